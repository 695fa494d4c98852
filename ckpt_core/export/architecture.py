"""What an architecture expects of a checkpoint: names, shapes and ties, from a model without weights."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ckpt_core.errors import MismatchError
from ckpt_core.export.recipe import Recipe
from ckpt_core.format.index import Index, Shape

_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


@dataclass(frozen=True)
class Architecture:
    """A model class with a config, seen from the names of its state dict."""

    name: str
    shapes: Mapping[str, Shape]
    """Shape of each tensor in the state dict, tied ones under both names."""

    ties: Mapping[str, str]
    """Names that are the same tensor as another, which the export keeps, by the config's declaration."""

    recipes: Mapping[str, Recipe]
    """How each tensor of an export, by its name there, is made of those of the state dict."""

    padded: frozenset[str]
    """Tensors with a row for each token, of which trainers keep more rows than there are tokens."""

    keep_float32: tuple[str, ...]
    """Parts of names whose tensors stay float32 when the rest is cast to float16."""

    keep_float32_always: tuple[str, ...]
    """Parts of names whose tensors stay float32 under any cast."""

    def keeps_float32(self, name: str, dtype: str) -> bool:
        """Whether the architecture wants this tensor left in float32 when weights are cast to `dtype`."""
        parts = self.keep_float32_always + (self.keep_float32 if dtype == "float16" else ())
        return any(re.search(rf"(^|\.){part}(\.|$)", name) for part in parts)


def find_architecture(config: Mapping[str, Any], index: Index) -> Architecture:
    """Return the architecture that a config names; without `architectures`, the one that the index's names fit.

    Raises:
        MismatchError: the config is none that transformers knows, or no class fits.
    """
    named = config.get("architectures") or []
    if named:
        return _describe(named_class(str(named[0])), config)
    tried: list[str] = []
    for auto in _AUTO_CLASSES:
        cls = _auto_class(auto, config)
        if cls is not None:
            architecture = _describe(cls, config)
            if _fits(architecture, index):
                return architecture
            tried.append(architecture.name)
    raise MismatchError(
        f"config of {config.get('model_type')!r}: names no architectures, and the checkpoint's tensors fit none of "
        f'{", ".join(tried) or "its classes"}; add "architectures" to config.json.'
    )


def _fits(architecture: Architecture, index: Index) -> bool:
    names = [name for name in architecture.shapes if name not in architecture.ties]
    stored = list(index.tensors)
    return all(any(s == name or s.endswith("." + name) for s in stored) for name in names) and any(
        s.endswith(names[-1]) for s in stored
    )


def named_class(name: str) -> Any:
    """Return the transformers model class of that name.

    Raises:
        MismatchError: there is none.
    """
    import transformers

    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise MismatchError(
            f"architecture {name!r}: transformers {transformers.__version__} has no such model; check the config, or "
            "install the version that has it."
        )
    return cls


def _auto_class(auto: str, config: Mapping[str, Any]) -> Any | None:
    import transformers

    mapping = getattr(transformers, auto)._model_mapping
    try:
        return mapping[type(_config(config))]
    except KeyError:
        return None


def _config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    fields = {name: value for name, value in config.items() if name not in {"model_type", "transformers_version"}}
    try:
        return AutoConfig.for_model(config["model_type"], **fields)
    except Exception as error:  # noqa: BLE001 - each config class has checks and errors of its own
        raise MismatchError(f"config of {config.get('model_type')!r}: {error}; check config.json.") from None


def _describe(cls: Any, config: Mapping[str, Any]) -> Architecture:
    import torch

    from ckpt_core.export.trace import trace_export

    built = _config(config)
    try:
        with torch.device("meta"):
            model = cls(built)
    except Exception as error:  # noqa: BLE001 - each model class has checks and errors of its own
        raise MismatchError(f"{cls.__name__}: cannot be built from its config ({error}); check config.json.") from None
    state = model.state_dict()
    ties = {target: source for target, source in (model.all_tied_weights_keys or {}).items() if target in state}
    return Architecture(
        name=cls.__name__,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        ties=ties,
        recipes=trace_export(model, {name: tensor for name, tensor in state.items() if name not in ties}),
        padded=_padded(model),
        keep_float32=tuple(model._keep_in_fp32_modules or ()),
        keep_float32_always=tuple(model._keep_in_fp32_modules_strict or ()),
    )


def _padded(model: Any) -> frozenset[str]:
    """Return the names of the embeddings of tokens, and of what predicts tokens."""
    owned: set[int] = set()
    for find in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # a model of something else than text
            module = find()
            owned |= {id(parameter) for parameter in (module.parameters() if module is not None else ())}
    return frozenset(name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in owned)
