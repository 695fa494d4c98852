"""Python code in a Hugging Face directory, which loading it might run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from ckpt_core.durable import file_size
from ckpt_core.verify.report import Check
from ckpt_core.verify.work import Work

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_CONFIG_SUFFIX = "config.json"
"""Of the model's config, the tokenizer's and the processor's: each may name code."""

_MAX_CONFIG_BYTES = 16 << 20


def code_check(place: Place, work: Work) -> Check:
    """Return the check that a Hugging Face directory brings no Python code, and that no config names any."""
    configs = 0
    for name in sorted(entry.name for entry in place.iterdir()):
        if name.endswith(".py"):
            work.findings.add("code", _brought(place / name, "Python code"))
        elif name.endswith(_CONFIG_SUFFIX):
            configs += 1
            for problem in _named(place / name):
                work.findings.add("code", problem)
    return work.findings.check("code", f"none, and none named by {configs} configs")


def _named(config: Place) -> Iterator[str]:
    """Yield what is wrong with a config."""
    try:
        document = json.loads(_config_bytes(config))
    except (ValueError, OSError, RecursionError) as error:
        yield f"{config}: whether it names code is not known, for it is not readable ({error}); restore a copy of it."
        return
    if isinstance(document, dict) and cast("dict[str, Any]", document).get("auto_map"):
        yield _brought(config, "auto_map, which names Python code")


def _config_bytes(config: Place) -> bytes:
    size = file_size(config)
    if size is None or size > _MAX_CONFIG_BYTES:
        raise ValueError(f"no regular file of at most {_MAX_CONFIG_BYTES} bytes")
    return config.read_bytes()


def _brought(where: Place, what: str) -> str:
    return (
        f"{where}: {what}, which loading with trust_remote_code would run; read it and trust its author, or take it "
        "away and load with a class that transformers has."
    )
