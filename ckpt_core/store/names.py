"""Names in a store: of steps, runs and pins, and of what is no checkpoint."""

from __future__ import annotations

import operator
import re
from typing import SupportsIndex

from ckpt_core.errors import ArgumentError

MAX_STEP = 10**10 - 1
_SHOWN_BITS = 256
STAGING, TRASH, DAMAGED = ".staging-", ".trash-", ".damaged-"
"""What begins the names of directories that are no checkpoints."""

PINS = "pins"
"""The directory of a run's pins: a file for each, named by it, with the step's name as its text."""

CHAMPION = "champion"
"""The pin of the step that is served."""

LOCK = ".lock"
"""What ends the name of the lock file of a directory in which a step is written."""

_STEP_NAME = re.compile(r"step_([0-9]{10})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def step_name(step: int) -> str:
    """Return the directory name of a step; `parse_step` is its inverse."""
    return f"step_{step:010d}"


def parse_step(name: str) -> int | None:
    """Return the step that a directory name stands for, or None if it is not a step's."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_debris(name: str, kind: str) -> bool:
    """Whether a hidden name is one that a store gave: `.trash-1000` or a native save's directory is not ours."""
    return name.startswith(kind) and parse_step(name.removeprefix(kind)[: len(step_name(0))]) is not None


def is_name(name: str) -> bool:
    """Whether a run or a pin may have this name."""
    return _NAME.fullmatch(name) is not None


def check_name(kind: str, name: str) -> str:
    """Return the name of a run or a pin.

    Raises:
        ArgumentError: it could lead elsewhere, or hide.
    """
    if not (isinstance(name, str) and is_name(name)):  # pyright: ignore[reportUnnecessaryIsInstance] - it is a user's
        raise ArgumentError(f"{kind} {name!r}: expected 1 to 64 letters, digits, '.', '_' or '-', no '.' first.")
    return name


def check_step(step: SupportsIndex) -> int:
    """Return the number of a step, which may be any integer type's, such as numpy's.

    Raises:
        ArgumentError: it is no integer, or a step's name could not hold it.
    """
    if isinstance(step, bool) or "bool" in str(getattr(step, "dtype", "")):
        raise ArgumentError(f"step {step}: a truth value; expected an integer from 0 to {MAX_STEP}.")
    try:
        number = operator.index(step)
    except TypeError:
        kind = type(step).__name__
        raise ArgumentError(f"step {step!r:.40}: of type {kind}; expected an integer from 0 to {MAX_STEP}.") from None
    if not 0 <= number <= MAX_STEP:
        shown = number if number.bit_length() < _SHOWN_BITS else f"of {number.bit_length()} bits"
        raise ArgumentError(f"step {shown}: expected 0 to {MAX_STEP}.")
    return number
