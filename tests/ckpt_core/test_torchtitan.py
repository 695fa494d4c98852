"""Checkpoints in torchtitan's native names: converted, a model computes in transformers what it computed there."""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention, silu
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ckpt_core import errors, io
from ckpt_core.export import Assets, convert
from ckpt_core.export.recipe import Piece, Recipe
from ckpt_core.export.stored import Box
from ckpt_core.export.stream import blocks
from ckpt_core.format.payload import Payload
from ckpt_core.format.source import open_source

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 3,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]),
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True, architectures=["LlamaForCausalLM"]),
    "qwen3": Qwen3Config(**SIZES, architectures=["Qwen3ForCausalLM"]),
    "deepseek_v3": DeepseekV3Config(**{**SIZES, **LATENT}, architectures=["DeepseekV3ForCausalLM"]),
    "deepseek_v3 without lora": DeepseekV3Config(
        **{**SIZES, **LATENT, "q_lora_rank": None}, architectures=["DeepseekV3ForCausalLM"]
    ),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, architectures=["Qwen3MoeForCausalLM"]),
}
NEWER = {
    r"attention\.(w[qkv])\.": r"attention.qkv_linear.\1.",
    r"^output\.": "lm_head.",
    r"moe\.experts\.(w[13])$": r"moe.routed_experts.inner_experts.\1_EFD",
    r"moe\.experts\.w2$": "moe.routed_experts.inner_experts.w2_EDF",
    r"moe\.expert_bias$": "moe.expert_bias_E",
}
"""What torchtitan called the same tensors in 2025, and what in 2026."""

Tensors = Mapping[str, torch.Tensor]


