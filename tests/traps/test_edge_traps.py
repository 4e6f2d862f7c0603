"""What readiness systems get wrong: data and ends that arrive without a further event.

An edge-triggered system tells once. Whoever reads less than is there, or takes a short receive for
"nothing left", never hears of the rest.
"""

from __future__ import annotations

import array
import errno
import os
import socket

import asyncio_native as an
import pytest
from support import drain, eventually, nothing, one, pair, pattern, received, settle


def fill(peer: socket.socket, data: bytes) -> int:
    """Sends as much of the data as the kernel takes without waiting; returns how much."""
    limit = peer.gettimeout()
    peer.setblocking(False)
    sent = 0
    try:
        while sent < len(data):
            try:
                sent += peer.send(data[sent : sent + 65536])
            except BlockingIOError:
                break
    finally:
        peer.settimeout(limit)
    return sent


def receive_to_end(port: an.CompletionPort, sock: an.AsyncSocket, max_bytes: int) -> list[bytes]:
    """The pieces that one-shot receives get, to the end of the stream."""
    pieces: list[bytes] = []
    for _ in range(1_000_000):
        operation = sock.recv(max_bytes)
        completion = one(port)
        assert completion.operation is operation
        piece = completion.result()
        if piece == b"":
            return pieces
        pieces.append(piece)
    raise AssertionError("the stream never ends")


def arm_multishot_to_end(port: an.CompletionPort, sock: an.AsyncSocket) -> bytes:
    """What a multishot receive gets, to the end of the stream."""
    sock.recv(multishot=True)
    completions = drain(port, lambda so_far: so_far and not so_far[-1].more)
    assert completions[-1].error == 0, os.strerror(completions[-1].error)
    assert completions[-1].data == b""
    assert all(c.more and c.data for c in completions[:-1])
    return received(completions)


@pytest.mark.parametrize("max_bytes", [1000, 4096])
def test_one_shot_receives_in_small_pieces_get_all_that_arrived_at_once(
    port: an.CompletionPort, family: str, max_bytes: int
) -> None:
    sock, peer = pair(port, family)
    with sock:
        data = pattern(1 << 20)
        sent = fill(peer, data)
        assert sent > 10 * max_bytes
        pieces = bytearray()
        while len(pieces) < sent:
            sock.recv(max_bytes)
            piece = one(port).result()
            assert 0 < len(piece) <= max_bytes
            pieces += piece
        assert pieces == data[:sent]
        last = sock.recv(max_bytes)
        nothing(port)
        peer.send(b"more")
        completion = one(port)
        assert completion.operation is last
        assert completion.data == b"more"


