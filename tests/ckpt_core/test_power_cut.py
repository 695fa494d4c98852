"""What a save said that it committed is there after a power cut.

The store lies on an ext4 image that hardly ever writes by itself. A copy of the image, while it is mounted, is what a
disk would hold if the power failed at that moment; mounted in its turn, it has its journal replayed.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fault_client import FaultServer

IMAGE_BYTES = 64 << 20
OPTIONS = "loop,commit=300,noatime"


def _run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _why_not():
    """Return why no image can be mounted here, or None."""
    if os.geteuid() != 0:
        return "mounting needs root"
    missing = [tool for tool in ("mkfs.ext4", "mount", "umount", "cp") if shutil.which(tool) is None]
    return f"{missing[0]} is not installed" if missing else None


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))


@contextmanager
def mounted(image, place):
    """Mount an image; whatever happens, it is unmounted, and its loop device is free again."""
    place.mkdir(exist_ok=True)
    done = _run("mount", "-o", OPTIONS, str(image), str(place))
    if done.returncode:
        pytest.skip(f"an ext4 image cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        if _run("umount", str(place)).returncode:
            _run("umount", "--lazy", str(place))


@pytest.fixture
def server():
    """What saves; it ends with the test."""
    server = FaultServer()
    yield server
    server.close()


@pytest.fixture
def disk(tmp_path):
    """An image with an empty file system, in memory where there is room."""
    memory = Path("/dev/shm")
    place = memory / f"power-cut-{os.getpid()}" if os.access(memory, os.W_OK) else tmp_path / "disk"
    place.mkdir()
    try:
        image = place / "image"
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        eager = ["-E", "lazy_itable_init=0,lazy_journal_init=0"]  # else the kernel writes in the background
        assert _run("mkfs.ext4", "-q", "-F", *eager, str(image)).returncode == 0
        yield image
    finally:
        shutil.rmtree(place)


@dataclass
class Cuts:
    """Cuts the power again and again, and looks at what is left."""

    server: FaultServer
    image: Path
    found: list = field(default_factory=list)
    """What was there after each cut."""

    wrong: list = field(default_factory=list)

    def cut(self):
        """Copy the image as it is."""
        assert _run("cp", "--sparse=always", str(self.image), str(self._copy)).returncode == 0

    def look(self, committed, where):
        """Mount the copy, and compare what is in it with the steps whose saves had returned."""
        try:
            with mounted(self._copy, self.image.with_name("after")) as place:
                steps = self.server.every(place / "store")
        finally:
            self._copy.unlink()
        whole = isinstance(steps, list) and steps[: len(committed)] == committed and len(steps) <= len(committed) + 1
        self.wrong += [] if whole else [f"{where}: {committed} had been saved; there was {steps}"]
        self.found.append(steps)

    @property
    def _copy(self):
        return self.image.with_name("copy")


def save(server, store, step, ranks):
    """Save a step; return how many seconds it took."""
    server.prepare(store, step, ranks)
    start = time.monotonic()
    server.go()
    assert server.outcomes() == ["committed"] * ranks
    return time.monotonic() - start


def stop(processes):
    """Stop processes wherever they are; return those that had not ended."""
    alive = []
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
            alive.append(process)
    for process in alive:
        while _state(process) not in "TZX":  # a flush that has begun goes on to its end
            time.sleep(0.001)
    return [process for process in alive if _state(process) == "T"]


def _state(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def save_with_cut(cuts, store, committed, ranks, delay):
    """Save the next step, and cut the power some seconds after it began; return whether it was not at its end."""
    processes = cuts.server.prepare(store, committed[-1] + 1, ranks)
    cuts.server.go()
    time.sleep(delay)
    alive = stop(processes)
    try:
        if alive:
            cuts.cut()
    finally:
        for process in alive:
            os.kill(process, signal.SIGCONT)
        assert cuts.server.outcomes() == ["committed"] * ranks
    if alive:
        cuts.look(committed, f"{delay:.3f} s after the beginning of step {committed[-1] + 1}")
    return bool(alive)


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.long)], ids=["short", "long"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_power_cut(server, disk, capsys, rounds, ranks):
    """After a power cut every step is there whose save had returned, bit for bit, and what else is there is whole."""
    draw, cuts = random.Random(rounds), Cuts(server, disk)
    with mounted(disk, disk.with_name("before")) as place:
        (place / "assets").mkdir()
        (place / "assets" / "vocabulary.txt").write_text("a b c")
        store = place / "store"
        seconds, committed, during = min(save(server, store, step, ranks) for step in (1, 2)), [1, 2], 0
        while during < rounds:
            cuts.cut()
            cuts.look(committed, f"just after step {committed[-1]}")
            if save_with_cut(cuts, store, committed, ranks, draw.uniform(0, seconds)):
                during += 1
            else:
                seconds *= 0.9  # it was faster than that
            committed.append(committed[-1] + 1)
        cuts.cut()
        cuts.look(committed, f"just after step {committed[-1]}")
    with capsys.disabled():
        print(f"\n{len(cuts.found)} power cuts, {ranks} ranks, {during} of them during a save; {len(cuts.wrong)} wrong")
    assert not cuts.wrong, "\n".join(cuts.wrong)
