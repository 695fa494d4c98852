"""Flow runs of releases in a process of their own, each with a token from somewhere, and most with something wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.settings import get_current_settings
from secret_search import answers, commands, files, tables
from small_releases import Made
from small_retrain import PROGRAMS, REPOSITORY

from ckpt_core.testing.hub_faults import Fault, Faults
from ckpt_core.testing.hub_server import HubServer

# With characters that a URL quotes; the Hub's own have none.
TOKEN = "hf_WritE/9dkq+Xv72mLcPz=tRgYbNw5sJhT"
READ_ONLY = "hf_ReaD/4nvb+Qz81kTdWx=fMjLpRc6yUgH"
WRONG = "hf_WronG/7xcp+Bm35rZsKv=qHnTdYw2jLfG"
DECOY = "hf_DecoY/2hjw+Ft69pGbNc=xZvKrMq8dSlP"
BLOCKS = {"secrets-write": TOKEN, "secrets-wrong": WRONG}
REPO = "team/secrets"
HTTP = "http://hub.example:8080"

Asked = Callable[[str, str], bool]


def commit(method: str, path: str) -> bool:
    """Whether a request is a commit."""
    return method == "POST" and "/commit/" in path


def each(_: str, __: str) -> bool:
    """Whether a request is one at all."""
    return True


def fault(on: Asked, **options: Any) -> list[Fault]:
    """Return what goes wrong with each such request."""
    return [Fault(on=on, times=1000, **options)]


@dataclass(frozen=True)
class Case:
    """A flow run: where its token comes from, what goes wrong, and what its final state says of it."""

    flow: str
    source: dict[str, str]
    says: str
    faults: list[Fault] = field(default_factory=list[Fault])
    endpoint: str | None = None
    environment: dict[str, str] = field(default_factory=dict[str, str])


ENVIRONMENT, BLOCK = {"environment": TOKEN}, {"block": "secrets-write"}
SOON = {"TEST_IDLE_SECONDS": "0.05"}
CASES = {
    "401": Case("publish", {"block": "secrets-wrong"}, "HTTP 401"),
    "403": Case("rollback", {"environment": READ_ONLY + "\n"}, "HTTP 403"),
    "429": Case("publish", ENVIRONMENT, "HTTP 429", fault(commit, kind="status", status=429, retry_after=0)),
    "500": Case("rollback", BLOCK, "HTTP 500", fault(commit, kind="status", status=500)),
    "503": Case("rollback", ENVIRONMENT, "HTTP 503", fault(each, kind="status", status=503)),
    "504 after success": Case("publish", BLOCK, "HTTP 504", fault(each, kind="lost", status=504)),
    "cut": Case("rollback", ENVIRONMENT, "broke off", fault(each, kind="cut")),
    "cut in its body": Case("publish", BLOCK, "broke off", fault(commit, kind="cut", body="request", at=40)),
    "lost": Case("rollback", BLOCK, "broke off", fault(each, kind="lost")),
    "412": Case("publish", ENVIRONMENT, "HTTP 412", fault(commit, kind="status", status=412)),
    "flipped byte": Case("publish", BLOCK, "HTTP 400", fault(commit, kind="flip", body="request", at=4)),
    "timeout": Case("rollback", BLOCK, "no answer within", fault(each, kind="delay", seconds=9), environment=SOON),
    "http": Case("publish", BLOCK, "over https or to this machine only", endpoint=HTTP),
    "http, environment": Case("rollback", ENVIRONMENT, "over https or to this machine only", endpoint=HTTP),
}


class World:
    """A process that runs flows, a Hub, and all that they leave behind, below one directory."""

    def __init__(
        self, root: Path, server: HubServer, faults: Faults, proxy: str, exports: dict[str, Made], seen: set[str]
    ) -> None:
        self.root = root
        self.faults = faults
        self.states: list[dict[str, str]] = []
        self.printed: list[str] = []
        self.server = server
        self._proxy = proxy
        self._exports = exports
        self.command_lines = seen
        settings = get_current_settings()
        assert settings.api.url is not None
        self.api = settings.api.url
        address = settings.server.database.connection_url
        assert address is not None
        self.database = Path(address.get_secret_value().removeprefix("sqlite+aiosqlite:///"))

    def start(self) -> None:
        """Start the process that runs flows."""
        environment = {
            **os.environ,
            "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(self.root / "prefect"),
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "PREFECT_LOGGING_TO_API_ENABLED": "true",
            "PREFECT_LOGGING_LOG_PRINTS": "true",
            "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
            "HF_HOME": str(self.root / "huggingface"),
            "HF_DEBUG": "1",  # the client tells each of its requests
            "NO_PROXY": "127.0.0.1,localhost",
        }
        command = [sys.executable, str(PROGRAMS / "release_runs.py")]
        with (self.root / "stderr").open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def end(self) -> None:
        """Wait until the process has sent its logs and ended; nothing happens the second time."""
        if self._process.returncode is None:
            (self.root / "stdout").write_text("".join(self.printed) + self._process.communicate(timeout=120)[0])

    def run(self, flow: str, parameters: dict[str, Any], environment: dict[str, str | None]) -> dict[str, str]:
        """Run a flow; return the name and message of its final state."""
        order = {"flow": flow, "parameters": parameters, "environment": environment}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            self.printed.append(line)
            if line.startswith('{"name": '):
                self.states.append(json.loads(line))
                return self.states[-1]
        raise AssertionError((self.root / "stderr").read_text()[-4000:])

    def release(self, case: Case, made: str = "second", to: str = "v2") -> dict[str, str]:
        """Publish or roll back as a case says."""
        block, endpoint = case.source.get("block"), case.endpoint or self.server.endpoint
        environment = {
            "HF_TOKEN": case.source.get("environment"),
            "HTTP_PROXY": self._proxy if case.endpoint else None,
            "TEST_IDLE_SECONDS": None,
            **case.environment,
        }
        if case.flow == "publish":
            where = {"repo_id": REPO, "endpoint": endpoint, "token_block": block}
            parameters = {"export": self._exports[made].export, "hub": where, "checkpoint": self._exports[made].url}
        else:
            parameters = {"store": str(self.root / "store"), "run": "tiny", "repo": REPO, "to": to}
            parameters |= {"endpoint": endpoint, "token_block": block}
        return self.run(case.flow, parameters, environment)

    def job(self) -> int:
        """Return the id of the process that speaks to this Hub now."""
        started = ["-u", "-m", "tasks.jobs"]
        [job] = [pid for pid, given in commands() if given[1:4] == started and self.server.endpoint in given[5]]
        return job

    def everything(self) -> Iterator[tuple[str, bytes | str]]:
        """Yield all that was kept, piece by piece, and what each piece is."""
        yield from files(self.root, self.database.parent)
        yield from tables(self.database)
        yield from answers(self.api)
        yield from (("a state's message", state["message"]) for state in self.states)
        yield from (("a command line", line) for line in self.command_lines)
