"""The training loop: batches in, checkpoints out; what a kill interrupts, the next start continues."""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from ckpt_core import PyTorchCheckpoint, ranks
from ckpt_core.errors import ArgumentError
from ckpt_core.store import open_checkpoint, open_store, step_name
from ckpt_core.urls import place_of
from tasks.worker.batches import batch, rank_share
from tasks.worker.checkpoints import Checkpoints
from tasks.worker.evaluate import heldout_loss
from tasks.worker.history import History
from tasks.worker.loss import accumulate_gradients
from tasks.worker.model import build_model, shard
from tasks.worker.optimizer import make_optimizer, make_schedule
from tasks.worker.progress import Progress
from tasks.worker.records import Records
from tasks.worker.scalars import check_tensorboard
from tasks.worker.tokenizer import load_tokenizer
from tasks.worker.tokens import TokenSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from tasks.config import Job
    from tasks.worker.place import Place


def train(job: Job, place: Place, stop_requested: Callable[[], bool]) -> bool:
    """Collective. Train up to the job's last step, from where the store's newest checkpoint left off.

    Args:
        job: what to train and where to commit its checkpoints.
        place: this rank.
        stop_requested: asked after each step; when any rank says so, all commit a checkpoint and stop.

    Returns:
        Whether the job is complete; False if it was stopped.

    Raises:
        ArgumentError: the settings do not fit each other, the data, or what the store holds.
        FloatingPointError: the loss or the gradient is no number any more.
    """
    origin = ranks.first(lambda: _origin(job))
    if origin is not None and origin[0] >= job.end_step:
        if place.rank == 0:
            Progress(job.start_step, job.end_step, 0).note(origin[0], f"complete: {origin[1]}")
        return True
    trainer = Trainer(job, place, origin)
    return trainer.run(stop_requested)


