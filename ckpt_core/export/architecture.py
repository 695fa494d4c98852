"""What an architecture expects of a checkpoint: names, shapes and ties, from a model without weights."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ckpt_core.errors import MismatchError
from ckpt_core.export.recipe import Recipe, copy_of
from ckpt_core.format import dtypes
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

    unsaved: frozenset[str]
    """Tensors of the state dict that transformers does not store, as the model computes them."""

    dtypes: Mapping[str, str]
    """Type of each tensor where transformers loads the model in the type that was asked for."""

    turned: frozenset[str] = frozenset()
    """Modules of GPT-2's kind of linear layer: their weights have the shape (inputs, outputs)."""

    def as_stored(self) -> Architecture:
        """Return the same model seen from the names of its export: some frameworks save under those."""
        shown = {recipe.sources[0]: name for name, recipe in self.recipes.items() if recipe.straight}
        ties = {target: shown[source] for target, source in self.ties.items() if source in shown}
        shapes = {name: recipe.shape for name, recipe in self.recipes.items()}
        kinds = {
            name: max((self.dtypes[source] for source in recipe.sources), key=_width, default="float32")
            for name, recipe in self.recipes.items()
        }
        return replace(
            self,
            shapes={**shapes, **{target: shapes[source] for target, source in ties.items()}},
            ties=ties,
            recipes={name: copy_of(name, shape) for name, shape in shapes.items()},
            padded=frozenset(shown[name] for name in self.padded if name in shown),
            dtypes={**kinds, **{target: kinds[source] for target, source in ties.items()}},
        )


def _width(dtype: str) -> int:
    return dtypes.ITEMSIZE[dtype]


def find_architecture(config: Mapping[str, Any], index: Index, dtype: str | None = None) -> Architecture:
    """Return the architecture that a config names; without `architectures`, the one that the index's names fit.

    Args:
        config: of the model, as it is stored.
        index: what the checkpoint holds.
        dtype: the type to make the model in; float32 without.

    Raises:
        MismatchError: the config is none that transformers knows, or no class fits.
    """
    named = config.get("architectures") or []
    if named:
        return _describe(named_class(str(named[0])), config, dtype)
    tried: list[str] = []
    for auto in _AUTO_CLASSES:
        cls = _auto_class(auto, config)
        if cls is not None:
            architecture = _describe(cls, config, dtype)
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


def _config(config: Mapping[str, Any], cls: Any = None) -> Any:
    """Return a config as its class, which `cls`, a model's, knows where transformers' list does not."""
    from transformers import CONFIG_MAPPING

    kind = str(config["model_type"])
    own = getattr(cls, "config_class", None)
    try:
        own_kind = kind not in CONFIG_MAPPING and kind == getattr(own, "model_type", None)
        known: Any = own if own_kind else CONFIG_MAPPING[kind]
        return known.from_dict(known._decode_special_floats(dict(config)))  # a copy: some classes change what they get
    except KeyError:
        import transformers

        raise MismatchError(
            f"config of {kind!r}: transformers {transformers.__version__} has no such model; check config.json."
        ) from None
    except Exception as error:  # noqa: BLE001 - each config class has checks and errors of its own
        raise MismatchError(f"config of {config.get('model_type')!r}: {error}; check config.json.") from None


def _describe(cls: Any, config: Mapping[str, Any], dtype: str | None) -> Architecture:
    import torch
    from transformers.modeling_utils import local_torch_dtype
    from transformers.pytorch_utils import Conv1D

    from ckpt_core.export.trace import trace_export

    built, made_in = _config(config, cls), getattr(torch, dtype or "float32")
    for part in (built, *(getattr(built, name, None) for name in built.sub_configs)):
        if part is not None:
            part.dtype = made_in
    try:
        with local_torch_dtype(made_in, cls.__name__), torch.device("meta"):
            model = cls(built)
    except Exception as error:  # noqa: BLE001 - each model class has checks and errors of its own
        raise MismatchError(f"{cls.__name__}: cannot be built from its config ({error}); check config.json.") from None
    state = model.state_dict()
    unsaved = frozenset(model._keys_to_ignore_on_save or ()) & set(state)
    ties = {target: source for target, source in (model.all_tied_weights_keys or {}).items() if target in state}
    return Architecture(
        name=cls.__name__,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        ties=ties,
        recipes=trace_export(model, {n: tensor for n, tensor in state.items() if n not in ties and n not in unsaved}),
        padded=_padded(model),
        unsaved=unsaved,
        dtypes=_dtypes(model, state, made_in),
        turned=frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
    )


def _dtypes(model: Any, state: Mapping[str, Any], made_in: Any) -> dict[str, str]:
    """Return the type of each tensor after loading: what the model was made with, or what transformers plans.

    The plan's names are searched for in those of tensors as transformers does it, anywhere.
    """
    plan = {pattern.replace("*", ".*"): dtype for pattern, dtype in model._get_dtype_plan(made_in).items()}
    found = {n: next((dtype for p, dtype in plan.items() if re.search(p, n)), t.dtype) for n, t in state.items()}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}


def _padded(model: Any) -> frozenset[str]:
    """Return the names of the embeddings of tokens, and of what predicts tokens."""
    owned: set[int] = set()
    for find in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # a model of something else than text
            module = find()
            owned |= {id(parameter) for parameter in (module.parameters() if module is not None else ())}
    return frozenset(name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in owned)
