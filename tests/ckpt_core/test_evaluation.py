"""Figures of causal language models on held-out tokens and text."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_transformers import model_of, save_pretrained, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ckpt_core.errors import ArgumentError, DamagedError
from ckpt_core.evaluation import evaluate

ROWS = np.random.default_rng(0).integers(0, 40, (5, 9), dtype=np.uint16)


@pytest.fixture
def text(tmp_path):
    """Write two texts of words that the small tokenizer knows: 14 tokens, 45 bytes."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8")
    (tmp_path / "text" / "b.txt").write_text("w11 w12 w13 w14 w15 ä")
    return tmp_path / "text"


def byte_tokenizer():
    """Return a tokenizer of bytes that ends each text."""
    words = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<end>": 256}
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def undecided(vocab_size=40):
    """Return a model to which every token is equally likely."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocab_size, max_position_embeddings=33))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_the_figures_are_those_of_the_model_on_token_rows():
    """Loss, perplexity and accuracy are what the logits give when they are taken one by one, in any batches."""
    model = model_of("llama").eval()
    losses, hits = [], []
    for row in torch.from_numpy(ROWS.astype(np.int64)):
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0].double()
        losses += [-logits[i].log_softmax(0)[row[i + 1]].item() for i in range(8)]
        hits += [logits[i].argmax().item() == row[i + 1].item() for i in range(8)]
    for batch_size in (1, 2, 16):
        found = evaluate(model, ROWS, batch_size=batch_size)
        assert found.heldout_loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
        assert (found.accuracy, found.tokens, found.bits_per_byte) == (np.mean(hits), 40, None)
        assert found.metrics.keys() == {"heldout_loss", "perplexity", "accuracy"}


def test_equal_models_get_equal_figures(tmp_path):
    """A model and its saved copy, on an array, a file and a directory of the same rows, give the same Evaluation."""
    model = model_of("llama tied")
    save_pretrained(model, tmp_path / "model")
    np.save(tmp_path / "tokens.npy", ROWS)
    expected = evaluate(model, ROWS)
    assert all(evaluate(tmp_path / "model", data) == expected for data in (ROWS, tmp_path / "tokens.npy", tmp_path))
    assert evaluate(model, ROWS[:4]).fingerprint != expected.fingerprint


@pytest.mark.parametrize("length", [2, 3, 8, 15, 33, None])
def test_every_token_of_a_text_is_predicted_once(text, length):
    """In windows of any length each token counts once, but for the first of all, which nothing precedes."""
    found = evaluate(undecided(), text, tokenizer=tokenizer(), sequence_length=length)
    assert found.tokens == 13
    assert found.heldout_loss == pytest.approx(math.log(40))
    assert found.perplexity == pytest.approx(40)
    assert found.bits_per_byte == pytest.approx(13 * math.log2(40) / (45 - 2))


@pytest.mark.parametrize("length", [5, 33])
def test_the_end_of_a_text_is_predicted_too(text, length):
    """With an end-of-text token every byte is predicted, and after each text its end."""
    found = evaluate(undecided(257), text, tokenizer=byte_tokenizer(), sequence_length=length)
    assert found.tokens == 45 + 2
    assert found.bits_per_byte == pytest.approx(47 * math.log2(257) / 45)


def test_a_window_is_what_the_model_sees(text):
    """The loss of a text is the sum over its windows, each of which begins with the last token of the one before."""
    model, ids = model_of("llama"), tokenizer()("w1 w2 w3 w4 w5 w6 w7 w8 w11 w12 w13 w14 w15 ä")["input_ids"]
    windows = [np.array([ids[:6], ids[5:11]]), np.array([ids[10:]])]
    sums = [evaluate(model, w) for w in windows]
    found = evaluate(model, text, tokenizer=tokenizer(), sequence_length=6)
    assert found.heldout_loss == pytest.approx(sum(e.heldout_loss * e.tokens for e in sums) / 13, rel=1e-6)


def test_text_comes_from_files_and_rows(text, tmp_path):
    """A directory, a glob, and rows of a `.jsonl` file with the same texts are the same data."""
    model = save_pretrained(model_of("llama"), tmp_path / "model")
    tokenizer().save_pretrained(model)
    rows = [json.dumps({"words": (text / name).read_text()}) + "\n" for name in ("a.txt", "b.txt")]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    expected = evaluate(model, text)
    assert evaluate(model, f"{text}/*.txt") == evaluate(model.as_uri(), f"{text.as_uri()}/*.txt") == expected
    assert evaluate(model, tmp_path / "rows.jsonl", text_field="words") == expected
    assert evaluate(model, text / "a.txt") != expected


def test_a_live_model_stays_as_it_was():
    """A model in training is evaluated without dropout, and is in training after it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=9, embd_pdrop=0.5))
    training = evaluate(model.train(), ROWS)
    assert model.training
    assert training == evaluate(model.eval(), ROWS)
    assert not model.training


class Breaks(GPT2LMHeadModel):
    """A model that draws random numbers, and fails at last."""

    draws = 0

    def forward(self, *args, **kwargs):
        """Return the logits, the first time."""
        self.draws += 1
        torch.rand(1), np.random.rand(), random.random()
        if self.draws > 1:
            raise RuntimeError("broken")
        return super().forward(*args, **kwargs)


