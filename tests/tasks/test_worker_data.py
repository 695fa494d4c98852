"""Where text comes from, which of it is used, and what happens when there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from worker_support import REPOSITORY, write_text

from ckpt_core.errors import ArgumentError
from tasks.config import DataSettings
from tasks.worker.documents import fingerprint, read_documents, split_documents


def read(source, **settings):
    """Read a source with everything else as by default, or as given."""
    return read_documents(DataSettings(**{"source": str(source), "heldout_every": 2} | settings))


def texts(documents):
    """Return the texts, sorted."""
    return sorted(d.text for d in documents)


def test_standard_library_is_read_without_its_tests():
    """The default source gives the standard library's modules, up to the limit, and no test modules."""
    documents = read("python-stdlib", max_megabytes=1.0)
    assert sum(d.size for d in documents) == pytest.approx(1_000_000, abs=4)
    everything = read("python-stdlib", max_megabytes=None)
    assert any("class JSONDecoder" in d.text for d in everything)
    assert not any("class TestDump:" in d.text for d in everything)


def test_directory_and_glob_and_file(tmp_path):
    """A directory is read with what lies below it, hidden files aside; a glob and a file are read as named."""
    for name in ("a.txt", "b/c.txt", "b/d.md", ".hidden/e.txt", "b/.f"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n")
    assert len(texts(read(tmp_path))) == 3
    assert texts(read(f"{tmp_path}/**/*.txt")) == ["text of a.txt\n", "text of b/c.txt\n"]
    assert sum(d.size for d in read(tmp_path / "a.txt")) == len("text of a.txt\n")


def test_jsonl_field(tmp_path):
    """Each row of a JSONL file is a document; blank lines are none."""
    rows = [json.dumps({"body": f"row {i}", "id": i}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(rows) + "\n")
    assert texts(read(tmp_path / "rows.jsonl", text_field="body")) == ["row 0", "row 1", "row 2", "row 3"]


def test_hub_dataset(tmp_path):
    """`hf:NAME` reads a data set through `datasets`, and names the split that is not there."""
    (tmp_path / "set").mkdir()
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(4))
    (tmp_path / "set" / "train.jsonl").write_text(rows)
    program = (
        "import sys\n"
        "from tasks.config import DataSettings\n"
        "from tasks.worker.documents import read_documents\n"
        "source, split, field = sys.argv[1:]\n"
        "settings = DataSettings(source=source, split=split, text_field=field, heldout_every=2)\n"
        "print(sorted(d.text for d in read_documents(settings)))\n"
    )

    def child(source, split="train", field="text"):
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        arguments = [sys.executable, "-W", "error::UserWarning", "-c", program, f"hf:{source}", split, field]
        return subprocess.run(
            arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    good = child(tmp_path / "set")
    assert good.stdout == "['row 0', 'row 1', 'row 2', 'row 3']\n", good.stderr
    assert good.stderr == ""
    assert "ArgumentError: Hub dataset" in (bad := child(tmp_path / "set", split="nosplit").stderr)
    assert "nosplit" in bad
    assert "row 0: no field 'body', only ['text']" in child(tmp_path / "set", field="body").stderr
    assert "ArgumentError: Hub dataset 'nobody/nothing'" in child("nobody/nothing").stderr


def test_order_does_not_depend_on_names(tmp_path):
    """The same texts under other names give the same documents in the same order."""
    write_text(tmp_path / "one")
    (tmp_path / "two").mkdir()
    for number, path in enumerate(sorted((tmp_path / "one").iterdir())):
        (tmp_path / "two" / f"{100 - number}.text").write_bytes(path.read_bytes())
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one == two
    assert fingerprint(one) == fingerprint(two)


def test_limit_takes_a_prefix_in_digest_order(tmp_path):
    """A limit keeps the first documents in the order of their digests, whole but for the last one."""
    everything = read(write_text(tmp_path / "text"))
    limited = read(tmp_path / "text", max_megabytes=0.01)
    assert sum(d.size for d in limited) == 10_000
    assert limited[:-1] == everything[: len(limited) - 1]
    assert everything[len(limited) - 1].text.startswith(limited[-1].text)


def test_equal_texts_count_once(tmp_path):
    """A text that lies in two files is one document, so it cannot be trained on and held out."""
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("the same\n" if name < "c" else "another\n")
    assert texts(read(tmp_path)) == ["another\n", "the same\n"]


def test_one_large_file_is_split(tmp_path):
    """A single file is cut at line ends into documents enough to hold some out, and nothing is lost."""
    lines = [f"line {i} of a book\n" for i in range(2000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    documents = read(tmp_path / "book.txt", heldout_every=10)
    assert 15 <= len(documents) <= 21
    assert sorted(line for d in documents for line in d.text.splitlines(keepends=True)) == sorted(lines)
    train, heldout = split_documents(documents, 10)
    assert train
    assert heldout


def test_heldout_does_not_move_when_data_is_added(tmp_path):
    """A document that was held out stays held out when others come, and about one in N is."""
    few = read(write_text(tmp_path / "text", documents=300), heldout_every=5)
    for i in range(300):
        (tmp_path / "text" / f"new{i}.txt").write_text(f"something else, number {i}\n")
    many = read(tmp_path / "text", heldout_every=5)
    before, after = split_documents(few, 5)[1], split_documents(many, 5)[1]
    assert set(before) <= set(after)
    assert 80 <= len(after) <= 160


def test_split_needs_two_documents():
    """A single document that cannot be cut has nothing to hold out, and the error says so."""
    from tasks.worker.documents import Document

    with pytest.raises(ArgumentError, match="nothing to hold out"):
        split_documents([Document(b"0" * 32, "x")], 40)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"rows\.jsonl, line 2: no field 'text', only \['body'\]"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"line 2: field 'text' is a number, expected text"),
        ("rows.jsonl", b'{"text": "a"}\n[1]\n', r"line 2: expected an object .* found a JSON list"),
        ("rows.jsonl", b'{"text": "a"}\n{"te\n', r"line 2: not JSON"),
        ("rows.jsonl", b"[" * 100_000 + b"\n", r"line 1: not JSON: maximum recursion"),
        ("rows.jsonl", b'{"text": "\xff"}\n', r"rows\.jsonl: not UTF-8"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt: not UTF-8 text"),
        ("a.txt", b" \n\n", r"empty: .*a\.txt' \(from .*\) held no text"),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    """What is wrong in a file is told with the file, and the line where it has lines."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        read(tmp_path / name)


def test_nothing_there(tmp_path):
    """A path that matches nothing, an empty directory and a dangling link are named."""
    with pytest.raises(ArgumentError, match=r"no data at .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="held no text"):
        read(tmp_path)
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ArgumentError, match=r"link\.txt: cannot be read: No such file"):
        read(f"{tmp_path}/*.txt")


def test_pipe_is_refused(tmp_path):
    """A glob that matches a FIFO is refused instead of waiting for a writer for ever."""
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ArgumentError, match="not a regular file"):
        read(f"{tmp_path}/*.txt")


def test_unreadable_file(tmp_path):
    """A file without read permission is named with the reason."""
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    path = Path(tmp_path / "secret.txt")
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(ArgumentError, match=r"secret\.txt: cannot be read: Permission denied"):
        read(path)
