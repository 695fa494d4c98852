"""A rank on several nodes that needs no torch; what it does is in its job's lineage."""

import json
import os
import signal
import sys
import time
from pathlib import Path

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
lineage = json.loads(Path(sys.argv[1]).read_text())["lineage"]
print(f"rank {rank} of {world}, does {lineage['does']}", flush=True)
while world > lineage["until"]:
    if lineage["does"] == "die" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if lineage["does"] == "raise" and rank == 1:
        raise ValueError("no such batch: 7")
    time.sleep(0.1)
