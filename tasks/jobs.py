"""The heavy work of a flow, in child processes of its own: `python -m tasks.jobs NAME REQUEST`.

A request is a JSON object, and so is the result; torch is imported here and never in the flow's process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ckpt_core.errors import ArgumentError
from tasks.child import child_main
from tasks.config import ModelSettings
from tasks.conversion_jobs import check_export, convert, finish_conversion

Request = dict[str, Any]


def validate(request: Request) -> dict[str, Any]:
    """Check a checkpoint's bytes, structure and values, and its loss on held-out text, if there is some.

    Args:
        request: `url`; `heldout` (prepared tokens) or null; `max_heldout_loss` or null; `allow_nonfinite`.

    Returns:
        `checks` (see `ckpt_core.verify.Check`) and `heldout_loss`, nats a token, or null.
    """
    from ckpt_core.verify import verify

    report = verify(request["url"], allow_nonfinite=request["allow_nonfinite"])
    checks, loss = [asdict(check) for check in report.checks], None
    if request["heldout"] is not None and report.passed:
        loss = _loss(_restored(request["url"]), request["heldout"])
        checks.append(_limit(loss, request["max_heldout_loss"]))
    return {"checks": checks, "heldout_loss": loss}


def compare(request: Request) -> dict[str, Any]:
    """Evaluate an export, the release that the Hub serves and an untrained model on the same held-out text.

    Args:
        request: `export`, `heldout`, `repo_id`, `endpoint`, `model` (settings), `tokenizer`, `seed`.

    Returns:
        `challenger` and `untrained`: loss in nats a token; `champion`: null, or its `tag`, `loss`, and whether it is
        the `same` as the export; `better`: whether the export should become the release.
    """
    from ckpt_core.hub import download, latest_release

    repo = {"endpoint": request["endpoint"]}
    challenger = _loss(_exported(Path(request["export"])), request["heldout"])
    release, champion = latest_release(request["repo_id"], **repo), None
    if release is not None:
        with tempfile.TemporaryDirectory() as directory:
            path = download(request["repo_id"], release.tag, directory=directory, **repo)
            same = (path / "export.json").read_bytes() == (Path(request["export"]) / "export.json").read_bytes()
            champion = {"tag": release.tag, "loss": _loss(_exported(path), request["heldout"]), "same": same}
    better = champion is None or champion["same"] or challenger < champion["loss"]
    untrained = _loss(_untrained(request), request["heldout"])
    return {"challenger": challenger, "champion": champion, "untrained": untrained, "better": better}


def publish(request: Request) -> dict[str, Any]:
    """Publish an export with a model card, in one commit, read back and tagged.

    Args:
        request: `export`, `repo_id`, `endpoint`, `private`, and `card`: arguments of `ckpt_core.hub.render_card`.

    Returns:
        The fields of `ckpt_core.hub.Release`.
    """
    from ckpt_core import hub

    card = hub.render_card(repo_id=request["repo_id"], **request["card"])
    release = hub.publish(
        request["export"], request["repo_id"], private=request["private"], endpoint=request["endpoint"], card=card
    )
    return asdict(release)


JOBS: dict[str, Callable[[Request], dict[str, Any]]] = {
    job.__name__: job for job in (validate, convert, finish_conversion, check_export, compare, publish)
}


def _limit(loss: float, limit: float | None) -> dict[str, Any]:
    if loss != loss:  # noqa: PLR0124 - how a NaN shows
        return {"name": "held-out loss", "passed": False, "detail": "NaN; the training diverged."}
    if limit is not None and loss > limit:
        detail = f"{loss:.4f} nats a token, the limit is {limit}; train longer, or raise validation.max_heldout_loss."
        return {"name": "held-out loss", "passed": False, "detail": detail}
    said = "no limit set" if limit is None else f"the limit is {limit}"
    return {"name": "held-out loss", "passed": True, "detail": f"{loss:.4f} nats a token, {said}"}


def _loss(model: Any, heldout: str) -> float:
    from tasks.worker.evaluate import heldout_loss

    device = _device()
    return heldout_loss(model.to(device), heldout, device)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _restored(url: str) -> Any:
    """Return the model of a checkpoint, built from its own config and filled from its shards."""
    from tasks.gate import restore_model

    return restore_model(url)


def _exported(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def _untrained(request: Request) -> Any:
    from transformers import AutoTokenizer

    from tasks.worker.model import build_model

    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
    return build_model(ModelSettings.model_validate(request["model"]), tokenizer, seed=request["seed"])


def _main() -> dict[str, Any]:
    name, request = sys.argv[1:3]
    if name not in JOBS:
        raise ArgumentError(f"job {name!r}: expected one of {', '.join(JOBS)}.")
    return JOBS[name](json.loads(request))


if __name__ == "__main__":
    child_main(_main)
