"""Traffic of a release: what is new is sent once; all is read to be hashed, and what is sent a second time."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckpt_core.testing.hub_server import HubServer, hub_server

SHARDS = 4
# One call a line, with the path of the file that a descriptor stands for: `read(7</tmp/a>, ""..., 16) = 16`.
READ = re.compile(r"(?:read|readv|pread64|preadv|preadv2)\([^<]*<([^>]*)>.*= (\d+)$")

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="counts the bytes that are read with strace")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """A local Hub."""
    with hub_server(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def megabytes(pytestconfig: pytest.Config, measuring: bool) -> int:
    """Size of one shard, in 10^6 bytes."""
    return pytestconfig.getoption("megabytes") // 10 // SHARDS if measuring else 2


def test_traffic(race: Any, benchmark: Any, server: HubServer, megabytes: int, tmp_path: Path) -> None:
    """A release reads each byte to hash it, and once more to send it; the same one again reads and sends none."""
    export = tmp_path / "export"
    write_export(export, [1, 2, 3, 4], megabytes)
    shard = (export / shard_name(0)).stat().st_size
    whole, small = SHARDS * shard, shard // 10
    first = benchmark.pedantic(lambda: publish(export, server, tmp_path), rounds=1)
    again = publish(export, server, tmp_path)
    write_export(export, [1, 2, 9, 4], megabytes)
    changed = publish(export, server, tmp_path)
    for what, (read, sent), hashed, new in (
        ("first release", first, whole, whole),
        ("unchanged release", again, 0, 0),
        ("release of one new shard of 4", changed, whole, shard),
    ):
        assert hashed <= read < hashed + new + small  # what is sent may still be in the client's memory
        assert new <= sent < new + small
        goal, detail = f"{(hashed + new) / whole:.2f}", f"{read / 1e6:.2f} MB read, {sent / 1e6:.2f} MB sent"
        race.note(what, "bytes of the release", read / whole, goal, good=True, detail=detail)


def publish(export: Path, server: HubServer, tmp_path: Path) -> tuple[int, int]:
    """Publish; return how many bytes of the export were read, and how many were sent."""
    server.requests.clear()
    log = tmp_path / "calls"
    tracer = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", "trace=read,readv,pread64,preadv,preadv2"]
    command = [str(Path(sys.executable).with_name("ckpt")), "publish", str(export), "team/model"]
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = [*tracer, *command, "--endpoint", server.endpoint, "--json"]
    subprocess.run(done, env=environment, stdout=subprocess.DEVNULL, check=True)
    calls = (READ.search(line) for line in log.read_text(errors="replace").splitlines())
    read = sum(int(call[2]) for call in calls if call and Path(call[1]).is_relative_to(export))
    return read, sum(request.received for request in server.requests)


def write_export(directory: Path, seeds: list[int], megabytes: int) -> None:
    """Write an export of shards of random numbers."""
    directory.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds):
        numbers = np.random.default_rng(seed).random(megabytes * 125_000)
        save_file({f"weight.{number}": numbers}, directory / shard_name(number))
    owners = {f"weight.{number}": shard_name(number) for number in range(SHARDS)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "export.json"}
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    record = {"format_version": 1, "source": {"digest": "sha256:1"}, "files": entries, "rules": [], "libraries": {}}
    (directory / "export.json").write_text(json.dumps(record))


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
