"""How the tensors of an export are made of a model's own."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_transformers import MODELS
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    Conv3dToLinear,
    ConversionOps,
    LinearToConv3d,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)

from ckpt_core.errors import MismatchError
from ckpt_core.export.recipe import Recipe
from ckpt_core.export.trace import Moves, inverted, trace_export

_LAYERS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT: dict[str, Any] = {**_LAYERS, "vocab_size": 40, "num_key_value_heads": 2, "pad_token_id": 0}
_EXPERTS: dict[str, Any] = {**_TEXT, "moe_intermediate_size": 6, "num_experts_per_tok": 2}

CONFIGS = {
    "mixtral": ("MixtralForCausalLM", transformers.MixtralConfig(**_TEXT, num_local_experts=2)),
    "qwen3 moe": ("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**_EXPERTS, num_experts=4)),
    "deepseek v3": (
        "DeepseekV3ForCausalLM",
        transformers.DeepseekV3Config(
            **_EXPERTS, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=4,
            q_lora_rank=4, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4,
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
}  # fmt: skip
NAMES = [*(name for name in MODELS if name != "llama tied"), *CONFIGS]

# Each operation with which transformers stores a model, reached through its default config made small.
OPERATIONS = {
    "NomicBertModel": {"Concatenate"},
    "Molmo2ForConditionalGeneration": {"Concatenate", "Chunk"},
    "OlmoHybridForCausalLM": {"Chunk"},
    "Step3p7ForConditionalGeneration": {"Concatenate", "PermuteForRope"},
    "Inkling2ForCausalLM": {"Interleave"},
    "Kimi_K25ForConditionalGeneration": {"Concatenate", "PermuteForRope"},
    "MistralLarge4ForConditionalGeneration": {"Chunk", "PermuteForRope", "SplitModulelist"},
    "Qwen3VLMoeForConditionalGeneration": {"Transpose"},
    "NemotronHForCausalLM": {"SplitModulelist"},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "Concatenate", "Transpose", "ErnieSplitAndDecoupleTextVisionExperts",
    },
}  # fmt: skip
_SMALL = {
    "depth": 2, "head_dim": 8, "hidden_size": 16, "image_size": 16, "intermediate_size": 24, "kv_lora_rank": 4,
    "max_position_embeddings": 32, "moe_intermediate_size": 6, "n_group": 2, "n_routed_experts": 4,
    "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "num_heads": 2, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "num_local_experts": 4, "out_hidden_size": 16, "pad_token_id": 0, "patch_size": 8,
    "q_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "topk_group": 1, "v_head_dim": 4, "vocab_size": 40,
}  # fmt: skip


def made_small(config: Any) -> Any:
    """Return a config with small numbers in the place of its own, also in the configs that it contains."""
    for name, size in _SMALL.items():
        if isinstance(getattr(config, name, None), int):
            with contextlib.suppress(AttributeError):  # derived from another one
                setattr(config, name, size)
    for name in ("layer_types", "mlp_layer_types", "moe_intermediate_size"):
        several = getattr(config, name, None)
        if isinstance(several, list):
            setattr(config, name, [6, 4] if name == "moe_intermediate_size" else several[:2])
    for name in config.sub_configs:
        made_small(getattr(config, name))
    return config


def small_model(name: str) -> PreTrainedModel:
    """Return a model of that class, small and without weights."""
    cls = getattr(transformers, name)
    config = made_small(cls.config_class())
    if name.startswith("Ernie"):  # its rotary embedding has 64 frequencies
        config.text_config.hidden_size = 256
    with torch.device("meta"):
        return cls(config)


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


def assert_recipes_hold(model: PreTrainedModel) -> None:
    """Compare a model's recipes, evaluated, with what transformers makes; and the inverted ones with the model."""
    state = own_state(model)
    values = numbered(state)
    expected = arrays(revert_weight_conversion(model, dict(values)))
    recipes = trace_export(model, state)
    exported = {name: evaluate(recipe, arrays(values)) for name, recipe in recipes.items()}
    assert_same(exported, expected)
    assert [recipe.wrong() for recipe in recipes.values()] == [None] * len(recipes)
    back = inverted(recipes, {name: tuple(tensor.shape) for name, tensor in state.items()})
    assert_same({name: evaluate(recipe, exported) for name, recipe in back.items()}, arrays(values))


@pytest.mark.parametrize("name", NAMES)
def test_recipes_make_what_transformers_makes(name):
    """Names, order, shapes and elements are those of transformers' own reversal, and lead back to the model's."""
    assert_recipes_hold(meta_model(name))


@pytest.mark.parametrize("name", OPERATIONS)
def test_recipes_hold_for_every_operation(name, monkeypatch):
    """Models are stored right that transformers concatenates, chunks, interleaves, permutes or decouples."""
    ran: set[str] = set()
    for operation in ConversionOps.__subclasses__():
        monkeypatch.setattr(operation, "convert", _noted(operation.convert, operation.__name__, ran))
    assert_recipes_hold(small_model(name))
    assert ran == OPERATIONS[name]


