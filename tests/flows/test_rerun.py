"""What a flow run finds that an earlier one did: taken where it is still there and the same, else done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import FailedRun
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, PREFECT_TASKS_REFRESH_CACHE, temporary_settings
from small_convert import task_names
from small_retrain import TINY, artifacts_of, commit_tiny, file_digests, tiny_step

from ckpt_core import PyTorchCheckpoint
from flows.convert import convert
from tasks import training
from tasks.config import ComputeSettings, Job
from tasks.results import ReferenceSerializer

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_home")]
PLAN = "sha256:" + "1" * 64
MADE = dict.fromkeys(["validate tiny", "convert tiny", "check export of tiny"], "Completed")
FOUND = dict.fromkeys(MADE, "Cached")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of this file's own results."""
    directory = tmp_path_factory.mktemp("results")
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: directory}):
        yield directory


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs of which events tell that they were committed."""
    urls: list[str] = []
    monkeypatch.setattr(training.events, "committed", lambda url, **_: urls.append(url))
    return urls


@flow(persist_result=False, result_serializer=ReferenceSerializer())
def trains(job: Job) -> PyTorchCheckpoint:
    """Train as a retrain does."""
    return training.train(job)


def job_of(store: Path, **changes: Any) -> Job:
    """Return a training job that ends with step 4."""
    names = dict.fromkeys(["tokenizer", "train_tokens", "heldout_tokens"], "none")
    job = {"store": store.as_uri(), "run": "tiny", "start_step": 0, "end_step": 4, "seed": 0, "lineage": {"plan": PLAN}}
    return Job(**names | job | {"model": TINY, "step": tiny_step(), "compute": ComputeSettings(ranks=1)} | changes)


def commit(store: Path, plan: str = PLAN) -> str:
    """Commit that step as a trainer does; return its URL."""
    saved = PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(store, run="tiny", step=4, lineage={"plan": plan})
    return str(saved.url)


def tasks_of(state: Any) -> dict[str, str]:
    """Return the state's name of each task run, by its own."""
    return task_names(state.state_details.flow_run_id)


def test_a_step_is_trained_once(results: Path, tmp_path: Path, told: list[str]):
    """The next flow run finds it, and gives the same reference; the commit is told once."""
    url = commit(tmp_path)
    first, again = (trains(job_of(tmp_path), return_state=True) for _ in range(2))
    assert [tasks_of(first), tasks_of(again)] == [{"train train to step 4": name} for name in ("Completed", "Cached")]
    assert first.result().to_dict() == again.result().to_dict()
    assert again.result().url == url
    assert told == [url]


def test_a_step_that_is_gone_is_trained_again(results: Path, tmp_path: Path, told: list[str]):
    """What is committed in its place is another checkpoint: told, and found from then on."""
    url = commit(tmp_path)
    first = trains(job_of(tmp_path))
    shutil.rmtree(Path(url.removeprefix("file://")))
    commit(tmp_path)
    second, third = (trains(job_of(tmp_path), return_state=True) for _ in range(2))
    assert [*tasks_of(second).values(), *tasks_of(third).values()] == ["Completed", "Cached"]
    assert second.result().to_dict() == third.result().to_dict() != first.to_dict()
    assert told == [url, url]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"seed": 1}, "Completed"),
        ({"step": tiny_step(learning_rate=1e-3)}, "Completed"),
        ({"lineage": {"plan": PLAN, "data": "another text"}}, "Completed"),
        ({"compute": ComputeSettings(ranks=1, trainer="my.trainer")}, "Completed"),
        ({"compute": ComputeSettings(ranks=4, grace_seconds=5), "tokenizer": "elsewhere"}, "Cached"),
        ({"lineage": {"plan": PLAN, "flow_run": "another"}}, "Cached"),
    ],
)
def test_only_an_equal_job_is_found(results: Path, tmp_path: Path, changes: dict[str, Any], state: str):
    """Equal in what decides the weights: not the flow run, nor paths, nor how many ranks train them."""
    commit(tmp_path)
    trains(job_of(tmp_path))
    assert [*tasks_of(trains(job_of(tmp_path, **changes), return_state=True)).values()] == [state]


