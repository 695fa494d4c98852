"""Filling live objects from DCP directories, at any number of ranks, whatever framework wrote them.

All that can be read or checked apart from the live objects comes first; see `fill`.
"""

# torch.distributed's tensors are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.nn.parameter import is_lazy

from ckpt_core import io, ranks, trainer
from ckpt_core.errors import CheckpointError, DamagedError, MismatchError
from ckpt_core.format.digests import algorithm_of
from ckpt_core.format.index import METADATA_NAME, TWIN_NAME, Index, Keys, TensorEntry, check_files, is_dcp, read_index
from ckpt_core.format.manifest import record_file
from ckpt_core.io.containers import KINDS_KEY, read_kinds, unpack, unpack_entry
from ckpt_core.io.nesting import nest
from ckpt_core.locate import find_prefix, left_over
from ckpt_core.printable import printable_logger
from ckpt_core.state import (
    MODEL_KEY,
    OPTIMIZER_KEY,
    PARAMETERS_KEY,
    UNUSED_KEY,
    ModelState,
    OptimizerState,
    like,
    recorded_layout,
    usual_layout,
)

if TYPE_CHECKING:
    from ckpt_core.store import Checkpoint
    from ckpt_core.urls import Place

_EXTRA = "_extra_state"
_ROOTS: tuple[Keys, ...] = ((OPTIMIZER_KEY, "optim"), (OPTIMIZER_KEY,), ("optimizer",))
"""Where an optimizer's `state` and `param_groups` stand: ours and NeMo-RL's, stock DCP's, Accelerate's."""

_OPTIMIZER = re.compile(r"(^|\.)(optim(izers?)?|param_groups)(_\d+)?(\.|$)")
"""What the name of an entry of an optimizer has in it, whichever framework saved it."""

_log = printable_logger(__name__)


def fill(model: ModelPlan | None, optimizer: OptimizerPlan | None, generators: Callable[[], None] | None) -> None:
    """Collective: put what was planned into the live objects.

    The optimizer's and scheduler's state is read whole before anything live is touched. Then the module's tensors are
    read into their place, and optimizer, scheduler and generators follow. The error of a later stage says what was
    overwritten until then.

    Raises:
        CheckpointError: something cannot be read, or does not fit.
    """
    if optimizer is not None:
        optimizer.read()
    touched: list[str] = []
    if model is not None:
        with _tell_overwritten(touched, "the module's tensors, in part"):
            model.load()
        touched.append("the module")
    if optimizer is not None:
        with _tell_overwritten(touched, "the optimizer or its scheduler, in part"):
            ranks.together(optimizer.apply)
        touched.append("the optimizer")
    with _tell_overwritten(touched, "the random number generators, in part"):
        ranks.together(lambda: generators and generators())  # a rank that did not save has none


@contextmanager
def _tell_overwritten(touched: list[str], current: str) -> Generator[None]:
    """Add to an error which of the live objects have other content than before."""
    try:
        yield
    except Exception as error:
        text = f"Overwritten until then: {', '.join([*touched, current])}; restore again before they are used."
        if isinstance(error, CheckpointError):
            raise type(error)(f"{error} {text}") from error
        if isinstance(error, (RuntimeError, ValueError, TypeError, KeyError, AttributeError)):
            raise MismatchError(f"{type(error).__name__}: {error} {text}") from error
        _log.error("%s", text)
        error.add_note(text)
        raise


