"""Host memory that a training state is copied into, so that training goes on while the copy is written."""

# torch is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

Keys = tuple[Hashable, ...]
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


@dataclass(frozen=True)
class _Buffer:
    """The copy of one tensor."""

    form: Hashable
    """What the tensor must have in common with the next one that is copied here."""

    staged: torch.Tensor
    """What is written: for a DTensor, one whose shard is `local`."""

    local: torch.Tensor


class HostBuffers:
    """Copies nested states into memory that is allocated once, and anew where a tensor's form has changed.

    What comes from a GPU is copied into pinned memory, on a stream of its own.
    """

    def __init__(self) -> None:
        self._held: dict[Keys, _Buffer] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stage(self, state: Any) -> Any:
        """Return a copy of a nest of dicts, lists and tuples, complete when this returns.

        A tensor that occurs twice, as tied weights do, is copied once. The next call overwrites the copy.
        """
        copying = _Copying(self._held, self._streams)
        with torch.inference_mode(False), torch.no_grad():  # a buffer made in inference mode could not be used again
            staged = copying.visit(state, ())
        copying.finish()
        self._held = copying.used
        return staged


class _Copying:
    """One pass over a state."""

    def __init__(self, held: dict[Keys, _Buffer], streams: dict[torch.device, torch.cuda.Stream]) -> None:
        self.used: dict[Keys, _Buffer] = {}
        self._held, self._streams = held, streams
        self._by_source: dict[Hashable, _Buffer] = {}
        self._filled: set[int] = set()
        self._copying_on: dict[torch.device, torch.cuda.Stream] = {}

    def visit(self, value: Any, keys: Keys) -> Any:
        """Return the copy of what is at `keys`."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value, keys)
        if isinstance(value, dict):
            return {key: self.visit(entry, (*keys, key)) for key, entry in cast("dict[Any, Any]", value).items()}
        if type(value) in {list, tuple}:
            return type(value)(self.visit(entry, (*keys, place)) for place, entry in enumerate(value))
        return copy.deepcopy(value)

    def finish(self) -> None:
        """Wait for the copies from GPUs."""
        for stream in self._copying_on.values():
            stream.synchronize()

    def _tensor(self, tensor: torch.Tensor, keys: Keys) -> torch.Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if type(local) not in _PLAIN or local.layout != torch.strided:
            return tensor.detach().to("cpu", copy=True)  # no memory of a plain form that could be kept for it
        form = _form(tensor, local)
        source = (form, local.data_ptr(), local.is_conj(), local.is_neg())
        buffer = self._by_source.get(source)
        if buffer is None:
            buffer = self._by_source[source] = self._buffer(tensor, form, keys)
            self._copy(buffer.local, local)
        self.used[keys] = buffer
        return buffer.staged

    def _buffer(self, tensor: torch.Tensor, form: Hashable, keys: Keys) -> _Buffer:
        """Return the buffer of `keys`, unless it does not fit or another tensor of this pass lies in it."""
        buffer = self._held.get(keys)
        if buffer is None or buffer.form != form or id(buffer) in self._filled:
            staged = torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)
            buffer = _Buffer(form, staged, staged.to_local() if isinstance(staged, DTensor) else staged)
        self._filled.add(id(buffer))
        return buffer

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if not source.is_cuda:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream(source.device)):
            target.copy_(source, non_blocking=True)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream for copies from `device`; it begins when the work given to the device so far has ended."""
        if device not in self._copying_on:
            stream = self._streams.get(device) or torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            self._streams[device] = self._copying_on[device] = stream
        return self._copying_on[device]


def _form(tensor: torch.Tensor, local: torch.Tensor) -> Hashable:
    sharding = (tensor.device_mesh, tensor.placements, tensor.shape) if isinstance(tensor, DTensor) else None
    return (local.shape, local.stride(), local.dtype, local.device, sharding)
