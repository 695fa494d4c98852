"""Errors: the exception tree is what its picture says, and what is wrong has the right class, path, key and remedy."""

import errno
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_core import PyTorchCheckpoint, durable, errors, io, open_store
from ckpt_core.native_checkpoint import load_checkpoint, save_checkpoint

DRAWN = re.compile(r"^([│├└─ ]*)([A-Z]\w+Error)(?: +[^(\n]*?)?(?:\((.+)\))?$", re.MULTILINE)


def drawn_tree():
    """Return each drawn class's drawn parent and standard base classes, by name."""
    parents, tree = [], {}
    for indent, name, bases in DRAWN.findall(errors.__doc__):
        depth = len(indent) // 4 if indent else 0
        del parents[depth:]
        tree[name] = (parents[-1] if parents else "Exception", *re.split(r",\s*", bases or "")) if parents else ()
        tree[name] = tuple(base for base in tree[name] if base)
        parents.append(name)
    return tree


DEFINED = {name: value for name, value in vars(errors).items() if isinstance(value, type)}


def test_every_class_is_drawn_where_it_stands():
    """The picture in the module's docstring names every class, its parent and its standard base classes."""
    found = {name: tuple(base.__name__ for base in kind.__bases__) for name, kind in DEFINED.items()}
    found["CkptError"] = ()
    assert drawn_tree() == found


def test_the_root_is_an_ordinary_exception():
    """One `except CkptError` catches all of them, and `except Exception` too."""
    assert errors.CkptError.__bases__ == (Exception,)
    assert all(issubclass(kind, errors.CkptError) for kind in DEFINED.values())


class ConnectionToError(OSError):
    """An error of a client of the network, which says what it could not reach."""

    def __str__(self):
        return "Cannot connect to host x:80"


def test_errors_of_the_system_are_described():
    """A file's error has its path and a remedy; one that is a client's own keeps the client's words."""
    assert errors.describe(OSError(errno.ENOSPC, "", "/data")).startswith("/data: No space left on device; ")
    assert errors.describe(OSError(-2, "Name or service not known")) == "[Errno -2] Name or service not known"
    for number in (errno.ECONNREFUSED, -2, None):
        assert errors.describe(ConnectionToError(number, "")) == "Cannot connect to host x:80"


@pytest.mark.parametrize("kind", DEFINED.values(), ids=list(DEFINED))
def test_every_error_survives_pickling(kind):
    """An error that crosses processes keeps its class, its text and its arguments."""
    error = kind("step_0000000001: a\nb; do c")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.args) == (kind, str(error), error.args)


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        (errors.NotACheckpointError, FileNotFoundError),
        (errors.StepExistsError, FileExistsError),
        (errors.DamagedError, ValueError),
        (errors.UntrustedError, ValueError),
        (errors.MismatchError, ValueError),
        (errors.CommitError, RuntimeError),
        (errors.ArgumentError, TypeError),
        (errors.ArgumentError, ValueError),
        (errors.ExportExistsError, FileExistsError),
        (errors.HubContentError, RuntimeError),
    ],
)
def test_errors_are_standard_ones_too(kind, standard):
    """Whoever catches the standard library's error catches ours, with its text whole."""
    with pytest.raises(standard, match=r"^where: what$"):
        raise kind("where: what")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "ask the owner"),
        (errno.ENAMETOOLONG, "255 bytes"),
        (errno.EIO, "disk or the network file system failed"),
    ],
    ids=errno.errorcode.get,
)
def test_errors_of_the_system_name_the_path_and_a_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    """What a file operation raises keeps its class and number, and says where it happened and what to do."""
    plain = OSError(number, os.strerror(number))
    for error in (plain, OSError(number, os.strerror(number), str(tmp_path / "file"))):
        with pytest.raises(type(plain)) as caught, durable.explained(tmp_path / "file"):
            raise error
        found = caught.value
        assert (found.errno, found.filename) == (number, str(tmp_path / "file"))
        assert remedy in str(found)
        assert str(errors.with_remedy(found, "elsewhere")) == str(found)
        assert errors.describe(found).startswith(f"{tmp_path / 'file'}: {os.strerror(number)}; ")
        assert str(pickle.loads(pickle.dumps(found))) == str(found)


