"""A LoRA adapter among a checkpoint's tensors: which of them are its own, told by the names that PEFT gives them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ckpt_core.errors import MismatchError
from ckpt_core.export.adapter_config import AdapterConfig
from ckpt_core.export.names import WRAPPERS, Table
from ckpt_core.format.index import Index
from ckpt_core.locate import OTHER_COMPONENTS

PREFIX = "base_model.model."
"""What PEFT puts in front of the names of a model's modules."""

Kind = Literal["factor", "trained", "copy", "base", "other"]

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<leaf>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?P<adapter>[^.]+?))??(?P<end>\.weight|\.bias)?"
)
_LEAVES = {
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
}
_OPTIONAL = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}
"""What an adapter has more when its config says so, and the field that says it."""

_TRAINED = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>.+)")
_COPY = re.compile(r"(?P<module>.+?)\.original_module\.(?P<leaf>.+)")
_BASE = re.compile(r"(?P<module>.+?)\.base_layer\.(?P<leaf>.+)")


_WORDS = re.compile(r"(.+\.)?(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte|shared)\.weight")
"""The embeddings of tokens. An adapter is exported without building its model, which would know them by itself."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a checkpoint of a model with an adapter."""

    stored: str
    """Its name in the checkpoint."""

    kind: Kind
    """A factor of the adapter, a module's trained copy or its frozen one, the frozen weight below factors, or none."""

    module: str
    """The module of the model to which it belongs, without PEFT's prefix; all of the name if it is none of these."""

    leaf: str
    """What stands after the module."""

    adapter: str | None = None

    @property
    def plain(self) -> str:
        """Its stored name without what PEFT put into it, as a model without an adapter would have been saved."""
        if self.kind == "trained":
            return self.stored.replace(f".modules_to_save.{self.adapter}.", ".")
        return self.stored.replace(".base_layer.", ".") if self.kind == "base" else self.stored

    @property
    def exported(self) -> str:
        """Its name in the file that PEFT writes."""
        between = ".base_layer" if self.kind == "base" else ""
        return PREFIX + self.module + (f"{between}.{self.leaf}" if self.leaf else "")


@dataclass(frozen=True)
class Adapter:
    """The adapter of a checkpoint, and all else that is there."""

    config: AdapterConfig
    parts: tuple[Part, ...]
    ignored: tuple[str, ...]
    """Stored names that the user's table drops, or that lie beside the model."""

    table: Table
    """What the user says of the checkpoint's names."""

    def of(self, *kinds: Kind) -> list[Part]:
        """Return the parts of some kinds."""
        return [part for part in self.parts if part.kind in kinds]

    @cached_property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """Return the stored names of the factors `lora_A` and `lora_B`, or those of an embedding, by module."""
        found: dict[str, dict[str, str]] = {}
        for part in self.of("factor"):
            side = part.leaf.removesuffix(".weight")
            if side.endswith(("_A", "_B")):
                found.setdefault(part.module, {})[side[-1]] = part.stored
        return {module: (sides.get("A", ""), sides.get("B", "")) for module, sides in found.items()}

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """The modules whose factors are those of an embedding."""
        return frozenset(part.module for part in self.of("factor") if "embedding" in part.leaf)


def has_adapter(index: Index, table: Table) -> bool:
    """Whether a checkpoint holds an adapter that the table of names does not drop."""
    return any("lora_" in n and _part(n, index, table).kind == "factor" for n in _candidates(index, table))


