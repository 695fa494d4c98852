"""Small models with a LoRA adapter, as PEFT makes them, saved by one rank or by several."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from small_transformers import model_of, tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckpt_core.export import Assets
from ckpt_core.export.assets import write_configs
from ckpt_core.native_checkpoint import save_checkpoint

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "llama whole": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "llama patterns": (
        "llama",
        {
            "target_modules": r".*\.(q_proj|up_proj|lm_head)",
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"up_proj": 3},
            "use_rslora": True,
        },
    ),
    "llama one layer": ("llama", {"target_modules": ["k_proj"], "layers_to_transform": [1]}),
    "llama words": ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2 square": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "vit": ("vit", {"target_modules": ["projection", "no_such_module"]}),
    "gpt2 places": ("gpt2", {"target_modules": ["wpe"]}),
}
"""The model, and what of LoRA's configuration is not the same for all."""


def adapted(name: str, dtype: str = "float32", **changes: Any) -> PeftModel:
    """Return a model with an adapter of random factors, the model's weights in `dtype`, the adapter's in float32."""
    family, options = ADAPTERS[name]
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, **options, **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a setting of Conv1D, which it corrects by itself
        model = get_peft_model(model_of(family).to(getattr(torch, dtype)), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    return model


def save_pretrained_adapter(model: PeftModel, directory: Path) -> Path:
    """Save an adapter as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(directory))
    return directory


def adapter_directory(model: PeftModel, directory: Path) -> Path:
    """Write the configs of a model and of its adapter, and a tokenizer, as a run keeps them; no weights."""
    directory.mkdir(parents=True)
    write_configs(model.get_base_model(), directory)
    model.peft_config["default"].save_pretrained(str(directory))
    tokenizer().save_pretrained(directory)
    return directory


def assets_of(directory: Path, config: dict[str, Any]) -> Assets:
    """Return all files of `adapter_directory` as assets, with a model's config."""
    return Assets(config, {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "config.json"})


def save_adapted(directory: Path, names: Iterable[str]) -> None:
    """Save models with adapters, each to a directory of its name, their rows divided among all ranks by FSDP2."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in names:
        model = adapted(name)
        fully_shard(model, mesh=mesh)
        save_checkpoint(model, str(directory / name))
