"""The maintain flow: one store with a run of each kind, looked after once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.client.orchestration import get_client
from prefect.states import State
from small_retrain import artifacts_of

from ckpt_core import PyTorchCheckpoint, open_store
from ckpt_core.errors import ArgumentError, NotACheckpointError
from ckpt_core.store import CHAMPION
from flows.maintain import main, maintain
from tasks import record


def commit(store: Path, run: str, *steps: int) -> None:
    """Commit small models to a run."""
    for step in steps:
        PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(store, run=run, step=step)


def steps(store: Path, run: str) -> list[int]:
    """Return the steps of a run."""
    return [checkpoint.step for checkpoint in open_store(store).list(run)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a sound run, a damaged one, and one that a retrain works on."""
    store = tmp_path_factory.mktemp("maintain") / "runs"
    for run in ("broken", "busy", "sound"):
        commit(store, run, 1, 2, 3)
    open_store(store).pin("sound", CHAMPION, 1)
    [data] = (store / "broken" / "step_0000000003" / "model").glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    return store


@pytest.fixture(scope="module")
def maintained(prefect_home: Path, store: Path) -> State[Any]:
    """How the flow ended on that store."""
    with record.only_retrain(str(store), "busy"):
        return maintain(str(store), sample_percent=100, keep_last=1, return_state=True)


def test_damage_fails_the_flow_at_its_end(maintained: State[Any], store: Path):
    """The message names store, run and step; by then the sound run is pruned, and nothing of the damaged one is."""
    assert maintained.is_failed()
    assert f"{store.as_uri()}: damaged, and left as it is: run broken, step 3: " in str(maintained.message)
    assert steps(store, "sound") == [1, 3]
    assert steps(store, "broken") == [1, 2, 3]


def test_a_run_with_a_retrain_at_work_is_left_alone(maintained: State[Any], store: Path):
    """Nothing of it is pruned, and the table says why."""
    assert steps(store, "busy") == [1, 2, 3]
    [line] = [row for row in table(maintained) if row["run"] == "busy"]
    assert line["deleted"] == "a retrain is at work"


def test_the_report_is_a_flat_table_and_a_summary(maintained: State[Any], store: Path):
    """The table has a line for each run, of plain cells; the summary names what is damaged."""
    rows = table(maintained)
    assert [(row["run"], row["damaged"], row["deleted"]) for row in rows] == [
        ("broken", "3", "damaged"),
        ("busy", "none", "a retrain is at work"),
        ("sound", "none", "2"),
    ]
    assert all(isinstance(cell, str | int) for row in rows for cell in row.values())
    [summary] = [artifact for artifact in shown(maintained) if artifact.type == "markdown"]
    assert f"## Damaged checkpoints: {store.as_uri()}" in str(summary.data)
    assert "9 checkpoints of 3 runs, 4 of them read by sample: 1 damaged, 1 deleted." in str(summary.data)


def test_an_event_tells_of_it(maintained: State[Any], store: Path):
    """`ckpt.store.maintained` has the figures as JSON, with the store as its resource."""
    payload = event_about(store)["payload"]
    assert payload["deleted"] == {"sound": [2]}
    assert payload["left"] == {"broken": "damaged", "busy": "a retrain is at work"}
    assert payload["errors"] == []
    [damaged] = payload["damaged"]
    assert damaged.startswith("run broken, step 3: ")


def test_the_command_says_what_was_done(
    prefect_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """It exits with 0 for a sound store, and says how many checkpoints were read and deleted."""
    commit(tmp_path / "runs", "a", 1, 2)
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "1"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"{(tmp_path / 'runs').as_uri()}: 1 checkpoints sound, 1 deleted"
    assert steps(tmp_path / "runs", "a") == [2]


def test_a_best_without_a_newest_is_a_mistake(prefect_home: Path, tmp_path: Path):
    """Nothing would be deleted, so what is to stay besides is refused before anything is read."""
    state = maintain(str(tmp_path), keep_best=2, metric="heldout_loss", return_state=True)
    with pytest.raises(ArgumentError, match="keep_last is empty, so nothing is deleted"):
        state.result()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_last": 1, "keep_best": 1, "metric": "score"}, "is not known; say which"),
        ({"keep_last": 1, "mode": "max"}, "of what"),
        ({"mode": "max"}, "keep_last is empty"),
        ({"store": "nowhere"}, "no such directory"),
    ],
)
def test_an_unclear_request_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
):
    """The flow fails before anything is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises((ArgumentError, NotACheckpointError), match=message):
        maintain.fn(**settings)


def shown(state: State[Any]) -> list[Any]:
    """Return the artifacts of a flow run."""
    return artifacts_of(state.state_details.flow_run_id)


def table(state: State[Any]) -> list[dict[str, Any]]:
    """Return the rows of the table that a flow run made."""
    [artifact] = [artifact for artifact in shown(state) if artifact.type == "table"]
    return json.loads(artifact.data) if isinstance(artifact.data, str) else artifact.data


def event_about(store: Path) -> dict[str, Any]:
    """Return the event about a store; the server writes events down every few seconds."""
    body = {"filter": {"event": {"name": ["ckpt.store.maintained"]}, "resource": {"id": [store.as_uri()]}}}
    with get_client(sync_client=True) as client:
        for _ in range(60):
            events = client.request("POST", "/events/filter", json=body).json()["events"]
            if events:
                return events[0]
            time.sleep(0.5)
    raise AssertionError("no event in 30 s")
