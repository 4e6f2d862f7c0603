"""Guarantee 5: a buffer passed in is held, and must not be resized, until its completion is
dequeued; after the port's close nothing touches it; no use after free by any order of calls."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable
from typing import Any

import asyncio_native as an
import pytest
from support import (
    cancelled,
    check_python,
    datagram,
    drain,
    nothing,
    one,
    pair,
    pump,
    settle,
    stall,
)


def held(buffer: bytearray) -> bool:
    try:
        buffer.append(0)
    except BufferError:
        return True
    buffer.pop()
    return False


def test_a_receive_holds_its_buffer_until_dequeued(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    buffer = bytearray(10)
    sock.recv_into(buffer)
    assert held(buffer)
    peer.sendall(b"x")
    nothing_dequeued = held(buffer)
    assert nothing_dequeued
    one(port)
    assert not held(buffer)


def test_a_datagram_receive_holds_its_buffer_until_dequeued(port: an.CompletionPort) -> None:
    sock, _ = datagram(port)
    buffer = bytearray(10)
    sock.recvfrom_into(buffer)
    assert held(buffer)
    sock.cancel()
    assert held(buffer)
    one(port)
    assert not held(buffer)


@pytest.mark.parametrize("start", ["send", "sendv"])
def test_a_send_holds_its_buffer_until_dequeued(port: an.CompletionPort, start: str) -> None:
    sock, _ = pair(port)
    buffer = bytearray(10)
    if start == "send":
        sock.send(buffer)
    else:
        sock.sendv([b"x", buffer])
    assert held(buffer)
    one(port)
    assert not held(buffer)


def test_a_datagram_send_holds_its_buffer_until_dequeued(port: an.CompletionPort) -> None:
    sock, address = datagram(port)
    buffer = bytearray(10)
    sock.sendto(buffer, address)
    assert held(buffer)
    one(port)
    assert not held(buffer)


def test_a_cancelled_operation_holds_its_buffer_until_dequeued(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    buffer = bytearray(10)
    sock.recv_into(buffer)
    sock.cancel()
    assert held(buffer)
    assert cancelled(one(port))
    assert not held(buffer)


def test_a_closed_sockets_operation_holds_its_buffer_until_dequeued(
    port: an.CompletionPort,
) -> None:
    sock, _ = pair(port)
    buffer = bytearray(10)
    sock.recv_into(buffer)
    sock.close()
    assert held(buffer)
    assert cancelled(one(port))
    assert not held(buffer)


def test_a_cancelled_receive_never_touches_the_buffer_again(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    buffer = bytearray(b"-" * 10)
    sock.recv_into(buffer)
    settle(port)
    sock.cancel()
    assert cancelled(one(port))
    peer.sendall(b"late data")
    nothing(port)
    assert buffer == b"-" * 10


def test_after_the_ports_close_buffers_are_free_and_untouched(backend: str) -> None:
    receive, send = bytearray(b"-" * 10), bytearray(16 << 20)
    with an.CompletionPort(backend) as port:
        sock, peer = pair(port, small=True)
        sock.recv_into(receive)
        sock.send(send)
        settle(port)
        assert held(receive)
        assert held(send)
    assert not held(receive)
    assert not held(send)
    try:
        peer.sendall(b"late data")
    except ConnectionError:
        pass
    assert receive == b"-" * 10


def test_a_buffer_of_several_operations_is_held_until_the_last(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    buffer = bytearray(b"both")
    sock.send(buffer)
    sock.send(buffer)
    one(port)
    assert held(buffer)
    one(port)
    assert not held(buffer)
    assert peer.recv(10) in (b"bothboth", b"both")


def test_a_quiet_send_holds_nothing(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True)
    stall(port, sock)
    buffer = bytearray(1 << 20)
    sock.send(buffer, quiet=True)
    assert not held(buffer)
    sock.sendv([buffer, b"x"], quiet=True)
    assert not held(buffer)


def test_completions_outlive_their_port(backend: str) -> None:
    with an.CompletionPort(backend) as port:
        sock, peer = pair(port, state="state")
        operation = sock.recv()
        peer.sendall(b"data")
        completion = one(port)
    del port, sock, peer
    gc.collect()
    assert completion.data == b"data"
    assert completion.operation is operation
    assert completion.result() == b"data"
    assert completion.socket is not None
    assert completion.socket.closed
    assert not operation.pending
    assert not operation.cancel()


DROPS = [
    "port sock operation",
    "operation sock port",
    "sock port operation",
    "operation port sock",
    "port operation sock",
    "sock operation port",
]


@pytest.mark.parametrize("order", DROPS)
@pytest.mark.parametrize("close", ["nothing", "sock", "port"])
def test_references_may_be_dropped_in_any_order(backend: str, order: str, close: str) -> None:
    port = an.CompletionPort(backend)
    sock, peer = pair(port, small=True)
    buffer = bytearray(100)
    sock.send(bytes(4 << 20))
    sock.recv(multishot=True)
    operation = sock.recv_into(buffer)
    peer.sendall(b"x")
    objects: dict[str, Any] = {"port": port, "sock": sock, "operation": operation}
    if close != "nothing":
        objects[close].close()
    del port, sock, operation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for name in order.split():
            del objects[name]
        gc.collect()
    try:
        peer.sendall(bytes(1000))
    except ConnectionError:
        pass


def test_a_cycle_through_the_state_is_collected(backend: str) -> None:
    class Session:
        sock: an.AsyncSocket | None = None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        session = Session()
        port = an.CompletionPort(backend)
        session.sock, peer = pair(port, state=session)
        session.sock.recv(multishot=True)
        del port, session
        gc.collect()
    assert peer.recv(1) == b""


def test_a_buffer_may_be_dropped_by_its_user_at_any_time(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    for number in range(100):
        sock.send(bytearray(b"%02d" % number * 10_000))
    for _ in range(10):
        sock.recv_into(bytearray(1000))
    gc.collect()
    litter = [bytearray(b"litter" * 4000) for _ in range(200)]
    peer.sendall(bytes(1000))
    data, completions = pump(port, peer, 2_000_000)
    assert data == b"".join(b"%02d" % number * 10_000 for number in range(100))
    assert litter[0] == b"litter" * 4000
    settle(port)
    assert any(c.kind is an.RECV for c in completions) or port.in_flight == 9


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_calls_is_safe(backend: str, seed: int) -> None:
    """Random calls on random objects in random states; every answer but a crash is right."""
    chance = random.Random(seed)
    ports = [an.CompletionPort(backend) for _ in range(2)]
    socks: list[an.AsyncSocket] = []
    operations: list[an.Operation] = []
    buffers = [bytearray(chance.randrange(1, 5000)) for _ in range(20)]
    actions: list[Callable[[], Any]] = [
        lambda: socks.append(pair(chance.choice(ports), small=True)[0]),
        lambda: operations.append(chance.choice(socks).recv()),
        lambda: operations.append(chance.choice(socks).recv(multishot=True)),
        lambda: operations.append(chance.choice(socks).recv_into(chance.choice(buffers))),
        lambda: chance.choice(socks).send(chance.choice(buffers)),
        lambda: chance.choice(socks).sendv(buffers[:5]),
        lambda: chance.choice(socks).send(bytes(100_000), quiet=True),
        lambda: operations.append(chance.choice(socks).disconnect()),
        lambda: operations.append(chance.choice(socks).accept()),
        lambda: chance.choice(operations).cancel(),
        lambda: chance.choice(socks).cancel(),
        lambda: chance.choice(socks).close(flush=chance.random() < 0.5),
        lambda: chance.choice(ports).post(chance.choice(buffers)),
        lambda: chance.choice(ports).dequeue_many(timeout=0),
        lambda: chance.choice(ports).associate(chance.choice(socks)),
        lambda: socks.pop(chance.randrange(len(socks))),
        lambda: operations.pop(chance.randrange(len(operations))),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for number in range(800):
            if number == 600:
                ports[0].close()
            try:
                chance.choice(actions)()
            except (OSError, ValueError, IndexError, BufferError):
                continue
        for port in ports:
            port.close()
        socks.clear()
        operations.clear()
        gc.collect()
    assert not any(held(buffer) for buffer in buffers)


LEAVING = """
    import gc, socket, sys, warnings
    warnings.simplefilter("ignore", ResourceWarning)
    import asyncio_native as an
    from support import pair, settle, listening, datagram
    port = an.CompletionPort()
    sock, peer = pair(port, small=True)
    listener, _ = listening(port)
    gram, _ = datagram(port)
    sock.send(bytes(8 << 20))
    sock.send(bytes(8 << 20), quiet=True)
    sock.recv(multishot=True)
    sock.recv_into(bytearray(10))
    listener.accept(multishot=True)
    gram.recvfrom()
    peer.sendall(b"x")
    port.post("never dequeued")
    settle(port)
    peer.sendall(b"never dequeued")
    {last}
