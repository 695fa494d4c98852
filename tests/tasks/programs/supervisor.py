"""Runs the command that it is given as a task does: SIGTERM becomes an exception, as under Prefect."""

import signal
import sys

from tasks.process import run


class TerminationSignal(BaseException):
    """What Prefect's handler raises."""


def terminate(*_: object) -> None:
    """Handle SIGTERM."""
    raise TerminationSignal


def show(line: str) -> None:
    """Pass the start of a line on."""
    print(line[:100], flush=True)


signal.signal(signal.SIGTERM, terminate)
try:
    run(sys.argv[1:], on_line=show)
except TerminationSignal:
    print("terminated", flush=True)
    sys.exit(15)
