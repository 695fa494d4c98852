"""Run one command and let nothing of it outlive the process that asked for it.

Started by `tasks.process`, as a file and without site-packages (some 40 ms):

    python -I -S reaper.py PARENT_PID GRACE_S KEPT_FDS COMMAND...

It is the ancestor of whatever the command starts, daemons included, because it adopts orphans
(``PR_SET_CHILD_SUBREAPER``). It stops the tree when the command ends, when it is sent SIGTERM, when its standard input
is closed, and when the thread that started it dies (``PR_SET_PDEATHSIG``): the command's process group gets SIGTERM;
what the command leaves behind gets SIGTERM when the command has ended; what is left after GRACE_S seconds gets SIGKILL.
Then it ends the way the command did, by exit code or by signal.

It and the command stay in the caller's session but have process groups of their own: a SIGKILL for the caller's group
(the end of a Prefect cancellation) must not reach the one process that cleans up, and Ctrl-C must reach the ranks of a
job as SIGTERM. KEPT_FDS are reading ends of pipes that the tree writes to; they are drained when the caller is gone, so
that a rank that prints while it saves its last checkpoint does not die of a broken pipe.

Only Linux adopts orphans. Elsewhere the command's process group is stopped, and a descendant that left it survives.
"""

import ctypes
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
TICK_S = 0.1
GIVE_UP_S = 10.0  # what SIGKILL cannot end in this time hangs in the kernel
ON_LINUX = sys.platform == "linux"


class Caller:
    """The process that wants the command to run, and its wish that it ends."""

    def __init__(self, pid: int, kept: list[int]) -> None:
        self._pid = pid
        self._kept = kept
        self._asked = False
        self._bell, self._ring = os.pipe()
        self._lifeline = select.poll()
        self._lifeline.register(0, 0)  # only POLLHUP: the caller never writes
        for end in (self._bell, self._ring):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._ring)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)

    def forget(self) -> None:
        """In a fork of this process: hear of nothing any more."""
        signal.set_wakeup_fd(-1)
        os.close(self._bell)
        os.close(self._ring)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def is_gone(self) -> bool:
        """Whether nobody reads the tree's output any more."""
        return os.getppid() != self._pid or bool(self._lifeline.poll(0))

    def wants_end(self) -> bool:
        """Whether the command must end now."""
        return self._asked or self.is_gone()

    def wait(self) -> None:
        """Return on a signal, such as a child's death, or after a tick; read what nobody else does."""
        fds = [self._bell, *(self._kept if self.is_gone() else ())]
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll(TICK_S * 1000):
            with suppress(BlockingIOError):
                os.read(fd, 1 << 16)


class Tree:
    """A command, the leader of a process group of its own, and all its descendants."""

    def __init__(self, pid: int) -> None:
        self.status: int | None = None
        self._termed: set[int] = set()
        self._pid = pid

    def reap(self) -> bool:
        """Bury the dead; whether any descendant is left. Each has a chain of living parents up to here."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                self.status = os.waitstatus_to_exitcode(status)

    def term_command(self) -> None:
        """SIGTERM to the command's process group, as timeout(1) does; torchrun passes it on to its ranks."""
        _signal_group(self._pid, signal.SIGTERM)

    def term_rest(self) -> None:
        """SIGTERM, once, to each descendant that the command has left behind."""
        for pid in descendants() - self._termed:
            self._termed.add(pid)
            _signal(pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to all."""
        for pid in descendants():
            _signal(pid, signal.SIGKILL)
        if not ON_LINUX:
            _signal_group(self._pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with suppress(OSError):
        os.kill(pid, number)


def _signal_group(group: int, number: int) -> None:
    with suppress(OSError):
        os.killpg(group, number)


def children() -> dict[int, list[int]]:
    """The process ids of all processes' children, by their parents', from /proc."""
    found: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])  # "pid (any name) state parent ..."
            found.setdefault(parent, []).append(int(stat.parent.name))
    return found


def descendants() -> set[int]:
    """The process ids of all descendants of this process."""
    families = children()
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        young = families.get(todo.pop(), [])
        found.update(young)
        todo.extend(young)
    return found


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process; nothing where there is no such call."""
    if ON_LINUX and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}): {os.strerror(ctypes.get_errno())}")


def spawn(command: list[str]) -> int:
    """Start a command in a process group of its own; return its process id."""
    return os.posix_spawnp(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
        setpgroup=0,
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM),  # Python, or the caller, ignores them
    )


def adopt(caller: int, kept: list[int]) -> Caller:
    """Become the ancestor of orphans, and hear of the caller's death."""
    for fd in kept:
        os.set_inheritable(fd, False)
    heard = Caller(caller, kept)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    return heard


def watch(tree: Tree, caller: Caller, grace_s: float) -> int:
    """Return how the command ended, when no process of its tree is left: its exit code, or minus a signal's number."""
    while tree.reap() and tree.status is None and not caller.wants_end():
        caller.wait()
    if tree.status is None:
        tree.term_command()
    end_tree(tree, caller, grace_s)
    return 1 if tree.status is None else tree.status


def end_tree(tree: Tree, caller: Caller, grace_s: float) -> None:
    """Return when no descendant is left; SIGKILL after `grace_s` seconds."""
    deadline = time.monotonic() + grace_s
    while tree.reap():
        late_s = time.monotonic() - deadline
        if late_s > GIVE_UP_S:
            sys.stderr.write(f"these processes do not die of SIGKILL: {sorted(descendants())}\n")
            return
        if late_s > 0:
            tree.kill()
        elif tree.status is not None:
            tree.term_rest()
        caller.wait()
    if not ON_LINUX:
        tree.kill()


def leave_like(status: int) -> None:
    """End this process as the command ended: with its exit code, or by its signal."""
    if status >= 0:
        sys.exit(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has left its core already
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    sys.exit(128 - status)


def main(arguments: list[str]) -> None:
    """Run the command to its end."""
    parent, grace_s, kept, *command = arguments
    caller = adopt(int(parent), [int(fd) for fd in kept.split(",")])
    if caller.wants_end():  # it died before it could be heard of
        sys.exit(1)
    try:
        pid = spawn(command)
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror}\n")
        sys.exit(127)
    leave_like(watch(Tree(pid), caller, float(grace_s)))


if __name__ == "__main__":
    main(sys.argv[1:])
