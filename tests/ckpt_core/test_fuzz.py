"""Whatever the bytes of a checkpoint's files are, a reader returns what was saved or raises a named error, soon.

Hypothesis changes bytes, JSON documents, pickle opcodes and the headers of zips; libFuzzer, through atheris, changes
what leads it to new lines of the readers.
"""

import copy
import importlib.util
import json
import os
import pickletools
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzzing
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_core.format.index import METADATA_NAME, TWIN_NAME
from ckpt_core.format.manifest import MANIFEST_NAME

PROGRAMS = Path(__file__).parent / "programs"
LONG = pytest.param(True, marks=[pytest.mark.long, pytest.mark.timeout(3600)])
FORMS = pytest.mark.parametrize("long", [False, LONG], ids=["short", "long"])


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Valid files to change."""
    return fuzzing.Samples(tmp_path_factory.mktemp("fuzz"))


@st.composite
def changed_bytes(draw, good):
    """A few places changed, cut out, doubled or put elsewhere; or the end cut off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, len(data))), draw(st.sampled_from([1, 1, 1, 2, 4, 8, 30]))
        how = draw(st.sampled_from(["flip", "set", "cut", "insert", "move", "end"]))
        part = bytes(data[place : place + length])
        if how == "flip" and part:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            data[place : place + length] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * length
        elif how == "cut":
            del data[place : place + length]
        elif how == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif how == "move":
            other = draw(st.integers(0, len(data)))
            data[other : other + length] = part
        elif how == "end":
            del data[place:]
    return bytes(data)


JUNK = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**62, 2**63, 2**200, 0.0, 1.5, float("nan"), float("inf"),
    "", "x", ".", "..", "../x", "/dev/zero", "a\0b", "\ud800", "float32", "int64", "__0_0.distcp",
    [], {}, [[]], [0], [4, 3], {"x": 1}, [None] * 70,
]  # fmt: skip


