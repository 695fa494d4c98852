"""State of a training run in the form that checkpoints have: of its model, and of its optimizer with scheduler."""

# torch.distributed.checkpoint is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any, cast

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _get_fqns,  # pyright: ignore[reportPrivateUsage] - the names that stock DCP gives to what wrappers rename
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ckpt_core.errors import ArgumentError, MismatchError
from ckpt_core.io.containers import pack

MODEL_KEY = "model"
OPTIMIZER_KEY = "optim"
UNUSED_KEY = "unused"
"""Beside the state of an optimizer that was saved before its first step: the state there only fills names."""

PARAMETERS_KEY = "parameters"
"""Beside an optimizer's state: dtype and shape of each parameter, and where a state is sharded otherwise, as JSON."""

Layout = list[str] | None
"""Placements of a state tensor on its parameter's mesh; None for a tensor that is no DTensor."""


class ModelState(Stateful):
    """A model's state for torch.distributed.checkpoint, under the names of its parameters and buffers.

    Args:
        model: any module; wrapped by FSDP or not, its state keeps the plain names.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self, *, offload: bool = True) -> dict[str, Any]:
        """Return the state; sharded parameters as DTensors that hold this rank's part.

        Args:
            offload: bring it to the CPU.
        """
        if _is_fsdp1(self.model):  # its state dict is only sharded within torch's own context
            return get_model_state_dict(self.model, options=StateDictOptions(cpu_offload=offload))
        with torch.no_grad():
            state = self.model.state_dict()
        return {_plain_name(self.model, key): _offloaded(v) if offload else v for key, v in state.items()}

    def content(self, *, offload: bool = True) -> dict[str, Any]:
        """Return what is saved: the state dict, readable without running code.

        Args:
            offload: bring it to the CPU.

        Raises:
            ArgumentError (a ValueError): something in it could not be read back.
        """
        sharded = _is_fsdp1(self.model)
        return pack(self.state_dict(offload=offload and sharded), MODEL_KEY, offload=offload, sharded=sharded)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the state into the model.

        Raises:
            RuntimeError: a name is missing or unknown, or a shape differs.
        """
        if _is_fsdp1(self.model):
            set_model_state_dict(self.model, state_dict)
            return
        keys = {_plain_name(self.model, key): key for key in self.model.state_dict()}
        self.model.load_state_dict({keys.get(name, name): value for name, value in state_dict.items()})


