"""Optimizers: saving and restoring takes no step, and a restored one goes on bit for bit."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sharded_optimizers
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from gloo_ranks import run_ranks, values
from small_models import assert_same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers.optimization import Adafactor

from ckpt_core import PyTorchCheckpoint
from ckpt_core.errors import ArgumentError, MismatchError
from ckpt_core.native_checkpoint import load_checkpoint, save_checkpoint

optim = torch.optim
Make = Callable[[list[nn.Parameter]], optim.Optimizer]


class Net(nn.Module):
    """Matrices and vectors, one of them frozen and one that never has a gradient."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 5, dtype=dtype)
        self.second = nn.Linear(5, 3, dtype=dtype)
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return three numbers a row."""
        return self.second(self.first(x).relu()) * self.frozen


class Mixed(optim.Optimizer):
    """Keeps state of other types than the parameters', and checks that it stays so."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"rate": 0.01, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: D102 - torch's
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["z"], state["mean"] = p.clone(), torch.zeros(p.shape, dtype=torch.float64)
                    state["count"], state["low"] = torch.zeros((), dtype=torch.int64), torch.zeros(p.shape).half()
                    state["sign"], state["mode"] = torch.zeros(p.shape, dtype=torch.bool), "ab"
                    state["rows"] = {1: [torch.zeros(p.shape[0], dtype=torch.float64), None], "x": (2, 3)}
                assert (state["mode"], list(state["rows"])) == ("ab", [1, "x"])
                dtypes = [torch.float64, torch.int64, torch.float16, torch.bool]
                assert [state[key].dtype for key in ("mean", "count", "low", "sign")] == dtypes
                state["count"] += 1
                state["mean"].mul_(0.9).add_(p.grad.double(), alpha=1 / int(state["count"]))
                state["low"].add_(p.grad.half(), alpha=0.1)
                state["sign"] ^= p.grad > 0
                state["rows"][1][0] += p.grad.double().reshape(len(p), -1).sum(1)
                state["z"].sub_(state["mean"].to(p.dtype), alpha=group["rate"])
                p.mul_(1 - group["rate"]).lerp_(state["z"], 1 / group["k"])


class OwnKeys(optim.SGD):
    """Writes more into its state dict than torch does, and a state of no parameter."""

    scale = 1.0

    def step(self, closure: Any = None) -> Any:  # noqa: D102 - torch's
        self.scale *= 0.7
        self.state["all"]["n"] = self.state["all"].get("n", 0) + 1
        self.param_groups[0]["lr"] *= self.scale / self.state["all"]["n"]
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102 - torch's
        return {**super().state_dict(), "scale": self.scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102 - torch's
        self.scale = state_dict["scale"]
        super().load_state_dict(state_dict)


MAKERS: dict[str, Make] = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW, rate a tensor": lambda p: optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "AdamW, groups": lambda p: optim.AdamW([{"params": p[:2], "lr": 0.1, "x": (1, {"a": 3})}, {"params": p[2:]}]),
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "Adafactor of transformers": lambda p: Adafactor(p, lr=None, beta1=0.9, weight_decay=0.1, warmup_init=True),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, history_size=5, line_search_fn="strong_wolfe"),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "ASGD": lambda p: optim.ASGD(p, lr=0.1, t0=1),
    "NAdam": lambda p: optim.NAdam(p, lr=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "Muon": lambda p: optim.Muon([each for each in p if each.ndim == 2], lr=0.01),
    "mixed types": Mixed,
    "keys of its own": lambda p: OwnKeys(p, lr=0.1),
}


