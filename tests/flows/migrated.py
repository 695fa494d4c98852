"""An empty database of a Prefect server, made once for all tests that run: to make one takes longer than all else."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path


def copy_database(target: Path, base: Path) -> None:
    """Put a database where a server will look for its own.

    Args:
        target: the file.
        base: pytest's directory of this process's temporary ones.
    """
    shared = base.parent if base.name.startswith("popen-") else base  # of all of pytest-xdist's processes
    home = shared / "migrated"
    home.mkdir(exist_ok=True)
    with (shared / "migrated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "done").exists():
            env = {**os.environ, "PREFECT_HOME": str(home)}
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
            subprocess.run(command, env=env, cwd=home, capture_output=True, check=True, timeout=240)
            (home / "done").touch()
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(home / "prefect.db", target)
