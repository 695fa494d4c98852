"""Ranks that stay: processes of one gloo group that hold a state and run one operation after the other, timed."""

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")


class RankPool:
    """Some ranks, each with a state of its own; `run` has all of them do one operation at the same time.

    Args:
        count: how many.
        megabytes: of float32 in the whole state, in 10^6 bytes.
    """

    def __init__(self, count: int, megabytes: int) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(count):
            ours, theirs = _context.Pipe()
            arguments = (rank, count, self._directory.name, megabytes, theirs)
            process = _context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        self.nbytes = sum(self._answers())

    def run(self, operation: str, *arguments: Any) -> list[Any]:
        """Run the method `operation` of each rank's `State`; return what they return, in order of rank."""
        for end in self._ends:
            end.send((operation, arguments))
        return self._answers()

    def seconds(self, operation: str, *arguments: Any) -> float:
        """Run an operation; return how long the slowest rank took, from the moment at which all were ready."""
        return max(self.run("timed", operation, *arguments))

    def close(self) -> None:
        """End the ranks."""
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(30)
            process.kill()
        self._directory.cleanup()

    def _answers(self) -> list[Any]:
        answers = [end.recv() for end in self._ends]
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if errors:
            raise errors[0]
        return answers


def _serve(rank: int, count: int, directory: str, megabytes: int, end: Connection) -> None:
    import torch
    import torch.distributed as dist
    from operations import State

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": str(count)}  # the latter as torchrun does
    warnings.simplefilter("ignore")  # stock saving warns of its own
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(minutes=5))
    state = State(rank, count, megabytes)
    end.send(state.nbytes)
    while (request := end.recv()) is not None:
        operation, arguments = request
        try:
            end.send(getattr(state, operation)(*arguments))
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            end.send(RuntimeError(f"rank {rank}, {operation}: {error}\n{traceback.format_exc()}"))
    state.close()
    dist.destroy_process_group()


def timed(function: Any, *arguments: Any) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def files_in(*directories: Path) -> list[Path]:
    """Return all files below directories."""
    return sorted(path for directory in directories for path in directory.rglob("*") if path.is_file())
