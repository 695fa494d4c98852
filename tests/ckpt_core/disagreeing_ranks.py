"""What two ranks do in the tests of agreement: each call is made with something that is not the same on both."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_ranks import Outcome, attempt
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ckpt_core import AsyncSaver, PyTorchCheckpoint, io, native_checkpoint
from ckpt_core.io import DigestWriter

LARGE = 600_000


class Model(nn.Module):
    """Some parameters and a buffer, none of them sharded."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, last: str = "last", rows: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2, 2)
        self.add_module(last, nn.Linear(2, rows, dtype=dtype))
        self.register_buffer("seen", torch.zeros(2))


class Interrupted(Model):
    """Is interrupted on rank 1 while it is filled."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        if dist.get_rank() == 1:
            raise KeyboardInterrupt
        super()._load_from_state_dict(*arguments)


def one(value: Any, other: Any = None) -> Any:
    """Return `value` on rank 0 and `other` on rank 1."""
    return value if dist.get_rank() == 0 else other


def adam(model: nn.Module, *, reverse: bool = False) -> torch.optim.Optimizer:
    """Return an optimizer of two groups that has stepped."""
    groups = [{"params": [p], "lr": 0.1 + number} for number, p in enumerate(model.parameters())]
    optimizer = torch.optim.AdamW(groups[::-1] if reverse else groups)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def changed(model: Model) -> Model:
    """Return the model with one number that is another one on rank 1."""
    with torch.no_grad():
        model.first.weight[1, 1] += dist.get_rank()
    return model


def save(directory: Path) -> dict[str, Outcome]:
    """Save in many ways that the ranks disagree on; return each outcome, and at last that of a good save."""
    model = Model()
    checkpoint = PyTorchCheckpoint(model)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer := adam(model))

    def to(saved: PyTorchCheckpoint, place: Path = directory, step: int = 1, **named: Any) -> Callable[[], Any]:
        return lambda: saved.save(place, step=step, **named)

    def in_background() -> None:
        with AsyncSaver(directory) as saver:
            saver.save(PyTorchCheckpoint(changed(Model())), step=1)

    def natively(**named: Any) -> Callable[[], Any]:
        return lambda: native_checkpoint.save_checkpoint(model, str(directory / "weights"), **named)

    path = str(directory / "optimizer")
    calls = {
        "run": to(checkpoint, run=one("a", "b")),
        "store": to(checkpoint, directory / one("a", "b")),
        "unknown store": to(checkpoint, one(directory, "nosuchscheme://x")),
        "step": to(checkpoint, step=one(1, 2)),
        "module": to(PyTorchCheckpoint(one(model), {"a": 1})),
        "optimizer": to(PyTorchCheckpoint(model, None, one(optimizer))),
        "scheduler": to(PyTorchCheckpoint(model, None, optimizer), scheduler=one(schedule)),
        "trainer": to(checkpoint, trainer=one({"epoch": 1})),
        "counters": to(checkpoint, trainer={"position": dist.get_rank()}),
        "metrics": to(checkpoint, metrics=one(None, {"loss": 1.0})),
        "lineage": to(checkpoint, lineage={"from": one("x", "y")}),
        "assets": to(checkpoint, assets=one(directory)),
        "hyperparameters": to(PyTorchCheckpoint(model, {"local_rank": dist.get_rank()})),
        "stages": to(PyTorchCheckpoint(Model(last=one("last", "other")))),
        "dtype": to(PyTorchCheckpoint(Model(dtype=one(torch.float32, torch.bfloat16)))),
        "shape": to(PyTorchCheckpoint(Model(rows=one(2, 3)))),
        "weights": to(PyTorchCheckpoint(changed(Model()))),
        "in background": in_background,
        "groups": to(PyTorchCheckpoint(model, None, adam(model, reverse=one(False, True)))),
        "native weights": lambda: native_checkpoint.save_checkpoint(changed(Model()), str(directory / "weights")),
        "native optimizer": natively(optimizer=one(optimizer), optimizer_path=path),
        "native path": natively(optimizer=optimizer, optimizer_path=one(path)),
    }
    said = {name: attempt(call) for name, call in calls.items()}
    with torch.no_grad():
        model.seen += 1 + dist.get_rank()
    same = {"step": 2, "scheduler": schedule, "trainer": {"rate": float("nan")}, "metrics": {"loss": float("nan")}}
    saved = attempt(to(PyTorchCheckpoint(model, {"a": 1}, optimizer), **same))
    return {**said, "at last": Outcome(saved.value.url if saved.value else None, saved.errors, saved.text)}


def save_parts(directory: Path) -> dict[str, Outcome]:
    """Save sharded and replicated tensors that are not what they seem; return each outcome."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(8.0)
    rank = dist.get_rank()
    shards = distribute_tensor(whole, mesh, [Shard(0)])
    replica = distribute_tensor(whole, mesh, [Replicate()])
    replica.to_local()[7] += rank
    odd = DTensor.from_local(torch.ones(4 + rank), mesh, [Shard(0)], shape=torch.Size([8]), stride=(1,))
    large = torch.zeros(LARGE)
    large[-1] = rank
    same = {"w": shards, "list": ["a", 1.5, None], "nan": float("nan")}
    states = {
        "a tuple of parts": {"pair": (shards, 1)},
        "a sum": {"sum": DTensor.from_local(whole, mesh, [Partial()])},
        "replicas": {"replica": replica},
        "a large tensor": {"large": large},
        "a value": {"value": rank},
        "a set": {"value": {"x", f"{rank}"}},
        "kind": {"w": one(shards, whole)},
        "parts of another size": {"odd": odd},
    }
    said = {
        name: attempt(io.save, state, directory / str(number)) for number, (name, state) in enumerate(states.items())
    }
    said["same"] = attempt(io.save, same, directory / "same")
    stock = DigestWriter(directory / "dtype")
    typed = DTensor.from_local(torch.ones(4, dtype=one(torch.float32, torch.bfloat16)), mesh, [Shard(0)])
    said["dtype by dcp"] = attempt(dcp.save, {"w": typed}, storage_writer=stock)
    said["without collectives"] = attempt(
        dcp.save, {"w": shards}, storage_writer=DigestWriter(directory / "none"), use_collectives=False
    )
    dist.barrier()
    dist.destroy_process_group()
    warnings.simplefilter("ignore")  # torch says that there is no process group
    alone = directory / f"alone_{rank}"
    said["alone"] = attempt(io.save, {"w": shards}, alone)
    said["alone by dcp"] = attempt(dcp.save, {"w": shards}, storage_writer=DigestWriter(alone / "dcp"), no_dist=True)
    return said


