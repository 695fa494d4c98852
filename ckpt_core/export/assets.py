"""What an export needs beside weights: the model's configs and the tokenizer's files."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckpt_core import durable
from ckpt_core.errors import DamagedError, MismatchError, NotACheckpointError, UntrustedError
from ckpt_core.export.carried import CONFIG_NAME, choose

if TYPE_CHECKING:
    from ckpt_core.urls import Place

_PART = re.compile(r".+/.+|.*processor_config\.json|modules\.json|.*sentence_.*\.json")
"""Files of a model that are neither its config nor its tokenizer's, nor tell of it as it was."""


@dataclass(frozen=True)
class Assets:
    """A model's config, and the other files of an export by name; the model's weights are not among them."""

    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    rules: tuple[str, ...] = ()
    """What a plan says of weights that are carried as they are, and of what is left out."""

    names: Sequence[str] = ()
    """Of the tensors of the file that the model was loaded from, whose form an export is to have; empty if unknown."""


def read_assets(directory: Place, *, trust_remote_code: bool = False) -> Assets:
    """Read the assets in `directory`: of a checkpoint, or of any Hugging Face directory.

    Raises:
        NotACheckpointError: there is no config.
        DamagedError: the config is not readable.
        UntrustedError: the model brings code along.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise NotACheckpointError(
            f"{directory}: no {CONFIG_NAME}, so the architecture is not known; name a config with --model."
        )
    config = _parse_config(path)
    found = dict(durable.files_below(directory))
    carried = choose(found, directory)
    files = {name: found[name].read_bytes() for name in carried.names}
    code = [name for name in files if name.endswith(".py")] or ["auto_map"] * ("auto_map" in config)
    if code and not trust_remote_code:
        raise UntrustedError(
            f"{directory}: brings Python code along ({code[0]}), which loading the export would run; pass "
            "trust_remote_code if you trust its author."
        )
    return Assets(config, files, carried.rules)


def fetch_assets(model: str, tokenizer: str | None = None) -> Assets:
    """Get the config of `model` and the tokenizer of `tokenizer`: local paths or Hub ids. Runs no code of theirs.

    Of a directory also the processor's config goes along, and what `read_assets` carries of directories below it.

    Args:
        model: where the config is, and the generation config if it has one.
        tokenizer: where the tokenizer is; None takes that of `model`, if it has one.

    Raises:
        NotACheckpointError: one of them is not there.
        UntrustedError: the model brings code along.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    with tempfile.TemporaryDirectory() as temporary:
        try:
            AutoConfig.from_pretrained(model, trust_remote_code=False).save_pretrained(temporary)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise UntrustedError(
                    f"config {model!r}: needs Python code of its own, which is not run; convert with a model class "
                    "that transformers has."
                ) from None
            raise NotACheckpointError(f"config {model!r}: {error}") from None
        try:
            AutoTokenizer.from_pretrained(tokenizer or model, trust_remote_code=False).save_pretrained(temporary)
        except (OSError, ValueError) as error:
            if tokenizer is not None:
                raise NotACheckpointError(f"tokenizer {tokenizer!r}: {error}") from None
        with suppress(OSError):  # not every model generates
            GenerationConfig.from_pretrained(model).save_pretrained(temporary)
        assets = read_assets(Path(temporary))
    return _with_parts(assets, Path(model)) if Path(model).is_dir() else assets


def _with_parts(assets: Assets, directory: Path) -> Assets:
    """Add what a model's directory has beside config and tokenizer: its processor's config, and its modules."""
    found = dict(durable.files_below(directory))
    carried = choose(found, directory)
    parts = [name for name in carried.names if name not in assets.files and _PART.fullmatch(name)]
    return replace(assets, files={**assets.files, **{n: found[n].read_bytes() for n in parts}}, rules=carried.rules)


def config_bytes(config: Mapping[str, Any], architecture: str, dtypes: Sequence[str], dtype: str | None) -> bytes:
    """Return `config.json` of a model with weights.

    Args:
        config: what it was.
        architecture: the name of the model's class.
        dtypes: of its tensors; the commonest floating-point one is named.
        dtype: what they were cast to, which configs within the config name as well; None without a cast.
    """
    floating = [kind for kind in dtypes if "float" in kind]
    commonest = max(set(floating), key=floating.count) if floating else None
    kept = {name: value for name, value in config.items() if name != "torch_dtype"}  # the old name of dtype
    if dtype:
        kept |= {n: {**v, "dtype": dtype} for n, v in kept.items() if isinstance(v, dict) and "model_type" in v}
    made = {**kept, "architectures": [architecture], "dtype": dtype or commonest}
    return (json.dumps(dict(sorted(made.items())), indent=2) + "\n").encode()


def write_configs(module: Any, directory: Path) -> None:
    """Write the configs of a live transformers model, naming its class and dtype as `save_pretrained` does.

    Of a model that PEFT wraps, these are the configs of the model within, and the adapter's.
    """
    if hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
        _write_adapter_config(module, directory)
        module = module.get_base_model()
    config = copy.deepcopy(module.config)
    config.architectures = [architecture_name(module)]
    config.dtype = str(module.dtype).removeprefix("torch.")
    config.save_pretrained(directory)
    if module.can_generate():
        module.generation_config.save_pretrained(directory)


def _write_adapter_config(module: Any, directory: Path) -> None:
    """Write the config of the adapter in use, as `save_pretrained` does."""
    active = module.active_adapters[0]
    config = copy.deepcopy(module.peft_config[active])
    config.inference_mode = True
    config.save_pretrained(str(directory))


def architecture_name(module: Any) -> str:
    """Return the name of a model's class; FSDP2 puts a class of its own in front."""
    return type(module).__name__.removeprefix("FSDP")


def _parse_config(path: Place) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedError(f"{path}: not JSON ({error}); restore a copy.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise MismatchError(f"{path}: names no model_type; expected the config of a transformers model.")
    return cast("dict[str, Any]", config)
