"""What a user can set: typed, documented, refused when unknown.

The flows' forms in the Prefect UI are made from these classes. Imports neither torch nor Prefect, so that
flows, tasks and training ranks can all read it.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator

from ckpt_core.errors import ArgumentError

PYTHON_STDLIB = "python-stdlib"
"""The data source that is on every machine: the source code of Python's own standard library."""


def expected(what: str) -> WrapValidator:
    """Have an error say what was expected in words; the form has the pattern."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"expected {what}; found {value!r}") from None

    return WrapValidator(check)


Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"),
    expected("1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit"),
]
"""A name that is also a directory's name."""

Module = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*$"), expected("a module's name, such as my_package.train")]
"""A Python module, by the name that it is imported by."""

Endpoint = Annotated[str, Field(pattern=r"^[\w.-]+:\d{1,5}$"), expected("host:port, such as 10.0.0.5:29400")]
"""Where a program listens, as other machines reach it."""

Repository = Annotated[
    str,
    Field(pattern=r"^([\w.-]+/[\w.-]+|[./~].*|[A-Za-z][\w+.-]*://.+)$"),
    expected("owner/name, an absolute path or a URL"),
]
"""A repository on the Hub, or a directory or bucket of releases."""


class Settings(BaseModel):
    """A group of settings: frozen, and an unknown key is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Describe each field by the text below it; `use_attribute_docstrings` would look at every imported module."""
        definition = _classes(cls.__module__).get(cls.__name__)
        for field, below in pairwise(definition.body if definition else ()):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    cls.__pydantic_fields__[name].description = inspect.cleandoc(text)


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # it has none, as an interactive session
        return {}
    return {found.name: found for found in ast.parse(source).body if isinstance(found, ast.ClassDef)}


class DataSettings(Settings):
    """Text to train on, and the part of it that is held out for evaluation."""

    source: str = PYTHON_STDLIB
    """A directory or glob of text files, a `.jsonl` file, a Hub dataset as `hf:NAME`, or `python-stdlib`."""

    text_field: str = "text"
    """The field that holds the text, in a JSONL file or a Hub dataset."""

    split: str = "train"
    """The split of a Hub dataset."""

    max_megabytes: float | None = Field(default=8.0, gt=0)
    """Use at most this much text (10^6 bytes, UTF-8), chosen by its content; empty means all of it."""

    heldout_every: int = Field(default=40, ge=2)
    """One document in this many is held out, chosen by its content, so that the choice never moves."""

    heldout_tokens: int = Field(default=16_384, ge=256)
    """Evaluate on at most this many held-out tokens."""

    sequence_length: int = Field(default=128, ge=8)
    """Tokens in one training sequence; documents are packed without padding."""


def small_llama() -> dict[str, Any]:
    """The default job's architecture: Llama, 2.6 million parameters; wide and shallow learns most in a minute."""
    return {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,  # 1/sqrt(width); with the usual 0.02 the first 100 steps learn little
    }


class ModelSettings(Settings):
    """The model: pretrained weights to start from, or an architecture to train from scratch."""

    pretrained: str | None = None
    """A local path or Hub id of a causal language model whose weights and tokenizer to start from."""

    architecture: dict[str, Any] = Field(default=small_llama())
    """Without `pretrained`: the fields of a transformers config, `model_type` among them."""

    tokenizer: str | None = None
    """A local path or Hub id; empty means that of `pretrained`, or a byte-level BPE trained on the data."""

    trust_remote_code: bool = False
    """Allow a model that brings Python code of its own. It then runs with your rights."""


class TrainingStep(Settings):
    """One training job; a retrain is a list of them, each starting from the weights of the one before."""

    name: Name = "train"
    """Shown in the UI and recorded in each checkpoint."""

    steps: int = Field(default=200, ge=1)
    """Optimizer steps."""

    learning_rate: float = Field(default=4e-3, gt=0)
    """The peak of the cosine schedule."""

    warmup_steps: int = Field(default=32, ge=0)
    """Steps of linear warm-up before the cosine; at most half of all steps."""

    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decoupled weight decay, on matrices only."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""

    batch_size: int = Field(default=8, ge=1)
    """Sequences in one optimizer step, over all ranks together: a multiple of their number."""

    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences that one rank puts through the model at once; the rest is gradient accumulation."""

    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step and a TERM make one too."""

    evaluate_every: int = Field(default=50, ge=1)
    """Steps between evaluations on the held-out text."""

    data: DataSettings | None = Field(default=None, title="Data")
    """Other data for this step; empty means the retrain's. The evaluation set stays the retrain's."""


