"""Tokenizers: a byte-level BPE trained on the documents, or one that exists."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tasks.worker.documents import Document

END_OF_TEXT = "<|endoftext|>"
_SMALLEST_VOCABULARY = 256 + 1  # every byte, and the end of text


def train_tokenizer(documents: Sequence[Document], vocab_size: int) -> Any:
    """Train a byte-level BPE of at most `vocab_size` tokens; it decodes to exactly what it encoded.

    Raises:
        ArgumentError: the vocabulary is too small for all bytes.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ArgumentError(
            f"vocab_size {vocab_size}: a byte-level tokenizer needs at least {_SMALLEST_VOCABULARY}; raise it"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    _settle_parallelism()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer=trainer, length=len(documents))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer from a directory or the Hub.

    Raises:
        ArgumentError: there is none, or it has no end-of-text token to put between documents.
    """
    from transformers import AutoTokenizer

    _settle_parallelism()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"no tokenizer at {str(name)!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ArgumentError(f"tokenizer {str(name)!r} has no end-of-text token (`eos_token`); set one in its files")
    for where_it_was in ("is_local", "local_files_only"):  # from_pretrained notes these, save_pretrained writes them
        tokenizer.init_kwargs.pop(where_it_was, None)
    return tokenizer


def _settle_parallelism() -> None:
    """Say once that threads are wanted: without it `tokenizers` warns whenever this process forks later."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
