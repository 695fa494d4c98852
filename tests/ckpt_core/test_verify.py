"""`verify` says of any checkpoint or export what was checked, and why what failed did."""

import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_files import Evil, rewrite
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from upath import UPath

from ckpt_core import PyTorchCheckpoint, open_checkpoint
from ckpt_core.errors import ArgumentError, NotACheckpointError, UnsupportedError
from ckpt_core.export import EXPORT_NAME, convert_checkpoint
from ckpt_core.format.index import METADATA_NAME, TWIN_NAME, read_index
from ckpt_core.format.manifest import MANIFEST_NAME, read_manifest, record_bytes
from ckpt_core.format.payload import locate
from ckpt_core.format.source import LocalSource, open_source
from ckpt_core.format.zips import data_offset, members
from ckpt_core.io import read_state
from ckpt_core.verify import verify
from ckpt_core.verify.report import Findings
from ckpt_core.verify.scan import Extent, Reading, Scan


def llama(**changes):
    """A transformers model of a few thousand numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A committed step of a transformers model, and its export."""
    place = tmp_path_factory.mktemp("made")
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    saved = PyTorchCheckpoint(model, {"rate": 0.1}, optimizer).save(place / "store", step=1, trainer={"step": 1})
    convert_checkpoint(open_checkpoint(saved.url), place / "export", max_shard_bytes=8000)
    return place


@pytest.fixture
def step(made, tmp_path):
    """A copy of the step to spoil."""
    return Path(shutil.copytree(made / "store" / "default" / "step_0000000001", tmp_path / "step_0000000001"))


@pytest.fixture
def export(made, tmp_path):
    """A copy of the export to spoil."""
    return Path(shutil.copytree(made / "export", tmp_path / "export"))


def failed(report):
    """The names of the checks that failed."""
    return {check.name for check in report.checks if not check.passed}


def detail(report, name):
    """What a check says."""
    [check] = [check for check in report.checks if check.name == name]
    return check.detail


@contextmanager
def read_bytes():
    """Yield the list of how many bytes each read of a file gives."""
    counted = []
    real = LocalSource.read_at

    def read_at(self, offset, buffer):
        counted.append(real(self, offset, buffer))
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalSource, "read_at", read_at)
        yield counted


def put(source, place):
    """Copy the files below a directory to a place elsewhere."""
    for path in source.rglob("*"):
        if path.is_file():
            target = place / path.relative_to(source).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


def flip(path, place=-300):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


