"""Quantized weights: refused, for their values mean nothing without scales that no model of this library has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from ckpt_core.errors import MismatchError
from ckpt_core.format import dtypes

_FIELDS = ("quantization_config", "compression_config")
"""The fields of a config that say how weights were quantized; the second is compressed-tensors' old name."""

_COMPANIONS = (
    # fp8 and int8 by blocks, channels or tensors: DeepSeek, compressed-tensors, ModelOpt, quanto
    (re.compile(r"(.+)_(scale|scale_2|scale_inv|scales|zero_point|global_scale)"), r"\1"),
    (re.compile(r"(.+)\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+)"), r"\1"),  # bitsandbytes
    (re.compile(r"(.+)\.SCB"), r"\1.weight"),  # bitsandbytes, eight bits
    (re.compile(r"(.+)_scales"), r"\1_blocks"),  # mxfp4
    (re.compile(r"(.+)_(scale|shape)"), r"\1_packed"),  # compressed-tensors, four bits
    (re.compile(r"(.+)\.(scales|qzeros|g_idx)"), r"\1.qweight"),  # GPTQ, AWQ
)
"""Names of what stands beside a quantized tensor, each with the name of that one."""

_ADVICE = (
    "read as numbers, such weights would be wrong by the factor of their scales. Take the weights from before they "
    "were quantized, or load the model with transformers, dequantized (of fp8 and mxfp4 with quantization_config="
    "FineGrainedFP8Config(dequantize=True) or Mxfp4Config(dequantize=True)), and save that"
)


def check_no_scales(stored: Mapping[str, str], where: str) -> None:
    """Check that no tensor has scales beside it, whatever a table of names would drop.

    Args:
        stored: the type of each tensor, by its name.
        where: they are, for errors.

    Raises:
        MismatchError: one has.
    """
    for name in stored:
        for pattern, of in _COMPANIONS:
            match = pattern.fullmatch(name)
            quantized = match.expand(of) if match else ""
            # A model may have both a tensor and a scale of it; of a type for numbers the tensor is no quantized one.
            if quantized in stored and _is_narrow(stored[quantized]):
                raise MismatchError(f"{where}: {quantized} is quantized, as {name} stands beside it; {_ADVICE}.")


def without_quantization(
    config: Mapping[str, Any], exported: Mapping[str, str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the config of weights that are not quantized, though it may say so, and what to say of that.

    Args:
        config: of the model.
        exported: the type of each tensor of the export, by its name.
        where: the weights are, for errors.

    Raises:
        MismatchError: they are quantized.
    """
    methods = sorted(set(_methods(config)))
    narrow = next((name for name, dtype in exported.items() if dtype in dtypes.FLOATING and _is_narrow(dtype)), None)
    if methods and narrow:
        raise MismatchError(
            f"{where}: {narrow} is of {exported[narrow]}, and the config says quantized ({methods[0]}), but there are "
            f"no scales; {_ADVICE}."
        )
    rules = [f"config: quantization ({method}) is left out; the weights are not quantized" for method in methods]
    return _without(config), rules


def _methods(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the methods by which a config says that weights, or those of a part of the model, are quantized."""
    for key, value in config.items():
        if key in _FIELDS and value:
            yield str(cast("dict[str, Any]", value).get("quant_method")) if isinstance(value, dict) else str(value)
        elif isinstance(value, dict):
            yield from _methods(cast("dict[str, Any]", value))


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without(cast("dict[str, Any]", value)) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _FIELDS
    }


def _is_narrow(dtype: str) -> bool:
    """Return whether elements are of a type that says little without a scale."""
    return dtype not in dtypes.FLOATING or dtypes.ITEMSIZE[dtype] == 1
