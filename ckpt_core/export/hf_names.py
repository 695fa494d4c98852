"""Which tensor of a Hugging Face directory is which of an architecture's export, whoever wrote it, and when."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckpt_core.errors import MismatchError
from ckpt_core.export.architecture import Architecture, named_class
from ckpt_core.export.names import Resolved, Table, Wanted, resolve
from ckpt_core.export.recipe import Recipe

_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""What models once stored and now compute; transformers passes over it in any file too."""


@dataclass(frozen=True)
class HfNames:
    """How the names of an export and those of a directory meet."""

    exported: Mapping[str, str]
    """The stored name of each of the export's, but for tensors that are stored as the model has them."""

    own: Mapping[str, str]
    """The stored name of each of the model's that is stored as the model has it, and not as an export has."""

    twins: list[tuple[str, str]]
    """Stored names of tensors that the config ties to others, each with the stored name of that one."""

    exact: bool
    """Whether every tensor is stored under the export's name or the model's, and no other is stored."""

    rules: tuple[str, ...]
    """What was passed over or done to the names, for people."""


def match_names(stored: Collection[str], architecture: Architecture, table: Table, where: str) -> HfNames:
    """Find the stored name of each name that an export has, or the model: transformers loads both, and mixtures.

    Args:
        stored: the directory's names.
        architecture: whose export it is to be.
        table: what the user says of the names.
        where: the directory, for errors.

    Raises:
        MismatchError: one is missing, or a stored one is left over.
    """
    wanted = Wanted(_groups(architecture))
    cls = named_class(architecture.name)
    read_as = _read_as(stored, wanted.names, cls.base_model_prefix)
    passed = [re.compile(pattern) for pattern in (*_COMPUTED, *(cls._keys_to_ignore_on_load_unexpected or ()))]
    passed += [re.compile(f"^{re.escape(name)}$") for name in architecture.unsaved]
    unread = [new for new in read_as if new not in wanted.names and any(pattern.search(new) for pattern in passed)]
    kept = [name for name in read_as if name not in unread]
    names = resolve(kept, wanted, table, model=architecture.name, where=where)
    _check_leftovers([name for name in kept if not table.drops(name)], names, architecture, where)
    forms: tuple[dict[str, str], dict[str, str]] = {}, {}
    twins: list[tuple[str, str]] = []
    for group, number in zip(wanted.groups, names.choice, strict=True):
        for name, may in group[number].items():
            first, *others = (read_as[names.stored[each]] for each in may if each in names.stored)
            forms[number][name] = first
            twins += ((twin, first) for twin in others)
    rules = [*names.rules, *(f"dropped: {read_as[name]}, which {architecture.name} does not read" for name in unread)]
    if forms[1]:
        rules.append(f"names: {len(forms[1])} tensors stored as the model has them, such as {next(iter(forms[1]))}")
    exact = not (names.prefix or unread) and all(name == read for read, name in read_as.items())
    return HfNames(*forms, twins, exact, tuple(rules))


def _groups(architecture: Architecture) -> list[list[dict[str, list[str]]]]:
    """Return tensors that are made of each other together, in their two forms: the export's, and the model's."""
    together: dict[str, set[str]] = {}
    for recipe in architecture.recipes.values():
        joined = {*recipe.sources}.union(*(together.get(source, ()) for source in recipe.sources))
        together |= dict.fromkeys(joined, joined)
    exported: dict[int, dict[str, list[str]]] = {}
    plain: list[list[dict[str, list[str]]]] = []
    for name, recipe in architecture.recipes.items():
        if (recipe.straight and recipe.sources == (name,)) or not recipe.sources:
            plain.append([{name: [name, *_tied(recipe, architecture)]}])
        else:
            exported.setdefault(id(together[recipe.sources[0]]), {})[name] = [name, *_tied(recipe, architecture)]
    names = {number: own for own in together.values() if (number := id(own)) in exported}
    others = ([form, {n: _alternatives(n, architecture) for n in sorted(names[k])}] for k, form in exported.items())
    return [*plain, *others]


def _alternatives(name: str, architecture: Architecture) -> list[str]:
    return [name, *(target for target, source in architecture.ties.items() if source == name)]


def _tied(recipe: Recipe, architecture: Architecture) -> list[str]:
    """Return the other names under which a tensor of an export may be stored, if it is a whole one of the model."""
    return _alternatives(recipe.sources[0], architecture)[1:] if recipe.straight else []


def _read_as(stored: Collection[str], known: Collection[str], base: str) -> dict[str, str]:
    """Return the stored name of each name as it is read.

    Names that are not known are tried as transformers tries them: with parts of them as they are called today, and
    with what stands in front of the names of the base model.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    renamings = get_checkpoint_conversion_mapping("legacy") or []

    def tried(name: str) -> Iterator[str]:
        today = name
        for renaming in renamings:
            today = renaming.rename_source_key(today)[0]
        for front in ("", f"{base}."):
            yield from (front + name, front + today)

    read_as = {next((new for new in tried(name) if new in known), name): name for name in stored}
    return read_as if len(read_as) == len(stored) else {name: name for name in stored}


def _check_leftovers(names: Sequence[str], found: Resolved, architecture: Architecture, where: str) -> None:
    """Check that nothing is passed over as a trainer's: there is no trainer's state in a Hugging Face directory."""
    used = set(found.stored.values())
    left = [name for name in names if name not in used]
    if left:
        raise MismatchError(
            f"{where}: holds {len(left)} tensors that {architecture.name} does not have, such as "
            f"{', '.join(left[:3])}; drop them by a table of names if they are not to be imported."
        )
