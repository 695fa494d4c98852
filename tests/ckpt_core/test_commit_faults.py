"""Whatever a save's system calls do, the newest committed step loads bit for bit, and success is told only when true.

`strace` kills the saving process before each of its calls on the store, or gives the call an error of the kernel's.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest
from fault_client import FaultServer
from programs import fault_state

CALLS = [
    "openat", "write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink",
    "unlinkat", "mkdir", "mkdirat", "rmdir", "ftruncate", "close",
]  # fmt: skip
FAULTS = ["signal=KILL", "error=ENOSPC", "error=EIO"]
COMMITTED = "step_0000000002"
SAVERS = 2
SHORT = 300
"""Faults that the short form injects at least, all tests together."""

LINE = re.compile(r"(\d+) +(\w+)\((.*)")


def _strace_works():
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _strace_works(), reason="needs strace (Debian package `strace`) and ptrace rights")


@dataclass(frozen=True)
class Point:
    """The `number`-th call of `call` of a rank, which does something to the store."""

    rank: int
    call: str
    number: int
    arguments: str

    @property
    def writes(self):
        """Whether it is of the calls that write: of those that open a file, the ones that make it."""
        return self.call != "openat" or "O_CREAT" in self.arguments


class Saver:
    """A server, and a store for it that is made anew for each save."""

    def __init__(self, place, template):
        self.store, self._template, self.server = place / "place" / "store", template, FaultServer()

    def refresh(self):
        """Make a store with one committed step, in place of what is there."""
        shutil.rmtree(self.store.parent, ignore_errors=True)
        shutil.copytree(self._template, self.store.parent)

    def save(self, *, step=2, ranks=1, rank=0, strace=()):
        """Save a step, with `strace` and these arguments attached to one rank; return what the ranks say."""
        process = self.server.prepare(self.store, step, ranks)[rank]
        with attached(process, strace):
            self.server.go()
            return self.server.outcomes()


@contextmanager
def attached(process, arguments):
    """Attach `strace` to a process, unless there are no arguments for it."""
    if not arguments:
        yield
        return
    trace = ["-e", "trace=" + ",".join("?" + call for call in CALLS)]
    with subprocess.Popen(
        ["strace", "-f", "-p", str(process), *trace, *arguments], stderr=subprocess.PIPE, text=True
    ) as tracer:
        assert "attached" in tracer.stderr.readline()
        try:
            yield
        finally:
            tracer.communicate(timeout=30)  # it ends with the process


@pytest.fixture(scope="module")
def savers(tmp_path_factory):
    """Two savers, so that both processors have work; their stores lie in memory, where a flush takes no time."""
    template = tmp_path_factory.mktemp("template") / "place"
    (template / "assets" / "deeper").mkdir(parents=True)
    (template / "assets" / "vocabulary.txt").write_text("a b c")
    (template / "assets" / "deeper" / "notes.txt").write_text("d")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        started = [Saver(Path(directory) / str(number), template) for number in range(SAVERS)]
        started[0].refresh()
        assert started[0].save(step=1) == ["committed"]
        shutil.copytree(started[0].store, template / "store")
        yield started
        for saver in started:
            saver.server.close()


@pytest.fixture(scope="module")
def points(savers, tmp_path_factory):
    """The calls on the store of a save without a fault, by number of ranks and rank."""
    logs = tmp_path_factory.mktemp("traces")
    return {(ranks, rank): _points(savers[0], logs, ranks, rank) for ranks, rank in [(1, 0), (2, 0), (2, 1)]}


def _points(saver, logs, ranks, rank):
    saver.refresh()
    log = logs / f"{ranks}-{rank}"
    said = saver.save(ranks=ranks, rank=rank, strace=["-y", "-s", "4096", "-o", str(log)])
    assert said == ["committed"] * ranks
    counts, found = Counter(), {}
    for thread, call, arguments in LINE.findall(log.read_text()):
        counts[thread, call] += 1  # as strace counts
        if f"{saver.store}/" in arguments and f"{COMMITTED}/" not in arguments:  # what follows only reads the new step
            number = counts[thread, call]
            found[call, number] = Point(rank, call, number, arguments.replace(str(saver.store), ""))
    return list(found.values())


@pytest.fixture(scope="module")
def tally():
    """How many faults each campaign injected, by ranks, rank and fault."""
    return Counter()


def inject(saver, point, fault, *, ranks=1):
    """Save with one fault; return what is wrong afterwards, and how the save ended."""
    saver.refresh()
    said = saver.save(
        ranks=ranks,
        rank=point.rank,
        strace=["-o", "/dev/null", "-e", f"inject={point.call}:{fault}:when={point.number}"],
    )
    try:
        step = saver.server.newest(saver.store)
        assert step in {1, 2}, f"the newest step: {step}"
        assert step == 2 or "committed" not in said, "success was reported, and is not true"
        uncertain = all(outcome.startswith(("CommitError", "died", "committed", "RuntimeError")) for outcome in said)
        assert step == 1 or uncertain, "an error was reported, and the step was committed"
        again = saver.save(ranks=ranks)
        expected = "committed" if step == 1 else "StepExistsError"
        assert all(outcome.startswith(expected) for outcome in again), f"a retry gave {again}"
        assert fault_state.newest_digested(saver.store) == 2
        assert fault_state.debris(saver.store) == []
    except Exception as error:  # noqa: BLE001 - collected
        return f"{point} {fault}: {said}: {type(error).__name__}: {error}", said
    return None, said


def campaign(savers, chosen, fault, capsys, *, ranks=1):
    """Inject a fault at each point, one at a time with each saver; fail with all that went wrong."""
    free = SimpleQueue()
    for saver in savers:
        free.put(saver)

    def one(point):
        saver = free.get()
        try:
            return point, *inject(saver, point, fault, ranks=ranks)
        finally:
            free.put(saver)

    with ThreadPoolExecutor(len(savers)) as pool:
        results = list(pool.map(one, chosen))
    wrong = [error for _, error, _ in results if error]
    outcomes = Counter(said[point.rank].partition(":")[0] for point, _, said in results)
    with capsys.disabled():
        print(f"\n{len(chosen)} x {fault}, {ranks} ranks: {dict(outcomes)}, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
    return outcomes


def spread(found, count):
    """Choose about `count` of the points, evenly; always the last ones, around the rename."""
    stride = max(1, len(found) // count)
    return sorted({*found[::stride], *found[-3:]}, key=found.index)


FORMS = pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.long)], ids=["short", "long"])


@FORMS
@pytest.mark.parametrize("fault", FAULTS)
def test_one_rank(savers, points, tally, capsys, fault, long):
    """Killed before a call, or when a call fails, a save leaves the old step or the new one, and the next commits."""
    chosen = points[1, 0] if long else [point for point in points[1, 0] if point.writes]
    if not long and fault != "signal=KILL":
        chosen = chosen[FAULTS.index(fault) % 2 :: 2]  # each call gets one of the two errors
    outcomes = campaign(savers, chosen, fault, capsys)
    tally[1, 0, fault, long] = len(chosen)
    if fault == "signal=KILL":
        assert outcomes == {"died 9": len(chosen)}
    else:
        assert outcomes["OSError"] > len(chosen) / 3


@FORMS
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks(savers, points, tally, capsys, rank, fault, long):
    """With two ranks, a fault of either leaves both with the old step or with the new one."""
    writes = [point for point in points[2, rank] if point.writes]
    missing = SHORT - 2 * len([point for point in points[1, 0] if point.writes])
    chosen = points[2, rank] if long else spread(writes, max(6, missing // 5))
    campaign(savers, chosen, fault, capsys, ranks=2)
    tally[2, rank, fault, long] = len(chosen)


def test_the_short_form_has_its_number(tally, capsys):
    """The short form injects at least 300 faults."""
    counts = [count for (*_, long), count in tally.items() if not long]
    if len(counts) < 9:
        pytest.skip("counts the faults of the whole file, and only a part of it was run")
    with capsys.disabled():
        print(f"\n{sum(counts)} faults")
    assert sum(counts) >= SHORT