class TestStep:
    """A committed step."""

    def test_good(self, step):
        """Every check passes, and the report is of JSON types."""
        report = verify(step)
        assert report.passed, report
        names = ["manifest", "digests", "structure", "crc32", "values", "trainer", "architecture"]
        assert (report.kind, [check.name for check in report.checks]) == ("checkpoint", names)
        assert json.loads(json.dumps(report.to_dict()))["passed"] is True
        assert "none NaN or Inf" in detail(report, "values")
        assert verify(step.as_uri()) == report

    @pytest.mark.parametrize("which", ["model", "optimizer", "trainer", "assets"])
    def test_one_bit_of_any_file(self, step, which):
        """A bit that is flipped in any file of any component fails the digests, by the file's name."""
        for path in (step / which).iterdir():
            good = path.read_bytes()
            flip(path, len(good) // 2)
            report = verify(step)
            assert "digests" in failed(report)
            assert path.name in detail(report, "digests")
            path.write_bytes(good)
        assert verify(step).passed

    def test_the_manifest(self, step):
        """Without its manifest a step has no digests to compare, and all else is still checked."""
        flip(step / MANIFEST_NAME, 200)
        report = verify(step)
        assert failed(report) == {"manifest"}
        names = ["manifest", "structure", "crc32", "values", "trainer", "architecture"]
        assert [check.name for check in report.checks] == names

    def test_a_file_too_many(self, step):
        """A file that the manifest does not name fails: a committed step never changes."""
        (step / "model" / "extra.distcp").touch()
        report = verify(step)
        assert failed(report) == {"manifest"}
        assert "extra.distcp: not in the manifest" in detail(report, "manifest")

    @pytest.mark.parametrize("name", ["model/__0_0.distcp", "assets/config.json", "optimizer/.metadata"])
    def test_a_file_too_few(self, step, name):
        """A missing file fails, by its name."""
        (step / name).unlink()
        report = verify(step)
        assert "manifest" in failed(report)
        assert name in detail(report, "manifest")

    def test_two_tensors_swapped(self, step):
        """Two tensors of one shape that changed places are whole, each with its CRC32: only the digests tell."""
        twin = json.loads((step / "model" / TWIN_NAME).read_bytes())
        one, other = (f"model.model.layers.{number}.mlp.up_proj.weight" for number in (0, 1))
        tensors = twin["tensors"]
        tensors[one]["chunks"][0][2:], tensors[other]["chunks"][0][2:] = (
            tensors[other]["chunks"][0][2:],
            tensors[one]["chunks"][0][2:],
        )
        (step / "model" / TWIN_NAME).write_text(json.dumps(twin, separators=(",", ":")) + "\n")
        report = verify(step)
        assert failed(report) == {"digests"}
        assert TWIN_NAME in detail(report, "digests")

    def test_two_tensors_swapped_in_the_shard(self, step):
        """The same with their bytes: the zips are whole, the values finite; the digests tell."""
        index = read_index(step / "model")
        spans = [index.tensors[f"model.model.layers.{n}.mlp.up_proj.weight"].chunks[0].span for n in (0, 1)]
        path = step / "model" / spans[0].file
        data = bytearray(path.read_bytes())
        first, second = (bytes(data[s.offset : s.offset + s.length]) for s in spans)
        assert len(first) == len(second)
        assert first != second
        for span, content in zip(spans, (second, first), strict=True):
            data[span.offset : span.offset + span.length] = content
        path.write_bytes(data)
        assert failed(verify(step)) == {"digests"}
        assert verify(step / "model").passed

    def test_another_config(self, step):
        """A config of another architecture fails the architecture, besides the manifest, which has another size."""
        path = step / "assets" / "config.json"
        config = json.loads(path.read_bytes())
        path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
        assert failed(verify(step)) == {"manifest", "architecture"}

    def test_generators_and_counters(self, step):
        """A state that no generator has, and counters that are no object, fail, whatever their digests are."""
        manifest = read_manifest(step)
        for name, content in (("rank_00000.safetensors", b"x"), ("state.json", b"[" * 100_000)):
            (step / "trainer" / name).write_bytes(content)
            manifest = replace(manifest, files={**manifest.files, f"trainer/{name}": record_bytes(content)})
            (step / "manifest.json").write_bytes(manifest.to_bytes())
            report = verify(step)
            assert failed(report) == {"trainer"}
            assert name in " ".join(report.checks[-2].problems)

    def test_without_a_model(self, tmp_path):
        """A step of an optimizer alone has no values of a model to check."""
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        saved = PyTorchCheckpoint(optimizer=optimizer).save(tmp_path, step=1)
        report = verify(saved.url)
        assert report.passed
        assert [check.name for check in report.checks] == ["manifest", "digests", "structure", "crc32"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_diverged_model(self, tmp_path, value):
        """NaN and infinities fail the values, with the tensor's name, unless they are allowed."""
        model = nn.Linear(3, 3)
        with torch.no_grad():
            model.weight[1, 1] = value
        saved = PyTorchCheckpoint(model).save(tmp_path, step=1)
        report = verify(saved.url)
        assert failed(report) == {"values"}
        assert "model.weight: holds NaN or Inf" in detail(report, "values")
        assert verify(saved.url, allow_nonfinite=True).passed

    def test_all_that_is_wrong_is_told(self, step):
        """Of several damaged tensors each is named, not the first alone."""
        index = read_index(step / "model")
        names = list(index.tensors)[:3]
        for name in names:
            span = index.tensors[name].chunks[0].span
            with (step / "model" / span.file).open("r+b") as file:
                file.seek(span.offset + span.length // 2)
                file.write(b"\x01\x02\x03")
        report = verify(step)
        assert failed(report) == {"digests", "crc32"}
        [check] = [check for check in report.checks if check.name == "crc32"]
        assert len(check.problems) == 3
        assert all(any(f": {name}: " in problem for problem in check.problems) for name in names)
        assert check.detail.endswith("(and 2 more)")

    def test_each_byte_is_read_once(self, step):
        """One pass gives digests, CRC32 and values: beyond the files' bytes, only headers are read, once more."""
        seen = []
        with read_bytes() as counted:
            verify(step, progress=lambda done, total: seen.append((done, total)))
        nbytes = sum(path.stat().st_size for path in step.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
        headers = sum(1500 for part in ("model", "optimizer") for _ in read_index(step / part).spans())
        assert nbytes <= sum(counted) <= nbytes + headers
        assert seen[-1] == (nbytes, nbytes)
        assert seen == sorted(seen)

    def test_a_sample(self, step):
        """A sample checks some chunks, the same for the same seed, and says what it left out."""
        report = verify(step, sample=0.1, seed=7)
        assert report.passed
        names = ["manifest", "structure", "crc32", "values", "trainer", "architecture"]
        assert [check.name for check in report.checks] == names
        total = sum(len(read_index(step / part).spans()) for part in ("model", "optimizer"))
        assert report.sample.startswith("10 % of chunks: ")
        assert report.sample.endswith(f" of {total}; digests of whole files not checked")
        assert report == verify(step, sample=0.1, seed=7)
        with read_bytes() as counted:
            verify(step, sample=0.1, seed=7)
        assert sum(counted) < sum(path.stat().st_size for path in step.rglob("*.distcp"))

    def test_samples_of_many_seeds_find_a_flipped_bit(self, step):
        """A damaged chunk is found by those samples that hold it, and all seeds together hold each chunk."""
        span = read_index(step / "model").tensors["model.model.embed_tokens.weight"].chunks[0].span
        flip(step / "model" / span.file, span.offset + span.length // 2)
        found = [failed(verify(step, sample=0.3, seed=seed)) == {"crc32"} for seed in range(20)]
        assert any(found)
        assert not all(found)

    @pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
    def test_no_share(self, step, share):
        """A share that is none is a caller's mistake."""
        with pytest.raises(ArgumentError, match="sample"):
            verify(step, sample=share)

    def test_a_sample_of_all_is_everything(self, step):
        """A share of 1 leaves nothing out."""
        assert verify(step, sample=1) == verify(step)

    def test_a_pruner_waits(self, tmp_path):
        """While a step is verified, it is not pruned."""
        from ckpt_core.retention import Retention
        from ckpt_core.store import LocalStore, Pruned

        store = LocalStore(tmp_path / "store")
        for number in (1, 2):
            PyTorchCheckpoint(nn.Linear(1, 1)).save(store.root, step=number)
        pruned = []

        def prune(done, total):
            if not pruned:
                pruned.append(store.prune("default", Retention(keep_last=1)))

        assert verify(store.list("default")[0].path, progress=prune).passed
        assert pruned == [Pruned(leased=(1,))]

    def test_a_step_elsewhere(self, tmp_path):
        """A step that was committed to an object store is verified there, and one changed byte fails its digest."""
        store = f"memory://{tmp_path.name}"
        try:
            saved = PyTorchCheckpoint(nn.Linear(3, 3)).save(store, step=1)
            report = verify(saved.url)
            assert report.passed, report
            assert [check.name for check in report.checks] == ["manifest", "digests", "structure", "crc32", "values"]
            [shard] = UPath(saved.url).rglob("*.distcp")
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1  # no byte of a tensor: the comment's length, at the end of the last zip
            shard.write_bytes(data)
            assert "digests" in failed(verify(saved.url))
        finally:
            UPath(store).rmdir(recursive=True)

    def test_a_directory_elsewhere(self, made, step):
        """A DCP directory in an object store passes and fails as it does here."""
        place = UPath(f"memory://verify/{made.name}/step_0000000001")
        try:
            put(step, place)
            assert [c.detail for c in verify(place / "model").checks] == [
                c.detail for c in verify(step / "model").checks
            ]
            data = bytearray((place / "model" / "__0_0.distcp").read_bytes())
            data[len(data) // 2] ^= 1
            (place / "model" / "__0_0.distcp").write_bytes(data)
            assert failed(verify(str(place / "model"))) == {"crc32"}
        finally:
            place.rmdir(recursive=True)


class TestDcp:
    """Any DCP directory."""

    @pytest.fixture
    def directory(self, tmp_path):
        """What plain `dcp.save` wrote: 8-bit floats, complex numbers, numbers that are never NaN, and a value."""
        state = {
            "a": torch.arange(6.0),
            "f8": torch.ones(3).to(torch.float8_e4m3fn),
            "c": torch.ones(3, dtype=torch.complex64),
            "i": torch.arange(3),
            "rate": 0.5,
        }
        self.save(state, tmp_path / "dcp")
        return tmp_path / "dcp"

    def save(self, state, directory):
        """Plain `dcp.save`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=directory)

    def test_good(self, directory):
        """Every chunk is read whole, every value too."""
        report = verify(directory)
        assert report.passed, report
        assert (report.kind, report.path) == ("dcp", str(directory))
        assert [(check.name, check.detail) for check in report.checks] == [
            ("structure", "4 tensors, 1 values"),
            ("crc32", "4 chunks as they were stored"),
            ("values", "15 elements, none NaN or Inf"),
        ]

    def test_a_level_below(self, directory):
        """The directory above is fine, where a framework puts the checkpoint below."""
        directory.rename(directory.parent / "weights")
        assert verify(directory.parent).path == str(directory.parent / "weights")

    def test_a_flipped_bit(self, directory):
        """A flipped bit of a tensor fails its CRC32, by the tensor's name."""
        path = directory / "__0_0.distcp"
        data = path.read_bytes()
        flip(path, data.index(torch.arange(6.0).numpy().tobytes()) + 9)
        report = verify(directory)
        assert failed(report) == {"crc32"}
        assert "__0_0.distcp: a: its bytes have CRC32" in detail(report, "crc32")

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda d: (d / METADATA_NAME).write_bytes(b""),
            lambda d: (d / "__0_0.distcp").unlink(),
            lambda d: os.truncate(d / "__0_0.distcp", 2000),
            lambda d: (d / TWIN_NAME).write_text("{}"),
        ],
        ids=["empty metadata", "no shard", "half a shard", "bad twin"],
    )
    def test_damage_is_reported_not_raised(self, directory, spoil):
        """Damage of any kind is in the report."""
        spoil(directory)
        assert failed(verify(directory)) == {"structure"}

    def test_an_evil_value(self, directory, tmp_path):
        """A value that would run code fails the check, and does not run."""
        metadata = pickle.loads((directory / METADATA_NAME).read_bytes())
        buffer = io.BytesIO()
        torch.save(Evil(tmp_path / "ran", "eval"), buffer)
        (directory / "evil").write_bytes(buffer.getvalue())
        key = next(key for key in metadata.storage_data if key.fqn == "rate")
        metadata.storage_data[key] = _StorageInfo("evil", 0, len(buffer.getvalue()))
        (directory / METADATA_NAME).write_bytes(pickle.dumps(metadata))
        report = verify(directory)
        assert failed(report) == {"structure"}
        assert "nothing was run" in detail(report, "structure")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.complex64])
    def test_nan_of_any_type(self, tmp_path, dtype):
        """NaN is found in 8-bit floats and complex numbers as well."""
        self.save({"x": torch.tensor([1.0, float("nan")]).to(dtype)}, tmp_path / "dcp")
        assert failed(verify(tmp_path / "dcp")) == {"values"}
        assert verify(tmp_path / "dcp", allow_nonfinite=True).passed

    def test_without_crc_is_unchecked_not_bad(self, tmp_path):
        """Chunks that were written without CRC32 pass, and are counted; empty ones have nothing to check."""
        torch.serialization.set_crc32_options(False)
        try:
            self.save({"x": torch.ones(3), "y": torch.ones(2), "empty": torch.empty(0)}, tmp_path / "dcp")
        finally:
            torch.serialization.set_crc32_options(True)
        report = verify(tmp_path / "dcp")
        assert report.passed
        assert detail(report, "crc32") == "1 chunks as they were stored; 2 chunks had no CRC32 and are unchecked"

    def test_chunks_that_do_not_fit_a_block(self, tmp_path):
        """Tensors of some MB, of odd sizes and in many threads' parts, pass whole and fail at their last byte."""
        state = {f"t{number}": torch.rand(400_003 * number + 1).to(torch.bfloat16) for number in range(6)}
        self.save(state, tmp_path / "dcp")
        assert verify(tmp_path / "dcp").passed
        state["t5"][-1] = float("inf")
        self.save(state, tmp_path / "inf")
        report = verify(tmp_path / "inf")
        assert failed(report) == {"values"}
        assert ": t5: " in detail(report, "values")
        flip(tmp_path / "dcp" / "__0_0.distcp", -2000)
        assert failed(verify(tmp_path / "dcp")) == {"crc32"}

    def test_a_part_of_a_stored_tensor(self, tmp_path):
        """NaN in bytes that were stored with a tensor, and are none of its elements, is not its."""
        whole = torch.ones(8)
        whole[5] = float("nan")
        self.save({"x": whole[:4].clone()}, tmp_path / "dcp")
        payload, bad = io.BytesIO(), io.BytesIO()
        torch.save(whole[:4], payload)
        torch.save(whole[2:6], bad)
        for content, wrong in ((payload, set()), (bad, {"values"})):
            data = content.getvalue()
            (tmp_path / "dcp" / "view").write_bytes(data)
            info = _StorageInfo("view", 0, len(data))
            rewrite(
                tmp_path / "dcp",
                lambda metadata, info=info: metadata.storage_data.update(dict.fromkeys(metadata.storage_data, info)),
            )
            assert failed(verify(tmp_path / "dcp")) == wrong

    def test_every_dcp_directory_below(self, tmp_path):
        """Of a framework's checkpoint each DCP directory is checked, and what was not looked into is named."""
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        self.save({"model": model.state_dict()}, tmp_path / "pytorch_model_fsdp_0")
        self.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, tmp_path / "optimizer_0")
        for name in ("scheduler.bin", "random_states_0.pkl", "optimizer_0/__7_0.distcp"):
            (tmp_path / name).write_bytes(b"x")
        report = verify(tmp_path)
        assert (report.passed, report.kind, report.path) == (True, "dcp", str(tmp_path))
        assert "in optimizer_0, pytorch_model_fsdp_0" in detail(report, "structure")
        assert report.unchecked == ("random_states_0.pkl", "scheduler.bin", "optimizer_0/__7_0.distcp")
        assert report.to_dict()["unchecked"] == report.unchecked
        for name, to in (("latest", "optimizer_0"), ("again", "."), ("above", ".."), ("optimizer_0/up", "..")):
            (tmp_path / name).symlink_to(to)
        assert verify(tmp_path) == report, "a link leads to what is checked already"
        span = read_index(tmp_path / "optimizer_0").tensors["optimizer.state.weight.exp_avg"].chunks[0].span
        with open_source(tmp_path / "optimizer_0" / span.file) as source:
            flip(tmp_path / "optimizer_0" / span.file, locate(source, span, "").offset)
        report = verify(tmp_path)
        assert failed(report) == {"crc32"}
        assert "optimizer_0" in detail(report, "crc32")

    def test_infinity_in_an_optimizer(self, tmp_path):
        """What an optimizer keeps may be infinite; a model's values may not."""
        self.save({"optimizer": {"w": torch.tensor([float("inf")])}}, tmp_path / "optimizer")
        self.save({"model": {"w": torch.ones(1)}}, tmp_path / "weights")
        assert verify(tmp_path).passed
        self.save({"model": {"w": torch.tensor([float("inf")])}}, tmp_path / "ema")
        assert failed(verify(tmp_path)) == {"values"}

    def test_dcp_and_safetensors(self, tmp_path):
        """Weights next to a DCP directory are checked, too."""
        self.save({"optimizer": {"w": torch.ones(1)}}, tmp_path / "optimizer_0")
        save_file({"w": torch.tensor([float("nan")])}, tmp_path / "model.safetensors")
        assert failed(verify(tmp_path)) == {"values"}

    def test_what_is_not_read_is_not_bad(self, tmp_path):
        """Quantized tensors, other objects and transformed items are named; the CRC32 of their bytes is checked."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.quint8)
        state = {"w": torch.ones(2), "q": quantized, "train_state": {"losses": io.BytesIO(b"abc")}}
        self.save(state, tmp_path / "step-10")
        report = verify(tmp_path)
        assert report.passed
        assert "2 that are not read" in detail(report, "structure")
        span = read_index(tmp_path / "step-10").unsupported["q"].spans[0]
        with open_source(tmp_path / "step-10" / span.file) as source:
            member = next(m for m in members(source, span, "") if m.name == "data/0")
            flip(tmp_path / "step-10" / span.file, data_offset(source, span, member, ""))
        assert failed(verify(tmp_path)) == {"crc32"}

    @pytest.mark.parametrize("form", [b"\x28\xb5\x2f\xfd", b"\x1f\x8b", (200).to_bytes(8, "little") + b'{"t"'])
    def test_streams_of_another_form(self, directory, form):
        """A chunk that is a stream of a known other form is not read; it is no zip that was cut short."""
        span = read_index(directory).tensors["a"].chunks[0].span
        with (directory / span.file).open("r+b") as file:
            file.seek(span.offset)
            file.write(form + b"\0" * (span.length - len(form)))
        report = verify(directory)
        assert report.passed
        assert "1 that are not read" in detail(report, "structure")
        with pytest.raises(UnsupportedError, match="which this library does not read"):
            read_state(directory)

    def test_compressed_zips(self, directory):
        """So with a zip whose entries are compressed."""
        span = read_index(directory).tensors["a"].chunks[0].span
        data = (directory / span.file).read_bytes()
        packed = io.BytesIO()
        with ZipFile(io.BytesIO(data[span.offset : span.offset + span.length])) as old, ZipFile(packed, "w", 8) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        (directory / "packed").write_bytes(packed.getvalue())
        rewrite(directory, lambda m: vars(next(i for k, i in m.storage_data.items() if k.fqn == "a")).update(
            relative_path="packed", offset=0, length=len(packed.getvalue())
        ))  # fmt: skip
        assert verify(directory).passed
        with pytest.raises(UnsupportedError, match="is compressed"):
            read_state(directory)

    def test_committed_steps_below(self, step):
        """A run's directory holds steps, each with its manifest: they are verified one by one."""
        with pytest.raises(NotACheckpointError, match="committed steps below it"):
            verify(step.parent)

    def test_nothing_there(self, tmp_path):
        """Where there is neither checkpoint nor export, there is no report."""
        with pytest.raises(NotACheckpointError):
            verify(tmp_path)
        with pytest.raises(NotACheckpointError):
            verify(tmp_path / "none")


class TestExport:
    """An export."""

    def weights(self, export):
        """One of its weight files."""
        return min(export.glob("*.safetensors"))

    def restamp(self, export, path):
        """Make `export.json` agree with a changed file."""
        record = json.loads((export / EXPORT_NAME).read_bytes())
        record["files"][path.name] = {
            **record["files"][path.name],
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        (export / EXPORT_NAME).write_text(json.dumps(record))

    def test_good(self, export):
        """Digests and values of several files pass."""
        report = verify(export)
        assert report.passed, report
        assert report.kind == "export"
        assert len(list(export.glob("*.safetensors"))) > 1
        expected = sum(len(load_file(path)) for path in export.glob("*.safetensors"))
        assert f"{expected} tensors" in detail(report, "structure")

    def test_one_bit_of_any_file(self, export):
        """A bit that is flipped in any file but the record fails the digests, by the file's name."""
        for path in export.iterdir():
            if path.name != EXPORT_NAME:
                good = path.read_bytes()
                flip(path, -1)
                report = verify(export)
                assert "digests" in failed(report)
                assert path.name in detail(report, "digests")
                path.write_bytes(good)

    def test_elsewhere(self, export):
        """An export in an object store passes and fails as it does here."""
        place = UPath(f"memory://{export.parent.name}")
        try:
            put(export, place)
            assert [check.detail for check in verify(place).checks] == [check.detail for check in verify(export).checks]
            data = bytearray((place / "config.json").read_bytes())
            data[5] ^= 1
            (place / "config.json").write_bytes(data)
            assert failed(verify(place)) == {"digests"}
        finally:
            place.rmdir(recursive=True)

    def test_a_file_too_many(self, export):
        """Weights that the record does not name fail: `from_pretrained` might load them."""
        save_file({"x": torch.ones(1)}, export / "model-stale.safetensors")
        report = verify(export)
        assert failed(report) == {"record"}
        assert "model-stale.safetensors" in detail(report, "record")

    @pytest.mark.parametrize(
        "name",
        ["sub/evil.py", "pytorch_model.bin", "tokenizer.json", "adapter_config.json", "chat_template.jinja", "x"],
    )
    def test_any_file_that_is_not_recorded(self, export, name):
        """Whatever is added to an export, its loader may read; only documents are left to people."""
        (export / "README.md").write_text("A model.")
        assert verify(export).unchecked == ("README.md",)
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_text("{}")
        report = verify(export)
        assert "record" in failed(report)
        assert name in detail(report, "record")

    def test_code(self, export):
        """Python code that somebody put beside an export fails."""
        (export / "modeling_x.py").write_text("")
        report = verify(export)
        assert failed(report) == {"code", "record"}
        assert "trust_remote_code" in detail(report, "code")

    def test_a_file_too_few(self, export):
        """A missing file fails the record and, of weights, the structure."""
        self.weights(export).unlink()
        assert failed(verify(export)) == {"record", "structure"}

    def test_nan(self, export):
        """NaN fails the values, also where the digests are right, unless it is allowed."""
        path = self.weights(export)
        tensors = load_file(path)
        name = min(tensors)
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
        self.restamp(export, path)
        report = verify(export)
        assert failed(report) == {"values"}
        assert name in detail(report, "values")
        assert verify(export, allow_nonfinite=True).passed

    def test_no_safetensors(self, export):
        """A weight file that is none fails the structure, also where the digests are right."""
        path = self.weights(export)
        path.write_bytes(b"\xff" * 100)
        self.restamp(export, path)
        assert failed(verify(export)) == {"structure"}

    def test_the_record(self, export):
        """Without its record an export has no digests to compare, and its weights are still checked."""
        (export / EXPORT_NAME).write_text("{")
        report = verify(export)
        assert failed(report) == {"record"}
        assert [check.name for check in report.checks] == ["record", "structure", "values", "code"]

    def test_a_sample(self, export):
        """A sample looks at some tensors and at no digest."""
        flip(export / "config.json", 5)
        report = verify(export, sample=0.5)
        assert report.passed
        assert "digests" not in [check.name for check in report.checks]
        assert "50 % of chunks: " in report.sample


class TestHuggingFace:
    """Any other Hugging Face directory."""

    @pytest.fixture
    def directory(self, export):
        """An export without its record."""
        (export / EXPORT_NAME).unlink()
        return export

    def test_good(self, directory):
        """Structure and values pass; a single file may be named by itself."""
        report = verify(directory)
        assert report.passed, report
        names = [check.name for check in report.checks]
        assert (report.kind, names) == ("huggingface", ["structure", "values", "code"])
        file = min(directory.glob("*.safetensors"))
        one = verify(file)
        assert one.passed
        assert f"{len(load_file(file))} tensors" in detail(one, "structure")

    def test_nan(self, directory):
        """NaN fails the values, by the tensor's name, unless it is allowed; then no value is read."""
        path = min(directory.glob("*.safetensors"))
        tensors = load_file(path)
        name = min(tensors)
        tensors[name].view(-1)[-1] = float("nan")
        save_file(tensors, path)
        report = verify(directory)
        assert failed(report) == {"values"}
        assert f"{path}: {name}: " in detail(report, "values")
        assert verify(directory, allow_nonfinite=True).passed

    def test_pickles_are_named(self, directory):
        """What is not looked into is in the report, pickles first."""
        for name in ("training_args.bin", "README.md", "runs/events.out", ".hidden"):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(b"x")
        report = verify(directory)
        assert report.passed
        assert report.unchecked == ("training_args.bin", "README.md", "runs/events.out")

    def test_a_single_file_beside_an_index(self, directory):
        """Weights twice over, split and in one file, fail the structure, for one of the two is not meant."""
        save_file({"x": torch.ones(1)}, directory / "model.safetensors")
        report = verify(directory)
        assert failed(report) == {"structure"}
        assert "which weights are meant" in detail(report, "structure")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("modeling_x.py", ""),
            ("config.json", '{"auto_map": {"AutoModel": "modeling_x.X"}}'),
            ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["a/b--x.X", null]}}'),
            ("config.json", "{"),
            ("config.json", "[" * 100_000),
        ],
    )
    def test_code(self, directory, name, content):
        """Python code, a config that names some, and one that cannot be read fail, by the file's name."""
        (directory / name).write_text(content)
        report = verify(directory)
        assert failed(report) == {"code"}
        assert f"{directory / name}: " in detail(report, "code")

    def test_large_tensors_in_parts(self, tmp_path):
        """A tensor of several threads' parts is read whole, to its last element."""
        x = torch.zeros(20_000_001)
        x[-1] = float("inf")
        save_file({"x": x, "y": torch.ones(3)}, tmp_path / "model.safetensors")
        seen = []
        report = verify(tmp_path, progress=lambda done, total: seen.append((done, total)))
        assert failed(report) == {"values"}
        assert seen[-1] == (80_000_016, 80_000_016)

    def test_damage(self, directory):
        """A shard that is cut short, or lacks a tensor that the index names, fails the structure."""
        path = min(directory.glob("*.safetensors"))
        os.truncate(path, path.stat().st_size - 1)
        report = verify(directory)
        assert failed(report) == {"structure"}
        assert path.name in detail(report, "structure")

    def test_a_pickle(self, tmp_path):
        """A directory of pickled weights fails, by the pickle's name."""
        (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
        report = verify(tmp_path)
        assert failed(report) == {"structure"}
        assert "pytorch_model.bin" in detail(report, "structure")

    def test_elsewhere(self, directory):
        """A directory in an object store passes and fails as it does here."""
        place = UPath(f"memory://verify/{directory.parent.name}")
        try:
            put(directory, place)
            report = verify(str(place))
            assert [check.detail for check in report.checks] == [check.detail for check in verify(directory).checks]
            name = min(path.name for path in directory.glob("*.safetensors"))
            (place / name).write_bytes((place / name).read_bytes()[:-1])
            assert failed(verify(str(place))) == {"structure"}
        finally:
            place.rmdir(recursive=True)


def test_an_interrupt_waits_for_no_large_file(tmp_path):
    """What the one who is told of the progress raises ends all reading, in the middle of files."""
    nbytes = 1 << 30
    for name in ("a", "b"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, nbytes)
    seen = []

    def interrupt_once(done, total):
        seen.append(done)
        if len(seen) == 1:
            raise KeyboardInterrupt

    readings = [Reading(tmp_path / name, nbytes, lambda _: [Extent(0, nbytes)]) for name in ("a", "b")]
    with pytest.raises(KeyboardInterrupt):
        Scan(Findings(), interrupt_once).run(readings)
    assert len(seen) < 1024
