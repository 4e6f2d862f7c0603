"""Forking in the middle: the child holds copies of every descriptor and must disturb nothing.

Each test forks in a script of its own: what the child does at its exit is part of the behaviour.
"""

from __future__ import annotations

import os

import asyncio_native as an
import pytest
from support import PATIENCE, check_python, datagram, listening, pair

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

# What the scripts share: a child in a `with`, told to go on by a pipe and waited for at the end.
PRELUDE = """
    import contextlib, errno, gc, os, socket, sys, threading, time, traceback, warnings
    import asyncio_native as an
    from support import PATIENCE, dial, drain, listening, nothing, one, pair, pattern, pump
    from support import read_exactly, read_to_end, settle, stall, stdlib_pair

    warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, from 3.12 on
    warnings.simplefilter("ignore", ResourceWarning)
    port = an.CompletionPort()

    def raises(error, call, *arguments):
        try:
            call(*arguments)
        except error:
            return
        raise AssertionError(f"{call} does not raise {error}")

    @contextlib.contextmanager
    def child(work, ends="exit"):
        '''Runs work() in a child that then waits until the block is over, and exits.'''
        read_end, write_end = os.pipe()
        done_read, done_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(write_end)
                work()
                os.write(done_write, b"d")
                os.read(read_end, 1)
                gc.collect()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            if ends == "exit":
                sys.exit(0)  # the whole way: atexit, module clean-up, garbage collection
            os._exit(0)
        os.close(read_end)
        os.close(done_write)
        assert os.read(done_read, 1) == b"d", "the child failed"
        try:
            yield pid
        finally:
            os.close(write_end)
            os.close(done_read)
            assert os.waitpid(pid, 0)[1] == 0

    def idle():
        pass
"""


def check_forking(source: str, backend: str) -> None:
    check_python(PRELUDE + source, backend)


def test_in_a_child_port_and_sockets_raise_that_the_port_is_closed(backend: str) -> None:
    check_forking(
        """
    sock, peer = pair(port)
    listener, address = listening(port)
    receiving = sock.recv(multishot=True)
    accepting = listener.accept(multishot=True)
    free = an.AsyncSocket()

    def use_everything():
        for call in (
            lambda: port.dequeue(0),
            lambda: port.dequeue_many(timeout=0),
            port.post,
            lambda: port.associate(free),
            lambda: sock.send(b"from the child"),
            lambda: sock.send(b"from the child", quiet=True),
            sock.recv,
            lambda: sock.recv_into(bytearray(10)),
            sock.disconnect,
            listener.accept,
        ):
            raises(an.PortClosedError, call)
        # Reading and closing never raise, and do nothing to the parent's.
        port.in_flight, port.backend, sock.closed, sock.unsent, receiving.pending
        sock.close()
        listener.close()
        port.close()
        port.close()

    with child(use_everything):
        peer.send(b"to the parent")
        completion = one(port)
        assert completion.operation is receiving and completion.data == b"to the parent"
    client = dial(address)
    completion = one(port)
    assert completion.operation is accepting and completion.accepted
    sock.send(b"alive", quiet=True)
    assert read_exactly(peer, 5) == b"alive"
    assert port.in_flight == 2
    port.close()
""",
        backend,
    )


@pytest.mark.parametrize("ends", ["exit", "_exit"])
def test_a_childs_exit_and_garbage_collection_leave_the_parents_connections_alone(
    backend: str, ends: str
) -> None:
    check_forking(
        f"""
    pairs = [pair(port, family) for family in ("ipv4", "unix") for _ in range(10)]
    for sock, _ in pairs:
        sock.recv(multishot=True)

    def drop_everything():
        global port
        pairs.clear()
        del port
        gc.collect()

    with child(drop_everything, {ends!r}):
        pass
    assert len(pairs) == 20
    for number, (sock, peer) in enumerate(pairs):
        peer.sendall(b"%d?" % number)
        completion = one(port)
        assert completion.socket is sock and completion.data == b"%d?" % number
        sock.send(b"%d!" % number, quiet=True)
        assert read_exactly(peer, len(b"%d!" % number)) == b"%d!" % number
    port.close()
""",
        backend,
    )


def test_what_the_parent_closes_ends_for_the_peer_though_a_child_holds_it(backend: str) -> None:
    check_forking(
        """
    for family in ("ipv4", "unix"):
        plain, plain_peer = pair(port, family)
        flushed, flushed_peer = pair(port, family)
        stalled, stalled_peer = pair(port, family, small=True)
        listener, address = listening(port, family)
        plain.recv()
        listener.accept(multishot=True)
        with child(idle):
            plain.close()
            plain_peer.settimeout(PATIENCE)
            assert plain_peer.recv(1) == b""
            flushed.send(pattern(1 << 20), quiet=True)
            flushed.close(flush=True)
            assert pump(port, flushed_peer, None)[0] == pattern(1 << 20)
            stall(port, stalled, 4 << 20) if port.in_flight == 0 else stalled.send(bytes(4 << 20))
            stalled.close()
            stalled_peer.settimeout(PATIENCE)
            try:
                read_to_end(stalled_peer)
            except ConnectionResetError:
                pass
            listener.close()
            raises(ConnectionRefusedError, dial, address)
            settle(port)
    port.close()
""",
        backend,
    )


