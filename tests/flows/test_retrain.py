"""The retrain flow, told as the story of one store: refused by the Hub, published, improved, and kept."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from prefect.settings import get_current_settings
from small_convert import task_names
from small_retrain import (
    PROGRAMS,
    REPOSITORY,
    artifacts_of,
    events_of,
    file_digests,
    log_of,
    tiny_data,
    tiny_retrain,
    tiny_step,
    write_text,
)

import flows.retrain
from ckpt_core import open_checkpoint, open_store
from ckpt_core.hub import served
from ckpt_core.testing.hub_server import hub_server
from flows.retrain import retrain
from flows.summary import Summary, json_schema
from tasks import record
from tasks.config import ComputeSettings, HubSettings

pytestmark = pytest.mark.timeout(600)
SECRET = "hf_" + "readonlysecret" * 2


@dataclass(frozen=True)
class Story:
    """Where it happens; its directories hold spaces, as people's do."""

    root: Path
    prefect_home: Path

    @property
    def store(self) -> Path:
        """The store."""
        return self.root / "my store"

    @property
    def run(self) -> Path:
        """The directory of its only run."""
        return self.store / "tiny"

    def parameters(self, **changes: Any) -> dict[str, Any]:
        """Return the parameters of this story's retrain."""
        return tiny_retrain(self.store, self.root / "text", **changes)


@dataclass(frozen=True)
class Chapter:
    """One retrain: its state, and what lay in the run's committed step when it had ended."""

    state: Any
    committed: dict[str, str]

    @property
    def flow_run_id(self) -> Any:
        """The flow run's id."""
        return self.state.state_details.flow_run_id

    @property
    def result(self) -> dict[str, Any]:
        """What the flow returned."""
        return self.state.result()


