"""Programs that run in the background: each in a session of its own, with a pid file and a log.

Whatever a program starts inherits a mark in its environment, so that nothing of it is overlooked, and nothing else is
ever stopped: a pid file that outlived its process names none of ours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "CKPTFLOW_STACK_PROGRAM"
INTERRUPTIBLE = ("env", "--default-signal=INT")
"""What a script starts in the background ignores SIGINT, by which a worker stops itself when it is sent SIGTERM."""
_TICK_S = 0.2
_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Program:
    """A program of a stack, running or not."""

    name: str
    command: tuple[str, ...]
    home: Path
    """The directory of its pid file and its log."""

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.home / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """Its process; None if it does not run."""
        try:
            pid = int(self._pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if pid in self.processes() else None

    def start(self, environment: Mapping[str, str], directory: Path) -> int:
        """Start it in a directory, and return its process."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*INTERRUPTIBLE, *self.command],
                cwd=directory,
                env={**environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        threading.Thread(target=process.wait, daemon=True).start()  # else, once it ends, it is a zombie until this does
        self._pid_file.write_text(f"{process.pid}\n")
        return process.pid

    def processes(self) -> set[int]:
        """Return its processes, and those of what it started."""
        entry = f"{MARK}={self._mark}".encode()
        found: set[int] = set()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it ended, or is another user's
                if entry in environ.read_bytes().split(b"\0"):
                    found.add(int(environ.parent.name))
        return found

    def last_lines(self) -> str:
        """Return the end of its log."""
        return self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace") if self.log.exists() else ""

    def forget(self) -> None:
        """Delete the pid file."""
        self._pid_file.unlink(missing_ok=True)

    @property
    def _pid_file(self) -> Path:
        return self.home / f"{self.name}.pid"

    @property
    def _mark(self) -> str:
        return f"{self.home}:{self.name}"


def stop(programs: Sequence[Program], grace_s: float) -> list[str]:
    """Stop programs and all that they started: SIGTERM to each, and after `grace_s` seconds SIGKILL to what is left.

    Returns:
        The names of those that had to be killed.
    """
    for program in programs:
        if (pid := program.pid) is not None:
            _signal([pid], signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(program.processes() for program in programs) and time.monotonic() < deadline:
        time.sleep(_TICK_S)
    killed: list[str] = []
    for program in programs:
        while left := program.processes():
            killed.append(program.name)
            _signal(left, signal.SIGKILL)
            time.sleep(_TICK_S)
        program.forget()
    return sorted(set(killed))


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
