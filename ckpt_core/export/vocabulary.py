"""The token ids in use: those of a tokenizer's files, and those that configs name."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ckpt_core.errors import CkptError, MismatchError
from ckpt_core.export.architecture import load_config, named_architecture, named_class
from ckpt_core.export.foreign import foreign_errors

GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_ADDED_NAME, _VOCAB_NAME = "added_tokens.json", "vocab.json"

_ID_KEY = re.compile(r"(?!(num|max|min|n)_).*(_tokens?|_token_(id|ids|index)|_ids|_id)")
"""Keys of configs that may hold token ids. Too many keep a row too much; too few would cut one that is needed."""

_SPECIAL_KEY = re.compile(
    r"(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_id|(begin_)?suppress_tokens"
)
"""Keys of ids that a model's vocabulary should have.

Ids that stand for images or sounds are none of them: models replace these before they look anything up.
"""

_KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")
"""The models of the tokenizers library."""

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_MERGES = re.compile(
    rb'("merges"\s*+:\s*+)\[(?:\s*+(?:S|\[\s*+S\s*+,\s*+S\s*+\])\s*+,?+)*+\s*+\]'.replace(b"S", _STRING), re.DOTALL
)
"""The merges of a tokenizer: most of its file, ten times as large once parsed, and of no use here."""


@dataclass(frozen=True)
class TokenizerFile:
    """What `tokenizer.json` says."""

    ids: tuple[int, ...]
    """Ids of tokens, the largest one among them."""

    unknown: str | None
    """What is not known of its form; None if all of it is."""


def read_tokenizer(files: Mapping[str, bytes]) -> TokenizerFile | None:
    """Read `tokenizer.json`, if there is one.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it nests too deep.
    """
    data = files.get(TOKENIZER_NAME)
    if data is None:
        return None
    document = _dict(json.loads(_MERGES.sub(rb"\1[]", data, count=1)))
    model = _dict(document.get("model"))
    vocabulary: Any = model.get("vocab")
    added: Any = document.get("added_tokens")
    entries: list[Any] = added if isinstance(added, list) else []
    ids = [*_numbers(vocabulary), *_numbers(dict(enumerate(_dict(entry).get("id") for entry in entries)))]
    if isinstance(vocabulary, list) and vocabulary:  # of a unigram model: pairs of token and score, by id
        ids.append(len(cast("list[Any]", vocabulary)) - 1)
    largest = (max(ids),) if ids else ()
    kind = model.get("type")  # older files have none
    if not isinstance(vocabulary, (dict, list)):
        return TokenizerFile(largest, "of a form without a vocabulary")
    known = kind is None or kind in _KINDS
    return TokenizerFile(largest, None if known else f"of a kind that is not known here, {str(kind)[:60]!r}")


def count_tokens(files: Mapping[str, bytes], tokenizer: TokenizerFile | None) -> int | None:
    """Return one more than the largest token id in a tokenizer's files; None if they do not say.

    A class of transformers may add tokens of its own: this is a lower bound, and `load_sizes` has the number.
    """
    own = tokenizer.ids if tokenizer is not None else _numbers(_parse(files, _VOCAB_NAME))  # GPT-2's older format
    ids = [*own, *_added_ids(files)]
    return max(ids) + 1 if ids else None


def _added_ids(files: Mapping[str, bytes]) -> Iterator[int]:
    """Yield the ids of tokens that `tokenizer_config.json` adds or, as transformers has it, else the older file."""
    added = _dict(_parse(files, TOKENIZER_CONFIG_NAME)).get("added_tokens_decoder")
    if isinstance(added, dict):
        yield from (int(key) for key in cast("dict[str, Any]", added) if key.isdecimal())
    else:
        yield from _numbers(_parse(files, _ADDED_NAME))


def load_sizes(files: Mapping[str, bytes], config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of tokens in a vocabulary, and with all that were added to it, as transformers loads it.

    Both are one more than the largest id. Vocabularies of sentencepiece, tiktoken and others need their library.

    Raises:
        MismatchError: transformers cannot load it here.
    """
    import transformers
    from transformers import AutoTokenizer

    logging: Any = transformers.logging
    with tempfile.TemporaryDirectory() as directory:
        for name, data in {**files, "config.json": json.dumps(config).encode()}.items():
            if "/" not in name and not name.endswith(".py"):  # none of its code is run
                (Path(directory) / name).write_bytes(data)
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)  # it speaks of each library that it tries in vain
        try:
            with foreign_errors("tokenizer", "check its files"):
                tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
                total = max([len(tokenizer), *(number + 1 for number in tokenizer.get_vocab().values())])
                return int(tokenizer.vocab_size), total
        finally:
            logging.set_verbosity(verbosity)


