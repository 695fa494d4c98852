"""Tensors that may hold Inf: masks and bounds of a model, which no training changes by gradients."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

from ckpt_core.durable import file_size
from ckpt_core.errors import CkptError
from ckpt_core.export import plan_export
from ckpt_core.export.assets import read_assets
from ckpt_core.export.carried import CONFIG_NAME
from ckpt_core.export.intake import plan_intake
from ckpt_core.format.index import METADATA_NAME
from ckpt_core.hf_weights import read_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckpt_core.export.plan import Output
    from ckpt_core.urls import Place


def untrained_tensors(directory: Place) -> frozenset[str]:
    """Return the stored names of a directory's tensors that may hold Inf; none where no config tells the model.

    Args:
        directory: a DCP directory, which has its config in `assets`, there or next to it, or a Hugging Face directory.
    """
    with suppress(CkptError, OSError, ValueError):
        return frozenset(s for output in _outputs(directory) if output.untrained for s in output.recipe.sources)
    return frozenset()


def _outputs(directory: Place) -> Iterable[Output]:
    if file_size(directory / METADATA_NAME) is None:
        config = json.loads((directory / CONFIG_NAME).read_bytes())
        return plan_intake(read_weights(directory), config).outputs
    own = directory / "assets"
    assets = own if file_size(own / CONFIG_NAME) is not None else directory.parent / "assets"
    return plan_export(directory, read_assets(assets, trust_remote_code=True)).outputs  # none of it is run
