"""NaN and Inf in what is about to be written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_core.errors import DamagedError, MismatchError
from ckpt_core.format.chunks import Words, bytes_of
from ckpt_core.values import first_nonfinite

if TYPE_CHECKING:
    from ckpt_core.export.plan import Output
    from ckpt_core.urls import Place


def check_finite(block: Words, made: Words, output: Output, place: Place) -> None:
    """Check that a block of a tensor has no NaN, and no Inf if it was trained; every one survives a cast.

    Args:
        block: what was stored.
        made: what becomes of it.
        output: the tensor.
        place: where it is stored, for errors.

    Raises:
        DamagedError: it has.
        MismatchError: it has since it was cast.
    """
    if first_nonfinite(bytes_of(made), output.dtype) is None:
        return
    if output.untrained and first_nonfinite(bytes_of(made), output.dtype, only_nan=True) is None:
        return
    where = f"{place}: {', '.join(output.sources[:3])}{', ...' if output.sources[3:] else ''}"
    if first_nonfinite(bytes_of(block), output.stored) is None:
        raise MismatchError(
            f"{where}: holds values that do not fit {output.dtype}, where they would be NaN or Inf; cast to bfloat16 "
            f"or float32, or keep {output.stored}."
        )
    raise DamagedError(
        f"{where}: holds NaN or Inf: the training diverged, or the file is damaged. Take an earlier step or another "
        "copy, or pass allow_nonfinite to have it as it is."
    )
