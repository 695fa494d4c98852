"""Checkpoints of runs with LoRA: exported as PEFT's save_pretrained does, or merged as its merge_and_unload does."""

import copy
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_adapters
import torch
import transformers
from gloo_ranks import run_ranks, values
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from small_adapters import ADAPTERS, adapted, adapter_directory, save_pretrained_adapter
from small_models import assert_same
from small_transformers import MODELS, model_of, read_json, save_pretrained
from transformers import AutoModelForCausalLM

from ckpt_core import PyTorchCheckpoint, errors, io, open_checkpoint
from ckpt_core.cli import main
from ckpt_core.export import Assets, convert, convert_checkpoint, plan_export
from ckpt_core.export.adapter_config import adapter_assets
from ckpt_core.export.assets import read_assets
from ckpt_core.export.lora import Update, Updated
from ckpt_core.export.names import Table, read_table
from ckpt_core.export.shard import parse_shard, shard_bytes, shards_of
from ckpt_core.export.stored import DcpStored
from ckpt_core.format.index import read_index
from ckpt_core.native_checkpoint import save_checkpoint
from ckpt_core.verify import verify

FACTORS, WEIGHTS, CONFIG = "adapter_model.safetensors", "model.safetensors", "adapter_config.json"
Saved = Callable[..., tuple[Path, Assets]]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Save a model with an adapter; return its DCP directory and its assets."""

    def save(model: PeftModel, name: str = "saved") -> tuple[Path, Assets]:
        save_checkpoint(model, str(tmp_path / name / "dcp"))
        return tmp_path / name / "dcp", read_assets(adapter_directory(model, tmp_path / name / "assets"))

    return save


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where two ranks saved the rows of each model."""
    directory = tmp_path_factory.mktemp("ranks")
    values(run_ranks(2, small_adapters.save_adapted, directory, list(ADAPTERS)))
    return directory


def merged(model: PeftModel, directory: Path, dtype: str | None = None) -> Path:
    """Merge as PEFT does, save, and cast by loading in another dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = save_pretrained(model.merge_and_unload(), directory / "whole")
    if dtype is None:
        return whole
    return save_pretrained(AutoModelForCausalLM.from_pretrained(whole, dtype=getattr(torch, dtype)), directory / dtype)


def with_config(assets: Assets, **changes: Any) -> Assets:
    """Return assets with another adapter's config."""
    config = json.loads(assets.files[CONFIG]) | changes
    return replace(assets, files={**assets.files, CONFIG: json.dumps(config).encode()})


def save_states(state: dict[str, Any], directory: Path) -> Path:
    """Save tensors as a checkpoint."""
    io.save({"model": state}, directory)
    return directory


