"""Matching of a checkpoint's names with those of a model: prefixes, wrappers, and what is saved next to a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ckpt_core import documents
from ckpt_core.errors import ArgumentError, MismatchError
from ckpt_core.export.patterns import PatternError, Patterns
from ckpt_core.locate import is_training_state
from ckpt_core.urls import local_path

if TYPE_CHECKING:
    from ckpt_core.urls import AnyPath

WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""What torch and Lightning put into names when they compile, shard or checkpoint a module; no model's own modules have
these names."""

_EXTRA = "_extra_state"
_MAX_TABLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Table:
    """What a user says of a checkpoint's names: which to drop, and how to rename the others, before any matching."""

    drop: tuple[re.Pattern[str], ...] = ()
    rename: tuple[tuple[re.Pattern[str], str], ...] = ()
    patterns: Patterns = field(default_factory=Patterns, compare=False, repr=False)

    def drops(self, name: str) -> bool:
        """Whether a stored name is left out.

        Raises:
            ArgumentError: a pattern takes too long.
        """
        try:
            return any(self.patterns.search(pattern, name) for pattern in self.drop)
        except PatternError as error:
            raise ArgumentError(f"the table of names: {error}; write it in another way.") from None

    def renamed(self, name: str) -> str:
        """Return what a stored name is to be read as: each pattern is replaced wherever it is found, in order.

        Raises:
            ArgumentError: a pattern takes too long.
        """
        try:
            for pattern, replacement in self.rename:
                name = self.patterns.replace(pattern, replacement, name)
        except PatternError as error:
            raise ArgumentError(f"the table of names: {error}; write it in another way.") from None
        return name

    def rules(self) -> list[str]:
        """Say which names it replaces."""
        return [
            f"names: {pattern.pattern!r} replaced by {new!r}, by the table of names" for pattern, new in self.rename
        ]


def read_table(path: AnyPath) -> Table:
    r"""Read a table: JSON such as `{"drop": ["^ema\\."], "rename": [["^net\\.", "model."]]}`, of regular expressions.

    Raises:
        ArgumentError: it is not readable, or something in it is no regular expression.
    """
    path = local_path(path, "names")
    try:
        return _parse(**documents.read_object(path, _MAX_TABLE_BYTES))
    except (OSError, ValueError, TypeError, OverflowError, RecursionError, re.error) as error:
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
class Wanted:
    """The tensors of a model, each by the names under which it may be stored; tied ones have several.

    Some tensors may be stored in either of several forms, such as the experts of a layer, fused or apart.
    """

    groups: Sequence[Sequence[Mapping[str, Sequence[str]]]]
    """The forms of each group of tensors: by the name of a tensor, its alternatives."""

    @cached_property
    def names(self) -> frozenset[str]:
        """Return every name under which one of the tensors may be stored."""
        return frozenset(n for group in self.groups for form in group for may in form.values() for n in may)

    def form(self, choice: Sequence[int]) -> dict[str, Sequence[str]]:
        """Return the tensors of the chosen form of each group."""
        return {n: may for group, form in zip(self.groups, choice, strict=True) for n, may in group[form].items()}

    def chosen(self, has: Callable[[str], bool]) -> list[int]:
        """Return the form of each group of which fewest tensors are missing, the same one of all if that is whole.

        Args:
            has: whether a name is stored.
        """
        most = max(map(len, self.groups), default=1)
        choices = [[min(form, len(group) - 1) for group in self.groups] for form in range(most)]
        if most > 1 and all(_missing(self.form(choice), has) for choice in choices):
            mixed = [min(range(len(g)), key=lambda n, g=g: len(_missing(g[n], has))) for g in self.groups]
            size = sum(len(group[form]) for group, form in zip(self.groups, mixed, strict=True))
            choices += [mixed] if len(self.form(mixed)) == size else []  # one name in two forms would mean two tensors
        return min(choices, key=lambda choice: len(_missing(self.form(choice), has)))


def _missing(form: Mapping[str, Sequence[str]], has: Callable[[str], bool]) -> list[str]:
    return [name for name, may in form.items() if not any(map(has, may))]


@dataclass(frozen=True)
class Resolved:
    """How a checkpoint's names and a model's meet."""

    stored: Mapping[str, str]
    """The stored name of each of the model's."""

    prefix: str
    """What the checkpoint's names have before the model's."""

    choice: Sequence[int]
    """The form in which each group of tensors is stored."""

    rules: tuple[str, ...]
    """What was done to the names, for people."""


