"""`PyTorchCheckpoint`: flytekit's class, with a checkpoint's state in a store and its JSON a small reference."""

# dataclasses-json, marshmallow and torch are only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dataclasses_json import DataClassJsonMixin

from ckpt_core.errors import ArgumentError, CheckpointError, MismatchError
from ckpt_core.format.manifest import Manifest
from ckpt_core.hyperparameters import as_dict, exact, plain, restored, types_lost
from ckpt_core.reference import Reference, refer
from ckpt_core.store import Checkpoint, open_checkpoint, open_store
from ckpt_core.store.names import check_name, check_step
from ckpt_core.urls import local_path

if TYPE_CHECKING:
    import torch
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

    from ckpt_core.commit import Parts
    from ckpt_core.urls import Place
else:

    class _Torch:
        """Stands for torch in annotations, and loads it when one is evaluated, as `typing.get_type_hints` does."""

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    torch = _Torch()

MODULE_KEY = "module_state_dict"
OPTIMIZER_KEY = "optimizer_state_dict"


@dataclass
class PyTorchCheckpoint(DataClassJsonMixin):
    """A model's module, its hyperparameters and its optimizer, in memory or in a store.

    `save` commits it. Its JSON is then a reference of a few KB; the checkpoint that `from_json` makes of that loads
    on demand, on any machine that reaches the store: `restore` fills live objects, and `checkpoint[key]` reads
    `module_state_dict`, `optimizer_state_dict` and each hyperparameter by its name.

    Args:
        module: the model.
        hyperparameters: a dict, a NamedTuple or a dataclass instance.
        optimizer: the optimizer; one that is saved without a module keeps its parameters' numbers for names.

    Raises:
        ArgumentError (a TypeError and ValueError): none of the three is given, the hyperparameters are of another
            type, one of them has the name of a state, or module or optimizer is none.
    """

    module: torch.nn.Module | None = None
    hyperparameters: dict[str, Any] | tuple[Any, ...] | Any | None = None
    optimizer: torch.optim.Optimizer | None = None
    _reference: Reference | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, what in (("module", "torch.nn.Module"), ("optimizer", "torch.optim.Optimizer")):
            given = getattr(self, name)
            if isinstance(given, type) or not (given is None or hasattr(given, "state_dict")):
                raise ArgumentError(f"{name}: expected an instance of {what}, found {given!r:.80}.")
        values = as_dict(self.hyperparameters)
        if self.module is None and self.optimizer is None and not values:
            raise ArgumentError("PyTorchCheckpoint(): empty; give at least one of module, hyperparameters, optimizer.")
        taken = {MODULE_KEY, OPTIMIZER_KEY} & set(values)
        if taken:
            raise ArgumentError(f"hyperparameters: {min(taken)!r} names a state of the checkpoint; rename it.")

    @property
    def url(self) -> str | None:
        """Where its state lies in a store; None for one that was never saved."""
        return self._reference.url if self._reference else None

    @property
    def step(self) -> int | None:
        """The step that it was saved as; None for one that was never saved."""
        return self._reference.step if self._reference else None

    @classmethod
    def from_url(cls, url: str | Path) -> PyTorchCheckpoint:
        """Return the committed step at `url`, to be loaded on demand.

        Raises:
            FileNotFoundError: there is none.
        """
        checkpoint = open_checkpoint(url)
        manifest = checkpoint.manifest
        values = restored(dict(manifest.hyperparameters), manifest.hyperparameter_types)
        return cls._referring(refer(checkpoint), values or None)

    def save(
        self,
        url: str | Path,
        *,
        step: int,
        run: str = "default",
        scheduler: Any | None = None,
        trainer: Mapping[str, Any] | None = None,
        assets: str | Path | None = None,
        metrics: Mapping[str, Any] | None = None,
        lineage: Mapping[str, Any] | None = None,
    ) -> PyTorchCheckpoint:
        """Commit it to a store as one step: all of it, or nothing. Collective.

        Every rank gives the same arguments. What is not sharded must be equal on all ranks, but for buffers, of which
        rank 0's are saved; see `ckpt_core.io.agreement`.

        Args:
            url: the store; the step is committed as `<url>/<run>/step_NNNNNNNNNN`.
            step: its number, which no other step of the run may have.
            run: the lineage that the step belongs to.
            scheduler: saved with the optimizer.
            trainer: counters of the training run, as JSON; each rank's random number generators go with them.
            assets: a directory whose files (tokenizer) go along; a transformers model adds its configs.
            metrics: how good it is, as JSON.
            lineage: what it was made from, as JSON.

        Returns:
            The checkpoint that knows its `url`.

        Raises:
            StepExistsError (a FileExistsError): the run has that step; nothing was written.
            CommitError: not committed, or not surely; the message says which. So is what the ranks disagree on.
        """
        from ckpt_core import commit, ranks

        described = partial(
            collect, self, run=run, step=step, scheduler=scheduler, trainer=trainer, assets=assets, metrics=metrics,
            lineage=lineage,
        )  # fmt: skip

        def write() -> Reference:
            parts, store = commit.agree(described, lambda: open_store(url))
            return commit.commit(store, ranks.together(lambda: commit.live(parts)))

        reference = ranks.together(write)  # refuses what cannot be copied, too: what JSON does not hold
        saved = PyTorchCheckpoint(self.module, copy.deepcopy(self.hyperparameters), self.optimizer)
        saved._reference = reference
        return saved

    def restore(
        self,
        module: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        scheduler: Any | None = None,
        rng: bool = False,
        prefix: str | None = None,
    ) -> dict[str, Any]:
        """Fill live objects with the saved state, at any number of ranks. Collective.

        No optimizer step is taken for it, and no hook of one is called. Names, shapes, parameter groups, counters and
        generators are read and compared, and the optimizer's and scheduler's state is read whole, before anything is
        overwritten. The module's tensors are then read into their place: one that is damaged leaves the module with
        part of the saved state, and the error says what was overwritten.

        Args:
            module: filled in place.
            optimizer: filled in place; needs `module`, whose parameters it updates, if it was saved with one.
            scheduler: filled in place, with the optimizer.
            rng: also set this rank's random number generators.
            prefix: which part of the saved module is meant, such as `ema`: what the names of its tensors begin with.
                Without it, a checkpoint in which several fit, or that has tensors of something else, is refused.

        Returns:
            The trainer's counters; empty if none were saved.

        Raises:
            MismatchError (a ValueError): the state does not fit the objects.
            CheckpointError: there is no such state, or it is damaged or hostile.
        """
        from ckpt_core import ranks

        given = {"module": module, "optimizer": optimizer, "scheduler": scheduler}
        facts: dict[str, object] = {name: None if one is None else "given" for name, one in given.items()}
        facts |= {"rng": rng, "prefix": prefix, "the checkpoint": self._reference and self._reference.digest}

        def restore() -> dict[str, Any]:
            ranks.agree(facts, "restore")
            return self._fill(module, optimizer, scheduler=scheduler, rng=rng, prefix=prefix)

        return ranks.together(restore)

    def _fill(
        self,
        module: torch.nn.Module | None,
        optimizer: torch.optim.Optimizer | None,
        *,
        scheduler: Any | None,
        rng: bool,
        prefix: str | None,
    ) -> dict[str, Any]:
        from ckpt_core import ranks
        from ckpt_core.restore import ModelPlan, OptimizerPlan, check_records, fill, read_trainer
        from ckpt_core.state import OptimizerState

        if scheduler is not None and optimizer is None:
            raise ArgumentError("restore: a scheduler's state goes with its optimizer's; give the optimizer too.")
        checkpoint = ranks.together(self._stored)

        def plan() -> tuple[ModelPlan | None, OptimizerPlan | None]:
            check_records(checkpoint, ranks.rank())
            model, state = None, None
            if module is not None:
                model = ModelPlan.make(module, self._component(checkpoint, "model"), prefix)
            elif optimizer is not None and checkpoint.component("model") is not None:
                raise ArgumentError("restore: this optimizer was saved by its module's names; give the module too.")
            if optimizer is not None:
                live, directory = OptimizerState(module, optimizer, scheduler), self._component(checkpoint, "optimizer")
                state = OptimizerPlan.make(live, directory, model.part if model else "")
            return model, state

        with ExitStack() as held:
            ranks.together(lambda: held.enter_context(checkpoint.lease()))
            plans = ranks.together(plan)
            counters, generators = ranks.together(lambda: read_trainer(checkpoint, ranks.rank(), rng=rng))
            fill(*plans, generators)
            return counters

    def __getitem__(self, key: str) -> Any:
        if key == MODULE_KEY:
            return self._state("module", "model")
        if key == OPTIMIZER_KEY:
            return self._state("optimizer", "optimizer")
        values = as_dict(self.hyperparameters)
        if key not in values:
            raise KeyError(f"{key!r} is not in this checkpoint; it has {', '.join(map(str, self.keys()))}.")
        return values[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """Return the keys that `checkpoint[key]` takes."""
        has_module = self.module is not None or bool(self._reference and self._reference.module)
        has_optimizer = self.optimizer is not None or bool(self._reference and self._reference.optimizer)
        states = [MODULE_KEY] * has_module + [OPTIMIZER_KEY] * has_optimizer
        return [*states, *as_dict(self.hyperparameters)]

    def to_dict(self, encode_json: bool = False) -> dict[str, Any]:  # noqa: ARG002 - a published signature
        """Return the reference that the JSON holds: JSON types only, whatever `encode_json`.

        Raises:
            ArgumentError (a ValueError): it has a module or optimizer and was never saved.
        """
        return self._document()

    def to_json(
        self,
        *,
        skipkeys: bool = False,
        ensure_ascii: bool = True,
        check_circular: bool = True,
        allow_nan: bool = True,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        default: Callable[..., Any] | None = None,
        sort_keys: bool = False,
        **kw: Any,
    ) -> str:
        """Return the reference as JSON text; the arguments are those of `json.dumps`.

        Raises:
            ArgumentError (a ValueError): it has a module or optimizer and was never saved.
        """
        return json.dumps(
            self._document(default=default, skipkeys=skipkeys),
            ensure_ascii=ensure_ascii,
            check_circular=check_circular,
            allow_nan=allow_nan,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
            **kw,
        )

    @classmethod
    def from_dict(cls, kvs: Any, *, infer_missing: bool = False) -> PyTorchCheckpoint:  # noqa: ARG003 - a published signature
        """Return the checkpoint that a reference names, to be loaded on demand; unknown keys are ignored.

        Raises:
            ArgumentError (a ValueError): it is not a reference.
        """
        if not isinstance(kvs, Mapping):
            raise ArgumentError(f"expected the JSON object of a PyTorchCheckpoint, found a {type(kvs).__name__}.")
        document = cast("Mapping[str, Any]", kvs)
        hyperparameters = document.get("hyperparameters")
        if not (hyperparameters is None or isinstance(hyperparameters, Mapping)):
            raise ArgumentError(f"hyperparameters: expected an object, found a {type(hyperparameters).__name__}.")
        values = None if hyperparameters is None else dict(cast("Mapping[str, Any]", hyperparameters))
        values = restored(values, document.get("hyperparameter_types"))
        if document.get("url") is None:
            return cls(hyperparameters=values)
        return cls._referring(Reference.parse(document), values)

    @classmethod
    def from_json(
        cls,
        s: str | bytes | bytearray,
        *,
        parse_float: Callable[[str], Any] | None = None,
        parse_int: Callable[[str], Any] | None = None,
        parse_constant: Callable[[str], Any] | None = None,
        infer_missing: bool = False,
        **kw: Any,
    ) -> PyTorchCheckpoint:
        """Return the checkpoint that JSON text names; the other arguments are those of `json.loads`.

        Raises:
            ValueError: it is not JSON, or not a reference.
        """
        try:
            document = json.loads(s, parse_float=parse_float, parse_int=parse_int, parse_constant=parse_constant, **kw)
        except RecursionError:
            raise ArgumentError("JSON nested too deeply; not a reference.") from None
        return cls.from_dict(document, infer_missing=infer_missing)

    @classmethod
    def schema(
        cls,
        *,
        infer_missing: bool = False,
        only: Any = None,
        exclude: Any = (),
        many: bool = False,
        context: Any = None,
        load_only: Any = (),
        dump_only: Any = (),
        partial: bool = False,
        unknown: Any = None,
    ) -> Any:
        """Return a marshmallow schema: `loads` is `from_json`, `dumps` is `to_json`; for lists too, with `many`."""
        from ckpt_core.checkpoint_schema import make_schema

        schema = make_schema(cls, infer_missing=infer_missing)(
            only=only,
            exclude=exclude,
            many=many,
            load_only=load_only,
            dump_only=dump_only,
            partial=partial,
            unknown=unknown or "exclude",
        )
        if context is not None:
            schema.context = context  # passed to the constructor, marshmallow 3 warns
        return schema

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> CoreSchema:
        """Let pydantic, and so a Prefect flow's parameter, take a checkpoint or its reference, and write the latter."""
        from ckpt_core.checkpoint_schema import make_core_schema

        return make_core_schema(cls)

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: CoreSchema, _handler: Any) -> JsonSchemaValue:
        return {"type": "object", "title": cls.__name__, "description": "A checkpoint's reference."}

    @classmethod
    def _referring(cls, reference: Reference, hyperparameters: dict[str, Any] | None) -> PyTorchCheckpoint:
        """Make a checkpoint that has nothing in memory but hyperparameters."""
        checkpoint = object.__new__(cls)
        checkpoint.module, checkpoint.optimizer = None, None
        checkpoint.hyperparameters, checkpoint._reference = hyperparameters, reference
        return checkpoint

    def _document(self, *, default: Callable[..., Any] | None = None, skipkeys: bool = False) -> dict[str, Any]:
        if self._reference is None and not (self.module is None and self.optimizer is None):
            raise ArgumentError(
                "PyTorchCheckpoint: its JSON refers to a saved state, and this one was never saved; call "
                ".save(store_url, step=...) and use the checkpoint that it returns."
            )
        values = None if self.hyperparameters is None else as_dict(self.hyperparameters)
        reference = asdict(self._reference) if self._reference else Reference.EMPTY
        document = {"hyperparameters": plain(values, "hyperparameters", default, skipkeys=skipkeys)}
        types = types_lost(values, "hyperparameters")
        return document | ({} if types is None else {"hyperparameter_types": types}) | reference

    def _stored(self) -> Checkpoint:
        if self._reference is None:
            raise CheckpointError("PyTorchCheckpoint: never saved, so there is nothing to load; call .save first.")
        checkpoint = open_checkpoint(self._reference.url)
        found = checkpoint.manifest.digest()
        if found != self._reference.digest:
            raise MismatchError(
                f"{checkpoint.path}: another checkpoint than this reference names: its digest is {found}, the "
                f"reference says {self._reference.digest}; the store was changed."
            )
        return checkpoint

    def _component(self, checkpoint: Checkpoint, name: str) -> Place:
        path = checkpoint.component(name)
        if path is None:
            raise MismatchError(f"{checkpoint.path}: has no {name}; it was saved without one.")
        return path

    def _state(self, attribute: str, component: str) -> Any:
        """Return a state dict: the committed step's, or the live object's where nothing was saved yet."""
        live = getattr(self, attribute)
        if self._reference is None and live is not None:
            return live.state_dict()
        if self._reference is None or getattr(self._reference, attribute) is None:
            raise KeyError(f"{attribute}_state_dict: this checkpoint has no {attribute}.")
        from ckpt_core import state_dicts
        from ckpt_core.restore import check_records

        checkpoint = self._stored()
        with checkpoint.lease():
            check_records(checkpoint, 0)
            directory = self._component(checkpoint, component)
            if component == "model":
                return state_dicts.read_model(directory)
            return state_dicts.read_optimizer(directory)


