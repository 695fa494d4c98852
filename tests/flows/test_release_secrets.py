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
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from urllib.parse import quote

import pytest
from prefect.blocks.system import Secret
from secret_runs import (
    BLOCK,
    BLOCKS,
    CASES,
    DECOY,
    ENVIRONMENT,
    READ_ONLY,
    REPO,
    TOKEN,
    WRONG,
    Case,
    World,
    commit,
)
from secret_search import Search, answers, watched_commands
from small_releases import make_export

from ckpt_core import hub
from ckpt_core.testing.hub_faults import Fault, Faults
from ckpt_core.testing.hub_server import hub_server

pytestmark = pytest.mark.timeout(300)


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
def kept(released: World) -> list[tuple[str, bytes | str]]:
    """All that was kept when every flow had run and a decoy was given away on purpose."""
    released.run("give_away", {"secret": DECOY}, {})
    released.end()
    end = time.monotonic() + 30
    while not any(kind == "events" and DECOY in text for kind, text in answers(released.api)):
        assert time.monotonic() < end, "the server writes events within seconds"
        time.sleep(0.5)
    return list(released.everything())


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
