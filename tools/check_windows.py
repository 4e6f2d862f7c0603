r"""Checks on a real Windows, in ten minutes, what Wine cannot tell; writes a report for an issue.

    py -m venv .venv-check && .venv-check\Scripts\pip install .
    .venv-check\Scripts\python tools\check_windows.py [--only WORD] [--clients N] [--report FILE]

The project's tests run the iocp backend under Wine, whose kernel is Linux. What Windows alone can
tell is walked through here, each point in a function below, in this order:

 1. The system and the interpreter are named; `backends()` has iocp.
 2. AF_UNIX: Wine 8 has none. A stream over a path, both ends ours.
 3. Ctrl-C in a console of its own ends `dequeue()` within 0.3 s, alone and beside other threads.
 4. Clients that reset at once, while AcceptEx waits for them: accepting goes on (CPython #93821).
 5. A datagram to a closed port does not poison later receives (SIO_UDP_CONNRESET).
 6. TransmitFile: 3 GiB of a sparse file, more than one call may send; and twenty files at once, of
    which a Windows that is no server sends two at a time.
 7. Large sends against a full window, cancelled in the middle: the peer gets what counts as sent.
 8. Receives into the user's memory, cancelled with data on its way: nothing is written late.
 9. A socket is not inherited: its port is free though a program that was started meanwhile lives.
10. 2,000 connections that came and went leave no handle and less than 4 MiB.
11. Timers: none is early; how late they are (the clock of Windows ticks each 15.6 ms by default).
12. Two threads that dequeue, and one that posts: how many each second.
13. c10k with ten thousand clients on this machine.

The whole suite is another matter: `py tools\check_system.py` builds and runs it (half an hour).
Nothing is changed on the machine, but for files in the temporary folder, which go. The report
names the system and the interpreter, no person and no machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if sys.platform != "win32":
    sys.exit("this is not Windows; tools/check_system.py is for every system")

import msvcrt

import asyncio_native as an
from asyncio_native.cli import windows

PATIENCE = 30.0
"""Seconds that anything may take before it counts as never."""

MEBIBYTE = 1 << 20
AF_UNIX = 1  # Python on Windows has no name for it


class NotHereError(Exception):
    """The point cannot be checked on this system, with the reason."""


# -- helpers --------------------------------------------------------------------------------------


def one(port: an.CompletionPort) -> an.Completion:
    """The next completion."""
    completion = port.dequeue(timeout=PATIENCE)
    assert completion is not None, f"no completion within {PATIENCE:g} s"
    return completion


@contextlib.contextmanager
def connected() -> Iterator[tuple[an.CompletionPort, an.AsyncSocket, socket.socket]]:
    """A port, a socket in it, and the socket of the standard library that it is connected with."""
    with (
        an.CompletionPort() as port,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), timeout=PATIENCE) as peer,
    ):
        sock = an.AsyncSocket.adopt(listener.accept()[0])
        port.associate(sock)
        yield port, sock, peer


def listening(port: an.CompletionPort) -> an.AsyncSocket:
    """A socket that listens on a loopback address."""
    listener = an.AsyncSocket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port.associate(listener)
    return listener


def reset(peer: socket.socket) -> None:
    """Closes with a TCP reset."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("HH", 1, 0))
    peer.close()


def read_all(peer: socket.socket, counts: list[int]) -> None:
    """Reads to the end; the number of bytes goes to the list."""
    buffer = bytearray(MEBIBYTE)
    total = 0
    while count := peer.recv_into(buffer):
        total += count
    counts.append(total)


# -- the points -----------------------------------------------------------------------------------


def backends() -> str:
    """The completion port of Windows is there."""
    told = {backend.name: backend.reason for backend in an.backends() if not backend.available}
    assert "iocp" not in told, told["iocp"]
    with an.CompletionPort() as port:
        return f"auto takes {port.backend}"


