"""Python code in a Hugging Face directory, which loading it might run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ckpt_core import documents
from ckpt_core.verify.report import Check
from ckpt_core.verify.work import Work

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_CONFIG_SUFFIX = "config.json"
"""Of the model's config, the tokenizer's and the processor's: each may name code."""

_MAX_CONFIG_BYTES = 16 << 20


def is_config(name: str) -> bool:
    """Whether a file of this name may name code that loading runs."""
    return name.endswith(_CONFIG_SUFFIX)


def code_check(files: Mapping[str, Place], work: Work) -> Check:
    """Return the check that a Hugging Face directory brings no Python code, and that no config names any.

    Args:
        files: what lies in the directory and below it, by its path there.
        work: what was found.
    """
    configs = sorted(name for name in files if is_config(name))
    for name in sorted(files):
        if name.endswith(".py"):
            work.findings.add("code", _brought(files[name], "Python code"))
    for name in configs:
        for problem in _named(files[name]):
            work.findings.add("code", problem)
    return work.findings.check("code", f"none, and none named by {len(configs)} configs")


def _named(config: Place) -> Iterator[str]:
    """Yield what is wrong with a config."""
    try:
        document = documents.read_object(config, _MAX_CONFIG_BYTES)
    except (ValueError, OSError) as error:
        yield f"{config}: whether it names code is not known, for it is not readable ({error}); restore a copy of it."
        return
    if document.get("auto_map"):
        yield _brought(config, "auto_map, which names Python code")


def _brought(where: Place, what: str) -> str:
    return (
        f"{where}: {what}, which loading with trust_remote_code would run; read it and trust its author, or take it "
        "away and load with a class that transformers has."
    )
