"""Connections between the hosts of a job, through which each learns when another ends or is lost.

They carry almost no data: TCP keepalive probes the other side and closes the connection within
seconds if a cable or a machine fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, sleep

from mixgrpo.hosts.job import Node

_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's address


class HostLost(ConnectionError):
    """A host did not connect, or no longer answers."""


@dataclass(frozen=True)
class HostEnded:
    """A host's command has ended.

    Attributes:
        exit_code: exit code of its command; None if the host was lost instead.
    """

    host: str
    exit_code: int | None
    why: str = ""


class Link:
    """This host's connections: from the first host to all others, or from this one to the first."""

    def __init__(self, peers: dict[str, socket.socket]) -> None:
        self.peers = peers

    def watch(self, report: Callable[[HostEnded], None]) -> None:
        """Reports once for every peer how it ended, from one thread per peer."""

        def follow(host: str, connection: socket.socket) -> None:
            report(_end_of(host, connection))

        for host, connection in self.peers.items():
            threading.Thread(target=follow, args=(host, connection), daemon=True).start()

    def tell(self, exit_code: int) -> None:
        """Sends the exit code of this host's command to all peers."""
        for connection in self.peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{exit_code}\n".encode())

    def interface(self) -> str | None:
        """The name of the network interface that leads to the other hosts."""
        address = next(iter(self.peers.values())).getsockname()[0].removeprefix("::ffff:")
        for _, name in socket.if_nameindex():
            if _address_of(name) == address:
                return name
        return None


class NotMet(Exception):
    """The job was stopped before all hosts had connected."""


def open_link(node: Node, is_asked: Callable[[], bool] = lambda: False) -> Link:
    """Connects to the other hosts.

    Args:
        is_asked: whether the job was asked to stop; called at least once per second.

    Raises:
        HostLost: not all of them connected in time; the message names those that did not.
        NotMet: ``is_asked`` returned True.
    """
    if node.rank == 0:
        return Link(_await_others(node, is_asked))
    first = node.hosts[0]
    connection = _connect(first, node, is_asked)
    connection.sendall(f"{_greeting(node, node.rank)}\n".encode())
    return Link({first: _kept_alive(connection, node.lost_after)})


def _await_others(node: Node, is_asked: Callable[[], bool]) -> dict[str, socket.socket]:
    awaited = {_greeting(node, rank): host for rank, host in enumerate(node.hosts) if rank}
    came: dict[str, socket.socket] = {}
    deadline = monotonic() + node.join_within
    with _server(node.port + 1) as server:
        while awaited and (left := deadline - monotonic()) > 0:
            _end_if(is_asked)
            server.settimeout(min(left, 1.0))
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                host = awaited.pop(_line(connection, 5), None)
                if host is None:
                    connection.close()
                else:
                    came[host] = _kept_alive(connection, node.lost_after)
    if awaited:
        raise HostLost(
            f"{', '.join(awaited.values())} did not connect to {node.host}:{node.port + 1} within "
            f"{node.join_within} s; if the host is running, a firewall blocks it: open the ports "
            "between the hosts"
        )
    return came


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _end_if(is_asked: Callable[[], bool]) -> None:
    if is_asked():
        raise NotMet


def _connect(first: str, node: Node, is_asked: Callable[[], bool]) -> socket.socket:
    deadline = monotonic() + node.join_within
    while True:
        _end_if(is_asked)
        try:
            return socket.create_connection((first, node.port + 1), timeout=5)
        except OSError as error:
            if monotonic() > deadline:
                raise HostLost(
                    f"{node.host} cannot reach {first}:{node.port + 1} ({error}): the name must "
                    "resolve to the same machine on every host, and the ports between the hosts "
                    "must be open"
                ) from error
        sleep(0.2)


def _greeting(node: Node, rank: int) -> str:
    return f"{node.job} {node.attempt} {rank}"


def _kept_alive(connection: socket.socket, lost_after: int) -> socket.socket:
    third = max(1, lost_after // 3)
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, third),
        (socket.TCP_KEEPINTVL, third),
        (socket.TCP_KEEPCNT, 2),
        (socket.TCP_USER_TIMEOUT, lost_after * 1000),  # for sent data that is not acknowledged
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _end_of(host: str, connection: socket.socket) -> HostEnded:
    try:
        line = _line(connection, None)
    except OSError as error:
        return HostEnded(host, None, error.strerror or str(error))
    if not line:
        return HostEnded(host, None, "its launcher ended without reporting an exit code")
    return HostEnded(host, int(line))


def _line(connection: socket.socket, timeout: float | None) -> str:
    connection.settimeout(timeout)
    received = b""
    while not received.endswith(b"\n"):
        more = connection.recv(64)
        if not more:
            return ""
        received += more
    return received.decode(errors="replace").strip()


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
        except OSError:  # no IPv4 address
            return None
