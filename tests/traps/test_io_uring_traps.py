"""What io_uring does to the unwary: it goes on by itself, for whoever asked, with what it has.

Requests belong to the thread that submitted them, hold files beyond their descriptors' end, accept
and receive when nobody looks, and run out of room for buffers and for completions.
"""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    cancelled,
    check_python,
    datagram,
    dial,
    drain,
    eventually,
    listening,
    nothing,
    one,
    open_descriptors,
    pair,
    pattern,
    read_exactly,
    received,
    reset,
    settle,
)

resource = pytest.importorskip("resource", reason="io_uring is Linux's")

pytestmark = pytest.mark.backends("io_uring")


@pytest.fixture(params=[0, 1], ids=["any-thread", "one-thread"])
def concurrency(request: pytest.FixtureRequest) -> int:
    promised: int = request.param
    return promised


@pytest.fixture
def port(backend: str, concurrency: int) -> Iterator[an.CompletionPort]:
    with an.CompletionPort(backend, concurrency=concurrency) as port:
        yield port
    assert port.in_flight == 0


# -- descriptors that the kernel made -------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["waiting", "elsewhere"])
def test_what_was_accepted_unseen_is_closed_when_another_thread_closes_the_port(
    backend: str, concurrency: int, inside: bool
) -> None:
    port = an.CompletionPort(backend, concurrency=concurrency)
    listener, address = listening(port, backlog=700)
    armed, connected, taken = threading.Event(), threading.Event(), threading.Event()

    def take_one() -> None:
        listener.accept(multishot=True)
        port.dequeue(0)
        armed.set()
        assert connected.wait(PATIENCE)
        first = one(port)
        assert first.accepted is not None
        first.accepted.close()
        taken.set()
        if inside:
            with pytest.raises(an.PortClosedError):
                while True:
                    for completion in port.dequeue_many(1):
                        assert completion.accepted is not None
                        completion.accepted.close()

    thread = threading.Thread(target=take_one)
    thread.start()
    assert armed.wait(PATIENCE)
    # More than one pass takes, so that completions stay behind in the ring.
    clients = [dial(address) for _ in range(600)]
    before = len(open_descriptors())
    connected.set()
    assert taken.wait(PATIENCE)
    if not inside:
        thread.join(PATIENCE)
    port.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert len(open_descriptors()) <= before
    for client in clients:
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass  # it was in the backlog still


@pytest.mark.parametrize("way", ["cancelled", "paused"])
def test_what_was_accepted_for_nobody_goes_with_its_listener(
    port: an.CompletionPort, way: str
) -> None:
    listener, address = listening(port)
    operation = listener.accept(multishot=True)
    nothing(port)
    before = open_descriptors()
    if way == "paused":
        operation.pause()
    client = dial(address)
    if way == "cancelled":
        operation.cancel()
    completions = settle(port)
    assert all(cancelled(c) for c in completions), "the accept went to somebody"
    listener.close()
    settle(port)
    try:
        assert client.recv(1) == b""
    except ConnectionResetError:
        pass  # it was in the backlog still

    def left() -> set[int]:
        return {n for n, d in open_descriptors().items() if before.get(n) != d}

    eventually(lambda: left() == {client.fileno()})


def test_accepting_keeps_to_a_limit_of_descriptors_that_was_lowered_since(
    port: an.CompletionPort,
) -> None:
    """A multishot goes by the limit of the time when it was armed."""
    listener, address = listening(port)
    operation = listener.accept(multishot=True)
    nothing(port)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [socket.socket() for _ in range(6)]
    occupied = set(open_descriptors())
    # Room for two more: the lowest two numbers that are free.
    free = [number for number in range(max(occupied) + 4) if number not in occupied]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[2], hard))
    try:
        for client in clients:
            client.connect(address)
        completions = drain(port, lambda so_far: any(c.error for c in so_far))
        completions += settle(port, 0.25)
        accepted = [c.accepted for c in completions if c.accepted is not None]
        assert all(sock.fileno() < free[2] for sock in accepted)
        assert [c.error for c in completions if c.error] == [errno.EMFILE]
        assert all(c.more for c in completions)
        assert len(accepted) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    accepted += [c.accepted for c in drain(port, 4) if c.accepted is not None]
    assert len(accepted) == len(clients)
    assert operation.pending
    for sock in accepted:
        sock.close()
    for client in clients:
        client.close()


