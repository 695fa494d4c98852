"""The deployments, as a team uses them: the stack that one command sets up, and runs by hand and by event."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import uuid4

import pytest
from small_retrain import PROGRAMS, REPOSITORY

from ckpt_core.verify import verify

pytestmark = pytest.mark.timeout(600)
MARK = "CKPTFLOW_DEPLOYMENT_TEST"
CRASHED_AFTER_S = 60
ON_COMMIT = "ckptflow: convert on commit"
SETTING_UP = ["up", "--gpus", "2", "--crashed-after", str(CRASHED_AFTER_S)]


@dataclass(frozen=True)
class Stack:
    """A stack in a home of its own, and the environment in which its commands run."""

    root: Path
    port: int
    env: dict[str, str]

    @property
    def home(self) -> Path:
        """Where the stack keeps what is its own."""
        return self.root / "home" / "ckptflow"

    @property
    def login(self) -> str:
        """What the server asks for."""
        return (self.home / "login").read_text().strip()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API."""
        headers = {
            "Content-Type": "application/json",
            "Authorization": "Basic " + base64.b64encode(self.login.encode()).decode(),
        }
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{self.port}/api{path}", data, headers, method=method)
        for _ in range(30):
            try:
                with urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or b"null")
            except HTTPError as error:
                if error.code != 503:  # SQLite was locked for too long: Prefect's own client asks again too
                    raise
            time.sleep(1)
        raise AssertionError(f"{path}: unavailable for half a minute")

    def post(self, path: str, body: Any) -> Any:
        """Ask the API for something that a body describes."""
        return self.ask("POST", path, body)

    def command(self, *arguments: str, status: int = 0) -> str:
        """Run a module in the repository's root; return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=REPOSITORY,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def stack(self, *arguments: str, status: int = 0) -> str:
        """Run a command of the stack."""
        return self.command("deployments.stack", *arguments, status=status)

    def deployments(self, flow: str) -> dict[str, dict[str, Any]]:
        """Return what the API tells of a flow's deployments, by name."""
        found = self.post("/deployments/filter", {"flows": {"name": {"any_": [flow]}}})
        return {each["name"]: each for each in found}

    def flow_run(self, flow: str) -> dict[str, Any] | None:
        """Return the newest flow run of a flow, if it has one."""
        body = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 1}
        return next(iter(self.post("/flow_runs/filter", body)), None)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack on a free port, stopped at the end; nothing that it started is left then."""
    root = tmp_path_factory.mktemp("stack")
    env = {
        **os.environ,
        MARK: str(root),
        "PREFECT_HOME": str(root / "home"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    made = Stack(root, free_port(), env)
    try:
        made.stack(*SETTING_UP, "--port", str(made.port))
        yield made
    finally:
        made.stack("down")
        left = marked(str(root))
    assert left == []


@pytest.fixture(scope="module", autouse=True)
def lost(stack: Stack) -> str:
    """A flow run whose process was killed as soon as it ran: nobody is left to tell of it. Returns its id."""
    env = {**stack.env, "PREFECT_PROFILE": "ckptflow"}
    command = [sys.executable, str(PROGRAMS / "idle_flow.py")]
    with (stack.root / "idle.log").open("wb") as log:
        program = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: heard_of(stack), seconds=120)
        finally:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()
    flow_run = stack.flow_run("idle")
    assert flow_run is not None
    return flow_run["id"]


def heard_of(stack: Stack) -> bool:
    """Whether the server has written down a heartbeat."""
    found = stack.post("/events/filter", {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}}})
    return found["total"] > 0


def free_port() -> int:
    """Return a port of this machine's that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(reached: Callable[[], Any], *, seconds: float) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not reached in {seconds} s"
        time.sleep(0.5)


def marked(mark: str) -> list[int]:
    """Return the processes that this test started and that still run, after giving them a moment to end."""
    entry = f"{MARK}={mark}".encode()
    left: list[int] = []
    for _ in range(20):
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


def test_the_server_asks_for_a_login(stack: Stack):
    """Who does not know it is refused; it is in no log, and only in files that nobody else may read."""
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"http://127.0.0.1:{stack.port}/api/work_pools/gpu", timeout=30)
    secret = stack.login.partition(":")[2]
    assert len(secret) >= 32
    holders = {path for path in stack.root.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()}
    assert holders == {stack.home / "login", stack.root / "home" / "profiles.toml"}
    assert {path.stat().st_mode & 0o777 for path in holders} == {0o600}


