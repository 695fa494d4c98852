"""torchrun for this machine's share of a job, with a pipe for each rank's output and a report of how the job ended.

Started by `tasks.torchrun`:

    python -u -m tasks.agent --directory D --ranks N --run-id ID --grace-s S MODULE ARGS...

D holds a FIFO for each rank of this machine, `rank_0` and so on, for its standard output and error. The agent writes

    D/first_rank    the number that the first of them has among the ranks of all nodes, before any is started
    D/report.json   when ranks failed, in the order in which torchrun saw them: `{"failures": [{"rank": 1, "code":
                    -9}, ...]}`; when they were stopped for what happened elsewhere: `{"ended": "why"}`

Of several nodes (`--nodes`), the one that hosts the rendezvous is given `--host`; `--endpoint` is where it is for all,
and `--address` is this node's own, as the others see it. With `--fork` the ranks are forks of this process.
"""

import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tasks.forked_rank import fork_ranks
from tasks.rendezvous import BACKEND, EndedElsewhereError, close_all


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
        (self._directory / "first_rank").write_text(envs[0]["RANK"])
        pipes = {rank: str(self._directory / f"rank_{rank}") for rank in envs}
        return LogsDest(stdouts=pipes, stderrs=dict(pipes), error_files=dict.fromkeys(envs, os.devnull))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options above; all after MODULE belongs to it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--grace-s", type=float, required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--endpoint")
    parser.add_argument("--address")
    parser.add_argument("--wait-s", type=float, default=600.0)
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("module")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def meeting(options: argparse.Namespace) -> dict[str, Any]:
    """The part of torchrun's settings that says where agents meet."""
    if options.nodes == 1:
        # A free port: jobs on one machine do not meet. The machine's own name need not resolve.
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    waits = {"join_timeout": math.ceil(options.wait_s), "is_host": options.host}
    return {
        "rdzv_backend": BACKEND,
        "rdzv_endpoint": options.endpoint,
        "rdzv_configs": waits,
        "local_addr": options.address,
    }


def launch(options: argparse.Namespace) -> None:
    """Run the ranks to their end."""
    config = LaunchConfig(
        min_nodes=options.nodes,
        max_nodes=options.nodes,
        nproc_per_node=options.ranks,
        run_id=options.run_id,
        max_restarts=0,
        logs_specs=PipeLogs(options.directory),
        # The reaper ends the tree after the grace; torchrun's own clock must not be the faster one.
        shutdown_timeout=math.ceil(options.grace_s) + 1,
        **meeting(options),
    )
    elastic_launch(config, sys.executable)("-u", "-m", options.module, *options.args)


def main() -> None:
    """Launch; end with 1 when ranks failed or had to stop, and by the signal that stopped this process."""
    options = parse(sys.argv[1:])
    report = options.directory / "report.json"
    if options.fork:
        fork_ranks(options.ranks)
    try:
        launch(options)
    except ChildFailedError as error:
        failures = [{"rank": rank, "code": failure.exitcode} for rank, failure in error.failures.items()]
        report.write_text(json.dumps({"failures": failures}))
        sys.exit(1)
    except EndedElsewhereError as end:
        report.write_text(json.dumps({"ended": str(end)}))
        sys.exit(1)
    except SignalException as stop:
        close_all()
        signal.signal(stop.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), stop.sigval)


if __name__ == "__main__":
    main()
