"""What a command is: a function of its options that gives an answer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a command has to say: the facts, for tools, and lines, for people."""

    facts: dict[str, Any]
    lines: list[str] = field(default_factory=list[str])
    good: bool = True


Command = Callable[[argparse.Namespace], Answer | None]
"""One that answers by itself, as it runs on, returns None."""


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
