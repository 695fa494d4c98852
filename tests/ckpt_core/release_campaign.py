"""Publications that are disturbed on purpose: one process that calls, one server, and what each must end in."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from hub_client import WORKER, Client, line_for, sharded_files, write_export

from ckpt_core.errors import HubError
from ckpt_core.testing.hub_faults import Fault, Faults
from ckpt_core.testing.hub_repos import Repos

TOKEN = "hf_0123456789abcdefghijklmnopqrstuvwx"
IDLE_SECONDS = 1.0

# Waits are cut short, and a process can "die" before or after its n-th request: from then on it does nothing at all.
DYING = """
import time
from huggingface_hub.utils import httpx
sleep, send, left = time.sleep, httpx.Client.send, []
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
class Dead(BaseException):
    pass
def dying_send(self, request, **options):
    if left:
        left[0] -= 1
        if left[0] < 0 or (left[0] == 0 and left[1] == "before"):
            raise Dead
    response = send(self, request, **options)
    if left and left[0] == 0:
        raise Dead
    return response
httpx.Client.send = dying_send
from ckpt_core import hub
def call_and_die(number, when, name, *arguments):
    left[:] = [int(number), when]
    try:
        getattr(hub, name)(*arguments)
    except Dead:
        return "dead"
    finally:
        left.clear()
    return "alive"
hub.call_and_die = call_and_die
"""


@dataclass(frozen=True)
class Scene:
    """What is to be done to a repository in which `before` was done undisturbed, and what `main` then is."""

    before: tuple[tuple[str, str], ...]
    call: tuple[str, str]
    titles: tuple[str, ...]
    tags: tuple[str, ...]
    serves: str


SCENES = {
    "first release": Scene((), ("publish", "one"), ("Publish v1", "initial commit"), ("v1",), "one"),
    "next release": Scene(
        (("publish", "one"),),
        ("publish", "two"),
        ("Publish v2", "Publish v1", "initial commit"),
        ("v1", "v2"),
        "two",
    ),
    "roll back": Scene(
        (("publish", "one"), ("publish", "two")),
        ("roll_back", "v1"),
        ("Roll back to v1", "Publish v2", "Publish v1", "initial commit"),
        ("v1", "v2"),
        "one",
    ),
}


class Campaign:
    """Runs scenes with a disturbance in them, and counts them."""

    def __init__(self, directory: Path, *, xet: bool = False) -> None:
        self.cases = 0
        self.faults = Faults()
        self._exports = {"one": directory / "one", "two": directory / "two"}
        environment = {"HF_TOKEN": TOKEN, "TEST_IDLE_SECONDS": str(IDLE_SECONDS), "HF_HUB_DISABLE_XET": "01"[not xet]}
        self._client = Client(directory, environment, token=TOKEN, faults=self.faults)
        self._client.program = DYING + WORKER
        self._scene, self._repo, self._begun = SCENES["first release"], "", []

    def __enter__(self) -> Campaign:
        self._client.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._client.__exit__(*details)

    def begin(self, scene: str) -> None:
        """Make a new repository, up to where the scene begins."""
        self.cases += 1
        self.faults.clear()
        self._scene, self._repo = SCENES[scene], f"team/case-{self.cases}"
        seeds = [3 * self.cases, 3 * self.cases + 1, 3 * self.cases + 2]  # no bytes that are in another repository
        write_export(self._exports["one"], sharded_files(seeds[:2], 600))
        write_export(self._exports["two"], sharded_files(seeds[::2], 600))
        for name, argument in self._scene.before:
            self._call(name, argument)
        self._begun = self._titles()

    def fail(self, fault: Fault, *, passes: bool) -> bool:
        """Run the scene with a fault; return whether it struck.

        It ends well; where the fault is not one that `passes`, it may also end in an error that changed nothing.
        """
        self.faults.add(fault)
        try:
            self._call(*self._scene.call)
        except HubError:
            if passes:
                raise
            self._check_whole()
        else:
            self.check_done()
        struck = bool(self.faults.struck)
        self.faults.clear()
        return struck

    def die(self, number: int, when: str) -> bool:
        """Run the scene and die before or after a request; return whether there was such a request."""
        name, argument = self._scene.call
        died = self._client.call("call_and_die", number, when, name, *self._order(name, argument)) == "dead"
        self._check_whole()
        return died

    def kill(self, number: int, when: str) -> bool:
        """Run the scene in a process of its own, and kill that; return whether there was such a request."""
        name, argument = self._scene.call
        worker = self._client.start_worker()
        seen = 0

        def kill(*_: object) -> bool:
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(worker.pid, signal.SIGKILL)
            return seen == number

        if when == "after":
            self._client.on_request = kill
        else:
            self.faults.add(Fault(kind="delay", seconds=60, on=kill))
        worker.communicate(line_for(name, *self._order(name, argument)), timeout=60)
        self._client.on_request = lambda *_: None
        self.faults.clear()
        self._check_whole()
        return worker.returncode == -signal.SIGKILL

    def finish(self) -> None:
        """Run the scene again, undisturbed."""
        self._call(*self._scene.call)
        self.check_done()

    def check_done(self) -> None:
        """`main` has exactly the commits that it should have, serves the right bytes, and is tagged."""
        repo = Repos(self._client.directory).get(self._repo)
        refs = repo.refs()
        assert tuple(self._titles()) == self._scene.titles
        assert self._serves(self._scene.serves)
        assert (set(refs.tags), set(refs.branches)) == (set(self._scene.tags), {"main"})
        if self._scene.call[0] == "publish":
            assert refs.tags[self._scene.tags[-1]] == refs.branches["main"]

    def _check_whole(self) -> None:
        """`main` is as it was, or already what it is to be."""
        titles = self._titles()
        assert titles == self._begun or (tuple(titles) == self._scene.titles and self._serves(self._scene.serves))

    def _serves(self, export: str) -> bool:
        repo = Repos(self._client.directory).get(self._repo)
        files = {name: repo.content(entry) for name, entry in repo.commit("main").files.items()}
        wanted = {path.name: path.read_bytes() for path in self._exports[export].iterdir()}
        assert set(files) == {*wanted, "README.md", ".gitattributes"}
        return all(files[name] == data for name, data in wanted.items())

    def _titles(self) -> list[str]:
        if not (self._client.directory / self._repo).exists():
            return []
        titles = [commit.title for commit in Repos(self._client.directory).get(self._repo).history("main")]
        return [] if titles == ["initial commit"] else titles

    def _call(self, name: str, argument: str) -> None:
        self._client.call(name, *self._order(name, argument), token=TOKEN)

    def _order(self, name: str, argument: str) -> tuple[str, str]:
        return (str(self._exports[argument]), self._repo) if name == "publish" else (self._repo, argument)
