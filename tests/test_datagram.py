"""Datagrams: recvfrom, recvfrom_into, sendto, and connected datagram sockets."""

from __future__ import annotations

import errno
import socket
import time
from typing import Any

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    WINE,
    cancelled,
    datagram,
    drain,
    family_number,
    keep,
    nothing,
    one,
    pair,
    settle,
    stdlib_datagram,
    why_not,
)

#: Seen with the stdlib's _overlapped as well.
wine_stops_after_an_error = pytest.mark.skipif(
    WINE,
    reason="Wine 8: after its first refusal a datagram socket's pending receive ends with neither "
    "another refusal nor a datagram",
)


def connected(port: an.CompletionPort, family: str = "ipv4") -> tuple[an.AsyncSocket, Any]:
    """A datagram socket and its stdlib peer, connected with each other."""
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    sock.connect(peer.getsockname())
    assert one(port).result() is None
    peer.connect(address)
    return sock, peer


def unreachable(port: an.CompletionPort) -> an.AsyncSocket:
    """A datagram socket, connected to an address where nobody is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = nobody.getsockname()
    sock, _ = datagram(port)
    sock.connect(address)
    assert one(port).result() is None
    return sock


def collect(
    port: an.CompletionPort, peer: socket.socket, count: int
) -> tuple[list[bytes], list[an.Completion]]:
    """Reads datagrams from the peer while the port works."""
    messages: list[bytes] = []
    completions: list[an.Completion] = []
    peer.setblocking(False)
    deadline = time.monotonic() + PATIENCE
    while len(messages) < count:
        assert time.monotonic() < deadline, f"{len(messages)} of {count} datagrams"
        try:
            messages.append(peer.recv(100))
        except BlockingIOError:
            completions += port.dequeue_many(timeout=0.01)
    return messages, completions


# -- receiving ------------------------------------------------------------------------------------


def test_recvfrom_brings_data_and_address(port: an.CompletionPort, family: str) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    operation = sock.recvfrom()
    nothing(port)
    peer.sendto(b"datagram", address)
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.RECVFROM
    assert completion.data == b"datagram"
    assert completion.transferred == 8
    assert completion.address == peer.getsockname()
    assert completion.truncated is False
    assert completion.more is False


def test_recvfrom_finds_what_came_before(port: an.CompletionPort, family: str) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    peer.sendto(b"early", address)
    sock.recvfrom()
    assert one(port).data == b"early"


def test_recvfrom_into_fills_the_callers_buffer(port: an.CompletionPort, family: str) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    buffer = bytearray(b"-" * 12)
    sock.recvfrom_into(buffer)
    peer.sendto(b"datagram", address)
    completion = one(port)
    assert completion.kind is an.RECVFROM
    assert completion.transferred == 8
    assert completion.data is None
    assert completion.address == peer.getsockname()
    assert completion.result() == (8, peer.getsockname())
    assert buffer == b"datagram----"


def test_an_empty_datagram_is_data(port: an.CompletionPort, family: str) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    sock.recvfrom(multishot=True)
    for message in (b"", b"x", b""):
        peer.sendto(message, address)
        completion = one(port)
        assert completion.data == message
        assert completion.error == 0
        assert completion.more
        assert completion.address == peer.getsockname()


def test_a_multishot_brings_each_datagram(port: an.CompletionPort, family: str) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    operation = sock.recvfrom(multishot=True)
    messages = [b"%d" % number * (number % 7) for number in range(50)]
    found: list[an.Completion] = []
    for start in range(0, 50, 5):  # a few at a time: an AF_UNIX queue holds about ten
        for message in messages[start : start + 5]:
            peer.sendto(message, address)
        found += drain(port, 5)
    assert [c.data for c in found] == messages
    assert all(c.more and c.operation is operation for c in found)
    operation.cancel()
    last = one(port)
    assert cancelled(last)
    assert not last.more


def test_datagrams_fill_receives_in_order(port: an.CompletionPort) -> None:
    sock, address = datagram(port)
    peer = stdlib_datagram()
    operations = [sock.recvfrom() for _ in range(5)]
    for number in range(5):
        peer.sendto(b"%d" % number, address)
    completions = drain(port, 5)
    assert [c.operation for c in completions] == operations
    assert [c.data for c in completions] == [b"0", b"1", b"2", b"3", b"4"]


def test_datagrams_from_many_peers_keep_their_addresses(port: an.CompletionPort) -> None:
    sock, address = datagram(port)
    sock.recvfrom(multishot=True)
    peers = [stdlib_datagram() for _ in range(20)]
    for peer in peers:
        peer.sendto(repr(peer.getsockname()).encode(), address)
    for completion in drain(port, 20):
        assert completion.data == repr(completion.address).encode()


def test_more_peers_than_anyone_remembers_each_get_their_own_answer(
    port: an.CompletionPort,
) -> None:
    sock, address = datagram(port)
    sock.recvfrom(multishot=True)
    first: list[tuple[socket.socket, Any]] = []
    for number in range(1500):
        peer = stdlib_datagram()
        peer.sendto(b"%d" % number, address)
        completion = one(port)
        assert (completion.data, completion.address) == (b"%d" % number, peer.getsockname())
        sock.sendto(b"%d" % number, completion.address, quiet=True)
        assert peer.recv(10) == b"%d" % number
        if number < 50:
            first.append((peer, completion.address))
        else:
            peer.close()
    for number, (peer, shown) in enumerate(first):
        sock.sendto(b"again %d" % number, shown, quiet=True)
        assert peer.recv(20) == b"again %d" % number


@pytest.mark.parametrize("multishot", [False, True])
def test_a_datagram_over_max_bytes_is_truncated(
    port: an.CompletionPort, family: str, multishot: bool
) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    sock.recvfrom(4, multishot=multishot)
    peer.sendto(b"datagram", address)
    completion = one(port)
    assert completion.data == b"data"
    assert completion.transferred == 4
    assert completion.truncated is True
    assert completion.error == 0
    assert completion.address == peer.getsockname()
    if not multishot:
        sock.recvfrom(4)
    peer.sendto(b"next", address)
    completion = one(port)
    assert completion.data == b"next", "the rest of the first is gone"
    assert completion.truncated is False


@pytest.mark.parametrize("spare", [0, 1])
def test_a_datagram_that_just_fits_is_not_truncated(
    port: an.CompletionPort, family: str, spare: int
) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    sock.recvfrom(8 + spare)
    peer.sendto(b"datagram", address)
    completion = one(port)
    assert (completion.data, completion.truncated) == (b"datagram", False)


def test_a_datagram_over_the_buffer_is_truncated(port: an.CompletionPort, family: str) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    buffer = bytearray(4)
    sock.recvfrom_into(buffer)
    peer.sendto(b"datagram", address)
    completion = one(port)
    assert completion.transferred == 4
    assert completion.truncated
    assert buffer == b"data"


def test_recv_on_a_connected_datagram_socket_tells_truncation(port: an.CompletionPort) -> None:
    sock, peer = connected(port)
    sock.recv(4)
    peer.send(b"datagram")
    completion = one(port)
    assert completion.data == b"data"
    assert completion.truncated


def test_the_largest_datagram_arrives_whole(port: an.CompletionPort) -> None:
    sock, address = datagram(port)
    peer = stdlib_datagram()
    largest = bytes(range(256)) * 256
    largest = largest[:65507]
    sock.recvfrom()
    peer.sendto(largest, address)
    completion = one(port)
    assert completion.data == largest
    assert not completion.truncated


def test_max_bytes_may_be_over_any_datagram(port: an.CompletionPort) -> None:
    sock, address = datagram(port)
    sock.recvfrom(1 << 20)
    stdlib_datagram().sendto(b"small", address)
    assert one(port).data == b"small"


def test_recvfrom_on_a_stream_is_no_datagram(port: an.CompletionPort) -> None:
    """The contract leaves open whether a stream has recvfrom: misuse, or data; never a hang."""
    sock, peer = pair(port)
    peer.sendall(b"x")
    try:
        sock.recvfrom()
    except (OSError, ValueError, TypeError):
        assert port.in_flight == 0
    else:
        completion = one(port)
        assert completion.kind is an.RECVFROM
        assert completion.error or completion.data == b"x"


# -- sending --------------------------------------------------------------------------------------


def test_sendto_sends_one_datagram(port: an.CompletionPort, family: str) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    operation = sock.sendto(b"datagram", peer.getsockname())
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.SENDTO
    assert completion.result() == 8
    assert completion.transferred == 8
    assert peer.recvfrom(100) == (b"datagram", address)


def test_sendto_sends_empty_datagrams(port: an.CompletionPort, family: str) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    sock.sendto(b"", peer.getsockname())
    assert one(port).result() == 0
    assert peer.recvfrom(100) == (b"", address)


def test_datagrams_go_out_in_order(port: an.CompletionPort) -> None:
    sock, _ = datagram(port)
    peer = stdlib_datagram()
    operations = [sock.sendto(b"%d" % n, peer.getsockname()) for n in range(50)]
    assert [c.operation for c in drain(port, 50)] == operations
    assert [peer.recv(10) for _ in range(50)] == [b"%d" % n for n in range(50)]


def test_quiet_sendto_gives_no_completion(port: an.CompletionPort, family: str) -> None:
    sock, _ = datagram(port, family)
    peer = stdlib_datagram(family)
    assert sock.sendto(b"quiet", peer.getsockname(), quiet=True) is None
    assert port.in_flight == 0
    assert peer.recv(100) == b"quiet"
    nothing(port)


def test_quiet_sendto_frees_the_buffer_at_once(port: an.CompletionPort) -> None:
    sock, _ = datagram(port)
    peer = stdlib_datagram()
    buffer = bytearray(b"first")
    sock.sendto(buffer, peer.getsockname(), quiet=True)
    buffer[:] = b"another"
    assert peer.recv(100) == b"first"


def test_a_datagram_too_long_is_a_completion(port: an.CompletionPort) -> None:
    sock, _ = datagram(port)
    peer = stdlib_datagram()
    operation = sock.sendto(bytes(70_000), peer.getsockname())
    completion = one(port)
    assert completion.operation is operation
    assert completion.error == errno.EMSGSIZE
    assert completion.transferred == 0
    sock.sendto(b"the next one goes", peer.getsockname())
    assert one(port).result() == 17
    assert peer.recv(100) == b"the next one goes"


def test_a_quiet_datagram_too_long_fails_as_sendto(port: an.CompletionPort) -> None:
    sock, _ = datagram(port)
    peer = stdlib_datagram()
    sock.sendto(bytes(70_000), peer.getsockname(), quiet=True)
    completion = one(port)
    assert completion.kind is an.SENDTO
    assert completion.operation is None
    assert completion.socket is sock
    assert completion.error == errno.EMSGSIZE
    assert completion.transferred == 70_000, "the bytes that were lost"
    nothing(port)
    sock.sendto(b"the next one goes", peer.getsockname(), quiet=True)
    assert peer.recv(100) == b"the next one goes"
    nothing(port)


def test_sendto_over_a_full_unix_queue_waits_for_room(port: an.CompletionPort) -> None:
    if reason := why_not("unix"):
        pytest.skip(reason)
    sock, _ = datagram(port, "unix")
    peer = stdlib_datagram("unix")
    operations = [sock.sendto(b"%03d" % n, peer.getsockname()) for n in range(200)]
    completions = settle(port)
    assert 0 < len(completions) < 200, "the queue never filled"
    messages, more = collect(port, peer, 200)
    completions += more + settle(port)
    assert messages == [b"%03d" % n for n in range(200)]
    assert [c.operation for c in completions] == operations


def test_a_stopped_datagram_harms_nothing_behind_it(port: an.CompletionPort) -> None:
    sock, _ = datagram(port, "unix")
    peer = stdlib_datagram("unix")
    operations = [sock.sendto(b"%03d" % n, peer.getsockname()) for n in range(200)]
    sent = len(settle(port))
    victim = operations[sent + 1]
    assert victim is not None
    assert victim.cancel()
    completion = one(port)
    assert completion.operation is victim
    assert cancelled(completion)
    assert completion.transferred == 0
    messages, _ = collect(port, peer, 199)
    assert messages == [b"%03d" % n for n in range(200) if n != sent + 1]


# -- connected ------------------------------------------------------------------------------------


def test_connected_datagram_sockets_send_and_receive(port: an.CompletionPort, family: str) -> None:
    sock, peer = connected(port, family)
    sock.recv()
    sock.send(b"there")
    assert one(port).kind is an.SEND
    assert peer.recv(100) == b"there"
    peer.send(b"back")
    completion = one(port)
    assert completion.kind is an.RECV
    assert completion.data == b"back"


def test_connected_datagram_sockets_keep_borders(port: an.CompletionPort) -> None:
    sock, peer = connected(port)
    sock.recv(multishot=True)
    for message in (b"one", b"", b"three"):
        peer.send(message)
    found = drain(port, 3)
    assert [c.data for c in found] == [b"one", b"", b"three"]
    assert all(c.more for c in found), "b'' is an empty datagram, no end"


def test_sendv_gathers_one_datagram(port: an.CompletionPort) -> None:
    sock, peer = connected(port)
    sock.sendv([b"ga", b"", bytearray(b"th"), memoryview(b"er")])
    assert one(port).result() == 6
    assert peer.recv(100) == b"gather"


def test_send_of_nothing_is_an_empty_datagram(port: an.CompletionPort) -> None:
    sock, peer = connected(port)
    sock.send(b"")
    assert one(port).result() == 0
    assert peer.recv(100) == b""


def test_recv_into_takes_a_datagram(port: an.CompletionPort) -> None:
    sock, peer = connected(port)
    buffer = bytearray(10)
    sock.recv_into(buffer)
    peer.send(b"data")
    assert one(port).result() == 4
    assert buffer[:4] == b"data"


@wine_stops_after_an_error
def test_a_refused_datagram_is_reported_and_the_multishot_stays(port: an.CompletionPort) -> None:
    sock = unreachable(port)
    receive = sock.recv(multishot=True)
    for _ in range(3):
        sock.send(b"x", quiet=True)
        completion = one(port)
        if completion.operation is None:
            continue  # the system told the send instead; the next one is told to the receive
        assert completion.operation is receive
        assert completion.error == errno.ECONNREFUSED
        assert completion.more
        assert not completion.data
        with pytest.raises(ConnectionRefusedError):
            completion.result()
    assert receive.pending
    assert receive.cancel()


@wine_stops_after_an_error
def test_a_refused_multishot_still_receives(port: an.CompletionPort) -> None:
    sock = unreachable(port)
    address = sock.getpeername()
    receive = sock.recv(multishot=True)
    sock.send(b"x", quiet=True)
    completion = one(port)
    assert completion.error == errno.ECONNREFUSED
    assert completion.more
    peer = keep(socket.socket(family_number("ipv4"), socket.SOCK_DGRAM))
    peer.bind(address)
    peer.sendto(b"now somebody is there", sock.getsockname())
    completion = one(port)
    assert completion.operation is receive
    assert completion.data == b"now somebody is there"
    assert completion.more


def test_a_refused_datagram_ends_a_single_receive(port: an.CompletionPort) -> None:
    sock = unreachable(port)
    receive = sock.recv()
    sock.send(b"x", quiet=True)
    completion = one(port)
    assert completion.operation is receive
    assert completion.error == errno.ECONNREFUSED
    assert not completion.more
    nothing(port)


def test_an_unconnected_socket_is_not_told_about_refused_datagrams(
    port: an.CompletionPort,
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = nobody.getsockname()
    sock, own_address = datagram(port)
    sock.recvfrom(multishot=True)
    sock.sendto(b"x", address, quiet=True)
    nothing(port)
    stdlib_datagram().sendto(b"still receiving", own_address)
    assert one(port).data == b"still receiving"


def test_a_send_on_an_unconnected_datagram_socket_is_a_completion(port: an.CompletionPort) -> None:
    sock, _ = datagram(port)
    sock.send(b"x")
    completion = one(port)
    with pytest.raises(OSError) as refused:
        stdlib_datagram().send(b"x")
    assert completion.error == refused.value.errno


@pytest.mark.parametrize("multishot", [False, True])
def test_cancel_ends_a_waiting_recvfrom(port: an.CompletionPort, multishot: bool) -> None:
    sock, address = datagram(port)
    sock.recvfrom(multishot=multishot)
    settle(port)
    assert sock.cancel() == 1
    completion = one(port)
    assert completion.kind is an.RECVFROM
    assert cancelled(completion)
    sock.recvfrom()
    stdlib_datagram().sendto(b"still usable", address)
    assert one(port).data == b"still usable"


def test_close_cancels_datagram_operations(port: an.CompletionPort, family: str) -> None:
    sock, _ = datagram(port, family)
    sock.recvfrom(multishot=True)
    sock.recvfrom_into(bytearray(10))
    sock.close()
    assert all(cancelled(c) for c in drain(port, 2))


def test_flush_sends_queued_datagrams(port: an.CompletionPort) -> None:
    sock, _ = datagram(port, "unix")
    peer = stdlib_datagram("unix")
    for number in range(100):
        sock.sendto(b"%03d" % number, peer.getsockname(), quiet=True)
    sock.close(flush=True)
    messages, _ = collect(port, peer, 100)
    assert messages == [b"%03d" % n for n in range(100)]
