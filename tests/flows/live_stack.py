"""A Prefect server, workers and a deployment of `retrain`, real and of a test's own: to stop, kill and start again."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from prefect.workers.process import ProcessWorker
from small_retrain import PROGRAMS, REPOSITORY
from temporary_server import copy_database
from tenacity import retry, retry_if_result, stop_after_attempt, wait_fixed

from deployments.profile import Stack
from deployments.programs import INTERRUPTIBLE

PREFECT = [sys.executable, "-m", "prefect"]
POOL = "live"
LOGIN = "live:stack"
MARK = "CKPTFLOW_LIVE_STACK"
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
BUSY = object()
UNFINISHED = ["PENDING", "RUNNING", "CANCELLING"]
_LOOK_S = 0.1


class LiveStack:
    """Leaving its context stops everything, and fails if a process is left then."""

    def __init__(self, root: Path, **settings: str) -> None:
        self.root, self.slow = root, root / "slow"
        self.described = Stack(root / "stack", free_port(), LOGIN)
        self.env = {
            **os.environ,
            **self.described.settings(),
            MARK: str(root),
            "CKPTFLOW_SLOW": str(self.slow),
            "PYTHONPATH": str(PROGRAMS),
            "TMPDIR": str(root / "tmp"),
            "PREFECT_HOME": str(root / "home"),
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "3",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "NO_COLOR": "1",
            **settings,
        }
        user, _, password = LOGIN.partition(":")
        self._api = httpx.Client(base_url=self.described.api_url, auth=(user, password), timeout=30)
        self._programs: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LiveStack:
        (self.root / "tmp").mkdir()
        copy_database(self.root / "home" / "prefect.db", self.root.parent)
        self.start_server()
        template = ProcessWorker.get_default_base_job_template()
        self.post("/work_pools/", {"name": POOL, "type": "process", "base_job_template": template})
        return self

    def __exit__(self, *_: object) -> None:
        self._api.close()
        for program in sorted(self._programs, key=lambda program: program is self.server):  # the server last
            stop(program)
        left = self.processes()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert left == {}

    # The API

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Ask it by POST."""
        return self._ask("POST", path, json=body)

    def get(self, path: str) -> Any:
        """Ask it by GET."""
        return self._ask("GET", path)

    @retry(retry=retry_if_result(lambda answer: answer is BUSY), wait=wait_fixed(1), stop=stop_after_attempt(30))
    def _ask(self, method: str, path: str, **options: Any) -> Any:
        answer = self._api.request(method, path, **options)
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:  # its database was locked for too long
            return BUSY
        assert answer.is_success, f"{path}: {answer.text}"
        return answer.json() if answer.content else None

    def is_up(self) -> bool:
        """Whether the server answers."""
        with suppress(httpx.TransportError):
            return self._api.get("/health", timeout=2).is_success
        return False

    # Programs

    def start_server(self) -> None:
        """Start the server, on the database and at the port of its predecessor; return when it answers."""
        self.server = self._start("server", "start", cwd=self.root)
        wait_until(self.is_up, seconds=240)

    def server_away(self, seconds: float) -> None:
        """Stop the server, and start it again after some time; return when it answers."""
        stop(self.server)
        time.sleep(seconds)
        self.start_server()

    def start_worker(self) -> None:
        """Start a worker, somewhere."""
        self.worker = self._start("worker", "start", "--pool", POOL, cwd=self.root)

    def _start(self, *arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
        with (self.root / f"{arguments[0]}.log").open("ab") as log:
            program = subprocess.Popen(
                [*INTERRUPTIBLE, *PREFECT, *arguments],
                cwd=cwd,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._programs.append(program)
        return program

    def prefect(self, *arguments: str) -> None:
        """Run the prefect command."""
        command = [*PREFECT, *arguments]
        subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, check=True, timeout=120)

    # Deployments and runs

    def deploy(self, name: str, parameters: Mapping[str, Any]) -> str:
        """Deploy `retrain` with parameters, one run at a time and the next one waiting; return the deployment's id."""
        flow = self.post("/flows/", {"name": "retrain"})
        made = {
            "name": name,
            "flow_id": flow["id"],
            "entrypoint": "flows/retrain.py:retrain",
            "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(REPOSITORY)}}],
            "parameters": plain(parameters),
            "work_pool_name": POOL,
            "concurrency_limit": 1,
            "concurrency_options": {"collision_strategy": "ENQUEUE"},
            "enforce_parameter_schema": False,
        }
        return self.post("/deployments/", made)["id"]

    def submit(self, deployment: str, **parameters: Any) -> str:
        """Have the deployment run now; return the run's id."""
        return self.post(f"/deployments/{deployment}/create_flow_run", {"parameters": plain(parameters)})["id"]

    def retry(self, run: str) -> str:
        """Have a run that has ended run again, as the button in the UI does."""
        again = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        assert self.post(f"/flow_runs/{run}/set_state", {"state": again, "force": True})["status"] == "ACCEPT"
        return run

    def cancel(self, run: str) -> None:
        """Ask for a run's cancellation."""
        self.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})

    def state(self, run: str) -> dict[str, Any]:
        """Return a run's `type`, `name`, `message` and `state_details`."""
        return self.get(f"/flow_runs/{run}")["state"]

    def has_begun(self, run: str) -> bool:
        """Whether a run's process is at work, or was."""
        return self.state(run)["type"] in {"RUNNING", *FINAL}

    def has_ended(self, run: str) -> bool:
        """Whether a run's state is final."""
        return self.state(run)["type"] in FINAL

    def unfinished_tasks(self, run: str) -> list[str]:
        """Return the names of a run's tasks that the API takes for running."""
        at_work = {"state": {"type": {"any_": UNFINISHED}}}
        found = self.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "task_runs": at_work})
        return [task["name"] for task in found]

    def slots(self) -> int:
        """Return how many slots are taken, over all concurrency limits."""
        return sum(limit["active_slots"] for limit in self.post("/v2/concurrency_limits/filter", {}))

    def leases(self) -> list[Path]:
        """Return the files of leases of slots."""
        return sorted((self.root / "home" / "concurrency_leases").glob("*-*.json"))

    def renew_slot(self, run: str) -> None:
        """Renew the lease of the slot that a run has taken, as its process does every few minutes."""
        lease = self.state(run)["state_details"]["deployment_concurrency_lease_id"]
        self.post(f"/v2/concurrency_limits/leases/{lease}/renew", {"lease_duration": 300})

    # Processes

    def processes(self, run: str | None = None) -> dict[int, str]:
        """Return the command lines of all processes of this stack, or of one flow run, by process id."""
        entry = f"PREFECT__FLOW_RUN_ID={run}" if run else f"{MARK}={self.root}"
        found: dict[int, str] = {}
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if entry.encode() in (place / "environ").read_bytes().split(b"\0"):
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def machine(self) -> list[int]:
        """Return the processes of the machine that trains: all but the server's."""
        return [pid for pid in self.processes() if _session(pid) != self.server.pid]

    def flow_process(self, run: str) -> list[int]:
        """Return the process that runs a flow, if it does."""
        return [pid for pid, line in self.processes(run).items() if "prefect.engine" in line]

    def ranks(self, run: str) -> list[int]:
        """Return the training ranks of a flow run, by their numbers."""
        names = {pid: _name(pid) for pid in self.processes(run)}
        return sorted((pid for pid, name in names.items() if re.fullmatch(r"rank \d+", name)), key=names.__getitem__)


def wait_until(reached: Callable[[], Any], *, seconds: float, told: Callable[[], str] = lambda: "") -> None:
    """Wait for what other processes do; where they do not, fail with what `told` says."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not reached in {seconds} s: {told()}"
        time.sleep(_LOOK_S)


def stop(program: subprocess.Popen[bytes]) -> None:
    """End a program that serves until it is stopped: by SIGINT, and by SIGKILL if that takes long."""
    if program.poll() is None:
        program.send_signal(signal.SIGINT)
    try:
        program.wait(timeout=60)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes; some may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flow's parameters in JSON types."""
    return {name: _plain(value) for name, value in parameters.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.model_dump() if hasattr(value, "model_dump") else value


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def free_port() -> int:
    """Return a port of this machine's that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
