"""Sending on streams: send, sendv, quiet sends, sendfile, disconnect."""

from __future__ import annotations

import array
import errno
import gc
import io
import os
import socket
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import asyncio_native as an
import pytest
from support import (
    cancelled,
    drain,
    family_number,
    keep,
    nothing,
    one,
    open_descriptors,
    pair,
    pattern,
    pump,
    read_exactly,
    read_to_end,
    reset,
    settle,
    stall,
    stdlib_listener,
)

# -- send -----------------------------------------------------------------------------------------


def test_send_completes_when_all_is_handed_over(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operation = sock.send(b"hello")
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.SEND
    assert completion.transferred == 5
    assert completion.result() == 5
    assert read_exactly(peer, 5) == b"hello"
    nothing(port)


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda data: memoryview(b"-" + data + b"-")[1:-1],
        lambda data: array.array("B", data),
        lambda data: memoryview(array.array("H", data)),
    ],
)
def test_send_takes_any_contiguous_buffer(
    port: an.CompletionPort, make: Callable[[bytes], Any]
) -> None:
    sock, peer = pair(port)
    data = pattern(1000)
    sock.send(make(data))
    assert one(port).result() == 1000, "bytes, not items"
    sock.send(make(data), quiet=True)
    assert read_exactly(peer, 2000) == data + data


@pytest.mark.parametrize("wrong", ["text", None, 5, [b"x"], object()])
def test_send_refuses_other_types(port: an.CompletionPort, wrong: Any) -> None:
    sock, _ = pair(port)
    with pytest.raises(TypeError):
        sock.send(wrong)
    with pytest.raises(TypeError):
        sock.send(wrong, quiet=True)
    assert port.in_flight == 0
    nothing(port)