def _noted(convert: Any, name: str, ran: set[str]) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        ran.add(name)
        return convert(*args, **kwargs)

    return wrapper


def test_no_operation_of_transformers_is_left_out():
    """The models above are stored with every operation that occurs in transformers' table."""
    table = conversion_mapping._build_checkpoint_conversion_mapping()
    used = {
        type(operation.reverse_op).__name__
        for transforms in table.values()
        for transform in transforms
        if isinstance(transform, WeightConverter)
        for operation in transform.operations
    }
    assert used == set().union(*OPERATIONS.values())


def test_every_source_is_seen_in_its_own_shape():
    """A recipe's pieces are boxes of the model's tensors as they are, which checkpoints store in boxes, too."""
    for name in ("gpt2", "mixtral", "deepseek v3"):
        state = own_state(meta_model(name))
        for recipe in trace_export(meta_model(name), state).values():
            assert all(piece.view == tuple(state[piece.source].shape) for piece in recipe.pieces)


def moved(change: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> tuple[Recipe, NDArray[np.int64]]:
    """Return the recipe of what `change` makes of tensors of these shapes; check it against the made tensor."""
    values = numbered({name: torch.empty(shape) for name, shape in zip("abc", shapes, strict=False)})
    moves = Moves("Tiny", values)
    with moves:
        made = change(*moves.tensors.values())
    recipe, expected = moves.recipe(made), change(*values.values()).numpy()
    assert_same({"made": evaluate(recipe, arrays(values))}, {"made": expected})
    assert recipe.wrong() is None
    return recipe, expected


@pytest.mark.parametrize(
    ("change", "shapes"),
    [
        (lambda a: torch.cat(a.chunk(2)[::-1]).T, [(4, 6)]),
        (lambda a, b: torch.stack([a, b]).transpose(0, 2), [(4, 6), (4, 6)]),
        (lambda a, b: torch.stack([a.T, b], dim=-1).reshape(-1), [(4, 6), (6, 4)]),
        (lambda a, b: torch.cat([a, b]).reshape(3, 4, 5)[1], [(7, 5), (5, 5)]),
        (lambda a: a.reshape(2, 4, 3, 5).transpose(1, 2).reshape(24, 5), [(24, 5)]),
        (lambda a: a.permute(2, 0, 1).contiguous().view(-1)[7:101], [(4, 6, 5)]),
        (lambda a: a.permute(2, 0, 1).clone().permute(1, 2, 0), [(4, 6, 5)]),
        (lambda a: a.diagonal().clone(), [(4, 6)]),
        (lambda a: a.unfold(0, 3, 2).contiguous(), [(9, 2)]),
        (lambda a: a.expand(3, 4).contiguous(), [(1, 4)]),
        (lambda a, b: torch.stack([a, b]), [(), ()]),
        (lambda a: a.clone(), [()]),
        (lambda a: a[0], [(5,)]),
        (lambda a: a[:, 2:2].contiguous(), [(4, 6)]),
        (lambda a, b: torch.cat([a, b[:0], b]), [(4, 6), (3, 6)]),
        (lambda a: LinearToConv3d(3, (2, 4, 5)).convert({"x": a}, ["x"], ["y"])["y"], [(7, 120)]),
        (lambda a: Conv3dToLinear(3, (2, 4, 5)).convert({"x": a}, ["x"], ["y"])["y"], [(7, 3, 2, 4, 5)]),
    ],
)
def test_chains_of_moves(change, shapes):
    """Views and copies, one after the other, are followed to the elements that they began with."""
    moved(change, *shapes)


_MOVES: dict[str, Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]] = {
    "transpose": lambda x, _, axis, n: x.transpose(axis, n % x.ndim),
    "narrow": lambda x, _, axis, n: x.narrow(axis, n % x.shape[axis], (x.shape[axis] - n % x.shape[axis] + 1) // 2),
    "chunk": lambda x, _, axis, n: x.chunk(2, axis)[-(n % 2)],
    "chunks exchanged": lambda x, _, axis, n: torch.cat(x.chunk(2 + n % 2, axis)[::-1], axis),
    "every second": lambda x, _, axis, n: x.movedim(axis, 0)[n % 2 % x.shape[axis] :: 2],
    "cat": lambda x, y, axis, _: torch.cat([x, y], axis),
    "stack": lambda x, y, axis, _: torch.stack([x, y], axis),
    "flatten": lambda x, _, axis, n: x.flatten(axis, axis + n % (x.ndim - axis)),
    "unflatten": lambda x, _, axis, n: x.unflatten(axis, (-1, math.gcd(x.shape[axis], 2 + n % 5))),
    "unsqueeze": lambda x, _, axis, __: x.unsqueeze(axis),
    "contiguous": lambda x, *_: x.contiguous(),
}


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from(sorted(_MOVES)), st.integers(0, 9), st.integers(0, 9)), max_size=7),
)
def test_any_chain_of_moves(shape, steps):
    """Whatever views and copies two tensors go through, the recipe makes the same tensor from them."""

    def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for name, axis, n in steps:
            x, y = _MOVES[name](x, y, axis % x.ndim, n), _MOVES[name](y, x, axis % y.ndim, n)
        return x

    moved(change, tuple(shape), tuple(shape))


