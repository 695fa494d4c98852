"""Run a module in several ranks under torchrun, and say which rank failed and what it printed last.

The ranks are this machine's, or its share of a job on several nodes whose agents meet.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from signal import SIGTERM
from tempfile import TemporaryDirectory
from typing import Any

from ckpt_core.errors import ArgumentError
from tasks.addresses import address_towards, socket_variables
from tasks.lines import Lines
from tasks.process import GRACE_S, TAIL_LINES, ChildFailedError, Start, how_it_ended, last_lines, supervise

RANKS_SHOWN = 3
STOPPED = (-SIGTERM, 128 + SIGTERM)  # how a rank ends that torchrun stopped because another one had failed


@dataclass(frozen=True)
class Meeting:
    """Where the agents of a job on several nodes meet."""

    endpoint: str
    """`host:port` of the host, as all nodes reach it."""

    nodes: int
    host: bool
    """Whether this is the node that hosts the rendezvous."""

    wait_s: float = 600.0
    """How long to wait for all nodes to come."""


@dataclass(frozen=True)
class RankFailure:
    """How one rank failed."""

    rank: int
    """Its number among the ranks of all nodes."""

    code: int
    """Its exit code, or minus the number of the signal that ended it."""

    lines: str
    """What it printed last."""

    node: str = ""
    """Where it ran, in a job on several nodes."""

    @property
    def died(self) -> bool:
        """Whether a signal ended it, other than torchrun's for the ranks beside a failed one."""
        return self.code < 0 and self.code not in STOPPED

    def story(self, ranks: int) -> str:
        """Tell it, of how many ranks it was one."""
        where = f" on node {self.node}" if self.node else ""
        return f"rank {self.rank} of {ranks}{where} {how_it_ended(self.code)}{last_lines(self.lines.splitlines())}"


class RanksFailedError(ChildFailedError):
    """Ranks failed by themselves, or were stopped for what happened on another node.

    `failures` are those of this node, the ones that caused the end, in the order in which they were seen; none when the
    cause lies elsewhere.
    """

    def __init__(self, message: str, failures: Sequence[RankFailure] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)


def run_torchrun(
    module: str,
    args: Sequence[str],
    *,
    ranks: int,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
    run_id: str | None = None,
    tail_lines: int = TAIL_LINES,
    meeting: Meeting | None = None,
    start: Start | None = None,
) -> None:
    """Run `python -m module args...` in `ranks` processes under torchrun; stop and fail as `tasks.process.run` does.

    `on_line` gets each rank's lines whole, as `[rank 0] text`, and torchrun's own as they are. `run_id` is the ranks'
    TORCHELASTIC_RUN_ID, by default a fresh one. OMP_NUM_THREADS is 1 unless it is set: the number of threads changes
    the sums on a CPU. With a `meeting` these are this node's of a job on several nodes, which give the same `run_id`;
    gloo and NCCL then use the network interface that leads to the host, unless the environment names another.

    `start` starts torchrun in another way than by executing it; its ranks are forks of it then.

    When a rank fails torchrun sends the others SIGTERM and, after the grace, SIGKILL; those on other nodes, too.
    `RanksFailedError` names the ranks that failed by themselves, with each one's exit code or signal and last lines.
    """
    if ranks < 1:
        raise ArgumentError(f"ranks is {ranks}; expected 1 or more: one a GPU, or a few on a CPU")
    output = Lines(on_line, keep=tail_lines)
    job = run_id or uuid.uuid4().hex
    with TemporaryDirectory(prefix="ckptflow-") as name, _Ranks(Path(name), ranks, on_line, tail_lines).pipes() as here:
        options = {"--directory": name, "--ranks": ranks, "--run-id": job, "--grace-s": grace_s}
        met, network = _meet(meeting)
        forks = ["--fork"] if start else []
        code = supervise(
            [sys.executable, "-u", "-m", "tasks.agent", *_flat(options), *met, *forks, module, *args],
            output=output,
            streams=here.streams,
            env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **network, **(env or {})},
            grace_s=grace_s,
            start=start,
        )
        report = here.report()
        failures = here.failures(report)
    if failures:
        world = ranks * (meeting.nodes if meeting else 1)
        raise RanksFailedError(f"{module}: {tell(failures, world)}", failures)
    if "ended" in report:
        raise RanksFailedError(f"{module}: this node's ranks were stopped: {report['ended']}")
    if code:
        raise ChildFailedError(f"torchrun of {module} {how_it_ended(code)}{here.all_last_lines(output)}")