def restore(directory: Path) -> dict[str, Outcome]:
    """Restore in ways that the ranks disagree on; return each outcome, and at last that of a good restore."""
    model = Model()
    optimizer = adam(model)
    saved = [PyTorchCheckpoint(model, None, optimizer).save(directory, step=step) for step in (1, 2)]
    groups = [[model.first.weight], [p for p in model.parameters() if p is not model.first.weight]]
    divided = torch.optim.AdamW([{"params": group} for group in groups])
    native = (str(directory / "weights"), optimizer, None, str(directory / "optimizer"))
    native_checkpoint.save_checkpoint(model, *native)
    calls = {
        "module": lambda: saved[0].restore(one(model)),
        "optimizer": lambda: saved[0].restore(model, one(optimizer)),
        "scheduler alone": lambda: saved[0].restore(model, scheduler=one(optimizer)),
        "checkpoint": lambda: saved[dist.get_rank()].restore(model),
        "groups": lambda: saved[0].restore(model, one(optimizer, divided)),
        "interrupt": lambda: saved[0].restore(Interrupted()),
        "model": lambda: saved[0].restore(Model(rows=one(2, 3))),
        "native optimizer": lambda: native_checkpoint.load_checkpoint(
            model, native[0], one(optimizer), None, native[3]
        ),
        "native path": lambda: native_checkpoint.load_checkpoint(model, native[0], optimizer, None, one(native[3])),
    }
    said = {name: attempt(call) for name, call in calls.items()}
    return {**said, "at last": attempt(saved[1].restore, model, optimizer)}
