"""io_uring as older kernels have it, and where it is forbidden.

Each feature that is found at run time has a fallback. They are tried here one by one, switched off
by the environment variable ASYNCIO_NATIVE_IO_URING_WITHOUT: as with a kernel that lacks it, every
behaviour stays and every byte arrives. `.ci/steps/io-uring` runs the rest of the suite likewise.
"""

from __future__ import annotations

import collections
import errno
import os
import platform
import select
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    cancelled,
    check_python,
    datagram,
    dial,
    drain,
    listening,
    nothing,
    one,
    pair,
    pattern,
    pump,
    read_exactly,
    read_to_end,
    received,
    refusing_address,
    settle,
    stdlib_datagram,
    stdlib_listener,
)

pytestmark = pytest.mark.backends("io_uring")

# csrc/backend/ring.h names them.
FEATURES = (
    "submit_all",
    "coop_taskrun",
    "buffer_ring",
    "multishot_accept",
    "multishot_receive",
    "defer_taskrun",
    "skip_success",
    "cancel_any",
)
MISSING = {"nothing": "", "everything": ",".join(FEATURES), **{name: name for name in FEATURES}}


@pytest.fixture(params=MISSING)
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ports opened in the test have to do without: a feature, nothing, everything."""
    name: str = request.param
    monkeypatch.setenv("ASYNCIO_NATIVE_IO_URING_WITHOUT", MISSING[name])
    return name


@pytest.fixture(params=[0, 1], ids=["any-thread", "one-thread"])
def concurrency(request: pytest.FixtureRequest) -> int:
    promised: int = request.param
    return promised


@pytest.fixture
def port(backend: str, without: str, concurrency: int) -> Iterator[an.CompletionPort]:
    with an.CompletionPort(backend, concurrency=concurrency) as port:
        yield port
    assert port.in_flight == 0


def converse(
    port: an.CompletionPort, peer: socket.socket, payload: bytes
) -> tuple[bytes, list[an.Completion]]:
    """Sends it while the port echoes what it receives; returns what came back."""
    completions: list[an.Completion] = []
    back = bytearray()
    sent = 0
    deadline = time.monotonic() + PATIENCE
    peer.setblocking(False)
    while len(back) < len(payload):
        assert time.monotonic() < deadline, f"{len(back)} of {len(payload)} bytes came back"
        try:
            if sent < len(payload):
                sent += peer.send(payload[sent : sent + (1 << 20)])
        except BlockingIOError:
            pass
        for completion in port.dequeue_many(timeout=0.001):
            completions.append(completion)
            assert completion.socket is not None and completion.data
            completion.socket.send(completion.data, quiet=True)
        try:
            back += peer.recv(1 << 20)
        except BlockingIOError:
            pass
    peer.settimeout(PATIENCE)
    return bytes(back), completions


# Below, at and above the buffers of the ring (4 KiB) and the memory of one call (256 KiB); large
# ones switch a socket to calls of our own, many small ones switch it back.
SIZES = (
    1,
    100,
    4095,
    4096,
    4097,
    *[8192] * 3,
    65536,
    *[4095] * 20,
    *[9000] * 3,
    *[50] * 20,
    400_000,
)


def test_every_size_comes_back_whole(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operation = sock.recv(multishot=True)
    start = 0
    for size in SIZES:
        payload = pattern(size, start)
        start += size
        back, completions = converse(port, peer, payload)
        assert back == payload
        assert all(c.more and c.operation is operation for c in completions)
    payload = pattern(3 << 20, start)
    assert converse(port, peer, payload)[0] == payload
    peer.shutdown(socket.SHUT_WR)
    last = one(port)
    assert (last.data, last.more, last.error) == (b"", False, 0)


def test_one_shot_receives_fill_in_order(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    whole = bytearray()
    buffer = bytearray(5000)
    sent = 0
    for number, size in enumerate((1, 4096, 4097, 5000, 30_000, 70, 4096, 1, 100_000, 3)):
        peer.sendall(pattern(size, sent))
        sent += size
        while len(whole) < sent:
            if number % 3 == 2:
                sock.recv_into(buffer)
                whole += buffer[: one(port).transferred]
            else:
                sock.recv(65536 if number % 2 else 1000)
                whole += one(port).data or b""
    assert whole == pattern(sent)


def test_receives_of_all_forms_in_flight_at_once_fill_in_order(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    buffer = bytearray(100)
    operations = [sock.recv(65536), sock.recv_into(buffer), sock.recv(10), sock.recv(65536)]
    operations.append(sock.recv(65536, multishot=True))
    nothing(port)
    for number in range(8):
        peer.sendall(b"%d" % number * 5)
        completion = one(port)
        assert completion.operation is operations[min(number, 4)]
        data = bytes(buffer[:5]) if number == 1 else completion.data
        assert data == b"%d" % number * 5


@pytest.mark.parametrize("which", range(3))
def test_one_of_several_receives_is_cancelled_and_harms_no_other(
    port: an.CompletionPort, which: int
) -> None:
    sock, peer = pair(port)
    operations = [sock.recv(), sock.recv(), sock.recv()]
    nothing(port)
    assert operations[which].cancel()
    completion = one(port)
    assert completion.operation is operations.pop(which) and cancelled(completion)
    for operation in operations:
        peer.sendall(b"for " + str(id(operation)).encode())
        completion = one(port)
        assert completion.operation is operation
        assert completion.data == b"for " + str(id(operation)).encode()


def test_what_comes_while_a_receive_is_cancelled_waits_for_the_next(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port)
    start = 0
    whole = b""
    for number in range(60):
        operation = sock.recv(multishot=bool(number % 2))
        whole += received(port.dequeue_many(timeout=0))  # what the last turn left over
        size = (1, 5000, 4096, 20_000)[number % 4]
        peer.sendall(pattern(size, start))
        start += size
        if number % 3:
            operation.cancel()
        whole += received(settle(port, 0.002))
        operation.cancel()
        whole += received(settle(port, 0))
    sock.recv(multishot=True)
    whole += received(drain(port, lambda so_far: len(whole) + len(received(so_far)) >= start))
    assert whole == pattern(start)


def test_connections_are_accepted_by_multishot_and_one_by_one(
    port: an.CompletionPort, family: str
) -> None:
    listener, address = listening(port, family)
    accepting = listener.accept(multishot=True)
    clients = [dial(address) for _ in range(30)]
    completions = drain(port, 30)
    assert all(c.more and c.accepted and c.operation is accepting for c in completions)
    if family != "unix":
        assert {c.address for c in completions} == {c.getsockname() for c in clients}
    assert accepting.cancel()
    assert cancelled(one(port))
    late = dial(address)  # may be taken by a request that is being cancelled; it is not lost
    nothing(port)
    operations = [listener.accept() for _ in range(3)]
    others = [dial(address) for _ in range(2)]
    for operation, client in zip(operations, [late, *others], strict=True):
        completion = one(port)
        assert completion.operation is operation and completion.accepted
        with completion.accepted as sock:
            port.associate(sock)
            sock.send(b"hello", quiet=True)
            assert read_exactly(client, 5) == b"hello"
    for completion in completions:
        assert completion.accepted is not None
        completion.accepted.close()


def test_close_ends_everything_once_and_tells_the_peers(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    sock, peer = pair(port)
    stalled, slow = pair(port, small=True)
    talker, _ = datagram(port)
    operations = [
        listener.accept(multishot=True),
        sock.recv(multishot=True),
        talker.recvfrom(multishot=True),
        stalled.send(bytes(8 << 20)),
        stalled.recv(),
    ]
    assert not settle(port)
    for each in (listener, sock, stalled, talker):
        each.close()
    assert peer.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        dial(address)
    completions = drain(port, len(operations))
    assert {c.operation for c in completions} == set(operations)
    assert all(cancelled(c) for c in completions)
    read_to_end(slow)
    nothing(port)


def test_pause_holds_back_and_resume_brings_all(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    whole = b""
    for turn in range(4):
        peer.sendall(pattern(100, turn * 60_100))
        whole += received([one(port)])
        operation.pause()
        peer.sendall(pattern(60_000, turn * 60_100 + 100))
        assert received(settle(port)) == b""
        operation.resume()
        wanted = (turn + 1) * 60_100 - len(whole)
        whole += received(drain(port, lambda so_far: len(received(so_far)) >= wanted))
    assert whole == pattern(4 * 60_100)
    operation.pause()
    peer.shutdown(socket.SHUT_WR)
    nothing(port)
    operation.resume()
    assert one(port).data == b""


def test_accepting_pauses_and_goes_on(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    operation = listener.accept(multishot=True)
    nothing(port)
    operation.pause()
    clients = [dial(address) for _ in range(5)]
    nothing(port)
    operation.resume()
    completions = drain(port, len(clients))
    assert all(c.accepted is not None and c.more for c in completions)
    for completion in completions:
        assert completion.accepted is not None
        completion.accepted.close()


def test_half_close_both_ways(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    sock.recv(multishot=True)
    peer.sendall(b"question")
    peer.shutdown(socket.SHUT_WR)
    completions = drain(port, lambda so_far: so_far and not so_far[-1].more)
    assert received(completions) == b"question" and completions[-1].data == b""
    sock.send(pattern(300_000), quiet=True)
    sock.disconnect()
    answer, completions = pump(port, peer, None)
    assert answer == pattern(300_000)
    completions += settle(port)
    assert [(c.kind, c.error) for c in completions] == [(an.DISCONNECT, 0)]


def test_datagrams_come_one_by_one(port: an.CompletionPort) -> None:
    sock, address = datagram(port)
    peer = stdlib_datagram()
    operation = sock.recvfrom(1000, multishot=True)
    nothing(port)
    for payload in (b"one", b"", pattern(1000), pattern(3000), b"last"):
        peer.sendto(payload, address)
        completion = one(port)
        assert completion.operation is operation and completion.more
        assert completion.data == payload[:1000]
        assert completion.truncated == (len(payload) > 1000)
        assert completion.address == peer.getsockname()
    sock.sendto(pattern(9000), peer.getsockname())
    assert one(port).transferred == 9000
    assert peer.recv(65536) == pattern(9000)


def test_a_connected_datagram_socket_sends_and_receives(port: an.CompletionPort) -> None:
    sock, _ = datagram(port)
    peer = stdlib_datagram()
    sock.connect(peer.getsockname())
    assert one(port).error == 0
    sock.recv(multishot=True)
    sock.send(b"ping", quiet=True)
    data, address = peer.recvfrom(100)
    assert data == b"ping"
    for payload in (b"pong", b"", pattern(5000)):
        peer.sendto(payload, address)
        completion = one(port)
        assert completion.data == payload and completion.more


def test_a_file_is_sent_whole(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family, small=True)
    with tempfile.TemporaryFile() as file:
        file.write(pattern(1 << 20))
        file.flush()
        operation = sock.sendfile(file, 1000)
    sock.send(b"behind", quiet=True)
    whole, completions = pump(port, peer, (1 << 20) - 1000 + 6)
    assert whole == pattern((1 << 20) - 1000, 1000) + b"behind"
    assert [c.operation for c in completions + settle(port)] == [operation]


def test_sends_larger_than_the_window_go_out_whole_and_in_order(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    operations = [sock.send(pattern(1 << 20)), sock.sendv([pattern(500_000), b"x" * 100])]
    sock.send(b"quiet", quiet=True)
    assert not settle(port)
    whole, completions = pump(port, peer, (1 << 20) + 500_105)
    assert whole == pattern(1 << 20) + pattern(500_000) + b"x" * 100 + b"quiet"
    assert [(c.operation, c.error) for c in completions + settle(port)] == [
        (operation, 0) for operation in operations
    ]


def test_pause_above_stops_reading_from_who_does_not_read(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.recv(multishot=True, pause_above=100_000)
    most = 0

    def echo() -> None:
        nonlocal most
        for completion in port.dequeue_many(timeout=0.001):
            assert completion.data
            sock.send(completion.data, quiet=True)
        most = max(most, sock.unsent)

    payload = pattern(1 << 20)
    sent = 0
    idle = 0
    peer.setblocking(False)
    while idle < 30:  # in a row, the window was full
        assert sent < 64 << 20, "nothing stops the sender"
        try:
            sent += peer.send(payload[sent % len(payload) :])
            idle = 0
        except BlockingIOError:
            idle += 1
        echo()
    assert 100_000 < most < 100_000 + (2 << 20)
    back = bytearray()
    deadline = time.monotonic() + PATIENCE
    while len(back) < sent:
        assert time.monotonic() < deadline, f"{len(back)} of {sent}"
        try:
            back += peer.recv(1 << 20)
        except BlockingIOError:
            pass
        echo()
    assert back == (payload * (sent // len(payload) + 1))[:sent]


def test_deadlines_end_what_waits_and_nothing_else(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    sock, peer = pair(port)
    talker, _ = datagram(port)
    began = time.monotonic()
    timed = [
        listener.accept(multishot=True, timeout=0.03),
        sock.recv(multishot=True, timeout=0.03),
        talker.recvfrom(timeout=0.03),
    ]
    completions = drain(port, 3)
    assert time.monotonic() - began >= 0.03
    assert {c.operation for c in completions} == set(timed)
    assert all(isinstance(_failure(c), TimeoutError) for c in completions)
    # What comes afterwards is the next one's.
    client = dial(address)
    peer.sendall(b"late")
    nothing(port)
    listener.accept()
    sock.recv()
    completions = drain(port, 2)
    assert received(completions) == b"late"
    accepted = next(c.accepted for c in completions if c.accepted is not None)
    accepted.close()
    assert client.recv(1) == b""
    timer = port.timer(0.01, "timer")
    assert one(port).operation is timer


def _failure(completion: an.Completion) -> BaseException | None:
    try:
        completion.result()
    except OSError as error:
        return error
    return None


def test_connects_succeed_and_fail(port: an.CompletionPort) -> None:
    listener = stdlib_listener()
    sock = an.AsyncSocket()
    port.associate(sock)
    sock.connect(listener.getsockname())
    receiving = sock.recv(multishot=True)
    assert one(port).error == 0
    server, _ = listener.accept()
    with server:
        server.sendall(b"welcome")
        completion = one(port)
        assert completion.operation is receiving and completion.data == b"welcome"
    assert one(port).data == b""
    refused = an.AsyncSocket()
    port.associate(refused)
    refused.connect(refusing_address())
    assert one(port).error == errno.ECONNREFUSED


def test_a_reset_is_told_to_the_receive(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(multishot=True)
    nothing(port)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    completion = one(port)
    assert completion.error == errno.ECONNRESET and not completion.more


def test_the_descriptor_tells_another_loop_of_every_kind(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    sock, peer = pair(port)
    with select.epoll() as loop:
        loop.register(port.fileno(), select.EPOLLIN)

        def next_one() -> an.Completion:
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                if (completion := port.dequeue(0)) is not None:
                    return completion
                assert loop.poll(PATIENCE), "the descriptor stays silent"
            raise AssertionError("readable, and nothing to dequeue")

        def asleep() -> None:
            deadline = time.monotonic() + PATIENCE
            while loop.poll(0.005):
                assert port.dequeue(0) is None
                assert time.monotonic() < deadline, "it stays readable"

        listener.accept(multishot=True)
        sock.recv(multishot=True)
        asleep()
        peer.sendall(b"data")
        assert next_one().data == b"data"
        asleep()
        dial(address)
        accepted = next_one().accepted
        assert accepted is not None
        accepted.close()
        asleep()
        port.timer(0.02)
        assert next_one().kind is an.TIMER
        asleep()
        threading.Thread(target=port.post).start()
        assert next_one().kind is an.POST
        asleep()


def test_threads_start_post_cancel_and_close_beside_the_one_that_dequeues(
    port: an.CompletionPort,
) -> None:
    rounds = 40
    pairs = [pair(port) for _ in range(4)]
    counts: collections.Counter[Any] = collections.Counter()

    def work(sock: an.AsyncSocket, peer: socket.socket) -> None:
        for number in range(rounds):
            operation = sock.recv(multishot=bool(number % 2))
            peer.sendall(b"x" * 100)
            if number % 3 == 0:
                operation.cancel()
            port.post("post")
            operation.cancel()
        sock.recv()
        sock.close()

    threads = [threading.Thread(target=work, args=each) for each in pairs]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while any(thread.is_alive() for thread in threads) or port.in_flight:
        assert time.monotonic() < deadline, counts
        for completion in port.dequeue_many(timeout=0.05):
            if not completion.more:
                counts[completion.kind] += 1
    for thread in threads:
        thread.join()
    assert counts == {an.POST: 4 * rounds, an.RECV: 4 * (rounds + 1)}


@pytest.mark.parametrize("concurrency", [0], ids=["any-thread"], indirect=True)
def test_many_threads_serve_one_port(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept(multishot=True)
    problems: list[BaseException] = []

    def serve() -> None:
        try:
            while True:
                for c in port.dequeue_many(4):
                    if c.accepted is not None:
                        port.associate(c.accepted)
                        c.accepted.recv()
                    elif c.kind is an.RECV and c.socket is not None:
                        if c.data:
                            c.socket.send(c.data, quiet=True)
                            c.socket.recv()
                        else:
                            c.socket.close()
        except an.PortClosedError:
            pass
        except BaseException as error:
            problems.append(error)

    def talk(number: int) -> None:
        try:
            client = clients[number]
            for turn in range(20):
                payload = pattern((1, 4000, 5000, 20_000)[turn % 4], number * 1000 + turn)
                client.sendall(payload)
                assert read_exactly(client, len(payload)) == payload
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        except BaseException as error:
            problems.append(error)

    clients = [dial(address) for _ in range(8)]
    servers = [threading.Thread(target=serve) for _ in range(4)]
    talkers = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in servers + talkers:
        thread.start()
    for thread in talkers:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    port.close()
    for thread in servers:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not problems, problems


@pytest.mark.parametrize("concurrency", [0], ids=["any-thread"], indirect=True)
def test_what_ended_threads_left_armed_goes_on(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    sock, peer = pair(port)
    talker, talker_address = datagram(port)

    def arm() -> None:
        operations.extend(
            [
                listener.accept(multishot=True),
                sock.recv(multishot=True),
                talker.recvfrom(multishot=True),
            ]
        )
        port.dequeue(0.01)  # here its requests go to the kernel, which ends them with the thread

    operations: list[an.Operation] = []
    thread = threading.Thread(target=arm)
    thread.start()
    thread.join()
    for number in range(3):
        nothing(port, 0.005)
        peer.sendall(b"data %d" % number)
        assert one(port).data == b"data %d" % number
        stdlib_datagram().sendto(b"datagram", talker_address)
        assert one(port).data == b"datagram"
        dial(address)
        accepted = one(port).accepted
        assert accepted is not None
        accepted.close()
        thread = threading.Thread(target=port.dequeue, args=(0,))
        thread.start()
        thread.join()
    assert all(operation.pending for operation in operations)


def test_a_small_ring_serves_many_connections_at_once(
    backend: str, without: str, concurrency: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submissions go in parts, and completions overflow into the kernel's list."""
    monkeypatch.setenv("ASYNCIO_NATIVE_IO_URING_ENTRIES", "8")
    with an.CompletionPort(backend, concurrency=concurrency) as port:
        listener, address = listening(port, backlog=300)
        listener.accept(multishot=True)
        clients = [dial(address) for _ in range(200)]
        completions = drain(port, 200)
        served = []
        for completion in completions:
            assert completion.accepted is not None
            port.associate(completion.accepted)
            completion.accepted.recv(multishot=True)
            served.append(completion.accepted)
        for turn in range(3):
            for number, client in enumerate(clients):
                client.sendall(b"%d/%d;" % (turn, number) * 3)
            sizes: collections.Counter[an.AsyncSocket | None] = collections.Counter()
            wanted = sum(len(b"%d/%d;" % (turn, number) * 3) for number in range(200))
            while sum(sizes.values()) < wanted:
                for completion in drain(port, 1):
                    assert completion.data and completion.socket
                    sizes[completion.socket] += len(completion.data)
                    completion.socket.send(completion.data, quiet=True)
            for number, client in enumerate(clients):
                back = b"%d/%d;" % (turn, number) * 3
                assert read_exactly(client, len(back)) == back
        for sock in served:
            sock.close()