@dataclass
class ModelPlan:
    """A model and the directory that fits it."""

    state: ModelState
    directory: Place
    index: Index
    prefix: str
    """What the checkpoint's names have in front of the model's."""

    own: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    """What to read into, by the model's names: live memory, where that is on the CPU."""

    loose: dict[str, Keys]
    """Where in the model's state each value belongs that is no tensor of it, such as an extra state, by flat name."""

    @classmethod
    def make(cls, module: torch.nn.Module, directory: Place, prefix: str | None = None) -> ModelPlan:
        """Find the model's tensors in a DCP directory, and compare them; nothing is read or changed.

        Args:
            module: the model.
            directory: the DCP directory.
            prefix: which of several models in it is meant; see `find_prefix`.

        Raises:
            MismatchError: a tensor of the model is not in it, has another shape there, or it is not clear which it is.
        """
        state = ModelState(module)
        own = state.state_dict()
        index = read_index(directory)
        check_files(directory, index)
        tensors = {name: v for name, v in own.items() if isinstance(v, torch.Tensor) and not _is_extra(name)}
        values = [name for name in own if name not in tensors]
        found = find_prefix(index, tensors, str(directory), prefix, values=values)
        targets = {name: _checked(index, found + name, tensor, directory) for name, tensor in tensors.items()}
        single = [name for name in index.tensors if found and "." not in name]
        unread = [*left_over(index, found, tensors, values), *single, *index.unsupported]
        if unread:
            count = len(unread)
            _log.warning("%s: %d tensors are not the model's and stay unread, such as %s", directory, count, unread[0])
        plan = cls(state, directory, index, found, own, targets, _loose_paths(index, found, values))
        plan.check_values()
        return plan

    @property
    def part(self) -> str:
        """What the names of a whole that was saved have in front of this model's."""
        return self.prefix.removeprefix(f"{MODEL_KEY}.")

    def check_values(self) -> None:
        """Check that every entry of the state that is neither tensor nor extra state is in the checkpoint."""
        found = {path[0] for path in self.loose.values()}
        missing = [n for n in self.own if n not in self.tensors and n not in found and not _is_extra(n)]
        if missing:
            raise MismatchError(
                f"{self.directory}: lacks {len(missing)} of the model's values, such as {', '.join(missing[:3])}; load "
                "it into the model that it was saved from."
            )

    def load(self) -> None:
        """Collective: read into the live model."""
        flat: dict[str, Any] = {self.prefix + name: tensor for name, tensor in self.tensors.items()}
        record = f"{MODEL_KEY}.{KINDS_KEY}"
        flat |= {name: _blank(self.index, name) for name in self.loose}
        flat |= dict.fromkeys({record} & self.index.values.keys())
        io.load(flat, self.directory, index=self.index)
        values = nest({name: flat[name] for name in self.loose}, self.loose, str(self.directory))
        kinds = read_kinds(flat.get(record), str(self.directory))
        loaded = {**self.own, **{name: flat[self.prefix + name] for name in self.tensors}}
        for name in self.own.keys() - self.tensors.keys():
            loaded |= unpack_entry(kinds.get(self.part + name), name, values, str(self.directory))
        ranks.together(lambda: self.state.load_state_dict(loaded))


