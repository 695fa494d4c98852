"""Which tensor of a Hugging Face directory is which of an architecture's export, whoever wrote it, and when."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckpt_core.errors import MismatchError
from ckpt_core.export.architecture import Architecture, named_class
from ckpt_core.export.names import Resolved, Table, resolve
from ckpt_core.export.recipe import Recipe

_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""What models once stored and now compute; transformers passes over it in any file too."""


@dataclass(frozen=True)
class HfNames:
    """How the names of an export and those of a directory meet."""

    first: Mapping[str, str]
    """The stored name of each of the export's."""

    twins: list[tuple[str, str]]
    """Stored names of tensors that the config ties to others, each with the stored name of that one."""

    rules: tuple[str, ...]
    """What was passed over or done to the names, for people."""


def match_names(stored: Collection[str], architecture: Architecture, table: Table, where: str) -> HfNames:
    """Find the stored name of each name that an export has.

    Args:
        stored: the directory's names.
        architecture: whose export it is to be.
        table: what the user says of the names.
        where: the directory, for errors.

    Raises:
        MismatchError: one is missing, or a stored one is left over.
    """
    wanted = {name: [name, *_tied(recipe, architecture)] for name, recipe in architecture.recipes.items()}
    known = {name for alternatives in wanted.values() for name in alternatives}
    cls = named_class(architecture.name)
    read_as = _read_as(stored, known, cls.base_model_prefix)
    passed = [re.compile(pattern) for pattern in (*_COMPUTED, *(cls._keys_to_ignore_on_load_unexpected or ()))]
    passed += [re.compile(f"^{re.escape(name)}$") for name in architecture.unsaved]
    unread = [new for new in read_as if new not in known and any(pattern.search(new) for pattern in passed)]
    kept = [name for name in read_as if name not in unread]
    names = resolve(kept, wanted, table, model=architecture.name, where=where)
    _check_leftovers([name for name in kept if not table.drops(name)], names, architecture, where)
    found = {name: [names.stored[n] for n in may if n in names.stored] for name, may in wanted.items()}
    rules = [*names.rules, *(f"dropped: {read_as[name]}, which {architecture.name} does not read" for name in unread)]
    return HfNames(
        {name: read_as[found[name][0]] for name in wanted},
        [(read_as[twin], read_as[first]) for first, *twins in found.values() for twin in twins],
        tuple(rules),
    )


def _tied(recipe: Recipe, architecture: Architecture) -> list[str]:
    """Return the other names under which a tensor of an export may be stored, if it is a whole one of the model."""
    return [t for t, s in architecture.ties.items() if recipe.straight and recipe.sources == (s,)]


def _read_as(stored: Collection[str], known: set[str], base: str) -> dict[str, str]:
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