def test_closing_the_port_lets_every_address_go_at_once(
    backend: str, without: str, concurrency: int
) -> None:
    port = an.CompletionPort(backend, concurrency=concurrency)
    listener, address = listening(port)
    talker, talker_address = datagram(port)
    listener.accept(multishot=True)
    talker.recvfrom(multishot=True)
    nothing(port, 0.005)
    began = time.monotonic()
    port.close()
    assert time.monotonic() - began < 0.5
    with socket.socket() as again:
        again.bind(address)  # SO_REUSEADDR is not set
        again.listen()
    with socket.socket(type=socket.SOCK_DGRAM) as again:
        again.bind(talker_address)


# -- forbidden ------------------------------------------------------------------------------------

needs_known_numbers = pytest.mark.skipif(
    platform.machine() not in {"x86_64", "aarch64"},
    reason="the numbers of io_uring's system calls are known for x86-64 and AArch64",
)

# What a refused io_uring looks like from Python, and that "auto" does without it.
REFUSED = """
    import os
    import asyncio_native as an
    from support import pair, one, read_exactly

    def check_refused(words):
        found = {backend.name: backend for backend in an.backends()}
        assert not found["io_uring"].available
        assert words in found["io_uring"].reason, found["io_uring"].reason
        assert found["epoll"].available
        for concurrency in (0, 1):
            try:
                an.CompletionPort("io_uring", concurrency=concurrency)
            except an.BackendUnavailableError as error:
                assert "'io_uring'" in str(error) and words in str(error), error
            else:
                raise AssertionError("a port was opened")
        os.environ["ASYNCIO_NATIVE_BACKEND"] = "io_uring"
        try:
            an.CompletionPort()
        except an.BackendUnavailableError as error:
            assert "ASYNCIO_NATIVE_BACKEND" in str(error) and words in str(error), error
        else:
            raise AssertionError("a port was opened")
        del os.environ["ASYNCIO_NATIVE_BACKEND"]
        with an.CompletionPort("auto") as port:
            assert port.backend == "epoll", port.backend
            check_serving(port)

    def check_serving(port):
        sock, peer = pair(port)
        sock.recv(multishot=True)
        for size in (1, 5000, 100_000):
            peer.sendall(bytes(size))
            left = size
            while left:
                left -= len(one(port).data)
        sock.send(b"answer", quiet=True)
        assert read_exactly(peer, 6) == b"answer"
"""