@dataclass
class OptimizerPlan:
    """An optimizer, with its scheduler, and the directory that holds their state."""

    state: OptimizerState
    directory: Place
    index: Index
    root: Keys
    """Where `state` and `param_groups` stand in what was saved."""

    part: str = ""
    """What the saved names have in front of the parameters' names, where the module is a part of a saved one."""

    numbered: dict[str, Any] = field(default_factory=dict[str, Any])
    sched: dict[str, Any] | None = None
    dtypes: dict[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def make(cls, state: OptimizerState, directory: Place, part: str = "") -> OptimizerPlan:
        """Find an optimizer's state in a DCP directory or in `optimizer` below it; nothing is changed.

        Raises:
            MismatchError: there is none, or the optimizer updates parameters that are not its module's.
        """
        below = directory / "optimizer"
        at_top = is_dcp(directory) or not is_dcp(below)
        found = directory if at_top else below
        index = read_index(found)
        state.names()
        for root in _ROOTS:
            if any(path[: len(root) + 1] == (*root, "param_groups") for path in index.paths.values()):
                return cls(state, found, index, root, part)
        names = [*index.tensors, *index.values]
        other = next((name for name in names if _OPTIMIZER.search(name)), None)
        if other is not None:
            raise MismatchError(
                f"{found}: its optimizer is in a form that is not loaded here, such as {other}; load it with the "
                "framework that saved it, or load the weights alone."
            )
        raise MismatchError(
            f"{found}: holds no optimizer ({', '.join(names[:3])}, ...); give the optimizer's directory."
        )

    def read(self) -> None:
        """Collective: read all of the state, and compare it with the optimizer; nothing live is changed."""
        # A tensor that was made in inference mode could never be updated by a step.
        with torch.inference_mode(False), torch.no_grad():
            values: dict[str, Any] = dict.fromkeys(self.index.values)
            io.load(values, self.directory, index=self.index)
            targets = ranks.together(lambda: self._targets(values))
            io.load(targets.tensors, self.directory, index=self.index)
            ranks.together(lambda: self._arrange(values, targets))

    def apply(self) -> None:
        """Put what was read into the optimizer and the scheduler."""
        self.state.put(self.numbered, self.dtypes)
        if self.sched is not None and self.state.scheduler is not None:
            self.state.scheduler.load_state_dict(self.sched)

    def _targets(self, values: Mapping[str, Any]) -> _Targets:
        """Return what to read each tensor into: sharded as the live state is, or was, or as the parameter is."""
        described, live = self._described(values), self.state.parameters()
        if live.keys() <= self._saved_names(values):
            self.part = ""
        parameters = {self.part + name: parameter for name, parameter in live.items()}
        for name, parameter in parameters.items():
            saved = described.get(name)
            if saved is not None and tuple(saved[1]) != tuple(parameter.shape):
                raise MismatchError(self._other_shape(name, tuple(saved[1]), parameter))
        targets = _Targets()
        depth = len(self.root)
        for name in _in_saved_order(self.index):
            path, entry = self.index.paths.get(name, (name,)), self.index.tensors.get(name)
            if entry is None:
                continue
            parameter = parameters.get(str(path[depth + 1])) if path[: depth + 1] == (*self.root, "state") else None
            if parameter is None:
                targets.tensors[name] = cast("torch.Tensor", _blank(self.index, name))
                continue
            saved_name, inner = str(path[depth + 1]), path[depth + 2 :]
            if not described and inner[-1:] and inner[-1] in _LIKE_PARAMETER and entry.shape != tuple(parameter.shape):
                raise MismatchError(self._other_shape(saved_name, entry.shape, parameter))
            layouts = described[saved_name][2] if len(described.get(saved_name, ())) > 2 else {}  # noqa: PLR2004
            targets.add(name, entry, parameter, self._placements(entry, parameter, inner, layouts))
        return targets

    def _placements(
        self, entry: TensorEntry, parameter: torch.Tensor, inner: Keys, layouts: Mapping[str, Any]
    ) -> tuple[Placement, ...] | None:
        live: Any = self.state.optimizer.state.get(parameter)
        for key in inner:
            live = live.get(key) if isinstance(live, dict) else None
        if isinstance(live, torch.Tensor) and tuple(live.shape) == entry.shape:
            return tuple(live.placements) if isinstance(live, DTensor) else None
        key = ".".join(map(str, inner))
        return recorded_layout(parameter, layouts[key]) if key in layouts else usual_layout(parameter, entry.shape)

    def _arrange(self, values: Mapping[str, Any], targets: _Targets) -> None:
        """Nest what was read, in the order of the live optimizer."""
        flat = {**values, **targets.finished()}
        ordered = {name: flat[name] for name in _in_saved_order(self.index)}
        place, *inside = map(str, self.root)
        top = unpack(nest(ordered, self.index.paths, str(self.directory))[place], f"{self.directory}: {place}")
        optim = top[inside[0]] if inside else top
        described = self._described(values)
        self.dtypes = {self._own_name(name): entry[0] for name, entry in described.items()}
        saved_state = {} if UNUSED_KEY in top else optim.get("state", {})
        groups = [{**group, "params": list(map(self._own_name, group["params"]))} for group in optim["param_groups"]]
        state = {self._own_name(name): value for name, value in saved_state.items()}
        self.numbered = self.state.numbered({**optim, "state": state, "param_groups": groups})
        if "sched" in top and inside and self.state.scheduler is not None:
            live = self.state.scheduler.state_dict()
            self.sched = top["sched"] if described else like(live, top["sched"])
            _check_scheduler(live, self.sched, self.directory)

    def _described(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is recorded of the parameters; nothing where another library saved."""
        record = values.get(f"{OPTIMIZER_KEY}.{PARAMETERS_KEY}")
        if record is None:
            return {}
        try:
            return {
                str(n): [str(d), [int(s) for s in shape], *rest] for n, (d, shape, *rest) in json.loads(record).items()
            }
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise DamagedError(
                f"{self.directory}: {PARAMETERS_KEY} is not a record of parameters; restore a copy of the checkpoint."
            ) from None

    def _saved_names(self, values: Mapping[str, Any]) -> set[str]:
        """Return the names of the parameters in the saved groups."""
        groups = (*self.root, "param_groups")
        lists = [
            values[name]
            for name, path in self.index.paths.items()
            if name in values and path[: len(groups)] == groups and path[-1] == "params"
        ]
        return {str(name) for names in lists if isinstance(names, list) for name in cast("list[Any]", names)}

    def _own_name(self, name: Any) -> str:
        return str(name).removeprefix(self.part)

    def _other_shape(self, name: str, shape: tuple[int, ...], parameter: torch.Tensor) -> str:
        return (
            f"{self.directory}: {name} has shape {shape} there, the module's has {tuple(parameter.shape)}; load it "
            "into the optimizer of the model that it was saved from."
        )


_LIKE_PARAMETER = frozenset({
    "exp_avg", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum", "prev",
})  # fmt: skip
"""States of torch's optimizers that have the shape of their parameter."""


class _Targets:
    """Tensors to read an optimizer's state into."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._placed: dict[str, tuple[DTensor, tuple[Placement, ...]]] = {}

    def add(
        self, name: str, entry: TensorEntry, parameter: torch.Tensor, placements: tuple[Placement, ...] | None
    ) -> None:
        """Make a tensor for an entry, with the placements on the parameter's mesh if there are any."""
        dtype = getattr(torch, entry.dtype)
        if not isinstance(parameter, DTensor) or placements is None:
            self.tensors[name] = torch.empty(entry.shape, dtype=dtype, device="cpu")
        elif entry.shape == tuple(parameter.shape) and placements == tuple(parameter.placements):
            self.tensors[name] = torch.empty_like(parameter.detach(), dtype=dtype, device="cpu")
        else:  # is read whole, and divided after that
            self.tensors[name] = torch.empty(entry.shape, dtype=dtype, device="cpu")
            self._placed[name] = parameter, placements

    def finished(self) -> dict[str, torch.Tensor]:
        """Return what was read, divided as it is to be."""
        return self.tensors | {name: self._divided(name, *where) for name, where in self._placed.items()}

    def _divided(self, name: str, parameter: DTensor, placements: tuple[Placement, ...]) -> DTensor:
        whole, mesh = self.tensors[name], parameter.device_mesh
        if all(isinstance(placement, Replicate) for placement in placements):
            return DTensor.from_local(whole, mesh, placements, run_check=False)
        return distribute_tensor(whole.to(mesh.device_type), mesh, placements, src_data_rank=None)


def read_trainer(checkpoint: Checkpoint, rank: int, *, rng: bool) -> tuple[dict[str, Any], Callable[[], None] | None]:
    """Return a step's counters, empty if it has none, and what sets this rank's generators, if asked for.

    Raises:
        DamagedError: they are not readable.
    """
    directory = checkpoint.component("trainer")
    if directory is None:
        return {}, None
    return trainer.load(directory), trainer.stored_generators(directory, rank) if rng else None


def check_records(checkpoint: Checkpoint, rank: int) -> None:
    """Compare what of a step no CRC32 guards, and this rank reads, with the manifest: metadata and trainer state.

    Raises:
        DamagedError: a file is not what was committed.
    """
    own = {f"trainer/{trainer.STATE_NAME}", f"trainer/{trainer.rank_name(rank)}"}
    for name, record in checkpoint.manifest.files.items():
        if not (name in own or name.endswith((f"/{METADATA_NAME}", f"/{TWIN_NAME}"))):
            continue
        found = record_file(checkpoint.root / name, algorithm_of(record.digest))
        if found != record:
            raise DamagedError(
                f"{checkpoint.root / name}: {found.bytes} bytes, {found.digest}; the manifest says {record.bytes}, "
                f"{record.digest}. Restore a copy, or load an older step."
            )


def _checked(index: Index, name: str, tensor: torch.Tensor, directory: Place) -> torch.Tensor:
    """Return what to read a tensor of the model into.

    Raises:
        MismatchError: it is no tensor in the checkpoint, or has another shape.
    """
    entry = index.tensors.get(name)
    if entry is not None and is_lazy(tensor):
        return cast("torch.Tensor", _blank(index, name))  # gets its shape from what it is loaded with
    found = "no tensor" if entry is None else entry.shape
    if found != tuple(tensor.shape):
        raise MismatchError(
            f"{directory}: {name} has shape {found}, what it is loaded into has {tuple(tensor.shape)}; load it into "
            "the model that it was saved from."
        )
    return tensor


def _check_scheduler(live: Any, stored: Any, directory: Place) -> None:
    """Compare the public names of two schedulers' states: those of a class may only grow.

    Raises:
        MismatchError: each has some that the other lacks.
    """
    if not (isinstance(live, dict) and isinstance(stored, dict)):
        return
    mine, theirs = ({str(k) for k in state if not str(k).startswith("_")} for state in (live, stored))
    if mine - theirs and theirs - mine:
        raise MismatchError(
            f"{directory}: the scheduler that was saved has {', '.join(sorted(theirs - mine)[:3])}, this one has "
            f"{', '.join(sorted(mine - theirs)[:3])}; make the scheduler as it was when it was saved."
        )


def _loose_paths(index: Index, prefix: str, names: list[str]) -> dict[str, Keys]:
    """Return where each stored entry that belongs to one of the model's values, such as an extra state, goes in it."""
    if not names:
        return {}
    wanted = {prefix + name: name for name in names}
    paths: dict[str, Keys] = {}
    for flat in _in_saved_order(index):
        joined, path = "", index.paths.get(flat, (flat,))
        for place, key in enumerate(path):
            joined = f"{joined}.{key}" if place else str(key)
            if joined in wanted:
                paths[flat] = (wanted[joined], *path[place + 1 :])
                break
    return paths


def _in_saved_order(index: Index) -> list[str]:
    place = {name: place for place, name in enumerate(index.paths)}
    return sorted([*index.tensors, *index.values], key=lambda name: place.get(name, len(place)))


def _blank(index: Index, name: str) -> torch.Tensor | None:
    """Return a place to read an entry of a checkpoint into."""
    entry = index.tensors.get(name)
    with torch.inference_mode(False):
        return None if entry is None else torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="cpu")


def _is_extra(name: str) -> bool:
    return _EXTRA in name.split(".")
