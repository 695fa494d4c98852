"""Bad input: one clear error that says what to do, a flow run that ends Failed, and nothing committed is touched."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.client.orchestration import get_client
from small_retrain import TINY_LLAMA, commit_tiny, file_digests, tiny_model, tiny_retrain, tiny_step, write_text

from ckpt_core import PyTorchCheckpoint, open_store
from flows.convert import convert
from flows.retrain import retrain
from tasks.config import ComputeSettings, HubSettings, ModelSettings

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_home")]
ONE_RANK = ComputeSettings(ranks=1, device="cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text that a tiny model can be trained on."""
    return write_text(tmp_path / "text")


def failure(flow: Any, **parameters: Any) -> str:
    """Run a flow that must fail; return the message of its final state, as the server has it."""
    state = flow(**parameters, return_state=True)
    with get_client(sync_client=True) as client:
        stored = client.read_flow_run(state.state_details.flow_run_id).state
    assert stored is not None
    assert stored.type.value == "FAILED"
    return stored.message or ""


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"model": {"architectur": {}}}, "model.architectur"),
        ({"data": {"sources": "x"}}, "data.sources"),
        ({"steps": [{"learning_rte": 1.0}]}, "steps.0.learning_rte"),
        ({"compute": {"gpus": 8}}, "compute.gpus"),
        ({"validation": {"max_loss": 1.0}}, "validation.max_loss"),
        ({"export": {"shards": 2}}, "export.shards"),
        ({"hub": {"token": "hf_x"}}, "hub.token"),
    ],
)
def test_an_unknown_key_is_named(tmp_path: Path, text: Path, changes: dict[str, Any], where: str):
    """A setting that does not exist fails the flow run before anything is made."""
    message = failure(retrain, **tiny_retrain(tmp_path / "store", text, **changes))
    assert f"{where}: Extra inputs are not permitted" in message
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("hub", "told"),
    [
        ({"repo_id": "team/m", "endpoint": "https://hub.invalid"}, "no token found; set HF_TOKEN"),
        ({"repo_id": "team/m", "endpoint": "hub.invalid"}, "is not the address of a Hub; write it like https://"),
        ({"repo_id": "team/a--b"}, "is not a repository on the Hub; write it like my-team/my-model"),
        ({"repo_id": "team/m", "token_block": "none-such"}, "no Secret block of that name; make one in Prefect"),
        ({"repo_id": "team/m", "card_template": "none-such.md"}, "hub.card_template 'none-such.md': no such file"),
        ({"repo_id": "team/m", "policy": {"metric": "bits_per_byte"}}, "not known how many bytes they were"),
        ({"repo_id": "team/m", "policy": {"metric": "accuracy", "direction": "lower"}}, "direction 'lower'"),
    ],
)
def test_a_retrain_that_could_not_be_published_does_not_begin(
    tmp_path: Path, text: Path, hub: dict[str, Any], told: str
):
    """A missing token or template, a wrong address, name or policy are told before any training."""
    message = failure(retrain, **tiny_retrain(tmp_path / "store", text, hub=HubSettings(**hub)))
    assert told in message
    assert not (tmp_path / "store").exists()


def test_a_token_never_travels_in_the_clear(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    """A Hub elsewhere without https is refused before any training."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub = HubSettings(repo_id="team/m", endpoint="http://hub.invalid")
    message = failure(retrain, **tiny_retrain(tmp_path / "store", text, hub=hub))
    assert "a token is sent over https or to this machine only; use an https address" in message
    assert "hf_secret" not in message
    assert not (tmp_path / "store").exists()


def test_an_empty_data_set_and_then_a_step_that_exists(tmp_path: Path, tokenizer: str):
    """A retrain without text says so; where somebody else then commits its step, it says that and leaves it alone."""
    empty = tmp_path / "text"
    empty.mkdir()
    (empty / "blank.txt").write_text(" \n")
    parameters = tiny_retrain(tmp_path / "store", empty, compute=ONE_RANK)
    message = failure(retrain, **parameters)
    assert message.startswith("Flow run encountered an exception: ChildFailedError: the data set is empty: ")
    assert "held no text; check `source`" in message

    step = commit_tiny(tmp_path / "store", tokenizer, step=4)
    before = file_digests(step)
    write_text(empty)
    message = failure(retrain, **parameters)
    assert f"StepExistsError: {step}: committed, but not by this retrain, which trains from step 0 to 4" in message
    assert "Give the retrain another run" in message
    assert file_digests(step) == before
    assert [checkpoint.step for checkpoint in open_store(tmp_path / "store").list("tiny")] == [4]


def test_a_retrain_with_another_architecture_says_what_does_not_fit(tmp_path: Path, text: Path, checkpoint: Path):
    """Continuing a checkpoint with other settings of the model names the tensor and both shapes."""
    before = file_digests(checkpoint)
    wider = ModelSettings(architecture={**TINY_LLAMA, "intermediate_size": 96})
    message = failure(retrain, **tiny_retrain(tmp_path / "store", text, model=wider, compute=ONE_RANK))
    assert "MismatchError" in message
    assert "mlp" in message
    assert "96" in message
    assert "64" in message
    assert file_digests(checkpoint) == before
    assert [step.step for step in open_store(tmp_path / "store").list("tiny")] == [4]


def test_a_checkpoint_whose_config_does_not_fit_is_not_converted(tmp_path: Path, checkpoint: Path, tokenizer: str):
    """Validation compares each tensor with what the config in the checkpoint's own assets makes of it."""
    config = (checkpoint / "assets" / "config.json").read_text()
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "config.json").write_text(config.replace('"intermediate_size": 64', '"intermediate_size": 96'))
    model, plain = tiny_model(tokenizer), torch.nn.Module()  # a plain module brings no config of its own
    plain.model, plain.lm_head = model.model, model.lm_head
    saved = PyTorchCheckpoint(plain).save(tmp_path / "store", run="unfit", step=1, assets=assets)
    before = file_digests(tmp_path / "store")
    message = failure(convert, checkpoint=str(saved.url))
    assert "was refused. architecture: " in message
    assert "96" in message
    assert file_digests(tmp_path / "store") == before


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    """Converting what is not there says where it was looked for, and how to see what is."""
    message = failure(convert, checkpoint=str(tmp_path / "store" / "tiny" / "step_0000000009"))
    assert "step_0000000009: no manifest.json, so no committed step; see `ckpt list` of the store" in message


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1.2 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "none", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_what_was_committed(small_disk: Path, text: Path, tokenizer: str):
    """A checkpoint that finds no room is an error that says so; the one before it stays as it was, without debris."""
    step = commit_tiny(small_disk / "store", tokenizer, step=4)
    before = file_digests(step)
    steps = [tiny_step(steps=2)]
    room = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (room.f_bavail * room.f_frsize - 400_000))
    message = failure(retrain, **tiny_retrain(small_disk / "store", text, steps=steps, compute=ONE_RANK))
    assert "No space left on device" in message
    assert file_digests(step) == before
    assert [path.name for path in step.parent.iterdir() if path.name.startswith((".staging", "step_"))] == [step.name]
