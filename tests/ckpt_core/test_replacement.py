"""The replacement of an export or a checkpoint by a new one: the old content is kept until the new one is in place."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small_transformers import checkpoint_of, model_of

from ckpt_core import durable, errors
from ckpt_core.export import Assets, abandon_conversion, convert
from ckpt_core.export.imports import import_hf
from ckpt_core.export.target import give_name, recover_replaced


class Killed(BaseException):
    """The end of a process, after which it changes nothing any more."""


class Kills:
    """Lets a number of system calls that change names pass, and none after them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._left = 1 << 30
        self.killed = False
        for name in ("rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(durable, "_renameat2", self._counted(durable._renameat2))

    def after(self, calls: int) -> None:
        """Kill at the call after this number of calls."""
        self._left, self.killed = calls, False

    def never(self) -> None:
        """Let all calls pass."""
        self.after(1 << 30)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                self.killed = True
                raise Killed
            return call(*arguments, **options)

        return counted


@pytest.fixture(params=["exchange", "two renames"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the file system can replace a directory."""
    if request.param == "two renames":

        def unsupported(*_: Any) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(durable, "_renameat2", unsupported)
    return request.param


@pytest.fixture
def kills(renames: str, monkeypatch: pytest.MonkeyPatch) -> Kills:
    """Kills of this process, for code that takes any error for the end."""
    return Kills(monkeypatch)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Assets]:
    """The DCP directory and the assets of a small Llama."""
    return checkpoint_of(model_of("llama"), tmp_path_factory.mktemp("llama"))


def fill(directory: Path, text: str) -> None:
    """Make a directory with a file."""
    directory.mkdir(parents=True)
    (directory / "file").write_text(text)


@pytest.mark.parametrize("old", ["directory", "file", "link"])
def test_killed_at_any_call_one_of_both_is_kept(tmp_path: Path, kills: Kills, old: str) -> None:
    """After a kill at any rename or deletion, recovery leaves either the old or the new content at the target."""
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "place" / "served"
    fill(elsewhere, "old")
    found = set[str]()
    for calls in range(100):
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        fill(tmp_path / "place" / "scratch" / "made", "new")
        if old == "directory":
            fill(target, "old")
        elif old == "file":
            target.write_text("old")
        else:
            target.symlink_to(elsewhere)
        kills.after(calls)
        with suppress(Killed):
            give_name(tmp_path / "place" / "scratch" / "made", target, overwrite=True)
        killed = kills.killed
        kills.never()
        recover_replaced(target)
        content = (target / "file" if target.is_dir() else target).read_text()
        found.add(content)
        assert sorted(path.name for path in target.parent.iterdir()) == ["scratch", "served"]
        assert (elsewhere / "file").read_text() == "old"
        if not killed:
            assert content == "new"
            break
    assert found == {"old", "new"}


def test_a_killed_conversion_loses_no_export(tmp_path: Path, llama: tuple[Path, Assets], kills: Kills) -> None:
    """After a kill anywhere, neither a failing conversion nor giving up deletes the export; the next one succeeds."""
    target = tmp_path / "place" / "served"
    old = export_files(convert(llama[0], tmp_path / "old", assets=llama[1]).path)
    new = export_files(convert(llama[0], tmp_path / "new", assets=llama[1], dtype="bfloat16").path)
    killed = 0
    for calls in range(100):
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        shutil.copytree(tmp_path / "old", target)
        kills.after(calls)
        try:
            convert(llama[0], target, assets=llama[1], dtype="bfloat16", overwrite=True, workers=1)
        except Killed:
            killed += 1
        else:
            break
        finally:
            kills.never()
        with pytest.raises(errors.ArgumentError):
            convert(llama[0], target, assets=llama[1], overwrite=True, max_shard_bytes=0)
        assert export_files(target) in (old, new)
        abandon_conversion(target)
        assert export_files(target) in (old, new)
        convert(llama[0], target, assets=llama[1], dtype="bfloat16", overwrite=True)
        assert export_files(target) == new
        assert list(target.parent.iterdir()) == [target]
    assert killed > 3


def test_a_killed_import_loses_no_checkpoint(tmp_path: Path, llama: tuple[Path, Assets], kills: Kills) -> None:
    """The same of `import_hf`."""
    source = convert(llama[0], tmp_path / "hf", assets=llama[1]).path
    old = export_files(import_hf(source, tmp_path / "old").path)
    new = export_files(import_hf(source, tmp_path / "new", dtype="bfloat16").path)
    target = tmp_path / "place" / "dcp"
    killed = 0
    for calls in range(100):
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        shutil.copytree(tmp_path / "old", target)
        kills.after(calls)
        try:
            import_hf(source, target, dtype="bfloat16", overwrite=True)
        except Killed:
            killed += 1
        else:
            break
        finally:
            kills.never()
        with pytest.raises(errors.ExportExistsError):
            import_hf(source, target)
        assert export_files(target) in (old, new)
    assert killed > 1
    assert export_files(target) == new


def test_a_name_that_is_taken_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process puts there between two renames is left alone, and the old content is kept and named."""

    def unsupported(first: Path, second: Path) -> bool:
        return False

    rename_new = durable.rename_new

    def taken(source: Path, name: Path) -> None:
        fill(name, "theirs")
        rename_new(source, name)

    monkeypatch.setattr(durable, "exchange", unsupported)
    monkeypatch.setattr(durable, "rename_new", taken)
    fill(tmp_path / "scratch" / "made", "new")
    fill(tmp_path / "served", "old")
    with pytest.raises(errors.ExportExistsError, match=r"What it was before is .*\.replaced-"):
        give_name(tmp_path / "scratch" / "made", tmp_path / "served", overwrite=True)
    recover_replaced(tmp_path / "served")
    [kept] = tmp_path.glob(".replaced-*")
    assert [(path / "file").read_text() for path in (tmp_path / "served", kept)] == ["theirs", "old"]


def test_recovery_takes_nothing_of_others(tmp_path: Path) -> None:
    """A directory kept for a target whose name begins or ends alike is not touched."""
    for name in ("a-1", "1-a", "a"):
        fill(tmp_path / f".replaced-64-99-{name}", name)
    recover_replaced(tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "a"
    assert len(list(tmp_path.glob(".replaced-*"))) == 2


def export_files(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file below a directory."""
    return {name: path.read_bytes() for name, path in durable.files_below(directory)}
