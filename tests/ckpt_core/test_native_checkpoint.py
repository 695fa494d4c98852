"""save_checkpoint, load_checkpoint and the two states: NeMo-RL's interface, in one process."""

import fcntl
import inspect
import os
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import gloo_ranks
import pytest
import torch
import torch.distributed.checkpoint as dcp
from children import FailingWords, Words, save_tokenizer_on_each_rank, save_when_continued, training
from small_models import assert_same, forward, layers, snapshot
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from tracing import CHANGING, NAMING, can_trace, kill_everywhere

from ckpt_core import PyTorchCheckpoint, native_checkpoint
from ckpt_core.errors import ArgumentError, CommitError, DamagedError, MismatchError, NotACheckpointError
from ckpt_core.format.index import read_index
from ckpt_core.native_checkpoint import ModelState, OptimizerState, load_checkpoint, save_checkpoint

NAMES = [f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")]


def stock_save(state: dict[str, Any], path: Path) -> None:
    """Save with plain torch.distributed.checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(state, checkpoint_id=path)


def stock_load(state: dict[str, Any], path: Path) -> None:
    """Load with plain torch.distributed.checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path)


def files_in(path: Path) -> list[str]:
    """Return the names of everything below a directory."""
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


class TestSignatures:
    """What NeMo-RL's callers may pass."""

    def test_they_are_the_contracts(self) -> None:
        """Names, order and defaults of all arguments are NeMo-RL's."""
        optimizer = ["optimizer=None", "scheduler=None", "optimizer_path=None"]
        expected = {
            "save_checkpoint": ["model", "weights_path", *optimizer, "tokenizer=None", "tokenizer_path=None"],
            "load_checkpoint": ["model", "weights_path", *optimizer, "prefix=None"],
            "convert_dcp_to_hf": [
                "dcp_ckpt_path",
                "hf_ckpt_path",
                "model_name_or_path",
                "tokenizer_name_or_path",
                "overwrite=False",
                "hf_overrides={}",
            ],
            "save_tokenizer_on_rank0": ["tokenizer", "tokenizer_path"],
            "ModelState": ["model"],
            "OptimizerState": ["model", "optimizer", "scheduler=None"],
        }
        assert sorted(native_checkpoint.__all__) == sorted(expected)
        for name, arguments in expected.items():
            signature = inspect.signature(getattr(native_checkpoint, name))
            found = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in signature.parameters.values()]
            assert found == arguments, name
            ours = {p.name for p in signature.parameters.values() if p.kind == inspect.Parameter.KEYWORD_ONLY}
            assert ours == ({"prefix"} if name == "load_checkpoint" else set())
            kinds = {p.kind for p in signature.parameters.values() if p.name not in ours}
            assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
        assert inspect.signature(save_checkpoint).return_annotation == "None"
        assert inspect.signature(native_checkpoint.convert_dcp_to_hf).return_annotation == "str"


