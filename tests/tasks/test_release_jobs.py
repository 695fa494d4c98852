"""The jobs of a release, called as their child processes call them; releases go to a directory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_support import TINY, prepare_tiny

from ckpt_core import PyTorchCheckpoint
from ckpt_core.errors import ArgumentError, HubConflictError
from ckpt_core.hub import served
from ckpt_core.hub.picture import CURVE_NAME
from tasks import jobs, release_jobs
from tasks.config import PolicySettings
from tasks.worker.model import build_model
from tasks.worker.tokenizer import load_tokenizer

POLICY = PolicySettings().model_dump()
CARD = {"title": "A model", "summary": "A model."}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Text, tokenizer and held-out tokens."""
    return prepare_tiny(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, prepared: dict[str, Any]) -> Callable[[float], str]:
    """A function that returns the export of a model whose logits are scaled: an untrained one is worse when sure."""
    root, made = tmp_path_factory.mktemp("exports"), dict[float, str]()

    def export(scale: float) -> str:
        if scale not in made:
            model = build_model(TINY, load_tokenizer(prepared["tokenizer"]), seed=3)
            with torch.no_grad():
                model.get_submodule("model.norm").weight.fill_(scale)
            saved = PyTorchCheckpoint(model).save(root / "store", step=len(made) + 1, assets=prepared["tokenizer"])
            request = {
                "url": str(saved.url),
                "target": str(root / f"export {scale}"),
                "dtype": None,
                "max_shard_bytes": 10**9,
                "allow_nonfinite": True,
                "merge_adapter": False,
                "trust_remote_code": False,
            }
            made[scale] = jobs.JOBS["convert"](request)["export"]["path"]
        return made[scale]

    return export


class Place:
    """A directory of releases, and the jobs on it."""

    def __init__(self, root: Path, prepared: dict[str, Any]) -> None:
        self.target = {"where": str(root / "releases"), "endpoint": None}
        self.prepared = prepared

    def compare(self, export: str, **changes: Any) -> dict[str, Any]:
        """Compare an export with what is served."""
        request = {
            "export": export,
            "data": self.prepared["heldout_tokens"],
            "policy": POLICY,
            "trust_remote_code": False,
        }
        return release_jobs.compare(request | self.target | changes)

    def stage(self, export: str, **changes: Any) -> dict[str, Any]:
        """Stage an export."""
        request = {"export": export, "private": False, "parent": None, "card": CARD, "curves": None}
        return release_jobs.stage(request | self.target | changes)

    def promote(self, candidate: dict[str, Any]) -> dict[str, Any]:
        """Promote a candidate."""
        return release_jobs.promote({"candidate": candidate} | self.target)

    def publish(self, export: str) -> dict[str, Any]:
        """Stage and promote an export."""
        return self.promote(self.stage(export))


@pytest.fixture
def place(tmp_path: Path, prepared: dict[str, Any]) -> Place:
    """A directory that is not there yet."""
    return Place(tmp_path, prepared)


def test_only_a_better_export_replaces_a_release(place: Place, exports: Callable[[float], str]):
    """Without a release any export is promoted; then only a lower loss, or the very same export, is."""
    first = place.compare(exports(40.0))
    assert (first["served"], first["champion"], first["decision"]["promote"]) == (None, None, True)
    place.publish(exports(40.0))
    same = place.compare(exports(40.0))
    assert (same["served"]["tag"], same["same"], same["decision"]) == ("v1", True, None)
    better = place.compare(exports(5.0))
    assert better["challenger"]["heldout_loss"] < better["champion"]["heldout_loss"]
    assert better["champion"] == first["challenger"]
    assert (better["same"], better["decision"]["promote"]) == (False, True)
    place.publish(exports(5.0))
    worse = place.compare(exports(40.0))
    assert (worse["served"]["tag"], worse["decision"]["promote"]) == ("v2", False)
    assert worse["decision"]["challenger"] == worse["challenger"]["heldout_loss"]
    assert worse["decision"]["champion"] == worse["champion"]["heldout_loss"]
    assert first["data"] == better["data"] == worse["data"]


