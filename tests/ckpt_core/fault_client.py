"""The other end of `programs/fault_server.py`: saves whose processes are known before they begin."""

import json
import subprocess
import sys
from pathlib import Path

from programs import fault_state

PROGRAMS = Path(fault_state.__file__).parent


class FaultServer:
    """A process that has torch loaded already, and forks ranks that save a step."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "programs.fault_server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROGRAMS.parent,
            env={"PYTHONPATH": f"{PROGRAMS.parent}:{PROGRAMS.parents[2]}", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert self._process.stdout.readline() == "ready\n"

    def prepare(self, store, step, ranks):
        """Fork ranks that are to save a step; return their process ids. They wait for `go`."""
        self._tell("save", ranks, str(store), step)
        return self._hear()

    def go(self):
        """Let them save."""
        self._tell("go")

    def outcomes(self):
        """Wait until all have ended; return for each `committed`, the class and text of its error, or `died N`."""
        return self._hear()

    def newest(self, store):
        """Return the newest committed step, bit for bit what was saved, or what is wrong with it."""
        self._tell("newest", str(store))
        return self._hear()

    def every(self, store):
        """Return all steps, each bit for bit what was saved, or what is wrong with them."""
        self._tell("every", str(store))
        return self._hear()

    def _tell(self, *request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _hear(self):
        return json.loads(self._process.stdout.readline())

    def close(self):
        """End it; ranks that were not told to go end too."""
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