def test_send_refuses_a_buffer_with_gaps(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    with pytest.raises((BufferError, TypeError, ValueError)):
        sock.send(memoryview(bytes(10))[::2])
    assert port.in_flight == 0


def test_send_completes_whole_under_a_full_window(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    operation = sock.send(pattern(4 << 20))
    data, completions = pump(port, peer, 4 << 20)
    completions += settle(port)
    assert data == pattern(4 << 20)
    assert [c.operation for c in completions] == [operation]
    assert completions[0].result() == 4 << 20


@pytest.mark.slow
def test_64_mib_go_out_in_one_send(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    size = 64 << 20
    operation = sock.send(pattern(size))
    data, completions = pump(port, peer, size, 40)
    completions += settle(port)
    assert data == pattern(size)
    assert [c.operation for c in completions] == [operation]
    assert completions[0].transferred == size


def test_sends_that_wait_complete_in_order(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    sizes = [1 << 20, 1, 300_000, 0, 65536, 7]
    expected = b""
    operations = []
    for size in sizes:
        data = pattern(size, len(expected))
        operations.append(sock.send(data))
        expected += data
    arrived, completions = pump(port, peer, len(expected))
    completions += settle(port)
    assert arrived == expected
    assert [c.operation for c in completions] == operations
    assert [c.transferred for c in completions] == sizes


def test_send_of_nothing_completes_after_what_was_sent_before(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    big = stall(port, sock, 4 << 20)
    barrier = sock.send(b"")
    nothing(port)
    _, completions = pump(port, peer, 4 << 20)
    completions += settle(port)
    assert [c.operation for c in completions] == [big, barrier]
    assert completions[1].result() == 0


def test_send_of_nothing_is_a_barrier_behind_quiet_sends(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.send(pattern(4 << 20), quiet=True)
    barrier = sock.send(b"")
    assert barrier is not None
    nothing(port)
    assert barrier.pending
    data, completions = pump(port, peer, 4 << 20)
    completions += settle(port)
    assert data == pattern(4 << 20)
    assert [c.operation for c in completions] == [barrier]


def test_send_of_nothing_on_an_idle_stream_completes(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.send(b"")
    completion = one(port)
    assert completion.result() == 0
    sock.send(b"x")
    assert one(port).result() == 1
    assert read_exactly(peer, 1) == b"x", "nothing came before it"


def test_a_send_starts_without_a_dequeue(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    sock.send(b"progress")
    assert read_exactly(peer, 8) == b"progress"
    assert port.in_flight == 1
    assert one(port).result() == 8


def test_a_stream_sends_once_it_is_connected(port: an.CompletionPort, family: str) -> None:
    listener = stdlib_listener(family)
    sock = an.AsyncSocket(family_number(family))
    port.associate(sock)
    connect = sock.connect(listener.getsockname())
    completion = one(port)
    assert completion.operation is connect
    assert completion.kind is an.CONNECT
    assert completion.result() is None
    peer = keep(listener.accept()[0])
    sock.send(b"x")
    assert one(port).result() == 1
    assert read_exactly(peer, 1) == b"x"


def test_sends_to_a_reset_peer_complete_with_an_error(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    operations = [stall(port, sock), sock.send(b"behind"), sock.sendv([b"be", b"hind"])]
    reset(peer)
    completions = drain(port, 3)
    assert [c.operation for c in completions] == operations
    first, *rest = completions
    assert first.error == errno.ECONNRESET
    assert 0 < first.transferred < 32 << 20
    for completion in rest:
        assert completion.transferred == 0
        with pytest.raises(BrokenPipeError):
            completion.result()


def test_later_sends_on_a_broken_stream_complete_with_broken_pipe(
    port: an.CompletionPort, family: str
) -> None:
    sock, _ = pair(port, family, small=True)
    send = stall(port, sock)
    assert send.cancel()
    completion = one(port)
    assert cancelled(completion)
    assert 0 < completion.transferred < 32 << 20
    for _ in range(3):
        sock.send(b"later")
        completion = one(port)
        assert completion.error == errno.EPIPE
        assert completion.transferred == 0


def test_a_cancelled_send_tells_how_much_went_out(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    send = stall(port, sock)
    assert send.cancel()
    completion = one(port)
    sock.close()
    assert read_to_end(peer) == pattern(completion.transferred)


def test_a_send_stopped_before_its_first_byte_harms_nothing(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, small=True)
    first = stall(port, sock, 4 << 20)
    victim = sock.send(b"never seen" * 1000)
    last = sock.send(b"the end")
    assert victim is not None
    assert victim.cancel()
    completion = one(port)
    assert completion.operation is victim
    assert cancelled(completion)
    assert completion.transferred == 0
    data, completions = pump(port, peer, (4 << 20) + 7)
    completions += settle(port)
    assert data == pattern(4 << 20) + b"the end"
    assert [c.operation for c in completions] == [first, last]
    assert all(c.error == 0 for c in completions)


# -- sendv ----------------------------------------------------------------------------------------


def test_sendv_gathers(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operation = sock.sendv([b"one ", bytearray(b"two "), memoryview(b"three"), b""])
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.SEND
    assert completion.result() == 13
    assert read_exactly(peer, 13) == b"one two three"


@pytest.mark.parametrize("make", [list, tuple, iter])
def test_sendv_takes_any_iterable(port: an.CompletionPort, make: Callable[[Any], Any]) -> None:
    sock, peer = pair(port)
    sock.sendv(make([b"a", b"b"]))
    assert one(port).result() == 2
    assert read_exactly(peer, 2) == b"ab"


def test_sendv_completes_whole_under_a_full_window(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    whole = pattern(3_000_000)
    pieces = [whole[start : start + 10_007] for start in range(0, len(whole), 10_007)]
    operation = sock.sendv(pieces)
    data, completions = pump(port, peer, len(whole))
    completions += settle(port)
    assert data == whole
    assert [c.operation for c in completions] == [operation]
    assert completions[0].transferred == len(whole)


def test_sendv_takes_more_buffers_than_one_call_of_the_system(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    whole = pattern(5000)
    sock.sendv([whole[n : n + 1] for n in range(5000)])
    assert one(port).result() == 5000
    assert read_exactly(peer, 5000) == whole


def test_sendv_of_nothing_completes(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.sendv([b"", b""])
    assert one(port).result() == 0


@pytest.mark.parametrize("wrong", [None, 5, ["text"], [b"x", None], [b"x", 5]])
def test_sendv_refuses_other_types(port: an.CompletionPort, wrong: Any) -> None:
    sock, peer = pair(port)
    with pytest.raises(TypeError):
        sock.sendv(wrong)
    with pytest.raises(TypeError):
        sock.sendv(wrong, quiet=True)
    assert port.in_flight == 0
    sock.send(b"nothing before this")
    assert read_exactly(peer, 19) == b"nothing before this"
    one(port)


def test_sendv_holds_all_its_buffers(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    stall(port, sock, 4 << 20)
    buffers = [bytearray(b"a" * 10), bytearray(b"b" * 10)]
    sock.sendv(buffers)
    for buffer in buffers:
        with pytest.raises(BufferError):
            buffer.append(0)
    pump(port, peer, (4 << 20) + 20)
    settle(port)
    for buffer in buffers:
        buffer.append(0)


def test_sendv_that_failed_to_start_holds_nothing(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    buffer = bytearray(10)
    wrong: Any = [buffer, "text"]
    with pytest.raises(TypeError):
        sock.sendv(wrong)
    gc.collect()
    buffer.append(0)


# -- quiet ----------------------------------------------------------------------------------------


def test_quiet_gives_no_completion(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    assert sock.send(b"one ", quiet=True) is None
    assert sock.sendv([b"two ", b"three"], quiet=True) is None
    assert port.in_flight == 0
    assert read_exactly(peer, 13) == b"one two three"
    nothing(port)


def test_quiet_sends_go_out_whole_and_in_order(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    expected = b""
    for number in range(40):
        data = pattern(100_000 + number, len(expected))
        if number % 3:
            sock.send(data, quiet=True)
        else:
            sock.sendv([data[:50], data[50:]], quiet=True)
        expected += data
    data, completions = pump(port, peer, len(expected))
    assert data == expected
    assert completions == []
    nothing(port)


def test_quiet_and_other_sends_keep_their_order(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    expected = b""
    operations = []
    for number in range(30):
        data = pattern(50_000, len(expected))
        operation = sock.send(data, quiet=number % 2 == 0)
        if operation is not None:
            operations.append(operation)
        expected += data
    arrived, completions = pump(port, peer, len(expected))
    completions += settle(port)
    assert arrived == expected
    assert [c.operation for c in completions] == operations


def test_a_quiet_buffer_is_free_when_the_call_returns(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    expected = b""
    buffer = bytearray()
    for number in range(20):
        buffer[:] = pattern(100_000 + number, len(expected))
        expected += buffer
        sock.send(buffer, quiet=True)
        buffer.append(0)  # may be resized
        buffer[:] = b"overwritten"
    data, _ = pump(port, peer, len(expected))
    assert data == expected


def test_quiet_sendv_buffers_are_free_when_the_call_returns(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    buffers = [bytearray(pattern(1 << 20)), bytearray(b"tail")]
    sock.sendv(buffers, quiet=True)
    for buffer in buffers:
        buffer[:] = b"overwritten"
    data, _ = pump(port, peer, (1 << 20) + 4)
    assert data == pattern(1 << 20) + b"tail"


def test_a_quiet_failure_is_one_completion_with_the_bytes_lost(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True, state="state")
    total = 0
    for number in range(20):
        sock.send(bytes(100_000 + number), quiet=True)
        total += 100_000 + number
    nothing(port)
    assert peer.recv(10, socket.MSG_PEEK), "some had gone out"
    reset(peer)
    completion = one(port)
    assert completion.kind is an.SEND
    assert completion.operation is None
    assert completion.socket is sock
    assert completion.state == "state"
    assert not completion.more
    assert total - (1 << 20) < completion.transferred < total, "the bytes that were lost"
    with pytest.raises(ConnectionResetError):
        completion.result()
    nothing(port)


def test_the_bytes_lost_and_the_bytes_sent_are_all(port: an.CompletionPort) -> None:
    sock, peer = pair(port, "unix", small=True)
    for _ in range(20):
        sock.send(bytes(100_000), quiet=True)
    nothing(port)
    arrived = 0
    peer.setblocking(False)
    while True:
        try:
            arrived += len(peer.recv(1 << 20))
        except BlockingIOError:
            break
    peer.close()
    completion = one(port)
    assert completion.error == errno.EPIPE
    assert arrived + completion.transferred == 2_000_000


def test_after_a_quiet_failure_quiet_sends_are_silent_and_others_fail(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port, "unix")
    peer.close()
    sock.send(b"abc", quiet=True)
    completion = one(port)
    assert completion.transferred == 3
    for _ in range(5):
        assert sock.send(b"silent", quiet=True) is None
        assert sock.sendv([b"si", b"lent"], quiet=True) is None
    nothing(port)
    operation = sock.send(b"x")
    completion = one(port)
    assert completion.operation is operation
    assert completion.error == errno.EPIPE
    nothing(port)


def test_quiet_sends_queued_behind_a_failure_fall_under_its_completion(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port, small=True)
    sock.send(bytes(4 << 20), quiet=True)
    for _ in range(10):
        sock.send(bytes(1000), quiet=True)
    nothing(port)
    reset(peer)
    completion = one(port)
    assert (3 << 20) + 10_000 < completion.transferred < (4 << 20) + 10_000
    nothing(port)


def test_a_failure_of_others_and_of_quiet_ones_behind_are_both_told(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port, small=True)
    send = stall(port, sock)
    sock.send(bytes(1000), quiet=True)
    sock.send(bytes(500), quiet=True)
    reset(peer)
    first, second = drain(port, 2)
    assert first.operation is send
    assert first.error
    assert second.operation is None
    assert second.transferred == 1500
    assert second.error
    nothing(port)


def test_quiet_sends_dropped_by_ones_own_close_give_none(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    for _ in range(10):
        sock.send(bytes(1 << 20), quiet=True)
    nothing(port)
    sock.close()
    nothing(port)
    assert len(read_to_end(peer)) < 10 << 20


def test_a_quiet_failure_that_was_queued_survives_close(port: an.CompletionPort) -> None:
    sock, peer = pair(port, "unix")
    peer.close()
    sock.send(b"abc", quiet=True)
    sock.close()
    completion = one(port)
    assert completion.operation is None
    assert completion.transferred == 3
    assert completion.error == errno.EPIPE
    nothing(port)


def test_a_quiet_failure_is_found_without_a_send(port: an.CompletionPort) -> None:
    """Never lost: nobody calls the socket again, and still the loss is told."""
    sock, peer = pair(port, small=True)
    sock.send(bytes(8 << 20), quiet=True)
    nothing(port)
    del sock
    gc.collect()
    reset(peer)
    completion = one(port)
    assert completion.operation is None
    assert completion.socket is not None
    assert completion.transferred > 0
    completion.socket.close()


def test_quiet_bytes_may_be_held(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    for _ in range(8):
        sock.send(b"%d" % id(sock) * 100_000, quiet=True)
        gc.collect()
    expected = b"%d" % id(sock) * 800_000
    data, _ = pump(port, peer, len(expected))
    assert data == expected


# -- sendfile -------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[IO[bytes]]:
    """An open file with 1,000,003 bytes of the pattern."""
    path = tmp_path / "file"
    path.write_bytes(pattern(1_000_003))
    with open(path, "rb") as opened:
        yield opened


def test_sendfile_sends_the_whole_file(
    port: an.CompletionPort, family: str, file: IO[bytes]
) -> None:
    sock, peer = pair(port, family, small=True)
    operation = sock.sendfile(file)
    data, completions = pump(port, peer, 1_000_003)
    completions += settle(port)
    assert data == pattern(1_000_003)
    assert [c.operation for c in completions] == [operation]
    assert completions[0].kind is an.SENDFILE
    assert completions[0].result() == 1_000_003


def test_sendfile_sends_a_part(port: an.CompletionPort, file: IO[bytes]) -> None:
    sock, peer = pair(port)
    sock.sendfile(file, 1000, 500)
    assert one(port).result() == 500
    sock.sendfile(file, offset=10, count=5)
    assert one(port).result() == 5
    sock.sendfile(file, offset=1_000_000)
    assert one(port).result() == 3
    assert read_exactly(peer, 508) == (
        pattern(500, 1000) + pattern(5, 10) + pattern(1_000_003)[1_000_000:]
    )


def test_sendfile_neither_uses_nor_moves_the_position(
    port: an.CompletionPort, file: IO[bytes]
) -> None:
    sock, peer = pair(port)
    file.seek(12345)
    sock.sendfile(file, 0, 100)
    assert one(port).result() == 100
    assert file.tell() == 12345
    assert read_exactly(peer, 100) == pattern(100)


def test_sendfile_does_not_move_the_position_of_the_descriptor(
    port: an.CompletionPort, tmp_path: Path
) -> None:
    (tmp_path / "raw").write_bytes(pattern(1000))
    with open(tmp_path / "raw", "rb", buffering=0) as raw:
        raw.seek(77)
        sock, peer = pair(port)
        sock.sendfile(raw, 5, 100)
        assert one(port).result() == 100
        assert os.lseek(raw.fileno(), 0, os.SEEK_CUR) == 77
        assert read_exactly(peer, 100) == pattern(100, 5)


def test_the_file_may_be_closed_at_once(port: an.CompletionPort, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(pattern(3_000_000))
    sock, peer = pair(port, small=True)
    with open(tmp_path / "file", "rb") as opened:
        operation = sock.sendfile(opened)
    assert operation.pending
    data, completions = pump(port, peer, 3_000_000)
    completions += settle(port)
    assert data == pattern(3_000_000)
    assert [c.transferred for c in completions] == [3_000_000]


def test_sendfile_past_the_end_completes_with_what_was_there(
    port: an.CompletionPort, file: IO[bytes]
) -> None:
    sock, peer = pair(port)
    sock.sendfile(file, 1_000_000, 100)
    completion = one(port)
    assert completion.error == 0
    assert completion.result() == 3
    sock.sendfile(file, 2_000_000)
    assert one(port).result() == 0
    sock.sendfile(file, 2_000_000, 5)
    assert one(port).result() == 0
    sock.send(b"on", quiet=True)
    assert read_exactly(peer, 5) == pattern(1_000_003)[1_000_000:] + b"on"


def test_sendfile_of_an_empty_file_completes(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    with tempfile.TemporaryFile() as empty:
        sock.sendfile(empty)
        assert one(port).result() == 0


def test_sendfile_of_a_file_that_shrinks_completes(port: an.CompletionPort, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 << 20))
    sock, peer = pair(port, small=True)
    with open(tmp_path / "file", "rb+") as opened:
        operation = sock.sendfile(opened, 0, 4 << 20)
        settle(port)
        assert operation.pending
        opened.truncate(0)
    sock.disconnect()
    data, completions = pump(port, peer, None)
    completions += settle(port)
    assert completions[0].operation is operation
    assert completions[0].error == 0
    assert completions[0].transferred == len(data)


def test_sendfile_keeps_the_order_of_sends(
    port: an.CompletionPort, family: str, file: IO[bytes]
) -> None:
    sock, peer = pair(port, family, small=True)
    operations = [
        sock.send(b"before"),
        sock.sendfile(file, 0, 300_000),
        sock.send(b"between"),
        sock.sendfile(file, 300_000, 200_000),
        sock.send(b"after"),
    ]
    sock.send(b"quietly", quiet=True)
    whole = pattern(500_000)
    expected = b"before" + whole[:300_000] + b"between" + whole[300_000:] + b"after" + b"quietly"
    data, completions = pump(port, peer, len(expected))
    completions += settle(port)
    assert data == expected
    assert [c.operation for c in completions] == operations


def test_sendfile_fails_when_the_peer_resets(port: an.CompletionPort, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(16 << 20))
    sock, peer = pair(port, small=True)
    with open(tmp_path / "file", "rb") as opened:
        operation = sock.sendfile(opened)
    nothing(port)
    reset(peer)
    completion = one(port)
    assert completion.operation is operation
    assert 0 < completion.transferred < 16 << 20
    with pytest.raises(ConnectionError):
        completion.result()


def test_a_cancelled_sendfile_breaks_the_stream(port: an.CompletionPort, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(pattern(16 << 20))
    sock, peer = pair(port, small=True)
    with open(tmp_path / "file", "rb") as opened:
        operation = sock.sendfile(opened)
    nothing(port)
    assert operation.cancel()
    completion = one(port)
    assert cancelled(completion)
    assert 0 < completion.transferred < 16 << 20
    sock.send(b"x")
    assert one(port).error == errno.EPIPE
    sock.close()
    assert read_to_end(peer) == pattern(completion.transferred)


@pytest.mark.skipif(sys.platform != "linux", reason="it counts descriptors through /proc")
def test_the_duplicate_descriptor_is_closed(port: an.CompletionPort, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    sock, peer = pair(port, small=True)

    def open_copies() -> int:
        return sum(name == str(path) for name in open_descriptors().values())

    with open(path, "rb") as opened:
        sock.sendfile(opened, 0, 100)
        assert one(port).result() == 100
        assert open_copies() == 1
        first = sock.sendfile(opened)
        second = sock.sendfile(opened)
    assert open_copies() >= 1
    settle(port)
    second.cancel()
    one(port)
    first.cancel()
    one(port)
    assert open_copies() == 0
    peer.close()


@pytest.mark.parametrize("arguments", [(-1,), (0, -1), (-5, 10)])
def test_sendfile_refuses_values_out_of_range(
    port: an.CompletionPort, file: IO[bytes], arguments: tuple[int, ...]
) -> None:
    sock, _ = pair(port)
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        sock.sendfile(file, *arguments)
    assert port.in_flight == 0


def test_sendfile_of_a_file_in_memory_raises_what_tells_of_send(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    with pytest.raises(TypeError, match=r"descriptor.*BytesIO.*send\(\)"):
        sock.sendfile(io.BytesIO(b"data"))
    assert port.in_flight == 0


@pytest.mark.parametrize("wrong", ["name", None, 1.5, object(), b"bytes"])
def test_sendfile_refuses_what_is_no_file(port: an.CompletionPort, wrong: Any) -> None:
    sock, _ = pair(port)
    with pytest.raises(TypeError):
        sock.sendfile(wrong)
    assert port.in_flight == 0


def test_sendfile_of_a_closed_file_raises(port: an.CompletionPort, tmp_path: Path) -> None:
    sock, _ = pair(port)
    opened = open(tmp_path / "file", "wb")
    opened.close()
    with pytest.raises((ValueError, OSError)):
        sock.sendfile(opened)
    assert port.in_flight == 0


# -- disconnect -----------------------------------------------------------------------------------


def test_disconnect_ends_the_stream_for_the_peer(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operation = sock.disconnect()
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.DISCONNECT
    assert completion.result() is None
    assert peer.recv(1) == b""


def test_disconnect_comes_after_what_was_sent_before(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    send = sock.send(pattern(2 << 20))
    sock.send(b"and quietly", quiet=True)
    disconnect = sock.disconnect()
    nothing(port)
    data, completions = pump(port, peer, None)
    completions += settle(port)
    assert data == pattern(2 << 20) + b"and quietly"
    assert [c.operation for c in completions] == [send, disconnect]


def test_after_disconnect_receiving_goes_on(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    sock.recv(multishot=True)
    sock.disconnect()
    assert one(port).kind is an.DISCONNECT
    assert peer.recv(1) == b""
    peer.sendall(b"a whole reply")
    completion = one(port)
    assert completion.data == b"a whole reply"
    assert completion.more
    peer.close()
    assert one(port).data == b""


def test_after_disconnect_sends_complete_with_broken_pipe(
    port: an.CompletionPort, family: str
) -> None:
    sock, _ = pair(port, family)
    sock.disconnect()
    sock.send(b"late")
    first, second = drain(port, 2)
    assert first.result() is None
    assert second.error == errno.EPIPE
    assert second.transferred == 0


def test_disconnect_behind_a_failed_send_fails(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    send = stall(port, sock)
    disconnect = sock.disconnect()
    reset(peer)
    first, second = drain(port, 2)
    assert first.operation is send
    assert second.operation is disconnect
    assert first.error
    assert second.error


def test_a_waiting_disconnect_can_be_cancelled(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    send = stall(port, sock, 4 << 20)
    disconnect = sock.disconnect()
    assert disconnect.cancel()
    completion = one(port)
    assert completion.operation is disconnect
    assert cancelled(completion)
    last = sock.send(b"still open")
    data, completions = pump(port, peer, (4 << 20) + 10)
    completions += settle(port)
    assert data.endswith(b"still open")
    assert [c.operation for c in completions] == [send, last]


# -- buffers --------------------------------------------------------------------------------------


def test_the_buffer_of_a_send_is_released_at_dequeue(port: an.CompletionPort) -> None:
    class Buffer(bytearray):
        pass

    sock, peer = pair(port)
    buffer = Buffer(b"x" * 100)
    reference = weakref.ref(buffer)
    operation = sock.send(buffer)
    assert operation is not None
    assert read_exactly(peer, 100) == b"x" * 100
    with pytest.raises(BufferError):
        buffer.append(0)
    del buffer
    gc.collect()
    assert reference() is not None
    completion = one(port)
    assert completion.operation is operation
    del completion
    gc.collect()
    assert reference() is None, "a finished operation holds no buffer"


def test_the_peer_gets_what_was_in_the_buffer_when_it_went_out(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    buffer = bytearray(b"same size")
    sock.send(buffer)
    one(port)
    buffer[:] = b"different"
    assert read_exactly(peer, 9) == b"same size"
