"""Which stored name is which of the model's: prefixes and wrappers, resolved against what the architecture expects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_core.errors import ArgumentError, MismatchError
from ckpt_core.locate import OTHER_COMPONENTS

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch puts into names when it compiles, shards or checkpoints a module; no model has modules of these names."""

_EXTRA = "_extra_state"


@dataclass(frozen=True)
class Table:
    """What a user says of a checkpoint's names: which to drop, and how to rename the others, before any matching."""

    drop: tuple[re.Pattern[str], ...] = ()
    rename: tuple[tuple[re.Pattern[str], str], ...] = ()

    def drops(self, name: str) -> bool:
        """Whether a stored name is left out."""
        return any(pattern.search(name) for pattern in self.drop)

    def renamed(self, name: str) -> str:
        """Return what a stored name is to be read as: each pattern is replaced wherever it is found, in order."""
        for pattern, replacement in self.rename:
            name = pattern.sub(replacement, name)
        return name

    def rules(self) -> list[str]:
        """Say which names it replaces."""
        return [
            f"names: {pattern.pattern!r} replaced by {new!r}, by the table of names" for pattern, new in self.rename
        ]


def read_table(path: Path) -> Table:
    r"""Read a table: JSON such as `{"drop": ["^ema\\."], "rename": [["^net\\.", "model."]]}`, of regular expressions.

    Raises:
        ArgumentError: it is not readable, or something in it is no regular expression.
    """
    try:
        return _parse(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, re.error) as error:
        raise ArgumentError(
            f"{path}: not a table of names ({error}); expected "
            '{"drop": [PATTERN, ...], "rename": [[PATTERN, REPLACEMENT], ...]}.'
        ) from None


def _parse(drop: Sequence[str] = (), rename: Sequence[tuple[str, str]] = ()) -> Table:
    return Table(tuple(map(re.compile, drop)), tuple(_pair(*pair) for pair in rename))


def _pair(pattern: str, replacement: str) -> tuple[re.Pattern[str], str]:
    compiled = re.compile(pattern)
    compiled.sub(replacement, "")
    return compiled, replacement


@dataclass(frozen=True)
class Resolved:
    """How a checkpoint's names and a model's meet."""

    stored: Mapping[str, str]
    """The stored name of each of the model's."""

    rules: tuple[str, ...]
    """What was done to the names, for people."""


def resolve(
    stored: Iterable[str],
    wanted: Mapping[str, Sequence[str]],
    table: Table,
    *,
    unsaved: Collection[str] = (),
    model: str,
    where: str,
) -> Resolved:
    """Find the stored name of each name that a model has.

    Names are taken as they are if they meet; else without what torch's wrappers put into them, else without `module`
    too: what is taken away must make every name meet, and no two the same.

    Args:
        stored: the checkpoint's names.
        wanted: the names under which each of the model's tensors may be stored; tied ones have several.
        table: what the user says of the names.
        unsaved: the model's names that may be stored, and are not exported.
        model: the name of its class, for errors.
        where: the checkpoint, for errors.

    Raises:
        MismatchError: a name of the model's is missing, or one of the checkpoint's is left over.
    """
    names = list(stored)
    kept = [name for name in names if not table.drops(name)]
    tries = [_attempt(kept, wanted, table, change) for change in (_as_it_is, _unwrapped, _unwrapped_modules)]
    best = min((t for t in tries if t is not None), key=lambda t: len(t.missing), default=None)
    if best is None or best.missing:
        raise _lacks(kept, wanted, best, where)
    found = {
        name: best.names[best.prefix + name]
        for alternatives in wanted.values()
        for name in alternatives
        if best.prefix + name in best.names
    }
    computed = [best.names[best.prefix + name] for name in unsaved if best.prefix + name in best.names]
    beside = _beside(kept, best, {*found.values(), *computed}, model, where)
    dropped = [f"dropped: {name}, by the table of names" for name in names if table.drops(name)]
    dropped += [f"dropped: {name}, which the model computes" for name in sorted(computed)]
    dropped += [f"dropped: {len(beside)} entries that are not the model's, such as {beside[0]}"] if beside else []
    return Resolved(found, (*_rules(found, best.prefix, table), *dropped))


@dataclass(frozen=True)
class _Attempt:
    """One way to read a checkpoint's names."""

    prefix: str
    missing: list[str]
    names: Mapping[str, str]
    """The stored name of each name as it is read."""


def _attempt(
    stored: Sequence[str], wanted: Mapping[str, Sequence[str]], table: Table, change: Callable[[str], str]
) -> _Attempt | None:
    """Return the prefix with which most names meet when `change` is made to all; None if two become the same."""
    names = {change(table.renamed(name)): name for name in stored}
    if len(names) != len(stored):
        return None
    attempts = [
        _Attempt(prefix, [n for n, may in wanted.items() if not any(prefix + m in names for m in may)], names)
        for prefix in _prefixes(names, wanted)
    ]
    return min(attempts, key=lambda a: (len(a.missing), len(a.prefix), a.prefix))


def _prefixes(names: Iterable[str], wanted: Iterable[str]) -> set[str]:
    """Return what may stand before the model's names: what stands before the longest of them."""
    found = {""}
    for probe in sorted(wanted, key=len, reverse=True)[:3]:
        found |= {name.removesuffix(probe) for name in names if name.endswith("." + probe)}
    return found


def _as_it_is(name: str) -> str:
    return name


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _unwrapped_modules(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS and part != "module")


def _lacks(
    stored: Sequence[str], wanted: Mapping[str, Sequence[str]], best: _Attempt | None, where: str
) -> MismatchError:
    missing = best.missing if best else list(wanted)
    return MismatchError(
        f"{where}: lacks {len(missing)} of the model's {len(wanted)} tensors, such as {', '.join(missing[:3])}; it "
        f"holds {', '.join(sorted(stored)[:3])}, ... Is it a checkpoint of this architecture?"
    )


def _beside(stored: Sequence[str], best: _Attempt, used: set[str], model: str, where: str) -> list[str]:
    """Return what frameworks keep beside a model, such as its optimizer.

    Raises:
        MismatchError: something else is left over.
    """
    read_as = {name: new for new, name in best.names.items()}
    above = best.prefix[: best.prefix[:-1].rfind(".") + 1]  # `app.model.` stands beside `app.optimizer.`
    left = [name for name in stored if name not in used]
    leftovers = [name for name in left if not _is_other(read_as[name].removeprefix(above))]
    if leftovers:
        raise MismatchError(
            f"{where}: holds {len(leftovers)} tensors that {model} does not have, such as "
            f"{', '.join(leftovers[:3])}; give the config that it was trained with, or drop them by a table of names."
        )
    return left


def _is_other(name: str) -> bool:
    """Whether a name is that of something that stands beside a model's tensors."""
    return name.startswith(OTHER_COMPONENTS) or _EXTRA in name.split(".")


def _rules(found: Mapping[str, str], prefix: str, table: Table) -> list[str]:
    rules = [f"names: {prefix!r} removed from the front"] if prefix else []
    wrappers = {part for name in found.values() for part in name.split(".") if part in {*WRAPPERS, "module"}}
    own = {part for name in found for part in name.split(".")}
    rules += [f"names: {part!r} removed from within" for part in sorted(wrappers - own - set(prefix.split(".")))]
    return rules + table.rules()
