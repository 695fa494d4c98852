"""The conventions of `ckpt` as a program: output, errors, numbers, signals, and what it is given that is no good."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_core import PyTorchCheckpoint, cli, errors
from ckpt_core.cli import stores
from ckpt_core.cli.command import Answer, printable
from ckpt_core.locate import find_dcp

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs one command and returns its exit status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = int(str(exit_.code or 0))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a step whose metrics are not finite."""
    metrics = {"loss": float("nan"), "worst": float("inf")}
    PyTorchCheckpoint(torch.nn.Linear(2, 2)).save(tmp_path / "store", step=1, run="a", metrics=metrics)
    return tmp_path / "store"


def strict(text: str) -> Any:
    """Parse JSON as its standard has it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def answer_with(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[str]:
    """Have `ckpt list` return an answer, or raise an error; return its arguments."""

    def run(_: object) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(stores, "_list", run)
    return ["list", "store"]


def test_the_version_is_the_packages(ckpt: Run) -> None:
    """`--version` prints one line and ends well."""
    from importlib.metadata import version

    assert ckpt("--version") == (0, f"ckpt {version('ckptflow')}\n", "")


def test_completion_scripts_are_printed(ckpt: Run, tmp_path: Path) -> None:
    """Bash takes the script, and completes a command by it."""
    for shell in ("bash", "zsh", "tcsh"):
        status, out, err = ckpt("--print-completion", shell)
        assert (status, err) == (0, "")
        assert "convert" in out
    status, out, _ = ckpt("--print-completion", "bash")
    (tmp_path / "completion").write_text(out)
    program = f'. {tmp_path}/completion; COMP_WORDS=(ckpt conv); COMP_CWORD=1; _shtab_ckpt; echo "${{COMPREPLY[@]}}"'
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["convert"]
    assert ckpt("--print-completion", "fish")[0] == 2


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_ends_it_quietly(stream: str) -> None:
    """Whoever reads may stop, as `head` does: no traceback, and the status that a shell gives for SIGPIPE."""
    program = "import sys; from ckpt_core import cli; sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["--version"] if stream == "stdout" else ["list"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        files: Any = {stream: writer, {"stdout": "stderr", "stderr": "stdout"}[stream]: subprocess.PIPE}
        result = subprocess.run([sys.executable, "-c", program, *arguments], text=True, check=False, **files)
    finally:
        os.close(writer)
    assert result.returncode == 141
    assert not result.stdout
    assert not result.stderr


def test_no_output_at_all_is_no_error(ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose standard output was closed from the start still does its work."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(answer_with(monkeypatch, Answer({}, ["text"]))) == 0


def test_a_full_device_is_an_error_of_the_output(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What cannot be printed is said on standard error."""
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(answer_with(monkeypatch, Answer({}, ["text"]))) == 1
        monkeypatch.undo()
        full._CHUNK_SIZE = 1
        with pytest.raises(OSError, match="No space"):
            full.flush()
        with pytest.raises(OSError, match="No space"):
            full.close()
    assert "No space left on device; make room" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["verify", "x", "--sample", value] for value in ("0%", "nan", "nan%", "200%", "-5%", "", "1e-999", "%")),
        *(["verify", "x", "--seed", value] for value in ("1.5", "x", "9" * 5000)),
        *(["convert", "a", "b", "--workers", value] for value in ("0", "-3", "1.5", "many", "9" * 5000, "1000000")),
        *(
            ["convert", "a", "b", "--max-shard-size", value]
            for value in ("0", "-1GB", "nonsense", "5PB5", "nan", "9" * 400, "", "0.0000001KB")
        ),
        *(["import", "a", "b", "--max-file-size", value] for value in ("0", "inf")),
        *(["import", "a", "b", "--workers", value] for value in ("0", "-1")),
        *(["publish", "a", "b", "--margin", value] for value in ("nan", "inf", "x")),
        *(["hub", "serve", "--port", value] for value in ("-1", "65536", "x")),
        *(["prune", "x", "--keep-last", value] for value in ("x", "1.5")),
        ["convert", "a", "b", "--work", "2"],
        ["convert"],
        ["no-such-command"],
        [],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_bad_arguments_are_misuse(ckpt: Run, arguments: list[str]) -> None:
    """Exit 2, the usage and one line on standard error; with --json the error is an object on standard output."""
    status, out, err = ckpt(*arguments)
    assert (status, out) == (2, "")
    assert "usage: ckpt" in err
    assert "Traceback" not in err
    status, out, err = ckpt(*arguments, "--json")
    assert status == 2
    assert strict(out)["error"].keys() == {"type", "message"}


