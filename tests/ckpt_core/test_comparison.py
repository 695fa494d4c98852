"""`ckpt publish --eval`: an export is served only if it is better than what is."""

import hashlib
import json

import pytest
import torch
from huggingface_hub import ModelCard
from small_transformers import model_of, save_pretrained, tokenizer

from ckpt_core import cli
from ckpt_core.evaluation import evaluate
from ckpt_core.hub import comparison, download, publish, served

TEXT = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"


@pytest.fixture
def ckpt(capsys):
    """Return a function that runs one command, and returns its exit status and its JSON."""

    def run(*arguments):
        status = cli.main([*map(str, arguments), "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


def export_of(model, directory):
    """Write a model, its tokenizer and the `export.json` that describes them."""
    save_pretrained(model, directory)
    tokenizer().save_pretrained(directory)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    record = {"format_version": 1, "source": {"digest": "sha256:5"}, "files": entries, "rules": [], "libraries": {}}
    (directory / "export.json").write_text(json.dumps(record))
    return directory


@pytest.fixture
def places(tmp_path):
    """Write held-out text, an export that is worse on it, and one that is better."""
    (tmp_path / "text.txt").write_text(TEXT)
    worse, better = model_of("llama"), model_of("llama")
    with torch.no_grad():
        worse.lm_head.weight.mul_(50)
        better.lm_head.weight.zero_()
    exports = (export_of(worse, tmp_path / "worse"), export_of(better, tmp_path / "better"))
    return tmp_path / "hub", tmp_path / "text.txt", *exports


def test_only_a_better_export_is_served(ckpt, places):
    """Worse and not better enough are refused and change nothing; better is served, with both figures on its card."""
    hub, text, worse, better = places
    bits = {export: evaluate(export, text).bits_per_byte for export in (worse, better)}
    gain = bits[worse] - bits[better]
    assert gain > 0

    status, first = ckpt("publish", worse, hub, "--eval", text)
    assert (status, first["tag"], first["champion"]) == (0, "v1", None)
    assert first["decision"]["reason"].endswith("and there is no champion.")

    status, refused = ckpt("publish", better, hub, "--eval", text, "--margin", gain * 1.5)
    assert (status, refused["decision"]["promote"]) == (1, False)
    assert "less than the margin" in refused["decision"]["reason"]
    assert "tag" not in refused
    assert served(hub).tag == "v1"

    status, second = ckpt("publish", better, hub, "--eval", text, "--margin", gain / 2)
    assert (status, second["tag"]) == (0, "v2")
    assert second["decision"]["metric"] == "bits_per_byte"
    assert (second["decision"]["challenger"], second["decision"]["champion"]) == (bits[better], bits[worse])
    before = served(hub)
    card = (download(hub, "v2", directory=hub.parent / "copy") / "README.md").read_text()
    figures = {result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results}
    assert figures == {name: value for name, value in second["challenger"].items() if value is not None}
    assert f"| bits per byte | {bits[better]:.6g} | {bits[worse]:.6g} |" in card
    assert "| Metric | This model | Served before (v1) |" in card
    assert "| checkpoint | sha256:5 |" in card

    status, refused = ckpt("publish", worse, hub, "--eval", text)
    assert (status, refused["decision"]["promote"]) == (1, False)
    status, again = ckpt("publish", better, hub, "--eval", text)
    assert (status, again["tag"], again["created"]) == (0, "v2", False)
    assert served(hub) == before


def test_a_metric_may_be_named(ckpt, places):
    """The metric decides with the direction that it has, and without data it is misuse."""
    hub, text, worse, better = places
    assert ckpt("publish", worse, hub, "--eval", text, "--metric", "accuracy")[0] == 0
    status, found = ckpt("publish", better, hub, "--eval", text, "--metric", "perplexity")
    assert (status, found["decision"]["metric"]) == (0, "perplexity")
    status, found = ckpt("publish", better, hub, "--metric", "accuracy")
    assert (status, found["error"]["message"]) == (2, "--metric and --margin are about --eval DATA; give it too")


def test_what_is_served_must_be_comparable(ckpt, places, tmp_path):
    """Where a model of another kind is served, the message names it, and nothing is published."""
    hub, text, worse, _ = places
    assert ckpt("publish", export_of(model_of("bert"), tmp_path / "bert"), hub)[0] == 0
    status, found = ckpt("publish", worse, hub, "--eval", text)
    assert status == 2
    assert f"{served(hub).url} is served, and cannot be compared with: " in found["error"]["message"]
    assert "is a BertForMaskedLM, and only causal language models" in found["error"]["message"]
    assert served(hub).tag == "v1"


def test_an_export_that_diverged_is_never_served(ckpt, places, tmp_path):
    """NaN does not win, even where nothing is served yet."""
    hub, text, *_ = places
    model = model_of("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    status, found = ckpt("publish", export_of(model, tmp_path / "diverged"), hub, "--eval", text)
    assert (status, found["challenger"]["bits_per_byte"]) == (1, None)
    assert "what has no finite figure cannot win" in found["decision"]["reason"]
    assert served(hub) is None


def test_a_model_that_another_tool_pushed_is_the_champion_too(ckpt, places):
    """Where main holds a model without an `export.json`, a worse export is refused as beside any other."""
    hub, text, worse, better = places
    assert ckpt("publish", better, hub)[0] == 0
    (hub / "main" / "export.json").unlink()
    status, found = ckpt("publish", worse, hub, "--eval", text)
    assert (status, found["decision"]["promote"]) == (1, False)
    assert found["champion"] is not None


def test_what_was_changed_by_hand_gets_no_tag(ckpt, places):
    """Where main is a release with a file more, or another config, publishing that export again does not tag main."""
    hub, text, worse, _ = places
    assert ckpt("publish", worse, hub)[0] == 0
    publish(worse, hub, pictures={"notes.txt": b"by hand"})
    (hub / "versions" / "v2.json").unlink()
    assert ckpt("publish", worse, hub, "--eval", text)[0] == 1
    (hub / "main" / "config.json").chmod(0o644)
    (hub / "main" / "config.json").write_text("{}")
    assert ckpt("publish", worse, hub, "--eval", text)[0] == 1
    assert [path.stem for path in (hub / "versions").iterdir()] == ["v1"]


def test_what_was_published_meanwhile_is_not_replaced(ckpt, places, monkeypatch):
    """Where nothing was served when an export was evaluated, and something is when it is sent, it is refused."""
    hub, text, worse, better = places
    compare_with_served = comparison.compare

    def slowly(*arguments, **options):
        found = compare_with_served(*arguments, **options)
        publish(better, hub)
        return found

    monkeypatch.setattr(comparison, "compare", slowly)
    status, found = ckpt("publish", worse, hub, "--eval", text)
    assert status == 1
    assert "the decision to publish was made against no model; nothing was sent" in found["error"]["message"]
    assert [path.stem for path in (hub / "versions").iterdir()] == ["v1"]