def tell(failures: Sequence[RankFailure], ranks: int) -> str:
    """Tell of the first few ranks that failed, of how many there were."""
    shown = [failure.story(ranks) for failure in failures[:RANKS_SHOWN]]
    more = len(failures) - len(shown)
    return "\n".join([*shown, *([f"and {more} more ranks failed"] if more else [])])


def _meet(meeting: Meeting | None) -> tuple[list[str], dict[str, str]]:
    """The agent's options for a meeting, and what its ranks need in their environment."""
    if meeting is None:
        return [], {}
    try:
        address = address_towards(meeting.endpoint)
    except OSError as error:
        raise ArgumentError(
            f"rendezvous {meeting.endpoint}: cannot be reached from here: {error.strerror}; expected host:port of the "
            "machine that runs the flow"
        ) from None
    options = {
        "--nodes": meeting.nodes,
        "--endpoint": meeting.endpoint,
        "--address": address,
        "--wait-s": meeting.wait_s,
    }
    return [*_flat(options), *(["--host"] if meeting.host else [])], socket_variables(address)


def _flat(options: Mapping[str, object]) -> list[str]:
    return [str(part) for pair in options.items() for part in pair]


class _Ranks:
    """The ranks of this machine, as their agent tells of them in a directory: a pipe for each, and a report."""

    def __init__(self, directory: Path, count: int, on_line: Callable[[str], None], keep: int) -> None:
        self._directory = directory
        self._readers = [Lines(partial(self._prefixed, on_line, local), keep=keep) for local in range(count)]
        self.streams: dict[int, Lines] = {}

    @cached_property
    def _first(self) -> int:
        """The number of the first of them among all nodes'; the agent writes it before it starts one."""
        return int((self._directory / "first_rank").read_text())

    def _prefixed(self, on_line: Callable[[str], None], local: int, line: str) -> None:
        on_line(f"[rank {self._first + local}] {line}")

    @contextmanager
    def pipes(self) -> Iterator["_Ranks"]:
        """A FIFO for each rank, `rank_0` and so on, opened for reading: `streams` has them with their readers."""
        try:
            for local, lines in enumerate(self._readers):
                path = self._directory / f"rank_{local}"
                os.mkfifo(path)
                # Open for writing too: a FIFO without a writer, before and between ranks, counts as at its end.
                self.streams[os.open(path, os.O_RDWR | os.O_NONBLOCK)] = lines
            yield self
        finally:
            for fd in self.streams:
                os.close(fd)

    def report(self) -> dict[str, Any]:
        """What the agent wrote of the end; empty when it wrote nothing."""
        path = self._directory / "report.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def failures(self, report: Mapping[str, Any]) -> list[RankFailure]:
        """The ranks that failed by themselves; the first one where all were stopped."""
        seen: list[tuple[int, int]] = [(entry["rank"], entry["code"]) for entry in report.get("failures", ())]
        own = [failure for failure in seen if failure[1] not in STOPPED] or seen[:1]
        return [RankFailure(rank, code, "\n".join(self._readers[rank - self._first].tail)) for rank, code in own]

    def all_last_lines(self, output: Lines) -> str:
        """Of torchrun's own output and of the ranks', since it is not known which of them tells the cause."""
        ranks = [f"[rank {self._first + n}] {line}" for n, lines in enumerate(self._readers) for line in lines.tail]
        return last_lines([*ranks, *output.tail])
