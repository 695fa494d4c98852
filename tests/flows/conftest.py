"""One temporary Prefect server for all tests of flows, with homes of its own; no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_retrain import TINY, commit_tiny, tiny_data, write_text
from temporary_server import temporary_server

from tasks.worker.prepare import prepare


@pytest.fixture(scope="session", autouse=True)
def homes(tmp_path_factory: pytest.TempPathFactory):
    """Keep every cache and setting of the user's out of the tests, and of the processes that they start."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home / "prefect"))
        patch.setenv("HF_HOME", str(home / "huggingface"))
        for name in ("HF_TOKEN", "HF_ENDPOINT", "PREFECT_API_URL", "PREFECT_PROFILE"):
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(scope="session")
def prefect_home(homes: Path, tmp_path_factory: pytest.TempPathFactory):
    """The home of the temporary server that every flow of this process reports to."""
    base = tmp_path_factory.getbasetemp()
    with temporary_server(homes, base, PREFECT_FLOWS_HEARTBEAT_FREQUENCY=None) as home:
        yield home


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a tokenizer for the tiny model."""
    root = tmp_path_factory.mktemp("tokenizer")
    return prepare(TINY, tiny_data(write_text(root / "text")), root / "prepared")["tokenizer"]


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: str) -> Path:
    """A committed step of a tiny model, fresh for each test: step 4 of the run `tiny` in `<tmp_path>/store`."""
    return commit_tiny(tmp_path / "store", tokenizer, step=4)
