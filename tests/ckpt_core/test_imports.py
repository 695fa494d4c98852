"""Hugging Face directories made into DCP checkpoints: those that save_checkpoint of the model makes, or an error."""

import errno
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sharded_families
import torch
import transformers
from gloo_ranks import fork, run_ranks, values
from import_child import import_when_continued, import_with_little_room, load_in_rank
from object_stores import s3_server  # noqa: F401 - a fixture
from safetensors.torch import load_file, save_file
from small_models import assert_same
from small_transformers import MODELS, model_of, read_json, save_pretrained, tokenizer
from test_hf_weights import Placed, save_parts
from tiny_models import small_config, small_model
from tracing import CHANGING, can_trace, kill_everywhere

from ckpt_core import cli, errors, io
from ckpt_core.export import chunks, convert
from ckpt_core.export.assets import read_assets
from ckpt_core.export.imports import import_hf
from ckpt_core.export.names import Table
from ckpt_core.format.index import read_index
from ckpt_core.native_checkpoint import load_checkpoint, save_checkpoint
from ckpt_core.urls import place_of
from ckpt_core.verify import verify

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what save_pretrained of a small Llama and of a tokenizer wrote."""
    directory = save_pretrained(model_of("llama"), tmp_path_factory.mktemp("llama") / "hf")
    tokenizer().save_pretrained(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def state_of(directory: Path) -> Tensors:
    """Return the model's state that a DCP directory holds."""
    return io.read_state(directory)["model"]


def copy_with(source: Path, target: Path, change: Callable[[Tensors], Any] = id, **config: Any) -> Path:
    """Write a Hugging Face directory with other tensors, or another config; fields of None are left out of it."""
    target.mkdir(parents=True)
    state = load_file(source / WEIGHTS)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / WEIGHTS)
    fields = {**read_json(source / "config.json"), **config}
    (target / "config.json").write_text(
        json.dumps({name: value for name, value in fields.items() if value is not None})
    )
    return target


def refused(kind: type[Exception], text: str, source: Path, target: Path, **options: Any) -> None:
    """Assert that an import is refused, and that nothing is left, hidden or not."""
    with pytest.raises(kind, match=text):
        import_hf(source, target, **options)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