# -- files that requests hold ---------------------------------------------------------------------


def is_free(address: tuple[str, int], kind: int = socket.SOCK_STREAM) -> bool:
    """Whether a socket without SO_REUSEADDR can be bound to it."""
    with socket.socket(type=kind) as again:
        try:
            again.bind(address)
        except OSError:
            return False
    return True


def test_a_port_closed_by_another_thread_lets_addresses_go_while_its_own_waits(
    backend: str, concurrency: int
) -> None:
    port = an.CompletionPort(backend, concurrency=concurrency)
    listener, address = listening(port)
    talker, talker_address = datagram(port)
    listener.accept(multishot=True)
    talker.recvfrom(multishot=True)
    problems: list[BaseException] = []

    def serve() -> None:
        try:
            port.dequeue(0)
            begun.set()
            port.dequeue()
        except an.PortClosedError:
            return
        except BaseException as error:
            problems.append(error)
        problems.append(AssertionError("the wait did not end by the close"))

    begun = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    assert begun.wait(PATIENCE)
    time.sleep(0.02)  # no event tells that a thread waits
    port.close()
    if "cancel_any" in os.environ.get("ASYNCIO_NATIVE_IO_URING_WITHOUT", ""):
        # Then the kernel ends by itself, a little later, what the other thread had asked for.
        eventually(lambda: is_free(address) and is_free(talker_address, socket.SOCK_DGRAM))
    else:
        assert is_free(address)
        assert is_free(talker_address, socket.SOCK_DGRAM)
    thread.join(PATIENCE)
    assert not thread.is_alive() and not problems, problems


def test_a_port_closed_behind_its_threads_back_lets_addresses_go_soon(
    backend: str, concurrency: int
) -> None:
    port = an.CompletionPort(backend, concurrency=concurrency)
    listener, address = listening(port)
    listener.accept(multishot=True)
    done = threading.Event()

    def arm() -> None:
        port.dequeue(0)
        armed.set()
        assert done.wait(PATIENCE)

    armed = threading.Event()
    thread = threading.Thread(target=arm)
    thread.start()
    assert armed.wait(PATIENCE)
    began = time.monotonic()
    port.close()
    assert time.monotonic() - began < 0.5

    eventually(lambda: is_free(address))
    done.set()
    thread.join(PATIENCE)


def test_closing_the_port_under_a_storm_of_signals_ends_all_requests(
    backend: str, concurrency: int
) -> None:
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for _ in range(50):
            port = an.CompletionPort(backend, concurrency=concurrency)
            listener, address = listening(port)
            listener.accept(multishot=True)
            port.dequeue(0)
            port.close()
            with socket.socket() as again:
                again.bind(address)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# -- fork -----------------------------------------------------------------------------------------

FORKING = """
    import errno, os, select, signal, socket, sys, threading, time, warnings
    import asyncio_native as an
    from support import PATIENCE, dial, drain, listening, nothing, one, pair, pattern
    from support import read_exactly, settle

    warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, from 3.12 on

    def forked(work=lambda: None):
        '''A child that works, tells so, and ends when the returned function is called.'''
        stop_read, stop_write = os.pipe()
        done_read, done_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(stop_write)
                work()
                os.write(done_write, b"d")
                os.read(stop_read, 1)
            finally:
                os._exit(0)
        os.close(stop_read)
        os.close(done_write)
        assert os.read(done_read, 1) == b"d", "the child failed"
        os.close(done_read)

        def end():
            os.close(stop_write)
            assert os.waitpid(pid, 0)[1] == 0
        return end
"""


@pytest.mark.parametrize("way", ["in the ring", "paused"])
def test_what_was_accepted_before_a_fork_ends_for_the_client_when_the_parent_closes_it(
    backend: str, concurrency: int, way: str
) -> None:
    """The child has a copy of a descriptor that the parent does not know of yet."""
    check_python(
        FORKING
        + f"""
    port = an.CompletionPort(concurrency={concurrency})
    listener, address = listening(port)
    accepting = listener.accept(multishot=True)
    assert port.dequeue(0) is None
    if {way!r} == "paused":
        accepting.pause()
    client = dial(address)
    if {way!r} == "paused":
        nothing(port)
    end = forked()
    accepting.resume()
    accepted = one(port).accepted
    port.associate(accepted)
    accepted.close()
    client.settimeout(PATIENCE)
    assert client.recv(1) == b""
    port.close()
    end()
""",
        backend,
    )


