"""Where a secret could lie: files, the tables and answers of a Prefect server, command lines; and finding it."""

from __future__ import annotations

import base64
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

_WRAPPING = re.compile(rb"\x1b\[[0-9;]*m|\\[nrt]|[\s'\"]+")
_PAGE = 200
_LISTED = ("flow_runs", "task_runs", "logs", "artifacts", "variables", "block_documents", "deployments")
_SECONDS_BETWEEN_LOOKS = 0.1


class Search:
    """Finds either half of a secret: as it is, reversed, quoted, in hex or in base64, also wrapped into lines."""

    def __init__(self, secret: str) -> None:
        middle = len(secret) // 2
        self._patterns = {form for half in (secret[:middle], secret[middle:]) for form in _forms(half.encode())}

    def finds_in(self, data: bytes | str) -> bool:
        """Whether the secret, or half of it, is in the data."""
        raw = data.encode() if isinstance(data, str) else data
        joined = _WRAPPING.sub(b"", raw)
        return any(pattern in text for text in (raw, joined) for pattern in self._patterns)


def _forms(half: bytes) -> Iterator[bytes]:
    yield half
    yield half[::-1]
    yield quote(half, safe="").encode()
    yield half.hex().encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for before in range(3):  # how many bytes of its group of three came before; what mixes with others is left out
            yield encode(b"\0" * before + half)[-(-before * 4 // 3) : (before + len(half)) * 4 // 3]


def files(*places: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each file below directories, and each file's own path as bytes."""
    for place in places:
        for path in place.rglob("*"):
            yield "a name", str(path).encode()
            if path.is_file():
                with suppress(FileNotFoundError):  # a server's, which lives on
                    yield str(path), path.read_bytes()


def tables(database: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each row of a SQLite database: in its file, long values are cut into pages."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in names:
            for row in connection.execute(f'SELECT * FROM "{name}"'):
                cells = (cell if isinstance(cell, bytes) else str(cell).encode() for cell in row)
                yield f"table {name}", b"\0".join(cells)
    connection.close()


def answers(api: str) -> Iterator[tuple[str, str]]:
    """Yield all that a Prefect server tells: runs with their parameters, states, logs, artifacts, events, blocks."""
    for kind in _LISTED:
        for item in _all(api, kind):
            yield kind, json.dumps(item)
            if kind in ("flow_runs", "task_runs"):
                of = kind.removesuffix("s")
                yield f"{of}_states", json.dumps(_ask(f"{api}/{of}_states/?{of}_id={item['id']}"))
    page = _ask(f"{api}/events/filter", {"limit": 50})
    while page is not None:
        for event in page["events"]:
            yield "events", json.dumps(event)
        page = _ask(page["next_page"]) if page["next_page"] else None


def _all(api: str, kind: str) -> Iterator[Any]:
    offset = 0
    while found := _ask(f"{api}/{kind}/filter", {"limit": _PAGE, "offset": offset}):
        yield from found
        offset += len(found)


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=30) as answer:
        return json.load(answer)


@contextmanager
def watched_commands() -> Iterator[set[str]]:
    """Yield a set that is filled with the command lines of all processes while the block runs."""
    seen, over = set[str](), threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.update(" ".join(arguments) for _, arguments in commands())
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def commands() -> Iterable[tuple[int, list[str]]]:
    """Yield id and arguments of each process."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield int(path.parent.name), path.read_bytes().decode(errors="replace").split("\0")