class TestWhatIsMade:
    """The checkpoint that save_checkpoint of the loaded model would make."""

    @pytest.mark.parametrize("name", MODELS)
    def test_there_and_back(self, tmp_path: Path, name: str) -> None:
        """Every family loads bit for bit, has the names of a saved model, and converts back to equal files."""
        model = model_of(name)
        source = save_pretrained(model, tmp_path / "hf")
        made = import_hf(source, tmp_path / "dcp")
        other = model_of(name, seed=1)
        load_checkpoint(other, str(made.path))
        loaded = type(model).from_pretrained(source)
        assert_same(dict(other.state_dict()), dict(loaded.state_dict()))
        save_checkpoint(model, str(tmp_path / "saved"))
        found, expected = read_index(made.path), read_index(tmp_path / "saved")
        assert list(found.paths.items()) == list(expected.paths.items())
        assert [*found.tensors] == [*expected.tensors]
        assert (made.tensors, made.nbytes) == (len(expected.tensors), expected.nbytes)
        export = convert(made.path, tmp_path / "back", assets=read_assets(made.path / "assets"))
        assert export.architecture == made.architecture == type(model).__name__
        back = contents(export.path)
        del back["export.json"]
        assert back == contents(source)

    def test_of_several_files(self, tmp_path: Path) -> None:
        """An index of several files of bfloat16 becomes several files of at most the size that was asked for."""
        model = model_of("mixtral").bfloat16()
        source = save_pretrained(model, tmp_path / "hf", max_shard_size=4000)
        assert len(list(source.glob("*.safetensors"))) > 3
        made = import_hf(source, tmp_path / "dcp", max_file_bytes=5000)
        assert_same(state_of(made.path), dict(model.state_dict()))
        files = sorted(path.name for path in made.path.glob("*.distcp"))
        assert files == sorted(f"__0_{number}.distcp" for number in range(len(files)))
        assert len(files) > 3
        back = convert(made.path, tmp_path / "back", assets=read_assets(made.path / "assets"))
        whole = save_pretrained(model, tmp_path / "whole")
        assert (back.path / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()

    @pytest.mark.parametrize("name", ["mixtral", "gpt2", "clap", "llava"])
    def test_large_tensors_are_several_chunks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """A tensor above the limit is cut along its first axes, each chunk with its own CRC32, and reads the same."""
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 200)
        model = model_of(name)
        made = import_hf(save_pretrained(model, tmp_path / "hf"), tmp_path / "dcp")
        assert_same(state_of(made.path), dict(model.state_dict()))
        sizes = [
            chunk.sizes
            for entry in read_index(made.path).tensors.values()
            if len(entry.chunks) > 1
            for chunk in entry.chunks
        ]
        assert max(torch.Size(size).numel() * 4 for size in sizes) <= 200
        assert verify(made.path).passed
        damaged = bytearray((made.path / "__0_0.distcp").read_bytes())
        place = damaged.index(next(t for t in model.state_dict().values() if t.dim() > 1).numpy().tobytes()[:16])
        damaged[place] ^= 1
        (made.path / "__0_0.distcp").write_bytes(damaged)
        with pytest.raises(errors.DamagedError, match="CRC32"):
            load_checkpoint(model_of(name, seed=1), str(made.path))

    def test_a_directory_that_stock_torch_reads(self, tmp_path: Path, llama: Path) -> None:
        """Metadata, its twin, one file and the assets; the pickle and the JSON say the same."""
        made = import_hf(llama, tmp_path / "dcp")
        names = {".metadata", ".metadata.json", "__0_0.distcp", "assets"}
        assert {path.name for path in made.path.iterdir()} == names
        twin = read_index(made.path)
        (made.path / ".metadata.json").unlink()
        assert read_index(made.path) == twin
        assert contents(made.path / "assets") == {n: d for n, d in contents(llama).items() if n != WEIGHTS}

    def test_one_file_is_enough(self, tmp_path: Path, llama: Path) -> None:
        """The path of a safetensors file means that file, with the config beside it, whatever else lies there."""
        source = copy_with(llama, tmp_path / "hf")
        (source / "other.safetensors").write_bytes((source / WEIGHTS).read_bytes())
        refused(errors.DamagedError, "and nothing says which is meant", source, tmp_path / "out" / "dcp")
        made = import_hf(source / WEIGHTS, tmp_path / "dcp")
        assert_same(state_of(made.path), dict(model_of("llama").state_dict()))

    def test_two_ranks_load_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two ranks, with FSDP2 and with plain dcp.load into DTensors, read many chunks in many files as one model."""
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 500)
        made = import_hf(
            save_pretrained(model_of("llama tied"), tmp_path / "hf"), tmp_path / "dcp", max_file_bytes=3000
        )
        assert len(list(made.path.glob("*.distcp"))) > 3
        for state in values(run_ranks(2, load_in_rank, "llama tied", str(made.path))):
            assert_same(state, dict(model_of("llama tied").state_dict()))

    def test_from_an_object_store(self, tmp_path: Path, llama: Path, s3_server: Any) -> None:  # noqa: F811 - the fixture
        """A URL gives the checkpoint that the same directory gives."""
        place = place_of(s3_server.new_bucket()) / "models" / "llama"
        for name, data in contents(llama).items():
            (place / name).write_bytes(data)
        made = import_hf(place, tmp_path / "far")
        assert contents(made.path) == contents(import_hf(llama, tmp_path / "near").path)

    def test_progress_adds_up(self, tmp_path: Path, llama: Path) -> None:
        """The bytes that are told are those of all tensors."""
        told: list[tuple[int, int]] = []
        made = import_hf(llama, tmp_path / "dcp", progress=lambda *said: told.append(said))
        assert (told[0], told[-1]) == ((0, made.nbytes), (made.nbytes, made.nbytes))
        assert told == sorted(told)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("llama tied", "bfloat16"),
            ("t5", "float16"),
            ("clap", "bfloat16"),
            ("llava", "bfloat16"),
            ("marian", "bfloat16"),
        ],
    )
    def test_a_cast_is_that_of_from_pretrained(self, tmp_path: Path, name: str, dtype: str) -> None:
        """A cast gives what from_pretrained gives in that dtype: integers stay, and what has to be float32."""
        model = model_of(name)
        source = save_pretrained(model, tmp_path / "hf")
        made = import_hf(source, tmp_path / "dcp", dtype=dtype)
        expected = type(model).from_pretrained(source, dtype=getattr(torch, dtype))
        assert_same(state_of(made.path), dict(expected.state_dict()))
        again = save_pretrained(expected, tmp_path / "again")
        assert read_json(made.path / "assets" / "config.json") == read_json(again / "config.json")
        assert f"cast: float32 to {dtype}" in made.rules


class TestNames:
    """How the directory's names and the architecture's meet."""

    def test_those_of_the_base_model(self, tmp_path: Path) -> None:
        """Weights without the prefix that the whole model has are taken where the config ties all that they lack."""
        model = model_of("gpt2")
        source = save_pretrained(model, tmp_path / "hf")
        bare = copy_with(source, tmp_path / "bare", lambda state: rename(state, r"^transformer\.", ""))
        made = import_hf(bare, tmp_path / "dcp")
        assert_same(state_of(made.path), dict(model.state_dict()))
        assert "renamed: h.*.attn.c_attn.weight to transformer.h.*.attn.c_attn.weight" in made.rules
        assert "h.0.attn.c_attn.weight" in load_file(bare / WEIGHTS)

    def test_those_of_long_ago(self, tmp_path: Path) -> None:
        """Names that transformers itself reads as others, such as gamma and beta, are read so here."""
        source = save_pretrained(model_of("bert"), tmp_path / "hf")

        def change(state: Tensors) -> None:
            rename(state, r"LayerNorm\.weight", "LayerNorm.gamma")
            rename(state, r"LayerNorm\.bias", "LayerNorm.beta")

        made = import_hf(copy_with(source, tmp_path / "old", change), tmp_path / "dcp")
        assert_same(state_of(made.path), dict(model_of("bert").state_dict()))

    def test_a_prefix_that_nobody_has(self, tmp_path: Path, llama: Path) -> None:
        """What torch's wrappers put in front of names is removed, and said."""
        source = copy_with(llama, tmp_path / "hf", lambda state: rename(state, "^", "module."))
        made = import_hf(source, tmp_path / "dcp")
        assert_same(state_of(made.path), dict(model_of("llama").state_dict()))
        assert "names: 'module.' removed from the front" in made.rules

    def test_a_table(self, tmp_path: Path, llama: Path) -> None:
        """A table of names drops and renames."""

        def change(state: Tensors) -> None:
            rename(state, r"norm\.weight$", "norm.gamma")
            state["optimizer.step"] = torch.zeros(1)

        source = copy_with(llama, tmp_path / "hf", change)
        table = Table(rename=((re.compile(r"gamma$"), "weight"),))
        refused(errors.MismatchError, r"optimizer\.step", source, tmp_path / "out" / "dcp", table=table)
        made = import_hf(source, tmp_path / "dcp", table=replace(table, drop=(re.compile("^optimizer"),)))
        assert_same(state_of(made.path), dict(model_of("llama").state_dict()))

    @pytest.mark.parametrize("name", ["llama tied", "t5"])
    def test_tied_ones(self, tmp_path: Path, name: str) -> None:
        """Tied tensors may be stored under one name, another, or all of them, if they are equal."""
        model = model_of(name)
        source = save_pretrained(model, tmp_path / "hf")
        whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kept = {"llama tied": "model.embed_tokens.weight", "t5": "shared.weight"}[name]
        for place, state in {"all": whole, "other": {n: t for n, t in whole.items() if n != kept}}.items():

            def change(found: Tensors, state: Tensors = state) -> None:
                found.clear()
                found.update(state)

            made = import_hf(copy_with(source, tmp_path / place, change), tmp_path / f"{place} dcp")
            assert_same(state_of(made.path), dict(model.state_dict()))
            assert f"tied: lm_head.weight is {kept}, stored under each name" in made.rules
        apart = copy_with(source, tmp_path / "apart", lambda s: s.update(whole, **{"lm_head.weight": whole[kept] + 1}))
        refused(errors.MismatchError, "differ, and the config ties", apart, tmp_path / "out" / "dcp")

    def test_what_models_compute_is_dropped(self, tmp_path: Path) -> None:
        """Numbers of positions, which models stored once, are left out, and said."""
        source = save_pretrained(model_of("bert"), tmp_path / "hf")
        positions = {"bert.embeddings.position_ids": torch.arange(33)[None]}
        made = import_hf(copy_with(source, tmp_path / "old", lambda s: s.update(positions)), tmp_path / "dcp")
        assert_same(state_of(made.path), dict(model_of("bert").state_dict()))
        assert "dropped: bert.embeddings.position_ids, which BertForMaskedLM does not read" in made.rules

    def test_what_models_compute_is_made(self, tmp_path: Path) -> None:
        """Tensors that a model makes by itself, and never stores, are made, whether somebody stored them or not."""
        source = save_pretrained(model_of("marian"), tmp_path / "hf")
        name = "model.encoder.embed_positions.weight"
        stored = copy_with(source, tmp_path / "stored", lambda s: s.update({name: torch.ones(1)}))
        for number, place in enumerate((source, stored)):
            made = import_hf(place, tmp_path / f"dcp{number}")
            assert f"computed: {name}, which the model makes by itself" in made.rules
            expected = type(model_of("marian")).from_pretrained(source).state_dict()
            assert_same(state_of(made.path), dict(expected))

    @pytest.mark.parametrize("name", ["mixtral", "llama tied", "bert", "vit", "llava"])
    def test_without_architectures(self, tmp_path: Path, name: str) -> None:
        """A config without `architectures` means the class of its model type whose tensors are those of the file."""
        cls, config = MODELS[name]
        head = {"bert": "BertForTokenClassification"}.get(name, cls.__name__)
        model = getattr(transformers, head)(deepcopy(config))  # saving a model sets the class in its config
        base = type(getattr(model, model.base_model_prefix))(deepcopy(config))
        for number, each in enumerate((model, base) if name != "llava" else (model,)):
            place = tmp_path / str(number)
            source = copy_with(save_pretrained(each, place / "hf"), place / "bare", architectures=None)
            made = import_hf(source, place / "dcp")
            assert made.architecture == type(each).__name__
            assert read_json(made.path / "assets" / "config.json")["architectures"] == [type(each).__name__]

    def test_without_architectures_nothing_is_guessed(self, tmp_path: Path) -> None:
        """Where several classes have these very tensors, or none has, it is an error that names them."""
        model = model_of("t5")  # its head is tied to its embeddings, so its file is that of a model without a head
        source = copy_with(save_pretrained(model, tmp_path / "hf"), tmp_path / "bare", architectures=None)
        text = "fit T5ForConditionalGeneration and T5Model alike"
        refused(errors.MismatchError, text, source, tmp_path / "out" / "dcp")
        source = copy_with(tmp_path / "hf", tmp_path / "less", lambda s: s.popitem(), architectures=None)
        refused(errors.MismatchError, "fit none of .*T5Model", source, tmp_path / "out" / "dcp")


