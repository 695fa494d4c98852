"""Functions run by several gloo ranks, each in a process of its own, forked from one that has imported torch."""

import io
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "ckpt_core.native_checkpoint", "ckpt_core.commit"]
PRELOADED += ["ckpt_core.export", "transformers.models.llama.modeling_llama", "torch.distributed.device_mesh"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Outcome:
    """What a rank's function returned, or the names of its error's classes and its text."""

    value: Any = None
    errors: tuple[str, ...] = ()
    text: str = ""


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Outcome]:
    """Run `function(*arguments)` in `count` ranks of one gloo group; return each rank's outcome.

    Raises:
        TimeoutError: a rank did not end in time; all of them are killed.
    """
    with tempfile.TemporaryDirectory() as directory:
        started = [_start(rank, count, Path(directory), function, arguments) for rank in range(count)]
        try:
            return [_receive(connection, time.monotonic() + seconds) for _, connection in started]
        finally:
            for process, connection in started:
                process.kill()
                process.join()
                connection.close()


def attempt(function: Callable[..., Any], *arguments: Any, **named: Any) -> Outcome:
    """Return the outcome of a call, an error too."""
    try:
        return Outcome(function(*arguments, **named))
    except BaseException as error:  # noqa: BLE001 - the test looks at it
        return Outcome(errors=tuple(kind.__name__ for kind in type(error).__mro__), text=str(error))


def values(outcomes: list[Outcome]) -> list[Any]:
    """Return what the ranks returned; an error of any is this process's."""
    assert not any(outcome.errors for outcome in outcomes), outcomes
    return [outcome.value for outcome in outcomes]


def fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """Start `function(*arguments)` in one process without a group; return the process, which the caller ends."""
    process = _context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def _start(
    rank: int, count: int, directory: Path, function: Callable[..., Any], arguments: Any
) -> tuple[Any, Connection]:
    ours, theirs = _context.Pipe(duplex=False)
    process = fork(_run, rank, count, str(directory), function, arguments, theirs)
    theirs.close()
    return process, ours


def _receive(connection: Connection, deadline: float) -> Outcome:
    if not wait([connection], timeout=max(0.0, deadline - time.monotonic())):
        raise TimeoutError("a rank hangs")
    import torch

    return torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)


def _run(rank: int, count: int, directory: str, function: Callable[..., Any], arguments: Any, sink: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=30))
    dist.barrier()  # a rank that ends before the others are connected would break their start
    outcome = attempt(function, *arguments)
    buffer = io.BytesIO()
    torch.save(outcome, buffer)
    sink.send_bytes(buffer.getvalue())
    if dist.is_initialized():  # the function may have ended it
        dist.destroy_process_group()
