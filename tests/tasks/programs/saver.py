"""Saves for two seconds on SIGTERM, printing more than a pipe holds, into the file that it is given."""

import signal
import sys
import time
from pathlib import Path


def save(*_: object) -> None:
    """Save, slowly and loudly, then leave."""
    print("saving " + "." * 200_000, flush=True)
    time.sleep(2)
    Path(sys.argv[1]).write_text("state")
    print("saved", flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    time.sleep(60)
