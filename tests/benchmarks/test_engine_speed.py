"""How fast the checkpoint engine saves, loads and verifies, and what memory and reading that takes."""

import multiprocessing
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from operations import read_slice
from rank_pool import files_in, timed

from ckpt_core.store import step_name
from ckpt_core.verify import verify

pytestmark = pytest.mark.timeout(1800)


def test_native_save_in_memory(race: Any, pool: Any, memory: Path, clean: Any) -> None:
    """Saving through the native face, CRC32s included, against `dcp.save`, on memory-backed storage."""
    race.run(
        "native save, in memory",
        "dcp.save",
        ours=lambda: pool.seconds("native_save", memory / "ours"),
        theirs=lambda: pool.seconds("stock_save", memory / "stock"),
        between=clean(memory / "ours", memory / "stock"),
        at_least=1.5,
    )


def test_store_save_in_memory(race: Any, pool: Any, memory: Path, clean: Any) -> None:
    """Committing a step, CRC32s and file digests included, against `dcp.save`, on memory-backed storage."""
    race.run(
        "commit to a store, in memory",
        "dcp.save",
        ours=lambda: pool.seconds("store_save", memory / "ours", 1),
        theirs=lambda: pool.seconds("stock_save", memory / "stock"),
        between=clean(memory / "ours", memory / "stock"),
        at_least=1.5,
    )


def test_store_save_on_disk(race: Any, pool: Any, disk: Path, clean: Any) -> None:
    """Committing a step against a plain write and fsync of the same bytes, on a disk."""
    race.run(
        "commit to a store, on disk",
        "write + fsync",
        ours=lambda: pool.seconds("store_save", disk / "ours", 1),
        theirs=lambda: pool.seconds("plain_write", disk / "plain"),
        between=clean(disk / "ours", disk / "plain"),
        at_most=1.2,
    )


def test_load(race: Any, pool: Any, memory: Path) -> None:
    """Loading with every CRC32 checked against `dcp.load`, which checks none."""
    pool.run("stock_save", memory / "stock")
    race.run(
        "load, checked",
        "dcp.load",
        ours=lambda: pool.seconds("native_load", memory / "stock"),
        theirs=lambda: pool.seconds("stock_load", memory / "stock"),
        at_least=3,
    )


def test_async_save(race: Any, pool: Any, memory: Path) -> None:
    """How long a save in the background keeps training waiting, from the second on, against a copy of the state."""
    steps = count(1)

    def save() -> float:
        step = next(steps)
        blocked = max(pool.run("async_save", memory / "async", step))
        pool.run("finish")
        shutil.rmtree(memory / "async" / "default" / step_name(step))
        return blocked

    save()
    race.run(
        "async save, blocked",
        "copy in memory",
        ours=save,
        theirs=lambda: pool.seconds("copy"),
        at_most=1.3,
    )


def test_verify(race: Any, pool: Any, memory: Path) -> None:
    """Verifying digests, CRC32s and values against `sha256sum` of the same files, one process for each core."""
    pool.run("store_save", memory / "store", 1)
    step = memory / "store" / "default" / step_name(1)
    command = ["xargs", "-0", "-P", str(multiprocessing.cpu_count()), "-n", "1", "sha256sum"]
    names = b"\0".join(bytes(path) for path in files_in(step))

    def check() -> None:
        assert verify(step).passed

    race.run(
        "verify",
        "sha256sum",
        ours=lambda: timed(check),
        theirs=lambda: timed(lambda: subprocess.run(command, input=names, stdout=subprocess.DEVNULL, check=True)),
        at_least=5,
    )


@pytest.mark.parametrize("operation", ["native_save", "store_save", "native_load"])
def test_memory(race: Any, benchmark: Any, pool: Any, memory: Path, clean: Any, operation: str) -> None:
    """Saving and loading take less than 200 MB beyond the state itself, in each rank."""
    arguments = [memory / "ours", 1] if operation == "store_save" else [memory / "ours"]
    if operation == "native_load":
        pool.run("native_save", memory / "ours")
    peaks: list[float] = []
    benchmark.pedantic(lambda: peaks.extend(pool.run("peak_beyond", operation, *arguments)), rounds=1)
    peak = max(peaks)
    benchmark.extra_info["megabytes"] = peak
    race.note(operation, "memory of the state", peak, "less than 200 MB more", good=peak < 200, detail=f"{peak:.0f} MB")
    assert peak < 200


@pytest.mark.parametrize("dimension", [0, 1], ids=["rows", "columns"])
def test_slice(race: Any, benchmark: Any, pool: Any, memory: Path, dimension: int) -> None:
    """Loading a hundredth of each matrix, some rows or some columns, reads at most a fiftieth of the bytes."""
    pool.run("native_save", memory / "ours")

    def load() -> None:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            found.append(child.submit(read_slice, memory / "ours", 100, dimension).result())

    found: list[tuple[int, int, int]] = []
    benchmark.pedantic(load, rounds=1)
    read, wanted, whole = found[0]
    assert wanted <= read <= whole / 50
    kind = "columns" if dimension else "rows"
    race.note(f"1 % of the {kind}", "all bytes", read / whole, "at most 0.02", good=True, detail=f"{read / 1e6:.1f} MB")
