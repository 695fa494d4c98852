"""The README's blocks run, and what it says of the tree is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckpt_core import PyTorchCheckpoint
from ckpt_core.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks(language):
    """Return the README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with the checkpoint that the README's commands name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes))
    PyTorchCheckpoint(model).save("runs", step=10, metrics={"heldout_loss": 3.0})
    return tmp_path


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run_as_they_stand(block, tmp_path):
    """Each Python block runs in a fresh process in an empty directory."""
    path = tmp_path / "block.py"
    path.write_text(block if "__main__" not in block else block.split("if __name__")[0])
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(BIN), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [block for block in blocks("sh") if block.startswith("ckpt")])
def test_ckpt_commands_run_as_they_stand(block, workplace, capsys):
    """Each line of a block of `ckpt` commands exits with 0, and says something."""
    for line in block.splitlines():
        status = main(shlex.split(line)[1:])
        said = capsys.readouterr()
        assert status == 0, f"{line}\n{said.out}{said.err}"
        assert said.out.strip()


def test_make_targets_do_what_the_readme_says():
    """`make run` starts the retrain flow, and `make test` every check."""
    shown = {
        target: subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("run", "test")
    }
    assert "python -m flows.retrain" in shown["run"]
    for check in ("ruff check", "ruff format --check", "pyright", "lint-imports", "pytest"):
        assert check in shown["test"]


def test_the_tree_is_there():
    """Every path that the README's file tree names exists."""
    (tree,) = [block for block in blocks("text") if block.startswith("ckpt_core/")]
    parents: list[str] = []
    for line in tree.splitlines():
        names, depth = line.split("   ")[0].strip(), (len(line) - len(line.lstrip())) // 2
        for name in names.split(", "):
            parents[depth:] = [name]
            assert (ROOT / "".join(parents[: depth + 1])).exists(), name


def test_each_promise_names_tests_that_are_there():
    """Each line of "What holds" links to tests, and each of them is there."""
    [section] = re.findall(r"^## What holds\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    promises = re.split(r"^- ", section, flags=re.MULTILINE)[1:]
    assert len(promises) >= 10
    for promise in promises:
        links = re.findall(r"\[(test_\w+)\]\(([\w/]+\.py)\)", promise)
        assert links, promise
        for name, path in links:
            assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}: no {name}"
