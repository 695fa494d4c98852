"""Exports to publish, and callers of `ckpt_core.hub`: in a child process against a local Hub, or in this one."""

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
from base64 import b64decode

import numpy as np
from hub_child import child_environment_for
from safetensors.numpy import save

from ckpt_core import hub
from ckpt_core.testing.hub_repos import Repos
from ckpt_core.testing.hub_server import hub_server

REPO = "team/model"
WORKER = """
import base64, builtins, dataclasses, json, os, pickle, sys, traceback
from ckpt_core import hub
from ckpt_core.errors import CkptError, HubError
from ckpt_core.hub import connection, retries, xet
retries.FIRST_WAIT_S = 0.01
retries.LONGEST_WAIT_S = 0.05
connection.IDLE_SECONDS = float(os.environ.get("TEST_IDLE_SECONDS", connection.IDLE_SECONDS))
xet.SPARE_SECONDS = float(os.environ.get("TEST_XET_SECONDS", xet.SPARE_SECONDS))
xet.SLOWEST_BYTES_PER_SECOND = 10_000_000
opened = []
sys.addaudithook(lambda name, given: opened.append(str(given[0])) if name == "open" else None)
for line in sys.stdin:
    name, arguments, options = json.loads(line)
    opened.clear()
    try:
        if name == "promote" or name == "discard":
            arguments[1] = hub.Candidate(**json.loads(arguments[1]))
        result = getattr(hub, name)(*arguments, **options)
        answer = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result
        answer = {"result": answer, "opened": opened}
    except CkptError as error:
        assert not isinstance(error, HubError) or (error.__cause__ is None and error.__context__ is None)
        text = "".join(traceback.format_exception(error))
        answer = {"error": base64.b64encode(pickle.dumps(error)).decode(), "text": text}
    print(json.dumps(answer, default=str), flush=True)
"""


class Client:
    """Calls `ckpt_core.hub` in a child process, and remembers what the server was asked."""

    program = WORKER

    def __init__(self, tmp_path, environment=None, **options):
        self.tmp_path = tmp_path
        self.environment = environment or {}
        self.requests = []
        self.opened = []
        self.directory = tmp_path / "hub"
        self.on_request = lambda *_: None
        self.endpoint = ""
        self.log = None
        self._server = hub_server(self.directory, on_request=self._observe, **options)
        self._worker = None

    def __enter__(self):
        server = self._server.__enter__()
        self.endpoint, self.log = server.endpoint, server.requests
        return self

    def __exit__(self, *details):
        if self._worker:
            self._worker.communicate(timeout=60)
        self._server.__exit__(*details)

    def _observe(self, method, path, status):
        if path != "/api/agent-harnesses":  # the client asks this once where it finds itself run by some tools
            self.requests.append((method, path, status))
            self.on_request(method, path, status)

    def start_worker(self, **environment):
        """Start a process that calls what it is told to, line by line."""
        env = {**child_environment_for(self.endpoint, self.tmp_path / "home"), **self.environment, **environment}
        command = [sys.executable, "-c", self.program]
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call(self, name, *arguments, **options):
        """Return what the function returned as JSON, or raise the error that it raised there."""
        self._worker = self._worker or self.start_worker()
        self._worker.stdin.write(line_for(name, *arguments, **options))
        self._worker.stdin.flush()
        return self.result(self._worker.stdout.readline(), options.get("token"))

    def call_alone(self, environment, name, *arguments, **options):
        """Call a function in a process of its own, with more in its environment."""
        worker = self.start_worker(**environment)
        output = worker.communicate(line_for(name, *arguments, **options), timeout=60)[0]
        return self.result(output, environment.get("HF_TOKEN"))

    def result(self, line, token):
        """Read a worker's answer; an error in it must not hold the token."""
        answer = json.loads(line)
        if "error" in answer:
            pickled = b64decode(answer["error"])
            if token:
                assert token not in answer["text"]
                assert token.encode() not in pickled
            raise pickle.loads(pickled)
        self.opened = answer["opened"]
        return answer["result"]

    def publish(self, export, **options):
        """Publish an export to the one repository of these tests."""
        return self.call("publish", export, REPO, **options)

    def forget(self):
        """Begin anew: without a repository, requests or errands."""
        self.on_request = lambda *_: None
        if (self.directory / REPO).exists():
            Repos(self.directory).delete(REPO)
        self.requests.clear()
        self.log.clear()

    @property
    def repo(self):
        """The repository as it is on the server's disk."""
        return Repos(self.directory).get(REPO)

    def titles(self):
        """Return the titles of main's commits, newest first."""
        return [commit.title for commit in self.repo.history("main")]


class Here:
    """Calls `ckpt_core.hub` in this process, with answers as a `Client` has them."""

    def call(self, name, *arguments, **options):
        """Return what the function returned, as JSON."""
        if name in ("promote", "discard"):
            arguments = (arguments[0], hub.Candidate(**arguments[1]), *arguments[2:])
        result = getattr(hub, name)(*arguments, **options)
        return dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result


def line_for(name, *arguments, **options):
    """Return the line that tells a worker to call a function."""
    plain = [json.dumps(each) if isinstance(each, dict) else str(each) for each in arguments]
    return json.dumps([name, plain, options]) + "\n"


def weights(seed=0, count=2500):
    """Return a safetensors file with one tensor of `count` int32 numbers."""
    return save({"weight": np.random.default_rng(seed).integers(0, 2**31, count, dtype=np.int32)})


def model_files(seed=0):
    """Return the files of a small export: weights, a config, and an empty file."""
    return {"model.safetensors": weights(seed), "config.json": b'{"seed": %d}' % seed, "empty.txt": b""}


def sharded_files(seeds, count):
    """Return the files of an export with a shard for each seed, of `count` int32 numbers."""
    names = [f"model-{number + 1:05d}-of-{len(seeds):05d}.safetensors" for number in range(len(seeds))]
    files, owners = {}, {}
    for name, seed in zip(names, seeds, strict=True):
        tensor = f"weight.{name[6:11]}"
        numbers = np.random.default_rng(seed).integers(0, 2**31, count, dtype=np.int32)
        files[name], owners[tensor] = save({tensor: numbers}), name
    index = {"metadata": {"total_size": 4 * count * len(seeds)}, "weight_map": owners}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode(), "config.json": b"{}"}


def write_export(directory, files):
    """Write the files and the `export.json` that describes them; others that are there go."""
    directory.mkdir(exist_ok=True)
    for path in directory.rglob("*"):
        if path.is_file():
            path.unlink()
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = {"format_version": 1, "source": {"digest": "sha256:1"}, "files": entries, "rules": [], "libraries": {}}
    (directory / "export.json").write_text(json.dumps(manifest))
    return directory


def files_below(directory):
    """Return the bytes of each file of a copy of a release, but for what the Hub and its client add."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes() for name, path in found.items() if not name.startswith((".cache/", ".gitattributes"))
    }
