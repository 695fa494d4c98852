"""A process that has imported all that a rank needs, and forks ranks: a start then takes no seconds.

`RankServer` is the client; the program reads one JSON request a line and answers with one JSON line.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker_support import REPOSITORY, write_job

_LONGEST_RUN_S = 120.0


class RankServer:
    """Runs jobs in ranks that can be killed at any moment."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )

    def run(
        self, job: Any, *, ranks: int | None = None, kill_after: float | None = None, term_at: str | None = None
    ) -> dict[str, Any]:
        """Run a job in new ranks, one process group; return `codes`, `seconds`, `killed` and `output`.

        Args:
            job: what to run; its store's parent takes the files.
            ranks: by default those of the job.
            kill_after: send SIGKILL to all of them this many seconds after their start.
            term_at: send SIGTERM to all of them when this text is in their output.
        """
        output = Path(f"{job.store}.output")
        request = {
            "job": str(write_job(job)),
            "ranks": ranks or job.compute.ranks,
            "output": str(output),
            "kill_after": kill_after,
            "term_at": term_at,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline()) | {"output": output.read_text()}

    def close(self) -> None:
        """End the server."""
        self._process.communicate(timeout=30)


def _serve() -> None:
    sys.path.insert(0, str(REPOSITORY))
    os.environ["OMP_NUM_THREADS"] = "1"
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tasks.worker.loop
    import tasks.worker.place  # noqa: F401

    gc.freeze()  # a collection would touch, and so copy, every page that is shared
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(**json.loads(line))) + "\n")
        sys.stdout.flush()


def _run(*, job: str, ranks: int, output: str, kill_after: float | None, term_at: str | None) -> dict[str, Any]:
    Path(output).write_bytes(b"")
    port, started = _free_port(), time.monotonic()
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _become_rank(rank, ranks, port, group=pids[0] if pids else 0, job=job, output=output)
        pids.append(pid)
        os.setpgid(pid, pids[0])  # also here: whoever of the two comes first
    codes, killed = _wait(pids, started, output, kill_after, term_at)
    return {"codes": codes, "killed": killed, "seconds": time.monotonic() - started}


def _become_rank(rank: int, ranks: int, port: int, *, group: int, job: str, output: str) -> None:
    code = 70
    try:
        os.setpgid(0, group)
        handle = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from tasks.worker.__main__ import main

        code = main([job])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - shown, and never back into the server's loop
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(
    pids: list[int], started: float, output: str, kill_after: float | None, term_at: str | None
) -> tuple[list[int], bool]:
    """Wait for all ranks, and send what is to be sent meanwhile; one that fails takes the others along."""
    codes: dict[int, int] = {}
    killed = termed = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        age = time.monotonic() - started
        failed = any(code not in {0, 128 + signal.SIGTERM} for code in codes.values())
        if not killed and (failed or age > (kill_after or _LONGEST_RUN_S)):
            _signal_rest(pids, codes, signal.SIGKILL)
            killed = True
        if term_at and not termed and term_at in Path(output).read_text():
            _signal_rest(pids, codes, signal.SIGTERM)
            termed = True
        time.sleep(0.002)
    return [codes[pid] for pid in pids], killed


def _signal_rest(pids: list[int], codes: dict[int, int], number: signal.Signals) -> None:
    for pid in pids:
        if pid not in codes:
            os.kill(pid, number)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    _serve()