def af_unix() -> str:
    """A stream over AF_UNIX, both ends in the port."""
    with tempfile.TemporaryDirectory() as folder, an.CompletionPort() as port:
        path = str(Path(folder, "s"))
        try:
            listener = an.AsyncSocket(AF_UNIX)
        except OSError as error:
            raise NotHereError(f"the system has no AF_UNIX: {error}") from None
        listener.bind(path)
        listener.listen()
        port.associate(listener)
        listener.accept()
        client = an.AsyncSocket(AF_UNIX)
        port.associate(client)
        client.connect(path)
        done = {completion.kind: completion for completion in (one(port), one(port))}
        done[an.CONNECT].result()
        server = done[an.ACCEPT].result()[0]
        port.associate(server)
        client.send(b"by path", quiet=True)
        server.recv()
        assert one(port).data == b"by path"
        listener.close()
        os.unlink(path)
    return "connected, accepted, received"


CONSOLE = """
import ctypes, sys, threading, time
import asyncio_native as an
ctypes.windll.kernel32.SetConsoleCtrlHandler(None, False)  # who started us may have ignored it
port = an.CompletionPort()
for _ in range(int(sys.argv[2])):
    threading.Thread(target=port.dequeue, daemon=True).start()
sent = []
def press():
    sent.append(time.perf_counter())
    ctypes.windll.kernel32.GenerateConsoleCtrlEvent(0, 0)
threading.Timer(0.5, press).start()
try:
    port.dequeue(timeout=10)
    late = None
except KeyboardInterrupt:
    late = time.perf_counter() - sent[0]
with open(sys.argv[1], "w") as file:
    print(late, file=file)
"""


def ctrl_c() -> str:
    """Ctrl-C of a console ends dequeue()."""
    told = []
    for others in (0, 3):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "told")
            command = [sys.executable, "-P", "-c", CONSOLE, str(path), str(others)]
            new_console = 0x08000000
            subprocess.run(command, timeout=PATIENCE, check=False, creationflags=new_console)
            text = path.read_text().strip() if path.exists() else "it ended before it could tell"
        if text == "None" and on_wine():
            raise NotHereError("this Wine has no console to press Ctrl-C in")
        late = float(text)
        assert late < 0.3, f"after {late:.3f} s with {others} other threads"
        told.append(f"{late * 1e3:.0f} ms with {others} other threads")
    return ", ".join(told)


def dying_clients() -> str:
    """Clients that reset while AcceptEx waits never end accepting."""
    with an.CompletionPort() as port:
        listener = listening(port)
        accepting = listener.accept(multishot=True)
        for _ in range(200):
            port.dequeue(0)
            reset(socket.create_connection(listener.getsockname(), timeout=PATIENCE))
        dead = failed = 0
        with socket.create_connection(listener.getsockname(), timeout=PATIENCE) as live:
            while True:
                completion = one(port)
                failed += completion.error != 0
                accepted, address = completion.result()
                accepted.close()
                if address == live.getsockname():
                    break
                dead += 1
        assert accepting.pending
    return f"of 200 that reset, {dead} were accepted and {200 - dead} not seen"


