"""Run a child process so that nothing of it outlives the caller, and hand out its lines while it runs.

The command runs under `tasks.reaper`, which ends its whole tree whatever dies first: the caller, the command or a
descendant. A caller that is interrupted (cancelled, Ctrl-C, SIGTERM turned into an exception) asks for that end, goes
on reading lines until the tree is gone, and lets its exception pass. `run` waits in short polls, so that an exception
which another thread raises in this one, Prefect's way to cancel a task, arrives at once. A thread that nobody
interrupts, such as a submitted task's under a worker's cancellation, ends with its process, and the tree then.
"""

import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tasks.held import held
from tasks.lines import Lines

GRACE_S = 20.0  # Prefect sends SIGKILL 30 s after SIGTERM
TAIL_LINES = 40
POLL_MS = 100
END_S = 0.001
CHUNK = 1 << 16
SHORT = 120
MARK = "CKPTFLOW_PROCESS_TREE"
REAPER = Path(__file__).with_name("reaper.py")


class ChildFailedError(RuntimeError):
    """A child process failed; the message says which, how it ended and what it printed last."""


@dataclass(frozen=True)
class Surroundings:
    """What a command finds when it starts."""

    sink: int
    """A file descriptor: its standard output and error."""

    kept: Sequence[int]
    """Reading ends of pipes that its tree writes to, for the reaper to drain when this process is gone."""

    env: Mapping[str, str]
    """The whole environment."""

    cwd: str
    grace_s: float


class Reaper(Protocol):
    """A running `tasks.reaper`, which this process started."""

    def poll(self) -> int | None:
        """Return how the command ended, when all of it has: its exit code, or minus a signal's number."""
        ...

    def terminate(self) -> None:
        """Ask for the tree's end."""

    def close(self) -> None:
        """Close its lifeline, which asks for the tree's end too."""

    def leave(self) -> None:
        """Let it end by itself, without anybody who waits."""


Start = Callable[[Sequence[str], Surroundings], Reaper]


class ExecutedReaper(subprocess.Popen[bytes]):
    """A reaper that executes a command."""

    def __init__(self, command: Sequence[str], around: Surroundings) -> None:
        options = [str(os.getpid()), str(around.grace_s), ",".join(map(str, around.kept))]
        super().__init__(
            [sys.executable, "-I", "-S", str(REAPER), *options, *command],
            stdin=subprocess.PIPE,  # never written: its end tells the reaper that this process is gone
            stdout=around.sink,
            stderr=around.sink,
            env=around.env,
            cwd=around.cwd,
            pass_fds=(*around.kept, *held()),
            process_group=0,
        )

    def close(self) -> None:
        """Close its lifeline."""
        assert self.stdin is not None
        self.stdin.close()

    def leave(self) -> None:
        """Have a thread collect its exit status: nobody else does."""
        threading.Thread(target=self.wait, daemon=True).start()


def run(
    command: Sequence[str],
    *,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    grace_s: float = GRACE_S,
    tail_lines: int = TAIL_LINES,
    start: Start | None = None,
) -> None:
    """Run `command` to its end; raise `ChildFailedError` unless it exits with 0.

    `on_line` gets each line of standard output and error, without its end, in this thread. `env` is added to this
    process's environment. Any exception here, from `on_line` too, stops the command and all its descendants: SIGTERM,
    SIGKILL for what is left after `grace_s` seconds. A second exception during that wait does not wait for the end,
    which comes all the same. `start` starts the command under a reaper, in another way than by executing both.
    """
    output = Lines(on_line, keep=tail_lines)
    code = supervise(command, output=output, env=env, cwd=cwd, grace_s=grace_s, start=start)
    if code:
        raise ChildFailedError(f"{shorten(command)} {how_it_ended(code)}{last_lines(output.tail)}")


def supervise(
    command: Sequence[str],
    *,
    output: Lines,
    streams: Mapping[int, Lines] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    grace_s: float = GRACE_S,
    start: Start | None = None,
) -> int:
    """`run` for a caller with readers of its own; the exit code, or minus the number of the signal that ended it.

    `output` gets standard output and error; `streams` are reading ends of further, non-blocking pipes, and their
    readers.
    """
    mark = uuid.uuid4().hex
    with ExitStack() as stack:
        receive, send = os.pipe()
        stack.callback(os.close, receive)
        os.set_blocking(receive, False)
        readers = {receive: output, **(streams or {})}
        full_env = {**os.environ, **(env or {}), MARK: mark}
        with os.fdopen(send, "wb") as sink:
            around = Surroundings(sink.fileno(), list(readers), full_env, str(cwd or Path.cwd()), grace_s)
            reaper = (start or ExecutedReaper)(command, around)
        stack.callback(reaper.close)
        try:
            return _pump(reaper, readers, mark)
        except BaseException:
            _stop(reaper, readers, mark)
            raise


def _stop(reaper: Reaper, readers: Mapping[int, Lines], mark: str) -> None:
    """Ask for the tree's end, and pump on until it has come."""
    reaper.terminate()
    try:
        _drain(reaper, readers, mark)
    except BaseException:
        reaper.leave()
        raise


def _pump(reaper: Reaper, readers: Mapping[int, Lines], mark: str) -> int:
    """Feed the readers until the reaper has ended and the pipes are dry; return how the command ended."""
    poller = select.poll()
    for fd in readers:
        poller.register(fd, select.POLLIN)
    while (code := reaper.poll()) is None:
        _read(poller, readers, POLL_MS)
    if code < 0:
        _kill_marked(mark)
    while _read(poller, readers, 0):
        pass
    for lines in readers.values():
        lines.close()
    return code


def _read(poller: select.poll, readers: Mapping[int, Lines], timeout_ms: int) -> bool:
    """Feed what is there; whether anything was."""
    found = False
    for fd, _ in poller.poll(timeout_ms):
        if chunk := os.read(fd, CHUNK):
            found = True
            readers[fd].feed(chunk)
        else:  # the reaper held the pipe open to its end, which is a moment away
            time.sleep(END_S)
    return found


def _drain(reaper: Reaper, readers: Mapping[int, Lines], mark: str) -> None:
    """Pump on, past further failures of `on_line`: `Lines` calls it no more once it has raised."""
    ended = False
    while not ended:
        try:
            _pump(reaper, readers, mark)
            ended = True
        except Exception:  # noqa: BLE001, S112 - the first exception is the one that the caller will see
            continue


def _kill_marked(mark: str) -> None:
    """SIGKILL to each process of a tree whose reaper died by a signal, perhaps before it had cleaned up."""
    entry = f"{MARK}={mark}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if entry in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)


def shorten(command: Sequence[str]) -> str:
    """`command` as a person would type it, cut to a line."""
    text = shlex.join(["python" if part == sys.executable else part for part in command])
    return text if len(text) <= SHORT else f"{text[:SHORT]}…"


def how_it_ended(code: int) -> str:
    """An exit code, or minus a signal's number, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", as the kernel does when memory runs out" if -code == signal.SIGKILL else ""
    return f"was ended by {signal_name(-code)}{hint}"


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; real-time signals by number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_lines(lines: Iterable[str]) -> str:
    """The end of a message: the last lines of an output, or that there are none."""
    text = "\n".join(lines).strip("\n")
    return f"; its last lines:\n{text}" if text else "; it printed nothing"