@needs_known_numbers
@pytest.mark.parametrize("calls", ["io_uring_setup", "io_uring_enter", "io_uring_register", "all"])
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS", "EACCES"])
def test_a_seccomp_filter_that_forbids_it_is_named_and_auto_falls_back(
    backend: str, calls: str, error: str
) -> None:
    words = "in this kernel" if error == "ENOSYS" else "security policy"
    check_python(
        REFUSED
        + f"""
    import errno
    from seccomp_support import IO_URING_CALLS, forbid

    forbid(errno.{error}, *(IO_URING_CALLS if {calls!r} == "all" else [{calls!r}]))
    check_refused({words!r})
""",
        backend,
    )


@needs_known_numbers
def test_a_port_of_before_the_filter_reports_what_the_system_says(backend: str) -> None:
    check_python(
        """
    import errno
    import asyncio_native as an
    from seccomp_support import IO_URING_CALLS, forbid
    from support import pair

    port = an.CompletionPort("io_uring")
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    assert port.dequeue(0) is None
    forbid(errno.EPERM, *IO_URING_CALLS)
    try:
        port.dequeue(timeout=1)
    except PermissionError as error:
        assert error.errno == errno.EACCES
    else:
        raise AssertionError("waited without the system")
    port.close()
    assert peer.recv(1) == b""
    assert not operation.pending
""",
        backend,
    )


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="shows the process another /proc/sys by a mount of its own, which only root may make",
)
@needs_known_numbers
@pytest.mark.parametrize("level", [1, 2])
def test_the_sysctl_that_forbids_it_is_named(backend: str, level: int) -> None:
    """The machine's own setting is not touched, others rely on it: the process sees a file of the
    test in its place, in a mount namespace of its own, and a filter refuses as the kernel would."""
    check_python(
        REFUSED
        + f"""
    import ctypes, errno, sys, tempfile
    from seccomp_support import forbid

    NEW_NAMESPACE, BIND, PRIVATE_TREE = 0x20000, 0x1000, 0x40000 | 0x4000
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.NamedTemporaryFile("w") as setting:
        setting.write("{level}\\n")
        setting.flush()
        name = setting.name.encode()
        if (
            libc.unshare(NEW_NAMESPACE) != 0
            or libc.mount(b"none", b"/", None, PRIVATE_TREE, None) != 0
            or libc.mount(name, b"/proc/sys/kernel/io_uring_disabled", None, BIND, None) != 0
        ):
            print("no mounts here:", os.strerror(ctypes.get_errno()))
            sys.exit(0)
        forbid(errno.EPERM, "io_uring_setup")
        check_refused("kernel.io_uring_disabled = {level}")
""",
        backend,
    )


@pytest.mark.parametrize("kibibytes", [0, 16, 64, 200])
def test_little_lockable_memory_is_enough_or_named(backend: str, kibibytes: int) -> None:
    """Kernels before 5.12, and newer ones again, count rings as locked memory of users."""
    check_python(
        REFUSED
        + f"""
    import encodings.idna, errno, traceback, resource, time
    from support import PATIENCE

    def open_port(concurrency):
        # The kernel gives back what a closed ring had locked a little later.
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return an.CompletionPort("io_uring", concurrency=concurrency)
            except OSError as error:
                named = isinstance(error, an.BackendUnavailableError) and "locked" in str(error)
                assert named or error.errno == errno.ENOMEM, error
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.005)

    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)  # nobody, who may not lock more
    resource.setrlimit(resource.RLIMIT_MEMLOCK, ({kibibytes << 10}, {kibibytes << 10}))
    found = {{backend.name: backend for backend in an.backends()}}
    if not found["io_uring"].available:
        assert {kibibytes} == 0, "a small ring needs no more than 8 KiB"
        check_refused("locked memory")
    else:
        for concurrency in (0, 1):
            with open_port(concurrency) as port:
                check_serving(port)
""",
        backend,
    )
