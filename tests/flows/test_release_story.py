"""Releases through the flows, told as the story of one repository: worse refused, better published, and taken back.

The Hub takes writes with a token that lies in a Prefect Secret block, and nowhere else.
"""

from __future__ import annotations

import contextvars
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.settings import get_current_settings
from small_releases import Loader, Made, loader, make_export
from small_retrain import REPOSITORY, TINY, artifacts_of, log_of, tiny_data, tiny_retrain, tiny_step, write_text

from ckpt_core import open_checkpoint, open_store
from ckpt_core.hub import Release, download, served
from ckpt_core.testing.hub_server import HubServer, hub_server
from flows.publish import publish
from flows.retrain import retrain
from flows.rollback import rollback
from flows.verdict import Origin, publish_or_keep
from tasks import releases
from tasks.config import ComputeSettings, HubSettings, ValidationSettings
from tasks.publication import destination
from tasks.worker.prepare import prepare

pytestmark = pytest.mark.timeout(900)
TOKEN = "hf_" + "storysecret" * 3
BLOCK = "story-hub-token"
REPO = "team/story"


@dataclass
class World:
    """A store, a Hub, and what was made so far."""

    root: Path
    prefect_home: Path
    server: HubServer
    loads: Loader
    heldout: str
    made: dict[str, Made]
    states: list[Any] = field(default_factory=list[Any])

    @property
    def store(self) -> Path:
        """The store."""
        return self.root / "my store"

    def hub(self, **changes: Any) -> HubSettings:
        """Return where releases go."""
        return HubSettings(**{"repo_id": REPO, "endpoint": self.server.endpoint, "token_block": BLOCK} | changes)

    def publish(self, name: str, **changes: Any) -> Any:
        """Run the publish flow on an export, with its checkpoint; return its final state."""
        made = self.made[name]
        state = publish(made.export, **{"hub": self.hub(), "checkpoint": made.url} | changes, return_state=True)
        self.states.append(state)
        return state

    def roll_back(self, to: str) -> Any:
        """Run the rollback flow; return its final state."""
        arguments = {"endpoint": self.server.endpoint, "token_block": BLOCK}
        state = rollback(str(self.store), "tiny", REPO, to, **arguments, return_state=True)
        self.states.append(state)
        return state

    def main(self) -> Release:
        """Return what is served."""
        release = served(REPO, endpoint=self.server.endpoint, token=TOKEN)
        assert release is not None
        return release

    def champion(self) -> int:
        """Return the step that the champion's pin names."""
        return open_store(self.store).pins("tiny")["champion"]


