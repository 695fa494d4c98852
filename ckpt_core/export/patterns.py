"""Regular expressions that somebody else wrote, matched within a bounded time.

The time that Python's `re` takes can double with each character of a name, and nothing can stop it.
"""

# regex is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import re
import time
from typing import Any

import regex

_SECONDS = 3.0
"""What slow matches of one `Patterns` may take together."""

_SLOW_SECONDS = 0.001
"""Usual patterns take microseconds for each name."""

_FLAGS = re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE
"""Flags that have the same numbers in `re` and in `regex`."""

_MAX_LENGTH = 100_000
_BRACE = re.compile(r"(?<![\\N])\{(?!\d*,?\d*\})")
"""A brace that counts nothing: `re` takes it as it is, `regex` as leave to match only nearly."""


class PatternError(ValueError):
    """A text is no regular expression, or matching it takes too long."""


class Patterns:
    """Regular expressions, with as much time for all of them as usual ones never need."""

    def __init__(self) -> None:
        self._left = _SECONDS
        self._compiled: dict[tuple[str, int], Any] = {}

    def fullmatch(self, pattern: str, text: str) -> bool:
        """Whether all of `text` matches.

        Raises:
            PatternError: it is no regular expression, or takes too long.
        """
        return self._run(pattern, lambda compiled, timeout: compiled.fullmatch(text, timeout=timeout)) is not None

    def match(self, pattern: str, text: str) -> bool:
        """Whether the begin of `text` matches.

        Raises:
            PatternError: it is no regular expression, or takes too long.
        """
        return self._run(pattern, lambda compiled, timeout: compiled.match(text, timeout=timeout)) is not None

    def search(self, pattern: re.Pattern[str], text: str) -> bool:
        """Whether something in `text` matches.

        Raises:
            PatternError: it takes too long.
        """
        search = self._run(
            pattern.pattern, lambda compiled, timeout: compiled.search(text, timeout=timeout), pattern.flags
        )
        return search is not None

    def replace(self, pattern: re.Pattern[str], replacement: str, text: str) -> str:
        """Return `text` with what matches replaced.

        Raises:
            PatternError: they are no regular expression and replacement, or it takes too long.
        """
        return self._run(
            pattern.pattern,
            lambda compiled, timeout: compiled.sub(replacement, text, timeout=timeout),
            pattern.flags,
        )

    def _run(self, pattern: str, match: Any, flags: int = 0) -> Any:
        compiled = self._compile(pattern, flags & _FLAGS)
        start = time.thread_time()
        try:
            return match(compiled, max(self._left, _SLOW_SECONDS))
        except (TimeoutError, MemoryError):
            raise PatternError(f"{pattern[:200]!r}: matching it takes more than {_SECONDS:g} seconds") from None
        except (regex.error, IndexError) as error:  # of a replacement that names a group that is not there
            raise PatternError(f"{pattern[:200]!r}: {error}") from None
        finally:
            self._left -= max(0.0, time.thread_time() - start - _SLOW_SECONDS)

    def _compile(self, pattern: str, flags: int) -> Any:
        if (pattern, flags) not in self._compiled:
            if len(pattern) > _MAX_LENGTH:
                raise PatternError(f"{pattern[:40]!r}...: {len(pattern)} characters, expected at most {_MAX_LENGTH}")
            try:
                re.compile(pattern, flags)  # `regex` takes more, such as a pattern that contains itself
                self._compiled[pattern, flags] = regex.compile(_BRACE.sub(r"\{", pattern), flags)
            except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
                raise PatternError(f"{pattern[:200]!r} is no regular expression ({error})") from None
        return self._compiled[pattern, flags]
