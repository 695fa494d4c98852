"""The stack's settings: a Prefect profile of its own, so that server, workers and a person's command read the same.

It is in `<PREFECT_HOME>/profiles.toml`, among the user's own. What else is the stack's (login, database, pid files,
logs) lies in `<PREFECT_HOME>/ckptflow/`.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.settings import get_current_settings
from prefect.settings.profiles import load_profiles, save_profiles

NAME = "ckptflow"
HOST = "127.0.0.1"
DEFAULT_PORT = 4200
HEARTBEAT_S = 30
"""How often a flow run says that it lives: the least that Prefect takes."""

_DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
_PRIVATE = 0o600


@dataclass(frozen=True)
class Stack:
    """A stack on this machine."""

    home: Path
    """The directory of what is its own."""

    port: int
    login: str = field(repr=False)
    """What the server asks for, `user:password`."""

    @property
    def url(self) -> str:
        """Where the UI is."""
        return f"http://{HOST}:{self.port}"

    @property
    def api_url(self) -> str:
        """Where the API is."""
        return f"{self.url}/api"

    @property
    def login_file(self) -> Path:
        """The file that holds the login, which only its owner may read."""
        return self.home / "login"

    def settings(self) -> dict[str, str]:
        """Return what the profile says, by the names of Prefect's settings."""
        return {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_API_AUTH_STRING": self.login,
            "PREFECT_SERVER_API_AUTH_STRING": self.login,
            "PREFECT_SERVER_API_HOST": HOST,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"{self.url},http://localhost:{self.port}",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # in memory, a server that starts again would hold every slot for ever, and end who holds one
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            # 2, 4, ... 128 s apart: a flow that ends while the server is away for some minutes tells it then
            "PREFECT_CLIENT_MAX_RETRIES": "7",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
            # not a minute: a server that was down together with its flows would wait for their heartbeats no more
            "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P7D",
        }


def find(port: int | None = None) -> Stack:
    """Return this user's stack, as its profile describes it or, before there is one, as it will be.

    Args:
        port: another port than that of the profile.
    """
    home = get_current_settings().home / NAME
    home.mkdir(parents=True, exist_ok=True)
    return Stack(home, port or _port() or DEFAULT_PORT, _login(home / "login"))


def save(stack: Stack) -> dict[str, str]:
    """Write the profile; what a person has added to it stays. Return all of it, by the names of Prefect's settings.

    The user's active profile stays what it is.
    """
    profiles, path = load_profiles(), get_current_settings().profiles_path
    database = {} if _DATABASE in _saved() else {_DATABASE: f"sqlite+aiosqlite:///{stack.home / 'prefect.db'}"}
    settings: dict[Any, str] = {**database, **stack.settings()}
    profile = profiles.update_profile(NAME, settings, source=path)
    if path.exists():
        path.chmod(_PRIVATE)
    save_profiles(profiles)
    return profile.to_environment_variables()


def environment(stack: Stack) -> dict[str, str]:
    """Write the profile, and return the environment of the stack's programs: nothing in this one overrides it."""
    others = {name: value for name, value in os.environ.items() if name != "PREFECT_API_KEY"}  # of Prefect Cloud
    return {**others, **save(stack), "PREFECT_PROFILE": NAME}


def _saved() -> dict[str, str]:
    """Return the profile as it was written; nothing if it was not."""
    profiles = load_profiles()
    return profiles[NAME].to_environment_variables() if NAME in profiles.names else {}


def _port() -> int | None:
    """Return the port that the profile names."""
    port = _saved().get("PREFECT_SERVER_API_PORT")
    return None if port is None else int(port)


def _login(path: Path) -> str:
    """Return the login that a file holds, which is made if there is none."""
    with suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
        with os.fdopen(handle, "w") as file:
            file.write(f"{NAME}:{secrets.token_urlsafe(24)}\n")
    return path.read_text().strip()