def find_adapter(index: Index, config: AdapterConfig, table: Table, where: str) -> Adapter:
    """Sort a checkpoint's tensors, and compare them with the adapter's config.

    Raises:
        MismatchError: there are several adapters, tensors of a kind that is not known, or the config is another's.
    """
    candidates = _candidates(index, table)
    parts = tuple(_part(name, index, table) for name in candidates)
    known = set(candidates)
    adapter = Adapter(
        config, parts, tuple(name for name in (*index.tensors, *index.values) if name not in known), table
    )
    names = sorted({part.adapter or "" for part in adapter.of("factor", "trained")})
    if len(names) > 1:
        raise MismatchError(
            f"{where}: holds several adapters ({', '.join(name or 'one without a name' for name in names)}); drop all "
            "but one by a table of names."
        )
    for part in adapter.of("other"):
        if any(word.startswith("lora_") for word in part.module.split(".")):
            raise MismatchError(
                f"{where}: {part.stored} is no tensor of LoRA that is known; drop it by a table of names."
            )
    _check_fits(adapter, index, where)
    return adapter


def embedding_rows(adapter: Adapter, index: Index) -> int | None:
    """Return the rows of the embeddings of tokens in the checkpoint; None if there are none of a usual name."""
    names = [(f"{part.module}.{part.leaf}".rstrip("."), part) for part in adapter.parts if part.kind != "factor"]
    return max((index.tensors[part.stored].shape[0] for name, part in names if _WORDS.fullmatch(name)), default=None)


def _candidates(index: Index, table: Table) -> list[str]:
    return [n for n in index.tensors if not table.drops(n) and not table.renamed(n).startswith(OTHER_COMPONENTS)]


def _part(stored: str, index: Index, table: Table) -> Part:
    renamed = table.renamed(stored)
    key = index.paths.get(stored, (stored,))[-1]  # the state dict may have been saved below another name
    seen = key if renamed == stored and isinstance(key, str) else renamed
    name = ".".join(word for word in seen.split(".") if word not in WRAPPERS).rpartition(PREFIX)[2]
    if match := _FACTOR.fullmatch(name):
        end = "" if "magnitude" in match["leaf"] else match["end"] or ""
        if match["leaf"] + end in _LEAVES:
            return Part(stored, "factor", match["module"], match["leaf"] + end, match["adapter"])
    kinds: Iterable[tuple[Kind, re.Pattern[str]]] = (("trained", _TRAINED), ("copy", _COPY), ("base", _BASE))
    for kind, pattern in kinds:
        if match := pattern.fullmatch(name):
            return Part(stored, kind, match["module"], match["leaf"], match.groupdict().get("adapter"))
    return Part(stored, "other", name, "")


def _check_fits(adapter: Adapter, index: Index, where: str) -> None:
    """Compare the modules and the shapes of factors with the config.

    Raises:
        MismatchError: they differ.
    """
    config = adapter.config
    leaves = {part.leaf for part in adapter.of("factor")}
    for leaf, field in _OPTIONAL.items():
        if (leaf in leaves) != bool(config.fields.get(field)):
            raise MismatchError(
                f"{where}: holds {'' if leaf in leaves else 'no '}{leaf}, but {config.where} says {field} "
                f"{config.fields.get(field)!r}; give the config that it was trained with."
            )
    for module, (a, b) in adapter.pairs.items():
        if not (a and b):
            raise MismatchError(f"{where}: {a or b} is there without its other factor; the save was not complete.")
        if not config.targets(module):
            raise MismatchError(
                f"{where}: {module} has an adapter, but {config.where} does not name it in target_modules; give the "
                "config that it was trained with."
            )
        shapes, rank = (index.tensors[a].shape, index.tensors[b].shape), config.rank(module)
        if (shapes[0][:1], shapes[1][1:2]) != ((rank,), (rank,)):
            raise MismatchError(
                f"{where}: the factors of {module} have the shapes {shapes[0]} and {shapes[1]}, {config.where} says "
                f"rank {rank}, so {rank} rows and {rank} columns; give the config that it was trained with."
            )
    bare = next((p for p in adapter.of("other") if config.expects(p.module.removesuffix(".weight"))), None)
    if bare is not None:
        raise MismatchError(
            f"{where}: {bare.stored} has no adapter, but {config.where} names its module in target_modules; give the "
            "config that it was trained with."
        )
