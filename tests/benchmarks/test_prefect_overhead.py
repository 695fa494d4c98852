"""What Prefect's side costs: a retrain without its work, a progress update, an import, a long list."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from temporary_server import temporary_server
from transformers import LlamaConfig, LlamaForCausalLM

from ckpt_core import PyTorchCheckpoint, open_checkpoint, open_store
from ckpt_core.store import step_name
from flows.retrain import retrain
from tasks import jobs, launch, live_view, training
from tasks.config import HubSettings, Job, TrainingStep

RUN = "overhead"
STEPS = 1000
MOST_SECONDS, MOST_MS, MOST_UPDATE_MS, MOST_IMPORT_SECONDS = 10, 100, 20, 0.3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A running Prefect server, with a home of its own."""
    with temporary_server(tmp_path_factory.mktemp("server"), tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what a training and a conversion would make: `model`, a config, and `export`."""
    root = tmp_path_factory.mktemp("trained")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, architectures=["LlamaForCausalLM"], **sizes))
    model.config.save_pretrained(root / "model")
    saved = PyTorchCheckpoint(model).save(root / "store", run=RUN, step=1, assets=root / "model")
    request = {"run": RUN, "url": str(saved.url), "target": str(root / "export"), "dtype": None}
    flags = {"allow_nonfinite": False, "merge_adapter": False, "trust_remote_code": False}
    jobs.convert({**request, **flags, "max_shard_bytes": 10**9})
    return root


class Instantly:
    """Does at once what child processes do in a retrain."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def train(self, job: Job, *_: Any) -> None:
        """Commit the last step of a job."""
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(self._root / "model"))
        saved = PyTorchCheckpoint(model, {"start_step": job.start_step})
        saved.save(job.store, run=job.run, step=job.end_step, assets=self._root / "model", lineage=job.lineage)

    def run_json(self, _: str, arguments: list[str], **__: Any) -> Any:
        """Answer a job."""
        name, request = arguments
        return getattr(self, f"_{name}")(json.loads(request))

    def _prepare(self, request: Mapping[str, Any]) -> dict[str, Any]:
        tokens = Path(request["output"]) / "tokens"
        tokens.mkdir(parents=True, exist_ok=True)
        sets = {"train": {"source": "text"}, "heldout": {"source": "text"}}
        places = dict.fromkeys(("directory", "tokenizer", "train_tokens", "heldout_tokens"), str(tokens))
        return {**places, **sets, "vocab_size": 16, "fingerprint": "xxh3_128:0", "unigram_loss": 2.0}

    def _validate(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"checks": [{"name": "digests", "passed": True, "detail": "all"}], "heldout_loss": 1.0}

    def _convert(self, request: Mapping[str, Any]) -> dict[str, Any]:
        shutil.copytree(self._root / "export", request["target"])
        from ckpt_core.export import read_export

        made = read_export(Path(request["target"]))
        facts = {"path": str(made.path), "files": made.files, "rules": made.rules, "architecture": made.architecture}
        return {"target": request["target"], "undone": [], "export": facts, "reused": False}

    def _check_export(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"checks": [{"name": "logits", "passed": True, "detail": "bit for bit"}]}

    def _compare(self, _: Mapping[str, Any]) -> dict[str, Any]:
        figures = {"challenger": {"heldout_loss": 1.0}, "champion": None}
        decision = {"promote": True, "reason": "the first", "metric": "heldout_loss", "challenger": 1.0}
        return {**figures, "decision": {**decision, "champion": None}, "served": None, "same": False, "data": None}

    def _evaluate_untrained(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"heldout_loss": 3.0}

    def _stage(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"where": request["where"], "name": "0" * 16, "commit": "1", "parent": ""}

    def _promote(self, request: Mapping[str, Any]) -> dict[str, Any]:
        named = {"repo_id": request["where"], "endpoint": None, "tag": "v1", "commit": "2", "url": request["where"]}
        return {**named, "files": 3, "bytes": 1, "created": True, "replaced": ()}


