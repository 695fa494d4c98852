"""Data preparation: text in, tokenizer and packed tokens out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core import locks
from ckpt_core.errors import ArgumentError
from tasks.config import DataSettings, ModelSettings
from tasks.worker.documents import Document, fingerprint, read_documents, split_documents
from tasks.worker.tokenizer import load_tokenizer, train_tokenizer
from tasks.worker.tokens import TokenSet, make_token_set, unigram_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

_FORMAT = 1  # raised when the same settings and text would give other files
_RESULT = "prepared.json"


def prepare(
    model: ModelSettings, data: DataSettings, output: str | Path, tokenizer: str | Path | None = None
) -> dict[str, Any]:
    """Read, split, tokenize and pack the text of a source, once for equal settings, text and tokenizer.

    Writes `<output>/<key>/` with `tokenizer/`, `train/` and `heldout/`, whole or not at all; a second call finds it.

    Args:
        model: names the tokenizer, or the size of the vocabulary of one that is trained on the training part.
        data: the source and how to split and pack it.
        output: directory for all prepared data; made if it is not there.
        tokenizer: directory of a tokenizer to use in any case, as a continued run does.

    Returns:
        JSON types only: `directory`, `tokenizer`, `train_tokens` and `heldout_tokens` (directories), `vocab_size`,
        `fingerprint` (SHA-256 of the documents), `train` and `heldout` (the fields of `TokenInfo`) and
        `unigram_loss` (held-out, nats a token).

    Raises:
        ArgumentError: no text, too little, a file that cannot be read, or a tokenizer that does not fit the model.
    """
    vocab_size = _checked_vocab_size(model, data)
    documents = read_documents(data)
    existing = tokenizer or model.tokenizer or model.pretrained
    loaded = None if existing is None else load_tokenizer(existing, trust_remote_code=model.trust_remote_code)
    key = _key(data, documents, vocab_size, loaded)
    output = Path(output).expanduser().absolute()
    directory = output / key
    with _locked(output):
        if not (directory / _RESULT).exists():
            staging = output / f".preparing-{uuid.uuid4().hex}"
            staging.mkdir()
            _write(staging, documents, data, loaded, vocab_size)
            staging.rename(directory)
    return _result(directory)


def _checked_vocab_size(model: ModelSettings, data: DataSettings) -> int:
    """Return the model's vocabulary size, or refuse sequences that it cannot take."""
    from tasks.worker.model import model_config

    config = model_config(model).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and data.sequence_length > longest:
        raise ArgumentError(
            f"sequence_length {data.sequence_length} is more than the model's max_position_embeddings {longest}"
        )
    return config.vocab_size


def _key(data: DataSettings, documents: list[Document], vocab_size: int, tokenizer: Any) -> str:
    """Return a name that equal settings, text and tokenizer give again."""
    parts = {
        "format": _FORMAT,
        "data": data.model_dump(),
        "documents": fingerprint(documents),
        "vocab_size": vocab_size,
        "tokenizer": None if tokenizer is None else tokenizer.backend_tokenizer.to_str(),
        "end_of_text": None if tokenizer is None else tokenizer.eos_token_id,
        "tokenizers": version("tokenizers"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Let one process at a time prepare into `output`; whatever one left that was killed goes."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        locks.take(lock.fileno(), locks.EXCLUSIVE, output)
        for leftover in output.glob(".preparing-*"):
            shutil.rmtree(leftover)
        yield


def _write(directory: Path, documents: list[Document], data: DataSettings, tokenizer: Any, vocab_size: int) -> None:
    train_documents, heldout_documents = split_documents(documents, data.heldout_every)
    tokenizer = tokenizer or train_tokenizer(train_documents, vocab_size)
    if len(tokenizer) > vocab_size:
        raise ArgumentError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocab_size}: "
            "raise `vocab_size` in the architecture, or take another tokenizer"
        )
    train = make_token_set(train_documents, tokenizer, source=data.source, sequence_length=data.sequence_length)
    heldout = make_token_set(
        heldout_documents,
        tokenizer,
        source=f"held out of {data.source}",
        sequence_length=data.sequence_length,
        max_tokens=data.heldout_tokens,
    )
    tokenizer.save_pretrained(directory / "tokenizer")
    train.save(directory / "train")
    heldout.save(directory / "heldout")
    result = {
        "vocab_size": len(tokenizer),
        "fingerprint": fingerprint(documents),
        "unigram_loss": unigram_loss(train, heldout, len(tokenizer)),
    }
    (directory / _RESULT).write_text(json.dumps(result))
    _sync(directory)


def _sync(directory: Path) -> None:
    """Make the files durable before the rename makes them visible."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _result(directory: Path) -> dict[str, Any]:
    sets = {part: TokenSet.open(directory / part).info for part in ("train", "heldout")}
    return {
        "directory": str(directory),
        "tokenizer": str(directory / "tokenizer"),
        "train_tokens": str(directory / "train"),
        "heldout_tokens": str(directory / "heldout"),
        **json.loads((directory / _RESULT).read_text()),
        **{part: vars(info) for part, info in sets.items()},
    }
