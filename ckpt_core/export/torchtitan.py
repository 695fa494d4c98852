"""Checkpoints in torchtitan's native names: the tensors of an architecture as torchtitan's own model has them.

Names, and the order of the rows of queries and keys, are those of the `state_dict_adapter.py` of each of its models.
Its Llama rotates pairs of neighbouring rows of a head (row 0 with 1, 2 with 3), as Meta's own weights do, where
transformers rotates a row of the first half of a head with one of the second half.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_core.errors import MismatchError
from ckpt_core.export.architecture import Architecture
from ckpt_core.export.names import WRAPPERS
from ckpt_core.export.recipe import Piece, Recipe, copy_of
from ckpt_core.format.index import Shape

_LAYER = re.compile(r"(?<=\.)layers\.([0-9]+)(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts\.)[0-9]+(?=\.)")
_NATIVE = re.compile(r"(?:^|\.)layers\.[0-9]+\.(?:attention_norm|ffn_norm)\.weight$")
_EMBEDDING = re.compile(r"(?:^|\.)tok_embeddings\.weight$")

_COMMON: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("tok_embeddings.weight",),
    "model.layers.{}.input_layernorm.weight": ("layers.{}.attention_norm.weight",),
    "model.layers.{}.post_attention_layernorm.weight": ("layers.{}.ffn_norm.weight",),
    "model.layers.{}.self_attn.q_proj.weight": (
        "layers.{}.attention.wq.weight",
        "layers.{}.attention.qkv_linear.wq.weight",
    ),
    "model.layers.{}.self_attn.k_proj.weight": (
        "layers.{}.attention.wk.weight",
        "layers.{}.attention.qkv_linear.wk.weight",
    ),
    "model.layers.{}.self_attn.v_proj.weight": (
        "layers.{}.attention.wv.weight",
        "layers.{}.attention.qkv_linear.wv.weight",
    ),
    "model.layers.{}.self_attn.o_proj.weight": ("layers.{}.attention.wo.weight",),
    "model.layers.{}.mlp.gate_proj.weight": ("layers.{}.feed_forward.w1.weight",),
    "model.layers.{}.mlp.up_proj.weight": ("layers.{}.feed_forward.w3.weight",),
    "model.layers.{}.mlp.down_proj.weight": ("layers.{}.feed_forward.w2.weight",),
    "model.norm.weight": ("norm.weight",),
    "lm_head.weight": ("output.weight", "lm_head.weight"),
}
"""By a tensor's name in an export, with `{}` for the layer and the expert, its names in torchtitan of any version."""

_NORMS: dict[str, tuple[str, ...]] = {
    "model.layers.{}.self_attn.q_norm.weight": ("layers.{}.attention.q_norm.weight",),
    "model.layers.{}.self_attn.k_norm.weight": ("layers.{}.attention.k_norm.weight",),
}

_EXPERTS: dict[str, tuple[str, ...]] = {
    "model.layers.{}.mlp.gate.weight": ("layers.{}.moe.router.gate.weight",),
    **{
        f"model.layers.{{}}.mlp.experts.{{}}.{name}_proj.weight": (
            f"layers.{{}}.moe.experts.{weight}",
            f"layers.{{}}.moe.experts.{weight}_{axes}",
            f"layers.{{}}.moe.routed_experts.inner_experts.{weight}_{axes}",
        )
        for name, weight, axes in (("gate", "w1", "EFD"), ("up", "w3", "EFD"), ("down", "w2", "EDF"))
    },
}

_LATENT: dict[str, tuple[str, ...]] = {
    "model.layers.{}.self_attn.q_a_proj.weight": ("layers.{}.attention.wq_a.weight",),
    "model.layers.{}.self_attn.q_a_layernorm.weight": ("layers.{}.attention.q_norm.weight",),
    "model.layers.{}.self_attn.q_b_proj.weight": ("layers.{}.attention.wq_b.weight",),
    "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight": ("layers.{}.attention.wkv_a.weight",),
    "model.layers.{}.self_attn.kv_a_layernorm.weight": ("layers.{}.attention.kv_norm.weight",),
    "model.layers.{}.self_attn.kv_b_proj.weight": ("layers.{}.attention.wkv_b.weight",),
    "model.layers.{}.mlp.gate.e_score_correction_bias": ("layers.{}.moe.expert_bias", "layers.{}.moe.expert_bias_E"),
    "model.layers.{}.mlp.shared_experts.gate_proj.weight": ("layers.{}.moe.shared_experts.w1.weight",),
    "model.layers.{}.mlp.shared_experts.up_proj.weight": ("layers.{}.moe.shared_experts.w3.weight",),
    "model.layers.{}.mlp.shared_experts.down_proj.weight": ("layers.{}.moe.shared_experts.w2.weight",),
}


@dataclass(frozen=True)
class _Family:
    """One of torchtitan's models."""

    names: Mapping[str, tuple[str, ...]]
    rotates_neighbours: bool = False
    """Whether it rotates pairs of neighbouring rows of queries and keys."""


