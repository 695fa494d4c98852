"""The model: built from settings, the same on every rank, then sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ckpt_core.errors import ArgumentError

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from tasks.config import ModelSettings


def model_config(settings: ModelSettings) -> Any:
    """Return the transformers config of the model.

    Raises:
        ArgumentError: `pretrained` is not there, or `architecture` has no, or an unknown, model type or field.
    """
    from transformers import AutoConfig

    if settings.pretrained is None:
        return _architecture_config(settings.architecture)
    try:
        return AutoConfig.from_pretrained(settings.pretrained, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"no pretrained model at {settings.pretrained!r}: {error}") from error


def build_model(settings: ModelSettings, tokenizer: Any, *, seed: int, load_weights: bool = True) -> nn.Module:
    """Return a causal language model in float32 on the CPU; equal settings and seed give equal weights.

    Args:
        settings: what to build.
        tokenizer: names the token that ends a text, for a model that is made from scratch.
        seed: of the initial weights; the generator's state is the same afterwards on every rank.
        load_weights: read the weights of `pretrained`; without it only its architecture, as a checkpoint's weights
            will replace them.

    Raises:
        ArgumentError: the settings name no causal language model.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    if settings.pretrained is not None and load_weights:
        return _pretrained_model(settings.pretrained, trust_remote_code=settings.trust_remote_code)
    config = model_config(settings)
    if settings.pretrained is None:
        _name_end_of_text(config, tokenizer, settings.architecture)
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=settings.trust_remote_code
        )
    except ValueError as error:
        raise ArgumentError(f"model type {config.model_type!r} is no causal language model: {error}") from error


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Collective. Shard each transformer block and the rest over the mesh (FSDP2); bf16 arithmetic on CUDA."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if mesh.device_type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that transformers itself would never split over devices: the model's blocks."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _architecture_config(architecture: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    fields = dict(architecture)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ArgumentError(
            f"architecture: model_type {model_type!r} is unknown to transformers; set one such as 'llama' or 'gpt2'"
        )
    config_class = CONFIG_MAPPING[model_type]
    known = config_class()
    unknown = sorted(name for name in fields if not hasattr(known, name))
    if unknown:
        raise ArgumentError(
            f"architecture: a {model_type!r} config has no field {', '.join(unknown)}; correct the name"
        )
    try:
        return config_class(**fields)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"architecture: {error}") from error


def _name_end_of_text(config: Any, tokenizer: Any, architecture: dict[str, Any]) -> None:
    """Generation must begin and stop at this tokenizer's tokens, not at the architecture's usual numbers."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in architecture and hasattr(config, name):
            setattr(config, name, getattr(tokenizer, name))


def _pretrained_model(name: str, *, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"no pretrained causal language model at {name!r}: {error}") from error
