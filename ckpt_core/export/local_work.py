"""A conversion to a file system under way: a directory beside its target, which is kept when the process is killed.

.converting-<target>/
plan.json        what is to be made, of what: equal plans go on where the last one was killed
shards/          one JSON file a shard: a unit of work for any process
done/            what is to be known of each finished shard
export/          becomes the target, by one rename
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from ckpt_core import durable
from ckpt_core.errors import CommitError
from ckpt_core.export import scratch
from ckpt_core.export.scratch import PLAN_NAME
from ckpt_core.export.target import give_name
from ckpt_core.export.work import Work, write_unit


class LocalWork(Work):
    """A conversion to a directory."""

    def __init__(self, target: Path) -> None:
        self.target = self._directory = target
        self.root = target.with_name(f".converting-{target.name}")

    def held(self) -> AbstractContextManager[None]:
        """Keep others from converting to the same place meanwhile."""
        return scratch.held(self.root, self._directory)

    def shared(self) -> AbstractContextManager[None]:
        """Keep the conversion from being given up while a file is written."""
        return scratch.shared(self.root)

    def begin(
        self,
        plan: Mapping[str, Any],
        units: Mapping[str, bytes],
        files: Mapping[str, bytes],
        *,
        overwrite: bool,  # noqa: ARG002 - the target stays until `finish`
    ) -> None:
        """Prepare a conversion, or find the same one as it was left."""
        data = (json.dumps(plan, indent=1) + "\n").encode()
        if (self.root / "export").is_dir() and self._planned() == data:
            for part in self.root.glob("*.part"):
                part.unlink(missing_ok=True)
            return
        scratch.clear(self.root)
        for name in ("shards", "done", "export"):
            (self.root / name).mkdir()
        for name, content in units.items():
            durable.write_new(self.root / "shards" / name, content)
        for name, content in files.items():
            durable.make_parents(self.root / "export" / name)
            durable.write_new(self.root / "export" / name, content)
        durable.sync_tree(self.root)
        durable.replace(self.root / PLAN_NAME, data)

    @property
    def plan(self) -> dict[str, Any]:
        """What is to be made."""
        return json.loads(self._read(PLAN_NAME))

    @property
    def undone(self) -> list[str]:
        """Names of the files of weights that are still to be written."""
        return [name for name in self.plan["shards"] if not (self.root / "done" / name).exists()]

    def write(self, name: str, written: Callable[[int], None]) -> None:
        """Write one file of weights, unless that is done."""
        if (self.root / "done" / name).exists():
            return
        plan, unit = self.plan, self._read(f"shards/{name}")
        part = self.root / f"{name}.{uuid.uuid4().hex}.part"
        sink = durable.LocalSink(part)
        try:
            record = write_unit(sink, plan, unit, written)
            sink.seal()
        finally:
            sink.close()
        part.replace(self.root / "export" / name)
        durable.sync_directory(self.root / "export")
        with suppress(FileExistsError):
            durable.write_new(self.root / "done" / name, json.dumps(record).encode())

    def finish(self, record: tuple[str, bytes], *, overwrite: bool) -> None:
        """Write the export's record, and give the directory its name."""
        made = self.root / "export"
        durable.replace(self.root / record[0], record[1])
        (self.root / record[0]).replace(made / record[0])
        # Without a plan nothing goes on here: after the exchange `made` is the old export, which is not to come back.
        (self.root / PLAN_NAME).unlink()
        durable.sync_directory(self.root)
        give_name(made, self._directory, overwrite=overwrite)

    def remove(self) -> None:
        """Delete the directory of the work."""
        scratch.remove(self.root)

    def abandon(self) -> None:
        """Delete what any conversion to the same target left."""
        with self.held():
            self.remove()

    def done_record(self, name: str) -> bytes:
        """Return what is to be known of a finished file of weights, as JSON."""
        return self._read(f"done/{name}")

    def sizes(self) -> dict[str, int | None]:
        """Return the size of each file that was written, in bytes."""
        return {name: durable.file_size(self.root / "export" / name) for name in self.plan["shards"]}

    def _planned(self) -> bytes | None:
        path = self.root / PLAN_NAME
        return path.read_bytes() if path.is_file() else None

    def _read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            raise CommitError(
                f"{self.root / name}: gone; another conversion to the same place took over. Begin again."
            ) from None
