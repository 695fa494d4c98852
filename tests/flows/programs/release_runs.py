"""Run flows of releases one after the other, in the environment that each is given.

Each line of standard input is a JSON object: `flow`, its `parameters`, and `environment`, where null unsets a name. The
answer is a line of JSON too: `name` and `message` of the final state.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from flows.publish import publish
from flows.rollback import rollback


@task
def tell(secret: str) -> str:
    """Return a secret, after it was told wherever a task can."""
    print(secret)
    get_run_logger().info("it is %s", secret)
    create_markdown_artifact(key="told", markdown=secret)
    emit_event("secret.told", resource={"prefect.resource.id": "secret"}, payload={"secret": secret})
    return secret


@flow
def give_away(secret: str) -> None:
    """Do with a secret all that must not be done."""
    raise ValueError(tell(secret))


FLOWS: dict[str, Any] = {"publish": publish, "rollback": rollback, "give_away": give_away}

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).with_name("hurried"))  # for the jobs; this process waits as ever
    for line in sys.stdin:
        order = json.loads(line)
        for name, value in order["environment"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        state = FLOWS[order["flow"]](**order["parameters"], return_state=True)
        print("\n" + json.dumps({"name": state.name, "message": str(state.message)}), flush=True)
