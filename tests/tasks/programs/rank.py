"""A rank that needs no torch; what it does is its first argument."""

import os
import signal
import sys
import time
from pathlib import Path


def on_term(*_: object) -> None:
    """Save for two seconds, then leave."""
    print("saving", flush=True)
    time.sleep(2)
    (folder / f"saved_{rank}").touch()
    sys.exit(0)


rank = int(os.environ["RANK"])
kind, folder = sys.argv[1], Path(sys.argv[2])
if kind == "deaf" and rank == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, on_term)
print("half a line, ", end="", flush=True)
print(f"pid {os.getpid()} of {os.environ['WORLD_SIZE']}", flush=True)
print("threads", os.environ["OMP_NUM_THREADS"], "run", os.environ["TORCHELASTIC_RUN_ID"], flush=True)
if kind == "raise" and rank == 1:
    raise ValueError("no such batch: 7")
while kind != "end":
    time.sleep(0.1)