CHILDREN = {
    "does nothing": "pass",
    "closes": "port.close(); sock.close(); listener.close()",
    "forgets": "global port, sock, listener; del port, sock, listener",
    "has a port of its own": """
        own = an.CompletionPort()
        mine, theirs = pair(own)
        mine.recv(multishot=True)
        theirs.sendall(bytes(10_000))
        left = 10_000
        while left:
            left -= len(one(own).data)
        own.close()
""",
    "executes": """
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-c", "pass"])
        assert os.wait()[1] == 0
""",
    "exits": """
        if os.fork() == 0:
            sys.exit(0)
        assert os.wait()[1] == 0
""",
}


@pytest.mark.parametrize("child", CHILDREN)
def test_a_child_beside_a_ring_disturbs_no_request_of_the_parent(
    backend: str, concurrency: int, child: str
) -> None:
    check_python(
        FORKING
        + f"""
    port = an.CompletionPort(concurrency={concurrency})
    listener, address = listening(port)
    sock, peer = pair(port)
    accepting = listener.accept(multishot=True)
    receiving = sock.recv(multishot=True)
    assert port.dequeue(0) is None

    def work():
        {CHILDREN[child]}

    start = 0

    def exchange():
        global start
        for size in (1, 4096, 50_000, 70):
            peer.sendall(pattern(size, start))
            got = b""
            while len(got) < size:
                completion = one(port)
                assert completion.operation is receiving and completion.more
                got += completion.data
            assert got == pattern(size, start)
            start += size
        client = dial(address)
        completion = one(port)
        assert completion.operation is accepting and completion.more
        completion.accepted.close()
        assert client.recv(1) == b""

    peer.sendall(pattern(3000))  # stands in the ring, or in the socket, when the process forks
    start = 3000
    end = forked(work)
    assert one(port).data == pattern(3000)
    exchange()
    end()
    exchange()
    port.close()
    assert peer.recv(1) == b""
""",
        backend,
    )


def test_a_child_that_holds_the_ring_holds_no_address_of_a_port_that_was_closed(
    backend: str, concurrency: int
) -> None:
    check_python(
        FORKING
        + f"""
    port = an.CompletionPort(concurrency={concurrency})
    listener, address = listening(port)
    sock, peer = pair(port)
    listener.accept(multishot=True)
    sock.recv(multishot=True)
    assert port.dequeue(0) is None
    end = forked()
    client = dial(address)
    port.close()
    assert peer.recv(1) == b""
    try:
        assert client.recv(1) == b""
    except ConnectionResetError:
        pass
    try:
        dial(address)
    except ConnectionRefusedError:
        pass
    else:
        raise AssertionError("the child's copy goes on listening")
    end()
""",
        backend,
    )


# -- room for data --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["multishot", "one-shot"])
def test_more_data_than_the_ring_has_buffers_waits_in_order(
    port: an.CompletionPort, way: str
) -> None:
    """A new ring has 64 buffers; each message needs one, and all come at once."""
    pairs = [pair(port, "unix") for _ in range(300)]
    multishot = way == "multishot"
    for sock, _ in pairs:
        sock.recv(multishot=multishot)
    assert port.dequeue(0) is None
    got: dict[an.AsyncSocket | None, bytearray] = {sock: bytearray() for sock, _ in pairs}
    for turn in range(3):
        for number, (_, peer) in enumerate(pairs):
            peer.sendall(pattern(3000, number + turn * 3000))
        wanted = 300 * 3000 * (turn + 1)
        while sum(map(len, got.values())) < wanted:
            for completion in drain(port, 1):
                assert completion.error == 0 and completion.data
                got[completion.socket] += completion.data
                if not multishot and completion.socket is not None:
                    completion.socket.recv()
    for number, (sock, _) in enumerate(pairs):
        assert got[sock] == pattern(9000, number)


