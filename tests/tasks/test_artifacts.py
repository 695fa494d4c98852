"""Artifacts: what a person reads in the Prefect UI."""

from __future__ import annotations

import base64
import json
import logging
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ckpt_core import PyTorchCheckpoint, open_checkpoint
from tasks import artifacts, cards, lineage
from tasks.publication import Destination

FIGURES = {"heldout_loss": 2.5, "perplexity": 12.1825, "accuracy": 0.4}
COMPARED = {
    "challenger": FIGURES,
    "served": {"tag": "v3", "commit": "f00d" * 10},
    "champion": {"heldout_loss": 2.75, "perplexity": 15.6426, "accuracy": None},
    "untrained": {"heldout_loss": 8.3},
    "same": False,
}
DECISION = {"promote": True, "reason": "The challenger's heldout_loss is 2.5, the champion's 2.75; better."}
URL = "https://hub.test/team/model/tree/v4"
RELEASE = {"tag": "v4", "repo_id": "team/model", "commit": "0123abcd", "files": 7, "url": URL}
CANDIDATE = {"name": "feedfacecafebeef"}
HUB = Destination("team/model", "https://hub.test", "https://hub.test/team/model")


def verdict(**changes: Any) -> dict[str, Any]:
    """Return what became of an export, by default published."""
    return {"decision": DECISION, "release": RELEASE, "candidate": None} | changes


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Catch what would be sent to the Prefect server."""
    made: list[dict[str, Any]] = []
    for name in ("create_markdown_artifact", "create_table_artifact"):
        monkeypatch.setattr(artifacts, name, lambda data, **rest: made.append({"data": data, **rest}))
    return made


def save(store: Path, **facts: Any) -> str:
    """Commit a small checkpoint and return its URL."""
    return str(PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(store, run="Nightly_1", step=7, **facts).url)


def test_a_checkpoint_card_tells_what_a_trainer_recorded(tmp_path: Path, shown: list[dict[str, Any]]):
    """Losses, parent, hardware, digest, how long its save blocked, and the curve are in the card."""
    metrics = {
        "train_loss": 2.0,
        "heldout_loss": 2.25,
        "loss_curve": [[1, 3.0], [7, 2.0]],
        "heldout_curve": [[7, 2.25]],
    }
    hardware = {"device": "H200", "backend": "nccl"}
    made_from = {"parent": {"step": 3}, "hardware": hardware, "training_step": "pretrain"}
    url = save(tmp_path, metrics=metrics, lineage=made_from)
    record = {"step": 7, "waited_s": 0.5, "blocked_s": 0.25}
    (tmp_path / "Nightly_1" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    artifacts.checkpoint_card(url)
    [card] = shown
    assert card["key"] == "checkpoint-nightly-1"
    digest = open_checkpoint(url).manifest.digest()
    assert card["description"] == "step 7, held-out loss 2.2500"
    for row in (
        "| Training step | pretrain |",
        "| Train loss | 2.0000 |",
        "| Held-out loss | 2.2500 |",
        "| Parent | step 3 |",
        "| Hardware | H200, nccl, 1 rank |",
        f"| Digest | `{digest[:19]}` |",
        "| Training stood still | 0.250 s for this save, and 0.500 s for the save before it |",
    ):
        assert row in card["data"]
    assert f"| Where | `{url}` |" in card["data"]
    assert "![loss curve](data:image/svg+xml;base64," in card["data"]


def test_a_checkpoint_card_needs_no_metrics(tmp_path: Path, shown: list[dict[str, Any]]):
    """What a trainer of the user's own did not record is said to be unknown."""
    artifacts.checkpoint_card(save(tmp_path))
    [card] = shown
    assert "| Held-out loss | not measured |" in card["data"]
    assert "| Training stood still | not recorded |" in card["data"]
    assert "| Parent | none: trained from scratch or from pretrained weights |" in card["data"]
    assert "loss curve" not in card["data"]


def test_the_loss_curve_is_a_picture_of_both_losses():
    """It is one SVG that needs no other file, and names its axes and curves."""
    text = cards.loss_curve([[1, 3.0], [2, 2.5]], [[2, 2.75]])
    found = re.fullmatch(r"!\[loss curve\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", text)
    assert found is not None
    svg = base64.b64decode(found[1])
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    for label in (b"step", b"loss, nats a token", b"train", b"held-out"):
        assert b"<!-- " + label + b" -->" in svg


def test_no_curve_is_no_picture():
    """Without a training loss the card has no picture at all."""
    assert cards.loss_curve([], []) == ""


def test_a_table_of_checks_is_flat(shown: list[dict[str, Any]]):
    """Each cell is plain text, and the description names the checks that failed."""
    checks = [
        {"name": "digests", "passed": True, "detail": "3 files"},
        {"name": "values", "passed": False, "detail": "holds NaN"},
    ]
    artifacts.report_table("validation", "tiny", checks)
    [table] = shown
    assert table["data"] == [
        {"check": "digests", "verdict": "pass", "found": "3 files"},
        {"check": "values", "verdict": "FAIL", "found": "holds NaN"},
    ]
    assert table["description"] == "FAILED: values"
    artifacts.report_table("validation", "tiny", checks[:1] * 3)
    assert shown[1]["description"] == "all 3 checks passed"