class TestTokenizerOnRank0:
    """`save_tokenizer_on_rank0`, which NeMo-RL's workers call by themselves."""

    def test_without_ranks_it_is_saved_at_the_given_path(self, tmp_path: Path) -> None:
        """The tokenizer is given the very path, and its error is raised as it is."""
        tokenizer = MagicMock()
        native_checkpoint.save_tokenizer_on_rank0(tokenizer, "/a/path")
        tokenizer.save_pretrained.assert_called_once_with("/a/path")
        with pytest.raises(PermissionError, match="not yours"):
            native_checkpoint.save_tokenizer_on_rank0(FailingWords(), str(tmp_path))

    def test_one_of_two_ranks_writes_and_both_see_it(self, tmp_path: Path) -> None:
        """Two that wrote would meet; the one that does not write returns when the files are there."""
        outcomes = gloo_ranks.run_ranks(2, partial(save_tokenizer_on_each_rank, fail=False), str(tmp_path))
        assert gloo_ranks.values(outcomes) == [["extra", "extra/merges.txt", "tokenizer.json"]] * 2

    def test_an_error_on_rank_0_is_one_on_all(self, tmp_path: Path) -> None:
        """No rank waits for one that failed, or goes on as if it had not."""
        outcomes = gloo_ranks.run_ranks(2, partial(save_tokenizer_on_each_rank, fail=True), str(tmp_path))
        assert [(outcome.errors[0], "not yours" in outcome.text) for outcome in outcomes] == [
            ("PermissionError", True)
        ] * 2

    @pytest.mark.parametrize("rank", [0, 1, 31])
    def test_callers_may_stand_in_for_ranks(self, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
        """With the functions of torch replaced, as in tests of trainers, rank 0 saves, and every rank waits once."""
        waits: list[int] = []
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
        monkeypatch.setattr("torch.distributed.barrier", lambda: waits.append(rank))
        tokenizer = MagicMock()
        native_checkpoint.save_tokenizer_on_rank0(tokenizer, "/a/path")
        assert (tokenizer.save_pretrained.call_count, waits) == (int(rank == 0), [rank])

    def test_a_checkpoints_tokenizer_goes_the_same_way(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`save_checkpoint` on a stand-in for rank 3 saves the model by `dcp.save`, once, and no tokenizer."""
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
        monkeypatch.setattr("torch.distributed.barrier", lambda: None)
        saved = MagicMock()
        monkeypatch.setattr("torch.distributed.checkpoint.save", saved)
        tokenizer = MagicMock()
        paths = {"weights_path": str(tmp_path / "weights"), "tokenizer_path": str(tmp_path / "tokenizer")}
        save_checkpoint(layers(), tokenizer=tokenizer, **paths)
        saved.assert_called_once()
        tokenizer.save_pretrained.assert_not_called()


class TestStates:
    """ModelState and OptimizerState, as torch.distributed.checkpoint uses them."""

    def test_a_models_state_has_its_names_and_takes_any_values(self) -> None:
        """The state has the parameters' names; what is loaded is there afterwards."""
        state = ModelState(layers())
        assert isinstance(state, Stateful)
        found = state.state_dict()
        assert list(found) == NAMES
        other = {name: torch.randn(tensor.shape) for name, tensor in found.items()}
        expected = {name: tensor.clone() for name, tensor in other.items()}
        state.load_state_dict(other)
        assert_same(state.state_dict(), expected)

    def test_an_optimizer_that_never_stepped_has_a_state_for_every_name(self) -> None:
        """Its state has `optim`, by name and complete, and `sched`; it takes any values; it is left as it was."""
        model, optimizer, scheduler = training(steps=0)
        before = snapshot(model, optimizer, scheduler)
        state = OptimizerState(model, optimizer, scheduler)
        assert isinstance(state, Stateful)
        found = state.state_dict()
        assert_same(snapshot(model, optimizer, scheduler), before)
        assert list(found) == ["optim", "sched"]
        assert sorted(found["optim"]["state"]) == sorted(NAMES)
        assert [sorted(entry) for entry in found["optim"]["state"].values()] == [["exp_avg", "exp_avg_sq", "step"]] * 6
        assert found["optim"]["param_groups"][0]["params"] == NAMES
        for entry in found["optim"]["state"].values():
            entry.update({key: torch.rand(value.shape) for key, value in entry.items()})
        found["sched"]["last_epoch"] = 7
        state.load_state_dict(found)
        assert_same(state.state_dict(), found)
        assert scheduler.last_epoch == 7

    def test_without_a_scheduler_there_is_no_sched(self) -> None:
        """A scheduler's state is there if and only if a scheduler is; one on the loading side alone is left."""
        model, optimizer, scheduler = training()
        state = OptimizerState(model, optimizer).state_dict()
        assert list(state) == ["optim"]
        before = snapshot(scheduler)
        OptimizerState(model, optimizer, scheduler).load_state_dict(state)
        assert_same(snapshot(scheduler), before)


class TestSaveAndLoad:
    """One process's checkpoints."""

    @pytest.mark.parametrize("steps", [0, 3])
    def test_everything_comes_back(self, tmp_path: Path, steps: int) -> None:
        """Model, optimizer and scheduler of others are equal to those saved, which saving left as they were."""
        saved = training(steps=steps)
        before = snapshot(*saved)
        model, optimizer, scheduler = saved
        paths = str(tmp_path / "run" / "model"), str(tmp_path / "run" / "optimizer")
        assert save_checkpoint(model, paths[0], optimizer, scheduler, optimizer_path=paths[1]) is None
        assert_same(snapshot(*saved), before)
        assert files_in(tmp_path) == [
            "run",
            *(f"run/{part}{name}" for part in ("model", "optimizer") for name in ("", "/.metadata", "/__0_0.distcp")),
        ]
        other, fresh, _ = training(steps=1, seed=1)
        schedule = torch.optim.lr_scheduler.StepLR(fresh, step_size=4, gamma=0.2)
        assert load_checkpoint(other, paths[0], fresh, schedule, optimizer_path=paths[1]) is None
        assert_same(snapshot(other, fresh, schedule), before)

    def test_a_model_alone_leaves_two_files(self, tmp_path: Path) -> None:
        """One rank leaves exactly `.metadata` and `__0_0.distcp`."""
        save_checkpoint(layers(), str(tmp_path / "weights"))
        assert files_in(tmp_path) == ["weights", "weights/.metadata", "weights/__0_0.distcp"]

    def test_the_stored_crc32_is_true(self, tmp_path: Path) -> None:
        """What is written carries its checksum: a flipped bit is found when it is loaded."""
        model = layers()
        save_checkpoint(model, str(tmp_path / "weights"))
        shard = tmp_path / "weights" / "__0_0.distcp"
        data = bytearray(shard.read_bytes())
        place = data.find(model[0].weight.detach().numpy().tobytes())
        data[place + 5] ^= 8
        shard.write_bytes(data)
        with pytest.raises(DamagedError, match="CRC32"):
            load_checkpoint(layers(), str(tmp_path / "weights"))

    def test_missing_paths_are_value_errors_before_anything_is_written(self, tmp_path: Path) -> None:
        """An optimizer without optimizer_path and a tokenizer without tokenizer_path are refused at once."""
        model, optimizer, _ = training()
        weights = str(tmp_path / "weights")
        with pytest.raises(ValueError, match="optimizer_path"):
            save_checkpoint(model, weights, optimizer)
        with pytest.raises(ValueError, match="tokenizer_path"):
            save_checkpoint(model, weights, tokenizer=Words())
        assert list(tmp_path.iterdir()) == []
        save_checkpoint(model, weights)
        before = snapshot(model)
        with pytest.raises(ValueError, match="optimizer_path"):
            load_checkpoint(model, weights, optimizer)
        assert_same(snapshot(model), before)

    def test_a_path_that_is_taken_is_refused_and_nothing_is_written(self, tmp_path: Path) -> None:
        """A checkpoint, a file or any full directory at either path is a FileExistsError; an empty one is taken."""
        model, optimizer, _ = training()
        taken, free = tmp_path / "taken", tmp_path / "free"
        save_checkpoint(model, str(taken))
        (tmp_path / "file").write_text("a")
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        for weights, optimizer_path in ((taken, free), (free, taken), (tmp_path / "file", free)):
            with pytest.raises(FileExistsError, match=r"taken|file"):
                save_checkpoint(model, str(weights), optimizer, optimizer_path=str(optimizer_path))
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        free.mkdir()
        save_checkpoint(model, str(free), optimizer, optimizer_path=str(tmp_path / "optimizer"))
        load_checkpoint(model, str(free), optimizer, optimizer_path=str(tmp_path / "optimizer"))

    @pytest.mark.parametrize(
        ("weights", "optimizer_path", "tokenizer_path"),
        [
            ("step", "step/optimizer", "step/tokenizer"),
            ("step/weights", "step", "step/tokenizer"),
            ("step/weights", "step/optimizer", "step"),
            ("step", "step/optimizer", "step"),
            ("a/b/weights", "c/optimizer", "a/b"),
        ],
    )
    def test_paths_may_lie_inside_each_other(
        self, tmp_path: Path, weights: str, optimizer_path: str, tokenizer_path: str
    ) -> None:
        """Whichever path holds which, each gets its files, and nothing else is left."""
        saved = training()
        model, optimizer, scheduler = saved
        path = {"weights_path": weights, "optimizer_path": optimizer_path, "tokenizer_path": tokenizer_path}
        path = {name: str(tmp_path / place) for name, place in path.items()}
        save_checkpoint(model, optimizer=optimizer, scheduler=scheduler, tokenizer=Words(), **path)
        files = {f"{place}/{name}" for place in (weights, optimizer_path) for name in (".metadata", "__0_0.distcp")}
        files |= {f"{tokenizer_path}/tokenizer.json", f"{tokenizer_path}/extra/merges.txt"}
        assert {name for name in files_in(tmp_path) if (tmp_path / name).is_file()} == files
        restored = training(seed=1)
        load_checkpoint(restored[0], path["weights_path"], *restored[1:], path["optimizer_path"])
        assert_same(snapshot(*restored), snapshot(*saved))

    def test_the_same_path_for_two_things_is_an_error(self, tmp_path: Path) -> None:
        """Model and optimizer in one directory would mix: refused, with nothing written."""
        model, optimizer, _ = training()
        with pytest.raises(ArgumentError, match="two things"):
            save_checkpoint(model, str(tmp_path / "a"), optimizer, None, str(tmp_path / "b" / ".." / "a"))
        assert list(tmp_path.iterdir()) == []

    def test_a_tokenizers_directory_may_have_files(self, tmp_path: Path) -> None:
        """The tokenizer's files are put among what is there."""
        place = tmp_path / "tokenizer"
        place.mkdir()
        (place / "mine").write_text("a")
        (place / "tokenizer.json").write_text("old")
        save_checkpoint(layers(), str(tmp_path / "weights"), tokenizer=Words(), tokenizer_path=str(place))
        assert files_in(place) == ["extra", "extra/merges.txt", "mine", "tokenizer.json"]
        assert (place / "tokenizer.json").read_text() == "{}"

    def test_the_two_may_lie_on_different_file_systems(self, tmp_path: Path) -> None:
        """The optimizer's directory is made on its own file system."""
        shared_memory = Path("/dev/shm")
        if not os.access(shared_memory, os.W_OK) or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("needs /dev/shm on a file system of its own")
        elsewhere = shared_memory / f"ckptflow-{os.getpid()}"
        model, optimizer, _ = training()
        try:
            save_checkpoint(model, str(tmp_path / "weights"), optimizer, None, str(elsewhere / "optimizer"))
            assert files_in(elsewhere) == ["optimizer", "optimizer/.metadata", "optimizer/__0_0.distcp"]
        finally:
            shutil.rmtree(elsewhere, ignore_errors=True)

    def test_an_error_in_the_middle_leaves_nothing(self, tmp_path: Path) -> None:
        """What fails after the optimizer is written, here a state that cannot be stored, leaves no path behind."""

        class Odd(nn.Linear):
            def get_extra_state(self) -> Any:
                return {"odd": object()}

        model = Odd(2, 2)
        optimizer = torch.optim.Adam(model.parameters())
        with pytest.raises(ArgumentError, match=r"_extra_state\.odd"):
            save_checkpoint(
                model, str(tmp_path / "w"), optimizer, None, str(tmp_path / "o"), Words(), str(tmp_path / "t")
            )
        assert list(tmp_path.iterdir()) == []

    def test_an_optimizer_of_other_shapes_is_refused(self, tmp_path: Path) -> None:
        """State of parameters with the same names and other shapes is a MismatchError, and changes nothing."""
        for width in (2, 3):
            model = nn.Linear(4, width)
            optimizer = torch.optim.Adam(model.parameters())
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            save_checkpoint(model, str(tmp_path / f"w{width}"), optimizer, None, str(tmp_path / f"o{width}"))
        before = snapshot(optimizer)
        with pytest.raises(MismatchError, match=r"has shape \(2"):
            load_checkpoint(model, str(tmp_path / "w3"), optimizer, None, str(tmp_path / "o2"))
        assert_same(snapshot(optimizer), before)

    def test_new_parents_survive_a_power_cut(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every directory that gets a new entry is flushed, up to the one that was there before."""
        real, flushed = os.fsync, set[Path]()
        monkeypatch.setattr(os, "fsync", lambda fd: (flushed.add(Path(f"/proc/self/fd/{fd}").readlink()), real(fd)))
        save_checkpoint(layers(), str(tmp_path / "a" / "b" / "weights"))
        assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= flushed

    def test_two_savers_at_one_path_do_not_meet(self, tmp_path: Path) -> None:
        """While another process saves there, a save is refused, and leaves the other's files alone."""
        staged = tmp_path / ".staging-weights-1"
        staged.mkdir()
        record = tmp_path / ".saving-weights"
        record.write_text(f'["{staged}", null]\n')
        with record.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(CommitError, match="another process"):
                save_checkpoint(layers(), str(tmp_path / "weights"))
        assert files_in(tmp_path) == [".saving-weights", ".staging-weights-1"]
        save_checkpoint(layers(), str(tmp_path / "weights"))
        assert files_in(tmp_path) == ["weights", "weights/.metadata", "weights/__0_0.distcp"]


class TestOtherWriters:
    """What plain torch.distributed.checkpoint and other frameworks write, and read."""

    @pytest.mark.parametrize("steps", [0, 3])
    def test_plain_dcp_reads_what_is_saved(self, tmp_path: Path, steps: int) -> None:
        """dcp.load with the two states, and with a bare state dict, reads both directories."""
        saved = training(steps=steps)
        save_checkpoint(saved[0], str(tmp_path / "w"), *saved[1:], str(tmp_path / "o"))
        model, optimizer, scheduler = training(steps=0, seed=1)
        forward(model).backward()  # gradients do not keep the optimizer from having a state to load into
        stock_load({"model": ModelState(model)}, tmp_path / "w")
        stock_load({"optim": OptimizerState(model, optimizer, scheduler)}, tmp_path / "o")
        assert_same(snapshot(model, scheduler), snapshot(saved[0], saved[2]))
        if steps:
            assert_same(snapshot(optimizer), snapshot(saved[1]))
        bare = {"model": {name: torch.zeros_like(tensor) for name, tensor in saved[0].state_dict().items()}}
        stock_load(bare, tmp_path / "w")
        assert_same(bare["model"], dict(saved[0].state_dict()))

    def test_numbers_for_keys_that_plain_dcp_made_text_of_are_numbers_again(self, tmp_path: Path) -> None:
        """A schedule of milestones within others goes on from what stock DCP saved, by us and by its own `load`."""
        rates = torch.optim.lr_scheduler

        def make() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
            model = layers()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            return (
                model,
                optimizer,
                rates.ChainedScheduler([rates.LinearLR(optimizer), rates.MultiStepLR(optimizer, [5])]),
            )

        def go_on(optimizer: torch.optim.Optimizer, scheduler: Any) -> list[float]:
            found: list[float] = []
            for _ in range(3):
                optimizer.step()
                scheduler.step()
                found.append(optimizer.param_groups[0]["lr"])
            return found

        model, optimizer, scheduler = make()
        go_on(optimizer, scheduler)
        stock_save({"model": model.state_dict()}, tmp_path / "w")
        stock_save({"optim": OptimizerState(model, optimizer, scheduler)}, tmp_path / "o")
        expected = go_on(optimizer, scheduler)
        assert expected[0] > 5 * expected[-1]
        other, fresh, restored = make()
        load_checkpoint(other, str(tmp_path / "w"), fresh, restored, str(tmp_path / "o"))
        assert go_on(fresh, restored) == expected
        other, fresh, restored = make()
        stock_load({"optim": OptimizerState(other, fresh, restored)}, tmp_path / "o")
        assert go_on(fresh, restored) == expected

    def test_an_optimizer_in_another_form_is_named(self, tmp_path: Path) -> None:
        """Torchtitan's flat state, and one that stands deeper, are called unsupported, and not missing."""
        model, optimizer, _ = training()
        state = {"model": model.state_dict()}
        flat = {"state.trunk.weight.exp_avg": torch.ones(2), "param_groups.trunk.weight.lr": 0.1}
        deeper = {"AdamW": {"state": {"0": {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}}
        for number, saved in enumerate(({**state, "optimizer": flat}, {"state": {**state, "optimizers": deeper}})):
            stock_save(saved, tmp_path / f"{number}")
            with pytest.raises(MismatchError, match="its optimizer is in a form that is not loaded here, such as"):
                load_checkpoint(model, str(tmp_path / f"{number}"), optimizer, None, str(tmp_path / f"{number}"))
        stock_save(state, tmp_path / "none")
        with pytest.raises(MismatchError, match="holds no optimizer"):
            load_checkpoint(model, str(tmp_path / "none"), optimizer, optimizer_path=str(tmp_path / "none"))

    def test_accelerates_optimizer_is_loaded(self, tmp_path: Path) -> None:
        """An optimizer's state that stands alone under `optimizer`, as Accelerate saves it."""
        saved = training()
        stock_save({"model": ModelState(saved[0])}, tmp_path / "w")
        stock_save({"optimizer": OptimizerState(*saved).state_dict()["optim"]}, tmp_path / "optimizer_0")
        other = training(steps=0, seed=1)
        load_checkpoint(other[0], str(tmp_path / "w"), other[1], None, str(tmp_path / "optimizer_0"))
        assert_same(snapshot(other[1]), snapshot(saved[1]))

    def test_what_plain_dcp_saved_is_loaded(self, tmp_path: Path) -> None:
        """Model and optimizer that NeMo-RL's own way of saving wrote come back."""
        saved = training()
        stock_save({"model": ModelState(saved[0])}, tmp_path / "w")
        stock_save({"optim": OptimizerState(*saved)}, tmp_path / "o")
        other = training(steps=0, seed=1)
        load_checkpoint(other[0], str(tmp_path / "w"), *other[1:], str(tmp_path / "o"))
        assert_same(snapshot(*other), snapshot(*saved))

    @pytest.mark.parametrize(
        ("prefix", "below"),
        [
            ("model", ""),
            (None, ""),
            ("state.model", ""),
            ("model", "policy/weights"),
            (None, "weights/model"),
            ("model", "policy/weights/model"),
            ("model", "pytorch_model_fsdp_0"),
            ("model", "weights"),
            ("model", "model"),
            (None, "checkpoint"),
        ],
    )
    def test_models_are_found_where_frameworks_put_them(
        self, tmp_path: Path, prefix: str | None, below: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """NeMo-RL's two layouts, Accelerate's, Lightning's and bare state dicts load, and the log says which."""
        model, other = layers(), layers(seed=1)
        state: dict[str, Any] = dict(model.state_dict())
        for key in reversed(prefix.split(".") if prefix else []):
            state = {key: state}
        stock_save(state, tmp_path / below)
        with caplog.at_level("INFO", logger="ckpt_core"):
            load_checkpoint(other, str(tmp_path))
        assert_same(snapshot(other), snapshot(model))
        if below:
            assert str(tmp_path / below) in "\n".join(caplog.messages)

    def test_what_stands_beside_the_model_is_no_part_of_it(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A directory of torchtitan's, with optimizer and counters, loads; unknown tensors are refused, or logged."""
        model, optimizer, _ = training()
        state = {**model.state_dict(), "optimizer": OptimizerState(model, optimizer).state_dict()["optim"]}
        stock_save({**state, "train_state": {"step": torch.tensor(3)}}, tmp_path / "a")
        other = layers(seed=1)
        load_checkpoint(other, str(tmp_path / "a"))
        assert_same(snapshot(other), snapshot(model))
        assert [record for record in caplog.records if record.name.startswith("ckpt_core")] == []
        stock_save({**model.state_dict(), "odd": torch.zeros(1)}, tmp_path / "b")
        before = snapshot(other)
        with pytest.raises(MismatchError, match=r"odd.*prefix=''"):
            load_checkpoint(other, str(tmp_path / "b"))
        assert_same(snapshot(other), before)
        load_checkpoint(other, str(tmp_path / "b"), prefix="")
        assert "odd" in caplog.text

    @pytest.mark.parametrize("dtype", ["float32", "complex32", "float4_e2m1fn_x2", "quint8"])
    @pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:TypedStorage", "ignore:.*quantize", "ignore:torch.ao")
    def test_a_single_tensor_beside_the_model_stays_unread(
        self, tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whatever its type, it hides no other, and the log names it."""
        model, other = layers(), layers(seed=1)
        if dtype == "quint8":
            beside = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)
        else:
            beside = torch.zeros(8, dtype=torch.uint8).view(getattr(torch, dtype))
        stock_save({"model": dict(model.state_dict()), "beside": beside}, tmp_path / "w")
        load_checkpoint(other, str(tmp_path / "w"))
        assert_same(snapshot(other), snapshot(model))
        assert "such as beside" in caplog.text

    def test_a_part_of_a_larger_model_loads(self, tmp_path: Path) -> None:
        """A model whose names stand deeper in the checkpoint is filled from there, if the caller says so."""
        whole = nn.ModuleDict({"trunk": layers(), "head": nn.Linear(1, 1)})
        save_checkpoint(whole, str(tmp_path / "w"))
        other = layers(seed=1)
        with pytest.raises(MismatchError, match=r"head\.weight.*prefix='model.trunk'"):
            load_checkpoint(other, str(tmp_path / "w"))
        load_checkpoint(other, str(tmp_path / "w"), prefix="trunk")
        assert_same(snapshot(other), snapshot(whole["trunk"]))

    @pytest.mark.parametrize("names", [("model", "ema"), ("policy", "ref"), ("actor", "ref")], ids="+".join)
    @pytest.mark.parametrize("below", [None, "model", "app.state"])
    def test_which_of_two_models_is_meant_is_never_guessed(
        self, tmp_path: Path, names: tuple[str, str], below: str | None
    ) -> None:
        """Two models that fit are refused, and both are named; the argument chooses one."""
        two = nn.ModuleDict({name: layers(seed) for seed, name in enumerate(names)})
        state: dict[str, Any] = dict(two.state_dict())
        for key in reversed(below.split(".") if below else []):
            state = {key: state}
        stock_save(state, tmp_path / "w")
        other = layers(seed=7)
        before = snapshot(other)
        with pytest.raises(MismatchError, match=rf"{min(names)}'.*{max(names)}'.*`prefix`"):
            load_checkpoint(other, str(tmp_path / "w"))
        assert_same(snapshot(other), before)
        for name in names:
            full = ".".join(filter(None, [below, name]))
            load_checkpoint(other, str(tmp_path / "w"), prefix=name if below == "model" else full)
            assert_same(snapshot(other), snapshot(two[name]))
        with pytest.raises(MismatchError, match=f"{names[0]}x"):
            load_checkpoint(other, str(tmp_path / "w"), prefix=f"{names[0]}x")
        both = nn.ModuleDict({name: layers(seed + 5) for seed, name in enumerate(names)})
        load_checkpoint(both, str(tmp_path / "w"))
        assert_same(snapshot(both), snapshot(two))

    def test_a_step_of_a_store_is_a_checkpoint_too(self, tmp_path: Path) -> None:
        """load_checkpoint reads the model and optimizer of a step that PyTorchCheckpoint committed."""
        saved = training()
        PyTorchCheckpoint(module=saved[0], optimizer=saved[1]).save(tmp_path, step=1, scheduler=saved[2])
        step = str(tmp_path / "default" / "step_0000000001")
        other = training(steps=0, seed=1)
        load_checkpoint(other[0], step, *other[1:], step)
        assert_same(snapshot(*other), snapshot(*saved))

    def test_what_is_not_there_is_named(self, tmp_path: Path) -> None:
        """Without a checkpoint the error says where one is; several need a choice; a model is no optimizer."""
        model, optimizer, _ = training()
        with pytest.raises(FileNotFoundError, match=r"no DCP checkpoint"):
            load_checkpoint(model, str(tmp_path))
        save_checkpoint(model, str(tmp_path / "deep" / "down" / "somewhere"))
        with pytest.raises(NotACheckpointError, match="deep/down/somewhere"):
            load_checkpoint(model, str(tmp_path))
        save_checkpoint(model, str(tmp_path / "weights"))
        save_checkpoint(model, str(tmp_path / "model"))
        with pytest.raises(NotACheckpointError, match="several"):
            load_checkpoint(model, str(tmp_path))
        before = snapshot(optimizer)
        with pytest.raises(MismatchError, match="no optimizer"):
            load_checkpoint(model, str(tmp_path / "weights"), optimizer, None, str(tmp_path / "model"))
        assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("nested", [False, True], ids=["beside", "inside"])
def test_killed_anywhere_each_path_is_whole_or_absent_and_a_retry_completes(tmp_path: Path, nested: bool) -> None:
    """SIGKILL before each system call of a save that changes a file leaves no half; saving again works, and cleans."""
    if not can_trace():
        pytest.skip("needs strace, and the right to attach it")
    saved = training(steps=1)
    expected = snapshot(*saved)

    def paths(place: Path) -> tuple[str, str, str]:
        weights = place / "step" / "weights"
        beside = weights.parent
        return str(weights), str((weights if nested else beside) / "optimizer"), str(beside / "tokenizer")

    def prepare(place: Path) -> tuple[Any, ...]:
        return save_when_continued, *paths(place)

    def check(place: Path) -> None:
        weights, optimizer_path, tokenizer_path = paths(place)
        for path in (weights, optimizer_path):
            if Path(path).exists():
                assert files_in(Path(path))[:2] == [".metadata", "__0_0.distcp"]
                read_index(path)
        if Path(weights).exists():
            assert Path(optimizer_path).exists(), "the model's is the last"
        else:
            save_checkpoint(saved[0], weights, saved[1], saved[2], optimizer_path, Words(), tokenizer_path)
            names = ["tokenizer", "weights"] if nested else ["optimizer", "tokenizer", "weights"]
            assert sorted(p.name for p in (place / "step").iterdir()) == names
        other = training(steps=0, seed=1)
        load_checkpoint(other[0], weights, *other[1:], optimizer_path)
        assert_same(snapshot(*other), expected)

    calls = NAMING if nested else CHANGING
    kills = kill_everywhere(calls, tmp_path, prepare, check, every={"write": 4, "fsync": 4})
    assert kills > (8 if nested else 15)