def token_ids(config: Mapping[str, Any], keys: re.Pattern[str] = _ID_KEY) -> Iterator[tuple[str, int]]:
    """Yield the ids that a config names, with their keys, those of configs within it included."""
    for name, value in config.items():
        key = str(name)  # of a config that never was JSON, some are numbers
        if isinstance(value, dict) and not keys.fullmatch(key):
            yield from ((f"{key}.{below}", number) for below, number in token_ids(cast("dict[str, Any]", value), keys))
        elif keys.fullmatch(key):
            yield from ((key, number) for number in _integers(value) if number >= 0)  # -1 says that there is none


def all_ids(config: Mapping[str, Any], files: Mapping[str, bytes]) -> Iterator[tuple[str, int]]:
    """Yield the ids that a model's config and generation config name, each with where."""
    yield from token_ids(config)
    yield from token_ids(_dict(_parse(files, GENERATION_CONFIG_NAME)))


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a config says; None if it does not."""
    size: Any = config.get("vocab_size", _dict(config.get("text_config")).get("vocab_size"))
    return size if type(size) is int else None


def resized(config: Mapping[str, Any], more: int) -> dict[str, Any]:
    """Return the config of a model with `more` tokens than it says, as `resize_token_embeddings` leaves it.

    Raises:
        MismatchError: it says nothing of its tokens.
    """
    name = named_architecture(config)
    cls = named_class(name) if name and not name.startswith("PeftModel") else None  # the wrapper of an adapter
    built = load_config(config, cls)
    with foreign_errors("config", "set the size of its vocabulary to the rows of the checkpoint"):
        built.get_text_config().vocab_size += more
        return json.loads(built.to_json_string())


def check_tokenizer(*, used: int | None, rows: int, what: str, where: str) -> None:
    """Check that a model has a row for each token of its tokenizer.

    Args:
        used: one more than the largest id of the tokenizer, as far as it is known.
        rows: the number of token ids that the model has rows for.
        what: has these rows, for the error.
        where: the checkpoint, for the error.

    Raises:
        MismatchError: a row is missing.
    """
    if used is not None and used > rows:
        raise MismatchError(
            f"{where}: the tokenizer has token ids up to {used - 1}, and {what} has rows for {rows} tokens; "
            "give the tokenizer that it was trained with, or a checkpoint from after its embeddings were resized."
        )


def check_loaded_tokenizer(
    files: Mapping[str, bytes], config: Mapping[str, Any], *, rows: int, what: str, where: str
) -> list[str]:
    """Check that a model has a row for each token of a tokenizer that only a library can read; return what to say.

    Tokens that its class adds by itself, often for nothing, need no row.

    Raises:
        MismatchError: a row is missing.
    """
    try:
        used, total = load_sizes(files, config)
    except MismatchError as error:
        return [f"vocabulary: whether the tokenizer fits the model was not checked, as it does not load here: {error}"]
    check_tokenizer(used=used, rows=rows, what=what, where=where)
    if total <= rows:
        return []
    return [f"vocabulary: the tokenizer's class adds tokens up to {total - 1}, and {what} has rows for {rows} tokens"]


def check_special_ids(
    config: Mapping[str, Any], files: Mapping[str, bytes], *, rows: int, architecture: str, where: str
) -> list[str]:
    """Check that a model has a row for each id that generation needs; return what to say of other ids without a row.

    Many released configs name ids that their model has no row for and never uses: the end of the text in a model that
    generates none, the beginning of the text in one that always gets a prompt. transformers loads and runs such models.

    Args:
        config: the model's.
        files: the other files of the export by name.
        rows: the number of token ids that the model has rows for.
        architecture: the name of the model's class.
        where: the checkpoint, for errors.

    Raises:
        MismatchError: generation would look up a row that is missing, or could never end.
    """
    generation = _dict(_parse(files, GENERATION_CONFIG_NAME))
    parts = [(config, "config"), (_dict(config.get("text_config")), "text_config"), (generation, "generation config")]
    named = [(name, key, number) for part, name in parts for key, number in token_ids(_flat(part), _SPECIAL_KEY)]
    beyond = [each for each in named if each[2] >= rows]
    # An id that the class sets by itself was never chosen for this vocabulary: transformers writes GPT-2's 50256
    # into the config of a GPT-2 with forty tokens, too.
    default = _default_ids(config, architecture) if beyond else frozenset[int]()
    chosen = [each for each in beyond if each[2] not in default]
    needed = _needed_keys(config, architecture, named, rows) if chosen else frozenset[str]()
    for name, key, number in chosen:
        if key in needed:
            raise MismatchError(
                f"{where}: {key} of the {name} is {number}, and {architecture} has rows for {rows} tokens; correct "
                "it there, or give a checkpoint from after its embeddings were resized."
            )
    said = dict.fromkeys(f"{key} {number}" for _, key, number in chosen)
    return [
        f"vocabulary: {each} is copied as it is, though {architecture} has rows for {rows} tokens; neither loading nor "
        "generating from a prompt needs it"
        for each in said
    ]


def _needed_keys(
    config: Mapping[str, Any], architecture: str, named: Iterable[tuple[str, str, int]], rows: int
) -> frozenset[str]:
    """Return the keys whose ids need a row where this class generates text; none if it does not."""
    cls = named_class(architecture)
    if not cls.can_generate():
        return frozenset()
    # Sequences of a batch that have ended get the padding, and forced ids index the logits.
    needed = {"pad_token_id", "forced_bos_token_id", "forced_eos_token_id"}
    if not any(key == "eos_token_id" and number < rows for _, key, number in named):
        needed.add("eos_token_id")  # without any end of the text, a generation only stops at its longest length
    if getattr(load_config(config, cls), "is_encoder_decoder", False):
        starts = any(key == "decoder_start_token_id" for _, key, _ in named)
        needed.add("decoder_start_token_id" if starts else "bos_token_id")
    return frozenset(needed)


def _default_ids(config: Mapping[str, Any], architecture: str) -> frozenset[int]:
    """Return the ids in the class of a config; none if it cannot be made without arguments."""
    try:
        with foreign_errors("config", "check it"):
            default = type(load_config(config, named_class(architecture)))().to_dict()
    except CkptError:
        return frozenset()
    return frozenset(number for _, number in token_ids(default))


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not isinstance(value, dict)}


def _parse(files: Mapping[str, bytes], name: str) -> Any:
    """Return what a JSON file holds; None without it, and for one that is no JSON, which reading the assets refuses."""
    try:
        return json.loads(files.get(name, b"null"))
    except (ValueError, RecursionError):
        return None


def _dict(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _numbers(value: Any) -> Iterator[int]:
    """Yield the ids among a dictionary's values."""
    return (number for number in _dict(value).values() if type(number) is int and number >= 0)


def _integers(value: Any) -> Iterator[int]:
    """Yield the integers in nested lists and dictionaries."""
    if type(value) is int:
        yield value
    elif isinstance(value, (list, dict)):
        inner: Any = value.values() if isinstance(value, dict) else value
        for each in inner:
            yield from _integers(each)
