"""Guarantee 12: one busy socket cannot starve the others or `post`; a loop of posts cannot starve
sockets. (Timers: tests/test_timer.py.)"""

from __future__ import annotations

import contextlib
import socket
import threading

import asyncio_native as an
import pytest
from support import PATIENCE, datagram, dial, listening, pair, stdlib_datagram

#: Completions of a busy source that may come before another's. Read ahead of one socket alone is
#: 1 MiB, which is 1,024 of the receives used here; a starving source would never be seen at all.
BOUND = 5000


class Flood:
    """A thread that keeps a peer's window full until the end of the `with` block."""

    def __init__(self, peer: socket.socket, piece: int = 1 << 18) -> None:
        self._peer = peer
        self._piece = bytes(piece)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        self._peer.settimeout(0.1)
        while not self._stop.is_set():
            try:
                self._peer.send(self._piece)
            except TimeoutError:
                continue

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)


def completions_before(port: an.CompletionPort, wanted: object) -> int:
    """How many completions come before that of the wanted socket or posted state."""
    for count in range(BOUND):
        completion = port.dequeue(timeout=PATIENCE)
        assert completion is not None
        assert not completion.error
        if completion.socket is wanted or (
            completion.kind is an.POST and completion.state == wanted
        ):
            return count
    pytest.fail(f"starved for {BOUND} completions")


@pytest.mark.parametrize("max_bytes", [1024, 65536])
def test_a_busy_socket_does_not_starve_another(
    port: an.CompletionPort, family: str, max_bytes: int
) -> None:
    busy, busy_peer = pair(port, family)
    calm, calm_peer = pair(port, family)
    busy.recv(max_bytes, multishot=True)
    calm.recv(multishot=True)
    with Flood(busy_peer):
        completions_before(port, busy)
        for _ in range(5):
            calm_peer.sendall(b"x")
            completions_before(port, calm)


def test_a_busy_socket_that_is_rearmed_does_not_starve_another(port: an.CompletionPort) -> None:
    busy, busy_peer = pair(port)
    calm, calm_peer = pair(port)
    calm.recv(multishot=True)
    busy.recv(1024)
    with Flood(busy_peer):
        for _ in range(5):
            calm_peer.sendall(b"x")
            for _ in range(BOUND):
                completion = port.dequeue(timeout=PATIENCE)
                assert completion is not None
                if completion.socket is calm:
                    break
                busy.recv(1024)
            else:
                pytest.fail(f"starved for {BOUND} completions")


def test_a_busy_socket_does_not_starve_posts(port: an.CompletionPort) -> None:
    busy, busy_peer = pair(port)
    busy.recv(1024, multishot=True)
    with Flood(busy_peer):
        completions_before(port, busy)
        for number in range(5):
            port.post(number)
            completions_before(port, number)


def test_a_busy_socket_does_not_starve_accepting(port: an.CompletionPort) -> None:
    busy, busy_peer = pair(port)
    busy.recv(1024, multishot=True)
    listener, address = listening(port)
    listener.accept()
    with Flood(busy_peer):
        dial(address)
        for _ in range(BOUND):
            completion = port.dequeue(timeout=PATIENCE)
            assert completion is not None
            if completion.accepted is not None:
                completion.accepted.close()
                break
        else:
            pytest.fail(f"starved for {BOUND} completions")


def test_a_busy_datagram_socket_does_not_starve_another(port: an.CompletionPort) -> None:
    busy, address = datagram(port)
    busy.recvfrom(multishot=True)
    calm, calm_peer = pair(port)
    calm.recv(multishot=True)
    flooder = stdlib_datagram()
    flooder.connect(address)
    with Flood(flooder, 100):
        for _ in range(5):
            calm_peer.sendall(b"x")
            completions_before(port, calm)


def test_a_loop_of_posts_does_not_starve_sockets(port: an.CompletionPort) -> None:
    """Each post is posted again when it comes: the queue is never empty."""
    sock, peer = pair(port)
    sock.recv(multishot=True)
    for _ in range(3):
        port.post("again")
    for _ in range(5):
        peer.sendall(b"x")
        for _ in range(BOUND):
            completion = port.dequeue(timeout=PATIENCE)
            assert completion is not None
            if completion.kind is an.RECV:
                break
            port.post("again")
        else:
            pytest.fail(f"starved for {BOUND} completions")


