"""The loss of a causal language model on held-out text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from tasks.worker.loss import summed_loss
from tasks.worker.tokens import TokenSet

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def heldout_loss(
    model: nn.Module,
    heldout: str | Path,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> float:
    """Return the mean loss on held-out text, in nats a token.

    Needs no process group. With a `world_size` above 1 it is collective over the default group, which must reduce
    CPU tensors: each rank takes its share of the sequences, and all return the same number.

    Args:
        model: a transformers causal language model, whole or sharded by FSDP; its mode is restored.
        heldout: a directory of prepared tokens.
        device: where the model is.
        batch_size: sequences that go through the model at once.
        rank: this rank's number.
        world_size: ranks that share the work.

    Raises:
        ArgumentError: there are no prepared tokens.
    """
    tokens = TokenSet.open(heldout).tokens
    total = torch.zeros((), dtype=torch.float64)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        # Every rank makes the same number of passes: a sharded model gathers its weights in each.
        for number in range(math.ceil(len(tokens) / (batch_size * world_size))):
            first = (number * world_size + rank) * batch_size
            mine = tokens[first : first + batch_size]
            rows = mine if len(mine) else tokens[:1]
            loss = summed_loss(model, torch.from_numpy(rows.astype(np.int64)).to(device))
            total += loss.cpu().double() if len(mine) else 0.0
    model.train(was_training)
    if world_size > 1:
        dist.all_reduce(total)
    return total.item() / (len(tokens) * (tokens.shape[1] - 1))
