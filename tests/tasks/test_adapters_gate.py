"""The export gate of a LoRA run: the adapter alone, or merged, is what the checkpoint holds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from worker_support import TINY, prepare_tiny

from ckpt_core import PyTorchCheckpoint
from tasks import conversion_jobs
from tasks.worker.model import build_model
from tasks.worker.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a step of a model with an adapter whose factors are not 0."""
    directory = tmp_path_factory.mktemp("lora")
    tokenizer = prepare_tiny(directory / "prepared")["tokenizer"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by a name that is deprecated
        model = get_peft_model(build_model(TINY, load_tokenizer(tokenizer), seed=3), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) / 10)
    return str(PyTorchCheckpoint(model).save(directory / "store", step=1, assets=tokenizer).url)


def gate(step: str, target: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Convert, unless that was done, and return the checks of the gate by name."""
    flags = dict.fromkeys(("allow_nonfinite", "merge_adapter", "trust_remote_code"), False)
    request = {"url": step, "target": str(target), "dtype": None, "max_shard_bytes": 10**9, **flags, **changes}
    if not target.exists():
        conversion_jobs.convert(request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by a name that is deprecated
        checks = conversion_jobs.check_export({"url": step, "export": str(target)})["checks"]
    return {check["name"]: check for check in checks}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_export_of_an_adapter_passes(step: str, tmp_path: Path, merge: bool, dtype: str | None):
    """The adapter alone, and the model with it merged, are loaded as users do, and agree with the checkpoint."""
    checks = gate(step, tmp_path / "export", merge_adapter=merge, dtype=dtype)
    assert all(check["passed"] for check in checks.values()), checks
    weights = "model.safetensors" if merge else "adapter_model.safetensors"
    assert (tmp_path / "export" / weights).is_file()


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_a_changed_export_of_an_adapter_fails(step: str, tmp_path: Path, merge: bool):
    """One different number shows in the tensors and in the logits."""
    gate(step, tmp_path / "export", merge_adapter=merge)
    file = tmp_path / "export" / ("model.safetensors" if merge else "adapter_model.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    failed = {name for name, check in gate(step, tmp_path / "export").items() if not check["passed"]}
    assert failed == {"tensors", "logits"}