def test_each_part_of_a_model_keeps_its_mode_and_the_generators_their_state():
    """Parts that are frozen in eval mode stay so, and the rest in training, after an error too."""
    model = Breaks(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=9)).train()
    model.transformer.h[0].eval()
    model.transformer.wte.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2

    def generators():
        return torch.get_rng_state().tolist(), np.random.get_state()[1:3], random.getstate()

    before = repr(generators())
    evaluate(model, ROWS)
    assert [module.training for module in model.modules()] == modes
    assert repr(generators()) == before
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, ROWS)
    assert [module.training for module in model.modules()] == modes
    assert repr(generators()) == before
    assert torch.is_grad_enabled()


def test_a_model_that_diverged_has_no_finite_figure():
    """NaN in the weights is NaN in the loss, and no error."""
    model = undecided()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    found = evaluate(model, ROWS)
    assert math.isnan(found.heldout_loss)
    assert math.isnan(found.perplexity)


def test_a_loss_beyond_exp_is_an_infinite_perplexity():
    """A loss of thousands of nats has a perplexity that no float holds."""
    model = undecided()
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[0].fill_(1e4)
    found = evaluate(model, np.full((1, 3), 7))
    assert found.heldout_loss == pytest.approx(8e4, rel=1e-3)
    assert found.perplexity == math.inf
    assert found.accuracy == 0.0


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_a_model_of_another_head_is_refused(tmp_path, name):
    """What does not predict the next token is refused by the name of its class, saved or live."""
    model = model_of(name)
    save_pretrained(model, tmp_path / "model")
    message = f"is a {type(model).__name__}, and only causal language models"
    for given in (tmp_path / "model", model):
        with pytest.raises(ArgumentError, match=message):
            evaluate(given, ROWS)


def test_a_model_that_sees_the_future_is_refused():
    """An encoder with the head of a decoder, whose loss would be too good, is no causal language model."""
    model = BertLMHeadModel(copy.deepcopy(model_of("bert").config))
    with pytest.raises(ArgumentError, match="BertLMHeadModel with is_decoder false sees the tokens"):
        evaluate(model, ROWS)
    model.config.is_decoder = True
    assert evaluate(model, ROWS).tokens == 40


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    """A directory without a config, an adapter, and a config of no known model are told apart."""
    with pytest.raises(ArgumentError, match=r"no config\.json, so no model of transformers there$"):
        evaluate(tmp_path, ROWS)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ArgumentError, match=r"a LoRA adapter alone is none: merge it first"):
        evaluate(tmp_path, ROWS)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ArgumentError, match="transformers cannot load it"):
        evaluate(tmp_path, ROWS)


def test_weights_that_would_be_random_are_refused(tmp_path):
    """A tensor that is missing in the directory is damage, and is named."""
    model = save_pretrained(model_of("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedError, match=r"has no weights for model\.norm\.weight"):
        evaluate(model, ROWS)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (ROWS + 31, {}, r"to \d+: the model's vocabulary has 40, so they are another tokenizer's"),
        (ROWS.astype(np.int64) - 40, {}, r"token numbers from -\d+ to -\d+"),
        (ROWS.astype(np.float32), {}, "float32 .*expected integers"),
        (ROWS[0], {}, r"\(9,\), expected integers \[sequences, length\]"),
        (ROWS[:, :1], {}, r"\(5, 1\), expected"),
        (ROWS[:0], {}, r"\(0, 9\), expected"),
        (np.tile(ROWS, 4), {}, "sequences of 36 tokens: the model takes 33"),
        (ROWS, {"batch_size": 0}, "batch_size 0"),
        ("text/long.txt", {"tokenizer": None}, "text for a live model needs its `tokenizer`"),
        ("text/long.txt", {"sequence_length": 1}, "sequence_length 1: expected 2 or more"),
        ("text/long.txt", {"sequence_length": 34}, "sequences of"),
        ("text/blank.txt", {}, "holds no text"),
        ("text/one.txt", {}, "1 tokens, which leaves nothing to predict"),
        ("text/none.txt", {}, "no data at .*none.txt"),
        ("text/bytes.npy", {}, "no array of tokens"),
        ("s3://bucket/text", {}, r"data: s3://bucket/text: expected a local path"),
        ("s3:/bucket/rows.npy", {}, "data: s3:/bucket/rows.npy: neither a path nor a URL"),
    ],
)
def test_data_that_does_not_fit_is_refused(text, tmp_path, data, options, message):
    """Wrong token rows, texts and settings are told with what was found and expected."""
    contents = {"blank.txt": b" \n", "one.txt": b"w1", "long.txt": b"w1 " * 40, "bytes.npy": b"\x93NUMPY nothing"}
    for name, content in contents.items():
        (text / name).write_bytes(content)
    given = tmp_path / data if isinstance(data, str) and ":" not in data else data
    with pytest.raises(ArgumentError, match=message):
        evaluate(model_of("llama"), given, **{"tokenizer": tokenizer(), **options})


def test_a_directory_without_a_tokenizer_takes_no_text(text, tmp_path):
    """Text for a model that was saved without its tokenizer is refused, and the message says what works."""
    model = save_pretrained(model_of("llama"), tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"(?s)has no tokenizer for text .*evaluate it on token rows"):
        evaluate(model, text)
