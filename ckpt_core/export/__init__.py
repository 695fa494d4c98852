"""DCP to Hugging Face safetensors: planned from metadata, streamed, complete or not there.

`export.json`, written last, names the source and the bytes and sha256 of each file. It has no times and no paths, so
that equal input gives equal bytes.
"""

from __future__ import annotations

from ckpt_core.export.assets import Assets
from ckpt_core.export.carried import EXPORT_NAME
from ckpt_core.export.conversion import (
    abandon_conversion,
    begin_conversion,
    convert,
    convert_checkpoint,
    convert_shard,
    finish_conversion,
)
from ckpt_core.export.planning import plan_export
from ckpt_core.export.record import Export, read_export
from ckpt_core.export.target import check_free, check_target

__all__ = [
    "EXPORT_NAME",
    "Assets",
    "Export",
    "abandon_conversion",
    "begin_conversion",
    "check_free",
    "check_target",
    "convert",
    "convert_checkpoint",
    "convert_shard",
    "finish_conversion",
    "plan_export",
    "read_export",
]
