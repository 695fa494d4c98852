"""`convert`: a committed checkpoint becomes a Hugging Face directory. Also `python -m flows.convert URL`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from ckpt_core import open_checkpoint
from ckpt_core.store import Checkpoint
from ckpt_core.urls import place_of
from tasks import artifacts, sentinel
from tasks.config import ExportSettings, ValidationSettings
from tasks.conversion import convert_checkpoint
from tasks.results import ReferenceSerializer
from tasks.validation import EXPORT_CHECK, VALIDATION, check_export, validate


def _run_name() -> str:
    """Name a flow run after its step, not after the whole URL."""
    return "convert " + Path(flow_run.parameters["checkpoint"]).name


@flow(name="convert", flow_run_name=_run_name, persist_result=False, result_serializer=ReferenceSerializer())
def convert(
    checkpoint: str,
    output: str | None = None,
    export: ExportSettings = ExportSettings(),
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """Check a checkpoint, convert it to safetensors, and check what came out.

    Run again after any stop, it writes only the files that were not finished. A script that calls it does so below
    `if __name__ == "__main__":`, as every process that writes files imports the script.

    Args:
        checkpoint: URL or path of a committed step, <store>/<run>/step_NNNNNNNNNN; config and tokenizer are in it.
        output: the directory to make, as a path or URL; empty means <store>/<run>/exports/<step>.
        export: cast, file sizes, and where the files are written: by processes of this machine, or a Dask cluster's.
        allow_nonfinite: accept NaN and Inf in the weights.
    """
    found = open_checkpoint(checkpoint)
    with sentinel.posted():
        validated = validate(found.url, found.run, None, ValidationSettings(allow_nonfinite=allow_nonfinite))
        artifacts.report_table(VALIDATION, found.run, validated["checks"])
        target = output or default_target(found, export)
        exported = convert_checkpoint(found.url, found.run, target, export, allow_nonfinite=allow_nonfinite)
        checks = check_export(found.url, found.run, exported["path"])
        artifacts.report_table(EXPORT_CHECK, found.run, checks)
    return {"checkpoint": found.url, "export": exported["path"], "checks": checks}


def default_target(checkpoint: Checkpoint, export: ExportSettings) -> str:
    """Return where a checkpoint's export goes: beside the run's steps, by step, cast and merge."""
    cast, merged = f"-{export.dtype}" if export.dtype else "", "-merged" if export.merge_adapter else ""
    return str(checkpoint.path.parent / "exports" / f"{checkpoint.path.name}{cast}{merged}")


if __name__ == "__main__":
    if len(sys.argv) not in {2, 3}:
        sys.exit("usage: python -m flows.convert CHECKPOINT [OUTPUT]")
    print(convert(sys.argv[1], str(place_of(sys.argv[2])) if sys.argv[2:] else None)["export"])  # noqa: T201
