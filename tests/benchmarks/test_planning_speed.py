"""How long it takes to plan the conversion of a checkpoint of thousands of ranks, and how much memory."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from ckpt_core.format.index import METADATA_NAME, TWIN_NAME, Chunk, Index, Span, TensorEntry, read_index, twin_bytes

pytestmark = pytest.mark.timeout(1800)

ZIP_BYTES = 1312
"""What a chunk's zip takes beside its elements, about."""

PLAN = """
import sys, time
from pathlib import Path
from ckpt_core.export.architecture import Architecture
from ckpt_core.export.plan import make_plan
from ckpt_core.export.recipe import copy_of
from ckpt_core.export.shard import shard_bytes, shards_of
from ckpt_core.format.index import read_index
place = Path(sys.argv[1])
began = time.perf_counter()
index = read_index(place)
read = time.perf_counter() - began
shapes = {name: entry.shape for name, entry in index.tensors.items()}
recipes = {name: copy_of(name, shape) for name, shape in shapes.items()}
model = Architecture("Model", shapes, {}, recipes, frozenset(), frozenset(), dict.fromkeys(shapes, "bfloat16"))
plan = make_plan(index, model, dtype="bfloat16", max_shard_bytes=10**8, where=str(place))
units = [shard_bytes(shard) for shard in shards_of(plan, place)]
whole = time.perf_counter() - began
[peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(read, whole, int(peak.split()[1]) * 1024 / 1e6, sum(len(entry.chunks) for entry in index.tensors.values()))
assert "torch" not in sys.modules
"""
"""Plans a conversion and nothing else. Its own peak is VmHWM; `ru_maxrss` outlives exec, so it has the parent's too."""


@dataclass(frozen=True)
class Stored:
    """One tensor's chunk on one rank: some rows from `start`, in `length` bytes from `offset` of the rank's file."""

    tensor: int
    rank: int
    start: int
    rows: int
    offset: int
    length: int


@dataclass(frozen=True)
class Model:
    """Tensors like those of a language model; FSDP2 shards their rows over ranks, each of which writes one file."""

    ranks: int
    tensors: int

    def name(self, tensor: int) -> str:
        """Return a name as transformers has them: a new string each time, as each rank sends its own."""
        parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm")
        return f"model.layers.{tensor // len(parts)}.{parts[tensor % len(parts)]}.weight"

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Return the shape in elements, of matrices and a vector in each layer; the last rank has a row less."""
        rows = self.ranks * (2 + tensor % 5) - 1
        return (rows,) if tensor % 5 == 4 else (rows, 4096)

    def stored(self) -> Iterator[Stored]:
        """Yield all chunks, rank by rank."""
        for rank in range(self.ranks):
            offset = 0
            for tensor in range(self.tensors):
                rows, *rest = self.shape(tensor)
                each = -(-rows // self.ranks)
                start = rank * each
                count = min(each, rows - start)
                length = 4 * prod((count, *rest)) + ZIP_BYTES
                yield Stored(tensor, rank, start, count, offset, length)
                offset += length

    def write_twin(self, directory: Path) -> None:
        """Write the metadata as this library does; the pickle beside it is only digested, so any bytes will do."""
        chunks: list[list[Chunk]] = [[] for _ in range(self.tensors)]
        for one in self.stored():
            rest = self.shape(one.tensor)[1:]
            span = Span(f"__{one.rank}_0.distcp", one.offset, one.length)
            chunks[one.tensor].append(Chunk((one.start, *(0 for _ in rest)), (one.rows, *rest), span))
        names = [self.name(tensor) for tensor in range(self.tensors)]
        entries = {name: TensorEntry("float32", self.shape(t), tuple(chunks[t])) for t, name in enumerate(names)}
        index, pickled = (
            Index(entries, {}, {name: ("model", name) for name in names}),
            bytes(150 * self.ranks * self.tensors),
        )
        (directory / TWIN_NAME).write_bytes(twin_bytes(index, pickled))
        (directory / METADATA_NAME).write_bytes(pickled)

    def write_pickle(self, directory: Path) -> None:
        """Write the metadata as `dcp.save` does: a rank's chunks share the name of its file, and nothing else."""
        import torch
        from torch.distributed.checkpoint import metadata as dcp
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        chunks: list[list[Any]] = [[] for _ in range(self.tensors)]
        storage: dict[Any, Any] = {}
        file = ""
        for one in self.stored():
            file = f"__{one.rank}_0.distcp" if one.tensor == 0 else file
            rest = self.shape(one.tensor)[1:]
            start = [one.start, *(0 for _ in rest)]
            chunks[one.tensor].append(dcp.ChunkStorageMetadata(torch.Size(start), torch.Size([one.rows, *rest])))
            key = dcp.MetadataIndex(self.name(one.tensor), torch.Size(start), one.rank)
            storage[key] = _StorageInfo(file, one.offset, one.length)
        properties = [dcp.TensorProperties(dtype=torch.float32) for _ in range(self.tensors)]
        items: Any = {
            self.name(t): dcp.TensorStorageMetadata(properties[t], torch.Size(self.shape(t)), chunks[t])
            for t in range(self.tensors)
        }
        paths: Any = {name: ("model", name) for name in items}
        metadata = dcp.Metadata(items, paths, storage, dcp.StorageMeta(directory), "1.0.0")
        with (directory / METADATA_NAME).open("wb") as target:
            pickle.dump(metadata, target)


WRITERS = {"JSON twin": Model.write_twin, "stock pickle": Model.write_pickle}
BOTH = pytest.mark.parametrize("form", list(WRITERS))


@BOTH
def test_planning(race: Any, benchmark: Any, measuring: bool, tmp_path: Path, form: str) -> None:
    """A million chunks of 2,000 ranks are read and planned in at most a minute and 4 GB; fewer in a part of that."""
    model = Model(2000, 500) if measuring else Model(200, 100)
    with ProcessPoolExecutor(1, get_context("spawn")) as child:  # writing takes memory too
        child.submit(WRITERS[form], model, tmp_path).result()
    for rank in range(model.ranks):
        (tmp_path / f"__{rank}_0.distcp").touch()  # of the data only sizes and times matter here
    answers: list[str] = []

    def plan() -> None:
        command = [sys.executable, "-c", PLAN, str(tmp_path)]
        answers.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    benchmark.pedantic(plan, rounds=1)
    read, seconds, megabytes, chunks = (float(number) for number in answers[0].split())
    most = 4000 if measuring else 150
    what = f"plan of {chunks:,.0f} chunks, {form}"
    benchmark.extra_info.update(seconds=seconds, megabytes=megabytes)
    race.note(
        what,
        "seconds",
        seconds,
        "at most 60 s",
        good=seconds <= 60,
        detail=f"{seconds:.1f} s, {read:.1f} of them to read",
    )
    race.note(what, "memory", megabytes, "at most 4,000 MB", good=megabytes <= most, detail=f"{megabytes:.0f} MB")
    assert chunks == model.ranks * model.tensors
    assert megabytes <= most


def test_twin_and_pickle_say_the_same(tmp_path: Path) -> None:
    """What both forms of the metadata of one model say is equal, so that their figures are of the same work."""
    model = Model(20, 30)
    for form, write in WRITERS.items():
        (tmp_path / form).mkdir()
        write(model, tmp_path / form)
    twin, pickled = (read_index(tmp_path / form) for form in WRITERS)
    assert twin == pickled
    assert list(twin.tensors) == list(pickled.tensors)
