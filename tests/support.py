"""Helpers shared by the test suite; they know the public API, the stdlib and how to skip.

Every wait has a deadline (`PATIENCE`, in seconds, unless a test names its own) and fails with an
`AssertionError` that says what was missing. Nothing here starts a thread.

Completions: `one(port)` is the next completion. `drain(port, until)` collects completions until
`until` holds: a number, or a function of the list so far. `settle(port)` makes progress until
nothing has come for a short while, and returns what came. `nothing(port)` asserts that none comes.
`cancelled(completion)` tells whether it reports a cancel.

Sockets: `pair(port, family)` is an associated, connected `AsyncSocket` and its stdlib peer
(blocking, with a time limit). `family` is a name of `FAMILIES` ("ipv4", "ipv6", "unix"), and
`small=True` asks for small kernel buffers, so that a big send stays in flight. `listening(port,
family)` is an associated listening `AsyncSocket` and the address to connect to; `datagram(port,
family)` an associated, bound datagram socket; `stdlib_datagram(family)` and
`stdlib_listener(family)` the stdlib's. `dial(address)` connects a stdlib socket. `reset(peer)`
closes with a TCP reset. `refusing_address(family)` is an address where nobody listens.

Stdlib sockets made here are remembered and closed after each test (`keep(sock)` adds another).

Peers that read while the port works: `read_exactly(peer, count)` and `read_to_end(peer)` block;
`pump(port, peer, count)` reads `count` bytes (or to the end, with `None`) from the peer while it
dequeues, and returns the bytes and the completions.

Programs: `run_python(source, backend)` runs a script in a fresh interpreter that can import this
module too. `start_python` starts it and leaves talking to it to the test.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from asyncio_native.cli.system import resident_bytes

#: Seconds that a helper waits before it fails. Slow instruments (sanitizers) may raise it.
PATIENCE = float(os.environ.get("ASYNCIO_NATIVE_TEST_PATIENCE", "15"))

#: Seconds in which an event that must not happen would have happened on loopback: 0.03, and in
#: proportion where the suite is told to be patient.
QUIET_SECONDS = PATIENCE / 500

#: Seconds in which has happened what must happen "at once", in a process that has to be woken for
#: it: 2, and in proportion where the suite is told to be patient.
SOON_SECONDS = PATIENCE / 7.5

#: Seconds that a program may take from its start to its end: 50, and in proportion likewise.
PROGRAM_SECONDS = PATIENCE * 10 / 3

FAMILIES = ("ipv4", "ipv6", "unix")

_FAMILY_NUMBERS = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
if hasattr(socket, "AF_UNIX"):
    _FAMILY_NUMBERS["unix"] = socket.AF_UNIX

#: Windows programs run under Wine here. What it does differently is named where a test is skipped.
WINE = sys.platform == "win32" and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")

#: The family of streams that takes no ports from others, where there is one.
LOCAL = "unix" if "unix" in _FAMILY_NUMBERS else "ipv4"

#: For tests that ask for `resident_memory()` or `open_count()`.
tells_memory = pytest.mark.skipif(
    sys.platform not in ("linux", "win32"),
    reason="knows how to ask Linux and Windows alone for a process's memory and descriptors",
)

#: Wine makes each socket and each call on one by asking another process: what a test repeats to
#: see whether something grows is divided by this.
SLOWNESS = 10 if WINE else 1

#: For tests of `CompletionPort.fileno()`.
watchable = pytest.mark.posix("Windows has no descriptor that tells whether completions wait")

_kept: list[socket.socket] = []
_folders: list[tempfile.TemporaryDirectory[str]] = []


# -- completions ----------------------------------------------------------------------------------


def one(port: an.CompletionPort, seconds: float | None = None) -> an.Completion:
    """The next completion, which must come in time."""
    patience = PATIENCE if seconds is None else seconds
    completion = port.dequeue(timeout=patience)
    assert completion is not None, f"no completion within {patience} s"
    return completion


def drain(
    port: an.CompletionPort,
    until: int | Callable[[list[an.Completion]], Any],
    seconds: float | None = None,
) -> list[an.Completion]:
    """Collects completions until there are `until` of them, or until `until(completions)`."""
    patience = PATIENCE if seconds is None else seconds
    deadline = time.monotonic() + patience
    completions: list[an.Completion] = []

    def done() -> bool:
        if callable(until):
            return bool(until(completions))
        return len(completions) >= until

    while not done():
        left = deadline - time.monotonic()
        assert left > 0, f"not within {patience} s; so far: {describe(completions)}"
        # A short slice: `until` may depend on what happens outside the port.
        completions += port.dequeue_many(timeout=min(left, 0.1))
    return completions


def settle(port: an.CompletionPort, seconds: float = QUIET_SECONDS) -> list[an.Completion]:
    """Dequeues until nothing has come for `seconds`."""
    completions: list[an.Completion] = []
    deadline = time.monotonic() + PATIENCE
    while batch := port.dequeue_many(timeout=seconds):
        completions += batch
        assert time.monotonic() < deadline, "completions never cease"
    return completions


def nothing(port: an.CompletionPort, seconds: float = QUIET_SECONDS) -> None:
    """Asserts that no completion comes for `seconds`."""
    completion = port.dequeue(timeout=seconds)
    assert completion is None, f"unexpected: {describe([completion])}"


def by_operation(
    completions: list[an.Completion],
) -> dict[an.Operation | None, list[an.Completion]]:
    """The completions of each operation, in the order they came."""
    found: dict[an.Operation | None, list[an.Completion]] = {}
    for completion in completions:
        found.setdefault(completion.operation, []).append(completion)
    return found


def received(completions: list[an.Completion]) -> bytes:
    """The bytes of all RECV completions, joined."""
    return b"".join(c.data or b"" for c in completions if c.kind is an.RECV)


def cancelled(completion: an.Completion) -> bool:
    """Whether the operation was cancelled (its `result()` says so in the documented way)."""
    try:
        completion.result()
    except an.OperationCancelledError:
        assert completion.error != 0
        return True
    except OSError:
        return False
    return False


def describe(completions: list[an.Completion]) -> str:
    shown = [
        f"{c.kind.name}(error={c.error}, transferred={c.transferred}, more={c.more})"
        for c in completions[-8:]
    ]
    return f"{len(completions)} completions, the last: {', '.join(shown) or 'none'}"


def eventually(condition: Callable[[], Any], seconds: float | None = None) -> None:
    """Waits until `condition()` holds; for what no event announces."""
    patience = PATIENCE if seconds is None else seconds
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{condition} does not hold within {patience} s"
        time.sleep(0.002)


# -- sockets --------------------------------------------------------------------------------------


def keep(sock: socket.socket) -> socket.socket:
    """Gives a stdlib socket the suite's time limit and closes it after the test."""
    sock.settimeout(PATIENCE)
    _kept.append(sock)
    return sock


