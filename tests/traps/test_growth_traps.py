"""What must not stay: sockets, descriptors and memory after clients have come and gone."""

from __future__ import annotations

import errno
import gc
import weakref

import asyncio_native as an
import pytest
from support import LOCAL, check_python, drain, one, pair, settle, tells_memory


def test_sockets_closed_with_operations_in_progress_are_given_back(
    port: an.CompletionPort, family: str
) -> None:
    gone: list[weakref.ref[an.AsyncSocket]] = []
    for number in range(200):
        sock, peer = pair(port, family, small=True)
        operations = [
            sock.recv(multishot=True),
            sock.recv_into(bytearray(1000)),
            sock.send(bytes(1 << 18)),
            sock.send(bytes(1 << 18)),
        ]
        sock.send(bytearray(1 << 16), quiet=True)
        gone.append(weakref.ref(sock))
        if number % 2:
            port.dequeue(0)
        sock.close()
        completions = [c for c in settle(port, 0) if not c.more]
        assert {c.error for c in completions} <= {errno.ECANCELED}
        del sock, operations, completions
        peer.close()
    drain(port, lambda _: not port.in_flight)
    gc.collect()
    assert [reference() for reference in gone if reference() is not None] == []
    assert [kept for kept in gc.get_objects() if isinstance(kept, an.Operation)] == []


def test_sockets_closed_by_the_hundred_before_anybody_dequeues_are_given_back(
    port: an.CompletionPort,
) -> None:
    gone = []
    expected = 0
    for _ in range(5):
        for _ in range(100):
            sock, peer = pair(port, LOCAL)
            sock.recv(multishot=True)
            sock.recv()
            expected += 2
            gone.append(weakref.ref(sock))
            sock.close()
            peer.close()
    del sock
    completions = drain(port, expected)
    assert {c.error for c in completions} == {errno.ECANCELED}
    assert len({c.operation for c in completions}) == expected
    del completions
    gc.collect()
    assert [reference() for reference in gone if reference() is not None] == []


def test_completions_hold_their_socket_and_state_no_longer_than_they_live(
    port: an.CompletionPort,
) -> None:
    class State:
        pass

    state = State()
    alive = weakref.ref(state)
    sock, peer = pair(port, state=state)
    port.post(state)
    assert one(port).state is state
    sock.recv()
    peer.send(b"x")
    completion = one(port)
    assert completion.state is state
    sock.close()
    del state, sock, completion
    gc.collect()
    assert alive() is None


MEMORY = """
    import ctypes, gc, os, random, socket, sys
    import asyncio_native as an
    from support import LOCAL, drain, eventually, nothing, one, pair, pattern, pump, release_kept
    from support import SLOWNESS, open_count, reset, resident_memory, settle

    MEBIBYTE = 1 << 20
    # What the interpreter may keep of freed objects: of many small ones, and of large ones. The
    # allocator of a free-threaded one takes 4 MiB at a time, and keeps about twice what a round of
    # 64 MiB had; four rounds that are all kept would be 256 MiB.
    GRAIN = (12 if "t" in getattr(sys, "abiflags", "") else 4) * MEBIBYTE
    KEPT = (160 if "t" in getattr(sys, "abiflags", "") else 24) * MEBIBYTE
    port = an.CompletionPort()
"""


@tells_memory
@pytest.mark.parametrize("piece", ["4 * MEBIBYTE", "65536"])
@pytest.mark.parametrize("leaving", ["reads", "resets", "is closed"])
def test_memory_returns_after_a_slow_reader_left(backend: str, leaving: str, piece: str) -> None:
    check_python(
        MEMORY
        + f"""
    def slow_reader(leaving, total=64 * MEBIBYTE):
        sock, peer = pair(port, small=True)
        piece = bytearray({piece})
        for _ in range(total // len(piece)):
            sock.send(piece, quiet=True)
        peak = resident_memory()
        assert sock.unsent > total // 2
        if leaving == "reads":
            data, completions = pump(port, peer, total)
            assert len(data) == total and not completions
            del data
        elif leaving == "resets":
            reset(peer)
            completion = one(port)
            assert completion.operation is None and completion.error
        assert leaving == "is closed" or sock.unsent == 0
        sock.close()
        settle(port)
        release_kept()
        return peak

    def resident_at_rest():
        # What is free below a block in use glibc keeps, and when it gives back what is above moves
        # with the sizes that were freed; which those were, a crowded machine decides. What was not
        # freed stays in any case.
        size = resident_memory()
        if size - before > KEPT and hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
            size = resident_memory()
        return size

    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    slow_reader({leaving!r}, 4 * MEBIBYTE)
    before = resident_memory()
    peaks, after = [], []
    for _ in range(4):
        peaks.append(slow_reader({leaving!r}))
        after.append(resident_at_rest())
    assert min(peaks) - before > 40 * MEBIBYTE, "the reader was not slow"
    grown = [(size - before) // MEBIBYTE for size in after]
    assert max(after) - before <= KEPT, f"still resident after each: {{grown}} MiB"
    port.close()
""",
        backend,
    )


