"""What the worker's tests share: a tiny text, a tiny model, prepared data, jobs, and what a checkpoint holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ckpt_core import PyTorchCheckpoint, open_store
from tasks.config import ComputeSettings, DataSettings, Job, ModelSettings, TrainingStep
from tasks.worker.prepare import prepare

REPOSITORY = Path(__file__).parents[2]

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,  # so that equal weights need equal random numbers
}
TINY = ModelSettings(architecture=TINY_LLAMA)


def write_text(directory: Path, documents: int = 60) -> Path:
    """Write distinct small documents of words that follow each other in a regular way."""
    directory.mkdir(parents=True)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    for number in range(documents):
        lines = [" ".join(words[(number + line + i) % 6] for i in range(8)) for line in range(12)]
        (directory / f"{number}.txt").write_text(f"document {number}\n" + "\n".join(lines) + "\n")
    return directory


def tiny_data(source: Path | str, **changes: Any) -> DataSettings:
    """Return settings that suit the tiny text."""
    return DataSettings(
        **{"source": str(source), "heldout_every": 6, "sequence_length": 32, "heldout_tokens": 1024} | changes
    )


def prepare_tiny(directory: Path) -> dict[str, Any]:
    """Write and prepare the tiny text below a directory."""
    return prepare(TINY, tiny_data(write_text(directory / "text")), directory / "prepared")


def tiny_job(
    prepared: dict[str, Any], store: Path, *, start_step: int = 0, end_step: int = 12, ranks: int = 1, **step: Any
) -> Job:
    """Return a job on prepared data; `step` changes the training step's settings."""
    settings = {
        "steps": end_step - start_step,
        "batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "checkpoint_every": 4,
        "evaluate_every": 4,
    }
    return Job(
        store=str(store),
        run="tiny",
        start_step=start_step,
        end_step=end_step,
        seed=7,
        model=TINY,
        step=TrainingStep(**settings | step),
        compute=ComputeSettings(ranks=ranks, device="cpu"),
        tokenizer=prepared["tokenizer"],
        train_tokens=prepared["train_tokens"],
        heldout_tokens=prepared["heldout_tokens"],
        lineage={"data": prepared["fingerprint"]},
    )


def write_job(job: Job) -> Path:
    """Write a job beside its store."""
    path = Path(f"{job.store}.job.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(job.model_dump_json())
    return path


def torchrun(job: Job) -> subprocess.CompletedProcess[str]:
    """Run a job under the real torchrun to its end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={job.compute.ranks}", "-m", "tasks.worker", str(write_job(job))]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)


def committed_steps(job: Job) -> list[int]:
    """Return the steps in the job's store, oldest first."""
    return [c.step for c in open_store(job.store).list(job.run)]


def manifest(job: Job, step: int) -> Any:
    """Return the manifest of a committed step."""
    return next(c.manifest for c in open_store(job.store).list(job.run) if c.step == step)


def final_state(job: Job) -> dict[str, bytes]:
    """Return the raw bytes of every weight and optimizer tensor of the newest checkpoint."""
    newest = open_store(job.store).latest(job.run)
    assert newest is not None
    assert newest.step == job.end_step
    checkpoint = PyTorchCheckpoint.from_url(newest.url)
    tensors = dict(checkpoint["module_state_dict"])
    for number, state in checkpoint["optimizer_state_dict"]["state"].items():
        tensors |= {f"optimizer {number} {name}": value for name, value in state.items()}
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def step_records(job: Job) -> list[dict[str, Any]]:
    """Return the lines of steps in the job's metrics.jsonl without their times."""
    lines = (Path(job.store) / job.run / "metrics.jsonl").read_text().splitlines()
    steps = [entry for entry in map(json.loads, lines) if "loss" in entry]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in steps]
