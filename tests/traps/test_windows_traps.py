"""What Windows does to handles, and what the I/O completion port makes of it."""

from __future__ import annotations

import _thread
import ctypes
import errno
import gc
import os
import re
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    WINE,
    drain,
    eventually,
    keep,
    listening,
    nothing,
    one,
    pair,
    read_exactly,
    reset,
    settle,
    start_python,
    stdlib_pair,
)

CREATE_NEW_CONSOLE = 0x10

pytestmark = pytest.mark.skipif(
    sys.platform != "win32", reason="Windows' handles and completion ports"
)


def bind_to_another_port(sock: socket.socket) -> Any:
    """Binds the socket's handle to a completion port that is not ours, and returns that."""
    overlapped: Any = pytest.importorskip("_overlapped")
    native = overlapped.CreateIoCompletionPort(overlapped.INVALID_HANDLE_VALUE, 0, 0, 1)
    overlapped.CreateIoCompletionPort(sock.fileno(), native, 0, 0)
    return native


def test_a_handle_bound_to_another_completion_port_is_refused_clearly(
    port: an.CompletionPort,
) -> None:
    ours, _ = stdlib_pair()
    bind_to_another_port(ours)
    with an.AsyncSocket.adopt(ours) as sock:
        with pytest.raises(ValueError, match="another completion port"):
            port.associate(sock)
        assert sock.port is None
        nothing(port)


def test_an_inherited_handle_of_a_port_is_refused_clearly_and_works_on_here(
    port: an.CompletionPort,
) -> None:
    """A socket belongs to its completion port in every process that has it."""
    sock, peer = pair(port)
    system: Any = os
    system.set_handle_inheritable(sock.fileno(), True)
    inherited = inherit(sock.fileno(), port.backend)
    assert inherited.startswith("ValueError: the socket belongs to another completion port")
    sock.send(b"still ours", quiet=True)
    assert read_exactly(peer, 10) == b"still ours"


def test_an_inherited_handle_that_no_port_has_is_served(port: an.CompletionPort) -> None:
    ours, peer = stdlib_pair()
    keep(ours).set_inheritable(True)  # kept, as it may end in a skip
    assert inherit(ours.fileno(), port.backend) == "served"
    assert read_exactly(peer, 14) == b"from the child"


def inherit(handle: int, backend: str) -> str:
    """What a child process says that adopts the handle and serves it."""
    source = f"""
        import socket
        import asyncio_native as an
        try:
            socket.socket(fileno={handle}).detach()
        except OSError:
            raise SystemExit("no socket")
        with an.CompletionPort() as port, an.AsyncSocket.adopt({handle}) as sock:
            try:
                port.associate(sock)
                sock.send(b"from the child")
                port.dequeue(10).result()
                print("served")
            except Exception as error:
                print(f"{{type(error).__name__}}: {{error}}")
        """
    process = start_python(source, backend, close_fds=False)
    try:
        output, errors = process.communicate(timeout=2 * PATIENCE)
    finally:
        process.kill()
        process.wait()
    if WINE and errors == "no socket\n":
        pytest.skip(
            "in Wine 8 an inherited handle is no socket: the stdlib's socket refuses it too"
        )
    assert errors == ""
    return output.strip()


def test_a_handle_without_overlapped_operations_is_refused_clearly(port: an.CompletionPort) -> None:
    ws2: Any = ctypes.WinDLL("ws2_32")  # type: ignore[attr-defined,unused-ignore]
    ws2.WSASocketW.restype = ctypes.c_void_p
    handle = ws2.WSASocketW(int(socket.AF_INET), int(socket.SOCK_STREAM), 0, None, 0, 0)
    with an.AsyncSocket.adopt(handle) as sock:
        with pytest.raises(ValueError, match="made without overlapped operations"):
            port.associate(sock)
        nothing(port)


def test_a_handle_that_is_no_socket_is_refused_clearly() -> None:
    msvcrt: Any = pytest.importorskip("msvcrt")
    with tempfile.TemporaryFile() as file:
        with pytest.raises(OSError) as caught:
            an.AsyncSocket.adopt(msvcrt.get_osfhandle(file.fileno()))
        assert caught.value.errno == errno.ENOTSOCK
        os.fstat(file.fileno())


