"""Trainings on GPUs take turns by slots of a global concurrency limit; a limit of any name counts on any machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path

import httpx
import pytest
from prefect import flow, get_client, task
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from small_retrain import REPOSITORY, TINY, tiny_step

from ckpt_core.errors import ArgumentError
from tasks import gpu_slots as module
from tasks.config import ComputeSettings, Job
from tasks.gpu_slots import gpu_slots
from tasks.training import train

pytestmark = pytest.mark.usefixtures("prefect_home")


@pytest.fixture
def limit(prefect_home: Path) -> str:
    """A global concurrency limit of two slots."""
    name = f"gpu-{uuid.uuid4().hex[:8]}"
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=2))
    return name


def held(limit: str) -> int:
    """Return how many slots of a limit are taken."""
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(limit).active_slots


def on_gpus(limit: str | None, ranks: int = 2) -> ComputeSettings:
    """Return settings of a training on GPUs, which nothing looks for."""
    return ComputeSettings(ranks=ranks, device="cuda", gpu_slots=limit)


@task
def hold(compute: ComputeSettings, seconds: float = 0.0, error: BaseException | None = None) -> tuple[float, float]:
    """Train for a while, or fail; return begin and end."""
    with gpu_slots(compute):
        begin = time.monotonic()
        if error:
            raise error
        time.sleep(seconds)
        return begin, time.monotonic()


@flow
def training(compute: ComputeSettings, seconds: float = 0.0) -> tuple[float, float]:
    """One flow with one training."""
    return hold(compute, seconds)


def test_two_trainings_of_all_slots_do_not_overlap(limit: str):
    """The second begins when the first has ended, and each holds as many slots as it has ranks."""
    spans: list[tuple[float, float]] = []
    contexts = [copy_context() for _ in range(2)]
    threads = [
        threading.Thread(target=context.run, args=(lambda: spans.append(training(on_gpus(limit), 1.0)),))
        for context in contexts
    ]
    for thread in threads:
        thread.start()
    seen: set[int] = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(held(limit))
        time.sleep(0.05)
    (_, first_end), (second_begin, _) = sorted(spans)
    assert second_begin >= first_end
    assert seen <= {0, 2}
    assert 2 in seen
    assert held(limit) == 0


class Cancelled(BaseException):
    """Stands for Prefect's, which are no `Exception` either."""


@pytest.mark.parametrize("error", [ValueError("failed"), Cancelled()])
def test_a_training_that_fails_or_is_cancelled_gives_its_slots_back(limit: str, error: BaseException):
    """However it ends, the next one can begin."""

    @flow
    def failing() -> None:
        hold(on_gpus(limit), error=error)

    with pytest.raises(type(error)):
        failing()
    assert held(limit) == 0


@pytest.mark.parametrize(
    "compute",
    [
        ComputeSettings(device="cuda"),
        ComputeSettings(device="cpu", gpu_slots="never-made"),
        ComputeSettings(device="auto", gpu_slots="never-made"),
    ],
)
def test_nothing_is_counted_on_a_cpu_or_without_a_name(compute: ComputeSettings, tmp_path: Path, monkeypatch):
    """No limit is asked for; `auto` means a CPU where the driver shows no GPU."""
    monkeypatch.setattr(module, "GPUS", tmp_path / "none")
    begin, end = training(compute)
    assert end >= begin


def test_a_limit_that_is_not_there_is_an_error_before_training(tmp_path: Path):
    """It names the setting, the limit and the command that makes it; nothing is started."""
    job = Job(
        store=tmp_path.as_uri(),
        run="tiny",
        start_step=0,
        end_step=4,
        seed=0,
        model=TINY,
        step=tiny_step(),
        compute=on_gpus("never-made"),
        tokenizer="-",
        train_tokens="-",
        heldout_tokens="-",
    )

    @flow
    def one() -> None:
        train(job)

    with pytest.raises(
        ArgumentError, match=r"compute.gpu_slots is 'never-made', .*prefect gcl create never-made --lim"
    ):
        one()


def test_more_ranks_than_slots_are_an_error(limit: str):
    """It would wait for ever."""
    with pytest.raises(ArgumentError, match=r"training takes 3 slots of the global concurrency limit .*, which has 2"):
        training(on_gpus(limit, ranks=3))


HOLDER = """
import sys, time
from prefect import flow, task
from tasks.config import ComputeSettings
from tasks.gpu_slots import gpu_slots

@flow
def holding():
    with_slots()

@task
def with_slots():
    with gpu_slots(ComputeSettings(ranks=2, device="cuda", gpu_slots=sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)

holding()
"""


@contextmanager
def server(root: Path) -> Iterator[str]:
    """Run a server with all its services, which the temporary one has not; yield its API's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PREFECT_HOME": str(root), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port), "--no-ui"]
    with (root / "log").open("wb") as log, subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log) as run:
        try:
            wait_for_health(f"http://127.0.0.1:{port}/api/health")
            yield f"http://127.0.0.1:{port}/api"
        finally:
            run.send_signal(signal.SIGINT)


def wait_for_health(url: str) -> None:
    """Return when a server answers."""
    for _ in range(240):
        with suppress(httpx.TransportError):
            if httpx.get(url).is_success:
                return
        time.sleep(1)
    raise AssertionError(f"{url} does not answer")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_holder_keeps_its_slots_until_the_lease_ends(tmp_path: Path):
    """After SIGKILL the slots are free again by themselves, some 300 s later."""
    with server(tmp_path) as url, httpx.Client(base_url=url, timeout=60) as api:
        api.post("/v2/concurrency_limits/", json={"name": "gpu", "limit": 2}).raise_for_status()
        env = {**os.environ, "PREFECT_API_URL": url}
        command = [sys.executable, "-c", HOLDER, "gpu"]
        with subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert any("held" in line for line in holder.stdout)
            holder.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert api.get("/v2/concurrency_limits/gpu").json()["active_slots"] == 2
        while api.get("/v2/concurrency_limits/gpu").json()["active_slots"]:
            assert time.monotonic() - killed < 400
            time.sleep(2)
        print(f"free again {time.monotonic() - killed:.0f} s after the kill")