def default_steps() -> list[TrainingStep]:
    """Return the default job: two training steps, the second at a lower rate."""
    return [
        TrainingStep(name="pretrain", steps=100),
        TrainingStep(name="finetune", steps=30, learning_rate=1e-3, warmup_steps=4),
    ]


class ComputeSettings(Settings):
    """Where training runs."""

    ranks: int = Field(default=2, ge=1)
    """Processes on each machine; on GPUs, one a GPU."""

    nodes: int = Field(default=1, ge=1)
    """Machines to train on: this one, and others on which `python -m tasks.node STORE RUN` waits. All have the store
    at the same path."""

    rendezvous: Endpoint | None = None
    """With several nodes: `host:port` at which the other machines reach this one, say `10.0.0.5:29400`. Open the port
    to them alone: torchrun trusts whoever connects."""

    max_restarts: int = Field(default=0, ge=0)
    """How often a training job goes on by itself, from its newest checkpoint, when a signal killed a rank or a machine
    was lost. An error in the program is never tried again."""

    min_ranks: int | None = Field(default=None, ge=1)
    """Go on with the ranks that are left, but no fewer than this many on all machines together: the most of them that
    share the batch evenly. Empty means that as many as before start again."""

    gpu_slots: str | None = None
    """Name of a Prefect global concurrency limit of which training on GPUs takes a slot for each rank, waiting until
    they are free. Empty means that nobody counts."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA when there is one."""

    grace_seconds: float = Field(default=20.0, gt=0, le=300)
    """After TERM, ranks have this long to commit a checkpoint before they are killed; after four fifths of it they
    give up what is not committed by then."""

    async_save: bool = True
    """Train on while a checkpoint is written. It takes memory of the size of model and optimizer."""

    tensorboard: bool = False
    """Write losses, learning rate, gradient norm and speed for TensorBoard, to `<store>/<run>/tensorboard`."""

    trainer: Module = "tasks.worker"
    """The module that torchrun starts. Yours may replace it: it is given the path of a job file (JSON: store,
    run, start_step, end_step, parent, lineage, settings) and commits a checkpoint of end_step, with that lineage, to
    that store. The steps that it appends to `<store>/<run>/metrics.jsonl`, as `tasks.worker.step_log` says, are shown
    while it runs."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError(
                f"nodes is {self.nodes}, but rendezvous is empty; give host:port at which the other machines reach "
                "this one, or set nodes to 1"
            )
        if self.min_ranks is not None and not (self.max_restarts and self.min_ranks <= self.nodes * self.ranks):
            raise ValueError(
                f"min_ranks is {self.min_ranks}, with nodes {self.nodes}, ranks {self.ranks} and max_restarts "
                f"{self.max_restarts}; expected at most nodes * ranks, and max_restarts of 1 or more"
            )
        return self


def check_batches(steps: Sequence[TrainingStep], compute: ComputeSettings) -> None:
    """Refuse, before anything is done, steps whose batches the ranks cannot share.

    Raises:
        ArgumentError: which step's; it names the field.
    """
    ranks = compute.nodes * compute.ranks
    for number, step in enumerate(steps):
        if step.batch_size % ranks:
            raise ArgumentError(
                f"steps.{number}.batch_size: {step.batch_size} sequences cannot be shared by {ranks} ranks; expected a "
                f"multiple of {ranks}, say {ranks * max(1, round(step.batch_size / ranks))}"
            )


class ValidationSettings(Settings):
    """What a checkpoint must pass before it is converted."""

    max_heldout_loss: float | None = None
    """Refuse a checkpoint whose held-out loss (nats a token) is above this."""

    allow_nonfinite: bool = False
    """Accept NaN and Inf in the weights."""


class ExportSettings(Settings):
    """The Hugging Face safetensors directory that is made of a checkpoint."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Cast floating-point weights to this; empty keeps them bit for bit."""

    max_shard_megabytes: float = Field(default=5000.0, gt=0)
    """Largest size of one safetensors file (10^6 bytes)."""

    merge_adapter: bool = False
    """Add a LoRA adapter to the model's weights, instead of exporting it as an adapter."""

    dask_address: str | None = None
    """Scheduler of a Dask cluster whose workers write the files, say `tcp://10.0.0.5:8786`; store and export are then
    at the same paths or URLs on all its machines. Empty means processes of this machine."""


