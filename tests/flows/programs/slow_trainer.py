"""Our worker, slowed down by as many seconds a step as the file says that CKPTFLOW_SLOW names, if there is one."""

import os
import sys
import time
from pathlib import Path

from tasks.worker import __main__ as worker
from tasks.worker import batches

SLOW = Path(os.environ["CKPTFLOW_SLOW"])
batch_at_once = batches.batch


def batch(*args, **options):
    """Return a batch, later."""
    if SLOW.exists():
        time.sleep(float(SLOW.read_text()))
    return batch_at_once(*args, **options)


batches.batch = batch  # before the loop, which takes it, is imported

if __name__ == "__main__":
    sys.exit(worker.main(sys.argv[1:]))