def _places(document, path=()):
    """Yield the path of each node of a JSON document."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _at(document, path):
    for key in path:
        document = document[key]
    return document


@st.composite
def changed_json(draw, good):
    """One to three nodes replaced by junk or by another node, taken out, doubled, or given another name."""
    document = json.loads(good)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in _places(document) if path]
        if not paths:
            break
        *above, key = draw(st.sampled_from(paths))
        parent = _at(document, above)
        how = draw(st.sampled_from(["junk", "junk", "other", "delete", "double", "rename"]))
        if how == "junk":
            parent[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        elif how == "other":
            parent[key] = copy.deepcopy(_at(document, draw(st.sampled_from(paths))))
        elif how == "delete":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, parent[key])
        else:
            parent[draw(st.sampled_from(["x", "", "model.z", "\0"]))] = (
                parent[key] if how == "double" else parent.pop(key)
            )
    return json.dumps(document).encode()


def _opcodes(good):
    """Split a pickle into its opcodes, each with its argument."""
    starts = [place for *_, place in pickletools.genops(good)]
    return [good[start:end] for start, end in zip(starts, [*starts[1:], len(good)], strict=True)]


CODES = [
    b".", b"(", b"0", b"1", b"2", b"N", b"\x88", b"\x89", b"]", b"}", b")", b"l", b"d", b"t", b"\x85", b"\x86", b"\x87",
    b"e", b"a", b"s", b"u", b"b", b"R", b"\x81", b"\x92", b"\x93", b"\x94", b"h\x00", b"h\x05", b"Q", b"\x8f", b"\x90",
    b"\x91", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"K\xff", b"J\xff\xff\xff\xff", b"\x82\x01", b"Pid\n",
    b"V../x\n", b"\x8a\x08" + b"\xff" * 8, b"G" + b"\xff" * 8, b"\x8d" + b"\xff" * 8, b"\x95" + b"\xff" * 7 + b"\x7f",
    b"\x96" + b"\0" * 8, b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x08builtins\x8c\x04eval\x93",
    b"\x8c\x0cimport os; 1\x85R", b"ibuiltins\neval\n",
]  # fmt: skip
"""Opcodes with their arguments: each kind, and some that ask for code or for much."""


@st.composite
def changed_pickle(draw, good):
    """Opcodes taken out, doubled, put elsewhere, or others put in."""
    codes = _opcodes(good)
    for _ in range(draw(st.integers(1, 4))):
        place, other = draw(st.integers(0, len(codes) - 1)), draw(st.integers(0, len(codes) - 1))
        how = draw(st.sampled_from(["delete", "double", "swap", "insert", "replace"]))
        if how == "delete" and len(codes) > 1:
            del codes[place]
        elif how == "double":
            codes.insert(other, codes[place])
        elif how == "swap":
            codes[place], codes[other] = codes[other], codes[place]
        elif how == "insert":
            codes.insert(place, draw(st.sampled_from(CODES)))
        elif how == "replace":
            codes[place] = draw(st.sampled_from(CODES))
    return b"".join(codes)


NUMBERS = [0, 1, 8, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF]


@st.composite
def changed_zip(draw, good):
    """Fields in the headers of the zips that a shard is made of, set to numbers that ask for much or for nothing."""
    data = bytearray(good)
    headers = [match.start() for match in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", good)]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(headers)) + draw(st.integers(0, 56))
        form = draw(st.sampled_from(["<H", "<I", "<Q"]))
        number = draw(st.sampled_from(NUMBERS)) % (1 << 8 * struct.calcsize(form))
        if place + struct.calcsize(form) <= len(data):
            struct.pack_into(form, data, place, number)
    return bytes(data)


@st.composite
def changed_header(draw, good):
    """Nodes of the header of a safetensors file changed, under its true length."""
    length = int.from_bytes(good[:8], "little")
    header = draw(changed_json(good[8 : 8 + length]))
    return len(header).to_bytes(8, "little") + header + good[8 + length :]


CHANGES = {
    "bytes of metadata": (METADATA_NAME, changed_bytes),
    "opcodes of metadata": (METADATA_NAME, changed_pickle),
    "bytes of the twin": (TWIN_NAME, changed_bytes),
    "nodes of the twin": (TWIN_NAME, changed_json),
    "bytes of a shard": (fuzzing.SHARD, changed_bytes),
    "headers of a shard": (fuzzing.SHARD, changed_zip),
    "bytes of a manifest": (MANIFEST_NAME, changed_bytes),
    "nodes of a manifest": (MANIFEST_NAME, changed_json),
    "bytes of safetensors": (fuzzing.WEIGHTS, changed_bytes),
    "header of safetensors": (fuzzing.WEIGHTS, changed_header),
}


@FORMS
@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=list(CHANGES))
def test_changed_files(samples, capsys, name, change, long):
    """A file that was changed gives what was saved, or a named error; nothing runs, hangs or fills the memory."""
    outcomes = Counter()

    @settings(
        max_examples=20_000 if long else 150,
        deadline=None,
        database=None,
        derandomize=not long,
        suppress_health_check=list(HealthCheck),
    )
    @given(change(samples.good[name]))
    def look(data):
        outcomes[samples.outcome(name, data)] += 1

    look()
    with capsys.disabled():
        print(f"\n{name}, {change.__name__}: {dict(outcomes)}")
    assert set(outcomes) <= {"equal", "refused"}
    assert outcomes["refused"] > sum(outcomes.values()) / 10


@FORMS
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris, of PyPI")
def test_atheris(tmp_path, capsys, long):
    """What libFuzzer finds in seconds, or minutes in the long form, gives what was saved or a named error."""
    seconds = 600 if long else 8
    options = [f"-max_total_time={seconds}", f"-seed={0 if long else 1}", "-timeout=20", "-rss_limit_mb=4096"]
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "fuzz_readers.py"), str(tmp_path), *options],
        capture_output=True, text=True, timeout=seconds + 120, check=False,
        env={**os.environ, "PYTHONPATH": f"{PROGRAMS.parent}:{PROGRAMS.parents[2]}"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    with capsys.disabled():
        print(f"\natheris: {runs[1]} inputs in {seconds} s")
    assert int(runs[1]) > 100


def test_the_watch_sees(tmp_path, samples):
    """The watch over the readers is awake: what it is to find is found."""
    actions = [
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=False),
        lambda: (tmp_path / "x").write_text(""),
        lambda: os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT),
        lambda: eval(compile("1", "", "eval")),
    ]
    for action in actions:
        with pytest.raises(fuzzing.RanError), fuzzing.harmless():
            action()
    assert not list(tmp_path.iterdir())
