"""Readers that are given broken bytes, and what must hold whatever these are.

A reader returns what was saved, or raises a named error: soon, in little memory, and without running anything.
"""

import logging
import os
import pickle
import sys
import sysconfig
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from hostile_files import cheap
from safetensors.torch import save

from ckpt_core import io
from ckpt_core.errors import CkptError
from ckpt_core.format.index import METADATA_NAME, TWIN_NAME, read_index, twin_bytes
from ckpt_core.format.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest
from ckpt_core.safetensors_header import read_header

SHARD = "__0_0.distcp"
WEIGHTS = "model.safetensors"
SECONDS = 2.0
"""Of a processor, for one input."""

RUNNING = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "subprocess.Popen",
    "exec", "ctypes.dlopen", "socket.", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
    "os.truncate", "os.chmod", "os.kill", "shutil.",
)  # fmt: skip
"""Beginnings of the names of audit events that no reader causes."""

STANDARD_LIBRARY = sysconfig.get_path("stdlib")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class RanError(BaseException):
    """A reader was about to run or to write something; no reader catches this."""


_watching = False


def _watch(event, arguments):
    if not _watching:
        return
    if event == "exec" and arguments[0].co_filename.startswith(STANDARD_LIBRARY):
        return  # a module that is imported late, such as a text encoding
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or event.startswith(RUNNING):
        raise RanError(f"{event}{arguments}")


sys.addaudithook(_watch)


@contextmanager
def harmless():
    """Nothing is run, written, or connected to; time and memory are bounded."""
    global _watching  # noqa: PLW0603 - an audit hook cannot be removed
    with cheap(SECONDS):
        _watching = True
        try:
            yield
        finally:
            _watching = False


def state():
    """What is saved: tensors that all differ in type or shape, so that none can pass for another, and a value."""
    return {
        "model": {"z": torch.arange(12.0).reshape(4, 3), "a": torch.ones(3).half(), "n": torch.tensor(7)},
        "rate": 0.5,
    }


def blank():
    """The same, to be filled."""
    return {"model": {k: torch.zeros_like(t) for k, t in state()["model"].items()}, "rate": None}


class Samples:
    """Valid files of each kind, and a directory in which one of them at a time is replaced."""

    def __init__(self, directory):
        self.directory = Path(directory) / "dcp"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state(), checkpoint_id=self.directory)
        files = {"model/.metadata": FileRecord(3, "xxh3_128:00"), "model/x": FileRecord(2**40, "xxh3_128:11")}
        manifest = Manifest(
            run="r", step=3, time="2026-01-01T00:00:00+00:00", world_size=2, hyperparameters={"a": [1, None, 0.5]},
            metrics={"loss": 1.5}, lineage={"parent": {"step": 2}}, files=files,
        )  # fmt: skip
        self.manifest = manifest
        self.good = {
            METADATA_NAME: (self.directory / METADATA_NAME).read_bytes(),
            TWIN_NAME: twin_bytes(read_index(self.directory), (self.directory / METADATA_NAME).read_bytes()),
            SHARD: (self.directory / SHARD).read_bytes(),
            MANIFEST_NAME: manifest.to_bytes(),
            WEIGHTS: save(state()["model"], {"format": "pt"}),
        }
        logging.getLogger().warning("to: all")  # a handler, of Prefect say, may import things for its first message
        for name in self.good:  # a reader's first call imports things
            if (self.directory / name).exists():
                self._read(name)
        for name, data in self.good.items():
            assert self.outcome(name, data) == "equal"
            assert self.outcome(name, data[: len(data) // 2]) == "refused"
            assert self.outcome(name, b"") == "refused"

    def outcome(self, name, data):
        """Read with `data` in place of one file; return `equal` or `refused`, or fail."""
        path = self.directory / name
        path.write_bytes(data)
        try:
            with harmless():
                self._read(name)
        except CkptError as error:
            return "refused" if len(str(error)) < 3000 else f"told at a length of {len(str(error))}"
        finally:
            if name in {METADATA_NAME, SHARD}:
                path.write_bytes(self.good[name])
            else:
                path.unlink()
        return "equal"

    def _read(self, name):
        if name == MANIFEST_NAME:
            assert read_manifest(self.directory).to_bytes() == self.manifest.to_bytes()
            return
        if name == WEIGHTS:
            found = read_header(self.directory / name).values()
            ends = {tensor.offset + tensor.nbytes for tensor in found}
            assert max(ends, default=0) <= (self.directory / name).stat().st_size, "a tensor beyond the file's end"
            return
        found = blank()
        io.load(found, self.directory)
        assert _leaves(found) == _leaves(state()), "another load than what was saved"
        stray = set(_leaves(io.read_state(self.directory))) - set(_leaves(state()))
        assert not stray, f"read, and never saved: {stray}"


def _leaves(value):
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    if isinstance(value, (list, tuple)):
        return [leaf for inner in value for leaf in _leaves(inner)]
    if isinstance(value, torch.Tensor):
        return [(str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())]
    return [pickle.dumps(value)]
