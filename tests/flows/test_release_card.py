"""The facts of a model card, from an export and its checkpoint; equal whichever flow run asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_core import PyTorchCheckpoint, open_checkpoint
from ckpt_core.errors import DamagedError
from ckpt_core.hub import render_card
from ckpt_core.store import Checkpoint
from flows.card import curves, model_card

COMPARED = {
    "challenger": {"heldout_loss": 2.5},
    "champion": {"heldout_loss": 2.75},
    "served": {"tag": None, "commit": "f00d" * 10},
    "untrained": {"heldout_loss": 8.3},
    "decision": {"promote": True, "reason": "better"},
    "data": "ab" * 32,
}


@pytest.fixture
def export(tmp_path: Path) -> str:
    """A directory with the record of a conversion."""
    directory = tmp_path / "export"
    directory.mkdir()
    source = {"digest": "sha256:ab", "run": "nightly", "step": 7}
    (directory / "export.json").write_text(json.dumps({"source": source, "libraries": {"torch": "2.13"}}))
    return str(directory)


def checkpoint(store: Path, hyperparameters: dict[str, Any] | None = None, **facts: Any) -> Checkpoint:
    """Commit a small checkpoint with these facts."""
    module = torch.nn.Linear(2, 2)
    return open_checkpoint(
        str(PyTorchCheckpoint(module, hyperparameters).save(store, run="nightly", step=7, **facts).url)
    )


def test_an_export_alone_is_told_by_its_record(export: str):
    """Run, step, digest and libraries are what export.json says; there is no figure and no curve."""
    card = model_card(export, None, None, data=None)
    assert card["title"] == "Run nightly, step 7"
    assert card["lineage"] == {"checkpoint": "sha256:ab", "run": "nightly", "step": 7}
    assert card["libraries"] == {"torch": "2.13"}
    assert "metrics" not in card
    assert curves(None) is None
    assert "Not evaluated." in render_card(repo_id="team/model", **card)


def test_a_checkpoint_tells_more(export: str, tmp_path: Path):
    """Parent, code, data and flow run, and the Hub's models and data sets that it was made of."""
    lineage = {
        "parent": {"step": 4, "url": "file:///x"},
        "code_revision": "c0ffee",
        "data": "sha256 of it",
        "data_source": "hf:team/texts",
        "flow_run": "a flow run",
    }
    metrics = {"loss_curve": [[1, 3.0], [7, 2.0]], "heldout_curve": [[7, 2.5]]}
    made = checkpoint(tmp_path, {"pretrained": "Some/Model"}, lineage=lineage, metrics=metrics)
    card = model_card(export, made, None, data=None)
    told = {"parent": "step 4", "code revision": "c0ffee", "training data": "sha256 of it", "flow run": "a flow run"}
    assert card["lineage"].items() >= told.items()
    assert card["lineage"]["checkpoint"] == made.manifest.digest()
    assert (card["base_model"], card["datasets"]) == ("Some/Model", ["team/texts"])
    assert curves(made) == {"train": [[1, 3.0], [7, 2.0]], "heldout": [[7, 2.5]]}


def test_what_is_not_on_the_hub_is_not_claimed_to_be(export: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory of weights that looks like an id, and texts on disk, are no links."""
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made = checkpoint(tmp_path, {"pretrained": "some/model"}, lineage={"data_source": "texts/mine"})
    card = model_card(export, made, None, data=None)
    assert "base_model" not in card
    assert "datasets" not in card


def test_figures_stand_beside_those_of_others(export: str):
    """What was served before is named by its tag or commit, and the data by its name and fingerprint."""
    card = model_card(export, None, COMPARED, data="held out of texts")
    assert card["metrics"] == {"heldout_loss": 2.5}
    assert card["compared"] == {
        "Served before (f00df00df00d)": {"heldout_loss": 2.75},
        "Untrained": {"heldout_loss": 8.3},
    }
    assert card["evaluated_on"] == {"name": "held out of texts", "type": "held-out", "fingerprint": "ab" * 32}
    assert card["decision"] == "better"
    assert "held out of texts" in render_card(repo_id="team/model", **card)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"source": 1}'])
def test_an_export_without_a_sound_record_is_named(export: str, text: str | None):
    """The error says what to do."""
    path = Path(export) / "export.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(DamagedError, match=r"export\.json: no record of a conversion .*; convert again"):
        model_card(export, None, None, data=None)
