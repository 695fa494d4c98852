"""The comparison of a retrain whose model began with pretrained weights of one Hub, and is released on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from small_releases import make_export
from small_retrain import TINY, tiny_data, write_text

from ckpt_core import hub
from ckpt_core.testing.hub_server import hub_server
from tasks.config import HubSettings, ModelSettings
from tasks.publication import Destination, compare
from tasks.worker.prepare import prepare

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_home")]
BASE = "team/base"


@flow
def comparing(at: Destination, export: str, data: str, untrained: dict[str, Any]) -> dict[str, Any]:
    """Compare an export with what is served."""
    return compare(at, HubSettings(repo_id=at.where, endpoint=at.endpoint), export, data, untrained)


@pytest.mark.long
def test_pretrained_weights_come_from_the_hub_they_are_on(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
):
    """What the model was before is loaded as for training, by `HF_ENDPOINT`, though it is released elsewhere."""
    text = write_text(tmp_path / "text")
    prepared = prepare(TINY, tiny_data(text), tmp_path / "prepared", tokenizer)
    made = make_export(tmp_path / "store", tokenizer, step=1, scale=1.0)
    with hub_server(tmp_path / "theirs") as theirs, hub_server(tmp_path / "ours") as ours:
        hub.publish(made.export, BASE, endpoint=theirs.endpoint)
        monkeypatch.setenv("HF_ENDPOINT", theirs.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        untrained = {"model": ModelSettings(pretrained=BASE).model_dump(), "tokenizer": tokenizer, "seed": 0}
        at = Destination("team/released", ours.endpoint, f"{ours.endpoint}/team/released")
        compared = comparing(at, made.export, prepared["heldout_tokens"], untrained)
    assert (compared["served"], compared["champion"]) == (None, None)
    assert compared["untrained"] == pytest.approx(compared["challenger"])
