"""Casts of floating-point elements, as torch makes them."""

# torch's views of buffers are only partly annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

from ckpt_core.format.chunks import Words, words_of


def cast(block: Words, stored: str, dtype: str) -> Words:
    """Return elements of the type `stored` as elements of `dtype`: words both, of one dimension."""
    import torch

    elements = torch.from_numpy(block).view(getattr(torch, stored)).to(getattr(torch, dtype))
    raw: Any = elements.view(torch.uint8).numpy()
    return raw.view(words_of(dtype))
