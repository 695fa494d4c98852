"""`ckpt publish`, `ckpt rollback` and `ckpt hub`: what a Hub, a directory or a bucket serves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.cli.bar import Bar
from ckpt_core.cli.command import Answer, Commands, parse_finite, parse_port, write_json, write_lines
from ckpt_core.errors import ArgumentError
from ckpt_core.evaluation import METRICS

if TYPE_CHECKING:
    from ckpt_core.hub import Candidate
    from ckpt_core.hub.comparison import Comparison
    from ckpt_core.testing.hub_server import HubServer


_SHOWN = 5


def add_commands(commands: Commands) -> None:
    """Add the commands that publish exports and take releases back."""
    publish = commands.add("publish", _publish, "publish an export: staged, compared, one commit, tagged")
    publish.add_argument("export", metavar="EXPORT", help="what ckpt convert wrote")
    publish.add_argument("where", metavar="WHERE", help="NAMESPACE/NAME on the Hub, or a directory's path or a URL")
    publish.add_argument("--tag", help="default: the next of v1, v2, ...")
    publish.add_argument("--private", action="store_true", help="create the repository as private")
    publish.add_argument("--read-back", action="store_true", help="read every byte back too, and compare it")
    publish.add_argument(
        "--eval",
        metavar="DATA",
        help="publish only what is better on it than what is served: text (a file, directory or glob), or token rows",
    )
    publish.add_argument("--metric", choices=METRICS, help="default: bits_per_byte on text, heldout_loss on tokens")
    publish.add_argument("--margin", type=parse_finite, default=0.0, metavar="X", help="by how much it must be better")
    _add_endpoint(publish)
    rollback = commands.add("rollback", _roll_back, "serve an earlier release again, by a new commit")
    rollback.add_argument("where", metavar="REPO_ID", help="or a directory's path or a URL")
    rollback.add_argument("--to", required=True, metavar="TAG", help="the release to serve")
    rollback.add_argument("--read-back", action="store_true", help="read every byte of it first, on the Hub too")
    _add_endpoint(rollback)
    hub = commands.add_group("hub", "the local Hub server")
    serve = hub.add("serve", _serve_hub, "serve the repositories in a directory, as the Hub does")
    serve.add_argument("directory", nargs="?", default="runs/hub", metavar="DIR")
    serve.add_argument("--port", type=parse_port, default=0, metavar="N", help="default: a free one")


def _add_endpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("--endpoint", metavar="URL", help="of the Hub; default: HF_ENDPOINT, or huggingface.co")


def _publish(options: argparse.Namespace) -> Answer:
    from ckpt_core.hub import promote

    if (options.metric or options.margin) and not options.eval:
        raise ArgumentError("--metric and --margin are about --eval DATA; give it too")
    _hide_bars_of_others()
    compared = _compare(options) if options.eval else None
    decision, figures = (compared.decision, compared.figures) if compared else (None, {})
    if decision and not decision.promote:
        return Answer(figures, [decision.reason, f"{options.where}: not published"], good=False)
    release = promote(options.where, _candidate(options, compared), tag=options.tag, endpoint=options.endpoint)
    state = "published" if release.created else "was published already, unchanged"
    told = [decision.reason] if decision else []
    told.append(f"{release.repo_id} {release.tag} {state}: {release.url}")
    if release.replaced:
        told.append(f"main had files that no release has, and that are in its history only: {_some(release.replaced)}")
    return Answer(asdict(release) | figures, told)


def _compare(options: argparse.Namespace) -> Comparison:
    from ckpt_core.hub.comparison import compare, policy_for

    policy = policy_for(options.eval, options.metric, options.margin)
    return compare(options.export, options.where, options.eval, policy, endpoint=options.endpoint)


def _candidate(options: argparse.Namespace, compared: Comparison | None) -> Candidate:
    """Stage an export, with its figures on the card unless it brings one; or find what is served to be the same."""
    from ckpt_core.hub import Candidate, stage
    from ckpt_core.hub.comparison import compared_card
    from ckpt_core.hub.contents import CARD

    card = parent = None
    if compared:
        parent = compared.served.commit if compared.served else ""
    if compared and compared.same:
        return Candidate(options.where, "", parent or "", parent)
    if compared and not (Path(options.export) / CARD).exists():
        card = compared_card(options.export, options.where, options.eval, compared)
    with Bar() as bar:
        return stage(
            options.export,
            options.where,
            tag=options.tag,
            private=options.private,
            endpoint=options.endpoint,
            card=card,
            parent=parent,
            progress=bar.show,
            read_back=options.read_back,
        )


def _roll_back(options: argparse.Namespace) -> Answer:
    from ckpt_core.hub import roll_back

    release = roll_back(options.where, options.to, endpoint=options.endpoint, read_back=options.read_back)
    state = f"is served again, by commit {release.commit}" if release.created else "was served already"
    return Answer(asdict(release), [f"{release.repo_id} {release.tag} {state}: {release.url}"])


def _serve_hub(options: argparse.Namespace) -> None:
    """Serve until a signal comes; the answer is given when the server is ready."""
    from ckpt_core.testing.hub_server import serve

    def ready(server: HubServer) -> None:
        facts = {"endpoint": server.endpoint, "directory": str(server.directory)}
        text = f"serving {server.directory} at {server.endpoint}; use it with HF_ENDPOINT={server.endpoint}"
        if options.json:  # the answer, before it blocks
            write_json(facts)
        else:
            write_lines([text])

    serve(options.directory, port=options.port, ready=ready)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _hide_bars_of_others() -> None:
    """Show one bar, and none in a log: the Hub's client draws one a file, wherever it writes to."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