def collect(
    checkpoint: PyTorchCheckpoint,
    *,
    run: str,
    step: int,
    scheduler: Any | None = None,
    trainer: Mapping[str, Any] | None = None,
    assets: str | Path | None = None,
    metrics: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Parts:
    """Return what `PyTorchCheckpoint.save` is given as the parts of a step; nothing is copied or written.

    Raises:
        ArgumentError: there is nothing to save, or something cannot be written as JSON.
    """
    from ckpt_core.commit import Parts, class_name

    if checkpoint.module is None and checkpoint.optimizer is None and checkpoint.url is not None:
        raise ArgumentError(f"{checkpoint.url}: saved already, and nothing of it is in memory; restore it first.")
    if scheduler is not None and checkpoint.optimizer is None:
        raise ArgumentError("save: a scheduler's state goes with its optimizer's; give the checkpoint one.")
    manifest = Manifest(
        run=check_name("run", run),
        step=check_step(step),
        time="",
        world_size=1,
        module=class_name(checkpoint.module),
        optimizer=class_name(checkpoint.optimizer),
        hyperparameters=plain(as_dict(checkpoint.hyperparameters), "hyperparameters"),
        hyperparameter_types=types_lost(as_dict(checkpoint.hyperparameters), "hyperparameters"),
        metrics=plain(_named(metrics, "metrics"), "metrics"),
        lineage=plain(_named(lineage, "lineage"), "lineage"),
    )
    return Parts(
        manifest,
        checkpoint.module,
        checkpoint.optimizer,
        scheduler,
        None if trainer is None else exact(_as_dict(trainer, "trainer"), "trainer"),
        None if assets is None else local_path(assets, "assets"),
    )


def _as_dict(value: Any, what: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{what}: expected a mapping of names to values, found {type(value).__name__}.")
    return dict(cast("Mapping[Any, Any]", value))


def _named(value: Any, what: str) -> dict[str, Any]:
    """Return what has a name as its key, as JSON would make one of any key."""
    found = _as_dict({} if value is None else value, what)
    for key in found:
        if not isinstance(key, str):
            raise ArgumentError(f"{what}: the key {key!r:.60} is of type {type(key).__name__}; give text.")
    return found
