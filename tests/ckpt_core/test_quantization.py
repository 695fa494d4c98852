"""Types of weights and what a config says of them: of eight bits, quantized, or said to be and not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import assert_same
from small_transformers import checkpoint_of, model_of, read_json, save_pretrained
from transformers import AutoModelForCausalLM

from ckpt_core import errors, io
from ckpt_core.export import Assets, convert
from ckpt_core.export.imports import import_hf

WEIGHTS = "model.safetensors"
WEIGHT = "model.layers.0.mlp.down_proj.weight"
METHOD: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
Tensors = dict[str, torch.Tensor]

COMPANIONS: dict[str, Callable[[Tensors], Tensors]] = {
    "blocks": lambda state: {WEIGHT: _eight(state), f"{WEIGHT}_scale_inv": torch.ones(1, 1)},
    "channels": lambda state: {WEIGHT: state[WEIGHT].to(torch.int8), f"{WEIGHT}_scale": torch.ones(24)},
    "bitsandbytes": lambda state: {
        WEIGHT: torch.zeros(192, 1, dtype=torch.uint8),
        f"{WEIGHT}.absmax": torch.ones(6),
        f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    },
    "GPTQ": lambda state: {
        WEIGHT.replace("weight", "qweight"): torch.zeros(3, 16, dtype=torch.int32),
        WEIGHT.replace("weight", "scales"): torch.ones(1, 16),
    },
    "mxfp4": lambda state: {
        "model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(2, 2, dtype=torch.uint8),
        "model.layers.0.mlp.experts.down_proj_scales": torch.zeros(2, dtype=torch.uint8),
    },
}


def _eight(state: Tensors) -> torch.Tensor:
    return state[WEIGHT].to(torch.float8_e4m3fn)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Assets]:
    """Return the tensors of a small Llama in bfloat16, and its assets."""
    model = model_of("llama").bfloat16()
    return dict(model.state_dict()), checkpoint_of(model, tmp_path_factory.mktemp("llama"))[1]


@pytest.mark.parametrize("kind", COMPANIONS)
@pytest.mark.parametrize("said", [True, False], ids=["config says so", "config says nothing"])
def test_quantized_weights_are_refused(tmp_path: Path, llama: tuple[Tensors, Assets], kind: str, said: bool) -> None:
    """Neither way are weights taken without their scales, by no table of names either, and the advice is no loss."""
    state, assets = llama
    state = {**state, **COMPANIONS[kind](state)}
    if said:
        assets = replace(assets, config={**assets.config, "quantization_config": METHOD})
    (tmp_path / "hub").mkdir()
    save_file(state, tmp_path / "hub" / WEIGHTS, {"format": "pt"})
    (tmp_path / "hub" / "config.json").write_text(json.dumps(assets.config))
    io.save({"model": state}, tmp_path / "dcp")
    for call in (
        lambda: import_hf(tmp_path / "hub", tmp_path / "imported"),
        lambda: convert(tmp_path / "dcp", tmp_path / "export", assets=assets),
    ):
        with pytest.raises(errors.MismatchError, match=r"quantized.*dequantize") as caught:
            call()
        assert "table" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "hub"]


def test_scales_that_a_table_drops_do_not_get_lost(tmp_path: Path, llama: tuple[Tensors, Assets]) -> None:
    """Weights of eight bits without scales are refused where the config says quantized, and taken where it does not."""
    state, assets = llama
    io.save({"model": {**state, WEIGHT: _eight(state)}}, tmp_path / "dcp")
    quantized = replace(assets, config={**assets.config, "quantization_config": METHOD})
    with pytest.raises(errors.MismatchError, match=r"down_proj\.weight is of float8_e4m3fn.*no scales"):
        convert(tmp_path / "dcp", tmp_path / "export", assets=quantized)
    export = convert(tmp_path / "dcp", tmp_path / "export", assets=assets)
    assert load_file(export.path / WEIGHTS)[WEIGHT].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("name", ["llama", "gemma3 with images"])
def test_a_config_that_says_quantized_of_weights_that_are_not(tmp_path: Path, name: str) -> None:
    """The field goes, in configs within configs too, with a word; the export loads as what it is."""
    model = model_of(name)
    directory, assets = checkpoint_of(model, tmp_path / "saved")
    config = {
        key: {**v, "quantization_config": METHOD} if key == "text_config" else v for key, v in assets.config.items()
    }
    config |= {"quantization_config": METHOD, "compression_config": {"quant_method": "compressed-tensors"}}
    export = convert(directory, tmp_path / "export", assets=replace(assets, config=config))
    expected = save_pretrained(model, tmp_path / "expected")
    assert read_json(export.path / "config.json") == read_json(expected / "config.json")
    assert [rule for rule in export.rules if rule.startswith("config")] == [
        f"config: quantization ({method}) is left out; the weights are not quantized"
        for method in ("compressed-tensors", "fp8")
    ]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    save_file(load_file(export.path / WEIGHTS), tmp_path / "hub" / WEIGHTS, {"format": "pt"})
    imported = import_hf(tmp_path / "hub", tmp_path / "imported")
    assert "quantization_config" not in (tmp_path / "imported" / "assets" / "config.json").read_text()
    assert any("quantization (fp8) is left out" in rule for rule in imported.rules)


class TestNamedType:
    """The type that a config names."""

    def test_it_is_the_first_parameters(self, tmp_path: Path) -> None:
        """As `save_pretrained` has it, whatever type most weights are of."""
        model = model_of("llama")
        model.model.embed_tokens.bfloat16()
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        export = convert(directory, tmp_path / "export", assets=assets)
        expected = save_pretrained(model, tmp_path / "expected")
        assert read_json(expected / "config.json")["dtype"] == "bfloat16"
        assert (export.path / "config.json").read_bytes() == (expected / "config.json").read_bytes()
        imported = import_hf(expected, tmp_path / "imported")
        assert (imported.path / "assets" / "config.json").read_bytes() == (expected / "config.json").read_bytes()

    @pytest.mark.parametrize("first", [False, True], ids=["projections", "the first parameter, too"])
    def test_it_is_one_that_loads(self, tmp_path: Path, llama: tuple[Tensors, Assets], first: bool) -> None:
        """Of eight bits may be most weights, or the first: an export of these loads as any other."""
        state, assets = llama
        narrow = {n: t.to(torch.float8_e4m3fn) for n, t in state.items() if "proj" in n or (first and "embed" in n)}
        io.save({"model": {**state, **narrow}}, tmp_path / "dcp")
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=assets)
        assert read_json(export.path / "config.json")["dtype"] == "bfloat16"
        assert_same(dict(sorted(load_file(export.path / WEIGHTS).items())), dict(sorted({**state, **narrow}.items())))
        back = AutoModelForCausalLM.from_pretrained(export.path)
        assert_same(dict(back.state_dict()), {n: narrow.get(n, t).bfloat16() for n, t in state.items()})

    def test_every_type_that_safetensors_has(self, tmp_path: Path, llama: tuple[Tensors, Assets]) -> None:
        """Tensors of each type that the installed safetensors writes are exported, and come back from an import."""
        state, assets = llama
        for dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float64, torch.float16):
            number = torch.full(state[WEIGHT].shape, 1.0).to(dtype)
            io.save({"model": {**state, WEIGHT: number}}, tmp_path / f"{dtype} dcp")
            export = convert(tmp_path / f"{dtype} dcp", tmp_path / f"{dtype}", assets=assets)
            found = load_file(export.path / WEIGHTS)[WEIGHT]
            assert found.dtype == dtype
            assert torch.equal(found.view(torch.uint8), number.view(torch.uint8))
