"""Every kind of store keeps the contract: a directory, fsspec's memory, and S3 as a real HTTP server speaks it."""

import uuid

import pytest
from object_stores import s3_server  # noqa: F401 - a fixture

from ckpt_core.store import LocalStore, open_store
from ckpt_core.store.remote import RemoteStore
from ckpt_core.testing.store_contract import StoreContract


class TestLocalStore(StoreContract):
    """A directory."""

    @pytest.fixture
    def store(self, tmp_path):
        """An empty directory."""
        return LocalStore(tmp_path / "store")


class TestMemoryStore(StoreContract):
    """fsspec's memory."""

    @pytest.fixture
    def store(self):
        """A place of its own in the process's memory."""
        store = open_store(f"memory://{uuid.uuid4().hex}/store")
        assert isinstance(store, RemoteStore)
        yield store
        store.root.fs.rm(store.root.parent.path, recursive=True) if store.root.exists() else None


class TestS3Store(StoreContract):
    """S3 on loopback."""

    @pytest.fixture
    def store(self, s3_server):  # noqa: F811 - the fixture
        """A bucket of its own."""
        store = open_store(f"{s3_server.new_bucket()}/some/store")
        assert isinstance(store, RemoteStore)
        return store
