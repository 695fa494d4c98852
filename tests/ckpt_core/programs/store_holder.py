"""Holds something of a store until its standard input ends: `store_holder.py lease|stage STORE`."""

import sys

from ckpt_core.store import LocalStore

kind, root = sys.argv[1:]
store = LocalStore(root)
if kind == "lease":
    checkpoint = store.latest("race")
    assert checkpoint is not None
    with checkpoint.lease():
        print(checkpoint.step, flush=True)
        sys.stdin.read()
else:
    staging = store.stage("race", 99)
    (staging.path / "half").write_bytes(b"half")
    print(staging.path, flush=True)
    sys.stdin.read()