@pytest.mark.parametrize("seed", range(12))
def test_random_receives_of_random_sizes_keep_every_byte_in_order(
    port: an.CompletionPort, seed: int
) -> None:
    """Sizes around the ring's buffers switch between the ring and calls of our own, with receives
    of all forms, cancels and pauses in between."""
    chance = random.Random(seed)
    sock, peer = pair(port, chance.choice(("ipv4", "unix")))
    peer.setblocking(False)
    buffer = bytearray(6000)
    got = bytearray()
    sent = 0
    armed: list[an.Operation] = []
    multishot = False

    def take(completions: list[an.Completion]) -> None:
        for completion in completions:
            if completion.data is not None:
                got.extend(completion.data)
            else:
                got.extend(buffer[: completion.transferred])
            if not completion.more and completion.operation is not None:
                armed.remove(completion.operation)

    for _ in range(150):
        if not armed:
            form = chance.randrange(4)
            multishot = False
            if form == 0:
                armed.append(sock.recv_into(buffer))
            elif form == 1:
                armed.append(sock.recv(chance.choice((10, 4095, 4096, 5000))))
            else:
                multishot = form == 3
                armed.append(sock.recv(65536, multishot=multishot))
        for _ in range(chance.randrange(1, 5)):
            size = chance.choice((1, 50, 4000, 4095, 4096, 4097, 8192, 20_000))
            try:
                sent += peer.send(pattern(size, sent))
            except BlockingIOError:
                pass
        chosen = chance.randrange(6)
        if chosen == 0:
            armed[0].cancel()
        elif chosen == 1 and multishot:
            armed[0].pause()
            take(port.dequeue_many(timeout=0))
            if armed:
                armed[0].resume()
        take(port.dequeue_many(timeout=0.001 if chance.randrange(3) else 0))
    for operation in list(armed):
        operation.cancel()
    take(settle(port, 0.01))
    sock.recv(multishot=True)
    deadline = time.monotonic() + PATIENCE
    while len(got) < sent:
        assert time.monotonic() < deadline, f"{len(got)} of {sent}"
        got += received(port.dequeue_many(timeout=0.05))
    assert got == pattern(sent)


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_that_never_rests_keeps_every_byte_in_order(
    port: an.CompletionPort, family: str, seed: int
) -> None:
    """While a socket changes between the ring and calls of our own, both could take from it."""
    chance = random.Random(seed)
    sock, peer = pair(port, family)
    pairs = [pair(port, "unix") for _ in range(20)]  # calls of theirs stand between ours
    for other, _ in pairs:
        other.recv(100, multishot=True)
    total = 6 << 20
    whole = pattern(total)
    problems: list[BaseException] = []

    def send() -> None:
        try:
            sent = 0
            while sent < total:
                small = chance.randrange(3)
                for _ in range(40):
                    size = chance.randrange(1, 200) if small else chance.randrange(4000, 40_000)
                    peer.sendall(whole[sent : sent + size])
                    sent = min(total, sent + size)
                for _, its_peer in pairs:
                    its_peer.sendall(b"x")
        except BaseException as error:
            problems.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    operation = sock.recv(multishot=True)
    got = 0
    deadline = time.monotonic() + PATIENCE
    while got < total:
        assert time.monotonic() < deadline, f"{got} of {total}"
        for completion in port.dequeue_many(timeout=0.1):
            if completion.socket is not sock:
                continue
            data = completion.data
            if data:
                assert data == whole[got : got + len(data)], f"displaced after {got} bytes"
                got += len(data)
            if not completion.more:
                operation = sock.recv(multishot=True)
            elif chance.randrange(20) == 0:
                operation.pause()
                operation.resume()
    sender.join(PATIENCE)
    assert not sender.is_alive() and not problems, problems


def test_what_stands_in_the_ring_comes_before_what_a_call_of_our_own_would_take(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port)
    sock.recv(100)  # small ones are received by calls
    peer.sendall(pattern(100))
    assert one(port).data == pattern(100)
    listener, address = listening(port, backlog=400)
    listener.accept(multishot=True)
    operation = sock.recv(multishot=True)
    assert port.dequeue(0) is None
    # More than one pass works on: what the ring received behind them stays in it.
    clients = [dial(address) for _ in range(400)]
    peer.sendall(pattern(50, 100))
    completions = port.dequeue_many(1)
    peer.sendall(pattern(50, 150))
    operation.cancel()
    while len(received(completions)) < 100:
        sock.recv(100)
        completions += drain(port, lambda so_far: any(c.data for c in so_far))
    assert received(completions) == pattern(100, 100)
    listener.close()
    for completion in completions + settle(port):
        if completion.accepted is not None:
            completion.accepted.close()
    for client in clients:
        client.close()


