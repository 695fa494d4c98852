"""`PyTorchCheckpoint` in an object store: saved there, restored from there, and referred to by its URL."""

import os

import pytest
import remote_ranks
import sharded_training
import torch
from gloo_ranks import run_ranks, values
from object_stores import s3_server  # noqa: F401 - a fixture
from small_models import assert_same, layers, train

from ckpt_core import PyTorchCheckpoint, open_store
from ckpt_core.errors import DamagedError, StepExistsError
from ckpt_core.verify import verify


@pytest.fixture
def url(s3_server):  # noqa: F811 - the fixture
    """The URL of an empty store on S3."""
    return f"{s3_server.new_bucket()}/store"


def trained():
    """A model and its optimizer, after some steps."""
    model = layers(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    train(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1), 2)
    return model, optimizer


def test_saved_and_restored(url):
    """A model, its optimizer, the trainer's counters and the assets go to S3, and come back bit for bit."""
    model, optimizer = trained()
    saved = PyTorchCheckpoint(model, {"layers": 3}, optimizer).save(url, step=5, trainer={"seen": 7})
    assert saved.url.startswith(f"{url}/default/step_")
    loaded = PyTorchCheckpoint.from_json(saved.to_json())
    other = layers(1)
    moments = torch.optim.Adam(other.parameters(), lr=0.5)
    assert loaded.restore(other, moments) == {"seen": 7}
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert moments.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    state = loaded["module_state_dict"]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded["layers"] == 3
    with pytest.raises(StepExistsError):
        PyTorchCheckpoint(model).save(url, step=5)


def test_written_before_its_manifest(url, s3_server):  # noqa: F811
    """What the ranks write is on S3, whole, before the manifest is."""
    s3_server.requests.clear()
    PyTorchCheckpoint(trained()[0]).save(url, step=5)
    writes = [request for request in s3_server.requests if request.method == "PUT" and "/step_" in request.path]
    assert {request.path.rsplit("/", 1)[1] for request in writes[:-1]} > {".metadata", "__0_0.distcp"}
    assert writes[-1].path.endswith("/step_0000000005/manifest.json")


def test_by_two_ranks(url):
    """What two ranks saved to S3, each its own file, one process restores bit for bit."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    (whole, text), _ = values(run_ranks(2, remote_ranks.save, url, environment, 2))
    names = set(open_store(url).latest("default").manifest.files)
    assert {"model/__0_0.distcp", "model/__1_0.distcp"} <= names
    training = sharded_training.Training(seed=1)
    loaded = PyTorchCheckpoint.from_json(text)
    found = loaded.restore(training.model, training.optimizer, scheduler=training.scheduler)
    assert found == {"step": 2}
    assert_same(training.whole(), whole)


def test_whole_and_damaged(url):
    """A step on S3 verifies; one of whose files a byte was changed does not, and the file is named."""
    model, _ = trained()
    saved = PyTorchCheckpoint(model).save(url, step=5)
    assert verify(saved.url).passed
    checkpoint = open_store(url).latest("default")
    file = checkpoint.root / "model" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    report = verify(saved.url)
    assert not report.passed
    assert any("__0_0.distcp" in check.detail for check in report.checks if not check.passed)


def test_a_chunk_that_was_changed(url):
    """Restoring from a damaged file on S3 is an error that names it, not a wrong model."""
    model, _ = trained()
    saved = PyTorchCheckpoint(model).save(url, step=5)
    file = open_store(url).latest("default").root / "model" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    for place in range(1000, len(data) - 1000, 500):
        data[place] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DamagedError, match="__0_0"):
        PyTorchCheckpoint.from_json(saved.to_json()).restore(layers(1))


def test_converted_from_its_url(url, tmp_path, s3_server):  # noqa: F811
    """A step on S3 is converted by ranges of bytes, to the very files that a local copy gives."""
    from small_transformers import model_of

    from ckpt_core.cli import main

    model = model_of("llama")
    saved = PyTorchCheckpoint(model).save(url, step=5)
    local = PyTorchCheckpoint(model).save(tmp_path / "store", step=5)
    s3_server.requests.clear()
    assert main(["convert", saved.url, str(tmp_path / "remote")]) == 0
    reads = [request for request in s3_server.requests if request.path.endswith(".distcp") and request.method == "GET"]
    assert reads
    assert all(request.range for request in reads)
    assert main(["convert", local.url, str(tmp_path / "local")]) == 0
    names = {path.name for path in (tmp_path / "local").iterdir()} - {"export.json"}
    assert "model.safetensors" in names
    for name in names:
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_slice_asks_for_its_bytes(url, s3_server, caplog):  # noqa: F811
    """A few rows of a matrix on S3 are asked for by their range, little beside them, and a log line says so."""
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

    from ckpt_core import open_checkpoint
    from ckpt_core.io import SafeLoadPlanner, SafeReader

    whole = torch.arange(1024 * 1024, dtype=torch.float32).view(1024, 1024)
    saved = PyTorchCheckpoint(torch.nn.ParameterDict({"w": whole})).save(url, step=5)
    reader = SafeReader(open_checkpoint(saved.url).component("model"))
    metadata, rows = reader.read_metadata(), torch.zeros(16, 1024)
    planner = SafeLoadPlanner("here")
    planner.set_up_planner({"model.w": rows}, metadata, is_coordinator=True)
    sizes = torch.Size([16, 1024])
    place = MetadataIndex("model.w", torch.Size([0, 0])), torch.Size([0, 0]), MetadataIndex("model.w")
    item = ReadItem(LoadItemType.TENSOR, place[2], place[1], place[0], torch.Size([500, 0]), sizes)
    s3_server.requests.clear()
    caplog.set_level("INFO", "ckpt_core")
    reader.read_data(LoadPlan([item]), planner).wait()
    assert "structure checked, not the CRC32" in caplog.text
    assert torch.equal(rows, whole[500:516])
    ranges = [request.range for request in s3_server.requests if request.path.endswith(".distcp")]
    asked = [1 + int(end) - int(start) for start, end in (r.removeprefix("bytes=").split("-") for r in ranges if r)]
    assert sum(asked) < 64 * 1024 + 8 * 32 * 1024 < whole.nbytes / 10
