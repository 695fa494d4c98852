"""Commands: functions of their options that return an answer, their arguments, and the one place that prints."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TextIO, cast

from ckpt_core.printable import printable

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)
_POWERS = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}
_MOST_WORKERS = 1024


@dataclass(frozen=True)
class Answer:
    """What a command has to say: the facts, for tools, and lines, for people."""

    facts: dict[str, Any]
    lines: list[str] = field(default_factory=list[str])
    good: bool = True


Command = Callable[[argparse.Namespace], Answer | None]
"""One that answers by itself, as it runs on, returns None."""


class UsageError(Exception):
    """Arguments that the parser does not take; `text` is what a person is shown, with the command's usage."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors: with `--json` they are an object on standard output."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # An abbreviation that works today would mean something else once an option is added.
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError."""
        raise UsageError(message, f"{self.format_usage()}{self.prog}: error: {message}")


class Commands:
    """The commands of a parser, each with `--json`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._under = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(self, name: str, run: Command, text: str) -> argparse.ArgumentParser:
        """Return the parser of a new command, for its arguments."""
        command = self._under.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(command=run)
        return command

    def add_group(self, name: str, text: str) -> Commands:
        """Return the commands below a new one."""
        return Commands(self._under.add_parser(name, help=text))


class OutputClosedError(Exception):
    """The reader of standard output or of standard error ended, as `head` does when it has its lines."""


def write_lines(lines: list[str], stream: TextIO | None = None) -> None:
    """Print lines, on standard output by default. Characters that could act on a terminal are printed as escapes.

    Raises:
        OutputClosedError: nobody reads them.
    """
    _write("".join(f"{printable(line)}\n" for line in lines), sys.stdout if stream is None else stream)


def write_json(facts: Mapping[str, Any]) -> None:
    """Print one JSON object, of JSON as its standard has it: a number that is not finite is null.

    Raises:
        OutputClosedError: nobody reads it.
    """
    _write(json.dumps(_finite(facts), allow_nan=False, default=str) + "\n", sys.stdout)


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None:  # the caller closed it
        return
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        raise OutputClosedError from None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return {name: _finite(entry) for name, entry in entries.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_size(text: str) -> int:
    """Return the bytes that a size names: `5GB` or `200MB` are powers of ten, `5GiB` and `200MiB` of two."""
    match = _SIZE.fullmatch(text.strip())
    unit = (1024 if match[3] else 1000) ** _POWERS[match[2].upper() if match[2] else None] if match else 0
    size = int(float(match[1]) * unit) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected a size such as 5GB or 200MB")
    return size


def parse_share(text: str) -> float:
    """Return the share that `5%` or `0.05` names."""
    percent = text.strip().endswith("%")
    try:
        share = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected a share such as 5% or 0.05")
    return share


def parse_workers(text: str) -> int:
    """Return a number of threads."""
    workers = _number(text)
    if workers is None or not 1 <= workers <= _MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected a number from 1 to {_MOST_WORKERS}")
    return workers


def parse_port(text: str) -> int:
    """Return the number of a port; 0 stands for a free one."""
    port = _number(text)
    if port is None or not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected a port from 0 to 65535")
    return port


def parse_finite(text: str) -> float:
    """Return a number that is neither NaN nor infinite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected a number")
    return number


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:  # also of numbers of thousands of digits
        return None
