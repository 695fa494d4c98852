"""`ckpt`: look at checkpoints, verify, convert, import, publish and prune them, from a shell.

Each command takes `--json` for one JSON object on standard output, also for an error: `{"error": {"type", "message"}}`;
numbers that are not finite are null. Exit status: 0 good, 1 the thing is bad or was not done, 2 misuse, 130 interrupted
by Ctrl-C, 141 nobody reads the output.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ckpt_core.cli import exports, imports, look, releases, stores
from ckpt_core.cli.command import (
    Answer,
    Commands,
    OutputClosedError,
    Parser,
    UsageError,
    write_json,
    write_lines,
)
from ckpt_core.errors import ArgumentError, CkptError, describe

__all__ = ["entry", "main"]

_INTERRUPTED, _NO_READER = 130, 141  # as a shell counts a process that SIGINT or SIGPIPE ended
_SHELLS = ("bash", "zsh", "tcsh")
_TRACEBACK = "CKPT_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(arguments, as_json="--json" in arguments)
    except OutputClosedError:
        _close_output()
        return _NO_READER


def entry() -> None:
    """Run as the `ckpt` program."""
    sys.exit(main())


def _run(arguments: Sequence[str], *, as_json: bool) -> int:
    try:
        options = _parser().parse_args(arguments)
        answer: Answer | None = options.command(options)
        if answer is None:
            return 0
        if options.json:
            write_json(answer.facts)
        else:
            write_lines(answer.lines)
    except (OutputClosedError, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a traceback helps no user
        return _fail(error, as_json=as_json)
    return 0 if answer.good else 1


def _fail(error: BaseException, *, as_json: bool) -> int:
    """Say what went wrong; return the exit status."""
    status, text = _outcome(error)
    if as_json:
        write_json({"error": {"type": type(error).__name__, "message": text}})
    if isinstance(error, UsageError):
        write_lines(error.text.splitlines(), sys.stderr)
        return status
    if os.environ.get(_TRACEBACK):
        write_lines("".join(traceback.format_exception(error)).splitlines(), sys.stderr)
    write_lines(f"ckpt: {text}".splitlines(), sys.stderr)
    return status


def _outcome(error: BaseException) -> tuple[int, str]:
    """Return the exit status that an error means, and its text."""
    if isinstance(error, UsageError | ArgumentError):
        return 2, str(error)
    if isinstance(error, CkptError):
        return 1, str(error)
    if isinstance(error, OSError):
        return 1, describe(error)
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, "interrupted"
    return 1, f"{type(error).__name__}: {error} (a fault of ckpt itself; {_TRACEBACK}=1 shows where)"


def _close_output() -> None:
    """Let what is still buffered go nowhere: the interpreter's own flush would complain at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            os.dup2(null, 1 if stream is sys.stdout else 2)
    os.close(null)


class _Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        write_lines([f"{parser.prog} {version('ckptflow')}"])
        parser.exit()


class _Completion(argparse.Action):
    """Prints a shell's script that completes commands, options and paths."""

    def __call__(self, parser: argparse.ArgumentParser, _namespace: object, shell: object, *_: object) -> None:
        import shtab

        _complete_paths(parser)
        script = shtab.complete(parser, shell=str(shell))
        sys.stdout.write(script if script.endswith("\n") else f"{script}\n")
        parser.exit()


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Have each command's argument that may be a path complete as one; shtab reads this attribute."""
    import shtab

    for action in parser._actions:  # pyright: ignore[reportPrivateUsage] - argparse lists them nowhere else
        choices: Any = action.choices
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            for command in choices.values():
                _complete_paths(command)
        elif action.type is None and not choices and action.nargs != 0:
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ckpt", description="Look at, verify, convert and publish checkpoints.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=_SHELLS,
        metavar="SHELL",
        help=f"print a script for {', '.join(_SHELLS)} that completes commands and paths",
    )
    commands = Commands(parser)
    for group in (look, stores, exports, imports, releases):
        group.add_commands(commands)
    return parser
