"""A process with a child, a child in a session of its own, and a daemon; `deaf` to SIGTERM when told so."""

import os
import signal
import sys
import time


def stay() -> None:
    """Never return."""
    while True:
        time.sleep(60)


def child(*, session: bool = False, daemon: bool = False) -> None:
    """Fork a process that stays, where the arguments say."""
    if os.fork():
        return
    if session or daemon:
        os.setsid()
    if daemon:
        if os.fork():
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
    stay()


if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child()
child(session=True)
child(daemon=True)
if "exit" not in sys.argv:
    print("ready", flush=True)
    stay()
