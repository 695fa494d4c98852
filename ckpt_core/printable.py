"""Text from files, made fit for a terminal, a log or a page."""

from __future__ import annotations

import logging

_HARMLESS = frozenset("\t\u00a0\u200c\u200d\u202f\u3000")
"""Tabs, spaces of other widths, and joiners, which scripts and emoji are written with."""


def printable(text: str) -> str:
    r"""Return `text` with what is not printable written as an escape, such as `\x1b`.

    Names in a checkpoint are anybody's text: a terminal would obey its control characters, a newline would begin a line
    of a log that nobody logged, and marks of direction show a name as another one.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _HARMLESS else c.encode("unicode_escape").decode() for c in text)


def printable_logger(name: str) -> logging.Logger:
    """Return the logger of this name, whose messages are made printable."""
    logger = logging.getLogger(name)
    logger.addFilter(_make_printable)
    return logger


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True
