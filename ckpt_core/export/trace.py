"""How each tensor that `save_pretrained` stores is made of the model's own, by watching transformers make it.

Every tensor is on the `meta` device: it has a storage with strides, but no bytes, so that views need no attention.
What is watched are the operations that fill a new storage.
"""

# transformers and torch's dispatcher are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_core.errors import MismatchError
from ckpt_core.export.recipe import Piece, Recipe, copy_of
from ckpt_core.export.regions import Grid, Loop, Region, as_recipe, region_of
from ckpt_core.format.cover import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trace_export(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, Recipe]:
    """Return, by name in the export, how each tensor of it is made of the model's, in transformers' order.

    Each recipe sees its sources in their own shapes.

    Args:
        model: on the `meta` device.
        state: names and tensors of its state dict, without the second names of tied ones; only shapes and dtypes count.

    Raises:
        MismatchError: transformers computes with the values, or cannot say how it stores this model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    moves = Moves(type(model).__name__, state)
    try:
        with moves:
            stored = revert_weight_conversion(model, dict(moves.tensors))
    except MismatchError:
        raise
    except Exception as error:
        raise MismatchError(
            f"{type(model).__name__}: transformers cannot undo its conversion of this model's weights "
            f"({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
    return {name: moves.recipe(tensor) for name, tensor in stored.items()}


_REMEDY = "load the checkpoint into the model and call save_pretrained."


def inverted(recipes: Mapping[str, Recipe], shapes: Mapping[str, Shape]) -> dict[str, Recipe]:
    """Return, by name in the model, how each tensor of it is made of the exported ones.

    Args:
        recipes: by name in the export, as `trace_export` gives them.
        shapes: of the model's tensors, by name.

    Raises:
        MismatchError: an element of a model's tensor is in no exported one, or in two.
    """
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for name, recipe in recipes.items():
        for piece in recipe.pieces:
            pieces[piece.source].append(_back(piece, name, recipe.layout))
    result = {name: Recipe(shape, shape or (1,), tuple(pieces[name])) for name, shape in shapes.items()}
    for name, recipe in result.items():
        problem = recipe.wrong()
        if problem:
            raise MismatchError(
                f"{name}: transformers stores it in {', '.join(recipe.sources) or 'no tensor'}, from which it cannot "
                f"be put together again ({problem}); {_REMEDY}"
            )
    return result


def _back(piece: Piece, name: str, layout: Shape) -> Piece:
    """Return the piece that leads from the exported tensor `name` back to its source."""
    axes: list[int | None] = [None] * len(piece.view)
    for number, axis in enumerate(piece.axes):
        if axis is not None:
            axes[axis] = number
    return Piece(piece.start, piece.taken, name, layout, piece.offsets, tuple(axes))


@dataclass(frozen=True)
class _Source:
    """The storage of one of the model's tensors."""

    name: str
    grid: Grid


@dataclass(frozen=True)
class _Copied:
    """A storage that was filled from others, whose parts lie side by side along one axis of a grid."""

    grid: Grid
    inputs: tuple[tuple[int, int, Shape], ...]
    """Of each part: the storage that it comes from, the offset of its first element there, and its strides."""

    def followed(self, region: Region) -> Iterator[tuple[int, Region]]:
        """Yield a region of this storage as regions of the storages that it was filled from."""
        grid = self.grid
        for box in grid.boxes(region):
            corner = grid.corner(box.origin)
            part = grid.part(corner)
            storage, origin, strides = self.inputs[part]
            origin += sum(at * stride for at, stride in zip(corner, strides, strict=True))
            if grid.borders:
                origin -= grid.borders[part] * strides[grid.axis]
            walks = [grid.walk(loop.by) for loop in box.loops]
            loops = (
                Loop(loop.size, loop.to, steps * strides[axis])
                for loop, (axis, steps) in zip(box.loops, walks, strict=True)
            )
            yield storage, Region(box.target, origin, tuple(loops))


