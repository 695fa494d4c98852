"""The place of this process among the ranks: its number, its device, and the group it speaks to."""

from __future__ import annotations

import os
import platform
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ckpt_core.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Place:
    """One rank of the default process group."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    """`gloo` or `nccl`: what moves tensors between the devices. CPU tensors always move by gloo."""

    def mesh(self) -> DeviceMesh:
        """Collective. Return all ranks as a mesh of one dimension."""
        return init_device_mesh(self.device.type, (self.world_size,))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Collective. Return the sums of the values over all ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def hardware(self) -> dict[str, Any]:
        """Describe what training runs on, in JSON types."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else _cpu_name(),
            "device_type": self.device.type,
            "backend": self.backend,
            "world_size": self.world_size,
            "torch": torch.__version__,
        }


def _cpu_name() -> str:
    """Return the processor's name where Linux tells it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


@contextmanager
def join(device: str) -> Iterator[Place]:
    """Collective. Join the ranks that torchrun started, or make a group of one where it did not.

    Args:
        device: `cpu`, `cuda` or `auto`; on CUDA each rank takes the GPU of its local number.

    Raises:
        ArgumentError: there is no GPU for this rank.
    """
    chosen = _device(device)
    _make_deterministic(chosen)
    on_cuda = chosen.type == "cuda"
    alone: dict[str, Any] = {"store": HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        device_id=chosen if on_cuda else None,
        **({} if "WORLD_SIZE" in os.environ else alone),
    )
    yield Place(dist.get_rank(), dist.get_world_size(), chosen, "nccl" if on_cuda else "gloo")
    # Not after an error: others may wait in a collective that this rank will never join.
    dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= found:
        raise ArgumentError(
            f"device {name!r}: rank {number} of this machine needs a GPU of its own, {found} were found; "
            "lower `compute.ranks` or set `compute.device` to 'cpu'"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _make_deterministic(device: torch.device) -> None:
    """Let equal runs give equal bits: where an operation has no deterministic form, torch says so."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if device.type == "cpu":
        torch.set_num_threads(1)  # the number of threads decides the order of sums
    else:
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # their backward passes add in any order
        torch.backends.cuda.enable_cudnn_sdp(False)
