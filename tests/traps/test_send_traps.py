"""Sending: short sends, full windows, resets in the middle and closing one side."""

from __future__ import annotations

import errno
import random
import select
import socket
import tempfile
import time

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    drain,
    nothing,
    one,
    pair,
    pattern,
    pump,
    read_exactly,
    read_to_end,
    received,
    reset,
    settle,
    stall,
)

BROKEN = (errno.ECONNRESET, errno.EPIPE)


def test_sixty_four_mebibytes_in_one_send_arrive_whole(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock:
        data = pattern(64 << 20)
        operation = sock.send(data)
        got, completions = pump(port, peer, len(data))
        completions = completions or [one(port)]
        assert got == data
        assert [c.operation for c in completions] == [operation]
        assert completions[0].error == 0
        assert completions[0].transferred == len(data)
        assert sock.unsent == 0


def test_sixty_four_mebibytes_gathered_from_many_buffers_arrive_whole(
    port: an.CompletionPort,
) -> None:
    """More buffers than one system call takes (IOV_MAX is 1024)."""
    sock, peer = pair(port)
    with sock:
        data = pattern(64 << 20)
        piece = len(data) // 4096
        operation = sock.sendv([data[at : at + piece] for at in range(0, len(data), piece)])
        got, completions = pump(port, peer, len(data))
        completions = completions or [one(port)]
        assert got == data
        assert [c.operation for c in completions] == [operation]
        assert completions[0].transferred == len(data)


def test_sends_of_every_kind_go_on_in_order_after_short_sends(
    port: an.CompletionPort, family: str
) -> None:
    """The peer reads little by little, so that nearly every system call sends short."""
    sock, peer = pair(port, family, small=True)
    chance = random.Random(20)
    with sock, tempfile.TemporaryFile() as file:
        file_bytes = pattern(100_000, 5)
        file.write(file_bytes)
        file.flush()
        expected = bytearray()
        sizes = []
        operations = []
        for number in range(40):
            data = pattern(chance.randrange(1, 40_000), number)
            kind = number % 4
            if kind == 0:
                operations.append(sock.send(data))
            elif kind == 1:
                cut = len(data) // 3
                operations.append(sock.sendv([data[:cut], bytearray(data[cut:]), b""]))
            elif kind == 2:
                changing = bytearray(data)
                assert sock.send(changing, quiet=True) is None
                changing[:] = b"\xff" * len(changing)  # the call returned: the buffer is free
            else:
                offset, count = chance.randrange(50_000), chance.randrange(1, 50_000)
                data = file_bytes[offset : offset + count]
                operations.append(sock.sendfile(file, offset, count))
            expected += data
            if kind != 2:
                sizes.append(len(data))
        completions: list[an.Completion] = []
        got = bytearray()
        while len(got) < len(expected):
            piece, came = pump(port, peer, min(3000, len(expected) - len(got)))
            got += piece
            completions += came
        completions += settle(port)
        assert got == expected
        assert [c.operation for c in completions] == operations
        assert [c.transferred for c in completions] == sizes
        assert {c.error for c in completions} == {0}
        assert sock.unsent == 0


def test_a_peer_that_resets_completes_every_queued_send_once_with_an_error(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, small=True)
    with sock:
        operations = [stall(port, sock, 1 << 20)]
        operations += [sock.send(pattern(1 << 20)) for _ in range(10)]
        operations.append(sock.sendv([b"one", b"two"]))
        operations.append(sock.disconnect())
        reset(peer)
        completions = drain(port, len(operations))
        assert [c.operation for c in completions] == operations
        assert completions[0].error in BROKEN
        assert 0 < completions[0].transferred < 1 << 20
        for completion in completions[1:]:
            assert completion.error != 0
            assert completion.transferred == 0
        assert settle(port) == []
        assert port.in_flight == 0
        late = sock.send(b"late")
        completion = one(port)
        assert completion.operation is late
        assert isinstance(completion.error, int)
        with pytest.raises(ConnectionError):
            completion.result()


def test_a_peer_that_resets_is_told_once_for_all_queued_quiet_sends(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, small=True, state="mine")
    with sock:
        for _ in range(20):
            assert sock.send(bytearray(1 << 18), quiet=True) is None
        nothing(port)
        unsent = sock.unsent
        assert 0 < unsent <= 20 << 18
        reset(peer)
        completion = one(port)
        assert completion.kind is an.SEND
        assert completion.operation is None
        assert completion.socket is sock
        assert completion.state == "mine"
        assert completion.error in BROKEN
        assert completion.transferred == unsent
        assert not completion.more
        assert sock.unsent == 0
        sock.send(b"silent now", quiet=True)
        nothing(port)


def test_a_file_for_a_peer_that_has_reset_fails_as_other_sends_do(port: an.CompletionPort) -> None:
    """TransmitFile itself says that there is no connection."""
    sock, peer = pair(port)
    reset(peer)
    assert select.select([sock.fileno()], [], [], PATIENCE)[0]
    with sock, tempfile.TemporaryFile() as file:
        file.write(b"file")
        file.flush()
        operations = [sock.sendfile(file), sock.send(b"behind")]
        completions = drain(port, 2)
        assert [c.operation for c in completions] == operations
        assert all(c.error in BROKEN for c in completions)


def test_a_peer_that_resets_ends_sends_and_receives_alike(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, small=True)
    with sock:
        receiving = sock.recv(multishot=True)
        sending = stall(port, sock, 1 << 20)
        reset(peer)
        completions = drain(port, 2)
        assert {c.operation for c in completions} == {receiving, sending}
        for completion in completions:
            assert not completion.more
            if completion.operation is sending:
                assert completion.error in BROKEN
            else:
                assert completion.error in (0, *BROKEN)
                assert not completion.data
        assert settle(port) == []


@pytest.mark.parametrize("ending", ["close", "disconnect"])
def test_a_peer_that_sends_shuts_down_and_reads_on_gets_its_whole_reply(
    port: an.CompletionPort, family: str, ending: str
) -> None:
    sock, peer = pair(port, family, small=True)
    reply = pattern(4 << 20)
    with sock:
        sock.recv(multishot=True)
        peer.sendall(b"request")
        peer.shutdown(socket.SHUT_WR)
        completions = drain(port, lambda so_far: so_far and not so_far[-1].more)
        assert received(completions) == b"request"
        assert completions[-1].result() == b""
        sock.send(reply, quiet=True)
        if ending == "close":
            sock.close(flush=True)
            assert sock.closed
        else:
            sock.disconnect()
        got, completions = pump(port, peer, None)
        assert got == reply
        completions += settle(port)
        assert [c.kind for c in completions] == ([an.DISCONNECT] if ending == "disconnect" else [])


def test_an_end_from_the_peer_does_not_break_a_reply_that_is_under_way(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, small=True)
    with sock:
        receiving = sock.recv(multishot=True)
        peer.sendall(b"request")
        assert one(port).data == b"request"
        sending = stall(port, sock, 4 << 20)
        peer.shutdown(socket.SHUT_WR)
        completion = one(port)
        assert completion.operation is receiving
        assert completion.result() == b""
        behind = sock.send(b"behind")
        got, completions = pump(port, peer, (4 << 20) + 6)
        completions += drain(port, 2 - len(completions))
        assert got == pattern(4 << 20) + b"behind"
        assert [c.operation for c in completions] == [sending, behind]
        assert [c.error for c in completions] == [0, 0]


@pytest.mark.parametrize("ending", ["nothing", "close"])
def test_an_end_from_the_peer_does_not_cut_off_what_the_system_has_of_a_send(
    port: an.CompletionPort, family: str, ending: str
) -> None:
    """Wine 8 ends the kernel's part of such a send early, and says that it went well."""
    sock, peer = pair(port, family, small=True)
    data = pattern(65535)
    with sock:
        sock.send(data, quiet=True)
        sock.recv()
        assert settle(port) == []
        peer.shutdown(socket.SHUT_WR)
        assert one(port).result() == b""
        assert settle(port) == []
        if ending == "close":
            sock.close(flush=True)
        got, completions = pump(port, peer, len(data))
        assert got == data
        assert completions == []


def test_after_our_own_disconnect_the_peers_data_still_comes(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock:
        sock.send(b"last words", quiet=True)
        disconnecting = sock.disconnect()
        completion = one(port)
        assert completion.operation is disconnecting
        completion.result()
        assert read_exactly(peer, 10) == b"last words"
        assert peer.recv(1) == b""
        sock.recv(multishot=True)
        for number in range(50):
            peer.sendall(pattern(10_000, number))
            got = drain(port, lambda so_far: len(received(so_far)) >= 10_000)
            assert received(got) == pattern(10_000, number)
        peer.shutdown(socket.SHUT_WR)
        completion = one(port)
        assert (completion.error, completion.data, completion.more) == (0, b"", False)


def test_a_disconnect_waits_for_a_full_window_and_both_sides_end_whole(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, small=True)
    with sock:
        sending = stall(port, sock, 2 << 20)
        disconnecting = sock.disconnect()
        receiving = sock.recv(multishot=True)
        nothing(port)
        peer.sendall(b"still talking")
        assert one(port).data == b"still talking"
        got, completions = pump(port, peer, None)
        assert got == pattern(2 << 20)
        completions += drain(port, 2 - len(completions))
        assert [c.operation for c in completions] == [sending, disconnecting]
        peer.close()
        completion = one(port)
        assert completion.operation is receiving
        assert completion.result() == b""


@pytest.mark.parametrize("size", [60_000, 300_000])
def test_what_was_sent_before_a_disconnect_arrives_though_the_peer_ends_its_side_meanwhile(
    port: an.CompletionPort, family: str, size: int
) -> None:
    """The system has a part of it in hand then, and a receive waits beside it."""
    sock, peer = pair(port, family, small=True)
    with sock:
        operations = [sock.recv(multishot=True), sock.send(pattern(size)), sock.disconnect()]
        completions = settle(port)
        got = bytearray()
        for _ in range(3):
            got += read_exactly(peer, 5000)
            completions += settle(port, 0)
        peer.shutdown(socket.SHUT_WR)
        rest, more = pump(port, peer, None)
        completions += more + drain(port, 3 - len(completions) - len(more))
        assert got + rest == pattern(size)
        assert {c.operation for c in completions} == set(operations)
        assert [c.error for c in completions] == [0, 0, 0]


def test_a_send_after_our_own_disconnect_is_a_broken_pipe(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock:
        sock.disconnect()
        assert one(port).error == 0
        operation = sock.send(b"too late")
        completion = one(port)
        assert completion.operation is operation
        with pytest.raises(BrokenPipeError):
            completion.result()
        assert peer.recv(1) == b""


def test_writing_on_and_on_to_a_dead_peer_only_yields_errors(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock:
        peer.close()
        failed = 0
        deadline = time.monotonic() + PATIENCE
        # Some may still be taken, until the system has heard that nobody is there.
        while failed < 100:
            assert failed or time.monotonic() < deadline
            operation = sock.send(b"anyone?")
            completion = one(port)
            assert completion.operation is operation
            if failed or completion.error:
                assert completion.error
                failed += 1
        assert completion.error in BROKEN


def test_what_is_started_on_a_broken_stream_completes_in_the_order_started(
    port: an.CompletionPort, family: str
) -> None:
    sock, _ = pair(port, family, small=True)
    with sock, tempfile.TemporaryFile() as file:
        file.write(b"file")
        file.flush()
        stall(port, sock, 1 << 20).cancel()
        assert one(port).error == errno.ECANCELED
        operations = [
            sock.send(b"one"),
            sock.disconnect(),
            sock.sendv([b"two", b"three"]),
            sock.sendfile(file),
            sock.disconnect(),
            sock.send(b""),
        ]
        completions = drain(port, len(operations))
        assert [c.operation for c in completions] == operations
        assert {c.error for c in completions} <= {errno.EPIPE, errno.ENOTCONN}
        assert {c.transferred for c in completions} == {0}


def without_room(port: an.CompletionPort, sock: an.AsyncSocket) -> None:
    """Fills the kernel's buffer until a send waits with its first byte, and cancels that one."""
    for _ in range(100_000):
        operation = sock.send(bytes(1000))
        assert operation is not None
        completion = port.dequeue(0)
        if completion is None:
            assert operation.cancel()
            completion = one(port)
            assert completion.transferred == 0
            return
        assert completion.error == 0
    raise AssertionError("the buffer has no end")


def test_a_disconnect_does_not_wait_for_room_that_it_does_not_need(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port, "unix", small=True)
    without_room(port, sock)
    sock.disconnect()
    completion = one(port)
    assert completion.kind is an.DISCONNECT
    assert completion.error == 0
    assert set(read_to_end(peer)) == {0}


def test_an_empty_send_does_not_wait_for_room_that_it_does_not_need(
    port: an.CompletionPort,
) -> None:
    sock, _peer = pair(port, "unix", small=True)
    without_room(port, sock)
    sock.send(b"")
    behind = sock.send(b"behind")
    completion = one(port)
    assert (completion.kind, completion.transferred, completion.error) == (an.SEND, 0, 0)
    assert behind is not None
    assert behind.pending
