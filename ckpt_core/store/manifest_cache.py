"""Cache of manifests in an object store, so that a run of hundreds of steps is listed with a few requests.

    <store>/<run>/.manifests.json   the manifests of many steps, each with the tag that the store gives its bytes

A manifest never changes, and the tag that a listing tells of it (S3's ETag) is that of its bytes. So a cached one is as
good as the object where the tags are equal, and is not used otherwise. The cache may be deleted at any time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ckpt_core.errors import DamagedError
from ckpt_core.format.manifest import MANIFEST_NAME, Manifest, parse_manifest
from ckpt_core.store import objects

if TYPE_CHECKING:
    from upath import UPath

NAME = ".manifests.json"
_WORTH_WRITING = 32
"""How many manifests have to be read one by one before the cache is written."""

_WORTH_READING = 8
_MAX_BYTES = 16 << 20
_log = logging.getLogger(__name__)


class ManifestCache:
    """The manifests of one run that are known, in this process and in the store."""

    def __init__(self, run: UPath) -> None:
        self._place = run / NAME
        self._known: dict[str, tuple[str, Manifest]] = {}

    def load(self, tags: Mapping[str, str], size: int | None) -> None:
        """Read the stored cache, if that saves requests.

        Args:
            tags: the tag of each step's manifest, by the step's name.
            size: the cache's size in bytes; None if there is none.
        """
        missing = [name for name, tag in tags.items() if self.find(name, tag) is None]
        if size is None or size > _MAX_BYTES or len(missing) < _WORTH_READING:
            return
        try:
            stored = cast("dict[str, tuple[str, Any]]", json.loads(objects.read(self._place, size)))
            for name in missing:
                if name in stored and stored[name][0] == tags[name]:
                    data = json.dumps(stored[name][1]).encode()
                    self.add(name, tags[name], parse_manifest(data, self._place.parent / name / MANIFEST_NAME))
        except (OSError, ValueError, TypeError, LookupError, RecursionError, DamagedError) as error:
            _log.info("%s: not used (%s)", self._place, error)

    def find(self, name: str, tag: str) -> Manifest | None:
        """Return the manifest of a step, if one with that tag is known."""
        known = self._known.get(name)
        return known[1] if known is not None and known[0] == tag else None

    def add(self, name: str, tag: str, manifest: Manifest) -> None:
        """Remember the manifest of a step."""
        self._known[name] = (tag, manifest)

    def save(self, tags: Mapping[str, str], read: int) -> None:
        """Store what is known of the steps that there are, if `read` manifests had to be read one by one.

        Whoever may not write there, or loses a race with another writer, only reads more the next time.
        """
        self._known = {name: known for name, known in self._known.items() if tags.get(name) == known[0]}
        if read < _WORTH_WRITING:
            return
        plain = {name: (tag, json.loads(manifest.to_bytes())) for name, (tag, manifest) in self._known.items()}
        data = json.dumps(plain).encode()
        if len(data) <= _MAX_BYTES:
            try:
                objects.write(self._place, data)
            except OSError as error:
                _log.info("%s: not written (%s)", self._place, error)
