"""Processes killed before a chosen system call."""

import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gloo_ranks

Job = tuple[Any, ...]
Check = Callable[[Path], object]

NAMING = ("mkdir", "rename", "renameat2", "unlink", "unlinkat", "rmdir")
"""System calls that change directories. On machines without some of these, Python uses others."""

if platform.machine() != "x86_64":
    NAMING = ("mkdirat", "renameat", "renameat2", "unlinkat")

CHANGING = (*NAMING, "write", "pwrite64", "fsync")
"""Those, and the ones that change files."""


def can_trace() -> bool:
    """Whether strace is there and may attach to other processes."""
    if shutil.which("strace") is None:
        return False
    with subprocess.Popen(["sleep", "30"]) as sleeper:
        command = ["timeout", "1", "strace", "-qq", "-p", str(sleeper.pid)]
        tracer = subprocess.run(command, capture_output=True, check=False)
        sleeper.kill()
    return tracer.returncode == 124


def kill_everywhere(
    calls: Sequence[str],
    place: Path,
    prepare: Callable[[Path], Job],
    check: Check,
    every: Mapping[str, int] | None = None,
) -> int:
    """Run a job again and again, killed before its first, second, ... of each of `calls`, until none is left.

    Args:
        calls: names of system calls, each counted by itself, as strace does.
        place: an empty directory; each run gets one of its own in it.
        prepare: makes that directory ready, and returns the job's function and arguments.
        check: is called with the directory after each kill.
        every: of how many of a call one is enough, where that is not each of them.

    Returns:
        The number of kills.
    """
    kills = 0
    for call in calls:
        count = 1
        while True:
            directory = place / f"{call}_{count}"
            directory.mkdir()
            if not _run_killed_at(call, count, *prepare(directory)):
                break
            check(directory)
            kills += 1
            count += (every or {}).get(call, 1)
    return kills


def _run_killed_at(call: str, count: int, function: Callable[..., Any], *arguments: Any) -> bool:
    """Run a function, which stops itself, in a process that is killed before its `count`th `call` from there on.

    Returns:
        Whether it was killed: otherwise it made fewer calls.
    """
    process = gloo_ranks.fork(function, *arguments)
    status = Path(f"/proc/{process.pid}/status")
    _wait_for(lambda: "State:\tT" in status.read_text())
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(process.pid)]
    tracer = subprocess.Popen([*command, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={count}"])
    try:
        _wait_for(lambda: "TracerPid:\t0\n" not in status.read_text())
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        return process.exitcode != 0
    finally:
        process.kill()
        tracer.wait(10)


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
