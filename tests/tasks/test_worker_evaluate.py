"""The loss that training ranks measure, and the one that decides on a release."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ckpt_core.evaluation import evaluate
from tasks.worker.evaluate import heldout_loss
from tasks.worker.tokens import TokenInfo, TokenSet


def test_ranks_and_releases_measure_the_same(tmp_path: Path):
    """On one directory of prepared tokens both give the same loss, and the fingerprint is the one in its record."""
    rows = np.random.default_rng(0).integers(0, 40, (5, 9), dtype=np.uint16)
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    TokenSet(rows, TokenInfo("x", 1, 45, 45, 5, 9, "uint16", digest)).save(tmp_path / "heldout")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40))
    found = evaluate(model, tmp_path / "heldout", batch_size=2)
    assert found.heldout_loss == pytest.approx(heldout_loss(model, tmp_path / "heldout", batch_size=3), rel=1e-6)
    assert found.fingerprint == TokenSet.open(tmp_path / "heldout").info.fingerprint
