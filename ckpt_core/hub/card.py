"""A release's model card: what it is, how good, where it comes from, how to load it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ckpt_core.errors import ArgumentError

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~&$])")
_LIST_START = re.compile(r"^(\d*)([-+=.)])")
_FENCE = "```"


def render_card(
    *,
    title: str,
    summary: str,
    repo_id: str,
    tag: str | None = None,
    metrics: Mapping[str, float] | None = None,
    lineage: Mapping[str, object] | None = None,
    hardware: Mapping[str, object] | None = None,
    pipeline_tag: str = "text-generation",
    auto_class: str = "AutoModelForCausalLM",
    license: str | None = None,  # noqa: A002  the Hub's own name of this field
    tags: Sequence[str] = (),
) -> str:
    """Return the text of a README.md with the Hub's metadata at its top.

    All text is plain: it is escaped, paragraphs of the summary stay. `metrics` are finite numbers; `lineage` and
    `hardware` are shown as tables in their order. Equal arguments give equal bytes. A card with a `tag` belongs to that
    release alone: publishing the same export under the next version is then a change. Raises ArgumentError for a
    metric that is not a finite number, and for an `auto_class` that is no name.
    """
    if not auto_class.isidentifier():
        raise ArgumentError(f"auto_class {auto_class!r} is not the name of a class in transformers")
    sections = [
        f"---\n{_metadata(pipeline_tag, license, tags)}---",
        f"# {_line(title)}",
        "\n\n".join(_paragraph(paragraph) for paragraph in re.split(r"\n\s*\n", summary.strip())),
        _table("Metrics", "Metric", {name: _number(name, value) for name, value in (metrics or {}).items()}),
        _table("Lineage", "What", lineage or {}),
        _table("Hardware", "What", hardware or {}),
        _loading(repo_id, tag, auto_class),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(pipeline_tag: str, license_name: str | None, tags: Sequence[str]) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline_tag}
    if license_name is not None:
        fields["license"] = license_name
    fields["tags"] = list(dict.fromkeys(["ckptflow", "safetensors", *tags]))
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=10**6)


def _number(name: str, value: float) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):  # pyright: ignore[reportUnnecessaryIsInstance] callers may be untyped
        raise ArgumentError(f"metric {name!r} is {value!r}; a card shows finite numbers only")
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _table(heading: str, first_column: str, rows: Mapping[str, object]) -> str:
    if not rows:
        return ""
    lines = [f"## {heading}", "", f"| {first_column} | Value |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {_line(name)} | {_line(str(value))} |" for name, value in rows.items())])


def _loading(repo_id: str, tag: str | None, auto_class: str) -> str:
    revision = f", revision={_quoted(tag)}" if tag else ""
    arguments = f"{_quoted(repo_id)}{revision}"
    code = [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f"model = {auto_class}.from_pretrained({arguments})",
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})",
    ]
    return "\n".join(["## How to load", "", f"{_FENCE}python", *code, _FENCE])


def _line(text: str) -> str:
    """Return plain text as one line of Markdown that shows it as it is."""
    single = " ".join(text.split())
    return _MARKDOWN.sub(r"\\\1", single)


def _paragraph(text: str) -> str:
    """Return plain text as a paragraph, which must not begin like a list or underline what is above it."""
    return _LIST_START.sub(r"\1\\\2", _line(text))


def _quoted(text: str) -> str:
    return '"' + re.sub(r'(["\\])', r"\\\1", " ".join(text.split())) + '"'