def release_kept() -> None:
    """Closes and removes what the helpers made; conftest calls it after each test."""
    while _kept:
        _kept.pop().close()
    while _folders:
        _folders.pop().cleanup()


def open_descriptors() -> dict[int, str]:
    """The open descriptors and what they are; empty where the system does not list them."""
    found: dict[int, str] = {}
    if sys.platform == "win32":
        return found  # under Wine /proc/self is another process
    try:
        numbers = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return found
    for number in numbers:
        try:
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the descriptor that listed the folder
    return found


def resident_memory() -> int:
    """Bytes of this process that are in memory; for tests marked `tells_memory`."""
    gc.collect()
    resident = resident_bytes(os.getpid())
    assert resident is not None
    return resident


def open_count() -> int:
    """How many descriptors, or handles on Windows, this process has open; likewise."""
    if sys.platform == "win32":
        from asyncio_native.cli import windows

        return windows.handles(os.getpid()) or 0
    return len(os.listdir("/proc/self/fd"))


def is_inheritable(sock: an.AsyncSocket) -> bool:
    """Whether programs that this one starts would have the socket as well."""
    if sys.platform == "win32":
        return os.get_handle_inheritable(sock.fileno())
    return os.get_inheritable(sock.fileno())


def is_non_blocking(sock: an.AsyncSocket) -> bool:
    """What the system says; Windows cannot be asked, so there it is taken for so."""
    return sys.platform == "win32" or not os.get_blocking(sock.fileno())


def family_number(family: str) -> socket.AddressFamily:
    """The system's number of a family; a test that needs one that is not here is skipped."""
    if family not in _FAMILY_NUMBERS:
        pytest.skip(why_not(family))
    return _FAMILY_NUMBERS[family]


def why_not(family: str) -> str:
    """Why a family cannot be used on this machine; empty when it can."""
    if family not in _FAMILY_NUMBERS:
        return f"this system's Python has no {family} sockets"
    try:
        with socket.socket(family_number(family), socket.SOCK_STREAM) as probe:
            if family != "unix":
                probe.bind(any_address(family))
    except OSError as error:
        return f"{family} does not work on this machine: {error}"
    return ""


def socket_path(name: str = "s") -> str:
    """A path for an AF_UNIX socket, short enough for every system."""
    folder = tempfile.TemporaryDirectory(prefix="an-")
    _folders.append(folder)
    return str(Path(folder.name) / name)


def any_address(family: str) -> Any:
    """An address to bind to: a free port of the loopback, or a fresh path."""
    if family == "unix":
        return socket_path()
    return ("127.0.0.1" if family == "ipv4" else "::1", 0)


