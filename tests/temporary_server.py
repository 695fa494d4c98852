"""Prefect servers of tests: their empty database is made once for all, which takes longer than the rest of a start."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch


@contextmanager
def temporary_server(home: Path, base: Path, **settings: Any) -> Iterator[Path]:
    """Run a server that flows of this process report to.

    Args:
        home: a directory for what the server and its clients keep.
        base: pytest's directory of this process's temporary ones.
        settings: Prefect's, by their names.

    Yields:
        Prefect's home.
    """
    from prefect import settings as prefect
    from prefect.testing.utilities import prefect_test_harness

    own = {getattr(prefect, name): value for name, value in {"PREFECT_HOME": home / "prefect", **settings}.items()}
    database = home / "database"
    copy_database(database / "prefect-test.db", base)
    with (
        prefect.temporary_settings(own),
        patch("prefect.testing.utilities.mkdtemp", lambda: str(database)),
        prefect_test_harness(server_startup_timeout=180),
    ):
        yield home / "prefect"


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
