"""Pins: names that keep steps, each a small file that holds the name of its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckpt_core.errors import ArgumentError, DamagedError
from ckpt_core.store.names import parse_step, step_name

if TYPE_CHECKING:
    from ckpt_core.urls import Place


def pin_bytes(step: int) -> bytes:
    """Return what the file of a pin holds; `parse_pin` is its inverse."""
    return f"{step_name(step)}\n".encode()


def parse_pin(data: bytes, place: Place) -> int:
    """Return the step that a pin names.

    Raises:
        DamagedError: it names none.
    """
    step = parse_step(data.decode(errors="replace").removesuffix("\n"))
    if step is None:
        raise DamagedError(f"{place}: holds {data[:40]!r}, expected the name of a step; pin it again, or delete it.")
    return step


def no_pin(run: str, name: str, pins: Mapping[str, int]) -> ArgumentError:
    """Return the error that there is no pin of that name."""
    return ArgumentError(f"pin {name!r}: run {run!r} has none of that name; it has {', '.join(pins) or 'none'}.")
