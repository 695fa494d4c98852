"""Addresses of this machine: the one by which another machine reaches it, and the network interface that has it."""

import fcntl
import os
import socket
import struct

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
NAME_BYTES = 15


def address_towards(endpoint: str) -> str:
    """The IPv4 address of this machine on the way to `endpoint` (`host:port`), from the routing table; nothing is sent.

    Raises:
        OSError: the host has no address, or there is no way to it.
    """
    host, _, port = endpoint.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The name of the interface whose first IPv4 address this is; None where there is no such one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:NAME_BYTES])
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # it has none, or this is not Linux
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def socket_variables(address: str) -> dict[str, str]:
    """What tells gloo and NCCL to use the interface of `address`, but for what the environment says already.

    By themselves they take the one of the machine's own name, which often is a loopback that no other machine reaches.
    """
    name = interface_of(address)
    chosen = {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    return {variable: value for variable, value in chosen.items() if variable not in os.environ}