def test_an_error_behind_data_that_nobody_took_yet_is_told_behind_it(
    port: an.CompletionPort,
) -> None:
    """The request has taken both, so the system tells the error to nobody else."""
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    nothing(port)
    operation.pause()
    peer.sendall(b"last words")
    reset(peer)
    nothing(port)
    operation.resume()
    completions = drain(port, lambda so_far: so_far and not so_far[-1].more)
    assert received(completions) == b"last words"
    assert completions[-1].error == errno.ECONNRESET


def test_a_kernel_that_is_too_busy_for_submissions_loses_nothing(backend: str) -> None:
    """A ring of 8 entries, whose submissions fail while it is being filled."""
    check_python(
        """
    import os
    import asyncio_native as an
    from seccomp_support import refuse_entering
    from support import drain, pair

    os.environ["ASYNCIO_NATIVE_IO_URING_ENTRIES"] = "8"
    refuse_entering(0)
    for concurrency in (0, 1):
        with an.CompletionPort(concurrency=concurrency) as port:
            pairs = [pair(port, "unix") for _ in range(100)]
            for sock, peer in pairs:
                sock.recv(multishot=True)
            for turn in range(3):
                for number, (_, peer) in enumerate(pairs):
                    peer.sendall(b"%d" % number)
                completions = drain(port, len(pairs))
                found = {c.socket: c.data for c in completions}
                assert found == {s: b"%d" % n for n, (s, _) in enumerate(pairs)}
            for sock, _ in pairs:
                sock.close()
            assert len(drain(port, len(pairs))) == len(pairs)
""",
        backend,
    )


@pytest.mark.parametrize("concurrency", [0, 1], ids=["any-thread", "one-thread"])
def test_the_number_of_a_closed_socket_is_not_free_before_the_kernel_has_looked_at_it(
    backend: str, concurrency: int
) -> None:
    """A request that was prepared names a number; here submitting it fails at first. The socket
    that comes next has the same slot, so that what the request brings must not be taken for its."""
    check_python(
        f"""
    import errno
    import asyncio_native as an
    from seccomp_support import refuse_entering
    from support import cancelled, drain, nothing, one, pair

    refuse_entering(9)  # a wait with a limit
    port = an.CompletionPort(concurrency={concurrency})
    sock, peer = pair(port, "unix")
    number = sock.fileno()
    operation = sock.recv(multishot=True)
    try:
        port.dequeue(timeout=0.01)
    except OSError as error:
        assert error.errno == errno.EBUSY
    else:
        raise AssertionError("the request was submitted")
    sock.close()
    assert peer.recv(1) == b""
    others = [pair(port, "unix") for _ in range(3)]
    assert number not in [other.fileno() for other, _ in others]
    for other, _ in others:
        other.recv(multishot=True)
    completions = port.dequeue_many(timeout=0)
    assert [c.operation for c in completions] == [operation] and cancelled(completions[0])
    for turn in range(3):
        for other, its_peer in others:
            its_peer.sendall(b"%d" % other.fileno())
        found = {{}}
        for _ in range(1000):
            found |= {{c.socket: c.data for c in port.dequeue_many(timeout=0)}}
            if len(found) == len(others):
                break
        assert found == {{other: b"%d" % other.fileno() for other, _ in others}}
    port.close()
""",
        backend,
    )


# -- threads --------------------------------------------------------------------------------------


def test_a_thread_that_computes_holds_back_nothing_that_it_had_asked_for(backend: str) -> None:
    """The kernel finishes a request in the thread that submitted it, which makes no system call."""
    with an.CompletionPort(backend) as port:
        sock, peer = pair(port)
        sock.recv(multishot=True)
        stop = threading.Event()
        armed = threading.Event()

        def compute() -> None:
            port.dequeue(0)
            armed.set()
            while not stop.is_set():
                sum(range(100))

        thread = threading.Thread(target=compute)
        thread.start()
        try:
            assert armed.wait(PATIENCE)
            for _ in range(10):
                peer.sendall(b"x")
                assert one(port).data == b"x"
                threading.Timer(0.01, port.post).start()
                assert one(port).kind is an.POST
        finally:
            stop.set()
            thread.join(PATIENCE)


