"""Models with a LoRA adapter in the export gate: PEFT, which trained them, makes and loads them there too."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ckpt_core import io, open_checkpoint
from ckpt_core.durable import file_size
from ckpt_core.errors import ArgumentError
from ckpt_core.export.adapter import find_adapter
from ckpt_core.export.adapter_config import ADAPTER_CONFIG_NAME, adapter_assets, adapter_config, find_adapter_config
from ckpt_core.export.adapter_plan import ADAPTER_WEIGHTS_NAME, plan_adapter
from ckpt_core.export.carried import CONFIG_NAME
from ckpt_core.export.names import Table
from ckpt_core.format.index import read_index
from ckpt_core.safetensors_header import read_header

if TYPE_CHECKING:
    from ckpt_core.urls import Place

DEFAULT_NAME = "default"
"""What PEFT calls an adapter that was given no name."""


@dataclass(frozen=True)
class StoredAdapter:
    """The adapter of a committed step."""

    model: Place
    """The DCP directory."""

    name: str
    """What PEFT called it when it was trained."""

    sources: dict[str, str]
    """Names in the checkpoint of what PEFT saves of it, by the names that PEFT gives them."""

    alone: bool
    """Whether the model below it is missing: its config, or its frozen tensors."""


def find_stored(url: str) -> StoredAdapter | None:
    """Return the adapter of a committed step; None where its assets have no adapter's config."""
    checkpoint = open_checkpoint(url)
    model, assets = checkpoint.component("model"), find_adapter_config(checkpoint.component("assets"))
    if model is None or assets is None:
        return None
    index, config = read_index(model), adapter_config(adapter_assets(assets), url, merge=False)
    adapter = find_adapter(index, config, Table(), url)
    plan = plan_adapter(index, adapter, dtype=None, where=url)
    names = [part.adapter for part in adapter.of("factor", "trained") if part.adapter]
    alone = file_size(assets / CONFIG_NAME) is None or plan.tensors.keys() == index.tensors.keys()
    sources = {output.name: output.sources[0] for output in plan.outputs}
    return StoredAdapter(model, names[0] if names else DEFAULT_NAME, sources, alone)


def stored_tensors(adapter: StoredAdapter) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors with torch's own loader; they have the names that PEFT gives them."""
    entries = read_index(adapter.model).tensors
    tensors = {
        source: torch.empty(entries[source].shape, dtype=getattr(torch, entries[source].dtype))
        for source in adapter.sources.values()
    }
    io.load(tensors, adapter.model)
    return {name: tensors[source] for name, source in adapter.sources.items()}


def exported_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's config and tensors from an export as PEFT does before it puts them on a model."""
    peft = _peft()
    peft.PeftConfig.from_pretrained(str(directory))
    return peft.load_peft_weights(str(directory), device="cpu")


def has_adapter(directory: Path) -> bool:
    """Whether a directory has an adapter's config."""
    return (directory / ADAPTER_CONFIG_NAME).is_file()


def with_adapter(model: Any, directory: Path, name: str) -> Any:
    """Return the model with the adapter around it whose config is in a directory, with fresh factors."""
    peft = _peft()
    return peft.get_peft_model(model, peft.PeftConfig.from_pretrained(str(directory)), adapter_name=name).eval()


def load_adapter(restored: Any, directory: Path, name: str) -> Any:
    """Return the model within, copied, with the adapter that was exported to a directory."""
    base = copy.deepcopy(restored).unload()
    peft = _peft()
    return peft.PeftModel.from_pretrained(base, str(directory), adapter_name=name, autocast_adapter_dtype=False).eval()


def merged(model: Any) -> Any:
    """Return a model as it is, or with its adapter added to its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def trained_tensors(tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
    """Return which of a model's tensors are an adapter's: factors, and modules that were trained as a whole."""
    return {name: tensor for name, tensor in tensors.items() if _saved_name(name, adapter) != name}


def cast_as_stored(tensors: dict[str, torch.Tensor], adapter: str, directory: Path) -> None:
    """Cast an adapter's tensors to the types in which an export stores them: PEFT loads them in the model's."""
    stored = read_header(directory / ADAPTER_WEIGHTS_NAME)
    for name, tensor in tensors.items():
        entry = stored.get(_saved_name(name, adapter))
        if entry and entry.dtype:
            tensor.data = tensor.data.to(getattr(torch, entry.dtype))


def _saved_name(name: str, adapter: str) -> str:
    """Return a tensor's name as PEFT saves it: without the adapter's."""
    end = rf"\.{re.escape(adapter)}(?=\.|$)"
    return re.sub(rf"(\.lora_\w+){end}|\.modules_to_save{end}", lambda match: match[1] or "", name)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ArgumentError("the checkpoint has a LoRA adapter, and peft is missing: pip install peft.") from None
    return peft
