"""What an export needs beside weights: the model's config, and the files of its tokenizer and processors."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckpt_core import durable
from ckpt_core.errors import CkptError, DamagedError, MismatchError, NotACheckpointError, UntrustedError
from ckpt_core.export.architecture import is_known
from ckpt_core.export.carried import CONFIG_NAME, MODULES_NAME, choose, module_directories
from ckpt_core.export.foreign import foreign_errors
from ckpt_core.export.repository import download
from ckpt_core.export.vocabulary import (
    GENERATION_CONFIG_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    TokenizerFile,
    count_tokens,
    read_tokenizer,
)
from ckpt_core.export.weight_conversions import RECORD_NAME, record_of
from ckpt_core.hf_weights import has_weights, read_weights
from ckpt_core.urls import is_url, place_of

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_TOKENIZER = re.compile(
    r"tokeniz.*|.*\.(model|model\.v[0-9a-z]+|spm|tiktoken|vocab|bpe|codes|dict)|(.*[-_])?vocab.*|tekken.*|merges.*"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template.*|additional_chat_templates/.*|(emoji|normalizer)\.json"
    r"|dict\..*txt"
)
"""The files of a tokenizer, whatever wrote it."""

_PROCESSOR = re.compile(r"(.*_)?(pre)?processor_config\.json")
_NEEDED = re.compile(rf"{_TOKENIZER.pattern}|{_PROCESSOR.pattern}|{GENERATION_CONFIG_NAME}|(.*/)?config.*\.json")
"""JSON files without which a model or its tokenizer does not load."""

_OF_A_MODEL = re.compile(rf"{GENERATION_CONFIG_NAME}|{MODULES_NAME}|(readme|licen[cs]e|notice).*", re.IGNORECASE)
"""Files beside a tokenizer that are of the model there."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 1 << 30
"""Of one file: it is read into memory."""


@dataclass(frozen=True)
class Assets:
    """A model's config, and the other files of an export by name; the model's weights are not among them."""

    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    rules: tuple[str, ...] = ()
    """What a plan says of weights that are carried as they are, of what is left out, and of what was not understood."""

    tokens: int | None = None
    """One more than the largest token id in the tokenizer's files; None if they do not say."""

    names: Sequence[str] = ()
    """Of the tensors of the file that the model was loaded from, whose form an export is to have; empty if unknown."""


def read_assets(directory: Place, *, trust_remote_code: bool = False) -> Assets:
    """Read the assets in `directory`: of a checkpoint, or of any Hugging Face directory. Runs no code of theirs.

    Files are carried byte for byte; they are parsed only to find what is damaged. Python code stays behind, unless it
    is trusted, and so does what the config says of it, if transformers has the model itself.

    Raises:
        NotACheckpointError: there is no config.
        DamagedError: a file is not readable, or is a pointer to one that Git LFS did not fetch.
        UntrustedError: the model needs code of its own.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        advice = "give the directory that has it, or put the model's own there"
        if (directory / "adapter_config.json").is_file():
            advice = "it holds an adapter alone, so give the model that it was merged into"
        raise NotACheckpointError(f"{directory}: no {CONFIG_NAME}, so the architecture is not known; {advice}.")
    config, rules = _without_code(_parse_config(path), path, trust_remote_code=trust_remote_code)
    rest = read_files(directory, trust_remote_code=trust_remote_code)
    return replace(rest, config=config, rules=(*rules, *rest.rules), names=_weight_names(directory))


def _weight_names(directory: Place) -> tuple[str, ...]:
    """Return the names of the tensors in the weights next to a config, from which its model was loaded."""
    if isinstance(directory, Path) and has_weights(directory):  # elsewhere each file's header would be a request
        with suppress(CkptError, OSError):  # of no use here; who wants these weights is told what is wrong with them
            return tuple(read_weights(directory).tensors)
    return ()


def read_files(directory: Place, *, trust_remote_code: bool = False) -> Assets:
    """Read the files of `directory` that are carried, its config aside.

    Raises:
        DamagedError: one of them is not readable, or is a pointer to one that Git LFS did not fetch.
    """
    local = isinstance(directory, Path)
    found = dict(durable.files_through_links(directory) if local else durable.files_below(directory))
    modules = module_directories(found[MODULES_NAME]) if MODULES_NAME in found else ()
    carried = choose(found, modules, directory, code=trust_remote_code)
    files = {name: _read(found[name]) for name in carried.names}
    unparsed = [rule for name, data in files.items() for rule in _check_json(name, data, directory, modules)]
    try:
        tokenizer = read_tokenizer(files)
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{directory / TOKENIZER_NAME}: not JSON ({type(error).__name__}: {error}); restore a copy of it."
        ) from None
    rules = (*carried.rules, *unparsed, *_tokenizer_rules(files, tokenizer))
    return Assets({}, files, rules, tokens=count_tokens(files, tokenizer))


def fetch_assets(model: str, tokenizer: str | None = None) -> Assets:
    """Get the assets of `model`, with the tokenizer and processors of `tokenizer`. Runs no code of theirs.

    Args:
        model: a directory, a config file by itself, or a Hub id.
        tokenizer: a directory or a Hub id; None takes the files of `model`.

    Raises:
        NotACheckpointError: one of them is not there.
        DamagedError: a file is not readable.
        UntrustedError: the model needs code of its own.
    """
    source, left = _locate(model, "config")
    if isinstance(source, Path) and source.is_file():
        config, rules = _without_code(_parse_config(source), source, trust_remote_code=False)
        assets = Assets(config, {}, tuple(rules))
    else:
        assets = read_assets(source)
    assets = replace(assets, rules=tuple(dict.fromkeys((*left, *assets.rules))))
    return assets if tokenizer is None else _with_tokenizer(assets, tokenizer)


def _with_tokenizer(assets: Assets, tokenizer: str) -> Assets:
    """Replace a model's tokenizer and processors by those of another directory or Hub id."""
    source, left = _locate(tokenizer, "tokenizer")
    others = read_files(source)
    given = {name: data for name, data in others.files.items() if not _OF_A_MODEL.fullmatch(name)}
    if not any(_TOKENIZER.fullmatch(name) for name in given):
        raise NotACheckpointError(f"tokenizer {tokenizer!r}: no files of a tokenizer there; name where they are.")
    kept = {name: data for name, data in assets.files.items() if not _TOKENIZER.fullmatch(name)}
    replaced = {name: data for name, data in given.items() if name not in kept or _PROCESSOR.fullmatch(name)}
    rules = tuple(dict.fromkeys((*assets.rules, *left, *others.rules)))
    return replace(assets, files={**kept, **replaced}, rules=rules, tokens=others.tokens)