def copy_config(source: Path, target: Path) -> Path:
    """Give a directory the config of another one."""
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


FUSED = ["mixtral", "qwen3 moe", "deepseek v3", "llava", "gemma3 with images", "granite hybrid"]
"""Models that transformers stores under other names than their own, or in other parts."""


class TestForms:
    """Files in a model's own names, as save_pretrained writes them without its conversions; transformers loads them."""

    @pytest.mark.parametrize("name", FUSED)
    @pytest.mark.parametrize("mixed", [False, True], ids=["own", "mixed"])
    @pytest.mark.parametrize("front", ["", "module."])
    def test_give_the_same_checkpoint(self, tmp_path: Path, name: str, *, mixed: bool, front: str) -> None:
        """A file in a model's own names, or partly so, becomes the checkpoint that the usual file becomes."""
        model = model_of(name)
        usual = save_pretrained(model, tmp_path / "usual")
        own = load_file(save_pretrained(model, tmp_path / "own", save_original_format=False) / WEIGHTS)

        def change(state: Tensors) -> None:
            kept = {n: t for n, t in state.items() if mixed and ".layers.0." not in n}
            state.clear()
            state |= kept | {n: t for n, t in own.items() if not mixed or ".layers.0." in n}
            if front:
                rename(state, "^", front)

        made = import_hf(copy_with(usual, tmp_path / "hf", change), tmp_path / "dcp")
        expected = import_hf(usual, tmp_path / "expected")
        assert_same(state_of(made.path), state_of(expected.path))

    def test_what_ranks_wrote_in_parts(self, tmp_path: Path) -> None:
        """Safetensors of two ranks, each with its rows of each tensor, become the checkpoint of the whole model."""
        names = ["llama", "mixtral"]
        values(run_ranks(2, sharded_families.save_safetensors, tmp_path, names))
        for name in names:
            model = model_of(name)
            made = import_hf(
                copy_config(save_pretrained(model, tmp_path / f"{name} whole"), tmp_path / name),
                tmp_path / f"{name} dcp",
            )
            assert_same(state_of(made.path), dict(model.state_dict()))

    @pytest.mark.parametrize(
        "name",
        ["mixtral", "gemma3 with images", "Mistral3ForConditionalGeneration"],
    )
    @pytest.mark.parametrize("axis", [0, 1])
    def test_parts_of_what_is_rearranged(self, tmp_path: Path, name: str, axis: int) -> None:
        """Tensors that are stacked, split or turned on the way may lie in parts, however the parts were cut."""
        model = model_of(name) if name in MODELS else small_model(cls := getattr(transformers, name), small_config(cls))
        usual = save_pretrained(model, tmp_path / "usual")
        expected = import_hf(usual, tmp_path / "expected")
        ranks: list[Placed] = [{}, {}]
        for tensor, value in load_file(usual / WEIGHTS).items():
            begin, cut = [0] * value.dim(), min(axis, value.dim() - 1)
            first = value.shape[cut] // 3 + 1 if value.dim() else 0
            if not value.dim() or first >= value.shape[cut]:
                ranks[0][tensor] = value, begin
                continue
            ranks[0][tensor] = value.narrow(cut, 0, first), begin
            rest = value.narrow(cut, first, value.shape[cut] - first)
            ranks[1][tensor] = rest, [first if each == cut else 0 for each in range(value.dim())]
        made = import_hf(copy_config(usual, save_parts(tmp_path / "parts", *ranks)), tmp_path / "dcp")
        assert_same(state_of(made.path), state_of(expected.path))

    def test_both_at_once_are_refused(self, tmp_path: Path) -> None:
        """Experts that are stored fused and apart are an error: which of them is meant is not known."""
        model = model_of("mixtral")
        usual = save_pretrained(model, tmp_path / "usual")
        own = load_file(save_pretrained(model, tmp_path / "own", save_original_format=False) / WEIGHTS)
        source = copy_with(usual, tmp_path / "hf", lambda state: state.update(own))
        refused(
            errors.MismatchError,
            "holds .* tensors that MixtralForCausalLM does not have",
            source,
            tmp_path / "out" / "dcp",
        )


