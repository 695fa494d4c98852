"""Element types: their names in torch, their names in safetensors, their size in bytes."""

from __future__ import annotations

_TABLE = {
    # torch         safetensors  bytes
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
    "complex64": ("C64", 8),
    "complex128": (None, 16),
    "complex32": (None, 4),
    # Below: torch has these types, and little that computes with them; what is stored is plain bytes all the same.
    "float4_e2m1fn_x2": (None, 1),
    **{f"{sign}int{bits}": (None, 1) for sign in ("", "u") for bits in range(1, 8)},
    **dict.fromkeys(("bits1x8", "bits2x4", "bits4x2", "bits8"), (None, 1)),
    "bits16": (None, 2),
}

NAMES = tuple(_TABLE)
ITEMSIZE = {name: size for name, (_, size) in _TABLE.items()}
SAFETENSORS = {name: code for name, (code, _) in _TABLE.items() if code is not None}
OPAQUE = frozenset(list(_TABLE)[list(_TABLE).index("float4_e2m1fn_x2") :])
"""Types that torch does not convert to others: only their bits can be compared."""

SAVED = frozenset(name for name in _TABLE if not name.startswith(("uint", "int", "bits")) or name in SAFETENSORS)
"""Types that DCP saves. Of integers of less than a byte, and of bare bits, torch does not know the size."""

FLOATING = frozenset(name for name in _TABLE if "float" in name)
QUANTIZED = frozenset({"qint8", "qint32", "quint8", "quint2x4", "quint4x2"})
"""Types whose elements mean nothing without a scale, which lies in the header of each chunk."""

STORAGE_CLASSES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}  # fmt: skip
"""The class names by which `torch.save` tells the element type of older dtypes."""
