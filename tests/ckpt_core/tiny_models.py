"""Small models of every class of transformers: their default configs with each size cut down, in several strengths."""

import copy
import importlib
import pkgutil
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

MOST_ELEMENTS = 2_000_000
"""Of a model that is small enough for two hundred megabytes of copies of it."""

LARGEST = 30_000_000
"""Of one that is taken where none is smaller."""

_NUMBERS_OF_LAYERS = re.compile(
    r"(.*_)?(num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_(encoder|decoder)_layers|num_blocks"
    r"|depth|n_blocks|num_hidden_groups|num_mtp_layers|num_nextn_predict_layers|resampler_depth|num_residual_layers)"
)
_EXPERTS = re.compile(
    r"(.*_)?(num_experts|num_local_experts|n_routed_experts|moe_num_experts|n_experts|routed_experts)"
)
_CHOSEN_EXPERTS = re.compile(
    r"(.*_)?(num_experts_per_tok(en)?|top_k|moe_k|moe_top_?k|experts_per_token|num_selected_experts)"
)
_WORDS = re.compile(r".*(vocab_size|vocabulary_size|num_embeddings)|(.*_)?vocab")
_IDS = re.compile(r".*(_token_id|_token_index|_token_ids|_id|_ids)|.*token_id_.*")
_LENGTHS = re.compile(
    r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|block_size|context_length"
    r"|max_seq(uence)?_len(gth)?|seq_length)"
)
_INNER = re.compile(
    r"(.*_)?(intermediate_size|intermediate_dim|inner_dim|ffn_(hidden_)?(dim|size)|d_ff|n_inner|mlp_(hidden_)?(dim|size)"
    r"|feed_?forward_(size|dim))"
)
_WIDTHS = re.compile(
    r"(.*_)?(hidden(_size|_dim|_channels)?|d_model|n_embd|emb(ed)?_dims?|dim|embedding_(size|dim)|input_embedding_size"
    r"|model_dim|width|projection_(dim|size)|proj_dim|output_dim|cross_attention_dim|latent_dim|feature_size|conv_dim"
    r"|hidden_size_per_layer_input)"
)
_HEADS = re.compile(r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads)")
_PAIRS_OF_HEADS = re.compile(r"(.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads|kv_heads)")
_HEAD_WIDTHS = re.compile(r"(.*_)?(head_dim|head_size|d_kv|kv_channels|mamba_(d_head|headdim)|dim_head|lora_rank)")
_IMAGES = re.compile(r".*image_size")
_PATCHES = re.compile(r".*patch_size")

_LIMITS: list[tuple[int, re.Pattern[str], int]] = [
    (3, _NUMBERS_OF_LAYERS, 2), (3, _EXPERTS, 4), (3, _CHOSEN_EXPERTS, 2), (3, _WORDS, 160),
    (2, _LENGTHS, 96), (2, _INNER, 48),
    (1, _HEAD_WIDTHS, 8), (1, _HEADS, 4), (1, _PAIRS_OF_HEADS, 2), (1, _WIDTHS, 32), (1, _IMAGES, 32), (1, _PATCHES, 8),
]  # fmt: skip
"""The largest value of the fields of each kind, and the weakest of the three strengths that cuts them down to it."""

_DERIVED: tuple[tuple[str, ...], ...] = (
    (), ("layer_types",), ("layer_types", "head_dim"), ("rope_parameters",), ("layer_types", "per_layer_config"),
    ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names"),
)  # fmt: skip
"""Fields that a config computes from others: left out, they fit the smaller ones."""

_UNSET = {"head_dim": 8, "num_key_value_heads": 2, "prediction_length": 4, "vocab_size": 160, "decoder_hidden_size": 32}
"""Fields that some classes need, and that their default configs leave at None."""

_FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "mamba2": {"num_heads": 8},
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 1, "qk_channels": 32,
        "v_channels": 32, "num_self_attention_heads": 2, "num_cross_attention_heads": 2,
    },
}  # fmt: skip
"""By model type, fields whose sizes depend on each other in a way of their own."""


def packages() -> list[str]:
    """Return the packages of transformers' models."""
    return sorted(found.name for found in pkgutil.iter_modules(transformers.models.__path__) if found.ispkg)


