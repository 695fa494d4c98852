"""How far apart two tensors are, in blocks of any sizes."""

import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_core.distance import measure, same_bits
from ckpt_core.format import dtypes

NAN, INF = float("nan"), float("inf")


@given(st.lists(st.integers(1, 40), max_size=6), st.lists(st.integers(1, 40), max_size=6), st.integers(0, 100))
def test_blocks_need_not_meet(cuts: list[int], others: list[int], size: int) -> None:
    """However both are cut into blocks, each element is compared with its own, and one that differs is found."""

    def blocks(tensor: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
        ends = [0]
        for length in lengths:
            ends.append(min(size, ends[-1] + length))
        ends.append(size)
        return [tensor[a:b] for a, b in pairwise(ends) if a < b]

    a = torch.arange(float(size)) + 1
    b = a.clone()
    assert same_bits(blocks(a, cuts), blocks(b, others))
    if size:
        b[size // 2] = -1.0
        assert not same_bits(blocks(a, cuts), blocks(b, others))
        distance = measure(blocks(a, cuts), blocks(b, others))
        assert (distance.elements, distance.differing, distance.max_abs) == (size, 1, size // 2 + 2.0)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [name for name in dtypes.NAMES if name not in {"bool", "float8_e8m0fnu"}])
def test_the_figures(dtype: str) -> None:
    """Of every type: 3 and 4 become 0 and 4, so the norm of the difference is 3 of 5; bits count as numbers."""
    if dtype in dtypes.OPAQUE:
        bits = torch.int16 if dtypes.ITEMSIZE[dtype] == 2 else torch.uint8
        a, b = (torch.tensor(values, dtype=bits).view(getattr(torch, dtype)) for values in ([3, 4], [0, 4]))
    else:
        a, b = (torch.tensor(values).to(getattr(torch, dtype)) for values in ([3, 4], [0, 4]))
    distance = measure([a], [b])
    assert (distance.elements, distance.differing, distance.nonfinite) == (2, 1, 0)
    assert (distance.max_abs, distance.relative) == (3.0, pytest.approx(0.6))


def test_other_types_are_compared_by_value() -> None:
    """Rounding to another type is a distance, and no more."""
    a = torch.tensor([1.0, 1.0 + 2**-10])
    distance = measure([a], [a.bfloat16()])
    assert (distance.differing, distance.max_abs) == (1, 2**-10)


def test_nan_equals_nan() -> None:
    """NaN at one place in both is no difference; NaN or Inf in one is, and leaves the figures finite."""
    a = torch.tensor([NAN, NAN, INF, INF, -INF, 1.0])
    b = torch.tensor([NAN, 1.0, INF, -INF, 2.0, 1.5])
    distance = measure([a], [b])
    assert (distance.differing, distance.nonfinite, distance.max_abs, distance.relative) == (4, 3, 0.5, 0.5)
    assert json.loads(json.dumps(asdict(distance), allow_nan=False))["differing"] == 4


def test_bits_without_a_value() -> None:
    """Another sign of zero, or another payload of NaN, is no other value, but not equal bit for bit."""
    a, b = torch.tensor([0.0, NAN]), torch.tensor([-0.0, NAN])
    b.view(torch.int32)[1] += 1
    assert not same_bits([a], [b])
    assert measure([a], [b]).differing == 0


def test_large_integers_are_not_rounded() -> None:
    """Integers that are equal as 64-bit floats still differ."""
    a = torch.tensor([2**60], dtype=torch.int64)
    assert measure([a], [a + 1]).differing == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_has_no_number(dtype: str) -> None:
    """A relative distance from zero, and one that overflows, is None."""
    zero, one = torch.zeros(2, dtype=getattr(torch, dtype)), torch.ones(2, dtype=getattr(torch, dtype))
    assert measure([zero], [one]).relative is None
    huge = torch.full((2,), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert measure([huge], [-huge]).max_abs is None


def test_many_parts() -> None:
    """Sums go over all parts of a tensor that is larger than one."""
    a = torch.ones(1_000_000)
    distance = measure(a.split(300_000), (a * 2).split(70_000))
    assert (distance.differing, distance.max_abs) == (1_000_000, 1.0)
    assert distance.relative is not None
    assert math.isclose(distance.relative, 1.0)
