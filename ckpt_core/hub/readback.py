"""Reading a commit back from the Hub and comparing every byte, by sha256, with what was to be published."""

import hashlib
import time
from collections.abc import Mapping

from ckpt_core.errors import HubContentError
from ckpt_core.hub.connection import Connection
from ckpt_core.hub.contents import Content

_ATTEMPTS = 3
_CHUNK_BYTES = 2**20


def read_back(hub: Connection, repo_id: str, commit: str, contents: Mapping[str, Content]) -> None:
    """Stream each file of the commit from the Hub; raises HubContentError at the first that is another one."""
    for path in sorted(contents):
        expected = contents[path]
        size, sha256 = _digest(hub, repo_id, commit, path)
        if (size, sha256) != (expected.size, expected.sha256):
            raise HubContentError(
                f"{hub.endpoint}/{repo_id} serves other bytes than were to be published: {path} at {commit} has {size}"
                f" bytes with sha256 {sha256}, expected {expected.size} with {expected.sha256}; no tag was set. If the"
                " file here still has the expected digest, the Hub's copy is damaged: delete it there and publish again"
            )


def _digest(hub: Connection, repo_id: str, commit: str, path: str) -> tuple[int, str]:
    """Return size in bytes and sha256 of a file as the Hub serves it; a broken transfer starts again."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import httpx

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _stream(hub, repo_id, commit, path)
        except EntryNotFoundError:
            break
        except httpx.TransportError:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(2**attempt)
    raise HubContentError(
        f"{hub.endpoint}/{repo_id}: {path} is not in commit {commit} though it was sent; no tag was set"
    )


def _stream(hub: Connection, repo_id: str, commit: str, path: str) -> tuple[int, str]:
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # pyright: ignore[reportUnknownVariableType] a bare dict in it

    url = hf_hub_url(repo_id, path, revision=commit, endpoint=hub.endpoint)
    # No compression: the digest is of the file's bytes. No cache: they are to come from where readers will get them.
    headers = {**build_hf_headers(token=hub.token), "Accept-Encoding": "identity", "Cache-Control": "no-cache"}
    size, digest = 0, hashlib.sha256()
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes(_CHUNK_BYTES):
            size += len(chunk)
            digest.update(chunk)
    return size, digest.hexdigest()
