"""Lines out of bytes that are cut anywhere."""

import pytest

from tasks.lines import LINE_LIMIT, Lines


def lines_of(*chunks: bytes) -> list[str]:
    """All lines of a stream that arrives in `chunks`."""
    found: list[str] = []
    lines = Lines(found.append, keep=5)
    for chunk in chunks:
        lines.feed(chunk)
    lines.close()
    return found


def test_a_line_is_whole_however_its_bytes_arrive():
    """Characters and line ends may be cut between two reads."""
    text = "eins zwei\r\n\ndrei \u00e4\u20ac\U0001f600\nvier".encode()
    expected = ["eins zwei", "", "drei \u00e4\u20ac\U0001f600", "vier"]
    assert lines_of(text) == expected
    assert lines_of(*(text[i : i + 1] for i in range(len(text)))) == expected


def test_invalid_bytes_and_nul_become_the_replacement_character():
    """Nothing that a child prints can stop the reader or a database behind it."""
    assert lines_of(b"a\xff\xfeb\0c\n", b"cut \xe2\x82") == ["a\ufffd\ufffdb\ufffdc", "cut \ufffd"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_progress_bar_is_one_line_in_its_last_state(size):
    """What a carriage return overwrites is gone."""
    text = b"start\n" + b"".join(b"\r%3d%%" % n for n in range(101)) + b"\ntail  1\rtail  2\r"
    assert lines_of(*(text[i : i + size] for i in range(0, len(text), size))) == ["start", "100%", "tail  2"]


def test_an_endless_progress_bar_takes_no_memory():
    """Overwritten states are dropped before the line ends."""
    lines = Lines(print, keep=5)
    for number in range(1000):
        lines.feed(b"\r%d" % number)
    assert lines._text == "999"


def test_a_megabyte_line_comes_in_pieces():
    """A line that is too long loses nothing."""
    text = bytes(97 + n % 26 for n in range(1 << 20))
    found = lines_of(*(text[i : i + 60_000] for i in range(0, len(text), 60_000)), b"\nnext\n")
    assert "".join(found[:-1]).encode() == text
    assert max(map(len, found)) == LINE_LIMIT
    assert found[-1] == "next"


def test_an_interruption_is_no_failure_of_the_consumer():
    """What interrupts `on_line` from outside, as Ctrl-C does, passes, and later lines are still handed out."""
    found: list[str] = []

    def on_line(line: str) -> None:
        found.append(line)
        if line == "1":
            raise KeyboardInterrupt

    lines = Lines(on_line, keep=5)
    with pytest.raises(KeyboardInterrupt):
        lines.feed(b"1\n")
    lines.feed(b"2\n")
    assert found == ["1", "2"]


def test_the_last_lines_are_kept():
    """`tail` holds the last `keep` lines, the unfinished one included after `close`."""
    lines = Lines(lambda _: None, keep=2)
    lines.feed(b"1\n2\n3")
    lines.close()
    assert list(lines.tail) == ["2", "3"]


def test_a_consumer_that_raised_is_not_called_again():
    """Its exception passes once; later lines are still kept."""
    lines = Lines(lambda line: 1 / len(line), keep=5)  # type: ignore[arg-type, return-value] - any callable will do
    with pytest.raises(ZeroDivisionError):
        lines.feed(b"\n")
    lines.feed(b"\nmore\n")
    assert list(lines.tail) == ["", "", "more"]
