"""Tokens: from documents to packed sequences in a file that ranks map into memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckpt_core.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tasks.worker.documents import Document

_TOKENS, _INFO = "tokens.npy", "info.json"


@dataclass(frozen=True)
class TokenInfo:
    """What a directory of prepared tokens says about itself, in `info.json`."""

    source: str
    """Where the text came from, as the settings name it."""
    documents: int
    text_bytes: int
    tokens: int
    """Tokens of the text, the ends of documents included; those of a last, incomplete sequence are not used."""
    sequences: int
    sequence_length: int
    dtype: str
    fingerprint: str
    """SHA-256 of the tokens as they lie in the file."""


@dataclass(frozen=True)
class TokenSet:
    """Packed sequences: `tokens` has the shape [sequences, sequence_length] and may be mapped from a file."""

    tokens: NDArray[Any]
    info: TokenInfo

    @classmethod
    def open(cls, directory: str | Path) -> TokenSet:
        """Map a prepared directory into memory.

        Raises:
            ArgumentError: it is not there, or its parts do not fit each other.
        """
        directory = Path(directory)
        try:
            info = TokenInfo(**json.loads((directory / _INFO).read_text()))
            tokens = np.load(directory / _TOKENS, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, TypeError) as error:
            raise ArgumentError(f"{directory}: no prepared tokens there ({error}); prepare the data again") from error
        if tokens.shape != (info.sequences, info.sequence_length) or tokens.dtype != info.dtype:
            raise ArgumentError(
                f"{directory}: {_TOKENS} is {tokens.dtype} {tokens.shape}, {_INFO} says {info.dtype} "
                f"{(info.sequences, info.sequence_length)}; prepare the data again"
            )
        return cls(tokens, info)

    def save(self, directory: Path) -> None:
        """Write `tokens.npy` and `info.json` into a new directory."""
        directory.mkdir()
        np.save(directory / _TOKENS, self.tokens, allow_pickle=False)
        (directory / _INFO).write_text(json.dumps(asdict(self.info), indent=2) + "\n")


def make_token_set(  # noqa: D417 (the rest is in the summary)
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    source: str,
    sequence_length: int,
    max_tokens: int | None = None,
) -> TokenSet:
    """Tokenize documents, end each with the tokenizer's end-of-text token, and cut the whole into sequences.

    Args:
        max_tokens: use only the first ones, but at least one sequence.

    Raises:
        ArgumentError: there are fewer tokens than one sequence has.
    """
    flat = _encode(documents, tokenizer)
    sequences = len(flat) // sequence_length
    if sequences == 0:
        raise ArgumentError(
            f"{source}: {len(documents)} documents gave {len(flat)} tokens, one sequence needs {sequence_length}; "
            "add text, hold out another part of it, or lower `sequence_length`"
        )
    if max_tokens is not None:
        sequences = min(sequences, max(1, max_tokens // sequence_length))
    tokens = flat[: sequences * sequence_length].reshape(sequences, sequence_length)
    info = TokenInfo(
        source=source,
        documents=len(documents),
        text_bytes=sum(d.size for d in documents),
        tokens=len(flat),
        sequences=sequences,
        sequence_length=sequence_length,
        dtype=str(tokens.dtype),
        fingerprint=hashlib.sha256(tokens.tobytes()).hexdigest(),
    )
    return TokenSet(tokens, info)


def unigram_loss(train: TokenSet, heldout: TokenSet, vocab_size: int) -> float:
    """Return the held-out loss, in nats a token, of guessing each token by its frequency in training.

    Counts are smoothed by adding one; the targets are those of the model, all but the first of each sequence.
    """
    counts = np.bincount(train.tokens.ravel(), minlength=vocab_size).astype(np.float64) + 1.0
    log_probabilities = np.log(counts / counts.sum())
    return float(-log_probabilities[heldout.tokens[:, 1:]].mean())


def _encode(documents: Sequence[Document], tokenizer: Any) -> NDArray[Any]:
    """Return all tokens in one array, of the smallest unsigned type that holds the vocabulary."""
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    end = np.array([tokenizer.eos_token_id], dtype=dtype)
    return np.concatenate([part for ids in encoded for part in (np.array(ids, dtype=dtype), end)])
