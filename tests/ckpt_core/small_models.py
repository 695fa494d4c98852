"""Models of a few hundred numbers, steps for them, and a comparison that overlooks nothing."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def layers(seed: int = 0) -> nn.ModuleList:
    """Return four layers, one of them without parameters."""
    torch.manual_seed(seed)
    return nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1)])


def forward(model: nn.ModuleList) -> torch.Tensor:
    """Return the sum of what the layers, one after the other, make of random numbers."""
    x = torch.randn(3, 4)
    for layer in model:
        x = layer(x)
    return x.sum()


def train(model: nn.ModuleList, optimizer: torch.optim.Optimizer, scheduler: Any = None, steps: int = 2) -> None:
    """Take steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        forward(model).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def snapshot(*objects: Any) -> list[Any]:
    """Return copies of the state dicts of what is given."""
    return [copy.deepcopy(thing.state_dict()) for thing in objects if thing is not None]


def assert_same(found: Any, expected: Any, where: str = "state") -> None:
    """Assert that two nested states are equal: values bit for bit, types, shapes, and the order of keys."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: a {type(found)}"
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
        return
    assert type(found) is type(expected), f"{where}: {type(found)}, expected {type(expected)}"
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{place}]")
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
        assert torch.equal(one, other), where
    else:
        assert found == expected, where