def test_a_thread_that_sleeps_in_the_system_holds_back_nothing_either(backend: str) -> None:
    with an.CompletionPort(backend) as port:
        sock, peer = pair(port)
        sock.recv(multishot=True)
        read_end, write_end = os.pipe()
        armed = threading.Event()

        def sleep() -> None:
            port.dequeue(0)
            armed.set()
            os.read(read_end, 1)

        thread = threading.Thread(target=sleep)
        thread.start()
        try:
            assert armed.wait(PATIENCE)
            for _ in range(10):
                peer.sendall(b"x")
                assert one(port).data == b"x"
        finally:
            os.write(write_end, b"x")
            thread.join(PATIENCE)
            os.close(read_end)
            os.close(write_end)


def test_sockets_closed_by_other_threads_leave_nothing_to_their_successors(
    port: an.CompletionPort,
) -> None:
    """Descriptors' numbers and slots are used again at once, while requests for their predecessors
    are being prepared, are under way or are being cancelled."""
    rounds = 150
    problems: list[BaseException] = []
    finished = 0

    def churn(name: int) -> None:
        try:
            for number in range(rounds):
                word = b"%d.%d;" % (name, number)
                ours, peer = socket.socketpair()
                sock = an.AsyncSocket.adopt(ours)
                port.associate(sock, word)
                sock.recv(multishot=bool(number % 2))
                if number % 3 == 0:
                    time.sleep(0)
                with peer:
                    peer.sendall(word)
                    sock.send(word, quiet=True)
                    if number % 4 == 0:
                        assert read_exactly(peer, len(word)) == word
                    sock.close()
                    with suppress(ConnectionResetError):  # it was closed with data unread
                        while peer.recv(100):
                            pass
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=churn, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while any(thread.is_alive() for thread in threads) or port.in_flight:
        assert time.monotonic() < deadline
        for completion in port.dequeue_many(timeout=0.01):
            if completion.data:
                assert completion.data == completion.state
            if completion.kind is an.RECV and not completion.more:
                finished += 1
                assert completion.data or cancelled(completion)
    assert not problems, problems
    assert finished == 4 * rounds


def test_a_descriptor_asked_for_while_another_thread_waits_does_not_stay_readable(
    port: an.CompletionPort,
) -> None:
    problems: list[BaseException] = []

    def serve() -> None:
        try:
            port.dequeue(0)
            begun.set()
            while port.dequeue(PATIENCE) is not None:
                pass
            problems.append(AssertionError("the port was not closed in time"))
        except an.PortClosedError:
            pass

    begun = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    assert begun.wait(PATIENCE)
    time.sleep(0.02)  # no event tells that a thread waits
    descriptor = port.fileno()
    eventually(lambda: not select.select([descriptor], [], [], 0)[0])
    port.close()
    thread.join(PATIENCE)
    assert not thread.is_alive() and not problems, problems


@pytest.mark.parametrize("where", ["main", "thread"])
def test_the_interpreter_ends_with_every_kind_of_request_in_flight(
    backend: str, concurrency: int, where: str
) -> None:
    check_python(
        f"""
    import threading
    import asyncio_native as an
    from support import PATIENCE, datagram, listening, pair, pattern

    port = an.CompletionPort(concurrency={concurrency})
    kept = []

    def start():
        listener, address = listening(port)
        sock, peer = pair(port)
        stalled, slow = pair(port, small=True)
        talker, _ = datagram(port)
        listener.accept(multishot=True)
        sock.recv(multishot=True)
        sock.recv_into(bytearray(1000))
        talker.recvfrom(multishot=True)
        stalled.send(pattern(8 << 20))
        port.timer(100)
        port.fileno()
        peer.sendall(bytes(100_000))
        kept.extend((listener, sock, peer, stalled, slow, talker))
        port.dequeue(0)
        begun.set()

    def serve():
        start()
        while True:
            port.dequeue()

    begun = threading.Event()
    if {where!r} == "main":
        start()
    else:
        threading.Thread(target=serve, daemon=True).start()
        assert begun.wait(PATIENCE)
""",
        backend,
    )


def test_lingering_resets_are_resets_with_a_request_in_flight(port: an.CompletionPort) -> None:
    """The request holds the file, so the close of its descriptor alone would reset nothing."""
    sock, peer = pair(port)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.recv(multishot=True)
    nothing(port)
    sock.close()
    with pytest.raises(ConnectionResetError):
        peer.recv(1)
    assert cancelled(one(port))