def _locate(name: str, what: str) -> tuple[Place, tuple[str, ...]]:
    """Return the directory, or file, that a path, URL or Hub id names, and what to say of files that it lacks."""
    if is_url(name):
        return place_of(name), ()
    path = Path(name).expanduser()
    try:
        if path.exists():
            return path, ()
    except (OSError, ValueError):  # too long for a path, or with a NUL: no id either, as the error will say
        pass
    return download(name, what)


def _read(path: Place) -> bytes:
    size = durable.file_size(path)
    if size is None:  # reading a named pipe would wait for ever
        raise DamagedError(f"{path}: not a regular file, or a link that leads nowhere; restore a copy, or delete it.")
    if size > _MAX_BYTES:
        raise MismatchError(f"{path}: {size} bytes, and a file beside weights has at most {_MAX_BYTES}; move it away.")
    data = path.read_bytes()
    if data.startswith(_LFS_POINTER):
        raise DamagedError(f"{path}: a pointer of Git LFS, not the file that it stands for; run `git lfs pull` there.")
    return data


def _check_json(name: str, data: bytes, directory: Place, modules: tuple[str, ...]) -> list[str]:
    """Check that a JSON file is one; return what to say of one that is not, if nothing needs it.

    Raises:
        DamagedError: it is not, and the model or its tokenizer needs it.
    """
    if not name.endswith(".json") or name == TOKENIZER_NAME:  # which is parsed for its tokens
        return []
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        needed = "/" not in name or name.startswith(tuple(f"{module}/" for module in modules))
        if needed and _NEEDED.fullmatch(name):
            raise DamagedError(
                f"{directory / name}: not JSON ({type(error).__name__}: {error}); restore a copy, or delete it."
            ) from None
        return [f"assets: {name} is copied as it is, though it is not JSON"]
    if name == GENERATION_CONFIG_NAME and not isinstance(document, dict):
        raise DamagedError(
            f"{directory / name}: a {type(document).__name__}, expected an object; restore a copy, or delete it."
        )
    return []


def lacks_tokenizer_json(files: Mapping[str, bytes]) -> bool:
    """Whether there is a tokenizer whose tokens only a library can count."""
    return TOKENIZER_NAME not in files and any(_TOKENIZER.fullmatch(name) for name in files)


