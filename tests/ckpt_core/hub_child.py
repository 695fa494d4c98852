"""Runs code that uses the real Hub client in a fresh process: its settings are read once, at import."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any


def child_environment_for(endpoint: str, home: Path, token: str | None = None) -> dict[str, str]:
    """Return a whole environment for a child that speaks to `endpoint` and has its own HF_HOME."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    hub = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **hub, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **({"HF_TOKEN": token} if token else {})}


def run_child(code: str, environment: dict[str, str]) -> Any:
    """Run Python code in a fresh process and return what its last line of output holds as JSON."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