class OptimizerState(Stateful):
    """An optimizer's state for torch.distributed.checkpoint, under the names of the parameters it belongs to.

    No step is ever taken for it: neither saving nor loading calls the optimizer's hooks, looks at gradients or changes
    a weight.

    Args:
        model: the module whose parameters the optimizer updates; without one, their numbers are their names.
        optimizer: the optimizer. One that has not stepped yet is left so.
        scheduler: anything with `state_dict` and `load_state_dict`, such as a learning-rate scheduler.

    Raises:
        ArgumentError (a ValueError): the model is sharded by FSDP1.
    """

    def __init__(
        self, model: torch.nn.Module | None, optimizer: torch.optim.Optimizer, scheduler: Any | None = None
    ) -> None:
        if model is not None and _is_fsdp1(model):
            raise ArgumentError(
                "optimizer: its parameters are sharded by FSDP1 (FullyShardedDataParallel), whose optimizer state "
                "cannot be saved or restored here; shard the module by fully_shard (FSDP2), or leave the optimizer out."
            )
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler

    def state_dict(self, *, offload: bool = True) -> dict[str, Any]:
        """Return `optim`, and with a scheduler `sched`.

        An optimizer of torch's that has not stepped has the state that it begins with, so that stock DCP has something
        to load into.

        Args:
            offload: bring it to the CPU.
        """
        state_dict: dict[str, Any] = {"optim": self._by_name()}
        if self.scheduler is not None:
            state_dict["sched"] = self.scheduler.state_dict()
        return _offloaded(state_dict) if offload else state_dict

    def content(self, *, offload: bool = True) -> dict[str, Any]:
        """Return what is saved: the state dict, readable without running code, with what loading it needs to know.

        Args:
            offload: bring it to the CPU.

        Raises:
            ArgumentError (a ValueError): something in it could not be read back.
        """
        content = self.state_dict(offload=False)
        content[PARAMETERS_KEY] = json.dumps(self._described(content["optim"]["state"]))
        if not self.optimizer.state:
            content[UNUSED_KEY] = True
        return pack(content, OPTIMIZER_KEY, offload=offload)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the state into the optimizer and, where there is one on both sides, the scheduler.

        A parameter of which the state dict has no state, as it never had a gradient, has none afterwards.

        Raises:
            MismatchError (a ValueError): the parameter groups hold other parameters than the optimizer's.
        """
        self.put(self.numbered(state_dict["optim"]))
        if "sched" in state_dict and self.scheduler is not None:
            self.scheduler.load_state_dict(like(self.scheduler.state_dict(), state_dict["sched"]))

    def numbered(self, optim: dict[str, Any]) -> dict[str, Any]:
        """Return a state by names as the optimizer's own `load_state_dict` takes it: by numbers, in its order.

        Raises:
            MismatchError (a ValueError): the parameter groups hold other parameters than the optimizer's.
        """
        saved = list(optim["param_groups"])
        groups: list[dict[str, Any]] = []
        numbers: dict[str, int] = {}
        for names, live in zip(self.names(), self.optimizer.param_groups, strict=True):
            group = _take_group(names, saved)
            start = len(numbers)
            numbers |= {name: start + place for place, name in enumerate(names)}
            options = {key: _on_device_of(live.get(key), value) for key, value in group.items()}
            groups.append({**options, "params": [numbers[name] for name in names]})
        if saved:
            raise _group_mismatch(list(map(str, saved[0]["params"])), self.names())
        others = {key: value for key, value in optim.items() if key not in {"state", "param_groups"}}
        state = {numbers.get(str(name), name): value for name, value in optim["state"].items()}
        return {**others, "state": state, "param_groups": groups}

    def put(self, numbered: dict[str, Any], saved_dtypes: Mapping[str, str] | None = None) -> None:
        """Load a state by numbers, each tensor of it with the dtype that it has there.

        Args:
            numbered: what `numbered` returned.
            saved_dtypes: those of the parameters when the state was saved. Where a parameter has another dtype now, or
                none is known, its state takes the parameter's, as torch does it.
        """
        # A tensor made in inference mode could never be updated by a step.
        with torch.inference_mode(False), torch.no_grad():
            self.optimizer.load_state_dict(dict(numbered))
            for number, (name, parameter) in enumerate(self.parameters().items()):
                saved, loaded = numbered["state"].get(number), self.optimizer.state.get(parameter)
                if isinstance(saved, dict) and isinstance(loaded, dict):
                    follows = (saved_dtypes or {}).get(name) != _dtype_name(parameter)
                    self.optimizer.state[parameter] = _exactly(saved, loaded, follows=follows)

    def names(self) -> list[list[str]]:
        """Return the names of the parameters in each of the optimizer's groups.

        Raises:
            MismatchError (a ValueError): a parameter is not the module's.
        """
        groups: list[list[torch.Tensor]] = [group["params"] for group in self.optimizer.param_groups]
        if self.model is None:
            numbers = iter(range(sum(map(len, groups))))
            return [[str(next(numbers)) for _ in group] for group in groups]
        model = self.model
        names = {id(parameter): _plain_name(model, key) for key, parameter in model.named_parameters()}
        try:
            return [[names[id(parameter)] for parameter in group] for group in groups]
        except KeyError:
            raise MismatchError(
                "optimizer: updates parameters that are not the module's; make it of module.parameters(), after the "
                "module was moved, wrapped or sharded."
            ) from None

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's parameters by name, in its order."""
        groups = zip(self.names(), self.optimizer.param_groups, strict=True)
        return {name: p for names, group in groups for name, p in zip(names, group["params"], strict=True)}

    def _by_name(self) -> dict[str, Any]:
        names = [name for group in self.names() for name in group]
        if not self.optimizer.state and self.model is not None:
            optim = _initial_state(self.optimizer)
        else:
            optim = self.optimizer.state_dict()
        groups = cast("list[dict[str, Any]]", optim["param_groups"])
        if [number for group in groups for number in group["params"]] != list(range(len(names))):
            raise ArgumentError(
                f"optimizer: the state_dict() of {type(self.optimizer).__qualname__} does not number its parameters as "
                "torch's optimizers do, so their state cannot be saved by name."
            )
        if self.model is not None:
            groups = [{**group, "params": [names[number] for number in group["params"]]} for group in groups]
        state = {names[key] if type(key) is int else key: value for key, value in optim["state"].items()}
        return {**optim, "state": state, "param_groups": groups}

    def _described(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what loading must know of the parameters: dtypes, shapes, and layouts that do not follow from them."""
        described: dict[str, Any] = {}
        for name, parameter in self.parameters().items():
            layouts = {
                ".".join(path): _layout_of(tensor)
                for path, tensor in _tensors(state.get(name), ())
                if not _has_usual_layout(tensor, parameter)
            }
            described[name] = [_dtype_name(parameter), list(parameter.shape), *([layouts] if layouts else [])]
        return described


def usual_layout(parameter: torch.Tensor, shape: tuple[int, ...]) -> tuple[Placement, ...] | None:
    """Return how a state tensor of some shape is placed on its parameter's mesh, if nothing else is known.

    One of the parameter's shape is sharded as the parameter; a number is a plain tensor; any other one, such as a
    factor of a matrix, is replicated, since operations do not mix DTensors with plain tensors.
    """
    if not isinstance(parameter, DTensor) or not shape:
        return None
    if shape == tuple(parameter.shape):
        return tuple(parameter.placements)
    return tuple(Replicate() for _ in parameter.placements)


def recorded_layout(parameter: torch.Tensor, layout: Layout) -> tuple[Placement, ...] | None:
    """Return how a state tensor of a recorded layout is placed on the mesh that its parameter has now."""
    if layout is None or not isinstance(parameter, DTensor):
        return None
    if len(layout) != len(parameter.placements):
        return tuple(Replicate() for _ in parameter.placements)
    return tuple(Shard(int(code[1:])) if code.startswith("S") else Replicate() for code in layout)


def like(live: Any, stored: Any) -> Any:
    """Return a state that stock DCP stored with numbers for keys, and counters, where `live` has them.

    Stock DCP turns every key into text. What this library saves keeps its types and needs no such guess.
    """
    if isinstance(live, (list, tuple)) and isinstance(stored, (list, tuple)) and len(live) == len(stored):
        return type(stored)(like(one, other) for one, other in zip(live, stored, strict=True))
    if not (isinstance(live, dict) and isinstance(stored, dict)):
        return stored
    pattern, content = cast("dict[Any, Any]", live), cast("dict[Any, Any]", stored)
    keys = {str(key): key for key in pattern}
    numbers = any(isinstance(key, int) for key in pattern)
    built: dict[Any, Any] = {}
    for key, value in content.items():
        known = keys.get(str(key), key)
        own = int(known) if numbers and isinstance(known, str) and known.lstrip("-").isdecimal() else known
        built[own] = like(pattern.get(own), value)
    return Counter(built) if isinstance(live, Counter) else built


def _is_fsdp1(model: torch.nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _plain_name(model: torch.nn.Module, key: str) -> str:
    """Return the name of an entry of a state dict without what DDP, torch.compile and others put into it."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        try:
            (name,) = _get_fqns(model, ".".join(parts[:end]))
        except AttributeError:  # a key beside a parameter's, as quantized layers write them, is no attribute
            continue
        return ".".join([name, *parts[end:]])
    return key


def _offloaded(value: Any) -> Any:
    """Return a nested state with its tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.to("cpu")
    if type(value) is dict:
        return {key: _offloaded(entry) for key, entry in cast("dict[Any, Any]", value).items()}
    if type(value) in {list, tuple}:
        return type(value)(_offloaded(entry) for entry in value)
    return value


def _take_group(names: list[str], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """Remove the parameter group of these parameters from the saved ones, and return it."""
    for place, group in enumerate(saved):
        if set(map(str, group["params"])) == set(names):
            return saved.pop(place)
    raise _group_mismatch(names, [list(map(str, group["params"])) for group in saved])


def _group_mismatch(names: list[str], others: list[list[str]]) -> MismatchError:
    unknown = sorted(set(names) - {name for group in others for name in group})
    return MismatchError(
        f"optimizer: the parameter group of {', '.join(names[:3]) or 'nothing'}, ... is on one side only; "
        + (f"the other has no {', '.join(unknown[:3])}. " if unknown else "the groups are divided otherwise. ")
        + "Make the optimizer as it was when it was saved."
    )


def _on_device_of(live: Any, value: Any) -> Any:
    """Return a parameter group's value where the live one is: a rate that is a tensor may have to be on the GPU."""
    if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor):
        return value.to(live.device)
    return value


