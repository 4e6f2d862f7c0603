"""Guarantee 3: sends go out in the order started, whole, from any number of threads; receives
fill in the order started; completions of one direction are queued in the order started."""

from __future__ import annotations

import struct
import threading

import asyncio_native as an
import pytest
from support import PATIENCE, drain, pair, pattern, pump, received, settle


def test_sends_of_one_thread_go_out_in_order(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    sizes = [1 + (number * 7919) % 30_000 for number in range(150)]
    expected = bytearray()
    operations = []
    for number, size in enumerate(sizes):
        data = pattern(size, len(expected))
        expected += data
        operation = (
            sock.sendv([data[: size // 2], data[size // 2 :]])
            if number % 4 == 0
            else sock.send(data)
        )
        operations.append(operation)
    arrived, completions = pump(port, peer, len(expected))
    completions += settle(port)
    assert arrived == expected
    assert [c.operation for c in completions] == operations
    assert [c.transferred for c in completions] == sizes


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [False, True])
def test_sends_of_many_threads_are_whole_and_in_order_for_each(
    port: an.CompletionPort, quiet: bool
) -> None:
    sock, peer = pair(port, small=True)
    threads, messages, size = 6, 25, 20_000

    def work(thread: int) -> None:
        for number in range(messages):
            sock.send(struct.pack(">II", thread, number) * (size // 8), quiet=quiet)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    arrived, completions = pump(port, peer, threads * messages * size, 2 * PATIENCE)
    for worker in workers:
        worker.join(PATIENCE)
    completions += settle(port)
    assert len(completions) == (0 if quiet else threads * messages)
    following = [0] * threads
    for start in range(0, len(arrived), size):
        message = arrived[start : start + size]
        thread, number = struct.unpack(">II", message[:8])
        assert message == struct.pack(">II", thread, number) * (size // 8), "interleaved"
        assert number == following[thread], "out of order"
        following[thread] += 1
    assert following == [messages] * threads


@pytest.mark.slow
def test_completions_of_many_threads_come_in_the_order_of_the_bytes(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port, small=True)
    threads, messages, size = 4, 40, 8_000
    marks: dict[an.Operation | None, bytes] = {}

    def work(thread: int) -> None:
        for number in range(messages):
            mark = struct.pack(">II", thread, number)
            operation = sock.send(mark * (size // 8))
            marks[operation] = mark

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    arrived, completions = pump(port, peer, threads * messages * size, 2 * PATIENCE)
    for worker in workers:
        worker.join(PATIENCE)
    completions += settle(port)
    order_of_bytes = [arrived[start : start + 8] for start in range(0, len(arrived), size)]
    assert [marks[c.operation] for c in completions] == order_of_bytes


def test_receives_fill_in_order(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    sizes = [1 + (number * 37) % 200 for number in range(100)]
    whole = pattern(sum(sizes))
    buffers = []
    operations = []
    for number, size in enumerate(sizes):
        if number % 2:
            buffers.append(bytearray(size))
            operations.append(sock.recv_into(buffers[-1]))
        else:
            operations.append(sock.recv(size))
    peer.sendall(whole)
    completions = drain(port, 100)
    assert [c.operation for c in completions] == operations
    assert [c.transferred for c in completions] == sizes
    into = iter(buffers)
    got = b"".join(
        c.data if c.data is not None else bytes(next(into))[: c.transferred] for c in completions
    )
    assert got == whole


def test_receives_started_before_and_after_the_data_fill_in_order(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    first = [sock.recv(10) for _ in range(3)]
    peer.sendall(pattern(60))
    second = [sock.recv(10) for _ in range(3)]
    completions = drain(port, 6)
    assert [c.operation for c in completions] == first + second
    assert received(completions) == pattern(60)


def test_a_small_send_does_not_overtake_a_big_one(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    big = sock.send(pattern(1 << 20))
    small = [sock.send(b"%d" % n) for n in range(10)]
    data, completions = pump(port, peer, (1 << 20) + 10)
    completions += settle(port)
    assert data == pattern(1 << 20) + b"0123456789"
    assert [c.operation for c in completions] == [big, *small]


def test_receiving_does_not_wait_for_sending(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    send = sock.send(bytes(32 << 20))
    settle(port)
    sock.recv()
    peer.sendall(b"the other direction")
    completion = drain(port, 1)[0]
    assert completion.data == b"the other direction"
    assert send is not None
    assert send.pending


@pytest.mark.dequeuing_threads
def test_one_shot_receives_rearmed_after_handling_keep_strict_order_over_threads(
    port: an.CompletionPort,
) -> None:
    """The way that API.md recommends for strict order with threads that dequeue side by side."""
    sock, peer = pair(port)
    whole = pattern(200_000)
    handled = bytearray()
    problems: list[BaseException] = []

    def work() -> None:
        try:
            while len(handled) < len(whole):
                completion = port.dequeue(timeout=0.2)
                if completion is not None and completion.kind is an.RECV:
                    assert completion.data
                    handled.extend(completion.data)
                    sock.recv(1000)
        except BaseException as error:
            problems.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    sock.recv(1000)
    for worker in workers:
        worker.start()
    peer.sendall(whole)
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive()
    assert not problems
    assert handled == whole
