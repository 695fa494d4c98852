"""Paths and URLs as arguments: one parser for all of them; what is not supported is refused before anything is done."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from upath import UPath

from ckpt_core import (
    AsyncSaver,
    PyTorchCheckpoint,
    errors,
    export,
    hub,
    io,
    native_checkpoint,
    open_checkpoint,
    open_store,
)
from ckpt_core.cli import main
from ckpt_core.diff import diff
from ckpt_core.evaluation import evaluate
from ckpt_core.export import abandon_conversion
from ckpt_core.export.imports import import_hf
from ckpt_core.export.names import read_table
from ckpt_core.store import LocalStore
from ckpt_core.summary import summarize
from ckpt_core.testing.hub_server import hub_server
from ckpt_core.urls import is_reachable, local_path, name_or_path, place_of, writable_place
from ckpt_core.verify import verify


class Named:
    """An `os.PathLike` that is no Path."""

    def __init__(self, path: str | bytes) -> None:
        self._path = path

    def __fspath__(self) -> str | bytes:
        return self._path

    def __repr__(self) -> str:
        return f"Named({self._path!r})"  # names a test alike in every process


REFUSED: dict[str, Any] = {
    "mistyped scheme": "s33://bucket/x",
    "one slash": "s3:/bucket/x",
    "no slash": "s3:bucket/x",
    "no colon": "s3//bucket/x",
    "case": "S3://bucket/x",
    "blank before": " s3://bucket/x",
    "no bucket": "s3:///x",
    "dots in a URL": "memory://a/../b",
    "chained": "simplecache::memory://x",
    "URL as Path": Path("s3://bucket/x"),
    "URL as absolute Path": Path("memory://x").absolute(),
    "host": "file://host/x",
    "query": "file:///x?y",
    "drive": "C:\\models\\x",
    "drive with slashes": "C:/models/x",
    "share": "\\\\server\\x",
    "empty": "",
    "blank": " ",
    "NUL": "a\0b",
    "NUL in a URL": "file:///a%00b",
    "no such user": "~nobody-of-that-name/x",
    "bytes": b"x",
    "bytes of fspath": Named(b"x"),
    "number": 3,
    "list": ["x"],
}


def module() -> torch.nn.Module:
    """Return a small model."""
    return torch.nn.Linear(2, 2)


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return its optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def save_native(**paths: Any) -> None:
    """Save a model, with an optimizer and a tokenizer, at these paths."""
    model = module()
    defaults: Any = {"weights_path": "weights", "optimizer_path": "optimizer", "tokenizer_path": "tokenizer"}
    native_checkpoint.save_checkpoint(model, optimizer=optimizer(model), tokenizer=Tokenizer(), **{**defaults, **paths})


class Tokenizer:
    """Writes one file."""

    def save_pretrained(self, directory: str) -> None:
        """Write it."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "tokenizer.json").write_text("{}")


def convert_native(**paths: Any) -> str:
    """Call `convert_dcp_to_hf`."""
    given: Any = {
        "dcp_ckpt_path": "dcp",
        "hf_ckpt_path": "hf",
        "model_name_or_path": "config",
        "tokenizer_name_or_path": "config",
    }
    return native_checkpoint.convert_dcp_to_hf(**{**given, **paths})


def save_assets(assets: Any) -> None:
    """Save a checkpoint with assets."""
    PyTorchCheckpoint(module()).save("store", step=1, assets=assets)


def save_assets_later(assets: Any) -> None:
    """Save a checkpoint with assets in the background."""
    with AsyncSaver("store") as saver:
        saver.save(PyTorchCheckpoint(module()), step=1, assets=assets)


def serve(directory: Any) -> None:
    """Run the local Hub."""
    with hub_server(directory):
        pass


NO_ASSETS = export.Assets({"model_type": "llama"}, {})

