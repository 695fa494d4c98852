"""A process that has imported what jobs need, and forks one for each: imports take seconds, a fork none.

    this process ── zygote: imports once, and runs nothing
                      ├── reaper ── job: python -m MODULE ARGS...
                      └── reaper ── job

A job has the environment, directory, streams and supervision of a command that `tasks.process` starts. The zygote ends
with the process that started it, however that ends.

CUDA does not survive a fork, and the client of the Hub reads its settings where it is imported: so there is none where
there are GPUs, and a job with an environment of its own starts anew.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import reaper
from tasks.held import held
from tasks.main_module import run_as_main

if TYPE_CHECKING:
    from tasks.process import Reaper, Surroundings

PRELOADED = (
    "torch.distributed.launcher.api",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "pydantic.main",
    "tokenizers",
)
"""What costs the seconds."""

_PYTHON_M = [sys.executable, "-u", "-m"]
_GPUS = Path("/proc/driver/nvidia/gpus")
_MOST_BYTES = 1 << 18
_MOST_PIPES = 64
_END_S = 1.0
_OWN = ("PREFECT_", "PYTEST_")
"""Beginnings of variables that no import of a job looks at."""

_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}

_lock = threading.Lock()
_zygotes: dict[str, Zygote] = {}
"""The one of this process, by the surroundings that it was started in."""


def quiet() -> dict[str, str]:
    """Return what silences libraries; tqdm's bars, which a log cannot redraw, unless the user has set it otherwise."""
    return {**_QUIET, "TQDM_DISABLE": os.environ.get("TQDM_DISABLE", "1")}


def is_possible() -> bool:
    """Return whether there may be one on this machine."""
    return sys.platform == "linux" and not _GPUS.exists()


def fork_module(
    command: Sequence[str], around: Surroundings, *, env: Mapping[str, str], modules: Sequence[str] = PRELOADED
) -> Reaper:
    """Start `python -u -m MODULE ARGS...` as a fork of this process's zygote; execute it where that cannot be done.

    Args:
        command: as `tasks.process.supervise` has it.
        around: likewise.
        env: what of `around.env` was added to this process's environment, and imports look at.
        modules: what the zygote imports.
    """
    from tasks.process import ExecutedReaper

    assert list(command[:3]) == _PYTHON_M
    with suppress(OSError):
        if zygote := _current(env, modules):
            return zygote.fork(command[3:], around)
    return ExecutedReaper(command, around)


def end() -> None:
    """End this process's zygote, if it has one; the next job starts another."""
    with _lock:
        for zygote in _zygotes.values():
            zygote.close()
        _zygotes.clear()


atexit.register(end)


def _current(env: Mapping[str, str], modules: Sequence[str]) -> Zygote | None:
    """Return this process's zygote, if it may have one: a new one where what its imports looked at has changed."""
    if not is_possible():
        return None
    full = {**os.environ, **env}
    looked_at = {name: value for name, value in full.items() if not name.startswith(_OWN)}
    key = json.dumps([str(Path.cwd()), sorted(looked_at.items()), list(modules)])
    with _lock:
        found = _zygotes.get(key)
    if found is None or not found.is_alive():
        end()
        with _lock:
            found = _zygotes[key] = Zygote(full, modules)
    return found


