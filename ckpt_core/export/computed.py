"""Tensors that a model computes when it is made, so that no Hugging Face directory holds them."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ckpt_core.export.architecture import named_class
from ckpt_core.hf_weights import HfWeights, read_weights


def write_computed(path: Path, architecture: str, config: Mapping[str, Any], names: Iterable[str]) -> HfWeights:
    """Have a model compute some of its tensors, in float32, and write them to a new safetensors file.

    Args:
        path: of the file.
        architecture: the name of the model's class.
        config: its config.
        names: of the tensors in its state dict; only the modules that own them come to have bytes.
    """
    cls = named_class(architecture)
    with torch.device("meta"):
        model: Any = cls(cls.config_class.from_dict(dict(config)))
    made: dict[str, torch.Tensor] = {}
    for name in names:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner).to(torch.float32).to_empty(device="cpu")
        model._init_weights(module)
        made[name] = module.state_dict()[own].clone()
    save_file(made, path)
    return read_weights(path)
