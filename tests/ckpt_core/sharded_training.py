"""What ranks do in the tests of FSDP2: train a sharded model, save it, restore it, and fail on purpose."""

import random
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from gloo_ranks import Outcome, attempt
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ckpt_core import PyTorchCheckpoint, native_checkpoint

FULL = StateDictOptions(full_state_dict=True)


class Uneven(nn.Module):
    """Matrices whose rows no number of ranks divides, one of a single row, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.middle = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return one number for each token."""
        return self.head(self.norm(self.middle(self.embed(numbers))) + self.frozen)


class Training:
    """A model, sharded where there is a process group, with AdamW in two groups and a cosine schedule."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Uneven()
        if dist.is_initialized():
            fully_shard(self.model.middle)
            fully_shard(self.model)
        groups = [{"params": self.model.embed.parameters(), "lr": 0.5}, {"params": self._others(), "weight_decay": 0.1}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)

    def _others(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if not name.startswith("embed")]

    def train(self, steps: int) -> None:
        """Take steps, all ranks on the same random tokens."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randint(0, 7, (4,))).pow(2).sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.model.count += 1

    def whole(self) -> list[Any]:
        """Return the model's, optimizer's and scheduler's whole states, the first two on rank 0 alone."""
        if not dist.is_initialized():
            by_name = get_optimizer_state_dict(self.model, self.optimizer)
            return [dict(self.model.state_dict()), by_name, self.scheduler.state_dict()]
        model = get_model_state_dict(self.model, options=FULL)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=FULL)
        return [model, optimizer, self.scheduler.state_dict()]


def draws() -> list[Any]:
    """Return what each generator gives next."""
    return [torch.rand(2), float(np.random.rand()), random.random()]


def seed_generators(seed: int) -> None:
    """Give each rank generators of its own."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def save(directory: Path, steps: int) -> tuple[list[Any], list[Any], str]:
    """Train, and save through both interfaces; return the whole state, the next draws and the checkpoint's JSON."""
    training = Training(seed=0)
    training.train(steps)
    native_checkpoint.save_checkpoint(
        training.model,
        str(directory / "native" / "weights"),
        training.optimizer,
        training.scheduler,
        str(directory / "native" / "optimizer"),
    )
    seed_generators(100 + dist.get_rank())
    checkpoint = PyTorchCheckpoint(training.model, {"epochs": 5}, training.optimizer).save(
        directory / "store", step=steps, scheduler=training.scheduler, trainer={"step": steps}
    )
    return training.whole(), draws(), checkpoint.to_json()


class Restored(NamedTuple):
    """What ranks have after they restored."""

    whole: list[Any]
    counters: dict[str, Any]
    draws: list[Any]
    by_native: list[Any]


def restore(directory: Path, text: str) -> Restored:
    """Restore through both interfaces, each into a training that is somewhere else: one has a part of the state."""
    training = Training(seed=1)
    training.train(1)
    seed_generators(7)
    checkpoint = PyTorchCheckpoint.from_json(text)
    counters = checkpoint.restore(training.model, training.optimizer, scheduler=training.scheduler, rng=True)
    next_draws = draws()
    other = Training(seed=2)
    other.model.embed.weight.grad = torch.ones_like(other.model.embed.weight)
    other.optimizer.step()
    native = directory / "native"
    native_checkpoint.load_checkpoint(
        other.model, str(native / "weights"), other.optimizer, other.scheduler, str(native / "optimizer")
    )
    for optimizer in (training.optimizer, other.optimizer):
        for parameter, state in optimizer.state.items():
            assert isinstance(state["exp_avg"], DTensor) == isinstance(parameter.data, DTensor), "no longer sharded"
    return Restored(training.whole(), counters, next_draws, other.whole())


def go_on(text: str, steps: int) -> list[list[Any]]:
    """Return the whole states after `steps` more, once from the checkpoint and once without a stop."""
    stopped = Training(seed=1)
    PyTorchCheckpoint.from_json(text).restore(stopped.model, stopped.optimizer, scheduler=stopped.scheduler)
    going = Training(seed=0)
    going.train(steps)
    states: list[list[Any]] = []
    for training in (stopped, going):
        seed_generators(3)
        training.train(steps)
        states.append(training.whole())
    return states


