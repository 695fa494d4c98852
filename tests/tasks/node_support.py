"""What the tests of several nodes share: further nodes as processes, machines as network namespaces, jobs of ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from programs.probe import MARK, PROGRAMS, wait_until
from worker_support import REPOSITORY, TINY

from tasks.config import ComputeSettings, Job, TrainingStep

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROGRAMS)}


class Program:
    """A running program, and the lines that it has printed so far."""

    def __init__(self, command: list[str], mark: str) -> None:
        env = {**ENVIRONMENT, MARK: mark}
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip("\n") for line in iter(self.process.stdout.readline, ""))

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Return when a line has `text`."""
        wait_until(lambda: any(text in line for line in list(self.lines)), seconds)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return how the program ended."""
        self.process.send_signal(number)
        return self.close()

    def close(self, seconds: float = 60) -> int:
        """Wait for the end, and return how it was."""
        code = self.process.wait(seconds)
        self._reader.join(seconds)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def node(store: Path, mark: str, *, prefix: tuple[str, ...] = ()) -> Program:
    """Start a further node for the run `tiny` of a store."""
    return Program([*prefix, sys.executable, "-m", "tasks.node", str(store), "tiny"], mark)


def light_job(store: Path, port: int, does: str, *, until: int = 0, **compute: Any) -> Job:
    """Return a job of two nodes whose ranks import no torch: what they do, and how few of them end by themselves."""
    settings: dict[str, Any] = {"ranks": 1, "nodes": 2, "rendezvous": f"127.0.0.1:{port}", "trainer": "node_rank"}
    return Job(
        store=str(store),
        run="tiny",
        start_step=0,
        end_step=4,
        seed=0,
        model=TINY,
        step=TrainingStep(batch_size=8),
        compute=ComputeSettings(**settings | {"grace_seconds": 1} | compute),
        tokenizer="-",
        train_tokens="-",
        heldout_tokens="-",
        lineage={"does": does, "until": until},
    )


@contextmanager
def machines() -> Generator[Mapping[str, tuple[str, ...]]]:
    """Two network namespaces with a cable between them: by address, what to put before a command to run it there."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program `ip`")
    tag = uuid.uuid4().hex[:8]
    names = {"10.213.77.1": f"first-{tag}", "10.213.77.2": f"other-{tag}"}
    made: list[str] = []
    try:
        for name in names.values():
            if _ip("netns", "add", name).returncode:
                pytest.skip("network namespaces cannot be made here")
            made.append(name)
        ends = [f"a{tag}", f"b{tag}"]
        assert _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]).returncode == 0
        for end, (address, name) in zip(ends, names.items(), strict=True):
            for command in (
                ["link", "set", end, "netns", name],
                ["-n", name, "addr", "add", f"{address}/24", "dev", end],
                ["-n", name, "link", "set", end, "up"],
                ["-n", name, "link", "set", "lo", "up"],
            ):
                done = _ip(*command)
                assert done.returncode == 0, done.stderr
        yield {address: ("ip", "netns", "exec", name) for address, name in names.items()}
    finally:
        for name in made:
            _ip("netns", "delete", name)


def unplug(place: tuple[str, ...]) -> None:
    """Pull the cable of a machine: what it sends is lost, and nobody is told."""
    name = place[-1]
    assert _ip("-n", name, "link", "set", f"b{name.partition('-')[2]}", "down").returncode == 0


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=30)
