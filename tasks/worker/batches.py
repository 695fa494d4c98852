"""The batch of a step: a pure function of the seed and the step, the same for any number of ranks."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def batch(tokens: NDArray[Any], step: int, *, seed: int, batch_size: int) -> NDArray[np.int64]:
    """Return the sequences of a step, in order, as [batch_size, sequence_length].

    Each epoch sees every sequence once, in an order of its own; a batch may lie across two epochs.

    Args:
        tokens: all sequences, [sequences, sequence_length].
        step: steps that were taken before this one, so that 0 names the first batch.
        seed: decides the order.
        batch_size: sequences in one step, over all ranks together.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    chosen = [_epoch_order(seed, p // len(tokens), len(tokens))[p % len(tokens)] for p in positions]
    return tokens[chosen].astype(np.int64)


def rank_share(sequences: NDArray[Any], rank: int, world_size: int) -> NDArray[Any]:
    """Return the part of a batch that a rank works on: one of `world_size` equal blocks."""
    size = len(sequences) // world_size
    return sequences[rank * size : (rank + 1) * size]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, sequences: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(sequences)
