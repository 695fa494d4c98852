"""What ranks do in the tests of resharding: train on meshes of one dimension (FSDP2) or two (and tensor parallel)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckpt_core import PyTorchCheckpoint
from ckpt_core.native_checkpoint import load_checkpoint, save_checkpoint

WHOLE = StateDictOptions(full_state_dict=True)
Mesh = tuple[int, ...]


class Block(nn.Module):
    """Matrices that tensor parallelism divides by columns and by rows, and others with rows that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return five numbers for each token."""
        hidden = self.embed(numbers)
        return self.head(self.norm(hidden + self.down(self.up(hidden).relu())))


def build(mesh: Mesh, seed: int, steps: int) -> tuple[Block, torch.optim.Optimizer]:
    """Return a model that was trained for some steps on a mesh: none, `(fsdp,)` or `(fsdp, tensor parallel)`."""
    torch.manual_seed(seed)
    model = Block()
    if len(mesh) == 2:
        both = init_device_mesh("cpu", mesh, mesh_dim_names=("fsdp", "tensor"))
        parallelize_module(model, both["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=both["fsdp"])
    elif mesh:
        fully_shard(model, mesh=init_device_mesh("cpu", mesh))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randint(0, 11, (12,))).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def whole(model: Block, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the states as if nothing were divided; of several ranks, the first has them."""
    return [
        get_model_state_dict(model, options=WHOLE),
        get_optimizer_state_dict(model, optimizer, options=WHOLE)["state"],
    ]


def save(directory: Path, mesh: Mesh) -> list[Any]:
    """Train, save through both interfaces, and return the whole state."""
    model, optimizer = build(mesh, seed=0, steps=3)
    save_checkpoint(model, str(directory / "w"), optimizer, optimizer_path=str(directory / "o"))
    PyTorchCheckpoint(model, None, optimizer).save(directory / "store", step=3)
    return whole(model, optimizer)


def load(directory: Path, mesh: Mesh) -> list[list[Any]]:
    """Restore through both interfaces into models that are somewhere else; return the whole states."""
    found: list[list[Any]] = []
    model, optimizer = build(mesh, seed=1, steps=1)
    load_checkpoint(model, str(directory / "w"), optimizer, optimizer_path=str(directory / "o"))
    found.append(whole(model, optimizer))
    model, optimizer = build(mesh, seed=2, steps=0)
    PyTorchCheckpoint.from_url(directory / "store" / "default" / "step_0000000003").restore(model, optimizer)
    return [*found, whole(model, optimizer)]
