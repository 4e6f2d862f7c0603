"""Guarantee 10: running out of descriptors while accepting does not spin and does not end a
multishot accept: the error arrives as a completion with `more` (once an episode), and accepting
goes on by itself when descriptors are free. A connection that died before it was accepted never
ends accepting."""

from __future__ import annotations

from textwrap import dedent

import asyncio_native as an
import pytest
from support import check_python, dial, listening, one, reset

pytestmark = [
    pytest.mark.posix("Windows has no limit of descriptors: handles are limited by memory alone")
]

# The clients live in a child process, so that the limit is the server's alone; a line to it opens
# that many connections.
PRELUDE = """
    import errno, os, resource, socket, subprocess, sys, threading, time
    import asyncio_native as an
    from support import *

    port = an.CompletionPort()
    listener, address = listening(port)
    accept = listener.accept(multishot=True)
    port.dequeue(timeout=0)
    clients = subprocess.Popen(
        [sys.executable, "-c", '''if True:
            import socket, sys
            kept = []
            for line in sys.stdin:
                for _ in range(int(line)):
                    kept.append(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
                print("done", flush=True)
        ''', str(address[1])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )

    def dial_from_outside(count):
        clients.stdin.write(f"{count}\\n")
        clients.stdin.flush()
        assert clients.stdout.readline() == "done\\n"

    def exhaust():
        '''Leaves no free descriptor; the list frees one with each pop.'''
        soft = max(map(int, os.listdir("/proc/self/fd"))) + 20
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        taken = []
        while True:
            try:
                taken.append(os.dup(0))
            except OSError as error:
                assert error.errno == errno.EMFILE
                return taken

    def end():
        clients.stdin.close()
        clients.wait(PATIENCE)
        clients.stdout.close()
        for completion in accepted:
            completion.accepted.close()
        port.close()

    def is_emfile(completion):
        return completion.error == errno.EMFILE

    accepted = []
"""


def script(body: str) -> str:
    return dedent(PRELUDE) + dedent(body)


def test_the_error_comes_once_with_more_and_without_spinning(backend: str) -> None:
    check_python(
        script(
            """
            taken = exhaust()
            dial_from_outside(5)
            completion = one(port)
            assert completion.operation is accept
            assert is_emfile(completion)
            assert completion.more
            assert completion.accepted is None
            try:
                completion.result()
            except OSError as error:
                assert error.errno == errno.EMFILE
            processor = time.process_time()
            assert settle(port, 1.0) == []
            assert time.process_time() - processor < 0.5, "it spins"
            assert accept.pending
            while taken:
                os.close(taken.pop())
            accepted = drain(port, 5)
            assert all(c.accepted and c.more for c in accepted)
            end()
            """
        ),
        backend,
    )


def test_accepting_goes_on_under_a_wait_for_ever(backend: str) -> None:
    """Others free descriptors, which no event tells, while dequeue waits without a timeout."""
    check_python(
        script(
            """
            taken = exhaust()
            dial_from_outside(3)
            assert is_emfile(one(port))

            def free():
                while taken:
                    os.close(taken.pop())

            threading.Timer(0.3, free).start()
            began = time.monotonic()
            for _ in range(3):
                completion = port.dequeue()
                assert completion.accepted and completion.more, completion
                accepted.append(completion)
            assert time.monotonic() - began < 10
            end()
            """
        ),
        backend,
    )


def test_accepting_goes_on_when_ones_own_sockets_close(backend: str) -> None:
    check_python(
        script(
            """
            dial_from_outside(10)
            served = drain(port, 10)
            taken = exhaust()
            dial_from_outside(4)
            assert is_emfile(one(port))
            for completion in served[:6]:
                completion.accepted.close()
            found = drain(port, lambda found: sum(c.accepted is not None for c in found) == 4)
            accepted = [c for c in found if c.accepted] + served[6:]
            while taken:
                os.close(taken.pop())
            end()
            """
        ),
        backend,
    )


def test_each_episode_is_told_once(backend: str) -> None:
    check_python(
        script(
            """
            for episode in range(3):
                taken = exhaust()
                dial_from_outside(2)
                completion = one(port)
                assert is_emfile(completion) and completion.more
                assert settle(port, 0.3) == []
                while taken:
                    os.close(taken.pop())
                got = drain(port, 2)
                assert all(c.accepted and c.more for c in got), describe(got)
                accepted += got
                assert settle(port) == []
            end()
            """
        ),
        backend,
    )