def test_a_policy_may_ask_for_more(place: Place, exports: Callable[[float], str]):
    """Another metric decides the other way round, and a margin that is not reached keeps what is served."""
    place.publish(exports(40.0))
    wide = place.compare(exports(5.0), policy={**POLICY, "margin": 1000.0})
    assert not wide["decision"]["promote"]
    assert "less than the margin of 1000" in wide["decision"]["reason"]
    accuracy = place.compare(exports(5.0), policy={**POLICY, "metric": "accuracy"})
    assert accuracy["decision"]["metric"] == "accuracy"
    assert not accuracy["decision"]["promote"]  # a scale changes no order: both guess the same tokens
    assert "equal is not better" in accuracy["decision"]["reason"]


def test_what_is_no_number_never_wins(place: Place, exports: Callable[[float], str]):
    """A diverged model is not promoted even where nothing is served, and its figures are null in JSON."""
    compared = place.compare(exports(math.nan))
    assert compared["challenger"]["heldout_loss"] is None
    assert not compared["decision"]["promote"]
    assert "cannot win" in compared["decision"]["reason"]


def test_the_untrained_model_is_measured_as_they_are(place: Place, exports: Callable[[float], str]):
    """It has the same metrics on the same data; knowing nothing, it guesses evenly."""
    untrained = {"model": TINY.model_dump(), "tokenizer": place.prepared["tokenizer"], "seed": 3}
    common = {"data": place.prepared["heldout_tokens"], "trust_remote_code": False}
    figures = release_jobs.evaluate_untrained(untrained | common)
    assert figures["heldout_loss"] == pytest.approx(math.log(TINY.architecture["vocab_size"]), abs=0.5)
    assert figures.keys() == place.compare(exports(5.0))["challenger"].keys()


def test_a_candidate_is_not_served_before_it_is_promoted(place: Place, exports: Callable[[float], str], tmp_path: Path):
    """Staged with its card and curve, it changes nothing; promoted it is v1, and promoting it again makes nothing."""
    curves = {"train": [[1, 3.0], [2, 2.0]], "heldout": [[2, 2.5]]}
    candidate = place.stage(exports(5.0), curves=curves)
    assert served(place.target["where"]) is None
    release = place.promote(candidate)
    assert (release["tag"], release["created"]) == ("v1", True)
    again = place.promote(candidate)
    assert (again["tag"], again["commit"], again["created"]) == ("v1", release["commit"], False)
    main = Path(place.target["where"]) / "main"
    assert f"./{CURVE_NAME}" in (main / "README.md").read_text()
    assert (main / CURVE_NAME).read_bytes().startswith(b"\x89PNG")


def test_what_is_served_already_can_be_named_by_its_commit(place: Place, exports: Callable[[float], str]):
    """A flow that finds its export served promotes that commit: nothing is sent, and the release is what it was."""
    release = place.publish(exports(5.0))
    named = {"where": place.target["where"], "name": "", "commit": release["commit"], "parent": release["commit"]}
    assert place.promote(named) == {**release, "created": False}


def test_a_rejected_candidate_is_taken_away(place: Place, exports: Callable[[float], str]):
    """What is served stays, and the candidate cannot be promoted any more than others."""
    release = place.publish(exports(5.0))
    candidate = place.stage(exports(40.0))
    release_jobs.discard({"candidate": candidate} | place.target)
    now = served(place.target["where"])
    assert now is not None
    assert (now.commit, now.tag) == (release["commit"], "v1")


def test_a_decision_against_what_was_served_before_is_a_conflict(place: Place, exports: Callable[[float], str]):
    """Where `main` has moved since the comparison, nothing is staged."""
    first = place.publish(exports(40.0))
    place.publish(exports(5.0))
    with pytest.raises(HubConflictError, match="main is at"):
        place.stage(exports(1.0), parent=first["commit"])


def test_rolling_back_serves_the_old_content_by_a_new_commit(place: Place, exports: Callable[[float], str]):
    """The tag stays where it was, and an unknown one is named."""
    first = place.publish(exports(40.0))
    second = place.publish(exports(5.0))
    back = release_jobs.roll_back({"to": "v1"} | place.target)
    assert back["tag"] == "v1"
    assert back["commit"] not in {first["commit"], second["commit"]}
    assert place.compare(exports(40.0))["same"]
    with pytest.raises(ArgumentError, match="no tag 'v9'"):
        release_jobs.roll_back({"to": "v9"} | place.target)