class TestAsAdapter:
    """The default: what PEFT would have saved."""

    @pytest.mark.parametrize("name", ADAPTERS)
    def test_bytes_are_those_of_peft(self, tmp_path: Path, saved: Saved, of_two_ranks: Path, name: str) -> None:
        """One rank's or two ranks' checkpoint gives PEFT's file byte for byte, and the configs beside it."""
        model = adapted(name)
        directory, assets = saved(model)
        expected = save_pretrained_adapter(model, tmp_path / "expected")
        for source in (directory, of_two_ranks / name):
            export = convert(source, tmp_path / f"export of {source.name}", assets=assets)
            assert (export.path / FACTORS).read_bytes() == (expected / FACTORS).read_bytes()
        files = {path.name for path in export.path.iterdir()}
        assert files == {FACTORS, CONFIG, "export.json", "tokenizer.json", "tokenizer_config.json"}
        assert (export.path / CONFIG).read_bytes() == assets.files[CONFIG]
        assert verify(export.path).passed
        [rule] = [rule for rule in export.rules if rule.startswith("dropped")]
        left_out = len(model.state_dict()) - len(load_file(export.path / FACTORS))
        assert rule.startswith(f"dropped: {left_out} frozen tensors")

    @pytest.mark.parametrize("name", ["llama", "gpt2 square"])
    def test_a_tokenizer_with_more_tokens_is_refused(self, tmp_path: Path, saved: Saved, name: str) -> None:
        """A token without a row in the model's embeddings is a MismatchError; without these, a rule says so."""
        model = adapted(name)
        directory, assets = saved(model)
        more = tmp_path / "saved/assets/added_tokens.json"
        more.write_text('{"<more>": 40}')
        for given in (read_assets(more.parent), adapter_assets(more.parent)):
            with pytest.raises(errors.MismatchError, match=r"token ids up to 40.*rows for 40 tokens"):
                plan_export(directory, given)
        alone = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
        plan = plan_export(save_states(alone, tmp_path / "alone"), adapter_assets(more.parent))
        assert any("token ids up to 40, and the config of the base model says 40" in rule for rule in plan.rules)
        assert not any("vocabulary" in rule for rule in plan_export(directory, assets).rules)

    @pytest.mark.parametrize("name", ["llama whole", "gpt2", "llama patterns"])
    def test_peft_loads_it(self, tmp_path: Path, saved: Saved, name: str) -> None:
        """PeftModel.from_pretrained on the base model gives the trained model's logits, bit for bit."""
        model = adapted(name)
        directory, assets = saved(model)
        export = convert(directory, tmp_path / "export", assets=assets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            back = PeftModel.from_pretrained(model_of(ADAPTERS[name][0]), str(export.path))
        words = torch.arange(8).reshape(1, 8)
        with torch.no_grad():
            assert torch.equal(back.eval()(words).logits, model.eval()(words).logits)

    @pytest.mark.parametrize(
        ("head", "task", "target"),
        [
            ("LlamaForSequenceClassification", "SEQ_CLS", "q_proj"),
            ("LlamaForTokenClassification", "TOKEN_CLS", "q_proj"),
            ("BertForSequenceClassification", "SEQ_CLS", "query"),
            ("BertForQuestionAnswering", "QUESTION_ANS", "query"),
        ],
    )
    def test_classifiers(self, tmp_path: Path, saved: Saved, head: str, task: str, target: str) -> None:
        """PEFT names the heads of all classifiers in the config; the one that the model has is exported and merged."""
        config = copy.deepcopy(MODELS[head.partition("For")[0].lower()][1])
        config.update({"pad_token_id": 0, "num_labels": 3})
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(transformers, head)(config)
            model = get_peft_model(model, LoraConfig(task_type=task, target_modules=[target]))
        directory, assets = saved(model)
        export = convert(directory, tmp_path / "export", assets=assets)
        expected = save_pretrained_adapter(model, tmp_path / "expected")
        assert (export.path / FACTORS).read_bytes() == (expected / FACTORS).read_bytes()
        whole = convert(directory, tmp_path / "merged", assets=assets, merge_adapter=True)
        assert whole.architecture == head
        assert (whole.path / WEIGHTS).read_bytes() == (merged(model, tmp_path) / WEIGHTS).read_bytes()

    def test_a_classifier_whose_head_is_not_there(self, tmp_path: Path, saved: Saved) -> None:
        """Where no head at all was saved, the config's names of heads are missing."""
        _, assets = saved(adapted("llama"))
        with_heads = with_config(assets, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
        with pytest.raises(errors.MismatchError, match="names 'classifier' in modules_to_save"):
            convert(tmp_path / "saved" / "dcp", tmp_path / "export", assets=with_heads)

    def test_a_cast_is_that_of_torch(self, tmp_path: Path, saved: Saved) -> None:
        """With a dtype the factors are what torch makes of them."""
        directory, assets = saved(adapted("llama"))
        whole = load_file(convert(directory, tmp_path / "whole", assets=assets).path / FACTORS)
        cast = load_file(convert(directory, tmp_path / "cast", assets=assets, dtype="bfloat16").path / FACTORS)
        assert_same(cast, {name: tensor.bfloat16() for name, tensor in whole.items()})

    @pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}], ids=str)
    def test_variants_that_only_have_more_tensors(self, tmp_path: Path, saved: Saved, changes: dict[str, Any]) -> None:
        """DoRA's magnitudes and the biases of factors are exported like PEFT's."""
        model = adapted("gpt2", **changes)
        directory, assets = saved(model)
        export = convert(directory, tmp_path / "export", assets=assets)
        expected = save_pretrained_adapter(model, tmp_path / "expected")
        assert (export.path / FACTORS).read_bytes() == (expected / FACTORS).read_bytes()

    @pytest.mark.parametrize("change", ["alone", "wrapped", "injected", "renamed"])
    def test_other_ways_to_save_it(self, tmp_path: Path, saved: Saved, change: str) -> None:
        """Factors alone, wrappers in names, names without PEFT's prefix, and a table of names give the same file."""
        model = adapted("llama whole")
        _, assets = saved(model)
        expected = save_pretrained_adapter(model, tmp_path / "expected") / FACTORS
        states = {
            "alone": load_file(expected),
            "wrapped": {f"_orig_mod.{n}".replace("v_proj", "_orig_mod.v_proj"): t for n, t in named(model).items()},
            "injected": {n.removeprefix("base_model.model."): t for n, t in named(model).items()},
            "renamed": {f"policy/{n.removeprefix('base_model.model.')}": t for n, t in named(model).items()},
        }
        (tmp_path / "names.json").write_text(json.dumps({"rename": [["^model.policy/", ""]]}))
        table = read_table(tmp_path / "names.json") if change == "renamed" else Table()
        source = save_states(states[change], tmp_path / "dcp")
        export = convert(source, tmp_path / "export", assets=assets, table=table)
        assert (export.path / FACTORS).read_bytes() == expected.read_bytes()

    def test_states_of_the_optimizer_lie_beside_it(self, tmp_path: Path, saved: Saved) -> None:
        """An optimizer's states in the same directory, named after factors, are dropped by a rule of their own."""
        model = adapted("llama")
        _, assets = saved(model)
        beside = {f"state.{n}.exp_avg": t for n, t in named(model).items() if "lora_" in n}
        io.save({"model": named(model), "optimizer": beside}, tmp_path / "dcp")
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=assets)
        expected = save_pretrained_adapter(model, tmp_path / "expected") / FACTORS
        assert (export.path / FACTORS).read_bytes() == expected.read_bytes()
        assert any(rule.startswith(f"dropped: {len(beside)} names beside the model") for rule in export.rules)


