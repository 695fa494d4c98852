"""Forks processes that save a step, each stopped until it is told to go, so that a tracer can be attached.

Each line of standard input is a request in JSON, and each answer one line of JSON:

- `["save", RANKS, STORE, STEP]`: the process ids. The next line lets them go; the second answer is how each ended:
  `committed`, the class and text of its error, or `died N`.
- `["newest", STORE]`: the newest committed step, after all of it was restored and found to be what was saved; or the
  class and text of the error.
- `["every", STORE]`: the same of all steps.
"""

import gc
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from programs import fault_state

PATIENCE = timedelta(seconds=20)


def rank_main(rank: int, ranks: int, meeting: str, go: int, outcome: int, store: Path, step: int) -> None:
    """Be one rank: connect, say so, wait, save, and tell how it went."""
    if ranks > 1:
        import torch.distributed as dist

        files = dist.FileStore(meeting, ranks)
        dist.init_process_group("gloo", store=files, rank=rank, world_size=ranks, timeout=PATIENCE)
        dist.barrier()
    os.write(outcome, b"\n")
    os.read(go, 1)
    try:
        fault_state.save(store, step)
        said = "committed"
    except Exception as error:  # noqa: BLE001 - it is told
        said = f"{type(error).__name__}: {error}"
    os.write(outcome, said.encode())


def fork(*arguments: Any) -> tuple[int, int, int]:
    """Fork a rank; return its process id, and the pipes to start it and to hear how it went."""
    (go_here, go), (outcome, outcome_there) = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        try:
            rank_main(*arguments[:3], go_here, outcome_there, *arguments[3:])
        finally:
            os._exit(0)
    os.close(go_here)
    os.close(outcome_there)
    return process, go, outcome


def hear(process: int, outcome: int) -> str:
    """Wait for the end of a rank; return what it said, or how it died."""
    said = b""
    while part := os.read(outcome, 1 << 16):
        said += part
    os.close(outcome)
    _, status = os.waitpid(process, 0)
    return said.decode() or f"died {os.WTERMSIG(status)}"


def serve(ranks: int, store: Path, step: int) -> None:
    """Run one save."""
    with tempfile.TemporaryDirectory() as directory:
        forked = [fork(rank, ranks, f"{directory}/meeting", store, step) for rank in range(ranks)]
        for _, _, outcome in forked:
            os.read(outcome, 1)
        print(json.dumps([process for process, _, _ in forked]), flush=True)
        sys.stdin.readline()
        for _, go, _ in forked:
            os.write(go, b"\n")
            os.close(go)
        print(json.dumps([hear(process, outcome) for process, _, outcome in forked]), flush=True)


def look(see: Callable[[Path], Any], store: Path) -> Any:
    """Return what is there, or what is wrong with it."""
    try:
        return see(store)
    except Exception as error:  # noqa: BLE001 - it is told
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Load everything that a save needs, once; then serve."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "assets").mkdir()
        fault_state.save(Path(directory) / "store", 1)
        fault_state.newest(Path(directory) / "store")
    gc.freeze()  # a collection would touch, and so copy, every page that is shared
    print("ready", flush=True)
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        if request == "save":
            ranks, store, step = arguments
            serve(ranks, Path(store), step)
        else:
            print(json.dumps(look(getattr(fault_state, request), Path(arguments[0]))), flush=True)


main()
