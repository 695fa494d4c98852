"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from tasks.config import TrainingStep


def make_optimizer(model: nn.Module, settings: TrainingStep) -> AdamW:
    """Return AdamW over the model's trainable parameters, with weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},  # noqa: PLR2004
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},  # noqa: PLR2004
    ]
    # Fused by name: left to torch, the implementation depends on the device and on what its tensors are.
    return AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def make_schedule(optimizer: Optimizer, *, steps: int, warmup_steps: int) -> LambdaLR:
    """Return a schedule that counts from 0: a linear warm-up to the peak, then a cosine down to zero at `steps`.

    A warm-up longer than half of the steps is cut to that, so that short jobs reach the peak too.
    """
    warmup_steps = min(warmup_steps, steps // 2)
    return LambdaLR(optimizer, lambda step: peak_fraction(step, steps=steps, warmup_steps=warmup_steps))


def peak_fraction(step: int, *, steps: int, warmup_steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak; `step` 0 is the first one."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
