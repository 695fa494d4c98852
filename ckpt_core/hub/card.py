"""A release's model card: what it is, how good, where it comes from, how to load it."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypedDict

import yaml

from ckpt_core.errors import ArgumentError
from ckpt_core.evaluation import METRICS
from ckpt_core.hub.card_text import render_template
from ckpt_core.urls import local_path

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_TEMPLATE = Path(__file__).with_name("card_template.md")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_BREAKS = re.compile("[\x85\u2028\u2029]")
_PICTURE = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


class EvaluatedOn(TypedDict, total=False):
    """The data that a model was evaluated on."""

    name: str
    """What people call it."""
    type: str
    """A data set's id on the Hub, or a name of one's own."""
    split: str
    fingerprint: str
    """A digest of it, as `Evaluation` has."""


def render_card(
    *,
    title: str,
    summary: str,
    repo_id: str,
    tag: str | None = None,
    metrics: Mapping[str, float | None] | None = None,
    compared: Mapping[str, Mapping[str, float | None]] | None = None,
    evaluated_on: EvaluatedOn | None = None,
    decision: str | None = None,
    curve: str | None = None,
    lineage: Mapping[str, object] | None = None,
    libraries: Mapping[str, object] | None = None,
    hardware: Mapping[str, object] | None = None,
    license: str | None = None,  # noqa: A002  the Hub's own name of this field
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    pipeline_tag: str | None = "text-generation",
    auto_class: str = "AutoModelForCausalLM",
    tags: Sequence[str] = (),
    metadata: Mapping[str, object] | None = None,
    template: str | PathLike[str] | None = None,
) -> str:
    """Return the text of a README.md with the Hub's metadata at its top. Equal arguments give equal bytes.

    All text is plain, and is escaped; the paragraphs of the summary stay. A card with a `tag` belongs to that release
    alone: publishing the same export under the next version is then a change.

    Args:
        title: the heading.
        summary: what the model is.
        repo_id: where it is published: `owner/name` on the Hub, or the path or URL of another target.
        tag: the release's version, named where the card shows how to load it.
        metrics: this model's figures by the names of `ckpt_core.evaluation.METRICS` or others; None: not measured.
        compared: figures of others by what they are, say the champion before it.
        evaluated_on: the data of all these figures.
        decision: why it was promoted.
        curve: file name of a picture beside the card.
        lineage: rows of a table, in their order; so are `libraries` and `hardware`.
        libraries: versions of what made it.
        hardware: what it was trained on.
        license: as the Hub abbreviates it.
        base_model: id on the Hub of the model that training began from.
        datasets: ids on the Hub of what it was trained on.
        pipeline_tag: the Hub's name of the task.
        auto_class: the class of transformers that loads it.
        tags: more words to find it by.
        metadata: more of the Hub's fields, such as `language`.
        template: path of a Jinja2 template for what follows the metadata. It has all arguments as variables, and
            `labels` of the metrics; what it prints is escaped, but for what went through the filter `paragraphs`,
            `quoted` (for code) or `safe`.

    Raises:
        ArgumentError: a figure that is no finite number, a name that is none, or a template with an error in it.
    """
    if not auto_class.isidentifier():
        raise ArgumentError(f"auto_class {auto_class!r} is not the name of a class in transformers")
    if curve is not None and not _PICTURE.fullmatch(curve):
        raise ArgumentError(f"curve {curve!r} is not the plain name of a file")
    figures = {name: _finite(name, value) for name, value in (metrics or {}).items() if value is not None}
    facts: dict[str, Any] = {
        "title": title,
        "summary": summary,
        "repo_id": repo_id,
        "on_hub": _HUB_ID.fullmatch(repo_id) is not None,
        "tag": tag,
        "metrics": figures,
        "labels": {name: _label(name) for name in figures},
        "compared": {who: _others(who, figures, of) for who, of in (compared or {}).items()},
        "evaluated_on": {"name": "held-out data", "type": "held-out", "split": "", **(evaluated_on or {})},
        "decision": decision,
        "curve": curve,
        "lineage": {name: str(value) for name, value in (lineage or {}).items()},
        "libraries": {name: str(value) for name, value in (libraries or {}).items()},
        "hardware": {name: str(value) for name, value in (hardware or {}).items()},
        "license": license,
        "base_model": _checked_id("base_model", base_model) if base_model is not None else None,
        "datasets": [_checked_id("data set", name) for name in datasets],
        "pipeline_tag": pipeline_tag,
        "auto_class": auto_class,
        "tags": list(dict.fromkeys(["ckptflow", "safetensors", *tags])),
        "metadata": dict(metadata or {}),
    }
    body = render_template(local_path(template, "template") if template is not None else _TEMPLATE, _plain(facts))
    text = f"---\n{_front_matter(facts)}\n---\n\n{body.strip()}\n"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"the card of {title!r} cannot be written as UTF-8: {error.reason}") from None
    return text


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):  # pyright: ignore[reportUnnecessaryIsInstance] callers may be untyped
        raise ArgumentError(f"metric {name!r} is {value!r}; a card shows finite numbers only")
    return value


def _others(who: str, names: Iterable[str], figures: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return another model's figures for the same metrics."""
    found = {name: figures.get(name) for name in names}
    return {name: None if value is None else _finite(f"{name} of {who}", value) for name, value in found.items()}


