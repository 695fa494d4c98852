"""What an architecture expects of a checkpoint: names, shapes and ties, from a model without weights."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ckpt_core.errors import MismatchError
from ckpt_core.export.foreign import foreign_errors
from ckpt_core.export.recipe import Recipe, copy_of
from ckpt_core.export.weight_conversions import DEFAULT_FORM, FileForm, record_of
from ckpt_core.format import dtypes
from ckpt_core.format.index import Shape

_MATRIX_AXES = 2


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

    untrained: frozenset[str] = frozenset()
    """Buffers, and parameters without gradients: Inf in them is a bound or a mask, and no sign of a divergence."""

    turned: frozenset[str] = frozenset()
    """Modules of GPT-2's kind of linear layer: their weights have the shape (inputs, outputs)."""

    order: tuple[str, ...] = ()
    """The names of the export that the model's parameters become, in the order of the parameters; no buffers."""

    tokens: int | None = None
    """How many token ids the model has rows for; None for a model without a table of tokens."""

    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The config as `save_pretrained` writes it, but for the class's name and the type of the weights."""

    record: bytes | None = None
    """The conversions that the model's file needed, and its export undoes, if they are not the default ones."""

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
            untrained=frozenset(
                name for name, recipe in self.recipes.items() if self.untrained.issuperset(recipe.sources)
            ),
            dtypes={**kinds, **{target: kinds[source] for target, source in ties.items()}},
        )


def _width(dtype: str) -> int:
    return dtypes.ITEMSIZE[dtype]


def find_architecture(
    config: Mapping[str, Any], dtype: str | None = None, *, form: FileForm = DEFAULT_FORM
) -> Architecture:
    """Return the architecture that a config names.

    Args:
        config: of the model, as it is stored, with `architectures`.
        dtype: the type to make the model in; float32 without.
        form: the form of the file that the model was loaded from, which its export is to have.

    Raises:
        MismatchError: the config is none that transformers knows.
    """
    [name] = class_names(config)
    cls = named_class(name)
    with foreign_errors(f"{cls.__name__}: cannot be built from its config", "check config.json"):
        return _describe(cls, load_config(config, cls), dtype, form)


T = TypeVar("T")


def choose_class(
    config: Mapping[str, Any],
    match: Callable[[Architecture], tuple[Any, T]],
    dtype: str | None,
    forms: Sequence[FileForm],
    where: str,
) -> T:
    """Return what comes of the class that a config means; where it names none, of the one of its model type that fits.

    Args:
        config: of the model.
        match: compares an architecture with what is stored, and returns how far apart their names are, and a result;
            raises a MismatchError if they do not fit.
        dtype: the type to make the model in; float32 without.
        forms: of the file that the model was loaded from; the first that fits is taken.
        where: what is stored, for errors.

    Raises:
        MismatchError: none fits, or several do, and nothing says which is meant.
    """
    names = class_names(config)
    if config.get("architectures"):
        return _matched(names[0], config, match, dtype, forms)[1]
    fitting: list[tuple[Any, str, T]] = []
    remediable: MismatchError | None = None
    for name in names:
        try:
            distance, result = _matched(name, config, match, dtype, forms)
            fitting.append((distance, name, result))
        except MismatchError as error:
            remediable = remediable or (error if type(error) is not MismatchError else None)
    if remediable and not fitting:
        raise remediable
    nearest = [each for each in fitting if each[0] == min(distance for distance, *_ in fitting)]
    if len(nearest) == 1:
        return nearest[0][2]
    said = f"fit {' and '.join(name for _, name, _ in nearest)} alike" if nearest else f"fit none of {', '.join(names)}"
    raise MismatchError(
        f"{where}: the config of {config['model_type']!r} names no architectures, and the tensors {said}; add "
        f'"architectures": ["{nearest[0][1] if nearest else "NAME"}"] to config.json, or the class that is meant.'
    )


