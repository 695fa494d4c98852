"""The parts of the training loop, each by itself: batches, gradients, schedule, history, progress, step log."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from worker_support import TINY, TINY_LLAMA, prepare_tiny

from ckpt_core.errors import ArgumentError
from tasks.config import ModelSettings, TrainingStep
from tasks.worker.batches import batch, rank_share
from tasks.worker.evaluate import heldout_loss
from tasks.worker.history import History
from tasks.worker.loss import accumulate_gradients, summed_loss
from tasks.worker.model import build_model, transformer_blocks
from tasks.worker.optimizer import make_optimizer, make_schedule, peak_fraction
from tasks.worker.progress import Progress
from tasks.worker.step_log import StepLog
from tasks.worker.tokenizer import load_tokenizer
from tasks.worker.tokens import TokenSet

SEQUENCES = np.arange(37 * 8, dtype=np.uint16).reshape(37, 8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare the tiny text once."""
    return prepare_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(prepared):
    """Load the tokenizer of the tiny text."""
    return load_tokenizer(prepared["tokenizer"])


@pytest.fixture
def model(tokenizer):
    """Build the tiny model without dropout."""
    return build_model(ModelSettings(architecture=TINY_LLAMA | {"attention_dropout": 0.0}), tokenizer, seed=3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_make_up_the_batch(world_size):
    """Put together in order of rank, the ranks' shares are the batch, for any number of ranks."""
    whole = batch(SEQUENCES, 11, seed=5, batch_size=8)
    shares = [rank_share(whole, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), whole)


def test_batch_is_a_pure_function_of_seed_and_step():
    """The batch of a step does not depend on which others were asked for before; another seed gives another."""
    forwards = [batch(SEQUENCES, step, seed=5, batch_size=8) for step in range(12)]
    backwards = [batch(SEQUENCES, step, seed=5, batch_size=8) for step in reversed(range(12))]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    assert not np.array_equal(forwards[0], batch(SEQUENCES, 0, seed=6, batch_size=8))


def test_each_epoch_sees_every_sequence_once():
    """Over three epochs, cut anywhere into batches, each epoch is a permutation of its own."""
    steps = [batch(SEQUENCES, step, seed=5, batch_size=3) for step in range(37)]
    epochs = np.concatenate(steps)[:, 0].reshape(3, 37)
    assert all(sorted(epoch) == list(range(0, 37 * 8, 8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_accumulated_gradient_is_the_whole_one(model, prepared, micro_batch_size):
    """Gradients added over micro-batches, even ones of unequal size, are those of one batch of 16."""
    tokens = TokenSet.open(prepared["train_tokens"]).tokens
    sequences = torch.from_numpy(batch(tokens, 0, seed=1, batch_size=16))

    def gradients(size):
        model.zero_grad()
        total = accumulate_gradients(model, sequences, micro_batch_size=size, scale=1 / sequences[:, 1:].numel())
        return total, [p.grad.clone() for p in model.parameters()]

    whole_loss, whole = gradients(16)
    loss, parts = gradients(micro_batch_size)
    assert loss.item() == pytest.approx(whole_loss.item(), rel=1e-6)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_loss_is_that_of_transformers(model, prepared):
    """The summed loss over its targets is the mean loss that the model itself computes from labels."""
    rows = torch.from_numpy(TokenSet.open(prepared["heldout_tokens"]).tokens[:4].astype(np.int64))
    expected = model(input_ids=rows, labels=rows).loss.item()
    assert summed_loss(model, rows).item() / rows[:, 1:].numel() == pytest.approx(expected, rel=1e-6)


def test_heldout_loss_does_not_depend_on_the_batch(model, prepared):
    """The held-out loss is the mean over all tokens, whatever goes through at once; the mode is restored."""
    model.train()
    losses = [heldout_loss(model, prepared["heldout_tokens"], "cpu", size) for size in (1, 5, 64)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert model.training


def test_equal_seeds_give_equal_weights(tokenizer):
    """A model made from scratch depends on the seed alone, and stops at its tokenizer's end of text."""
    one, same, other = (build_model(TINY, tokenizer, seed=seed) for seed in (1, 1, 2))
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    assert one.generation_config.eos_token_id == one.config.eos_token_id == tokenizer.eos_token_id
    assert [type(block).__name__ for block in transformer_blocks(one)] == ["LlamaDecoderLayer"] * 2


def test_pretrained_weights_are_loaded(tokenizer, model, tmp_path):
    """`pretrained` gives the saved weights in float32; without `load_weights`, only their architecture."""
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    settings = ModelSettings(pretrained=str(tmp_path / "model"))
    loaded = build_model(settings, tokenizer, seed=9)
    empty = build_model(settings, tokenizer, seed=9, load_weights=False)
    for saved, full, fresh in zip(model.parameters(), loaded.parameters(), empty.parameters(), strict=True):
        assert full.dtype == torch.float32
        assert torch.equal(full, saved.float())
        assert full.shape == fresh.shape


def test_no_causal_language_model(tokenizer):
    """A model type that predicts no next token is refused."""
    with pytest.raises(ArgumentError, match="'vit' is no causal language model"):
        build_model(ModelSettings(architecture={"model_type": "vit"}), tokenizer, seed=1)


def test_only_matrices_decay(model):
    """Norms are left out of weight decay; every parameter is in one group."""
    decayed, others = make_optimizer(model, TrainingStep(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert others["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_schedule():
    """The rate rises in equal parts to its peak, then falls along a cosine towards zero at the last step."""
    fractions = [peak_fraction(step, steps=20, warmup_steps=4) for step in range(21)]
    assert fractions[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert fractions[12] == pytest.approx(0.5)
    assert fractions[20] == pytest.approx(0.0)
    assert sorted(fractions[4:], reverse=True) == fractions[4:]
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=8.0)
    assert make_schedule(optimizer, steps=20, warmup_steps=4).get_last_lr() == [2.0]
    assert make_schedule(optimizer, steps=4, warmup_steps=100).get_last_lr() == [4.0]


def test_history_stays_small_and_survives_json():
    """100,000 steps leave at most 128 points that still average to the whole, and JSON gives the history back."""
    history = History()
    losses = [5.0 + math.sin(step) for step in range(100_000)]
    for step, loss in enumerate(losses, start=1):
        history.add_step(step, loss)
        if step % 100 == 0:
            history.add_evaluation(step, loss)
    curve = history.metrics()["loss_curve"]
    assert 64 <= len(curve) <= 128
    assert len(json.dumps(history.metrics())) < 12_000
    covered = history.train.stride * len(curve)
    assert np.mean([loss for _, loss in curve]) == pytest.approx(np.mean(losses[:covered]))
    assert curve[-1][0] == covered
    assert history.metrics()["train_loss"] == pytest.approx(np.mean(losses[-10:]))
    assert history.initial_heldout_loss == losses[99]
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history


def test_progress_lines():
    """A line comes for the first step, then at most every two seconds, and for the last step."""
    lines: list[str] = []
    now = [0.0]
    progress = Progress(0, 100, 2048, write=lines.append, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 0.5
        progress.step(step, 8.0 - step / 100, 2e-3)
    assert lines[0] == "step 1/100  loss 7.990  lr 2.0e-03  4.1k tokens/s  50 s left"
    assert lines[1] == "step 5/100  loss 7.950  lr 2.0e-03  4.1k tokens/s  48 s left"
    assert lines[-1] == "step 100/100  loss 7.000  lr 2.0e-03  4.1k tokens/s  0 s left"
    assert len(lines) == 2 + 24


def test_step_log_drops_what_lies_beyond(tmp_path):
    """Opened to resume from a step, the log keeps the whole lines up to it and goes on from there."""
    path = tmp_path / "run" / "metrics.jsonl"
    log = StepLog(path, resume_step=0)
    for step in range(1, 6):
        log.add({"step": step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    log = StepLog(path, resume_step=3)
    log.add({"step": 4})
    log.sync()
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]
