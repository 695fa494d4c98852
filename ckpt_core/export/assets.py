"""What an export needs beside weights: the model's configs and the tokenizer's files."""

# transformers is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckpt_core import durable
from ckpt_core.errors import DamagedError, MismatchError, NotACheckpointError, UntrustedError

if TYPE_CHECKING:
    from ckpt_core.urls import Place

CONFIG_NAME = "config.json"
EXPORT_NAME = "export.json"
PLAIN_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md")
"""Of configs, of the files of a tokenizer, and of a description."""

_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json", ".distcp", ".gguf", ".h5",
    ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite",
)  # fmt: skip
"""Of files that hold weights, of this model as it was or of another one."""


@dataclass(frozen=True)
class Assets:
    """A model's config, and the other files of an export by name; weights are not among them."""

    config: Mapping[str, Any]
    files: Mapping[str, bytes]


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
    files = {name: found[name].read_bytes() for name in _carried(found)}
    code = [name for name in files if name.endswith(".py")] or ["auto_map"] * ("auto_map" in config)
    if code and not trust_remote_code:
        raise UntrustedError(
            f"{directory}: brings Python code along ({code[0]}), which loading the export would run; pass "
            "trust_remote_code if you trust its author."
        )
    return Assets(config, files)


def _carried(names: Iterable[str]) -> list[str]:
    """Return which files of a directory go with its model, wherever its weights go.

    Those in directories below it are plain text, say a pooling layer's config; but a directory with weights is another
    model's.
    """
    names = [name for name in names if name not in {CONFIG_NAME, EXPORT_NAME}]
    weights = {name for name in names if name.endswith(_WEIGHT_SUFFIXES)}
    others = {name.partition("/")[0] for name in weights if "/" in name}
    hidden = {name for name in names if name.startswith(".") or "/." in name}
    below = {name for name in names if name.endswith(PLAIN_SUFFIXES) and name.partition("/")[0] not in others} - hidden
    return [name for name in names if name not in weights and ("/" not in name or name in below)]


def fetch_assets(model: str, tokenizer: str | None = None) -> Assets:
    """Get the config of `model` and the tokenizer of `tokenizer`: local paths or Hub ids. Runs no code of theirs.

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
        return read_assets(Path(temporary))


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
