"""Sharded models: saved by two gloo ranks with FSDP2, restored by one, two and three; and ranks that fail."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sharded_training
from gloo_ranks import Outcome, run_ranks, values
from small_models import assert_same

from ckpt_core import PyTorchCheckpoint, open_store
from ckpt_core.native_checkpoint import load_checkpoint

STEPS = 3


class Saved(NamedTuple):
    """What two ranks saved."""

    directory: Path
    whole: list[Any]
    draws: list[list[Any]]
    text: str

    def assert_restored(self, found: sharded_training.Restored) -> None:
        """Assert that what was restored, by either interface, is what was saved."""
        assert_same(found.whole, self.whole)
        assert_same(found.by_native, self.whole)
        assert found.counters == {"step": STEPS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return what two ranks saved through both interfaces."""
    directory = tmp_path_factory.mktemp("sharded")
    ranks = values(run_ranks(2, sharded_training.save, directory, STEPS))
    return Saved(directory, ranks[0][0], [draws for _, draws, _ in ranks], ranks[0][2])


def test_there_is_something_to_compare(saved: Saved) -> None:
    """The saved state is not the initial one, and each rank has random numbers of its own."""
    torch_model = saved.whole[0]
    assert torch_model["count"] == STEPS
    assert not torch_model["middle.weight"].equal(sharded_training.Training(seed=0).model.middle.weight)
    assert saved.draws[0][1:] != saved.draws[1][1:]


def test_two_ranks_restore_and_go_on_bit_for_bit(saved: Saved) -> None:
    """The same number of ranks restores everything, random numbers too, and ends where it would without a stop."""
    outcomes = values(run_ranks(2, sharded_training.restore_and_go_on, saved.directory, saved.text, STEPS))
    saved.assert_restored(outcomes[0][0])
    assert_same([restored.draws for restored, _ in outcomes], saved.draws)
    stopped, going = outcomes[0][1]
    assert_same(stopped, going)


def test_three_ranks_restore_what_two_saved(saved: Saved) -> None:
    """More ranks restore the same state, whatever rows each of them has; the third keeps its own random numbers."""
    outcomes = values(run_ranks(3, sharded_training.restore, saved.directory, saved.text))
    saved.assert_restored(outcomes[0])
    assert [restored.counters for restored in outcomes] == [{"step": STEPS}] * 3
    assert_same([restored.draws for restored in outcomes[:2]], saved.draws)


def test_one_process_restores_what_two_ranks_saved(saved: Saved) -> None:
    """Without a process group and without FSDP the same state is there, by both interfaces and as torch's dicts."""
    restored = sharded_training.restore(saved.directory, saved.text)
    saved.assert_restored(restored)
    assert_same(restored.draws, saved.draws[0])
    checkpoint = PyTorchCheckpoint.from_json(saved.text)
    assert_same(checkpoint["module_state_dict"], saved.whole[0])
    plain = sharded_training.Training(seed=1)
    plain.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    assert_same(plain.whole()[1], saved.whole[1])
    assert checkpoint["epochs"] == 5


def test_each_rank_writes_a_file_of_its_own(saved: Saved) -> None:
    """Two ranks leave `.metadata` and a file each, and nothing beside the directories."""
    native = saved.directory / "native"
    assert sorted(p.name for p in native.iterdir()) == ["optimizer", "weights"]
    for part in native.iterdir():
        assert sorted(p.name for p in part.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert open_store(saved.directory / "store").list("default")[0].manifest.world_size == 2


def test_an_error_on_one_rank_is_every_ranks_error(saved: Saved, tmp_path: Path) -> None:
    """Whatever fails on one rank, every rank raises, nothing is left, and the next save works: no rank hangs."""
    outcomes = run_ranks(2, sharded_training.fail, tmp_path, saved.directory / "native" / "weights")

    def all_raise(name: str, kind: str, text: str) -> None:
        for outcome in values(outcomes):
            assert kind in outcome[name].errors, (name, outcome[name])
            assert text in outcome[name].text, (name, outcome[name])

    for interface in ("store", "native"):
        all_raise(f"{interface}: cannot write", "OSError", "File too large")
        all_raise(f"{interface}: cannot collect", "ArgumentError", "lr")
        for name in ("cannot write", "cannot collect"):
            left = values(outcomes)[0][f"{interface}: {name}, left"]
            assert left == Outcome(["default"] if interface == "store" else []), name
    all_raise("steps", "CommitError", "disagree")
    all_raise("hyperparameters", "ArgumentError", "hyperparameters")
    all_raise("tokenizer fails", "RuntimeError", "no vocabulary")
    all_raise("load", "FileNotFoundError", "elsewhere")
    for outcome in values(outcomes):
        assert outcome["tokenizer fails, left"] == Outcome([])
        assert outcome["tokenizer"] == Outcome(["rank_0"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native", "store", "tokenizer"]
    assert [c.step for c in open_store(tmp_path / "store").list("default")] == [1]
    load_checkpoint(sharded_training.Training(seed=1).model, str(tmp_path / "native" / "weights"))
    assert [*tmp_path.rglob(".staging*"), *tmp_path.rglob(".saving*")] == []
