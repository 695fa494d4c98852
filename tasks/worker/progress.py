"""The lines that a person reads while training runs."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_SECONDS_BETWEEN_LINES = 2.0


class Progress:
    """Writes a line for the first step, the last one, and at most one in two seconds between them."""

    def __init__(
        self,
        first_step: int,
        last_step: int,
        tokens_per_step: int,
        *,
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_step, self._last_step = first_step, last_step
        self._tokens_per_step = tokens_per_step
        self._write = write or _write_line
        self._clock = clock
        self._begin = clock()
        self._shown_step, self._shown_at = first_step, self._begin

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Show a completed step, if it is time to."""
        now = self._clock()
        is_end = step in {self._first_step + 1, self._last_step}
        if not is_end and now - self._shown_at < _SECONDS_BETWEEN_LINES:
            return
        rate = (step - self._shown_step) * self._tokens_per_step / max(now - self._shown_at, 1e-9)
        left = (now - self._begin) / (step - self._first_step) * (self._last_step - step)
        self._shown_step, self._shown_at = step, now
        self.note(step, f"loss {loss:.3f}  lr {learning_rate:.1e}  {rate / 1000:.1f}k tokens/s  {left:.0f} s left")

    def note(self, step: int, text: str) -> None:
        """Show something that happened at a step."""
        self._write(f"step {step}/{self._last_step}  {text}")


def _write_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
