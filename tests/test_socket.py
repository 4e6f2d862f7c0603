"""AsyncSocket: creating, adopting, options, what is synchronous, and closing."""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

import asyncio_native as an
import pytest
from support import (
    cancelled,
    drain,
    family_number,
    is_inheritable,
    is_non_blocking,
    keep,
    listening,
    nothing,
    one,
    pair,
    pattern,
    pump,
    read_exactly,
    read_to_end,
    reset,
    settle,
    stall,
    stdlib_listener,
    stdlib_pair,
    why_not,
)

# -- creating -------------------------------------------------------------------------------------


def test_the_default_is_an_ipv4_stream() -> None:
    with an.AsyncSocket() as sock:
        assert sock.family == socket.AF_INET
        assert sock.type == socket.SOCK_STREAM
        assert sock.proto in (0, socket.IPPROTO_TCP)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_family_and_type_are_as_asked(family: str, kind: socket.SocketKind) -> None:
    with an.AsyncSocket(family_number(family), kind) as sock:
        assert sock.family == family_number(family)
        assert sock.type == kind
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == kind


def test_arguments_have_the_documented_names() -> None:
    with an.AsyncSocket(
        family=socket.AF_INET, type=socket.SOCK_DGRAM, proto=socket.IPPROTO_UDP
    ) as sock:
        assert sock.type == socket.SOCK_DGRAM
        assert sock.proto == socket.IPPROTO_UDP


def test_a_new_socket_is_open_and_not_associated() -> None:
    with an.AsyncSocket() as sock:
        assert sock.fileno() >= 0
        assert not sock.closed
        assert sock.port is None
        assert sock.state is None
        assert sock.unsent == 0


def test_a_socket_is_non_blocking_and_not_inherited() -> None:
    with an.AsyncSocket() as sock:
        assert is_non_blocking(sock)
        assert not is_inheritable(sock)


def test_an_accepted_socket_is_non_blocking_and_not_inherited(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept()
    with keep(socket.create_connection(address)):
        accepted = one(port).accepted
        assert accepted is not None
        with accepted:
            assert is_non_blocking(accepted)
            assert not is_inheritable(accepted)


def test_an_unknown_family_raises_the_systems_error() -> None:
    with pytest.raises(OSError):
        an.AsyncSocket(9999)


@pytest.mark.parametrize("arguments", [("2",), (2, "1"), (2, 1, "0")])
def test_wrong_types_for_the_constructor_raise(arguments: Any) -> None:
    with pytest.raises(TypeError):
        an.AsyncSocket(*arguments)


def test_an_address_in_two_arguments_raises_what_names_the_class_or_the_tuple() -> None:
    with an.AsyncSocket() as sock:
        with pytest.raises(TypeError, match=r"AsyncSocket\.bind\(\) takes 2 positional"):
            sock.bind("127.0.0.1", 5555)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"must be a tuple \(host, port\), not str"):
            sock.bind("127.0.0.1")
        with pytest.raises(TypeError, match=r"CompletionPort\.fileno\(\) takes 1 positional"):
            an.CompletionPort.fileno(None, 5)  # type: ignore[call-arg,arg-type]


def test_the_context_manager_closes() -> None:
    with an.AsyncSocket() as sock:
        number = sock.fileno()
    assert sock.closed
    assert sock.fileno() == -1
    with pytest.raises(OSError):
        os.fstat(number)


def test_the_context_manager_closes_at_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), an.AsyncSocket() as sock:
        raise ZeroDivisionError
    assert sock.closed


# -- adopt and detach -----------------------------------------------------------------------------


def test_adopt_takes_over_a_socket(family: str) -> None:
    ours, _ = stdlib_pair(family)
    number, name = ours.fileno(), ours.getsockname()
    with an.AsyncSocket.adopt(ours) as sock:
        assert ours.fileno() == -1
        assert sock.fileno() == number
        assert sock.getsockname() == name
        assert sock.family == family_number(family)
        assert sock.type == socket.SOCK_STREAM
        assert sock.port is None


def test_adopt_takes_over_a_descriptor() -> None:
    ours, peer = stdlib_pair()
    number = ours.detach()
    with an.AsyncSocket.adopt(number) as sock:
        assert sock.fileno() == number
        assert sock.family == socket.AF_INET
        assert sock.type == socket.SOCK_STREAM
    assert peer.recv(1) == b""


def test_an_adopted_socket_becomes_non_blocking_and_is_not_inherited() -> None:
    ours, _ = stdlib_pair()
    ours.set_inheritable(True)
    with an.AsyncSocket.adopt(ours) as sock:
        assert is_non_blocking(sock)
        assert not is_inheritable(sock)


