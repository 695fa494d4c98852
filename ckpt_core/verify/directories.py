"""The checks of any directory that has no record of ours: each DCP directory in it, and Hugging Face weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_core.format.index import RANK_METADATA
from ckpt_core.hf_weights import INDEX_SUFFIX, SUFFIX, has_weights
from ckpt_core.locate import find_dcp
from ckpt_core.verify.dcp import dcp_checks, read_contents
from ckpt_core.verify.exports import huggingface_checks
from ckpt_core.verify.report import Check, Report
from ckpt_core.verify.tree import Tree, read_tree
from ckpt_core.verify.work import Work

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_TRAINING_STATE = ("optim", "sched", "lr_sched", "trainer", "dataloader", "rng")
"""What the names of directories begin with in which NaN and Inf may be in order."""


def verify_directory(place: Place, work: Work) -> Report:
    """Check every DCP directory at or below `place`, and Hugging Face weights in it.

    Raises:
        NotACheckpointError: there is neither.
    """
    if not place.is_dir() and has_weights(place):
        checks, _ = huggingface_checks(place, {}, work)
        return Report(str(place), "huggingface", tuple(checks), work.sample.said())
    tree = read_tree(place) if place.is_dir() else Tree(place)
    if not tree.dcp and not has_weights(place):
        find_dcp(place)  # its error says what was looked for
    checks: list[Check] = []
    checked: set[str] = set()
    if tree.dcp:
        found, named = _dcp(tree, work)
        checks, checked = checks + found, checked | named
    # Where there are DCP directories, pickles next to them are not the model's weights.
    if not tree.dcp or any(name.endswith((SUFFIX, INDEX_SUFFIX)) and "/" not in name for name in tree.files):
        found, named = huggingface_checks(place, tree.files, Work(work.sample, work.finite, work.progress))
        checks, checked = checks + found, checked | named
    kind = "dcp" if tree.dcp else "huggingface"
    path = next(iter(tree.dcp.values())) if len(tree.dcp) == 1 and len(checked) == len(tree.files) else place
    return Report(str(path), kind, tuple(checks), work.sample.said(), tree.unchecked(checked))


def _dcp(tree: Tree, work: Work) -> tuple[list[Check], set[str]]:
    """Return the checks of DCP directories, and the files that they looked into."""
    models = {name for name in tree.dcp if not name.rpartition("/")[2].startswith(_TRAINING_STATE)}
    read = {
        name: read_contents(directory, work.findings, finite=work.finite and name in models, choose=work.sample.choose)
        for name, directory in tree.dcp.items()
    }
    contents = {name: each for name, each in read.items() if each is not None}
    work.read([reading for each in contents.values() for reading in each.readings()])
    checked = {f"{name}/{span.file}".lstrip("/") for name, each in contents.items() for span in each.index.spans()}
    checked |= {name for name in tree.files if RANK_METADATA.fullmatch(name.rpartition("/")[2])}
    return dcp_checks(contents, work, models), checked