class PolicySettings(Settings):
    """When a new model takes the place of the one that is served, both measured on the same held-out data."""

    metric: Literal["heldout_loss", "perplexity", "bits_per_byte", "accuracy"] | None = None
    """What decides: loss in nats a token, its exponential, bits a byte of text, or the share of right next tokens.
    Empty means bits a byte for text, which any two tokenizers share, and the loss for tokens."""

    direction: Literal["lower", "higher"] | None = None
    """Which way is better; empty means the metric's own."""

    margin: float = Field(default=0.0, ge=0)
    """By how much the new model must be better, in the metric's unit."""


class HubSettings(Settings):
    """Where the release goes, and when it does. The token is never given here: see `token_block`."""

    repo_id: Repository = "local/stdlib-llama"
    """`owner/name` on the Hub; or a directory or bucket for releases, as an absolute path or a URL."""

    endpoint: str | None = None
    """The Hub's URL, say https://huggingface.co; empty means a local Hub server over `<store>/hub`."""

    token_block: str | None = None
    """Name of a Prefect Secret block that holds the Hub's token; empty means `HF_TOKEN` of the environment."""

    private: bool = False
    """Create the repository as private."""

    license: str | None = None
    """The model's licence, as the Hub abbreviates it."""

    card_template: str | None = None
    """Path of a Jinja2 template of your own for the model card; see `ckpt_core.hub.render_card`."""

    policy: PolicySettings = PolicySettings()
    """What decides between the new model and the one that is served."""

    on_worse: Literal["stop", "branch", "approve"] = "stop"
    """What becomes of a model that is not better: it stays here; it is uploaded to a branch of its own; or it is
    uploaded, and a person approves or rejects it on the flow run's page. One without a finite figure stays here."""

    approval_hours: float = Field(default=12.0, gt=0)
    """With `approve`: how long the flow run waits for that person; then the model is rejected."""


class Job(Settings):
    """What one training job is given, as a JSON file: all that a trainer needs to know of a retrain."""

    store: str
    """URL of the store; checkpoints go to `<store>/<run>/step_NNNNNNNNNN`."""

    run: Name
    """The lineage that the checkpoints belong to."""

    start_step: int = Field(ge=0)
    """Global step at which this job begins: 0, or that of the newest checkpoint when its retrain began."""

    parent: int | None = Field(default=None, ge=0)
    """Step of the checkpoint whose weights it starts from; empty means `start_step`, if that has a checkpoint."""

    end_step: int = Field(ge=1)
    """Global step at which this job is complete."""

    seed: int = Field(ge=0)
    """Seeds initial weights, dropout and the order of the data."""

    model: ModelSettings
    step: TrainingStep
    compute: ComputeSettings

    tokenizer: str
    """Directory of the tokenizer's files."""

    train_tokens: str
    """Directory of the prepared training tokens."""

    heldout_tokens: str
    """Directory of the prepared evaluation tokens."""

    lineage: dict[str, Any] = Field(default={})
    """Facts to record in each manifest, such as data fingerprints and the flow run's id."""

    @model_validator(mode="after")
    def _parent_lies_before(self) -> Self:
        if self.parent is not None and self.parent > self.start_step:
            raise ValueError(f"parent is step {self.parent}, but the job begins at step {self.start_step}")
        return self