def resolve(
    stored: Iterable[str],
    wanted: Wanted,
    table: Table,
    *,
    unsaved: Collection[str] = (),
    values: Collection[str] = (),
    untrained: Collection[str] = (),
    model: str,
    where: str,
) -> Resolved:
    """Find the stored name of each name that a model has.

    Names are taken as they are if they meet; else without what torch's wrappers put into them, else without `module`
    too: what is taken away must make every name meet, and no two the same.

    Args:
        stored: the checkpoint's names.
        wanted: the model's tensors.
        table: what the user says of the names.
        unsaved: the model's names that may be stored, and are not exported.
        values: those of `stored` that are no tensors.
        untrained: those of `stored` that are no weights, as they are not floating-point.
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
    found = {name: best.find(name) for may in best.form.values() for name in may if best.has(name)}
    computed = [best.find(name) for name in unsaved if best.has(name)]
    used = {*found.values(), *computed}
    left = [name for name in kept if name not in used]
    _check_beside(left, best, {*values}, {*untrained}, model, where)
    dropped = [f"dropped: {name}, by the table of names" for name in names if table.drops(name)]
    dropped += [f"dropped: {name}, which the model computes" for name in sorted(computed)]
    dropped += [f"dropped: {len(left)} entries that are not the model's, such as {left[0]}"] if left else []
    return Resolved(found, best.prefix, best.choice, (*_rules(found, best.prefix, table), *dropped))


@dataclass(frozen=True)
class _Attempt:
    """One way to read a checkpoint's names."""

    change: Callable[[str], str]
    """What is done to a name, the checkpoint's or the model's, before they are compared."""

    prefix: str
    names: Mapping[str, str]
    """The stored name of each name as it is read."""

    wanted: Wanted
    fitting: tuple[str, ...] = ()
    """The prefixes with which no tensor is missing: each is that of a model."""

    def has(self, name: str) -> bool:
        """Whether a name of the model's is stored."""
        return self.prefix + self.change(name) in self.names

    def find(self, name: str) -> str:
        """Return the stored name of one of the model's."""
        return self.names[self.prefix + self.change(name)]

    @cached_property
    def choice(self) -> list[int]:
        """Return the form in which most of each group of tensors is stored."""
        return self.wanted.chosen(self.has)

    @cached_property
    def form(self) -> dict[str, Sequence[str]]:
        """Return the tensors of these forms."""
        return self.wanted.form(self.choice)

    @cached_property
    def missing(self) -> list[str]:
        """Return the tensors that are not stored."""
        return _missing(self.form, self.has)


def _attempt(stored: Sequence[str], wanted: Wanted, table: Table, change: Callable[[str], str]) -> _Attempt | None:
    """Return the prefix with which most names meet when `change` is made to all; None if two become the same."""
    names = {change(table.renamed(name)): name for name in stored}
    changed = {*map(change, wanted.names)}  # a model may have modules of these names itself
    if len(names) != len(stored) or len(changed) != len(wanted.names):
        return None
    attempts = [_Attempt(change, prefix, names, wanted) for prefix in _prefixes(names, changed)]
    best = min(attempts, key=lambda a: (len(a.missing), len(a.prefix), a.prefix))
    return replace(best, fitting=tuple(sorted(a.prefix for a in attempts if not a.missing)))


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


def _lacks(stored: Sequence[str], wanted: Wanted, best: _Attempt | None, where: str) -> MismatchError:
    missing, count = (best.missing, len(best.form)) if best else (sorted(wanted.names), len(wanted.names))
    return MismatchError(
        f"{where}: lacks {len(missing)} of the model's {count} tensors, such as {', '.join(missing[:3])}; it "
        f"holds {', '.join(sorted(stored)[:3])}, ... Is it a checkpoint of this architecture?"
    )


def _check_beside(
    left: Sequence[str], best: _Attempt, values: set[str], untrained: set[str], model: str, where: str
) -> None:
    """Check that what is left over is what frameworks save next to a model, such as its optimizer.

    Raises:
        MismatchError: something else is left over.
    """
    read_as = {name: new for new, name in best.names.items()}
    above = best.prefix[: best.prefix[:-1].rfind(".") + 1]  # `app.model.` stands next to `app.optimizer.`
    own = {best.change(name).partition(".")[0] for name in best.wanted.names}

    def is_other(name: str) -> bool:
        if name in values or _EXTRA in name.split("."):
            return True
        inside = read_as[name].startswith(best.prefix)
        read = read_as[name].removeprefix(best.prefix if inside else above)
        # Random number generators and counters have any name, but are integers, which are not trained.
        return not (inside and read.partition(".")[0] in own) and (is_training_state(read) or name in untrained)

    leftovers = [name for name in left if not is_other(name)]
    if leftovers and len(best.fitting) > 1:
        shown = ", ".join(repr(prefix.rstrip(".")) for prefix in best.fitting)
        drop = json.dumps({"drop": [f"^{re.escape(max(best.fitting, key=len))}"]})
        raise MismatchError(
            f"{where}: holds more than one {model}: {shown}; choose one by a table of names that drops the others, "
            f"such as {drop}."
        )
    if leftovers:
        raise MismatchError(
            f"{where}: holds {len(leftovers)} tensors that {model} does not have, such as "
            f"{', '.join(leftovers[:3])}; give the config that it was trained with, or drop them by a table of names."
        )


def _rules(found: Mapping[str, str], prefix: str, table: Table) -> list[str]:
    rules = [f"names: {prefix!r} removed from the front"] if prefix else []
    wrappers = {part for name in found.values() for part in name.split(".") if part in {*WRAPPERS, "module"}}
    own = {part for name in found for part in name.split(".")}
    rules += [f"names: {part!r} removed from within" for part in sorted(wrappers - own - set(prefix.split(".")))]
    return rules + table.rules()
