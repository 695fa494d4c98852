"""Data preparation: the same files from the same input, whole or not at all, and a clear error for each mistake."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from worker_support import REPOSITORY, TINY, TINY_LLAMA, prepare_tiny, tiny_data, write_text

from ckpt_core.errors import ArgumentError
from tasks.config import ModelSettings
from tasks.worker.prepare import prepare
from tasks.worker.tokens import TokenSet


def files_below(directory):
    """Return path and content of every file."""
    return {p.relative_to(directory): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


def tiny_model(**architecture):
    """Return the tiny model with another architecture."""
    return ModelSettings(architecture=TINY_LLAMA | architecture)


def test_tokens_are_the_documents(tmp_path):
    """Decoded, the packed sequences are the documents of each part, each followed by the end of text."""
    prepared = prepare_tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(prepared["tokenizer"])
    written = {p.read_text() for p in (tmp_path / "text").iterdir()}
    parts = {}
    for part in ("train", "heldout"):
        token_set = TokenSet.open(prepared[f"{part}_tokens"])
        assert token_set.tokens.shape == (prepared[part]["sequences"], 32)
        assert token_set.tokens.dtype == np.uint16
        assert isinstance(token_set.tokens, np.memmap)
        *whole, _cut = tokenizer.decode(token_set.tokens.ravel()).split(tokenizer.eos_token)
        parts[part] = set(whole)
        assert parts[part] <= written
    assert len(parts["train"]) >= prepared["train"]["documents"] - 1
    assert not parts["train"] & parts["heldout"]


def test_tokenizer_is_lossless(tmp_path):
    """The trained tokenizer decodes any text to itself and has one token that ends a text."""
    tokenizer = AutoTokenizer.from_pretrained(prepare_tiny(tmp_path)["tokenizer"])
    text = "  def f(x):\n\treturn 'ü → 😀' , x !\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert len(tokenizer) == TINY_LLAMA["vocab_size"]


def test_another_process_agrees(tmp_path):
    """A child process that prepares the same text writes the same bytes, without a warning."""
    here = prepare_tiny(tmp_path)
    request = {
        "model": TINY.model_dump(),
        "data": tiny_data(tmp_path / "text").model_dump(),
        "output": str(tmp_path / "child"),
        "tokenizer": None,
    }
    command = [sys.executable, "-W", "error", "-m", "tasks.jobs", "prepare", json.dumps(request)]
    child = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert child.stderr == ""
    assert files_below(json.loads(child.stdout)["directory"]) == files_below(here["directory"])


def test_second_call_reuses(tmp_path):
    """A second call with the same input finds the first one's files; another text or setting gets files of its own."""
    first = prepare_tiny(tmp_path)
    tokens = Path(first["train_tokens"]) / "tokens.npy"
    before = tokens.stat().st_mtime_ns
    source, output = tmp_path / "text", tmp_path / "prepared"
    assert prepare(TINY, tiny_data(source), output) == first
    assert tokens.stat().st_mtime_ns == before
    shorter = prepare(TINY, tiny_data(source, sequence_length=16), output)
    (source / "more.txt").write_text("more text to learn\n")
    more = prepare(TINY, tiny_data(source), output)
    assert len({first["directory"], shorter["directory"], more["directory"]}) == 3
    assert first["fingerprint"] == shorter["fingerprint"] != more["fingerprint"]


def test_leftovers_of_a_killed_preparation_go(tmp_path):
    """What a killed preparation left is removed by the next one and never taken for a result."""
    leftover = tmp_path / "prepared" / ".preparing-dead"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    prepared = prepare_tiny(tmp_path)
    assert sorted(p.name for p in (tmp_path / "prepared").iterdir()) == [".lock", Path(prepared["directory"]).name]


def test_failed_preparation_leaves_nothing_that_counts(tmp_path):
    """After an error the same call succeeds once its cause is gone."""
    source = write_text(tmp_path / "text")
    tokenizer = prepare_tiny(tmp_path / "other")["tokenizer"]
    with pytest.raises(ArgumentError, match="the tokenizer has 300 tokens, the model's vocabulary 299"):
        prepare(tiny_model(vocab_size=299), tiny_data(source), tmp_path / "prepared", tokenizer)
    again = prepare(TINY, tiny_data(source), tmp_path / "prepared", tokenizer)
    assert sorted(p.name for p in (tmp_path / "prepared").iterdir()) == [".lock", Path(again["directory"]).name]


