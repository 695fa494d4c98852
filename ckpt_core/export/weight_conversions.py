"""Weight conversions of transformers: those a model was loaded with, which `save_pretrained` undoes.

A file may have a model's weights in today's names or in earlier ones, whole or in parts. transformers remembers which
conversions a file needed, and saves in the form of that file. A model that was loaded from no file is saved in the
default form.
"""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

RECORD_NAME = "weight_conversions.json"
"""In a checkpoint's assets: the conversions that its model was loaded with, where they are not the default ones."""


@dataclass(frozen=True)
class FileForm:
    """What is known of the file that a model was loaded from."""

    names: Collection[str] = ()
    """Of its tensors."""

    record: bytes | None = None
    """The conversions that it needed, as `record_of` returns them."""

    def conversions(self, model: Any) -> list[Any] | None:
        """Return the conversions to undo for a model; None means the default ones."""
        if self.record is not None:
            return _recorded(model, self.record)
        return _needed(model, self.names) if self.names else None


DEFAULT_FORM = FileForm()


def record_of(model: Any) -> bytes | None:
    """Return the record of the conversions that a live model was loaded with; None if they are the default ones."""
    conversions: Sequence[Any] | None = getattr(model, "_weight_conversions", None)
    if conversions is None or _texts(conversions) == _texts(_default(model)):
        return None
    return (json.dumps(_texts(conversions), indent=1) + "\n").encode()


def _default(model: Any) -> list[Any]:
    """Return what transformers undoes for a model that it has not loaded."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    return [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]


def _needed(model: Any, names: Collection[str]) -> list[Any] | None:
    """Return the conversions that transformers uses to load tensors of these names; None if most are of no model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state = model.state_dict()
    loaded = 0
    for name in sorted(names, key=dot_natural_key):  # one conversion may depend on what another has seen
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        loaded += renamed in state or name in state
    # The file next to a config may be an adapter's, or another model's.
    return [each for each in conversions if each.was_used()] if 2 * loaded > len(names) else None


def _recorded(model: Any, record: bytes) -> list[Any] | None:
    """Return the conversions of a record; None if this version of transformers has one of them no more."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    try:
        texts = json.loads(record)
    except (ValueError, RecursionError):
        return None
    conversions = get_model_conversion_mapping(model)
    known = _texts(conversions)
    if not isinstance(texts, list) or not all(text in known for text in cast("list[Any]", texts)):
        return None
    return [each for each, text in zip(conversions, known, strict=True) if text in texts]


def _texts(conversions: Sequence[Any]) -> list[str]:
    return [f"{each.scope_prefix or ''}: {each!r}" for each in conversions]