def test_a_loop_of_posts_does_not_starve_sockets_in_batches(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(multishot=True)
    for _ in range(600):
        port.post("again")
    peer.sendall(b"x")
    for _ in range(200):
        batch = port.dequeue_many(timeout=PATIENCE)
        if any(c.kind is an.RECV for c in batch):
            break
        for _ in batch:
            port.post("again")
    else:
        pytest.fail("starved for 200 batches")


def test_a_loop_of_sends_does_not_starve_receives(port: an.CompletionPort) -> None:
    busy, busy_peer = pair(port)
    calm, calm_peer = pair(port)
    calm.recv()
    calm_peer.sendall(b"x")
    busy.send(b"x")
    busy_peer.setblocking(False)
    for _ in range(BOUND):
        completion = port.dequeue(timeout=PATIENCE)
        assert completion is not None
        if completion.socket is calm:
            return
        try:
            busy_peer.recv(1 << 16)
        except BlockingIOError:
            pass
        busy.send(b"x")
    pytest.fail(f"starved for {BOUND} completions")


def test_a_big_send_does_not_starve_others(port: an.CompletionPort) -> None:
    """64 MiB for a peer that reads as fast as it can, in another thread."""
    busy, busy_peer = pair(port)
    calm, calm_peer = pair(port)
    calm.recv(multishot=True)
    size = 64 << 20
    send = busy.send(bytes(size))

    def read() -> None:
        left = size
        while left:
            left -= len(busy_peer.recv(1 << 20))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5):
        calm_peer.sendall(b"x")
        for _ in range(3):
            completion = port.dequeue(timeout=PATIENCE)
            assert completion is not None
            if completion.socket is calm:
                break
            assert completion.operation is send
    while send is not None and send.pending:
        port.dequeue(timeout=PATIENCE)
    reader.join(PATIENCE)
    assert not reader.is_alive()


def test_all_busy_sockets_get_their_share(port: an.CompletionPort) -> None:
    pairs = [pair(port) for _ in range(8)]
    for sock, peer in pairs:
        peer.setblocking(False)
        sock.recv(4096, multishot=True)
    counts = {id(sock): 0 for sock, _ in pairs}
    for _ in range(4000):
        for _, peer in pairs:
            try:
                peer.send(bytes(8192))
            except BlockingIOError:
                continue
        completion = port.dequeue(timeout=PATIENCE)
        assert completion is not None
        counts[id(completion.socket)] += 1
    assert min(counts.values()) > 50, counts


def test_many_busy_sockets_do_not_starve_a_calm_one(port: an.CompletionPort) -> None:
    """They fill every batch; who found no room in one has its turn in the next."""
    calm, calm_peer = pair(port)
    calm.recv(multishot=True)
    with contextlib.ExitStack() as floods:
        for _ in range(6):
            busy, busy_peer = pair(port)
            busy.recv(multishot=True)
            floods.enter_context(Flood(busy_peer))
        for _ in range(20):
            calm_peer.sendall(b"x")
            assert completions_before(port, calm) < 500


def test_a_batch_is_small_enough_for_the_cache(port: an.CompletionPort) -> None:
    """It ends at some 256 KiB, give or take one receive (io_uring: as much again that came through
    the ring), so that the first of it is still in the processor's cache when it is used. Nothing is
    lost of what found no room."""
    size, receive, count = 256 << 10, 64 << 10, 12
    limit = (256 << 10) * (2 if port.backend == "io_uring" else 1) + receive
    pairs = [pair(port) for _ in range(count)]
    senders = [threading.Thread(target=peer.sendall, args=(bytes(size),)) for _, peer in pairs]
    for ours, _ in pairs:
        ours.recv(receive, multishot=True)
    for sender in senders:
        sender.start()
    left = {ours: size for ours, _ in pairs}
    while any(left.values()):
        batch = port.dequeue_many(timeout=PATIENCE)
        assert batch, "the rest never came"
        assert sum(completion.transferred for completion in batch) < limit
        for completion in batch:
            assert completion.socket is not None
            left[completion.socket] -= completion.transferred
    for sender in senders:
        sender.join(PATIENCE)
    assert not any(left.values())
