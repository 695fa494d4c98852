"""DCP to Hugging Face safetensors: the same bytes as save_pretrained's, or a named error and nothing written."""

import copy
import errno
import hashlib
import json
import math
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gloo_ranks
import pytest
import torch
import transformers
from children import convert_when_continued, convert_with_little_room, save_as
from safetensors.torch import load_file, save_file
from small_models import assert_same
from small_transformers import (
    MODELS,
    checkpoint_of,
    config_directory,
    model_of,
    read_json,
    save_pretrained,
    tokenizer,
)
from tiny_models import small_config, small_model
from tracing import CHANGING, NAMING, can_trace, kill_everywhere
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ckpt_core import PyTorchCheckpoint, errors, io, open_checkpoint
from ckpt_core.diff import diff
from ckpt_core.export import Assets, convert, convert_checkpoint, plan_export, read_export
from ckpt_core.export.assets import fetch_assets, read_assets
from ckpt_core.export.imports import import_hf
from ckpt_core.export.names import Table
from ckpt_core.hf_weights import read_weights
from ckpt_core.native_checkpoint import convert_dcp_to_hf, save_checkpoint
from ckpt_core.verify import verify

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Assets]:
    """Return the DCP directory and the assets of a small Llama."""
    return checkpoint_of(model_of("llama"), tmp_path_factory.mktemp("llama"))


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def save_states(state: dict[str, torch.Tensor], directory: Path) -> Path:
    """Save tensors as a checkpoint."""
    io.save({"model": state}, directory)
    return directory


def refused(kind: type[Exception], text: str, directory: Path, assets: Assets, target: Path, **options: Any) -> None:
    """Assert that a conversion is refused, and that nothing is left, hidden or not."""
    with pytest.raises(kind, match=text):
        convert(directory, target, assets=assets, **options)
    assert not target.exists()
    assert not target.parent.exists() or [p for p in target.parent.iterdir() if p.name[0] == "."] == []