@pytest.fixture(scope="module")
def world(prefect_home: Path, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Exports of four models, from bad to good, and an empty Hub."""
    root = tmp_path_factory.mktemp("releases")
    text = write_text(root / "text")
    prepared = prepare(TINY, tiny_data(text), root / "prepared", tokenizer)
    Secret(value=TOKEN).save(BLOCK)
    with hub_server(root / "hub", token=TOKEN) as server, loader(server.endpoint, root / "cache") as loads:
        made = World(root, prefect_home, server, loads, prepared["heldout_tokens"], {})
        for step, (name, scale) in enumerate({"fair": 40.0, "bad": 80.0, "good": 10.0, "best": 1.0}.items(), 1):
            made.made[name] = make_export(made.store, tokenizer, step=step, scale=scale)
        yield made


def test_a_first_release_needs_no_evaluation(world: World):
    """Published without data it is v1, its card says that it was not evaluated, and a record lies beside its step."""
    state = world.publish("fair")
    release = state.result()["release"]
    assert (release["tag"], release["created"], state.result()["decision"]) == ("v1", True, None)
    assert world.loads.load(REPO) == world.loads.load(REPO, "v1") == world.made["fair"].digests
    kept = releases.find(str(world.store), "tiny", f"{world.server.endpoint}/{REPO}", "v1")
    digest = open_checkpoint(world.made["fair"].url).manifest.digest()
    assert kept == releases.ReleaseRecord(1, digest, REPO, "v1", release["commit"], release["url"], None)
    assert world.champion() == 1
    [card] = artifacts_of(state.state_details.flow_run_id)
    assert card.description == "Published v1"
    assert "Not evaluated." in card.data


def test_an_unchanged_release_is_found(world: World):
    """A rerun makes no commit and no version, and the record stays."""
    before = world.main()
    release = world.publish("fair").result()["release"]
    assert (release["tag"], release["commit"], release["created"]) == ("v1", before.commit, False)
    assert world.main() == before


def test_a_worse_model_is_refused(world: World):
    """Compared on held-out data it is kept back with both figures and a reason, and nothing is sent."""
    before = world.main()
    state = world.publish("bad", data=world.heldout)
    verdict = state.result()
    assert (verdict["release"], verdict["candidate"]) == (None, None)
    assert verdict["decision"]["challenger"] > verdict["decision"]["champion"]
    assert "it is worse by" in verdict["decision"]["reason"]
    assert world.main() == before
    assert world.loads.load(REPO) == world.made["fair"].digests
    assert world.champion() == 1
    [card] = artifacts_of(state.state_details.flow_run_id)
    assert card.description == "Kept v1"
    assert verdict["decision"]["reason"] in card.data


def test_a_better_model_is_published(world: World, tmp_path: Path):
    """It becomes v2, and decision and figures are in the record, on the card and in the artifact."""
    state = world.publish("good", data=world.heldout)
    verdict = state.result()
    assert verdict["release"]["tag"] == "v2"
    assert world.loads.load(REPO) == world.made["good"].digests
    assert world.loads.load(REPO, "v1") == world.made["fair"].digests
    kept = releases.find(str(world.store), "tiny", f"{world.server.endpoint}/{REPO}", "v2")
    assert kept is not None
    assert kept.decision == verdict["decision"]
    assert kept.decision["challenger"] < kept.decision["champion"]
    assert world.champion() == 3
    [card] = artifacts_of(state.state_details.flow_run_id)
    assert f"| {kept.decision['challenger']:.6g} | {kept.decision['champion']:.6g} |" in card.data
    release = download(REPO, "v2", endpoint=world.server.endpoint, token=TOKEN, directory=tmp_path / "v2")
    text = (release / "README.md").read_text()
    figures = (f"| {kept.decision[name]:.6g} |" for name in ("challenger", "champion"))
    for told in (kept.digest, *figures, "model-index:"):
        assert told in text


def test_a_rollback_restores_the_old_model_and_the_champion_follows(world: World):
    """`main` serves v1 again by a new commit, v2 stays, and the pin names the step of v1."""
    before = world.main()
    state = world.roll_back("v1")
    assert state.result() == {"release": state.result()["release"], "champion": 1}
    assert world.main().tag == "v1"
    assert world.main().commit == state.result()["release"]["commit"] != before.commit
    assert world.loads.load(REPO) == world.made["fair"].digests
    assert world.loads.load(REPO, "v2") == world.made["good"].digests
    assert world.champion() == 1
    [card] = artifacts_of(state.state_details.flow_run_id)
    assert card.description == "Rolled back to v1"
    again = world.roll_back("v1").result()["release"]
    assert (again["commit"], again["created"]) == (state.result()["release"]["commit"], False)


def test_the_next_retrain_starts_from_the_restored_model(world: World):
    """After the rollback it trains on from the weights of v1's step, in steps after the newest one."""
    parameters = tiny_retrain(
        world.store,
        world.root / "text",
        steps=[tiny_step(steps=2)],
        compute=ComputeSettings(ranks=1, device="cpu"),
        validation=ValidationSettings(max_heldout_loss=0.001),  # ends it there
        hub=world.hub(),
    )
    state = retrain(**parameters, return_state=True)
    world.states.append(state)
    assert "was refused. held-out loss: " in state.message
    trained = open_checkpoint(world.store / "tiny" / "step_0000000006").manifest
    assert trained.lineage["parent"]["step"] == 1
    replaced = releases.find(str(world.store), "tiny", f"{world.server.endpoint}/{REPO}", "v2")
    assert replaced is not None
    assert trained.metrics["initial_heldout_loss"] == pytest.approx(replaced.decision["champion"], rel=1e-4)
    assert trained.lineage["libraries"].keys() >= {"torch", "transformers"}
    assert trained.lineage["code_revision"]


def test_after_a_rollback_a_better_model_is_the_next_version(world: World):
    """What is published then is compared with what was restored, and is v3."""
    verdict = world.publish("best", data=world.heldout).result()
    assert verdict["release"]["tag"] == "v3"
    assert world.loads.load(REPO) == world.made["best"].digests
    assert world.champion() == 4


def test_a_rollback_of_a_run_that_is_not_there_changes_nothing(world: World):
    """A misspelt run or tag fails the flow run with what there is."""
    before = world.main()
    arguments = {"endpoint": world.server.endpoint, "token_block": BLOCK, "return_state": True}
    run = rollback(str(world.store), "tny", REPO, "v1", **arguments)
    assert run.is_failed()
    assert "has no run 'tny'; it has tiny." in run.message
    tag = rollback(str(world.store), "tiny", REPO, "v9", **arguments)
    assert tag.is_failed()
    assert "no tag 'v9' to roll back to; it has v1, v2, v3" in tag.message
    world.states += [run, tag]
    assert world.main() == before
    assert not (world.store / "tny").exists()


def judged(world: World, name: str, settings: HubSettings, *, figure: float | None = 9.5) -> Any:
    """Do what the settings say with an export that was found to be worse; return the flow run's final state."""
    made, main = world.made[name], world.main()
    compared = {
        "challenger": {"heldout_loss": figure},
        "champion": {"heldout_loss": 5.5},
        "served": vars(main),
        "same": False,
        "untrained": None,
        "decision": {
            "promote": False,
            "reason": "It is worse by 4.",
            "metric": "heldout_loss",
            "challenger": figure,
            "champion": 5.5,
        },
        "data": "ab" * 32,
    }

    @flow
    def judging() -> dict[str, Any]:
        origin = Origin(str(world.store), open_checkpoint(made.url))
        with destination(str(world.store), settings) as at:
            return vars(publish_or_keep(at, settings, made.export, origin, compared, "held-out text"))

    state = judging(return_state=True)
    world.states.append(state)
    return state


@contextmanager
def answering(answer: Callable[[Any], None]) -> Iterator[None]:
    """Do something with a flow run as soon as it is paused, as a person does at another machine."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        paused = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
        with get_client(sync_client=True) as client:
            while time.monotonic() < deadline:
                if runs := client.read_flow_runs(flow_run_filter=paused):
                    time.sleep(0.5)  # the form is stored right after the state
                    answer(runs[0].id)
                    return
                time.sleep(0.2)

    person = threading.Thread(target=contextvars.copy_context().run, args=[wait])
    person.start()
    yield
    person.join()


def resume(**answer: Any) -> Callable[[Any], None]:
    """Return what resumes a flow run with an answer."""

    def send(flow_run_id: Any) -> None:
        with get_client(sync_client=True) as client:
            client.resume_flow_run(flow_run_id, run_input=answer)

    return send


def candidates(world: World) -> list[str]:
    """Return the names of the branches that hold candidates."""
    from huggingface_hub import HfApi

    branches = HfApi(endpoint=world.server.endpoint, token=TOKEN).list_repo_refs(REPO).branches
    return [branch.name for branch in branches if branch.name.startswith("candidate/")]


def test_a_worse_model_may_go_to_a_branch(world: World):
    """It is uploaded whole under the candidate's name, `main` stays, and it can be loaded from there."""
    before = world.main()
    verdict = judged(world, "bad", world.hub(on_worse="branch")).result()
    assert verdict["release"] is None
    assert world.main() == before
    assert candidates(world) == [f"candidate/{verdict['candidate']['name']}"]
    assert world.loads.load(REPO, candidates(world)[0]) == world.made["bad"].digests


def test_a_diverged_model_is_shown_to_nobody(world: World):
    """Without a finite figure it is neither uploaded nor put to a person, whatever the settings say."""
    before = candidates(world)
    for on_worse in ("branch", "approve"):
        verdict = judged(world, "fair", world.hub(on_worse=on_worse), figure=None).result()
        assert (verdict["release"], verdict["candidate"]) == (None, None)
    assert candidates(world) == before


def test_a_person_may_reject_it(world: World):
    """The flow run pauses until somebody answers; a rejected candidate is taken away, and the comment is kept."""
    before = world.main()
    with answering(resume(approve=False, comment="too sure of itself")):
        verdict = judged(world, "bad", world.hub(on_worse="approve")).result()
    assert (verdict["release"], verdict["candidate"]) == (None, None)
    assert verdict["decision"]["approval"] == {"approved": False, "comment": "too sure of itself"}
    assert world.main() == before
    assert candidates(world) == []


def test_nobody_answers(world: World):
    """After the time that was set the model is not served, the flow run ends Failed, and the candidate stays."""
    before = world.main()
    state = judged(world, "bad", world.hub(on_worse="approve", approval_hours=3 / 3600))
    assert state.is_failed()
    assert world.main() == before
    assert len(candidates(world)) == 1


def test_main_moves_while_a_person_thinks(world: World):
    """An approval counts against what was compared: where `main` has moved, it is a conflict, and `main` stays."""

    def move(flow_run_id: Any) -> None:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=world.server.endpoint, token=TOKEN)
        api.upload_file(path_or_fileobj=b"mine\n", path_in_repo="NOTES.md", repo_id=REPO)
        resume(approve=True)(flow_run_id)

    with answering(move):
        state = judged(world, "bad", world.hub(on_worse="approve"))
    assert state.is_failed()
    assert "main" in state.message
    assert world.loads.load(REPO) == world.made["best"].digests
    assert world.champion() == 4


