"""Ranks that are forks of torchrun's agent, which is a fork of `tasks.zygote`: their imports are done.

The agent forks them before it has threads or sockets; each waits for what torchrun gives to a rank, and becomes it.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tasks.main_module import run_as_main

_OUTPUTS = 2
"""Standard output and error."""


class ForkedRank:
    """A rank, seen from the agent that forked it: what torchrun uses of a `subprocess.Popen`."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._channel = channel
        self._end = os.pidfd_open(pid)

    def begin(self, command: tuple[str, ...], env: dict[str, str], outputs: list[int]) -> None:
        """Have it run `python -u -m MODULE ARGS...`; one that is dead is told by `poll`."""
        with self._channel, suppress(OSError):
            socket.send_fds(self._channel, [b"!"], outputs)
            self._channel.sendall(json.dumps([command[3:], env]).encode())
            self._channel.shutdown(socket.SHUT_WR)  # ranks forked later have it open too

    def poll(self) -> int | None:
        """Return its exit code, or minus a signal's number, when it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Return likewise.

        Raises:
            TimeoutExpired: it has not ended within so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def fork_ranks(count: int) -> None:
    """Have torchrun's agent, which this process is about to be, run its ranks in forks of this process.

    In a rank's process it does not return: that ends when the rank has.
    """
    waiting = [_fork() for _ in range(count)]

    class Handler(SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> ForkedRank:  # pyright: ignore[reportIncompatibleMethodOverride] - it has what is used of it
            rank = waiting[self.local_rank_id]
            assert self._stdout is not None
            assert self._stderr is not None
            rank.begin(args, env, [self._stdout.fileno(), self._stderr.fileno()])
            return rank

    api.get_subprocess_handler = Handler  # pyright: ignore[reportPrivateImportUsage] - there is no public way to say it


def _fork() -> ForkedRank:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _be_rank(theirs)
    theirs.close()
    ours.recv(1)
    return ForkedRank(pid, ours)


def _be_rank(channel: socket.socket) -> None:
    os.setsid()  # torchrun signals a rank's process group
    _name("rank, waiting")
    channel.send(b"!")
    begins, outputs, _, _ = socket.recv_fds(channel, 1, _OUTPUTS)
    if not begins:  # the agent is gone
        sys.exit()
    for fd, stream in zip(outputs, (1, 2), strict=True):
        os.dup2(fd, stream)
        os.close(fd)
    with channel, channel.makefile("rb") as order:
        module, env = json.load(order)
    os.environ.clear()
    os.environ.update(env)
    _name(f"rank {env['RANK']}")
    threads = env.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():  # which OpenMP has looked at long ago
        torch.set_num_threads(int(threads))
    run_as_main(module)
    sys.exit()


def _name(name: str) -> None:
    """Set what tools such as `ps` and `top` call this process."""
    Path("/proc/self/comm").write_text(name)
