"""A training job on several nodes: how the one that runs the flow calls the others, and hears of their ranks.

    <store>/<run>/training.json            the call, while the job is on: where the agents meet, and the job itself
    <store>/<run>/.nodes-<id>/<node>.json  a note from each node that came: that it joined, and how its share ended

The nodes share the store and nothing else but the rendezvous of their agents, by which a job that ends on one ends on
all. What a note tells is why: it is awaited for a bounded time, and a node that leaves none is counted as lost.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from ckpt_core import durable
from ckpt_core.errors import CkptError
from ckpt_core.store import local_path
from tasks import zygote
from tasks.config import Job, Settings
from tasks.process import ChildFailedError
from tasks.torchrun import Meeting, RankFailure, RanksFailedError, run_torchrun, tell

CALL_NAME = "training.json"
NOTE_S = 20.0
"""How long, beyond the grace of its ranks, a node has for its last note: clients of a shared file system cache what is
not there."""
POLL_S = 0.5
_CHARACTERS = 4000
"""Of a rank's last lines, in a note."""


class Call(Settings):
    """What the nodes of a job are told."""

    id: str
    """Of this start of the job; a restart has another one."""

    job: Job


class RankNote(Settings):
    """How one rank failed, in a note."""

    rank: int
    code: int
    lines: str


class Note(Settings):
    """What one node tells of its share of a job."""

    node: str
    """Its name, for people."""

    state: Literal["joined", "done", "failed", "left"]
    """`failed`: ranks did, here or elsewhere; `left`: the node itself could not go on, or was told to stop."""

    reason: str = ""
    failures: list[RankNote] = Field(default=[])


class NodesFailedError(RanksFailedError):
    """A job on several nodes failed: `failures` are those of all nodes, `lost` is how many nodes are gone."""

    def __init__(self, message: str, failures: tuple[RankFailure, ...] = (), lost: int = 0) -> None:
        super().__init__(message, failures)
        self.lost = lost


def run_once(job: Job, on_line: Callable[[str], None]) -> None:
    """Run the ranks of a training job to its end: on this machine, or on this and on those that are waiting for a call.

    Raises:
        RanksFailedError: ranks failed, on whatever node.
        ChildFailedError: torchrun itself did.
    """
    if job.compute.nodes == 1:
        _run_share(job, on_line)
    else:
        _run_on_nodes(job, on_line)


def _run_share(job: Job, on_line: Callable[[str], None], *, call: str | None = None, host: bool = True) -> None:
    """Run this machine's ranks of a job, with those of other nodes where there is a call."""
    compute, quiet = job.compute, zygote.quiet()
    meeting = None
    if call is not None:
        assert compute.rendezvous is not None
        meeting = Meeting(compute.rendezvous, compute.nodes, host=host)
    with tempfile.TemporaryDirectory(prefix="ckptflow-") as temporary:
        path = Path(temporary) / "job.json"
        path.write_text(job.model_dump_json(indent=1))
        run_torchrun(
            compute.trainer,
            [str(path)],
            ranks=compute.ranks,
            on_line=on_line,
            grace_s=compute.grace_seconds,
            env=quiet,
            run_id=call,
            meeting=meeting,
            start=partial(zygote.fork_module, env=quiet) if zygote.is_possible() else None,
        )


def _run_on_nodes(job: Job, on_line: Callable[[str], None]) -> None:
    call = Call(id=uuid.uuid4().hex, job=job)
    directory = local_path(job.store) / job.run
    notes = directory / f".nodes-{call.id}"
    _clear(directory)
    notes.mkdir(parents=True)
    on_line(f"waiting at {job.compute.rendezvous} for {job.compute.nodes - 1} more of {job.compute.nodes} nodes")
    try:
        with _calling(directory, call):
            _run_share(job, on_line, call=call.id)
    except RanksFailedError as error:
        raise _told_by_all(error, notes, job) from None
    finally:
        shutil.rmtree(notes, ignore_errors=True)


