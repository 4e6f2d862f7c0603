"""Flow control: pause, resume, pause_above and unsent."""

from __future__ import annotations

import random
import socket
import threading
import time
from typing import Any

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    cancelled,
    datagram,
    dial,
    drain,
    listening,
    nothing,
    one,
    pair,
    pattern,
    pump,
    received,
    settle,
    stall,
    stdlib_datagram,
)

MEBIBYTE = 1 << 20


def push(peer: socket.socket, data: bytes) -> int:
    """How much of the data the peer's window takes now."""
    peer.setblocking(False)
    pushed = 0
    while pushed < len(data):
        try:
            pushed += peer.send(data[pushed:])
        except BlockingIOError:
            break
    return pushed


# -- unsent ---------------------------------------------------------------------------------------


def test_unsent_is_zero_when_all_is_handed_over(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    assert sock.unsent == 0
    sock.send(b"x" * 1000)
    sock.send(b"x" * 1000, quiet=True)
    assert sock.unsent == 0


def test_unsent_counts_what_the_system_has_not_taken(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    operation = stall(port, sock, 8 * MEBIBYTE)
    first = sock.unsent
    assert 0 < first < 8 * MEBIBYTE
    sock.send(bytes(1000))
    sock.send(bytes(200), quiet=True)
    sock.sendv([bytes(30), bytes(4)], quiet=True)
    assert sock.unsent == first + 1234
    pump(port, peer, 2 * MEBIBYTE)
    assert sock.unsent < first + 1234
    pump(port, peer, 6 * MEBIBYTE + 1234)
    settle(port)
    assert not operation.pending
    assert sock.unsent == 0


def test_unsent_is_what_a_cancelled_send_did_not_transfer(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True)
    operation = stall(port, sock, 8 * MEBIBYTE)
    unsent = sock.unsent
    operation.cancel()
    assert one(port).transferred == 8 * MEBIBYTE - unsent
    assert sock.unsent == 0


def test_unsent_is_what_quiet_sends_lose(port: an.CompletionPort) -> None:
    sock, peer = pair(port, "unix", small=True)
    for _ in range(10):
        sock.send(bytes(100_000), quiet=True)
    nothing(port)
    unsent = sock.unsent
    peer.close()
    assert one(port).transferred == unsent
    assert sock.unsent == 0


def test_unsent_can_be_read_after_close(backend: str) -> None:
    with an.CompletionPort(backend) as port:
        sock, _ = pair(port, small=True)
        sock.send(bytes(8 * MEBIBYTE), quiet=True)
        other, _ = pair(port)
        other.close()
        assert other.unsent == 0
    assert sock.unsent == 0


# -- pause and resume -----------------------------------------------------------------------------


def test_a_paused_multishot_receives_nothing_until_resumed(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    operation = sock.recv(multishot=True)
    peer.sendall(b"before")
    assert one(port).data == b"before"
    operation.pause()
    peer.sendall(b"while paused")
    nothing(port)
    assert operation.pending
    assert port.in_flight == 1
    operation.resume()
    completion = one(port)
    assert completion.data == b"while paused"
    assert completion.more
    peer.sendall(b"after")
    assert one(port).data == b"after"


def test_a_multishot_may_be_paused_right_after_its_start(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    operation.pause()
    peer.sendall(b"x")
    nothing(port)
    operation.resume()
    assert one(port).data == b"x"


def test_pause_and_resume_may_be_repeated(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    operation.resume()
    operation.pause()
    operation.pause()
    peer.sendall(b"x")
    nothing(port)
    operation.resume()
    operation.resume()
    assert one(port).data == b"x"
    nothing(port)


def test_what_was_queued_before_the_pause_still_comes(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operation = sock.recv(100, multishot=True)
    peer.sendall(bytes(5000))
    found = drain(port, 1)
    operation.pause()
    found += settle(port)
    peer.sendall(b"the rest")
    nothing(port)
    operation.resume()
    found += drain(port, lambda more: len(received(found + more)) == 5008)
    assert received(found) == bytes(5000) + b"the rest"


def test_what_comes_while_paused_waits_in_the_kernel(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    settle(port)
    operation.pause()
    whole = pattern(64 * MEBIBYTE)
    pushed = 0
    for _ in range(20):
        pushed += push(peer, whole[pushed:])
        nothing(port, 0.01)
    assert pushed < len(whole), "the peer was never slowed down"
    operation.resume()
    data = bytearray()
    while len(data) < pushed:
        for completion in drain(port, 1):
            data += completion.data or b""
    assert data == whole[:pushed]


def test_a_stream_survives_random_pauses(port: an.CompletionPort, family: str) -> None:
    chance = random.Random(4)
    sock, peer = pair(port, family)
    operation = sock.recv(multishot=True)
    whole = pattern(4 * MEBIBYTE)
    data, pushed = bytearray(), 0
    deadline = time.monotonic() + 2 * PATIENCE
    while len(data) < len(whole):
        assert time.monotonic() < deadline
        pushed += push(peer, whole[pushed : pushed + chance.randrange(1, 200_000)])
        chance.choice([operation.pause, operation.resume])()
        for completion in port.dequeue_many(timeout=0.001):
            assert completion.more
            data += completion.data or b""
    assert data == whole


def test_the_end_of_the_stream_waits_for_resume(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operation = sock.recv(multishot=True)
    settle(port)
    operation.pause()
    peer.sendall(b"last")
    peer.close()
    nothing(port)
    operation.resume()
    first, second = drain(port, 2)
    assert (first.data, first.more) == (b"last", True)
    assert (second.data, second.more) == (b"", False)


def test_only_a_multishot_in_flight_can_be_paused(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    single = sock.recv()
    ended = sock.recv(multishot=True)
    ended.cancel()
    one(port)
    for operation in (single, ended):
        for call in (operation.pause, operation.resume):
            with pytest.raises(ValueError, match="multishot"):
                call()
    assert single.pending


@pytest.mark.parametrize("end", ["operation", "socket", "close"])
def test_a_paused_multishot_can_be_ended(port: an.CompletionPort, end: str) -> None:
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    operation.pause()
    peer.sendall(b"x")
    nothing(port)
    if end == "operation":
        assert operation.cancel()
    elif end == "socket":
        assert sock.cancel() == 1
    else:
        sock.close()
    completion = one(port)
    assert completion.operation is operation
    assert cancelled(completion)
    assert not completion.more
    nothing(port)


def test_resume_from_another_thread_wakes_the_dequeue(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    settle(port)
    operation.pause()
    peer.sendall(b"x")
    nothing(port)
    thread = threading.Timer(0.1, operation.resume)
    thread.start()
    completion = port.dequeue(timeout=PATIENCE)
    thread.join()
    assert completion is not None
    assert completion.data == b"x"


def test_a_receive_behind_a_paused_multishot_waits(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    multishot = sock.recv(multishot=True)
    behind = sock.recv()
    multishot.pause()
    peer.sendall(b"x")
    nothing(port)
    multishot.cancel()
    assert one(port).operation is multishot
    completion = one(port)
    assert completion.operation is behind
    assert completion.data == b"x"


def test_a_paused_accept_leaves_clients_in_the_backlog(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    operation = listener.accept(multishot=True)
    settle(port)
    operation.pause()
    clients = [dial(address) for _ in range(3)]
    nothing(port)
    operation.resume()
    for completion in drain(port, len(clients)):
        assert completion.more
        assert completion.accepted is not None
        completion.accepted.close()


def test_a_paused_recvfrom_leaves_datagrams_in_the_kernel(port: an.CompletionPort) -> None:
    sock, address = datagram(port)
    operation = sock.recvfrom(multishot=True)
    settle(port)
    operation.pause()
    peer = stdlib_datagram()
    for number in range(5):
        peer.sendto(b"%d" % number, address)
    nothing(port)
    operation.resume()
    assert [c.data for c in drain(port, 5)] == [b"0", b"1", b"2", b"3", b"4"]


def test_a_paused_socket_still_sends(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.recv(multishot=True).pause()
    send = sock.send(pattern(2 * MEBIBYTE))
    data, completions = pump(port, peer, 2 * MEBIBYTE)
    completions += settle(port)
    assert data == pattern(2 * MEBIBYTE)
    assert [c.operation for c in completions] == [send]


def test_a_paused_multishot_does_not_keep_the_processor_busy(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    operation.pause()
    push(peer, bytes(16 * MEBIBYTE))
    before = time.process_time()
    nothing(port, 1.0)
    assert time.process_time() - before < 0.3


# -- pause_above ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, MEBIBYTE])
def test_an_echo_server_holds_little_for_a_peer_that_does_not_read(
    port: an.CompletionPort, family: str, limit: int
) -> None:
    sock, peer = pair(port, family, small=True)
    operation = sock.recv(multishot=True, pause_above=limit)
    whole = pattern(32 * MEBIBYTE)
    pushed, most, idle = 0, 0, 0
    while idle < 10:
        before = pushed
        pushed += push(peer, whole[pushed:])
        completions = port.dequeue_many(timeout=0.005)
        for completion in completions:
            assert completion.data
            assert completion.more
            sock.send(completion.data, quiet=True)
            most = max(most, sock.unsent)
        idle = 0 if completions or pushed > before else idle + 1
    assert pushed < len(whole), "the peer was never slowed down"
    # What one look at the system had read when the limit was passed still comes.
    assert most <= limit + 2 * MEBIBYTE
    assert operation.pending

    # It goes on by itself as soon as the peer reads.
    echoed = bytearray()
    deadline = time.monotonic() + 40
    while len(echoed) < pushed:
        assert time.monotonic() < deadline, f"{len(echoed)} of {pushed} bytes came back"
        try:
            echoed += peer.recv(MEBIBYTE)
        except BlockingIOError:
            pass
        for completion in port.dequeue_many(timeout=0.001):
            sock.send(completion.data or b"", quiet=True)
    assert echoed == whole[:pushed]


def test_pause_above_receives_nothing_while_over_the_limit(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.send(pattern(4 * MEBIBYTE), quiet=True)
    sock.recv(multishot=True, pause_above=100_000)
    peer.sendall(b"a request")
    nothing(port)
    data = b""
    completions: list[an.Completion] = []
    while not completions:
        piece, completions = pump(port, peer, 50_000)
        data += piece
        assert len(data) <= 4 * MEBIBYTE - 50_000, "never resumed"
        completions += settle(port, 0.001)
    assert completions[0].data == b"a request"
    assert sock.unsent <= 100_000
    rest, _ = pump(port, peer, 4 * MEBIBYTE - len(data))
    assert data + rest == pattern(4 * MEBIBYTE)


def test_pause_above_does_not_disturb_below_the_limit(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(multishot=True, pause_above=MEBIBYTE)
    for number in range(50):
        peer.sendall(b"%d" % number)
        assert one(port).data == b"%d" % number


def test_a_multishot_paused_by_its_limit_can_be_cancelled(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    stall(port, sock)
    operation = sock.recv(multishot=True, pause_above=1000)
    peer.sendall(b"x")
    nothing(port)
    assert operation.cancel()
    assert cancelled(one(port))


def test_a_limit_counts_others_sends_too(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.recv(multishot=True, pause_above=1000)
    send = stall(port, sock, 2 * MEBIBYTE)
    peer.sendall(b"x")
    nothing(port)
    _, completions = pump(port, peer, 2 * MEBIBYTE)
    completions += settle(port)
    assert {c.kind for c in completions} == {an.SEND, an.RECV}
    assert not send.pending


@pytest.mark.parametrize("limit", [-1, -(1 << 40)])
def test_a_limit_out_of_range_raises(port: an.CompletionPort, limit: int) -> None:
    sock, _ = pair(port)
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        sock.recv(multishot=True, pause_above=limit)
    assert port.in_flight == 0


@pytest.mark.parametrize("limit", ["1", 1.5])
def test_a_limit_of_a_wrong_type_raises(port: an.CompletionPort, limit: Any) -> None:
    sock, _ = pair(port)
    with pytest.raises(TypeError):
        sock.recv(multishot=True, pause_above=limit)
    assert port.in_flight == 0
