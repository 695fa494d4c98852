"""A reader, writer or pruner of a run, for some seconds: `store_racer.py ROLE URL SECONDS FIRST_STEP STRIDE`.

Every file of a step repeats the step's number, so that a mix of two steps shows. Prints how often it did its work; a
step that is half there, mixed or older than one seen before ends it with an assertion.
"""

import sys
import time

from ckpt_core import durable
from ckpt_core.errors import NotACheckpointError
from ckpt_core.format.manifest import Manifest, record_file
from ckpt_core.retention import Retention
from ckpt_core.store import Store, open_store

RUN = "race"
FILES = ("model/a.bin", "model/b.bin", "trainer/state.json")


def content(step: int, name: str) -> bytes:
    """What a file of a step holds."""
    return f"{step:010d}".encode() * (1 + (step * 7 + len(name)) % 5000)


def commit(store: Store, step: int) -> None:
    """Write and commit a step."""
    staging = store.stage(RUN, step)
    try:
        for name in FILES:
            durable.make_parents(staging.path / name)
            durable.write_new(staging.path / name, content(step, name))
        records = {name: record_file(staging.path / name) for name in FILES}
        staging.commit(Manifest(run=RUN, step=step, time="2026-01-01", world_size=1, files=records))
    finally:
        store.release(staging)


def read(store: Store, newest: int) -> int:
    """Read the newest step whole under a lease; return its number, or the one before if a pruner was faster."""
    checkpoint = store.latest(RUN)
    assert checkpoint is not None, "no checkpoint, where there always is one"
    assert checkpoint.step >= newest, f"step {checkpoint.step} after {newest}"
    try:
        with checkpoint.lease():
            for name in FILES:
                assert (checkpoint.root / name).read_bytes() == content(checkpoint.step, name), f"{name} is mixed"
                assert record_file(checkpoint.root / name) == checkpoint.manifest.files[name]
    except NotACheckpointError:
        return newest
    return checkpoint.step


def main() -> None:
    """Do the role's work until the time is over."""
    role, url, seconds, step, stride = *sys.argv[1:3], *map(float, sys.argv[3:])
    store, end, count, newest = open_store(url), time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        match role:
            case "write":
                commit(store, int(step))
                step += stride
            case "read":
                newest = read(store, newest)
            case "list":
                steps = [c.step for c in store.list(RUN)]
                assert steps == sorted(set(steps))
            case "prune":
                assert store.prune(RUN, Retention(keep_last=2)).errors == ()
        count += 1
    print(count)


if __name__ == "__main__":
    main()