def test_an_adopted_datagram_socket_knows_its_type() -> None:
    ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with an.AsyncSocket.adopt(ours) as sock:
        assert sock.type == socket.SOCK_DGRAM


def test_an_adopted_listener_accepts(port: an.CompletionPort) -> None:
    stdlib = socket.create_server(("127.0.0.1", 0))
    listener = an.AsyncSocket.adopt(stdlib)
    port.associate(listener)
    listener.accept()
    client = keep(socket.create_connection(listener.getsockname()))
    accepted, address = one(port).result()
    assert address == client.getsockname()
    accepted.close()


@pytest.mark.parametrize("wrong", ["1", None, 1.5, object()])
def test_adopt_refuses_other_types(wrong: Any) -> None:
    with pytest.raises(TypeError):
        an.AsyncSocket.adopt(wrong)


def test_adopt_refuses_a_closed_socket() -> None:
    closed = socket.socket()
    closed.close()
    with pytest.raises((OSError, ValueError)):
        an.AsyncSocket.adopt(closed)


def test_adopt_refuses_what_is_no_socket_and_leaves_it_open() -> None:
    with tempfile.TemporaryFile() as file:
        with pytest.raises(OSError) as caught:
            an.AsyncSocket.adopt(file.fileno())
        assert caught.value.errno == errno.ENOTSOCK
        os.fstat(file.fileno())


def test_detach_gives_the_socket_back(family: str) -> None:
    ours, peer = stdlib_pair(family)
    number = ours.fileno()
    sock = an.AsyncSocket.adopt(ours)
    with keep(sock.detach()) as detached:
        assert isinstance(detached, socket.socket)
        assert detached.fileno() == number
        assert detached.family == family_number(family)
        assert detached.type == socket.SOCK_STREAM
        assert sock.closed
        assert sock.fileno() == -1
        detached.sendall(b"x")
        assert peer.recv(1) == b"x"


@pytest.mark.posix("Windows cannot be asked whether a socket is non-blocking")
def test_a_detached_socket_knows_its_own_mode() -> None:
    with an.AsyncSocket().detach() as detached:
        assert detached.getblocking() == os.get_blocking(detached.fileno())


