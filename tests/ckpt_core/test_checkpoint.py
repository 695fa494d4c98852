"""PyTorchCheckpoint: what its constructor takes, its JSON, and the state that it saves, reads and restores."""

import copy
import dataclasses
import datetime
import enum
import inspect
import json
import math
import random
import subprocess
import sys
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import marshmallow
import numpy as np
import pydantic
import pytest
import torch
from dataclasses_json import DataClassJsonMixin
from small_models import MakeOptimizer, assert_same, forward, layers, snapshot, train
from torch import nn

from ckpt_core import AsyncSaver, PyTorchCheckpoint, open_checkpoint, open_store
from ckpt_core.errors import (
    ArgumentError,
    CheckpointError,
    CkptError,
    DamagedError,
    MismatchError,
    NotACheckpointError,
    StepExistsError,
)


class Color(enum.Enum):
    """A choice, as hyperparameters have them."""

    RED = "red"


@dataclasses.dataclass
class Schedule:
    """A part of hyperparameters."""

    warmup: int = 10
    kind: Color = Color.RED


@dataclasses.dataclass
class Settings:
    """Hyperparameters as a dataclass."""

    epochs: int = 5
    loss: float = 0.4
    schedule: Schedule = dataclasses.field(default_factory=Schedule)


class Pair(NamedTuple):
    """Hyperparameters as a NamedTuple."""

    epochs: int
    loss: float


def saved(tmp_path: Path, **kwargs: Any) -> PyTorchCheckpoint:
    """Return a small checkpoint that was saved."""
    return PyTorchCheckpoint(layers(), kwargs.pop("hyperparameters", {"epochs": 5}), **kwargs).save(tmp_path, step=1)


def reread(checkpoint: PyTorchCheckpoint) -> PyTorchCheckpoint:
    """Return what another machine has of a checkpoint: what its JSON says."""
    return PyTorchCheckpoint.from_json(checkpoint.to_json())


class TestConstructor:
    """What the constructor takes and refuses."""

    def test_it_is_a_dataclass_of_three_fields_that_dataclasses_json_knows(self) -> None:
        """The class is a dataclass built on DataClassJsonMixin and takes module, hyperparameters and optimizer."""
        assert dataclasses.is_dataclass(PyTorchCheckpoint)
        assert issubclass(PyTorchCheckpoint, DataClassJsonMixin)
        parameters = inspect.signature(PyTorchCheckpoint).parameters
        assert {name: p.default for name, p in parameters.items()} == dict.fromkeys(
            ("module", "hyperparameters", "optimizer")
        )

    @pytest.mark.parametrize("method", ["to_dict", "to_json", "from_dict", "from_json", "schema"])
    def test_its_methods_take_what_the_mixin_takes(self, method: str) -> None:
        """Each JSON method has the arguments, kinds and defaults of the one it stands in for."""
        ours = inspect.signature(getattr(PyTorchCheckpoint, method)).parameters.values()
        theirs = inspect.signature(getattr(DataClassJsonMixin, method)).parameters.values()
        assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
        assert [p.default or None for p in ours] == [p.default or None for p in theirs]

    def test_hyperparameters_read_by_name_whatever_they_came_as(self) -> None:
        """A dict, a NamedTuple and a dataclass instance all give `checkpoint[name]`."""
        for given in ({"epochs": 5, "loss": 0.4}, Pair(5, 0.4), Settings()):
            checkpoint = PyTorchCheckpoint(hyperparameters=given)
            assert (checkpoint["epochs"], checkpoint["loss"]) == (5, 0.4)
            assert checkpoint.hyperparameters is given

    def test_arguments_may_be_given_by_position(self) -> None:
        """Module, hyperparameters and optimizer come in this order."""
        module = layers()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        checkpoint = PyTorchCheckpoint(module, {"a": 1}, optimizer)
        assert (checkpoint.module, checkpoint.optimizer) == (module, optimizer)
        assert checkpoint.keys() == ["module_state_dict", "optimizer_state_dict", "a"]

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"hyperparameters": {}},
            {"hyperparameters": Settings},
            {"hyperparameters": Pair},
            {"hyperparameters": [("a", 1)]},
            {"hyperparameters": (1, 2)},
            {"hyperparameters": "text"},
            {"hyperparameters": {"module_state_dict": 1}},
            {"hyperparameters": {"optimizer_state_dict": 1}},
            {"module": nn.Linear},
            {"module": {"epochs": 5}},
            {"optimizer": torch.optim.SGD},
        ],
    )
    def test_a_wrong_argument_is_a_type_error_and_a_value_error(self, arguments: dict[str, Any]) -> None:
        """Nothing, other kinds, and names that a state has, are refused with an error of every fitting type."""
        for kind in (ArgumentError, TypeError, ValueError, CkptError):
            with pytest.raises(kind):
                PyTorchCheckpoint(**arguments)

    def test_an_unknown_key_is_a_key_error_that_names_the_known_ones(self) -> None:
        """`checkpoint[key]` of something else says what there is."""
        with pytest.raises(KeyError, match="no module"):
            PyTorchCheckpoint(hyperparameters={"epochs": 5})["module_state_dict"]
        with pytest.raises(KeyError, match="module_state_dict"):
            PyTorchCheckpoint(module=layers())["epochs"]

    def test_a_live_checkpoint_reads_its_objects_state(self) -> None:
        """Before it is saved, the two states are those of the live objects."""
        module = layers()
        optimizer = torch.optim.Adam(module.parameters())
        checkpoint = PyTorchCheckpoint(module=module, optimizer=optimizer)
        assert_same(checkpoint["module_state_dict"], module.state_dict())
        assert_same(checkpoint["optimizer_state_dict"], optimizer.state_dict())
        assert "module_state_dict" in checkpoint
        assert list(checkpoint) == ["module_state_dict", "optimizer_state_dict"]


class TestImport:
    """What importing costs."""

    def test_importing_it_loads_neither_torch_nor_transformers(self) -> None:
        """A process that imports the package, and makes and reads JSON, has loaded none of the heavy libraries."""
        code = """
import sys, ckpt_core
from ckpt_core import PyTorchCheckpoint
text = PyTorchCheckpoint(hyperparameters={"a": 1}).to_json()
assert PyTorchCheckpoint.from_json(text)["a"] == 1
print([name for name in ("torch", "transformers", "numpy", "prefect") if name in sys.modules])
"""
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


