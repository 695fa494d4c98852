"""The choice of a model's files that go with it, by their names: all but weights, code and what is unknown."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ckpt_core.errors import DamagedError, MismatchError

if TYPE_CHECKING:
    from ckpt_core.urls import Place

CONFIG_NAME = "config.json"
EXPORT_NAME = "export.json"
MODULES_NAME = "modules.json"
MAX_NAME_BYTES = 255

_TEXT = re.compile(
    r".*\.(json|jinja|model|model\.v[0-9a-z]+|spm|tiktoken|vocab|bpe|codes|dict|txt|md|ya?ml|csv|tsv|png|jpe?g|gif|svg|webp)"
    r"|(licen[cs]e|notice|copying|readme|use_policy|acceptable_use|citation|authors)[^/]*"
    r"|[^/]*[-_]licen[cs]e",
    re.IGNORECASE,
)
"""Configs, the files of tokenizers and processors, and descriptions with their pictures.

A list of what is carried, not of what is not: formats of weights come and go, and a copy of old weights beside new
ones would be loaded by some program, some day.
"""

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth?|pte|ckpt|pkl|pickle|npz|npy|nemo|pb|h5|hdf5|keras|msgpack|distcp|gguf|ggml|llamafile|ot"
    r"|onnx|onnx_data|tflite|task|mlmodel|engine|plan|joblib|params|tar|tgz|gz|bz2|xz|zst|zip|7z|rar)"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index\.json|.*\.ckpt[-.].*|.*\.data-\d+-of-\d+",
    re.IGNORECASE,
)
"""Weights of this model as it was or of another one, also in archives."""

_STALE = frozenset({CONFIG_NAME, EXPORT_NAME, "trainer_state.json"})
"""What an export has anew, or what tells of another training."""

_CODE = ".py"
_WEIGHTS_AS_WERE = "weights as they were"
_MAX_SHOWN = 20
_CARRIED_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Carried:
    """What is carried of a directory."""

    names: tuple[str, ...]
    rules: tuple[str, ...]
    """What a plan says of weights among them, and of what is left out."""


def choose(names: Iterable[str], modules: Collection[str], directory: object, *, code: bool = False) -> Carried:
    """Choose among the files of a directory, by their names below it.

    Files beside the config go along, and those in directories, say a pooling layer's config. A directory with weights
    is another model's, or this one in another format, and stays behind; but one that `modules.json` names is a part of
    this model (sentence-transformers' layout), and its weights, which no checkpoint of the transformer holds, go along.

    Args:
        names: of all files.
        modules: the directories that `modules.json` names.
        directory: where they are, for errors.
        code: carry Python files as well.

    Raises:
        MismatchError: a module's weights are in no format that can be carried.
    """
    visible = [n for n in names if n not in _STALE and not n.startswith(".") and "/." not in n]
    weights = {name for name in visible if _WEIGHTS.fullmatch(name)}
    own = {name for name in weights if any(name.startswith(f"{module}/") for module in modules)}
    _check_formats(own, modules, directory)
    kept = {name for name in own if name.endswith(_CARRIED_WEIGHTS)}
    others = sorted({name.partition("/")[0] for name in weights - own if "/" in name})
    rest = [n for n in visible if n not in weights and not ("/" in n and n.partition("/")[0] in others)]
    chosen = [n for n in rest if is_plain(n) and (_TEXT.fullmatch(n) or (code and n.endswith(_CODE)))]
    rules = [f"assets: {name} is carried as it is; {MODULES_NAME} names its directory" for name in sorted(kept)]
    rules += [f"assets: {name}/ is left out; it holds weights, and {MODULES_NAME} does not name it" for name in others]
    old = [n for n in weights - own if "/" not in n and not n.endswith(_CARRIED_WEIGHTS)]
    reasons = dict.fromkeys(old, _WEIGHTS_AS_WERE) | {name: _reason(name) for name in set(rest) - set(chosen)}
    for reason in sorted(set(reasons.values())):
        left = [_shown(name) for name in sorted(reasons) if reasons[name] == reason]
        more = f" and {len(left) - _MAX_SHOWN} more" if left[_MAX_SHOWN:] else ""
        rules.append(f"assets: left out: {', '.join(left[:_MAX_SHOWN])}{more}; {reason}")
    return Carried((*chosen, *sorted(kept)), tuple(rules))


def is_plain(name: str) -> bool:
    """Return whether a path within an export is one that its record can name."""
    plain = not {"", ".", ".."} & set(name.split("/")) and "\\" not in name
    return plain and name.isprintable() and len(name.encode(errors="replace")) <= MAX_NAME_BYTES


def module_directories(place: Place) -> tuple[str, ...]:
    """Return the directories that `modules.json` names.

    Raises:
        DamagedError: it is not readable.
    """
    try:
        document: Any = json.loads(place.read_bytes())
        paths = [cast("object", module["path"]) for module in document]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(f"{place}: no list of modules ({type(error).__name__}: {error}); restore a copy.") from None
    return tuple(path.strip("/") for path in paths if isinstance(path, str) and path.strip("/"))


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _reason(name: str) -> str:
    if not is_plain(name):
        return "names that no record can hold"
    if name.endswith(_CODE):
        return "Python code, and trust_remote_code was not given"
    return "neither configs nor files of a tokenizer, a processor or a description"


def _check_formats(weights: Iterable[str], modules: Iterable[str], directory: object) -> None:
    for module in modules:
        files = sorted(name for name in weights if name.startswith(f"{module}/"))
        if files and not any(name.endswith(".safetensors") for name in files):
            raise MismatchError(
                f"{directory}/{files[0]}: {MODULES_NAME} names {module}, so these weights go with the model, but only "
                "safetensors are carried; save the module with safe_serialization=True, or delete it from both."
            )
