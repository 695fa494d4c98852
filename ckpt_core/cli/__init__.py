"""`ckpt`: look at checkpoints, verify, convert, import, publish and prune them, from a shell.

Each command takes `--json` for one JSON object on standard output. Exit status: 0 good, 1 the thing is bad, 2 misuse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ckpt_core.cli import exports, imports, look, releases, stores
from ckpt_core.cli.command import Answer, Commands
from ckpt_core.errors import ArgumentError, CkptError

__all__ = ["entry", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        answer: Answer | None = options.command(options)
    except ArgumentError as error:
        return _fail(error, options, 2)
    except (CkptError, OSError) as error:
        return _fail(error, options, 1)
    except KeyboardInterrupt:
        return 130
    if answer is None:
        return 0
    print(json.dumps(answer.facts) if options.json else "\n".join(answer.lines))  # noqa: T201 - the answer
    return 0 if answer.good else 1


def entry() -> None:
    """Run as the `ckpt` program."""
    sys.exit(main())


def _fail(error: Exception, options: argparse.Namespace, status: int) -> int:
    if options.json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))  # noqa: T201 - the answer
    print(f"ckpt: {error}", file=sys.stderr)  # noqa: T201 - the answer
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ckpt", description="Look at, verify, convert and publish checkpoints.")
    commands = Commands(parser)
    for group in (look, stores, exports, imports, releases):
        group.add_commands(commands)
    return parser