def stdlib_listener(family: str = "ipv4", backlog: int = 128) -> socket.socket:
    listener = keep(socket.socket(family_number(family), socket.SOCK_STREAM))
    listener.bind(any_address(family))
    listener.listen(backlog)
    return listener


def dial(address: Any, *, receive_buffer: int | None = None) -> socket.socket:
    """A stdlib stream socket, connected to the address."""
    client = keep(socket.socket(_family_of(address), socket.SOCK_STREAM))
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(address)
    return client


def refusing_address(family: str = "ipv4") -> Any:
    """An address where nobody listens; it is taken, so that no other socket comes to have it."""
    probe = keep(socket.socket(family_number(family), socket.SOCK_STREAM))
    probe.bind(any_address(family))
    return probe.getsockname()


def stdlib_pair(
    family: str = "ipv4", *, small: bool = False
) -> tuple[socket.socket, socket.socket]:
    """Two connected stdlib sockets; `small` gives both ends small kernel buffers."""
    if family == "unix":
        ours, peer = socket.socketpair(family_number(family), socket.SOCK_STREAM)
        if small:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        return ours, keep(peer)
    with socket.socket(family_number(family), socket.SOCK_STREAM) as listener:
        listener.bind(any_address(family))
        listener.listen(1)
        peer = dial(listener.getsockname(), receive_buffer=16384 if small else None)
        ours, _ = listener.accept()
    if small:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    for end in (ours, peer):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, peer


def pair(
    port: an.CompletionPort, family: str = "ipv4", *, state: object = None, small: bool = False
) -> tuple[an.AsyncSocket, socket.socket]:
    """An associated AsyncSocket and the stdlib socket that it is connected with."""
    ours, peer = stdlib_pair(family, small=small)
    sock = an.AsyncSocket.adopt(ours)
    port.associate(sock, state)
    return sock, peer


def listening(
    port: an.CompletionPort, family: str = "ipv4", *, backlog: int = 128, state: object = None
) -> tuple[an.AsyncSocket, Any]:
    """An associated, listening AsyncSocket and its address."""
    listener = an.AsyncSocket(family_number(family))
    listener.bind(any_address(family))
    listener.listen(backlog)
    port.associate(listener, state)
    return listener, listener.getsockname()


def stdlib_datagram(family: str = "ipv4") -> socket.socket:
    """A bound stdlib datagram socket."""
    sock = keep(socket.socket(family_number(family), socket.SOCK_DGRAM))
    sock.bind(any_address(family))
    return sock


def datagram(
    port: an.CompletionPort, family: str = "ipv4", *, state: object = None
) -> tuple[an.AsyncSocket, Any]:
    """An associated, bound datagram AsyncSocket and its address."""
    sock = an.AsyncSocket(family_number(family), socket.SOCK_DGRAM)
    sock.bind(any_address(family))
    port.associate(sock, state)
    return sock, sock.getsockname()