def test_a_server_at_its_limit_serves_all_its_connections(backend: str) -> None:
    """As many sockets as the limit allows: the system's own limits must not be hit before."""
    check_python(
        script(
            """
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
            socks = []
            try:
                while True:
                    sock = an.AsyncSocket(type=socket.SOCK_DGRAM)
                    sock.bind(("127.0.0.1", 0))
                    port.associate(sock)
                    sock.recvfrom(multishot=True)
                    socks.append(sock)
            except OSError as error:
                assert error.errno == errno.EMFILE
            socks.pop().close()
            assert len(socks) > 250
            with socket.socket(type=socket.SOCK_DGRAM) as sender:
                for sock in socks:
                    sender.sendto(b"x", sock.getsockname())
            found = drain(port, lambda found: sum(c.data == b"x" for c in found) == len(socks))
            assert {c.socket for c in found if c.data} == set(socks)
            end()
            """
        ),
        backend,
    )


def test_other_sockets_are_served_meanwhile(backend: str) -> None:
    check_python(
        script(
            """
            sock, peer = pair(port)
            sock.recv(multishot=True)
            taken = exhaust()
            dial_from_outside(3)
            assert is_emfile(one(port))
            for number in range(50):
                peer.sendall(b"%d" % number)
                assert one(port).data == b"%d" % number
            while taken:
                os.close(taken.pop())
            accepted = drain(port, 3)
            end()
            """
        ),
        backend,
    )


def test_a_single_accept_ends_with_the_error(backend: str) -> None:
    check_python(
        script(
            """
            accept.cancel()
            assert cancelled(one(port))
            single = listener.accept()
            taken = exhaust()
            dial_from_outside(1)
            completion = one(port)
            assert completion.operation is single
            assert is_emfile(completion)
            assert not completion.more
            while taken:
                os.close(taken.pop())
            listener.accept()
            accepted = [one(port)]
            assert accepted[0].accepted
            end()
            """
        ),
        backend,
    )


def test_a_paused_accept_can_be_cancelled(backend: str) -> None:
    check_python(
        script(
            """
            taken = exhaust()
            dial_from_outside(1)
            assert is_emfile(one(port))
            assert accept.cancel()
            completion = one(port)
            assert completion.operation is accept and cancelled(completion) and not completion.more
            while taken:
                os.close(taken.pop())
            assert settle(port, 0.3) == []
            end()
            """
        ),
        backend,
    )


def test_a_new_socket_or_port_at_the_limit_raises(backend: str) -> None:
    check_python(
        script(
            """
            taken = exhaust()
            for make in (an.AsyncSocket, an.CompletionPort):
                try:
                    make()
                except OSError as error:
                    assert error.errno == errno.EMFILE, error
                else:
                    raise AssertionError("made without descriptors")
            while taken:
                os.close(taken.pop())
            end()
            """
        ),
        backend,
    )


def test_sendfile_at_the_limit_raises_and_harms_nothing(backend: str) -> None:
    check_python(
        script(
            """
            import tempfile
            sock, peer = pair(port)
            with tempfile.TemporaryFile() as file:
                file.write(b"content")
                file.flush()
                taken = exhaust()
                try:
                    sock.sendfile(file)
                except OSError as error:
                    assert error.errno == errno.EMFILE, error
                else:
                    raise AssertionError("the descriptor cannot have been duplicated")
                assert port.in_flight == 1  # the accept
                while taken:
                    os.close(taken.pop())
                sock.sendfile(file)
                assert one(port).result() == 7
            end()
            """
        ),
        backend,
    )


def test_a_connection_that_died_before_it_was_accepted_never_ends_accepting(
    port: an.CompletionPort,
) -> None:
    listener, address = listening(port)
    for _ in range(20):
        reset(dial(address))
    operation = listener.accept(multishot=True)
    living = dial(address)
    for _ in range(30):
        completion = one(port)
        assert completion.operation is operation
        assert completion.more
        if completion.accepted is None:
            continue
        with completion.accepted as accepted:
            if completion.address == living.getsockname():
                assert accepted.getpeername() == living.getsockname()
                return
    pytest.fail("the living connection was never accepted")


def test_connections_that_die_while_accepting_never_end_it(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    operation = listener.accept(multishot=True)
    for number in range(100):
        client = dial(address)
        if number % 2:
            reset(client)
        completion = one(port)
        assert completion.operation is operation
        assert completion.more
        if completion.accepted is not None:
            completion.accepted.close()
        client.close()
    assert operation.pending