def test_a_retrain_without_its_work(
    server: None, race: Any, benchmark: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retrain whose training, conversion and publication take no time; the tasks' time is from the first to the last.

    Prefect itself takes a second to end any flow, which runs beside the tasks.
    """
    instantly, seconds, each, tasks = Instantly(trained), list[float](), list[float](), list[int]()
    monkeypatch.setattr(training, "run_ranks", instantly.train)
    monkeypatch.setattr(launch, "run_json", instantly.run_json)

    def measure() -> None:
        root = tmp_path / str(len(seconds))
        with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: root / "results"}):
            began = time.perf_counter()
            step = TrainingStep(steps=1, batch_size=2)
            state = retrain(
                store=str(root / "store"),
                run=RUN,
                steps=[step],
                hub=HubSettings(repo_id=str(root / "releases")),
                return_state=True,
            )
            seconds.append(time.perf_counter() - began)
        assert state.is_completed(), state.message
        runs = task_runs(state.state_details.flow_run_id)
        span = max(run.end_time for run in runs) - min(run.start_time for run in runs)
        each.append(1000 * span.total_seconds() / len(runs))
        tasks.append(len(runs))

    benchmark.pedantic(measure, rounds=race.rounds)
    whole, one = statistics.median(seconds), statistics.median(each)
    goal, good = f"under {MOST_SECONDS} s", whole < MOST_SECONDS
    race.note("retrain without its work", "seconds", whole, goal, good=good, detail=f"{whole:.2f} s")
    goal, good = f"under {MOST_MS} ms", one < MOST_MS
    race.note(f"each of its {tasks[0]} tasks", "ms", one, goal, good=good, detail=f"{one:.0f} ms")


def timed(function: Any, *arguments: Any, **options: Any) -> float:
    """Return how many seconds a call takes."""
    began = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - began


def task_runs(flow_run_id: Any) -> list[Any]:
    """Return the task runs of a flow run, as the server has them a moment later."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        for _ in range(60):
            runs = client.read_task_runs(flow_run_filter=chosen)
            if runs and all(run.state and run.state.is_final() for run in runs):
                return runs
            time.sleep(0.5)
    raise AssertionError(f"task runs of {flow_run_id} are not all there: {runs}")


def test_a_progress_update(server: None, race: Any, benchmark: Any) -> None:
    """Sending the newest value of a progress bar takes the thread that does it less than 20 ms."""

    @flow
    def training_flow() -> list[float]:
        with get_client(sync_client=True) as client:
            board = live_view.Board(client)
            board.put("progress", "progress-overhead", 0.0, "step 0 of 100")
            return [timed(board.put, "progress", "progress-overhead", p, f"step {p}") for p in range(1, 51)]

    updates: list[float] = []
    benchmark.pedantic(lambda: updates.extend(training_flow()), rounds=1)
    median = 1000 * statistics.median(updates)
    goal, good = f"under {MOST_UPDATE_MS} ms", median < MOST_UPDATE_MS
    race.note("progress update", "ms", median, goal, good=good, detail="of 50")


def test_import(race: Any, benchmark: Any) -> None:
    """Importing `flows.retrain` loads no torch, and takes little more than what it needs of Prefect."""
    found: dict[str, list[float]] = {"from prefect import flow, task": [], "import flows.retrain": []}

    def measure() -> None:
        for statement, seconds in found.items():
            seconds.append(import_seconds(statement))

    benchmark.pedantic(measure, rounds=race.rounds, warmup_rounds=1)
    base, mine = (statistics.median(seconds[1:] or seconds) for seconds in found.values())
    detail = f"{mine:.2f} s, {base:.2f} s"
    goal, good = f"at most {MOST_IMPORT_SECONDS} s more", mine - base <= MOST_IMPORT_SECONDS
    race.note("import flows.retrain", "import of flow and task", mine - base, goal, good=good, detail=detail)


def import_seconds(statement: str) -> float:
    """Return how long an import takes in a new interpreter."""
    code = f"import sys, time; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
    none = "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", f"{code}; {none}"], check=True, capture_output=True, text=True)
    return float(done.stdout)


def test_a_long_list(race: Any, benchmark: Any, trained: Path, tmp_path: Path) -> None:
    """A thousand checkpoints of a store are listed in under a second."""
    first = trained / "store" / RUN / step_name(1)
    manifest = open_checkpoint(first).manifest
    for step in range(1, STEPS + 1):
        target = tmp_path / "store" / RUN / step_name(step)
        shutil.copytree(first, target, copy_function=os.link)
        (target / "manifest.json").unlink()
        fields = {name: value for name, value in vars(manifest).items() if name != "step"}
        (target / "manifest.json").write_bytes(type(manifest)(step=step, **fields).to_bytes())
    seconds: list[float] = []

    def measure() -> None:
        began = time.perf_counter()
        assert len(open_store(tmp_path / "store").list(RUN)) == STEPS
        seconds.append(time.perf_counter() - began)

    benchmark.pedantic(measure, rounds=race.rounds)
    median = statistics.median(seconds)
    race.note("list 1,000 checkpoints", "seconds", median, "under 1 s", good=median < 1, detail=f"{median:.2f} s")
