"""Guarantee 2: a misuse raises at the call, and nothing is in flight after it; what the network
does arrives as a completion."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from support import datagram, nothing, one, pair, pattern, read_exactly, refusing_address

ADDRESS = ("127.0.0.1", 9)

STREAM_CALLS: dict[str, Callable[[Any], Any]] = {
    "accept": lambda s: s.accept(),
    "accept multishot": lambda s: s.accept(multishot=True),
    "connect": lambda s: s.connect(ADDRESS),
    "recv": lambda s: s.recv(),
    "recv multishot": lambda s: s.recv(multishot=True),
    "recv_into": lambda s: s.recv_into(bytearray(1)),
    "send": lambda s: s.send(b"x"),
    "send quiet": lambda s: s.send(b"x", quiet=True),
    "sendv": lambda s: s.sendv([b"x"]),
    "sendv quiet": lambda s: s.sendv([b"x"], quiet=True),
    "disconnect": lambda s: s.disconnect(),
}
DATAGRAM_CALLS: dict[str, Callable[[Any], Any]] = {
    "recvfrom": lambda s: s.recvfrom(),
    "recvfrom multishot": lambda s: s.recvfrom(multishot=True),
    "recvfrom_into": lambda s: s.recvfrom_into(bytearray(1)),
    "sendto": lambda s: s.sendto(b"x", ADDRESS),
    "sendto quiet": lambda s: s.sendto(b"x", ADDRESS, quiet=True),
}
ALL_CALLS = STREAM_CALLS | DATAGRAM_CALLS


def fresh(name: str) -> an.AsyncSocket:
    kind = socket.SOCK_DGRAM if name in DATAGRAM_CALLS else socket.SOCK_STREAM
    return an.AsyncSocket(type=kind)


@pytest.mark.parametrize("name", ALL_CALLS)
def test_an_unassociated_socket_raises_value_error(name: str) -> None:
    with fresh(name) as sock, pytest.raises(ValueError, match="associat"):
        ALL_CALLS[name](sock)


@pytest.mark.parametrize("name", ALL_CALLS)
def test_a_closed_socket_raises_ebadf(port: an.CompletionPort, name: str) -> None:
    sock = fresh(name)
    port.associate(sock)
    sock.close()
    with pytest.raises(OSError) as caught:
        ALL_CALLS[name](sock)
    assert caught.value.errno == errno.EBADF
    assert not isinstance(caught.value, an.PortClosedError)
    assert port.in_flight == 0
    nothing(port)


@pytest.mark.parametrize("name", ALL_CALLS)
def test_a_socket_of_a_closed_port_raises_port_closed_error(backend: str, name: str) -> None:
    sock = fresh(name)
    with an.CompletionPort(backend) as port:
        port.associate(sock)
    with pytest.raises(an.PortClosedError):
        ALL_CALLS[name](sock)
    assert port.in_flight == 0


def test_sendfile_raises_likewise(port: an.CompletionPort, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with open(tmp_path / "file", "rb") as file:
        with an.AsyncSocket() as sock, pytest.raises(ValueError, match="associat"):
            sock.sendfile(file)
        sock = an.AsyncSocket()
        port.associate(sock)
        sock.close()
        with pytest.raises(OSError) as caught:
            sock.sendfile(file)
        assert caught.value.errno == errno.EBADF
    assert port.in_flight == 0


WRONG_TYPES: dict[str, Callable[[Any], Any]] = {
    "recv": lambda s: s.recv("1"),
    "recv_into read-only": lambda s: s.recv_into(b"1"),
    "recv_into no buffer": lambda s: s.recv_into(1),
    "send text": lambda s: s.send("text"),
    "send text quiet": lambda s: s.send("text", quiet=True),
    "sendv text": lambda s: s.sendv(["text"]),
    "sendv no iterable": lambda s: s.sendv(1),
    "connect": lambda s: s.connect("127.0.0.1"),
    "sendfile": lambda s: s.sendfile("name"),
}
WRONG_VALUES: dict[str, Callable[[Any], Any]] = {
    "recv 0": lambda s: s.recv(0),
    "recv negative": lambda s: s.recv(-1),
    "recv_into empty": lambda s: s.recv_into(bytearray()),
    "connect by name": lambda s: s.connect(("localhost", 80)),
    "connect out of range": lambda s: s.connect(("127.0.0.1", 65536)),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_wrong_type_raises_and_leaves_nothing_in_flight(
    port: an.CompletionPort, name: str
) -> None:
    sock, peer = pair(port)
    with pytest.raises(TypeError):
        WRONG_TYPES[name](sock)
    check_untouched(port, sock, peer)


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_value_out_of_range_raises_and_leaves_nothing_in_flight(
    port: an.CompletionPort, name: str
) -> None:
    sock, peer = pair(port)
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        WRONG_VALUES[name](sock)
    check_untouched(port, sock, peer)


def check_untouched(port: an.CompletionPort, sock: an.AsyncSocket, peer: socket.socket) -> None:
    assert port.in_flight == 0
    assert sock.cancel() == 0
    nothing(port)
    sock.recv()
    peer.sendall(b"all is well")
    assert one(port).data == b"all is well"
    sock.send(b"likewise")
    assert one(port).result() == 8
    assert read_exactly(peer, 8) == b"likewise"


@pytest.mark.parametrize("name", ["sendto no address", "sendto text", "recvfrom", "recvfrom_into"])
def test_wrong_types_on_datagrams_raise(port: an.CompletionPort, name: str) -> None:
    calls: dict[str, Callable[[Any], Any]] = {
        "sendto no address": lambda s: s.sendto(b"x", None),
        "sendto text": lambda s: s.sendto("x", ADDRESS),
        "recvfrom": lambda s: s.recvfrom("1"),
        "recvfrom_into": lambda s: s.recvfrom_into(b"x"),
    }
    sock, _ = datagram(port)
    with pytest.raises(TypeError):
        calls[name](sock)
    assert port.in_flight == 0
    nothing(port)


def test_a_buffer_is_free_again_after_a_misuse(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.close()
    buffer = bytearray(10)
    for call in (sock.recv_into, sock.send, lambda b: sock.sendv([b])):
        with pytest.raises(OSError):
            call(buffer)
    buffer.append(0)


def test_what_the_network_does_is_no_exception_at_the_call(port: an.CompletionPort) -> None:
    refused = an.AsyncSocket()
    port.associate(refused)
    refused.connect(refusing_address())
    assert one(port).error
    dead, peer = pair(port, "unix")
    peer.close()
    for data in (b"x", pattern(10_000)):
        dead.send(data)
        assert one(port).error == errno.EPIPE
        dead.sendv([data])
        assert one(port).error == errno.EPIPE


def test_many_misuses_leave_nothing_behind(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    for _ in range(2000):
        for call in WRONG_VALUES.values():
            try:
                call(sock)
            except ValueError:
                continue
            pytest.fail("did not raise")
    check_untouched(port, sock, peer)