def restore_and_go_on(directory: Path, text: str, steps: int) -> tuple[Restored, list[list[Any]]]:
    """Do both in the same ranks."""
    return restore(directory, text), go_on(text, steps)


def fail(directory: Path, seen: Path) -> dict[str, Outcome]:
    """Make one call after the other fail on one rank; return this rank's outcomes, and at last one that succeeds.

    Args:
        directory: where to save; it must be empty after each failure.
        seen: a checkpoint that both ranks could load.
    """
    outcomes: dict[str, Outcome] = {}
    for interface in ("store", "native"):
        place = directory / interface
        for name, function in (("cannot write", cannot_write), ("cannot collect", cannot_collect)):
            outcomes[f"{interface}: {name}"] = attempt(function, interface, place)
            outcomes[f"{interface}: {name}, left"] = Outcome(left_in(place))
        outcomes[f"{interface}: again"] = attempt(save_by, interface, place, Training(seed=0))
    outcomes["steps"] = attempt(disagree, directory / "steps")
    outcomes["hyperparameters"] = attempt(bad_hyperparameters, directory / "hyperparameters")
    outcomes["tokenizer fails"] = attempt(save_tokenizer, directory / "tokenizer", True)
    outcomes["tokenizer fails, left"] = Outcome(left_in(directory / "tokenizer"))
    outcomes["tokenizer"] = attempt(save_tokenizer, directory / "tokenizer", False)
    outcomes["load"] = attempt(load_on_rank_0_alone, seen)
    return outcomes


def left_in(directory: Path) -> list[str]:
    """Return what is below a directory once no rank works there any more."""
    dist.barrier()
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def save_by(interface: str, directory: Path, training: Training) -> None:
    """Save model and optimizer through one of the two interfaces."""
    if interface == "store":
        PyTorchCheckpoint(module=training.model, optimizer=training.optimizer).save(directory, step=1)
    else:
        paths = (str(directory / "weights"), training.optimizer, None, str(directory / "optimizer"))
        native_checkpoint.save_checkpoint(training.model, *paths)


def cannot_write(interface: str, directory: Path) -> None:
    """Save where rank 1 may write no file beyond a hundred bytes."""
    training = Training(seed=0)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        save_by(interface, directory, training)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def cannot_collect(interface: str, directory: Path) -> None:
    """Save with a state that could not be read back, on rank 1."""
    training = Training(seed=0)
    if dist.get_rank() == 1:
        training.optimizer.param_groups[0]["lr"] = left_in
    save_by(interface, directory, training)


def disagree(directory: Path) -> None:
    """Save as another step on each rank."""
    PyTorchCheckpoint(module=Training(seed=0).model).save(directory, step=dist.get_rank())


def bad_hyperparameters(directory: Path) -> None:
    """Save with hyperparameters that rank 1 alone cannot write as JSON."""
    value = object() if dist.get_rank() == 1 else 1
    PyTorchCheckpoint(Training(seed=0).model, {"a": value}).save(directory, step=1)


class Tokenizer:
    """Writes a file, slowly, or fails."""

    def __init__(self, *, fails: bool) -> None:
        self._fails = fails

    def save_pretrained(self, directory: str) -> None:
        """Write which rank this is."""
        if self._fails:
            raise RuntimeError("no vocabulary")
        time.sleep(0.5)
        Path(directory, f"rank_{dist.get_rank()}").write_text("a")


def save_tokenizer(directory: Path, fails: bool) -> list[str]:
    """Save with a tokenizer; return what its directory holds when the call ends."""
    path = directory / "tokenizer"
    native_checkpoint.save_checkpoint(
        Training(seed=0).model,
        str(directory / "weights"),
        tokenizer=Tokenizer(fails=fails),
        tokenizer_path=str(path),
    )
    return sorted(p.name for p in path.iterdir())


def load_on_rank_0_alone(path: Path) -> None:
    """Load where rank 1 sees no checkpoint."""
    seen = path if dist.get_rank() == 0 else path / "elsewhere"
    native_checkpoint.load_checkpoint(Training(seed=1).model, str(seen))
