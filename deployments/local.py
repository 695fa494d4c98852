"""The stack on this machine: started, set up, looked at, stopped."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from deployments import profile
from deployments.automations import late_runs, lost_heartbeats
from deployments.profile import HOST, Stack
from deployments.programs import Program, stop
from deployments.provision import POOLS, provision

ROOT = Path(__file__).parents[1]
PREFECT = (sys.executable, "-m", "prefect")
TOO_LATE_S = 12 * 3600
_START_S = 240.0
_GRACE_S = 60.0


class StackError(RuntimeError):
    """The stack could not be set up; the message says why, and what to do."""


def up(stack: Stack, gpus: int, crashed_after_s: int) -> None:
    """Start what does not run, and set the server up; see `apply`.

    Raises:
        StackError: a program did not start, or what there is does not fit.
    """
    environment = profile.environment(stack)
    server, *workers = programs(stack)
    if server.pid is None:
        _check_free(stack.port)
        server.start(environment, ROOT)
    _wait(stack, server)
    apply(stack, gpus, crashed_after_s)
    for worker in workers:
        if worker.pid is None:
            worker.start(environment, ROOT)


def apply(stack: Stack, gpus: int, crashed_after_s: int) -> None:
    """Give a server that runs its work pools, limits, automations and deployments, or update them in place.

    Args:
        stack: which one.
        gpus: how many slots the concurrency limit `gpu` has.
        crashed_after_s: after how many seconds without a heartbeat a flow run is crashed.

    Raises:
        StackError: there is no answer, or what there is does not fit.
    """
    environment = profile.environment(stack)
    _wait(stack)
    with _client(stack) as client:
        provision(client, gpus, [lost_heartbeats(crashed_after_s), late_runs(TOO_LATE_S)])
    _deploy(environment)


def down(stack: Stack) -> list[str]:
    """Stop what `up` started: workers with their flow runs first, then the server, which hears how these ended.

    Returns:
        The names of programs that had to be killed.
    """
    server, *workers = programs(stack)
    return [*stop(workers, _GRACE_S), *stop([server], _GRACE_S)]


def programs(stack: Stack) -> list[Program]:
    """Return the server and the workers, running or not."""
    serve = (*PREFECT, "server", "start", "--host", HOST, "--port", str(stack.port))
    workers = [
        Program(f"worker-{pool}", (*PREFECT, "worker", "start", "--pool", pool, "--name", f"{pool}-1"), stack.home)
        for pool in POOLS
    ]
    return [Program("server", serve, stack.home), *workers]


def healthy(stack: Stack) -> bool:
    """Whether a server answers."""
    with suppress(OSError), urlopen(f"{stack.api_url}/health", timeout=5) as answer:  # noqa: S310 - http, this machine
        return answer.status == 200  # noqa: PLR2004 - "OK"
    return False


def _wait(stack: Stack, server: Program | None = None) -> None:
    """Wait until a server answers, or until `server`, if that is to be it, has ended."""
    deadline = time.monotonic() + _START_S
    while not healthy(stack):
        if server is not None and server.pid is None:
            raise StackError(f"the server ended; the end of {server.log}:\n{server.last_lines()}")
        if time.monotonic() > deadline:
            raise StackError(f"{stack.url}: no answer in {_START_S:g} s; is that the server's port? Else give --port.")
        time.sleep(0.5)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex((HOST, port)) == 0:
            raise StackError(f"port {port}: another program listens there; stop it, or give another --port.")


@contextmanager
def _client(stack: Stack) -> Generator[SyncPrefectClient]:
    """Yield a client of the stack's API.

    Raises:
        StackError: the server asks for another login.
    """
    own: dict[Any, str] = {PREFECT_API_URL: stack.api_url, PREFECT_API_AUTH_STRING: stack.login}
    with temporary_settings(own), get_client(sync_client=True) as client:
        try:
            client.read_work_pools()
        except PrefectHTTPStatusError as error:
            raise StackError(
                f"{stack.url}: does not take the login in {stack.login_file} ({error.response.status_code}); if it is "
                "this stack's, `python -m deployments.stack down`, then up again."
            ) from None
        yield client


def _deploy(environment: dict[str, str]) -> None:
    command = [*PREFECT, "--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StackError(f"deployments/prefect.yaml was not deployed:\n{done.stdout}{done.stderr}")
