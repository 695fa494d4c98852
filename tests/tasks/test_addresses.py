"""A machine knows the address that others reach it by, and which of its network interfaces that is."""

from __future__ import annotations

import socket

import pytest

from tasks.addresses import address_towards, interface_of, socket_variables


def test_the_way_to_this_machine_is_its_loopback():
    """Nothing has to listen there: only the routing table is asked."""
    assert address_towards("127.0.0.1:9") == "127.0.0.1"
    assert address_towards("localhost:9") == "127.0.0.1"


def test_a_host_without_an_address_is_an_error():
    """A name that cannot be resolved has no way to it."""
    with pytest.raises(OSError, match=r"."):
        address_towards("no-such-machine.invalid:9")


def test_an_address_belongs_to_one_interface():
    """The loopback's does to `lo`; one that is not of this machine to none."""
    assert interface_of("127.0.0.1") == dict(socket.if_nameindex())[1] == "lo"
    assert interface_of("192.0.2.1") is None


def test_gloo_and_nccl_take_that_interface_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    """What the environment says stands."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert socket_variables("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert socket_variables("192.0.2.1") == {}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert socket_variables("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}
