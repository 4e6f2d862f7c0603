"""Closing, dropping and leaving: sockets, ports, references and interpreters."""

from __future__ import annotations

import errno
import gc
import os
import socket
import sys
import time
import warnings
import weakref

import asyncio_native as an
import pytest
from support import (
    LOCAL,
    PATIENCE,
    PROGRAM_SECONDS,
    check_python,
    datagram,
    dial,
    drain,
    family_number,
    listening,
    nothing,
    one,
    pair,
    pattern,
    pump,
    read_exactly,
    settle,
    stall,
    stdlib_datagram,
    stdlib_pair,
)


def told_of_the_end(peer: socket.socket) -> bool:
    """Reads until the peer is told that the connection is over (its time limit raises)."""
    try:
        while peer.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_close_with_nobody_dequeuing_tells_the_peer_at_once(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    operation = sock.recv(multishot=True)
    sock.close()
    peer.settimeout(1.0)
    assert peer.recv(1) == b""
    completion = one(port)
    assert completion.operation is operation
    assert completion.error == errno.ECANCELED


@pytest.mark.posix("duplicates a descriptor, which a socket on Windows does not have")
@pytest.mark.backends("epoll", "kqueue", "poll")  # the ring holds the file: it shuts the connection
def test_what_comes_for_a_duplicate_of_a_closed_sockets_descriptor_wakes_nobody(
    port: an.CompletionPort,
) -> None:
    listener, address = listening(port)
    listener.accept()
    with dial(address) as client:
        sock, _ = one(port).result()
        port.associate(sock)
        sock.recv(multishot=True)
        nothing(port)
        with socket.socket(fileno=os.dup(sock.fileno())) as duplicate:
            sock.close()
            assert one(port).error == errno.ECANCELED
            nothing(port)
            duplicate.settimeout(PATIENCE)
            waits = port.statistics().waits
            rounds = 5
            for _ in range(rounds):
                client.sendall(b"x")
                assert duplicate.recv(1) == b"x"
                nothing(port, 0.01)
            # One wait each, that lasts: what is still watched would end it and begin another.
            assert port.statistics().waits - waits <= rounds + 1


def test_a_close_of_a_stalled_socket_with_nobody_dequeuing_tells_the_peer(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, small=True)
    stalled = stall(port, sock, 4 << 20)
    receiving = sock.recv()
    sock.close()
    peer.settimeout(5.0)
    assert told_of_the_end(peer)
    completions = {c.operation: c for c in drain(port, 2)}
    assert completions[stalled].error == errno.ECANCELED
    assert completions[receiving].error == errno.ECANCELED


def test_a_close_with_data_unread_and_nobody_dequeuing_tells_the_peer(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    peer.sendall(b"never read")
    sock.close()
    peer.settimeout(1.0)
    assert told_of_the_end(peer)


def test_a_closed_listener_refuses_clients_at_once_with_nobody_dequeuing(
    port: an.CompletionPort, family: str
) -> None:
    listener, address = listening(port, family)
    operation = listener.accept(multishot=True)
    nothing(port, 0)
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        dial(address)
    completion = one(port)
    assert completion.operation is operation
    assert completion.error == errno.ECANCELED
    assert not completion.more


def test_closing_the_port_tells_every_peer(backend: str, family: str) -> None:
    port = an.CompletionPort(backend)
    socks = [pair(port, family) for _ in range(20)]
    for number, (sock, _) in enumerate(socks):
        if number % 3 == 0:
            sock.recv(multishot=True)
        elif number % 3 == 1:
            sock.send(bytes(8 << 20), quiet=True)
    port.close()
    for _, peer in socks:
        assert told_of_the_end(peer)
    for sock, _ in socks:
        assert sock.closed
        assert sock.fileno() == -1


def test_a_descriptor_number_reused_at_once_gets_nothing_of_its_predecessor(
    port: an.CompletionPort, family: str
) -> None:
    numbers: list[int] = []
    for number in range(300):
        sock, peer = pair(port, family)
        numbers.append(sock.fileno())
        operation = sock.recv(multishot=number % 2 == 0)
        message = b"for number %d" % number
        peer.send(message)
        if number % 3:
            completion = one(port)
            assert completion.operation is operation
            assert completion.data == message
            peer.send(b"an event of the old one is under way")
        sock.close()
        if number % 5:
            peer.close()
        # The next socket may have the same number before the old completions are dequeued.
        successor, successors_peer = pair(port, family)
        numbers.append(successor.fileno())
        fresh = successor.recv()
        for completion in settle(port, 0.0):
            assert completion.operation is operation
            assert completion.socket is sock
        assert fresh.pending
        successors_peer.send(b"fresh")
        completions = drain(port, lambda _: not fresh.pending)
        for completion in completions[:-1]:
            assert completion.operation is operation
        assert completions[-1].operation is fresh
        assert completions[-1].data == b"fresh"
        assert completions[-1].socket is successor
        successor.close()
        successors_peer.close()
        peer.close()
        settle(port, 0.0)
    assert len(set(numbers)) < len(numbers) / 4, "the numbers were not reused"


def test_a_port_closed_with_ten_thousand_operations_in_flight_ends_them_all(
    backend: str,
) -> None:
    port = an.CompletionPort(backend)
    socks = [pair(port, LOCAL)[0] for _ in range(50)]
    buffers = [bytearray(64) for _ in range(2500)]
    operations = [sock.recv() for sock in socks for _ in range(50)]
    operations += [socks[number % 50].recv_into(buffer) for number, buffer in enumerate(buffers)]
    operations += [sock.send(bytes(1 << 16)) for sock in socks for _ in range(100)]
    assert port.in_flight == len(operations) == 10_000
    assert all(operation.pending for operation in operations)
    with pytest.raises(BufferError):
        buffers[0].append(0)
    started = time.monotonic()
    port.close()
    assert time.monotonic() - started < 5
    assert port.in_flight == 0
    assert not any(operation.pending for operation in operations)
    for buffer in buffers:
        buffer.append(0)  # nothing holds it any more
    for operation in operations[::1000]:
        assert not operation.cancel()
    with pytest.raises(an.PortClosedError):
        port.dequeue(0)


def test_a_port_closed_with_ten_thousand_completions_not_dequeued_ends_them_all(
    backend: str,
) -> None:
    port = an.CompletionPort(backend)
    sock, peer = pair(port)
    for number in range(5000):
        port.post(number)
    operations = [sock.recv(1) for _ in range(5000)]
    peer.sendall(bytes(5000))
    for _ in range(10):
        port.dequeue(0)
    assert port.in_flight == 9990
    port.close()
    assert port.in_flight == 0
    assert not any(operation.pending for operation in operations)


def test_a_dropped_socket_with_operations_in_flight_lives_until_they_are_done(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, state="remembered")
    number = sock.fileno()
    sock.recv()
    del sock
    gc.collect()
    peer.send(b"still there?")
    completion = one(port)
    assert completion.data == b"still there?"
    assert completion.state == "remembered"
    assert completion.operation is not None
    assert completion.socket is not None
    assert completion.socket.fileno() == number
    again = completion.socket
    del completion
    gc.collect()
    again.send(b"yes", quiet=True)
    assert read_exactly(peer, 3) == b"yes"
    again.close()


def test_a_dropped_multishot_receive_goes_on(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(multishot=True)
    del sock
    for number in range(100):
        gc.collect(0)
        peer.send(b"%d" % number)
        completion = one(port)
        assert completion.data == b"%d" % number
        assert completion.more
        del completion
    peer.close()
    completion = one(port)
    assert completion.result() == b""
    assert completion.socket is not None
    completion.socket.close()


def test_a_dropped_buffer_is_kept_until_its_receive_is_done(port: an.CompletionPort) -> None:
    class Buffer(bytearray):
        pass

    sock, peer = pair(port)
    with sock:
        buffer = Buffer(4096)
        alive = weakref.ref(buffer)
        sock.recv_into(buffer)
        del buffer
        gc.collect()
        kept = alive()
        assert kept is not None
        peer.send(b"into what nobody names")
        completion = one(port)
        assert completion.result() == 22
        assert kept[:22] == b"into what nobody names"
        del kept, completion
        gc.collect()
        assert alive() is None


def test_dropped_send_buffers_are_kept_until_they_are_sent(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family, small=True)
    with sock:
        expected = pattern(1 << 20, 7)
        sock.send(bytearray(expected))
        sock.sendv([bytearray(expected), memoryview(bytearray(expected))])
        gc.collect()
        got, completions = pump(port, peer, 3 << 20)
        assert got == expected * 3
        completions += drain(port, 2 - len(completions))
        assert [c.error for c in completions] == [0, 0]


def test_a_socket_dropped_with_nothing_in_flight_is_closed_with_a_warning(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    with pytest.warns(ResourceWarning):
        del sock
        gc.collect()
    assert peer.recv(1) == b""


def test_a_socket_dropped_when_its_last_operation_is_done_is_closed(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    sock.recv()
    del sock
    peer.send(b"last")
    completion = one(port)
    assert completion.data == b"last"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del completion
        gc.collect()
    assert peer.recv(1) == b""


def test_sockets_in_reference_cycles_with_operations_in_flight_are_given_back(
    port: an.CompletionPort,
) -> None:
    class Session:
        """A state that knows its socket, as servers have it."""

        sock: an.AsyncSocket
        operation: an.Operation

    alive: list[weakref.ref[Session]] = []
    for _ in range(50):
        ours, peer = stdlib_pair()
        session = Session()
        session.sock = an.AsyncSocket.adopt(ours)
        port.associate(session.sock, session)
        session.operation = session.sock.recv(multishot=True)
        alive.append(weakref.ref(session))
        del session, ours
        peer.close()
    completions = drain(port, 50)
    assert all(c.result() == b"" for c in completions)
    for completion in completions:
        assert completion.socket is not None
        completion.socket.close()
    settle(port)
    del completions, completion
    gc.collect()
    assert [reference() for reference in alive] == [None] * 50


@pytest.mark.skipif(sys.platform != "linux", reason="counts the descriptors in /proc")
def test_everything_dropped_at_once_is_given_back_and_peers_are_told(backend: str) -> None:
    check_python(
        """
        import gc, os, socket, warnings
        import asyncio_native as an
        from support import pair, release_kept

        warnings.simplefilter("ignore", ResourceWarning)

        def use_and_forget():
            port = an.CompletionPort()
            peers = []
            for number in range(10):
                sock, peer = pair(port, small=True)
                peers.append(peer)
                sock.recv(multishot=True)
                sock.recv_into(bytearray(100))
                sock.send(bytes(1 << 20))
                sock.send(bytearray(1 << 20), quiet=True)
                port.post(sock)
                if number % 2:
                    peer.send(b"data")
                port.dequeue(0)
            return peers

        counts = []
        for _ in range(20):
            peers = use_and_forget()
            gc.collect()
            for peer in peers:
                try:
                    while peer.recv(1 << 20):
                        pass
                except ConnectionResetError:
                    pass
            release_kept()
            counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[-1] <= counts[0], counts
        """,
        backend,
    )


def test_an_abandoned_connection_that_is_finalized_before_its_port_does_no_harm(
    backend: str,
) -> None:
    """What a signal handler broke off stays with the port; garbage goes in any order."""
    check_python(
        """
        import gc, socket, warnings
        import asyncio_native as an
        from support import PATIENCE, dial, listening

        def abandon(port, done):
            if an.binding == "c":
                port._abandon(done)
            else:
                from asyncio_native._batch import Remainder
                port._abandoned.append(Remainder(done))

        warnings.simplefilter("ignore", ResourceWarning)
        port = an.CompletionPort()
        listener, address = listening(port)
        listener.accept(multishot=True)
        peer = dial(address)
        done = port.dequeue_many(timeout=PATIENCE)
        accepted = done[0].accepted
        port.associate(accepted)
        abandon(port, done)
        del done, listener, port
        gc.collect()  # the port now stands behind what alone leads to it
        del accepted
        gc.collect()
        assert peer.recv(1) == b""
        """,
        backend,
    )


def test_a_forgotten_port_at_interpreter_exit_does_no_harm(backend: str) -> None:
    """Nothing is closed, everything is in flight, all at module level."""
    check_python(
        """
        import asyncio_native as an
        from support import listening, pair

        port = an.CompletionPort()
        socks = [pair(port, small=True) for _ in range(20)]
        listener, address = listening(port)
        operations = [listener.accept(multishot=True)]
        buffers = [bytearray(1000) for _ in socks]
        for (sock, peer), buffer in zip(socks, buffers):
            operations.append(sock.recv_into(buffer))
            operations.append(sock.send(bytes(4 << 20)))
            sock.send(bytearray(1 << 20), quiet=True)
            peer.send(b"data")
        completions = port.dequeue_many(timeout=1)
        port.post(completions)
        """,
        backend,
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_interpreter_exit_with_blocked_daemon_threads_is_quick_and_silent(
    backend: str, threads: int
) -> None:
    started = time.monotonic()
    output = check_python(
        f"""
        import threading
        import asyncio_native as an
        from support import pair

        port = an.CompletionPort()
        socks = [pair(port) for _ in range(3)]
        for sock, _ in socks:
            sock.recv(multishot=True)
        ready = threading.Barrier({threads} + 1)

        def serve():
            ready.wait()
            while True:
                completion = port.dequeue(None)
                if completion.kind is an.POST:
                    seen.wait()

        seen = threading.Barrier({threads} + 1)
        for _ in range({threads}):
            threading.Thread(target=serve, daemon=True).start()
        ready.wait()
        for _ in range({threads}):
            port.post()
        seen.wait()
        print("exits")
        """,
        backend,
    )
    assert output == "exits\n"
    assert time.monotonic() - started < PROGRAM_SECONDS / 5


def test_interpreter_exit_while_daemon_threads_serve_traffic_is_silent(backend: str) -> None:
    check_python(
        """
        import threading, time
        import asyncio_native as an
        from support import PATIENCE, pair

        port = an.CompletionPort()
        rounds = threading.Semaphore(0)

        def serve():
            while True:
                for completion in port.dequeue_many(timeout=None):
                    if completion.kind is an.RECV and completion.data:
                        completion.socket.send(completion.data, quiet=True)

        def talk(peer):
            while True:
                peer.sendall(b"x" * 100)
                if not peer.recv(100):
                    return
                rounds.release()

        kept = []
        for _ in range(2):
            threading.Thread(target=serve, daemon=True).start()
            sock, peer = pair(port)
            kept.append((sock, peer))
            sock.recv(multishot=True)
            threading.Thread(target=talk, args=(peer,), daemon=True).start()
        for _ in range(200):
            assert rounds.acquire(timeout=PATIENCE)
        """,
        backend,
    )


def test_a_port_closed_at_exit_by_a_handler_ends_a_thread_that_is_no_daemon(
    backend: str,
) -> None:
    output = check_python(
        """
        import threading
        import asyncio_native as an
        from support import PATIENCE

        port = an.CompletionPort()
        entered = threading.Event()

        def serve():
            try:
                while True:
                    if port.dequeue(None).kind is an.POST:
                        entered.set()
            except an.PortClosedError:
                print("ended")

        thread = threading.Thread(target=serve)
        thread.start()
        port.post()
        assert entered.wait(PATIENCE)
        port.close()
        thread.join(PATIENCE)
        """,
        backend,
    )
    assert output == "ended\n"


@pytest.mark.parametrize("kind", ["stream", "datagram"])
def test_a_closed_socket_lets_its_address_go_when_its_operations_are_done(
    port: an.CompletionPort, inet: str, kind: str
) -> None:
    for _ in range(20):
        if kind == "datagram":
            sock, address = datagram(port, inet)
            sock.recvfrom(multishot=True)
        else:
            sock, address = listening(port, inet)
            sock.accept(multishot=True)
        sock.close()
        assert one(port).error == errno.ECANCELED
        number = family_number(inet)
        with socket.socket(
            number, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
        ) as again:
            again.bind(address)


def test_a_closed_datagram_socket_receives_nothing_more(
    port: an.CompletionPort, family: str
) -> None:
    sock, address = datagram(port, family)
    peer = stdlib_datagram(family)
    operation = sock.recvfrom(multishot=True)
    peer.sendto(b"before", address)
    completion = one(port)
    assert completion.data == b"before"
    sock.close()
    try:
        peer.sendto(b"after", address)
    except ConnectionRefusedError:
        pass
    completions = settle(port)
    assert [c.operation for c in completions] == [operation]
    assert completions[0].error == errno.ECANCELED


@pytest.mark.parametrize("dropping", ["kept", "dropped"])
def test_the_failure_of_a_quiet_send_names_its_socket_though_that_was_closed_since(
    port: an.CompletionPort, family: str, dropping: str
) -> None:
    sock, peer = pair(port, family, state="mine")
    number = id(sock)
    peer.close()
    for _ in range(100):  # the first may still be taken by the system
        sock.send(b"lost", quiet=True)
    sock.close()
    if dropping == "dropped":
        del sock
        gc.collect()
    completion = one(port)
    assert completion.kind is an.SEND
    assert completion.operation is None
    assert completion.error in (errno.EPIPE, errno.ECONNRESET)
    assert completion.state == "mine"
    assert id(completion.socket) == number
    assert settle(port) == []
