"""State dicts come back equal in value and type, or are refused when they are saved."""

import collections
import datetime
import enum
import io as python_io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ckpt_core import AsyncSaver, PyTorchCheckpoint, io, open_store
from ckpt_core.errors import ArgumentError, DamagedError
from ckpt_core.format.index import read_index
from ckpt_core.io.containers import KINDS_KEY, pack, unpack
from ckpt_core.io.nesting import nest
from ckpt_core.native_checkpoint import load_checkpoint, save_checkpoint

T = torch.arange(2.0)


class Color(enum.StrEnum):
    """A choice that is a text, too."""

    RED = "red"


class Pair(NamedTuple):
    """A tuple with names."""

    one: int
    two: int


class Text(str):
    """A text of another type."""


class Number(int):
    """A number of another type."""


class Attributes(dict[str, Any]):
    """A dict of another type."""


class Extra(nn.Linear):
    """A layer with a state of its own."""

    extra: Any = None

    def get_extra_state(self) -> Any:  # noqa: D102 - torch's
        return self.extra

    def set_extra_state(self, state: Any) -> None:  # noqa: D102 - torch's
        self.extra = state


def nested(depth: int) -> list[Any]:
    """Return lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def recursive() -> list[Any]:
    """Return a list that is its own entry."""
    value: list[Any] = []
    value.append(value)
    return value


def assert_equal(found: Any, expected: Any) -> None:
    """Assert that two values are equal, and of the same types throughout, keys and their order included."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert [(type(key), key) for key in found] == [(type(key), key) for key in expected]
        assert getattr(found, "default_factory", None) is getattr(expected, "default_factory", None)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, (torch.Tensor, np.ndarray)):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tolist() == expected.tolist()
    elif isinstance(expected, python_io.BytesIO):
        assert found.getvalue() == expected.getvalue()
    else:
        assert repr(found) == repr(expected)  # NaN, and the sign of zero


KEPT = [
    {0: 1.0, 1: T}, {True: 1, 2: {3: T}}, {None: 1, 1.5: 2, -0.0: 3}, {"a.b": 1, "/": {}, "": {"": 2}, "é": {1: 2}},
    {"a": {}}, {}, [], (), [{}], [[], [{}]], [T, {}], [{}, T, {}], [[{}], (T, ())],
    {"a": [{"b": ()}], "c": {1: {2: {}}}},
    (1, 2), [(1, 2), [3]], (T, [T, (1, {"a": T})]), torch.Size([1, 2]), [torch.Size([]), torch.float32],
    collections.Counter({2: 1, 6: 1}), collections.OrderedDict(b=1, a=T), collections.defaultdict(list, {3: [1]}),
    [collections.Counter(), collections.OrderedDict()], collections.defaultdict(None, a={}),
    {1, 2}, frozenset({1, 2}), [frozenset(), set()], b"ab", b"", bytearray(b"\0\xff"), python_io.BytesIO(b"fp8"),
    1 + 2j, 2**70, -(2**64), float("nan"), float("-inf"), -0.0, "\ud800", "x" * 70000,
    torch.bfloat16, torch.device("cuda:1"),
    np.float32(0.1), [np.float64(0.1), T], (np.int64(3), np.bool_(True)), np.complex64(1j),
    np.arange(6).reshape(2, 3).T, np.array(3.5), np.zeros((0, 2), np.float16),
    [[T, {"0": [1]}], None, {}], nested(60), None, 5, torch.tensor(7), torch.empty(0, 3),
]  # fmt: skip

REFUSED = [
    Color.RED, Text("a"), Number(3), Pair(1, 2), Attributes(a=1), [Pair(1, 2), T], {"a": {"b": Color.RED}},
    datetime.date(2026, 1, 2), Path("a"), range(3), object, len, 2**3000, nested(300), recursive(),
    {(1, 2): 3}, {b"k": 1}, {np.int64(1): 2}, {Color.RED: 1}, {Text("a"): 1}, {float("nan"): 1},
    {1: 1, "1": 2}, {"a.b": 1, "a": {"b": 2}}, collections.ChainMap({}), collections.defaultdict(lambda: 0),
    np.array(["a"]), np.array([None]), np.str_("a"), torch.empty(2, device="meta"), torch.eye(2).to_sparse(),
    torch.ones(2, dtype=torch.uint8).view(torch.int4), torch.ones(2, dtype=torch.uint8).view(torch.bits8),
    nn.UninitializedParameter(),
]  # fmt: skip


@pytest.mark.parametrize("value", KEPT, ids=lambda value: type(value).__name__)
def test_what_is_kept(tmp_path: Path, value: Any) -> None:
    """Whatever DCP's flattening loses of a value is restored, and what lies beside it keeps its place."""
    io.save({"model": pack({"first": 1, "value": value, "last": T}, "model")}, tmp_path / "dcp", twin=True)
    found = io.read_state(tmp_path / "dcp")["model"]
    assert list(found) == ["first", "value", "last"]
    assert_equal(found["value"], value)


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_is_refused(value: Any) -> None:
    """What would come back as something else is an error that names it."""
    with pytest.raises(ArgumentError, match=r"model\.state"):
        pack({"state": {"value": value}}, "model")


