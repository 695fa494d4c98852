"""`python -m torch.distributed.run ... -m tasks.worker JOB.json`: one training rank.

Exit status: 0 the job is complete; 143 stopped by TERM (or Ctrl-C) after committing a checkpoint, start it again to
continue; 1 an error, told in the last line; 2 misuse.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ckpt_core.errors import ArgumentError, CkptError
from tasks.config import Job

if TYPE_CHECKING:
    from types import FrameType

_STOPPED = 128 + signal.SIGTERM


class StopRequest:
    """Remembers that this process was asked to stop; the loop looks at it between steps."""

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def __call__(self) -> bool:
        """Return whether a stop was requested."""
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._requested = True


def main(arguments: list[str]) -> int:
    """Train what the job file describes and return the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m torch.distributed.run ... -m tasks.worker JOB.json\n")
        return 2
    stop_requested = StopRequest()
    try:
        complete = _train(_read_job(Path(arguments[0])), stop_requested)
    except (CkptError, FloatingPointError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0 if complete else _STOPPED


def _train(job: Job, stop_requested: StopRequest) -> bool:
    # cuBLAS reads this when it starts; without it its sums depend on what else the GPU does.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from tasks.worker.loop import train
    from tasks.worker.place import join

    with join(job.compute.device) as place:
        return train(job, place, stop_requested)


def _read_job(path: Path) -> Job:
    try:
        return Job.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ArgumentError(f"{path}: not a training job: {faults}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