def test_an_accepted_socket_can_be_detached(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept()
    client = keep(socket.create_connection(address))
    accepted = one(port).accepted
    assert accepted is not None
    detached = keep(accepted.detach())
    client.sendall(b"x")
    assert detached.recv(1) == b"x"


def test_detach_raises_once_associated(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    with pytest.raises(ValueError, match="associated"):
        sock.detach()
    assert not sock.closed
    sock.send(b"still works")
    assert one(port).result() == 11


def test_detach_of_a_closed_socket_raises() -> None:
    sock = an.AsyncSocket()
    sock.close()
    with pytest.raises(OSError) as caught:
        sock.detach()
    assert caught.value.errno == errno.EBADF


# -- synchronous calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ipv4", "ipv6"])
def test_bind_takes_a_numeric_host(name: str) -> None:
    if reason := why_not(name):
        pytest.skip(reason)
    host = {"ipv4": "127.0.0.1", "ipv6": "::1"}[name]
    with an.AsyncSocket(family_number(name)) as sock:
        sock.bind((host, 0))
        assert sock.getsockname()[0] == host
        assert sock.getsockname()[1] > 0


def test_bind_reports_the_systems_error() -> None:
    taken = stdlib_listener()
    with an.AsyncSocket() as sock, pytest.raises(OSError) as caught:
        sock.bind(taken.getsockname())
    assert caught.value.errno == errno.EADDRINUSE


def test_names_are_those_of_the_stdlib(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    assert sock.getsockname() == peer.getpeername()
    assert sock.getpeername() == peer.getsockname()


def test_getpeername_of_an_unconnected_socket_raises() -> None:
    with an.AsyncSocket() as sock, pytest.raises(OSError) as caught:
        sock.getpeername()
    assert caught.value.errno == errno.ENOTCONN


def test_options_are_set_and_read_as_in_socket() -> None:
    with an.AsyncSocket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) != 0
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_options_can_be_bytes() -> None:
    with an.AsyncSocket() as sock, socket.socket() as stdlib:
        linger = struct.pack("HH" if sys.platform == "win32" else "ii", 1, 2)
        for either in (sock, stdlib):
            either.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        value = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert value == stdlib.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert value == linger
        assert isinstance(value, bytes)


def test_a_wrong_option_raises_the_systems_error() -> None:
    with an.AsyncSocket() as sock:
        with pytest.raises(OSError):
            sock.setsockopt(socket.SOL_SOCKET, 9999, 1)
        with pytest.raises(OSError):
            sock.getsockopt(socket.SOL_SOCKET, 9999)
        with pytest.raises(TypeError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, "1")  # type: ignore[arg-type]


def test_listen_has_a_default_backlog(port: an.CompletionPort) -> None:
    listener = an.AsyncSocket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port.associate(listener)
    clients = [keep(socket.create_connection(listener.getsockname())) for _ in range(20)]
    listener.accept(multishot=True)
    for completion in drain(port, len(clients)):
        assert completion.accepted is not None
        completion.accepted.close()


def test_listen_takes_its_backlog_by_name_and_position() -> None:
    for arguments, named in (((5,), {}), ((), {"backlog": 5})):
        with an.AsyncSocket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(*arguments, **named)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def test_listen_on_a_datagram_socket_raises() -> None:
    with an.AsyncSocket(type=socket.SOCK_DGRAM) as sock, pytest.raises(OSError):
        sock.listen()


def test_shutdown_of_the_sending_side_is_an_end_for_the_peer(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    sock.send(b"last", quiet=True)
    sock.shutdown(socket.SHUT_WR)
    assert read_to_end(peer) == b"last"
    peer.sendall(b"still heard")
    sock.recv()
    assert one(port).data == b"still heard"


def test_shutdown_of_the_receiving_side_ends_a_receive(
    port: an.CompletionPort, family: str
) -> None:
    sock, _ = pair(port, family)
    sock.recv()
    settle(port)
    sock.shutdown(socket.SHUT_RD)
    assert one(port).data == b""


def test_shutdown_of_an_unconnected_socket_raises() -> None:
    with an.AsyncSocket() as sock, pytest.raises(OSError) as caught:
        sock.shutdown(socket.SHUT_RDWR)
    assert caught.value.errno == errno.ENOTCONN


CLOSED_CALLS: dict[str, Callable[[an.AsyncSocket], Any]] = {
    "bind": lambda s: s.bind(("127.0.0.1", 0)),
    "listen": lambda s: s.listen(),
    "shutdown": lambda s: s.shutdown(socket.SHUT_WR),
    "getsockname": lambda s: s.getsockname(),
    "getpeername": lambda s: s.getpeername(),
    "setsockopt": lambda s: s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    "getsockopt": lambda s: s.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR),
    "detach": lambda s: s.detach(),
}


@pytest.mark.parametrize("name", CLOSED_CALLS)
def test_a_closed_socket_raises_ebadf(name: str) -> None:
    sock = an.AsyncSocket()
    sock.close()
    with pytest.raises(OSError) as caught:
        CLOSED_CALLS[name](sock)
    assert caught.value.errno == errno.EBADF


# -- close ----------------------------------------------------------------------------------------


def test_close_is_idempotent(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.close()
    sock.close()
    sock.close(flush=True)
    assert sock.closed
    assert sock.fileno() == -1
    nothing(port)


def test_close_tells_the_peer_at_once_with_nobody_dequeuing(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    sock.recv(multishot=True)
    sock.recv()
    settle(port)
    sock.close()
    assert peer.recv(1) == b""
    assert all(cancelled(c) for c in drain(port, 2))


def test_close_while_another_thread_waits_tells_the_peer_at_once(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    sock.recv(multishot=True)
    found: list[an.Completion] = []
    thread = threading.Thread(target=lambda: found.append(one(port)))
    thread.start()
    sock.close()
    assert peer.recv(1) == b""
    thread.join()
    assert cancelled(found[0])


def test_close_drops_what_was_not_handed_over(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    send = stall(port, sock)
    sock.send(pattern(1 << 20), quiet=True)
    sock.close()
    completion = one(port)
    assert completion.operation is send
    assert cancelled(completion)
    arrived = read_to_end(peer)
    assert len(arrived) < 32 << 20
    assert arrived == pattern(len(arrived))
    assert completion.transferred == len(arrived)
    nothing(port)


def test_close_of_a_listener_refuses_new_clients(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept(multishot=True)
    settle(port)
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 5)
    assert cancelled(one(port))


def test_the_address_can_be_bound_again_at_once(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept(multishot=True)
    settle(port)
    listener.close()
    settle(port)
    with an.AsyncSocket() as again:
        again.bind(address)
        again.listen()


def test_close_of_an_unassociated_socket_tells_the_peer() -> None:
    ours, peer = stdlib_pair()
    an.AsyncSocket.adopt(ours).close()
    assert peer.recv(1) == b""


def test_flush_hands_over_what_was_sent_before(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    first = sock.send(pattern(3 << 20))
    sock.send(pattern(1 << 20, 3 << 20), quiet=True)
    last = sock.send(b"the end")
    sock.close(flush=True)
    assert sock.closed
    data, completions = pump(port, peer, None)
    assert data == pattern(4 << 20) + b"the end"
    completions += settle(port)
    assert [c.operation for c in completions] == [first, last]
    assert [c.result() for c in completions] == [3 << 20, 7]


def test_flush_with_nothing_unsent_closes_at_once(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    sock.send(b"x", quiet=True)
    sock.close(flush=True)
    assert read_to_end(peer) == b"x"
    nothing(port)


def test_flush_ends_receives_at_once(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    receive = sock.recv(multishot=True)
    send = stall(port, sock, 8 << 20)
    sock.close(flush=True)
    completion = one(port)
    assert completion.operation is receive
    assert cancelled(completion)
    assert not completion.more
    assert send.pending
    pump(port, peer, None)
    settle(port)


def test_a_flushing_socket_refuses_new_operations(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True)
    stall(port, sock)
    sock.close(flush=True)
    with pytest.raises(OSError) as caught:
        sock.send(b"x")
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError) as caught:
        sock.recv()
    assert caught.value.errno == errno.EBADF


def test_a_plain_close_stops_the_flush(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    send = stall(port, sock)
    sock.close(flush=True)
    nothing(port)
    sock.close()
    completion = one(port)
    assert completion.operation is send
    assert cancelled(completion)
    assert len(read_to_end(peer)) < 32 << 20


def test_a_flush_that_fails_is_one_completion(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True, state="state")
    for _ in range(8):
        sock.send(bytes(1 << 20), quiet=True)
    sock.close(flush=True)
    nothing(port)
    reset(peer)
    completion = one(port)
    assert completion.kind is an.SEND
    assert completion.operation is None
    assert completion.socket is sock
    assert completion.state == "state"
    assert 0 < completion.transferred <= 8 << 20
    with pytest.raises(ConnectionError):
        completion.result()
    nothing(port)


def test_flush_goes_on_without_references(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.send(pattern(4 << 20), quiet=True)
    sock.close(flush=True)
    del sock
    gc.collect()
    data, _ = pump(port, peer, None)
    assert data == pattern(4 << 20)


def test_closing_the_port_stops_a_flush(backend: str) -> None:
    with an.CompletionPort(backend) as port:
        sock, peer = pair(port, small=True)
        sock.send(bytes(8 << 20), quiet=True)
        sock.close(flush=True)
        nothing(port)
    assert len(read_to_end(peer)) < 8 << 20


# -- references -----------------------------------------------------------------------------------


def test_an_unassociated_socket_without_references_is_closed_with_a_warning() -> None:
    ours, peer = stdlib_pair()
    sock = an.AsyncSocket.adopt(ours)
    with pytest.warns(ResourceWarning):
        del sock
        gc.collect()
    assert peer.recv(1) == b""


def test_an_idle_socket_without_references_is_closed_with_a_warning(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port)
    sock.send(b"x")
    one(port)
    with pytest.warns(ResourceWarning):
        del sock
        gc.collect()
    assert read_exactly(peer, 1) == b"x"
    assert peer.recv(1) == b""


def test_an_unclaimed_connection_is_closed_with_a_warning(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept()
    client = keep(socket.create_connection(address))
    completion = one(port)
    assert completion.accepted is not None
    with pytest.warns(ResourceWarning):
        del completion
        gc.collect()
    assert client.recv(1) == b""


def test_a_socket_with_operations_in_flight_is_kept(port: an.CompletionPort) -> None:
    sock, peer = pair(port, state="state")
    sock.recv()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del sock
        gc.collect()
    peer.sendall(b"x")
    completion = one(port)
    assert completion.data == b"x"
    assert completion.state == "state"
    assert completion.socket is not None
    completion.socket.send(b"answer", quiet=True)
    assert read_exactly(peer, 6) == b"answer"
    completion.socket.close()


def test_a_kept_socket_goes_with_its_last_operation(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv()
    del sock
    gc.collect()
    peer.sendall(b"x")
    with pytest.warns(ResourceWarning):
        assert one(port).data == b"x"
        gc.collect()
    assert peer.recv(1) == b""


def test_what_was_sent_quietly_goes_out_without_references(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.send(pattern(2 << 20), quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del sock
        gc.collect()
    data, _ = pump(port, peer, 2 << 20)
    assert data == pattern(2 << 20)


def test_a_closed_socket_is_dropped_without_a_warning(port: an.CompletionPort) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sock, _ = pair(port)
        sock.recv()
        sock.close()
        del sock
        gc.collect()
        assert cancelled(one(port))
        gc.collect()
