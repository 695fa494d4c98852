"""The metadata at the top of a model card, and what the Hub would not accept in it."""

import re
from typing import Any, cast

import yaml

from ckpt_core.card_metadata import find_problems

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def parse_card(content: str) -> dict[str, Any]:
    """Return the YAML at the top of a card, `{}` without one; raises ValueError where it is no mapping."""
    match = _FRONT_MATTER.match(content)
    if match is None:
        return {}
    try:
        metadata: Any = yaml.safe_load(match[1])
    except yaml.YAMLError as problem:
        raise ValueError(f"the card's metadata is not YAML: {problem}") from None
    if not isinstance(metadata, dict):
        raise ValueError("the card's metadata is not a YAML mapping")  # noqa: TRY004  content, not a call
    return cast("dict[str, Any]", metadata)


def check_card(content: str) -> dict[str, Any]:
    """Return a card's metadata; raises CardError where the Hub would not take it."""
    try:
        metadata = parse_card(content)
    except ValueError as problem:
        raise CardError([str(problem)]) from None
    if problems := find_problems(metadata):
        raise CardError(problems)
    return metadata


class CardError(ValueError):
    """A card's metadata is not what the Hub takes; `problems` has a sentence for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def card_metadata(content: bytes) -> dict[str, Any]:
    """Return a card's metadata as JSON can carry it; `{}` where it cannot be read."""
    try:
        metadata = parse_card(content.decode())
    except ValueError:
        return {}
    return {str(key): _plain(value) for key, value in metadata.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value if isinstance(value, str | int | bool | None) else str(value)
