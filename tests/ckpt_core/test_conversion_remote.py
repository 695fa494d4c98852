"""A conversion to an object store: streamed, resumed, given up, taken over; whole when `export.json` is there."""

import gc
import json
import multiprocessing
import shutil
import signal
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from children import convert_until_killed
from object_stores import S3Server, s3_server  # noqa: F401 - a fixture
from safetensors.torch import load_file
from small_transformers import checkpoint_of, model_of

from ckpt_core import PyTorchCheckpoint, durable, errors, io
from ckpt_core.cli import main
from ckpt_core.export import (
    Assets,
    abandon_conversion,
    begin_conversion,
    convert,
    convert_checkpoint,
    convert_shard,
    finish_conversion,
    note,
    read_export,
)
from ckpt_core.export.conversion import work_on
from ckpt_core.export.remote_work import RemoteWork
from ckpt_core.store import objects, open_checkpoint
from ckpt_core.urls import place_of
from ckpt_core.verify import verify

SMALL = {"max_shard_bytes": 4000}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Assets]:
    """The DCP directory and the assets of a small Llama."""
    return checkpoint_of(model_of("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, llama: tuple[Path, Assets]) -> dict[str, bytes]:
    """What becomes of it on a disk, in several files."""
    target = tmp_path_factory.mktemp("expected") / "export"
    return contents(convert(llama[0], target, assets=llama[1], **SMALL).path)


@pytest.fixture
def bucket(s3_server: S3Server) -> Any:  # noqa: F811 - the fixture
    """An empty bucket."""
    return place_of(s3_server.new_bucket())


@pytest.fixture
def memory() -> Any:
    """An empty directory in memory."""
    return place_of(f"memory://{uuid.uuid4().hex}")


def contents(directory: Any) -> dict[str, bytes]:
    """Return the bytes of each file below a directory, by its path there."""
    return {name: place.read_bytes() for name, place in durable.files_below(directory)}


def unfinished_uploads(bucket: Any) -> list[Any]:
    """Return the uploads in parts that are neither complete nor aborted."""
    return fsspec.filesystem("s3").list_multipart_uploads(bucket.path.strip("/"))


class TestWhole:
    """What comes out."""

    @pytest.mark.parametrize(
        "settings",
        [{}, SMALL, {"dtype": "bfloat16"}, {"digest": False}],
        ids=["one file", "several", "cast", "no digest"],
    )
    def test_bytes_are_those_on_a_disk(
        self, tmp_path: Path, bucket: Any, llama: tuple[Path, Assets], settings: dict[str, Any]
    ) -> None:
        """Every file in a bucket is byte for byte that on a disk, and there is nothing else in it."""
        export = convert(llama[0], bucket / "exports" / "llama", assets=llama[1], **settings)
        local = convert(llama[0], tmp_path / "export", assets=llama[1], **settings)
        assert contents(bucket) == {f"exports/llama/{name}": data for name, data in contents(local.path).items()}
        assert (export.files, export.rules) == (local.files, local.rules)
        assert verify(str(export.path)).passed

    def test_a_large_file_is_sent_in_parts(
        self,
        tmp_path: Path,
        bucket: Any,
        s3_server: S3Server,  # noqa: F811 - the fixture
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A file of several parts is sent as such, in a few requests, and is whole."""
        monkeypatch.setattr(durable, "_PART_BYTES", 5 << 20)  # the least that S3 takes
        state = {name: torch.randn(t.shape) for name, t in wide_llama().state_dict().items()}
        io.save({"model": state}, tmp_path / "dcp")
        assets = Assets({**wide_llama().config.to_dict(), "architectures": ["LlamaForCausalLM"]}, {})
        export = convert(tmp_path / "dcp", bucket / "export", assets=assets)
        path = f"/{bucket.path.strip('/')}/export/model.safetensors"
        puts = [request for request in s3_server.requests if (request.method, request.path) == ("PUT", path)]
        assert len(puts) == export.files["model.safetensors"]["bytes"] // (5 << 20) + 1 > 3
        (tmp_path / "model.safetensors").write_bytes((export.path / "model.safetensors").read_bytes())
        found = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert unfinished_uploads(bucket) == []

    def test_the_record_is_last(
        self,
        bucket: Any,
        llama: tuple[Path, Assets],
        s3_server: S3Server,  # noqa: F811 - the fixture
    ) -> None:
        """`export.json` is the last thing that is put to the target; until then nothing takes it for an export."""
        target = bucket / "export"
        *names, last = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        for name in names:
            convert_shard(target, name)
        with pytest.raises(errors.NotACheckpointError, match=r"export\.json"):
            read_export(target)
        assert not verify(str(target)).passed
        convert_shard(target, last)
        assert finish_conversion(target) == read_export(target)
        below = f"/{bucket.path.strip('/')}/export/"
        puts = [r.path for r in s3_server.requests if r.method == "PUT" and r.path.startswith(below)]
        assert puts[-1] == f"{below}export.json"
        assert puts.count(puts[-1]) == 1

    def test_from_a_store_to_a_bucket(self, tmp_path: Path, bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
        """`ckpt convert` of a step in a bucket, with an OUT in it, gives an export, and says where."""
        model = model_of("llama")
        model.config.save_pretrained(tmp_path / "assets")
        step = PyTorchCheckpoint(model).save(f"{bucket}store", step=1, assets=tmp_path / "assets")
        out = f"{bucket}exports/one"
        assert main(["convert", str(step.url), out, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["path"] == out
        local = convert_checkpoint(open_checkpoint(str(step.url)), tmp_path / "export")
        assert contents(place_of(out)) == contents(local.path)
        assert main(["convert", str(step.url), out]) == 1
        assert "exists; give another directory" in capsys.readouterr().err


class TestNothingIsLeft:
    """What ends without an export."""

    @pytest.mark.parametrize("kind", ["NaN", "flipped byte"])
    def test_after_an_error(self, tmp_path: Path, bucket: Any, llama: tuple[Path, Assets], kind: str) -> None:
        """A NaN or a wrong CRC32 is a DamagedError, and neither an object nor a part of one is left."""
        copy = shutil.copytree(llama[0], tmp_path / "dcp")
        if kind == "NaN":
            shutil.rmtree(copy)
            state = dict(model_of("llama").state_dict())
            state["model.norm.weight"][0] = float("nan")
            io.save({"model": state}, copy)
        else:
            data = bytearray((copy / "__0_0.distcp").read_bytes())
            data[len(data) // 2] ^= 1
            (copy / "__0_0.distcp").write_bytes(data)
        for settings in ({}, SMALL):
            with pytest.raises(errors.DamagedError):
                convert(copy, bucket / "exports" / "llama", assets=llama[1], workers=1, **settings)
            assert contents(bucket) == {}
            assert unfinished_uploads(bucket) == []

    def test_a_sink_that_is_not_sealed(self, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """An object that is not sealed never appears, nor when Python lets go of it, whatever was sent of it."""
        monkeypatch.setattr(durable, "_PART_BYTES", 5 << 20)
        for size in (1, 6 << 20):
            sink = durable.RemoteSink(bucket / "object", replace=True)
            sink.write(memoryview(bytes(size)))
            sink.close()
            del sink
            gc.collect()
        assert contents(bucket) == {}
        assert unfinished_uploads(bucket) == []

    def test_abandoned(self, memory: Any, llama: tuple[Path, Assets]) -> None:
        """What is abandoned leaves nothing, and a late hand is told so."""
        target = memory / "export"
        names = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        convert_shard(target, names[0])
        abandon_conversion(target)
        assert contents(memory) == {}
        with pytest.raises(errors.CommitError, match="given up"):
            convert_shard(target, names[1])
        assert contents(memory) == {}

    @pytest.mark.parametrize("moment", ["while it is sent", "after it was sent"])
    def test_a_late_hand(
        self, memory: Any, llama: tuple[Path, Assets], monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        """A file that is at work when all is given up is not left behind, and its writer is told."""
        target = memory / "export"
        [name, *_] = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        seal = durable.RemoteSink.seal

        def sealed(sink: durable.RemoteSink) -> None:
            seal(sink)
            abandon_conversion(target)

        if moment == "after it was sent":
            monkeypatch.setattr(durable.RemoteSink, "seal", sealed)
        written = (lambda _: abandon_conversion(target)) if moment == "while it is sent" else (lambda _: None)
        with pytest.raises(errors.CommitError, match="given up"):
            work_on(target).write(name, written)
        assert contents(memory) == {}

    def test_what_is_not_finished_is_no_export(self, memory: Any, llama: tuple[Path, Assets]) -> None:
        """Finishing before all is written is a CommitError, and nothing was begun at another place."""
        target = memory / "export"
        begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        with pytest.raises(errors.CommitError, match="still to be written"):
            finish_conversion(target)
        with pytest.raises(errors.CommitError, match="Begin again"):
            finish_conversion(memory / "other")


class TestResumed:
    """After a stop."""

    def test_finished_files_stay(
        self,
        bucket: Any,
        llama: tuple[Path, Assets],
        expected: dict[str, bytes],
        s3_server: S3Server,  # noqa: F811 - the fixture
    ) -> None:
        """The same conversion goes on: what was finished is not sent again."""
        target = bucket / "export"
        names = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        for name in names[:2]:
            convert_shard(target, name)
        s3_server.requests.clear()
        convert(llama[0], target, assets=llama[1], **SMALL)
        sent = {r.path.rpartition("/")[2] for r in s3_server.requests if r.method == "PUT" and "/export/" in r.path}
        assert sent & set(names) == set(names[2:])
        assert contents(bucket) == {f"export/{name}": data for name, data in expected.items()}

    def test_after_the_network_failed(
        self, memory: Any, llama: tuple[Path, Assets], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error of the store is an OSError that leaves no export, and the next conversion does the rest."""
        seal, sealed = durable.RemoteSink.seal, []

        def failing(sink: durable.RemoteSink) -> None:
            if len(sealed) == 2:
                raise ConnectionError("the network failed")
            seal(sink)
            sealed.append(sink)

        with monkeypatch.context() as patch:
            patch.setattr(durable.RemoteSink, "seal", failing)
            with pytest.raises(OSError, match="the network failed"):
                convert(llama[0], memory / "export", assets=llama[1], workers=1, **SMALL)
        assert "export/export.json" not in contents(memory)
        assert len(work_on(memory / "export").undone) == len(weights(expected)) - 2
        convert(llama[0], memory / "export", assets=llama[1], **SMALL)
        assert contents(memory) == {f"export/{name}": data for name, data in expected.items()}

    @pytest.mark.parametrize("change", [{"max_shard_bytes": 8000}, {"dtype": "bfloat16"}, {"digest": False}])
    def test_another_conversion_begins_anew(
        self, tmp_path: Path, memory: Any, llama: tuple[Path, Assets], change: dict[str, Any]
    ) -> None:
        """Other settings use nothing of what was left, and delete it."""
        target = memory / "export"
        for name in begin_conversion(llama[0], target, assets=llama[1], **SMALL):
            convert_shard(target, name)
        convert(llama[0], target, assets=llama[1], **{**SMALL, **change})
        fresh = convert(llama[0], tmp_path / "fresh", assets=llama[1], **{**SMALL, **change})
        assert contents(memory) == {f"export/{name}": data for name, data in contents(fresh.path).items()}

    def test_stopped_while_it_began(
        self, memory: Any, llama: tuple[Path, Assets], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped at any request of its beginning, a conversion is begun again, and ends as if nothing had been."""
        write, limit = objects.write, [0]

        def failing(place: Any, data: bytes) -> None:
            if limit[0] == 0:
                raise KeyboardInterrupt
            limit[0] -= 1
            write(place, data)

        for requests in range(0, len(expected) + 4, 3):
            with monkeypatch.context() as patch:
                patch.setattr(objects, "write", failing)
                limit[0] = requests
                with pytest.raises(KeyboardInterrupt):
                    convert(llama[0], memory / "export", assets=llama[1], **SMALL)
        convert(llama[0], memory / "export", assets=llama[1], **SMALL)
        assert contents(memory) == {f"export/{name}": data for name, data in expected.items()}


class TestKilled:
    """What a process that was killed while it sent a file in parts leaves."""

    @pytest.fixture
    def begun(self, bucket: Any, llama: tuple[Path, Assets]) -> Any:
        """The target of a conversion of several files, with a part of one that nobody completes."""
        [name, *_] = begin_conversion(llama[0], bucket / "export", assets=llama[1], **SMALL)
        abandoned_upload(bucket / "export" / name)
        assert len(unfinished_uploads(bucket)) == 1
        return bucket / "export"

    def test_the_next_one_ends_it(self, tmp_path: Path, bucket: Any, s3_server: S3Server) -> None:  # noqa: F811 - the fixture
        """Nothing passes for an export; the same conversion sends what was not finished, and no part is left."""
        io.save({"model": {n: torch.randn(t.shape) for n, t in wide_llama().state_dict().items()}}, tmp_path / "dcp")
        assets = Assets({**wide_llama().config.to_dict(), "architectures": ["LlamaForCausalLM"]}, {})
        settings = {"assets": assets, "max_shard_bytes": 9_000_000}
        local, target = convert(tmp_path / "dcp", tmp_path / "export", **settings), bucket / "export"
        *finished, last = weights(contents(local.path))
        within_last = local.nbytes - 3_000_000
        job = (str(tmp_path / "dcp"), str(target), settings, within_last, 5 << 20)
        process = multiprocessing.get_context("spawn").Process(target=convert_until_killed, args=job)
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert [upload["Key"] for upload in unfinished_uploads(bucket)] == [f"export/{last}"]
        with pytest.raises(errors.NotACheckpointError, match=r"export\.json"):
            read_export(target)
        assert not verify(str(target)).passed
        s3_server.requests.clear()
        convert(tmp_path / "dcp", target, **settings)
        sent = {r.path.rpartition("/")[2] for r in s3_server.requests if r.method == "PUT" and "/export/" in r.path}
        assert last in sent
        assert not sent & set(finished)
        assert contents(bucket) == {f"export/{name}": data for name, data in contents(local.path).items()}
        assert unfinished_uploads(bucket) == []

    def test_another_one_clears_it(self, bucket: Any, begun: Any, llama: tuple[Path, Assets]) -> None:
        """Another conversion to the same place leaves no part of the first."""
        assert begin_conversion(llama[0], begun, assets=llama[1], dtype="bfloat16") == ["model.safetensors"]
        assert unfinished_uploads(bucket) == []

    def test_it_is_given_up(self, bucket: Any, begun: Any) -> None:
        """Giving it up leaves no object, and no part of one."""
        abandon_conversion(begun)
        assert contents(bucket) == {}
        assert unfinished_uploads(bucket) == []

    def test_a_late_hand(self, bucket: Any, begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who sends parts of a file that was given up meanwhile is told so, and leaves nothing."""
        [name, *_] = work_on(begun).undone
        write = durable.RemoteSink.write

        def given_up(sink: durable.RemoteSink, data: memoryview) -> None:
            abandon_conversion(begun)
            write(sink, data)
            raise FileNotFoundError("The specified upload does not exist.")  # as S3 says of one that was aborted

        monkeypatch.setattr(durable.RemoteSink, "write", given_up)
        with pytest.raises(errors.CommitError, match="given up"):
            convert_shard(begun, name)
        assert contents(bucket) == {}
        assert unfinished_uploads(bucket) == []

    def test_uploads_of_others_stay(self, bucket: Any, llama: tuple[Path, Assets]) -> None:
        """What somebody else sends below the target, or beside it, is not aborted."""
        for name in ("export/other.bin", "export-2/model.safetensors"):
            abandoned_upload(bucket / name)
        convert(llama[0], bucket / "export", assets=llama[1])
        assert len(unfinished_uploads(bucket)) == 2

    def test_a_store_that_lists_no_uploads(
        self,
        bucket: Any,
        llama: tuple[Path, Assets],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Who may not list them gets an export all the same, and a warning."""
        call = type(bucket.fs).call_s3

        def denied(files: Any, method: str, *arguments: Any, **options: Any) -> Any:
            if method == "list_multipart_uploads":
                raise PermissionError("Access Denied")
            return call(files, method, *arguments, **options)

        monkeypatch.setattr(type(bucket.fs), "call_s3", denied)
        convert(llama[0], bucket / "export", assets=llama[1])
        assert "could not be aborted (Access Denied)" in caplog.text
        assert read_export(bucket / "export").files


class TestTaken:
    """A target that holds something."""

    def test_anything_there_is_an_error(self, bucket: Any, llama: tuple[Path, Assets]) -> None:
        """A target with any object is left alone."""
        objects.write(bucket / "export" / "notes.txt", b"mine")
        with pytest.raises(errors.ExportExistsError, match="pass overwrite"):
            convert(llama[0], bucket / "export", assets=llama[1])
        assert contents(bucket) == {"export/notes.txt": b"mine"}

    def test_overwrite_keeps_the_export_until_the_new_one_is_complete(
        self,
        tmp_path: Path,
        bucket: Any,
        llama: tuple[Path, Assets],
        s3_server: S3Server,  # noqa: F811 - the fixture
    ) -> None:
        """With `overwrite` nothing at the target changes before all is written; then its record goes first."""
        target = bucket / "export"
        convert(llama[0], target, assets=llama[1], **SMALL)
        s3_server.requests.clear()
        convert(llama[0], target, assets=llama[1], overwrite=True)
        base = f"/{bucket.path.strip('/')}/"
        changes = [r.path.removeprefix(base) for r in s3_server.requests if r.method in {"PUT", "DELETE"}]
        first = next(i for i, path in enumerate(changes) if path.startswith("export/"))
        assert any(path.endswith("/export/export.json") for path in changes[:first])
        assert changes[first] == "export/export.json"
        local = convert(llama[0], tmp_path / "export", assets=llama[1])
        assert contents(bucket) == {f"export/{name}": data for name, data in contents(local.path).items()}
        assert unfinished_uploads(bucket) == []

    def test_an_overwrite_that_fails_leaves_the_export(
        self, tmp_path: Path, memory: Any, llama: tuple[Path, Assets], expected: dict[str, bytes]
    ) -> None:
        """A checkpoint with NaN changes nothing at the target, and leaves nothing beside it."""
        convert(llama[0], memory / "export", assets=llama[1], **SMALL)
        state = dict(model_of("llama").state_dict())
        state["model.norm.weight"][0] = float("nan")
        io.save({"model": state}, tmp_path / "dcp")
        with pytest.raises(errors.DamagedError):
            convert(tmp_path / "dcp", memory / "export", assets=llama[1], overwrite=True, workers=1, **SMALL)
        assert contents(memory) == {f"export/{name}": data for name, data in expected.items()}

    @pytest.mark.parametrize("then", ["the same", "another", "an error", "abandoned"])
    def test_stopped_while_it_replaces(
        self,
        tmp_path: Path,
        memory: Any,
        llama: tuple[Path, Assets],
        expected: dict[str, bytes],
        monkeypatch: pytest.MonkeyPatch,
        then: str,
    ) -> None:
        """Stopped before any request that changes something, the old export or the new one is complete somewhere.

        Whatever comes next completes the replacement, or leaves the old one.
        """
        new = contents(convert(llama[0], tmp_path / "new", assets=llama[1], dtype="bfloat16").path)
        target = memory / "export"
        for count in range(0, 1000, 1 if then == "the same" else 5):
            objects.delete_all(memory, objects.sizes_below(memory))
            convert(llama[0], target, assets=llama[1], **SMALL)
            with monkeypatch.context() as patch:
                stopped = _stop_before(count, patch)
                with suppress(KeyboardInterrupt):
                    convert(llama[0], target, assets=llama[1], dtype="bfloat16", overwrite=True, workers=1)
            for record in objects.names_in(memory / ".converting-export" / "notes"):
                objects.delete(memory / ".converting-export" / "notes" / record)  # as if they had expired
            if then == "the same":
                convert(llama[0], target, assets=llama[1], dtype="bfloat16", overwrite=True)
            elif then == "another":
                convert(llama[0], target, assets=llama[1], dtype="float16", overwrite=True)
            elif then == "an error":
                with pytest.raises(errors.CkptError):
                    convert(llama[0], target, assets=llama[1], overwrite=True, max_shard_bytes=0)
            else:
                abandon_conversion(target)
            found = contents(target)
            if then == "the same":
                assert found == new
            elif then == "abandoned":
                assert found in (expected, new)
                assert not any(name.endswith(".safetensors") for name in contents(memory / ".converting-export"))
            elif then == "an error":
                complete = [found, *_kept_exports(memory)]
                assert expected in complete or new in complete
            else:
                assert read_export(target).files["model.safetensors"]["bytes"] < len(b"".join(expected.values()))
            if not stopped:
                break
        assert count > 10

    def test_places_that_cannot_be(self, memory: Any, llama: tuple[Path, Assets]) -> None:
        """A target in its source, around it, in a committed step or without a name is an ArgumentError."""
        for name, data in contents(llama[0]).items():
            objects.write(memory / "runs" / "dcp" / name, data)
        objects.write(memory / "step" / "manifest.json", b"{}")
        source = memory / "runs" / "dcp"
        for target in (source / "export", memory / "runs", memory / "step" / "export", place_of("memory://")):
            with pytest.raises(errors.ArgumentError):
                convert(source, target, assets=llama[1], overwrite=True)
        assert contents(source) == contents(llama[0])


class TestTogether:
    """Several at the same target."""

    def test_two_at_the_same_file(self, memory: Any, llama: tuple[Path, Assets], expected: dict[str, bytes]) -> None:
        """Two that write one file at the same time end with that file, whole."""
        target = memory / "export"
        names = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        threads = [threading.Thread(target=convert_shard, args=(target, name)) for name in names * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        finish_conversion(target)
        assert contents(target) == expected

    def test_another_conversion_waits(
        self, memory: Any, llama: tuple[Path, Assets], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While somebody writes, another conversion to the same place is a CommitError that changes nothing."""
        target = memory / "export"
        [name, *_] = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        refused: list[str] = []

        def meanwhile(_: int) -> None:
            with pytest.raises(errors.CommitError, match="somebody converts to the same place") as caught:
                convert(llama[0], target, assets=llama[1])
            refused.append(str(caught.value))

        work_on(target).write(name, meanwhile)
        assert refused
        assert name not in work_on(target).undone

    def test_a_dead_writer_s_note_expires(
        self, tmp_path: Path, memory: Any, llama: tuple[Path, Assets], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a killed writer left keeps another conversion away for ten minutes, and the same one not at all."""
        target = memory / "export"
        begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        work = work_on(target)
        assert isinstance(work, RemoteWork)
        work.plan  # noqa: B018 - finds the conversion
        assert work._mine is not None
        note.Note(work.root / "notes", work._mine.key)
        begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        with pytest.raises(errors.CommitError, match="if that process is dead, until"):
            convert(llama[0], target, assets=llama[1])
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 601)
        convert(llama[0], target, assets=llama[1])
        local = convert(llama[0], tmp_path / "export", assets=llama[1])
        assert contents(memory) == {f"export/{name}": data for name, data in contents(local.path).items()}

    def test_a_note_is_renewed(self, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A note lasts as long as its owner renews it; one that was forgotten ends the writing."""
        now = [time.time()]
        monkeypatch.setattr(time, "time", lambda: now[0])
        mine = note.Note(memory / "notes", "a" * 32)
        for _ in range(4):
            now[0] += 400
            mine.renew()
            mine.check()
        assert len(objects.names_in(memory / "notes")) == 1
        now[0] += 700
        with pytest.raises(errors.CommitError, match="Convert again"):
            mine.renew()


def _stop_before(count: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Raise KeyboardInterrupt before a request that changes something, and before each one after it, as if killed."""
    done, stopped = [0], list[str]()

    def wrapped(name: str) -> Any:
        real = getattr(objects, name)

        def call(*arguments: Any) -> Any:
            if done[0] >= count:
                stopped.append(name)
                raise KeyboardInterrupt
            done[0] += 1
            return real(*arguments)

        return call

    for name in ("write", "copy", "delete", "delete_all"):
        patch.setattr(objects, name, wrapped(name))
    return stopped


def _kept_exports(memory: Any) -> list[dict[str, bytes]]:
    """Return the files of each export that is complete beside the target, waiting to be copied there."""
    root = memory / ".converting-export"
    return [
        contents(root / name / "export")
        for name in objects.names_in(root)
        if objects.exists(root / name / "export" / "export.json")
    ]


def abandoned_upload(place: Any) -> None:
    """Send a part of an object, and neither complete nor abort it, as who is killed."""
    bucket, key, _ = place.fs.split_path(place.path)
    upload = place.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
    place.fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=bytes(5 << 20))


def weights(files: dict[str, bytes]) -> list[str]:
    """Return the names of the files of weights."""
    return [name for name in files if name.endswith(".safetensors")]


def wide_llama() -> Any:
    """Return a Llama without weights, whose file has some 18 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, vocab_size=8192
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)
