"""Take the pictures of the documentation: `python docs/screenshots.py`.

A Prefect server of its own, on a free port and in a temporary directory, sees two retrains of the small default model;
Chromium then looks at what they left. No process stays. Needs `pip install playwright`, and Chromium: the one at
`--chromium`, or else Playwright's own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = Path(__file__).with_name("images")
WIDTH, HEIGHT = 1280, 860
PATIENCE_S = 600
WELL_UNDER_WAY = 40
"""Percent of a training step that its picture shows at least."""
SETTLED_MS = 8000
"""How long a page is left alone before its picture, for graphs that move."""

EVENTS = ["ckpt.checkpoint.committed", "ckpt.training.progress", "ckpt.release.published"]
RETRAIN = "import json, sys; from flows.retrain import retrain; retrain(**json.loads(sys.argv[1]))"


@dataclass(frozen=True)
class Server:
    """A Prefect server, and the environment in which programs report to it."""

    url: str
    environment: dict[str, str]

    def ask(self, path: str, **question: Any) -> Any:
        """Ask the API for what a filter finds."""
        return httpx.post(f"{self.url}/api/{path}/filter", json=question, timeout=30).raise_for_status().json()

    def newest_run(self) -> dict[str, Any]:
        """Return the flow run that was started last."""
        [run] = self.ask(
            "flow_runs", flow_runs={"state": {"type": {"not_any_": ["SCHEDULED"]}}}, sort="START_TIME_DESC", limit=1
        )
        return run

    def artifacts(self, flow_run: str) -> dict[str, dict[str, Any]]:
        """Return the newest artifact of each key of a flow run."""
        found = self.ask("artifacts", artifacts={"flow_run_id": {"any_": [flow_run]}}, sort="CREATED_DESC")
        return {artifact["key"]: artifact for artifact in reversed(found) if artifact["key"]}


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=IMAGES, help="directory of the pictures")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser; empty means Playwright's own")
    options = parser.parse_args()
    options.images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ckptflow-") as directory, serving(Path(directory)) as server:
        deploy(server)
        with browser(options.chromium) as page:
            camera = Camera(server, page, options.images)
            assert retrain(server, Path(directory), steps=24).wait(PATIENCE_S) == 0
            training = retrain(server, Path(directory), steps=80)
            camera.of_a_training()
            assert training.wait(PATIENCE_S) == 0
            camera.of_what_is_left()


def deploy(server: Server) -> None:
    """Deploy the nightly retrain, to a work pool that nobody works for."""
    pool = {"name": "gpu", "type": "process", "base_job_template": {}}
    httpx.post(f"{server.url}/api/work_pools/", json=pool, timeout=30).raise_for_status()
    options = ["--no-prompt", "deploy", "--name", "retrain/nightly", "--prefect-file", "deployments/prefect.yaml"]
    assert run(server, [sys.executable, "-m", "prefect", *options], ROOT).wait(PATIENCE_S) == 0


def retrain(server: Server, directory: Path, *, steps: int) -> subprocess.Popen[bytes]:
    """Start a retrain of the small default model; its first training step takes `steps`."""
    pretrain = {"name": "pretrain", "steps": steps, "checkpoint_every": 40, "evaluate_every": 10}
    finetune = {"name": "finetune", "steps": 12, "learning_rate": 1e-3, "warmup_steps": 4, "evaluate_every": 6}
    parameters = {
        "store": str(directory / "runs"),
        "run": "stdlib-llama",
        "steps": [pretrain, finetune],
        "data": {"max_megabytes": 2.0},
    }
    return run(server, [sys.executable, "-c", RETRAIN, json.dumps(parameters)], directory)


def run(server: Server, command: list[str], directory: Path) -> subprocess.Popen[bytes]:
    """Start a program that reports to the server."""
    return subprocess.Popen(command, cwd=directory, env=server.environment)


@contextmanager
def serving(directory: Path) -> Iterator[Server]:
    """Run a server on a free port, with everything of its own in a directory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(directory / "prefect"),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (directory / "server.log").open("wb") as log:
        program = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            until(lambda: answers(f"{url}/api/health"))
            yield Server(url, environment)
        finally:
            os.killpg(program.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                program.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()


@contextmanager
def browser(chromium: str) -> Iterator[Page]:
    """Open a page in a browser without a window."""
    with sync_playwright() as playwright:
        chosen = {"executable_path": chromium} if chromium else {}
        opened = playwright.chromium.launch(args=["--no-sandbox"], **chosen)
        try:
            yield opened.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        finally:
            opened.close()


@dataclass(frozen=True)
class Camera:
    """Takes pictures of a server's pages."""

    server: Server
    page: Page
    images: Path

    def of_a_training(self) -> None:
        """Take the page of a flow run in the middle of its first training step."""
        before = self.server.newest_run()
        before = self.server.newest_run()["id"]
        until(lambda: self.server.newest_run()["id"] != before)
        flow_run = self.server.newest_run()["id"]
        until(lambda: self._is_well_under_way(flow_run))
        self._take("run-training", f"/runs/flow-run/{flow_run}", tab="Artifacts")
        self._take("curve", self._artifact(flow_run, "training"))

    def of_what_is_left(self) -> None:
        """Take the pages of a flow run that has ended, of its artifacts, of a form and of the events."""
        flow_run = self.server.newest_run()
        self._take("run", f"/runs/flow-run/{flow_run['id']}", tab="Task Runs")
        for kind, height in {"checkpoint": 1100, "validation": 700, "release": HEIGHT, "lineage": 1480}.items():
            self._take(kind, self._artifact(flow_run["id"], kind), height=height)
        [deployment] = self.server.ask("deployments")
        self._take("form", f"/deployments/deployment/{deployment['id']}/run", height=1300)
        self._take("events", f"/events?events={quote(json.dumps(EVENTS))}&seconds=-3600&rangeType=span", height=1100)

    def _is_well_under_way(self, flow_run: str) -> bool:
        found = self.server.artifacts(flow_run)
        return any(a["data"] >= WELL_UNDER_WAY for key, a in found.items() if key.startswith("progress-"))

    def _artifact(self, flow_run: str, kind: str) -> str:
        """Return the page of a flow run's first artifact of a kind, by key."""
        found = self.server.artifacts(flow_run)
        return f"/artifacts/artifact/{next(a['id'] for key, a in sorted(found.items()) if key.startswith(kind))}"

    def _take(self, name: str, path: str, *, tab: str = "", height: int = HEIGHT) -> None:
        self.page.set_viewport_size({"width": WIDTH, "height": height})
        self.page.goto(f"{self.server.url}/v2{path}")
        if tab:
            self.page.get_by_role("tab", name=tab, exact=True).click()
        self.page.wait_for_timeout(SETTLED_MS)
        self.page.screenshot(path=self.images / f"{name}.png")


def until(reached: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, f"not reached in {PATIENCE_S} s"
        time.sleep(0.5)


def answers(url: str) -> bool:
    """Whether a server does."""
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).is_success
    return False


if __name__ == "__main__":
    main()
