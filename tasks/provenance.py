"""What a training's checkpoints record of the code that made them."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

_LIBRARIES = ("ckptflow", "torch", "transformers", "safetensors", "tokenizers")


def code_revision(directory: Path | None = None) -> str:
    """Return the git commit of a directory, by default the working directory, with `-dirty` where files were changed.

    Outside of a repository it is this package's version: the code is then what was installed.
    """
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return f"ckptflow {version('ckptflow')}"
    return done.stdout.strip()


def libraries() -> dict[str, str]:
    """Return the versions of what decides the weights; imports none of it."""
    return {name: version(name) for name in _LIBRARIES}