@contextmanager
def _calling(directory: Path, call: Call) -> Generator[None]:
    path = directory / CALL_NAME
    durable.replace(path, call.model_dump_json(indent=1).encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _clear(directory: Path) -> None:
    """Remove the notes of a flow that was killed; the caller is the run's only retrain."""
    for notes in directory.glob(".nodes-*"):
        shutil.rmtree(notes, ignore_errors=True)


def _told_by_all(error: RanksFailedError, notes: Path, job: Job) -> NodesFailedError:
    """Return the error of a job with what its other nodes tell of theirs."""
    compute, here = job.compute, node_name()
    found = _await_notes(notes, compute.grace_seconds + NOTE_S)
    gone = [note for note in found if note.state in {"joined", "left"}]
    missing = max(0, compute.nodes - 1 - len(found))
    failures = _in_order([RankFailure(f.rank, f.code, f.lines, here) for f in error.failures], *map(_failures, found))
    stories = [_gone(note) for note in gone]
    if failures:
        stories.append(tell(failures, compute.nodes * compute.ranks))
    if missing or not stories:
        stories += [str(error), *(f"node {note.node}: {note.reason}" for note in found if note.reason)]
    return NodesFailedError(f"{compute.trainer}: " + "\n".join(stories), failures, len(gone) + missing)


def _failures(note: Note) -> list[RankFailure]:
    return [RankFailure(failure.rank, failure.code, failure.lines, note.node) for failure in note.failures]


def _in_order(*nodes: list[RankFailure]) -> tuple[RankFailure, ...]:
    """Return all failures: first those by a signal, as an exit often is a broken connection; of each node its first."""
    ranked = [(not failure.died, place, failure) for node in nodes for place, failure in enumerate(node)]
    return tuple(failure for _, _, failure in sorted(ranked, key=lambda entry: entry[:2]))


def _gone(note: Note) -> str:
    if note.state == "left":
        return f"node {note.node} left: {note.reason or 'it was told to stop'}"
    return f"node {note.node} is gone: it does not tell how its ranks ended"


def _await_notes(notes: Path, seconds: float) -> list[Note]:
    """Return each node's last note, once all of them have ended their share or the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        found = [note for path in sorted(notes.glob("*.json")) if (note := _read_note(path))]
        if all(note.state != "joined" for note in found) or time.monotonic() > deadline:
            return found
        time.sleep(POLL_S)


def _read_note(path: Path) -> Note | None:
    try:
        return Note.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):  # being replaced, on a file system where that is no single step
        return None


def node_name() -> str:
    """Return this machine's name and process, for people and as a note's name."""
    return f"{socket.gethostname()}-{os.getpid()}"


def read_call(directory: Path) -> Call | None:
    """Return the call that is out in a run's directory, if there is one that can be read."""
    try:
        return Call.model_validate_json((directory / CALL_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def answer(directory: Path, call: Call, on_line: Callable[[str], None]) -> Note:
    """Run this node's share of a job to its end, and tell how that was; return the last note.

    An exception from outside, such as a stop, is told as `left` and passes.
    """
    path = directory / f".nodes-{call.id}" / f"{node_name()}.json"
    _write_note(path, Note(node=node_name(), state="joined"))
    note = Note(node=node_name(), state="left")
    try:
        _run_share(call.job, on_line, call=call.id, host=False)
        note = Note(node=node_name(), state="done")
    except RanksFailedError as error:
        note = _failed(error)
    except (ChildFailedError, CkptError) as error:
        note = Note(node=node_name(), state="left", reason=_end_of(error))
    finally:
        _write_note(path, note)
    return note


def _failed(error: RanksFailedError) -> Note:
    failures = [RankNote(rank=f.rank, code=f.code, lines=f.lines[-_CHARACTERS:]) for f in error.failures]
    return Note(node=node_name(), state="failed", reason=_end_of(error), failures=failures)


def _end_of(error: Exception) -> str:
    return str(error)[-_CHARACTERS:]


def _write_note(path: Path, note: Note) -> None:
    with suppress(FileNotFoundError):  # the job is over, and nobody reads notes any more
        durable.replace(path, note.model_dump_json().encode())
