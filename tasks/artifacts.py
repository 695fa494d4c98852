"""What a person sees in the Prefect UI: cards and tables of what a run made.

The work does not depend on them: where the server cannot be reached, the log says what was not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger

from tasks import cards, lineage

if TYPE_CHECKING:
    from tasks.publication import Destination


def checkpoint_card(url: str) -> None:
    """Show a checkpoint: what it is, where, how good, what its save cost, what it came from, and its loss curve."""
    _show(cards.checkpoint(url))


def report_table(kind: str, run: str, checks: Sequence[Mapping[str, Any]]) -> None:
    """Show the checks of a validation or gate, one a row."""
    rows = [
        {"check": check["name"], "verdict": "pass" if check["passed"] else "FAIL", "found": check["detail"]}
        for check in checks
    ]
    failed = [check["name"] for check in checks if not check["passed"]]
    found = f"FAILED: {', '.join(failed)}" if failed else f"all {len(rows)} checks passed"
    _send(create_table_artifact, rows, cards.key(kind, run), found)


def export_card(run: str, export: Mapping[str, Any]) -> None:
    """Show an export: its files with sizes and digests, and the rules that were applied."""
    _show(cards.export(run, export))


def release_card(run: str, at: Destination, verdict: Mapping[str, Any], compared: Mapping[str, Any] | None) -> None:
    """Show what became of an export, why, and how good it is beside what was served.

    Args:
        run: names the artifact.
        at: where the release went, or would have.
        verdict: `decision`, `release` and `candidate`, as `flows.verdict.Verdict` has them.
        compared: what `tasks.publication.compare` returned; None without an evaluation.
    """
    _show(cards.release(run, at, verdict, compared))


def rollback_card(run: str, at: Destination, release: Mapping[str, Any], step: int | None) -> None:
    """Show what is served after a roll back, and which step the run's next retrain starts from."""
    _show(cards.rollback(run, at, release, step))


def lineage_card(run: str, summary: Mapping[str, Any], kept: str) -> None:
    """Show what a retrain made of what, as a diagram, and where the same is kept for tools.

    Args:
        run: names the artifact.
        summary: as `flows.summary.Summary.to_dict` returns it.
        kept: the path of the file that holds it.
    """
    _show(lineage.card(run, summary, kept))


def maintenance(card: cards.Card, rows: Sequence[Mapping[str, str | int]]) -> None:
    """Show what was found and done in a store: a summary, and a table with a line for each run."""
    _show(card)
    _send(create_table_artifact, list(rows), cards.key(card.key, "runs"), card.description)


def _show(card: cards.Card) -> None:
    _send(create_markdown_artifact, card.text, card.key, card.description)


def _send(create: Callable[..., Any], data: Any, key: str, description: str) -> None:
    try:
        create(data, key=key, description=description)
    except httpx.HTTPError as error:
        get_run_logger().warning("the artifact %s (%s) is not shown: %r", key, description, error)
