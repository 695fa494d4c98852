"""Results of tasks as JSON, and when an earlier one is taken."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefect import Flow, Task
from prefect.cache_policies import INPUTS, NO_CACHE
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.serializers import Serializer
from upath import UPath

import flows
import tasks
from ckpt_core import PyTorchCheckpoint
from ckpt_core.errors import ArgumentError, DamagedError, NotACheckpointError
from ckpt_core.export import EXPORT_NAME
from tasks.caching import ByContent, checkpoint_identity, export_identity
from tasks.results import ReferenceSerializer

RESULTS = ReferenceSerializer()
TEXT = st.text().filter(lambda text: text != "$type")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@dataclass(frozen=True)
class Trained:
    """What a task of a user's own might return."""

    checkpoint: PyTorchCheckpoint
    losses: tuple[float, ...]
    best: float = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "best", min(self.losses))


class Unpicklable(torch.nn.Linear):
    """A module that nothing may pickle."""

    def __reduce__(self):
        raise AssertionError("pickled")


def save(store: Path | str, step: int = 1) -> PyTorchCheckpoint:
    """Commit a small checkpoint."""
    return PyTorchCheckpoint(Unpicklable(2, 2), {"epochs": 5}).save(store, run="small", step=step)


def stored(result: Any) -> Any:
    """Return what is read of a result that was stored."""
    return RESULTS.loads(RESULTS.dumps(result))


@given(VALUES)
def test_what_is_read_is_what_was_returned(value: Any):
    """JSON types and tuples come back equal and of the same types, in any nesting."""
    assert repr(stored(value)) == repr(value)


def test_a_checkpoint_is_stored_as_its_reference(tmp_path: Path):
    """Less than a kilobyte, without its tensors; what is read loads them from the store."""
    saved = save(tmp_path)
    text = RESULTS.dumps(saved)
    assert len(text) < 1000
    assert json.loads(text)["reference"] == saved.to_dict()
    read = RESULTS.loads(text)
    assert (read.module, read.url, read["epochs"]) == (None, saved.url, 5)
    other = torch.nn.Linear(2, 2)
    read.restore(other)
    assert torch.equal(other.weight, saved.module.weight)


def test_checkpoints_are_stored_wherever_they_are(tmp_path: Path):
    """In lists, tuples, dicts and dataclasses; a dataclass comes back as itself."""
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    read = stored({"all": [first, (second, None)], "kept": Trained(second, (2.5, 0.5))})
    assert [read["all"][0].url, read["all"][1][0].url] == [first.url, second.url]
    assert type(read["kept"]) is Trained
    assert read["kept"].checkpoint.to_dict() == second.to_dict()
    assert (read["kept"].losses, read["kept"].best) == ((2.5, 0.5), 0.5)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ({"a": [1, Path("x")]}, r"^result\['a'\]\[1\]: a pathlib\.PosixPath cannot be stored as a task's result; "),
        ({"when": datetime(2026, 1, 1, tzinfo=UTC)}, r"^result\['when'\]: a datetime\.datetime cannot be stored"),
        (Trained(PyTorchCheckpoint(None, {"a": 1}), (torch.ones(1),)), r"^result\['losses'\]\[0\]: a torch\.Tensor "),
        ([ValueError("inside")], r"^result\[0\]: a builtins\.ValueError cannot be stored"),
        ({1: "one"}, r"^result: has the key 1; a stored dict has text for keys"),
        ({"$type": "tuple"}, r"^result: has the key '\$type'; "),
        (PyTorchCheckpoint(torch.nn.Linear(1, 1)), r"was never saved; call \.save"),
        (SimpleNamespace(a=1), r"^result: a types\.SimpleNamespace cannot be stored"),
    ],
)
def test_what_has_no_json_is_named(result: Any, told: str):
    """An error says where it is and of which type; nothing is pickled instead."""
    with pytest.raises(ArgumentError, match=told):
        RESULTS.dumps(result)


def test_a_dataclass_without_a_name_of_its_own_is_refused():
    """One that is defined in a function could not be found again."""

    @dataclass
    class Hidden:
        a: int = 1

    with pytest.raises(ArgumentError, match=r"Hidden cannot be found by its name; define it at the top of its module"):
        RESULTS.dumps(Hidden())