def test_an_export_card_lists_files_and_rules(shown: list[dict[str, Any]]):
    """Each file is there with its size and the start of its digest."""
    files = {"model.safetensors": {"bytes": 1234567, "sha256": "ab" * 32}}
    export = {"architecture": "LlamaForCausalLM", "path": "/x/export", "files": files, "rules": ["cast: to bfloat16"]}
    artifacts.export_card("tiny", export)
    [card] = shown
    assert "| model.safetensors | 1,234,567 | `abababababababab…` |" in card["data"]
    assert "- cast: to bfloat16" in card["data"]


def test_a_release_card_tells_the_decision_and_the_figures(shown: list[dict[str, Any]]):
    """Where it is, why it was published, and each figure beside those of what was served before."""
    artifacts.release_card("tiny", HUB, verdict(), COMPARED)
    [card] = shown
    assert card["description"] == "Published v4"
    for line in (
        "| Where | https://hub.test/team/model |",
        f"| Link | [team/model v4]({URL}) |",
        DECISION["reason"],
        "| | New model | Served before (v3) | Untrained |",
        "| held-out loss | 2.5 | 2.75 | 8.3 |",
        "| accuracy of the next token | 0.4 | not measured | not measured |",
    ):
        assert line in card["data"].splitlines()


def test_a_local_release_is_shown_with_the_command_that_serves_it(shown: list[dict[str, Any]]):
    """The address of the local Hub is gone with the run, so its directory is told instead."""
    local = Destination("team/model", "http://127.0.0.1:41234", "hub/team/model", "/my store/hub")
    release = {**RELEASE, "url": "file:///my%20store/hub/team/model"}
    artifacts.release_card("tiny", local, verdict(release=release), COMPARED)
    [card] = shown
    assert "| Where | `ckpt hub serve '/my store/hub'` |" in card["data"]
    assert "| Link | `file:///my%20store/hub/team/model` |" in card["data"]
    assert "41234" not in card["data"]


def test_a_release_card_tells_what_was_kept(shown: list[dict[str, Any]]):
    """Without a release the old one is named, and why it stays; a model that has no tag by its commit."""
    artifacts.release_card("tiny", HUB, verdict(release=None), COMPARED)
    untagged = {**COMPARED, "served": {"tag": None, "commit": "f00d" * 10}}
    artifacts.release_card("tiny", HUB, verdict(release=None), untagged)
    assert [card["description"] for card in shown] == ["Kept v3", "Kept f00df00df00d"]
    assert DECISION["reason"] in shown[0]["data"]


def test_a_release_card_tells_what_a_person_said(shown: list[dict[str, Any]]):
    """Candidate, answer and comment are in it, the comment on one line."""
    asked = {**DECISION, "approval": {"approved": False, "comment": "too\nslow | bad"}}
    artifacts.release_card("tiny", HUB, verdict(decision=asked, release=None, candidate=CANDIDATE), COMPARED)
    [card] = shown
    assert "| Asked | not approved: too slow \\| bad |" in card["data"]
    assert "| Candidate | `candidate/feedfacecafebeef`, uploaded and not served |" in card["data"]


def test_a_release_without_an_evaluation_says_so(shown: list[dict[str, Any]]):
    """There is no table of figures."""
    artifacts.release_card("tiny", HUB, verdict(decision=None), None)
    [card] = shown
    assert card["data"].startswith("## Published v4\n\nNot evaluated.\n\n| | |\n")


def test_a_release_that_was_served_already_says_so(shown: list[dict[str, Any]]):
    """With why it was published then, where that is known."""
    same = {**COMPARED, "challenger": None, "champion": None, "same": True}
    artifacts.release_card("tiny", HUB, verdict(), same)
    artifacts.release_card("tiny", HUB, verdict(decision=None), same)
    told = "It is what was served before: nothing was sent."
    assert [card["data"].splitlines()[2] for card in shown] == [f"{told} {DECISION['reason']}", told]


def test_a_rollback_card_tells_what_is_served_and_what_comes_next(shown: list[dict[str, Any]]):
    """The tag, the new commit, and the step that the next retrain starts from."""
    artifacts.rollback_card("tiny", HUB, {**RELEASE, "tag": "v1"}, 7)
    [card] = shown
    assert card["description"] == "Rolled back to v1"
    assert "| Commit | `0123abcd` |" in card["data"]
    assert "| Champion | step 7 |" in card["data"]


@pytest.mark.parametrize("run", ["Nightly_1", "a.b", "x--y", "Z" * 64, "1.", "a_"])
def test_a_key_suits_prefect(run: str, shown: list[dict[str, Any]]):
    """Every run's name becomes lower-case letters, digits and single dashes."""
    artifacts.report_table("export-check", run, [])
    assert re.fullmatch(r"export-check-[a-z0-9]+(-[a-z0-9]+)*", shown[0]["key"])


