"""Exports of real architectures, whoever saved them: names, dtypes, shapes and bytes are those of save_pretrained."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sharded_families
import torch
import transformers
from gloo_ranks import run_ranks, values
from safetensors.torch import load_file
from sharded_families import Mesh
from small_models import assert_same
from small_transformers import MODELS, checkpoint_of, model_of, read_json, save_pretrained, tokenizer
from transformers import PreTrainedModel

from ckpt_core import errors, io
from ckpt_core.export import Assets, Export, convert, plan_export
from ckpt_core.export.assets import read_assets, write_configs

WEIGHTS = "model.safetensors"
FLOAT, BRAIN = "float32", "bfloat16"

JOBS: dict[Mesh, list[tuple[str, str]]] = {
    (1,): [("llama", FLOAT), ("gemma3", BRAIN), ("clap", FLOAT)],
    (2,): [(name, FLOAT) for name in MODELS] + [(name, BRAIN) for name in ("gpt2", "resnet", "whisper", "mixtral")],
    (3,): [("gpt2", FLOAT), ("t5", BRAIN), ("clap", FLOAT), ("llava", FLOAT), ("deepseek v3", BRAIN)],
    (2, 2): [("llama", FLOAT), ("gemma3", BRAIN), ("whisper", FLOAT), ("mixtral", FLOAT), ("qwen3 moe", BRAIN)],
}
"""What is saved on each mesh: nothing has a number of rows that three ranks share evenly, and few that two do."""


def assets_of(model: PreTrainedModel, directory: Path) -> Assets:
    """Return the assets of a live model, written below `directory`."""
    directory.mkdir()
    write_configs(model, directory)
    return read_assets(directory)


def assert_same_export(found: Path, expected: Path) -> None:
    """Assert that weights are equal byte for byte, and JSON files value for value."""
    ours, theirs = (dict(sorted(load_file(directory / WEIGHTS).items())) for directory in (found, expected))
    assert_same(ours, theirs)
    assert (found / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    for file in expected.glob("*.json"):
        assert read_json(found / file.name) == read_json(file), file.name


def recast(model: PreTrainedModel, export: Export, dtype: str, target: Path) -> Path:
    """Return what transformers writes after it has loaded an export in another dtype."""
    return save_pretrained(type(model).from_pretrained(export.path, dtype=getattr(torch, dtype)), target)


@pytest.fixture(scope="module", params=JOBS, ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mesh, Path]:
    """Return a mesh, and where its ranks saved their models."""
    mesh: Mesh = request.param
    directory = tmp_path_factory.mktemp("saved")
    values(run_ranks(sharded_families.ranks_of(mesh), sharded_families.save, directory, JOBS[mesh], mesh, seconds=120))
    return mesh, directory


def test_whatever_mesh_saved_it(saved: tuple[Mesh, Path], tmp_path: Path) -> None:
    """FSDP2 on one, two and three ranks, and with tensor parallelism on four, give save_pretrained's files."""
    mesh, directory = saved
    for name, dtype in JOBS[mesh]:
        model = sharded_families.build(name, dtype)
        place = tmp_path / f"{name} {dtype}"
        dcp = sharded_families.place_of(directory, name, dtype)
        assert len(list(dcp.glob("*.distcp"))) == sharded_families.ranks_of(mesh)
        place.mkdir()
        export = convert(dcp, place / "export", assets=assets_of(model, place / "assets"))
        assert_same_export(export.path, save_pretrained(model, place / "expected"))