@pytest.fixture(scope="module")
def story(prefect_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A text, and a store that is not there yet."""
    root = tmp_path_factory.mktemp("a story")
    write_text(root / "text")
    write_text(root / "other text", stride=3)
    return Story(root, prefect_home)


@pytest.fixture(scope="module")
def refused(story: Story) -> Chapter:
    """The first retrain, with a token that may only read."""
    with pytest.MonkeyPatch.context() as patch, hub_server(story.root / "hub", read_only_token=SECRET) as server:
        patch.setenv("HF_TOKEN", SECRET)
        hub = HubSettings(repo_id="local/tiny", endpoint=server.endpoint)
        state = retrain(**story.parameters(hub=hub), return_state=True)
    return Chapter(state, file_digests(story.run / "step_0000000004"))


@pytest.fixture(scope="module")
def first(story: Story, refused: Chapter) -> Chapter:
    """The same retrain again, with a Hub that accepts it."""
    return Chapter(retrain(**story.parameters(), return_state=True), file_digests(story.run / "step_0000000004"))


@pytest.fixture(scope="module")
def second(story: Story, first: Chapter) -> dict[str, Any]:
    """The next retrain, in a fresh process and one rank: two training steps, the second on other text."""
    steps = [
        tiny_step(name="pretrain", steps=12, checkpoint_every=4),
        tiny_step(name="finetune", steps=2, learning_rate=1e-5, data=tiny_data(story.root / "other text")),
    ]
    parameters = story.parameters(steps=steps, compute=ComputeSettings(ranks=1, device="cpu"))
    plain = json.dumps(parameters, default=lambda settings: settings.model_dump())
    server = get_current_settings().to_environment_variables(exclude_unset=True)
    command = [sys.executable, str(PROGRAMS / "fresh_retrain.py")]
    child = subprocess.run(
        command, input=plain, env={**os.environ, **server}, capture_output=True, text=True, check=False, timeout=500
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def tags(story: Story) -> list[str]:
    """Return the tag of the newest release in the store's own Hub, if there is one."""
    with hub_server(story.store / "hub") as server:
        release = served("local/tiny", endpoint=server.endpoint)
    return [release.tag] if release else []


def stored_log(flow_run_id: Any, awaited: str) -> str:
    """Return a flow run's log when the server has a message in it, which takes a moment."""
    for _ in range(60):
        text = "\n".join(log_of(flow_run_id))
        if awaited in text:
            return text
        time.sleep(0.5)
    raise AssertionError(f"{awaited!r} is not in the log of the flow run:\n{text}")


def holding(text: str, directory: Path) -> list[Path]:
    """Return the files below a directory that have a text in them."""
    return [path for path in directory.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_refused_publication_fails_the_flow_run_and_says_what_to_do(refused: Chapter):
    """A token without the right to write ends the flow run Failed, with the Hub's answer and the remedy."""
    assert refused.state.is_failed()
    message = refused.state.message
    assert "HTTP 403" in message
    assert "the token lacks write permission to this repository; set HF_TOKEN to one that has it" in message
    assert "Traceback" not in message


def test_no_secret_is_kept(story: Story, refused: Chapter):
    """The token is in no file of Prefect's, neither log nor state nor artifact, and in none of the store's."""
    assert SECRET not in stored_log(refused.flow_run_id, "the token lacks write permission")
    database = get_current_settings().server.database.connection_url
    assert database is not None
    server = Path(database.get_secret_value().removeprefix("sqlite+aiosqlite:///")).parent
    assert holding("the token lacks write permission", server) != []  # it is where logs and states lie
    assert holding("model.safetensors", story.root) != []
    assert [holding(SECRET, place) for place in (server, story.prefect_home, story.root)] == [[], [], []]


def test_a_rerun_keeps_what_was_committed_and_publishes_it(story: Story, refused: Chapter, first: Chapter):
    """After a stop between commit and publication the same retrain repeats no work and publishes v1."""
    assert first.result["release"]["tag"] == "v1"
    assert first.result["release"]["created"]
    assert first.result["step"] == 4
    assert refused.committed
    assert first.committed == refused.committed
    states = task_names(first.flow_run_id)
    found = ["train train to step 4", "validate tiny", "convert tiny", "check export of tiny"]
    assert {name for name, state in states.items() if state == "Cached"} == set(found)
    assert set(states.values()) == {"Cached", "Completed"}
    assert [checkpoint.step for checkpoint in open_store(story.store).list("tiny")][:1] == [4]
    assert open_store(story.store).pins("tiny")["champion"] >= 4


def test_a_retrain_shows_its_artifacts(first: Chapter):
    """Prefect has a card with its loss curve, two tables of checks, the export's files, the release and the lineage."""
    made = {artifact.key: artifact for artifact in artifacts_of(first.flow_run_id)}
    kinds = ("checkpoint", "validation", "export", "export-check", "release", "lineage")
    assert set(made) == {f"{kind}-tiny" for kind in kinds}
    picture = re.search(r"!\[loss curve\]\(data:image/svg\+xml;base64,([^)]+)\)", made["checkpoint-tiny"].data)
    assert picture is not None
    assert b"<svg" in base64.b64decode(picture[1])
    validation = json.loads(made["validation-tiny"].data)
    of_the_step = ["manifest", "digests", "structure", "crc32", "values", "trainer", "architecture"]
    assert [row["check"] for row in validation] == [*of_the_step, "held-out loss"]
    assert {row["verdict"] for row in validation} == {"pass"}
    assert {row["verdict"] for row in json.loads(made["export-check-tiny"].data)} == {"pass"}
    assert "model.safetensors" in made["export-tiny"].data
    assert "## Published v1" in made["release-tiny"].data
    assert '\n  release[["release v1<br/>local/tiny<br/>commit ' in made["lineage-tiny"].data


def test_the_summary_is_whole(story: Story, first: Chapter):
    """It tells losses, checkpoint, each verdict, the release, and lines that load the model."""
    result = first.result
    lines = Summary(**result).text(story.root).splitlines()
    loss = re.compile(r"loss +(\d\.\d{3}) before, (\d\.\d{3}) after \(held-out, nats a token\)").fullmatch(lines[1])
    assert loss is not None
    assert float(loss[1]) > float(loss[2]) == round(result["loss"], 3)
    assert f"checkpoint  {story.run / 'step_0000000004'}" in lines
    verdicts = [line for line in lines if line.startswith("pass  ")]
    assert len(verdicts) == len(result["checks"]) == 13
    assert any(line.startswith("release     published local/tiny v1, commit ") for line in lines)
    assert f'  model = AutoModelForCausalLM.from_pretrained("{result["export"]}")' in lines
    assert '  model = AutoModelForCausalLM.from_pretrained("local/tiny", revision="v1")' in lines
    assert any(line.endswith("ckpt hub serve 'my store/hub' --port 8765") for line in lines)


def test_the_flow_process_never_imports_torch(second: dict[str, Any]):
    """Neither importing the flow nor a whole retrain loads torch or what stands on it into the flow's process."""
    assert second["before"] == second["after"] == []


def test_the_next_retrain_continues_and_publishes_the_next_version(first: Chapter, second: dict[str, Any]):
    """It starts from the newest checkpoint, at another number of ranks too, and a better model becomes v2."""
    result = second["result"]
    assert result["release"]["tag"] == "v2"
    assert result["champion"]["tag"] == "v1"
    assert result["loss"] < result["champion"]["loss"]
    assert result["initial_loss"] == pytest.approx(first.result["loss"], rel=1e-4)
    assert result["step"] == 18


def test_training_steps_chain(story: Story, second: dict[str, Any]):
    """The second step starts from the first one's weights, on its own text; each has a checkpoint of its own."""
    pretrained, finetuned = (open_checkpoint(story.run / f"step_{step:010d}").manifest for step in (16, 18))
    assert (pretrained.lineage["training_step"], finetuned.lineage["training_step"]) == ("pretrain", "finetune")
    assert pretrained.lineage["parent"]["step"] == 12
    assert [made["parent"]["step"] for made in second["result"]["checkpoints"]] == [4, 16]
    assert finetuned.lineage["parent"]["step"] == 16
    assert finetuned.metrics["initial_heldout_loss"] == pytest.approx(pretrained.metrics["heldout_loss"], rel=1e-5)
    assert pretrained.lineage["data"] != finetuned.lineage["data"]
    assert pretrained.world_size == finetuned.world_size == 1


def test_each_checkpoint_has_a_card(story: Story, second: dict[str, Any]):
    """A card is made for each checkpoint of a retrain, those in the middle of a training step too."""
    made = artifacts_of(second["result"]["flow_run"])
    cards = [a.description.partition(",")[0] for a in made if a.key == "checkpoint-tiny"]
    assert cards == ["step 8", "step 12", "step 16", "step 18"]
    record = story.run / "metrics.jsonl"
    saved = [entry["step"] for entry in map(json.loads, record.read_text().splitlines()) if "blocked_s" in entry]
    assert saved == [4, 8, 12, 16, 18]


def test_training_is_shown_by_one_progress_and_one_curve_a_step(second: dict[str, Any]):
    """Both end with the last step, and the curve is there."""
    made = [a for a in artifacts_of(second["result"]["flow_run"]) if a.key.startswith(("progress", "training"))]
    assert [a.key for a in made] == [
        f"{kind}-tiny-{step}" for step in ("pretrain", "finetune") for kind in ("progress", "training")
    ]
    assert [a.data for a in made if a.type == "progress"] == [100, 100]
    assert all(a.description.endswith(", complete") for a in made)
    assert all("![loss curve]" in a.data for a in made if a.type == "markdown")


def test_commits_and_the_release_are_events_with_a_url(story: Story, second: dict[str, Any]):
    """Each committed step is an event, and the last of a training step says so; so are progress and the release."""
    told = events_of(second["result"]["flow_run"], awaited=7)
    committed = [event["payload"] for event in told if event["event"] == "ckpt.checkpoint.committed"]
    assert [(payload["step"], payload["complete"]) for payload in committed] == [
        (8, False), (12, False), (16, True), (18, True),
    ]  # fmt: skip
    assert committed[-1]["url"] == second["result"]["checkpoint"]
    [released] = [event for event in told if event["event"] == "ckpt.release.published"]
    assert released["payload"]["url"] == second["result"]["release"]["url"]
    assert released["resource"]["prefect.resource.name"] == "local/tiny v2"
    progress = [event["payload"] for event in told if event["event"] == "ckpt.training.progress"]
    assert [(payload["url"], payload["percent"]) for payload in progress] == [(story.run.as_uri(), 100)] * 2


def test_the_facts_of_a_retrain_stay_as_json(story: Story, second: dict[str, Any]):
    """Tools find what the flow returned in a file named by its step, as the schema says it."""
    facts = json.loads((story.run / "retrains" / "step_0000000018.json").read_text())
    assert facts == second["result"]
    schema = json_schema()
    jsonschema.validate(facts, schema)
    undescribed = {name for name, field in schema["properties"].items() if "description" not in field}
    assert undescribed == set()
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'integer'"):
        jsonschema.validate({**facts, "step": "18"}, schema)


@pytest.mark.long
def test_a_model_that_is_not_better_is_kept_back(
    story: Story, second: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A trainer of the user's own takes our worker's place; its worse model ends in 'kept v2' and exit status 0.

    The checkpoints of both releases stay, though only two of the newest were to.
    """
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    compute = ComputeSettings(ranks=1, device="cpu", trainer="scrambling_trainer")
    parameters = story.parameters(compute=compute, keep_checkpoints=2)
    monkeypatch.setattr(flows.retrain, "retrain", partial(retrain, **parameters))
    assert flows.retrain.main() == 0
    printed = capsys.readouterr().out
    reason = r"The challenger's heldout_loss is [\d.]+, the champion's [\d.]+; it is worse by [\d.]+\."
    assert re.search(f"^kept v2  {reason}$", printed, re.MULTILINE)
    assert "loss        not measured before, " in printed
    assert 'revision="' not in printed
    assert tags(story) == ["v2"]
    assert [checkpoint.step for checkpoint in open_store(story.store).list("tiny")] == [4, 18, 22]


def test_a_trainer_that_commits_nothing_is_named(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A trainer that ends well without its checkpoint ends the flow run Failed, and the program with 1."""
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    compute = ComputeSettings(ranks=1, device="cpu", trainer="idle_trainer")
    parameters = tiny_retrain(tmp_path / "store", story.root / "text", compute=compute)
    monkeypatch.setattr(flows.retrain, "retrain", partial(retrain, **parameters))
    assert flows.retrain.main() == 1
    printed = capsys.readouterr().err
    assert "retrain failed: " in printed
    assert "idle_trainer ended well; expected a checkpoint at step 4" in printed


def test_an_interrupted_retrain_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Ctrl-C ends the program with 130 and a line instead of a traceback."""

    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(flows.retrain, "retrain", interrupted)
    assert flows.retrain.main() == 130
    assert capsys.readouterr().err == "\nretrain stopped; run it again to continue\n"


def test_two_retrains_of_one_run_exclude_each_other(story: Story, tmp_path: Path):
    """While one works on a run, another one waits for as long as a dying one may take; then it fails and says why."""
    compute = ComputeSettings(ranks=2, device="cpu", grace_seconds=0.1)
    parameters = tiny_retrain(tmp_path / "store", story.root / "text", compute=compute)
    with record.only_retrain(parameters["store"], "tiny"):
        state = retrain(**parameters, return_state=True)
    assert state.is_failed()
    assert "another retrain is working on it; wait for it to end, or give another run" in state.message
    assert open_store(tmp_path / "store").list("tiny") == []


def test_importing_the_flows_loads_no_heavy_module():
    """A fresh import of all flows loads neither torch nor what is only needed when a task runs."""
    heavy = ["torch", "transformers", "datasets", "huggingface_hub", "matplotlib", "uvicorn", "numpy"]
    flows = "flows.convert, flows.maintain, flows.publish, flows.retrain, flows.rollback"
    script = f"import {flows}, sys; print([name for name in {heavy} if name in sys.modules])"
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert child.stdout == "[]\n"
