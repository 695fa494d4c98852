"""Whatever a save's system calls do, the newest committed step loads bit for bit, and success is told only when true.

`strace` stops the saving process before each of its calls on the store, or gives the call an error of the kernel's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import fault_state

PROGRAMS = Path(fault_state.__file__).parent
CALLS = [
    "openat", "write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink",
    "unlinkat", "mkdir", "mkdirat", "rmdir", "ftruncate", "close",
]  # fmt: skip
COMMITTED = "step_0000000002"
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
    def changes(self):
        """Whether what lies in the store is another after it."""
        return self.call != "close" and ("O_CREAT" in self.arguments or self.call != "openat")


class Server:
    """`programs/fault_server.py`, which has torch loaded already."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "programs.fault_server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROGRAMS.parent,
            env={"PYTHONPATH": f"{PROGRAMS.parent}:{PROGRAMS.parents[2]}", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def save(self, store, *, ranks=1, rank=0, strace=()):
        """Save step 2, with `strace` and these arguments attached to one rank; return what the ranks say."""
        self._tell(json.dumps([ranks, str(store), 2]))
        processes = json.loads(self.process.stdout.readline())
        self.traced = processes[rank]
        with attached(self.traced, strace):
            self._tell("go")
            return json.loads(self.process.stdout.readline())

    def _tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


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
def server():
    """The server; it ends with the module."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A place with assets and a store with one committed step."""
    place = tmp_path_factory.mktemp("template") / "place"
    (place / "assets" / "deeper").mkdir(parents=True)
    (place / "assets" / "vocabulary.txt").write_text("a b c")
    (place / "assets" / "deeper" / "notes.txt").write_text("d")
    fault_state.save(place / "store", 1)
    return place


@pytest.fixture
def fresh(template):
    """Make a store with one committed step, as often as is asked: in memory, where a flush takes no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:

        def make():
            shutil.rmtree(f"{directory}/place", ignore_errors=True)
            return Path(shutil.copytree(template, f"{directory}/place")) / "store"

        yield make


def points(server, store, tmp_path, *, ranks=1, rank=0):
    """Run once without a fault; return the calls of a rank's main thread that touch the store."""
    log = tmp_path / f"trace-{rank}"
    said = server.save(store, ranks=ranks, rank=rank, strace=["-y", "-s", "4096", "-o", str(log)])
    assert said == ["committed"] * ranks
    counts, found = Counter(), []
    for process, call, arguments in LINE.findall(log.read_text()):
        if int(process) == server.traced:
            counts[call] += 1
            if f"{store}/" in arguments and f"{COMMITTED}/" not in arguments:  # what follows only reads the new step
                found.append(Point(rank, call, counts[call], arguments.replace(str(store), "")))
    return found


def inject(server, fresh, point, fault, *, ranks=1):
    """Save with one fault; return what is wrong afterwards, and how the save ended."""
    store = fresh()
    said = server.save(
        store,
        ranks=ranks,
        rank=point.rank,
        strace=["-o", "/dev/null", "-e", f"inject={point.call}:{fault}:when={point.number}"],
    )
    try:
        step = fault_state.newest(store)
        assert step == 2 or "committed" not in said, "success was reported, and is not true"
        uncertain = all(outcome.startswith(("CommitError", "died", "committed", "RuntimeError")) for outcome in said)
        assert step == 1 or uncertain, "an error was reported, and the step was committed"
        again = server.save(store, ranks=ranks)
        expected = "committed" if step == 1 else "StepExistsError"
        assert all(outcome.startswith(expected) for outcome in again), f"a retry gave {again}"
        assert fault_state.newest_digested(store) == 2
        assert fault_state.debris(store) == []
    except Exception as error:  # noqa: BLE001 - collected
        return f"{point} {fault}: {said}: {type(error).__name__}: {error}", said
    return None, said


def campaign(server, fresh, chosen, fault, capsys, *, ranks=1):
    """Inject a fault at each point; fail with all that went wrong."""
    outcomes, wrong = Counter(), []
    for point in chosen:
        error, said = inject(server, fresh, point, fault, ranks=ranks)
        wrong += [error] if error else []
        outcomes[said[point.rank].partition(":")[0]] += 1
    with capsys.disabled():
        print(f"\n{len(chosen)} x {fault}, {ranks} ranks: {dict(outcomes)}, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
    return outcomes


def spread(found, count):
    """Choose about `count` of the points, evenly; always the last ones, around the rename."""
    stride = max(1, len(found) // count)
    return sorted({*found[::stride], *found[-3:]}, key=found.index)


FORMS = [17, pytest.param(10**9, marks=pytest.mark.long)]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["short", "long"])
def test_killed(server, fresh, tmp_path, capsys, every):
    """Killed before any call, a save leaves the old step or the new one, and the next save commits."""
    chosen = [point for point in points(server, fresh(), tmp_path) if every or point.changes]
    outcomes = campaign(server, fresh, chosen, "signal=KILL", capsys)
    assert outcomes == {"died 9": len(chosen)}


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("count", FORMS, ids=["short", "long"])
def test_refused(server, fresh, tmp_path, capsys, error, count):
    """A call that fails, of a full or a broken disk, is an error of the save, and the next save commits."""
    chosen = spread(points(server, fresh(), tmp_path), count)
    outcomes = campaign(server, fresh, chosen, f"error={error}", capsys)
    assert outcomes["OSError"] > len(chosen) / 3


@pytest.mark.parametrize("count", [4, pytest.param(10**9, marks=pytest.mark.long)], ids=["short", "long"])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks(server, fresh, tmp_path, capsys, rank, count):
    """With two ranks, the death of either, at any point, leaves the old step or the new one."""
    found = points(server, fresh(), tmp_path, ranks=2, rank=rank)
    chosen = spread([point for point in found if point.changes], count)
    campaign(server, fresh, chosen, "signal=KILL", capsys, ranks=2)
