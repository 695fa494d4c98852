"""What a rank of the benchmarks can do: the library's operations, and the baselines that they are compared with."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conversion import meta_llama
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

from ckpt_core import PyTorchCheckpoint, io
from ckpt_core.async_save import AsyncSaver
from ckpt_core.native_checkpoint import ModelState, load_checkpoint, save_checkpoint

WIDTH = 4096


class State:
    """A rank's part of a model of float32 matrices, as wide as those of a model of some billion parameters."""

    def __init__(self, rank: int, count: int, megabytes: int) -> None:
        mesh = init_device_mesh("cpu", (count,))
        rows = max(1, megabytes * 10**6 // count // (4 * WIDTH))
        sizes = [1024] * (rows // 1024) + [rows % 1024] * bool(rows % 1024)
        self._rank = rank
        self.model = _Matrices(sizes, mesh, seed=rank)
        self.nbytes = sum(t.nbytes for t in self._locals())
        self._saver: AsyncSaver | None = None
        self._copies: list[torch.Tensor] = []

    def timed(self, operation: str, *arguments: Any) -> float:
        """Run an operation when all ranks are ready; return its seconds."""
        dist.barrier()
        began = time.perf_counter()
        getattr(self, operation)(*arguments)
        return time.perf_counter() - began

    def stock_save(self, directory: Path) -> None:
        """`dcp.save` as it comes."""
        dcp.save({"model": ModelState(self.model)}, checkpoint_id=str(directory))

    def native_save(self, directory: Path) -> None:
        """Save through NeMo-RL's interface: with CRC32s."""
        save_checkpoint(self.model, str(directory))

    def store_save(self, store: Path, step: int) -> None:
        """Commit a step to a store: with CRC32s, and a digest of each file."""
        PyTorchCheckpoint(self.model).save(store, step=step)

    def save_llama(self, config: Path, directory: Path) -> None:
        """Save random parameters of a Llama, of which each rank has some rows."""
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        generator = torch.Generator().manual_seed(self._rank)
        state = {name: zeros(t.shape, device_mesh=mesh, placements=[Shard(0)]) for name, t in _llama(config).items()}
        for tensor in state.values():
            tensor.to_local().normal_(generator=generator)
        io.save({"model": state}, directory)

    def plain_write(self, directory: Path) -> None:
        """Write the same bytes to a file, and flush it to the device."""
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / f"{self._rank}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for tensor in self._locals():
            data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            while data:
                data = data[os.write(handle, data[: 64 << 20]) :]
        os.fsync(handle)
        os.close(handle)

    def stock_load(self, directory: Path) -> None:
        """`dcp.load` as it comes."""
        dcp.load({"model": ModelState(self.model)}, checkpoint_id=str(directory))

    def native_load(self, directory: Path) -> None:
        """Load through NeMo-RL's interface: every CRC32 checked."""
        load_checkpoint(self.model, str(directory))

    def copy(self) -> None:
        """Copy the state in memory, into memory that was used before."""
        if not self._copies:
            self._copies = [torch.zeros_like(tensor) for tensor in self._locals()]
        for copy, tensor in zip(self._copies, self._locals(), strict=True):
            copy.copy_(tensor)

    def async_save(self, store: Path, step: int) -> float:
        """Begin to save in the background; return the seconds for which that kept training from going on."""
        if self._saver is None:
            self._saver = AsyncSaver(store)
        dist.barrier()
        began = time.perf_counter()
        self._saver.save(PyTorchCheckpoint(self.model), step=step)
        return time.perf_counter() - began

    def finish(self) -> None:
        """Wait for the save in the background."""
        assert self._saver is not None
        self._saver.wait()

    def peak_beyond(self, operation: str, *arguments: Any) -> float:
        """Return how much anonymous memory an operation takes at most beyond what there is, in 10^6 bytes."""
        dist.barrier()
        before, peak, over = _anonymous(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.002):
                peak = max(peak, _anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        getattr(self, operation)(*arguments)
        over.set()
        watcher.join()
        return max(0, peak - before) / 1e6

    def close(self) -> None:
        """End what runs in the background."""
        if self._saver is not None:
            self._saver.close()

    def _locals(self) -> list[torch.Tensor]:
        return [p.detach().to_local() for p in self.model.parameters()]


class _Matrices(nn.Module):
    """Matrices of which each rank holds some rows."""

    def __init__(self, rows: list[int], mesh: DeviceMesh, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for number, count in enumerate(rows):
            part = torch.empty(count, WIDTH).normal_(generator=generator)
            whole = DTensor.from_local(part, mesh, [Shard(0)])
            self.register_parameter(f"matrix_{number:03d}", nn.Parameter(whole))


def _llama(config: Path) -> dict[str, torch.Tensor]:
    return dict(meta_llama(config).state_dict())


def _anonymous() -> int:
    """Return the bytes of memory that this process has to itself."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def read_slice(directory: Path, parts: int, dimension: int) -> tuple[int, int, int]:
    """Load one part of many of each matrix, in a process of its own, as one rank of as many would.

    Returns:
        The bytes that the process read, those of the part, and those of all matrices.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ckpt_core.format.index import read_index
    from ckpt_core.io import SafeLoadPlanner, SafeReader

    dist.init_process_group("fake", rank=parts // 2, world_size=parts, store=FakeStore())
    mesh = init_device_mesh("cpu", (parts,))
    tensors = read_index(directory).tensors
    state = {n: zeros(e.shape, device_mesh=mesh, placements=[Shard(dimension)]) for n, e in tensors.items()}
    before = _read_bytes()
    dcp.load(state, storage_reader=SafeReader(directory), planner=SafeLoadPlanner(directory), no_dist=True)
    read = _read_bytes() - before
    return read, sum(t.to_local().nbytes for t in state.values()), sum(e.nbytes for e in tensors.values())


def _read_bytes() -> int:
    """Return how many bytes this process has read from files."""
    [line] = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])
