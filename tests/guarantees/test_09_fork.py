"""Guarantee 9: in a forked child a port and its sockets raise PortClosedError, and the parent's
connections are not disturbed: what the parent closes, ends for the peer."""

from __future__ import annotations

import pytest
from support import check_python

pytestmark = [pytest.mark.posix("there is no fork on Windows")]

# Each script forks; `in_child(function)` runs it in a child that lives until the pipe's end is
# closed by `end_child()`, and reports what went wrong there.
PRELUDE = """
    import gc, os, signal, socket, sys, threading, traceback
    import asyncio_native as an
    from support import *

    port = an.CompletionPort()
    sock, peer = pair(port)
    receive = sock.recv(multishot=True)
    port.dequeue(timeout=0)
    release, hold = os.pipe()
    report, reports = os.pipe()
    child = 0

    def in_child(function):
        global child
        child = os.fork()
        if child == 0:
            status = 0
            try:
                os.close(hold)
                function()
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                status = 1
            os.write(reports, b"%d" % status)
            os.read(release, 1)  # lives on, with all descriptors, until the parent lets it go
            os._exit(status)
        assert os.read(report, 1) == b"0", "the child failed"

    def end_child():
        os.close(hold)
        assert os.waitpid(child, 0)[1] == 0

    def raises_port_closed(call):
        try:
            call()
        except an.PortClosedError:
            return
        raise AssertionError("did not raise PortClosedError")
"""


def script(body: str) -> str:
    from textwrap import dedent

    return dedent(PRELUDE) + dedent(body)


def test_in_the_child_everything_raises_port_closed(backend: str) -> None:
    check_python(
        script(
            """
            fresh = an.AsyncSocket()

            def child_work():
                for call in (
                    lambda: port.post(1),
                    lambda: port.dequeue(timeout=0),
                    lambda: port.dequeue(),
                    lambda: port.dequeue_many(timeout=0),
                    lambda: port.associate(fresh),
                    lambda: sock.recv(),
                    lambda: sock.recv_into(bytearray(1)),
                    lambda: sock.send(b"x"),
                    lambda: sock.send(b"x", quiet=True),
                    lambda: sock.sendv([b"x"]),
                    lambda: sock.disconnect(),
                    lambda: sock.accept(),
                    lambda: sock.connect(("127.0.0.1", 9)),
                ):
                    raises_port_closed(call)
                assert port.backend and sock.family == socket.AF_INET
                port.close()

            in_child(child_work)
            fresh.close()
            end_child()
            """
        ),
        backend,
    )


def test_the_parent_goes_on_beside_the_child(backend: str) -> None:
    check_python(
        script(
            """
            in_child(lambda: None)
            for _ in range(20):
                peer.sendall(b"request")
                assert one(port).data == b"request"
                sock.send(b"reply", quiet=True)
                assert read_exactly(peer, 5) == b"reply"
            port.post("post")
            assert one(port).state == "post"
            end_child()
            assert receive.pending
            """
        ),
        backend,
    )


@pytest.mark.parametrize(
    "deed",
    [
        "port.close()",
        "sock.close()",
        "sock.close(flush=True)",
        "receive.cancel()",
        "sock.cancel()",
        "globals().pop('port'); globals().pop('sock'); globals().pop('receive'); gc.collect()",
    ],
)
def test_what_the_child_does_to_its_copies_disturbs_nobody(backend: str, deed: str) -> None:
    check_python(
        script(
            f"""
            import warnings
            warnings.simplefilter("ignore", ResourceWarning)

            def child_work():
                try:
                    {deed}
                except an.PortClosedError:
                    pass

            in_child(child_work)
            peer.sendall(b"request")
            completion = one(port)
            assert completion.data == b"request" and completion.more
            sock.send(b"reply", quiet=True)
            assert read_exactly(peer, 5) == b"reply"
            end_child()
            peer.sendall(b"again")
            assert one(port).data == b"again"
            """
        ),
        backend,
    )


def test_a_child_that_exits_normally_disturbs_nobody(backend: str) -> None:
    """With all of the interpreter's finalization, in which every object is dropped."""
    check_python(
        script(
            """
            import warnings
            warnings.simplefilter("ignore")
            child = os.fork()
            if child == 0:
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
            peer.sendall(b"request")
            assert one(port).data == b"request"
            sock.send(b"reply", quiet=True)
            assert read_exactly(peer, 5) == b"reply"
            """
        ),
        backend,
    )


