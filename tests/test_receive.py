"""Receiving on streams, accepting and connecting."""

from __future__ import annotations

import array
import errno
import gc
import socket
import sys
import weakref
from typing import Any

import asyncio_native as an
import pytest
from support import (
    any_address,
    cancelled,
    datagram,
    dial,
    drain,
    family_number,
    keep,
    listening,
    nothing,
    one,
    pair,
    pattern,
    read_exactly,
    received,
    refusing_address,
    reset,
    settle,
    stdlib_listener,
)

# -- recv -----------------------------------------------------------------------------------------


def test_recv_completes_when_something_is_there(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operation = sock.recv()
    nothing(port)
    peer.sendall(b"hello")
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.RECV
    assert completion.data == b"hello"
    assert isinstance(completion.data, bytes)
    assert completion.transferred == 5
    assert completion.error == 0
    assert completion.more is False
    nothing(port)


def test_recv_finds_what_came_before(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    peer.sendall(b"early")
    nothing(port)
    sock.recv()
    assert one(port).data == b"early"


def test_recv_leaves_the_rest_for_the_next(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    peer.sendall(b"abcdefgh")
    sock.recv(3)
    assert one(port).data == b"abc"
    nothing(port)
    sock.recv(100)
    assert one(port).data == b"defgh"


def test_recv_gives_at_most_max_bytes(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    peer.sendall(pattern(1000))
    data = b""
    while len(data) < 1000:
        sock.recv(max_bytes=7)
        piece = one(port).data
        assert piece is not None
        assert 1 <= len(piece) <= 7
        data += piece
    assert data == pattern(1000)


def test_recv_gives_at_most_65536_by_default(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    peer.setblocking(False)
    assert peer.send(bytes(200_000)) > 65536
    sock.recv()
    assert 1 <= one(port).transferred <= 65536


def test_recv_can_ask_for_more_than_the_default(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    whole = pattern(1 << 20)
    peer.setblocking(False)
    sent, got, biggest = 0, b"", 0
    while len(got) < len(whole):
        if sent < len(whole):
            try:
                sent += peer.send(whole[sent:])
            except BlockingIOError:
                pass
        sock.recv(1 << 20)
        data = one(port).data
        assert data
        got += data
        biggest = max(biggest, len(data))
    assert got == whole
    assert biggest > 65536


def test_the_end_of_the_stream_is_an_empty_receive(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    sock.recv()
    peer.close()
    completion = one(port)
    assert completion.data == b""
    assert completion.transferred == 0
    assert completion.error == 0
    assert completion.result() == b""


def test_the_end_is_told_again_to_each_receive(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    peer.shutdown(socket.SHUT_WR)
    for _ in range(3):
        sock.recv()
        assert one(port).data == b""
    for operation in [sock.recv() for _ in range(3)]:
        completion = one(port)
        assert completion.operation is operation
        assert completion.data == b""


def test_data_comes_before_the_end(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    peer.sendall(pattern(100_000))
    peer.close()
    data = b""
    while True:
        sock.recv(30_000)
        completion = one(port)
        assert completion.error == 0
        if not completion.data:
            break
        data += completion.data
    assert data == pattern(100_000)


def test_after_the_end_sending_goes_on(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    sock.recv()
    peer.shutdown(socket.SHUT_WR)
    assert one(port).data == b""
    sock.send(pattern(100_000), quiet=True)
    assert read_exactly(peer, 100_000) == pattern(100_000)


def test_receives_fill_in_the_order_started(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operations = [sock.recv(5) for _ in range(4)]
    settle(port)
    peer.sendall(b"aaaaabbbbbcccccddddd")
    completions = drain(port, 4)
    assert [c.operation for c in completions] == operations
    assert received(completions) == b"aaaaabbbbbcccccddddd"


def test_a_reset_is_an_error(port: an.CompletionPort, inet: str) -> None:
    sock, peer = pair(port, inet)
    operation = sock.recv(multishot=True)
    nothing(port)
    reset(peer)
    completion = one(port)
    assert completion.operation is operation
    assert not completion.more
    assert not completion.data
    assert completion.error == errno.ECONNRESET


@pytest.mark.parametrize("size", [0, -1, -(1 << 40)])
def test_sizes_out_of_range_raise(port: an.CompletionPort, size: int) -> None:
    sock, _ = pair(port)
    gram, _ = datagram(port)
    for call in (sock.recv, gram.recvfrom):
        with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
            call(size)
        with pytest.raises(ValueError):  # noqa: PT011
            call(size, multishot=True)
    assert port.in_flight == 0


@pytest.mark.parametrize("wrong", ["5", 1.5, None, b"5"])
def test_sizes_of_a_wrong_type_raise(port: an.CompletionPort, wrong: Any) -> None:
    sock, _ = pair(port)
    with pytest.raises(TypeError):
        sock.recv(wrong)
    assert port.in_flight == 0


# -- multishot ------------------------------------------------------------------------------------


def test_a_multishot_goes_on(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operation = sock.recv(multishot=True)
    for number in range(50):
        peer.sendall(b"%d" % number)
        completion = one(port)
        assert completion.operation is operation
        assert completion.data == b"%d" % number
        assert completion.more is True
    assert port.in_flight == 1


def test_a_multishot_brings_a_long_stream_in_order(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    sock.recv(multishot=True)
    whole = pattern(6_000_000)
    peer.setblocking(False)
    sent = 0
    data = bytearray()
    while len(data) < len(whole):
        if sent < len(whole):
            try:
                sent += peer.send(whole[sent : sent + 300_000])
            except BlockingIOError:
                pass
        for completion in drain(port, 1):
            assert completion.more
            assert completion.data
            assert len(completion.data) <= 65536
            data += completion.data
    assert data == whole


def test_a_multishot_ends_with_the_stream(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operation = sock.recv(multishot=True)
    peer.sendall(b"last")
    peer.close()
    first, second = drain(port, 2)
    assert first.data == b"last"
    assert first.more
    assert second.data == b""
    assert second.error == 0
    assert not second.more
    assert not operation.pending
    nothing(port)


def test_a_multishot_ends_with_cancel(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operation = sock.recv(multishot=True)
    peer.sendall(b"x")
    assert one(port).more
    assert operation.cancel()
    completion = one(port)
    assert cancelled(completion)
    assert not completion.more
    peer.sendall(b"y")
    nothing(port)
    sock.recv()
    assert one(port).data == b"y", "what came after the cancel is not lost"


def test_a_multishot_ends_with_close(port: an.CompletionPort, family: str) -> None:
    sock, _ = pair(port, family)
    operation = sock.recv(multishot=True)
    nothing(port)
    sock.close()
    completion = one(port)
    assert completion.operation is operation
    assert cancelled(completion)
    assert not completion.more
    nothing(port)


def test_a_receive_behind_a_multishot_waits_for_its_end(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    multishot = sock.recv(multishot=True)
    behind = sock.recv()
    peer.sendall(b"to the first")
    assert one(port).operation is multishot
    multishot.cancel()
    assert one(port).operation is multishot
    peer.sendall(b"to the second")
    completion = one(port)
    assert completion.operation is behind
    assert completion.data == b"to the second"


def test_a_multishot_respects_max_bytes(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(10, multishot=True)
    peer.sendall(pattern(1000))
    completions = drain(port, lambda found: len(received(found)) == 1000)
    assert received(completions) == pattern(1000)
    assert all(1 <= c.transferred <= 10 for c in completions)


def test_data_stays_valid_after_later_receives(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(multishot=True)
    kept = []
    for number in range(200):
        peer.sendall(b"%03d" % number * 100)
        kept += [c.data for c in drain(port, 1)]
    gc.collect()
    assert b"".join(data or b"" for data in kept) == b"".join(
        b"%03d" % number * 100 for number in range(200)
    )


# -- recv_into ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [bytearray, lambda n: memoryview(bytearray(n)), lambda n: array.array("B", bytes(n))]
)
def test_recv_into_fills_the_callers_buffer(port: an.CompletionPort, make: Any) -> None:
    sock, peer = pair(port)
    buffer = make(10)
    operation = sock.recv_into(buffer)
    nothing(port)
    peer.sendall(b"hello")
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.RECV
    assert completion.transferred == 5
    assert completion.data is None
    assert completion.result() == 5
    assert bytes(buffer) == b"hello\0\0\0\0\0"


def test_recv_into_a_slice_touches_nothing_else(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    buffer = bytearray(b"-" * 10)
    sock.recv_into(memoryview(buffer)[3:6])
    peer.sendall(b"abcdef")
    assert one(port).transferred == 3
    assert buffer == b"---abc----"


def test_recv_into_counts_bytes_not_items(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    buffer = array.array("I", [0, 0])
    sock.recv_into(buffer)
    peer.sendall(b"\1\0\0\0\2\0\0\0")
    assert one(port).transferred == 8
    assert buffer.tolist() == [1, 2]


def test_recv_into_at_the_end_of_the_stream_transfers_nothing(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv_into(bytearray(10))
    peer.close()
    completion = one(port)
    assert completion.error == 0
    assert completion.result() == 0


def test_an_empty_buffer_raises(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    gram, _ = datagram(port)
    for call in (sock.recv_into, gram.recvfrom_into):
        with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
            call(bytearray())
    assert port.in_flight == 0


@pytest.mark.parametrize("wrong", [b"read-only", memoryview(b"read-only"), "text", None, 5])
def test_what_cannot_be_written_raises(port: an.CompletionPort, wrong: Any) -> None:
    sock, _ = pair(port)
    gram, _ = datagram(port)
    for call in (sock.recv_into, gram.recvfrom_into):
        with pytest.raises(TypeError):
            call(wrong)
    assert port.in_flight == 0


def test_the_buffer_is_held_until_its_completion_is_dequeued(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    buffer = bytearray(10)
    sock.recv_into(buffer)
    for resize in (lambda: buffer.append(0), lambda: buffer.clear(), lambda: buffer.pop()):
        with pytest.raises(BufferError):
            resize()
    peer.sendall(b"hello")
    assert one(port).transferred == 5
    buffer.append(0)


def test_a_buffer_without_references_is_kept_and_then_released(port: an.CompletionPort) -> None:
    class Buffer(bytearray):
        pass

    sock, peer = pair(port)
    buffer = Buffer(10)
    reference = weakref.ref(buffer)
    operation = sock.recv_into(buffer)
    del buffer
    gc.collect()
    assert reference() is not None
    peer.sendall(b"x")
    assert one(port).operation is operation
    gc.collect()
    assert reference() is None


# -- accept ---------------------------------------------------------------------------------------


def test_accept_brings_a_connection(port: an.CompletionPort, family: str) -> None:
    listener, address = listening(port, family, state="listener")
    operation = listener.accept()
    nothing(port)
    client = dial(address)
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.ACCEPT
    assert completion.socket is listener
    assert completion.state == "listener"
    assert completion.error == 0
    assert not completion.more
    assert completion.address == client.getsockname()
    accepted = completion.accepted
    assert isinstance(accepted, an.AsyncSocket)
    assert accepted.family == family_number(family)
    assert accepted.type == socket.SOCK_STREAM
    assert accepted.getsockname() == address
    accepted.close()


def test_an_accepted_socket_is_not_yet_associated(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept()
    client = dial(address)
    accepted = one(port).accepted
    assert accepted is not None
    assert accepted.port is None
    assert accepted.state is None
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        accepted.recv()
    port.associate(accepted, "mine")
    accepted.recv()
    client.sendall(b"x")
    completion = one(port)
    assert completion.data == b"x"
    assert completion.state == "mine"
    accepted.close()


def test_an_accepted_socket_can_go_to_another_port(port: an.CompletionPort, backend: str) -> None:
    listener, address = listening(port)
    listener.accept()
    client = dial(address)
    accepted = one(port).accepted
    assert accepted is not None
    with an.CompletionPort(backend) as other:
        other.associate(accepted)
        accepted.recv()
        client.sendall(b"x")
        assert one(other).data == b"x"


def test_what_came_before_association_is_received(port: an.CompletionPort, family: str) -> None:
    listener, address = listening(port, family)
    listener.accept()
    client = dial(address)
    client.sendall(b"early")
    accepted = one(port).accepted
    assert accepted is not None
    client.sendall(b" bird")
    client.close()
    port.associate(accepted)
    accepted.recv(multishot=True)
    completions = drain(port, lambda found: found and not found[-1].more)
    assert received(completions) == b"early bird"


def test_accept_finds_clients_that_came_before(port: an.CompletionPort, family: str) -> None:
    listener, address = listening(port, family)
    clients = [dial(address) for _ in range(5)]
    listener.accept(multishot=True)
    completions = drain(port, 5)
    assert all(c.more for c in completions)
    assert sorted(map(str, (c.address for c in completions))) == sorted(
        str(client.getsockname()) for client in clients
    )
    for completion in completions:
        assert completion.accepted is not None
        completion.accepted.close()


def test_accepts_complete_in_the_order_started(port: an.CompletionPort, family: str) -> None:
    listener, address = listening(port, family)
    operations = [listener.accept() for _ in range(5)]
    settle(port)
    for _ in operations:
        dial(address)
    completions = drain(port, 5)
    assert [c.operation for c in completions] == operations
    for completion in completions:
        assert completion.accepted is not None
        completion.accepted.close()


def test_one_accept_takes_one_connection(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    for _ in range(3):
        dial(address)
    listener.accept()
    accepted, _ = one(port).result()
    accepted.close()
    nothing(port)


def test_a_multishot_accept_goes_on(port: an.CompletionPort, family: str) -> None:
    listener, address = listening(port, family)
    operation = listener.accept(multishot=True)
    for _ in range(20):
        client = dial(address)
        completion = one(port)
        assert completion.operation is operation
        assert completion.more
        assert completion.accepted is not None
        completion.accepted.close()
        assert client.recv(1) == b""
    assert operation.cancel()
    last = one(port)
    assert cancelled(last)
    assert not last.more
    assert last.accepted is None


def test_a_cancelled_accept_leaves_connections_for_the_next(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept(multishot=True).cancel()
    assert cancelled(one(port))
    client = dial(address)
    nothing(port)
    listener.accept()
    accepted, client_address = one(port).result()
    assert client_address == client.getsockname()
    accepted.close()


# -- connect --------------------------------------------------------------------------------------


def test_connect_connects(port: an.CompletionPort, family: str) -> None:
    listener = stdlib_listener(family)
    sock = an.AsyncSocket(family_number(family))
    port.associate(sock, "state")
    operation = sock.connect(listener.getsockname())
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.CONNECT
    assert completion.state == "state"
    assert completion.result() is None
    assert sock.getpeername() == listener.getsockname()
    peer = keep(listener.accept()[0])
    sock.recv()
    peer.sendall(b"x")
    assert one(port).data == b"x"


def test_connect_from_a_bound_address(port: an.CompletionPort, inet: str) -> None:
    listener = stdlib_listener(inet)
    sock = an.AsyncSocket(family_number(inet))
    sock.bind(any_address(inet))
    port.associate(sock)
    sock.connect(listener.getsockname())
    assert one(port).result() is None
    peer, address = listener.accept()
    keep(peer)
    assert address == sock.getsockname()


def test_connect_to_a_port_where_nobody_listens_is_refused(
    port: an.CompletionPort, inet: str
) -> None:
    sock = an.AsyncSocket(family_number(inet))
    port.associate(sock)
    operation = sock.connect(refusing_address(inet))
    completion = one(port)
    assert completion.operation is operation
    assert completion.error == errno.ECONNREFUSED
    nothing(port)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full backlog refuses")
def test_a_connect_in_progress_can_be_cancelled(port: an.CompletionPort) -> None:
    listener = stdlib_listener(backlog=0)  # Linux lets the clients of a full backlog wait
    operations = []
    for _ in range(4):
        sock = an.AsyncSocket()
        port.associate(sock)
        operations.append(sock.connect(listener.getsockname()))
    settle(port)
    waiting = [operation for operation in operations if operation.pending]
    assert waiting, "the backlog never filled"
    for operation in waiting:
        assert operation.cancel()
    completions = drain(port, len(waiting))
    assert {c.operation for c in completions} == set(waiting)
    assert all(cancelled(c) for c in completions)
    nothing(port)


def test_a_hundred_connects_at_once(port: an.CompletionPort, family: str) -> None:
    listener, address = listening(port, family, backlog=256)
    listener.accept(multishot=True)
    socks = [an.AsyncSocket(family_number(family)) for _ in range(100)]
    for sock in socks:
        port.associate(sock)
        sock.connect(address)
    completions = drain(port, 200)
    connects = [c for c in completions if c.kind is an.CONNECT]
    accepts = [c for c in completions if c.kind is an.ACCEPT]
    assert all(c.result() is None for c in connects)
    assert {id(c.socket) for c in connects} == {id(sock) for sock in socks}
    assert len(accepts) == 100
    for completion in accepts:
        assert completion.accepted is not None
        completion.accepted.close()


def test_a_port_can_talk_to_itself(port: an.CompletionPort, family: str) -> None:
    listener, address = listening(port, family)
    listener.accept()
    client = an.AsyncSocket(family_number(family))
    port.associate(client)
    client.connect(address)
    server = next(c.accepted for c in drain(port, 2) if c.kind is an.ACCEPT)
    assert server is not None
    port.associate(server)
    server.recv(multishot=True)
    client.recv(multishot=True)
    for number in range(20):
        client.send(b"%d" % number, quiet=True)
        assert one(port).data == b"%d" % number
        server.send(b"%d" % -number, quiet=True)
        assert one(port).data == b"%d" % -number
