"""`verify` says of any checkpoint or export what was checked, and why what failed did."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_files import Evil
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ckpt_core import PyTorchCheckpoint, open_checkpoint
from ckpt_core.errors import NotACheckpointError
from ckpt_core.export import EXPORT_NAME, convert_checkpoint, sha256_of
from ckpt_core.format.index import METADATA_NAME, TWIN_NAME, read_index
from ckpt_core.format.manifest import MANIFEST_NAME
from ckpt_core.verify import verify


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


def flip(path, place=-300):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


class TestStep:
    """A committed step."""

    def test_good(self, step):
        """Digests, values and architecture pass, and the report is of JSON types."""
        report = verify(step)
        assert report.passed, report
        assert (report.kind, [check.name for check in report.checks]) == (
            "checkpoint",
            ["digests", "values", "architecture"],
        )
        assert json.loads(json.dumps(report.to_dict()))["passed"] is True
        assert "none NaN or Inf" in report.checks[1].detail
        assert verify(step.as_uri()) == report

    @pytest.mark.parametrize("which", ["model", "optimizer", "trainer", "assets"])
    def test_one_bit_of_any_file(self, step, which):
        """A bit that is flipped in any file of any component fails the digests, by the file's name."""
        for path in (step / which).iterdir():
            good = path.read_bytes()
            flip(path, len(good) // 2)
            report = verify(step)
            assert "digests" in failed(report)
            assert path.name in next(check.detail for check in report.checks if check.name == "digests")
            path.write_bytes(good)
        assert verify(step).passed

    def test_the_manifest(self, step):
        """A damaged manifest fails the digests, and the other checks still run."""
        flip(step / MANIFEST_NAME, 200)
        report = verify(step)
        assert failed(report) == {"digests"}
        assert len(report.checks) == 3

    def test_a_file_too_many(self, step):
        """A file that the manifest does not name fails: a committed step never changes."""
        (step / "model" / "extra.distcp").touch()
        report = verify(step)
        assert failed(report) == {"digests"}
        assert "extra.distcp: not in the manifest" in report.checks[0].detail

    @pytest.mark.parametrize("name", ["model/__0_0.distcp", "assets/config.json", "optimizer/.metadata"])
    def test_a_file_too_few(self, step, name):
        """A missing file fails the digests."""
        (step / name).unlink()
        assert "digests" in failed(verify(step))

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
        assert TWIN_NAME in report.checks[0].detail

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
        """A config of another architecture fails the architecture, besides the digests."""
        path = step / "assets" / "config.json"
        config = json.loads(path.read_bytes())
        path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
        assert failed(verify(step)) == {"digests", "architecture"}

    def test_without_a_model(self, tmp_path):
        """A step of an optimizer alone has digests to check, and no values."""
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        saved = PyTorchCheckpoint(optimizer=optimizer).save(tmp_path, step=1)
        report = verify(saved.url)
        assert report.passed
        assert [check.name for check in report.checks] == ["digests"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_diverged_model(self, tmp_path, value):
        """NaN and infinities fail the values, with the tensor's name, unless they are allowed."""
        model = nn.Linear(3, 3)
        with torch.no_grad():
            model.weight[1, 1] = value
        saved = PyTorchCheckpoint(model).save(tmp_path, step=1)
        report = verify(saved.url)
        assert failed(report) == {"values"}
        assert "model.weight: holds NaN or Inf" in report.checks[1].detail
        assert verify(saved.url, allow_nonfinite=True).passed

    def test_a_pruner_waits(self, made, tmp_path, monkeypatch):
        """While a step is verified, it is not pruned."""
        from ckpt_core import verify as module
        from ckpt_core.retention import Retention
        from ckpt_core.store import LocalStore, Pruned

        store = LocalStore(tmp_path / "store")
        for number in (1, 2):
            PyTorchCheckpoint(nn.Linear(1, 1)).save(store.root, step=number)
        pruned = []
        real = module._digests
        monkeypatch.setattr(
            module, "_digests", lambda c: (pruned.append(store.prune("default", Retention(keep_last=1))), real(c))[1]
        )
        assert verify(store.list("default")[0].path).passed
        assert pruned == [Pruned(leased=(1,))]


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
        assert "4 tensors, 15 elements, none NaN or Inf" in report.checks[0].detail

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
        assert failed(report) == {"values"}
        assert "__0_0.distcp: a: its bytes have CRC32" in report.checks[0].detail

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
        assert failed(verify(directory)) == {"values"}

    def test_an_evil_value(self, directory, tmp_path):
        """A value that would run code fails the check, and does not run."""
        import io
        import pickle

        metadata = pickle.loads((directory / METADATA_NAME).read_bytes())
        buffer = io.BytesIO()
        torch.save(Evil(tmp_path / "ran", "eval"), buffer)
        (directory / "evil").write_bytes(buffer.getvalue())
        key = next(key for key in metadata.storage_data if key.fqn == "rate")
        metadata.storage_data[key] = _StorageInfo("evil", 0, len(buffer.getvalue()))
        (directory / METADATA_NAME).write_bytes(pickle.dumps(metadata))
        report = verify(directory)
        assert failed(report) == {"values"}
        assert "nothing was run" in report.checks[0].detail
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
        assert "2 chunks had no CRC32 and are unchecked" in report.checks[0].detail

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
            "sha256": sha256_of(path),
        }
        (export / EXPORT_NAME).write_text(json.dumps(record))

    def test_good(self, export):
        """Digests and values of several files pass."""
        report = verify(export)
        assert report.passed, report
        assert report.kind == "export"
        assert len(list(export.glob("*.safetensors"))) > 1
        expected = sum(len(load_file(path)) for path in export.glob("*.safetensors"))
        assert f"{expected} tensors" in report.checks[1].detail

    def test_one_bit_of_any_file(self, export):
        """A bit that is flipped in any file but the record fails the digests, by the file's name."""
        for path in export.iterdir():
            if path.name != EXPORT_NAME:
                good = path.read_bytes()
                flip(path, -1)
                report = verify(export)
                assert "digests" in failed(report)
                assert path.name in report.checks[0].detail
                path.write_bytes(good)

    def test_a_file_too_many(self, export):
        """Weights that the record does not name fail: `from_pretrained` might load them."""
        save_file({"x": torch.ones(1)}, export / "model-stale.safetensors")
        assert failed(verify(export)) == {"values"}

    def test_a_file_too_few(self, export):
        """A missing file fails."""
        self.weights(export).unlink()
        assert failed(verify(export)) == {"digests", "values"}

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
        assert name in report.checks[1].detail
        assert verify(export, allow_nonfinite=True).passed

    def test_no_safetensors(self, export):
        """A weight file that is none fails the values, also where the digests are right."""
        path = self.weights(export)
        path.write_bytes(b"\xff" * 100)
        self.restamp(export, path)
        assert failed(verify(export)) == {"values"}

    def test_the_record(self, export):
        """A record that is not readable fails both checks."""
        (export / EXPORT_NAME).write_text("{")
        assert failed(verify(export)) == {"digests", "values"}
