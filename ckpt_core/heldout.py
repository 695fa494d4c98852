"""Held-out data: rows of tokens, as they are, or text, packed so that each of its tokens is predicted once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckpt_core.errors import ArgumentError
from ckpt_core.texts import find_texts, read_texts
from ckpt_core.urls import local_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.integer[Any]]
    """Token numbers, [sequences, length]."""

_TOKENS_NAME = "tokens.npy"


@dataclass(frozen=True)
class Heldout:
    """Rows of tokens, of each of which all but the first are predicted."""

    blocks: list[Rows]
    """Each [sequences, length], of lengths of its own."""

    text_bytes: int | None
    """What the predicted tokens are in UTF-8; None where only tokens were given."""

    fingerprint: str
    """SHA-256 of the token rows, or of the texts."""

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return sum(block.shape[0] * (block.shape[1] - 1) for block in self.blocks)


def read_rows(data: str | PathLike[str] | Rows) -> Heldout | None:
    """Return rows of tokens: an array, a `.npy` file, or a directory that holds `tokens.npy`; None for anything else.

    Raises:
        ArgumentError: they are no integers in two dimensions, of at least two tokens a row.
    """
    if isinstance(data, str | PathLike):
        path = local_path(data, "data")
        path = path / _TOKENS_NAME if path.is_dir() else path
        if path.suffix != ".npy" or not path.is_file():
            return None
        rows, where = _map(path), str(path)
    else:
        rows, where = data, "the token rows"
    if rows.ndim != 2 or rows.dtype.kind not in "iu" or rows.shape[0] == 0 or rows.shape[1] < 2:  # noqa: PLR2004
        raise ArgumentError(
            f"{where}: {rows.dtype} {rows.shape}, expected integers [sequences, length] with 1 sequence and 2 tokens "
            "or more"
        )
    digest = hashlib.sha256(np.ascontiguousarray(rows).data)
    return Heldout([rows], None, digest.hexdigest())


def load_texts(source: str | PathLike[str], field: str = "text") -> list[str]:
    """Return the texts of a file, directory or glob; what is blank does not count.

    Raises:
        ArgumentError: no text there, or a file that cannot be read.
    """
    texts = [text for path in find_texts(source) for text in read_texts(path, field) if text.strip()]
    if not texts:
        raise ArgumentError(f"{source}: holds no text; give more")
    return texts


def pack_texts(texts: Sequence[str], tokenizer: Any, window: int) -> Heldout:
    """Tokenize texts and cut them into windows that overlap by one token.

    Each text is followed by the end-of-text token, which stands before the first one too. A tokenizer without one
    leaves the first token of all unpredicted.

    Raises:
        ArgumentError: a window of less than two tokens, or nothing to predict.
    """
    if window < 2:  # noqa: PLR2004
        raise ArgumentError(f"sequence_length {window}: expected 2 or more, as the first token is not predicted")
    tokens = _encode(texts, tokenizer)
    if len(tokens) < 2:  # noqa: PLR2004
        raise ArgumentError(f"the text is {len(tokens)} tokens, which leaves nothing to predict; give more")
    text_bytes, digest = sum(len(text.encode()) for text in texts), hashlib.sha256()
    if tokenizer.eos_token_id is None:
        text_bytes -= len(tokenizer.decode(tokens[:1].tolist()).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return Heldout(_windows(tokens, window), text_bytes, digest.hexdigest())


def _map(path: Path) -> Rows:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path}: no array of tokens ({error}); prepare the data again") from error


def _encode(texts: Sequence[str], tokenizer: Any) -> Rows:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array(ids, np.int64) for ids in (end, *(ids + end for ids in encoded))])


def _windows(tokens: Rows, length: int) -> list[Rows]:
    """Return the full windows, then a shorter one of what is left; each begins with the last token of that before."""
    blocks: list[Rows] = []
    full = (len(tokens) - 1) // (length - 1)
    if full:
        blocks.append(np.lib.stride_tricks.sliding_window_view(tokens, length)[:: length - 1])
    rest = tokens[full * (length - 1) :]
    return [*blocks, rest[None]] if len(rest) > 1 else blocks
