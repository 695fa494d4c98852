"""Which files of a model's directory go with it wherever its weights go, and what is said of those that do not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ckpt_core.errors import DamagedError, MismatchError

if TYPE_CHECKING:
    from ckpt_core.urls import Place

CONFIG_NAME = "config.json"
EXPORT_NAME = "export.json"
MODULES_NAME = "modules.json"
PLAIN_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md")
"""Of configs, of the files of a tokenizer, and of a description."""

_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json", ".distcp", ".gguf", ".h5",
    ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite",
)  # fmt: skip
"""Of files that hold weights, of this model as it was or of another one."""


@dataclass(frozen=True)
class Carried:
    """What is carried of a directory."""

    names: tuple[str, ...]
    rules: tuple[str, ...]
    """What a plan says of weights among them, and of directories that are left out."""


def choose(found: Mapping[str, Place], directory: Place) -> Carried:
    """Choose among the files of a directory, by their names below it.

    Plain files beside the config go along, and those in directories, say a pooling layer's config. A directory with
    weights is another model's, or this one in another format, and stays behind; but one that `modules.json` names is a
    part of this model (sentence-transformers' layout), and its weights, which no checkpoint of the transformer holds,
    go along as they are.

    Raises:
        DamagedError: `modules.json` is not readable.
        MismatchError: a module's weights are in no format that can be carried.
    """
    names = [n for n in found if n not in {CONFIG_NAME, EXPORT_NAME} and not n.startswith(".") and "/." not in n]
    weights = {name for name in names if name.endswith(_WEIGHT_SUFFIXES)}
    modules = _modules(found[MODULES_NAME]) if MODULES_NAME in found else ()
    own = {name for name in weights if _module_of(name, modules)}
    _check_formats(own, modules, directory)
    kept = {name for name in own if name.endswith((".safetensors", ".safetensors.index.json"))}
    others = sorted({name.partition("/")[0] for name in weights - own if "/" in name})
    rules = [f"assets: {name} is carried as it is; {MODULES_NAME} names its directory" for name in sorted(kept)]
    rules += [f"assets: {name}/ is left out; it holds weights, and {MODULES_NAME} does not name it" for name in others]
    plain = (n for n in names if n not in weights and _goes_along(n, others))
    return Carried((*plain, *sorted(kept)), tuple(rules))


def _goes_along(name: str, others: Iterable[str]) -> bool:
    return "/" not in name or (name.endswith(PLAIN_SUFFIXES) and name.partition("/")[0] not in others)


def _modules(place: Place) -> tuple[str, ...]:
    """Return the directories that `modules.json` names."""
    try:
        document: Any = json.loads(place.read_bytes())
        paths = [cast("object", module["path"]) for module in document]
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"{place}: no list of modules ({type(error).__name__}: {error}); restore a copy.") from None
    return tuple(path.strip("/") for path in paths if isinstance(path, str) and path.strip("/"))


def _module_of(name: str, modules: Iterable[str]) -> str | None:
    return next((module for module in modules if name.startswith(f"{module}/")), None)


def _check_formats(weights: Iterable[str], modules: Iterable[str], directory: Place) -> None:
    for module in modules:
        files = sorted(name for name in weights if name.startswith(f"{module}/"))
        if files and not any(name.endswith(".safetensors") for name in files):
            raise MismatchError(
                f"{directory / files[0]}: {MODULES_NAME} names {module}, so these weights go with the model, but only "
                "safetensors are carried; save the module with safe_serialization=True, or delete it from both."
            )
