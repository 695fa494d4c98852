"""How good a causal language model is on held-out data."""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ckpt_core.errors import ArgumentError, DamagedError
from ckpt_core.urls import local_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ckpt_core.heldout import Heldout, Rows

_LONGEST_WINDOW = 1024
_LARGEST_EXPONENT = 700  # of more, exp overflows


@dataclass(frozen=True)
class Metric:
    """What a figure is called, its unit (empty for a plain number), and which way is better."""

    label: str
    unit: str
    direction: Literal["lower", "higher"]


METRICS = {
    "heldout_loss": Metric("held-out loss", "nats a token", "lower"),
    "perplexity": Metric("perplexity", "", "lower"),
    "bits_per_byte": Metric("bits per byte", "", "lower"),
    "accuracy": Metric("accuracy of the next token", "", "higher"),
}


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on some data. The figures of a model that diverged may be NaN or infinite.

    Only `bits_per_byte` compares models with different tokenizers.
    """

    heldout_loss: float
    """The mean over the predicted tokens, in nats."""

    perplexity: float
    """The exponential of the loss."""

    accuracy: float
    """The share of tokens that the model held for the likeliest, 0 to 1."""

    bits_per_byte: float | None
    """The whole loss in bits, over the bytes of the text in UTF-8; None where token rows were given."""

    tokens: int
    """How many were predicted."""

    fingerprint: str
    """SHA-256 of the token rows, or of the texts."""

    @property
    def metrics(self) -> dict[str, float]:
        """The figures that there are, by the names of `METRICS`."""
        return {name: value for name, value in asdict(self).items() if name in METRICS and value is not None}


def evaluate(
    model: str | PathLike[str] | nn.Module,
    data: str | PathLike[str] | Rows,
    *,
    device: str = "auto",
    batch_size: int = 16,
    sequence_length: int | None = None,
    text_field: str = "text",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Evaluate a causal language model. Equal models, data and settings give equal figures.

    Args:
        model: a transformers model's directory, or a live one, which stays on its device and each module of
            it in its mode, whatever happens. The random number generators stay as they are, too.
        data: token rows [sequences, length], as an array, a `.npy` file or a directory with `tokens.npy`; or text:
            a file, a directory or a glob, where each row of a `.jsonl` file is a text.
        device: where to put the model of a directory: `cpu`, `cuda`, ...; `auto` is CUDA where there is one.
        batch_size: sequences that go through the model at once.
        sequence_length: tokens in one window of text; by default 1024, or what the model takes if that is less.
        text_field: the field of a `.jsonl` file's rows that holds the text.
        tokenizer: for text; by default the one in the model's directory.
        trust_remote_code: allow a model that brings Python code of its own. It then runs with your rights.

    Raises:
        ArgumentError: no causal language model, no such data, or data that does not fit the model.
        DamagedError: the directory does not hold all of the model's weights.
    """
    from ckpt_core.heldout import load_texts, pack_texts, read_rows

    if batch_size < 1:
        raise ArgumentError(f"batch_size {batch_size}: expected 1 or more")
    heldout = read_rows(data)
    texts = load_texts(cast("str | PathLike[str]", data), text_field) if heldout is None else []
    with _kept_generators():
        live = _open(model, device, trust_remote_code=trust_remote_code)
        if heldout is None:
            tokenizer = tokenizer or _tokenizer_of(model, trust_remote_code=trust_remote_code)
            heldout = pack_texts(texts, tokenizer, sequence_length or _window(live))
        _check_fit(live, heldout)
        nats, hits = _score(live, heldout, batch_size)
    loss = nats / heldout.predicted
    return Evaluation(
        heldout_loss=loss,
        perplexity=math.exp(loss) if loss < _LARGEST_EXPONENT else loss * math.inf,
        accuracy=hits / heldout.predicted,
        bits_per_byte=None if heldout.text_bytes is None else nats / math.log(2) / heldout.text_bytes,
        tokens=heldout.predicted,
        fingerprint=heldout.fingerprint,
    )


def _open(model: str | PathLike[str] | nn.Module, device: str, *, trust_remote_code: bool) -> Any:
    """Return a live model that predicts each token from those before it."""
    live: Any = model
    if isinstance(model, str | PathLike):
        live = _load(local_path(model, "model"), trust_remote_code=trust_remote_code).to(_device(device))
    elif type(model).__module__.startswith("transformers."):
        _check_class(type(model).__name__, "the model")
    if getattr(live.config, "is_decoder", True) is False:
        raise ArgumentError(f"{type(live).__name__} with is_decoder false sees the tokens that it would predict")
    return live


