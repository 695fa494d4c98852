"""What checkpoints record of the code that made them."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

from tasks import provenance


def git(directory: Path, *arguments: str) -> str:
    """Run git in a directory, as somebody."""
    somebody = ["-c", "user.name=Some Body", "-c", "user.email=some@body.test"]
    command = ["git", *somebody, *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout.strip()


def test_a_repository_tells_its_commit_and_whether_files_were_changed(tmp_path: Path):
    """The full commit, with `-dirty` once a tracked file differs from it; a new file beside changes nothing."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "train.py").write_text("steps = 1\n")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "--quiet", "--message", "Train")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("new\n")
    assert provenance.code_revision(tmp_path) == commit
    (tmp_path / "train.py").write_text("steps = 2\n")
    assert provenance.code_revision(tmp_path) == f"{commit}-dirty"


def test_elsewhere_it_is_the_version_of_this_package(tmp_path: Path):
    """Outside of a repository the code is what was installed."""
    assert provenance.code_revision(tmp_path) == f"ckptflow {version('ckptflow')}"


def test_libraries_are_told_by_version():
    """Those that decide the weights are all there."""
    assert provenance.libraries()["torch"] == version("torch")
    assert provenance.libraries()["ckptflow"] == version("ckptflow")
