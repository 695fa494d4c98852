"""What tells of a conversion to an object store under way: `.converting-<target>/plan.json`, beside the target."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import DamagedError
from ckpt_core.export.scratch import PLAN_NAME
from ckpt_core.store import objects

if TYPE_CHECKING:
    from upath import UPath


@dataclass(frozen=True)
class Begun:
    """A conversion that was begun."""

    id: str
    """The directory of its records: no record of another conversion, or of one that was given up, is taken for its."""

    plan: dict[str, Any]
    """What is to be made."""

    given_up: bool = False
    """Whether its files are being deleted."""

    apart: bool = False
    """Whether its files go to its own directory first, as the target holds something that is to be replaced."""

    replacing: str = ""
    """The sha256 of the export's record, once the export is complete and being copied from there to the target."""

    @property
    def key(self) -> str:
        """The same for equal plans."""
        return plan_key(self.plan)

    @property
    def files(self) -> set[str]:
        """Names of the export's files, but for its record."""
        return {*self.plan["shards"], *self.plan["files"]}


def plan_key(plan: dict[str, Any]) -> str:
    """Return what is the same for equal plans."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:32]


def records_beside(target: UPath) -> UPath:
    """Return the directory of the records of a conversion to `target`."""
    return target.parent / f".converting-{target.name}"


def read_begun(target: UPath) -> Begun | None:
    """Return the conversion to `target` that was begun; None if there is none.

    Raises:
        DamagedError: what tells of it cannot be read.
    """
    place = records_beside(target) / PLAN_NAME
    try:
        return Begun(**json.loads(objects.read(place)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        raise DamagedError(f"{place}: not the plan of a conversion; delete it, and convert again.") from None


def write_begun(target: UPath, begun: Begun) -> None:
    """Tell of a conversion to `target`."""
    objects.write(records_beside(target) / PLAN_NAME, (json.dumps(asdict(begun), indent=1) + "\n").encode())
