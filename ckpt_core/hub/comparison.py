"""An export beside what a target serves: evaluated on the same data in one process, and decided."""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

from ckpt_core.errors import ArgumentError, DamagedError
from ckpt_core.evaluation import METRICS, Evaluation, evaluate
from ckpt_core.heldout import read_rows
from ckpt_core.hub.card_facts import export_card
from ckpt_core.hub.contents import CARD, MANIFEST, Content, read_contents
from ckpt_core.hub.picture import CURVE_NAME
from ckpt_core.hub.releases import Release
from ckpt_core.hub.serving import download, served
from ckpt_core.hub.target import Tree, open_target
from ckpt_core.policy import Decision, Policy, decide
from ckpt_core.urls import local_path


@dataclass(frozen=True)
class Comparison:
    """What is served, how good it and the export are, and which of them is to be served.

    Where the export is what is served already, nothing was evaluated, and there is nothing to decide.
    """

    served: Release | None
    same: bool
    challenger: Evaluation | None
    champion: Evaluation | None
    decision: Decision | None

    @property
    def figures(self) -> dict[str, Any]:
        """Both models' figures and the decision, in JSON types; None for what is no finite number or was not made."""
        return {
            "challenger": _finite(self.challenger.metrics) if self.challenger else None,
            "champion": _finite(self.champion.metrics) if self.champion else None,
            "decision": _finite(asdict(self.decision)) if self.decision else None,
        }


def policy_for(data: str | PathLike[str], metric: str | None = None, margin: float = 0.0) -> Policy:
    """Return the policy of a metric; by default bits a byte for text, which any two tokenizers share, else the loss.

    Raises:
        ArgumentError: a margin that is none, or data that is damaged.
    """
    name = metric or ("bits_per_byte" if read_rows(data) is None else "heldout_loss")
    return Policy(name, METRICS[name].direction, margin)


def compare(
    export: str | PathLike[str],
    where: str | PathLike[str],
    data: str | PathLike[str],
    policy: Policy,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Evaluate an export and what a target serves on the same data, and decide by a policy.

    `trust_remote_code` allows models that bring Python code of their own; it then runs with your rights.

    Raises:
        ArgumentError: a wrong argument, or a model that cannot be evaluated on the data.
        DamagedError: the export is not what its `export.json` says, or holds not all weights.
        HubError: the target cannot be read.
    """
    contents = read_contents(export, lambda _: "")
    release = served(where, endpoint=endpoint, token=token)
    if release is not None:
        tree = open_target(where, endpoint=endpoint, token=token).tree(release.commit)
        if _is_release_of(tree, contents, tagged=release.tag is not None):
            return Comparison(release, same=True, challenger=None, champion=None, decision=None)
    challenger, champion = evaluate(export, data, trust_remote_code=trust_remote_code), None
    if release is not None:
        with tempfile.TemporaryDirectory() as directory:
            place = download(where, release.commit, endpoint=endpoint, token=token, directory=directory)
            champion = _evaluate_served(place, data, release, trust_remote_code=trust_remote_code)
    decision = decide(policy, challenger.metrics, champion.metrics if champion else None)
    return Comparison(release, same=False, challenger=challenger, champion=champion, decision=decision)


def compared_card(
    export: str | PathLike[str], where: str | PathLike[str], data: str | PathLike[str], comparison: Comparison
) -> str:
    """Return a card with the figures of an export that was compared, and with what `export.json` says."""
    figures, release = comparison.figures, comparison.served
    others = {f"Served before ({release.tag or release.commit[:12]})": figures["champion"]} if release else {}
    return export_card(
        str(where),
        json.loads((local_path(export, "export") / MANIFEST).read_bytes()),
        metrics=figures["challenger"],
        compared=others,
        evaluated_on={
            "name": local_path(data, "data").name,
            "fingerprint": cast("Evaluation", comparison.challenger).fingerprint,
        },
        decision=figures["decision"]["reason"],
    )


def _is_release_of(tree: Tree, contents: Mapping[str, Content], *, tagged: bool) -> bool:
    """Whether a tree is an export with any card and, untagged, no pictures but ours: a hand may have added files."""
    held = all(path in tree and tree[path].holds(contents[path]) for path in contents.keys() - {CARD})
    return held and (tagged or tree.keys() - contents.keys() <= {CURVE_NAME})


def _evaluate_served(
    place: Path, data: str | PathLike[str], release: Release, *, trust_remote_code: bool
) -> Evaluation:
    try:
        return evaluate(place, data, trust_remote_code=trust_remote_code)
    except (ArgumentError, DamagedError) as error:
        raise type(error)(f"{release.url} is served, and cannot be compared with: {error}") from error


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