class TestMerged:
    """On request: the model with the adapter in its weights."""

    @pytest.mark.parametrize("name", sorted(ADAPTERS.keys() - {"vit"}))
    def test_weights_are_those_of_peft(self, tmp_path: Path, saved: Saved, of_two_ranks: Path, name: str) -> None:
        """Updated weights are within a rounding of merge_and_unload's, all else bit for bit; saved by one or two."""
        model = adapted(name)
        directory, assets = saved(model)
        expected = merged(model, tmp_path)
        for source in (directory, of_two_ranks / name):
            export = convert(source, tmp_path / f"of {source.name}", assets=assets, merge_adapter=True)
            assert_merged(export.path, expected, model)
        assert CONFIG not in export.files
        _, report = AutoModelForCausalLM.from_pretrained(export.path, output_loading_info=True)
        assert not any(report.values()), report

    @pytest.mark.parametrize("name", ["llama", "llama words", "gpt2", "gpt2 places"])
    def test_weights_of_half_the_size(self, tmp_path: Path, saved: Saved, name: str) -> None:
        """Factors in float32 are added to bfloat16 weights as PEFT adds them, and so are factors in bfloat16."""
        for factors in (torch.float32, torch.bfloat16):
            model = adapted(name, "bfloat16").to(factors) if factors is torch.bfloat16 else adapted(name, "bfloat16")
            directory, assets = saved(model, str(factors))
            export = convert(directory, tmp_path / f"{factors} export", assets=assets, merge_adapter=True)
            assert_merged(export.path, merged(model, tmp_path / f"{factors} expected"), model)

    def test_the_class_around_the_model_is_none(self, tmp_path: Path, saved: Saved) -> None:
        """A config that names PEFT's class, around the model, gives the model that the tensors fit."""
        model = adapted("llama")
        directory, assets = saved(model)
        around = replace(assets, config={**assets.config, "architectures": ["PeftModelForCausalLM"]})
        export = convert(directory, tmp_path / "export", assets=around, merge_adapter=True)
        assert_merged(export.path, merged(model, tmp_path), model)

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_a_cast_follows_the_merge(self, tmp_path: Path, saved: Saved, name: str) -> None:
        """With a dtype the export is what from_pretrained makes of the merged model in that dtype."""
        model = adapted(name)
        directory, assets = saved(model)
        export = convert(directory, tmp_path / "export", assets=assets, merge_adapter=True, dtype="bfloat16")
        assert_merged(export.path, merged(model, tmp_path, "bfloat16"), model)
        assert read_json(export.path / "config.json")["dtype"] == "bfloat16"

    def test_blocks_and_shards_change_nothing(self, tmp_path: Path, saved: Saved, monkeypatch: Any) -> None:
        """Read in blocks that begin within rows, and written to many files, the weights are the same bit for bit."""
        directory, assets = saved(adapted("gpt2"))
        whole = load_file(convert(directory, tmp_path / "whole", assets=assets, merge_adapter=True).path / WEIGHTS)
        monkeypatch.setattr("ckpt_core.export.stream.BLOCK_BYTES", 20)
        parts = convert(
            directory, tmp_path / "parts", assets=assets, merge_adapter=True, max_shard_bytes=4000, digest=False
        )
        found: dict[str, torch.Tensor] = {}
        for file in parts.path.glob("*.safetensors"):
            found |= load_file(file)
        assert_same({name: found[name] for name in whole}, whole)

    def test_many_rows_are_merged_alike_wherever_they_are(self, tmp_path: Path) -> None:
        """A weight of more rows than are multiplied at once gets PEFT's sum, to a rounding, in its last rows too."""
        torch.manual_seed(0)
        for rows in (63, 64, 65, 130):
            check_rows(tmp_path / str(rows), rows, 7)

    def test_units_of_work_carry_it(self, saved: Saved) -> None:
        """A shard with updates survives being written as JSON, and names the files that hold the factors."""
        directory, assets = saved(adapted("llama"))
        plan = plan_export(directory, assets, merge_adapter=True)
        [shard] = shards_of(plan, directory)
        assert parse_shard(shard_bytes(shard)) == replace(shard, files=dict(shard.files))
        factors = {name for name in shard.tensors if "lora_" in name}
        assert len(factors) == 8
        assert factors == {s for o in shard.outputs if o.update for s in (o.update.a, o.update.b)}
        assert {o.name for o in shard.outputs if o.unchanged} == {o.name for o in shard.outputs if not o.update}

    def test_a_damaged_factor_is_found(self, tmp_path: Path, saved: Saved) -> None:
        """A flipped byte of a factor is a DamagedError by its CRC32."""
        directory, assets = saved(adapted("llama"))
        plan = plan_export(directory, assets, merge_adapter=True)
        factor = next(o.update.a for o in plan.outputs if o.update)
        span = plan.tensors[factor].chunks[0].span
        file = directory / span.file
        data = bytearray(file.read_bytes())
        data[data.index(named_bytes(adapted("llama"), factor))] ^= 1
        file.write_bytes(data)
        with pytest.raises(errors.DamagedError, match="CRC32"):
            convert(directory, tmp_path / "export", assets=assets, merge_adapter=True)