def test_numbers_are_json_numbers(ckpt: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinities are null; what JSON has no type for is text."""
    status, out, _ = ckpt("list", store, "--json")
    assert status == 0
    assert strict(out)["runs"]["a"][0]["metrics"] == {"loss": None, "worst": None}
    facts = {"a": [float("nan"), {"b": (1.0, float("-inf"))}], "path": Path("/x"), "text": "\ud800"}
    status, out, _ = ckpt(*answer_with(monkeypatch, Answer(facts)), "--json")
    assert strict(out) == {"a": [None, {"b": [1.0, None]}], "path": "/x", "text": "\ud800"}


@pytest.mark.parametrize(
    ("error", "status", "kind", "text"),
    [
        (errors.ArgumentError("step: wrong"), 2, "ArgumentError", "step: wrong"),
        (errors.DamagedError("file: damaged"), 1, "DamagedError", "file: damaged"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "PermissionError", "/x: Permission denied; this"),
        (OSError(errno.ENOSPC, "", "/x"), 1, "OSError", "/x: No space left on device; make room"),
        (OSError("no number"), 1, "OSError", "no number"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt", "interrupted"),
        (RuntimeError("odd"), 1, "RuntimeError", "RuntimeError: odd (a fault of ckpt itself"),
        (RecursionError("deep"), 1, "RecursionError", "RecursionError: deep"),
        (AssertionError(), 1, "AssertionError", "AssertionError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_are_a_line_and_an_object(
    ckpt: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, kind: str, text: str
) -> None:
    """Each error has its exit status, its class and its text, and no traceback but where one is asked for."""
    arguments = answer_with(monkeypatch, error)
    found, out, err = ckpt(*arguments)
    assert (found, out) == (status, "")
    assert err.startswith(f"ckpt: {text}")
    assert "Traceback" not in err
    found, out, _ = ckpt(*arguments, "--json")
    assert found == status
    assert strict(out)["error"]["type"] == kind
    assert strict(out)["error"]["message"].startswith(text)
    monkeypatch.setenv("CKPT_TRACEBACK", "1")
    assert "Traceback" in ckpt(*arguments)[2]


def test_text_cannot_act_on_the_terminal(ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters are printed as escapes, in answers and in errors; other writing stays as it is."""
    assert printable("a\tb é 猫") == "a\tb é 猫"
    line = "\x1b]0;title\x07\x9b2J\u202eabc\r\nnext\ud800"
    shown = "\\x1b]0;title\\x07\\x9b2J\\u202eabc\\r\\nnext\\ud800\n"
    assert ckpt(*answer_with(monkeypatch, Answer({}, [line])))[1] == shown
    assert "\x1b" not in ckpt(*answer_with(monkeypatch, errors.DamagedError(line)))[2]


def test_an_encoding_without_the_letters_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a locale without the letters of a name, they are escapes."""
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert cli.main(answer_with(monkeypatch, Answer({}, ["é 猫"]))) == 0
    assert (tmp_path / "out").read_text() == "\\xe9 \\u732b\n"


NO_FILE = "no-such-file"


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", NO_FILE],
        ["verify", NO_FILE],
        ["diff", NO_FILE, NO_FILE],
        ["list", NO_FILE],
        ["list", "binary"],
        ["prune", NO_FILE, "--keep-last", "1"],
        ["repair", NO_FILE],
        ["pin", NO_FILE, "run", "name", "1"],
        ["unpin", NO_FILE, "run", "name"],
        ["convert", NO_FILE, "out"],
        ["convert", NO_FILE, "out", "--plan"],
        ["convert", "binary", "out", "--model", "binary"],
        ["convert", "binary", "out", "--names", "binary"],
        ["import", NO_FILE, "out"],
        ["import", "binary", "out"],
        ["import", "binary", "out", "--names", NO_FILE],
        ["publish", NO_FILE, "./releases"],
        ["publish", "binary", "./releases"],
        ["rollback", "./no-such-directory", "--to", "v1"],
        ["inspect", "binary"],
        ["verify", "binary"],
        ["diff", "binary", "binary"],
        ["inspect", "/dev/null"],
        ["verify", "fifo"],
        ["inspect", "loop"],
        ["inspect", "x" * 300],
        ["convert", "binary", "y" * 300],
    ],
    ids=lambda arguments: " ".join(arguments)[:50],
)
def test_what_is_not_there_or_no_checkpoint_is_an_error(
    ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Every command ends with 1 or 2 and one message, and makes nothing."""
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(bytes(range(256)) * 64)
    Path("loop").symlink_to("loop")
    os.mkfifo("fifo")
    status, out, err = ckpt(*arguments)
    assert status in {1, 2}
    assert out == ""
    assert err.startswith("ckpt: ")
    assert "fault of ckpt itself" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary", "fifo", "loop"]
    status, out, _ = ckpt(*arguments, "--json")
    assert strict(out).keys() == {"error"}


def test_a_deep_table_of_names_is_an_error(ckpt: Run, tmp_path: Path) -> None:
    """JSON of lists in lists ends no parser."""
    (tmp_path / "names.json").write_text('{"drop": ' + "[" * 100_000)
    status, _, err = ckpt("import", tmp_path, tmp_path / "out", "--names", tmp_path / "names.json")
    assert status == 2
    assert "not a table of names" in err


def test_a_hint_costs_little(tmp_path: Path) -> None:
    """A checkpoint near by is named; a large tree, or the root, is not searched through."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / ".metadata").touch()
    with pytest.raises(errors.NotACheckpointError, match=r"there is one at .*runs/a"):
        find_dcp(tmp_path)
    wide = tmp_path / "wide"
    for number in range(300):
        (wide / f"{number:03d}" / "b").mkdir(parents=True)
    seen: list[str] = []
    iterdir = Path.iterdir

    def counted(path: Path) -> Any:
        seen.append(str(path))
        return iterdir(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", counted)
        for place in (wide, Path("/")):
            seen.clear()
            with pytest.raises(errors.NotACheckpointError, match="no DCP checkpoint in it; give"):
                find_dcp(place)
            assert len(seen) <= 100
        assert seen == []


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal on standard error, or without any, nothing is drawn."""
    from ckpt_core.cli.bar import Bar

    with Bar() as bar:
        bar.show(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", None)
    with Bar() as bar:
        bar.show(2, 2)
    assert capsys.readouterr().out == ""
