"""What child processes do in the tests: kept apart from the tests, so that a child imports no more than it needs."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_models import layers, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ckpt_core import durable, io
from ckpt_core.errors import ExportError
from ckpt_core.export import convert, plan_export
from ckpt_core.export.assets import read_assets
from ckpt_core.native_checkpoint import save_checkpoint, save_tokenizer_on_rank0
from ckpt_core.urls import place_of


class Words:
    """A tokenizer that writes two files, one of them in a directory below."""

    def save_pretrained(self, directory: str) -> None:
        """Write them."""
        Path(directory, "tokenizer.json").write_text("{}")
        Path(directory, "extra").mkdir()
        Path(directory, "extra", "merges.txt").write_text("a b")


class FailingWords(Words):
    """A tokenizer that cannot be written."""

    def save_pretrained(self, directory: str) -> None:
        """Fail."""
        raise PermissionError(f"{directory}: not yours")


def training(*, steps: int = 2, seed: int = 0) -> tuple[nn.ModuleList, torch.optim.Optimizer, Any]:
    """Return a model, its Adam and a scheduler after some steps."""
    model = layers(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    train(model, optimizer, scheduler, steps)
    return model, optimizer, scheduler


def save_when_continued(weights: str, optimizer_path: str, tokenizer_path: str) -> None:
    """Stop until the tracer is there, then save."""
    model, optimizer, scheduler = training(steps=1)
    os.kill(os.getpid(), signal.SIGSTOP)
    save_checkpoint(model, weights, optimizer, scheduler, optimizer_path, Words(), tokenizer_path)


def save_tokenizer_on_each_rank(directory: str, *, fail: bool) -> list[str]:
    """Save a tokenizer from every rank; return what this one sees right after."""
    path = Path(directory, "tokenizer")
    if dist.get_rank() == 0:
        path.mkdir()
    tokenizer = FailingWords() if fail else Words()
    save_tokenizer_on_rank0(tokenizer, str(path))
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def convert_when_continued(directory: str, assets: str, target: str, overwrite: bool) -> None:
    """Stop until the tracer is there, then convert."""
    given = read_assets(Path(assets))
    plan_export(Path(directory), given)
    os.kill(os.getpid(), signal.SIGSTOP)
    convert(Path(directory), Path(target), assets=given, overwrite=overwrite)


def convert_with_little_room(directory: str, assets: str, target: str) -> None:
    """Convert where no file may be larger than 15,000 bytes; exit with the number of the error."""
    given = read_assets(Path(assets))
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, resource.RLIM_INFINITY))
    try:
        convert(Path(directory), Path(target), assets=given)
    except ExportError as error:
        os._exit(getattr(error.__cause__, "errno", 1))


def convert_until_killed(directory: str, target: str, settings: Any, nbytes: int, part_bytes: int) -> None:
    """Convert to a URL, one file after the other, and be killed when so many bytes of tensors were written."""
    durable._PART_BYTES = part_bytes

    def kill(done: int, _: int) -> None:
        if done >= nbytes:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(Path(directory), place_of(target), workers=1, progress=kill, **settings)


def save_as(state_file: str, directory: str, layout: str) -> None:
    """Save a state dict from all ranks, each with its part: rows, columns or rectangles of the matrices."""
    state = torch.load(state_file, weights_only=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("outer", "inner"))
    placements = {"rows": [Replicate(), Shard(0)], "columns": [Replicate(), Shard(1)], "both": [Shard(0), Shard(1)]}
    for name, tensor in state.items():
        state[name] = distribute_tensor(tensor, mesh, placements[layout] if tensor.dim() == 2 else [Replicate()] * 2)
    io.save({"model": state}, Path(directory))
