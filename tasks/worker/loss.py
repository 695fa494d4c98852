"""The loss of a causal language model, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor, nn


def summed_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Return the sum of the losses, in nats, of predicting all but the first token of each sequence.

    Args:
        model: a transformers causal language model.
        sequences: token numbers, [sequences, sequence_length], where the model is.
    """
    logits = model(input_ids=sequences, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten(), reduction="sum")


def accumulate_gradients(model: nn.Module, sequences: Tensor, *, micro_batch_size: int, scale: float) -> Tensor:
    """Collective if the model is sharded. Add the gradient of `scale` times the summed loss; return that sum.

    The gradient is that of all sequences at once, whatever the size of a micro-batch. Ranks exchange it once.
    """
    total = torch.zeros((), dtype=torch.float64, device=sequences.device)
    parts = sequences.split(micro_batch_size)
    for number, part in enumerate(parts, start=1):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number == len(parts))
        loss = summed_loss(model, part)
        (loss * scale).backward()
        total += loss.detach()
    return total
