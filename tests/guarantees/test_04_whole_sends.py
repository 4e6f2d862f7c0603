"""Guarantee 4: a send completes short only with an error, and then `transferred` tells how many
bytes went out; a stream whose send broke off in the middle is broken; one that was stopped before
its first byte harms nothing behind it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from support import (
    cancelled,
    drain,
    nothing,
    one,
    pair,
    pattern,
    pump,
    read_to_end,
    reset,
    settle,
    stall,
)


def test_no_send_completes_short_without_an_error(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    sizes = [1, 16384, 16385, 100_000, 1_000_000, 3, 2_000_000]
    whole = pattern(sum(sizes))
    start = 0
    for size in sizes:
        sock.send(whole[start : start + size])
        start += size
    data, completions = pump(port, peer, len(whole))
    completions += settle(port)
    assert data == whole
    assert [(c.error, c.transferred) for c in completions] == [(0, size) for size in sizes]


STARTS: dict[str, Callable[[an.AsyncSocket, Path], Any]] = {
    "send": lambda sock, path: sock.send(pattern(16 << 20)),
    "sendv": lambda sock, path: sock.sendv([pattern(1 << 20)] * 16),
    "sendfile": lambda sock, path: _sendfile(sock, path),
}


def _sendfile(sock: an.AsyncSocket, path: Path) -> an.Operation:
    path.write_bytes(pattern(16 << 20))
    with open(path, "rb") as file:
        return sock.sendfile(file)


@pytest.mark.parametrize("name", STARTS)
def test_a_send_cancelled_in_the_middle_breaks_the_stream(
    port: an.CompletionPort, family: str, name: str, tmp_path: Path
) -> None:
    sock, peer = pair(port, family, small=True)
    operation = STARTS[name](sock, tmp_path / "file")
    queued = [sock.send(b"queued behind"), sock.sendv([b"and", b"this"])]
    settle(port)
    assert operation.pending
    assert operation.cancel()
    completions = drain(port, 3)
    assert [c.operation for c in completions] == [operation, *queued]
    assert cancelled(completions[0])
    assert 0 < completions[0].transferred < 16 << 20
    for completion in completions[1:]:
        assert completion.error == errno.EPIPE
        assert completion.transferred == 0
        with pytest.raises(BrokenPipeError):
            completion.result()
    sock.close()
    assert len(read_to_end(peer)) == completions[0].transferred
    nothing(port)


@pytest.mark.parametrize("name", STARTS)
def test_a_send_that_failed_in_the_middle_breaks_the_stream(
    port: an.CompletionPort, name: str, tmp_path: Path
) -> None:
    sock, peer = pair(port, small=True)
    operation = STARTS[name](sock, tmp_path / "file")
    queued = sock.send(b"queued behind")
    settle(port)
    reset(peer)
    first, second = drain(port, 2)
    assert first.operation is operation
    assert second.operation is queued
    assert first.error
    assert not cancelled(first)
    assert second.error == errno.EPIPE
    sock.send(b"later")
    assert one(port).error == errno.EPIPE


@pytest.mark.parametrize("victim_start", STARTS)
def test_a_send_stopped_before_its_first_byte_harms_nothing(
    port: an.CompletionPort, victim_start: str, tmp_path: Path
) -> None:
    sock, peer = pair(port, small=True)
    first = stall(port, sock, 4 << 20)
    victim = STARTS[victim_start](sock, tmp_path / "file")
    behind = sock.send(b"behind")
    assert victim.cancel()
    completion = one(port)
    assert completion.operation is victim
    assert cancelled(completion)
    assert completion.transferred == 0
    data, completions = pump(port, peer, (4 << 20) + 6)
    completions += settle(port)
    assert data == pattern(4 << 20) + b"behind"
    assert [(c.operation, c.error) for c in completions] == [(first, 0), (behind, 0)]
    sock.send(b"and after")
    assert one(port).result() == 9


def test_quiet_sends_behind_a_broken_stream_are_one_failure(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True)
    send = stall(port, sock)
    sock.send(bytes(100), quiet=True)
    sock.send(bytes(200), quiet=True)
    assert send.cancel()
    first, second = drain(port, 2)
    assert first.operation is send
    assert second.operation is None
    assert second.kind is an.SEND
    assert second.transferred == 300
    assert second.error == errno.EPIPE
    sock.send(bytes(10), quiet=True)
    nothing(port)


def test_a_broken_stream_still_receives(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    stall(port, sock).cancel()
    assert cancelled(one(port))
    sock.recv()
    peer.sendall(b"the other direction is whole")
    assert one(port).data == b"the other direction is whole"


def test_a_barrier_on_a_broken_stream_fails(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True)
    stall(port, sock).cancel()
    assert cancelled(one(port))
    sock.send(b"")
    assert one(port).error == errno.EPIPE


def test_transferred_counts_every_byte_that_went_out(port: an.CompletionPort) -> None:
    sock, peer = pair(port, "unix", small=True)
    send = stall(port, sock)
    arrived, completions = pump(port, peer, 3 << 20)
    assert not completions
    assert send.cancel()
    completion = one(port)
    sock.close()
    arrived += read_to_end(peer)
    assert completion.transferred == len(arrived)
    assert arrived == pattern(len(arrived))
