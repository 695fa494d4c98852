"""A module that runs in a fork as if the fork had been executed: `python -m MODULE ARGS...`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from types import TracebackType

_RUNPY = "<frozen runpy>"


def run_as_main(command: Sequence[str]) -> None:
    """Run a module as the main one.

    Args:
        command: the module's name, and its arguments.
    """
    sys.argv = list(command)
    sys.excepthook = _tell
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _tell(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    """Print an exception that ends this process, with the module's frames alone."""
    own = frames
    while frames is not None:
        following = frames.tb_next
        if frames.tb_frame.f_code.co_filename == _RUNPY:
            own = following
        frames = following
    sys.__excepthook__(kind, error.with_traceback(own), own)