class Zygote:
    """The zygote, seen from the process that started it."""

    def __init__(self, env: Mapping[str, str], modules: Sequence[str]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*_PYTHON_M, "tasks.zygote", str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=env,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    def is_alive(self) -> bool:
        """Return whether it runs."""
        return self._process.poll() is None

    def fork(self, job: Sequence[str], around: Surroundings) -> ForkedReaper:
        """Have it fork a reaper with a job, a module's name and its arguments.

        Raises:
            OSError: it is gone, or the message is too large.
        """
        lifeline, ours = os.pipe()
        told, status = os.pipe()
        made = ForkedReaper(told, ours)
        try:
            order = asdict(_Order(list(job), dict(around.env), around.cwd, around.grace_s, len(around.kept)))
            pipes = [lifeline, around.sink, status, *around.kept, *held()]
            socket.send_fds(self._channel, [json.dumps(order).encode()], pipes, socket.MSG_NOSIGNAL)
        except BaseException:
            made.close()
            raise
        finally:
            os.close(lifeline)
            os.close(status)
        return made

    def close(self) -> None:
        """Let it end: at once, or when the jobs that it has forked have ended."""
        self._channel.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            threading.Thread(target=self._process.wait, daemon=True).start()


class ForkedReaper:
    """A reaper that a zygote forked; it tells its process id, and how its command ended."""

    def __init__(self, told: int, lifeline: int) -> None:
        os.set_blocking(told, False)
        self._code: int | None = None
        self._told, self._lifeline = told, lifeline
        self._text = b""
        self._process: int | None = None
        """A pidfd: process ids are used again."""

    def poll(self) -> int | None:
        """Return how the command ended, when all of it has."""
        with suppress(BlockingIOError):
            while self._code is None:
                chunk = os.read(self._told, 64)
                self._hear(chunk)
        return self._code

    def terminate(self) -> None:
        """Ask for the tree's end; one that is not there yet will find the lifeline cut."""
        self.poll()
        if self._process is None:
            self._cut()
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGTERM)

    def close(self) -> None:
        """Close its lifeline, and all that is known of it."""
        self._cut()
        for fd in (self._told, self._process):
            if fd is not None:
                os.close(fd)

    def leave(self) -> None:
        """Let it end by itself: the zygote collects it."""

    def _cut(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _hear(self, chunk: bytes) -> None:
        self._text += chunk
        pid, *rest = self._text.split(b"\n")
        if rest and self._process is None:
            with suppress(ProcessLookupError):
                self._process = os.pidfd_open(int(pid))
        if len(rest) > 1:
            self._code = int(rest[0])
        elif not chunk:  # nobody is left who could tell
            self._code = -signal.SIGKILL


@dataclass(frozen=True)
class _Order:
    """What a zygote is to fork."""

    job: list[str]
    env: Mapping[str, str]
    cwd: str
    grace_s: float
    kept: int
    """How many of the file descriptors that come with it are `Surroundings.kept`; others follow, to be kept open."""


class _Server:
    """The zygote itself."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._reapers: set[int] = set()
        reaper.prctl(reaper.PR_SET_CHILD_SUBREAPER, 1)  # it adopts what a reaper that was killed leaves
        signal.signal(signal.SIGCHLD, self._bury)

    def serve(self) -> list[str] | None:
        """Fork a reaper for each order. Return None when nobody can give one; in a job's process return the job."""
        while True:
            message, pipes, _, _ = socket.recv_fds(self._channel, _MOST_BYTES, _MOST_PIPES)
            if not message:
                break
            if self._fork() == 0:
                self._channel.close()
                return _reap(_Order(**json.loads(message)), *pipes)
            for fd in pipes:
                os.close(fd)
        while self._reapers:  # which would take its end for their caller's
            time.sleep(_END_S / 10)
        return None

    def _fork(self) -> int:
        """Fork, and know the child before it may be taken for a stray."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        else:
            self._reapers.add(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        return pid

    def _bury(self, *_: object) -> None:
        """Collect the dead, and kill the strays."""
        with suppress(ChildProcessError):
            while dead := os.waitpid(-1, os.WNOHANG)[0]:
                self._reapers.discard(dead)
        for stray in set(reaper.children().get(os.getpid(), [])) - self._reapers:
            with suppress(ProcessLookupError):
                os.kill(stray, signal.SIGKILL)


def _reap(order: _Order, lifeline: int, sink: int, status: int, *others: int) -> list[str]:
    """Be a job's reaper, and end when the job has; in the job's process return the job."""
    kept = others[: order.kept]
    os.setpgid(0, 0)
    for fd, stream in ((lifeline, 0), (sink, 1), (sink, 2)):
        os.dup2(fd, stream)
    for fd in (lifeline, sink):
        os.close(fd)
    os.environ.clear()
    os.environ.update(order.env)
    caller = reaper.adopt(os.getppid(), list(kept))
    _tell(status, os.getpid())
    code = 1
    if not caller.wants_end():
        pid = os.fork()
        if pid == 0:
            caller.forget()
            _become_job(order, status, kept)
            return order.job
        with suppress(OSError):  # it does so itself; whoever comes first
            os.setpgid(pid, pid)
        code = reaper.watch(reaper.Tree(pid), caller, order.grace_s)
    _tell(status, code)
    os._exit(0)


def _tell(status: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(status, f"{number}\n".encode())


def _become_job(order: _Order, status: int, kept: Sequence[int]) -> None:
    """Leave nothing of the reaper in this process."""
    os.setpgid(0, 0)
    default = dict.fromkeys((signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)
    for number, handler in {**default, signal.SIGINT: signal.default_int_handler}.items():
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's background jobs ignore SIGINT
            signal.signal(number, handler)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for fd in (null, status, *kept):
        os.close(fd)
    os.chdir(order.cwd)


def main() -> None:
    """Import, then fork what is ordered; in the process of a job, be that job."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # a collection would touch, and so copy, every page that is shared
    job = _Server(channel).serve()
    if job is not None:
        run_as_main(job)


if __name__ == "__main__":
    main()