def test_receives_started_at_once_share_out_what_arrived_at_once(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock:
        data = pattern(65536)
        peer.sendall(data)
        operations = [sock.recv(1024) for _ in range(64)]
        completions = drain(port, 64)
        assert [c.operation for c in completions] == operations
        assert all(c.data for c in completions)
        assert data.startswith(received(completions))
        rest = bytearray(received(completions))
        while len(rest) < len(data):
            sock.recv(1024)
            rest += one(port).result()
        assert rest == data


def test_data_that_arrived_long_before_the_receive_is_received(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock:
        peer.sendall(b"early")
        nothing(port)  # the event came and nobody wanted it
        sock.recv()
        assert one(port).data == b"early"


def test_data_left_by_a_cancelled_receive_is_there_for_the_next(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock:
        for _ in range(50):
            peer.sendall(b"0123456789")
            sock.recv(4)
            assert one(port).data == b"0123"
            operation = sock.recv(4)
            operation.cancel()
            completion = one(port)
            assert completion.operation is operation
            assert completion.error in (0, errno.ECANCELED)
            rest = completion.data if completion.error == 0 else b""
            while len(rest or b"") < 6:
                sock.recv()
                rest = (rest or b"") + one(port).result()
            assert rest == b"456789"


def test_data_comes_before_the_end_when_the_peer_shut_down_before_the_first_receive(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock:
        data = pattern(100_000)
        sent = fill(peer, data)
        peer.shutdown(socket.SHUT_WR)
        nothing(port)  # the hang-up came and nobody wanted it
        pieces = receive_to_end(port, sock, 1000)
        assert b"".join(pieces) == data[:sent]
        assert max(map(len, pieces)) <= 1000


def test_data_comes_before_the_end_when_the_peer_is_already_gone(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock:
        data = pattern(100_000)
        sent = fill(peer, data)
        peer.close()
        nothing(port)
        assert arm_multishot_to_end(port, sock) == data[:sent]


def test_data_comes_before_the_end_when_both_sides_have_shut_down(
    port: an.CompletionPort, family: str
) -> None:
    """Both directions closed is a hang-up (EPOLLHUP), also with data still to read."""
    sock, peer = pair(port, family)
    with sock:
        sock.disconnect()
        assert one(port).error == 0
        assert peer.recv(1) == b""
        peer.sendall(pattern(50_000))
        peer.shutdown(socket.SHUT_WR)
        nothing(port)
        assert b"".join(receive_to_end(port, sock, 777)) == pattern(50_000)


def send_with_end(peer: socket.socket, data: bytes) -> None:
    """Data and the end of the stream; on TCP in one segment where MSG_MORE holds the data back."""
    peer.send(data, 0 if peer.family.name == "AF_UNIX" else getattr(socket, "MSG_MORE", 0))
    peer.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("moment", ["armed before", "armed after"])
@pytest.mark.parametrize("way", ["one-shot", "into", "multishot"])
def test_data_and_the_end_in_one_event_are_both_received(
    port: an.CompletionPort, family: str, way: str, moment: str
) -> None:
    for round_number in range(30):
        sock, peer = pair(port, family)
        with sock:
            message = pattern(1 + 97 * round_number)
            buffer = bytearray(65536)

            def start(
                sock: an.AsyncSocket = sock, buffer: bytearray = buffer
            ) -> an.Operation | None:
                if way == "multishot":
                    return sock.recv(multishot=True)
                return sock.recv_into(buffer) if way == "into" else sock.recv()

            if moment == "armed before":
                start()
                assert port.dequeue(0) is None
                send_with_end(peer, message)
            else:
                send_with_end(peer, message)
                port.dequeue(0)
                start()
            got = b""
            for _ in range(len(message) + 1):
                completion = one(port)
                assert completion.error == 0
                piece = (
                    bytes(buffer[: completion.transferred]) if way == "into" else completion.data
                )
                assert piece is not None
                if not piece:
                    assert not completion.more
                    break
                got += piece
                if way != "multishot":
                    start()
            assert got == message
        peer.close()


def test_an_end_that_follows_a_short_receive_is_received(
    port: an.CompletionPort, family: str
) -> None:
    for _ in range(50):
        sock, peer = pair(port, family)
        with sock:
            sock.recv(multishot=True)
            peer.send(b"short")
            assert one(port).data == b"short"
            peer.shutdown(socket.SHUT_WR)
            completion = one(port)
            assert (completion.error, completion.data, completion.more) == (0, b"", False)
        peer.close()


def test_an_end_beside_data_that_a_full_receive_left_is_received(
    port: an.CompletionPort, family: str
) -> None:
    """A receive that fills its buffer exactly says nothing about what is behind it."""
    sock, peer = pair(port, family)
    with sock:
        send_with_end(peer, b"exactly!")
        sock.recv(8)
        assert one(port).data == b"exactly!"
        sock.recv(8)
        assert one(port).data == b""
        sock.recv(8)
        assert one(port).data == b"", "the end of a stream stays"


@pytest.mark.parametrize("inline", [False, True], ids=["out of band", "inline"])
@pytest.mark.parametrize("moment", ["armed before", "armed after"])
@pytest.mark.parametrize("way", ["one-shot", "multishot"])
def test_an_urgent_byte_in_the_middle_loses_neither_data_nor_the_end(
    port: an.CompletionPort, inet: str, way: str, moment: str, inline: bool
) -> None:
    """A receive stops at the urgent mark and is short with data left behind it."""
    sock, peer = pair(port, inet)
    with sock:
        if inline:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)

        def send_all() -> None:
            peer.send(b"before")
            peer.send(b"!", socket.MSG_OOB)
            peer.send(b"after")
            peer.shutdown(socket.SHUT_WR)

        if moment == "armed before":
            operation = sock.recv(multishot=way == "multishot")
            assert port.dequeue(0) is None
            send_all()
        else:
            send_all()
            nothing(port)
            operation = sock.recv(multishot=way == "multishot")
        got = b""
        for _ in range(20):
            completion = one(port)
            assert completion.operation is operation
            piece = completion.result()
            if not piece:
                break
            got += piece
            if way == "one-shot":
                operation = sock.recv()
        assert got == (b"before!after" if inline else b"beforeafter")


def test_an_urgent_byte_alone_ends_no_receive(port: an.CompletionPort, inet: str) -> None:
    sock, peer = pair(port, inet)
    with sock:
        operation = sock.recv(multishot=True)
        peer.send(b"!", socket.MSG_OOB)
        nothing(port)
        assert operation.pending
        peer.send(b"data")
        completion = one(port)
        assert completion.data == b"data"
        assert completion.more


@pytest.mark.parametrize("way", ["one-shot", "multishot"])
def test_descriptors_that_the_peer_passes_lose_neither_data_nor_the_end(
    port: an.CompletionPort, way: str
) -> None:
    """A receive on AF_UNIX stops behind a message with descriptors, with data left behind it."""
    sock, peer = pair(port, "unix")
    with sock:
        read_end, write_end = os.pipe()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read_end]).tobytes())]
        for number in range(10):
            peer.sendmsg([b"with %d;" % number], rights)
            peer.send(b"without %d;" % number)
        peer.shutdown(socket.SHUT_WR)
        os.close(read_end)
        expected = b"".join(b"with %d;without %d;" % (n, n) for n in range(10))
        if way == "multishot":
            assert arm_multishot_to_end(port, sock) == expected
        else:
            assert b"".join(receive_to_end(port, sock, 65536)) == expected

        def reader_is_gone() -> bool:
            try:
                os.write(write_end, b"x")
            except BrokenPipeError:
                return True
            return False

        try:
            os.set_blocking(write_end, False)
            eventually(reader_is_gone)  # nothing in this process kept a passed descriptor
        finally:
            os.close(write_end)


def test_descriptors_passed_to_an_armed_receive_lose_nothing(port: an.CompletionPort) -> None:
    sock, peer = pair(port, "unix")
    with sock:
        sock.recv(multishot=True)
        assert port.dequeue(0) is None
        with open(os.devnull, "rb") as file:
            rights = [
                (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]).tobytes())
            ]
            # With a time limit Python waits for room first, of which there is a quarter only.
            peer.setblocking(False)
            for _ in range(50):
                peer.sendmsg([b"a"], rights)
                peer.send(b"bb")
            peer.close()
        completions = drain(port, lambda so_far: so_far and not so_far[-1].more)
        assert completions[-1].result() == b""
        assert received(completions) == b"abb" * 50


def test_a_multishot_receive_hears_of_every_small_message_of_a_long_exchange(
    port: an.CompletionPort, family: str
) -> None:
    """Each round the receive is short and the next data brings a new event."""
    sock, peer = pair(port, family)
    with sock:
        sock.recv(multishot=True)
        for number in range(500):
            message = b"%d" % number
            peer.send(message)
            assert one(port).data == message
        assert settle(port) == []
