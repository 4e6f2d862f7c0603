"""Guarantee 7: any thread may start, cancel, post, associate and close, and may end before its
operations do; any number of threads may dequeue at once; waiting releases the interpreter lock."""

from __future__ import annotations

import collections
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    cancelled,
    check_python,
    dial,
    drain,
    eventually,
    listening,
    nothing,
    one,
    pair,
    pattern,
    pump,
    read_exactly,
    settle,
    stdlib_pair,
)


def run(function: Callable[[], object]) -> None:
    """Runs the function in a thread that has ended when this returns."""
    problems: list[BaseException] = []

    def work() -> None:
        try:
            function()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    if problems:
        raise problems[0]


class Crew:
    """Threads that dequeue into one list until the port is closed or `stop` is set."""

    def __init__(self, port: an.CompletionPort, count: int, *, many: bool = False) -> None:
        self.completions: list[tuple[int, an.Completion]] = []
        self.problems: list[BaseException] = []
        self.stop = threading.Event()
        self._port = port
        self._many = many
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int) -> None:
        try:
            while not self.stop.is_set():
                if self._many:
                    batch = self._port.dequeue_many(timeout=0.1)
                else:
                    completion = self._port.dequeue(timeout=0.1)
                    batch = [] if completion is None else [completion]
                self.completions += [(number, completion) for completion in batch]
        except BaseException as error:
            self.problems.append(error)

    def end(self) -> list[an.Completion]:
        self.stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not self.problems, self.problems
        return [completion for _, completion in self.completions]