def train(net: Net, optimizer: optim.Optimizer, steps: int, seed: int) -> None:
    """Take steps on random numbers of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (net(x.to(net.frozen.dtype)).float() - y).pow(2).sum()
            loss.backward()
            return loss

        if isinstance(optimizer, optim.LBFGS):
            optimizer.step(closure)  # pyright: ignore
        else:
            closure()
            optimizer.step()


def states(net: Net, optimizer: optim.Optimizer) -> list[Any]:
    """Return copies of both states."""
    return copy.deepcopy([dict(net.state_dict()), optimizer.state_dict()])


def armed(net: Net, optimizer: optim.Optimizer) -> list[Any]:
    """Set gradients and hooks that a step would use; return what the hooks note, and then the gradients."""
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 3.0)
    return [calls, [parameter.grad for parameter in net.parameters()]]


def assert_untouched(net: Net, arms: list[Any]) -> None:
    """Assert that no step was taken."""
    calls, gradients = arms
    assert calls == []
    assert [id(parameter.grad) for parameter in net.parameters()] == [id(gradient) for gradient in gradients]
    assert all(gradient is None or bool((gradient == 3).all()) for gradient in gradients)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_it_goes_on_bit_for_bit_and_no_step_is_taken(tmp_path: Path, name: str, steps: int) -> None:
    """Whatever the optimizer keeps, saving changes nothing, and a restored one ends where an uninterrupted one does."""
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and name in {"LBFGS", "ASGD"}:
            continue  # do not work in this precision
        place = tmp_path / str(dtype)
        net = Net(0, dtype)
        optimizer = MAKERS[name](list(net.parameters()))
        train(net, optimizer, steps, seed=1)
        before = states(net, optimizer)
        arms = armed(net, optimizer)
        saved = PyTorchCheckpoint(net, None, optimizer).save(place, step=1)
        by_number = PyTorchCheckpoint(None, None, optimizer).save(place, step=2)
        save_checkpoint(net, str(place / "w"), optimizer, None, str(place / "o"))
        assert_untouched(net, arms)
        assert_same(states(net, optimizer), before)
        assert_same(saved["optimizer_state_dict"], before[1])
        assert_same(by_number["optimizer_state_dict"], before[1])
        train(net, optimizer, 2, seed=2)
        for way in ("store", "native", "number"):
            other = Net(5, dtype)
            fresh = MAKERS[name](list(other.parameters()))
            if way == "native":  # one with a state of its own
                train(other, fresh, 1, seed=3)
            arms = armed(other, fresh)
            if way == "store":
                saved.restore(other, fresh)
            elif way == "native":
                load_checkpoint(other, str(place / "w"), fresh, None, str(place / "o"))
            else:
                by_number.restore(None, fresh)
                other.load_state_dict(before[0])
            assert_untouched(other, arms)
            assert_same(states(other, fresh), before)
            train(other, fresh, 2, seed=2)
            assert_same(states(other, fresh), states(net, optimizer))


def test_a_gradient_of_another_dtype_does_not_matter(tmp_path: Path) -> None:
    """Parameters whose gradients must have another type than they, and sparse gradients, are no obstacle."""
    for make in (optim.AdamW, optim.SparseAdam):
        table = nn.Embedding(4, 3, sparse=True)
        optimizer = make(list(table.parameters()))
        if isinstance(optimizer, optim.SparseAdam):
            table(torch.tensor([1, 2])).sum().backward()
            optimizer.step()
        saved = PyTorchCheckpoint(table, None, optimizer).save(tmp_path / type(optimizer).__name__, step=1)
        other = nn.Embedding(4, 3, sparse=True)
        other.weight.grad_dtype = torch.bfloat16
        fresh = make(list(other.parameters()))
        saved.restore(other, fresh)
        assert_same(states(other, fresh), states(table, optimizer))  # pyright: ignore


def test_a_wrapped_optimizer_leaves_its_scaler_alone(tmp_path: Path) -> None:
    """Accelerate's optimizer steps through a GradScaler, which sees nothing of saving and restoring."""
    Accelerator(cpu=True)

    def make() -> tuple[nn.Module, Any, Any]:
        model, scaler = nn.Linear(2, 2), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return model, scaler, AcceleratedOptimizer(optim.AdamW(model.parameters()), scaler=scaler)

    model, scaler, optimizer = make()
    PyTorchCheckpoint(model, None, optimizer).save(tmp_path, step=0)
    scaler.scale(model(torch.ones(2)).sum()).backward()
    optimizer.step()
    saved = PyTorchCheckpoint(model, None, optimizer).save(tmp_path, step=1)
    other, untouched, fresh = make()
    untouched.scale(torch.ones(1))
    before = untouched.state_dict()
    saved.restore(other, fresh)
    assert untouched.state_dict() == before
    assert_same(copy.deepcopy(fresh.state_dict()), optimizer.state_dict())


def test_parameters_in_another_precision_get_a_state_of_theirs(tmp_path: Path) -> None:
    """A state that had the dtype of its parameter takes the dtype that the parameter has now, as torch does it."""
    net = Net(0, torch.bfloat16)
    optimizer = optim.AdamW(net.parameters())
    train(net, optimizer, 1, seed=1)
    saved = PyTorchCheckpoint(net, None, optimizer).save(tmp_path, step=1)
    other = Net(1)
    fresh = optim.AdamW(other.parameters())
    saved.restore(other, fresh)
    assert fresh.state[other.first.weight]["exp_avg"].dtype == torch.float32
    train(other, fresh, 1, seed=2)


