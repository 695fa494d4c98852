"""Models with a LoRA adapter in the export gate: PEFT, which trained them, makes and loads them there too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ckpt_core.errors import ArgumentError
from ckpt_core.export.adapter_config import ADAPTER_CONFIG_NAME
from ckpt_core.export.adapter_plan import ADAPTER_WEIGHTS_NAME
from ckpt_core.safetensors_header import read_header


def has_adapter(directory: Path) -> bool:
    """Whether a directory has an adapter's config."""
    return (directory / ADAPTER_CONFIG_NAME).is_file()


def with_adapter(model: Any, directory: Path) -> Any:
    """Return the model with the adapter around it whose config is in a directory, with fresh factors."""
    peft = _peft()
    return peft.get_peft_model(model, peft.PeftConfig.from_pretrained(str(directory))).eval()


def load_adapter(restored: Any, directory: Path) -> Any:
    """Return the model within, copied, with the adapter that was exported to a directory."""
    base = copy.deepcopy(restored).unload()
    return _peft().PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False).eval()


def merged(model: Any) -> Any:
    """Return a model as it is, or with its adapter added to its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def trained_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return which of a model's tensors are an adapter's: factors, and modules that were trained as a whole."""
    return {name: tensor for name, tensor in tensors.items() if "default" in name.split(".")}


def cast_as_stored(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Cast an adapter's tensors to the types in which an export stores them: PEFT loads them in the model's."""
    stored = read_header(directory / ADAPTER_WEIGHTS_NAME)
    for name, tensor in tensors.items():
        entry = stored.get(name.replace(".modules_to_save", "").replace(".default", ""))
        if entry and entry.dtype:
            tensor.data = tensor.data.to(getattr(torch, entry.dtype))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ArgumentError("the checkpoint has a LoRA adapter, and peft is missing: pip install peft.") from None
    return peft