def _tokenizer_rules(files: Mapping[str, bytes], tokenizer: TokenizerFile | None) -> list[str]:
    """Say what is not known of a tokenizer."""
    rules = list[str]()
    if names := sorted(name for name in files if _TOKENIZER.fullmatch(name)) if tokenizer is None else []:
        rules.append(
            f"assets: {', '.join(names)}: copied as they are, and not looked into, as there is no {TOKENIZER_NAME}"
        )
    elif tokenizer is not None and tokenizer.unknown:
        rules.append(
            f"assets: {TOKENIZER_NAME} is copied as it is, and is {tokenizer.unknown}; whether the tokenizer loads and "
            "fits the model was not checked"
        )
    named: Any = json.loads(files.get(TOKENIZER_CONFIG_NAME, b"null"))
    if isinstance(named, dict) and cast("dict[str, Any]", named).get("auto_map"):
        rules.append(
            f"assets: {TOKENIZER_CONFIG_NAME} is copied as it is, and names Python code (auto_map); the tokenizer "
            "loads only where that code is, and is trusted"
        )
    return rules


def check_generation_config(files: Mapping[str, bytes]) -> list[str]:
    """Say whether transformers takes a generation config; it need not, for the model to be what it is.

    This imports torch, which reading the assets of an adapter does not need.
    """
    data = files.get(GENERATION_CONFIG_NAME)
    if data is None:
        return []
    from transformers import GenerationConfig

    try:
        with foreign_errors(GENERATION_CONFIG_NAME, "correct it"):
            GenerationConfig.from_dict(json.loads(data)).validate()
    except CkptError as error:
        return [f"assets: {GENERATION_CONFIG_NAME} is copied as it is, though transformers does not take it: {error}"]
    return []


def config_bytes(config: Mapping[str, Any], architecture: str, dtype: str) -> bytes:
    """Return `config.json` of a model with weights, as `save_pretrained` writes it.

    Args:
        config: what `Architecture.config` is.
        architecture: the name of the model's class.
        dtype: of its weights.
    """
    made = {**config, "architectures": [architecture], "dtype": dtype}
    return (json.dumps(dict(sorted(made.items())), indent=2) + "\n").encode()


def write_configs(module: Any, directory: Path) -> None:
    """Write the configs of a live transformers model, naming its class and dtype as `save_pretrained` does.

    Of a model that PEFT wraps, these are the configs of the model within, and the adapter's.
    """
    if hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
        _write_adapter_config(module, directory)
        module = module.get_base_model()
    config = copy.deepcopy(module.config)
    config.architectures = [architecture_name(module)]
    config.dtype = str(module.dtype).removeprefix("torch.")
    config.save_pretrained(directory)
    if hasattr(module, "decision_config"):  # of models that decide: decision.json, and its template
        module.decision_config.save_pretrained(directory)
    if record := record_of(module):
        (directory / RECORD_NAME).write_bytes(record)
    if module.can_generate():
        # Not `save_pretrained`, which refuses values that nothing but generation is concerned with: a step that
        # cannot be saved for them would be lost.
        path = directory / GENERATION_CONFIG_NAME
        module.generation_config.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])


def _write_adapter_config(module: Any, directory: Path) -> None:
    """Write the config of the adapter in use, as `save_pretrained` does."""
    active = module.active_adapters[0]
    config = copy.deepcopy(module.peft_config[active])
    config.inference_mode = True
    config.save_pretrained(str(directory))


def architecture_name(module: Any) -> str:
    """Return the name of a model's class; FSDP2 puts a class of its own in front."""
    return type(module).__name__.removeprefix("FSDP")


def _without_code(
    config: dict[str, Any], path: Place, *, trust_remote_code: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a config that names no Python code, with what to say of that; as it is if its author is trusted.

    Raises:
        UntrustedError: transformers does not have the model without that code.
    """
    if "auto_map" not in config or trust_remote_code:
        return config, ()
    if not is_known(config):
        raise UntrustedError(
            f"{path}: needs Python code of its own (auto_map), which is not run; convert with a model class that "
            "transformers has, or pass trust_remote_code if you trust its author."
        )
    kept = {name: value for name, value in config.items() if name != "auto_map"}
    return kept, ("config: auto_map is left out; transformers has the model itself",)


def _parse_config(path: Place) -> dict[str, Any]:
    try:
        config = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CkptError):
            raise
        raise DamagedError(f"{path}: not JSON ({type(error).__name__}: {error}); restore a copy.") from None
    # Classes that are only parts of others have a config class without a model_type, which `architectures` finds.
    typed = isinstance(config, dict) and isinstance(config.get("model_type", ""), str)
    if not typed or not (config.get("model_type") or is_known(config)):
        raise MismatchError(f"{path}: names no model_type; expected the config of a transformers model.")
    return cast("dict[str, Any]", config)