def rename(state: Tensors, pattern: str, new: str) -> None:
    """Rename tensors."""
    renamed = {re.sub(pattern, new, name): tensor for name, tensor in state.items()}
    state.clear()
    state.update(renamed)


class TestRefusals:
    """What is not imported: each ends in a named error, with nothing written."""

    @pytest.mark.parametrize(
        ("change", "kind", "text"),
        [
            (lambda s: s.update(odd=torch.zeros(1)), errors.MismatchError, "1 tensors that LlamaForCausalLM .*odd"),
            (lambda s: s.pop("model.norm.weight"), errors.MismatchError, r"lacks 1 .*model\.norm\.weight"),
            (lambda s: s.update({"model.norm.weight": torch.ones(17)}), errors.MismatchError, r"shape \(17,\)"),
            (lambda s: s["model.norm.weight"][3:4].fill_(float("nan")), errors.DamagedError, r"norm\.weight.*NaN"),
            (lambda s: s["lm_head.weight"][3].fill_(-float("inf")), errors.DamagedError, r"lm_head\.weight.*Inf"),
        ],
        ids=["leftover", "missing", "longer", "NaN", "Inf"],
    )
    def test_tensors(
        self, tmp_path: Path, llama: Path, change: Callable[[Tensors], Any], kind: type[Exception], text: str
    ) -> None:
        """A tensor left over, missing, of another shape, or that holds NaN or Inf, is an error that names it."""
        refused(kind, text, copy_with(llama, tmp_path / "hf", change), tmp_path / "out" / "dcp")

    def test_nan_that_is_allowed(self, tmp_path: Path, llama: Path) -> None:
        """With allow_nonfinite NaN and Inf come over as they are."""
        source = copy_with(llama, tmp_path / "hf", lambda s: s["model.norm.weight"][3:4].fill_(float("-inf")))
        made = import_hf(source, tmp_path / "dcp", allow_nonfinite=True)
        assert state_of(made.path)["model.norm.weight"][3] == float("-inf")

    def test_values_that_do_not_fit_the_type(self, tmp_path: Path, llama: Path) -> None:
        """A finite value that a cast would make Inf is refused by name."""
        source = copy_with(llama, tmp_path / "hf", lambda s: s["model.norm.weight"][3:4].fill_(70000.0))
        said = r"model\.norm\.weight: holds values that do not fit float16"
        refused(errors.MismatchError, said, source, tmp_path / "out" / "dcp", dtype="float16")
        assert import_hf(source, tmp_path / "dcp", dtype="bfloat16").tensors

    def test_tensors_of_several_types_in_one(self, tmp_path: Path) -> None:
        """Experts that are stored in two types cannot become one tensor."""
        source = save_pretrained(model_of("mixtral"), tmp_path / "hf")
        name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
        mixed = copy_with(source, tmp_path / "mixed", lambda s: s.update({name: s[name].bfloat16()}))
        refused(errors.MismatchError, "are of bfloat16, float32", mixed, tmp_path / "out" / "dcp")

    def test_several_elements_to_a_byte(self, tmp_path: Path, llama: Path) -> None:
        """Tensors of four bits are refused, with the advice to take the weights from before they were quantized."""
        source = copy_with(llama, tmp_path / "hf")
        data = (source / WEIGHTS).read_bytes()
        [length] = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header["model.norm.weight"] |= {"dtype": "F4", "shape": [128]}
        text = json.dumps(header).encode()
        (source / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        refused(errors.MismatchError, "of F4.*quantized", source, tmp_path / "out" / "dcp")

    def test_configs(self, tmp_path: Path, llama: Path) -> None:
        """Another architecture, other sizes, an unknown class and a class of nobody's are MismatchErrors."""
        for number, (config, text) in enumerate(
            (
                ({"hidden_size": 32}, "shape"),
                ({"num_hidden_layers": 1}, "does not have"),
                ({"num_hidden_layers": 3}, "lacks"),
                ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "lacks"),
                ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
                ({"architectures": None, "model_type": "bert"}, "fit none of"),
                ({"model_type": "nothing"}, "nothing"),
            )
        ):
            source = copy_with(llama, tmp_path / str(number), **config)
            refused(errors.MismatchError, text, source, tmp_path / "out" / "dcp")
        (source / "config.json").unlink()
        refused(
            errors.NotACheckpointError, r"config\.json.*put the model's own there", source, tmp_path / "out" / "dcp"
        )
        (source / "adapter_config.json").write_text("{}")
        refused(errors.NotACheckpointError, r"holds an adapter alone", source, tmp_path / "out" / "dcp")

    def test_damaged_files(self, tmp_path: Path, llama: Path) -> None:
        """A header that is none, a file that is cut short, one that is missing and weights as a pickle are named."""
        source = copy_with(llama, tmp_path / "hf")
        data = (source / WEIGHTS).read_bytes()
        for damaged in (data[:8] + b"[" + data[9:], data[:-100], b"", b"\xff" * 8 + data[8:]):
            (source / WEIGHTS).write_bytes(damaged)
            refused(errors.DamagedError, "not a sound safetensors file", source, tmp_path / "out" / "dcp")
        (source / WEIGHTS).unlink()
        refused(errors.NotACheckpointError, r"no \.safetensors", source, tmp_path / "out" / "dcp")
        (source / "pytorch_model.bin").write_bytes(b"")
        refused(errors.UntrustedError, "pickle", source, tmp_path / "out" / "dcp")

    def test_a_source_that_changes(self, tmp_path: Path, llama: Path) -> None:
        """A file that is written to while it is read ends the import, with nothing left."""
        source = copy_with(llama, tmp_path / "hf")

        def touch(*_: int) -> None:
            os.utime(source / WEIGHTS, ns=(1, 1))

        refused(errors.DamagedError, "changed while", source, tmp_path / "out" / "dcp", progress=touch)

    def test_targets_that_are_taken_or_inside(self, tmp_path: Path, llama: Path) -> None:
        """An existing target stays unless it may be replaced; one inside or around the source is refused."""
        source, target = copy_with(llama, tmp_path / "hf"), tmp_path / "out" / "dcp"
        target.mkdir(parents=True)
        (target / "mine").write_text("a")
        with pytest.raises(errors.ExportExistsError):
            import_hf(source, target)
        assert contents(target) == {"mine": b"a"}
        assert_same(state_of(import_hf(source, target, overwrite=True).path), dict(model_of("llama").state_dict()))
        assert list(target.parent.iterdir()) == [target]
        for inside in (source, source / "dcp", source.parent, source / ".." / "hf" / "x"):
            with pytest.raises(errors.ArgumentError, match="lies in the other"):
                import_hf(source, inside, overwrite=True)
        for limit in (0, -1):
            with pytest.raises(errors.ArgumentError, match="max_file_bytes"):
                import_hf(source, tmp_path / "x", max_file_bytes=limit)