def _load(directory: Path, *, trust_remote_code: bool) -> Any:
    import transformers

    library: Any = transformers  # half typed
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if not (directory / "config.json").is_file():
        why = " (a LoRA adapter alone is none: merge it first)" if (directory / "adapter_config.json").exists() else ""
        raise ArgumentError(f"{directory}: no config.json, so no model of transformers there{why}")
    try:
        config = library.AutoConfig.from_pretrained(directory, **settings)
        brings_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        architectures: list[str] = [] if brings_code else config.architectures or []
        for name in architectures:
            _check_class(name, str(directory))
        model, found = library.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **settings)
    except ArgumentError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"{directory}: transformers cannot load it ({error})") from error
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise DamagedError(f"{directory}: has no weights for {names}, which would be random; make the export again")
    return model


def _check_class(name: str, where: str) -> None:
    """Refuse a class of transformers that does not predict the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    plain = name.removeprefix("FSDP")  # what FSDP puts before the names of classes
    if plain not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ArgumentError(
            f"{where}: is a {plain}, and only causal language models (`...ForCausalLM`) can be evaluated"
        )


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tokenizer_of(model: str | PathLike[str] | nn.Module, *, trust_remote_code: bool) -> Any:
    import transformers

    library: Any = transformers  # half typed
    if not isinstance(model, str | PathLike):
        raise ArgumentError("text for a live model needs its `tokenizer`")
    try:
        directory = local_path(model, "model")
        return library.AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"{model}: has no tokenizer for text ({error}); evaluate it on token rows") from error


def _window(model: Any) -> int:
    return min(_LONGEST_WINDOW, _longest(model) or _LONGEST_WINDOW)


def _longest(model: Any) -> int | None:
    """Return how many tokens the model takes at once; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _check_fit(model: Any, heldout: Heldout) -> None:
    longest, most = max(block.shape[1] for block in heldout.blocks), _longest(model)
    if most is not None and longest > most:
        raise ArgumentError(f"sequences of {longest} tokens: the model takes {most}; give it shorter ones")
    lowest = min(int(block.min()) for block in heldout.blocks)
    highest = max(int(block.max()) for block in heldout.blocks)
    size = model.config.get_text_config().vocab_size
    if not 0 <= lowest <= highest < size:
        raise ArgumentError(
            f"token numbers from {lowest} to {highest}: the model's vocabulary has {size}, so they are another "
            "tokenizer's; evaluate it on text"
        )


def _score(model: Any, heldout: Heldout, batch_size: int) -> tuple[float, int]:
    """Return the summed loss in nats, and how many tokens were the likeliest."""
    import numpy as np
    import torch

    nats, hits, device = 0.0, 0, next(model.parameters()).device
    with _eval_mode(model), torch.no_grad():
        for block in heldout.blocks:
            for first in range(0, len(block), batch_size):
                rows = torch.as_tensor(block[first : first + batch_size].astype(np.int64), device=device)
                batch_nats, batch_hits = _score_rows(model, rows)
                nats, hits = nats + batch_nats, hits + batch_hits
    return nats, hits


@contextmanager
def _eval_mode(model: nn.Module) -> Generator[None]:
    """Put a model into eval mode for a while; then each of its modules is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # one by one: `train` gives one mode to all, and a frozen part has its own
            module.training = training


@contextmanager
def _kept_generators() -> Generator[None]:
    """Leave the random number generators as they are: of torch on all devices, numpy and Python."""
    import numpy as np
    import torch

    fork_rng: Any = cast("Any", torch.random).fork_rng  # half typed
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _score_rows(model: Any, rows: Tensor) -> tuple[float, int]:
    from torch.nn import functional

    logits, nats, hits = model(input_ids=rows, use_cache=False).logits, 0.0, 0
    for row, targets in zip(logits[:, :-1], rows[:, 1:], strict=True):  # one by one: a copy in float32 is large
        exact = row.float()
        nats += functional.cross_entropy(exact, targets, reduction="sum").item()
        hits += int((exact.argmax(-1) == targets).sum().item())
    return nats, hits