def test_merged_axes_stay_one_piece():
    """A tensor that is only seen in another shape is one straight piece."""
    recipe, _ = moved(lambda a: a.reshape(4, 2, 3, 5).contiguous(), (4, 30))
    assert recipe.straight


def test_rotary_permutation_takes_two_pieces_a_head():
    """Rows that lie one apart in each half of a head make two pieces a head."""
    recipe, _ = moved(lambda a: a.view(4, 2, 8, 5).transpose(1, 2).reshape(64, 5), (64, 5))
    assert len(recipe.pieces) == 4 * 2


@pytest.mark.parametrize(
    ("change", "operation"),
    [
        (lambda a: a * 2, "aten.mul"),
        (lambda a: a.T.clone().to(torch.float64), "aten._to_copy"),
        (lambda a: torch.cat([a, a.new_empty(4, 6, dtype=torch.float64)]), "aten.new_empty"),
        (lambda a: a.flip(0), "aten.flip"),
        (lambda a: a.clone().fill_(1), "aten.fill_"),
        (lambda a: a.view(torch.int32), "aten.view.dtype"),
    ],
)
def test_arithmetic_is_refused(change, operation):
    """What is more than a move is an error with the model, the tensor and the operation."""
    moves = Moves("Tiny", {"a.weight": torch.empty(4, 6)})
    with moves, pytest.raises(MismatchError, match=rf"^Tiny: .*a\.weight.*{operation}.*call save_pretrained"):
        change(moves.tensors["a.weight"])


def test_conjugates_are_refused():
    """A view that changes what elements mean is no move."""
    moves = Moves("Tiny", {"a": torch.empty(3, dtype=torch.complex64)})
    with moves, pytest.raises(MismatchError, match=r"aten\._conj"):
        moves.tensors["a"].conj()


def test_mixed_dtypes_are_refused():
    """Tensors of two dtypes, side by side, would be cast."""
    moves = Moves("Tiny", {"a": torch.empty(3), "b": torch.empty(3, dtype=torch.float64)})
    with moves, pytest.raises(MismatchError, match=r"aten\.cat"):
        torch.cat(list(moves.tensors.values()))


def test_foreign_tensors_are_refused():
    """A tensor that is not made of the model's has no recipe."""
    with pytest.raises(MismatchError, match="none of the model"):
        Moves("Tiny", {"a": torch.empty(3)}).recipe(torch.empty(3, device="meta"))


class Halve(ConversionOps):
    """An operation that computes."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Halve each tensor."""
        return {name: tensors[0] / 2 for name, tensors in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """Return itself."""
        return self


def test_a_conversion_that_computes_is_refused():
    """A model whose weights transformers computes with before it stores them is an error that says what to do."""
    model: Any = meta_model("llama")
    model._weight_conversions = [WeightConverter("q_proj.weight", "q_proj.weight", [Halve()])]
    with pytest.raises(MismatchError, match=r"LlamaForCausalLM.*q_proj\.weight.*aten\.div.*save_pretrained"):
        trace_export(model, own_state(model))


def test_a_conversion_that_fails_is_refused():
    """What transformers cannot undo, as for quantized weights, is an error with its own words."""
    model: Any = meta_model("llama")
    renaming = WeightRenaming("q_proj", "query")
    renaming.quantization_operation = Halve()
    model._weight_conversions = [renaming]
    with pytest.raises(MismatchError, match=r"LlamaForCausalLM.*TP or quantization.*save_pretrained"):
        trace_export(model, own_state(model))


@pytest.fixture
def mixtral() -> tuple[dict[str, Recipe], dict[str, tuple[int, ...]]]:
    """Recipes of a model with experts, and the shapes of its tensors."""
    state = own_state(meta_model("mixtral"))
    return trace_export(meta_model("mixtral"), state), {n: tuple(tensor.shape) for n, tensor in state.items()}


def test_a_dropped_tensor_has_no_way_back(mixtral):
    """A model's tensor with a part that no export has cannot be put together again."""
    recipes, shapes = mixtral
    del recipes["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    with pytest.raises(MismatchError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: .*experts\.0\.w1\.weight"):
        inverted(recipes, shapes)


def test_a_wholly_dropped_tensor_has_no_way_back(mixtral):
    """A model's tensor that is in no export cannot be put together again."""
    recipes, shapes = mixtral
    del recipes["model.norm.weight"]
    with pytest.raises(MismatchError, match=r"model\.norm\.weight: transformers stores it in no tensor"):
        inverted(recipes, shapes)


def test_a_doubled_element_has_no_way_back(mixtral):
    """A model's tensor of which an element is stored twice, and another not at all, cannot be put together again."""
    recipes, shapes = mixtral
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    [piece] = recipes[name].pieces
    recipes[name] = replace(recipes[name], pieces=(replace(piece, start=(1, piece.start[1] - 1, 0)),))
    with pytest.raises(MismatchError, match=r"gate_up_proj: .*chunks overlap"):
        inverted(recipes, shapes)