class TestJson:
    """The reference that stands for a checkpoint."""

    def test_the_reference_reads_back_equal_in_every_way(self, tmp_path: Path) -> None:
        """to_json, to_dict, schema().dumps and their inverses all give the one reference."""
        checkpoint = saved(tmp_path)
        text = checkpoint.to_json()
        back = PyTorchCheckpoint.from_json(text)
        assert back == PyTorchCheckpoint.from_dict(checkpoint.to_dict())
        assert back == PyTorchCheckpoint.schema().loads(text)
        assert back == PyTorchCheckpoint.schema().load(checkpoint.to_dict())
        assert back == PyTorchCheckpoint.from_json(text.encode())
        assert back == PyTorchCheckpoint.from_url(str(checkpoint.url))
        assert PyTorchCheckpoint.schema().dumps(checkpoint) == text == back.to_json()
        assert PyTorchCheckpoint.schema().dump(checkpoint) == json.loads(text) == checkpoint.to_dict(encode_json=True)
        assert (back.url, back.step, back["epochs"]) == (checkpoint.url, 1, 5)

    def test_it_says_what_the_state_is_and_where(self, tmp_path: Path) -> None:
        """The JSON holds hyperparameters in full, classes by name, a tensor summary and the place."""
        module = layers()
        checkpoint = PyTorchCheckpoint(module, Settings(), torch.optim.Adam(module.parameters())).save(
            tmp_path, step=7, run="first"
        )
        assert checkpoint.to_dict() == {
            "hyperparameters": {"epochs": 5, "loss": 0.4, "schedule": {"warmup": 10, "kind": "red"}},
            "url": (tmp_path / "first" / "step_0000000007").as_uri(),
            "run": "first",
            "step": 7,
            "digest": open_checkpoint(str(checkpoint.url)).manifest.digest(),
            "module": {
                "class": "torch.nn.modules.container.ModuleList",
                "tensors": {"count": 6, "elements": 33, "bytes": 132, "dtypes": {"float32": 33}},
            },
            "optimizer": {"class": "torch.optim.adam.Adam"},
        }

    def test_it_stays_a_few_kilobytes_for_thousands_of_tensors(self, tmp_path: Path) -> None:
        """The JSON does not grow with the number of tensors."""
        module = nn.ParameterDict({f"p{n}": nn.Parameter(torch.zeros(1)) for n in range(2000)})
        checkpoint = PyTorchCheckpoint(module=module).save(tmp_path, step=1)
        assert checkpoint.to_dict()["module"]["tensors"]["count"] == 2000
        assert len(checkpoint.to_json()) < 2000

    def test_what_was_never_saved_has_nothing_to_refer_to(self) -> None:
        """The JSON of a checkpoint with live objects that was not saved is an error that names `save`."""
        checkpoint = PyTorchCheckpoint(layers(), {"a": 1})
        for method in (checkpoint.to_json, checkpoint.to_dict, lambda: PyTorchCheckpoint.schema().dumps(checkpoint)):
            with pytest.raises(ValueError, match=r"\.save\("):
                method()

    def test_hyperparameters_alone_need_no_store(self) -> None:
        """With neither module nor optimizer the JSON is complete in itself."""
        checkpoint = PyTorchCheckpoint(hyperparameters=Pair(5, 0.5))
        back = reread(checkpoint)
        assert back.hyperparameters == {"epochs": 5, "loss": 0.5}
        assert back.url is None
        assert back == PyTorchCheckpoint.schema().loads(checkpoint.to_json())

    def test_values_beyond_json_come_as_dataclasses_json_writes_them(self) -> None:
        """Enums, times, numpy's numbers and arrays, nested dataclasses, sets and NaN are written."""
        moment = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
        given = {
            "kind": Color.RED,
            "time": moment,
            "single": np.float32(0.5),
            "count": np.int64(3),
            "array": np.arange(2),
            "part": Schedule(),
            "set": {1},
            "nan": math.nan,
            "inf": math.inf,
            "text": "ü",
            "nothing": None,
        }
        found = reread(PyTorchCheckpoint(hyperparameters=given))
        expected = {
            "kind": "red",
            "time": moment.timestamp(),
            "single": 0.5,
            "count": 3,
            "array": [0, 1],
            "part": {"warmup": 10, "kind": "red"},
            "set": [1],
            "inf": math.inf,
            "text": "ü",
            "nothing": None,
        }
        assert math.isnan(found["nan"])
        assert {name: found[name] for name in expected} == expected

    def test_tuples_and_keys_that_are_no_text_come_back(self, tmp_path: Path) -> None:
        """What JSON makes of them is undone, from each form of a reference, and two keys never become one."""
        given = {
            "betas": (0.9, [1, (2,)]),
            "milestones": {5: 0.1, True: {None: ()}, 1.5: [{2: 3}]},
            "plain": [1, {"a": 2}],
        }
        checkpoint = PyTorchCheckpoint(layers(), given).save(tmp_path, step=1)
        given["plain"].append("later")  # what was saved does not follow the caller's objects
        expected = {**given, "plain": [1, {"a": 2}]}
        with AsyncSaver(tmp_path) as saver:
            saver.save(PyTorchCheckpoint(layers(), expected), step=2)
        forms = [checkpoint, reread(checkpoint), PyTorchCheckpoint.from_url(str(checkpoint.url)), saver.committed]
        forms += [PyTorchCheckpoint.schema().loads(checkpoint.to_json()), reread(PyTorchCheckpoint(None, expected))]
        for form in forms:
            assert repr(form.hyperparameters) == repr(expected)
        assert json.loads(checkpoint.to_json())["hyperparameters"]["milestones"]["5"] == 0.1
        for name in ("hyperparameters", "trainer"):
            values = {"hyperparameters": {"x": 1}, "trainer": {}, name: {"a": {1: 2, "1": 3}}}
            twice = PyTorchCheckpoint(layers(), values["hyperparameters"])
            with pytest.raises(ArgumentError, match=name):
                twice.save(tmp_path, step=3, trainer=values["trainer"])
        for types in (
            [1],
            ["tuple", []],
            ["dict", [["x", None]]],
            ["dict", 3],
            "dict",
            ["dict", [["betas", ["tuple", []]]]],
        ):
            with pytest.raises(ArgumentError, match="hyperparameter_types"):
                PyTorchCheckpoint.from_dict({**checkpoint.to_dict(), "hyperparameter_types": types})

    def test_each_argument_of_dumps_does_what_it_does_there(self) -> None:
        """The arguments of json.dumps reach it."""
        checkpoint = PyTorchCheckpoint(hyperparameters={"b": "ü", "a": 1})
        document = checkpoint.to_dict()
        for arguments in (
            {"ensure_ascii": False},
            {"indent": 2},
            {"indent": "\t"},
            {"separators": (",", ":")},
            {"sort_keys": True},
            {"check_circular": False},
            {"allow_nan": False},
            {"cls": json.JSONEncoder},
        ):
            assert checkpoint.to_json(**arguments) == json.dumps(document, **arguments)

    def test_what_json_refuses_is_refused_or_left_out_as_asked(self) -> None:
        """allow_nan, skipkeys, default and check_circular decide about values that JSON has not."""
        with pytest.raises(ValueError, match="JSON compliant"):
            PyTorchCheckpoint(hyperparameters={"nan": math.nan}).to_json(allow_nan=False)
        pairs = PyTorchCheckpoint(hyperparameters={(1, 2): 3, "a": 1})
        with pytest.raises(ArgumentError, match="hyperparameters"):
            pairs.to_json()
        assert json.loads(pairs.to_json(skipkeys=True))["hyperparameters"] == {"a": 1}
        odd = PyTorchCheckpoint(hyperparameters={"model": object})
        with pytest.raises(ArgumentError, match="default="):
            odd.to_json()
        assert json.loads(odd.to_json(default=repr))["hyperparameters"] == {"model": repr(object)}
        loop: dict[str, Any] = {"a": 1}
        loop["self"] = loop
        with pytest.raises(ValueError, match=r"hyperparameters\.self: contains itself"):
            PyTorchCheckpoint(hyperparameters=loop).to_json()

    def test_each_argument_of_loads_does_what_it_does_there(self) -> None:
        """The arguments of json.loads reach it."""
        text = PyTorchCheckpoint(hyperparameters={"f": 0.5, "i": 2, "n": math.nan}).to_json()
        assert PyTorchCheckpoint.from_json(text, parse_float=str)["f"] == "0.5"
        assert PyTorchCheckpoint.from_json(text, parse_int=str)["i"] == "2"
        assert PyTorchCheckpoint.from_json(text, parse_constant=str)["n"] == "NaN"
        ordered = PyTorchCheckpoint.from_json(text, object_pairs_hook=OrderedDict)
        assert type(ordered.hyperparameters) is dict
        assert PyTorchCheckpoint.from_json(text, infer_missing=True)["i"] == 2

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "1", "null", '{"hyperparameters": []}', '{"url": 1}', '{"url": "file:///x", "run": "a"}', "{}"],
    )
    def test_what_is_no_reference_is_a_value_error(self, text: str) -> None:
        """Text that is not JSON, or JSON that is not a reference, is refused."""
        with pytest.raises(ValueError, match=r"."):
            PyTorchCheckpoint.from_json(text)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"trainer": [1]}, "trainer: expected a mapping of names to values, found list"),
            ({"trainer": "x"}, "trainer: expected a mapping"),
            ({"metrics": {1: 2.0}}, "metrics: the key 1 is of type int; give text"),
            ({"lineage": [("data", 1)]}, "lineage: expected a mapping"),
            ({"metrics": {"loss": torch.tensor(1.0)}}, r"metrics\.loss: a tensor is no JSON"),
            ({"trainer": {"seen": torch.ones(2)}}, r"trainer\.seen: a tensor is no JSON"),
        ],
    )
    def test_facts_of_another_form(self, tmp_path: Path, given: dict[str, Any], message: str) -> None:
        """Counters, metrics and lineage are mappings from names; what is none is an ArgumentError that says so."""
        with pytest.raises(ArgumentError, match=message):
            PyTorchCheckpoint(nn.Linear(2, 2)).save(tmp_path, step=1, **given)
        assert not list(tmp_path.iterdir())

    def test_odd_names_in_errors(self) -> None:
        """A reference that nests without end is an ArgumentError, and a missing name lists those that are no text."""
        with pytest.raises(ArgumentError, match="nested too deeply"):
            PyTorchCheckpoint.from_json("[" * 100_000)
        with pytest.raises(KeyError, match=r"it has module_state_dict, 3"):
            _ = PyTorchCheckpoint(nn.Linear(2, 2), {3: 1})["a"]

    @pytest.mark.parametrize(
        "change",
        [{"url": 3}, {"run": None}, {"step": "1"}, {"digest": None}, {"module": []}, {"optimizer": "Adam"}],
    )
    def test_a_reference_with_a_field_of_another_type_is_refused(self, tmp_path: Path, change: dict[str, Any]) -> None:
        """The error names the field."""
        document = saved(tmp_path).to_dict() | change
        with pytest.raises(ArgumentError, match=next(iter(change))):
            PyTorchCheckpoint.from_dict(document)

    def test_unknown_keys_are_ignored(self, tmp_path: Path) -> None:
        """A reference that a later version wrote still reads, as dataclasses-json has it."""
        checkpoint = saved(tmp_path)
        document = {**checkpoint.to_dict(), "later": 1}
        assert PyTorchCheckpoint.from_dict(document) == reread(checkpoint)
        assert PyTorchCheckpoint.schema().load(document) == reread(checkpoint)