def test_a_person_may_approve_it(world: World):
    """It is then served under the next version, and the record has the answer beside the decision."""
    left = candidates(world)
    with answering(resume(approve=True, comment="faster, and good enough")):
        verdict = judged(world, "bad", world.hub(on_worse="approve")).result()
    assert verdict["release"]["tag"] == "v4"
    assert world.loads.load(REPO) == world.made["bad"].digests
    kept = releases.find(str(world.store), "tiny", f"{world.server.endpoint}/{REPO}", "v4")
    assert kept is not None
    assert kept.decision["promote"] is False
    assert kept.decision["approval"] == {"approved": True, "comment": "faster, and good enough"}
    assert world.champion() == 2
    assert candidates(world) == left


def test_a_stop_before_the_record_is_made_up_for(world: World, monkeypatch: pytest.MonkeyPatch):
    """A flow run that ends between promotion and record is run again: no second commit, and the record is there."""
    address = f"{world.server.endpoint}/{REPO}"
    with monkeypatch.context() as patch:
        patch.setattr(releases, "crown", stop)
        assert world.publish("fair").is_failed()
    release = world.main()
    assert (release.tag, world.champion()) == ("v5", 2)
    assert releases.find(str(world.store), "tiny", address, "v5") is None
    again = world.publish("fair", data=world.heldout).result()["release"]
    assert (again["tag"], again["commit"], again["created"]) == ("v5", release.commit, False)
    kept = releases.find(str(world.store), "tiny", address, "v5")
    assert kept is not None
    assert (kept.step, kept.commit, world.champion()) == (1, release.commit, 1)