def test_a_bar_in_a_path_stays_in_its_cell(tmp_path: Path, shown: list[dict[str, Any]]):
    """It does not cut the table's row in two."""
    local = Destination("team/model", "http://127.0.0.1:41234", "hub/team/model", str(tmp_path / "a|b"))
    artifacts.release_card("tiny", local, verdict(), COMPARED)
    [row] = [line for line in shown[0]["data"].splitlines() if "Where" in line]
    assert row.count("|") - row.count("\\|") == 3


def test_what_the_server_does_not_take_fails_no_work(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """An artifact that cannot be sent is a warning in the log, which names it and says why."""

    def refuse(*content: Any, **names: Any) -> None:
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr(artifacts, "create_markdown_artifact", refuse)
    monkeypatch.setattr(artifacts, "get_run_logger", lambda: logging.getLogger("run"))
    artifacts.release_card("tiny", HUB, verdict(), COMPARED)
    assert "the artifact release-tiny (Published v4) is not shown: ConnectError('connection refused')" in caplog.text


def summary(**changes: Any) -> dict[str, Any]:
    """Return what a retrain of two training steps made, by default released; as far as a lineage shows it."""
    parent = {"step": 4, "url": "file:///store/tiny/step_0000000004", "digest": "xxh3_128:" + "a1" * 16}
    first = {
        "step": 16,
        "digest": "xxh3_128:" + "b2" * 16,
        "training_step": "pretrain",
        "data_source": "/texts/*.txt",
        "data": "sha256:" + "c3" * 32,
        "heldout_loss": 2.75,
        "parent": parent,
    }
    second = first | {"step": 18, "digest": "xxh3_128:" + "d4" * 16, "training_step": "finetune", "heldout_loss": 2.5}
    whole = {
        "step": 18,
        "checkpoints": [first, second],
        "files": {
            "config.json": {"bytes": 7, "sha256": "e5" * 32},
            "model.safetensors": {"bytes": 9, "sha256": "f6" * 32},
        },
        "decision": DECISION,
        "champion": {"tag": "v3", "commit": "f00d" * 10, "loss": 2.75},
        "release": RELEASE,
    }
    return whole | changes


def test_a_lineage_leads_from_data_to_the_release():
    """Each training step, its data and its parent, checkpoints with their digests, the export and the release."""
    assert lineage.diagram(summary()).split("\n  ") == [
        "flowchart TD",
        'data0[("/texts/#42;.txt<br/>sha256:c3c3c3c3c3c3")]',
        'data0 -->|"pretrain"| c0',
        'data0 -->|"finetune"| c1',
        'parent(["checkpoint, step 4<br/>xxh3_128:a1a1a1a1a1a1"])',
        "parent -->|weights| c0",
        'c0(["checkpoint, step 16<br/>xxh3_128:b2b2b2b2b2b2<br/>held-out loss 2.7500"])',
        'c1(["checkpoint, step 18<br/>xxh3_128:d4d4d4d4d4d4<br/>held-out loss 2.5000"])',
        "c0 -->|weights| c1",
        'export["export, safetensors<br/>sha256:f6f6f6f6f6f6"]',
        "c1 -->|convert| export",
        'champion[["served before: v3<br/>held-out loss 2.7500"]]',
        'release[["release v4<br/>team/model<br/>commit 0123abcd"]]',
        "export ==>|published| release",
        "champion -.->|replaced by| release",
    ]


def test_a_lineage_without_a_release_ends_at_what_stayed_served():
    """A model that was not better leads to no release, and one that began without a checkpoint has no parent."""
    first = summary()["checkpoints"][0] | {"parent": None}
    told = lineage.diagram(summary(release=None, checkpoints=[first]))
    assert 'export -.->|"not released"| champion' in told
    assert "release[[" not in told
    assert "parent" not in told


HOSTILE = ['a"]; click c0 href "javascript:alert(1)"', "a|b", "a\nb", "<b>&amp;`", "ü#35;", "x" * 500]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_out_of_a_lineage(name: str):
    """Whatever a source is called, it is one label of plain characters and numbered ones, on one line."""
    made = summary()["checkpoints"][0] | {"data_source": name, "training_step": name}
    lines = lineage.diagram(summary(checkpoints=[made])).splitlines()
    assert len(lines) == len(lineage.diagram(summary(checkpoints=summary()["checkpoints"][:1])).splitlines())
    data, edge = (line for line in lines if line.strip().startswith("data0"))
    assert re.fullmatch(r'  data0\[\("[A-Za-z0-9 .,:/+=()#;<>-]{1,600}"\)\]', data)
    assert data.count('"') == edge.count('"') == 2
    assert data.count("<") == 1


def test_the_card_of_a_lineage_says_where_its_facts_are(shown: list[dict[str, Any]]):
    """A person finds the diagram, and a tool the file."""
    artifacts.lineage_card("tiny", summary(), "/store/tiny/retrains/step_0000000018.json")
    [card] = shown
    assert (card["key"], card["description"]) == ("lineage-tiny", "step 18, released as v4")
    assert "```mermaid\nflowchart TD\n" in card["data"]
    assert "`/store/tiny/retrains/step_0000000018.json`" in card["data"]
