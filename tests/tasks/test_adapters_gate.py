"""The export gate of a LoRA run: the adapter alone, or merged, is what the checkpoint holds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from worker_support import TINY, prepare_tiny

from ckpt_core import PyTorchCheckpoint
from ckpt_core.export.assets import write_configs
from tasks import conversion_jobs, jobs
from tasks.worker.model import build_model
from tasks.worker.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a tokenizer for the tiny model."""
    return prepare_tiny(tmp_path_factory.mktemp("prepared"))["tokenizer"]


@pytest.fixture(scope="module", params=["default", "maths"])
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> str:
    """The URL of a step of a model with an adapter of some name."""
    store = tmp_path_factory.mktemp("lora")
    return str(PyTorchCheckpoint(adapted(tokenizer, request.param)).save(store, step=1, assets=tokenizer).url)


@pytest.fixture(scope="module", params=["no config", "the model's config too"])
def step_alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> str:
    """The URL of a step of an adapter's tensors, whose assets have its config, and perhaps the model's."""
    directory = tmp_path_factory.mktemp("alone")
    model = adapted(tokenizer, "default")
    model.peft_config["default"].save_pretrained(str(directory / "assets"))
    if request.param != "no config":
        write_configs(model, directory / "assets")
    factors = torch.nn.Module()
    for name, factor in get_peft_model_state_dict(model).items():
        path, _, leaf = name.rpartition(".")
        module = factors
        for word in path.split("."):
            if not hasattr(module, word):
                module.add_module(word, torch.nn.Module())
            module = module.get_submodule(word)
        module.register_parameter(leaf, torch.nn.Parameter(factor))
    return str(PyTorchCheckpoint(factors).save(directory / "store", step=1, assets=directory / "assets").url)


def adapted(tokenizer: str, name: str) -> Any:
    """Return a tiny model with an adapter whose factors are not 0."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by a name that is deprecated
        model = get_peft_model(build_model(TINY, load_tokenizer(tokenizer), seed=3), config, adapter_name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) / 10)
    return model


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


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_without_its_model_is_compared_by_its_tensors(step_alone: str, tmp_path: Path, dtype: str | None):
    """What PEFT reads from the export is what the checkpoint holds, or its cast; without a model no logits are told."""
    checks = gate(step_alone, tmp_path / "export", dtype=dtype)
    assert list(checks) == ["missing keys", "unexpected keys", "tensors"]
    assert all(check["passed"] for check in checks.values()), checks
    request = {"url": step_alone, "heldout": None, "max_heldout_loss": None, "allow_nonfinite": False}
    assert all(check["passed"] for check in jobs.validate(request)["checks"])
    count = len(load_file(tmp_path / "export" / "adapter_model.safetensors"))
    assert checks["tensors"]["detail"] == f"{count} tensors, bit for bit"
    assert count > 4


def test_a_changed_adapter_without_its_model_fails(step_alone: str, tmp_path: Path):
    """One different number shows in the tensors, and a tensor of another name in the keys."""
    gate(step_alone, tmp_path / "export")
    file = tmp_path / "export" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    failed = {name: check["detail"] for name, check in gate(step_alone, file.parent).items() if not check["passed"]}
    assert failed == {"tensors": f"differ: {name}"}
    tensors["other"] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    checks = gate(step_alone, file.parent)
    assert (checks["missing keys"]["detail"], checks["unexpected keys"]["detail"]) == (name, "other")
