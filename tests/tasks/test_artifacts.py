"""Artifacts: what a person reads in the Prefect UI."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_core import PyTorchCheckpoint
from tasks import artifacts
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
RELEASE = {"tag": "v4", "repo_id": "team/model", "commit": "0123abcd", "files": 7}
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
    """Losses, parent, hardware and the curve are in the card."""
    metrics = {
        "train_loss": 2.0,
        "heldout_loss": 2.25,
        "loss_curve": [[1, 3.0], [7, 2.0]],
        "heldout_curve": [[7, 2.25]],
    }
    hardware = {"device": "H200", "backend": "nccl"}
    url = save(tmp_path, metrics=metrics, lineage={"parent": {"step": 3}, "hardware": hardware})
    artifacts.checkpoint_card(url)
    [card] = shown
    assert card["key"] == "checkpoint-nightly-1"
    assert card["description"] == "step 7"
    for row in (
        "| Train loss | 2.0000 |",
        "| Held-out loss | 2.2500 |",
        "| Parent | step 3 |",
        "| Hardware | H200, nccl, 1 ranks |",
    ):
        assert row in card["data"]
    assert f"| Where | `{url}` |" in card["data"]
    assert "![loss curve](data:image/svg+xml;base64," in card["data"]


def test_a_checkpoint_card_needs_no_metrics(tmp_path: Path, shown: list[dict[str, Any]]):
    """What a trainer of the user's own did not record is said to be unknown."""
    artifacts.checkpoint_card(save(tmp_path))
    [card] = shown
    assert "| Held-out loss | not measured |" in card["data"]
    assert "| Parent | none: trained from scratch or from pretrained weights |" in card["data"]
    assert "loss curve" not in card["data"]


def test_the_loss_curve_is_a_picture_of_both_losses():
    """It is one SVG that needs no other file, and names its axes and curves."""
    text = artifacts.loss_curve([[1, 3.0], [2, 2.5]], [[2, 2.75]])
    found = re.fullmatch(r"!\[loss curve\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", text)
    assert found is not None
    svg = base64.b64decode(found[1])
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    for label in (b"step", b"loss, nats a token", b"train", b"held-out"):
        assert b"<!-- " + label + b" -->" in svg


def test_no_curve_is_no_picture():
    """Without a training loss the card has no picture at all."""
    assert artifacts.loss_curve([], []) == ""


def test_a_table_of_checks_is_flat(shown: list[dict[str, Any]]):
    """Each cell is plain text, and one failed check shows in the description."""
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
    assert table["description"] == "a check failed"


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
        DECISION["reason"],
        "| | New model | Served before (v3) | Untrained |",
        "| held-out loss | 2.5 | 2.75 | 8.3 |",
        "| accuracy of the next token | 0.4 | not measured | not measured |",
    ):
        assert line in card["data"].splitlines()


def test_a_local_release_is_shown_with_the_command_that_serves_it(shown: list[dict[str, Any]]):
    """The address of the local Hub is gone with the run, so its directory is told instead."""
    local = Destination("team/model", "http://127.0.0.1:41234", "hub/team/model", "/my store/hub")
    artifacts.release_card("tiny", local, verdict(), COMPARED)
    [card] = shown
    assert "| Where | `ckpt hub serve '/my store/hub'` |" in card["data"]
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
    assert card["data"].endswith("\n\nNot evaluated.\n")


def test_a_release_that_was_served_already_says_so(shown: list[dict[str, Any]]):
    """With why it was published then, where that is known."""
    same = {**COMPARED, "challenger": None, "champion": None, "same": True}
    artifacts.release_card("tiny", HUB, verdict(), same)
    artifacts.release_card("tiny", HUB, verdict(decision=None), same)
    told = "It is what was served before: nothing was sent."
    assert [card["data"].splitlines()[-1] for card in shown] == [f"{told} {DECISION['reason']}", told]


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
