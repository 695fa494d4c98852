"""A conversion to an object store under way, where nothing can be renamed or locked.

<target>/<file>                   each sent as a whole; `export.json`, sent last, makes them an export
.converting-<target>/plan.json    what is to be made: equal plans go on where the last one was killed; see `begun`
.converting-<target>/<id>/shards/, done/    as in `local_work`
.converting-<target>/<id>/export/ the files, where the target holds an export that they are to replace
.converting-<target>/notes/       who is at it; see `note`

What is to be replaced stays until the new export is complete. Then `plan.json` says so, and the files are copied to the
target within the store; whoever converts to the same target after a kill first completes that.

Who writes leaves a note, and then reads the plan; who begins another conversion marks the plan as given up, and then
looks for notes. Whatever the order of these four, a writer that finds the plan is found. Equal plans lead to equal
bytes, so those who follow them need not wait for each other.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_core.durable import RemoteSink
from ckpt_core.errors import CommitError, ExportExistsError
from ckpt_core.export.begun import Begun, plan_key, read_begun, records_beside, write_begun
from ckpt_core.export.carried import EXPORT_NAME
from ckpt_core.export.note import Note, check_alone, noted
from ckpt_core.export.scratch import PLAN_NAME
from ckpt_core.export.uploads import abort_uploads
from ckpt_core.export.work import Work, write_unit
from ckpt_core.store import objects

if TYPE_CHECKING:
    from upath import UPath

_NOTES = "notes"


class RemoteWork(Work):
    """A conversion to a directory of objects. An instance is about one conversion: the first that it began or found."""

    def __init__(self, target: UPath) -> None:
        self.target = self._place = target
        self.root = records_beside(target)
        self._mine: Begun | None = None

    def begin(
        self, plan: Mapping[str, Any], units: Mapping[str, bytes], files: Mapping[str, bytes], *, overwrite: bool
    ) -> None:
        """Prepare a conversion, or find the same one as it was left."""
        wanted: dict[str, Any] = json.loads(json.dumps(plan))
        with noted(self.root / _NOTES, plan_key(wanted)):
            found = read_begun(self._place)
            if found is not None and found.replacing:
                check_alone(self.root / _NOTES, plan_key(wanted))
                self._replace(found)
                found = None
            if found is not None and not found.given_up and found.plan == wanted and self._owns_files(found):
                self._mine = found
            else:
                self._clear_for(wanted, found)
                apart = overwrite and bool(objects.sizes_below(self._place))
                self._begin_anew(Begun(uuid.uuid4().hex, wanted, apart=apart), units)
            directory = self._files_of(self._current())
            for name, data in files.items():
                objects.write(directory / name, data)

    def _owns_files(self, found: Begun) -> bool:
        """Whether the files that a conversion wrote are still its own, and not those of an export at the target."""
        return found.apart or not self._is_export()

    def _clear_for(self, wanted: dict[str, Any], found: Begun | None) -> None:
        """Delete what another conversion left.

        Raises:
            CommitError: somebody is still at another conversion.
        """
        check_alone(self.root / _NOTES, plan_key(wanted))
        if found is not None:
            write_begun(self._place, replace(found, given_up=True))
            check_alone(self.root / _NOTES, plan_key(wanted))
            if self._owns_files(found):
                self._delete_files(found)
        self._delete_records(keep=(_NOTES, PLAN_NAME))

    def _begin_anew(self, begun: Begun, units: Mapping[str, bytes]) -> None:
        for name, data in units.items():
            objects.write(self._record(begun, "shards", name), data)
        write_begun(self._place, begun)  # from here on it is known whose the names at the target are
        self._mine = begun

    @property
    def plan(self) -> dict[str, Any]:
        """What is to be made."""
        return self._current().plan

    @property
    def undone(self) -> list[str]:
        """Names of the files of weights that are still to be written."""
        begun = self._current()
        done = set(objects.names_in(self.root / begun.id / "done"))
        return [name for name in begun.plan["shards"] if name not in done]

    def write(self, name: str, written: Callable[[int], None]) -> None:
        """Write one file of weights, unless that is done."""
        key = self._current().key
        with noted(self.root / _NOTES, key) as note:
            begun = self._current()  # once more: who takes over from here on sees the note
            done = self._record(begun, "done", name)
            if objects.exists(done):
                return
            record = self._send(begun, name, note, written)
            objects.write(done, json.dumps(record).encode())
            self._check_wanted(begun, name)

    def _send(self, begun: Begun, name: str, note: Note, written: Callable[[int], None]) -> dict[str, Any]:
        unit = self._read(self._record(begun, "shards", name))
        sink = _Sending(self._files_of(begun) / name, note)
        try:
            record = write_unit(sink, begun.plan, unit, written)
            sink.seal()
        finally:
            sink.close()
        return record

    def _check_wanted(self, begun: Begun, name: str) -> None:
        """Check that a file that was sent still belongs to a conversion, or an export; else delete it.

        Raises:
            CommitError: the conversion was finished or given up meanwhile.
        """
        found = read_begun(self._place)
        if found == begun:
            return
        objects.delete(self._record(begun, "done", name))
        if (found is None or found.given_up) and self._owns_files(begun):
            objects.delete(self._files_of(begun) / name)
        raise self._gone()

    def finish(self, record: tuple[str, bytes], *, overwrite: bool) -> None:
        """Write the export's record, and delete those of the conversion."""
        with noted(self.root / _NOTES, self._current().key):
            begun = self._current()  # once more: who takes over from here on sees the note
            if self._is_export() and not overwrite:
                raise ExportExistsError(
                    f"{self._place}: an export appeared while its content was being written; it was left alone."
                )
            objects.write(self._files_of(begun) / record[0], record[1])
            abort_uploads(self._files_of(begun), begun.plan["shards"])
            if begun.apart:
                begun = replace(begun, replacing=hashlib.sha256(record[1]).hexdigest())
                write_begun(self._place, begun)
                self._replace(begun)
            else:
                self._delete_records()

    def _replace(self, begun: Begun) -> None:
        """Copy an export that is complete to the target, in place of what is there; its record goes last.

        It can be done again after a stop at any point: the copies are deleted when the record is in place.
        """
        source, record = self._files_of(begun), self._place / EXPORT_NAME
        if _sha256(record) != begun.replacing:
            data = objects.read(source / EXPORT_NAME)
            objects.delete(record)  # from here on the target is no export, rather than half of one
            for name in sorted(begun.files):
                objects.copy(source / name, self._place / name)
            objects.delete_all(self._place, objects.sizes_below(self._place).keys() - begun.files)
            objects.write(record, data)
        self._delete_records()

    def remove(self) -> None:
        """Delete what this conversion left, if it is still the one to this target; a complete export is kept."""
        found = read_begun(self._place)
        if self._mine is None or found is None or found.id != self._mine.id:
            return
        if found.replacing:
            self._replace(found)
            return
        if self._owns_files(found):
            write_begun(self._place, replace(found, given_up=True))  # a late writer deletes what it sends
            self._delete_files(found)
        self._delete_records()

    def abandon(self) -> None:
        """Delete what any conversion to the same target left; who still writes a file of it deletes that."""
        self._mine = read_begun(self._place)
        self.remove()

    def done_record(self, name: str) -> bytes:
        """Return what is to be known of a finished file of weights, as JSON."""
        return self._read(self._record(self._current(), "done", name))

    def sizes(self) -> Mapping[str, int | None]:
        """Return the size of each file that was written, in bytes."""
        return objects.sizes_below(self._files_of(self._current()))

    def _current(self) -> Begun:
        found = read_begun(self._place)
        if found is None or found.given_up or found.replacing or (self._mine and self._mine.id != found.id):
            raise self._gone()
        self._mine = found
        return found

    def _gone(self) -> CommitError:
        return CommitError(
            f"{self.root}: gone; the conversion was finished or given up, or another one took over. Begin again."
        )

    def _is_export(self) -> bool:
        return objects.exists(self._place / EXPORT_NAME)

    def _record(self, begun: Begun, kind: str, name: str) -> UPath:
        return self.root / begun.id / kind / name

    def _read(self, place: UPath) -> bytes:
        try:
            return objects.read(place)
        except FileNotFoundError:
            raise self._gone() from None

    def _files_of(self, begun: Begun) -> UPath:
        """Return the directory that a conversion writes the export's files to."""
        return self.root / begun.id / "export" if begun.apart else self._place

    def _delete_files(self, begun: Begun) -> None:
        """Delete the export's files that a conversion wrote, and parts of them."""
        objects.delete_all(self._files_of(begun), begun.files)
        abort_uploads(self._files_of(begun), begun.files)

    def _delete_records(self, *, keep: tuple[str, ...] = ()) -> None:
        names = objects.sizes_below(self.root)
        objects.delete_all(self.root, [name for name in names if name.partition("/")[0] not in {PLAN_NAME, *keep}])
        if PLAN_NAME not in keep:
            objects.delete(self.root / PLAN_NAME)  # last: what a kill leaves is found by it


def _sha256(place: UPath) -> str | None:
    """Return the digest of an object; None if there is none."""
    return hashlib.sha256(objects.read(place)).hexdigest() if objects.exists(place) else None


class _Sending:
    """A new object whose sender's note is renewed; errors of the network are OSErrors."""

    def __init__(self, place: UPath, note: Note) -> None:
        self._place, self._note = place, note
        with objects.plain_errors(place):
            self._sink = RemoteSink(place, replace=True)

    def write(self, data: memoryview) -> None:
        """Append all of `data`."""
        self._note.renew()
        try:
            with objects.plain_errors(self._place):
                self._sink.write(data)
        except FileNotFoundError:  # the upload was aborted
            self._note.check()
            raise

    def seal(self) -> None:
        """Send the rest, if nobody else may have begun another conversion."""
        self._note.check()
        with objects.plain_errors(self._place):
            self._sink.seal()

    def close(self) -> None:
        """Forget what was not sealed."""
        self._sink.close()
