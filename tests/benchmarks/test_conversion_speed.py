"""How fast a checkpoint becomes safetensors, against a copy of its files, a digest of them, and other converters."""

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conversion import llama_config
from rank_pool import RankPool, files_in, timed

pytestmark = pytest.mark.timeout(3600)
HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def checkpoint(pytestconfig: pytest.Config, measuring: bool, memory_root: Path) -> Iterator[tuple[Path, Path]]:
    """A Llama's DCP directory, saved by two ranks in memory-backed storage, and its config."""
    megabytes = pytestconfig.getoption("megabytes") if measuring else 20
    config = llama_config(megabytes, memory_root / "config")
    ranks = RankPool(2, 1)
    ranks.run("save_llama", config, memory_root / "dcp")
    ranks.close()
    yield memory_root / "dcp", config
    shutil.rmtree(memory_root / "dcp")


def convert(checkpoint: tuple[Path, Path], target: Path, *options: str) -> dict[str, Any]:
    """Convert as a user does, to files of at most 900 MB; return what the command says of itself."""
    shutil.rmtree(target, ignore_errors=True)
    dcp, config = checkpoint
    command = [str(BIN / "ckpt"), "convert", str(dcp), str(target), "--model", str(config), "--json"]
    command += ["--max-shard-size", "900MB", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def other_way(name: str, checkpoint: tuple[Path, Path], target: Path) -> float:
    """Convert in another way; return the seconds, imports not counted."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, str(HERE / "conversion.py"), name, *map(str, checkpoint), str(target)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])["write_s"]


def test_against_a_copy(race: Any, checkpoint: Any, memory: Path) -> None:
    """Without a cast or digests, against `cp` of the checkpoint's files."""
    copies = count()

    def copy() -> float:
        target = memory / f"copy{next(copies)}"
        seconds = timed(lambda: subprocess.run(["cp", "-r", checkpoint[0], target], check=True))
        shutil.rmtree(target)
        return seconds

    race.run(
        "convert, no cast, no digests",
        "cp",
        ours=lambda: convert(checkpoint, memory / "hf", "--no-digest")["write_s"],
        theirs=copy,
        at_most=1.0,
    )


@pytest.mark.long
def test_against_a_digest(race: Any, checkpoint: Any, memory: Path) -> None:
    """Cast to bfloat16, with CRC32s, sha256, statistics and the search for NaN, against `sha256sum` of the output."""
    convert(checkpoint, memory / "written", "--dtype", "bfloat16")
    names = b"\0".join(bytes(path) for path in files_in(memory / "written"))
    command = ["xargs", "-0", "-P", str(multiprocessing.cpu_count()), "-n", "1", "sha256sum"]
    race.run(
        "convert to bf16, all checks",
        "sha256sum of the output",
        ours=lambda: convert(checkpoint, memory / "hf", "--dtype", "bfloat16")["write_s"],
        theirs=lambda: timed(lambda: subprocess.run(command, input=names, stdout=subprocess.DEVNULL, check=True)),
        at_most=1.0,
    )


@pytest.mark.long
@pytest.mark.parametrize(("name", "goal"), [("through_torch_save", 7), ("through_a_model", 15)])
def test_against_others(few: Any, checkpoint: Any, memory: Path, name: str, goal: float) -> None:
    """Without a cast, against `dcp_to_torch_save` and saving again, and against a live model and `save_pretrained`."""
    few.run(
        "convert, no cast, no digests",
        {"through_torch_save": "dcp_to_torch_save + save", "through_a_model": "model + save_pretrained"}[name],
        ours=lambda: convert(checkpoint, memory / "hf", "--no-digest")["write_s"],
        theirs=lambda: other_way(name, checkpoint, memory / "other"),
        at_least=goal,
    )


@pytest.mark.long
def test_with_all_checks(few: Any, checkpoint: Any, memory: Path) -> None:
    """Without a cast, with CRC32s, sha256, statistics and the search for NaN, against a live model as well."""
    few.run(
        "convert, no cast, all checks",
        "model + save_pretrained",
        ours=lambda: convert(checkpoint, memory / "hf")["write_s"],
        theirs=lambda: other_way("through_a_model", checkpoint, memory / "other"),
        at_least=5,
    )


@pytest.mark.long
def test_startup(race: Any, checkpoint: Any, memory: Path) -> None:
    """From the start of the process to the first byte, against importing one class of transformers."""
    command = [sys.executable, "-c", "from transformers import LlamaForCausalLM"]
    race.run(
        "start-up of convert",
        "import LlamaForCausalLM",
        ours=lambda: convert(checkpoint, memory / "hf", "--no-digest")["startup_s"],
        theirs=lambda: timed(lambda: subprocess.run(command, check=True)),
        at_most=1.2,
    )


def test_memory(race: Any, benchmark: Any, checkpoint: Any, memory: Path) -> None:
    """Converting takes less than 150 MB of anonymous memory beyond `import torch`, however large the model."""
    torch_alone = _peak_anonymous([sys.executable, "-c", "import torch, time; time.sleep(0.5)"])
    dcp, config = checkpoint
    command = [
        str(BIN / "ckpt"),
        "convert",
        str(dcp),
        str(memory / "hf"),
        "--model",
        str(config),
        "--dtype",
        "bfloat16",
        "--max-shard-size",  # so that files are written at the same time
        "500MB",
    ]
    peaks: list[float] = []
    benchmark.pedantic(lambda: peaks.append(_peak_anonymous(command)), rounds=1)
    beyond = peaks[0] - torch_alone
    said = f"{beyond:.0f} MB"
    race.note("convert", "memory of `import torch`", beyond, "less than 150 MB more", good=beyond < 150, detail=said)
    assert beyond < 150


def _peak_anonymous(command: list[str]) -> float:
    """Return the largest amount of anonymous memory that a process had, in 10^6 bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            break
        found = [line for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, int(found[0].split()[1]) * 1024 if found else 0)
        time.sleep(0.002)
    assert process.wait() == 0
    return peak / 1e6
