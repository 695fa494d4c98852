"""What ranks do in the tests of exports: divide small transformers models among them in several ways, and save."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from small_transformers import model_of
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ckpt_core.native_checkpoint import load_checkpoint, save_checkpoint

Mesh = tuple[int, ...]

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "fc1")
_BY_COLUMNS = ("o_proj", "out_proj", "down_proj", "fc2")
_OF_EXPERTS = {"gate_up_proj": Shard(1), "down_proj": Shard(2)}


def build(name: str, dtype: str) -> PreTrainedModel:
    """Return a whole model, its floating-point tensors in `dtype`."""
    return model_of(name).to(getattr(torch, dtype))


def place_of(directory: Path, name: str, dtype: str) -> Path:
    """Return where `save` puts a model's DCP directory."""
    return directory / f"{name} {dtype}"


def save(directory: Path, jobs: Iterable[tuple[str, str]], mesh: Mesh) -> None:
    """Save models, by name and dtype, from all ranks of a mesh: `(fsdp,)`, or `(fsdp, tensor parallel)`."""
    axes = init_device_mesh("cpu", mesh, mesh_dim_names=("fsdp", "tensor")[: len(mesh)])
    for name, dtype in jobs:
        model = build(name, dtype)
        if len(mesh) == 2:
            _divide_matrices(model, axes["tensor"])
        _divide_rows(model, axes["fsdp"])
        save_checkpoint(model, str(place_of(directory, name, dtype)))


def save_safetensors(directory: Path, names: Iterable[str]) -> None:
    """Save models by torch's writer of safetensors: each rank a file, with its rows of each tensor."""
    for name in names:
        model = build(name, "float32")
        _divide_rows(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        writer = HuggingFaceStorageWriter(str(directory / name), save_distributed=True)
        dcp.save(model.state_dict(), storage_writer=writer)


def train_on(config: Path, imported: Path, target: Path) -> None:
    """Load an imported checkpoint into a model that FSDP2 divides among all ranks, and save it."""
    model = AutoModel.from_config(AutoConfig.from_pretrained(config))
    _divide_rows(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    load_checkpoint(model, str(imported))
    save_checkpoint(model, str(target))


def ranks_of(mesh: Mesh) -> int:
    """Return how many ranks a mesh has."""
    return math.prod(mesh)


def _divide_rows(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to each layer, then to the rest; it cannot divide a single number."""
    numbers = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=numbers)


def _divide_matrices(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Apply tensor parallelism to the linear layers of attention and feed-forward blocks, and inside each expert."""
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and name in _BY_ROWS + _BY_COLUMNS:
            parallelize_module(module, mesh, ColwiseParallel() if name in _BY_ROWS else RowwiseParallel())
        if name == "experts":
            for kind, placement in _OF_EXPERTS.items():
                whole = module.get_parameter(kind)
                setattr(module, kind, nn.Parameter(distribute_tensor(whole.detach(), mesh, [placement])))