@pytest.mark.parametrize("last", ["close", "drop", "port"])
def test_requests_that_fail_at_once_leave_nothing_for_the_kernel(backend: str, last: str) -> None:
    """No packet comes for them: closing the port waits in vain for one that is counted all the
    same, and memory that is let go twice is found by the next request."""
    port = an.CompletionPort(backend)
    for _ in range(50):
        sock = an.AsyncSocket()
        port.associate(sock)
        operations = [sock.recv(), sock.accept(), sock.recv_into(bytearray(10)), sock.send(b"x")]
        completions = {c.operation: c for c in drain(port, len(operations)) + settle(port, 0)}
        assert set(completions) == set(operations)
        assert all(c.error for c in completions.values())
        if last == "close":
            sock.close()
    began = time.perf_counter()
    if last == "drop":
        with pytest.warns(ResourceWarning):
            del sock, operations, completions
            gc.collect()
    port.close()
    assert time.perf_counter() - began < 2, "waited for a packet that does not come"


def test_closing_the_port_has_the_kernel_let_go_of_pending_requests(backend: str) -> None:
    port = an.CompletionPort(backend)
    listener, _ = listening(port)
    listener.accept(multishot=True)
    datagrams = an.AsyncSocket(type=socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    port.associate(datagrams)
    datagrams.recvfrom()
    for _ in range(100):
        sock, _ = pair(port, small=True)
        sock.recv(multishot=True)
        sock.recv_into(bytearray(1 << 16))
        sock.send(bytes(1 << 20))
    settle(port)
    began = time.perf_counter()
    port.close()
    assert time.perf_counter() - began < 3
    assert port.in_flight == 0


def test_one_of_two_pending_receives_can_be_cancelled(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    first, second = sock.recv(), sock.recv()
    settle(port)
    assert second.cancel()
    assert one(port).operation is second
    peer.sendall(b"for the first")
    completion = one(port)
    assert completion.operation is first
    assert completion.data == b"for the first"


def test_a_buffer_may_go_as_soon_as_its_cancelled_operation_was_dequeued(
    port: an.CompletionPort,
) -> None:
    """The kernel never has the user's memory: the buffer can be resized, the data is not in it."""
    sock, peer = pair(port)
    buffer = bytearray(100)
    operation = sock.recv_into(buffer)
    settle(port)
    assert operation.cancel()
    one(port)
    buffer.extend(bytes(1 << 20))
    peer.sendall(b"late")
    assert one_receive(port, sock) == b"late"
    assert not any(buffer)


def one_receive(port: an.CompletionPort, sock: an.AsyncSocket) -> bytes:
    sock.recv()
    data: bytes = one(port).data
    return data


def test_accepting_goes_on_after_clients_that_died_while_it_waited(
    port: an.CompletionPort,
) -> None:
    """AcceptEx completes with an error, or with a connection that is dead (CPython #93821)."""
    with an.AsyncSocket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port.associate(listener)
        accept = listener.accept(multishot=True)
        for _ in range(30):
            port.dequeue(0)
            reset(socket.create_connection(listener.getsockname()))
        live = keep(socket.create_connection(listener.getsockname()))
        while True:
            accepted, address = one(port).result()
            if address == live.getsockname():
                break
            accepted.close()
        assert accept.pending
        with accepted:
            port.associate(accepted)
            accepted.send(b"hello", quiet=True)
            assert read_exactly(live, 5) == b"hello"


def test_a_closed_port_of_others_does_not_poison_the_receives_of_a_datagram_socket(
    port: an.CompletionPort,
) -> None:
    """SIO_UDP_CONNRESET is off: the refusal of one peer is no business of the others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = probe.getsockname()
    with an.AsyncSocket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port.associate(sock)
        receive = sock.recvfrom(multishot=True)
        for _ in range(5):
            sock.sendto(b"is anybody there", nobody, quiet=True)
            nothing(port)
        peer = keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        peer.sendto(b"yes", sock.getsockname())
        completion = one(port)
        assert completion.operation is receive
        assert completion.data == b"yes"


def test_what_was_handed_over_arrives_although_the_socket_is_closed_at_once(
    port: an.CompletionPort,
) -> None:
    """A piece that the kernel has is not cancelled by closing: the peer gets all that counts."""
    sock, peer = pair(port, small=True)
    operation = sock.send(bytes(8 << 20))
    settle(port)
    assert operation.cancel()
    transferred = one(port).transferred
    assert 0 < transferred < 8 << 20
    sock.close()
    got = 0
    while piece := peer.recv(65536):
        got += len(piece)
        port.dequeue(0)
    assert got == transferred


def test_threads_that_find_nothing_all_wait_in_the_kernel(port: an.CompletionPort) -> None:
    count = 5
    meeting = threading.Barrier(count)

    def work() -> None:
        one(port)
        meeting.wait(PATIENCE)  # each handles one beside the others

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    eventually(lambda: port.statistics().gauge_waiting == count)
    peers = []
    for _ in range(count):
        sock, peer = pair(port)
        sock.recv()
        peers.append(peer)
    for peer in peers:
        peer.sendall(b"x")
    for thread in threads:
        thread.join(PATIENCE)
    assert not meeting.broken
    assert port.statistics().gauge_waiting == 0


def test_the_reference_tells_the_numbers_of_errors() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
    rows = [line.split("|") for line in page.read_text("utf-8").splitlines() if "| `errno." in line]
    assert len(rows) >= 10
    for row in rows:
        names = re.findall(r"errno\.([A-Z]+)", row[2])
        assert [getattr(errno, name) for name in names] == [int(n) for n in row[4].split(",")]
        for name in names:
            number = getattr(errno, name)
            wanted = row[3].strip(" `")
            raised = (
                an.OperationCancelledError if name == "ECANCELED" else type(OSError(number, ""))
            )
            assert raised.__name__ == wanted


def test_an_interrupt_without_the_console_ends_a_wait_for_ever(port: an.CompletionPort) -> None:
    """Nothing wakes the thread then: it waits in slices, and so lets Python see it."""
    interrupted: list[float] = []

    def interrupt() -> None:
        eventually(lambda: port.statistics().gauge_waiting == 1)
        interrupted.append(time.perf_counter())
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        port.dequeue()
    assert time.perf_counter() - interrupted[0] < PATIENCE / 15  # a second, where nobody is patient
    thread.join(PATIENCE)


CTRL_C = """
    import ctypes, signal, sys, threading, time
    import asyncio_native as an
    from asyncio_native import _port

    _port._SLICE_NS = 600_000_000_000  # not by looking now and then
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel32.SetConsoleCtrlHandler(None, False)  # not ignored, whatever our parent does
    handled = []

    def handle(number, frame):
        handled.append(number)
        raise KeyboardInterrupt

    if {own_handler}:
        signal.signal(signal.SIGINT, handle)
    port = an.CompletionPort()

    def other():
        try:
            while True:
                port.dequeue()
        except an.PortClosedError:
            pass

    others = [threading.Thread(target=other) for _ in range({others})]
    for thread in others:
        thread.start()

    def press():
        while port.statistics().gauge_waiting <= {others}:
            time.sleep(0.01)
        if not kernel32.GenerateConsoleCtrlEvent(signal.CTRL_C_EVENT, 0):
            print("no event:", ctypes.get_last_error(), flush=True)

    for _ in range(3):
        presser = threading.Thread(target=press)
        presser.start()
        began = time.perf_counter()
        try:
            completion = port.dequeue(timeout=20)
        except KeyboardInterrupt:
            print("interrupted", time.perf_counter() - began < 5, flush=True)
        presser.join()
    assert not {own_handler} or handled == [signal.SIGINT] * 3
    port.post("still works")
    if not others:
        assert port.dequeue(20).state == "still works"
    port.close()
    for thread in others:
        thread.join(20)
"""


@pytest.mark.parametrize(
    "case",
    [
        {"own_handler": False, "others": 0},
        {"own_handler": False, "others": 3},
        {"own_handler": True, "others": 3},
    ],
    ids=["alone", "beside-other-threads", "own-handler"],
)
def test_ctrl_c_in_a_console_ends_a_wait_at_once(backend: str, case: dict[str, object]) -> None:
    """The event is handled in a thread of the system's, by Python's handler as ever, and then the
    waiting threads are interrupted. Ctrl-Break goes the same way; Wine 8 makes none."""
    process = start_python(CTRL_C.format(**case), backend, creationflags=CREATE_NEW_CONSOLE)
    try:
        output, errors = process.communicate(timeout=2 * PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert errors == ""
    assert output == "interrupted True\n" * 3
    assert process.returncode == 0
