"""What ranks do in the tests of optimizers: train sharded modules, save them, and go on from what was saved."""

import warnings
from pathlib import Path
from typing import Any

import torch
from gloo_ranks import Outcome, attempt
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from ckpt_core import AsyncSaver, PyTorchCheckpoint
from ckpt_core.native_checkpoint import load_checkpoint, save_checkpoint


class Factors(torch.optim.Optimizer):
    """Keeps state whose layout does not follow from its shape."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: D102 - torch's
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    mesh = p.device_mesh
                    everywhere = [Replicate()] * mesh.ndim
                    state["total"] = distribute_tensor(torch.zeros(()), mesh, everywhere)
                    state["rows"] = p.grad.new_zeros(p.shape[:1])
                    state["whole"] = distribute_tensor(torch.zeros(p.shape), mesh, everywhere)
                    state["pair"] = (torch.zeros(2, 2), [torch.zeros_like(p), {7: p.clone()}])
                layouts = [type(state["total"]), type(state["pair"][0]), state["whole"].placements[0]]
                assert layouts == [DTensor, torch.Tensor, Replicate()], layouts
                assert state["pair"][1][1][7].placements == p.placements
                assert isinstance(state["rows"], DTensor)
                state["rows"] += p.grad.full_tensor().reshape(len(p), -1).sum(1)[0]
                state["total"] += p.grad.full_tensor().sum()
                state["whole"] += p.grad.redistribute(placements=state["whole"].placements)
                state["pair"][0].add_(1)
                state["pair"][1][0].add_(p.grad)
                p.add_(state["whole"].redistribute(placements=p.placements) + state["pair"][1][0], alpha=-0.01)


MAKERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "factors": Factors,
}


def build(seed: int, name: str, *, meshes: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a module whose rows no number of ranks divides, sharded on one or more dimensions, and an optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    size = torch.distributed.get_world_size()
    shape, names = ((size,), ("shard",)) if meshes == 1 else ((size // 2, 2), ("replicate", "shard"))
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model, MAKERS[name](model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    """Take steps, all ranks on the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(4, 4, generator=generator)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return both states, with whole tensors."""
    return [_whole(dict(model.state_dict())), _whole(optimizer.state_dict())]


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _whole(entry) for key, entry in value.items()}
    return type(value)(map(_whole, value)) if isinstance(value, (list, tuple)) else value


def save(directory: Path) -> dict[str, list[Any]]:
    """Train with each optimizer, save, now and in the background, and return the states then and two steps later."""
    found: dict[str, list[Any]] = {}
    for name in MAKERS:
        model, optimizer = build(0, name)
        train(model, optimizer, 2, seed=1)
        PyTorchCheckpoint(model, None, optimizer).save(directory / name, step=1)
        with AsyncSaver(directory / name) as saver:
            saver.save(PyTorchCheckpoint(model, None, optimizer), step=2)
        found[name] = whole(model, optimizer)
        train(model, optimizer, 2, seed=2)
        found[name] += whole(model, optimizer)
    return found


def restore(directory: Path, meshes: int) -> dict[str, list[Any]]:
    """Restore each, once from each step, and return the states then and two steps later."""
    found: dict[str, list[Any]] = {}
    for name in MAKERS:
        for step in (1, 2):
            model, optimizer = build(5, name, meshes=meshes)
            PyTorchCheckpoint.from_url(directory / name / "default" / f"step_{step:010d}").restore(model, optimizer)
            states = whole(model, optimizer)
            train(model, optimizer, 2, seed=2)
            found[f"{name} {step}"] = states + whole(model, optimizer)
    return found


def use_fsdp1(directory: Path) -> dict[str, Outcome]:
    """Save and load modules that FSDP1 shards, with an optimizer and without."""
    found: dict[str, Outcome] = {}
    warnings.simplefilter("ignore")  # FSDP1 is deprecated
    for original in (True, False):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        model = FullyShardedDataParallel(plain, device_id=torch.device("cpu"), use_orig_params=original)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        place = directory / str(original)
        paths = (str(place / "both"), optimizer, None, str(place / "o"))
        found[f"save {original}"] = attempt(save_checkpoint, model, *paths)
        found[f"left {original}"] = Outcome(place.exists() and [path.name for path in place.iterdir()])
        found[f"store {original}"] = attempt(PyTorchCheckpoint(model, None, optimizer).save, place / "s", step=1)
        found[f"model {original}"] = attempt(save_checkpoint, model, str(place / "w"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        found[f"load {original}"] = attempt(load_checkpoint, model, str(place / "w"))
        with FullyShardedDataParallel.summon_full_params(model):
            found[f"loaded {original}"] = Outcome({n: t.clone() for n, t in plain.state_dict().items()})
        found[f"initial {original}"] = Outcome(expected)
    return found
