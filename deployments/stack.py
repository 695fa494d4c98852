"""`python -m deployments.stack up`: a Prefect server with a login, workers, and all deployments, on this machine.

Safe to repeat: what runs is left running, what has died is started, what is there is updated in place.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ckpt_core.locks import EXCLUSIVE, locked
from deployments import local, profile
from deployments.profile import HEARTBEAT_S, Stack

CRASHED_AFTER_S = 10 * HEARTBEAT_S


def main(arguments: list[str]) -> int:
    """Run a command; print what a person needs to know."""
    options = _parser().parse_args(arguments)
    stack = profile.find(getattr(options, "port", None))
    try:
        with locked(stack.home, EXCLUSIVE):
            return _COMMANDS[options.command](stack, options)
    except local.StackError as error:
        print(f"{options.command} failed: {error}", file=sys.stderr)  # noqa: T201
        return 1


def count_gpus(devices: Path = Path("/dev")) -> int:
    """Return the number of NVIDIA GPUs of this machine, or of this container."""
    return sum(re.fullmatch(r"nvidia[0-9]+", device.name) is not None for device in devices.iterdir())


def _up(stack: Stack, options: argparse.Namespace) -> int:
    local.up(stack, options.gpus, options.crashed_after)
    _say(
        f"Prefect is at {stack.url}; it asks for the login in {stack.login_file}.",
        f"Server and workers log to {stack.home}; {options.gpus} GPUs are shared out.",
        "",
        f"  prefect profile use {profile.NAME}            # your prefect command talks to it from then on",
        "  prefect deployment run retrain/nightly  # or wait for the night",
        "  python -m deployments.stack down        # stops it; up starts it again",
    )
    return 0


def _apply(stack: Stack, options: argparse.Namespace) -> int:
    local.apply(stack, options.gpus, options.crashed_after)
    _say(f"{stack.url}: pools, limits, automations and deployments are set up; {options.gpus} GPUs are shared out.")
    return 0


def _profile(stack: Stack, options: argparse.Namespace) -> int:  # noqa: ARG001 - as the others
    profile.save(stack)
    _say(f"The profile {profile.NAME} names {stack.url}, and the login in {stack.login_file}.")
    return 0


def _status(stack: Stack, options: argparse.Namespace) -> int:  # noqa: ARG001 - as the others
    running = {program.name: program.pid for program in local.programs(stack)}
    answers = local.healthy(stack)
    _say(
        *(f"{name:12} {'not running' if pid is None else f'running, pid {pid}'}" for name, pid in running.items()),
        f"{stack.url} {'answers' if answers else 'does not answer'}",
    )
    return 0 if answers and None not in running.values() else 1


def _down(stack: Stack, options: argparse.Namespace) -> int:  # noqa: ARG001 - as the others
    killed = local.down(stack)
    _say(f"Stopped; {', '.join(killed)} had to be killed." if killed else "Stopped.")
    return 0


def _say(*lines: str) -> None:
    print(*lines, sep="\n")  # noqa: T201


_COMMANDS = {"up": _up, "apply": _apply, "profile": _profile, "status": _status, "down": _down}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deployments.stack", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    port = argparse.ArgumentParser(add_help=False)
    port.add_argument("--port", type=int, help="of the server; default: the last one's, at first 4200")
    setup = argparse.ArgumentParser(add_help=False)
    setup.add_argument("--gpus", type=int, default=count_gpus(), help="slots of the limit `gpu`; default: those here")
    setup.add_argument(
        "--crashed-after",
        type=_seconds,
        default=CRASHED_AFTER_S,
        metavar="SECONDS",
        help=f"without a heartbeat, one every {HEARTBEAT_S} s, until a flow run is crashed; default: {CRASHED_AFTER_S}",
    )
    commands.add_parser("up", parents=[port, setup], help="start what does not run, and set all of it up")
    commands.add_parser("apply", parents=[setup], help="set up a server that something else has started")
    commands.add_parser("profile", parents=[port], help="write the profile that server and workers start with")
    commands.add_parser("status", help="tell what runs; exit status 1 if not all does")
    commands.add_parser("down", help="stop what up started")
    return parser


def _seconds(text: str) -> int:
    if not text.isdigit() or int(text) < 2 * HEARTBEAT_S:
        raise argparse.ArgumentTypeError(f"{text}: at least two heartbeats, {2 * HEARTBEAT_S}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
