"""The heavy work of a flow, in child processes of its own: `python -m tasks.jobs NAME REQUEST`.

A request is a JSON object, and so is the result; torch is imported here and never in the flow's process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core import open_checkpoint
from ckpt_core.errors import ArgumentError, CkptError, CommitError, ExportExistsError
from ckpt_core.store import local_path
from tasks.child import child_main
from tasks.config import ModelSettings

if TYPE_CHECKING:
    from ckpt_core.export import Export

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


def convert(request: Request) -> dict[str, Any]:
    """Convert a committed step whose lease the caller holds, or find the export that was made of it before.

    With several files to write it only begins: they are for `ckpt_core.export.convert_shard`, in any processes, and
    then `finish_conversion`.

    Args:
        request: `url`, `target`, `dtype` or null, `max_shard_bytes`, `allow_nonfinite`, `trust_remote_code`.

    Returns:
        `target`; `undone`, the names of the files to write; `export`, what `finish_conversion` returns, or null.

    Raises:
        ExportExistsError: `target` holds something else than an export of this checkpoint.
    """
    from ckpt_core.export import abandon_conversion, begin_conversion, convert_shard
    from ckpt_core.export.conversion import model_of, own_assets, source_of

    checkpoint, target = open_checkpoint(request["url"]), local_path(request["target"])
    settings, begun = _conversion_settings(request), {"target": str(target), "undone": [], "export": None}
    _check_replaceable(target, checkpoint.manifest.digest())
    export = _made_of(target, checkpoint.manifest.digest(), settings)
    if export is not None:
        return {**begun, "export": _described(export, reused=True)}
    assets = own_assets(checkpoint, trust_remote_code=settings.pop("trust_remote_code"))
    source = source_of(checkpoint)
    undone = begin_conversion(model_of(checkpoint), target, assets=assets, source=source, overwrite=True, **settings)
    if len(undone) > 1:
        return {**begun, "undone": undone}
    try:
        for name in undone:
            convert_shard(target, name)
    except CommitError:  # another conversion took over, and what lies there is its own
        raise
    except CkptError:
        abandon_conversion(target)
        raise
    return {**begun, "export": finish_conversion(request)}


def finish_conversion(request: Request) -> dict[str, Any]:
    """Give a conversion that `convert` began, and whose files are written, its name.

    Args:
        request: that of `convert`.

    Returns:
        `path`, `files` (bytes and sha256 of each), `rules`, `architecture`, and whether it was `reused`.

    Raises:
        ExportExistsError: `target` holds something else than an export of this checkpoint.
    """
    from ckpt_core import export

    target = local_path(request["target"])
    _check_replaceable(target, open_checkpoint(request["url"]).manifest.digest())
    made = export.finish_conversion(target, overwrite=True)
    _settings_file(target).write_text(json.dumps(_conversion_settings(request)))
    return _described(made, reused=False)


def check_export(request: Request) -> dict[str, Any]:
    """Load an export as a user would, and compare it with the checkpoint that it was made of.

    Args:
        request: `url` of the checkpoint, `export`.

    Returns:
        `checks` (see `ckpt_core.verify.Check`).
    """
    from tasks.gate import compare_with_checkpoint

    return {"checks": [asdict(check) for check in compare_with_checkpoint(request["url"], Path(request["export"]))]}


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


def _conversion_settings(request: Request) -> dict[str, Any]:
    """Return what of a request decides on an export's content, but for the checkpoint."""
    return {name: request[name] for name in ("dtype", "max_shard_bytes", "allow_nonfinite", "trust_remote_code")}


def _settings_file(target: Path) -> Path:
    return target.parent / f"{target.name}.settings.json"


def _described(export: Export, *, reused: bool) -> dict[str, Any]:
    return {
        "path": str(export.path),
        "files": export.files,
        "rules": export.rules,
        "architecture": export.architecture,
        "reused": reused,
    }


def _check_replaceable(target: Path, digest: str) -> None:
    """Refuse a target that holds anything but an export of this checkpoint, whole or damaged."""
    from ckpt_core.export import EXPORT_NAME

    try:
        found = json.loads((target / EXPORT_NAME).read_bytes())["source"]["digest"]
    except FileNotFoundError:
        found = None
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
    except (OSError, ValueError, LookupError, TypeError):
        found = None
    if found != digest:
        what = "something else than an export" if found is None else "the export of another checkpoint"
        raise ExportExistsError(f"{target}: holds {what}, and is left alone; give another directory, or delete it.")


def _made_of(target: Path, digest: str, settings: Mapping[str, Any]) -> Export | None:
    """Return the export at `target` if it is whole and of this checkpoint with these settings, else None."""
    from ckpt_core.export import read_export

    try:
        export = read_export(target)
        made_with = json.loads(_settings_file(target).read_text())
    except (CkptError, OSError, ValueError):
        return None
    return export if export.source.get("digest") == digest and made_with == settings else None


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
