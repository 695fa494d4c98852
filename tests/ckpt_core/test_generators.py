"""A stored state that its random number generator never has is refused before any generator takes it over."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from ckpt_core import trainer
from ckpt_core.errors import DamagedError


def _header(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _draw():
    return random.random(), np.random.standard_normal(), float(torch.rand(())), float(torch.randn(()))


@pytest.fixture
def stored(tmp_path):
    """The states as they are after some draws, and what is drawn next."""
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)
    _draw()
    (tmp_path / "rank_00000.safetensors").write_bytes(trainer.content({}, 0)["rank_00000.safetensors"])
    return tmp_path, _draw()


def _change(directory, change):
    path = directory / "rank_00000.safetensors"
    tensors, details = load(path.read_bytes()), json.loads(_header(path.read_bytes())["__metadata__"]["generators"])
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, details)
    path.write_bytes(save(tensors, metadata={"generators": json.dumps(details)}))


def test_what_is_drawn_next_comes_back(stored):
    """Generators go on where they were, kept halves of normal pairs included."""
    directory, expected = stored
    restore = trainer.stored_generators(directory, 0)
    assert restore is not None
    restore()
    assert _draw() == expected
    assert trainer.stored_generators(directory, 1) is None


def test_a_state_at_each_end_is_one_that_generators_have(stored):
    """Right after its seed and at its last word, a generator's position lies at an end of what is allowed."""
    directory, _ = stored
    for draws in (0, 623, 624, 625, 1248):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        for _ in range(draws):
            torch.randint(1 << 20, ())
            np.random.randint(1 << 20)
            random.getrandbits(20)
        (directory / "rank_00000.safetensors").write_bytes(trainer.content({}, 0)["rank_00000.safetensors"])
        assert trainer.stored_generators(directory, 0) is not None


def _torch_head(left, seeded, following):
    def change(tensors, _):
        head = torch.frombuffer(bytearray(struct.pack("<QiiQ", 1, left, seeded, following)), dtype=torch.uint8)
        tensors["torch"][: head.numel()] = head

    return change


def _set(name, place, value):
    def change(tensors, details):
        (details if name in details and place is not None else tensors)[name][place or 0] = value

    return change


def _replace(name, tensor):
    return lambda tensors, _: tensors.update({name: tensor})


IMPOSSIBLE = {
    **{f"numpy position {n!r}": _set("numpy", 0, n) for n in (5 * 10**8, 625, -1, 1.5, True, None, "1", 10**30)},
    **{f"numpy gauss {n!r}": _set("numpy", 2, n) for n in (float("nan"), "x", None)},
    "numpy has half a gauss": _set("numpy", 1, 2),
    "numpy word below 0": _set("numpy", None, -1),
    "numpy word of 33 bits": _set("numpy", None, 1 << 32),
    "numpy with a word less": _replace("numpy", torch.zeros(623, dtype=torch.int64)),
    "numpy of other integers": _replace("numpy", torch.zeros(624, dtype=torch.int32)),
    "numpy in two dimensions": _replace("numpy", torch.zeros(2, 312, dtype=torch.int64)),
    "python version 2": _set("python", 0, 2),
    "python gauss": _set("python", 1, [1]),
    "python word below 0": _set("python", None, -5),
    "python position": lambda tensors, _: tensors["python"].__setitem__(624, 625),
    "python with a word more": _replace("python", torch.zeros(626, dtype=torch.int64)),
    "torch beyond its words": _torch_head(624, 1, 624),
    "torch far beyond": _torch_head(1, 1, 1 << 60),
    "torch none left": _torch_head(0, 1, 0),
    "torch less than none": _torch_head(-1, 1, 0),
    "torch not seeded": _torch_head(1, 0, 0),
    "torch cut short": _replace("torch", torch.zeros(5055, dtype=torch.uint8)),
    "torch empty": _replace("torch", torch.zeros(0, dtype=torch.uint8)),
    "cuda cut short": _replace("cuda", torch.zeros(15, dtype=torch.uint8)),
    "cuda offset": _replace("cuda", torch.tensor([0] * 8 + [3] + [0] * 7, dtype=torch.uint8)),
    "cuda of floats": _replace("cuda", torch.zeros(4)),
    "no numpy": lambda tensors, _: tensors.pop("numpy"),
    "no details": lambda _, details: details.clear(),
    "details of another form": lambda _, details: details.update(python=3),
}  # fmt: skip


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_impossible_states(stored, change):
    """They are refused by name, and no generator was touched."""
    directory, _ = stored
    _change(directory, change)
    before = random.getstate(), np.random.get_state()[2:], torch.get_rng_state().tolist()
    with pytest.raises(DamagedError, match="rank_00000"):
        trainer.stored_generators(directory, 0)
    assert before == (random.getstate(), np.random.get_state()[2:], torch.get_rng_state().tolist())


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "[]", "1" * 5000, "{" + '"a":[],' * 10, "nul", "\xff"])
def test_counters_of_another_form(tmp_path, text):
    """Counters that are no JSON object, or nested without end, are damaged."""
    (tmp_path / "state.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedError, match=r"state\.json"):
        trainer.load(tmp_path)