KINDS = {
    "adopted": "",
    "accepted": """
            listener, address = listening(port)
            listener.accept()
            peer = dial(address)
            sock = one(port).accepted
            port.associate(sock)
            sock.recv()
            port.dequeue(timeout=0)
    """,
    "connected": """
            stdlib = stdlib_listener()
            sock = an.AsyncSocket()
            port.associate(sock)
            sock.connect(stdlib.getsockname())
            assert one(port).result() is None
            peer = keep(stdlib.accept()[0])
            sock.recv()
            port.dequeue(timeout=0)
    """,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["sock.close()", "port.close()", "sock.close(flush=True)"])
def test_what_the_parent_closes_ends_for_the_peer(backend: str, how: str, kind: str) -> None:
    """The child still holds a copy of the descriptor, which alone would keep the connection."""
    check_python(
        script(
            f"""
            {KINDS[kind]}
            in_child(lambda: None)
            {how}
            assert peer.recv(1) == b""
            end_child()
            """
        ),
        backend,
    )


def test_a_listener_that_the_parent_closes_refuses(backend: str) -> None:
    check_python(
        script(
            """
            listener, address = listening(port)
            listener.accept(multishot=True)
            port.dequeue(timeout=0)
            in_child(lambda: None)
            listener.close()
            try:
                socket.create_connection(address, 5)
            except ConnectionRefusedError:
                pass
            else:
                raise AssertionError("still listening")
            end_child()
            """
        ),
        backend,
    )


def test_the_number_of_a_closed_socket_is_not_confused(backend: str) -> None:
    """The child keeps the old connection open; events of it must not reach the new socket."""
    check_python(
        script(
            """
            in_child(lambda: None)
            number = sock.fileno()
            sock.close()
            assert cancelled(one(port))
            others = []
            for _ in range(20):
                new, new_peer = pair(port)
                new.recv(multishot=True)
                others.append((new, new_peer))
            try:
                peer.sendall(b"to the closed one")
            except OSError:
                pass
            assert settle(port) == []
            for new, new_peer in others:
                new_peer.sendall(b"%d" % new.fileno())
            for completion in drain(port, 20):
                assert completion.data == b"%d" % completion.socket.fileno()
            end_child()
            """
        ),
        backend,
    )


def test_a_child_can_use_a_port_of_its_own(backend: str) -> None:
    check_python(
        script(
            """
            def child_work():
                with an.CompletionPort() as own:
                    own_sock, own_peer = pair(own)
                    own_sock.recv()
                    own_peer.sendall(b"x")
                    assert one(own).data == b"x"
                    own.post(1)
                    assert one(own).state == 1

            in_child(child_work)
            end_child()
            """
        ),
        backend,
    )


def test_fork_while_other_threads_dequeue(backend: str) -> None:
    """Locks that another thread holds at the fork stay locked in the child for ever."""
    check_python(
        script(
            """
            import warnings
            warnings.simplefilter("ignore", DeprecationWarning)
            stop = threading.Event()

            def work():
                while not stop.is_set():
                    port.post()
                    port.dequeue_many(timeout=0.01)

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    signal.alarm(20)
                    raises_port_closed(lambda: port.post())
                    raises_port_closed(lambda: port.dequeue())
                    raises_port_closed(lambda: sock.recv())
                    port.close()
                    sock.close()
                    with an.CompletionPort() as own:
                        own.post("own")
                        assert own.dequeue().state == "own"
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
            settle(port)
            peer.sendall(b"x")
            assert one(port).data == b"x"
            """
        ),
        backend,
    )


def test_subprocesses_inherit_nothing(backend: str) -> None:
    check_python(
        script(
            """
            import subprocess
            sleeper = subprocess.Popen(
                [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False, text=True,
            )
            assert sleeper.stdout.readline() == "up\\n"
            number = sock.fileno()
            os.set_inheritable(peer.fileno(), False)
            folder = f"/proc/{sleeper.pid}/fd"
            if os.path.isdir(folder):
                links = [os.path.join(folder, name) for name in os.listdir(folder)]
                ours = os.readlink(f"/proc/self/fd/{number}")
                assert ours not in [os.readlink(link) for link in links]
            port.close()
            assert peer.recv(1) == b""
            sleeper.communicate()
            """
        ),
        backend,
    )