class TestCasts:
    """What a cast gives: what transformers has after loading the uncast export in that dtype."""

    @pytest.mark.parametrize("name", MODELS)
    def test_every_family(self, tmp_path: Path, name: str) -> None:
        """In bfloat16 and float16 each tensor has the dtype and the bytes that from_pretrained gives it."""
        model = model_of(name)
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        whole = convert(directory, tmp_path / "whole", assets=assets)
        for dtype in ("bfloat16", "float16"):
            export = convert(directory, tmp_path / dtype, assets=assets, dtype=dtype)
            assert_same_export(export.path, recast(model, whole, dtype, tmp_path / f"expected {dtype}"))

    @pytest.mark.parametrize(
        ("name", "dtype", "kept"),
        [
            ("t5", "float16", ["decoder.block.0.layer.2.DenseReluDense.wo.weight"]),
            ("deepseek v3", "bfloat16", ["model.layers.1.mlp.gate.e_score_correction_bias"]),
            ("olmo hybrid", "bfloat16", ["model.layers.0.linear_attn.A_log"]),
            ("resnet", "bfloat16", ["resnet.embedder.embedder.normalization.num_batches_tracked"]),
            ("bark", "float16", ["semantic.layers.0.attn.bias"]),
            ("clap", "float16", ["text_model.embeddings.position_ids"]),
        ],
    )
    def test_there_is_something_to_keep(self, tmp_path: Path, name: str, dtype: str, kept: list[str]) -> None:
        """Some tensors of these families are not cast: wanted in float32, or not floating-point at all."""
        model = model_of(name)
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        found = {output.name: output.dtype for output in plan_export(directory, assets, dtype=dtype).outputs}
        expected = {tensor: str(model.state_dict()[tensor].dtype).removeprefix("torch.") for tensor in kept}
        assert {tensor: found[tensor] for tensor in kept} == expected
        assert dtype in found.values()

    @pytest.mark.parametrize("name", ["t5", "olmo hybrid", "resnet"])
    def test_models_of_several_dtypes(self, tmp_path: Path, name: str) -> None:
        """A model that transformers loaded in float16 is exported as it is, and cast as from_pretrained casts it."""
        whole = model_of(name)
        mixed = type(whole).from_pretrained(save_pretrained(whole, tmp_path / "whole"), dtype=torch.float16)
        directory, assets = checkpoint_of(mixed, tmp_path / "saved")
        export = convert(directory, tmp_path / "export", assets=assets)
        assert_same_export(export.path, save_pretrained(mixed, tmp_path / "expected"))
        for dtype in ("bfloat16", "float32"):
            cast = convert(directory, tmp_path / dtype, assets=assets, dtype=dtype)
            assert_same_export(cast.path, recast(mixed, export, dtype, tmp_path / f"expected {dtype}"))

    @pytest.mark.parametrize(
        ("name", "dtype"), [("t5", "float16"), ("deepseek v3", "bfloat16"), ("olmo hybrid", "bfloat16")]
    )
    def test_what_stays_float32_is_widened(self, tmp_path: Path, name: str, dtype: str) -> None:
        """Where all was saved in bfloat16, what the architecture wants in float32 is float32 after a cast."""
        model = model_of(name).bfloat16()
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        export = convert(directory, tmp_path / "export", assets=assets)
        cast = convert(directory, tmp_path / dtype, assets=assets, dtype=dtype)
        assert_same_export(cast.path, recast(model, export, dtype, tmp_path / f"expected {dtype}"))


@pytest.mark.parametrize("stored", [torch.bool, torch.uint8, torch.int16, torch.int32], ids=str)
def test_whatever_is_not_floating_point_stays(tmp_path: Path, stored: torch.dtype) -> None:
    """Counters and masks keep dtype and bytes under a cast, 0-d or not, whatever the architecture makes them."""
    model = model_of("clap")
    _, assets = checkpoint_of(model, tmp_path / "saved")
    state = {n: t if t.is_floating_point() else t.to(stored) for n, t in model.state_dict().items()}
    io.save({"model": state}, tmp_path / "dcp")
    found = load_file(convert(tmp_path / "dcp", tmp_path / "export", assets=assets, dtype="bfloat16").path / WEIGHTS)
    kept = {name: tensor for name, tensor in state.items() if tensor.dtype == stored}
    assert {tensor.dim() for tensor in kept.values()} == {0, 2}
    assert_same({name: found[name] for name in kept}, kept)


def _fully_sharded(name: str) -> str:
    """Return a name as FSDP's first version leaves it, around the model and around each layer."""
    return "_fsdp_wrapped_module." + re.sub(r"(?<=\.)([0-9]+)\.", r"\1._fsdp_wrapped_module.", name)


