"""Run a module in several ranks on this machine, under torchrun, and say which rank failed and what it printed last."""

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from signal import SIGTERM
from tempfile import TemporaryDirectory

from ckpt_core.errors import ArgumentError
from tasks.lines import Lines
from tasks.process import GRACE_S, TAIL_LINES, ChildFailedError, how_it_ended, last_lines, supervise

AGENT = Path(__file__).with_name("agent.py")
RANKS_SHOWN = 3
STOPPED = (-SIGTERM, 128 + SIGTERM)  # how a rank ends that torchrun stopped because another one had failed


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
) -> None:
    """Run `python -m module args...` in `ranks` processes under torchrun; stop and fail as `tasks.process.run` does.

    `on_line` gets each rank's lines whole, as `[rank 0] text`, and torchrun's own as they are. `run_id` is the ranks'
    TORCHELASTIC_RUN_ID, by default a fresh one. OMP_NUM_THREADS is 1 unless it is set: the number of threads changes
    the sums on a CPU.

    When a rank fails torchrun sends the others SIGTERM and, 30 s later, SIGKILL (its own fixed time). Then
    `ChildFailedError` names the ranks that failed by themselves, with each one's exit code or signal and last lines.
    """
    if ranks < 1:
        raise ArgumentError(f"ranks is {ranks}; expected 1 or more: one a GPU, or a few on a CPU")
    output = Lines(on_line, keep=tail_lines)
    readers = [Lines(partial(_prefixed, on_line, rank), keep=tail_lines) for rank in range(ranks)]
    with TemporaryDirectory(prefix="ckptflow-") as name, _pipes(Path(name), readers) as streams:
        job = run_id or uuid.uuid4().hex
        options = {"--directory": name, "--ranks": ranks, "--run-id": job, "--grace-s": grace_s}
        code = supervise(
            [sys.executable, "-P", str(AGENT), *_flat(options), module, *args],
            output=output,
            streams=streams,
            env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **(env or {})},
            grace_s=grace_s,
        )
        failures = _failures(Path(name))
    if failures:
        raise ChildFailedError(_story(module, failures, readers))
    if code:
        raise ChildFailedError(f"torchrun of {module} {how_it_ended(code)}{_all_last_lines(output, readers)}")


def _prefixed(on_line: Callable[[str], None], rank: int, line: str) -> None:
    on_line(f"[rank {rank}] {line}")


def _flat(options: Mapping[str, object]) -> list[str]:
    return [str(part) for pair in options.items() for part in pair]


@contextmanager
def _pipes(directory: Path, readers: Sequence[Lines]) -> Iterator[dict[int, Lines]]:
    """A FIFO for each rank, `rank_0` and so on, opened for reading, with its reader."""
    streams: dict[int, Lines] = {}
    try:
        for rank, lines in enumerate(readers):
            path = directory / f"rank_{rank}"
            os.mkfifo(path)
            # Open for writing too: a FIFO without a writer, before and between ranks, counts as at its end.
            streams[os.open(path, os.O_RDWR | os.O_NONBLOCK)] = lines
        yield streams
    finally:
        for fd in streams:
            os.close(fd)


def _failures(directory: Path) -> list[tuple[int, int]]:
    """Rank and exit code of each rank that failed, those first that did so by themselves."""
    report = directory / "failures.json"
    if not report.exists():
        return []
    failures = [(entry["rank"], entry["code"]) for entry in json.loads(report.read_text())]
    return [f for f in failures if f[1] not in STOPPED] or failures[:1]


def _story(module: str, failures: Sequence[tuple[int, int]], readers: Sequence[Lines]) -> str:
    shown = [
        f"rank {rank} of {len(readers)} {how_it_ended(code)}{last_lines(readers[rank].tail)}"
        for rank, code in failures[:RANKS_SHOWN]
    ]
    more = len(failures) - len(shown)
    return "\n".join([f"{module}: {shown[0]}", *shown[1:], *([f"and {more} more ranks failed"] if more else [])])


def _all_last_lines(output: Lines, readers: Sequence[Lines]) -> str:
    """Of torchrun's own output and of the ranks', since it is not known which of them tells the cause."""
    ranks = [f"[rank {rank}] {line}" for rank, lines in enumerate(readers) for line in lines.tail]
    return last_lines([*ranks, *output.tail])
