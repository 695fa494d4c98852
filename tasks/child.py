"""A child process with a result: one JSON object, through a file that the environment names."""

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ckpt_core.errors import CkptError
from tasks.lines import Lines
from tasks.process import GRACE_S, TAIL_LINES, ChildFailedError, Start, how_it_ended, last_lines, supervise

RESULT = "CKPTFLOW_RESULT"


def run_json(
    module: str,
    args: Sequence[str],
    *,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
    start: Start | None = None,
) -> Any:
    """Run `python -m module args...` as `tasks.process.supervise` does; what the child gave to `write_result`.

    `ChildFailedError` when it fails: with the message alone when `child_main` reported an error meant for people, else
    with the exit code or signal and the last lines.
    """
    with TemporaryDirectory(prefix="ckptflow-") as directory:
        path = Path(directory) / "result.json"
        output = Lines(on_line, keep=TAIL_LINES)
        command = [sys.executable, "-u", "-m", module, *args]
        given = {**(env or {}), RESULT: str(path)}
        code = supervise(command, output=output, env=given, grace_s=grace_s, start=start)
        result = _read(path)
    if code:
        raise ChildFailedError(_reported(result) or f"{module} {how_it_ended(code)}{last_lines(output.tail)}")
    if result is None:
        raise ChildFailedError(f"{module} ended well but left no JSON result{last_lines(output.tail)}")
    return result


def _read(path: Path) -> Any:
    """The result; None when there is none, or a broken one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _reported(result: Any) -> str | None:
    """The message of a reported error."""
    match result:
        case {"error": {"type": str(), "message": str(message)}}:
            return message
        case _:
            return None


def write_result(result: Any) -> None:
    """In the child: hand `result`, of JSON types, to `run_json`; a second call replaces the first one's.

    Without `run_json`, when a person starts the module, the result is printed.
    """
    text = json.dumps(result)
    target = os.environ.get(RESULT)
    if target is None:
        print(text)  # noqa: T201 - the person at the terminal is who asked
        return
    part = Path(f"{target}.part")
    part.write_text(text)
    part.replace(target)


def child_main(function: Callable[[], Any]) -> None:
    """In the child: write what `function` returns as the result.

    A `CkptError`, `ValueError` or `OSError` (a full disk, a directory that may not be written) becomes the reported
    error and exit status 1; any other exception is a crash, with its traceback.
    """
    try:
        write_result(function())
    except (CkptError, ValueError, OSError) as error:
        write_result({"error": {"type": type(error).__name__, "message": _told(error)}})
        sys.exit(1)


def _told(error: Exception) -> str:
    """An error's message; of a full disk, with what to do."""
    full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    return f"{error}; make room there, then run again: what was committed is untouched" if full else str(error)