class Moves(TorchDispatchMode):
    """While it is active, remembers which elements of its tensors operations move where."""

    def __init__(self, architecture: str, state: Mapping[str, torch.Tensor]) -> None:
        """Make `tensors`: contiguous twins without bytes of the tensors in `state`, by the same names."""
        super().__init__()
        self.architecture = architecture
        self.tensors = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in state.items()}
        self._own = {id(tensor): name for name, tensor in self.tensors.items()}
        self._storages: dict[int, _Source | _Copied] = {
            _storage(tensor): _Source(name, Grid(tuple(tensor.shape) or (1,))) for name, tensor in self.tensors.items()
        }
        self._alive: list[torch.Tensor] = []  # the storage of a tensor that dies gives its identity to another

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation.

        Raises:
            MismatchError: it is neither a view nor a known way to copy.
        """
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            self._record(func, result, *_COPIES[func](*args, **(kwargs or {})))
        elif func._schema.is_mutable or not all(self._is_view(made, args[0]) for made in _tensors(result)):
            raise self._not_a_move(func, args)
        return result

    def recipe(self, tensor: torch.Tensor) -> Recipe:
        """Return how a tensor is made of those in `tensors`.

        Raises:
            MismatchError: it is not made of them.
        """
        shape, name = tuple(tensor.shape), self._own.get(id(tensor))
        if name is not None:
            return copy_of(name, shape)
        if _storage(tensor) not in self._storages:
            raise self._not_a_move("something unseen", [])
        if not tensor.numel():
            return as_recipe(shape, [])
        region = region_of(shape, tensor.stride(), int(tensor.storage_offset()))
        return as_recipe(shape, list(self._traced(_storage(tensor), region)))

    def _traced(self, storage: int, region: Region) -> Iterator[tuple[str, Grid, Region]]:
        """Yield a region of a storage as boxes of the model's tensors."""
        place = self._storages[storage]
        if isinstance(place, _Source):
            yield from ((place.name, place.grid, box) for box in place.grid.boxes(region))
        else:
            for earlier, part in place.followed(region):
                yield from self._traced(earlier, part)

    def _record(self, func: object, made: torch.Tensor, parts: Sequence[torch.Tensor], dim: int) -> None:
        """Remember what a new storage was filled from: the parts, side by side along `dim`."""
        if any(part.dtype != made.dtype or _storage(part) not in self._storages for part in parts):
            raise self._not_a_move(func, parts)
        if not made.ndim:
            made, parts = made[None], [part[None] for part in parts]
        order = sorted(range(made.ndim), key=made.stride, reverse=True)
        filled = [part for part in parts if part.numel()]
        borders = list(accumulate((part.shape[dim] for part in filled), initial=0))[:-1]
        grid = Grid(tuple(made.shape[axis] for axis in order), order.index(dim % made.ndim), tuple(borders))
        inputs = (
            (_storage(part), int(part.storage_offset()), tuple(part.stride(axis) for axis in order)) for part in filled
        )
        self._storages[_storage(made)] = _Copied(grid, tuple(inputs))
        self._alive.append(made)

    def _is_view(self, made: torch.Tensor, of: object) -> bool:
        known = isinstance(of, torch.Tensor) and _storage(made) in self._storages and made.dtype == of.dtype
        return known and not made.is_conj() and not made.is_neg()

    def _not_a_move(self, func: object, args: Sequence[object]) -> MismatchError:
        names = (name for tensor in _tensors(args) for name in self._names(_storage(tensor)))
        return MismatchError(
            f"{self.architecture}: before it stores {next(names, 'a tensor that is none of the model')}, transformers "
            f"applies {func}, which does more than move elements; {_REMEDY}"
        )

    def _names(self, storage: int) -> Iterator[str]:
        place = self._storages.get(storage)
        if isinstance(place, _Source):
            yield place.name
        elif place:
            for earlier, _, _ in place.inputs:
                yield from self._names(earlier)


def _storage(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's storage; those on `meta` all have the address 0."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage] - nothing public tells them apart


def _tensors(values: object) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _side_by_side(tensors: Sequence[torch.Tensor], dim: int = 0) -> tuple[Sequence[torch.Tensor], int]:
    return tensors, dim


def _stacked(tensors: Sequence[torch.Tensor], dim: int = 0) -> tuple[Sequence[torch.Tensor], int]:
    return [tensor.unsqueeze(dim) for tensor in tensors], dim


def _alone(tensor: torch.Tensor, *, memory_format: object = None) -> tuple[Sequence[torch.Tensor], int]:
    del memory_format  # the strides of the copy tell
    return [tensor], 0


_COPIES: dict[Any, Callable[..., tuple[Sequence[torch.Tensor], int]]] = {
    torch.ops.aten.cat.default: _side_by_side,
    torch.ops.aten.stack.default: _stacked,
    torch.ops.aten.clone.default: _alone,
}
"""Of each operation that fills a new storage: from its arguments the parts, and the axis along which they lie."""
