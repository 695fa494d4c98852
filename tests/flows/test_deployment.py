"""The deployments, as a team uses them: a real server, a process worker started elsewhere, and a run by hand."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from small_retrain import REPOSITORY

from ckpt_core.verify import verify

pytestmark = pytest.mark.timeout(600)
MARK = "CKPTFLOW_DEPLOYMENT_TEST"
PREFECT = [sys.executable, "-m", "prefect"]


@dataclass(frozen=True)
class Server:
    """A Prefect server with all deployments, and the environment in which its programs run."""

    url: str
    env: dict[str, str]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Ask the API."""
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def prefect(self, *arguments: str) -> str:
        """Run the prefect command in the repository's root, where the README says to; return what it printed."""
        command = [*PREFECT, *arguments]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self.env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deployment(self, flow: str) -> dict[str, Any]:
        """Return what the API tells of a flow's only deployment."""
        [found] = self.post("/deployments/filter", {"flows": {"name": {"any_": [flow]}}})
        return found


def readme_commands() -> list[list[str]]:
    """Return the arguments of the README's prefect commands, but for the one that starts a server on a fixed port."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = readme.partition("```sh\nprefect server start --background\n")[2].partition("```")[0]
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert len(commands) == 4
    return commands


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a free port with a home of its own, both work pools, and the project's deployments."""
    root = tmp_path_factory.mktemp("server")
    port = free_port()
    env = {
        **os.environ,
        MARK: str(root),
        "PREFECT_HOME": str(root / "home"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    with running([*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)], env, root):
        made = Server(f"http://127.0.0.1:{port}/api", env)
        wait_until(lambda: healthy(made.url), seconds=240)
        for arguments in readme_commands():
            made.prefect(*arguments)
        yield made
    assert marked(str(root)) == []


def free_port() -> int:
    """Return a port of this machine's that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def healthy(url: str) -> bool:
    """Return whether a Prefect server answers."""
    with suppress(OSError), urlopen(f"{url}/health", timeout=5) as answer:
        return answer.status == 200
    return False


def wait_until(reached: Callable[[], bool], *, seconds: float) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not reached in {seconds} s"
        time.sleep(0.5)


@contextmanager
def running(command: list[str], env: dict[str, str], directory: Path) -> Iterator[None]:
    """Run a program that serves until it is stopped: by SIGINT, and by SIGKILL if that takes long."""
    with (directory / f"{command[3]}.log").open("wb") as log:
        program = subprocess.Popen(command, cwd=directory, env=env, stdout=log, stderr=log)
        try:
            yield
        finally:
            program.send_signal(signal.SIGINT)
            try:
                program.wait(timeout=60)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


def marked(mark: str) -> list[int]:
    """Return the processes that this test started and that still run, after giving them a moment to end."""
    entry = f"{MARK}={mark}".encode()
    left: list[int] = []
    for _ in range(40):
        left = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if entry in environ.read_bytes().split(b"\0"):
                    left.append(int(environ.parent.name))
        if not left:
            break
        time.sleep(0.5)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def test_the_nightly_retrain_is_scheduled(server: Server):
    """It runs at two o'clock on the pool `gpu`, one at a time; another one is cancelled."""
    nightly = server.deployment("retrain")
    assert nightly["name"] == "nightly"
    assert nightly["work_pool_name"] == "gpu"
    assert nightly["entrypoint"] == "flows/retrain.py:retrain"
    [schedule] = nightly["schedules"]
    assert schedule["active"]
    assert schedule["schedule"] == {"cron": "0 2 * * *", "timezone": "Etc/UTC", "day_or": True}
    assert nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert nightly["global_concurrency_limit"]["limit"] == 1


def test_the_form_has_nested_groups(server: Server):
    """The schema that the UI makes its form from has groups with descriptions, plain defaults, limits and choices."""
    schema = server.deployment("retrain")["parameter_openapi_schema"]
    assert schema.get("required", []) == []
    assert "the directory that holds runs" in schema["properties"]["store"]["description"]
    groups = schema["definitions"]
    assert groups["TrainingStep"]["properties"]["steps"]["minimum"] == 1
    assert groups["TrainingStep"]["properties"]["learning_rate"]["description"] == "The peak of the cosine schedule."
    assert groups["ComputeSettings"]["properties"]["device"]["enum"] == ["auto", "cpu", "cuda"]
    assert groups["DataSettings"]["properties"]["source"]["default"] == "python-stdlib"
    assert all(group["additionalProperties"] is False for group in groups.values())
    assert schema["properties"]["compute"]["default"]["ranks"] == 2
    assert [step["name"] for step in schema["properties"]["steps"]["default"]] == ["pretrain", "finetune"]


def test_conversion_by_hand_needs_a_url_alone(server: Server):
    """The deployment has no schedule, stands on the pool `cpu`, and requires nothing but the checkpoint."""
    by_hand = server.deployment("convert")
    assert by_hand["name"] == "by-hand"
    assert by_hand["work_pool_name"] == "cpu"
    assert by_hand["schedules"] == []
    assert by_hand["parameter_openapi_schema"]["required"] == ["checkpoint"]


@pytest.mark.parametrize(("flow", "required"), [("publish", ["export"]), ("rollback", ["store", "run", "repo", "to"])])
def test_releases_are_made_and_taken_back_by_hand(server: Server, flow: str, required: list[str]):
    """Both deployments have no schedule and stand on the pool `cpu`; no field of theirs takes a token."""
    by_hand = server.deployment(flow)
    assert (by_hand["name"], by_hand["work_pool_name"], by_hand["schedules"]) == ("by-hand", "cpu", [])
    assert by_hand["entrypoint"] == f"flows/{flow}.py:{flow}"
    schema = by_hand["parameter_openapi_schema"]
    assert schema["required"] == required
    assert "token" not in schema["properties"]


def test_a_worker_converts_a_checkpoint(server: Server, checkpoint: Path, tmp_path: Path):
    """`prefect deployment run` with a URL ends Completed on a worker started elsewhere, with export and artifacts."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with running([*PREFECT, "worker", "start", "--pool", "cpu"], server.env, elsewhere):
        server.prefect("deployment", "run", "convert/by-hand", "--param", f"checkpoint={checkpoint.as_uri()}")
        wait_until(lambda: ended(server) is not None, seconds=300)
        flow_run = ended(server)
    assert flow_run is not None
    assert (flow_run["state_type"], flow_run["name"]) == ("COMPLETED", "convert step_0000000004")
    assert verify(checkpoint.parent / "exports" / "step_0000000004").passed
    made = server.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run["id"]]}}})
    assert {artifact["key"] for artifact in made} == {"validation-tiny", "export-tiny", "export-check-tiny"}


def ended(server: Server) -> dict[str, Any] | None:
    """Return the flow run of the convert deployment when it has ended."""
    flow_runs = server.post("/flow_runs/filter", {"flows": {"name": {"any_": ["convert"]}}})
    return next((run for run in flow_runs if run["state"]["type"] in {"COMPLETED", "FAILED", "CRASHED"}), None)
