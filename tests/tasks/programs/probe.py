"""Find the processes that a test started, and wait for what they do."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

MARK = "CKPTFLOW_TEST_MARK"
PATIENCE_S = 40.0
PROGRAMS = Path(__file__).parent


def marked(mark: str) -> dict[int, str]:
    """Process id and command line of each living process with `mark` in its environment; zombies have none."""
    entry = f"{MARK}={mark}".encode()
    found: dict[int, str] = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if entry in environ.read_bytes().split(b"\0"):
                line = environ.with_name("cmdline").read_bytes()
                found[int(environ.parent.name)] = line.replace(b"\0", b" ").decode()
        except OSError:
            continue
    found.pop(os.getpid(), None)
    return found


def parent_of(pid: int) -> int:
    """The parent's process id; 0 where there is none any more."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def pid_of(mark: str, program: str) -> int:
    """The one marked Python that runs `program`, options before it and all, once there is one."""
    pattern = re.compile(rf"\S+ {program} .*")
    wait_until(lambda: any(map(pattern.fullmatch, marked(mark).values())))
    [pid] = [pid for pid, line in marked(mark).items() if pattern.fullmatch(line)]
    return pid


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Return when `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen in {seconds} s"
        time.sleep(0.02)


def wait_until_gone(mark: str, seconds: float = PATIENCE_S) -> None:
    """Return when no marked process is left; fail after `seconds`, and end them."""
    try:
        wait_until(lambda: not marked(mark), seconds)
    except AssertionError:
        left = marked(mark)
        for pid in left:
            os.kill(pid, 9)
        raise AssertionError(f"left over after {seconds} s: {left}") from None