class TestRefused:
    """What is not exported, by name."""

    def test_the_config_is_missing(self, tmp_path: Path, saved: Saved) -> None:
        """Without adapter_config.json the error names it, and the option that gives it; nothing is left."""
        directory, assets = saved(adapted("llama"))
        bare = replace(assets, files={n: d for n, d in assets.files.items() if n != CONFIG})
        for merge in (False, True):
            with pytest.raises(errors.NotACheckpointError, match=r"adapter_config\.json.*--adapter"):
                convert(directory, tmp_path / "export", assets=bare, merge_adapter=merge)
        with pytest.raises(errors.NotACheckpointError, match="adapter_config"):
            adapter_assets(directory)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"r": 8}, "have the shapes .* says rank 8"),
            ({"rank_pattern": {"q_proj": 2}}, "q_proj have the shapes .* says rank 2"),
            ({"target_modules": ["q_proj"]}, "down_proj has an adapter, but"),
            ({"target_modules": r".*q_proj"}, "down_proj has an adapter, but"),
            ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "k_proj.weight has no adapter, but"),
            ({"target_modules": "("}, "no regular expression"),
            ({"target_modules": [1]}, "expected a list of names"),
            ({"modules_to_save": ["lm_head.x"]}, "names 'lm_head.x' in modules_to_save"),
            ({"r": "4"}, "r of .* is '4', expected a positive number"),
            ({"use_dora": True}, "holds no lora_magnitude_vector"),
            ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
            ({"bias": "all"}, "bias is 'all'"),
            ({"use_qalora": True}, "use_qalora"),
            ({"target_parameters": ["experts"]}, "target_parameters"),
            ({"some_future_kind": {"on": 1}}, "some_future_kind"),
        ],
        ids=str,
    )
    def test_another_config(self, tmp_path: Path, saved: Saved, changes: dict[str, Any], text: str) -> None:
        """A config that does not fit the factors, or has what is not known, is a MismatchError that says where."""
        directory, assets = saved(adapted("llama"))
        with pytest.raises(errors.MismatchError, match=text):
            convert(directory, tmp_path / "export", assets=with_config(assets, **changes))
        assert not (tmp_path / "export").exists()

    @pytest.mark.parametrize("data", [b"{", b"[]"])
    def test_a_damaged_config(self, tmp_path: Path, saved: Saved, data: bytes) -> None:
        """A config that is no JSON object is a DamagedError."""
        directory, assets = saved(adapted("llama"))
        with pytest.raises(errors.DamagedError, match="adapter_config"):
            convert(directory, tmp_path / "export", assets=replace(assets, files={CONFIG: data}))

    @pytest.mark.parametrize(
        ("name", "changes", "text"),
        [
            ("llama", {"use_dora": True}, "use_dora is True.*merge_and_unload"),
            ("gpt2", {"lora_bias": True}, "lora_bias"),
            ("gpt2", {"target_modules": ["wte"]}, "wte is tied to another module"),
            ("vit", {}, "only products of two matrices are merged"),
        ],
    )
    def test_what_is_not_merged(
        self, tmp_path: Path, saved: Saved, name: str, changes: dict[str, Any], text: str
    ) -> None:
        """DoRA, biases of factors, and updates of tied weights and of convolutions are not merged."""
        directory, assets = saved(adapted(name, **changes))
        with pytest.raises(errors.MismatchError, match=text):
            convert(directory, tmp_path / "export", assets=assets, merge_adapter=True)

    def test_a_config_that_hides_what_an_adapter_does(self, tmp_path: Path, saved: Saved) -> None:
        """DoRA's magnitudes are not overlooked when the config says that there are none."""
        directory, assets = saved(adapted("llama", use_dora=True))
        for merge in (False, True):
            with pytest.raises(errors.MismatchError, match=r"holds lora_magnitude_vector, but .* says use_dora False"):
                plan_export(directory, with_config(assets, use_dora=False), merge_adapter=merge)

    def test_there_is_nothing_to_merge(self, tmp_path: Path, saved: Saved) -> None:
        """A merge of a checkpoint without an adapter, and of one without the model's weights, is refused."""
        model = adapted("llama")
        _, assets = saved(model)
        factors = load_file(save_pretrained_adapter(model, tmp_path / "peft") / FACTORS)
        alone = save_states(factors, tmp_path / "alone")
        with pytest.raises(errors.MismatchError, match="no frozen weight of"):
            convert(alone, tmp_path / "export", assets=assets, merge_adapter=True)
        plain = save_states(dict(model_of("llama").state_dict()), tmp_path / "plain")
        with pytest.raises(errors.MismatchError, match="no LoRA adapter to merge"):
            convert(plain, tmp_path / "export", assets=assets, merge_adapter=True)
        with pytest.raises(errors.MismatchError, match=r"no config of its model"):
            convert(plain, tmp_path / "export", assets=replace(assets, config={}))
        with pytest.raises(errors.MismatchError, match="peft_type 'IA3'; only adapters of the type 'LORA'"):
            plan_export(plain, replace(with_config(assets, peft_type="IA3"), config={}))

    def test_weights_and_factors_of_other_types(self, tmp_path: Path, saved: Saved) -> None:
        """Weights that are integers, as quantized ones are, and factors of two types are not merged."""
        model = adapted("llama")
        _, assets = saved(model)
        changes = [("q_proj.base_layer", torch.int8, "is of int8"), ("q_proj.lora_A", torch.float16, "of float16 and")]
        for part, dtype, text in changes:
            state = {n: t.to(dtype) if part in n else t for n, t in named(model).items()}
            source = save_states(state, tmp_path / part)
            with pytest.raises(errors.MismatchError, match=text):
                convert(source, tmp_path / "export", assets=assets, merge_adapter=True)

    def test_several_adapters(self, tmp_path: Path, saved: Saved) -> None:
        """Two adapters are refused, and one is exported when a table of names drops the other."""
        model = adapted("llama")
        model.add_adapter("second", model.peft_config["default"])
        directory, assets = saved(model)
        with pytest.raises(errors.MismatchError, match=r"several adapters \(default, second\)"):
            convert(directory, tmp_path / "export", assets=assets)
        (tmp_path / "names.json").write_text(json.dumps({"drop": [r"\.second\."]}))
        table = read_table(tmp_path / "names.json")
        export = convert(directory, tmp_path / "export", assets=assets, table=table)
        assert any(rule.startswith("dropped: 8 names by the table of names") for rule in export.rules)
        expected = save_pretrained_adapter(adapted("llama"), tmp_path / "expected")
        assert (export.path / FACTORS).read_bytes() == (expected / FACTORS).read_bytes()

    @pytest.mark.parametrize("side", ["lora_A", "lora_B"])
    def test_a_factor_is_missing_or_unknown(self, tmp_path: Path, saved: Saved, side: str) -> None:
        """A factor without the other, and a tensor of LoRA that nobody knows, are refused by name."""
        model = adapted("llama")
        _, assets = saved(model)
        state = named(model)
        lost = next(name for name in state if side in name)
        half = save_states({n: t for n, t in state.items() if n != lost}, tmp_path / "half")
        with pytest.raises(errors.MismatchError, match="without its other factor"):
            convert(half, tmp_path / "export", assets=assets)
        more = save_states({**state, lost.replace(side, "lora_E"): state[lost]}, tmp_path / "more")
        with pytest.raises(errors.MismatchError, match=r"lora_E.*no tensor of LoRA that is known"):
            convert(more, tmp_path / "export", assets=assets)

    @pytest.mark.parametrize("merge", [False, True])
    def test_values_that_are_none(self, tmp_path: Path, saved: Saved, merge: bool) -> None:
        """NaN in a factor is a DamagedError that names it; nothing is left; with permission it is exported."""
        model = adapted("llama")
        factor = "model.layers.1.mlp.down_proj.lora_B.default.weight"
        with torch.no_grad():
            model.get_parameter("base_model.model." + factor)[3, 1] = torch.nan
        directory, assets = saved(model)
        with pytest.raises(errors.DamagedError, match=f"{factor}.*NaN"):
            convert(directory, tmp_path / "export", assets=assets, merge_adapter=merge)
        assert not (tmp_path / "export").exists()
        assert convert(directory, tmp_path / "export", assets=assets, merge_adapter=merge, allow_nonfinite=True)


