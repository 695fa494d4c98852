"""A bucket on loopback: moto's server."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from ckpt_core import durable
from ckpt_core.urls import place_of


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket on loopback, which other processes reach by their environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    s3 = fsspec.get_filesystem_class("s3")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3.clear_instance_cache()
        name = f"exports-{uuid.uuid4().hex}"  # servers in one process have the same buckets
        fsspec.filesystem("s3").mkdir(name)
        yield f"s3://{name}"
        s3.clear_instance_cache()
    server.stop()


def contents(url: str) -> dict[str, bytes]:
    """Return the bytes of each file below a directory, by its path there."""
    return {name: place.read_bytes() for name, place in durable.files_below(place_of(url))}