class TestTypes:
    """The class as an annotation."""

    def test_its_annotations_can_be_evaluated(self) -> None:
        """Tools that ask for the fields' types get torch's classes."""
        hints = typing.get_type_hints(PyTorchCheckpoint)
        assert hints["module"] == nn.Module | None
        assert hints["optimizer"] == torch.optim.Optimizer | None

    def test_pydantic_takes_a_checkpoint_or_its_reference(self, tmp_path: Path) -> None:
        """A parameter of this type, as of a Prefect flow, takes both, and is written as the reference."""
        parameter = pydantic.TypeAdapter(PyTorchCheckpoint)
        checkpoint = saved(tmp_path)
        assert parameter.validate_python(checkpoint) is checkpoint
        assert parameter.validate_python(checkpoint.to_dict()) == reread(checkpoint)
        assert parameter.validate_python(checkpoint.to_json()) == reread(checkpoint)
        assert parameter.dump_python(checkpoint, mode="json") == checkpoint.to_dict()
        assert parameter.json_schema()["type"] == "object"
        for wrong in (3, "text", {"url": 3}):
            with pytest.raises(pydantic.ValidationError):
                parameter.validate_python(wrong)


class TestSchema:
    """The marshmallow schema."""

    def test_many_reads_and_writes_lists(self, tmp_path: Path) -> None:
        """A schema for many has lists of checkpoints on the one side and JSON lists on the other."""
        both = [saved(tmp_path), PyTorchCheckpoint(hyperparameters={"a": 1})]
        schema = PyTorchCheckpoint.schema(many=True)
        text = schema.dumps(both)
        assert json.loads(text) == [checkpoint.to_dict() for checkpoint in both]
        assert schema.loads(text) == [reread(checkpoint) for checkpoint in both]

    def test_only_and_exclude_choose_fields(self, tmp_path: Path) -> None:
        """The chosen fields are written, and read: what is left of a reference must still be one."""
        checkpoint = saved(tmp_path)
        only = PyTorchCheckpoint.schema(only=("hyperparameters",))
        assert only.dump(checkpoint) == {"hyperparameters": {"epochs": 5}}
        assert only.loads(checkpoint.to_json()) == PyTorchCheckpoint(hyperparameters={"epochs": 5})
        without = PyTorchCheckpoint.schema(exclude=("module",))
        assert without.dump(checkpoint) == {k: v for k, v in checkpoint.to_dict().items() if k != "module"}
        with pytest.raises(ArgumentError, match="digest"):
            PyTorchCheckpoint.schema(exclude=("digest",)).loads(checkpoint.to_json())

    def test_load_only_dump_only_partial_and_context_are_the_schemas_own(self, tmp_path: Path) -> None:
        """The other options reach marshmallow, and none of them warns."""
        checkpoint = saved(tmp_path)
        assert "digest" not in PyTorchCheckpoint.schema(load_only=("digest",)).dump(checkpoint)
        readable = PyTorchCheckpoint.schema(dump_only=("module",)).loads(checkpoint.to_json())
        assert readable.url == checkpoint.url
        assert "module_state_dict" not in readable
        schema = PyTorchCheckpoint.schema(partial=True, context={"a": 1}, infer_missing=True)
        assert (schema.partial, schema.context) == (True, {"a": 1})
        assert schema.loads(checkpoint.to_json()) == reread(checkpoint)

    def test_unknown_decides_about_other_keys(self, tmp_path: Path) -> None:
        """Unknown keys are left out unless the schema is told to raise."""
        text = json.dumps({**saved(tmp_path).to_dict(), "later": 1})
        assert PyTorchCheckpoint.schema(unknown=marshmallow.EXCLUDE).loads(text).step == 1
        with pytest.raises(marshmallow.ValidationError, match="later"):
            PyTorchCheckpoint.schema(unknown=marshmallow.RAISE).loads(text)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "sgd with momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.1),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1),
    "adamw, rate as a tensor": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.1), amsgrad=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.1),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.1),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.1),
    "muon of the matrices": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.1),
    "groups": lambda m: torch.optim.SGD(
        [
            {"params": list(m[3].parameters()), "lr": 0.5},
            {"params": [m[0].weight], "momentum": 0.0},
            {"params": [m[0].bias, *m[1].parameters()], "weight_decay": 0.3, "mine": "text"},
        ],
        lr=0.1,
        momentum=0.9,
    ),
    "named groups": lambda m: torch.optim.AdamW(
        [{"params": list(m[3].named_parameters()), "lr": 0.5}, {"params": list(m[0].named_parameters(prefix="x"))}]
    ),
}