def test_setting_up_again_mends_what_is_missing(stack: Stack):
    """A worker that died is started; pools, queues, limits, deployments, automations and processes stay the same."""
    before, running = inventory(stack), pids(stack)
    os.killpg(running["worker-gpu"], signal.SIGKILL)
    assert "worker-gpu   not running" in stack.stack("status", status=1)
    said = stack.stack(*SETTING_UP)
    assert f"Prefect is at http://127.0.0.1:{stack.port}; it asks for the login in {stack.home / 'login'}." in said
    assert stack.login not in said
    assert inventory(stack) == before
    assert {name for name, pid in pids(stack).items() if pid != running[name]} == {"worker-gpu"}


def inventory(stack: Stack) -> dict[str, dict[str, str]]:
    """Return the names of all that is set up, by id; a deployment's own automations are made anew by each deploying."""
    listed = {
        "pools": stack.post("/work_pools/filter", {}),
        "queues": stack.post("/work_queues/filter", {}),
        "limits": stack.post("/v2/concurrency_limits/filter", {}),
        "deployments": stack.post("/deployments/filter", {}),
    }
    found = {kind: {each["id"]: each["name"] for each in all_} for kind, all_ in listed.items()}
    automations = stack.post("/automations/filter", {})
    lasting = [each for each in automations if each["name"] != ON_COMMIT]
    assert len(automations) == len({each["name"] for each in automations}) == 3
    return {**found, "automations": {each["id"]: each["name"] for each in lasting}}


def test_gpus_are_shared_out(stack: Stack):
    """The limit `gpu` has the slots that were asked for."""
    assert stack.ask("GET", "/v2/concurrency_limits/gpu")["limit"] == 2


def test_background_work_is_done_singly(stack: Stack):
    """The pool `cpu` has a queue for it, after the one for what people start."""
    queues = {queue["name"]: queue for queue in stack.post("/work_pools/cpu/queues/filter", {})}
    assert {name: (queue["priority"], queue["concurrency_limit"]) for name, queue in queues.items()} == {
        "default": (1, None),
        "background": (2, 1),
    }


def test_the_nightly_retrain_is_scheduled(stack: Stack):
    """It runs at two o'clock on the pool `gpu`, one at a time; another one is cancelled."""
    nightly = stack.deployments("retrain")["nightly"]
    assert nightly["work_pool_name"] == "gpu"
    assert nightly["entrypoint"] == "flows/retrain.py:retrain"
    [schedule] = nightly["schedules"]
    assert schedule["active"]
    assert schedule["schedule"] == {"cron": "0 2 * * *", "timezone": "Etc/UTC", "day_or": True}
    assert nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert nightly["global_concurrency_limit"]["limit"] == 1
    wait_until(lambda: nights(stack, nightly["id"]), seconds=60)
    assert nightly["parameters"] == {"compute": {"gpu_slots": "gpu"}}
    assert all(night.partition("T")[2].startswith("02:00:00") for night in nights(stack, nightly["id"]))


