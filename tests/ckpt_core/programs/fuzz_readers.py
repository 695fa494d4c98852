"""Feeds readers what libFuzzer makes of valid files, led by which of their lines it reaches.

    python programs/fuzz_readers.py DIRECTORY -max_total_time=SECONDS -seed=NUMBER ...

The first byte of an input chooses the file that the rest replaces. Anything but a named error ends it with a status
that is not 0; the input is then in DIRECTORY.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ckpt_core"]):
    import ckpt_core.io

assert ckpt_core.io
from fuzzing import Samples  # noqa: E402 - what it imports is to be instrumented


def main(directory: Path, options: list[str]) -> None:
    """Fuzz until the time is over."""
    samples = Samples(directory)
    names = list(samples.good)
    corpus = directory / "corpus"
    corpus.mkdir()
    for number, name in enumerate(names):
        (corpus / name).write_bytes(bytes([number]) + samples.good[name])

    def one(data: bytes) -> None:
        if data:
            assert samples.outcome(names[data[0] % len(names)], data[1:]) in {"equal", "refused"}

    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={directory}/", str(corpus)], one)
    atheris.Fuzz()


main(Path(sys.argv[1]), sys.argv[2:])
