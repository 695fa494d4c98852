"""A progress bar on standard error, where that is a terminal."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any


class Bar:
    """Shows the bytes that are done, and knows when they began to be."""

    def __enter__(self) -> Bar:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=0, unit="B", unit_scale=True, file=sys.stderr, disable=sys.stderr is None or not sys.stderr.isatty()
        )
        self._startup_s: float | None = None
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, done: int, total: int) -> None:
        """Show the bytes that are done so far, of those to do."""
        if self._startup_s is None:
            self._startup_s, self._began = _process_age_s(), time.perf_counter()
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def seconds(self) -> dict[str, float]:
        """Return the seconds from the start of the process to the first byte, and from that one until now."""
        if self._startup_s is None:
            return {}
        return {"startup_s": self._startup_s, "write_s": time.perf_counter() - self._began}


def _process_age_s() -> float:
    """Return how long ago the system started this process."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