WRAPPERS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "of a trainer": lambda name: f"model.{name}",
    "fully sharded": _fully_sharded,
    "all of them": lambda name: f"state.model.module.{_fully_sharded(name)}",
    "some layers": lambda name: re.sub(
        r"(?<=\.)([01])\.", lambda n: f"{n[1]}.{('_checkpoint_wrapped_module', 'module._orig_mod')[int(n[1])]}.", name
    ),
}


class TestNames:
    """What wrappers put into names, beside prefixes and numbers that are the architecture's own."""

    @pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma3 with images", "bark", "mixtral"])
    def test_wrappers_leave_no_trace(self, tmp_path: Path, name: str) -> None:
        """Whatever stood in front of names or within them, the export is the same."""
        model = model_of(name)
        _, assets = checkpoint_of(model, tmp_path / "saved")
        expected = save_pretrained(model, tmp_path / "expected")
        for wrapper, rename in WRAPPERS.items():
            dcp = tmp_path / wrapper / "dcp"
            io.save({rename(tensor): value for tensor, value in model.state_dict().items()}, dcp)
            assert_same_export(convert(dcp, tmp_path / wrapper / "export", assets=assets).path, expected)


class TestRows:
    """Embeddings with more rows than there are tokens, or fewer."""

    @pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "gemma3 with images", "whisper"])
    def test_padding_is_left_out(self, tmp_path: Path, name: str) -> None:
        """Rows that neither the tokenizer nor the configs need, of weights and biases, tied or not, are trimmed."""
        model = model_of(name)
        saved, _ = checkpoint_of(model, tmp_path / "saved")
        tokenizer().save_pretrained(saved.parent / "assets")
        state = model.state_dict()
        padded = {n: torch.cat([t, torch.ones(8, *t.shape[1:])]) for n, t in state.items() if t.shape[:1] == (40,)}
        io.save({"model": {**state, **padded}}, tmp_path / "dcp")
        given = read_assets(saved.parent / "assets")
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=given)
        assert_same_export(export.path, save_pretrained(model, tmp_path / "expected"))
        assert any("from 48 rows to the config's 40; neither the tokenizer, of 40" in rule for rule in export.rules)

    @pytest.mark.parametrize("name", ["llama tied", "bert", "gemma3 with images"])
    def test_rows_that_may_be_trained_are_kept(self, tmp_path: Path, name: str) -> None:
        """Without a tokenizer that says what is unused all rows stay, in the form that resizing the model gives."""
        model = model_of(name)
        _, assets = checkpoint_of(model, tmp_path / "saved")
        model.resize_token_embeddings(43)
        io.save({"model": model.state_dict()}, tmp_path / "dcp")
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=assets)
        assert_same_export(export.path, save_pretrained(model, tmp_path / "expected"))
        assert any(rule.startswith("vocabulary: set to 43 tokens") for rule in export.rules)

    @pytest.mark.parametrize("needs", ["tokenizer", "config", "generation config", "config within"])
    def test_rows_that_are_in_use_are_kept(self, tmp_path: Path, needs: str) -> None:
        """A token that was added, or an id in any config, keeps all rows, though the base's config has fewer."""
        model = model_of("llama")
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        beside = directory.parent / "assets"
        words = tokenizer()
        if needs == "tokenizer":
            words.add_special_tokens({"additional_special_tokens": ["<think>"]})
        words.save_pretrained(beside)
        config = dict(assets.config)
        if needs == "config":
            config["image_token_id"] = 42
        elif needs == "config within":
            config["audio"] = {"suppress_tokens": [[3, 41]]}
        elif needs == "generation config":
            generation = read_json(beside / "generation_config.json")
            (beside / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [2, 40]}))
        (beside / "config.json").write_text(json.dumps(config))
        model.resize_token_embeddings(48)
        io.save({"model": model.state_dict()}, tmp_path / "dcp")
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=read_assets(beside))
        assert_same(load_file(export.path / WEIGHTS), dict(sorted(model.state_dict().items())))
        assert read_json(export.path / "config.json")["vocab_size"] == 48

    def test_a_tokenizer_with_more_tokens_is_refused(self, tmp_path: Path) -> None:
        """A token without a row is a MismatchError, wherever the tokenizer's files name it."""
        directory, _ = checkpoint_of(model_of("llama"), tmp_path / "saved")
        beside = directory.parent / "assets"
        words = tokenizer()
        words.save_pretrained(beside)
        assert convert(directory, tmp_path / "fits", assets=read_assets(beside)).files
        kept = {file: file.read_bytes() for file in beside.iterdir()}
        words.add_tokens(["<more>"])
        words.save_pretrained(beside)
        decoder = {"added_tokens_decoder": {"40": {"content": "<more>"}}}
        for name, content in (
            ("tokenizer.json", (beside / "tokenizer.json").read_text()),
            ("tokenizer_config.json", json.dumps(decoder)),
            ("added_tokens.json", '{"<more>": 40}'),
        ):
            for file, data in kept.items():
                file.write_bytes(data)
            (beside / name).write_text(content)
            with pytest.raises(errors.MismatchError, match=r"token ids up to 40.*rows for 40 tokens"):
                convert(directory, tmp_path / "export", assets=read_assets(beside))
            (beside / name).unlink()

    def test_a_tokenizer_without_its_vocabulary_cuts_nothing(self, tmp_path: Path) -> None:
        """Settings of a tokenizer alone, of which transformers makes one of three tokens, leave all rows in place."""
        model = model_of("llama")
        _, assets = checkpoint_of(model, tmp_path / "saved")
        model.resize_token_embeddings(48)
        io.save({"model": model.state_dict()}, tmp_path / "dcp")
        settings = {"tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizerFast"}'}
        plan = plan_export(tmp_path / "dcp", replace(assets, files=settings))
        assert plan.tokens == 48

    def test_tokens_that_a_library_counts(self, tmp_path: Path) -> None:
        """A vocabulary without tokenizer.json is counted as transformers loads it; if it cannot, a rule says why."""
        directory, assets = checkpoint_of(model_of("bert"), tmp_path / "saved")
        words = [*("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), *(f"w{n}" for n in range(35))]
        fits, more = ("\n".join(each).encode() for each in (words, [*words, "more"]))
        rules = plan_export(directory, replace(assets, files={"vocab.txt": fits})).rules
        assert not any("vocabulary" in rule for rule in rules)
        with pytest.raises(errors.MismatchError, match=r"token ids up to 40.*rows for 40 tokens"):
            plan_export(directory, replace(assets, files={"vocab.txt": more}))
        rules = plan_export(directory, replace(assets, files={"vocab.txt": b"\xff\xfe"})).rules
        assert any("was not checked, as it does not load here: tokenizer: " in rule for rule in rules)

    @pytest.mark.parametrize(
        ("place", "change"),
        [
            ("config.json", {"eos_token_id": [41, 42]}),
            ("generation_config.json", {"pad_token_id": 40}),
            ("generation_config.json", {"forced_eos_token_id": 50}),
        ],
    )
    def test_ids_that_generation_needs_are_refused_without_a_row(
        self, tmp_path: Path, place: str, change: dict[str, object]
    ) -> None:
        """An id beyond the rows is a MismatchError that names it; none at all, and -1, are no ids."""
        directory, _ = checkpoint_of(model_of("llama"), tmp_path / "saved")
        beside = directory.parent / "assets"
        for name in ("config.json", "generation_config.json"):
            ended = {"eos_token_id": None} if "eos_token_id" in change else {"pad_token_id": -1}
            (beside / name).write_text(json.dumps({**read_json(beside / name), **ended}))
        assert plan_export(directory, read_assets(beside)).outputs
        (beside / place).write_text(json.dumps({**read_json(beside / place), **change}))
        with pytest.raises(errors.MismatchError, match=rf"{next(iter(change))} of the .*rows for 40 tokens"):
            plan_export(directory, read_assets(beside))

    def test_the_start_of_a_decoder_needs_a_row(self, tmp_path: Path) -> None:
        """An encoder-decoder looks up its start, which is the beginning of the text if nothing else is named."""
        directory, assets = checkpoint_of(model_of("t5"), tmp_path / "saved")
        for key in ("decoder_start_token_id", "bos_token_id"):
            others = {name: value for name, value in assets.config.items() if "start" not in name}
            with pytest.raises(errors.MismatchError, match=rf"{key} of the config is 40, and T5"):
                plan_export(directory, Assets({**others, key: 40}, {}))

    @pytest.mark.parametrize(
        ("architecture", "change"),
        [
            ("LlamaForCausalLM", {"bos_token_id": 50256, "eos_token_id": [2, 41]}),
            ("LlamaForCausalLM", {"sep_token_id": 102}),
            ("LlamaModel", {"bos_token_id": 50, "eos_token_id": 41}),
        ],
    )
    def test_ids_that_nothing_needs_are_only_named(
        self, tmp_path: Path, architecture: str, change: dict[str, object]
    ) -> None:
        """An id that the model does not look up is carried, and a rule of the plan names it."""
        directory, assets = checkpoint_of(model_of("llama"), tmp_path / "saved")
        if architecture == "LlamaModel":
            model = model_of("llama").model
            directory, assets = checkpoint_of(model, tmp_path / "whole")
        export = convert(directory, tmp_path / "export", assets=replace(assets, config={**assets.config, **change}))
        said = "\n".join(rule for rule in export.rules if rule.startswith("vocabulary: "))
        assert all(f"{key} " in said for key in change)
        assert read_json(export.path / "config.json").items() >= change.items()
        loaded = getattr(transformers, architecture).from_pretrained(export.path)
        loaded(torch.tensor([[1, 2, 3]]))

    @pytest.mark.parametrize("rows", [0, 39])
    def test_missing_ones_are_refused(self, tmp_path: Path, rows: int) -> None:
        """An embedding of no rows, or of too few, is a MismatchError, though the tied one has them all."""
        model = model_of("llama tied")
        _, assets = checkpoint_of(model, tmp_path / "saved")
        state = {**model.state_dict(), "model.embed_tokens.weight": torch.ones(rows, 16)}
        io.save({"model": state}, tmp_path / "dcp")
        with pytest.raises(errors.MismatchError, match=r"embed_tokens\.weight"):
            convert(tmp_path / "dcp", tmp_path / "export", assets=assets)
        assert not (tmp_path / "export").exists()


class TestExperts:
    """Experts, fused in memory and apart in files."""

    @pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "deepseek v3"])
    def test_missing_ones_are_refused(self, tmp_path: Path, name: str) -> None:
        """A checkpoint that lacks all experts of a layer, or one of them, is a MismatchError that names the tensor."""
        model = model_of(name)
        _, assets = checkpoint_of(model, tmp_path / "saved")
        state = model.state_dict()
        fused = "model.layers.1.mlp.experts.down_proj"
        without = {tensor: value for tensor, value in state.items() if tensor != fused}
        for number, changed in enumerate((without, {**state, fused: state[fused][:-1]})):
            io.save({"model": changed}, tmp_path / f"dcp{number}")
            with pytest.raises(errors.MismatchError, match=re.escape(fused)):
                convert(tmp_path / f"dcp{number}", tmp_path / "export", assets=assets)
            assert not (tmp_path / "export").exists()

    @pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "deepseek v3"])
    def test_they_are_apart_in_files(self, tmp_path: Path, name: str) -> None:
        """Each expert's matrix has a name of its own in the export, which the plan says beforehand."""
        model = model_of(name)
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        planned = {output.name: output.shape for output in plan_export(directory, assets).outputs}
        expected = load_file(save_pretrained(model, tmp_path / "expected") / WEIGHTS)
        assert planned == {tensor: tuple(value.shape) for tensor, value in expected.items()}
        assert len(planned) > len(model.state_dict())