def _label(name: str) -> str:
    metric = METRICS.get(name)
    if metric is None:
        return name
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def _checked_id(what: str, name: str) -> str:
    if not _HUB_ID.fullmatch(name):
        raise ArgumentError(f"{what} {name!r} is no id on the Hub, which is like my-team/my-model; leave it out")
    return name


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of JSON types, so that a template meets no object with a life of its own."""
    try:
        return json.loads(json.dumps(facts))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"a card's facts are text, numbers, lists and mappings of them ({error})") from None


class _Dumper(yaml.SafeDumper):
    """Writes Unicode's own line breaks as escapes: PyYAML folds text at U+0085 so that other text reads back."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if _BREAKS.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)  # pyright: ignore[reportUnknownMemberType]


_Dumper.add_representer(str, _Dumper.represent_text)


def _front_matter(facts: Mapping[str, Any]) -> str:
    """Return the Hub's metadata as YAML that reads back as what was given."""
    from huggingface_hub import ModelCard, ModelCardData

    own: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": facts["pipeline_tag"],
        "license": facts["license"],
        "base_model": facts["base_model"],
        "datasets": facts["datasets"] or None,
        "tags": facts["tags"],
        "model_name": PurePosixPath(facts["repo_id"]).name or "model",
        "eval_results": _eval_results(facts) or None,
    }
    if twice := own.keys() & facts["metadata"].keys():
        raise ArgumentError(f"metadata: {min(twice)} is an argument of its own")
    data = ModelCardData(**own, **facts["metadata"])
    if not data.eval_results:
        data.pop("model_name")
    text = yaml.dump(data.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True).strip()
    try:
        again = ModelCard(f"---\n{text}\n---\n").data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ArgumentError(f"metadata that YAML cannot hold ({error})") from None
    if again != data.to_dict():
        raise ArgumentError("metadata that YAML cannot hold: it reads back as something else")
    return text


def _eval_results(facts: Mapping[str, Any]) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    data = facts["evaluated_on"]
    return [
        EvalResult(
            task_type=facts["pipeline_tag"] or "other",
            dataset_type=data["type"],
            dataset_name=data["name"],
            dataset_split=data["split"] or None,
            dataset_args={"fingerprint": data["fingerprint"]} if "fingerprint" in data else None,
            metric_type=name,
            metric_name=facts["labels"][name],
            metric_value=value,
        )
        for name, value in facts["metrics"].items()
    ]
