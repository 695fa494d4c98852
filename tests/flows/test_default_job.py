"""The default job, as a user runs it: no setting, no server, no account; what it prints works as printed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest

pytestmark = pytest.mark.timeout(900)
STARTUP = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
"""Which this process sets when it imports flows; a user's shell does not."""
LOSSES = re.compile(
    r"loss +(?P<before>[\d.]+) before, (?P<after>[\d.]+) after \(held-out, nats a token\)\n"
    r" +(?P<untrained>[\d.]+) untrained, (?P<unigram>[\d.]+) unigram baseline\n"
)
LOADING = re.compile(
    r"load it from the export:\n(?P<export>(?:  .*\n)+)"
    r"or from the Hub, by name:\n  (?P<serve>.* hub serve .* --port (?P<port>\d+))\n"
    r"  (?P<python>HF_ENDPOINT=.*)\n(?P<hub>(?:  .*\n)+)"
)
GENERATE = """
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({repo}, revision={tag})
prompt = tokenizer("def main(", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
print(answer.shape[1] - prompt["input_ids"].shape[1], "tokens:", tokenizer.decode(answer[0]))
"""


@dataclass(frozen=True)
class Finished:
    """The default job after its end: where it ran, with which homes, and what it printed."""

    directory: Path
    printed: str

    def shell(self, home: str) -> dict[str, str]:
        """Return the environment of a new shell whose Hugging Face cache is empty and which finds no network."""
        names = ("HF_TOKEN", "HF_ENDPOINT", "PREFECT_API_URL", "PREFECT_PROFILE", "PYTHONPATH", STARTUP)
        plain = {name: value for name, value in os.environ.items() if name not in names}
        homes = {"HF_HOME": str(self.directory.parent / home), "PREFECT_HOME": str(self.directory.parent / "prefect")}
        return {**plain, **homes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Run it in an empty directory."""
    directory = tmp_path_factory.mktemp("default") / "work"
    directory.mkdir()
    command = [sys.executable, "-m", "flows.retrain"]
    environment = Finished(directory, "").shell("first home")
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return Finished(directory, done.stdout)


def test_it_learns(finished: Finished):
    """The held-out loss of the export is a nat below the untrained model's, and below the unigram baseline."""
    losses = LOSSES.search(finished.printed)
    assert losses is not None, finished.printed
    after = float(losses["after"])
    assert after <= float(losses["untrained"]) - 1.0
    assert after < float(losses["unigram"])
    assert float(losses["before"]) == pytest.approx(float(losses["untrained"]), abs=0.002)


def test_it_passes_its_checks_and_publishes_v1(finished: Finished):
    """Every check passes, the first release is v1, and checkpoint and Hub lie below the working directory."""
    assert len(re.findall(r"^pass  ", finished.printed, re.MULTILINE)) == 13
    assert "FAIL" not in finished.printed
    assert re.search(
        r"^release     published local/stdlib-llama v1, commit [0-9a-f]{12}$", finished.printed, re.MULTILINE
    )
    checkpoint = re.search(r"^checkpoint  (.*)$", finished.printed, re.MULTILINE)
    assert checkpoint is not None
    assert (finished.directory / "runs") in Path(checkpoint[1]).parents
    assert (Path(checkpoint[1]) / "manifest.json").is_file()


def test_the_export_loads_as_printed(finished: Finished):
    """The two lines of Python work in a new shell."""
    code = dedented(loading(finished)["export"]) + "print(type(model).__name__)\n"
    assert run_shell(f"{sys.executable}", code, finished, "second home") == "LlamaForCausalLM\n"


def test_the_release_loads_by_name_and_writes_text(finished: Finished):
    """The two lines of shell and the two of Python load the release by name, and it continues a text."""
    printed = loading(finished)
    port = int(printed["port"])
    if not is_free(port):
        port = free_port()
    serve, python = (printed[name].replace(printed["port"], str(port)) for name in ("serve", "python"))
    named = re.search(r'from_pretrained\(("[^"]+"), revision=("[^"]+")\)', printed["hub"])
    assert named is not None
    code = dedented(printed["hub"]) + GENERATE.format(repo=named[1], tag=named[2])
    with serving(serve, finished, f"http://127.0.0.1:{port}/api/models/{named[1][1:-1]}"):
        answer = run_shell(python, code, finished, "third home")
    assert re.match(r"\d+ tokens: def main\(.", answer, re.DOTALL), answer
    assert int(answer.split()[0]) > 0


def loading(finished: Finished) -> re.Match[str]:
    """Return the parts of the printed text that say how to load the model."""
    found = LOADING.search(finished.printed + "\n")
    assert found is not None, finished.printed
    return found


def dedented(lines: str) -> str:
    """Return lines as a person pastes them, without the two spaces before each."""
    return "".join(line[2:] for line in lines.splitlines(keepends=True))


def run_shell(line: str, code: str, finished: Finished, home: str) -> str:
    """Run a line in a new shell, type code into the program that it starts, and return what that prints."""
    done = subprocess.run(
        line,
        shell=True,
        input=code,
        cwd=finished.directory,
        env=finished.shell(home),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(line: str, finished: Finished, url: str) -> Iterator[None]:
    """Run a line in a shell in the background until the block ends; wait until `url` answers."""
    program = subprocess.Popen(
        line, shell=True, cwd=finished.directory, env=finished.shell("hub home"), start_new_session=True
    )
    try:
        for _ in range(240):
            with suppress(OSError), urlopen(url, timeout=5):
                break
            assert program.poll() is None, f"{line} has ended"
            time.sleep(0.25)
        yield
    finally:
        os.killpg(program.pid, signal.SIGINT)
        program.wait(timeout=60)


def is_free(port: int) -> bool:
    """Return whether nobody listens on a port of this machine's."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    """Return a port of this machine's that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
