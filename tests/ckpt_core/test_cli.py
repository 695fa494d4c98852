"""`ckpt`: what each command says and does, its JSON, and its exit status."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_child import child_environment_for
from safetensors.torch import load_file
from small_models import layers
from small_transformers import config_directory, model_of, tokenizer

from ckpt_core import PyTorchCheckpoint, cli, open_store
from ckpt_core.cli.exports import parse_size
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
            place / "store", step=step, run="first", assets=words, metrics={"loss": 0.5}
        )
    save_checkpoint(model, str(place / "dcp"))
    config_directory(model, place / "config")
    return place


def step_of(place: Path, step: int = 1) -> Path:
    """Return the directory of a step."""
    return place / "store" / "first" / f"step_{step:010d}"


def test_inspect_shows_what_is_there(ckpt: Run, place: Path) -> None:
    """It lists each tensor with type, shape and chunks and, of a committed step, who made it."""
    status, out, err = ckpt("inspect", step_of(place))
    assert (status, err) == (0, "")
    assert "run first, step 1" in out
    assert "model.model.norm.weight" in out
    assert "(16,)" in out
    status, out, err = ckpt("inspect", step_of(place).as_uri(), "--json")
    facts = json.loads(out)
    assert facts["path"] == str(step_of(place) / "model")
    assert facts["tensors"]["model.model.norm.weight"] == {"dtype": "float32", "shape": [16], "chunks": 1, "bytes": 64}
    assert (facts["manifest"]["step"], facts["manifest"]["metrics"]) == (1, {"loss": 0.5})
    assert facts["manifest"]["digest"].startswith("blake3:")
    assert "manifest" not in json.loads(ckpt("inspect", place / "dcp", "--json")[1])


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


def test_list_and_prune_work_on_a_store(ckpt: Run, tmp_path: Path) -> None:
    """The committed steps are listed by run; prune leaves the newest ones of each run, or of one."""
    store = tmp_path / "store"
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
    assert json.loads(ckpt("prune", store, "--keep-last", 2, "--run", "a", "--json")[1]) == {"deleted": {"a": [1]}}
    status, out, _ = ckpt("prune", store, "--keep-last", "1")
    assert status == 0
    assert out == "a: deleted [2]\nb: deleted [1, 2]\n"
    assert {run: [c.step for c in open_store(store).list(run)] for run in ("a", "b")} == {"a": [3], "b": [3]}


def test_convert_makes_an_export(ckpt: Run, place: Path, tmp_path: Path) -> None:
    """A step needs nothing else; a DCP directory takes its config from --model; --plan writes nothing."""
    status, out, err = ckpt("convert", step_of(place), tmp_path / "one", "--plan")
    assert (status, err) == (0, "")
    assert out.startswith("LlamaForCausalLM: ")
    assert "rule: tied: lm_head.weight is model.embed_tokens.weight" in out
    planned = json.loads(ckpt("convert", step_of(place), tmp_path / "one", "--plan", "--json")[1])
    assert planned["tensors"]["model.norm.weight"]["source"] == "model.model.norm.weight"
    assert list(tmp_path.iterdir()) == []
    status, out, _ = ckpt("convert", step_of(place), tmp_path / "one")
    assert (status, out.startswith(f"{tmp_path / 'one'}: LlamaForCausalLM, ")) == (0, True)
    status, out, _ = ckpt("convert", place / "dcp", tmp_path / "two", "--model", place / "config", "--json")
    facts = json.loads(out)
    assert (status, facts["architecture"], facts["path"]) == (0, "LlamaForCausalLM", str(tmp_path / "two"))
    assert "tokenizer.json" in facts["files"]
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
        (["list", "s3://bucket"], 2, "s3"),
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


def test_help_names_every_command(ckpt: Run) -> None:
    """`ckpt --help` exits with 0 and tells of each command."""
    status, out, _ = ckpt("--help")
    assert status == 0
    for command in ("inspect", "verify", "list", "prune", "convert", "publish", "hub"):
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
            assert process.returncode == 0, err
            release = json.loads(out)
            assert (release["repo_id"], release["tag"], release["created"]) == ("team/model", "v1", created)
        out, err = start("publish", tmp_path / "export", "team/model", "--tag", "v1 v1", env=environment).communicate()
        assert (out, "v1 v1" in err) == ("", True)
    finally:
        server.kill()
        server.communicate()