class TestCommand:
    """`ckpt convert`."""

    def test_the_plan_shows_what_is_merged(self, tmp_path: Path, saved: Saved, capsys: Any) -> None:
        """`--plan --merge-adapter` names each weight's factors and the scaling, for people and as JSON."""
        directory, _ = saved(adapted("llama"))
        options = [str(directory), str(tmp_path / "out"), "--model", str(tmp_path / "saved/assets"), "--plan"]
        assert main(["convert", *options, "--merge-adapter"]) == 0
        lines = capsys.readouterr().out.splitlines()
        [line] = [line for line in lines if "layers.0.self_attn.q_proj" in line]
        assert "copied, merged from" in line
        assert "q_proj.lora_B.default.weight" in line
        assert "  rule: merged: 4 weights with 1.5 times a product of rank 4" in lines
        assert main(["convert", *options, "--merge-adapter", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)["tensors"]["model.layers.0.self_attn.q_proj.weight"]
        assert facts["scaling"] == 1.5
        assert [name.split(".")[-3] for name in facts["merges"]] == ["lora_A", "lora_B"]
        assert main(["convert", *options]) == 0
        assert "LoRA adapter of" in capsys.readouterr().out

    def test_a_committed_step_has_all_it_needs(self, tmp_path: Path) -> None:
        """A step that was saved with the adapter's config as an asset is exported, and merged, without any option."""
        model = adapted("llama")
        (tmp_path / "assets").mkdir()
        model.peft_config["default"].save_pretrained(str(tmp_path / "assets"))
        PyTorchCheckpoint(module=model).save(tmp_path / "store", step=1, assets=tmp_path / "assets")
        step = str(tmp_path / "store/default/step_0000000001")
        assert main(["convert", step, str(tmp_path / "adapter")]) == 0
        expected = save_pretrained_adapter(model, tmp_path / "peft")
        assert (tmp_path / "adapter" / FACTORS).read_bytes() == (expected / FACTORS).read_bytes()
        assert main(["convert", step, str(tmp_path / "merged"), "--merge-adapter"]) == 0
        assert_merged(tmp_path / "merged", merged(model, tmp_path), model)

    def test_a_live_model_brings_its_configs(self, tmp_path: Path) -> None:
        """A step of a PEFT model that was saved without assets is exported, and merged, as PEFT does."""
        model = adapted("llama")
        step = open_checkpoint(str(PyTorchCheckpoint(module=model).save(tmp_path / "store", step=1).url))
        export = convert_checkpoint(step, tmp_path / "adapter")
        expected = save_pretrained_adapter(model, tmp_path / "peft")
        assert (export.path / FACTORS).read_bytes() == (expected / FACTORS).read_bytes()
        ours, theirs = (read_json(path / CONFIG)["target_modules"] for path in (export.path, expected))
        assert sorted(ours) == sorted(theirs)  # of a set, in the order of its hashes
        convert_checkpoint(step, tmp_path / "merged", merge_adapter=True)
        assert_merged(tmp_path / "merged", merged(model, tmp_path), model)

    def test_a_step_with_an_adapter_alone(self, tmp_path: Path) -> None:
        """A step whose assets have an adapter's config and none of its model is exported as an adapter."""
        model = adapted("llama")
        (tmp_path / "assets").mkdir()
        model.peft_config["default"].save_pretrained(str(tmp_path / "assets"))
        factors = torch.nn.Module()
        for name, factor in get_peft_model_state_dict(model).items():
            module = factors
            for part in name.split(".")[:-1]:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(name.rpartition(".")[2], torch.nn.Parameter(factor))
        PyTorchCheckpoint(module=factors).save(tmp_path / "store", step=1, assets=tmp_path / "assets")
        export = convert_checkpoint(open_checkpoint(tmp_path / "store/default/step_0000000001"), tmp_path / "adapter")
        expected = save_pretrained_adapter(model, tmp_path / "peft")
        assert (export.path / FACTORS).read_bytes() == (expected / FACTORS).read_bytes()

    def test_where_the_config_is(self, tmp_path: Path, saved: Saved, capsys: Any) -> None:
        """`--adapter DIR`, or assets beside the checkpoint, give the adapter's config; without it the error says so."""
        model = adapted("llama")
        directory, assets = saved(model)
        alone = tmp_path / "alone"
        alone.mkdir()
        (alone / CONFIG).write_bytes(assets.files[CONFIG])
        assert main(["convert", str(directory), str(tmp_path / "none")]) == 2
        assert "--adapter DIR" in capsys.readouterr().err
        assert main(["convert", str(directory), str(tmp_path / "one"), "--adapter", str(alone)]) == 0
        assert {file.name for file in (tmp_path / "one").iterdir()} == {FACTORS, CONFIG, "export.json"}
        words = ["--adapter", str(alone), "--tokenizer", str(tmp_path / "saved/assets")]
        assert main(["convert", str(directory), str(tmp_path / "two"), *words]) == 0
        assert (tmp_path / "two/tokenizer.json").is_file()
        shutil.copytree(alone, directory / "assets")
        assert main(["convert", str(directory), str(tmp_path / "beside")]) == 0
        model_alone = save_pretrained(model_of("llama"), tmp_path / "base")
        both = ["--adapter", str(alone), "--model", str(model_alone), "--merge-adapter"]
        assert main(["convert", str(directory), str(tmp_path / "three"), *both]) == 0
        assert_merged(tmp_path / "three", merged(model, tmp_path / "expected"), model)

    def test_it_needs_no_torch(self, tmp_path: Path, saved: Saved) -> None:
        """A process that exports an adapter without a cast has imported neither torch nor transformers in the end."""
        directory, _ = saved(adapted("llama"))
        program = (
            "import sys; from ckpt_core.cli import main; status = main(sys.argv[1:]); "
            "assert not {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(status)"
        )
        options = ["convert", directory, tmp_path / "out", "--adapter", tmp_path / "saved/assets"]
        ended = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / "out" / FACTORS).is_file()