READS: dict[str, Callable[[Any], object]] = {
    "from_url": PyTorchCheckpoint.from_url,
    "open_checkpoint": open_checkpoint,
    "load_checkpoint weights_path": lambda p: native_checkpoint.load_checkpoint(module(), p),
    "convert_dcp_to_hf dcp_ckpt_path": lambda p: convert_native(dcp_ckpt_path=p),
    "verify": verify,
    "summarize": summarize,
    "diff a": lambda p: diff(p, "."),
    "SafeReader": lambda p: io.SafeReader(p).read_metadata(),
    "SafeReader reset": lambda p: io.SafeReader("dcp").reset(p),
    "io.load": lambda p: io.load({}, p),
    "io.read_state": io.read_state,
    "import_hf source": lambda p: import_hf(p, "imported"),
    "convert directory": lambda p: export.convert(p, "hf", assets=NO_ASSETS),
}
"""Arguments that name something to read, as a path or a URL."""

WRITES: dict[str, Callable[[Any], object]] = {
    "save": lambda p: PyTorchCheckpoint(module()).save(p, step=1),
    "AsyncSaver": AsyncSaver,
    "open_store": open_store,
    "io.save": lambda p: io.save({"a": torch.ones(1)}, p),
    "DigestWriter": io.DigestWriter,
    "DigestWriter reset": lambda p: io.DigestWriter("dcp").reset(p),
    "convert_dcp_to_hf hf_ckpt_path": lambda p: convert_native(hf_ckpt_path=p),
    "convert target": lambda p: export.convert(Path("dcp"), p, assets=NO_ASSETS),
    "abandon_conversion": abandon_conversion,
}
"""Arguments that name something to write, as a path or a URL."""

LOCAL: dict[str, Callable[[Any], object]] = {
    "save assets": save_assets,
    "AsyncSaver.save assets": save_assets_later,
    "LocalStore": LocalStore,
    "save_checkpoint weights_path": lambda p: save_native(weights_path=p),
    "save_checkpoint optimizer_path": lambda p: save_native(optimizer_path=p),
    "save_checkpoint tokenizer_path": lambda p: save_native(tokenizer_path=p),
    "save_tokenizer_on_rank0": lambda p: native_checkpoint.save_tokenizer_on_rank0(Tokenizer(), p),
    "convert_dcp_to_hf model_name_or_path": lambda p: convert_native(model_name_or_path=p),
    "import_hf target": lambda p: import_hf("hf", p),
    "read_table": read_table,
    "evaluate model": lambda p: evaluate(p, np.ones((1, 2), np.int64)),
    "publish export": lambda p: hub.stage(p, "./releases"),
    "download directory": lambda p: hub.download("./releases", "v1", directory=p),
    "card template": lambda p: hub.render_card(title="a", summary="b", repo_id="a/b", template=p),
    "hub_server": serve,
}
"""Arguments that name something on this machine."""


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("argument", [*READS, *WRITES, *LOCAL])
def test_what_is_no_path_is_refused_everywhere(empty: Path, argument: str) -> None:
    """No function takes what is neither a path nor a URL, and nothing is written: above all no directory `s3:`."""
    call = (READS | WRITES | LOCAL)[argument]
    for kind, given in REFUSED.items():
        if argument in {"evaluate model", "card template"} and not isinstance(given, str | os.PathLike):
            continue  # a live model; a value of another type
        with pytest.raises(errors.ArgumentError) as caught:
            call(given)
        assert caught.value.__cause__ is None, kind
        assert list(empty.iterdir()) == [], (kind, str(caught.value))


@pytest.mark.parametrize("argument", LOCAL)
def test_a_url_is_refused_where_only_paths_are_supported(empty: Path, argument: str) -> None:
    """The error names the argument, or says what can be done, and nothing is written."""
    for url in ("memory://urls/x", "s3://bucket/x", "hf://owner/name"):
        with pytest.raises(errors.ArgumentError, match=r"local|not a directory|only local exports") as caught:
            LOCAL[argument](url)
        assert url in str(caught.value)
        assert list(empty.iterdir()) == []


