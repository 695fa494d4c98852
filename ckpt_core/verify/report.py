"""What `verify` found: one check a line, and whether all of them passed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any

from ckpt_core.errors import CkptError

_SHOWN = 100


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str
    """What was found; of a check that failed, the first reason, and how many more there are."""

    problems: tuple[str, ...] = ()
    """Why it failed, the first hundred reasons."""


@dataclass(frozen=True)
class Report:
    """All checks of one checkpoint or export."""

    path: str
    kind: str
    """`checkpoint` (a committed step), `dcp` (any DCP directory), `export` (one of ours), or `huggingface`."""

    checks: tuple[Check, ...]
    sample: str = ""
    """What was left out, of a verification by sample."""

    unchecked: tuple[str, ...] = ()
    """Files that are there and were not looked into, such as pickles, by their path below `path`."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in JSON types."""
        return {**asdict(self), "passed": self.passed}


class Findings:
    """What threads find as they read, by the name of the check that it belongs to."""

    def __init__(self) -> None:
        self.problems: defaultdict[str, list[str]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.unsupported: list[str] = []
        """What is stored in forms that are not read, so that no more than its bytes could be checked, and why."""

        self._lock = Lock()

    def add(self, check: str, problem: str) -> None:
        """Note why a check fails."""
        with self._lock:
            self.problems[check].append(problem)

    def add_unsupported(self, what: str) -> None:
        """Note what could not be checked; that is no reason for a check to fail."""
        with self._lock:
            self.unsupported.append(what)

    def count(self, what: str, number: int = 1) -> None:
        """Count something."""
        with self._lock:
            self.counts[what] += number

    def check(self, name: str, detail: str) -> Check:
        """Return a check: failed if there are problems, else with `detail` for what was found."""
        problems = sorted(self.problems[name])
        if not problems:
            return Check(name, passed=True, detail=detail)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Check(name, passed=False, detail=problems[0] + more, problems=tuple(problems[:_SHOWN]))


def run(name: str, check: Callable[[], str]) -> Check:
    """Return a check that one function makes: it returns what it found, or raises why it failed."""
    try:
        return Check(name, passed=True, detail=check())
    except (CkptError, OSError) as error:
        return Check(name, passed=False, detail=str(error), problems=(str(error),))
