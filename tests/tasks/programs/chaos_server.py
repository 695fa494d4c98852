"""Runs training ranks for `programs/chaos_rank.py`: forked from a process that has imported all that they need.

    python programs/chaos_server.py SOCKET

The first line of standard input says, in JSON, where the prepared data lies. Each connection to SOCKET brings its
environment, the directory to train in and where its output goes; it is answered with the exit status. A rank whose
client goes away is killed. The server ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

import ckpt_chaos
import transformers.models.llama.modeling_llama  # noqa: F401 - loaded before the ranks are forked
from worker_support import tiny_job

import tasks.worker.loop
import tasks.worker.place  # noqa: F401 - loaded before the ranks are forked
from tasks.worker.__main__ import main as train

ARM = Path(ckpt_chaos.__file__).parent / "_boot" / "sitecustomize.py"
STEPS, EVERY = 4, 2


def rank(prepared: dict[str, str], store: str, environment: dict[str, str], outputs: list[int]) -> int:
    """Be a rank as if freshly started: with the environment and output of its client, and ckpt-chaos in it."""
    os.dup2(outputs[0], 1)
    os.dup2(outputs[1], 2)
    os.environ.clear()
    os.environ.update(environment)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    job = tiny_job(prepared, Path(store), end_step=STEPS, ranks=ranks, checkpoint_every=EVERY, evaluate_every=EVERY)
    path = Path(f"{store}.{os.environ.get('RANK', '0')}.json")
    path.write_text(job.model_dump_json())
    runpy.run_path(str(ARM))
    return train([str(path)])


def forked_rank(*arguments: object) -> int:
    """Fork a rank; return its process id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        code = rank(*arguments)  # pyright: ignore[reportArgumentType] - as `rank` takes them
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - shown, and never back into the server's loop
        traceback.print_exc()
    finally:
        os._exit(code)


def serve(connection: socket.socket, prepared: dict[str, str]) -> None:
    """Run one rank; tell its exit status, or kill it when nobody listens any more."""
    message, outputs, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    request = json.loads(message)
    process = forked_rank(prepared, request["store"], request["environment"], outputs)
    gone = threading.Thread(target=_kill_when_gone, args=(connection, process), daemon=True)
    gone.start()
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(OSError):
        connection.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))


def _kill_when_gone(connection: socket.socket, process: int) -> None:
    connection.recv(1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def main(address: str) -> None:
    """Serve each connection in a process of its own."""
    prepared = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    gc.freeze()  # a collection would touch, and so copy, every page that is shared
    print("ready", flush=True)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    while not any(key.fileobj is sys.stdin for key, _ in waiting.select()):
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve(connection, prepared)
            os._exit(0)
        connection.close()


main(*sys.argv[1:])