def classes_of(package: str) -> list[type[PreTrainedModel]]:
    """Return the public model classes of a package that can be made and saved by themselves."""
    module = importlib.import_module(f"transformers.models.{package}")
    found: list[type[PreTrainedModel]] = []
    for name in sorted(dir(module)):
        try:
            cls = getattr(module, name)
        except (ImportError, AttributeError):  # of a library that is not there
            continue
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and not name.lower().endswith("pretrainedmodel"):
            found += [cls] if getattr(cls, "config_class", None) else []
    return found


def small_config(cls: type[PreTrainedModel]) -> PreTrainedConfig | str:
    """Return a config with which a model is small, or why there is none."""
    reasons: list[str] = []
    best: tuple[int, PreTrainedConfig] | None = None
    for config in _configs(cls.config_class):
        if isinstance(config, str):
            reasons.append(config)
            continue
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                size = sum(tensor.numel() for tensor in cls(copy.deepcopy(config)).state_dict().values())
        except Exception as error:  # noqa: BLE001 - a class of another author may raise anything
            reasons.append(f"{type(error).__name__}: {str(error)[:120]}")
            continue
        if best is None or size < best[0]:
            best = size, config
        if size <= MOST_ELEMENTS:
            break
    if best and best[0] <= LARGEST:
        return best[1]
    return f"{best[0]:,} elements" if best else next(iter(dict.fromkeys(reasons)))


def _configs(cls: Any) -> Iterator[PreTrainedConfig | str]:
    """Yield configs, the smallest first, or why one is none."""
    try:
        whole = cls()
    except Exception as error:  # noqa: BLE001 - as above
        yield f"{type(error).__name__}: {str(error)[:120]}"
        return
    fields = whole.to_dict()
    for name in ("transformers_version", "model_type", "architectures", "dtype", "_name_or_path"):
        fields.pop(name, None)
    for strength in (1, 2, 3):
        cut = {**_cut(fields, strength), **_FIELDS.get(cls.model_type, {})}
        unset = {name: value for name, value in _UNSET.items() if fields.get(name) is None}
        for candidate in (*(_without(cut, names) for names in _DERIVED), {**_without(cut, ()), **unset}):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    yield cls(**candidate)
            except Exception as error:  # noqa: BLE001 - as above
                yield f"{type(error).__name__}: {str(error)[:120]}"
    yield whole


def _cut(fields: dict[str, Any], strength: int) -> dict[str, Any]:
    cut: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            cut[name] = _cut(value, strength)
        elif type(value) is int:
            cut[name] = _number(str(name).lower(), value, strength)
        elif isinstance(value, (list, tuple)):
            cut[name] = _list(str(name).lower(), list(value), strength)
        else:
            cut[name] = value
    return cut


def _number(name: str, value: int, strength: int) -> int:
    if _IDS.fullmatch(name):
        return 5 + value % 97 if value >= 120 else value
    for weakest, pattern, limit in _LIMITS:
        if strength <= weakest and pattern.fullmatch(name):
            return min(value, limit)
    return value


def _list(name: str, values: list[Any], strength: int) -> list[Any]:
    if not all(type(value) is int for value in values):
        kinds = list(dict.fromkeys(value for value in values if isinstance(value, str)))
        one_a_layer = name.endswith(("layer_types", "block_types", "block_type")) and len(values) > 2
        return (kinds * 2)[:2] if one_a_layer and kinds else values
    if _IDS.fullmatch(name):
        return [5 + value % 97 if value > 100 else value for value in values]
    if "depths" in name:
        return [1 for _ in values]
    if strength == 1 and re.search("hidden_size|embed_dim|dims|channels", name) and max(values, default=0) > 32:
        factor = max(1, min(values) // 8)
        return [max(8, value // factor) for value in values]
    return values


def _without(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, dict) else copy.deepcopy(value)
        for name, value in fields.items()
        if name not in names
    }


def small_model(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with random weights: no two floating-point tensors hold the same, and no counter is 0."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls(copy.deepcopy(config))
    unsaved = model._keys_to_ignore_on_save or ()
    tensors = {id(t): t for n, t in model.state_dict(keep_vars=True).items() if n not in unsaved}
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor, dtype=torch.float32).to(tensor.dtype))
            elif tensor.dim() == 0 and tensor.dtype != torch.bool:
                tensor.add_(7)
    return model
