"""Two threads at once: cancel, close and dequeue against completion, start and threads' ends."""

from __future__ import annotations

import errno
import queue
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    dial,
    drain,
    listening,
    one,
    pair,
    pattern,
    pump,
    read_exactly,
    refusing_address,
    settle,
    stall,
)


@contextmanager
def thread(target: Callable[[], None]) -> Iterator[threading.Thread]:
    """Runs the function in a thread beside the block; what it raises fails the test."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            target()
        except BaseException as error:
            failures.append(error)

    running = threading.Thread(target=run, daemon=True)
    running.start()
    try:
        yield running
    finally:
        running.join(PATIENCE)
    assert not running.is_alive(), "the thread does not end"
    if failures:
        raise failures[0]


@contextmanager
def canceller() -> Iterator[queue.SimpleQueue[an.Operation | None]]:
    """A thread that cancels each operation that is put into the queue."""
    work: queue.SimpleQueue[an.Operation | None] = queue.SimpleQueue()

    def cancel_all() -> None:
        while (operation := work.get()) is not None:
            operation.cancel()

    with thread(cancel_all):
        try:
            yield work
        finally:
            work.put(None)


def test_a_cancel_that_races_with_arriving_data_loses_none(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    outcomes: Counter[int] = Counter()
    with sock, canceller() as work:
        for number in range(1000):
            message = b"%d." % number
            operation = sock.recv()
            if number % 2:
                work.put(operation)
                peer.send(message)
            else:
                peer.send(message)
                work.put(operation)
            completion = one(port)
            assert completion.operation is operation
            outcomes[completion.error] += 1
            if completion.error:
                assert completion.error == errno.ECANCELED
                sock.recv()
                completion = one(port)
            assert completion.data == message
    assert set(outcomes) <= {0, errno.ECANCELED}


def test_a_cancel_that_says_too_late_is_followed_by_success(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    with sock:
        for number in range(1000):
            operation = sock.recv()
            peer.send(b"x")
            if number % 3 == 0:
                port.post()
                completions = drain(port, 1)
            else:
                completions = []
            open_still = operation.cancel()
            assert not operation.cancel() or open_still
            want = 2 if number % 3 == 0 else 1
            completions += drain(port, want - len(completions))
            completion = next(c for c in completions if c.operation is operation)
            if not open_still:
                assert completion.result() == b"x"
            else:
                assert completion.error in (0, errno.ECANCELED)
            if completion.error:
                sock.recv()
                assert one(port).data == b"x"


def test_a_cancel_that_races_with_a_multishot_receive_loses_no_byte(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with sock, canceller() as work:
        for _ in range(300):
            operation = sock.recv(multishot=True)
            peer.send(b"first")
            work.put(operation)
            peer.send(b"second")
            completions = drain(port, lambda so_far: so_far and not so_far[-1].more)
            assert {c.operation for c in completions} == {operation}
            assert completions[-1].error == errno.ECANCELED
            got = b"".join(c.data or b"" for c in completions)
            while len(got) < 11:
                sock.recv()
                got += one(port).result()
            assert got == b"firstsecond"


def test_a_cancel_that_races_with_a_draining_send_counts_the_bytes_right(
    port: an.CompletionPort, family: str
) -> None:
    chance = random.Random(3)
    for _ in range(25):
        sock, peer = pair(port, family, small=True)
        with sock:
            sizes = [300_000, 200_000, 100_000]
            operations = [sock.send(pattern(size, at)) for at, size in enumerate(sizes)]
            victim = chance.randrange(3)
            delay = chance.random() * 0.002

            def cancel_soon(
                operation: an.Operation = operations[victim], delay: float = delay
            ) -> None:
                time.sleep(delay)
                operation.cancel()

            with thread(cancel_soon):
                completions: list[an.Completion] = []
                got = bytearray()
                peer.setblocking(False)
                deadline = time.monotonic() + PATIENCE
                while len(completions) < 3:
                    assert time.monotonic() < deadline
                    try:
                        got += peer.recv(1 << 16)
                    except BlockingIOError:
                        pass
                    completions += port.dequeue_many(timeout=0)
            settled = {c.operation: c for c in completions}
            assert set(settled) == set(operations)
            sock.close()
            got += pump(port, peer, None)[0]
            expected = b"".join(
                pattern(size, at)[: settled[operation].transferred]
                for at, (size, operation) in enumerate(zip(sizes, operations, strict=True))
            )
            assert got == expected
            broken = False
            for operation, size in zip(operations, sizes, strict=True):
                completion = settled[operation]
                if completion.error == 0:
                    assert not broken
                    assert completion.transferred == size
                elif completion.error == errno.ECANCELED:
                    assert operation is operations[victim]
                    broken = completion.transferred > 0
                else:
                    assert broken and completion.error == errno.EPIPE
                    assert completion.transferred == 0
        peer.close()


def test_a_cancel_that_races_with_a_client_loses_no_connection(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    with listener, canceller() as work:
        for number in range(300):
            operation = listener.accept()
            if number % 2:
                work.put(operation)
            client = dial(address)
            if not number % 2:
                work.put(operation)
            completion = one(port)
            if completion.error:
                assert completion.error == errno.ECANCELED
                listener.accept()
                completion = one(port)
            accepted, whose = completion.result()
            assert whose == client.getsockname()
            accepted.close()
            client.close()


def test_cancelling_all_of_a_socket_races_with_completion_and_counts_each_once(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port)
    total = 0
    with sock:
        for _ in range(100):
            operations = [sock.recv(4) for _ in range(8)]
            counts: list[int] = []
            with thread(lambda: counts.append(sock.cancel())):
                peer.send(b"12345678")
                completions = drain(port, 8)
            assert {c.operation for c in completions} == set(operations)
            cancelled = sum(c.error == errno.ECANCELED for c in completions)
            succeeded = sum(c.error == 0 for c in completions)
            assert cancelled + succeeded == 8
            assert counts[0] >= cancelled
            got = sum(len(c.data or b"") for c in completions)
            while got < 8:
                sock.recv()
                got += len(one(port).result())
            total += got
    assert total == 800


@pytest.mark.dequeuing_threads
def test_a_close_that_races_with_dequeue_in_another_thread_completes_each_once(
    port: an.CompletionPort, family: str
) -> None:
    seen: Counter[an.Operation | None] = Counter()
    started: list[an.Operation] = []

    def take(completions: list[an.Completion]) -> bool:
        """Counts; true when the post was among them."""
        ends = False
        for completion in completions:
            if completion.kind is an.POST:
                ends = True
                continue
            assert completion.error in (0, errno.ECANCELED)
            if not completion.more:
                seen[completion.operation] += 1
        return ends

    def dequeue_to_the_post() -> None:
        while not take(port.dequeue_many(timeout=PATIENCE)):
            pass

    with thread(dequeue_to_the_post):
        for number in range(200):
            sock, peer = pair(port, family)
            started.append(sock.recv(multishot=number % 2 == 0))
            operation = sock.send(b"x" * 100)
            started.append(operation)
            peer.send(b"data")
            sock.close()
            assert read_to_end_or_reset(peer) in (b"", b"x" * 100)
            peer.close()
        port.post()
    take(settle(port))
    assert seen == Counter(started)
    assert port.in_flight == 0


def read_to_end_or_reset(peer: socket.socket) -> bytes:
    """What comes until the peer is told that the connection is over, one way or the other."""
    got = b""
    try:
        while piece := peer.recv(65536):
            got += piece
    except ConnectionResetError:
        return b""
    return got


@pytest.mark.parametrize("threads", [1, 3])
def test_closing_the_port_ends_every_blocked_dequeue(backend: str, threads: int) -> None:
    for number in range(10):
        port = an.CompletionPort(backend)
        sock, _ = pair(port)
        operation = sock.recv()
        ready = threading.Barrier(threads + 1)
        ended: list[type[BaseException]] = []

        def block(
            port: an.CompletionPort = port,
            ready: threading.Barrier = ready,
            ended: list[type[BaseException]] = ended,
        ) -> None:
            ready.wait(PATIENCE)
            try:
                # An operation that the close cancels may still be handed out.
                while True:
                    port.dequeue(PATIENCE)
            except an.PortClosedError as error:
                ended.append(type(error))

        blocked = [threading.Thread(target=block, daemon=True) for _ in range(threads)]
        for running in blocked:
            running.start()
        ready.wait(PATIENCE)
        if number % 2:
            time.sleep(0.01)  # half the rounds close it surely blocked, half while it enters
        port.close()
        for running in blocked:
            running.join(PATIENCE)
            assert not running.is_alive()
        assert len(ended) == threads
        assert port.in_flight == 0
        assert not operation.pending
        sock.close()


def test_closing_the_port_races_with_threads_that_start_operations(backend: str) -> None:
    for _ in range(20):
        port = an.CompletionPort(backend)
        socks = [pair(port)[0] for _ in range(3)]
        listener, _ = listening(port)
        ready = threading.Barrier(4)
        refused: list[str] = []

        def start_until_closed(
            sock: an.AsyncSocket,
            port: an.CompletionPort = port,
            ready: threading.Barrier = ready,
            refused: list[str] = refused,
        ) -> None:
            ready.wait(PATIENCE)
            deadline = time.monotonic() + PATIENCE
            try:
                while time.monotonic() < deadline:
                    sock.send(b"x" * 1000, quiet=True)
                    sock.recv()
                    port.post(sock)
                    sock.cancel()
                    port.dequeue_many(timeout=0)
            except OSError as error:
                refused.append(type(error).__name__)

        workers = [
            threading.Thread(target=start_until_closed, args=(sock,), daemon=True) for sock in socks
        ]
        for worker in workers:
            worker.start()
        listener.accept(multishot=True)
        ready.wait(PATIENCE)
        port.close()
        for worker in workers:
            worker.join(PATIENCE)
            assert not worker.is_alive()
        assert refused == ["PortClosedError"] * 3
        assert port.in_flight == 0
        for sock in socks:
            assert sock.closed


@pytest.mark.dequeuing_threads
def test_a_completion_that_comes_before_the_starting_call_returned_knows_its_operation(
    port: an.CompletionPort,
) -> None:
    """The dequeuing thread may be faster than the one that starts."""
    sock, peer = pair(port, state="mine")
    seen: list[an.Completion] = []

    def take(completions: list[an.Completion]) -> bool:
        """Checks and notes; true when the post was among them."""
        ends = False
        for completion in completions:
            if completion.kind is an.POST:
                ends = True
                continue
            operation = completion.operation
            assert operation is not None
            assert operation.kind is completion.kind
            assert not operation.pending
            assert operation.socket is sock
            assert completion.socket is sock
            assert completion.state == "mine"
            seen.append(completion)
        return ends

    def dequeue_to_the_post() -> None:
        while not take(port.dequeue_many(timeout=PATIENCE)):
            pass

    started: list[an.Operation] = []
    with sock:
        with thread(dequeue_to_the_post):
            for number in range(1500):
                started.append(sock.send(b"%d" % (number % 10)))
                peer.send(b"x")
                started.append(sock.recv(1))
            port.post()
        take(settle(port))
    everything = read_exactly(peer, 1500)
    assert everything == b"".join(b"%d" % (number % 10) for number in range(1500))
    assert Counter(c.operation for c in seen) == Counter(started)
    assert all(c.error == 0 for c in seen)


def test_operations_started_by_a_thread_that_ended_complete(port: an.CompletionPort) -> None:
    receiving, sender = pair(port)
    sending, reader = pair(port, small=True)
    listener, address = listening(port)
    connecting, refused = an.AsyncSocket(), an.AsyncSocket()
    port.associate(connecting)
    port.associate(refused)
    started: dict[str, an.Operation] = {}

    def start_all() -> None:
        started["recv"] = receiving.recv(multishot=True)
        started["send"] = sending.send(pattern(4 << 20))
        started["accept"] = listener.accept(multishot=True)
        started["connect"] = connecting.connect(address)
        started["refused"] = refused.connect(refusing_address())

    with thread(start_all) as ended:
        ended.join(PATIENCE)
    completions = drain(
        port, lambda so_far: {an.ACCEPT, an.CONNECT} <= {c.kind for c in so_far} and len(so_far) > 2
    )
    found = {c.operation: c for c in completions}
    assert found[started["connect"]].error == 0
    assert found[started["refused"]].error == errno.ECONNREFUSED
    accepted = found[started["accept"]].accepted
    assert accepted is not None
    sender.sendall(b"after its starter ended")
    completion = one(port)
    assert completion.operation is started["recv"]
    assert completion.data == b"after its starter ended"
    got, completions = pump(port, reader, 4 << 20)
    assert got == pattern(4 << 20)
    completions = completions or [one(port)]
    assert [c.operation for c in completions] == [started["send"]]
    for sock in (receiving, sending, listener, connecting, refused, accepted):
        sock.close()


def test_operations_outlive_many_short_threads(port: an.CompletionPort) -> None:
    """Each of a hundred threads starts one receive and ends; thread identities are reused."""
    sock, peer = pair(port)
    started: list[an.Operation] = []
    with sock:
        for _ in range(100):
            with thread(lambda: started.append(sock.recv(1))) as ended:
                ended.join(PATIENCE)
        peer.sendall(pattern(100, 3))
        completions = drain(port, 100)
        assert [c.operation for c in completions] == started
        assert b"".join(c.data or b"" for c in completions) == pattern(100, 3)


def test_a_socket_closed_by_one_thread_while_another_starts_raises_or_cancels(
    port: an.CompletionPort, family: str
) -> None:
    for _ in range(100):
        sock, peer = pair(port, family)
        started: list[an.Operation] = []
        ready = threading.Barrier(2)

        def start_until_closed(
            sock: an.AsyncSocket = sock,
            started: list[an.Operation] = started,
            ready: threading.Barrier = ready,
        ) -> None:
            ready.wait(PATIENCE)
            for _ in range(100_000):
                try:
                    started.append(sock.recv())
                except OSError as error:
                    if error.errno != errno.EBADF:
                        raise
                    return

        with thread(start_until_closed):
            ready.wait(PATIENCE)
            sock.close()
        completions = drain(port, len(started))
        assert Counter(c.operation for c in completions) == Counter(started)
        assert {c.error for c in completions} <= {errno.ECANCELED}
        peer.close()


def test_two_threads_that_close_and_cancel_the_same_socket_do_no_harm(
    port: an.CompletionPort,
) -> None:
    for _ in range(100):
        sock, peer = pair(port, small=True)
        operations = [sock.recv(), stall_quickly(sock), sock.recv(multishot=True)]
        with thread(sock.close), thread(lambda: cancel_closed(sock)):
            sock.close()
        completions = drain(port, 3)
        assert Counter(c.operation for c in completions) == Counter(operations)
        peer.close()
    assert port.in_flight == 0


def stall_quickly(sock: an.AsyncSocket) -> an.Operation:
    operation = sock.send(bytes(1 << 20))
    assert operation is not None
    return operation


def cancel_closed(sock: an.AsyncSocket) -> None:
    """Cancelling may come after the close: then there is nothing to cancel, or it says so."""
    try:
        sock.cancel()
    except OSError as error:
        if error.errno != errno.EBADF:
            raise


def test_a_stalled_send_and_its_buffer_survive_a_close_from_another_thread(
    port: an.CompletionPort,
) -> None:
    for _ in range(20):
        sock, peer = pair(port, small=True)
        operation = stall(port, sock, 4 << 20)
        with thread(sock.close):
            completion = one(port)
        assert completion.operation is operation
        assert completion.error == errno.ECANCELED
        assert 0 < completion.transferred < 4 << 20
        peer.close()
