"""A child with a result, an error for people, or a crash."""

import os
import sys
from pathlib import Path

from ckpt_core.errors import DamagedError
from tasks.child import RESULT, child_main, write_result


def main() -> object:
    """Do what the first argument says."""
    kind, *words = sys.argv[1:]
    print("working", flush=True)
    match kind:
        case "good":
            return {"words": words, "loss": 0.5}
        case "damaged":
            raise DamagedError("step_0000000500: no manifest; delete the step")
        case "bad value":
            raise ValueError("rate is -1; expected more than 0")
        case "crash":
            raise KeyError("lost")
        case "killed after its result":
            write_result({"loss": 0.5})
            os.kill(os.getpid(), 9)
        case "broken":
            Path(os.environ[RESULT]).write_text("{")
    sys.exit(0)  # without a result


child_main(main)