def native_model(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Return random weights of torchtitan's model of a config, as its state dict names them."""
    torch.manual_seed(0)
    hidden, head, inner = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = {"tok_embeddings.weight": (config.vocab_size, hidden), "norm.weight": (hidden,)}
    for layer in range(config.num_hidden_layers):
        of_layer = {
            "attention_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
        }
        if config.model_type == "deepseek_v3":
            of_layer |= latent_shapes(config)
        else:
            of_layer |= {
                "attention.wq.weight": (queries, hidden),
                "attention.wk.weight": (keys, hidden),
                "attention.wv.weight": (keys, hidden),
                "attention.wo.weight": (hidden, queries),
            }
        if config.model_type.startswith("qwen3"):
            of_layer |= {"attention.q_norm.weight": (head,), "attention.k_norm.weight": (head,)}
        if config.model_type == "qwen3_moe" or (config.model_type == "deepseek_v3" and layer):
            count, inner = config.num_experts if "qwen3" in config.model_type else 4, config.moe_intermediate_size
            of_layer |= {"moe.router.gate.weight": (count, hidden)}
            if config.model_type == "deepseek_v3":
                of_layer |= {f"moe.shared_experts.{name}.weight": (inner, hidden) for name in ("w1", "w3")}
                of_layer |= {"moe.shared_experts.w2.weight": (hidden, inner), "moe.expert_bias": (count,)}
            of_layer |= {f"moe.experts.{name}": (count, inner, hidden) for name in ("w1", "w3")}
            of_layer |= {"moe.experts.w2": (count, hidden, inner)}
        else:
            of_layer |= {f"feed_forward.{name}.weight": (inner, hidden) for name in ("w1", "w3")}
            of_layer |= {"feed_forward.w2.weight": (hidden, inner)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    state = {name: torch.randn(shape) / 2 for name, shape in shapes.items()}
    tied = config.tie_word_embeddings
    return {**state, "output.weight": state["tok_embeddings.weight"] if tied else torch.randn(40, hidden)}


def latent_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer of attention with latent keys and values."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    low = {"wq.weight": (queries, hidden)}
    if rank:
        low = {"wq_a.weight": (rank, hidden), "q_norm.weight": (rank,), "wq_b.weight": (queries, rank)}
    latent = config.kv_lora_rank
    high = {
        "wkv_a.weight": (latent + config.qk_rope_head_dim, hidden),
        "kv_norm.weight": (latent,),
        "wkv_b.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "wo.weight": (hidden, heads * config.v_head_dim),
    }
    return {f"attention.{name}": shape for name, shape in {**low, **high}.items()}


def latent_attention(stream: torch.Tensor, layer: Tensors, config: PreTrainedConfig) -> torch.Tensor:
    """Compute causal attention of latent keys and values, of which a part is rotated as complex numbers."""
    eps, plain, turned = 1e-6, config.qk_nope_head_dim, config.qk_rope_head_dim
    weights = {name.removeprefix("attention."): tensor for name, tensor in layer.items()}
    if config.q_lora_rank:
        low = rms_norm(stream @ weights["wq_a.weight"].T, (config.q_lora_rank,), weights["q_norm.weight"], eps)
        query = low @ weights["wq_b.weight"].T
    else:
        query = stream @ weights["wq.weight"].T
    query = query.view(len(stream), -1, plain + turned).transpose(0, 1)
    latent, rotated = (stream @ weights["wkv_a.weight"].T).split([config.kv_lora_rank, turned], dim=-1)
    high = rms_norm(latent, (config.kv_lora_rank,), weights["kv_norm.weight"], eps) @ weights["wkv_b.weight"].T
    key, value = (
        high.view(len(stream), -1, plain + config.v_head_dim).transpose(0, 1).split([plain, config.v_head_dim], dim=-1)
    )
    turn = turns(len(stream), turned)
    query = torch.cat([query[..., :plain], turned_pairs(query[..., plain:], turn)], dim=-1)
    key = torch.cat([key, turned_pairs(rotated, turn).expand(len(key), -1, -1)], dim=-1)
    mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(0, 1).flatten(1) @ weights["wo.weight"].T


def turns(length: int, size: int) -> torch.Tensor:
    """Return by how much each pair of numbers of a head is turned at each place, as complex numbers."""
    angles = torch.outer(torch.arange(length), 100.0 ** (-torch.arange(0, size, 2) / size))
    return torch.polar(torch.ones_like(angles), angles)


def turned_pairs(numbers: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbours."""
    pairs = torch.view_as_complex(numbers.reshape(*numbers.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def logits(state: Tensors, config: PreTrainedConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Compute what torchtitan's model does: Llama rotates neighbouring numbers as complex ones, Qwen3 two halves."""
    eps = config.rms_norm_eps
    stream = embedding(tokens, state["tok_embeddings.weight"])
    for number in range(config.num_hidden_layers):
        layer = {k.removeprefix(f"layers.{number}."): v for k, v in state.items() if k.startswith(f"layers.{number}.")}
        normed = rms_norm(stream, stream.shape[-1:], layer["attention_norm.weight"], eps)
        stream = stream + attention(normed, layer, config)
        normed = rms_norm(stream, stream.shape[-1:], layer["ffn_norm.weight"], eps)
        stream = stream + (experts(normed, layer, config) if "moe.experts.w1" in layer else feed_forward(normed, layer))
    return rms_norm(stream, stream.shape[-1:], state["norm.weight"], eps) @ state["output.weight"].T


def attention(stream: torch.Tensor, layer: Tensors, config: PreTrainedConfig) -> torch.Tensor:
    """Compute causal attention of grouped queries."""
    if config.model_type == "deepseek_v3":
        return latent_attention(stream, layer, config)
    size = config.head_dim
    query, key, value = (
        (stream @ layer[f"attention.w{of}.weight"].T).view(len(stream), -1, size).transpose(0, 1) for of in "qkv"
    )
    turn = turns(len(stream), size)
    if config.model_type == "llama":
        query, key = turned_pairs(query, turn), turned_pairs(key, turn)
    else:
        query = rms_norm(query, (size,), layer["attention.q_norm.weight"], config.rms_norm_eps)
        key = rms_norm(key, (size,), layer["attention.k_norm.weight"], config.rms_norm_eps)
        cos, sin = (torch.cat([each, each], dim=-1) for each in (turn.real, turn.imag))
        first = size // 2
        query, key = (x * cos + torch.cat([-x[..., first:], x[..., :first]], dim=-1) * sin for x in (query, key))
    groups = len(query) // len(key)
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(0, 1).flatten(1) @ layer["attention.wo.weight"].T


def feed_forward(stream: torch.Tensor, layer: Tensors, name: str = "feed_forward") -> torch.Tensor:
    """Compute a gated layer."""
    w1, w2, w3 = (layer[f"{name}.w{of}.weight"] for of in (1, 2, 3))
    return (silu(stream @ w1.T) * (stream @ w3.T)) @ w2.T


def experts(stream: torch.Tensor, layer: Tensors, config: PreTrainedConfig) -> torch.Tensor:
    """Compute the experts of highest probability of each token, weighted by it."""
    scores, bias, scale = stream @ layer["moe.router.gate.weight"].T, layer.get("moe.expert_bias"), 1.0
    if bias is None:
        scores = scores.softmax(-1)
        chosen = scores.topk(config.num_experts_per_tok, dim=-1).indices
    else:
        scores, scale = scores.sigmoid(), config.routed_scaling_factor
        chosen = (scores + bias).topk(config.num_experts_per_tok, dim=-1).indices
    top = scores.gather(-1, chosen)
    weights = torch.zeros_like(scores).scatter(-1, chosen, scale * top / top.sum(-1, keepdim=True))
    made = [
        (silu(stream @ w1.T) * (stream @ w3.T)) @ w2.T
        for w1, w2, w3 in zip(*(layer[f"moe.experts.w{of}"] for of in (1, 2, 3)), strict=True)
    ]
    routed = sum(weights[:, number, None] * each for number, each in enumerate(made))
    return routed + (feed_forward(stream, layer, "moe.shared_experts") if bias is not None else 0)


def newer(state: Tensors) -> dict[str, torch.Tensor]:
    """Return a state dict with the newer names."""
    result = dict(state)
    for pattern, replacement in NEWER.items():
        result = {re.sub(pattern, replacement, name): tensor for name, tensor in result.items()}
    return result


def assets_of(config: PreTrainedConfig) -> Assets:
    """Return what a conversion needs of a model beside its weights."""
    return Assets(config.to_dict(), {})


@pytest.mark.parametrize("version", ["2025", "2026"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_same(tmp_path: Path, name: str, version: str) -> None:
    """The converted model gives the logits of the native one, with older and newer names, at the top or below `model`.

    The reference is computed here from the native weights, by torchtitan's formulas and not by its names' mapping.
    """
    config = CONFIGS[name]
    state, tokens = native_model(config), torch.arange(9) * 4 % 40
    saved = (
        {"model": {**state, "freqs_cis": torch.ones(3, dtype=torch.complex64)}} if version == "2025" else newer(state)
    )
    io.save({**saved, "train_state": {"step": torch.tensor(3)}, "optimizer": {"lr": 0.1}}, tmp_path / "dcp")
    export = convert(tmp_path / "dcp", tmp_path / "export", assets=assets_of(config))
    model = AutoModelForCausalLM.from_pretrained(export.path)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None]).logits[0], logits(state, config, tokens), rtol=1e-4, atol=1e-4)
    turned = "turned: model.layers.*.self_attn.q_proj.weight from layers.*.attention."
    assert any(rule.startswith(turned) for rule in export.rules) == (config.model_type == "llama")


class Chunks:
    """A matrix that is stored in chunks of some of its rows and columns, one after the other in a file."""

    def __init__(self, directory: Path, matrix: np.ndarray, rows: list[int], columns: list[int]) -> None:
        self.place = directory
        self._boxes: list[Box] = []
        self._payloads: list[Payload] = []
        with (directory / "file").open("wb") as file:
            for top, bottom in pairwise(rows):
                for left, right in pairwise(columns):
                    shape, offset = (bottom - top, right - left), file.tell()
                    data = matrix[top:bottom, left:right].tobytes()
                    file.write(data)
                    self._boxes.append(Box((top, left), shape, "file"))
                    self._payloads.append(Payload(offset, len(data), 0, "float32", shape, (shape[1], 1), 0))
        self._source = open_source(directory / "file")

    def boxes(self, _: str) -> list[Box]:
        """Return the chunks."""
        return self._boxes

    def payload(self, _: str, number: int) -> Payload:
        """Return where a chunk lies."""
        return self._payloads[number]

    def source(self, _: str) -> Any:
        """Return the file."""
        return self._source

    def __enter__(self) -> "Chunks":
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()


@pytest.mark.parametrize("rows", [[0, 24], [0, 8, 24], [0, 1, 24], [0, 3, 4, 11, 17, 24], list(range(25))])
@pytest.mark.parametrize("columns", [[0, 5], [0, 2, 5]])
def test_heads_are_turned_however_they_are_sharded(tmp_path: Path, rows: list[int], columns: list[int]) -> None:
    """A chunk may begin and end anywhere in a head of 8 rows; each row comes to its place."""
    matrix = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    halves, pairs = (3, 2, 4, 5), (3, 4, 2, 5)
    recipe = Recipe((24, 5), halves, (Piece((0,) * 4, halves, "x", pairs, (0,) * 4, (0, 2, 1, 3)),))
    with Chunks(tmp_path, matrix, rows, columns) as chunks:
        made = np.concatenate(list(blocks(chunks, recipe, "float32"))).view(np.float32)
    assert (made.reshape(24, 5) == matrix.reshape(pairs).transpose(0, 2, 1, 3).reshape(24, 5)).all()


def test_another_view_of_a_sharded_tensor_is_not_guessed(tmp_path: Path) -> None:
    """Only the first axis of a tensor in several chunks can be split; anything else ends with an error."""
    recipe = Recipe((24, 5), (24, 5, 1), (Piece((0,) * 3, (24, 5, 1), "x", (24, 5, 1), (0,) * 3, (0, 1, 2)),))
    with (
        Chunks(tmp_path, np.zeros((24, 5), np.float32), [0, 8, 24], [0, 5]) as chunks,
        pytest.raises(NotImplementedError),
    ):
        list(blocks(chunks, recipe, "float32"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_bias": True}, r"whose LlamaForCausalLM has nothing that model\.layers\.0\.self_attn\.\w+\.bias"),
        ({"num_hidden_layers": 1}, "holds 9 tensors that LlamaForCausalLM does not have"),
        ({"num_hidden_layers": 3}, r"lacks 9 of the model's 30 tensors, such as layers\.2\."),
        ({"head_dim": 4}, r"layers\.0\.attention\.wq\.weight has shape \(32, 16\)"),
    ],
)
def test_another_config_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """A native model and a config that do not fit each other are an error that names a tensor."""
    io.save(native_model(CONFIGS["llama"]), tmp_path / "dcp")
    assets = assets_of(LlamaConfig(**{**SIZES, **change}, architectures=["LlamaForCausalLM"]))
    with pytest.raises(errors.MismatchError, match=said):
        convert(tmp_path / "dcp", tmp_path / "export", assets=assets)


def test_halves_of_heads_are_not_taken_for_pairs(tmp_path: Path) -> None:
    """DeepSeek's config can say that rows are in the other order; torchtitan's are not."""
    io.save(native_model(CONFIGS["deepseek_v3"]), tmp_path / "dcp")
    config = {**CONFIGS["deepseek_v3"].to_dict(), "rope_interleave": False}
    with pytest.raises(errors.MismatchError, match="the config has rope_interleave false"):
        convert(tmp_path / "dcp", tmp_path / "export", assets=Assets(config, {}))


def test_a_bias_of_experts_is_not_dropped(tmp_path: Path) -> None:
    """What balances the load of experts moves tokens to others; transformers' Qwen3 has none, so it is refused."""
    config = CONFIGS["qwen3_moe"]
    io.save({**native_model(config), "layers.0.moe.expert_bias": torch.ones(3)}, tmp_path / "dcp")
    with pytest.raises(errors.MismatchError, match=r"does not have, such as layers\.0\.moe\.expert_bias; "):
        convert(tmp_path / "dcp", tmp_path / "export", assets=assets_of(config))


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    """The native names of a model that was not compared are not guessed; the error names torchtitan's own converter."""
    io.save(native_model(CONFIGS["llama"]), tmp_path / "dcp")
    small = {**SIZES, "num_local_experts": 2}
    assets = assets_of(GptOssConfig(**small, architectures=["GptOssForCausalLM"]))
    with pytest.raises(errors.MismatchError, match=r"native names.*but not for GptOssForCausalLM; .*convert_to_hf\.py"):
        convert(tmp_path / "dcp", tmp_path / "export", assets=assets)
