"""A conversion as work: resumed, shared out, watched, copied by the kernel, and stopped when the source changes."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_transformers import checkpoint_of, model_of, read_json

from ckpt_core import errors, io
from ckpt_core.export import (
    Assets,
    abandon_conversion,
    begin_conversion,
    convert,
    convert_shard,
    finish_conversion,
    read_export,
)
from ckpt_core.export.names import Table, read_table
from ckpt_core.format.index import read_index
from ckpt_core.format.source import LocalSource
from ckpt_core.hub import publish
from ckpt_core.verify import verify

SMALL = {"max_shard_bytes": 4000}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Assets]:
    """The DCP directory and the assets of a small Llama."""
    return checkpoint_of(model_of("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def expected(tmp_path: Path, llama: tuple[Path, Assets]) -> dict[str, bytes]:
    """What one process makes of it, in several files."""
    return contents(convert(llama[0], tmp_path / "expected", assets=llama[1], **SMALL).path)


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def hidden(directory: Path) -> list[str]:
    """Return the names in a directory that begin with a dot."""
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


class TestSharedOut:
    """Files of weights as units of work."""

    def test_many_hands_make_what_one_makes(
        self, tmp_path: Path, llama: tuple[Path, Assets], expected: dict[str, bytes]
    ) -> None:
        """Files that are written one by one, in any order and some twice, give the export that `convert` gives."""
        target = tmp_path / "export"
        names = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        assert len(names) > 3
        for name in [*reversed(names), names[0]]:
            assert not target.exists()
            convert_shard(target, name)
        assert finish_conversion(target) == read_export(target)
        assert contents(target) == expected
        assert hidden(tmp_path) == []

    def test_two_at_the_same_file(self, tmp_path: Path, llama: tuple[Path, Assets], expected: dict[str, bytes]) -> None:
        """Two that write one file at the same time end with that file, whole."""
        target = tmp_path / "export"
        names = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        threads = [threading.Thread(target=convert_shard, args=(target, name)) for name in names * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        finish_conversion(target)
        assert contents(target) == expected

    def test_what_is_not_finished_gets_no_name(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """Finishing before all is written is a CommitError, and there is nothing at the target."""
        target = tmp_path / "export"
        names = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        convert_shard(target, names[0])
        with pytest.raises(errors.CommitError, match="still to be written"):
            finish_conversion(target)
        assert not target.exists()
        for name in names:
            convert_shard(target, name)
        assert finish_conversion(target).path == target

    def test_given_up(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """What is abandoned leaves nothing, and a late hand is told so."""
        target = tmp_path / "export"
        names = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        convert_shard(target, names[0])
        abandon_conversion(target)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(errors.CommitError, match="given up"):
            convert_shard(target, names[1])


class TestResumed:
    """After a kill."""

    def test_finished_files_stay(self, tmp_path: Path, llama: tuple[Path, Assets], expected: dict[str, bytes]) -> None:
        """The same conversion goes on: what was finished is not written again, what was half done is."""
        target, work = tmp_path / "export", tmp_path / ".converting-export"
        names = begin_conversion(llama[0], target, assets=llama[1], **SMALL)
        for name in names[:2]:
            convert_shard(target, name)
        (work / f"{names[2]}.0.part").write_bytes(b"half")
        inodes = {name: (work / "export" / name).stat().st_ino for name in names[:2]}
        convert(llama[0], target, assets=llama[1], **SMALL)
        assert {name: (target / name).stat().st_ino for name in names[:2]} == inodes
        assert contents(target) == expected
        assert hidden(tmp_path) == []

    @pytest.mark.parametrize("change", [{"max_shard_bytes": 8000}, {"dtype": "bfloat16"}, {"digest": False}])
    def test_another_conversion_begins_anew(
        self, tmp_path: Path, llama: tuple[Path, Assets], change: dict[str, Any]
    ) -> None:
        """Other settings use nothing of what was left, and delete it."""
        target = tmp_path / "export"
        for name in begin_conversion(llama[0], target, assets=llama[1], **SMALL):
            convert_shard(target, name)
        convert(llama[0], target, assets=llama[1], **{**SMALL, **change})
        fresh = convert(llama[0], tmp_path / "fresh", assets=llama[1], **{**SMALL, **change})
        assert contents(target) == contents(fresh.path)
        assert hidden(tmp_path) == []

    def test_another_checkpoint_begins_anew(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """A checkpoint that was written anew between the two is converted as it is now."""
        copy, target = shutil.copytree(llama[0], tmp_path / "dcp"), tmp_path / "export"
        for name in begin_conversion(copy, target, assets=llama[1], **SMALL):
            convert_shard(target, name)
        shutil.rmtree(copy)
        io.save({"model": model_of("llama", seed=7).state_dict()}, copy)
        export = convert(copy, target, assets=llama[1], **SMALL)
        found = {name: t for file in export.path.glob("*.safetensors") for name, t in load_file(file).items()}
        assert torch.equal(found["lm_head.weight"], model_of("llama", seed=7).state_dict()["lm_head.weight"])


def test_a_source_that_changes_is_named(tmp_path: Path, llama: tuple[Path, Assets]) -> None:
    """A file that is written to between plan and copy is a DamagedError, and nothing is left."""
    copy, target = shutil.copytree(llama[0], tmp_path / "dcp"), tmp_path / "export"
    [shard] = copy.glob("*.distcp")

    def touch(done: int, _: int) -> None:
        if done:
            os.utime(shard, ns=(done, done))

    with pytest.raises(errors.DamagedError, match=r"__0_0\.distcp: changed while it was converted"):
        convert(copy, target, assets=llama[1], progress=touch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000], ids=["one file", "several"])
def test_a_flipped_byte_is_found(tmp_path: Path, name: str, max_shard_bytes: int) -> None:
    """A chunk that is not as it was stored is a DamagedError, whether it is copied in order or cut into experts."""
    directory, assets = checkpoint_of(model_of(name), tmp_path / "saved")
    index = read_index(directory)
    [largest] = [entry.chunks[0] for entry in sorted(index.tensors.values(), key=lambda e: -e.nbytes)[:1]]
    with (directory / largest.span.file).open("r+b") as file:
        file.seek(largest.span.offset + largest.span.length // 2)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(errors.DamagedError, match="CRC32"):
        convert(directory, tmp_path / "export", assets=assets, max_shard_bytes=max_shard_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


class TestWithoutDigests:
    """`--no-digest`: unchanged bytes, copied by the kernel."""

    @pytest.mark.parametrize("settings", [{}, SMALL, {"dtype": "bfloat16"}], ids=["one file", "several", "cast"])
    def test_tensors_are_the_same(self, tmp_path: Path, llama: tuple[Path, Assets], settings: dict[str, Any]) -> None:
        """Every tensor is bit for bit that of a conversion with digests, and data begin on a page of the file."""
        with_digests = convert(llama[0], tmp_path / "with", assets=llama[1], **settings)
        without = convert(llama[0], tmp_path / "without", assets=llama[1], digest=False, **settings)
        for file in with_digests.path.glob("*.safetensors"):
            found, wanted = load_file(without.path / file.name), load_file(file)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
            header = (without.path / file.name).read_bytes()[:8]
            assert (8 + int.from_bytes(header, "little")) % 4096 == 0
            assert without.files[file.name]["sha256"] is None
        assert verify(without.path).passed

    def test_what_has_no_digest_is_not_published(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """Such an export is refused by `publish`, with what to do."""
        export = convert(llama[0], tmp_path / "export", assets=llama[1], digest=False)
        with pytest.raises(errors.DamagedError, match="convert again, with digests"):
            publish(str(export.path), "local/model", endpoint="http://127.0.0.1:9")

    def test_nothing_is_looked_at(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """NaN and flipped bytes go through, as is said of the option."""
        state = dict(model_of("llama").state_dict())
        state["model.norm.weight"][0] = float("nan")
        io.save({"model": state}, tmp_path / "dcp")
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=llama[1], digest=False)
        assert load_file(export.path / "model.safetensors")["model.norm.weight"].isnan().any()

    def test_blocks_are_shared_where_the_file_system_can(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """On btrfs an export of large tensors takes next to no room of its own."""
        mount = tmp_path / "btrfs"
        if not _mount_btrfs(tmp_path / "image", mount):
            pytest.skip("needs mkfs.btrfs, loop devices, and the right to mount")
        try:
            state = {name: torch.randn(t.shape) for name, t in _wide_llama().state_dict().items()}
            io.save({"model": state}, mount / "dcp")
            config = {**_wide_llama().config.to_dict(), "architectures": ["LlamaForCausalLM"]}
            before = _used(mount)
            export = convert(mount / "dcp", mount / "export", assets=Assets(config, {}), digest=False)
            taken = _used(mount) - before
            found = load_file(export.path / "model.safetensors")
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
            assert taken < export.nbytes / 4
        finally:
            subprocess.run(["umount", "--lazy", str(mount)], check=True)  # tensors that were loaded still map it


class TestTable:
    """What a user says of the names of a model of theirs."""

    def test_names_are_dropped_and_renamed(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """A checkpoint with names of its own is converted by a table, whose rules are recorded."""
        state = {f"net.{name.replace('model.', 'body.')}": t for name, t in model_of("llama").state_dict().items()}
        io.save({**state, "ema.lm_head.weight": torch.zeros(3)}, tmp_path / "dcp")
        with pytest.raises(errors.MismatchError, match="lacks"):
            convert(tmp_path / "dcp", tmp_path / "export", assets=llama[1])
        path = tmp_path / "names.json"
        path.write_text(json.dumps({"drop": [r"^ema\."], "rename": [[r"^net\.body\.", "model."], [r"^net\.", ""]]}))
        export = convert(tmp_path / "dcp", tmp_path / "export", assets=llama[1], table=read_table(path))
        plain = convert(llama[0], tmp_path / "plain", assets=llama[1])
        weights = "model.safetensors"
        assert (export.path / weights).read_bytes() == (plain.path / weights).read_bytes()
        assert "dropped: ema.lm_head.weight, by the table of names" in export.rules
        assert any("replaced by 'model.'" in rule for rule in export.rules)

    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"drops": []}', '{"drop": ["("]}', '{"rename": [["a"]]}', '{"rename": [["a", "\\\\1"]]}']
    )
    def test_a_table_that_is_none(self, tmp_path: Path, text: str) -> None:
        """What is no table is an ArgumentError that shows what one looks like."""
        (tmp_path / "names.json").write_text(text)
        with pytest.raises(errors.ArgumentError, match=r"names\.json: not a table of names.*PATTERN"):
            read_table(tmp_path / "names.json")

    def test_two_names_that_become_one(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """A table that gives two stored tensors one name is not followed."""
        io.save({"model": {**model_of("llama").state_dict(), "other.norm.weight": torch.zeros(16)}}, tmp_path / "dcp")
        table = Table(rename=((re.compile(r"other\.norm"), "model.norm"),))
        with pytest.raises(errors.MismatchError, match="lacks"):
            convert(tmp_path / "dcp", tmp_path / "export", assets=llama[1], table=table)


def test_statistics_are_those_of_the_values(tmp_path: Path, llama: tuple[Path, Assets]) -> None:
    """The record has the smallest, largest and mean value of each floating-point tensor, after the cast."""
    export = convert(llama[0], tmp_path / "export", assets=llama[1], dtype="bfloat16")
    statistics = read_json(export.path / "export.json")["statistics"]
    tensors = load_file(export.path / "model.safetensors")
    assert statistics.keys() == tensors.keys()
    for name, tensor in tensors.items():
        values = tensor.double()
        assert (statistics[name]["min"], statistics[name]["max"]) == (values.min().item(), values.max().item())
        assert statistics[name]["mean"] == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-12)


def test_files_digests_are_in_the_record(tmp_path: Path, llama: tuple[Path, Assets]) -> None:
    """Whoever wrote a file, its sha256 in the record is that of its bytes."""
    target = tmp_path / "export"
    for name in begin_conversion(llama[0], target, assets=llama[1], **SMALL):
        convert_shard(target, name)
    for name, record in finish_conversion(target).files.items():
        assert record["sha256"] == hashlib.sha256((target / name).read_bytes()).hexdigest()


def _wide_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8, vocab_size=2048
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def _mount_btrfs(image: Path, mount: Path) -> bool:
    if not (shutil.which("mkfs.btrfs") and os.geteuid() == 0):
        return False
    with image.open("wb") as file:
        file.truncate(400 << 20)
    mount.mkdir()
    made = subprocess.run(["mkfs.btrfs", "-q", str(image)], check=False, capture_output=True).returncode == 0
    command = ["mount", "-o", "loop", str(image), str(mount)]
    return made and subprocess.run(command, check=False, capture_output=True).returncode == 0


def _used(mount: Path) -> int:
    os.sync()
    status = os.statvfs(mount)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


class TestDisks:
    """Which of the two disks an error names, and what becomes of what was done."""

    @pytest.mark.parametrize("named", [True, False], ids=["with a file name", "without"])
    def test_a_source_that_fails_is_named_and_the_work_goes_on(
        self, tmp_path: Path, llama: tuple[Path, Assets], monkeypatch: pytest.MonkeyPatch, named: bool
    ) -> None:
        """An EIO of the checkpoint's file is an OSError about that; the next conversion does the rest."""
        target, settings = tmp_path / "out" / "export", {"max_shard_bytes": 4000, "workers": 1}
        reads, read = [0], LocalSource.read_at

        def failing(source: LocalSource, offset: int, buffer: memoryview) -> int:
            reads[0] += 1
            if reads[0] > 100:
                raise OSError(errno.EIO, os.strerror(errno.EIO), *([str(source._path)] if named else []))
            return read(source, offset, buffer)

        with monkeypatch.context() as patch:
            patch.setattr(LocalSource, "read_at", failing)
            with pytest.raises(OSError, match=r"__0_0\.distcp") as caught:
                convert(llama[0], target, assets=llama[1], **settings)
        assert not isinstance(caught.value, errors.ExportError)
        assert caught.value.errno == errno.EIO
        assert str(target) not in str(caught.value)
        done = list((target.parent / ".converting-export" / "done").iterdir())
        assert done
        convert(llama[0], target, assets=llama[1], **settings)
        assert list(target.parent.iterdir()) == [target]

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_a_target_that_fails_is_named_and_nothing_is_left(
        self, tmp_path: Path, llama: tuple[Path, Assets], monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """An error of the files that are written is an ExportError about the target, with a remedy."""
        target, write = tmp_path / "out" / "export", os.write

        def failing(handle: int, data: Any) -> int:
            if "model-0" in str(Path(f"/proc/self/fd/{handle}").readlink()):
                raise OSError(number, os.strerror(number))
            return write(handle, data)

        monkeypatch.setattr(os, "write", failing)
        with pytest.raises(errors.ExportError, match="could not be written, and nothing is left of it") as caught:
            convert(llama[0], target, assets=llama[1], max_shard_bytes=4000, workers=1)
        assert str(caught.value).startswith(f"{target}: ")
        assert f"{os.strerror(number)}; " in str(caught.value)
        assert list(target.parent.iterdir()) == []

    def test_a_target_that_may_not_be_made(self, tmp_path: Path, llama: tuple[Path, Assets]) -> None:
        """A name that no file system takes is an error about the target before anything is written."""
        with pytest.raises(errors.ExportError, match="255 bytes"):
            convert(llama[0], tmp_path / ("x" * 250), assets=llama[1])
        assert list(tmp_path.iterdir()) == []