def test_nothing_is_taken_where_a_person_says_so(results: Path, tmp_path: Path):
    """Prefect's setting has each task run again."""
    commit(tmp_path)
    trains(job_of(tmp_path))
    with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: True}):
        state = trains(job_of(tmp_path), return_state=True)
    assert [*tasks_of(state).values()] == ["Completed"]


def test_a_retried_flow_run_finds_what_it_did(results: Path, tmp_path: Path, told: list[str]):
    """Stopped by an error after a task, the same flow run does not do it again."""
    url, stops, seen = commit(tmp_path), ["no room"], list[PyTorchCheckpoint]()

    @flow(retries=1, persist_result=False, result_serializer=ReferenceSerializer())
    def stopped_once() -> None:
        seen.append(training.train(job_of(tmp_path)))
        if stops:
            raise OSError(stops.pop())

    state = stopped_once(return_state=True)
    assert state.is_completed()
    assert [checkpoint.url for checkpoint in seen] == [url, url]
    assert told == [url]


def test_nothing_is_pickled(tmp_path: Path):
    """Neither what a task returns nor how a task or a flow fails; a failure is read as its text."""
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        commit(tmp_path / "own")
        trains(job_of(tmp_path / "own"))
        commit(tmp_path / "other", plan="of somebody else")
        failed = trains(job_of(tmp_path / "other"), return_state=True)
        convert(str(tmp_path / "missing"), return_state=True)
        with get_client(sync_client=True) as client:
            stored = client.read_flow_run(failed.state_details.flow_run_id).state
        with pytest.raises(FailedRun, match=r"^StepExistsError: .*committed, but not by this retrain"):
            stored.result()
    records = [json.loads(path.read_bytes()) for path in (tmp_path / "results").iterdir()]
    of_tasks = [json.loads(record["result"]) for record in records if isinstance(record, dict)]
    assert [fact["$type"] for fact in of_tasks if isinstance(fact, dict)] == ["checkpoint"]
    assert [fact.partition(":")[0] for fact in of_tasks if isinstance(fact, str)] == ["StepExistsError"]
    of_flows = [record.partition(":")[0] for record in records if isinstance(record, str)]
    assert sorted(of_flows) == ["NotACheckpointError", "StepExistsError"]
    assert len(records) == len(of_tasks) + len(of_flows)


@dataclass(frozen=True)
class Converted:
    """A step, its export, and the flow run that made it."""

    step: Path
    export: Path
    first: Any
    files: dict[str, str]


@pytest.fixture(scope="module")
def converted(results: Path, prefect_home: Path, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """What the tests below find, one after the other, and change."""
    step = commit_tiny(tmp_path_factory.mktemp("converted") / "store", tokenizer, step=4)
    first = convert(str(step), return_state=True)
    export = Path(first.result()["export"])
    return Converted(step, export, first, file_digests(export))


def flip(file: Path) -> None:
    """Change a bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_an_export_that_is_gone_is_made_again(converted: Converted):
    """And checked again; the checkpoint is not validated again, and both flow runs show all of it."""
    shutil.rmtree(converted.export)
    again = convert(str(converted.step), return_state=True)
    assert tasks_of(converted.first) == MADE
    assert tasks_of(again) == MADE | {"validate tiny": "Cached"}
    assert file_digests(converted.export) == converted.files
    third = convert(str(converted.step), return_state=True)
    assert tasks_of(third) == FOUND
    assert converted.first.result() == again.result() == third.result()
    shown = [{a.key: a.data for a in artifacts_of(s.state_details.flow_run_id)} for s in (converted.first, third)]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 3


def test_an_export_that_was_changed_is_checked_again(converted: Converted):
    """One bit of its weights, its size being the same, fails the flow run; it is told what to do."""
    flip(converted.export / "model.safetensors")
    state = convert(str(converted.step), return_state=True)
    assert tasks_of(state) == FOUND | {"check export of tiny": "Failed"}
    assert f"export {converted.export} was refused. tensors: differ" in state.message
    assert state.message.endswith(". Delete it to have it made again.")


def test_a_checkpoint_that_was_changed_is_validated_again(converted: Converted):
    """One bit of a shard ends the flow run, though the checkpoint had passed before; nothing is converted."""
    flip(next((converted.step / "model").glob("*.distcp")))
    state = convert(str(converted.step), return_state=True)
    assert tasks_of(state) == {"validate tiny": "Failed"}
    assert "was refused. digests: " in state.message
