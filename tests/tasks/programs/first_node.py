"""The machine that runs the flow: runs the ranks of a job, of which others are on another machine."""

import sys
from pathlib import Path

from tasks.config import Job
from tasks.elastic import run_ranks

run_ranks(Job.model_validate_json(Path(sys.argv[1]).read_bytes()), lambda line: print(line, flush=True))
