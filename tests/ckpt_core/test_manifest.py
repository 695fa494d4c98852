"""A manifest says what a step is, and is believed only whole."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from hostile_files import cheap
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128

import ckpt_core.format.manifest
from ckpt_core.errors import DamagedError
from ckpt_core.format.digests import digest_bytes
from ckpt_core.format.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest, record_bytes, record_file

SCHEMA = json.loads(Path(ckpt_core.format.manifest.__file__).with_name("manifest.schema.json").read_bytes())
FILES = {"model/.metadata": FileRecord(3, "xxh3_128:00ff"), "model/__0_0.distcp": FileRecord(1 << 40, "xxh3_128:abcd")}
MANIFEST = Manifest(
    run="default",
    step=500,
    time="2026-01-02T03:04:05+00:00",
    world_size=2,
    module="models.Net",
    optimizer=None,
    hyperparameters={"rate": 1e-3, "layers": [1, 2], "name": "grün"},
    metrics={"loss": 0.1},
    lineage={"parent": None},
    files=FILES,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=20,
)


def written(directory, manifest=MANIFEST):
    """Write a manifest; return its document."""
    (directory / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return json.loads((directory / MANIFEST_NAME).read_bytes())


def test_round_trip(tmp_path):
    """What is read equals what was written, and has the digest that the file says."""
    document = written(tmp_path)
    assert read_manifest(tmp_path) == MANIFEST
    assert document["digest"] == MANIFEST.digest()
    assert MANIFEST.nbytes == 3 + (1 << 40)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.text(max_size=9), JSON, max_size=5))
def test_any_json_comes_back(values):
    """Hyperparameters of any JSON types, NaN and infinities among them, come back as they were."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        written(Path(directory), replace(MANIFEST, hyperparameters=values))
        found = read_manifest(Path(directory)).hyperparameters
    assert json.dumps(found) == json.dumps(values)


def test_keys_that_become_text(tmp_path):
    """Numbers for keys become text in JSON, where they sort otherwise; the digest holds."""
    written(tmp_path, replace(MANIFEST, metrics={"by": {10: 1, 9: 2, 1: 3}}))
    assert read_manifest(tmp_path).metrics == {"by": {"10": 1, "9": 2, "1": 3}}


def test_what_is_not_json_is_an_error_at_once():
    """A value that JSON has no form for is a TypeError when the manifest is made, not when it is written."""
    with pytest.raises(TypeError):
        replace(MANIFEST, metrics={"when": object()})


def test_the_schema_describes_it(tmp_path):
    """The schema in the repository accepts what is written, and is itself a schema."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(written(tmp_path), SCHEMA)
    jsonschema.validate(written(tmp_path, Manifest(run="r", step=0, time="2026-01-02", world_size=1)), SCHEMA)


LIES = {
    "run": 5,
    "step": "500",
    "time": None,
    "world_size": 1.5,
    "module": 3,
    "optimizer": [],
    "hyperparameters": [],
    "metrics": None,
    "lineage": "x",
    "files": {"a": {"bytes": "3", "digest": "xxh3_128:00"}},
    "format_version": 2,
    "digest": "xxh3_128:00",
    "extra": 1,
}


@pytest.mark.parametrize(("name", "value"), LIES.items(), ids=list(LIES))
def test_types_are_checked(tmp_path, name, value):
    """A field of another type is damage, also where the manifest's own digest is right; the schema agrees."""
    document = written(tmp_path)
    document[name] = value
    if name != "digest":
        document["digest"] = _digest(document)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, SCHEMA)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(DamagedError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def _digest(document):
    content = {name: value for name, value in document.items() if name != "digest"}
    return digest_bytes(json.dumps(content, sort_keys=True).encode())


def test_the_digest_of_the_tests_is_the_real_one(tmp_path):
    """The lies above carry right digests: an honest document with a digest made that way is read."""
    document = written(tmp_path)
    document["step"] = 501
    document["digest"] = _digest(document)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    assert read_manifest(tmp_path).step == 501


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "a//b", ".", "", "a\0b", "./a"])
def test_files_lie_below_the_step(tmp_path, name):
    """A file's name that leads out of the step is damage."""
    (tmp_path / MANIFEST_NAME).write_bytes(replace(MANIFEST, files={name: FileRecord(1, "xxh3_128:00")}).to_bytes())
    with pytest.raises(DamagedError):
        read_manifest(tmp_path)


def test_every_flipped_bit_is_found(tmp_path):
    """One bit flipped anywhere in the file is damage, or means the same."""
    good = MANIFEST.to_bytes()
    for position in range(len(good)):
        (tmp_path / MANIFEST_NAME).write_bytes(
            good[:position] + bytes([good[position] ^ (1 << position % 8)]) + good[position + 1 :]
        )
        try:
            assert read_manifest(tmp_path) == MANIFEST
        except DamagedError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017 - either is right


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10**6, b'{"format_version": 1}', b'{"format_version": 1, "digest": 1}'],
    ids=range(8),
)
def test_no_manifest(tmp_path, content):
    """What is not JSON, or not this JSON, is damage."""
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with cheap(), pytest.raises(DamagedError):
        read_manifest(tmp_path)


def test_missing(tmp_path):
    """No file is a FileNotFoundError, as its docstring says."""
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_not_a_file(tmp_path, make):
    """A directory, a FIFO or a device in its place is damage, and nobody waits for it."""
    make(tmp_path / MANIFEST_NAME)
    with cheap(), pytest.raises(DamagedError, match="not a regular file"):
        read_manifest(tmp_path)


def test_too_large(tmp_path):
    """A file that is larger than a manifest can be is not read."""
    (tmp_path / MANIFEST_NAME).touch()
    os.truncate(tmp_path / MANIFEST_NAME, 1 << 40)
    with cheap(), pytest.raises(DamagedError):
        read_manifest(tmp_path)


def test_numbers_that_json_has_not(tmp_path):
    """NaN and infinities are written as Python's json writes them, and read back."""
    written(tmp_path, replace(MANIFEST, metrics={"loss": math.nan, "best": -math.inf}))
    metrics = read_manifest(tmp_path).metrics
    assert math.isnan(metrics["loss"])
    assert metrics["best"] == -math.inf


def test_record_of_a_file(tmp_path):
    """A record has the size and the XXH3 digest of the whole file, also where it is larger than one read."""
    data = os.urandom((4 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert record_file(tmp_path / "file") == FileRecord(len(data), f"xxh3_128:{xxh3_128(data).hexdigest()}")
    assert record_bytes(data) == record_file(tmp_path / "file")