def test_given_tokenizer_is_kept(tmp_path):
    """A continued run's tokenizer is used as it is, whatever the new text would have given."""
    first = prepare_tiny(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for i in range(40):
        (other / f"{i}.txt").write_text(f"entirely different words, number {i}\n" * 20)
    second = prepare(TINY, tiny_data(other), tmp_path / "prepared", first["tokenizer"])
    assert files_below(second["tokenizer"]) == files_below(first["tokenizer"])


def test_unigram_loss(tmp_path):
    """The baseline is the cross-entropy of the held-out targets under add-one smoothed training frequencies."""
    prepared = prepare_tiny(tmp_path)
    train = TokenSet.open(prepared["train_tokens"]).tokens.ravel().tolist()
    targets = TokenSet.open(prepared["heldout_tokens"]).tokens[:, 1:].ravel().tolist()
    total = len(train) + prepared["vocab_size"]
    expected = -sum(math.log((train.count(t) + 1) / total) for t in targets) / len(targets)
    assert prepared["unigram_loss"] == pytest.approx(expected, rel=1e-9)


def test_heldout_limit(tmp_path):
    """Held-out text is cut to `heldout_tokens`."""
    source = write_text(tmp_path / "text", documents=120)
    prepared = prepare(TINY, tiny_data(source, heldout_tokens=256), tmp_path / "prepared")
    assert prepared["heldout"]["sequences"] == 256 // 32


@pytest.mark.parametrize(
    ("architecture", "data", "message"),
    [
        ({}, {"sequence_length": 65}, "sequence_length 65 is more than the model's max_position_embeddings 64"),
        ({"vocab_size": 256}, {}, "vocab_size 256: a byte-level tokenizer needs at least 257"),
        ({"hiden_size": 8}, {}, "a 'llama' config has no field hiden_size"),
        ({"model_type": "lama"}, {}, "model_type 'lama' is unknown to transformers"),
        ({"max_position_embeddings": 4096}, {"sequence_length": 4000}, "tokens, one sequence needs 4000"),
    ],
)
def test_mistakes(tmp_path, architecture, data, message):
    """A setting that does not fit is one error that names it."""
    source = write_text(tmp_path / "text")
    with pytest.raises(ArgumentError, match=message):
        prepare(tiny_model(**architecture), tiny_data(source, **data), tmp_path / "prepared")


def test_missing_tokenizer_and_model(tmp_path):
    """A tokenizer or pretrained model that is not there is named."""
    source = write_text(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"no tokenizer at '.*empty'"):
        prepare(TINY, tiny_data(source), tmp_path / "prepared", tmp_path / "empty")
    with pytest.raises(ArgumentError, match=r"no pretrained model at '.*empty'"):
        prepare(ModelSettings(pretrained=str(tmp_path / "empty")), tiny_data(source), tmp_path / "prepared")


def test_tampered_tokens_are_refused(tmp_path):
    """Tokens that do not fit their description are not trained on."""
    prepared = prepare_tiny(tmp_path)
    np.save(Path(prepared["train_tokens"]) / "tokens.npy", np.zeros((2, 32), dtype=np.uint16))
    with pytest.raises(ArgumentError, match=r"tokens\.npy is uint16 \(2, 32\), info\.json says"):
        TokenSet.open(prepared["train_tokens"])
    with pytest.raises(ArgumentError, match="no prepared tokens there"):
        TokenSet.open(tmp_path)


def test_no_fork_warning_after_tokenizing(tmp_path):
    """A process that tokenized may fork without a warning about parallelism."""
    source = write_text(tmp_path / "text")
    program = (
        "import os, sys\n"
        "sys.path.insert(0, 'tests/tasks')\n"
        "from worker_support import TINY, tiny_data\n"
        "from tasks.worker.prepare import prepare\n"
        f"prepare(TINY, tiny_data({str(source)!r}), {str(tmp_path / 'prepared')!r})\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    from tokenizers import Tokenizer\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    child = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert child.stderr == ""