def nights(stack: Stack, deployment: str) -> list[str]:
    """Return when the next flow runs of a deployment are to start."""
    waiting = {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    found = stack.post("/flow_runs/filter", {"flow_runs": waiting})
    return [flow_run["expected_start_time"] for flow_run in found]


def test_the_form_has_nested_groups(stack: Stack):
    """The schema that the UI makes its form from has groups with descriptions, plain defaults, limits and choices."""
    schema = stack.deployments("retrain")["nightly"]["parameter_openapi_schema"]
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


def test_maintenance_follows_the_night(stack: Stack):
    """It runs at six o'clock in the background, one at a time, and keeps ten checkpoints of each run."""
    nightly = stack.deployments("maintain")["nightly"]
    assert (nightly["work_pool_name"], nightly["work_queue_name"]) == ("cpu", "background")
    assert nightly["schedules"][0]["schedule"]["cron"] == "0 6 * * *"
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["parameters"] == {"keep_last": 10}
    assert nightly["parameter_openapi_schema"].get("required", []) == []


def test_conversion_by_hand_needs_a_url_alone(stack: Stack):
    """The deployment has no schedule, stands on the pool `cpu`, and requires nothing but the checkpoint."""
    by_hand = stack.deployments("convert")["by-hand"]
    assert by_hand["work_pool_name"] == "cpu"
    assert by_hand["schedules"] == []
    assert by_hand["parameter_openapi_schema"]["required"] == ["checkpoint"]


@pytest.mark.parametrize(("flow", "required"), [("publish", ["export"]), ("rollback", ["store", "run", "repo", "to"])])
def test_releases_are_made_and_taken_back_by_hand(stack: Stack, flow: str, required: list[str]):
    """Both deployments have no schedule and stand on the pool `cpu`; no field of theirs takes a token."""
    by_hand = stack.deployments(flow)["by-hand"]
    assert (by_hand["work_pool_name"], by_hand["schedules"]) == ("cpu", [])
    assert by_hand["entrypoint"] == f"flows/{flow}.py:{flow}"
    schema = by_hand["parameter_openapi_schema"]
    assert schema["required"] == required
    assert "token" not in schema["properties"]


def test_a_worker_converts_a_checkpoint(stack: Stack, checkpoint: Path):
    """`prefect deployment run` with a URL ends Completed on the stack's worker, with export and artifacts."""
    stack.command(
        "prefect",
        "--profile",
        "ckptflow",
        "deployment",
        "run",
        "convert/by-hand",
        "--param",
        f"checkpoint={checkpoint.as_uri()}",
    )
    wait_until(lambda: has_ended(stack.flow_run("convert")), seconds=300)
    flow_run = stack.flow_run("convert")
    assert flow_run is not None
    assert (flow_run["state_type"], flow_run["name"]) == ("COMPLETED", "convert step_0000000004")
    assert verify(checkpoint.parent / "exports" / "step_0000000004").passed
    made = stack.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run["id"]]}}})
    assert {artifact["key"] for artifact in made} >= {"validation-tiny", "export-tiny", "export-check-tiny"}


def has_ended(flow_run: dict[str, Any] | None) -> bool:
    """Whether there is a flow run, and it is over."""
    return flow_run is not None and flow_run["state_type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def test_commits_are_converted_once_that_is_turned_on(stack: Stack):
    """The automation is off; turned on, the URL of a training job's last checkpoint becomes a run's parameter."""
    [automation] = [each for each in stack.post("/automations/filter", {}) if each["name"] == ON_COMMIT]
    assert not automation["enabled"]
    on_commit = stack.deployments("convert")["on-commit"]
    assert (on_commit["work_pool_name"], on_commit["work_queue_name"]) == ("cpu", "background")
    stack.ask("PATCH", f"/work_queues/{on_commit['work_queue_id']}", {"is_paused": True})  # none is to be converted
    stack.ask("PATCH", f"/automations/{automation['id']}", {"enabled": True})
    time.sleep(2)  # the server's triggers look again
    url = "file:///runs/tiny/step_0000000004"
    stack.post("/events", [committed("file:///runs/tiny/step_0000000002", "false"), committed(url, "true")])
    own = {"flow_runs": {"deployment_id": {"any_": [on_commit["id"]]}}}
    wait_until(lambda: stack.post("/flow_runs/filter", own), seconds=60)
    [begun] = stack.post("/flow_runs/filter", own)
    assert begun["parameters"] == {"checkpoint": url, "export": {"dtype": "bfloat16"}}


def committed(url: str, complete: str) -> dict[str, Any]:
    """Return the event that a checkpoint was committed."""
    return {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "ckpt.checkpoint.committed",
        "resource": {"prefect.resource.id": url, "ckpt.complete": complete},
        "payload": {"url": url},
    }


def test_a_flow_run_that_was_killed_is_crashed(stack: Stack, lost: str):
    """No process of it is left to say so: its heartbeats have ended, and within bounded time it is known why."""
    wait_until(lambda: has_ended(stack.ask("GET", f"/flow_runs/{lost}")), seconds=CRASHED_AFTER_S + 60)
    state = stack.ask("GET", f"/flow_runs/{lost}")["state"]
    assert (state["type"], state["message"].partition(":")[0]) == ("CRASHED", f"No heartbeat for {CRASHED_AFTER_S} s")


def test_down_stops_all_of_it(stack: Stack):
    """No process is left, and who asks is told that nothing runs."""
    assert stack.stack("down") == "Stopped.\n"
    assert marked(str(stack.root)) == []
    assert "does not answer" in stack.stack("status", status=1)


def pids(stack: Stack) -> dict[str, int]:
    """Return the process of each program, by its name."""
    return {path.stem: int(path.read_text()) for path in stack.home.glob("*.pid")}


def test_the_readme_names_the_commands():
    """What the README says to type is what these tests drive."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "```sh\npython -m deployments.stack up\nprefect profile use ckptflow\n" in readme