def datagrams() -> str:
    """A refusal of one peer does not end the receives from others."""
    with an.CompletionPort() as port, socket.socket(type=socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            nobody = probe.getsockname()
        sock = an.AsyncSocket(type=socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        port.associate(sock)
        receiving = sock.recvfrom(multishot=True)
        for number in range(50):
            sock.sendto(b"anybody?", nobody, quiet=True)
            peer.sendto(bytes([number]), sock.getsockname())
            completion = one(port)
            assert completion.operation is receiving, completion
            assert completion.data == bytes([number]), completion
    return "50 refusals between 50 datagrams"


def send_files() -> str:
    """TransmitFile beyond its limits: of bytes, and of calls at once."""
    with tempfile.TemporaryFile() as file:
        size = 3 << 30
        if on_wine():
            size = 64 * MEBIBYTE  # Wine's file has all its bytes on the disk
        else:
            sparse, told = 0x000900C4, ctypes.c_ulong()
            handle = ctypes.c_void_p(msvcrt.get_osfhandle(file.fileno()))
            ctypes.WinDLL("kernel32").DeviceIoControl(
                handle, sparse, None, 0, None, 0, ctypes.byref(told), None
            )
        file.truncate(size)
        began = time.perf_counter()
        with connected() as (port, sock, peer):
            counts: list[int] = []
            reader = threading.Thread(target=read_all, args=(peer, counts))
            reader.start()
            sock.sendfile(file)
            completion = port.dequeue(timeout=300)
            assert completion is not None
            assert completion.result() == size
            sock.close(flush=True)
            reader.join(PATIENCE)
            assert counts == [size], counts
        seconds = time.perf_counter() - began
    with tempfile.TemporaryFile() as file, contextlib.ExitStack() as stack:
        file.write(bytes(MEBIBYTE))
        file.flush()
        pairs = [stack.enter_context(connected()) for _ in range(20)]
        got: list[int] = []
        readers = [threading.Thread(target=read_all, args=(peer, got)) for _, _, peer in pairs]
        for reader, (_, sock, _) in zip(readers, pairs, strict=True):
            reader.start()
            sock.sendfile(file)
        for port, sock, _ in pairs:
            assert one(port).result() == MEBIBYTE
            sock.close(flush=True)
        for reader in readers:
            reader.join(PATIENCE)
        assert got == [MEBIBYTE] * 20, got
    return f"{size // MEBIBYTE} MiB in {seconds:.1f} s, then 20 files at once"


def cancelled_sends() -> str:
    """The peer gets just what a cancelled send says that it handed over."""
    shares = []
    for _ in range(20):
        with connected() as (port, sock, peer):
            operation = sock.send(bytes(32 * MEBIBYTE))
            assert operation is not None
            port.dequeue(0)
            assert operation.cancel()
            sent = one(port).transferred
            sock.close()
            counts: list[int] = []
            reader = threading.Thread(target=read_all, args=(peer, counts))
            reader.start()
            while reader.is_alive():
                port.dequeue(timeout=0.01)
            assert counts == [sent], (counts, sent)
            shares.append(sent)
    return f"{min(shares) // 1024} to {max(shares) // 1024} KiB of 32 MiB went out"


def cancelled_receives() -> str:
    """Memory of the user is not written after the completion was dequeued."""
    for _ in range(200):
        with connected() as (port, sock, peer):
            buffer = bytearray(100)
            operation = sock.recv_into(buffer)
            peer.sendall(b"x" * 10)
            operation.cancel()
            completion = one(port)
            before = bytes(buffer)
            buffer.extend(bytes(MEBIBYTE))  # raises where something still holds it
            peer.sendall(b"y" * 10)
            sock.recv(timeout=0.2)
            assert one(port).data, completion
            assert bytes(buffer[:100]) == before
    return "200 times"


def not_inherited() -> str:
    """What is started does not hold our sockets."""
    with an.CompletionPort() as port:
        listener = listening(port)
        address = listener.getsockname()
        with subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False
        ) as child:
            listener.close()
            with socket.socket() as again:
                again.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
                again.bind(address)
            child.communicate(b"\n", timeout=PATIENCE)
    return "the address is free"


def come_and_go() -> str:
    """Connections leave neither handles nor memory."""

    def serve(port: an.CompletionPort, address: tuple[str, int], count: int) -> None:
        for _ in range(count):
            with socket.create_connection(address, timeout=PATIENCE) as client:
                accepted = one(port).result()[0]
                port.associate(accepted)
                accepted.recv(multishot=True)
                client.sendall(b"hello")
                assert one(port).data == b"hello"
            while one(port).more:
                pass
            accepted.close()

    with an.CompletionPort() as port:
        listener = listening(port)
        listener.accept(multishot=True)
        serve(port, listener.getsockname(), 300)
        handles, memory = windows.handles(os.getpid()), windows.resident_bytes(os.getpid())
        serve(port, listener.getsockname(), 2000)
        more_handles = (windows.handles(os.getpid()) or 0) - (handles or 0)
        more_memory = (windows.resident_bytes(os.getpid()) or 0) - (memory or 0)
    assert more_handles < 10, f"{more_handles} handles more"
    assert more_memory < 4 * MEBIBYTE, f"{more_memory} bytes more"
    return f"{more_handles} handles and {more_memory // 1024} KiB more after 2,000"


def timers() -> str:
    """Timers are never early; how late."""
    late = []
    with an.CompletionPort() as port:
        for number in range(200):
            seconds = 0.001 + number % 20 / 1000
            began = time.perf_counter()
            port.timer(seconds)
            one(port)
            late.append(time.perf_counter() - began - seconds)
    assert min(late) >= 0, f"{-min(late) * 1e3:.3f} ms early"
    late.sort()
    return f"median {late[100] * 1e3:.2f} ms late, at most {late[-1] * 1e3:.2f} ms"


def posts() -> str:
    """Several threads dequeue; each post is had once."""
    count = 100_000
    seen: list[object] = []

    def dequeue(port: an.CompletionPort) -> None:
        with contextlib.suppress(an.PortClosedError):
            while True:
                seen.extend(c.state for c in port.dequeue_many(timeout=PATIENCE))

    with an.CompletionPort() as port:
        threads = [threading.Thread(target=dequeue, args=(port,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        began = time.perf_counter()
        for number in range(count):
            port.post(number)
        while len(seen) < count and time.perf_counter() - began < PATIENCE:
            time.sleep(0.001)
        seconds = time.perf_counter() - began
    for thread in threads:
        thread.join(PATIENCE)
    assert len(seen) == count == len(set(seen)), f"{len(seen)} of {count}"
    return f"{count / seconds:,.0f} each second"


def c10k(clients: int) -> str:
    """Every byte of many clients comes back."""
    command = [sys.executable, "-P", "-m", "asyncio_native", "c10k", "--clients", str(clients)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return "\n    " + "\n    ".join(ended.stdout.splitlines())


# -- the report -----------------------------------------------------------------------------------


def on_wine() -> bool:
    """Whether this Windows is Wine."""
    return hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")


def check(name: str, point: Callable[[], str], tell: Callable[[str], None]) -> bool:
    """Runs one point and tells what came of it; false if it failed."""
    began = time.perf_counter()
    try:
        outcome = f"ok: {point()}"
    except NotHereError as reason:
        outcome = f"not here: {reason}"
    except Exception:
        outcome = "FAILED\n" + traceback.format_exc()
    tell(f"{name:20} {outcome} ({time.perf_counter() - began:.1f} s)")
    return not outcome.startswith("FAILED")


def main(arguments: Sequence[str] | None = None) -> int:
    """Walks through the points; the status is 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Checks what only a real Windows can tell.")
    parser.add_argument("--only", default="", help="the points whose name has this in it")
    parser.add_argument("--clients", type=int, default=10_000, help="of c10k (default: 10000)")
    parser.add_argument("--report", type=Path, default=Path("asyncio-native-windows.txt"))
    options = parser.parse_args(arguments)
    points = [backends, af_unix, ctrl_c, dying_clients, datagrams, send_files, cancelled_sends]
    points += [cancelled_receives, not_inherited, come_and_go, timers, posts]
    named: dict[str, Callable[[], str]] = {point.__name__: point for point in points}
    named["c10k"] = lambda: c10k(options.clients)
    with options.report.open("w", encoding="utf-8") as file:

        def tell(text: str) -> None:
            print(text, flush=True)
            print(text, file=file, flush=True)

        kind = "Wine, not Windows itself" if on_wine() else "Windows itself"
        tell(f"system               {platform.platform()} {platform.machine()}: {kind}")
        tell(f"Python               {sys.version}")
        wanted = {name: point for name, point in named.items() if options.only in name}
        failed = [name for name, point in wanted.items() if not check(name, point, tell)]
        tell("failed: " + (", ".join(failed) or "nothing"))
    print(f"the report is in {options.report.resolve()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
