"""Names that pickles ask for, and whether what bears them could run code."""

from __future__ import annotations

import sys

_DATA: dict[str, frozenset[str]] = {
    "_codecs": frozenset({"encode"}),
    "_io": frozenset({"BytesIO", "StringIO"}),
    "argparse": frozenset({"Namespace"}),
    "array": frozenset({"array", "_array_reconstructor"}),
    "collections": frozenset({
        "ChainMap", "Counter", "IterableUserDict", "OrderedDict", "UserDict", "UserList", "UserString", "defaultdict",
        "deque",
    }),
    "copyreg": frozenset({"__newobj__", "__newobj_ex__", "_reconstructor"}),
    "datetime": frozenset({"date", "datetime", "time", "timedelta", "timezone"}),
    "decimal": frozenset({"Decimal"}),
    "fractions": frozenset({"Fraction"}),
    "io": frozenset({"BytesIO", "StringIO"}),
    "ipaddress": frozenset({"IPv4Address", "IPv6Address"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}),
    "random": frozenset({"Random"}),
    "time": frozenset({"struct_time"}),
    "types": frozenset({"MappingProxyType", "SimpleNamespace"}),
    "uuid": frozenset({"SafeUUID", "UUID"}),
    "zoneinfo": frozenset({"ZoneInfo", "ZoneInfo._unpickle"}),
    "builtins": frozenset({
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
        "slice", "str", "tuple", "unicode", "long", "xrange", "Ellipsis", "NotImplemented",
    }),
}  # fmt: skip
"""Of the standard library, what only holds data. All else of it may run code, when it is called or only imported."""

_OTHER_NAMES = {
    "__builtin__": "builtins", "exceptions": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib",
    **dict.fromkeys(("UserDict", "UserList", "UserString"), "collections"),
}  # fmt: skip
"""What Python 2, and pickles that it can read, call these modules, and Python 3.13."""

_INERT_FUNCTIONS = frozenset({
    ("torch.serialization", "_get_layout"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    *(("torch", name) for name in (
        "channels_last", "channels_last_3d", "contiguous_format", "device", "dtype", "layout", "memory_format",
        "per_channel_affine", "per_channel_affine_float_qparams", "per_channel_symmetric", "per_tensor_affine",
        "per_tensor_symmetric", "preserve_format", "sparse_bsc", "sparse_bsr", "sparse_coo", "sparse_csc", "sparse_csr",
        "strided",
    )),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("dtype", "matrix", "memmap", "ndarray", "recarray", "record", "void")),
    *((f"numpy.{place}", n) for place in ("rec", "core.records", "_core.records") for n in ("recarray", "record")),
    ("numpy.matrixlib.defmatrix", "matrix"), ("numpy.ma.core", "_mareconstruct"),
    *(("numpy.random._pickle", f"__{kind}_ctor") for kind in ("bit_generator", "generator", "randomstate")),
})  # fmt: skip
_RUNNING = (
    "IPython", "_pytest", "cffi", "cloudpickle", "dill", "distutils", "fabric", "invoke", "jaxlib", "joblib",
    "llvmlite", "numba", "numpy.distutils", "numpy.f2py", "numpy.testing", "paramiko", "pexpect", "pip",
    "pkg_resources", "pytest", "sh", "setuptools", "torch._dynamo", "torch._inductor", "torch.fx", "torch.hub",
    "torch.jit", "torch.package", "torch.utils.cpp_extension", "triton",
)  # fmt: skip
"""Packages whose classes run, compile or load code, too."""

_REBUILD = "_rebuild_"
"""How torch's functions that put tensors together are called; all of them are in `torch._utils`."""


def may_run_code(module: str, name: str) -> bool:
    """Whether loading a pickle that asks for `module.name` could run code beyond the making of an object.

    An unknown function may do anything. An unknown class is taken to hold data: nothing here loads it either, so this
    decides no more than what is said of the file.
    """
    module = _OTHER_NAMES.get(module, module)
    if name in _DATA.get(module, ()) or (module, name) in _INERT_FUNCTIONS:
        return False
    if module == "torch._utils" and name.startswith(_REBUILD):
        return False
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names or _is_below(module, _RUNNING):
        return not (module == "builtins" and name.endswith(("Error", "Exception", "Warning")))
    if module == "torch" and name.islower() and any(character.isdigit() for character in name):
        return False  # an element type that this library has no name for
    return not all(part.lstrip("_")[:1].isupper() for part in name.split("."))


def _is_below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