def test_a_port_that_the_parent_closes_ends_for_all_peers_though_a_child_holds_it(
    backend: str,
) -> None:
    check_forking(
        """
    pairs = [pair(port, family) for family in ("ipv4", "ipv4", "unix", "unix")]
    pairs[0][0].recv(multishot=True)
    pairs[2][0].recv()
    with child(idle):
        port.close()
        for _, peer in pairs:
            peer.settimeout(PATIENCE)
            assert peer.recv(1) == b""
""",
        backend,
    )


def test_a_closed_socket_that_a_child_holds_causes_no_events_in_the_parent(backend: str) -> None:
    """A descriptor that was not taken off epoll before it was closed would fire for ever."""
    check_forking(
        """
    sock, peer = pair(port, "unix")
    other, other_peer = pair(port)
    dropped = sock.recv(multishot=True)
    stays = other.recv(multishot=True)
    with child(idle):
        sock.close()
        assert one(port).operation is dropped
        try:
            peer.send(b"for nobody")
        except BrokenPipeError:
            pass
        peer.close()
        used = time.process_time()
        nothing(port, 0.5)
        assert time.process_time() - used < 0.2, "the wait spins"
        other_peer.send(b"for the other")
        completion = one(port)
        assert completion.operation is stays and completion.data == b"for the other"
        # The same number again, while the child holds the old socket under it.
        successor, successors_peer = pair(port)
        fresh = successor.recv()
        nothing(port)
        successors_peer.send(b"fresh")
        assert one(port).data == b"fresh"
    port.close()
""",
        backend,
    )


def test_a_fork_with_operations_and_sends_in_flight_sends_every_byte_once(backend: str) -> None:
    check_forking(
        """
    sock, peer = pair(port, small=True)
    stalled = stall(port, sock, 4 << 20)
    sock.send(bytearray(pattern(1 << 20, 9)), quiet=True)
    with child(gc.collect):
        got, completions = pump(port, peer, 5 << 20)
    assert got == pattern(4 << 20) + pattern(1 << 20, 9)
    assert [c.operation for c in completions] == [stalled] and not completions[0].error
    sock.close()
    assert peer.recv(1) == b""
    port.close()
""",
        backend,
    )


def test_a_child_may_open_and_use_a_port_of_its_own(backend: str) -> None:
    check_forking(
        """
    sock, peer = pair(port)
    sock.recv(multishot=True)

    def serve():
        with an.CompletionPort() as own:
            mine, my_peer = pair(own)
            mine.recv()
            my_peer.send(b"in the child")
            assert one(own).data == b"in the child"
            own.post("state")
            assert one(own).state == "state"
            mine.close()

    with child(serve):
        peer.send(b"in the parent")
        assert one(port).data == b"in the parent"
    port.close()
""",
        backend,
    )


def test_a_fork_while_another_thread_waits_leaves_both_processes_able_to_end(
    backend: str,
) -> None:
    check_forking(
        """
    sock, peer = pair(port)
    sock.recv(multishot=True)
    arrived = threading.Semaphore(0)
    ended = threading.Event()

    def wait_for_ever():
        try:
            while True:
                if port.dequeue(None).kind is not an.POST:
                    arrived.release()
        except an.PortClosedError:
            ended.set()

    thread = threading.Thread(target=wait_for_ever)
    thread.start()
    peer.send(b"first")
    assert arrived.acquire(timeout=PATIENCE)

    def close_everything():
        raises(an.PortClosedError, port.dequeue, 0)
        sock.close()
        port.close()

    for number in range(20):
        if number % 2:
            port.post()
        with child(close_everything, "exit" if number % 2 else "_exit"):
            peer.send(b"again")
            assert arrived.acquire(timeout=PATIENCE)
    port.close()
    assert ended.wait(PATIENCE)
    thread.join()
""",
        backend,
    )


def test_descriptors_are_not_inherited_by_other_programs(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    listener, address = listening(port)
    receiver, _ = datagram(port)
    client = an.AsyncSocket()
    port.associate(client)
    listener.accept()
    client.connect(address)
    accepted = None
    for _ in range(2):
        completion = port.dequeue(PATIENCE)
        assert completion is not None
        accepted = completion.accepted or accepted
    assert accepted is not None
    for made in (sock, listener, receiver, client, accepted):
        assert not os.get_inheritable(made.fileno())
        assert not os.get_blocking(made.fileno())
        made.close()
    assert not os.get_inheritable(port.fileno())
