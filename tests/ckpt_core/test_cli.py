"""`ckpt`: what each command says and does, its JSON, and its exit status."""

import argparse
import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hub_child import child_environment_for
from safetensors.torch import load_file
from small_models import layers
from small_transformers import config_directory, model_of, tokenizer

from ckpt_core import PyTorchCheckpoint, cli, open_store
from ckpt_core.cli.command import parse_share, parse_size
from ckpt_core.native_checkpoint import save_checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs one command and returns its exit status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = int(str(exit_.code))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a store of three steps, a DCP directory, and a config with a tokenizer."""
    place = tmp_path_factory.mktemp("cli")
    words = place / "words"
    tokenizer().save_pretrained(words)
    model = model_of("llama tied")
    for step in (1, 2, 3):
        PyTorchCheckpoint(module=model, hyperparameters={"a": 1}).save(
            place / "store", step=step, run="first", assets=words, metrics={"loss": 0.5}, lineage={"data": "sha256:5"}
        )
    save_checkpoint(model, str(place / "dcp"))
    config_directory(model, place / "config")
    return place


def step_of(place: Path, step: int = 1) -> Path:
    """Return the directory of a step."""
    return place / "store" / "first" / f"step_{step:010d}"


def test_inspect_shows_what_is_there(ckpt: Run, place: Path) -> None:
    """It tells who made a committed step, its files, and each tensor with type, shape and chunks, the summary first."""
    status, out, err = ckpt("inspect", step_of(place))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"checkpoint {step_of(place) / 'model'}: ")
    assert lines[1].startswith("run first, step 1, ")
    assert {"metric loss: 0.5", "data: sha256:5"} <= set(lines)
    assert any(line.startswith("float32 ") for line in lines)
    assert any(line.endswith("  model/__0_0.distcp") for line in lines)
    assert "(16,)" in lines[-1] + lines[-2]
    assert "model.model.norm.weight" in out
    status, out, err = ckpt("inspect", step_of(place).as_uri(), "--json")
    facts = json.loads(out)
    assert (facts["path"], facts["kind"]) == (str(step_of(place) / "model"), "checkpoint")
    assert facts["tensors"]["model.model.norm.weight"] == {"dtype": "float32", "shape": [16], "chunks": 1, "bytes": 64}
    assert facts["dtypes"]["float32"] == {"tensors": len(facts["tensors"]), "bytes": facts["bytes"]}
    assert facts["files"]["assets/config.json"] == (step_of(place) / "assets" / "config.json").stat().st_size
    assert (facts["manifest"]["step"], facts["manifest"]["metrics"]) == (1, {"loss": 0.5})
    assert facts["manifest"]["lineage"] == {"data": "sha256:5"}
    assert ":" in facts["manifest"]["digest"]


def test_inspect_shows_dcp_directories_and_exports(ckpt: Run, place: Path, tmp_path: Path) -> None:
    """A DCP directory has no manifest; an export says what it was made of; one safetensors file is enough."""
    facts = json.loads(ckpt("inspect", place / "dcp", "--json")[1])
    assert (facts["kind"], "manifest" in facts) == ("dcp", False)
    assert set(facts["files"]) == {".metadata", "__0_0.distcp"}
    assert ckpt("convert", step_of(place), tmp_path / "export")[0] == 0
    facts = json.loads(ckpt("inspect", tmp_path / "export", "--json")[1])
    assert (facts["kind"], facts["export"]["architecture"]) == ("export", "LlamaForCausalLM")
    assert facts["export"]["source"]["step"] == 1
    assert facts["files"]["model.safetensors"] == (tmp_path / "export" / "model.safetensors").stat().st_size
    status, out, _ = ckpt("inspect", tmp_path / "export")
    assert status == 0
    assert "\nrule: tied: lm_head.weight is model.embed_tokens.weight" in out
    facts = json.loads(ckpt("inspect", tmp_path / "export" / "model.safetensors", "--json")[1])
    assert (facts["kind"], list(facts["files"])) == ("huggingface", ["model.safetensors"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such tensors are deprecated
        quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)
        dcp.save({"w": torch.ones(2), "x": quantized}, checkpoint_id=tmp_path / "foreign", no_dist=True)
    assert "\n  not read: x, of quantized elements, quint8\n" in ckpt("inspect", tmp_path / "foreign")[1]
    assert "x" in json.loads(ckpt("inspect", tmp_path / "foreign", "--json")[1])["unsupported"]
    PyTorchCheckpoint(hyperparameters={"a": 1}).save(tmp_path / "store", step=1)
    facts = json.loads(ckpt("inspect", tmp_path / "store" / "default" / "step_0000000001", "--json")[1])
    assert (facts["tensors"], facts["manifest"]["hyperparameters"]) == ({}, {"a": 1})


def test_verify_tells_good_from_bad(ckpt: Run, place: Path, tmp_path: Path) -> None:
    """A step, a DCP directory and an export pass with 0; a flipped bit, or NaN, fails with 1 and says where."""
    save_checkpoint(layers(), str(tmp_path / "dcp"))
    assert ckpt("convert", step_of(place), tmp_path / "export")[0] == 0
    for path, kind in ((step_of(place), "checkpoint"), (tmp_path / "dcp", "dcp"), (tmp_path / "export", "export")):
        status, out, err = ckpt("verify", path)
        assert (status, err) == (0, ""), out
        assert out.startswith(f"{kind} ")
        assert "FAIL" not in out
        report = json.loads(ckpt("verify", path, "--json")[1])
        assert (report["kind"], report["passed"]) == (kind, True)
    for file in (tmp_path / "dcp" / "__0_0.distcp", tmp_path / "export" / "model.safetensors"):
        data = bytearray(file.read_bytes())
        data[len(data) * 2 // 3] ^= 1
        file.write_bytes(data)
        status, out, err = ckpt("verify", file.parent)
        assert (status, err) == (1, "")
        assert "FAIL" in out
        report = json.loads(ckpt("verify", file.parent, "--json")[1])
        assert not report["passed"]
    module = layers()
    torch.nn.init.constant_(module[0].weight, float("nan"))
    save_checkpoint(module, str(tmp_path / "nan"))
    assert ckpt("verify", tmp_path / "nan")[0] == 1
    assert ckpt("verify", tmp_path / "nan", "--allow-nonfinite")[0] == 0


def test_verify_of_a_sample_says_what_it_left_out(ckpt: Run, place: Path) -> None:
    """--sample takes a share in percent or as a number; --seed chooses which chunks."""
    status, out, _ = ckpt("verify", step_of(place), "--sample", "10%", "--seed", "3")
    assert status == 0
    assert out.splitlines()[1].startswith("10 % of chunks: ")
    assert "digests of whole files not checked" in out
    assert "ok   digests" not in out
    report = json.loads(ckpt("verify", step_of(place), "--sample", "0.1", "--seed", "3", "--json")[1])
    assert report["sample"] == out.splitlines()[1]


def test_verify_shows_its_progress_on_a_terminal(
    ckpt: Run, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where standard error is a terminal it shows the bytes read; the answer on standard output stays one object."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = ckpt("verify", step_of(place), "--json")
    assert (status, json.loads(out)["passed"]) == (0, True)
    assert "100%" in err


def test_diff_tells_how_two_differ(ckpt: Run, place: Path, tmp_path: Path) -> None:
    """Equal ones exit with 0, others with 1 and a line for each tensor that differs, and what is none with 1."""
    assert ckpt("convert", step_of(place), tmp_path / "export")[0] == 0
    status, out, err = ckpt("diff", step_of(place), tmp_path / "export")
    assert (status, err) == (0, "")
    assert out.startswith("equal: ")
    assert out.endswith("(names without 'model.')\n")
    assert json.loads(ckpt("diff", step_of(place, 1), step_of(place, 2), "--json")[1])["equal"]
    module = layers()
    save_checkpoint(module, str(tmp_path / "a"))
    torch.nn.init.constant_(module[0].bias, 5.0)
    module[3] = torch.nn.Linear(4, 2).bfloat16()
    module.append(torch.nn.Linear(1, 1))
    save_checkpoint(module, str(tmp_path / "b"))
    status, out, err = ckpt("diff", tmp_path / "a", tmp_path / "b")
    assert (status, err) == (1, "")
    lines = {line.split()[-1] if "only" in line else line.split()[1]: line for line in out.splitlines()[:-1]}
    assert "4 of 4 elements, 0 of them NaN or Inf; largest difference " in lines["model.0.bias"]
    assert "(1, 4) and (2, 4)" in lines["model.3.weight"]
    assert lines["model.4.bias"].startswith("only in b ")
    assert out.splitlines()[-1].startswith("different: ")
    facts = json.loads(ckpt("diff", tmp_path / "a", tmp_path / "b", "--json")[1])
    assert (facts["equal"], facts["counts"]["only in b"]) == (False, 2)
    assert ckpt("diff", tmp_path / "a", tmp_path / "none")[0] == 1
    assert ckpt("diff", tmp_path / "a")[0] == 2


def test_list_and_prune_work_on_a_store(ckpt: Run, tmp_path: Path) -> None:
    """The committed steps are listed by run; prune leaves the newest ones of each run, or of one."""
    store = tmp_path / "store"
    for command in (
        ("list", store),
        ("prune", store, "--keep-last", 1),
        ("repair", store),
        ("pin", store, "a", "x", 1),
    ):
        assert ckpt(*command)[0] == 1
    assert not store.exists()
    store.mkdir()
    assert ckpt("list", store)[:2] == (0, f"{store.as_uri()}: no committed steps\n")
    for run in ("a", "b"):
        for step in (1, 2, 3):
            PyTorchCheckpoint(hyperparameters={"a": 1}).save(store, step=step, run=run)
    status, out, _ = ckpt("list", store)
    assert status == 0
    assert len(out.splitlines()) == 6
    facts = json.loads(ckpt("list", store, "--json")[1])
    assert [entry["step"] for entry in facts["runs"]["a"]] == [1, 2, 3]
    assert facts["runs"]["b"][0]["url"] == (store / "b" / "step_0000000001").as_uri()
    dry = ("prune", store, "--keep-last", 2, "--run", "a", "--dry-run")
    assert json.loads(ckpt(*dry, "--json")[1]) == {"would_delete": {"a": [1]}, "errors": []}
    assert ckpt(*dry)[1] == "a: would delete [1]\n"
    pruned = json.loads(ckpt("prune", store, "--keep-last", 2, "--run", "a", "--json")[1])
    assert pruned == {"deleted": {"a": [1]}, "leased": {"a": []}, "errors": []}
    with open_store(store).list("a")[0].lease():
        status, out, _ = ckpt("prune", store, "--keep-last", "1")
    assert status == 0
    assert out == "a: deleted nothing\nb: deleted [1, 2]\na: being read, so left: [2]\n"
    assert ckpt("prune", store, "--keep-last", "1")[1] == "a: deleted [2]\nb: deleted nothing\n"
    assert {run: [c.step for c in open_store(store).list(run)] for run in ("a", "b")} == {"a": [3], "b": [3]}


def test_prune_keeps_the_best_and_every_nth_and_the_pinned(ckpt: Run, tmp_path: Path) -> None:
    """The rules of a policy are options; a pin keeps a step until it is taken away."""
    store = tmp_path / "store"
    for step in range(1, 9):
        PyTorchCheckpoint(hyperparameters={"a": 1}).save(store, step=step, run="a", metrics={"loss": abs(step - 3)})
    status, out, _ = ckpt("pin", store, "a", "champion", 5)
    assert (status, out) == (0, "a: champion is step 5\n")
    assert ckpt("list", store)[1].splitlines()[4].endswith("champion")
    policy = ("--keep-last", 1, "--keep-best", 1, "--metric", "loss", "--mode", "min", "--keep-every", 6)
    assert json.loads(ckpt("prune", store, *policy, "--json")[1])["deleted"] == {"a": [1, 2, 4, 7]}
    assert json.loads(ckpt("list", store, "--json")[1])["pins"] == {"a": {"champion": 5}}
    assert json.loads(ckpt("unpin", store, "a", "champion", "--json")[1]) == {"pins": {}}
    assert json.loads(ckpt("prune", store, *policy, "--json")[1])["deleted"] == {"a": [5]}
    assert ckpt("pin", store, "a", "champion", 5)[0] == 1
    assert ckpt("unpin", store, "a", "champion")[0] == 2
    assert ckpt("prune", store, "--keep-last", 1, "--keep-best", 2)[0] == 2


def test_prune_deletes_nothing_where_the_request_is_unclear(ckpt: Run, tmp_path: Path) -> None:
    """Unknown metrics, directions and runs are errors before anything goes, in any run; accuracy is maximised."""
    store = tmp_path / "store"
    for run, name in (("a", "accuracy"), ("b", "score")):
        for step in (1, 2, 3):
            metrics = {name: 0.9 if step == 1 else 0.1}
            PyTorchCheckpoint(hyperparameters={"a": 1}).save(store, step=step, run=run, metrics=metrics)
    best = ("prune", store, "--keep-last", 1, "--keep-best", 1, "--metric")
    for options, status, text in (
        ((*best, "acuracy", "--run", "a"), 2, "whether a lower or a higher one is better is not known"),
        ((*best, "acuracy", "--mode", "max", "--run", "a"), 2, "no step has a finite one"),
        ((*best, "accuracy"), 2, "run 'b': metric 'accuracy': no step has a finite one"),
        ((*best, "accuracy", "--mode", "min", "--run", "a"), 2, "a higher accuracy is the better one"),
        ((*best, "score", "--run", "b"), 2, "say which"),
        (("prune", store, "--keep-last", 1, "--mode", "max"), 2, "of what"),
        (("prune", store, "--keep-last", 1, "--run", "c"), 1, "it has a, b"),
        (("repair", store, "--run", "c"), 1, "it has a, b"),
        (("prune", tmp_path / "stor", "--keep-last", 1), 1, "no such directory"),
    ):
        for dry_run in ((), ("--dry-run",)) if options[0] == "prune" else ((),):
            found, _, said = ckpt(*options, *dry_run)
            assert (found, text in said) == (status, True), said
    assert {run: [c.step for c in open_store(store).list(run)] for run in ("a", "b")} == {
        "a": [1, 2, 3],
        "b": [1, 2, 3],
    }
    assert ckpt(*best, "accuracy", "--run", "a")[1] == "a: deleted [2]\n"


def test_prune_tells_of_an_unsound_step(ckpt: Run, tmp_path: Path) -> None:
    """The exit status says that not all is well, and older steps stay; a run that is a link is left out."""
    store = tmp_path / "store"
    for step in (1, 2, 3):
        PyTorchCheckpoint(module=layers()).save(store, step=step, run="a")
    data = store / "a" / "step_0000000003" / "model" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (store / "alias").symlink_to("a")
    status, out, _ = ckpt("prune", store, "--keep-last", 1)
    assert status == 1
    assert out.startswith("a: deleted [1]\n")
    assert "step 3 was not found to be sound" in out
    assert len(out.splitlines()) == 2


def test_repair_sets_damaged_steps_aside(ckpt: Run, tmp_path: Path) -> None:
    """A step that lacks a file is no longer there afterwards, and what was done is said; then there is no more."""
    store = tmp_path / "store"
    for step in (1, 2):
        PyTorchCheckpoint(module=layers()).save(store, step=step, run="a")
    (store / "a" / "step_0000000001" / "model" / "__0_0.distcp").unlink()
    status, out, _ = ckpt("repair", store, "--dry-run")
    assert (status, "step_0000000001: would be set aside" in out) == (0, True)
    assert len(json.loads(ckpt("repair", store, "--dry-run", "--json")[1])["would_repair"]["a"]) == 1
    status, out, _ = ckpt("repair", store)
    assert status == 0
    assert "step_0000000001" in out
    assert json.loads(ckpt("repair", store, "--run", "a", "--json")[1]) == {"repaired": {"a": []}}
    assert ckpt("repair", store)[1] == f"{store.as_uri()}: nothing to repair\n"
    assert not (store / "a" / "step_0000000001").exists()


def test_convert_makes_an_export(ckpt: Run, place: Path, tmp_path: Path) -> None:
    """A step needs nothing else; a DCP directory takes its config from --model; --plan writes nothing."""
    status, out, err = ckpt("convert", step_of(place), tmp_path / "one", "--plan")
    assert (status, err) == (0, "")
    assert out.startswith("LlamaForCausalLM: ")
    assert "rule: tied: lm_head.weight is model.embed_tokens.weight" in out
    planned = json.loads(ckpt("convert", step_of(place), tmp_path / "one", "--plan", "--json")[1])
    assert planned["tensors"]["model.norm.weight"]["sources"] == ["model.model.norm.weight"]
    assert planned["reads_bytes"] > planned["bytes"] == sum(planned["shards_bytes"].values())  # tied ones, to compare
    assert list(tmp_path.iterdir()) == []
    status, out, _ = ckpt("convert", step_of(place), tmp_path / "one")
    assert (status, out.startswith(f"{tmp_path / 'one'}: LlamaForCausalLM, ")) == (0, True)
    rules = json.loads((tmp_path / "one" / "export.json").read_text())["rules"]
    assert out.splitlines()[1:] == [f"  rule: {rule}" for rule in rules]
    assert planned["rules"] == rules
    status, out, _ = ckpt("convert", place / "dcp", tmp_path / "two", "--model", place / "config", "--json")
    facts = json.loads(out)
    assert (status, facts["architecture"], facts["path"]) == (0, "LlamaForCausalLM", str(tmp_path / "two"))
    assert facts["rules"] == json.loads((tmp_path / "two" / "export.json").read_text())["rules"]
    assert "tokenizer.json" in facts["files"]
    assert facts["startup_s"] > 0 < facts["write_s"]
    assert ckpt("convert", step_of(place), tmp_path / "three", "--model", place / "config")[0] == 0
    assert json.loads((tmp_path / "three" / "export.json").read_text())["source"]["step"] == 1
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_converts_options_do_what_they_say(ckpt: Run, place: Path, tmp_path: Path) -> None:
    """--dtype casts, --max-shard-size splits, --overwrite replaces, --tokenizer chooses, --allow-nonfinite allows."""
    source, out = step_of(place), tmp_path / "out"
    assert ckpt("convert", source, out, "--dtype", "bfloat16")[0] == 0
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    status, text, err = ckpt("convert", source, out, "--max-shard-size", "4KB")
    assert (status, text) == (1, "")
    assert err.startswith(f"ckpt: {out}: exists")
    assert ckpt("convert", source, out, "--max-shard-size", "4KB", "--overwrite")[0] == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    bare = tmp_path / "bare"
    model_of("llama tied").config.save_pretrained(bare)
    assert ckpt("convert", place / "dcp", tmp_path / "no words", "--model", bare)[0] == 0
    assert not (tmp_path / "no words" / "tokenizer.json").exists()
    words = ("--tokenizer", place / "words")
    assert ckpt("convert", place / "dcp", tmp_path / "words", "--model", bare, *words)[0] == 0
    assert (tmp_path / "words" / "tokenizer.json").exists()
    other = tokenizer()
    other.add_special_tokens({"eos_token": "w7"})
    other.save_pretrained(tmp_path / "other")
    assert ckpt("convert", source, tmp_path / "other words", "--tokenizer", tmp_path / "other")[0] == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "other words" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    other.add_tokens(["<beyond the rows>"])
    other.save_pretrained(tmp_path / "other")
    status, _, err = ckpt("convert", source, tmp_path / "too many words", "--tokenizer", tmp_path / "other")
    assert (status, "token ids up to 40" in err) == (1, True)
    assert not (tmp_path / "too many words").exists()
    model = model_of("llama tied")
    torch.nn.init.constant_(model.model.norm.weight, float("inf"))
    save_checkpoint(model, str(tmp_path / "inf"))
    arguments = ("convert", tmp_path / "inf", tmp_path / "from inf", "--model", bare)
    assert ckpt(*arguments)[0] == 1
    assert ckpt(*arguments, "--allow-nonfinite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "COMMAND"),
        (["nothing"], 2, "invalid choice"),
        (["inspect"], 2, "path"),
        (["prune", "{}"], 2, "--keep-last"),
        (["prune", "{}", "--keep-last", "0", "--run", "a"], 2, "at least 1"),
        (["prune", "{}", "--keep-last", "1", "--run", "../a"], 2, "run"),
        (["list", "nothing://bucket"], 2, "nothing"),
        (["verify", "{}", "--sample", "0"], 2, "share such as 5%"),
        (["verify", "{}", "--sample", "5 parts"], 2, "share such as 5%"),
        (["diff", "{}"], 2, "B"),
        (["diff", "{}/a", "{}/missing"], 1, "missing"),
        (["prune", "{}", "--keep-last", "1", "--mode", "most"], 2, "invalid choice"),
        (["pin", "{}", "a", "champion"], 2, "STEP"),
        (["convert", "{}/a", "{}/b", "--max-shard-size", "big"], 2, "size such as 5GB"),
        (["convert", "{}/a", "{}/b", "--max-shard-size", "0"], 2, "size such as 5GB"),
        (["convert", "{}/a", "{}/b", "--dtype", "int8"], 2, "invalid choice"),
        (["convert", "{}/a", "{}/b"], 2, "--model"),
        (["convert", "{}/a", "{}/a/b", "--model", "{}"], 2, "lies in the other"),
        (["hub", "serve", "{}/hub", "--port", "70000"], 2, "70000"),
        (["publish", "{}/a", "not an id"], 2, "not an id"),
        (["inspect", "{}/missing"], 1, "no DCP checkpoint"),
        (["verify", "{}/missing"], 1, "missing"),
        (["convert", "{}/missing", "{}/b", "--model", "{}"], 1, "no DCP checkpoint"),
        (["convert", "{}/a", "{}/b", "--model", "{}/a"], 1, "config"),
    ],
)
def test_errors_go_to_standard_error(ckpt: Run, tmp_path: Path, arguments: list[str], status: int, text: str) -> None:
    """Misuse is 2, a bad thing 1; the reason is on standard error; with --json it is one JSON object as well."""
    save_checkpoint(layers(), str(tmp_path / "a"))
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.format(tmp_path) for argument in arguments]
    found, out, err = ckpt(*arguments)
    assert (found, out) == (status, "")
    assert text in err
    found, out, err = ckpt(*arguments, "--json")
    assert found == status
    assert text in err
    if out:
        error = json.loads(out)["error"]
        assert text in error["message"]
        assert error["type"].endswith("Error")
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_are_read_as_people_write_them() -> None:
    """Units are powers of ten, in either case, with or without B."""
    sizes = {"5GB": 5 * 10**9, "200mb": 2 * 10**8, "1.5K": 1500, "7": 7, "2 TB": 2 * 10**12}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "GB", "-1", "5XB", "0B", "5 5", "1e3"):
        with pytest.raises(argparse.ArgumentTypeError, match="size such as"):
            parse_size(text)


def test_shares_are_read_as_people_write_them() -> None:
    """A share is a percentage or a number above 0 and at most 1."""
    shares = {"5%": 0.05, " 5 %": 0.05, "0.05": 0.05, "100%": 1.0, "1": 1.0, "0.5%": 0.005}
    assert {text: parse_share(text) for text in shares} == pytest.approx(shares)
    for text in ("", "%", "0", "0%", "-5%", "101%", "5", "nan", "inf", "five"):
        with pytest.raises(argparse.ArgumentTypeError, match="share such as"):
            parse_share(text)


def test_help_names_every_command(ckpt: Run) -> None:
    """`ckpt --help` exits with 0 and tells of each command."""
    status, out, _ = ckpt("--help")
    assert status == 0
    for command in (
        "inspect", "verify", "diff", "list", "prune", "repair", "pin", "unpin", "convert", "publish", "hub",
    ):  # fmt: skip
        assert f"  {command} " in out


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start the program in a process of its own."""
    command = [sys.executable, "-m", "ckpt_core.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_hub_is_served_until_a_signal_comes(tmp_path: Path, number: int) -> None:
    """`ckpt hub serve --json` says once where it serves, and ends with 0 on TERM and on an interrupt."""
    process = start("hub", "serve", tmp_path / "hub", "--json")
    assert process.stdout is not None
    try:
        facts = json.loads(process.stdout.readline())
        assert facts["directory"] == str(tmp_path / "hub")
        assert facts["endpoint"].startswith("http://127.0.0.1:")
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_an_export_is_published_to_a_served_hub(ckpt: Run, place: Path, tmp_path: Path) -> None:
    """`ckpt publish` makes a release, tagged v1; the same export again changes nothing."""
    assert ckpt("convert", step_of(place), tmp_path / "export")[0] == 0
    server = start("hub", "serve", tmp_path / "hub", "--json")
    assert server.stdout is not None
    try:
        endpoint = json.loads(server.stdout.readline())["endpoint"]
        environment = child_environment_for(endpoint, tmp_path / "home", token="hf_any")
        for created in (True, False):
            process = start("publish", tmp_path / "export", "team/model", "--json", env=environment)
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, "")
            release = json.loads(out)
            assert (release["repo_id"], release["tag"], release["created"]) == ("team/model", "v1", created)
        out, err = start("publish", tmp_path / "export", "team/model", "--tag", "v1 v1", env=environment).communicate()
        assert (out, "v1 v1" in err) == ("", True)
    finally:
        server.kill()
        server.communicate()