@pytest.mark.parametrize("argument", WRITES)
def test_what_is_only_read_is_refused_as_a_target(empty: Path, argument: str) -> None:
    """Nothing is written to the Hub file by file, or to a web server."""
    for url in ("hf://owner/name", "https://example.com/x"):
        with pytest.raises(errors.ArgumentError, match="only read"):
            WRITES[argument](url)
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "PATH"],
        ["verify", "PATH"],
        ["diff", "PATH", "."],
        ["diff", ".", "PATH"],
        ["list", "PATH"],
        ["prune", "PATH", "--keep-last", "1"],
        ["repair", "PATH"],
        ["pin", "PATH", "run", "name", "1"],
        ["unpin", "PATH", "run", "name"],
        ["convert", "PATH", "out"],
        ["convert", "dcp", "PATH"],
        ["import", "PATH", "out"],
        ["import", "hf", "PATH"],
        ["publish", "PATH", "./releases"],
    ],
    ids=" ".join,
)
def test_commands_refuse_it_too(empty: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """Each command ends with 2, and an error of one line."""
    for kind in ("one slash", "mistyped scheme", "drive", "empty", "NUL"):
        arguments = [str(REFUSED[kind]) if part == "PATH" else part for part in command]
        if command[:2] == ["diff", "."]:
            (empty / ".metadata").touch()
            arguments[1] = str(empty)
        assert main(arguments) in ({1, 2} if command[0] == "diff" else {2}), kind
        said = capsys.readouterr()
        assert said.err.startswith("ckpt: ")
        assert said.out == ""
    assert [path.name for path in empty.iterdir()] in ([], [".metadata"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("x", "CWD/x"),
        ("x/", "CWD/x"),
        ("./x", "CWD/x"),
        (".", "CWD"),
        (Path("x"), "CWD/x"),
        (Named("x/y"), "CWD/x/y"),
        (UPath("x"), "CWD/x"),
        ("/a/b", "/a/b"),
        ("file:///a/b%20c", "/a/b c"),
        ("file://localhost/a", "/a"),
        ("local:///a/b", "/a/b"),
        ("~", "HOME"),
        ("~/x", "HOME/x"),
        (Path("~/x"), "HOME/x"),
        ("./~/x", "CWD/~/x"),
        ("run:1/step", "CWD/run:1/step"),
        ("12:30/x", "CWD/12:30/x"),
        ("a//b", "CWD/a/b"),
        ("ü 猫", "CWD/ü 猫"),
        ("\udcff", "CWD/\udcff"),
    ],
    ids=repr,
)
def test_paths(empty: Path, monkeypatch: pytest.MonkeyPatch, given: Any, expected: str) -> None:
    """A path in any form is one absolute Path."""
    monkeypatch.setenv("HOME", "/home/of/mine")
    wanted = Path(expected.replace("CWD", str(empty)).replace("HOME", "/home/of/mine"))
    for parse in (place_of, writable_place, local_path):
        found = parse(given)
        assert (found, isinstance(found, Path)) == (wanted, True)


@pytest.mark.parametrize("given", ["memory://a/b", "memory://a/b/", UPath("memory://a/b")], ids=repr)
def test_urls(given: Any) -> None:
    """A URL of a scheme that fsspec knows is a place there; a slash at its end names no other one."""
    assert str(place_of(given)) == str(writable_place(given)) == "memory://a/b"
    assert is_reachable(given)
    with pytest.raises(errors.ArgumentError, match=r"^ARGUMENT: memory://a/b/?: expected a local path"):
        local_path(given, "ARGUMENT")


def test_a_hub_id_is_left_as_it_is(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that may be a Hub id is not made absolute; what begins like a path is."""
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert name_or_path("owner/name", "model") == "owner/name"
    assert name_or_path("./owner/name", "model") == str(empty / "owner" / "name")
    assert name_or_path("~/name", "model") == "/home/of/mine/name"
    assert name_or_path(Path("name"), "model") == str(empty / "name")


def test_a_conversion_to_a_url_and_back(empty: Path) -> None:
    """`convert_dcp_to_hf` writes to a URL where a store is, and `import_hf` reads from there."""
    from small_transformers import checkpoint_of, model_of, tokenizer

    directory, _ = checkpoint_of(model_of("llama"), empty)
    config = str(empty / "assets")
    tokenizer().save_pretrained(config)
    target = "memory://urls/export"
    assert native_checkpoint.convert_dcp_to_hf(str(directory), target, config, config) == target
    assert verify(target).passed
    assert diff(str(directory), target).equal
    import_hf(target, empty / "back")
    assert diff(str(directory), empty / "back").equal
    with pytest.raises(FileExistsError):
        native_checkpoint.convert_dcp_to_hf(str(directory), target, config, config)
    assert not list(empty.glob("memory*"))
