"""Bytes of a child process in, lines of text out."""

from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Callable

LINE_LIMIT = 64 * 1024  # characters; a longer line comes in pieces, so that memory stays bounded


class Lines:
    """Cuts one stream into lines, hands each to `on_line`, and keeps the last `keep` of them.

    Invalid UTF-8 and NUL become U+FFFD. As on a terminal, what a carriage return overwrites is gone: a progress bar is
    one line, its last state. What `on_line` raises passes through `feed`; after an `Exception`, which is its own
    failure and not an interruption from outside, it is not called again.
    """

    def __init__(self, on_line: Callable[[str], None], *, keep: int) -> None:
        self.tail: deque[str] = deque(maxlen=keep)
        self._on_line: Callable[[str], None] | None = on_line
        self._decode = getincrementaldecoder("utf-8")("replace").decode
        self._text = ""

    def feed(self, data: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        *lines, rest = (self._text + self._decode(data)).split("\n")
        rest = _after_overwriting(rest)
        whole = len(rest) - len(rest) % LINE_LIMIT
        self._text = rest[whole:]
        self._emit([*lines, *([rest[:whole]] if whole else [])])

    def close(self) -> None:
        """The stream has ended: a last line without a line end counts."""
        rest = self._text + self._decode(b"", final=True)
        self._text = ""
        self._emit([rest] if rest else [])

    def _emit(self, lines: list[str]) -> None:
        for line in lines:
            text = _after_overwriting(line).rstrip("\r").replace("\0", "\ufffd")
            for start in range(0, len(text) or 1, LINE_LIMIT):
                self._hand_over(text[start : start + LINE_LIMIT])

    def _hand_over(self, line: str) -> None:
        self.tail.append(line)
        if self._on_line is None:
            return
        try:
            self._on_line(line)
        except Exception:
            self._on_line = None
            raise


def _after_overwriting(line: str) -> str:
    """What a terminal shows of `line`; a carriage return at its end may be half of a line end, and stays."""
    return line[line.rfind("\r", 0, len(line.rstrip("\r"))) + 1 :]