def test_other_errors_of_the_system_are_left_as_they_are(tmp_path: Path) -> None:
    """One that callers tell from others, such as that a file exists, is the same object."""
    error = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "x")
    with pytest.raises(FileExistsError) as caught, durable.explained(tmp_path):
        raise error
    assert caught.value is error


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A full device, and a name that is too long, are named in the error of the file."""
    with pytest.raises(OSError, match=r"255 bytes") as caught:
        durable.write_new(tmp_path / ("x" * 300), b"")
    assert caught.value.filename == str(tmp_path / ("x" * 300))
    sink = durable.LocalSink(tmp_path / "file")
    os.close(sink.handle)
    sink.handle = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=r"make room.*file") as caught:
        sink.write(memoryview(b"x"))
    sink.close()
    assert caught.value.errno == errno.ENOSPC


class TestNumbersOfSteps:
    """What a step may be."""

    @pytest.mark.parametrize("step", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)], ids=repr)
    def test_any_integer_is_a_step(self, tmp_path: Path, step: Any) -> None:
        """Each has the same name, and comes back as an int."""
        saved = PyTorchCheckpoint(hyperparameters={"a": 1}).save(tmp_path, step=step)
        assert str(saved.url).endswith("/step_0000000003")
        assert type(saved.step) is int
        assert [type(c.step) for c in open_store(tmp_path).list("default")] == [int]

    @pytest.mark.parametrize(
        "step",
        [True, np.True_, torch.tensor(True), 1.0, "3", None, -1, 10**10, 10**6000, torch.tensor([1, 2]), [1]],
        ids=lambda step: f"{type(step).__name__}",
    )
    def test_anything_else_is_refused(self, tmp_path: Path, step: Any) -> None:
        """It is an ArgumentError of the save, and nothing is written."""
        with pytest.raises(errors.ArgumentError, match=r"^step .*expected"):
            PyTorchCheckpoint(hyperparameters={"a": 1}).save(tmp_path / "store", step=step)
        assert not (tmp_path / "store").exists()


CYCLE: dict[str, Any] = {"b": []}
CYCLE["b"].append(CYCLE)
DEEP: Any = {}
for _ in range(20_000):
    DEEP = [DEEP]
LEVELS: Any = {}
for _ in range(200):
    LEVELS = {"k": LEVELS}


class TestOddValues:
    """What JSON cannot hold, in each argument that becomes JSON."""

    @pytest.mark.parametrize("argument", ["hyperparameters", "trainer", "metrics", "lineage"])
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (CYCLE, r"^WHERE\.key\.b\[0\]: contains itself"),
            (DEEP, r"^WHERE\.key.*: nested more than 100 levels"),
            (LEVELS, r"^WHERE\.key.*: nested more than 100 levels"),
            ([1, {"x": object()}], r"^WHERE\.key\[1\]\.x: .*not JSON serializable"),
            ({"n": 10**5000}, r"^WHERE\.key\.n: "),
            ({(1, 2): 3}, r"^WHERE\.key: keys must be"),
            ({1: "a", "1": "b"}, r"^WHERE\.key: two keys are '1'"),
        ],
        ids=["cycle", "deep list", "deep dict", "object", "huge", "key", "equal keys"],
    )
    def test_the_key_is_named(self, tmp_path: Path, argument: str, value: Any, text: str) -> None:
        """The error names the argument and the key, and nothing is written."""
        given: Any = {argument: {"fine": 1, "key": value}}
        hyperparameters = given.pop("hyperparameters", {"a": 1})
        with pytest.raises(errors.ArgumentError, match=text.replace("WHERE", argument)):
            PyTorchCheckpoint(hyperparameters=hyperparameters).save(tmp_path / "store", step=1, **given)
        assert not (tmp_path / "store").exists()

    def test_a_dataclass_that_contains_itself(self) -> None:
        """It is refused like a dict."""

        @dataclass
        class Node:
            child: Any = None

        node = Node()
        node.child = node
        with pytest.raises(errors.ArgumentError, match="contain themselves"):
            PyTorchCheckpoint(hyperparameters=node)

    def test_what_is_only_odd_comes_back(self, tmp_path: Path) -> None:
        """A lone surrogate, a number of a thousand digits and fifty levels are stored as they are."""
        nested: Any = 1
        for _ in range(50):
            nested = [nested]
        values = {"text": "\ud800", "number": 10**1000, "nested": nested, "": 0}
        saved = PyTorchCheckpoint(hyperparameters=values).save(tmp_path, step=1)
        assert PyTorchCheckpoint.from_url(str(saved.url)).hyperparameters == values


class TestCutFiles:
    """A file of a checkpoint that is too short."""

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    @pytest.mark.parametrize("size", [0, 100, 2000])
    def test_it_is_damaged_and_torch_says_nothing(
        self, tmp_path: Path, size: int, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each way to read it raises a DamagedError that names the file; no traceback is logged or printed."""
        model = torch.nn.Linear(40, 40)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(40)).sum().backward()
        optimizer.step()
        paths = [str(tmp_path / name) for name in ("weights", "optimizer")]
        save_checkpoint(model, paths[0], optimizer, None, paths[1])
        for cut in paths:
            shutil.copytree(cut, tmp_path / "whole")
            os.truncate(Path(cut) / "__0_0.distcp", size)
            with pytest.raises(errors.DamagedError, match=f"{cut}/__0_0.distcp"):
                load_checkpoint(model, paths[0], optimizer, None, paths[1])
            with pytest.raises(errors.DamagedError, match=f"{cut}/__0_0.distcp"):
                io.read_state(cut)
            with pytest.raises(dcp.api.CheckpointException) as caught:
                dcp.load({"model": {}}, storage_reader=io.SafeReader(cut), no_dist=True)
            assert [type(error) for error, _ in caught.value.failures.values()] == [errors.DamagedError]
            shutil.rmtree(cut)
            (tmp_path / "whole").rename(cut)
        assert capfd.readouterr().err == ""
        assert not [record for record in caplog.records if record.exc_info]
