"""What the command of the stack takes, and what it writes before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deployments import stack


def test_gpus_are_counted_by_their_devices(tmp_path: Path):
    """`nvidia0` is one; the driver's other devices are none."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert stack.count_gpus(tmp_path) == 2


def test_a_missed_heartbeat_alone_crashes_nothing(capsys: pytest.CaptureFixture[str]):
    """Less than two heartbeats are refused, by the name of the option."""
    with pytest.raises(SystemExit):
        stack.main(["up", "--crashed-after", "30"])
    assert "--crashed-after: 30: at least two heartbeats, 60" in capsys.readouterr().err


def test_the_profile_keeps_what_a_person_set(tmp_path: Path):
    """The port of the last time, another database and the active profile stay; the login does too."""
    tables = (
        'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://elsewhere/api"\n'
        '[profiles.ckptflow]\nPREFECT_SERVER_API_PORT = "4999"\n'
        'PREFECT_SERVER_DATABASE_CONNECTION_URL = "postgresql+asyncpg://db/prefect"\n'
    )
    (tmp_path / "profiles.toml").write_text(tables)
    script = (
        "import json; from deployments import profile; stack = profile.find(); env = profile.environment(stack); "
        "from prefect.settings.profiles import load_profiles; "
        "print(json.dumps([env, profile.find().login == stack.login, load_profiles().active_name]))"
    )
    environment = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_KEY": "of the cloud", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    env, same, active = json.loads(done.stdout)
    assert (same, active) == (True, "mine")
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:4999/api"
    assert env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == "postgresql+asyncpg://db/prefect"
    assert env["PREFECT_PROFILE"] == "ckptflow"
    assert "PREFECT_API_KEY" not in env
    assert (tmp_path / "profiles.toml").stat().st_mode & 0o777 == 0o600


def test_an_automation_is_equal_to_itself_in_every_process():
    """Prefect keeps what it waits for as sets: compared in their order, an automation was updated for nothing."""
    code = (
        "import json; from deployments.automations import lost_heartbeats; from deployments.provision import facts; "
        "print(json.dumps(facts(lost_heartbeats(300))))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
