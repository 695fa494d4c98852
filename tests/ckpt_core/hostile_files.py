"""Damaged and hostile files, and a bound on what reading them may cost."""

import pickle
import resource
import time
from contextlib import contextmanager
from pathlib import Path

ROOM_BYTES = 512 << 20


class Evil:
    """Its pickle, loaded the ordinary way, makes a file."""

    def __init__(self, mark, how="os.system"):
        self.mark, self.how = mark, how

    def __reduce__(self):
        if self.how == "os.system":
            import os

            return os.system, (f"touch {self.mark}",)
        return eval, (f"__import__('pathlib').Path({str(self.mark)!r}).touch()",)


@contextmanager
def cheap(seconds=5.0):
    """Reading takes less than `seconds` of a processor, and no more memory than there is room for."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, before[1]))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < seconds


def metadata_of(directory):
    """Return torch's own metadata object of a DCP directory that the test made."""
    return pickle.loads((directory / ".metadata").read_bytes())


def write_metadata(directory, metadata):
    """Replace a DCP directory's metadata by an object's pickle."""
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def rewrite(directory, change):
    """Change the metadata of a DCP directory."""
    metadata = metadata_of(directory)
    change(metadata)
    write_metadata(directory, metadata)


def tuple_bomb(depth=64):
    """Opcodes that put a tuple of 2 ** depth atoms on the stack."""
    return b"\x88\x85\x94" + b"".join(b"h" + bytes([n]) + b"\x86\x94" for n in range(depth))