_FAMILIES = {
    "LlamaForCausalLM": _Family(_COMMON, rotates_neighbours=True),
    "DeepseekV3ForCausalLM": _Family({**_COMMON, **_EXPERTS, **_LATENT}),
    "Qwen3ForCausalLM": _Family({**_COMMON, **_NORMS}),
    "Qwen3MoeForCausalLM": _Family({**_COMMON, **_NORMS, **_EXPERTS}),
}
"""Its models whose tensors were compared here with those of transformers, by the class in transformers."""

_COMPUTED = frozenset({"freqs_cis", "rope_cache"})
"""Buffers that earlier versions saved, and that the model computes from its config."""


def is_native(stored: Collection[str]) -> bool:
    """Whether a checkpoint's names are those of torchtitan's own models."""
    return any(map(_EMBEDDING.search, stored)) and any(map(_NATIVE.search, stored))


def as_native(
    architecture: Architecture, config: Mapping[str, Any], stored: Collection[str], where: str
) -> Architecture:
    """Return an architecture seen from torchtitan's names of its tensors.

    Args:
        architecture: of the class in transformers.
        config: of the model, which says how many rows a head has.
        stored: the checkpoint's names, which tell torchtitan's versions apart.
        where: the checkpoint, for errors.

    Raises:
        MismatchError: torchtitan's names of this class are not known here.
    """
    family = _FAMILIES.get(architecture.name)
    if family is None:
        raise MismatchError(
            f"{where}: holds a model in torchtitan's native names, which are converted here for"
            f" {', '.join(sorted(_FAMILIES))}, but not for {architecture.name}; convert it with torchtitan's"
            " scripts/checkpoint_conversion/convert_to_hf.py, or save it there with last_save_in_hf"
        )
    if config.get("rope_interleave") is False:
        raise MismatchError(
            f"{where}: torchtitan's {architecture.name} rotates pairs of neighbouring rows, and the config has"
            " rope_interleave false; give the config that it was trained with"
        )
    view = architecture.as_stored()
    chosen = _choose_version(family, stored)
    native = {name: _native_name(name, chosen, architecture.name, where) for name in view.shapes}
    experts = Counter(native[name] for name in view.shapes if _EXPERT.search(name))
    rows = _rows_of_a_head(config) if family.rotates_neighbours else 0
    recipes = {
        name: _recipe(name, recipe.shape, native[name], experts.get(native[name]), rows)
        for name, recipe in view.recipes.items()
    }
    shapes = {
        native[name]: (experts[native[name]], *shape) if native[name] in experts else shape
        for name, shape in view.shapes.items()
    }
    return replace(
        view,
        shapes=shapes,
        ties={native[target]: native[source] for target, source in view.ties.items()},
        recipes=recipes,
        padded=frozenset(native[name] for name in view.padded),
        unsaved=_COMPUTED,
        untrained=frozenset(native[name] for name in view.untrained),
        dtypes={native[name]: kind for name, kind in view.dtypes.items()},
    )


def _choose_version(family: _Family, stored: Iterable[str]) -> dict[str, str]:
    """Return the native name of each kind of tensor as the version of torchtitan has it that saved the checkpoint."""
    plain = (".".join(part for part in name.split(".") if part not in WRAPPERS) for name in stored)
    found = {_LAYER.sub("layers.{}", f".{name}") for name in plain}
    return {
        kind: next((may for may in names if any(name.endswith(f".{may}") for name in found)), names[0])
        for kind, names in family.names.items()
    }


def _native_name(name: str, chosen: Mapping[str, str], architecture: str, where: str) -> str:
    layer = _LAYER.search(name)
    kind = _EXPERT.sub("{}", _LAYER.sub("layers.{}", name))
    if kind not in chosen:
        raise MismatchError(
            f"{where}: holds a model in torchtitan's native names, whose {architecture} has nothing that"
            f" {name} could be made of; give the config that it was trained with"
        )
    return chosen[kind].replace("{}", layer[1] if layer else "")


def _rows_of_a_head(config: Mapping[str, Any]) -> int:
    """Return the size of an attention head, as transformers computes it where the config does not say."""
    from transformers import CONFIG_MAPPING

    known: Any = CONFIG_MAPPING[str(config["model_type"])]
    built = known.from_dict(dict(config))
    return getattr(built, "head_dim", None) or built.hidden_size // built.num_attention_heads


def _recipe(name: str, shape: Shape, native: str, experts: int | None, rows: int) -> Recipe:
    """Return how a tensor of an export is made of a native one.

    Args:
        name: of the tensor in the export.
        shape: of it.
        native: name of the native tensor.
        experts: how many experts that one holds; None if it is of none.
        rows: of a head of queries and keys, if their rows are in another order.
    """
    zeros = (0,) * len(shape)
    if experts:
        number = int(_EXPERT.findall(name)[0])
        axes = tuple(range(1, len(shape) + 1))
        return Recipe(shape, shape, (Piece(zeros, shape, native, (experts, *shape), (number, *zeros), axes),))
    if rows and name.endswith((".q_proj.weight", ".k_proj.weight")):
        halves, pairs = (shape[0] // rows, 2, rows // 2, shape[1]), (shape[0] // rows, rows // 2, 2, shape[1])
        return Recipe(shape, halves, (Piece((0,) * 4, halves, native, pairs, (0,) * 4, (0, 2, 1, 3)),))
    return copy_of(native, shape)