@pytest.mark.skipif(not can_trace(), reason="needs strace, and the right to attach to processes")
def test_killed_anywhere(tmp_path: Path, llama: Path) -> None:
    """After a kill the target is whole or not there; the next import completes it, and leaves nothing else."""
    expected = contents(import_hf(llama, tmp_path / "expected").path)

    def prepare(place: Path) -> tuple[Any, ...]:
        return import_when_continued, str(llama), str(place / "dcp")

    def check(place: Path) -> None:
        target = place / "dcp"
        if target.exists():
            assert contents(target) == expected
        import_hf(llama, target, overwrite=True)
        assert contents(target) == expected
        assert list(place.iterdir()) == [target]

    (tmp_path / "killed").mkdir()
    kills = kill_everywhere(CHANGING, tmp_path / "killed", prepare, check, every={"write": 40, "fsync": 5, "unlink": 3})
    assert kills > 8


def test_a_full_disk_leaves_nothing(tmp_path: Path, llama: Path) -> None:
    """An error of the file system in the middle of a file ends the import, with nothing at the target."""
    target = tmp_path / "out" / "dcp"
    process = fork(import_with_little_room, str(llama), str(target))
    process.join(60)
    assert process.exitcode == errno.EFBIG
    assert list(target.parent.iterdir()) == []