@pytest.mark.parametrize("place", ["extra state", "parameter group", "optimizer state", "scheduler"])
def test_it_is_the_same_everywhere_and_in_the_background(tmp_path: Path, place: str) -> None:
    """In a module, an optimizer and a scheduler, saved at once, natively or in the background: kept, or refused."""
    kept = {3: (T, {}), "dtype": torch.float16, "names": frozenset({1})}
    for value, refused in ((kept, False), (Color.RED, True)):
        module, optimizer, scheduler = parts(place, value)
        checkpoint = PyTorchCheckpoint(module, None, optimizer)

        def in_background(directory: Path, saved: Any = checkpoint, with_scheduler: Any = scheduler) -> None:
            with AsyncSaver(directory) as saver:
                saver.save(saved, step=1, scheduler=with_scheduler)

        ways = {
            "now": lambda directory, c=checkpoint, s=scheduler: c.save(directory, step=1, scheduler=s),
            "background": in_background,
            "native": lambda directory, m=module, o=optimizer, s=scheduler: save_checkpoint(
                m, str(directory / "w"), o, s, str(directory / "o")
            ),
        }
        for name, save in ways.items():
            directory = tmp_path / f"{name} {refused}"
            if refused:
                with pytest.raises(ArgumentError, match="Color"):
                    save(directory)
                assert not directory.exists() or open_store(directory).runs() == []
                continue
            save(directory)
            other, fresh, restored = parts(place, None)
            if name == "native":
                load_checkpoint(other, str(directory / "w"), fresh, restored, str(directory / "o"))
            else:
                [step] = open_store(directory).list("default")
                PyTorchCheckpoint.from_url(step.url).restore(other, fresh, scheduler=restored)
            assert_equal(value_of(place, other, fresh, restored), value)


def parts(place: str, value: Any) -> tuple[Extra, torch.optim.Optimizer, Any]:
    """Return a module, its optimizer after a step and a scheduler, one of which holds a value."""
    module = Extra(2, 2)
    optimizer = torch.optim.SGD([{"params": module.parameters(), "odd": value if place == "parameter group" else 0}])
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    if place == "extra state":
        module.extra = value
    elif place == "optimizer state":
        optimizer.state[module.weight]["odd"] = value
    elif place == "scheduler":
        scheduler.odd = value
    return module, optimizer, scheduler


def value_of(place: str, module: Extra, optimizer: torch.optim.Optimizer, scheduler: Any) -> Any:
    """Return the value that one of them holds."""
    return {
        "extra state": lambda: module.extra,
        "parameter group": lambda: optimizer.param_groups[0]["odd"],
        "optimizer state": lambda: optimizer.state[module.weight]["odd"],
        "scheduler": lambda: scheduler.odd,
    }[place]()


def test_a_record_stands_only_where_something_would_be_lost(tmp_path: Path) -> None:
    """Ordinary states have the names that stock DCP gives them and no record; one with a record is read by it too."""
    ordinary = {"w": T, "n": {"betas": (0.9, 0.99), "list": [1, 2], "nested": [T, {"a": 1}]}}
    assert pack(ordinary, "model").keys() == ordinary.keys()
    packed = pack({"w": T, "milestones": collections.Counter({2: 1})}, "model")
    io.save({"model": packed}, tmp_path / "dcp")
    assert read_index(tmp_path / "dcp").paths["model.milestones.2"] == ("model", "milestones", "2")
    template = {"model": {"w": torch.zeros(2), "milestones": {"2": 0}}}
    dcp.state_dict_loader._load_state_dict(template, dcp.FileSystemReader(tmp_path / "dcp"), no_dist=True)
    assert torch.equal(template["model"]["w"], T)
    assert template["model"]["milestones"] == {"2": 1}


@pytest.mark.parametrize(
    "record",
    ["", "{", "1", "[]x", '["a"]', '[["value", ["dict"]]]', '[["value", ["dict", [["x", null]]]]]', '[["value", 3]]',
     '[["value", ["numpy", "object"]]]', '[["value", ["unknown"]]]', "[" * 100_000, '[["value", ["tuple", [null]]]]',
     '[["other", null], ["value", null]]', '[["value", ["defaultdict", [["a", null]], "os"]]]'],
)  # fmt: skip
def test_a_damaged_record(record: str) -> None:
    """A record that does not fit what is stored is damage, whatever it says."""
    with pytest.raises(DamagedError, match=r"model"):
        unpack({"value": {"a": 1}, KINDS_KEY: record}, "model")


def test_a_path_without_end_is_damage() -> None:
    """Metadata that nests an entry thousands of levels deep is refused."""
    with pytest.raises(DamagedError, match="levels deep"):
        nest({"a": 1}, {"a": ("k",) * 50_000}, "here")
