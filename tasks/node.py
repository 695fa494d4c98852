"""A further node of training jobs: `python -m tasks.node STORE RUN`, on each machine but the one that runs the flow.

It waits for the jobs of a run, takes part in each, prints the lines of its own ranks, and waits on, until TERM or
Ctrl-C: then its ranks commit a checkpoint with all others, and it ends. It needs the store at the same path as on the
other machines, and a network on which they reach each other; the store tells the rest. Where a job needs fewer nodes
than are waiting, the others are spare.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ckpt_core.errors import CkptError
from ckpt_core.store import local_path
from tasks.nodes import answer, read_call

POLL_S = 1.0
_STOPPED = 128 + signal.SIGTERM


def serve(directory: Path, on_line: Callable[[str], None]) -> None:
    """Take part in each job of a run, until an exception from outside."""
    answered = ""
    while True:
        call = read_call(directory)
        if call is not None and call.id != answered:
            on_line(f"job to step {call.job.end_step}: joining at {call.job.compute.rendezvous}")
            note = answer(directory, call, on_line)
            on_line(f"job to step {call.job.end_step}: {note.state}{note.reason and ': '}{note.reason}")
            answered = call.id
        time.sleep(POLL_S)


def main(arguments: list[str]) -> int:
    """Serve until stopped; return the exit status: 143 after TERM, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tasks.node", description="A further node of training jobs.")
    parser.add_argument("store", help="the directory, or file URL, of the store that the flow trains to")
    parser.add_argument("run", help="the run whose jobs to take part in")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
    try:
        directory = local_path(options.store) / options.run
        _print(f"waiting for the jobs of {directory}")
        serve(directory, _print)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except CkptError as error:
        _print(str(error))
        return 1
    return 0


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