class TestBytes:
    """What is written."""

    @pytest.mark.parametrize("name", MODELS)
    def test_they_are_those_of_save_pretrained(self, tmp_path: Path, name: str) -> None:
        """Weights are equal byte for byte, configs value for value, and from_pretrained misses nothing."""
        model = model_of(name)
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        export = convert(directory, tmp_path / "export", assets=assets)
        expected = save_pretrained(model, tmp_path / "expected")
        assert (export.path / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
        for file in expected.glob("*.json"):
            assert read_json(export.path / file.name) == read_json(file)
        assert set(contents(export.path)) == {*contents(expected), "export.json"}
        back, report = type(model).from_pretrained(export.path, output_loading_info=True)
        assert not any(report.values()), report
        assert_same(dict(back.state_dict()), dict(model.state_dict()))

    @pytest.mark.parametrize("name", ["llama tied", "t5", "resnet"])
    def test_a_cast_is_that_of_torch(self, tmp_path: Path, name: str) -> None:
        """In bfloat16 and float16 floating-point tensors are cast as torch does; integer and boolean ones are not."""
        model = model_of(name)
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        for dtype in (torch.bfloat16, torch.float16):
            text = str(dtype).removeprefix("torch.")
            export = convert(directory, tmp_path / text, assets=assets, dtype=text)
            found = load_file(export.path / WEIGHTS)
            stored = {n: t for n, t in model.state_dict().items() if n in found}
            expected = {n: t.to(dtype) if t.is_floating_point() else t for n, t in stored.items()}
            kept = {n for n in found if name == "t5" and dtype is torch.float16 and ".wo." in n}  # T5 asks for that
            assert_same({n: found[n] for n in expected}, expected | {n: stored[n] for n in kept})
            assert read_json(export.path / "config.json")["dtype"] == text
            assert any(rule == f"cast: float32 to {text}" for rule in export.rules)

    def test_shards_are_named_indexed_and_complete(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """Several files with an index hold each tensor once, no file above the limit but of a single tensor."""
        directory, assets = llama
        export = convert(directory, tmp_path / "export", assets=assets, max_shard_bytes=4000)
        expected = save_pretrained(model_of("llama"), tmp_path / "expected", max_shard_size=4000)
        shards = sorted(export.path.glob("*.safetensors"))
        assert [p.name for p in shards] == [
            f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
        ]
        index = read_json(export.path / "model.safetensors.index.json")
        theirs = read_json(expected / "model.safetensors.index.json")
        assert index["metadata"] == theirs["metadata"]
        assert sorted(index["weight_map"]) == sorted(theirs["weight_map"])
        for shard in shards:
            tensors = load_file(shard)
            assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(tensors)
            assert sum(t.nbytes for t in tensors.values()) <= 4000 or len(tensors) == 1
        assert len(shards) > 3
        back = AutoModelForCausalLM.from_pretrained(export.path)
        assert_same(dict(back.state_dict()), dict(model_of("llama").state_dict()))

    def test_equal_input_gives_equal_bytes(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """Two conversions agree in every file, the record too, wherever source and target lie."""
        directory, assets = llama
        copy = shutil.copytree(directory, tmp_path / "elsewhere" / "copy")
        first = convert(directory, tmp_path / "one", assets=assets, max_shard_bytes=9000)
        second = convert(copy, tmp_path / "deep" / "two", assets=assets, max_shard_bytes=9000)
        assert contents(first.path) == contents(second.path)
        assert str(tmp_path) not in (first.path / "export.json").read_text()

    def test_the_record_has_the_digest_of_each_file(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """export.json names every other file with its bytes and sha256, the source and the libraries."""
        directory, assets = llama
        export = convert(directory, tmp_path / "export", assets=assets)
        files = {name: data for name, data in contents(export.path).items() if name != "export.json"}
        assert export.files == {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
        assert export.nbytes == sum(map(len, files.values()))
        assert export.architecture == "LlamaForCausalLM"
        record = read_json(export.path / "export.json")
        assert sorted(record["libraries"]) == ["ckptflow", "safetensors", "torch", "transformers"]
        assert record["source"]["digest"].startswith("sha256:")
        assert export == read_export(export.path)
        (export.path / "config.json").write_text("{}")
        with pytest.raises(errors.DamagedError, match=r"config\.json"):
            read_export(export.path)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"files": {"config.json": {"bytes": 2}}}, "sha256 'none'"),
            ({"files": {"config.json": {"bytes": 2, "sha256": 5}}}, "sha256 5"),
            ({"files": {"config.json": {"bytes": "2", "sha256": "0" * 64}}}, "bytes '2'"),
            ({"files": {"config.json": {"bytes": -2, "sha256": "0" * 64}}}, "bytes -2"),
            ({"files": {"config.json": {"bytes": True, "sha256": "0" * 64}}}, "bytes True"),
            ({"files": {"config.json": {"bytes": 3, "sha256": "0" * 64}}}, "not of 3 bytes"),
            ({"files": {"config.json": 2}}, "config.json is a int"),
            ({"files": {"../export/config.json": {"bytes": 2, "sha256": "0" * 64}}}, "no plain name"),
            ({"files": {"a\0b": {"bytes": 2, "sha256": "0" * 64}}}, "no plain name"),
            ({"files": {"a" * 256: {"bytes": 2, "sha256": "0" * 64}}}, "no plain name"),
            ({"files": []}, "files is a list"),
            ({"source": "x"}, "source is a str"),
            ({"rules": "x"}, "rules is a str"),
            ({"rules": [1]}, "a rule is a int"),
            ({"architecture": None}, "architecture is a NoneType"),
            ({"format_version": 2}, "format_version 2"),
        ],
    )
    def test_a_record_that_is_none(self, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        """A record whose fields are missing, or are not what they must be, is a DamagedError that names the field."""
        (tmp_path / "config.json").write_text("{}")
        files = {"config.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}}
        good = {"format_version": 1, "architecture": "A", "source": {}, "files": files, "rules": []}
        (tmp_path / "export.json").write_text(json.dumps(good))
        assert read_export(tmp_path).nbytes == 2
        (tmp_path / "export.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(errors.DamagedError) as caught:
            read_export(tmp_path)
        assert said in str(caught.value)

    def test_a_record_that_is_too_large(self, tmp_path: Path) -> None:
        """A record of more than 64 MB is not read."""
        good = {"format_version": 1, "architecture": "A", "source": {}, "files": {}, "rules": []}
        (tmp_path / "export.json").write_text(json.dumps(good) + " " * 64_000_000)
        with pytest.raises(errors.DamagedError, match="at most 64000000"):
            read_export(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"[" * 100_000])
    def test_a_record_that_is_no_json(self, tmp_path: Path, content: bytes) -> None:
        """What is no JSON object, or nests too deep, is a DamagedError."""
        (tmp_path / "export.json").write_bytes(content)
        with pytest.raises(errors.DamagedError, match="not an export's record"):
            read_export(tmp_path)

    def test_progress_adds_up(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """The bytes that are told are those of all tensors."""
        told: list[tuple[int, int]] = []
        convert(llama[0], tmp_path / "export", assets=llama[1], progress=lambda *said: told.append(said))
        nbytes = plan_export(*llama).nbytes
        assert (told[0], told[-1]) == ((0, nbytes), (nbytes, nbytes))
        assert told == sorted(told)


@pytest.mark.parametrize(("layout", "ranks"), [("rows", 2), ("columns", 2), ("both", 4)])
def test_whoever_saved_it_the_bytes_are_the_same(
    tmp_path: Path, llama: tuple[Path, Assets], layout: str, ranks: int
) -> None:
    """Rows of two ranks, columns of two, and rectangles of four give the export that one rank's checkpoint gives."""
    torch.save(model_of("llama").state_dict(), tmp_path / "state.pt")
    gloo_ranks.values(gloo_ranks.run_ranks(ranks, save_as, str(tmp_path / "state.pt"), str(tmp_path / "dcp"), layout))
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == ranks
    export = convert(tmp_path / "dcp", tmp_path / "export", assets=llama[1])
    expected = convert(*[llama[0], tmp_path / "expected"], assets=llama[1])
    assert (export.path / WEIGHTS).read_bytes() == (expected.path / WEIGHTS).read_bytes()


class TestRefusals:
    """What is not converted: each ends in a named error, with nothing written."""

    @pytest.mark.parametrize("dtype", [None, "float16"])
    def test_bounds_and_masks_may_be_infinite(self, tmp_path: Path, dtype: str | None) -> None:
        """Inf in a buffer, which no training changes by gradients, is converted, imported and verified; NaN is not."""
        model = model_of("resnet")
        _, assets = checkpoint_of(model, tmp_path / "saved")
        bound = "resnet.embedder.embedder.normalization.running_mean"
        for value, weight in ((float("-inf"), bound), (float("nan"), bound), (float("inf"), "classifier.1.weight")):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            state[weight].view(-1)[0] = value
            directory = save_states(state, tmp_path / f"{weight} {value}" / "dcp")
            if weight != bound or math.isnan(value):
                refused(
                    errors.DamagedError, "holds NaN or Inf", directory, assets, tmp_path / "out" / "export", dtype=dtype
                )
                continue
            export = convert(directory, tmp_path / "export", assets=assets, dtype=dtype).path
            made = import_hf(export, tmp_path / "imported").path
            for place in (export, made):
                report = verify(place)
                assert report.passed, report
                assert any("Inf only in masks and bounds" in check.detail for check in report.checks)
            assert not verify(directory).passed  # without a config nothing tells what it is

    def test_values_that_are_not_finite(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """NaN and Inf are refused by name, unless they are allowed."""
        for number, value in enumerate((float("nan"), float("inf"), float("-inf"))):
            state = dict(model_of("llama").state_dict())
            state["model.norm.weight"][3] = value
            directory = save_states(state, tmp_path / f"dcp{number}")
            refused(errors.DamagedError, r"model\.norm\.weight.*NaN", directory, llama[1], tmp_path / "out" / "export")
        export = convert(directory, tmp_path / "allowed", assets=llama[1], allow_nonfinite=True)
        assert load_file(export.path / WEIGHTS)["model.norm.weight"][3] == float("-inf")

    def test_values_that_do_not_fit_the_type(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """A finite value that a cast would make Inf is refused by name, and what fits is cast."""
        state = dict(model_of("llama").state_dict())
        state["model.norm.weight"][3] = 65504.0
        fits = convert(save_states(state, tmp_path / "fits"), tmp_path / "half", assets=llama[1], dtype="float16")
        assert load_file(fits.path / WEIGHTS)["model.norm.weight"][3] == 65504.0
        state["model.norm.weight"][3] = -70000.0
        directory, out = save_states(state, tmp_path / "dcp"), tmp_path / "out" / "export"
        said = r"model\.norm\.weight: holds values that do not fit float16.*bfloat16 or float32"
        refused(errors.MismatchError, said, directory, llama[1], out, dtype="float16")
        assert convert(directory, tmp_path / "wide", assets=llama[1], dtype="bfloat16").architecture

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda state: state.update(odd=torch.zeros(1)), r"1 tensors that LlamaForCausalLM does not have.*odd"),
            (lambda state: state.pop("model.norm.weight"), r"lacks 1 .*model\.norm\.weight"),
            (lambda state: state.update({"model.norm.weight": torch.ones(17)}), r"norm\.weight has shape \(17,\)"),
            (lambda state: state.update({"model.norm.weight": torch.ones(16, 1)}), r"norm\.weight has shape"),
            (lambda state: state.update({"model.norm.weight": torch.ones(16, dtype=torch.complex128)}), "complex128"),
            (lambda state: state.update({"model.norm.weight": 3}), r"norm\.weight"),
        ],
        ids=["leftover", "missing", "longer", "deeper", "complex128", "a number"],
    )
    def test_tensors_that_the_architecture_does_not_expect(
        self, tmp_path: Path, llama: tuple[Path, Assets], change: Callable[[dict[str, Any]], Any], text: str
    ) -> None:
        """A tensor left over, missing, or of another shape or kind is a MismatchError that names it."""
        state: dict[str, Any] = dict(model_of("llama").state_dict())
        change(state)
        directory = save_states(state, tmp_path / "dcp")
        refused(errors.MismatchError, text, directory, llama[1], tmp_path / "out" / "export")

    def test_a_config_of_another_model(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """Another architecture, other sizes, an unknown class, and a class of nobody's are MismatchErrors."""
        out = tmp_path / "out" / "export"
        _, other = checkpoint_of(model_of("gpt2"), tmp_path / "gpt2")
        refused(errors.MismatchError, "architecture", llama[0], other, out)
        config = dict(llama[1].config)
        for change, text in (
            ({"hidden_size": 32}, "shape"),
            ({"num_hidden_layers": 1}, "does not have"),
            ({"num_hidden_layers": 3}, "lacks"),
            ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
            ({"architectures": ["Tensor"]}, "Tensor"),
            ({"architectures": None, "model_type": "bert"}, "names no architectures"),
            ({"model_type": "nothing"}, "nothing"),
            ({"hidden_size": "many"}, "config"),
        ):
            refused(errors.MismatchError, text, llama[0], replace(llama[1], config={**config, **change}), out)

    def test_a_config_without_a_model_type(self, tmp_path: Path) -> None:
        """A part of a model whose config class has none is found by its class; any other config is refused by name."""
        model = small_model(transformers.BarkCausalModel, small_config(transformers.BarkCausalModel))
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        assert "model_type" not in assets.config
        export = convert(directory, tmp_path / "export", assets=assets)
        expected = save_pretrained(model, tmp_path / "expected")
        for name in (WEIGHTS, "config.json"):
            assert (export.path / name).read_bytes() == (expected / name).read_bytes()
        config = expected / "config.json"
        for change in ({"architectures": None}, {"architectures": ["LlamaForCausalLM"]}, {"model_type": 3}):
            config.write_text(json.dumps({**read_json(config), **change}))
            with pytest.raises(errors.MismatchError, match="names no model_type"):
                read_assets(expected)

    def test_tied_tensors_that_differ(self, tmp_path: Path) -> None:
        """Two tensors that the config ties are compared: equal ones are stored once, others refused."""
        model = model_of("llama tied")
        _, assets = checkpoint_of(model, tmp_path / "saved")
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        export = convert(save_states(state, tmp_path / "equal"), tmp_path / "export", assets=assets)
        assert "lm_head.weight" not in load_file(export.path / WEIGHTS)
        alone = {name: tensor for name, tensor in state.items() if name != "model.embed_tokens.weight"}
        from_head = convert(save_states(alone, tmp_path / "head"), tmp_path / "from head", assets=assets)
        assert (from_head.path / WEIGHTS).read_bytes() == (export.path / WEIGHTS).read_bytes()
        state["lm_head.weight"][0, 0] += 1
        directory = save_states(state, tmp_path / "differ")
        refused(errors.MismatchError, "differ, and the config ties", directory, assets, tmp_path / "out" / "export")

    def test_targets_that_are_taken_or_inside(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """An existing target is a FileExistsError and stays as it is; one inside or around the source is refused."""
        directory, assets = llama
        taken = tmp_path / "taken"
        taken.mkdir()
        with pytest.raises(errors.ExportExistsError):
            convert(directory, taken, assets=assets)
        (taken / "mine").write_text("a")
        with pytest.raises(FileExistsError):
            convert(directory, taken, assets=assets)
        assert contents(taken) == {"mine": b"a"}
        for target in (directory, directory / "export", directory.parent, directory / ".." / "dcp" / "x"):
            with pytest.raises(errors.ArgumentError, match="lies in the other"):
                convert(directory, target, assets=assets, overwrite=True)
        for limit in (0, -1):
            with pytest.raises(errors.ArgumentError, match="max_shard_bytes"):
                convert(directory, tmp_path / "x", assets=assets, max_shard_bytes=limit)

    def test_assets_in_directories(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """Text in directories of the assets goes along, say a pooling layer's config; weights and code do not."""
        assets = tmp_path / "assets"
        kept = {"config.json": json.dumps(llama[1].config), "1_Pooling/config.json": "{}", "modules.json": "[]"}
        others = [
            "onnx/model.onnx",
            "onnx/config.json",
            "eval/run.py",
            ".cache/etag.json",
            ".gitattributes",
            "old.h5",
            "a.safetensors",
        ]
        for name, text in {**kept, **dict.fromkeys(others, "")}.items():
            (assets / name).parent.mkdir(parents=True, exist_ok=True)
            (assets / name).write_text(text)
        export = convert(llama[0], tmp_path / "export", assets=read_assets(assets))
        assert export.files.keys() == {*kept, "model.safetensors"}
        assert (export.path / "1_Pooling" / "config.json").read_text() == "{}"
        assert read_export(export.path) == export
        assert verify(export.path).passed

    @pytest.mark.parametrize("given", ["assets", "--model"])
    def test_modules_with_weights_of_their_own(self, tmp_path: Path, llama: tuple[Path, Assets], given: str) -> None:
        """Weights in directories that `modules.json` names go along, by a rule; of other directories a rule says no."""
        directory = modules_directory(tmp_path / "model", llama[1])
        dense = {"linear.weight": torch.rand(3, 2)}
        save_file(dense, directory / "2_Dense" / "model.safetensors")
        assets = read_assets(directory) if given == "assets" else fetch_assets(str(directory))
        export = convert(llama[0], tmp_path / "export", assets=assets)
        exported = load_file(export.path / "2_Dense" / "model.safetensors")
        assert torch.equal(exported["linear.weight"], dense["linear.weight"])
        kept = {"2_Dense/config.json", "1_Pooling/config.json", "modules.json", "preprocessor_config.json"}
        assert kept < export.files.keys()
        assert not any(name.startswith("onnx") for name in export.files)
        assert [rule for rule in export.rules if rule.startswith("assets: ")] == [
            "assets: 2_Dense/model.safetensors is carried as it is; modules.json names its directory",
            "assets: onnx/ is left out; it holds weights, and modules.json does not name it",
        ]
        assert read_export(export.path) == export
        assert verify(export.path).passed
        assert read_weights(export.path).files.keys() == {"model.safetensors"}

    def test_modules_that_cannot_be_carried(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """A module's pickled weights, or a `modules.json` that is no list of modules, are named errors."""
        directory = modules_directory(tmp_path / "model", llama[1])
        (directory / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
        for read in (read_assets, lambda place: fetch_assets(str(place))):
            with pytest.raises(errors.MismatchError, match=r"2_Dense/pytorch_model\.bin.*safe_serialization"):
                read(directory)
        for text in ("{", "[1]", "3", '[{"idx": 0}]'):
            (directory / "modules.json").write_text(text)
            with pytest.raises(errors.DamagedError, match=r"modules\.json"):
                read_assets(directory)

    def test_assets_that_bring_code(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """Python code stays behind, named, where transformers has the model itself; else the model is refused."""
        assets = tmp_path / "assets"
        assets.mkdir()
        with pytest.raises(errors.NotACheckpointError, match=r"config\.json"):
            read_assets(assets)
        config = {**llama[1].config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
        (assets / "config.json").write_text(json.dumps(config))
        (assets / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        for read in (read_assets, lambda place: fetch_assets(str(place))):
            found = read(assets)
            assert found.files == {}
            assert "auto_map" not in found.config
            assert [rule.partition(";")[0] for rule in found.rules] == [
                "config: auto_map is left out",
                "assets: left out: evil.py",
            ]
        trusted = read_assets(assets, trust_remote_code=True)
        assert set(trusted.files) == {"evil.py"}
        assert trusted.config == config
        for change in ({"model_type": "evil"}, {"architectures": ["EvilForCausalLM"]}):
            (assets / "config.json").write_text(json.dumps({**config, **change}))
            for read in (read_assets, lambda place: fetch_assets(str(place))):
                with pytest.raises(errors.UntrustedError, match="auto_map"):
                    read(assets)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("{", errors.DamagedError),
            ("[" * 100_000, errors.DamagedError),
            ("[]", errors.MismatchError),
            ("{}", errors.MismatchError),
        ],
        ids=["cut", "deep", "list", "empty"],
    )
    def test_configs_that_are_none(self, tmp_path: Path, text: str, kind: type[Exception]) -> None:
        """A config that is not JSON, or names no model type, is a named error."""
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(kind, match=r"config\.json"):
            read_assets(tmp_path)

    def test_damaged_files(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """A checkpoint whose file is cut short or missing is a DamagedError, and nothing is left."""
        directory = shutil.copytree(llama[0], tmp_path / "dcp")
        shard = directory / "__0_0.distcp"
        data = shard.read_bytes()
        shard.write_bytes(data[:-100])
        refused(errors.DamagedError, "distcp", directory, llama[1], tmp_path / "out" / "export")
        shard.unlink()
        refused(errors.DamagedError, "distcp", directory, llama[1], tmp_path / "out" / "export")


class TestSources:
    """What is converted from."""

    def test_a_committed_step_has_its_own_assets(self, tmp_path: Path) -> None:
        """A step's assets give config and tokenizer, and the record names the step; an old record is left out."""
        words = tmp_path / "words"
        tokenizer().save_pretrained(words)
        (words / "export.json").write_text("old")
        (words / "old.safetensors").write_text("old")
        model = model_of("llama tied")
        saved = PyTorchCheckpoint(module=model).save(tmp_path / "store", step=4, run="r", assets=words)
        export = convert_checkpoint(open_checkpoint(str(saved.url)), tmp_path / "export")
        digest = saved.to_dict()["digest"]
        assert export.source == {"run": "r", "step": 4, "digest": digest}
        assert AutoTokenizer.from_pretrained(export.path)("w3 w5")["input_ids"] == [3, 5]
        assert "old.safetensors" not in contents(export.path)
        bare = PyTorchCheckpoint(hyperparameters={"a": 1}).save(tmp_path / "store", step=5, run="r")
        with pytest.raises(errors.NotACheckpointError, match="has no model"):
            convert_checkpoint(open_checkpoint(str(bare.url)), tmp_path / "bare")

    def test_a_committed_step_with_other_assets(self, tmp_path: Path) -> None:
        """Assets that are given stand in for the step's own, and the record names the step all the same."""
        model = model_of("llama tied")
        saved = PyTorchCheckpoint(module=model).save(tmp_path / "store", step=4, run="r")
        other = Assets(model.config.to_dict(), {"notes.txt": b"other"})
        export = convert_checkpoint(open_checkpoint(str(saved.url)), tmp_path / "export", assets=other)
        assert contents(export.path)["notes.txt"] == b"other"
        assert (export.source["run"], export.source["step"]) == ("r", 4)

    @pytest.mark.parametrize("prefix", ["", "model.", "state.model."])
    def test_names_in_front_of_the_models_are_removed(
        self, tmp_path: Path, llama: tuple[Path, Assets], prefix: str
    ) -> None:
        """Whatever the wrapper was called, and whatever optimizer stands beside it, the export is the same."""
        state = {prefix + name: tensor for name, tensor in model_of("llama").state_dict().items()}
        state |= {"optimizer.state.lm_head.weight.exp_avg": torch.zeros(40, 16)}
        io.save({**state, "train_state": {"step": torch.tensor(3)}}, tmp_path / "dcp")
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=llama[1])
        expected = convert(llama[0], tmp_path / "expected", assets=llama[1])
        assert (export.path / WEIGHTS).read_bytes() == (expected.path / WEIGHTS).read_bytes()

    @pytest.mark.parametrize("name", ["mixtral", "llava"])
    def test_names_may_be_those_of_the_export(self, tmp_path: Path, name: str) -> None:
        """A checkpoint that holds each expert by itself, as Hugging Face stores it, gives the same files."""
        model = model_of(name)
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        expected = convert(directory, tmp_path / "expected", assets=assets)
        io.save({"model": load_file(expected.path / WEIGHTS)}, tmp_path / "dcp")
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=assets)
        assert (export.path / WEIGHTS).read_bytes() == (expected.path / WEIGHTS).read_bytes()

    @pytest.mark.parametrize(
        ("model", "optimizer"),
        [("app.model.", "app.optimizer."), ("model.", "optimizer_0."), ("", "optim."), ("state_dict.", "optimizer.")],
        ids=["torch's tutorial", "Lightning", "torchtitan", "a state dict"],
    )
    def test_what_stands_beside_a_model_is_left(
        self, tmp_path: Path, llama: tuple[Path, Assets], model: str, optimizer: str
    ) -> None:
        """An optimizer in the same directory is no leftover, wherever frameworks put it."""
        state = {model + name: tensor for name, tensor in model_of("llama").state_dict().items()}
        io.save({**state, f"{optimizer}state.lm_head.weight.exp_avg": torch.zeros(40, 16)}, tmp_path / "dcp")
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=llama[1])
        expected = convert(llama[0], tmp_path / "expected", assets=llama[1])
        assert (export.path / WEIGHTS).read_bytes() == (expected.path / WEIGHTS).read_bytes()
        said = f"dropped: 1 entries that are not the model's, such as {optimizer}state.lm_head.weight.exp_avg"
        assert said in export.rules

    def test_what_a_training_keeps_is_no_leftover(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """Values, counters, random states and schedulers next to a model are left out, and the plan says so."""
        others = {
            "step": torch.tensor(3),
            "tokens_seen": 12,
            "epoch": torch.tensor(0.5),
            "rng_state": torch.get_rng_state(),
            "args": Namespace(lr=1.0),
            "lr_scheduler": {"betas": torch.ones(2), "kind": "cosine"},
            "dataloader_state": {"0": {"position": 7}},
        }
        expected = (convert(llama[0], tmp_path / "expected", assets=llama[1]).path / WEIGHTS).read_bytes()
        for name, state in (
            ("apart", {"model": model_of("llama").state_dict()}),
            ("flat", model_of("llama").state_dict()),
        ):
            export = convert(
                save_states({**state, **others}, tmp_path / name), tmp_path / f"{name} out", assets=llama[1]
            )
            assert (export.path / WEIGHTS).read_bytes() == expected
            assert any(
                rule.startswith(f"dropped: {len(others) + 1} entries that are not the model's") for rule in export.rules
            )

    @pytest.mark.parametrize(
        "other",
        [{"ema.norm.weight": torch.ones(16)}, {"model.extra.count": torch.tensor(3)}],
        ids=["weights", "inside"],
    )
    def test_what_may_be_trained_is_never_left(
        self, tmp_path: Path, llama: tuple[Path, Assets], other: dict[str, torch.Tensor]
    ) -> None:
        """Weights next to a model, and anything within it that it does not have, are a MismatchError."""
        directory = save_states({**model_of("llama").state_dict(), **other}, tmp_path / "dcp")
        refused(errors.MismatchError, "does not have", directory, llama[1], tmp_path / "out" / "export")

    @pytest.mark.parametrize("names", [("model", "ema"), ("actor", "ref.module"), ("", "ema_model")], ids="+".join)
    def test_several_models_are_refused(
        self, tmp_path: Path, llama: tuple[Path, Assets], names: tuple[str, str]
    ) -> None:
        """Of two models that fit neither is guessed: the error names both, and a table of names that chooses one."""
        states = [model_of("llama").state_dict(), {n: -t for n, t in model_of("llama").state_dict().items()}]
        both = {f"{at}.{n}".lstrip("."): t for at, state in zip(names, states, strict=True) for n, t in state.items()}
        io.save(both, tmp_path / "dcp")
        with pytest.raises(errors.MismatchError, match=r"holds more than one LlamaForCausalLM: .*by a table") as raised:
            plan_export(tmp_path / "dcp", llama[1])
        assert all(f"'{name}'" in str(raised.value) for name in names)
        table = Table(drop=(re.compile("^" + re.escape(f"{names[1]}.")),))
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=llama[1], table=table)
        assert_same(load_file(export.path / WEIGHTS), dict(sorted(states[0].items())))
        (suggested,) = json.loads(str(raised.value).partition("such as ")[2].rstrip("."))["drop"]
        assert plan_export(tmp_path / "dcp", llama[1], table=Table(drop=(re.compile(suggested),))).outputs

    @pytest.mark.parametrize(
        ("name", "front"),
        [("CLIPTextModel", "text_model."), ("SiglipVisionModel", "vision_model."), ("mixtral", None), ("llava", None)],
    )
    def test_the_form_of_the_file_that_a_model_was_loaded_from(
        self, tmp_path: Path, name: str, front: str | None
    ) -> None:
        """A model that was loaded is exported as save_pretrained saves it: in the names of its file, old or new."""
        hub = tmp_path / "hub"
        if front is None:
            save_pretrained(model_of(name), hub, save_original_format=False)
        else:
            cls = getattr(transformers, name)
            save_pretrained(small_model(cls, small_config(cls)), hub)
            state = {front + tensor: value for tensor, value in load_file(hub / WEIGHTS).items()}
            save_file(state, hub / WEIGHTS, metadata={"format": "pt"})
        cls = getattr(transformers, read_json(hub / "config.json")["architectures"][0])
        model = cls.from_pretrained(hub)
        expected = (save_pretrained(model, tmp_path / "expected") / WEIGHTS).read_bytes()
        assert (hub / WEIGHTS).read_bytes() == expected
        directory, own = checkpoint_of(model, tmp_path / "saved")
        for number, assets in enumerate((own, read_assets(hub), fetch_assets(str(hub)))):
            export = convert(directory, tmp_path / f"export {number}", assets=assets)
            assert (export.path / WEIGHTS).read_bytes() == expected
            assert "names: in the form of the file that the model was loaded from" in export.rules
            assert not (export.path / "weight_conversions.json").exists()
        made = import_hf(hub, tmp_path / "imported").path
        back = convert(made, tmp_path / "back", assets=read_assets(made / "assets"))
        assert (back.path / WEIGHTS).read_bytes() == expected
        assert diff(directory, back.path).equal
        others = Assets(own.config, {"weight_conversions.json": b'["no longer there"]'})
        usual = convert(directory, tmp_path / "usual", assets=others).path
        assert (usual / WEIGHTS).read_bytes() != expected

    def test_a_class_that_fsdp_renamed(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """A config that was saved of a live FSDP2 model names the class that transformers has."""
        assets = replace(llama[1], config={**llama[1].config, "architectures": ["FSDPLlamaForCausalLM"]})
        export = convert(llama[0], tmp_path / "export", assets=assets)
        assert read_json(export.path / "config.json")["architectures"] == ["LlamaForCausalLM"]

    @pytest.mark.parametrize(
        ("family", "head"),
        [
            ("llama", "LlamaForCausalLM"), ("llama", "LlamaModel"), ("llama tied", "LlamaForCausalLM"),
            ("llama tied", "LlamaModel"), ("t5", "T5ForConditionalGeneration"), ("t5", "T5EncoderModel"),
            ("bert", "BertForSequenceClassification"), ("llava", "LlavaForConditionalGeneration"),
            ("whisper", "WhisperForConditionalGeneration"),
        ],
    )  # fmt: skip
    def test_without_architectures_the_class_that_fits_is_taken(self, tmp_path: Path, family: str, head: str) -> None:
        """A config without `architectures` means the class of its model type that has just these tensors."""
        model = getattr(transformers, head)(copy.deepcopy(MODELS[family][1]))
        directory, assets = checkpoint_of(model, tmp_path / "saved")
        config = {name: value for name, value in assets.config.items() if name != "architectures"}
        export = convert(directory, tmp_path / "export", assets=replace(assets, config=config))
        assert export.architecture == head
        assert read_json(export.path / "config.json")["architectures"] == [head]

    def test_without_architectures_nothing_is_guessed(self, tmp_path: Path) -> None:
        """Two classes with the same tensors are an error that names both."""
        directory, assets = checkpoint_of(model_of("bert"), tmp_path / "saved")
        config = {name: value for name, value in assets.config.items() if name != "architectures"}
        text = "fit BertForMaskedLM and BertLMHeadModel alike"
        refused(errors.MismatchError, text, directory, replace(assets, config=config), tmp_path / "out" / "export")

    def test_the_old_name_of_dtype_is_not_kept(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """A config from before transformers 5 does not end with two dtypes."""
        old = replace(llama[1], config={**llama[1].config, "torch_dtype": "float32"})
        export = convert(llama[0], tmp_path / "export", assets=old, dtype="bfloat16")
        assert AutoConfig.from_pretrained(export.path).dtype == torch.bfloat16
        assert "torch_dtype" not in read_json(export.path / "config.json")


class TestConvertDcpToHf:
    """NeMo-RL's way to convert."""

    def test_its_result_loads_with_transformers(self, tmp_path: Path) -> None:
        """It returns the path that it was given, from which the saved weights and the tokenizer load."""
        model = model_of("llama tied", seed=5)
        save_checkpoint(model, str(tmp_path / "step" / "policy" / "weights"))
        config = str(config_directory(model, tmp_path / "config"))
        target = str(tmp_path / "hf")
        assert convert_dcp_to_hf(str(tmp_path / "step"), target, config, config) is target
        back = AutoModelForCausalLM.from_pretrained(target)
        assert_same(dict(back.state_dict()), dict(model.state_dict()))
        assert AutoTokenizer.from_pretrained(target)("w7")["input_ids"] == [7]
        assert not list(Path(target).glob("*.bin"))

    def test_an_existing_target_is_replaced_only_if_asked(self, tmp_path: Path) -> None:
        """Without overwrite it is a FileExistsError, whatever else is wrong; with it the old one is gone."""
        model = model_of("llama")
        save_checkpoint(model, str(tmp_path / "dcp"))
        config = str(config_directory(model, tmp_path / "config"))
        target = tmp_path / "hf"
        target.mkdir()
        (target / "old.bin").write_text("old")
        with pytest.raises(FileExistsError, match="hf"):
            convert_dcp_to_hf(str(tmp_path / "missing"), str(target), "no config", "no tokenizer")
        assert convert_dcp_to_hf(str(tmp_path / "dcp"), str(target), config, config, overwrite=True) == str(target)
        assert sorted(contents(target)) == [
            "config.json",
            "export.json",
            WEIGHTS,
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config", "dcp", "hf"]

    def test_a_file_or_a_link_at_the_target_is_replaced_too(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """Overwriting takes the name; what a link led to stays."""
        kept = tmp_path / "kept"
        kept.mkdir()
        (tmp_path / "link").symlink_to(kept)
        (tmp_path / "file").write_text("a")
        for name in ("link", "file"):
            with pytest.raises(FileExistsError):
                convert(llama[0], tmp_path / name, assets=llama[1])
            convert(llama[0], tmp_path / name, assets=llama[1], overwrite=True)
            assert (tmp_path / name / WEIGHTS).is_file()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "kept", "link"]
        assert list(kept.iterdir()) == []

    def test_overrides_are_the_configs(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """`hf_overrides` gives the config that `AutoConfig.from_pretrained` makes of them."""
        model = model_of("llama")
        save_checkpoint(model, str(tmp_path / "dcp"))
        config = str(config_directory(model, tmp_path / "config"))
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
        overrides = {"max_position_embeddings": 256, "rope_parameters": rope, "num_labels": 3, "no_such_value": 1}
        given = copy.deepcopy(overrides)
        convert_dcp_to_hf(str(tmp_path / "dcp"), str(tmp_path / "hf"), config, config, False, overrides)
        assert overrides == given
        assert "no_such_value" in caplog.text
        found, wanted = (
            AutoConfig.from_pretrained(tmp_path / "hf").to_dict(),
            AutoConfig.from_pretrained(config, **copy.deepcopy(overrides)).to_dict(),
        )
        ignored = {"_name_or_path", "architectures", "dtype", "transformers_version"}
        assert {k: v for k, v in found.items() if k not in ignored} == {
            k: v for k, v in wanted.items() if k not in ignored
        }
        assert found["max_position_embeddings"] == 256
        for none in ({}, None):
            convert_dcp_to_hf(str(tmp_path / "dcp"), str(tmp_path / "hf"), config, config, True, none)
            assert AutoConfig.from_pretrained(tmp_path / "hf").max_position_embeddings != 256

    @pytest.mark.parametrize(
        "overrides", [{"hidden_size": "wide"}, {"rope_parameters": {"factor": object()}}], ids=["type", "object"]
    )
    def test_overrides_that_cannot_be_are_refused(self, tmp_path: Path, overrides: dict[str, Any]) -> None:
        """A value that the config does not accept, or JSON does not have, is an ArgumentError."""
        model = model_of("llama")
        save_checkpoint(model, str(tmp_path / "dcp"))
        config = str(config_directory(model, tmp_path / "config"))
        with pytest.raises(errors.ArgumentError, match="hf_overrides"):
            convert_dcp_to_hf(str(tmp_path / "dcp"), str(tmp_path / "hf"), config, config, hf_overrides=overrides)
        assert not (tmp_path / "hf").exists()

    def test_what_is_missing_is_a_file_not_found_error(self, tmp_path: Path) -> None:
        """No checkpoint, no config and no tokenizer are each named, and nothing is written."""
        model = model_of("llama")
        save_checkpoint(model, str(tmp_path / "dcp"))
        config = str(config_directory(model, tmp_path / "config"))
        empty = tmp_path / "empty"
        empty.mkdir()
        for dcp, model_path, tokenizer_path, text in (
            (str(empty), config, config, "no DCP checkpoint"),
            (str(tmp_path / "dcp"), str(empty), config, "config"),
            (str(tmp_path / "dcp"), config, str(empty), "tokenizer"),
        ):
            with pytest.raises(FileNotFoundError, match=text):
                convert_dcp_to_hf(dcp, str(tmp_path / "hf"), model_path, tokenizer_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config", "dcp", "empty"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_killed_anywhere_there_is_no_half_and_a_rerun_works(
    tmp_path: Path, llama: tuple[Path, Assets], overwrite: bool
) -> None:
    """SIGKILL before each system call of a conversion that changes a file leaves no half; the rerun cleans up."""
    if not can_trace():
        pytest.skip("needs strace, and the right to attach it")
    directory, assets = llama
    expected = contents(convert(directory, tmp_path / "expected", assets=assets).path)

    def prepare(place: Path) -> tuple[Any, ...]:
        if overwrite:
            (place / "export").mkdir()
            (place / "export" / "old").write_text("old")
        assets_directory = directory.parent / "assets"
        return convert_when_continued, str(directory), str(assets_directory), str(place / "export"), overwrite

    def check(place: Path) -> None:
        target = place / "export"
        if overwrite:  # on a file system that can exchange names there is no moment without one
            assert contents(target) in (expected, {"old": b"old"})
        assert not target.exists() or contents(target) in (expected, {"old": b"old"})
        convert(directory, target, assets=assets, overwrite=True)
        assert contents(target) == expected
        assert list(place.iterdir()) == [target]

    (tmp_path / "killed").mkdir()
    calls = NAMING if overwrite else CHANGING
    kills = kill_everywhere(calls, tmp_path / "killed", prepare, check, every={"write": 9, "fsync": 2})
    assert kills > (5 if overwrite else 10)


def test_a_full_disk_leaves_nothing(tmp_path: Path, llama: tuple[Path, Assets]) -> None:
    """An error of the file system in the middle of a shard ends the conversion, with nothing at the target."""
    target = tmp_path / "out" / "export"
    arguments = (str(llama[0]), str(llama[0].parent / "assets"), str(target))
    process = gloo_ranks.fork(convert_with_little_room, *arguments)
    process.join(60)
    assert process.exitcode == errno.EFBIG
    assert list(target.parent.iterdir()) == []


def modules_directory(directory: Path, assets: Assets) -> Path:
    """Write a model's directory in sentence-transformers' layout, whose dense layer still lacks its weights."""
    modules = [{"idx": n, "path": path} for n, path in enumerate(["", "1_Pooling", "2_Dense"])]
    files = {"config.json": dict(assets.config), "modules.json": modules, "preprocessor_config.json": {}}
    files |= {f"{name}/config.json": {} for name in ("1_Pooling", "2_Dense", "onnx")}
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    (directory / "onnx" / "model.onnx").write_bytes(b"")
    return directory
