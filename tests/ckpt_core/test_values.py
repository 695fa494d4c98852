"""NaN and Inf are found by their bits, in elements of every type."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_core.format import dtypes
from ckpt_core.values import first_nonfinite

EIGHT_BITS = [name for name in dtypes.NAMES if name.startswith("float8")]
WIDE = ["float64", "float32", "float16", "bfloat16"]
INTEGERS = [name for name in dtypes.NAMES if "float" not in name and "complex" not in name]


def raw(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor's elements."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def bits_of(patterns: np.ndarray, dtype: str) -> torch.Tensor:
    """Return elements that have these bits."""
    return torch.from_numpy(patterns.view(f"i{patterns.itemsize}")).view(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_each_of_256_patterns_of_8_bits(dtype: str) -> None:
    """Of each pattern of an 8-bit type, the answer is torch's, after widening it to 32 bits."""
    for pattern in range(256):
        block = bytes([pattern])
        expected = bool(torch.isfinite(bits_of(np.array([pattern], "u1"), dtype).float()).all())
        assert (first_nonfinite(block, dtype) is None) == expected, hex(pattern)
        nan = bool(torch.isnan(bits_of(np.array([pattern], "u1"), dtype).float()).any())
        assert (first_nonfinite(block, dtype, only_nan=True) is not None) == nan, hex(pattern)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_of_65536_patterns_of_16_bits(dtype: str) -> None:
    """Of each pattern of a 16-bit type, the answer is torch's."""
    patterns = np.arange(1 << 16, dtype="u2")
    finite = torch.isfinite(bits_of(patterns, dtype).float()).numpy()
    assert first_nonfinite(patterns[finite].tobytes(), dtype) is None
    nan = torch.isnan(bits_of(patterns, dtype).float()).numpy()
    assert first_nonfinite(patterns[~nan].tobytes(), dtype, only_nan=True) is None
    for pattern in patterns[~finite]:
        assert first_nonfinite(pattern.tobytes(), dtype) == 0, hex(pattern)
    for pattern in patterns[nan]:
        assert first_nonfinite(pattern.tobytes(), dtype, only_nan=True) == 0, hex(pattern)


@pytest.mark.parametrize("dtype", [*WIDE, "complex64", "complex128"])
def test_the_edges_of_what_is_finite(dtype: str) -> None:
    """The largest, the smallest, denormals and both zeros are finite."""
    kind = getattr(torch, dtype)
    info = torch.finfo(kind)
    denormal = info.smallest_normal / 2
    edges = torch.tensor([info.max, info.min, info.tiny, -info.tiny, denormal, -denormal, 0.0, -0.0]).double()
    edges[:2] = torch.tensor([info.max, info.min], dtype=torch.float64)
    assert first_nonfinite(raw(edges.to(kind)), dtype) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -float("nan")])
@pytest.mark.parametrize("dtype", [*WIDE, "complex64", "complex128"])
@pytest.mark.parametrize("position", [0, 1, 700_001, 999_999])
def test_the_position_is_the_first_ones(dtype: str, value: float, position: int) -> None:
    """Wherever it stands, in the first part or the last, its position is told; of two, the first one's."""
    tensor = torch.ones(1_000_000, dtype=getattr(torch, dtype))
    tensor[position] = value
    tensor[-1] = value
    assert first_nonfinite(raw(tensor), dtype) == position


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_the_imaginary_part_counts(dtype: str) -> None:
    """NaN in the imaginary part alone makes its element one."""
    tensor = torch.zeros(5, dtype=getattr(torch, dtype))
    torch.view_as_real(tensor)[3, 1] = float("nan")
    assert first_nonfinite(raw(tensor), dtype) == 3


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        ("float32", 0x7F80_0001),
        ("float32", 0xFFFF_FFFF),
        ("float32", 0xFF80_0001),
        ("float64", 0x7FF0_0000_0000_0001),
        ("float64", 0xFFF8_DEAD_BEEF_0001),
        ("float64", 0xFFFF_FFFF_FFFF_FFFF),
    ],
)
def test_any_payload_of_nan(dtype: str, pattern: int) -> None:
    """Signalling and quiet NaN, of either sign and with any payload, are NaN."""
    width = dtypes.ITEMSIZE[dtype]
    assert first_nonfinite(bytes(2 * width) + pattern.to_bytes(width, "little"), dtype) == 2


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_finite(dtype: str) -> None:
    """No bits of an integer or a boolean are NaN."""
    assert first_nonfinite(b"\xff" * 64, dtype) is None


@pytest.mark.parametrize("dtype", dtypes.NAMES)
def test_nothing_is_finite(dtype: str) -> None:
    """A block of no elements has none."""
    assert first_nonfinite(b"", dtype) is None


def test_a_block_that_is_not_aligned() -> None:
    """A block may begin at any byte."""
    data = b"\0" + raw(torch.tensor([1.0, 2.0, float("inf")])).tobytes()
    assert first_nonfinite(memoryview(data)[1:], "float32") == 2


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_any_bits_of_32(words: list[int]) -> None:
    """Of any 32-bit patterns, the first that torch does not call finite is found."""
    patterns = np.array(words, "u4")
    wrong = np.flatnonzero(~torch.isfinite(bits_of(patterns, "float32")).numpy())
    assert first_nonfinite(patterns.tobytes(), "float32") == (int(wrong[0]) if wrong.size else None)