@tells_memory
def test_memory_returns_after_a_burst_that_nobody_dequeued(backend: str) -> None:
    """Reading ahead borrows buffers from the pool, which shrinks again."""
    check_python(
        MEMORY
        + """
    def burst():
        socks = [pair(port, LOCAL) for _ in range(200)]
        for sock, peer in socks:
            sock.recv(multishot=True)
            peer.setblocking(False)
            try:
                while True:
                    peer.send(bytes(65536))
            except BlockingIOError:
                pass
        port.dequeue(0)  # progress; most stays in the queue
        total = 0
        for sock, peer in socks:
            peer.close()
        ended = 0
        while ended < len(socks):
            for completion in port.dequeue_many(timeout=15):
                total += len(completion.result())
                ended += not completion.more
        for sock, _ in socks:
            sock.close()
        settle(port)
        release_kept()
        return total

    burst()
    before = resident_memory()
    for _ in range(5):
        assert burst() > 200 * 65536
    grown = (resident_memory() - before) // MEBIBYTE
    assert grown <= 16, f"{grown} MiB more are resident"
    port.close()
""",
        backend,
    )


@tells_memory
def test_connections_that_come_and_go_for_long_leave_nothing(backend: str) -> None:
    check_python(
        MEMORY
        + """
    from support import dial, listening
    import errno
    chance = random.Random(33)
    listener, address = listening(port)
    listener.accept(multishot=True)

    def come_and_go(count):
        for _ in range(count):
            client = socket.create_connection(address)
            accepted = one(port).accepted
            port.associate(accepted, object())
            accepted.recv(multishot=True)
            accepted.recv_into(bytearray(100))
            way = chance.randrange(5)
            if way == 0:  # closed by us with everything in flight
                accepted.send(bytes(300_000))
                accepted.close()
            elif way == 1:  # the client leaves
                client.send(b"bye")
                client.close()
                while True:
                    completion = one(port)
                    if not completion.more and not completion.data:
                        break
                accepted.close()
            elif way == 2:  # the client resets with a send under way
                accepted.send(bytes(1 << 20), quiet=True)
                reset(client)
                one(port)
                accepted.close(flush=True)
            elif way == 3:
                accepted.cancel()
                accepted.close()
            else:
                accepted.send(b"done", quiet=True)
                accepted.close(flush=True)
                assert client.recv(10) == b"done"
            client.close()
            settle(port, 0)
        settle(port)

    come_and_go(300)
    before, open_before = resident_memory(), open_count()
    come_and_go(2000 // SLOWNESS)
    grown = resident_memory() - before
    assert grown < GRAIN, f"{grown // 1024} KiB for 2000 connections"
    assert open_count() <= open_before
    assert port.in_flight == 1
    listener.close()
    port.close()
""",
        backend,
    )


@tells_memory
def test_ports_that_open_and_close_for_long_leave_nothing(backend: str) -> None:
    check_python(
        MEMORY
        + """
    def open_and_close(count):
        for _ in range(count):
            with an.CompletionPort() as other:
                sock, peer = pair(other, small=True)
                sock.recv(multishot=True)
                sock.send(bytes(1 << 18), quiet=True)
                other.post("never dequeued")
                peer.send(b"never dequeued")
                other.dequeue(0)
            release_kept()

    open_and_close(50)
    before, open_before = resident_memory(), open_count()
    open_and_close(400 // SLOWNESS)
    grown = resident_memory() - before
    assert grown < 4 * MEBIBYTE, f"{grown // 1024} KiB for 400 ports"
    assert open_count() <= open_before
    port.close()
""",
        backend,
    )