class TestOptimizers:
    """Optimizers' states."""

    @pytest.mark.parametrize("steps", [0, 2])
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_its_state_reads_and_restores_as_torch_has_it(self, tmp_path: Path, name: str, steps: int) -> None:
        """Both state dicts are torch's own, saving leaves the live objects alone, and `restore` fills new ones."""
        module = layers()
        optimizer = OPTIMIZERS[name](module)
        train(module, optimizer, steps=steps)
        before = snapshot(module, optimizer)
        checkpoint = reread(PyTorchCheckpoint(module=module, optimizer=optimizer).save(tmp_path, step=1))
        assert_same(snapshot(module, optimizer), before)
        assert_same([checkpoint["module_state_dict"], checkpoint["optimizer_state_dict"]], before)
        other = layers(seed=1)
        fresh = OPTIMIZERS[name](other)
        checkpoint.restore(other, fresh)
        assert_same(snapshot(other, fresh), before)

    def test_swapped_in_for_flytekits_it_loads_with_torchs_own_methods(self, tmp_path: Path) -> None:
        """New objects take the two states by load_state_dict, and go on as the old ones do."""
        module = layers()
        optimizer = OPTIMIZERS["sgd with momentum"](module)
        train(module, optimizer)
        checkpoint = reread(PyTorchCheckpoint(module, Pair(5, 0.4), optimizer).save(tmp_path, step=1))
        other = layers(seed=1)
        other.load_state_dict(checkpoint["module_state_dict"])
        fresh = OPTIMIZERS["sgd with momentum"](other)
        fresh.load_state_dict(checkpoint["optimizer_state_dict"])
        for pair in ((module, optimizer), (other, fresh)):
            torch.manual_seed(3)
            train(*pair)
        assert_same(snapshot(other, fresh), snapshot(module, optimizer))
        assert (checkpoint["epochs"], checkpoint["loss"]) == (5, 0.4)

    def test_parameters_without_state_stay_without(self, tmp_path: Path) -> None:
        """Frozen parameters and ones that never had a gradient have no state after a restore, whatever was there."""

        def make() -> tuple[nn.ModuleList, torch.optim.Optimizer]:
            module = layers()
            module[0].bias.requires_grad_(False)
            return module, torch.optim.AdamW(module.parameters(), lr=0.1)

        module, optimizer = make()
        module[0](torch.ones(2, 4)).sum().backward()
        optimizer.step()
        before = snapshot(module, optimizer)
        assert list(before[1]["state"]) == [0]
        checkpoint = reread(PyTorchCheckpoint(module=module, optimizer=optimizer).save(tmp_path, step=1))
        assert_same(checkpoint["optimizer_state_dict"], before[1])
        for steps in (0, 2):
            other, fresh = make()
            train(other, fresh, steps=steps)
            checkpoint.restore(other, fresh)
            assert_same(snapshot(other, fresh), before)

    def test_gradients_do_not_keep_the_state_from_being_restored(self, tmp_path: Path) -> None:
        """An optimizer whose parameters have gradients already gets all of the state; the gradients stay."""
        module = layers()
        optimizer = torch.optim.AdamW(module.parameters())
        train(module, optimizer)
        checkpoint = PyTorchCheckpoint(module=module, optimizer=optimizer).save(tmp_path, step=1)
        other = layers(seed=1)
        fresh = torch.optim.AdamW(other.parameters())
        forward(other).backward()
        gradients = [p.grad for p in other.parameters()]
        checkpoint.restore(other, fresh)
        assert_same(snapshot(other, fresh), snapshot(module, optimizer))
        assert all(p.grad is g for p, g in zip(other.parameters(), gradients, strict=True))

    def test_an_optimizer_alone_keeps_its_numbers(self, tmp_path: Path) -> None:
        """Without its module an optimizer is saved and read by the numbers of its parameters."""
        module = layers()
        optimizer = torch.optim.Adam(module.parameters())
        train(module, optimizer)
        checkpoint = reread(PyTorchCheckpoint(optimizer=optimizer).save(tmp_path, step=1))
        assert checkpoint.keys() == ["optimizer_state_dict"]
        assert_same(checkpoint["optimizer_state_dict"], optimizer.state_dict())
        fresh = torch.optim.Adam(layers(seed=1).parameters())
        checkpoint.restore(optimizer=fresh)
        assert_same(snapshot(fresh), snapshot(optimizer))
        with pytest.raises(MismatchError, match="no model"):
            checkpoint.restore(module, optimizer)
        with pytest.raises(MismatchError, match="group"):
            checkpoint.restore(optimizer=torch.optim.Adam(module[0].parameters()))

    def test_an_optimizer_that_does_not_fit_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        """Other parameters, other groups, other shapes and another module's parameters are each a MismatchError."""
        module = layers()
        optimizer = torch.optim.AdamW(module.parameters())
        train(module, optimizer)
        checkpoint = PyTorchCheckpoint(module=module, optimizer=optimizer).save(tmp_path, step=1)
        other = layers(seed=1)
        fewer = torch.optim.AdamW(other[0].parameters())
        divided = torch.optim.AdamW(
            [{"params": other[0].parameters()}, {"params": [*other[1].parameters(), *other[3].parameters()]}]
        )
        foreign = torch.optim.AdamW(layers().parameters())
        for optimizer in (fewer, divided, foreign):
            before = snapshot(optimizer)
            with pytest.raises(MismatchError, match="optimizer"):
                checkpoint.restore(other, optimizer)
            assert_same(snapshot(optimizer), before)
        with pytest.raises(MismatchError, match="not the module's"):
            PyTorchCheckpoint(module=module, optimizer=foreign).save(tmp_path, step=2)
        with pytest.raises(ArgumentError, match="module"):
            checkpoint.restore(optimizer=fewer)

    def test_a_scheduler_goes_with_its_optimizer(self, tmp_path: Path) -> None:
        """A scheduler without an optimizer is an error on both ways, and one of an optimizer alone comes back."""
        module = layers()
        optimizer = torch.optim.Adam(module.parameters())
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])
        with pytest.raises(ArgumentError, match="optimizer"):
            PyTorchCheckpoint(module=module).save(tmp_path, step=1, scheduler=scheduler)
        train(module, optimizer, scheduler)
        checkpoint = PyTorchCheckpoint(optimizer=optimizer).save(tmp_path, step=1, scheduler=scheduler)
        fresh = torch.optim.Adam(layers().parameters())
        restored = torch.optim.lr_scheduler.MultiStepLR(fresh, [7])
        checkpoint.restore(optimizer=fresh, scheduler=restored)
        assert_same(snapshot(fresh, restored), snapshot(optimizer, scheduler))
        with pytest.raises(ArgumentError, match="optimizer"):
            checkpoint.restore(scheduler=restored)


