"""What child processes do in the tests of imports: kept apart, so that a child imports no more than it needs."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from small_models import assert_same
from small_transformers import model_of
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from ckpt_core.errors import ExportError
from ckpt_core.export.imports import import_hf
from ckpt_core.native_checkpoint import load_checkpoint


def import_when_continued(source: str, target: str) -> None:
    """Stop until the tracer is there, then import."""
    os.kill(os.getpid(), signal.SIGSTOP)
    import_hf(Path(source), Path(target))


def import_with_little_room(source: str, target: str) -> None:
    """Import where no file may be larger than 15,000 bytes; exit with the number of the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, resource.RLIM_INFINITY))
    try:
        import_hf(Path(source), Path(target))
    except ExportError as error:
        os._exit(getattr(error.__cause__, "errno", 1))


def load_in_rank(name: str, directory: str) -> dict[str, torch.Tensor]:
    """Load a model into FSDP2 and, by plain dcp.load, into DTensors; return its state if they agree."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = model_of(name, seed=dist.get_rank() + 1)
    state: dict[str, Any] = {n: distribute_tensor(t.clone(), mesh, [Shard(0)]) for n, t in model.state_dict().items()}
    fully_shard(model, mesh=mesh)
    load_checkpoint(model, directory)
    dcp.load({"model": state}, checkpoint_id=directory)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    divided = {name: tensor.full_tensor() for name, tensor in state.items()}
    if dist.get_rank() == 0:
        assert_same(dict(whole), divided)
    return divided