class Trainer:
    """The state of one rank between two steps. Making one is collective: it builds, shards and restores."""

    def __init__(self, job: Job, place: Place, origin: tuple[int, str] | None) -> None:
        self.job, self.place = job, place
        self.tokens = TokenSet.open(job.train_tokens).tokens
        _check(job, place)
        self.step = job.start_step
        self.history = History()
        self.model = self._build(load_weights=origin is None)
        self.optimizer = make_optimizer(self.model, job.step)
        self.scheduler = make_schedule(
            self.optimizer, steps=job.end_step - job.start_step, warmup_steps=job.step.warmup_steps
        )
        if origin is not None:
            self._restore(*origin)
        tokens_per_step = job.step.batch_size * self.tokens.shape[1]
        self.records = Records.open(job, place, step=self.step, tokens_per_step=tokens_per_step)
        self.checkpoints = Checkpoints(job, open_store(job.store), origin, self.records.committed)

    def run(self, stop_requested: Callable[[], bool]) -> bool:
        """Collective. Train to the end or until a stop; return whether the end was reached."""
        with self.checkpoints:
            if self.history.initial_heldout_loss is None:
                self._evaluate()
            stop = any(self.place.sum([float(stop_requested())]))
            while self.step < self.job.end_step and not stop:
                entry, stop = self._advance(stop_requested)
                self.checkpoints.look()
                if stop:
                    self.checkpoints.hurry()
                if self._is_due(self.job.step.evaluate_every):
                    entry["heldout_loss"] = self._evaluate()
                self.records.keep(entry)
                if stop or self._is_due(self.job.step.checkpoint_every):
                    self._save()
            self.checkpoints.finish()
        self.records.close()
        return self.step == self.job.end_step

    def _advance(self, stop_requested: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
        """Collective. Take one optimizer step; return its record and whether any rank wants to stop."""
        started = time.monotonic()
        settings, seed = self.job.step, self.job.seed
        sequences = batch(self.tokens, self.step, seed=seed, batch_size=settings.batch_size)
        targets = sequences[:, 1:].size
        mine = torch.from_numpy(rank_share(sequences, self.place.rank, self.place.world_size))
        summed = accumulate_gradients(
            self.model,
            mine.to(self.place.device),
            micro_batch_size=settings.micro_batch_size,
            scale=self.place.world_size / targets,  # FSDP takes the mean of the ranks' gradients
        )
        norm = _whole(clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)).item()
        total, stops = self.place.sum([summed.item(), float(stop_requested())])
        loss, learning_rate = total / targets, float(self.scheduler.get_last_lr()[0])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            newest = self.checkpoints.newest
            raise FloatingPointError(
                f"step {self.step + 1}: the loss is {loss}, the gradient's norm {norm}; "
                f"{f'the checkpoint of step {newest[0]} is untouched; ' if newest else ''}"
                "lower `learning_rate` or lengthen `warmup_steps`"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.history.add_step(self.step, loss)
        self.records.advanced(self.step, loss, learning_rate)
        entry = {"step": self.step, "loss": loss, "learning_rate": learning_rate, "grad_norm": norm}
        return {**entry, "tokens": sequences.size, "seconds": round(time.monotonic() - started, 4)}, stops > 0

    def _evaluate(self) -> float:
        """Collective. Record the loss on the held-out text."""
        loss = heldout_loss(
            self.model,
            self.job.heldout_tokens,
            self.place.device,
            self.job.step.micro_batch_size,
            rank=self.place.rank,
            world_size=self.place.world_size,
        )
        self.history.add_evaluation(self.step, loss)
        self.records.evaluated(self.step, loss)
        return loss

    def _save(self) -> None:
        """Collective. Save this step; with `async_save`, what is written is a copy and training goes on."""
        self.records.sync()
        job = self.job
        times = self.checkpoints.save(
            PyTorchCheckpoint(self.model, _hyperparameters(job), self.optimizer),
            step=self.step,
            scheduler=self.scheduler,
            trainer={"step": self.step, "history": self.history.to_json()},
            assets=job.tokenizer,
            metrics={**self.history.metrics(), "tokens": self._tokens_seen()},
            lineage={**job.lineage, "hardware": self.place.hardware()},
        )
        self.records.keep_save(times)

    def _build(self, *, load_weights: bool) -> nn.Module:
        job = self.job
        tokenizer = load_tokenizer(job.tokenizer, trust_remote_code=job.model.trust_remote_code)
        model = build_model(job.model, tokenizer, seed=job.seed, load_weights=load_weights)
        shard(model, self.place.mesh())
        model.train()
        _seed_rank(job.seed, job.start_step, self.place.rank)
        return model

    def _restore(self, step: int, url: str) -> None:
        """Collective. Take everything from a checkpoint of this job, only weights from the one it starts from."""
        checkpoint = PyTorchCheckpoint.from_url(url)
        if step <= self.job.start_step:
            checkpoint.restore(self.model)
            return
        state = checkpoint.restore(self.model, self.optimizer, scheduler=self.scheduler, rng=True)
        self.step = state["step"]
        self.history = History.from_json(state["history"])

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.job.end_step

    def _tokens_seen(self) -> int:
        return (self.step - self.job.start_step) * self.job.step.batch_size * self.tokens.shape[1]


def _origin(job: Job) -> tuple[int, str] | None:
    """Return step and URL of this job's newest checkpoint, else of its parent; None where it begins without one.

    Raises:
        ArgumentError: the checkpoint of `start_step` is not there.
        NotACheckpointError: the parent is not there.
        DamagedError: the parent is damaged.
    """
    newest = open_store(job.store).latest(job.run)
    if newest is None and job.start_step > 0:
        raise ArgumentError(
            f"{job.store}: run {job.run!r} has no checkpoint, but the job starts from step {job.start_step}; "
            "run the training step before it first"
        )
    if newest is None:
        return None
    if newest.step < job.start_step:
        raise ArgumentError(
            f"{newest.url} is the newest checkpoint of run {job.run!r}, but the job starts from step "
            f"{job.start_step}; run the training step before it first"
        )
    if newest.step == job.start_step and job.parent is not None:
        parent = open_checkpoint(place_of(job.store) / job.run / step_name(job.parent))
        return parent.step, parent.url
    return newest.step, newest.url


def _check(job: Job, place: Place) -> None:
    if job.compute.tensorboard:
        check_tensorboard()
    if job.step.batch_size % place.world_size:
        raise ArgumentError(
            f"batch_size {job.step.batch_size} cannot be shared by {place.world_size} ranks; make it a multiple"
        )
    if job.end_step <= job.start_step:
        raise ArgumentError(f"the job ends at step {job.end_step}, but starts from {job.start_step}")


def _seed_rank(seed: int, start_step: int, rank: int) -> None:
    """Give each rank random numbers of its own, for dropout; the weights were drawn from the common seed."""
    own = int(np.random.SeedSequence((seed, start_step, rank)).generate_state(1)[0])
    torch.manual_seed(own)
    np.random.seed(own)
    random.seed(own)


def _whole(norm: Tensor) -> Tensor:
    """Return a norm that may be spread over ranks as one number."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def _hyperparameters(job: Job) -> dict[str, Any]:
    """Return all settings that decide the weights, with the model's architecture as it was given."""
    settings = job.step.model_dump(exclude={"name", "data", "steps", "checkpoint_every", "evaluate_every"})
    return {
        "step_name": job.step.name,
        **settings,
        "steps": job.end_step - job.start_step,
        "start_step": job.start_step,
        "seed": job.seed,
        "pretrained": job.model.pretrained,
        "architecture": None if job.model.pretrained else job.model.architecture,
        "sequence_length": TokenSet.open(job.train_tokens).info.sequence_length,
        "ranks": job.compute.ranks,
    }