class Kinds(nn.Module):
    """Tensors of every kind that a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.images = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.brief = nn.Parameter(torch.randn(5).bfloat16())
        self.number = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("bytes", torch.tensor([1, -2], dtype=torch.int8))
        self.register_buffer("complex", torch.randn(2, dtype=torch.complex64))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("part", torch.randn(10)[2:4])
        self.register_buffer("kept_out", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)
        self.norm = nn.BatchNorm1d(2)


class Tied(nn.Module):
    """An embedding whose weight is also the output's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class Extra(nn.Linear):
    """A layer with a state of its own."""

    extra: Any = None

    def get_extra_state(self) -> Any:  # noqa: D102 - torch's
        return self.extra

    def set_extra_state(self, state: Any) -> None:  # noqa: D102 - torch's
        self.extra = state


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make a dtype the default one for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class TestModules:
    """Modules' states."""

    def test_tensors_of_every_kind_come_back(self, tmp_path: Path) -> None:
        """0-d, empty, boolean, integer, bfloat16, complex and non-contiguous tensors are saved bit for bit."""
        torch.manual_seed(0)
        module, other = Kinds(), Kinds()
        before = snapshot(module)
        strides = [tensor.stride() for tensor in other.state_dict().values()]
        checkpoint = reread(PyTorchCheckpoint(module=module).save(tmp_path, step=1))
        assert_same(checkpoint["module_state_dict"], before[0])
        checkpoint.restore(other)
        assert_same(snapshot(other), before)
        assert [tensor.stride() for tensor in other.state_dict().values()] == strides

    def test_tied_weights_stay_tied(self, tmp_path: Path) -> None:
        """A weight under two names reads under both, and is still one tensor after a restore."""
        module, other = Tied(), Tied()
        optimizer, fresh = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (module, other))
        module.head(module.embed(torch.tensor([1]))).sum().backward()
        optimizer.step()
        checkpoint = PyTorchCheckpoint(module=module, optimizer=optimizer).save(tmp_path, step=1)
        assert_same([reread(checkpoint)["module_state_dict"]], snapshot(module))
        checkpoint.restore(other, fresh)
        assert other.head.weight is other.embed.weight
        assert_same(snapshot(other, fresh), snapshot(module, optimizer))

    @pytest.mark.parametrize(
        "extra",
        [None, "text", torch.arange(3), {"n": 3, "t": torch.ones(2), "l": [1, {"a": torch.zeros(1)}]}, {}],
        ids=["none", "text", "tensor", "nested", "empty"],
    )
    def test_an_extra_state_comes_back_as_it_was(self, tmp_path: Path, extra: Any) -> None:
        """What get_extra_state gives is saved, in its place among the keys, and given to set_extra_state."""
        module, other = (nn.Sequential(Extra(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
        module[0].extra = extra
        checkpoint = reread(PyTorchCheckpoint(module=module).save(tmp_path, step=1))
        assert_same(checkpoint["module_state_dict"], module.state_dict())
        other[0].extra = "another"
        checkpoint.restore(other)
        assert_same(other[0].get_extra_state(), extra)

    def test_what_could_not_be_read_back_is_not_saved(self, tmp_path: Path) -> None:
        """A state with objects that only running code could restore is refused, by its name, before it is committed."""
        module = Extra(2, 2)
        module.extra = {"settings": [Settings()]}
        with pytest.raises(ArgumentError, match=r"_extra_state\.settings\.0.*Settings"):
            PyTorchCheckpoint(module=module).save(tmp_path, step=1)
        assert open_store(tmp_path).runs() == []

    def test_a_module_that_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        """Another shape, or a tensor that is not there, is a MismatchError that names it."""
        checkpoint = PyTorchCheckpoint(module=nn.Sequential(nn.Linear(2, 2))).save(tmp_path, step=1)
        with pytest.raises(MismatchError, match=r"0\.(weight|bias) has shape"):
            checkpoint.restore(nn.Sequential(nn.Linear(2, 3)))
        with pytest.raises(MismatchError, match=r"lacks 2 of the model's 4"):
            checkpoint.restore(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


class Table:
    """Rates by number of a step, which a scheduler keeps as a dict of numbers."""

    def __init__(self) -> None:
        self.rates = {1: 0.5, 4: 0.25}

    def __call__(self, step: int) -> float:
        """Return the factor for a step."""
        return self.rates.get(step, 1.0)


def schedulers() -> dict[str, Any]:
    """Return ways to make schedulers, by name."""
    rates = torch.optim.lr_scheduler
    return {
        "lambda": lambda o: rates.LambdaLR(o, lambda step: 0.9**step),
        "cosine": lambda o: rates.CosineAnnealingLR(o, 10),
        "one cycle": lambda o: rates.OneCycleLR(o, max_lr=0.2, total_steps=20),
        "milestones": lambda o: rates.MultiStepLR(o, [2, 4]),
        "sequence": lambda o: rates.SequentialLR(
            o, [rates.LinearLR(o, total_iters=3), rates.CosineAnnealingLR(o, 10)], milestones=[3]
        ),
        "milestones in a sequence": lambda o: rates.SequentialLR(
            o, [rates.LinearLR(o, total_iters=2), rates.MultiStepLR(o, [2, 3])], milestones=[2]
        ),
        "milestones in a chain": lambda o: rates.ChainedScheduler([rates.LinearLR(o), rates.MultiStepLR(o, [2, 5])]),
        "table": lambda o: rates.LambdaLR(o, Table()),
    }


class TestTraining:
    """Schedulers, counters and generators."""

    @pytest.mark.parametrize("name", schedulers())
    def test_a_scheduler_goes_on_where_it_was(self, tmp_path: Path, name: str) -> None:
        """A restored scheduler has the same state dict, and gives the same rates from then on."""
        make = schedulers()[name]
        module, other = layers(), layers(seed=1)
        optimizer, fresh = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (module, other))
        scheduler, restored = make(optimizer), make(fresh)
        train(module, optimizer, scheduler, steps=3)
        checkpoint = PyTorchCheckpoint(module=module, optimizer=optimizer).save(tmp_path, step=1, scheduler=scheduler)
        reread(checkpoint).restore(other, fresh, scheduler=restored)
        assert_same(snapshot(other, fresh, restored), snapshot(module, optimizer, scheduler))
        kinds = [{name: type(value) for name, value in s.state_dict().items()} for s in (restored, scheduler)]
        assert kinds[0] == kinds[1]
        for trio in ((module, optimizer, scheduler), (other, fresh, restored)):
            torch.manual_seed(3)
            train(*trio, steps=3)
        assert_same(snapshot(other, fresh, restored), snapshot(module, optimizer, scheduler))

    def test_numpys_numbers_in_a_state_stay_numpys(self, tmp_path: Path) -> None:
        """A rate that numpy computed in single precision goes on being rounded so."""
        module = layers()
        optimizer = torch.optim.SGD(module.parameters(), lr=np.float32(0.1))
        checkpoint = reread(PyTorchCheckpoint(module=module, optimizer=optimizer).save(tmp_path, step=1))
        assert_same(checkpoint["optimizer_state_dict"]["param_groups"][0]["lr"], np.float32(0.1))

    def test_counters_and_generators_come_back(self, tmp_path: Path) -> None:
        """Restoring returns the counters; with rng the generators of torch, numpy and Python go on where they were."""

        def draw() -> list[Any]:
            return [
                torch.rand(3),
                torch.randn(1),
                np.random.rand(2).tolist(),
                np.random.randn(),
                random.gauss(),
                random.random(),
            ]

        random.gauss(0, 1)
        np.random.randn()
        checkpoint = saved(tmp_path)
        again = PyTorchCheckpoint(layers()).save(tmp_path, step=2, trainer={"step": 2, "tokens": [1, 2]})
        expected = draw()
        assert checkpoint.restore(layers()) == {}
        other = layers(seed=9)
        assert again.restore(other) == {"step": 2, "tokens": [1, 2]}
        assert_same(again.restore(other, rng=True), {"step": 2, "tokens": [1, 2]})
        assert_same(draw(), expected)

    def test_counters_keep_their_types_or_are_refused(self, tmp_path: Path) -> None:
        """Tuples and number keys come back; what JSON would turn into something else is named."""
        counters = {"step": 2, "seen": {3: (1, 2), "x": [{1: None}]}, "loss": math.inf, "rate": 0.1}
        checkpoint = PyTorchCheckpoint(layers()).save(tmp_path, step=1, trainer=counters)
        assert repr(checkpoint.restore(layers())) == repr(counters)
        for value in (
            Color.RED,
            np.float32(1),
            {1},
            {"a": [Pair(1, 0.5)]},
            {(1,): 2},
            b"a",
            1j,
            datetime.date(2026, 1, 2),
        ):
            with pytest.raises(ArgumentError, match="trainer"):
                PyTorchCheckpoint(layers()).save(tmp_path, step=2, trainer={"x": value})

    @pytest.mark.parametrize(
        ("name", "content"), [("state.json", "{"), ("state.json", ""), ("rank_00000.safetensors", "x")]
    )
    def test_a_damaged_trainer_state_is_named(self, tmp_path: Path, name: str, content: str) -> None:
        """Counters or generators that cannot be read are a DamagedError that names the file."""
        checkpoint = PyTorchCheckpoint(layers()).save(tmp_path, step=1, trainer={"step": 1})
        file = tmp_path / "default" / "step_0000000001" / "trainer" / name
        file.write_text(content.ljust(file.stat().st_size))
        with pytest.raises(DamagedError, match=name):
            checkpoint.restore(layers(), rng=True)

    def test_what_is_not_there_is_named(self, tmp_path: Path) -> None:
        """Restoring an optimizer from a checkpoint without one says so; so does one that was never saved."""
        module = layers()
        checkpoint = saved(tmp_path)
        with pytest.raises(MismatchError, match="no optimizer"):
            checkpoint.restore(module, torch.optim.SGD(module.parameters()))
        with pytest.raises(KeyError, match="no optimizer"):
            reread(checkpoint)["optimizer_state_dict"]
        with pytest.raises(CheckpointError, match="never saved"):
            PyTorchCheckpoint(module).restore(module)


class TestStore:
    """Committing to a store and reading from it."""

    def test_a_committed_step_never_changes(self, tmp_path: Path) -> None:
        """A second save of a step is a FileExistsError and leaves every byte; another run may have the step."""
        checkpoint = saved(tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for kind in (StepExistsError, FileExistsError):
            with pytest.raises(kind, match="step 1"):
                PyTorchCheckpoint(layers(seed=1)).save(tmp_path, step=1)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert PyTorchCheckpoint(layers()).save(tmp_path, step=1, run="other").url != checkpoint.url

    def test_its_address_is_a_url_or_a_path(self, tmp_path: Path) -> None:
        """A path does as well as a URL; a missing step is a FileNotFoundError, an unknown scheme an ArgumentError."""
        checkpoint = PyTorchCheckpoint(hyperparameters={"a": 1}).save(tmp_path.as_uri(), step=3, run="r")
        assert checkpoint.url == (tmp_path / "r" / "step_0000000003").as_uri()
        assert PyTorchCheckpoint.from_url(tmp_path / "r" / "step_0000000003")["a"] == 1
        with pytest.raises(NotACheckpointError):
            PyTorchCheckpoint.from_url(tmp_path / "r" / "step_0000000004")
        with pytest.raises(ArgumentError, match="nowhere"):
            PyTorchCheckpoint(hyperparameters={"a": 1}).save("nowhere://bucket/x", step=3)

    @pytest.mark.parametrize("name", ["trainer/state.json", "trainer/rank_00000.safetensors", "model/.metadata.json"])
    def test_what_no_crc_guards_is_compared_with_the_manifest(self, tmp_path: Path, name: str) -> None:
        """Metadata and trainer state of the right size but with other bytes are an error, and nothing is restored."""
        saved = PyTorchCheckpoint(layers()).save(tmp_path, step=5, trainer={"step": 5})
        file = tmp_path / "default" / "step_0000000005" / name
        data = file.read_bytes()
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        other = layers(1)
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(DamagedError, match=Path(name).name):
            PyTorchCheckpoint.from_json(saved.to_json()).restore(other, rng=True)
        assert all(torch.equal(p, q) for p, q in zip(before, other.parameters(), strict=True))

    @pytest.mark.parametrize(
        "wrong",
        [{"step": -1}, {"step": 10**10}, {"run": "a/b"}, {"run": "../a"}, {"metrics": {"a": object()}}]
        + [{name: {"a": object()}} for name in ("lineage", "trainer")],
    )
    def test_a_wrong_argument_writes_nothing(self, tmp_path: Path, wrong: dict[str, Any]) -> None:
        """What cannot be saved is a ValueError before anything is written."""
        with pytest.raises(ArgumentError):
            PyTorchCheckpoint(layers()).save(tmp_path, **{"step": 1, **wrong})
        assert list(tmp_path.iterdir()) == []

    def test_links_among_the_assets(self, tmp_path: Path) -> None:
        """What links lead to is saved, directories too; a link that leads back, or nowhere, is refused by name."""
        assets, elsewhere = tmp_path / "assets", tmp_path / "elsewhere"
        (elsewhere / "deep").mkdir(parents=True)
        assets.mkdir()
        (elsewhere / "tokenizer.json").write_text("{}")
        (elsewhere / "deep" / "vocab.txt").write_text("a")
        (assets / "file.json").symlink_to(elsewhere / "tokenizer.json")
        (assets / "tokenizer").symlink_to("../elsewhere")
        saved = PyTorchCheckpoint(layers()).save(tmp_path / "store", step=1, assets=assets)
        names = [name for name in open_checkpoint(saved.url).manifest.files if name.startswith("assets/")]
        assert names == ["assets/file.json", "assets/tokenizer/deep/vocab.txt", "assets/tokenizer/tokenizer.json"]
        (elsewhere / "deep" / "back").symlink_to(assets)
        for wrong in (elsewhere / "deep" / "back", assets / "nowhere"):
            wrong.unlink(missing_ok=True)
            wrong.symlink_to(assets if wrong.name == "back" else "/nowhere")
            with pytest.raises(ArgumentError, match=wrong.name):
                PyTorchCheckpoint(layers()).save(tmp_path / "store", step=2, assets=assets)
            wrong.unlink()

    def test_a_failed_save_leaves_nothing(self, tmp_path: Path) -> None:
        """An error while parts are written, such as missing assets, leaves neither the step nor its staging."""
        with pytest.raises(FileNotFoundError):
            PyTorchCheckpoint(layers()).save(tmp_path, step=1, assets=tmp_path / "missing")
        assert list((tmp_path / "default").iterdir()) == []

    def test_what_was_saved_does_not_follow_the_live_objects(self, tmp_path: Path) -> None:
        """The state dicts of a saved checkpoint are those of its step, whatever the module and optimizer do later."""
        module = layers()
        optimizer = torch.optim.AdamW(module.parameters())
        train(module, optimizer)
        expected = snapshot(module, optimizer)
        checkpoint = PyTorchCheckpoint(module, None, optimizer).save(tmp_path, step=1)
        train(module, optimizer)
        for form in (checkpoint, reread(checkpoint)):
            assert_same([form["module_state_dict"], form["optimizer_state_dict"]], expected)

    @pytest.mark.parametrize("damaged", ["model", "optimizer"])
    def test_a_failed_restore_says_what_it_overwrote(self, tmp_path: Path, damaged: str) -> None:
        """Damage of the optimizer's state, or a scheduler of another kind, leaves all as it was; of the module, not."""
        module = layers()
        optimizer = torch.optim.AdamW(module.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        train(module, optimizer, scheduler)
        checkpoint = PyTorchCheckpoint(module, None, optimizer).save(tmp_path, step=1, scheduler=scheduler)
        other = layers(seed=1)
        fresh = torch.optim.AdamW(other.parameters())
        before = snapshot(other, fresh)
        with pytest.raises(MismatchError, match=r"gamma.*T_max"):
            checkpoint.restore(other, fresh, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(fresh, 3))
        fresh.param_groups[0].pop("initial_lr")
        assert_same(snapshot(other, fresh), before)
        shard = next((tmp_path / "default" / "step_0000000001" / damaged).glob("*.distcp"))
        data = bytearray(shard.read_bytes())
        state = module[0].weight if damaged == "model" else optimizer.state[module[0].weight]["exp_avg"]
        data[data.find(state.detach().numpy().tobytes())] ^= 1
        shard.write_bytes(data)
        with pytest.raises(DamagedError, match="CRC32") as error:
            checkpoint.restore(other, fresh)
        if damaged == "model":
            assert "Overwritten until then: the module's tensors, in part" in str(error.value)
            assert_same(snapshot(fresh), before[1:])
        else:
            assert "verwritten" not in str(error.value)
            assert_same(snapshot(other, fresh), before)

    def test_a_part_is_restored_with_its_optimizer(self, tmp_path: Path) -> None:
        """One of two models is chosen by `prefix`, and the optimizer's names with it."""
        two = nn.ModuleDict({"policy": layers(), "ref": layers(seed=1)})
        optimizer = torch.optim.AdamW(two["policy"].parameters())
        train(two["policy"], optimizer)
        checkpoint = PyTorchCheckpoint(two, None, optimizer).save(tmp_path, step=1)
        other = layers(seed=2)
        fresh = torch.optim.AdamW(other.parameters())
        with pytest.raises(MismatchError, match=r"model\.policy.*model\.ref"):
            checkpoint.restore(other, fresh)
        checkpoint.restore(other, fresh, prefix="policy")
        assert_same(snapshot(other, fresh), snapshot(two["policy"], optimizer))

    @pytest.mark.parametrize("mode", ["default device", "default dtype", "inference mode", "no grad"])
    def test_the_callers_modes_do_not_matter(self, tmp_path: Path, mode: str) -> None:
        """With another default device or dtype, or in inference mode, all is saved and restored, and can be trained."""
        modes: dict[str, Callable[[], Any]] = {
            "default device": lambda: torch.device("meta"),
            "default dtype": lambda: default_dtype(torch.float64),
            "inference mode": torch.inference_mode,
            "no grad": torch.no_grad,
        }
        module = layers()
        optimizer = torch.optim.AdamW(module.parameters())
        train(module, optimizer)
        expected = snapshot(module, optimizer)
        other, narrow = layers(seed=1), layers(seed=2).bfloat16()
        fresh = torch.optim.AdamW(other.parameters())
        with modes[mode]():
            saved = PyTorchCheckpoint(module, None, optimizer).save(tmp_path, step=1, trainer={"a": 1})
            with AsyncSaver(tmp_path) as saver:
                saver.save(PyTorchCheckpoint(module, None, optimizer), step=2)
                saver.save(PyTorchCheckpoint(module, None, optimizer), step=3)
            saved.restore(other, fresh, rng=True)
            saved.restore(narrow)
            assert_same(saved["module_state_dict"], expected[0])
        assert_same(snapshot(other, fresh), expected)
        train(other, fresh)

    def test_modules_that_write_their_state_otherwise(self, tmp_path: Path) -> None:
        """Keys that are no attributes, and lazy parameters, work as with `load_state_dict`, or are an error."""

        class Quantized(nn.Linear):
            absmax = torch.ones(2)

            def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
                super()._save_to_state_dict(destination, prefix, keep_vars)
                destination[prefix + "weight.absmax"] = self.absmax
                destination[prefix + "weight.kind"] = ("nf4", {4: torch.zeros(1)})

            def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
                self.absmax = state_dict.pop(prefix + "weight.absmax")
                self.kind = state_dict.pop(prefix + "weight.kind")
                super()._load_from_state_dict(state_dict, prefix, *others)

        module, other = (nn.Sequential(Quantized(2, 2)) for _ in range(2))
        module[0].absmax = torch.arange(2.0)
        checkpoint = PyTorchCheckpoint(module).save(tmp_path, step=1)
        checkpoint.restore(other)
        assert_same(other[0].absmax, module[0].absmax)
        assert_same(other[0].kind, ("nf4", {4: torch.zeros(1)}))
        lazy = nn.LazyLinear(2)
        with pytest.raises(ArgumentError, match="lazy"):
            PyTorchCheckpoint(lazy).save(tmp_path, step=2)
        PyTorchCheckpoint(nn.Linear(4, 2)).save(tmp_path, step=2).restore(lazy)
        assert lazy.weight.shape == (2, 4)

    def test_a_reference_to_a_replaced_checkpoint_is_refused(self, tmp_path: Path) -> None:
        """A reference names one checkpoint by digest; another one in its place is not taken for it."""
        reference = reread(saved(tmp_path / "a", hyperparameters={"epochs": 1}))
        saved(tmp_path / "b", hyperparameters={"epochs": 2})
        (tmp_path / "a").rename(tmp_path / "c")
        with pytest.raises(NotACheckpointError):
            reference.restore(layers())
        (tmp_path / "b").rename(tmp_path / "a")
        with pytest.raises(MismatchError, match="another checkpoint"):
            reference.restore(layers())

    def test_a_reference_cannot_be_saved_before_it_is_restored(self, tmp_path: Path) -> None:
        """A checkpoint with nothing in memory is not written as an empty one."""
        with pytest.raises(ArgumentError, match="restore it first"):
            reread(saved(tmp_path)).save(tmp_path, step=2)

    def test_damage_is_an_error_and_restores_nothing(self, tmp_path: Path) -> None:
        """A flipped bit in the model's file is found by its CRC32."""
        checkpoint = saved(tmp_path)
        shard = next((tmp_path / "default" / "step_0000000001" / "model").glob("*.distcp"))
        data = bytearray(shard.read_bytes())
        place = data.find(layers()[0].weight.detach().numpy().tobytes())
        data[place] ^= 1
        shard.write_bytes(data)
        with pytest.raises(DamagedError, match="CRC32"):
            checkpoint.restore(layers())
        with pytest.raises(DamagedError, match="CRC32"):
            reread(checkpoint)["module_state_dict"]

    def test_it_can_be_copied_and_compared(self, tmp_path: Path) -> None:
        """A checkpoint that refers to a store survives copy and compares by what it refers to."""
        reference = reread(saved(tmp_path))
        assert copy.deepcopy(reference) == reference
        assert reference != reread(PyTorchCheckpoint(hyperparameters={"epochs": 5}))
