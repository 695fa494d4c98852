"""torchrun for one machine, with a pipe for each rank's output and a report of the ranks that failed.

Started by `tasks.torchrun`, as a file:

    python -P agent.py --directory D --ranks N --run-id ID --grace-s S MODULE ARGS...

D holds a FIFO for each rank, `rank_0` and so on, for its standard output and error; D/failures.json is written when
ranks fail, in the order in which torchrun saw them: `[{"rank": 1, "code": -9}, ...]`.
"""

import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


class PipeLogs(LogsSpecs):
    """Tells torchrun to open the ranks' pipes where it would open log files."""

    def __init__(self, directory: Path) -> None:
        super().__init__(log_dir=str(directory))
        self._directory = directory

    @property
    def root_log_dir(self) -> str:
        """The directory that holds the pipes."""
        return str(self._directory)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """One pipe a rank for both streams; no error files, because the last lines hold the traceback."""
        for env in envs.values():
            env["TORCHELASTIC_ERROR_FILE"] = ""
        pipes = {rank: str(self._directory / f"rank_{rank}") for rank in envs}
        return LogsDest(stdouts=pipes, stderrs=dict(pipes), error_files=dict.fromkeys(envs, os.devnull))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options above; all after MODULE belongs to it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--grace-s", type=float, required=True)
    parser.add_argument("module")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def launch(options: argparse.Namespace) -> None:
    """Run the ranks to their end."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.ranks,
        run_id=options.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port: jobs on one machine do not meet
        local_addr="localhost",  # the machine's own name need not resolve
        max_restarts=0,
        logs_specs=PipeLogs(options.directory),
        # The reaper ends the tree after the grace; torchrun's own clock must not be the faster one.
        shutdown_timeout=math.ceil(options.grace_s) + 1,
    )
    elastic_launch(config, sys.executable)("-u", "-m", options.module, *options.args)


def main() -> None:
    """Launch; end with 1 when ranks failed, and by the signal that stopped this process."""
    options = parse(sys.argv[1:])
    try:
        launch(options)
    except ChildFailedError as error:
        failures = [{"rank": rank, "code": failure.exitcode} for rank, failure in error.failures.items()]
        (options.directory / "failures.json").write_text(json.dumps(failures))
        sys.exit(1)
    except SignalException as stop:
        signal.signal(stop.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), stop.sigval)


if __name__ == "__main__":
    main()
