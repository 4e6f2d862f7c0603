"""Timers, and the deadlines that each operation may have (`timeout=`)."""

from __future__ import annotations

import errno
import random
import select
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    by_operation,
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
    read_to_end,
    settle,
    stall,
    stdlib_datagram,
    stdlib_listener,
    watchable,
)

#: Seconds by which a busy machine may be late. Never early is what the contract promises.
SLACK = PATIENCE / 3

#: Seconds in which a busy machine has done a little, as a deadline that it must keep.
SHORT = PATIENCE / 20


def timed_out(completion: an.Completion) -> bool:
    """Whether the completion reports that the deadline passed, in the documented way."""
    if completion.error != errno.ETIMEDOUT:
        return False
    with pytest.raises(TimeoutError):
        completion.result()
    assert not completion.more
    return True


# -- timers ---------------------------------------------------------------------------------------


def test_a_timer_completes_after_its_time_never_early(port: an.CompletionPort) -> None:
    state = object()
    began = time.perf_counter()
    operation = port.timer(0.1, state)
    assert isinstance(operation, an.Operation)
    assert operation.kind is an.TIMER
    assert operation.pending
    assert port.in_flight == 1
    completion = one(port)
    assert 0.1 <= time.perf_counter() - began < SLACK
    assert completion.operation is operation
    assert completion.kind is an.TIMER
    assert completion.state is state
    assert completion.socket is None
    assert completion.error == 0
    assert not completion.more
    assert completion.result() is None
    assert not operation.pending
    assert port.in_flight == 0
    nothing(port)


def test_many_times_never_early(port: an.CompletionPort) -> None:
    chance = random.Random(1)
    for _ in range(100):
        seconds = chance.random() / 100
        began = time.perf_counter()
        port.timer(seconds)
        one(port)
        assert time.perf_counter() - began >= seconds


@pytest.mark.parametrize("seconds", [0, 0.0, 1e-9, 0.0004])
def test_short_timers_complete(port: an.CompletionPort, seconds: float) -> None:
    port.timer(seconds, "state")
    assert one(port).state == "state"


def test_timers_complete_in_the_order_of_their_times(port: an.CompletionPort) -> None:
    times = [0.2, 0.05, 0.15, 0.1, 0.01]
    for seconds in times:
        port.timer(seconds, seconds)
    assert [c.state for c in drain(port, 5)] == sorted(times)


def test_ten_thousand_timers_complete_once_each(port: an.CompletionPort) -> None:
    chance = random.Random(2)
    due = {}
    for number in range(10_000):
        seconds = chance.random() / 2
        due[number] = time.perf_counter() + seconds
        port.timer(seconds, number)
    seen: list[int] = []
    deadline = time.perf_counter() + PATIENCE
    while len(seen) < 10_000:
        assert time.perf_counter() < deadline
        batch = port.dequeue_many(timeout=1)
        now = time.perf_counter()
        assert all(now >= due[c.state] for c in batch)
        seen += [c.state for c in batch]
    assert sorted(seen) == list(range(10_000))
    nothing(port)


def test_a_timer_can_be_cancelled(port: an.CompletionPort) -> None:
    operation = port.timer(60, "state")
    assert operation.cancel() is True
    assert operation.cancel() is False
    completion = one(port)
    assert completion.operation is operation
    assert completion.kind is an.TIMER
    assert completion.state == "state"
    assert cancelled(completion)
    assert port.in_flight == 0


def test_a_timer_that_fired_cannot_be_cancelled(port: an.CompletionPort) -> None:
    operation = port.timer(0)
    assert one(port).operation is operation
    assert operation.cancel() is False
    nothing(port)


def test_one_of_many_timers_is_cancelled(port: an.CompletionPort) -> None:
    timers = [port.timer(0.05 + number / 1000, number) for number in range(50)]
    for timer in timers[::2]:
        assert timer.cancel()
    completions = drain(port, 50)
    assert {c.state for c in completions if cancelled(c)} == set(range(0, 50, 2))
    assert [c.state for c in completions if not c.error] == list(range(1, 50, 2))


def test_dequeue_may_time_out_before_a_timer(port: an.CompletionPort) -> None:
    port.timer(0.3, "later")
    assert port.dequeue(timeout=0.01) is None
    assert one(port).state == "later"


def test_a_timer_ends_a_wait_for_ever(port: an.CompletionPort) -> None:
    port.timer(0.05, "state")
    completion = port.dequeue()
    assert completion is not None
    assert completion.state == "state"