def test_a_failure_is_stored_as_text():
    """Its type and message, without what it may hold besides."""
    failure = OSError("no room")
    failure.held = object()  # pyright: ignore[reportAttributeAccessIssue] - as HTTP errors hold a request
    assert RESULTS.dumps(failure) == b'"OSError: no room"'


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"gASVCwAAAAAAAACMB3N1YnByb2Nlc3OULg==",
        b'{"$type": "pickle", "data": ""}',
        b'{"$type": "checkpoint", "reference": {"url": 1}}',
        b'{"$type": "tuple"}',
        b'{"$type": "dataclass", "class": "subprocess:Popen", "fields": {"args": "true"}}',
        b'{"$type": "dataclass", "class": "os:path.join", "fields": {}}',
        b'{"$type": "dataclass", "class": 7, "fields": {}}',
        b'{"$type": "dataclass", "class": "test_results:Trained", "fields": {"no": 1}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_result_is_named(text: bytes):
    """What was not stored by this serializer is an error that says what to do."""
    with pytest.raises(DamagedError, match="PREFECT_TASKS_REFRESH_CACHE=true"):
        RESULTS.loads(text)


def test_reading_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stored name of a module that is not imported is an error, and its code does not run."""
    (tmp_path / "never_imported.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DamagedError, match="no dataclass 'never_imported:Thing'"):
        RESULTS.loads(b'{"$type": "dataclass", "class": "never_imported:Thing", "fields": {}}')
    assert "never_imported" not in sys.modules


def test_prefect_finds_the_serializer_by_its_type():
    """A stored result names it, and a process that reads the result makes it of that."""
    assert type(Serializer(type="ckpt-reference")) is ReferenceSerializer


def key_of_inputs(**inputs: Any) -> str | None:
    """Return Prefect's cache key for a task's parameters."""
    return INPUTS.compute_key(None, inputs, {})  # pyright: ignore[reportArgumentType] - this policy looks at no context


def test_a_checkpoint_as_a_parameter_is_named_by_its_digest(tmp_path: Path):
    """The cache key is that of what was saved, live or as a reference, wherever it lies; its module is not pickled."""
    saved, other = save(tmp_path / "store", 1), save(tmp_path / "store", 2)
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    copied = PyTorchCheckpoint.from_url(tmp_path / "copy" / "small" / "step_0000000001")
    assert copied.url != saved.url
    assert key_of_inputs(c=saved) == key_of_inputs(c=stored(saved)) == key_of_inputs(c=copied)
    assert key_of_inputs(c=saved) != key_of_inputs(c=other)


def test_a_checkpoint_that_was_never_saved_is_equal_to_no_other():
    """Its tensors are not looked at, so no result of another counts; hyperparameters alone are compared."""
    live = PyTorchCheckpoint(Unpicklable(2, 2))
    assert key_of_inputs(c=live) != key_of_inputs(c=live)
    assert key_of_inputs(c=PyTorchCheckpoint(None, {"a": 1})) == key_of_inputs(c=PyTorchCheckpoint(None, {"a": 1}))
    assert key_of_inputs(c=PyTorchCheckpoint(None, {"a": 1})) != key_of_inputs(c=PyTorchCheckpoint(None, {"a": 2}))


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    """A place for results."""
    return ResultStore(result_storage=LocalFileSystem(basepath=str(tmp_path / "results")), serializer=RESULTS)


def key(policy: ByContent, store: ResultStore, **inputs: Any) -> str | None:
    """Return the key under which a task with a policy would look for, and store, its result."""
    context: Any = SimpleNamespace(result_store=store)
    return policy.compute_key(context, inputs, {})


def test_equal_content_has_one_key(store: ResultStore):
    """Before and after a result is stored; other content, and another name, have another one."""
    policy = ByContent(name="made", content=lambda a, b: {"a": a})
    first = key(policy, store, a=1, b="this machine")
    assert first is not None
    assert first.startswith("made-")
    store.write("result", key=first)
    assert key(policy, store, a=1, b="another") == first
    assert key(policy, store, a=2, b="this machine") != first
    assert key(ByContent(name="found", content=policy.content), store, a=1, b="") not in {None, first}


def test_a_result_that_does_not_hold_is_not_found(store: ResultStore):
    """What is made in its place has a key of its own, and is found from then on."""
    there = {"a", "b"}
    policy = ByContent(name="made", content=lambda: 1, holds=there.__contains__)
    first = key(policy, store)
    store.write("a", key=first)
    assert key(policy, store) == first
    there.remove("a")
    second = key(policy, store)
    assert second not in {None, first}
    assert not store.exists(str(second))
    store.write("b", key=second)
    assert key(policy, store) == second


def test_a_result_that_cannot_be_looked_after_does_not_hold(store: ResultStore):
    """A checkpoint that is damaged, say, is made again."""

    def gone(_: Any) -> bool:
        raise NotACheckpointError("deleted")

    policy = ByContent(name="made", content=lambda: 1, holds=gone)
    first = key(policy, store)
    store.write("a", key=first)
    assert key(policy, store) not in {None, first}


def test_content_that_cannot_be_told_has_no_key(store: ResultStore):
    """The task runs, and says what is wrong by itself."""

    def damaged() -> Any:
        raise DamagedError("its manifest is damaged")

    assert key(ByContent(name="made", content=damaged), store) is None


def test_a_damaged_record_is_no_result(store: ResultStore, tmp_path: Path):
    """Half of a file in the result storage counts as none, and is written again."""
    policy = ByContent(name="made", content=lambda: 1)
    first = key(policy, store)
    store.write("a" * 100, key=first)
    [file] = (tmp_path / "results").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert key(policy, store) == first
    assert not store.exists(str(first))


@pytest.mark.parametrize("where", ["directory", "bucket"])
def test_a_file_that_was_written_again_is_another_checkpoint(tmp_path: Path, where: str):
    """Its bytes need not be read for that, and no other change of the store matters."""
    root = tmp_path / "store" if where == "directory" else "memory://identities"
    url = str(save(root).url)
    before = checkpoint_identity(url)
    save(root, 2)
    assert checkpoint_identity(url) == before
    file = next(UPath(url).rglob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))
    after = checkpoint_identity(url)
    assert after["digest"] == before["digest"]
    assert after["files"] != before["files"]


def test_a_checkpoint_that_is_gone_has_no_identity(tmp_path: Path):
    """Nor has one that lacks a file."""
    saved = Path(str(save(tmp_path).url).removeprefix("file://"))
    next(saved.rglob("*.distcp")).unlink()
    with pytest.raises(DamagedError, match="missing"):
        checkpoint_identity(str(saved))
    shutil.rmtree(saved)
    with pytest.raises(NotACheckpointError):
        checkpoint_identity(str(saved))


def test_a_file_that_was_written_again_is_another_export(tmp_path: Path):
    """So a gate that an export has passed is asked again."""
    files = {"model.safetensors": {"bytes": 4, "sha256": "0" * 64}}
    record = {"format_version": 1, "source": {}, "files": files, "rules": [], "architecture": "Tiny"}
    (tmp_path / EXPORT_NAME).write_text(json.dumps(record))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"good")
    before = export_identity(str(tmp_path))
    assert before["made"] == files
    assert export_identity(tmp_path.as_uri()) == before
    weights.write_bytes(b"evil")
    os.utime(weights, ns=(0, 0))
    assert export_identity(str(tmp_path)) != before


def members(package: Any, kind: type) -> dict[str, Any]:
    """Return the flows or tasks that are defined in the modules of a package, by name."""
    names = [f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    found = {f"{name}.{key}": member for name in names for key, member in vars(importlib.import_module(name)).items()}
    return {name: member for name, member in found.items() if isinstance(member, kind)}


def test_each_task_says_what_becomes_of_its_result():
    """Else Prefect would take that of a run before the retry: of a task that looks at the Hub, an old answer."""
    found = members(tasks, Task)
    assert {"tasks.training.train", "tasks.publication.compare"} <= found.keys()
    undecided = {name for name, task in found.items() if not is_decided(task)}
    assert undecided == set()


def is_decided(task: Any) -> bool:
    """Whether a task has no result stored, or one that is looked after."""
    policy = task.cache_policy
    return task.persist_result is False or policy == NO_CACHE or isinstance(policy, ByContent)


def test_no_flow_pickles_its_failure():
    """Prefect stores the exception of a flow that failed, whether or not its result is stored."""
    found = members(flows, Flow)
    assert {"flows.retrain.retrain", "flows.rollback.rollback"} <= found.keys()
    pickling = {
        name
        for name, flow in found.items()
        if flow.persist_result is not False or not isinstance(flow.result_serializer, ReferenceSerializer)
    }
    assert pickling == set()