def test_one_at_a_time(tmp_path: Path, llama: Path) -> None:
    """While one process imports to a place, another is refused, and leaves what the first has written."""

    def meanwhile(*_: int) -> None:
        with pytest.raises(errors.CommitError, match="another process"):
            import_hf(llama, tmp_path / "dcp")

    made = import_hf(llama, tmp_path / "dcp", progress=meanwhile)
    assert_same(state_of(made.path), dict(model_of("llama").state_dict()))


MEASURED = """
import sys
from pathlib import Path
from transformers import LlamaForCausalLM
from ckpt_core.export.imports import import_hf

def anonymous():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10

before, most = anonymous(), 0

def look(done, total):
    global most
    most = max(most, anonymous())

import_hf(Path(sys.argv[1]), Path(sys.argv[2]), progress=look)
print(most - before)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """300 MB, most of it in two tensors, are imported in less memory than a single chunk has bytes."""
    config = {**MODELS["llama"][1].to_dict(), "hidden_size": 1024, "vocab_size": 36_000, "num_hidden_layers": 1}
    config |= {"architectures": ["LlamaForCausalLM"], "head_dim": 8}
    with torch.device("meta"):
        model = MODELS["llama"][0](type(MODELS["llama"][1]).from_dict(config))
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    header, size = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [size, size + tensor.nbytes]}
        size += tensor.nbytes
    text = json.dumps(header).encode()
    with (source / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)  # zeros that take no room
    assert size > 295_000_000
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "dcp")]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert int(done.stdout) < chunks.CHUNK_BYTES
    index = read_index(tmp_path / "dcp")
    assert [len(entry.chunks) for entry in index.tensors.values()][:2] == [3, 1]
    assert index.nbytes == size


def test_from_the_command_line(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ckpt import` says what it made, as text and as JSON; `ckpt convert` makes the same export of it again."""
    out, back = tmp_path / "dcp", tmp_path / "back"
    assert cli.main(["import", str(llama), str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: LlamaForCausalLM, 21 tensors, ")
    assert cli.main(["import", str(llama), str(out)]) == 1
    assert "pass overwrite" in capsys.readouterr().err
    arguments = ["--overwrite", "--dtype", "bfloat16", "--max-file-size", "2KB", "--json"]
    assert cli.main(["import", str(llama), str(out), *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["architecture"], facts["tensors"]) == (str(out), "LlamaForCausalLM", 21)
    assert facts["rules"] == ["cast: float32 to bfloat16"]
    assert facts["bytes"] == read_index(out).nbytes
    assert facts["startup_s"] > 0
    assert len(list(out.glob("*.distcp"))) > 1
    assert cli.main(["import", str(llama), str(out), "--overwrite"]) == 0
    assert cli.main(["convert", str(out), str(back), "--model", str(llama)]) == 0
    for name in (WEIGHTS, "config.json", "generation_config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (llama / name).read_bytes(), name
    assert cli.main(["import", str(llama), str(llama / "x")]) == 2