@pytest.mark.parametrize(
    "make",
    [optim.AdamW, lambda p: optim.SGD(p, lr=0.1, momentum=0.9), optim.Adafactor],
    ids=["AdamW", "SGD", "factors"],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_stock_dcp_reads_and_writes_the_same(tmp_path: Path, make: Make, steps: int) -> None:
    """What torch's own functions make of an optimizer is loaded, and they load what is saved, stepped or not."""
    net = Net(0)
    optimizer = make([*net.first.parameters(), *net.second.parameters()])
    train(net, optimizer, steps, seed=1)
    save_checkpoint(net, str(tmp_path / "w"), optimizer, None, str(tmp_path / "o"))
    twin = Net(0)
    theirs = make([*twin.first.parameters(), *twin.second.parameters()])
    if steps:
        train(twin, theirs, steps, seed=1)
    template = {"optim": {"optim": get_optimizer_state_dict(twin, theirs)}}
    expected = copy.deepcopy(template)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(template, checkpoint_id=tmp_path / "stock")
        for entry in template["optim"]["optim"]["state"].values():
            for tensor in entry.values():
                tensor.fill_(9)
        dcp.load(template, checkpoint_id=tmp_path / "o")
    if steps:
        assert_same(template, expected)
        other = Net(3)
        fresh = make([*other.first.parameters(), *other.second.parameters()])
        load_checkpoint(other, str(tmp_path / "w"), fresh, None, str(tmp_path / "stock"))
        assert_same(copy.deepcopy(fresh.state_dict()), optimizer.state_dict())


def test_groups_are_found_by_their_parameters_and_all_of_them(tmp_path: Path) -> None:
    """Groups in another order keep their options; an option of an empty one too; a group too many is an error."""

    def make(net: Net, order: list[int], rates: list[float]) -> optim.Optimizer:
        groups: list[Any] = [{"params": net.first.parameters()}, {"params": net.second.parameters()}, {"params": []}]
        groups += [{"params": []}]
        return optim.AdamW([{**groups[place], "lr": rates[place]} for place in order])

    net = Net(0)
    saved = PyTorchCheckpoint(net, None, make(net, [0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4])).save(tmp_path, step=1)
    other = Net(1)
    fresh = make(other, [1, 2, 0, 3], [1.0, 1.0, 1.0, 1.0])
    saved.restore(other, fresh)
    assert [group["lr"] for group in fresh.param_groups] == [0.2, 0.3, 0.1, 0.4]
    before = states(other, fresh)
    for order, name in (([0, 2, 3], "second.weight"), ([0, 1], "nothing")):
        fewer = make(Net(2), order, [1.0] * 4)
        with pytest.raises(MismatchError, match=name):
            saved.restore(other, make(other, order, [1.0] * 4))
        assert len(fewer.state) == 0
        assert_same(states(other, fresh), before)


def test_an_optimizer_that_numbers_its_parameters_otherwise_is_refused(tmp_path: Path) -> None:
    """A state dict of another form is not taken for one of torch's."""

    class Odd(optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            state_dict = super().state_dict()
            state_dict["param_groups"][0]["params"].reverse()
            return state_dict

    net = Net(0)
    with pytest.raises(ArgumentError, match="Odd"):
        PyTorchCheckpoint(net, None, Odd(net.parameters())).save(tmp_path, step=1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """Return where two ranks saved with several optimizers, and the states that they had then and later."""
    directory = tmp_path_factory.mktemp("sharded")
    return directory, values(run_ranks(2, sharded_optimizers.save, directory))[0]


@pytest.mark.parametrize(("count", "meshes"), [(2, 1), (2, 2), (4, 2)], ids=["as saved", "HSDP of one", "HSDP"])
def test_ranks_restore_each_layout(sharded: tuple[Path, dict[str, list[Any]]], count: int, meshes: int) -> None:
    """Sharded, replicated and plain state comes back as it was, and the next steps end where they would have."""
    directory, expected = sharded
    for found in values(run_ranks(count, sharded_optimizers.restore, directory, meshes)):
        for name, states in found.items():
            saved = expected[name.rsplit(" ", 1)[0]]
            assert_same(states[:2], saved[:2], name)
            if meshes == 1:  # the gradients of other meshes are sums in another order
                assert_same(states[2:], saved[2:], name)


def test_fsdp1_is_refused_with_an_optimizer_and_kept_without(tmp_path: Path) -> None:
    """An optimizer of FSDP1's flat parameters is refused before anything is written; the module alone comes back."""
    for found in values(run_ranks(2, sharded_optimizers.use_fsdp1, tmp_path)):
        for original in (True, False):
            for way in ("save", "store"):
                assert "ArgumentError" in found[f"{way} {original}"].errors
                assert "fully_shard" in found[f"{way} {original}"].text
            assert not found[f"left {original}"].value
            for way in ("model", "load"):
                assert found[f"{way} {original}"].errors == (), found[f"{way} {original}"]
            loaded = found[f"loaded {original}"].value
            assert not any(bool((tensor == 7).any()) for tensor in loaded.values())