def _matched(
    name: str,
    config: Mapping[str, Any],
    match: Callable[[Architecture], tuple[Any, T]],
    dtype: str | None,
    forms: Sequence[FileForm],
) -> tuple[Any, T]:
    """Match a class in each form; where none fits, the error is that of the last one."""
    for form in forms[:-1]:
        with suppress(MismatchError):
            return match(find_architecture({**config, "architectures": [name]}, dtype, form=form))
    return match(find_architecture({**config, "architectures": [name]}, dtype, form=forms[-1]))


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes that a config may mean: the one that it names, or all of its model type.

    Raises:
        MismatchError: the config is none that transformers knows.
    """
    named = named_architecture(config)
    if named:
        return [named]
    kind = type(load_config(config))
    found: set[str] = set()
    with foreign_errors(f"config of {config.get('model_type')!r}", 'add "architectures" to config.json'):
        package = importlib.import_module(kind.__module__.rpartition(".")[0])
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.startswith("modeling_"):
                members = vars(importlib.import_module(f"{package.__name__}.{module.name}")).values()
                found |= {cls.__name__ for cls in members if getattr(cls, "config_class", None) is kind}
    return sorted(name for name in found & {*dir(package)} if not name.lower().endswith("pretrainedmodel"))


def named_architecture(config: Mapping[str, Any]) -> str | None:
    """Return the name of the class that a config names first; None if it names none.

    Raises:
        MismatchError: `architectures` is no list of names.
    """
    named: Any = config.get("architectures")
    if not named:
        return None
    if isinstance(named, str):  # some tools write the name alone
        return named
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise MismatchError(f"config: architectures is {str(named)[:100]}, expected a list of names of classes.")
    return named[0]


def is_known(config: Mapping[str, Any]) -> bool:
    """Return whether transformers itself has the classes that a config means, so that no other code is needed."""
    import transformers

    kind, name = config.get("model_type", ""), named_architecture(config)
    try:
        cls = named_class(name) if name else None
    except MismatchError:
        return False
    own = getattr(getattr(cls, "config_class", None), "model_type", None)
    return kind in transformers.CONFIG_MAPPING or (own is not None and own == kind)


def named_class(name: str) -> Any:
    """Return the transformers model class of that name, which FSDP2 may have renamed.

    Raises:
        MismatchError: there is none.
    """
    import transformers

    for each in (name, name.removeprefix("FSDP")):
        with foreign_errors(f"architecture {name!r}", "install what it needs, or the version that has it"):
            cls = getattr(transformers, each, None) if each.isidentifier() else None
        is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if is_model and getattr(cls, "config_class", None) is not None:  # without one it is a base of all models
            return cls
    raise MismatchError(
        f"architecture {name!r}: transformers {transformers.__version__} has no such model; check the config, or "
        "install the version that has it."
    )


def load_config(config: Mapping[str, Any], cls: Any = None) -> Any:
    """Return a config as an object of its class, which `cls`, a model's, knows where transformers' list does not.

    Raises:
        MismatchError: transformers does not know it, or does not take its values.
    """
    import transformers

    kind = str(config.get("model_type", ""))
    own = getattr(cls, "config_class", None)
    own_kind = kind not in transformers.CONFIG_MAPPING and kind == getattr(own, "model_type", None)
    if not own_kind and kind not in transformers.CONFIG_MAPPING:
        raise MismatchError(
            f"config of {kind!r}: transformers {transformers.__version__} has no such model; check config.json, or "
            "install the version that has it."
        )
    with foreign_errors(f"config of {kind!r}", "check config.json"):
        known: Any = own if own_kind else transformers.CONFIG_MAPPING[kind]
        # A copy: some classes change what they get. transformers writes NaN and Infinity in a form of its own.
        return known.from_dict(known._decode_special_floats(copy.deepcopy(dict(config))))


def _describe(cls: Any, config: Any, dtype: str | None, form: FileForm) -> Architecture:
    import torch
    from transformers.modeling_utils import local_torch_dtype
    from transformers.pytorch_utils import Conv1D

    made_in = getattr(torch, dtype or "float32")
    types = [(part, part.dtype) for part in _parts(config)]
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = made_in
    with local_torch_dtype(made_in, cls.__name__), torch.device("meta"):
        model = cls(config)
    if not dtype:  # building it hands the type on to configs within configs, as loading it in that type would
        for part, kind in types:
            part.dtype = kind
    written = model.config.to_json_string()  # now, as some classes set fields of their config
    state = model.state_dict()
    unsaved = frozenset(model._keys_to_ignore_on_save or ()) & set(state)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    ties = {
        target: source
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if target in state
    }
    recipes = _recipes(model, {n: t for n, t in state.items() if n not in ties and n not in unsaved}, form)
    return Architecture(
        name=cls.__name__,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        ties=ties,
        recipes=recipes,
        padded=_padded(model),
        unsaved=unsaved,
        untrained=frozenset(state.keys() - trained),
        dtypes=_dtypes(model, state, made_in),
        turned=frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
        order=_order([name for name in state if name in parameters], recipes),
        tokens=_tokens(model),
        config=json.loads(written),
        record=record_of(model),
    )


def _parts(config: Any) -> Iterator[Any]:
    """Yield a config, and all configs within it."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _recipes(model: Any, state: Mapping[str, Any], form: FileForm) -> dict[str, Recipe]:
    """Return how each tensor of an export is made, in the form of a file if transformers can save in it."""
    from ckpt_core.export.trace import trace_export

    conversions = form.conversions(model)
    if conversions is not None:
        model._weight_conversions = conversions
        with suppress(MismatchError):
            return trace_export(model, state)
        del model._weight_conversions
    return trace_export(model, state)