def named(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return a model's tensors as they are saved."""
    return dict(model.state_dict())


def named_bytes(model: PeftModel, stored: str) -> bytes:
    """Return the bytes of a tensor, by its stored name."""
    return model.state_dict()[stored.removeprefix("model.")].numpy().tobytes()


def check_rows(directory: Path, rows: int, columns: int) -> None:
    """Update a matrix of zeros in three blocks, and compare with one product of all rows."""
    state = {"a": torch.randn(3, columns), "b": torch.randn(rows, 3)}
    index = read_index(save_states(state, directory))
    update = Update("model.a", "model.b", 3, "float32", 0.5, turned=False, rounded=False)
    sizes = [5, rows * columns - 5 - 2 * columns, 2 * columns]
    with DcpStored(directory, index.tensors) as stored:
        updated = Updated(update, (rows, columns), "float32", stored, check=True)
        blocks = [updated.next(np.zeros(size, np.uint32)) for size in sizes]
    found = torch.from_numpy(np.concatenate(blocks)).view(torch.float32).reshape(rows, columns)
    torch.testing.assert_close(found, 0.5 * (state["b"] @ state["a"]), rtol=1e-6, atol=1e-6)


def assert_merged(found: Path, expected: Path, model: PeftModel) -> None:
    """Assert that what the adapter updates is equal to two roundings, and all else bit for bit."""
    ours, theirs = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    updated = {name for name in theirs if name.removesuffix(".weight") in modules_of(model)}
    assert len(updated) == len(modules_of(model))
    assert_same({n: t for n, t in ours.items() if n not in updated}, {n: theirs[n] for n in ours if n not in updated})
    for name in updated:
        eps = 2 * torch.finfo(theirs[name].dtype).eps
        torch.testing.assert_close(ours[name], theirs[name], rtol=eps, atol=eps)
    for file in expected.glob("*.json"):
        assert read_json(found / file.name) == read_json(file), file.name


def modules_of(model: PeftModel) -> set[str]:
    """Return the names of the modules that the adapter updates, from its config; the model may be merged by now."""
    config = model.peft_config["default"]
    ends = config.target_modules
    named_modules = [name for name, _ in model.get_base_model().named_modules()]
    if isinstance(ends, str):
        return {name for name in named_modules if re.fullmatch(ends, name)}
    return {name for name in named_modules if any(name.endswith(f".{end}") for end in ends)}
