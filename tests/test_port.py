"""CompletionPort: creating, posting, dequeuing, watching and closing."""

from __future__ import annotations

import asyncio
import errno
import gc
import select
import socket
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    SOON_SECONDS,
    cancelled,
    datagram,
    dial,
    drain,
    listening,
    nothing,
    one,
    pair,
    pump,
    read_to_end,
    run_python,
    settle,
    stall,
    stdlib_pair,
    watchable,
)

ALL_BACKENDS = {"iocp", "io_uring", "epoll", "kqueue", "poll"}


# -- backends -------------------------------------------------------------------------------------


def test_backends_lists_all_five_with_the_reason_where_one_is_missing() -> None:
    backends = list(an.backends())
    assert {backend.name for backend in backends} == ALL_BACKENDS
    assert len(backends) == 5
    assert any(backend.available for backend in backends)
    for backend in backends:
        assert isinstance(backend.available, bool)
        if not backend.available:
            assert isinstance(backend.reason, str)
            assert backend.reason


def test_a_port_tells_the_backend_in_use(port: an.CompletionPort, backend: str) -> None:
    assert port.backend == backend


def test_auto_takes_an_available_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNCIO_NATIVE_BACKEND", raising=False)
    available = {backend.name for backend in an.backends() if backend.available}
    with an.CompletionPort() as port:
        assert port.backend in available
        assert port.backend != "poll" or available == {"poll"}


