"""Ranks that disagree: what is not the same on all of them is refused by its name, promptly, on all of them."""

from pathlib import Path

import disagreeing_ranks
import pytest
import torch
from gloo_ranks import Outcome, run_ranks, values

from ckpt_core import PyTorchCheckpoint, io, open_store
from ckpt_core.io.agreement import _content


def assert_refused(outcomes: list[dict[str, Outcome]], expected: dict[str, str]) -> None:
    """Assert that every call failed on every rank, with a text in its error."""
    for number, said in enumerate(outcomes):
        for name, text in expected.items():
            assert said[name].errors, (number, name)
            assert text in said[name].text, (number, name, said[name].text)


def test_a_save_that_ranks_disagree_on_is_refused(tmp_path: Path) -> None:
    """Arguments, modules, optimizers or weights that differ are named by both ranks; then a good save goes well."""
    outcomes = values(run_ranks(2, disagreeing_ranks.save, tmp_path, seconds=120))
    expected = {
        "run": "run: rank 0 has a, rank 1 has b",
        "store": "the store",
        "unknown store": "nosuchscheme",
        "step": "step: rank 0 has 1, rank 1 has 2",
        "module": "module",
        "optimizer": "optimizer",
        "scheduler": "scheduler",
        "trainer": "trainer",
        "counters": "trainer['position']: rank 0 has 0, rank 1 has 1",
        "metrics": "metrics['loss']: rank 0 has none, rank 1 has 1.0",
        "lineage": "lineage['from']",
        "assets": "assets",
        "hyperparameters": "hyperparameters['local_rank']",
        "stages": "disagree on model.last.bias: rank 0 has a tensor",
        "dtype": "bfloat16",
        "shape": "model.last.bias",
        "weights": "disagree on model.first.weight",
        "in background": "disagree on model.first.weight",
        "groups": "disagree on optim.",
        "native weights": "disagree on model.first.weight",
        "native optimizer": "optimizer",
        "native path": "optimizer_path",
    }
    assert_refused(outcomes, expected)
    assert {said["at last"].value for said in outcomes} == {(tmp_path / "default" / "step_0000000002").as_uri()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["default"]
    assert [checkpoint.step for checkpoint in open_store(tmp_path).list("default")] == [2]
    saved = PyTorchCheckpoint.from_url(tmp_path / "default" / "step_0000000002")
    assert saved["module_state_dict"]["seen"].tolist() == [1.0, 1.0], "not rank 0's buffer"


def test_parts_that_make_no_whole_are_refused(tmp_path: Path) -> None:
    """What one rank's part, replica or value would stand for is named; nothing that can be opened is left."""
    outcomes = values(run_ranks(2, disagreeing_ranks.save_parts, tmp_path))
    expected = {
        "a tuple of parts": "pair",
        "a sum": "sum",
        "replicas": "replica: ranks 0 and 1 hold replicas",
        "a large tensor": "large",
        "a value": "value: rank 0 has int 0",
        "a set": "value",
        "kind": "disagree on w",
        "parts of another size": "odd",
        "dtype by dcp": "w: the ranks disagree: torch.float32 (8,) on rank 0, torch.bfloat16 (8,) on rank 1",
        "without collectives": "use_collectives=False",
        "alone": "w: the chunks hold 4 elements, the shape (8,) has 8",
        "alone by dcp": "w: the chunks hold 4 elements, the shape (8,) has 8",
    }
    assert_refused(outcomes, expected)
    assert not (tmp_path / "none").exists()
    assert [path.parent.name for path in tmp_path.rglob(".metadata")] == ["same"]


def test_a_restore_that_ranks_disagree_on_is_refused(tmp_path: Path) -> None:
    """An error of one rank is an error of both at once, an interrupt too, and the process group can be used on."""
    outcomes = values(run_ranks(2, disagreeing_ranks.restore, tmp_path))
    expected = {
        "module": "module: rank 0 has given, rank 1 has none",
        "optimizer": "optimizer",
        "scheduler alone": "scheduler",
        "checkpoint": "the checkpoint",
        "groups": "the groups are divided otherwise",
        "model": "last",
        "native optimizer": "optimizer",
        "native path": "optimizer_path",
    }
    assert_refused(outcomes, expected)
    assert outcomes[1]["interrupt"].errors[0] == "KeyboardInterrupt"
    assert "KeyboardInterrupt" in outcomes[0]["interrupt"].text
    assert [said["at last"] for said in outcomes] == [Outcome({})] * 2


@pytest.mark.parametrize("value", [1, 1.0, True, "1", b"1", None, (1,), [1], {1}, {"1": 1}, torch.ones(1), 1 + 0j])
def test_equal_values_have_equal_digests(value: object) -> None:
    """Equal values are the same to all ranks whatever objects they are made of; of others none is."""
    text = "".join(["a", "b"])
    assert _content(["ab", "ab", value], "v") == _content([text, "ab", value], "v")
    others = [2, 2.0, False, "2", (), [], {2}, {"1": 2}, torch.zeros(1), torch.ones(1, dtype=torch.int64)]
    assert _content(value, "v") not in {_content(other, "v") for other in others}


def test_a_difference_between_samples_is_not_seen_and_any_other_is() -> None:
    """Of a tensor over 1 MiB, samples are compared, the first and the last elements among them."""
    tensor = torch.zeros(disagreeing_ranks.LARGE)
    digest = _content(tensor, "w")
    for place in (0, disagreeing_ranks.LARGE - 1):
        other = tensor.clone()
        other[place] = 1
        assert _content(other, "w") != digest
    assert _content(tensor.reshape(2, -1), "w") != digest
    assert _content(tensor + 1, "w") != digest


def test_one_process_saves_what_it_has(tmp_path: Path) -> None:
    """Without a process group nothing is compared, and a set or tuple of numbers is a value like any other."""
    io.save({"w": torch.ones(2), "pair": (1, 2)}, tmp_path / "dcp")
    assert io.read_state(tmp_path / "dcp")["pair"] == (1, 2)