def stop(*_: Any) -> None:
    """End a flow run as a full disk does."""
    raise OSError("no room")


def test_a_directory_serves_releases_as_well(world: World):
    """With the same versions, record, champion and way back; no server is in it."""
    where, made = world.root / "served", world.made
    hub = HubSettings(repo_id=str(where))
    for name, tag in (("best", "v1"), ("bad", "v2")):
        assert world.publish(name, hub=hub).result()["release"]["tag"] == tag
        assert (where / "main" / "export.json").read_bytes() == Path(made[name].export, "export.json").read_bytes()
        assert world.champion() == made[name].step
    state = rollback(str(world.store), "tiny", str(where), "v1", return_state=True)
    assert state.result()["champion"] == world.champion() == made["best"].step
    assert (where / "main" / "export.json").read_bytes() == Path(made["best"].export, "export.json").read_bytes()


def test_a_token_that_may_only_read_is_told(world: World):
    """The flow run ends Failed with what to do, and says no token."""
    read_only = "hf_" + "onlyreads" * 3
    Secret(value=read_only).save("story-read-only")
    with hub_server(world.root / "hub", token=TOKEN, read_only_token=read_only) as server:
        hub = world.hub(endpoint=server.endpoint, token_block="story-read-only")
        state = world.publish("good", hub=hub)
    assert state.is_failed()
    assert "HTTP 403" in state.message
    assert read_only not in state.message


def test_a_block_that_is_not_there_is_named(world: World):
    """Before anything is sent."""
    state = world.publish("good", hub=world.hub(token_block="no-such-block"))
    assert state.is_failed()
    assert "hub.token_block 'no-such-block': no Secret block of that name" in state.message


def test_an_export_of_another_checkpoint_is_refused(world: World):
    """A record never names a checkpoint that the release was not made of."""
    state = world.publish("good", checkpoint=world.made["bad"].url)
    assert state.is_failed()
    assert "made of sha256:" in state.message


def test_a_rollback_to_what_has_no_checkpoint_any_more(world: World):
    """`main` goes back all the same, and the champion stays what it is."""
    before = world.champion()
    open_store(world.store).unpin("tiny", "released-3")
    shutil.rmtree(world.store / "tiny" / "step_0000000003")
    state = world.roll_back("v2")
    assert state.result()["champion"] == world.champion() == before
    assert world.loads.load(REPO) == world.made["good"].digests


@pytest.mark.parametrize(
    ("name", "usage"), [("publish", "EXPORT REPO [DATA]"), ("rollback", "STORE RUN REPO TAG [ENDPOINT]")]
)
def test_each_flow_is_a_program(name: str, usage: str):
    """Without arguments it says which it takes."""
    command = [sys.executable, "-m", f"flows.{name}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (1, f"usage: python -m flows.{name} {usage}\n")


def test_the_token_is_nowhere(world: World):
    """After all this it is in no file of Prefect's, of the store, the Hub or the cache, and in no log or state."""
    database = get_current_settings().server.database.connection_url
    assert database is not None
    server = Path(database.get_secret_value().removeprefix("sqlite+aiosqlite:///")).parent
    time.sleep(3)  # logs reach the server within two seconds
    texts = [json.dumps(log_of(state.state_details.flow_run_id)) for state in world.states]
    texts += [str(artifact.data) for s in world.states for artifact in artifacts_of(s.state_details.flow_run_id)]
    texts += [f"{state.message} {state.data}" for state in world.states]
    for secret in (TOKEN, "hf_" + "onlyreads" * 3):
        assert [text for text in texts if secret in text] == []
        for place in (server, world.prefect_home, world.root):
            assert [p for p in place.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()] == []
    assert any("story" in text for text in texts)