@pytest.mark.parametrize("arguments", [(), ("auto",)])
def test_auto_reads_the_environment(
    arguments: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCIO_NATIVE_BACKEND", backend)
    with an.CompletionPort(*arguments) as port:
        assert port.backend == backend


def test_the_environment_is_read_in_a_fresh_interpreter(backend: str) -> None:
    ended = run_python("import asyncio_native as a; print(a.CompletionPort().backend)", backend)
    assert ended.stdout.strip() == backend


def test_a_named_backend_wins_over_the_environment(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCIO_NATIVE_BACKEND", "iocp" if backend != "iocp" else "epoll")
    with an.CompletionPort(backend) as port:
        assert port.backend == backend


def test_an_unknown_backend_is_unavailable_by_name() -> None:
    with pytest.raises(an.BackendUnavailableError, match="no_such_backend"):
        an.CompletionPort("no_such_backend")


def test_an_unknown_backend_in_the_environment_is_unavailable_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ASYNCIO_NATIVE_BACKEND", "no_such_backend")
    with pytest.raises(an.BackendUnavailableError, match="no_such_backend"):
        an.CompletionPort()


def test_a_missing_backend_says_which_and_why() -> None:
    missing = [backend for backend in an.backends() if not backend.available]
    assert missing, "no system has all five"
    for backend in missing:
        with pytest.raises(an.BackendUnavailableError) as caught:
            an.CompletionPort(backend.name)
        assert backend.name in str(caught.value)
        assert backend.reason in str(caught.value)


def test_backend_unavailable_is_an_oserror() -> None:
    assert issubclass(an.BackendUnavailableError, OSError)


def test_wrong_constructor_arguments_raise(backend: str) -> None:
    wrong: Any = 5
    with pytest.raises(TypeError):
        an.CompletionPort(wrong)
    with pytest.raises(TypeError):
        an.CompletionPort(backend, concurrency="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="concurrency"):
        an.CompletionPort(backend, concurrency=-1)


def test_the_package_has_a_version_and_exports_the_documented_names() -> None:
    for name in (
        "AsyncSocket",
        "BackendUnavailableError",
        "Completion",
        "CompletionPort",
        "Operation",
        "OperationCancelledError",
        "OperationKind",
        "PortClosedError",
        "backends",
    ):
        assert name in an.__all__
        assert hasattr(an, name)
    assert isinstance(an.__version__, str)


def test_the_include_folder_holds_the_header() -> None:
    assert (Path(an.get_include()) / "asyncio_native.h").is_file()


# -- post and dequeue -----------------------------------------------------------------------------


def test_a_post_comes_back_with_its_state(port: an.CompletionPort) -> None:
    state = object()
    port.post(state)
    completion = one(port)
    assert completion.kind is an.POST
    assert completion.state is state
    assert completion.result() is state
    assert completion.error == 0
    assert completion.socket is None
    assert completion.more is False


def test_a_post_without_state_carries_none(port: an.CompletionPort) -> None:
    port.post()
    assert one(port).state is None


def test_posts_of_a_thread_come_in_order(port: an.CompletionPort) -> None:
    for number in range(1000):
        port.post(number)
    assert [c.state for c in drain(port, 1000)] == list(range(1000))


def test_posts_of_several_threads_come_in_order_for_each(port: an.CompletionPort) -> None:
    def work(thread: int) -> None:
        for number in range(500):
            port.post((thread, number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    completions = drain(port, 2000)
    for thread in threads:
        thread.join()
    states = [c.result() for c in completions]
    for thread_number in range(4):
        assert [n for t, n in states if t == thread_number] == list(range(500))


def test_a_post_wakes_a_waiting_dequeue(port: an.CompletionPort) -> None:
    timer = threading.Timer(0.1, port.post, args=("wake",))
    timer.start()
    completion = port.dequeue(timeout=PATIENCE)
    timer.join()
    assert completion is not None
    assert completion.state == "wake"


def test_a_post_wakes_a_dequeue_that_waits_for_ever(port: an.CompletionPort) -> None:
    timer = threading.Timer(0.1, port.post, args=("wake",))
    timer.start()
    completion = port.dequeue()
    timer.join()
    assert completion is not None
    assert completion.state == "wake"


def test_a_posted_state_is_released_after_its_completion(port: an.CompletionPort) -> None:
    class State:
        pass

    state = State()
    reference = weakref.ref(state)
    port.post(state)
    del state
    gc.collect()
    assert reference() is not None
    one(port)
    gc.collect()
    assert reference() is None


def test_dequeue_polls_with_zero(port: an.CompletionPort) -> None:
    began = time.monotonic()
    assert port.dequeue(timeout=0) is None
    assert port.dequeue_many(timeout=0) == []
    assert time.monotonic() - began < 1.0


def test_dequeue_with_zero_finds_what_is_there(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv()
    peer.sendall(b"x")
    deadline = time.monotonic() + PATIENCE
    while (completion := port.dequeue(0)) is None:
        assert time.monotonic() < deadline
    assert completion.data == b"x"


@pytest.mark.parametrize("seconds", [0.05, 0.2, 1])
def test_dequeue_times_out_never_early(port: an.CompletionPort, seconds: float) -> None:
    began = time.perf_counter()
    assert port.dequeue(timeout=seconds) is None
    took = time.perf_counter() - began
    assert seconds <= took < seconds + SOON_SECONDS


def test_dequeue_many_times_out_never_early(port: an.CompletionPort) -> None:
    began = time.perf_counter()
    assert port.dequeue_many(timeout=0.1) == []
    assert 0.1 <= time.perf_counter() - began < 0.1 + SOON_SECONDS


def test_dequeue_many_takes_at_most_max_count(port: an.CompletionPort) -> None:
    for number in range(10):
        port.post(number)
    assert [c.state for c in port.dequeue_many(4, timeout=0)] == [0, 1, 2, 3]
    assert [c.state for c in port.dequeue_many(max_count=1, timeout=0)] == [4]
    assert [c.state for c in port.dequeue_many(100, timeout=0)] == [5, 6, 7, 8, 9]


def test_dequeue_many_takes_256_by_default(port: an.CompletionPort) -> None:
    for number in range(300):
        port.post(number)
    first = port.dequeue_many(timeout=0)
    assert 1 <= len(first) <= 256
    assert [c.state for c in first + drain(port, 300 - len(first))] == list(range(300))


def test_dequeue_many_can_take_thousands(port: an.CompletionPort) -> None:
    for number in range(5000):
        port.post(number)
    completions = port.dequeue_many(5000, timeout=0)
    completions += drain(port, 5000 - len(completions))
    assert [c.state for c in completions] == list(range(5000))


def test_dequeue_many_with_zero_takes_what_is_queued(port: an.CompletionPort) -> None:
    for number in range(5):
        port.post(number)
    assert len(port.dequeue_many(timeout=0)) == 5


@pytest.mark.parametrize("count", [0, -1])
def test_max_count_below_one_raises_and_takes_nothing(port: an.CompletionPort, count: int) -> None:
    port.post("kept")
    with pytest.raises(ValueError, match=r"max_count must be at least 1.*\(timeout=0\)"):
        port.dequeue_many(count)
    assert one(port).state == "kept"


def test_a_time_in_the_place_of_max_count_raises_what_tells_of_timeout(
    port: an.CompletionPort,
) -> None:
    with pytest.raises(TypeError, match="`timeout`"):
        port.dequeue_many(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_a_negative_timeout_raises_and_takes_nothing(
    port: an.CompletionPort, timeout: float
) -> None:
    port.post("kept")
    with pytest.raises(ValueError, match="timeout"):
        port.dequeue(timeout)
    with pytest.raises(ValueError, match="timeout"):
        port.dequeue_many(timeout=timeout)
    assert one(port).state == "kept"


def test_wrong_types_raise_and_take_nothing(port: an.CompletionPort) -> None:
    wrong: Any = "1"
    port.post("kept")
    with pytest.raises(TypeError):
        port.dequeue(wrong)
    with pytest.raises(TypeError):
        port.dequeue_many(wrong)
    with pytest.raises(TypeError):
        port.dequeue_many(timeout=wrong)
    with pytest.raises(TypeError):
        port.associate(wrong)
    assert one(port).state == "kept"


def test_in_flight_counts_what_was_started_and_not_dequeued(port: an.CompletionPort) -> None:
    assert port.in_flight == 0
    sock, peer = pair(port)
    assert port.in_flight == 0
    receive = sock.recv(multishot=True)
    assert port.in_flight == 1
    port.post("post")
    assert port.in_flight == 2
    send = sock.send(b"counted")
    assert send is not None
    assert port.in_flight == 3
    assert sock.send(b"quiet", quiet=True) is None
    assert port.in_flight == 3
    assert {c.kind for c in drain(port, 2)} == {an.POST, an.SEND}
    assert port.in_flight == 1
    peer.sendall(b"x")
    assert one(port).more
    assert port.in_flight == 1
    receive.cancel()
    assert port.in_flight == 1
    assert not one(port).more
    assert port.in_flight == 0


# -- associate ------------------------------------------------------------------------------------


def test_associate_binds_port_and_state(port: an.CompletionPort) -> None:
    ours, _ = stdlib_pair()
    sock = an.AsyncSocket.adopt(ours)
    assert sock.port is None
    assert sock.state is None
    state = object()
    port.associate(sock, state)
    assert sock.port is port
    assert sock.state is state


def test_state_comes_back_with_each_completion(port: an.CompletionPort) -> None:
    state = object()
    sock, peer = pair(port, state=state)
    sock.send(b"x")
    sock.recv()
    peer.sendall(b"y")
    for completion in drain(port, 2):
        assert completion.state is state
        assert completion.socket is sock


def test_associating_again_replaces_the_state(port: an.CompletionPort) -> None:
    sock, _ = pair(port, state="old")
    port.associate(sock, "new")
    assert sock.state == "new"
    sock.send(b"x")
    assert one(port).state == "new"
    port.associate(sock)
    assert sock.state is None


def test_state_is_the_one_at_dequeue(port: an.CompletionPort) -> None:
    sock, _ = pair(port, state="at start")
    sock.send(b"x")
    port.associate(sock, "at dequeue")
    assert one(port).state == "at dequeue"


def test_a_second_port_raises(port: an.CompletionPort, backend: str) -> None:
    sock, _ = pair(port, state="kept")
    with an.CompletionPort(backend) as other:
        with pytest.raises(ValueError, match="port"):
            other.associate(sock, "other")
    assert sock.port is port
    assert sock.state == "kept"
    sock.send(b"x")
    assert one(port).result() == 1


def test_associating_a_closed_socket_raises(port: an.CompletionPort) -> None:
    sock = an.AsyncSocket()
    sock.close()
    with pytest.raises(OSError) as caught:
        port.associate(sock)
    assert caught.value.errno == errno.EBADF


def test_two_ports_do_not_mix(port: an.CompletionPort, backend: str) -> None:
    with an.CompletionPort(backend) as other:
        ours, our_peer = pair(port)
        theirs, their_peer = pair(other)
        ours.recv()
        theirs.recv()
        our_peer.sendall(b"ours")
        their_peer.sendall(b"theirs")
        assert one(port).data == b"ours"
        assert one(other).data == b"theirs"
        nothing(port)
        nothing(other)


# -- fileno ---------------------------------------------------------------------------------------


def readable(port: an.CompletionPort, seconds: float = PATIENCE) -> bool:
    return bool(select.select([port.fileno()], [], [], seconds)[0])


def come_to_rest(port: an.CompletionPort) -> None:
    """Dequeues with 0 until the descriptor is quiet, as a foreign event loop does."""
    deadline = time.monotonic() + PATIENCE
    while readable(port, 0.05):
        port.dequeue_many(timeout=0)
        assert time.monotonic() < deadline, "readable for ever with nothing to dequeue"


@watchable
def test_fileno_is_quiet_when_nothing_can_come(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.recv(multishot=True)
    come_to_rest(port)
    assert not readable(port, 0.1)


@watchable
def test_fileno_is_readable_when_data_came(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(multishot=True)
    come_to_rest(port)
    for number in range(20):
        peer.sendall(b"%d" % number)
        assert readable(port)
        assert drain(port, 1)[0].data == b"%d" % number
        come_to_rest(port)


@watchable
def test_fileno_is_readable_before_the_first_dequeue(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv()
    peer.sendall(b"x")
    assert readable(port)


@watchable
def test_fileno_is_readable_for_a_new_connection(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept(multishot=True)
    come_to_rest(port)
    dial(address)
    assert readable(port)
    accepted = one(port).accepted
    assert accepted is not None
    accepted.close()


@watchable
def test_fileno_is_readable_after_a_start_that_completed_at_once(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    come_to_rest(port)
    sock.send(b"x")
    assert readable(port)
    assert one(port).kind is an.SEND
    come_to_rest(port)


@watchable
def test_fileno_is_readable_after_a_cancel(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    sock.recv()
    come_to_rest(port)
    sock.cancel()
    assert readable(port)
    assert cancelled(one(port))


@watchable
def test_fileno_is_readable_after_a_post_from_another_thread(port: an.CompletionPort) -> None:
    come_to_rest(port)
    for _ in range(3):
        thread = threading.Timer(0.05, port.post)
        thread.start()
        assert readable(port)
        assert one(port).kind is an.POST
        thread.join()
        come_to_rest(port)


@watchable
def test_fileno_stays_readable_while_dequeue_leaves_something_behind(
    port: an.CompletionPort,
) -> None:
    for number in range(5):
        port.post(number)
    for number in range(5):
        assert readable(port)
        completion = port.dequeue(timeout=0)
        assert completion is not None
        assert completion.state == number
    come_to_rest(port)


@watchable
def test_fileno_stays_readable_while_a_batch_leaves_data_behind(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(10, multishot=True)
    peer.sendall(bytes(200_000))
    taken = 0
    deadline = time.monotonic() + PATIENCE
    while taken < 200_000:
        assert time.monotonic() < deadline, taken
        assert readable(port), f"not readable after {taken} bytes"
        taken += sum(c.transferred for c in port.dequeue_many(7, timeout=0))
    come_to_rest(port)


@watchable
def test_fileno_reports_a_send_that_goes_on(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    send = stall(port, sock, 8 << 20)
    come_to_rest(port)
    left = 8 << 20
    deadline = time.monotonic() + PATIENCE
    peer.setblocking(False)
    while send.pending:
        assert time.monotonic() < deadline, f"{left} bytes left"
        try:
            left -= len(peer.recv(1 << 20))
        except BlockingIOError:
            assert readable(port), f"the descriptor is quiet, {left} bytes left"
            port.dequeue_many(timeout=0)


@watchable
def test_an_asyncio_loop_can_watch_a_port(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(multishot=True)
    seen: list[bytes] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def dequeue() -> None:
            for completion in port.dequeue_many(timeout=0):
                seen.append(completion.data or b"")
                if b"".join(seen) == b"abc":
                    done.set()

        loop.add_reader(port.fileno(), dequeue)
        try:
            for letter in b"abc":
                await asyncio.sleep(0.01)
                peer.sendall(bytes([letter]))
            await asyncio.wait_for(done.wait(), PATIENCE)
        finally:
            loop.remove_reader(port.fileno())

    asyncio.run(main())
    assert b"".join(seen) == b"abc"


@watchable
def test_fileno_is_the_same_each_time_and_minus_one_after_close(backend: str) -> None:
    port = an.CompletionPort(backend)
    assert port.fileno() >= 0
    assert port.fileno() == port.fileno()
    port.close()
    assert port.fileno() == -1


# -- concurrency ----------------------------------------------------------------------------------


def in_thread(function: Any) -> Any:
    """What the function returns or raises in another thread."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    return outcome[0]


def test_with_concurrency_1_a_second_dequeuing_thread_gets_runtime_error(backend: str) -> None:
    with an.CompletionPort(backend, concurrency=1) as port:
        port.post("first")
        assert one(port).state == "first"
        port.post("second")
        assert isinstance(in_thread(lambda: port.dequeue(timeout=0)), RuntimeError)
        assert isinstance(in_thread(lambda: port.dequeue_many(timeout=0)), RuntimeError)
        assert one(port).state == "second"


def test_with_concurrency_1_the_first_that_dequeues_is_the_one(backend: str) -> None:
    with an.CompletionPort(backend, concurrency=1) as port:
        assert in_thread(lambda: port.dequeue(timeout=0)) is None
        with pytest.raises(RuntimeError):
            port.dequeue(timeout=0)


def test_with_concurrency_1_any_thread_may_start_post_cancel_and_close(backend: str) -> None:
    with an.CompletionPort(backend, concurrency=1) as port:
        assert port.dequeue(timeout=0) is None
        sock, peer = pair(port)

        def work() -> int:
            port.post("posted")
            sock.send(b"sent")
            sock.recv()
            return sock.cancel()

        assert in_thread(work) >= 1
        completions = drain(port, 3)
        assert {c.kind for c in completions} == {an.POST, an.SEND, an.RECV}
        assert peer.recv(100) == b"sent"
        sock.recv()
        in_thread(sock.close)
        assert cancelled(one(port))


@pytest.mark.parametrize("concurrency", [0, 1])
def test_a_port_serves_with_either_concurrency(backend: str, concurrency: int) -> None:
    with an.CompletionPort(backend, concurrency=concurrency) as port:
        sock, peer = pair(port, small=True)
        sock.recv(multishot=True)
        peer.sendall(b"request")
        assert one(port).data == b"request"
        send = sock.send(bytes(2 << 20))
        data, completions = pump(port, peer, 2 << 20)
        completions += settle(port)
        assert len(data) == 2 << 20
        assert [c.operation for c in completions] == [send]


# -- close ----------------------------------------------------------------------------------------


def test_close_is_idempotent_and_the_context_manager_closes(backend: str) -> None:
    with an.CompletionPort(backend) as port:
        pass
    port.close()
    port.close()
    with pytest.raises(an.PortClosedError):
        port.post()


def test_port_closed_error_is_an_oserror() -> None:
    assert issubclass(an.PortClosedError, OSError)


def test_close_closes_the_associated_sockets(backend: str) -> None:
    port = an.CompletionPort(backend)
    socks, peers = zip(*(pair(port) for _ in range(5)), strict=True)
    port.close()
    for sock, peer in zip(socks, peers, strict=True):
        assert sock.closed
        assert sock.fileno() == -1
        assert peer.recv(1) == b""


def test_close_leaves_sockets_that_are_not_associated(backend: str) -> None:
    with an.AsyncSocket() as sock:
        an.CompletionPort(backend).close()
        assert not sock.closed


def test_close_cancels_what_is_in_flight(backend: str) -> None:
    port = an.CompletionPort(backend)
    listener, _ = listening(port)
    sock, _ = pair(port, small=True)
    operations = [
        listener.accept(multishot=True),
        sock.recv(),
        sock.recv_into(bytearray(10)),
        sock.send(bytes(32 << 20)),
    ]
    port.post("never dequeued")
    assert port.in_flight == 5
    port.close()
    assert port.in_flight == 0
    for operation in operations:
        assert operation is not None
        assert not operation.pending
        assert not operation.cancel()


def test_after_close_starting_and_waiting_raise(backend: str) -> None:
    port = an.CompletionPort(backend)
    sock, _ = pair(port)
    gram, _ = datagram(port)
    with an.AsyncSocket() as fresh:
        port.close()
        for call in (
            lambda: port.post(1),
            lambda: port.dequeue(timeout=0),
            lambda: port.dequeue(),
            lambda: port.dequeue_many(timeout=0),
            lambda: port.associate(fresh),
            lambda: sock.recv(),
            lambda: sock.recv_into(bytearray(1)),
            lambda: gram.recvfrom(),
            lambda: gram.recvfrom_into(bytearray(1)),
            lambda: sock.send(b"x"),
            lambda: sock.send(b"x", quiet=True),
            lambda: sock.sendv([b"x"]),
            lambda: gram.sendto(b"x", ("127.0.0.1", 9)),
            lambda: sock.accept(),
            lambda: sock.connect(("127.0.0.1", 9)),
            lambda: sock.disconnect(),
        ):
            with pytest.raises(an.PortClosedError):
                call()
    assert port.in_flight == 0


def test_after_close_properties_can_be_read(backend: str) -> None:
    port = an.CompletionPort(backend)
    sock, _ = pair(port, state="state")
    operation = sock.recv()
    port.close()
    assert port.backend == backend
    assert port.in_flight == 0
    assert sock.closed
    assert sock.port is port
    assert sock.family == socket.AF_INET
    assert sock.fileno() == -1
    assert sock.state in ("state", None)
    assert operation.kind is an.RECV
    assert operation.pending is False
    assert operation.socket is sock
    sock.close()
    repr(port), repr(sock), repr(operation)


def test_close_ends_a_blocked_dequeue_in_another_thread(backend: str) -> None:
    port = an.CompletionPort(backend)
    outcomes: list[BaseException | None] = []

    def wait() -> None:
        try:
            port.dequeue()
            outcomes.append(None)
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)  # nothing tells from outside that a thread blocks in dequeue
    port.close()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert [type(outcome) for outcome in outcomes] == [an.PortClosedError] * 3


def test_close_frees_connections_that_nobody_claimed(backend: str) -> None:
    port = an.CompletionPort(backend)
    listener, address = listening(port)
    listener.accept(multishot=True)
    clients = [dial(address) for _ in range(10)]
    accepted = one(port).accepted  # the others may be queued by now
    assert accepted is not None
    accepted.close()
    port.close()
    for client in clients:
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass  # it was still in the listener's backlog


def test_close_with_data_queued_loses_only_that(backend: str) -> None:
    port = an.CompletionPort(backend)
    sock, peer = pair(port)
    sock.recv(multishot=True)
    sock.send(b"said before", quiet=True)
    peer.sendall(bytes(1000))
    assert one(port).data
    port.close()
    assert read_to_end(peer) == b"said before"


def test_a_port_that_is_dropped_lets_its_sockets_go(backend: str) -> None:
    port = an.CompletionPort(backend)
    sock, peer = pair(port)
    listener, _ = listening(port)
    sock.recv(multishot=True)
    listener.accept(multishot=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del port, sock, listener
        gc.collect()
    assert peer.recv(1) == b""


def test_many_ports_can_live_at_once(backend: str) -> None:
    ports = [an.CompletionPort(backend) for _ in range(50)]
    for number, port in enumerate(ports):
        port.post(number)
    for number, port in enumerate(ports):
        assert one(port).state == number
        port.close()


def test_opening_and_closing_ports_leaves_nothing_behind(backend: str) -> None:
    for _ in range(300):
        with an.CompletionPort(backend) as port:
            port.post()
            one(port)
