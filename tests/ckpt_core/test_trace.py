"""How the tensors of an export are made of a model's own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from small_transformers import FUSED, MODELS
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ckpt_core.export.recipe import Recipe
from ckpt_core.export.trace import inverted, trace_export

_LAYERS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT: dict[str, Any] = {**_LAYERS, "vocab_size": 40, "num_key_value_heads": 2, "pad_token_id": 0}
_EXPERTS: dict[str, Any] = {**_TEXT, "moe_intermediate_size": 6, "num_experts_per_tok": 2}
_VISION: dict[str, Any] = {**_LAYERS, "image_size": 16, "patch_size": 8}
_GEMMA_TEXT: dict[str, Any] = {**_TEXT, "head_dim": 8}

CONFIGS = {
    "mixtral": ("MixtralForCausalLM", FUSED[1]),
    "qwen3 moe": ("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**_EXPERTS, num_experts=4, head_dim=8)),
    "deepseek v3": (
        "DeepseekV3ForCausalLM",
        transformers.DeepseekV3Config(
            **_EXPERTS, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=4,
            q_lora_rank=4, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4,
        ),
    ),
    "gemma3": ("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**_GEMMA_TEXT)),
    "gemma3 vision": (
        "Gemma3ForConditionalGeneration",
        transformers.Gemma3Config(text_config=_GEMMA_TEXT, vision_config=_VISION, mm_tokens_per_image=4),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        transformers.LlavaConfig(
            text_config={**_TEXT, "model_type": "llama"}, vision_config={**_VISION, "model_type": "clip_vision_model"}
        ),
    ),
    "qwen2.5 vl": (
        "Qwen2_5_VLForConditionalGeneration",
        transformers.Qwen2_5_VLConfig(
            text_config=_TEXT,
            vision_config={
                "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
            },
        ),
    ),
    "gpt oss": ("GptOssForCausalLM", transformers.GptOssConfig(**_TEXT, head_dim=8, num_local_experts=4)),
    "whisper": (
        "WhisperForConditionalGeneration",
        transformers.WhisperConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, pad_token_id=0,
            max_source_positions=16, max_target_positions=16,
        ),
    ),
}  # fmt: skip
NAMES = [*(name for name in MODELS if name != "llama tied"), *CONFIGS]


def meta_model(name: str) -> PreTrainedModel:
    """Return a model without weights."""
    cls, config = MODELS.get(name) or (getattr(transformers, CONFIGS[name][0]), CONFIGS[name][1])
    with torch.device("meta"):
        return cls(config)


def own_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a model's state dict without the second names of tied tensors."""
    return {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}


def numbered(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of the same shapes whose elements are all different."""
    result: dict[str, torch.Tensor] = {}
    count = 0
    for name, tensor in state.items():
        result[name] = torch.arange(count, count + tensor.numel()).reshape(tensor.shape)
        count += tensor.numel()
    return result


def evaluate(recipe: Recipe, values: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the tensor that a recipe makes: the meaning of a recipe."""
    made = np.full(recipe.layout, -1)
    for piece in recipe.pieces:
        box = values[piece.source].reshape(piece.view)[_slices(piece.start, piece.taken)]
        walked = [axis for axis in piece.axes if axis is not None]
        others = [axis for axis in range(box.ndim) if axis not in walked]
        made[_slices(piece.offsets, piece.sizes)] = box.transpose(walked + others).reshape(piece.sizes)
    return made.reshape(recipe.shape)


def _slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.int64]]:
    """Return tensors as arrays."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def assert_same(found: Mapping[str, NDArray[np.int64]], expected: Mapping[str, NDArray[np.int64]]) -> None:
    """Compare names and their order, shapes and values."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert (found[name] == value).all(), name


@pytest.mark.parametrize("name", NAMES)
def test_recipes_make_what_transformers_makes(name):
    """Names, order, shapes and elements of the recipes' tensors are those of transformers' own reversal."""
    model = meta_model(name)
    values = numbered(own_state(model))
    expected = arrays(revert_weight_conversion(model, dict(values)))
    recipes = trace_export(model, own_state(model))
    assert_same({n: evaluate(recipe, arrays(values)) for n, recipe in recipes.items()}, expected)
    assert [recipe.wrong() for recipe in recipes.values()] == [None] * len(recipes)


@pytest.mark.parametrize("name", NAMES)
def test_inverted_recipes_give_the_model_back(name):
    """What the recipes take apart, the inverted ones put together."""
    state = own_state(meta_model(name))
    values = arrays(numbered(state))
    recipes = trace_export(meta_model(name), state)
    exported = {n: evaluate(recipe, values) for n, recipe in recipes.items()}
    back = inverted(recipes, {n: tuple(tensor.shape) for n, tensor in state.items()})
    assert_same({n: evaluate(recipe, exported) for n, recipe in back.items()}, values)


def test_every_source_is_seen_in_its_own_shape():
    """A recipe's pieces are boxes of the model's tensors as they are, which checkpoints store in boxes, too."""
    for name in ("gpt2", "mixtral", "deepseek v3"):
        state = own_state(meta_model(name))
        for recipe in trace_export(meta_model(name), state).values():
            assert all(piece.view == tuple(state[piece.source].shape) for piece in recipe.pieces)