"""


@pytest.mark.parametrize(
    "last",
    [
        "pass",
        "sys.exit(0)",
        "del port, sock, listener, gram",
        "del port, sock, listener, gram; gc.collect()",
        "sock.close(); listener.close()",
        "port.close()",
        "sys.modules['kept'] = (port, sock)",
        "import builtins; builtins.kept = [sock, port]; gc.disable()",
        "import atexit; atexit.register(port.close)",
        "import atexit; atexit.register(port.post, 1)",
    ],
)
def test_the_interpreter_exits_with_operations_in_flight(backend: str, last: str) -> None:
    check_python(LEAVING.format(last=last), backend)


def test_objects_finalized_at_exit_may_still_be_used(backend: str) -> None:
    check_python(
        """
        import asyncio_native as an
        from support import pair

        class Late:
            def __del__(self):
                try:
                    self.sock.send(b"late")
                    self.port.post(1)
                    self.port.dequeue(0)
                except (OSError, ValueError):
                    pass
                self.sock.close()
                self.port.close()

        late = Late()
        late.port = an.CompletionPort()
        late.sock, peer = pair(late.port)
        late.sock.recv(multishot=True)
        late.cycle = late
        """,
        backend,
    )


def test_operations_are_reused_safely(port: an.CompletionPort) -> None:
    """The memory of finished operations is taken again; an old Operation must not act on it."""
    sock, peer = pair(port)
    old = []
    for _ in range(200):
        operation = sock.recv(1)
        peer.sendall(b"x")
        assert one(port).operation is operation
        old.append(operation)
    current = [sock.recv(1) for _ in range(50)]
    for operation in old:
        assert not operation.pending
        assert not operation.cancel()
    assert all(operation.pending for operation in current)
    peer.sendall(bytes(50))
    assert [c.operation for c in drain(port, 50)] == current
