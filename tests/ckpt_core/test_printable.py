"""Names from checkpoints cannot command a terminal, begin a line of a log, or show themselves as others."""

import logging
import pickle

import pytest
import torch

from ckpt_core import io
from ckpt_core.cli import main
from ckpt_core.errors import CkptError, DamagedError, NotACheckpointError
from ckpt_core.hub.card_text import line, quoted
from ckpt_core.printable import printable, printable_logger

EVIL = {
    "\x1b[2J": r"\x1b[2J",
    "a\nb": r"a\nb",
    "\r\x08\x7f\x9b": r"\r\x08\x7f\x9b",
    "\u202egpj.exe": r"\u202egpj.exe",
    "\u2066x\u2069\u200f": r"\u2066x\u2069\u200f",
    "a\u2028b": r"a\u2028b",
    "\ud800": r"\ud800",
    "\ufeff": r"\ufeff",
}
KIND = [
    "\u00e4 \u4f60\u597d \U0001f600",
    "\U0001f469\u200d\U0001f4bb",
    "a\u00a0b",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
]


@pytest.mark.parametrize(("text", "shown"), EVIL.items())
def test_what_would_be_obeyed_is_escaped(text, shown):
    """Control characters, marks of direction, line ends of Unicode and halves of characters become escapes."""
    assert printable(text) == shown
    for error in (CkptError, DamagedError, NotACheckpointError):
        assert str(error(f"x: {text}")) == f"x: {shown}"
        assert str(pickle.loads(pickle.dumps(error(f"x: {text}")))) == f"x: {shown}"


@pytest.mark.parametrize("text", KIND)
def test_writing_of_any_language_stays(text):
    """Letters, emoji and what joins them are shown as they are."""
    assert printable(text) == text


def test_what_ckpt_prints(tmp_path, capsys):
    """Whatever the names in a checkpoint are, each command prints lines of its own alone."""
    name = "\x1b]0;evil\x07\u202ew\nFAIL x"
    io.save({"model": {name: torch.ones(1)}, name: 3}, tmp_path / "a")
    io.save({"model": {name: torch.zeros(1)}}, tmp_path / "b")
    for arguments in (["inspect", "a"], ["verify", "a"], ["diff", "a", "b"], ["inspect", name], ["convert", "a", "c"]):
        main([arguments[0], *(str(tmp_path / part) for part in arguments[1:])])
        said = capsys.readouterr()
        for text in (said.out, said.err):
            assert not any(not line.isprintable() or line.startswith("FAIL") for line in text.split("\n"))


def test_logs(caplog):
    """Log lines are escaped, arguments too, and levels stay what they are."""
    with caplog.at_level(logging.INFO):
        printable_logger("ckpt_core.test").info("%s of %d", "a\x1b\nb", 3)
    assert [record.getMessage() for record in caplog.records] == [r"a\x1b\nb of 3"]


def test_cards():
    """So are a card's."""
    assert "\u202e" not in line("a\u202eb")
    assert "\x1b" not in quoted("a\x1bb")
