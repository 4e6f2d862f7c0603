"""Operation, Completion and OperationKind."""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable
from typing import Any

import asyncio_native as an
import pytest
from support import (
    cancelled,
    datagram,
    dial,
    drain,
    listening,
    nothing,
    one,
    pair,
    pump,
    read_to_end,
    refusing_address,
    reset,
    settle,
    stall,
    stdlib_datagram,
    stdlib_listener,
)

KINDS = (
    "ACCEPT",
    "CONNECT",
    "RECV",
    "RECVFROM",
    "SEND",
    "SENDTO",
    "SENDFILE",
    "DISCONNECT",
    "POST",
    "TIMER",
)


# -- kinds ----------------------------------------------------------------------------------------


def test_operation_kind_is_an_intenum_with_the_documented_members() -> None:
    assert issubclass(an.OperationKind, enum.IntEnum)
    assert [kind.name for kind in an.OperationKind] == list(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_a_name_of_the_module(name: str) -> None:
    assert getattr(an, name) is an.OperationKind[name]
    assert name in an.__all__


def test_each_call_has_its_kind(port: an.CompletionPort, tmp_path: Any) -> None:
    stream, _ = pair(port)
    gram, address = datagram(port)
    listener, listener_address = listening(port)
    client = an.AsyncSocket()
    port.associate(client)
    (tmp_path / "file").write_bytes(b"content")
    with open(tmp_path / "file", "rb") as file:
        operations: dict[an.Operation | None, an.OperationKind] = {
            listener.accept(): an.ACCEPT,
            client.connect(listener_address): an.CONNECT,
            stream.recv(): an.RECV,
            stream.recv_into(bytearray(1)): an.RECV,
            gram.recvfrom(): an.RECVFROM,
            gram.recvfrom_into(bytearray(1)): an.RECVFROM,
            stream.send(b"x"): an.SEND,
            stream.sendv([b"x", b"y"]): an.SEND,
            gram.sendto(b"x", address): an.SENDTO,
            gram.sendto(b"x", address): an.SENDTO,
            stream.sendfile(file): an.SENDFILE,
            stream.disconnect(): an.DISCONNECT,
        }
    for operation, kind in operations.items():
        assert operation is not None
        assert operation.kind is kind
    stream.cancel()
    for completion in drain(port, len(operations)):
        assert completion.kind is operations.pop(completion.operation)
        if completion.accepted is not None:
            completion.accepted.close()
    assert not operations


# -- operations -----------------------------------------------------------------------------------


def test_an_operation_knows_its_socket(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    operation = sock.recv()
    assert operation.socket is sock
    assert operation.kind is an.RECV


def test_a_completion_names_its_operation_and_socket(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    operation = sock.send(b"x")
    completion = one(port)
    assert completion.operation is operation
    assert completion.socket is sock


def test_pending_is_true_until_the_completion_is_dequeued(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    receive = sock.recv()
    assert receive.pending is True
    nothing(port)
    assert receive.pending
    send = sock.send(b"x")
    assert send is not None
    assert peer.recv(1) == b"x"
    assert send.pending, "not dequeued yet"
    assert one(port).operation is send
    assert send.pending is False
    peer.sendall(b"y")
    assert one(port).operation is receive
    assert not receive.pending


def test_a_multishot_is_pending_until_its_last_completion(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    receive = sock.recv(multishot=True)
    for _ in range(3):
        peer.sendall(b"x")
        assert one(port).more
        assert receive.pending
    peer.close()
    assert not one(port).more
    assert not receive.pending


def test_cancel_is_true_while_the_outcome_is_open(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    receive = sock.recv()
    assert receive.cancel() is True
    assert receive.cancel() is False, "the outcome is settled"
    assert receive.pending
    completion = one(port)
    assert completion.operation is receive
    assert cancelled(completion)
    assert not receive.pending
    assert receive.cancel() is False


def test_cancel_of_what_completed_is_false_and_changes_nothing(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    send = sock.send(b"x")
    assert send is not None
    assert peer.recv(1) == b"x"
    assert send.cancel() is False
    assert one(port).result() == 1


def test_cancel_stops_one_of_several(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    first, second, third = (sock.recv_into(bytearray(1)) for _ in range(3))
    settle(port)
    assert second.cancel()
    completion = one(port)
    assert completion.operation is second
    assert cancelled(completion)
    peer.sendall(b"ab")
    assert [c.operation for c in drain(port, 2)] == [first, third]


def test_a_cancelled_operation_completes_ahead_of_earlier_ones(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    first, second = sock.recv(), sock.recv()
    settle(port)
    second.cancel()
    assert one(port).operation is second
    peer.sendall(b"x")
    assert one(port).operation is first


def test_socket_cancel_counts_all_in_flight(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True)
    assert sock.cancel() == 0
    send = stall(port, sock)
    operations = [sock.recv(), sock.recv(multishot=True), sock.recv_into(bytearray(1)), send]
    assert sock.cancel() == 4
    assert sock.cancel() == 0
    completions = drain(port, 4)
    assert {c.operation for c in completions} == set(operations)
    assert all(cancelled(c) for c in completions)
    assert not any(c.more for c in completions)


def test_socket_cancel_does_not_count_what_completed(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.send(b"x")
    sock.recv()
    assert sock.cancel() == 1
    results = drain(port, 2)
    assert sorted(c.kind for c in results if cancelled(c)) == [an.RECV]


def test_socket_cancel_does_not_count_quiet_sends_but_stops_them(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.send(bytes(8 << 20), quiet=True)
    nothing(port)
    assert sock.cancel() == 0
    sock.send(b"behind")
    completions = drain(port, lambda found: any(c.operation is not None for c in found))
    with pytest.raises(BrokenPipeError):
        next(c for c in completions if c.operation is not None).result()
    settle(port)
    sock.close()
    assert len(read_to_end(peer)) < 8 << 20


def test_cancel_leaves_the_socket_usable(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    for _ in range(100):
        receive = sock.recv()
        assert receive.cancel()
        assert cancelled(one(port))
    sock.recv()
    peer.sendall(b"x")
    assert one(port).data == b"x"


def test_cancel_of_an_accept_leaves_the_listener_usable(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    assert listener.accept(multishot=True).cancel()
    assert cancelled(one(port))
    listener.accept()
    dial(address)
    accepted, _ = one(port).result()
    accepted.close()


def test_cancel_on_an_unassociated_socket_raises_or_finds_nothing() -> None:
    with an.AsyncSocket() as sock:
        try:
            assert sock.cancel() == 0
        except ValueError:
            pass  # "ValueError when not associated" is as good an answer


def test_an_operation_can_be_a_key(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    names = {sock.recv_into(bytearray(1)): "first", sock.recv_into(bytearray(1)): "second"}
    peer.sendall(b"ab")
    found = [names[c.operation] for c in drain(port, 2) if c.operation is not None]
    assert found == ["first", "second"]


# -- completions ----------------------------------------------------------------------------------


def test_fields_that_say_nothing_have_their_defaults(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.send(b"xyz")
    completion = one(port)
    assert completion.error == 0
    assert completion.transferred == 3
    assert completion.data is None
    assert completion.accepted is None
    assert completion.address is None
    assert completion.truncated is False
    assert completion.more is False


def test_transferred_counts_the_bytes_of_data_too(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv()
    peer.sendall(b"12345")
    completion = one(port)
    assert completion.data == b"12345"
    assert completion.transferred == 5


def test_result_can_be_asked_again(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.recv()
    sock.cancel()
    completion = one(port)
    for _ in range(3):
        with pytest.raises(an.OperationCancelledError):
            completion.result()


def test_the_result_of_accept(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept()
    client = dial(address)
    completion = one(port)
    accepted: an.AsyncSocket
    accepted, peer_address = completion.result()
    same = accepted is completion.accepted
    assert same
    assert peer_address == completion.address == client.getsockname()
    accepted.close()


def test_the_result_of_connect_and_disconnect_is_none(port: an.CompletionPort) -> None:
    listener = stdlib_listener()
    sock = an.AsyncSocket()
    port.associate(sock)
    sock.connect(listener.getsockname())
    assert one(port).result() is None
    sock.disconnect()
    assert one(port).result() is None


def test_the_results_of_receives(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(3)
    sock.recv_into(bytearray(2))
    peer.sendall(b"abcde")
    assert [c.result() for c in drain(port, 2)] == [b"abc", 2]


def test_the_results_of_datagram_receives(port: an.CompletionPort) -> None:
    sock, address = datagram(port)
    sock.recvfrom()
    sock.recvfrom_into(bytearray(10))
    peer = stdlib_datagram()
    peer.sendto(b"abc", address)
    peer.sendto(b"de", address)
    results = [c.result() for c in drain(port, 2)]
    assert results == [(b"abc", peer.getsockname()), (2, peer.getsockname())]


def test_the_results_of_sends_are_counts(port: an.CompletionPort, tmp_path: Any) -> None:
    sock, _ = pair(port)
    (tmp_path / "file").write_bytes(b"12345")
    sock.send(b"abc")
    sock.sendv([b"d", b"ef"])
    with open(tmp_path / "file", "rb") as file:
        sock.sendfile(file)
    gram, address = datagram(port)
    gram.sendto(b"1234", address)
    results = {c.kind: c.result() for c in drain(port, 4) if c.kind is not an.SEND}
    assert results == {an.SENDFILE: 5, an.SENDTO: 4}


def test_the_result_of_a_post_is_its_state(port: an.CompletionPort) -> None:
    port.post(["state"])
    assert one(port).result() == ["state"]


def test_a_failed_connect_raises_the_right_subclass(port: an.CompletionPort) -> None:
    sock = an.AsyncSocket()
    port.associate(sock)
    sock.connect(refusing_address())
    completion = one(port)
    assert completion.error == errno.ECONNREFUSED
    with pytest.raises(ConnectionRefusedError) as caught:
        completion.result()
    assert caught.value.errno == errno.ECONNREFUSED
    assert caught.value.strerror


def test_a_reset_raises_the_right_subclass(port: an.CompletionPort, inet: str) -> None:
    sock, peer = pair(port, inet)
    sock.recv()
    reset(peer)
    completion = one(port)
    assert completion.error == errno.ECONNRESET
    assert not completion.data
    with pytest.raises(ConnectionResetError):
        completion.result()


def test_a_send_to_a_dead_peer_raises_the_right_subclass(port: an.CompletionPort) -> None:
    sock, peer = pair(port, "unix")
    peer.close()
    sock.send(b"x")
    completion = one(port)
    assert completion.error == errno.EPIPE
    assert completion.transferred == 0
    with pytest.raises(BrokenPipeError):
        completion.result()


def test_a_cancelled_operation_raises_its_own_error(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.recv()
    sock.cancel()
    completion = one(port)
    assert completion.error == errno.ECANCELED
    with pytest.raises(an.OperationCancelledError) as caught:
        completion.result()
    assert caught.value.errno == errno.ECANCELED
    assert isinstance(caught.value, OSError)


UNCONNECTED: dict[str, Callable[[an.AsyncSocket], Any]] = {
    "accept": lambda s: s.accept(),
    "accept multishot": lambda s: s.accept(multishot=True),
    "recv": lambda s: s.recv(),
    "recv multishot": lambda s: s.recv(multishot=True),
    "recv_into": lambda s: s.recv_into(bytearray(1)),
    "send": lambda s: s.send(b"x"),
    "sendv": lambda s: s.sendv([b"x"]),
    "disconnect": lambda s: s.disconnect(),
}


@pytest.mark.parametrize("name", UNCONNECTED)
def test_what_only_the_system_can_tell_is_a_completion(port: an.CompletionPort, name: str) -> None:
    sock = an.AsyncSocket()
    port.associate(sock)
    operation: an.Operation = UNCONNECTED[name](sock)
    completion = one(port)
    same = completion.operation is operation
    assert same
    assert not completion.more
    with pytest.raises(OSError):
        completion.result()
    assert not operation.pending
    nothing(port)


@pytest.mark.parametrize("name", ["recv", "recv multishot", "recv_into"])
@pytest.mark.parametrize("associated_first", [False, True])
def test_a_receive_on_a_listener_is_a_completion_with_its_error(
    port: an.CompletionPort, name: str, associated_first: bool
) -> None:
    sock = an.AsyncSocket()
    sock.bind(("127.0.0.1", 0))
    if associated_first:
        port.associate(sock)
        sock.listen()
    else:
        sock.listen()
        port.associate(sock)
    nothing(port, 0)  # what the system tells of a new socket is known
    fails_for_good(port, UNCONNECTED[name](sock), errno.ENOTCONN)
    sock.accept()  # and harms nothing behind it
    dial(sock.getsockname())
    assert one(port).accepted is not None


@pytest.mark.parametrize("name", ["accept", "accept multishot"])
def test_an_accept_on_a_connected_socket_is_a_completion_with_its_error(
    port: an.CompletionPort, name: str, family: str
) -> None:
    sock, peer = pair(port, family)
    nothing(port, 0)
    fails_for_good(port, UNCONNECTED[name](sock), errno.EINVAL)
    sock.recv()
    peer.sendall(b"x")
    assert one(port).data == b"x"


def fails_for_good(port: an.CompletionPort, operation: an.Operation, error: int) -> None:
    """One completion with that error, and none behind it."""
    completion = one(port)
    assert completion.operation is operation
    assert (completion.error, completion.more) == (error, False)
    assert not operation.pending


def test_a_quiet_send_on_an_unconnected_socket_fails_by_completion(
    port: an.CompletionPort,
) -> None:
    sock = an.AsyncSocket()
    port.associate(sock)
    sock.send(b"abc", quiet=True)
    completion = one(port)
    assert completion.kind is an.SEND
    assert completion.operation is None
    assert completion.transferred == 3
    assert completion.error != 0


def test_a_completion_has_a_repr(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    operation = sock.send(b"x")
    completion = one(port)
    assert "SEND" in repr(completion)
    assert "SEND" in repr(operation)
    assert "SEND" in repr(completion.kind)


def test_many_operations_of_one_socket_complete_in_order(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operations = [sock.send(b"%04d" % number) for number in range(1000)]
    data, completions = pump(port, peer, 4000)
    completions += settle(port)
    assert data == b"".join(b"%04d" % number for number in range(1000))
    assert [c.operation for c in completions] == operations


def test_a_connect_of_a_connected_socket_is_a_completion(port: an.CompletionPort) -> None:
    listener = stdlib_listener()
    sock, peer = pair(port)
    sock.connect(listener.getsockname())
    assert one(port).error == errno.EISCONN
    sock.send(b"not disturbed", quiet=True)
    assert peer.recv(100) == b"not disturbed"