def reset(peer: socket.socket) -> None:
    """Closes a TCP socket with a reset."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def expect_reset(peer: socket.socket) -> None:
    """The next that a blocking socket receives is a reset.

    Wine 8 tells a reset as an end where its server has looked at the socket before the program has
    (a peer on Linux gets ECONNRESET from the same close): there an end is taken for one."""
    if WINE:
        with suppress(ConnectionResetError):
            assert peer.recv(1) == b""
        return
    with pytest.raises(ConnectionResetError):
        peer.recv(1)


def stall(port: an.CompletionPort, sock: an.AsyncSocket, size: int = 32 << 20) -> an.Operation:
    """Starts a send that the peer's window cannot take, and sees that it stays in flight.

    Use it on a pair made with `small=True`, or with a size over all that the kernel may hold."""
    operation = sock.send(pattern(size))
    assert operation is not None
    settled = settle(port)
    assert operation.pending, f"the send did not stall: {describe(settled)}"
    assert not settled, f"unexpected: {describe(settled)}"
    return operation


def _family_of(address: Any) -> socket.AddressFamily:
    if not isinstance(address, tuple):
        return _FAMILY_NUMBERS["unix"]
    return _FAMILY_NUMBERS["ipv6" if ":" in address[0] else "ipv4"]


# -- peers ----------------------------------------------------------------------------------------

_BLOCK = b"".join(struct.pack(">I", number) for number in range(1 << 16))


def pattern(size: int, start: int = 0) -> bytes:
    """`size` bytes in which a lost, doubled or displaced piece shows."""
    start %= len(_BLOCK)
    whole = _BLOCK * ((start + size) // len(_BLOCK) + 1)
    return whole[start : start + size]


def read_exactly(peer: socket.socket, count: int) -> bytes:
    """`count` bytes from a blocking socket."""
    pieces = bytearray()
    while len(pieces) < count:
        piece = peer.recv(min(count - len(pieces), 1 << 20))
        assert piece, f"the stream ended after {len(pieces)} of {count} bytes"
        pieces += piece
    return bytes(pieces)


def read_to_end(peer: socket.socket) -> bytes:
    """All bytes from a blocking socket, to the end of the stream."""
    pieces = bytearray()
    while piece := peer.recv(1 << 20):
        pieces += piece
    return bytes(pieces)


def pump(
    port: an.CompletionPort, peer: socket.socket, count: int | None, seconds: float | None = None
) -> tuple[bytes, list[an.Completion]]:
    """Reads `count` bytes from the peer, or to its end of stream, while the port works."""
    patience = PATIENCE if seconds is None else seconds
    deadline = time.monotonic() + patience
    pieces = bytearray()
    completions: list[an.Completion] = []
    limit = peer.gettimeout()
    peer.setblocking(False)
    try:
        while count is None or len(pieces) < count:
            assert time.monotonic() < deadline, (
                f"{len(pieces)} of {count} bytes within {patience} s; {describe(completions)}"
            )
            wait = 0.0
            try:
                piece = peer.recv((1 << 20) if count is None else min(count - len(pieces), 1 << 20))
                if not piece:
                    assert count is None, f"the stream ended after {len(pieces)} of {count} bytes"
                    break
                pieces += piece
            except BlockingIOError:
                wait = 0.001
            completions += port.dequeue_many(timeout=wait)
    finally:
        peer.settimeout(limit)
    return bytes(pieces), completions


# -- programs -------------------------------------------------------------------------------------

#: Flags for a program that gets signals. Windows has Ctrl-C and Ctrl-Break alone, which all
#: programs of a console get: this one has a console of its own.
OWN_CONSOLE = 0

#: The signals that end a program in order.
ENDING_SIGNALS = [signal.SIGINT, signal.SIGTERM]

if sys.platform == "win32":
    OWN_CONSOLE = subprocess.CREATE_NO_WINDOW
    ENDING_SIGNALS = [signal.SIGINT]

# A process has one console: another one goes into that of the program, and presses the key there.
_PRESS = """
import ctypes, sys
kernel = ctypes.WinDLL("kernel32")
kernel.FreeConsole()
kernel.SetConsoleCtrlHandler(None, True)
process, key = map(int, sys.argv[1:])
if not kernel.AttachConsole(process) or not kernel.GenerateConsoleCtrlEvent(key, 0):
    sys.exit("the key cannot be pressed")
"""


def send_signal(process: subprocess.Popen[Any], number: int) -> None:
    """Sends a signal; on Windows SIGINT as Ctrl-C, and SIGBREAK, to a program with OWN_CONSOLE."""
    if sys.platform != "win32":
        process.send_signal(number)
        return
    key = signal.CTRL_BREAK_EVENT if number == signal.SIGBREAK else signal.CTRL_C_EVENT
    command = [sys.executable, "-c", _PRESS, str(process.pid), str(int(key))]
    pressed = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
    )
    assert pressed.returncode == 0, pressed


def first_line(process: subprocess.Popen[str]) -> str:
    """The first line that a program prints; the program is ended if that does not come in time."""
    assert process.stdout is not None
    # Windows' pipes cannot be waited for with a limit.
    limit = threading.Timer(PATIENCE, process.kill)
    limit.start()
    try:
        return process.stdout.readline()
    finally:
        limit.cancel()


def _python(source: str, backend: str) -> tuple[list[str], dict[str, str]]:
    environment = dict(os.environ)
    here = str(Path(__file__).parent)
    paths = [here, *filter(None, [environment.get("PYTHONPATH")])]
    environment.update(PYTHONPATH=os.pathsep.join(paths), ASYNCIO_NATIVE_BACKEND=backend)
    # -P: the current folder must not hide the installed package.
    command = [sys.executable, "-P", "-X", "faulthandler", "-c", textwrap.dedent(source)]
    return command, environment


def run_python(
    source: str, backend: str, *, seconds: float = PROGRAM_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end; its "auto" backend is `backend`."""
    command, environment = _python(source, backend)
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def check_python(source: str, backend: str, *, seconds: float = PROGRAM_SECONDS) -> str:
    """Runs a script that must end with status 0 and nothing on stderr; returns its output."""
    ended = run_python(source, backend, seconds=seconds)
    assert ended.returncode == 0, f"status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    assert ended.stderr == "", ended.stderr
    return ended.stdout


def start_python(
    source: str, backend: str, *, creationflags: int = 0, close_fds: bool = True
) -> subprocess.Popen[str]:
    """Starts a script with pipes for its input and output; the test ends it."""
    command, environment = _python(source, backend)
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        creationflags=creationflags,
        close_fds=close_fds,
    )