def _order(parameters: Iterable[str], recipes: Mapping[str, Recipe]) -> tuple[str, ...]:
    """Return the names of an export in the order of the parameters that they are made of."""
    users: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        for source in recipe.sources:
            users.setdefault(source, []).append(name)
    return tuple(dict.fromkeys(name for parameter in parameters for name in users.get(parameter, ())))


def _dtypes(model: Any, state: Mapping[str, Any], made_in: Any) -> dict[str, str]:
    """Return the type of each tensor after loading: what the model was made with, or what transformers plans.

    The plan's names are searched for in those of tensors as transformers does it, anywhere.
    """
    plan = {pattern.replace("*", ".*"): dtype for pattern, dtype in model._get_dtype_plan(made_in).items()}
    found = {n: next((dtype for p, dtype in plan.items() if re.search(p, n)), t.dtype) for n, t in state.items()}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}


def _padded(model: Any) -> frozenset[str]:
    """Return the names of the embeddings of tokens, and of what predicts tokens."""
    owned = {id(parameter) for table in _tables(model) for parameter in _parameters(table)}
    return frozenset(name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in owned)


def _tables(model: Any) -> list[Any]:
    """Return what embeds tokens and what predicts them, as the model says: modules, or tensors in Perceiver."""
    found: list[Any] = []
    for find in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # a model of something else than text
            found += [table] if (table := find()) is not None else []
    return found


def _parameters(table: Any) -> list[Any]:
    return list(table.parameters()) if hasattr(table, "parameters") else [table]


def _tokens(model: Any) -> int | None:
    """Return the number of token ids that have a row in the larger of the two tables.

    What is no `Embedding`, such as a vision model's convolution, is no table of tokens. Some embeddings have a second
    table for the ids after the first one's.
    """
    import torch

    tables = _tables(model)
    if not tables or not isinstance(tables[0], torch.nn.Embedding):
        return None
    return max(sum(p.shape[0] for p in _parameters(table) if p.dim() == _MATRIX_AXES) for table in tables)