def test_a_thread_may_start_and_end_before_its_operations(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    operations: list[an.Operation | None] = []
    run(lambda: operations.append(sock.recv()))
    run(lambda: operations.append(sock.send(pattern(4 << 20))))
    run(lambda: sock.send(b"quiet", quiet=True))
    nothing(port)
    peer.sendall(b"late")
    assert one(port).operation is operations[0]
    data, completions = pump(port, peer, (4 << 20) + 5)
    completions += settle(port)
    assert data == pattern(4 << 20) + b"quiet"
    assert [c.operation for c in completions] == operations[1:]


def test_any_thread_may_do_anything(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    run(lambda: listener.accept(multishot=True))
    client = dial(address)
    accepted = one(port).accepted
    assert accepted is not None
    run(lambda: port.associate(accepted, "state"))
    run(lambda: accepted.recv(multishot=True))
    client.sendall(b"x")
    completion = one(port)
    assert completion.data == b"x"
    assert completion.state == "state"
    run(lambda: port.post("posted"))
    assert one(port).state == "posted"
    run(accepted.cancel)
    assert cancelled(one(port))
    run(accepted.close)
    assert client.recv(1) == b""
    run(port.close)
    with pytest.raises(an.PortClosedError):
        port.post()


def test_the_thread_that_made_the_port_may_end(backend: str) -> None:
    made: list[an.CompletionPort] = []
    run(lambda: made.append(an.CompletionPort(backend)))
    with made[0] as port:
        sock, peer = pair(port)
        sock.recv()
        peer.sendall(b"x")
        assert one(port).data == b"x"


@pytest.mark.dequeuing_threads
def test_the_thread_that_dequeued_may_end(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    for _ in range(5):
        sock.recv()
        peer.sendall(b"x")
        run(lambda: one(port))
    sock.recv()
    peer.sendall(b"y")
    assert one(port).data == b"y"


@pytest.mark.dequeuing_threads
@pytest.mark.parametrize("many", [False, True])
def test_each_completion_goes_to_one_thread(port: an.CompletionPort, many: bool) -> None:
    crew = Crew(port, 6, many=many)
    for number in range(5000):
        port.post(number)
    eventually(lambda: len(crew.completions) >= 5000)
    states = [completion.state for completion in crew.end()]
    assert sorted(states) == list(range(5000))


@pytest.mark.dequeuing_threads
def test_several_threads_share_the_work(port: an.CompletionPort) -> None:
    """Each thread that got a completion waits for the others: no thread can do it all."""
    meeting = threading.Barrier(4)

    def work() -> None:
        one(port)
        meeting.wait(PATIENCE)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        port.post()
    for thread in threads:
        thread.join(PATIENCE)
    assert not meeting.broken


@pytest.mark.dequeuing_threads
def test_network_completions_reach_all_waiting_threads(port: an.CompletionPort) -> None:
    """Data for many sockets at once, and each thread that takes one waits for the others."""
    meeting = threading.Barrier(4)
    socks = [pair(port) for _ in range(4)]
    for sock, _ in socks:
        sock.recv()

    def work() -> None:
        one(port)
        meeting.wait(PATIENCE)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _, peer in socks:
        peer.sendall(b"x")
    for thread in threads:
        thread.join(PATIENCE)
    assert not meeting.broken


@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True])
def test_an_echo_server_of_many_threads_loses_nothing(port: an.CompletionPort, many: bool) -> None:
    listener, address = listening(port)
    stop = threading.Event()
    problems: list[BaseException] = []

    def serve() -> None:
        try:
            while not stop.is_set():
                for c in port.dequeue_many(256 if many else 1, timeout=0.1):
                    if c.kind is an.ACCEPT and c.accepted:
                        port.associate(c.accepted)
                        c.accepted.recv()
                    elif c.kind is an.RECV and c.data:
                        assert c.socket is not None
                        c.socket.send(c.data, quiet=True)
                        c.socket.recv()
                    elif c.kind is an.RECV:
                        assert c.socket is not None
                        c.socket.close(flush=True)
        except BaseException as error:
            problems.append(error)

    listener.accept(multishot=True)
    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        clients = [dial(address) for _ in range(20)]
        for round_number in range(20):
            for number, client in enumerate(clients):
                client.sendall(pattern(10_000, number * 1000 + round_number))
            for number, client in enumerate(clients):
                data = read_exactly(client, 10_000)
                assert data == pattern(10_000, number * 1000 + round_number)
        for client in clients:
            client.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert not problems, problems


@pytest.mark.dequeuing_threads
def test_waiting_releases_the_interpreter_lock(port: an.CompletionPort) -> None:
    waiting = threading.Thread(target=lambda: port.dequeue(timeout=PATIENCE))
    waiting.start()
    began = time.monotonic()
    for _ in range(20):
        time.sleep(0.001)  # each would wait for the lock if the other thread kept it
    assert time.monotonic() - began < 5
    assert waiting.is_alive()
    port.post()
    waiting.join(PATIENCE)
    assert not waiting.is_alive()


def test_starts_from_many_threads_are_all_counted(port: an.CompletionPort) -> None:
    sock, _ = pair(port)

    def work() -> None:
        for _ in range(500):
            sock.recv(1)
            port.post()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert port.in_flight == 4000
    assert sock.cancel() == 2000
    kinds = collections.Counter(c.kind for c in drain(port, 4000))
    assert kinds == {an.RECV: 2000, an.POST: 2000}
    assert port.in_flight == 0


@pytest.mark.slow
def test_threads_that_start_cancel_post_and_close_beside_dequeuing_ones(
    port: an.CompletionPort,
) -> None:
    crew = Crew(port, 3, many=True)
    counts = collections.Counter[str]()
    lock = threading.Lock()
    problems: list[BaseException] = []

    def work() -> None:
        mine = collections.Counter[str]()
        try:
            for number in range(60):
                ours, peer = stdlib_pair()
                sock = an.AsyncSocket.adopt(ours)
                port.associate(sock, number)
                operations = [sock.recv(1) for _ in range(5)]
                sock.send(b"abc")
                peer.sendall(b"xy")
                operations[number % 5].cancel()
                port.post(number)
                if number % 2:
                    sock.cancel()
                sock.close()
                peer.close()
                mine.update(started=6, posted=1)
        except BaseException as error:
            problems.append(error)
        with lock:
            counts.update(mine)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not problems, problems
    eventually(lambda: port.in_flight == 0)
    completions = crew.end()
    assert sum(c.kind is an.POST for c in completions) == counts["posted"]
    assert sum(c.kind is not an.POST for c in completions) == counts["started"]
    assert len({id(c.operation) for c in completions if c.kind is not an.POST}) == counts["started"]


def test_closing_the_port_beside_busy_threads_is_safe(backend: str) -> None:
    for _ in range(20):
        port = an.CompletionPort(backend)
        sock, peer = pair(port)
        problems: list[BaseException] = []

        def work(port: an.CompletionPort = port, sock: an.AsyncSocket = sock) -> None:
            try:
                while True:
                    port.post()
                    sock.recv(1)
                    sock.send(b"x", quiet=True)
                    port.dequeue_many(timeout=0.01)
            except an.PortClosedError:
                pass
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert peer.recv(1) == b"x"
        port.close()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not problems, problems
        peer.close()


def test_two_threads_may_close_the_same_port(backend: str) -> None:
    for _ in range(20):
        port = an.CompletionPort(backend)
        sock, _ = pair(port)
        sock.recv()
        together = threading.Barrier(3)

        def work(port: an.CompletionPort = port, together: threading.Barrier = together) -> None:
            together.wait()
            port.close()
            assert port.in_flight == 0

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_a_dequeue_in_one_thread_serves_starts_of_another(port: an.CompletionPort) -> None:
    """What is started while a thread waits in the system must reach that wait."""
    crew = Crew(port, 1)
    for _ in range(100):
        before = len(crew.completions)
        sock, peer = pair(port)
        sock.recv()
        peer.sendall(b"x")
        eventually(partial(lambda before: len(crew.completions) > before, before))
        sock.close()
    assert all(c.data == b"x" for c in crew.end())


@pytest.mark.parametrize(
    ("wait", "end"),
    [
        ("port.dequeue()", "pass"),
        ("port.dequeue_many()", "pass"),
        ("port.dequeue(timeout=60)", "sys.exit(0)"),
        ("port.dequeue()", "port.close()"),
        ("port.dequeue()", "sock.close()"),
        ("port.dequeue()", "import gc; del sock, peer; gc.collect()"),
        ("[port.dequeue(timeout=0.001) for _ in iter(int, 1)]", "pass"),
        ("[(port.post(), port.dequeue()) for _ in iter(int, 1)]", "pass"),
        ("[(sock.send(b'x', quiet=True), port.dequeue(0)) for _ in iter(int, 1)]", "pass"),
    ],
)
def test_blocked_daemon_threads_end_silently_at_exit(backend: str, wait: str, end: str) -> None:
    check_python(
        f"""
        import sys, threading, time
        import asyncio_native as an
        from support import pair
        port = an.CompletionPort()
        sock, peer = pair(port)
        sock.recv(multishot=True)
        sock.recv_into(bytearray(10))
        port.timer(60)

        def work():
            try:
                {wait}
            except an.PortClosedError:
                pass

        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.1)  # nothing tells from outside that a thread blocks in dequeue
        {end}
        """,
        backend,
    )


def test_the_end_of_a_multishot_does_not_overtake_what_came_before(backend: str) -> None:
    """A thread has data of a multishot and no interpreter lock yet, when another one handles its
    end: the data must arrive all the same."""
    with an.CompletionPort(backend) as port, an.CompletionPort(backend) as other:
        ours, theirs = socket.socketpair()
        receiver, sender = an.AsyncSocket.adopt(ours), an.AsyncSocket.adopt(theirs)
        port.associate(receiver)
        other.associate(sender)
        operation = receiver.recv(multishot=True)
        first: list[an.Completion] = []
        thread = threading.Thread(target=lambda: first.extend(port.dequeue_many(64, PATIENCE)))
        thread.start()
        eventually(lambda: port.statistics().waits > 0)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(PATIENCE)
        try:
            sender.send(b"data", quiet=True)
            until = time.monotonic() + 0.05
            while time.monotonic() < until:
                pass  # the thread gets the data meanwhile, but not the interpreter
            operation.cancel()
            second = port.dequeue_many(64, 0)
        finally:
            sys.setswitchinterval(interval)
        thread.join(PATIENCE)
        completions = first + second
        while not any(not c.more for c in completions):
            completions.append(one(port))
        assert [c.data for c in completions if c.more] == [b"data"]
        assert all(c.operation is operation for c in completions)
        assert not operation.pending and port.in_flight == 0
        receiver.close()
        sender.close()


def test_threads_that_dequeue_side_by_side_lose_nothing_of_short_multishots(backend: str) -> None:
    connections, pieces, threads = 150, 4, 4
    with an.CompletionPort(backend) as port:
        received: dict[int, bytes] = {}
        ends = []
        lock = threading.Lock()

        def dequeue() -> None:
            while True:
                for completion in port.dequeue_many(3, PATIENCE):
                    if completion.kind is an.POST:
                        port.post()  # for the next one
                        return
                    with lock:
                        number = completion.state
                        received[number] = received.get(number, b"") + completion.data
                        if not completion.more:
                            ends.append(number)
                    if not completion.more:
                        completion.socket.close()

        workers = [threading.Thread(target=dequeue) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for number in range(connections):
            ours, theirs = socket.socketpair()
            sock = an.AsyncSocket.adopt(ours)
            port.associate(sock, number)
            sock.recv(1, multishot=True)
            theirs.sendall(bytes(pieces))
            theirs.close()
        eventually(lambda: len(ends) == connections)
        port.post()
        for worker in workers:
            worker.join(PATIENCE)
        assert sorted(ends) == list(range(connections))
        assert {number: len(data) for number, data in received.items()} == dict.fromkeys(
            range(connections), pieces
        )
