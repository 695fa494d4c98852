"""Changes to a model's config, with the meaning that `AutoConfig.from_pretrained(..., **overrides)` gives them."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_core.errors import ArgumentError, MismatchError
from ckpt_core.export.carried import CONFIG_NAME
from ckpt_core.printable import printable_logger

_log = printable_logger(__name__)


def override_config(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with some values replaced; a dict updates a config within it.

    As in transformers, names that the model's config does not have change nothing; they are logged.

    Raises:
        ArgumentError: the values are none that this config can have.
        MismatchError: transformers has no config of this model type.
    """
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise MismatchError(f"config: model_type {kind!r} is none of transformers', so it cannot be overridden.")
    try:
        of_kind: Any = CONFIG_MAPPING[kind]
        made, unused = of_kind.from_dict(
            copy.deepcopy(dict(config)), **copy.deepcopy(dict(overrides)), return_unused_kwargs=True
        )
        with tempfile.TemporaryDirectory() as directory:
            made.save_pretrained(directory)
            document = json.loads((Path(directory) / CONFIG_NAME).read_bytes())
    except Exception as error:  # noqa: BLE001 - each model's config checks its values in its own way
        raise ArgumentError(f"hf_overrides: not accepted by the config of {kind}: {error}") from None
    if unused:
        _log.warning(
            "hf_overrides: the config of %s has no %s; ignored, as transformers does.", kind, ", ".join(unused)
        )
    return document
