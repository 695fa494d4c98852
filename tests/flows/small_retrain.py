"""What the tests of flows share: a retrain of a tiny model, and what Prefect and a store hold after it."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Artifact

from ckpt_core import PyTorchCheckpoint
from ckpt_core.store import local_path
from tasks.config import ComputeSettings, DataSettings, HubSettings, ModelSettings, TrainingStep
from tasks.worker.model import build_model
from tasks.worker.tokenizer import load_tokenizer

PROGRAMS = Path(__file__).with_name("programs")
REPOSITORY = Path(__file__).parents[2]
TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TINY = ModelSettings(architecture=TINY_LLAMA)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def write_text(directory: Path, stride: int = 1, documents: int = 24) -> Path:
    """Write small documents whose words follow each other in a regular way that `stride` decides."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        lines = [" ".join(WORDS[(number + line + i * stride) % 8] for i in range(8)) for line in range(10)]
        (directory / f"{number}.txt").write_text(f"document {number}\n" + "\n".join(lines) + "\n")
    return directory


def tiny_data(source: Path, **changes: Any) -> DataSettings:
    """Return settings that suit the tiny text."""
    tiny = {"source": str(source), "heldout_every": 6, "heldout_tokens": 512, "sequence_length": 32}
    return DataSettings(**tiny | changes)


def tiny_step(**changes: Any) -> TrainingStep:
    """Return a training step that learns something in a moment."""
    tiny = {"steps": 4, "learning_rate": 1e-2, "warmup_steps": 1, "batch_size": 4, "micro_batch_size": 2}
    return TrainingStep(**tiny | changes)


def tiny_retrain(store: Path, text: Path, **changes: Any) -> dict[str, Any]:
    """Return the parameters of a retrain of a tiny model in two ranks."""
    tiny = {
        "store": str(store),
        "run": "tiny",
        "model": TINY,
        "data": tiny_data(text),
        "steps": [tiny_step()],
        "compute": ComputeSettings(ranks=2, device="cpu"),
        "hub": HubSettings(repo_id="local/tiny"),
    }
    return tiny | changes


def tiny_model(tokenizer: str) -> Any:
    """Build the tiny model, untrained."""
    return build_model(TINY, load_tokenizer(tokenizer), seed=0)


def commit_tiny(store: Path, tokenizer: str, *, step: int) -> Path:
    """Commit an untrained tiny model with config and tokenizer to the run `tiny`, and return the step's directory."""
    saved = PyTorchCheckpoint(tiny_model(tokenizer)).save(store, run="tiny", step=step, assets=tokenizer)
    return local_path(str(saved.url))


def file_digests(directory: Path) -> dict[str, str]:
    """Return the sha256 of every file below a directory, by its path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def artifacts_of(flow_run_id: Any) -> list[Artifact]:
    """Return the artifacts that a flow run's tasks made to be looked at, oldest first."""
    made_by = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=made_by)
    return sorted((artifact for artifact in found if artifact.key), key=lambda artifact: str(artifact.created))


def log_of(flow_run_id: Any) -> list[str]:
    """Return the messages that a flow run has logged so far, as the server has them."""
    with get_client(sync_client=True) as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
    return [log.message for log in logs]


def events_of(flow_run_id: str, *, awaited: int) -> list[dict[str, Any]]:
    """Return this project's events of a flow run, oldest first, once the server has as many as are awaited."""
    question = {
        "filter": {
            "event": {"prefix": ["ckpt."]},
            "any_resource": {"id": [f"prefect.flow-run.{flow_run_id}"]},
            "order": "ASC",
        }
    }
    with get_client(sync_client=True) as client:
        for _ in range(60):
            found = client.request("POST", "/events/filter", json=question).json()["events"]
            if len(found) >= awaited:
                return found
            time.sleep(0.5)
    raise AssertionError(f"{len(found)} events, expected {awaited}: {[event['event'] for event in found]}")
