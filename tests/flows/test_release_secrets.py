"""The Hub's token is nowhere but in the environment of the jobs that need it, and in a Secret block, encrypted.

Flows publish and roll back in a process of their own, well and with every kind of fault; then all that Prefect, the
store, the Hub, its client and the terminal keep of it is searched. A decoy that is told on purpose shows that the
search would find the token.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any
from urllib.parse import quote

import pytest
from prefect.blocks.system import Secret
from prefect.settings import get_current_settings
from secret_search import Search, answers, commands, files, tables, watched_commands
from small_releases import Made, make_export
from small_retrain import PROGRAMS, REPOSITORY

from ckpt_core import hub
from ckpt_core.testing.hub_faults import Fault, Faults
from ckpt_core.testing.hub_server import HubServer, hub_server

pytestmark = pytest.mark.timeout(300)

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
SOON = {"TEST_IDLE_SECONDS": "0.1"}
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
            hub = {"repo_id": REPO, "endpoint": endpoint, "token_block": block}
            parameters = {"export": self._exports[made].export, "hub": hub, "checkpoint": self._exports[made].url}
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


@pytest.fixture(scope="module")
def connections() -> list[bytes]:
    """What came to the proxy that stands for all other machines."""
    return []


@pytest.fixture(scope="module")
def proxy(connections: list[bytes]) -> Iterator[str]:
    """The address of a proxy that notes what it is asked, and answers nothing."""

    class Noting(BaseRequestHandler):
        def handle(self) -> None:
            connections.append(self.request.recv(65536))

    with ThreadingTCPServer(("127.0.0.1", 0), Noting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def world(prefect_home: Path, tokenizer: str, proxy: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub that takes one token, two exports, and a process that runs flows; two releases, and one taken back."""
    root, faults = tmp_path_factory.mktemp("secrets"), Faults()
    for name, secret in BLOCKS.items():
        Secret(value=secret).save(name)
    made = {
        name: make_export(root / "store", tokenizer, step=step, scale=float(step))
        for step, name in enumerate(("first", "second"), 1)
    }
    with (
        hub_server(root / "hub", token=TOKEN, read_only_token=READ_ONLY, faults=faults) as server,
        watched_commands() as seen,
    ):
        world = World(root, server, faults, proxy, made, seen)
        world.start()
        try:
            yield world
        finally:
            world.end()


@pytest.fixture(scope="module")
def released(world: World) -> World:
    """The world after a first and a second release, of which `main` serves the first again."""
    for flow, source, made, to in (
        ("publish", ENVIRONMENT, "first", "v1"),
        ("publish", BLOCK, "second", "v2"),
        ("rollback", ENVIRONMENT, "", "v1"),
    ):
        state = world.release(Case(flow, source, ""), made, to)
        assert state["name"] == "Completed", state
        assert served(world) == to
    return world


@pytest.fixture(scope="module")
def kept(world: World) -> list[tuple[str, bytes | str]]:
    """All that was kept when every flow had run and a decoy was given away on purpose."""
    world.run("give_away", {"secret": DECOY}, {})
    world.end()
    end = time.monotonic() + 30
    while not any(kind == "events" and DECOY in text for kind, text in answers(world.api)):
        assert time.monotonic() < end, "the server writes events within seconds"
        time.sleep(0.5)
    return list(world.everything())


def served(world: World) -> str | None:
    """Return the tag of what `main` serves."""
    release = hub.served(REPO, endpoint=world.server.endpoint, token=TOKEN)
    return release.tag if release else None


@pytest.mark.parametrize("name", CASES)
def test_a_release_fails(released: World, name: str):
    """Whatever goes wrong, the flow run fails and says what; `main` stays."""
    case = CASES[name]
    released.faults.add(*case.faults)
    state = released.release(case)
    struck = bool(released.faults.struck)
    released.faults.clear()
    assert state["name"] == "Failed"
    assert case.says in state["message"]
    assert struck == bool(case.faults)
    assert served(released) == "v1"


def test_a_job_is_killed(released: World):
    """A job that is killed while it commits fails its flow run; `main` stays."""

    def kill(method: str, path: str) -> bool:
        if commit(method, path):
            os.kill(released.job(), signal.SIGKILL)
        return commit(method, path)

    released.faults.add(Fault(kind="delay", seconds=60, on=kill))
    state = released.release(Case("publish", ENVIRONMENT, ""))
    released.faults.clear()
    assert state["name"] == "Failed"
    assert "SIGKILL" in state["message"]
    assert served(released) == "v1"


@pytest.mark.parametrize("secret", [TOKEN, READ_ONLY, WRONG], ids=["token", "read-only", "wrong"])
def test_a_token_is_nowhere(kept: list[tuple[str, bytes | str]], secret: str):
    """No file, table, log, state, artifact, parameter, event, line of output or command line has it, in any form."""
    search = Search(secret)
    assert [place for place, content in kept if search.finds_in(content)] == []


def test_a_token_that_is_told_is_found(kept: list[tuple[str, bytes | str]], world: World):
    """The decoy is found in all those places, so that the search would have found a token."""
    search = Search(DECOY)
    found = {place for place, content in kept if search.finds_in(content)}
    wanted = {"logs", "flow_runs", "flow_run_states", "artifacts", "events", "table log", "table flow_run"}
    assert wanted <= found
    assert {str(world.root / name) for name in ("stdout", "stderr")} <= found
    assert any(str(world.database) in place for place in found)
    assert any(str(world.root / "prefect" / "storage") in place for place in found), "a persisted result"


def test_what_was_searched_is_what_happened(kept: list[tuple[str, bytes | str]], world: World):
    """Among it are the blocks, the jobs' command lines, what they logged of their requests, and the store's records."""
    places = {place for place, _ in kept}
    assert {"block_documents", "table block_document", "events", "artifacts"} <= places
    text = [content if isinstance(content, str) else content.decode(errors="replace") for _, content in kept]
    for said in (
        "-m tasks.jobs stage",
        "-m tasks.jobs roll_back",
        "curl -X POST",
        "<TOKEN>",
        *(c.says for c in CASES.values()),
    ):
        assert any(said in each for each in text), said
    assert any("releases" in place for place in places)


def test_no_token_goes_to_another_machine_over_http(connections: list[bytes], kept: object):
    """Nothing at all was sent to the address that is neither https nor here."""
    assert connections == []


@pytest.mark.parametrize(
    "form",
    [
        DECOY[:18] + "\n  " + DECOY[18:],
        DECOY[::-1],
        quote(DECOY, safe=""),
        repr({"authorization": f"Bearer {DECOY}"}),
        DECOY[len(DECOY) // 2 :],
        DECOY.encode().hex(),
        *(base64.b64encode(b"x" * n + DECOY.encode() + b"yz").decode() for n in range(3)),
        base64.encodebytes(b"x" * 64 + DECOY.encode()).decode(),
        json.dumps(base64.encodebytes(b"x" * 64 + DECOY.encode()).decode()),
        "\x1b[1mhf_DecoY\x1b[0m" + DECOY[8:],
    ],
)
def test_each_form_is_found(form: str):
    """A secret that is wrapped, reversed, quoted, cut in half, in hex or in base64 is found, and no other."""
    assert Search(DECOY).finds_in(f"before {form} after")
    assert not Search(TOKEN).finds_in(f"before {form} after")
