"""Datagrams: empty ones, cut ones, lost ones, and receivers that are full."""

from __future__ import annotations

import errno
import socket
from typing import Any

import asyncio_native as an
import pytest
from support import (
    WINE,
    datagram,
    drain,
    family_number,
    keep,
    nothing,
    one,
    pattern,
    settle,
    socket_path,
    stdlib_datagram,
)

#: Seen with the stdlib's _overlapped as well.
wine_stops_after_an_error = pytest.mark.skipif(
    WINE,
    reason="Wine 8: after its first refusal a datagram socket's pending receive ends with neither "
    "another refusal nor a datagram",
)


def connected(port: an.CompletionPort, family: str) -> tuple[an.AsyncSocket, socket.socket]:
    """A connected datagram socket and its stdlib peer."""
    peer = stdlib_datagram(family)
    sock, address = datagram(port, family)
    sock.connect(peer.getsockname())
    one(port).result()
    peer.connect(address)
    return sock, peer


def refused_datagrams(port: an.CompletionPort, family: str) -> tuple[an.AsyncSocket, Any]:
    """A datagram socket that is connected to a port that nobody has any more."""
    with socket.socket(family_number(family), socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1" if family == "ipv4" else "::1", 0))
        address = gone.getsockname()
        sock, _ = datagram(port, family)
        sock.connect(address)
        one(port).result()
    return sock, address


@pytest.mark.parametrize("way", ["one-shot", "multishot"])
def test_an_empty_datagram_is_data_and_not_an_end(
    port: an.CompletionPort, family: str, way: str
) -> None:
    sock, peer = connected(port, family)
    with sock:
        multishot = way == "multishot"
        operation = sock.recv(multishot=multishot)
        for message in (b"", b"one", b"", b"", b"two", b""):
            peer.send(message)
            completion = one(port)
            assert completion.operation is operation
            assert (completion.error, completion.data) == (0, message)
            assert completion.more == multishot
            if not multishot:
                operation = sock.recv()
        assert operation.pending


@pytest.mark.parametrize("way", ["one-shot", "multishot"])
def test_an_empty_datagram_has_its_sender_and_the_next_one_comes(
    port: an.CompletionPort, family: str, way: str
) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    with sock:
        multishot = way == "multishot"
        sock.recvfrom(multishot=multishot)
        for message in (b"", b"", b"data", b""):
            peer.sendto(message, address)
            completion = one(port)
            assert completion.result() == (message, peer.getsockname())
            assert not completion.truncated
            assert completion.more == multishot
            if not multishot:
                sock.recvfrom()


def test_empty_datagrams_that_arrived_at_once_are_each_received(
    port: an.CompletionPort, family: str
) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    with sock:
        for message in (b"", b"", b"x", b""):
            peer.sendto(message, address)
        sock.recvfrom(multishot=True)
        assert [c.data for c in drain(port, 4)] == [b"", b"", b"x", b""]


def test_an_empty_datagram_into_a_buffer_transfers_nothing_and_is_no_error(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = connected(port, family)
    with sock:
        buffer = bytearray(b"untouched")
        sock.recv_into(buffer)
        peer.send(b"")
        assert one(port).result() == 0
        sock.recvfrom_into(buffer)
        peer.send(b"")
        assert one(port).result() == (0, peer.getsockname())
        assert buffer == b"untouched"
        sock.recv_into(buffer)
        peer.send(b"data")
        assert one(port).result() == 4
        assert buffer == b"datauched"


def test_empty_datagrams_are_sent(port: an.CompletionPort, family: str) -> None:
    sock, peer = connected(port, family)
    other, _ = datagram(port, family)
    receiver = stdlib_datagram(family)
    with sock, other:
        sock.send(b"")
        assert one(port).result() == 0
        assert peer.recv(100) == b""
        sock.send(b"", quiet=True)
        assert peer.recv(100) == b""
        other.sendto(b"", receiver.getsockname())
        assert one(port).result() == 0
        assert receiver.recv(100) == b""


@pytest.mark.parametrize("way", ["recvfrom", "recvfrom_into", "recv", "recv_into", "multishot"])
def test_a_datagram_that_does_not_fit_is_cut_and_says_so_and_the_next_is_whole(
    port: an.CompletionPort, family: str, way: str
) -> None:
    sock, peer = connected(port, family)
    with sock:
        buffer = bytearray(8)
        if way == "multishot":
            sock.recvfrom(8, multishot=True)
        for message in (b"a" * 9, b"fits", b"b" * 5000, b"just fit", b"", b"c" * 100):
            peer.send(message)
            if way == "recvfrom":
                sock.recvfrom(8)
            elif way == "recvfrom_into":
                sock.recvfrom_into(buffer)
            elif way == "recv":
                sock.recv(8)
            elif way == "recv_into":
                sock.recv_into(buffer)
            completion = one(port)
            assert completion.error == 0
            got = bytes(buffer[: completion.transferred]) if "into" in way else completion.data
            assert got == message[:8]
            assert completion.truncated == (len(message) > 8)
        assert settle(port) == []


def test_a_large_datagram_comes_whole(port: an.CompletionPort, family: str) -> None:
    sock, peer = connected(port, family)
    with sock:
        message = pattern(60_000)
        sock.recv()
        peer.send(message)
        assert one(port).data == message
        sock.recvfrom(multishot=True)
        peer.send(message)
        completion = one(port)
        assert (completion.data, completion.truncated) == (message, False)


def test_a_datagram_too_long_fails_and_harms_nothing_behind_it(
    port: an.CompletionPort, inet: str
) -> None:
    sock, peer = connected(port, inet)
    with sock:
        operation = sock.send(bytes(70_000))
        completion = one(port)
        assert completion.operation is operation
        assert completion.error == errno.EMSGSIZE
        sock.send(bytes(70_000), quiet=True)
        completion = one(port)
        assert completion.operation is None
        assert completion.error == errno.EMSGSIZE
        sock.send(b"short enough")
        assert one(port).result() == 12
        assert peer.recv(100) == b"short enough"


@wine_stops_after_an_error
def test_a_connected_receive_to_a_closed_port_reports_the_refusal_and_stays_armed(
    port: an.CompletionPort, inet: str
) -> None:
    sock, address = refused_datagrams(port, inet)
    with sock:
        operation = sock.recv(multishot=True)
        for _ in range(3):
            sock.send(b"anyone?", quiet=True)
            completion = one(port)
            assert completion.operation is operation
            assert completion.error == errno.ECONNREFUSED
            assert completion.more
            with pytest.raises(ConnectionRefusedError):
                completion.result()
        peer = keep(socket.socket(family_number(inet), socket.SOCK_DGRAM))
        peer.bind(address)
        sock.send(b"and now?", quiet=True)
        assert peer.recv(100) == b"and now?"
        peer.sendto(b"here", sock.getsockname())
        completion = one(port)
        assert (completion.operation, completion.data, completion.more) == (
            operation,
            b"here",
            True,
        )


def test_a_refusal_completes_a_one_shot_receive_and_the_next_gets_data(
    port: an.CompletionPort, inet: str
) -> None:
    sock, address = refused_datagrams(port, inet)
    with sock:
        sock.recv()
        sock.send(b"anyone?", quiet=True)
        assert one(port).error == errno.ECONNREFUSED
        peer = keep(socket.socket(family_number(inet), socket.SOCK_DGRAM))
        peer.bind(address)
        sock.recv()
        peer.sendto(b"here", sock.getsockname())
        assert one(port).data == b"here"


def test_sends_to_a_closed_port_each_complete_once_and_later_ones_get_through(
    port: an.CompletionPort, inet: str
) -> None:
    """The refusal of one datagram is told by the next call, whichever that is."""
    sock, address = refused_datagrams(port, inet)
    with sock:
        operations = [sock.send(b"%d" % number) for number in range(20)]
        completions = drain(port, 20)
        assert [c.operation for c in completions] == operations
        assert {c.error for c in completions} <= {0, errno.ECONNREFUSED}
        assert settle(port) == []
        peer = keep(socket.socket(family_number(inet), socket.SOCK_DGRAM))
        peer.bind(address)
        for _ in range(2):  # the first may still tell of the last refusal
            sock.send(b"through")
            last = one(port)
        assert last.error == 0
        assert peer.recv(100) == b"through"


def test_an_unconnected_socket_goes_on_after_datagrams_to_a_closed_port(
    port: an.CompletionPort, inet: str
) -> None:
    refused, address = refused_datagrams(port, inet)
    sock, own_address = datagram(port, inet)
    peer = stdlib_datagram(inet)
    with refused, sock:
        operation = sock.recvfrom(multishot=True)
        for _ in range(10):
            sock.sendto(b"anyone?", address, quiet=True)
        nothing(port)
        peer.sendto(b"hello", own_address)
        completion = one(port)
        assert completion.operation is operation
        assert completion.result() == (b"hello", peer.getsockname())
        assert completion.more


def test_a_send_to_a_missing_unix_path_fails_and_the_next_gets_through(
    port: an.CompletionPort,
) -> None:
    sock, _ = datagram(port, "unix")
    peer = stdlib_datagram("unix")
    with sock:
        sock.sendto(b"nobody", socket_path())
        with pytest.raises(FileNotFoundError):
            one(port).result()
        sock.sendto(b"somebody", peer.getsockname(), quiet=True)
        assert peer.recv(100) == b"somebody"


@pytest.mark.parametrize("way", ["send", "sendto"])
def test_datagrams_to_a_full_unix_receiver_wait_and_all_arrive_in_order(
    port: an.CompletionPort, way: str
) -> None:
    """A full receiver is not writable for its sender, yet no event tells an unconnected one."""
    receiver = stdlib_datagram("unix")
    sock, _ = datagram(port, "unix")
    with sock:
        if way == "send":
            sock.connect(receiver.getsockname())
            one(port).result()
        count = 2000
        operations = [
            sock.send(b"%d" % number)
            if way == "send"
            else sock.sendto(b"%d" % number, receiver.getsockname())
            for number in range(count)
        ]
        completions = settle(port)
        assert len(completions) < count, "the receiver is not full"
        got: list[bytes] = []
        receiver.setblocking(False)

        def read_while_waiting(so_far: list[an.Completion]) -> bool:
            for _ in range(100):
                try:
                    got.append(receiver.recv(100))
                except BlockingIOError:
                    break
            return len(completions) + len(so_far) >= count

        completions += drain(port, read_while_waiting)
        read_while_waiting([])
        while len(got) < count:
            got.append(receiver.recv(100))
        assert got == [b"%d" % number for number in range(count)]
        assert [c.operation for c in completions] == operations
        assert {c.error for c in completions} == {0}