def _exactly(saved: Any, loaded: Any, *, follows: bool) -> Any:
    """Return what an optimizer loaded, but for what its `load_state_dict` changed without need.

    torch gives the parameter's dtype to every tensor of its state, and rebuilds all that can be iterated.
    """
    if isinstance(saved, torch.Tensor) or isinstance(loaded, torch.Tensor):
        if not (isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor)) or saved.dtype == loaded.dtype:
            return loaded
        casts = follows and saved.is_floating_point() and loaded.is_floating_point()
        return loaded if casts else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        merged = copy.copy(saved)
        for key, value in loaded.items():  # the dtype of `step` depends on how the optimizer computes: torch sees to it
            merged[key] = value if key == "step" or key not in saved else _exactly(saved[key], value, follows=follows)
        return merged
    if type(saved) in {list, tuple} and isinstance(loaded, (list, tuple)) and len(saved) == len(loaded):
        return type(saved)(_exactly(one, other, follows=follows) for one, other in zip(saved, loaded, strict=True))
    return saved


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensors(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Yield the tensors of a nested state, each with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(entry, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for place, entry in enumerate(value):
            yield from _tensors(entry, (*path, str(place)))


def _has_usual_layout(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    usual = usual_layout(parameter, tuple(tensor.shape))
    return (tuple(tensor.placements) if isinstance(tensor, DTensor) else None) == usual


def _layout_of(tensor: torch.Tensor) -> Layout:
    if not isinstance(tensor, DTensor):
        return None
    return [f"S{p.dim}" if type(p) is Shard else "R" for p in tensor.placements]


def _initial_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict of an optimizer that has not stepped, filled as its first step would begin.

    Only torch's own optimizers can do that without a step. What others begin with is not known: their state is empty.
    """
    inner: Any = optimizer
    while type(inner).__module__.partition(".")[0] != "torch" and isinstance(
        getattr(inner, "optimizer", None), torch.optim.Optimizer
    ):
        inner = inner.optimizer  # a wrapper, as Accelerate's
    if type(inner).__module__.split(".")[:2] != ["torch", "optim"] or not hasattr(inner, "_init_group"):
        return optimizer.state_dict()
    blank: Any = object.__new__(type(inner))
    blank.__dict__.update(inner.__dict__)
    blank.state = defaultdict(dict)
    parameters = _stand_ins([parameter for group in inner.param_groups for parameter in group["params"]])
    remaining = iter(parameters)
    for group in inner.param_groups:
        _initialize(blank, {**group, "params": [next(remaining) for _ in group["params"]]})
    state_dict = optimizer.state_dict()
    state_dict["state"] = {n: blank.state[p] for n, p in enumerate(parameters) if blank.state.get(p)}
    return state_dict


def _initialize(optimizer: Any, group: dict[str, Any]) -> None:
    """Make the state of one parameter group."""
    lists = len(signature(optimizer._init_group).parameters) - 1
    optimizer._init_group(group, *([] for _ in range(lists)))
    if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:  # SGD makes its state after its first update
        for parameter in group["params"]:
            if parameter.grad is not None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _stand_ins(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of parameters that look as if they had gradients, of which only the form is looked at."""
    views = [parameter.detach() for parameter in parameters]
    for view, parameter in zip(views, parameters, strict=True):
        if parameter.requires_grad:
            view.grad = view.detach()
    return views