def test_an_earlier_timer_of_another_thread_shortens_the_wait(port: an.CompletionPort) -> None:
    port.timer(60, "late")
    thread = threading.Timer(0.1, lambda: port.timer(0.05, "early"))
    thread.start()
    began = time.perf_counter()
    completion = port.dequeue(timeout=PATIENCE)
    thread.join()
    assert completion is not None
    assert completion.state == "early"
    assert time.perf_counter() - began < SLACK


@pytest.mark.dequeuing_threads
def test_a_timer_wakes_one_of_several_waiting_threads(port: an.CompletionPort) -> None:
    seen: list[an.Completion | None] = []
    threads = [
        threading.Thread(target=lambda: seen.append(port.dequeue(timeout=PATIENCE)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for number in range(3):
        port.timer(0.05 * number, number)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sorted(c.state for c in seen if c is not None) == [0, 1, 2]


def test_a_cancel_from_another_thread_wakes_the_wait(port: an.CompletionPort) -> None:
    operation = port.timer(60)
    thread = threading.Timer(0.1, operation.cancel)
    thread.start()
    completion = port.dequeue(timeout=PATIENCE)
    thread.join()
    assert completion is not None
    assert cancelled(completion)


def test_a_far_timer_is_taken(port: an.CompletionPort) -> None:
    operation = port.timer(1e9)
    nothing(port)
    assert operation.cancel()
    assert cancelled(one(port))


@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan")])
def test_a_time_out_of_range_raises(port: an.CompletionPort, seconds: float) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        port.timer(seconds)
    assert port.in_flight == 0


@pytest.mark.parametrize("seconds", ["1", None, b"1"])
def test_a_time_of_a_wrong_type_raises(port: an.CompletionPort, seconds: Any) -> None:
    with pytest.raises(TypeError):
        port.timer(seconds)
    assert port.in_flight == 0


def test_a_timer_on_a_closed_port_raises(backend: str) -> None:
    port = an.CompletionPort(backend)
    operation = port.timer(60)
    port.close()
    assert port.in_flight == 0
    assert not operation.pending
    assert not operation.cancel()
    with pytest.raises(an.PortClosedError):
        port.timer(1)


@watchable
def test_fileno_becomes_readable_when_a_timer_is_due(port: an.CompletionPort) -> None:
    port.timer(0.2, "due")
    assert port.dequeue(timeout=0) is None
    began = time.perf_counter()
    completion = None
    while completion is None:
        assert time.perf_counter() - began < PATIENCE
        assert select.select([port.fileno()], [], [], PATIENCE)[0]
        completion = port.dequeue(timeout=0)
    assert time.perf_counter() - began >= 0.19
    assert completion.state == "due"


def test_a_loop_of_posts_does_not_starve_timers(port: an.CompletionPort) -> None:
    port.timer(0.05, "timer")
    port.post("again")
    began = time.perf_counter()
    while one(port).kind is not an.TIMER:
        port.post("again")
        assert time.perf_counter() - began < SLACK


def test_a_busy_socket_does_not_starve_timers(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(1024, multishot=True)
    peer.setblocking(False)
    port.timer(0.05, "timer")
    began = time.perf_counter()
    while True:
        try:
            peer.send(bytes(1 << 18))
        except BlockingIOError:
            pass
        if one(port).kind is an.TIMER:
            break
        assert time.perf_counter() - began < SLACK


def test_a_timer_may_start_the_next(port: an.CompletionPort) -> None:
    for number in range(200):
        port.timer(0, number)
        assert one(port).state == number


def test_cancelled_timers_and_deadlines_do_not_grow_memory(backend: str) -> None:
    check_python(
        """
        import gc
        import asyncio_native as an
        from support import *

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096

        port = an.CompletionPort()
        sock, peer = pair(port)

        def many(count):
            for _ in range(count):
                port.timer(3600).cancel()
                one(port)
                sock.recv(timeout=3600).cancel()
                one(port)
            gc.collect()
            return resident()

        many(10_000)
        before = many(10_000)
        after = many(50_000)
        assert after - before < 2 << 20, (before, after)
        """,
        backend,
    )


# -- deadlines ------------------------------------------------------------------------------------


Start = Callable[..., an.Operation | None]


def unanswered(port: an.CompletionPort) -> Start:
    """A connect to a listener whose backlog is full: Linux lets it wait."""
    listener = stdlib_listener(backlog=0)
    for _ in range(2):
        filler = an.AsyncSocket()
        port.associate(filler)
        filler.connect(listener.getsockname())
    settle(port)
    sock = an.AsyncSocket()
    port.associate(sock)
    return partial(sock.connect, listener.getsockname())


def stalled(port: an.CompletionPort) -> an.AsyncSocket:
    """A stream whose window is full, so that all sends behind wait."""
    sock, _ = pair(port, small=True)
    stall(port, sock)
    return sock


def waiting_sendfile(port: an.CompletionPort, path: Path) -> Start:
    path.write_bytes(b"content")
    sock = stalled(port)

    def start(timeout: float) -> an.Operation | None:
        with open(path, "rb") as file:
            return sock.sendfile(file, timeout=timeout)

    return start


def waiting_sendto(port: an.CompletionPort) -> Start:
    sock, _ = datagram(port, "unix")
    peer = stdlib_datagram("unix")
    while sock.sendto(b"x", peer.getsockname()).pending:
        if not settle(port, 0.01):
            break
    return partial(sock.sendto, b"x", peer.getsockname())


#: Prepares what an operation would wait for; what it returns starts the operation.
WAITING: dict[str, Callable[[an.CompletionPort, Path], Start]] = {
    "accept": lambda port, path: listening(port)[0].accept,
    "accept multishot": lambda port, path: partial(listening(port)[0].accept, multishot=True),
    "connect": lambda port, path: unanswered(port),
    "recv": lambda port, path: pair(port)[0].recv,
    "recv multishot": lambda port, path: partial(pair(port)[0].recv, multishot=True),
    "recv_into": lambda port, path: partial(pair(port)[0].recv_into, bytearray(1)),
    "recvfrom": lambda port, path: datagram(port)[0].recvfrom,
    "recvfrom multishot": lambda port, path: partial(datagram(port)[0].recvfrom, multishot=True),
    "recvfrom_into": lambda port, path: partial(datagram(port)[0].recvfrom_into, bytearray(1)),
    "send": lambda port, path: partial(stalled(port).send, b"x"),
    "sendv": lambda port, path: partial(stalled(port).sendv, [b"x"]),
    "sendto": lambda port, path: waiting_sendto(port),
    "sendfile": waiting_sendfile,
    "disconnect": lambda port, path: stalled(port).disconnect,
}


@pytest.mark.parametrize("name", WAITING)
def test_an_operation_ends_at_its_deadline(
    port: an.CompletionPort, name: str, tmp_path: Path
) -> None:
    start = WAITING[name](port, tmp_path / "file")
    began = time.perf_counter()
    operation = start(timeout=0.15)
    completion = one(port)
    took = time.perf_counter() - began
    assert completion.operation is operation
    assert timed_out(completion)
    assert completion.transferred == 0
    assert 0.15 <= took < SLACK
    assert operation is not None
    assert not operation.pending
    assert not operation.cancel()
    nothing(port)


def test_deadlines_are_never_early(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    for number in range(30):
        began = time.perf_counter()
        sock.recv(timeout=number / 1000)
        assert timed_out(one(port))
        assert time.perf_counter() - began >= number / 1000


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan")])
def test_a_deadline_out_of_range_raises(
    port: an.CompletionPort, name: str, seconds: float, tmp_path: Path
) -> None:
    start = WAITING[name](port, tmp_path / "file")
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        start(timeout=seconds)
    stray = [c for c in settle(port, 0.01) if timed_out(c)]
    assert not stray


def test_a_deadline_of_a_wrong_type_raises(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    wrong: Any = "1"
    with pytest.raises(TypeError):
        sock.recv(timeout=wrong)
    with pytest.raises(TypeError):
        sock.send(b"x", timeout=wrong)
    assert port.in_flight == 0


def test_no_timeout_means_for_ever(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(timeout=None)
    nothing(port)
    peer.sendall(b"x")
    assert one(port).data == b"x"


def test_an_operation_in_time_is_not_told_later(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(timeout=SHORT)
    sock.send(b"x", timeout=SHORT)
    peer.sendall(b"y")
    assert {c.kind for c in drain(port, 2) if not c.error} == {an.RECV, an.SEND}
    nothing(port, SHORT + 0.1)


def test_data_after_a_deadline_is_not_lost(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(timeout=0.02)
    assert timed_out(one(port))
    peer.sendall(b"late")
    sock.recv(timeout=PATIENCE)
    assert one(port).data == b"late"


# -- races: exactly one outcome --------------------------------------------------------------------

RACES = 300
DEADLINE = 0.001


def race(port: an.CompletionPort, act: Callable[[], object]) -> list[an.Completion]:
    """Dequeues without waiting and calls `act` somewhere around a deadline that was just set."""
    done: list[an.Completion] = []
    at = time.perf_counter() + random.uniform(0, 2 * DEADLINE)
    acted = False
    until = time.perf_counter() + PATIENCE
    while not (done and acted):
        assert time.perf_counter() < until
        if not acted and time.perf_counter() >= at:
            act()
            acted = True
        done += port.dequeue_many(timeout=0)
    return done


def test_a_deadline_that_races_with_data_yields_one_of_the_two(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    outcomes = set()
    for _ in range(RACES):
        operation = sock.recv(1, timeout=DEADLINE)
        [completion] = race(port, lambda: peer.sendall(b"x"))
        assert completion.operation is operation
        assert not operation.pending
        outcomes.add(completion.error)
        if completion.error:
            assert timed_out(completion)
            sock.recv(1)  # the byte was not taken by the operation that timed out
            completion = one(port)
        assert completion.data == b"x"
        assert port.dequeue(0) is None
        assert port.in_flight == 0
    assert outcomes == {0, errno.ETIMEDOUT}, "both happen in a race worth the name"


def test_a_deadline_that_races_with_cancel_yields_one_of_the_two(port: an.CompletionPort) -> None:
    sock, _peer = pair(port)
    outcomes = set()
    for _ in range(RACES):
        operation = sock.recv(1, timeout=DEADLINE)
        answers: list[bool] = []
        [completion] = race(port, lambda: answers.append(operation.cancel()))
        assert completion.operation is operation
        assert answers == [completion.error == errno.ECANCELED]
        outcomes.add(completion.error)
        assert port.dequeue(0) is None
        assert port.in_flight == 0
    assert outcomes == {errno.ECANCELED, errno.ETIMEDOUT}


@pytest.mark.dequeuing_threads
def test_deadlines_that_race_with_data_and_other_threads_yield_one_completion_each(
    port: an.CompletionPort,
) -> None:
    pairs = [pair(port) for _ in range(8)]
    done: list[an.Completion] = []

    def dequeue_until_told() -> None:
        while (completion := port.dequeue(PATIENCE)) and completion.kind is not an.POST:
            done.append(completion)

    threads = [threading.Thread(target=dequeue_until_told) for _ in range(3)]
    for thread in threads:
        thread.start()
    started = []
    for _ in range(RACES // 3):
        for sock, peer in pairs:
            started.append(sock.recv(1, timeout=DEADLINE))
            time.sleep(random.uniform(0, DEADLINE / 4))  # the race itself, not a wait for something
            peer.sendall(b"x")
    until = time.perf_counter() + PATIENCE
    while port.in_flight:
        assert time.perf_counter() < until
        time.sleep(0.001)
    for _ in threads:
        port.post()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(done) == len(started)
    assert {id(c.operation) for c in done} == {id(operation) for operation in started}
    assert {c.error for c in done} <= {0, errno.ETIMEDOUT}


def test_a_timed_out_operation_completes_ahead_of_earlier_ones(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    first = sock.recv(timeout=PATIENCE)
    second = sock.recv(timeout=0.05)
    third = sock.recv()
    completion = one(port)
    assert completion.operation is second
    assert timed_out(completion)
    peer.sendall(b"a")
    assert one(port).operation is first
    peer.sendall(b"b")
    assert one(port).operation is third


def test_a_cancel_before_the_deadline_is_a_cancel(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    operation = sock.recv(timeout=0.1)
    assert operation.cancel()
    assert cancelled(one(port))
    nothing(port, 0.2)


def test_a_close_before_the_deadline_is_a_cancel(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.recv(timeout=0.1)
    sock.close()
    assert cancelled(one(port))
    nothing(port, 0.2)


#: Times a fifth of a deadline: longer than it.
PIECES = 6


def test_a_multishot_ends_when_nothing_came_for_that_long(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    began = time.perf_counter()
    operation = sock.recv(multishot=True, timeout=SHORT)
    for number in range(PIECES):
        # Each piece in a part of the deadline; together they take longer than it.
        assert port.dequeue(timeout=SHORT / 5) is None
        last = time.perf_counter()
        peer.sendall(b"%d" % number)
        completion = one(port)
        assert completion.data == b"%d" % number
        assert completion.more
    assert last - began > SHORT
    completion = one(port)
    assert completion.operation is operation
    assert timed_out(completion)
    assert time.perf_counter() - last >= SHORT
    assert not operation.pending


def test_a_multishot_accept_ends_when_nobody_came_for_that_long(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    operation = listener.accept(multishot=True, timeout=SHORT)
    for _ in range(PIECES):
        assert port.dequeue(timeout=SHORT / 5) is None
        dial(address)
        completion = one(port)
        assert completion.more
        assert completion.accepted is not None
        completion.accepted.close()
    completion = one(port)
    assert completion.operation is operation
    assert timed_out(completion)


def test_a_multishot_recvfrom_ends_when_nothing_came_for_that_long(
    port: an.CompletionPort,
) -> None:
    sock, address = datagram(port)
    operation = sock.recvfrom(multishot=True, timeout=SHORT)
    peer = stdlib_datagram()
    for _ in range(PIECES):
        assert port.dequeue(timeout=SHORT / 5) is None
        peer.sendto(b"x", address)
        assert one(port).more
    completion = one(port)
    assert completion.operation is operation
    assert timed_out(completion)


def test_a_send_that_times_out_in_the_middle_breaks_the_stream(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, small=True)
    operation = sock.send(pattern(32 << 20), timeout=0.1)
    behind = sock.send(b"behind")
    first, second = drain(port, 2)
    assert first.operation is operation
    assert timed_out(first)
    assert 0 < first.transferred < 32 << 20
    assert second.operation is behind
    assert second.error == errno.EPIPE
    sock.send(b"later")
    assert one(port).error == errno.EPIPE
    sock.close()
    assert read_to_end(peer) == pattern(first.transferred)


def test_a_send_that_times_out_before_its_first_byte_harms_nothing(
    port: an.CompletionPort,
) -> None:
    sock, peer = pair(port, small=True)
    first = stall(port, sock, 4 << 20)
    victim = sock.send(b"never seen", timeout=0.05)
    last = sock.send(b"the end")
    completion = one(port)
    assert completion.operation is victim
    assert timed_out(completion)
    assert completion.transferred == 0
    data, completions = pump(port, peer, (4 << 20) + 7)
    completions += settle(port)
    assert data == pattern(4 << 20) + b"the end"
    assert [(c.operation, c.error) for c in completions] == [(first, 0), (last, 0)]


def test_a_quiet_send_that_times_out_fails_once(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True, state="state")
    sock.send(bytes(8 << 20), quiet=True, timeout=0.1)
    sock.send(bytes(1000), quiet=True)
    completion = one(port)
    assert completion.operation is None
    assert completion.kind is an.SEND
    assert completion.state == "state"
    assert timed_out(completion)
    assert 1000 < completion.transferred < (8 << 20) + 1000
    sock.send(b"silent", quiet=True)
    nothing(port)


def test_a_quiet_send_in_time_is_silent(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.send(pattern(2 << 20), quiet=True, timeout=PATIENCE)
    # Time enough for the 2 MiB before it also where that is slow: Wine on a busy machine.
    sock.sendv([b"a", b"b"], quiet=True, timeout=PATIENCE / 10)
    data, completions = pump(port, peer, (2 << 20) + 2)
    assert data == pattern(2 << 20) + b"ab"
    assert completions == []
    nothing(port, PATIENCE / 10 + 0.1)


def test_thousands_of_deadlines_end_once_each(port: an.CompletionPort) -> None:
    chance = random.Random(3)
    pairs = [pair(port) for _ in range(40)]
    operations = [
        sock.recv(10, timeout=chance.random() / 3) for sock, _ in pairs for _ in range(50)
    ]
    for _, peer in pairs:
        peer.sendall(bytes(20))
    completions = drain(port, 2000)
    nothing(port)
    assert all(len(found) == 1 for found in by_operation(completions).values())
    assert {c.operation for c in completions} == set(operations)
    assert sum(c.transferred for c in completions) == 40 * 20
    assert all(timed_out(c) for c in completions if c.error)


def test_a_deadline_ends_a_wait_for_ever(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    thread = threading.Timer(0.05, lambda: sock.recv(timeout=0.05))
    thread.start()
    completion = port.dequeue()
    thread.join()
    assert completion is not None
    assert timed_out(completion)


def test_deadlines_do_not_keep_the_processor_busy(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.recv(timeout=1.0)
    port.timer(1.1)
    before = time.process_time()
    drain(port, 2)
    assert time.process_time() - before < 0.3


@watchable
def test_fileno_becomes_readable_at_a_deadline(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.recv(timeout=0.2)
    began = time.perf_counter()
    completion = port.dequeue(timeout=0)
    while completion is None:
        assert time.perf_counter() - began < PATIENCE
        assert select.select([port.fileno()], [], [], PATIENCE)[0]
        completion = port.dequeue(timeout=0)
    assert timed_out(completion)
