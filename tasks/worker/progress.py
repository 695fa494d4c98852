"""What a person sees of training while it runs, and the record of each step that stays."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


class StepLog:
    """A file of one JSON object a line for each optimizer step, in order and without gaps.

    Only one rank writes it. What lies beyond the step that training resumes from is dropped when it is opened, so that
    an interrupted run leaves the same lines as one that was not, apart from times.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = b"".join(_lines_up_to(path, resume_step))
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(kept)
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, entry: dict[str, Any]) -> None:
        """Append a step; a process that is killed later does not take it along."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make it durable: a checkpoint must not outlive the lines of its steps."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    """Return the whole lines of steps up to `step`."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):  # cut by a kill or a power cut
        lines.pop()
    return [line for line in lines if json.loads(line)["step"] <= step]


def _write_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
