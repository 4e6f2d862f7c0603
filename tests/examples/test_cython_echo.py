"""The echo server in Cython, built as its README says, under clients that we did not write.

Where the package `cython_echo` is installed, as the step `extensions` of .ci does, that one is
tested; else it is built here, against the asyncio_native that is tested.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import asyncio_native as an
import pytest
from capi_support import why_not
from example_support import EXAMPLES, Example, flood, nc, program
from support import PATIENCE, PROGRAM_SECONDS, read_exactly, read_to_end

pytestmark = pytest.mark.posix("compiles it by the C compiler `cc`, and drives it by nc")

IGNORED = shutil.ignore_patterns("build", "*.egg-info", "*.c", "__pycache__")
NEEDED = ("Cython", "pip", "setuptools")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `cython_echo` can be imported from; as PYTHONPATH has it."""
    found = importlib.util.find_spec("cython_echo")
    if found is not None and found.origin is not None:
        return Path(found.origin).parent.parent
    reason = why_not(cython=True)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        reason = f"to build it takes {', '.join(missing)}"
    if reason:
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("cython_echo")
    source, target = place / "source", place / "installed"
    shutil.copytree(EXAMPLES / "cython_echo", source, ignore=IGNORED)
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(target)]
    built = subprocess.run(
        [*pip, *options, str(source)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS + PATIENCE,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return target


class Server(Example):
    """The running server."""

    def __init__(self, folder: Path, backend: str, *arguments: str) -> None:
        command = [sys.executable, "-P", *(arguments or ("-m", "cython_echo", "--port", "0"))]
        path = os.pathsep.join([str(folder), str(Path(an.__file__).parent.parent)])
        self.start(["env", f"PYTHONPATH={path}", *command], backend)


def test_a_foreign_client_gets_back_all_that_it_sent(folder: Path, backend: str) -> None:
    data = os.urandom(8 << 20)
    with Server(folder, backend) as server:
        assert nc(server, data) == data


def test_many_clients_at_once_each_get_back_their_own(folder: Path, backend: str) -> None:
    with Server(folder, backend) as server:
        clients = [
            subprocess.Popen(
                [program("socat"), "-t", "20", "-", f"TCP:{server.host}:{server.port}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for _ in range(8)
        ]
        for number, client in enumerate(clients):
            output, _ = client.communicate(b"%d " % number * 50_000, timeout=PATIENCE)
            assert output == b"%d " % number * 50_000
            assert client.returncode == 0


def test_a_client_that_reads_nothing_is_read_no_further(folder: Path, backend: str) -> None:
    with Server(folder, backend) as server, server.dial() as deaf, server.dial() as other:
        (count,) = flood([deaf], b"x" * 65536, limit=256 << 20)
        assert count < 256 << 20
        other.sendall(b"still served")
        assert read_exactly(other, 12) == b"still served"
        deaf.settimeout(PATIENCE)
        assert read_exactly(deaf, count) == b"x" * count


def test_it_ends_in_order_with_connections_open(folder: Path, backend: str) -> None:
    with Server(folder, backend) as server:
        clients = [server.dial() for _ in range(20)]
        for client in clients:
            client.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
        server.ends_in_order()
        assert [read_to_end(client) for client in clients] == [b""] * 20


def test_connections_that_come_and_go_leave_nothing(folder: Path, backend: str) -> None:
    with Server(folder, backend) as server:
        with server.dial() as first:
            first.sendall(b"x")
            assert read_exactly(first, 1) == b"x"
            before = server.descriptors()
            for _ in range(200):
                with server.dial() as client:
                    client.sendall(b"x")
                    assert read_exactly(client, 1) == b"x"
                    client.shutdown(socket.SHUT_WR)
                    assert read_to_end(client) == b""
            deadline = time.monotonic() + PATIENCE
            while server.descriptors() > before:
                assert time.monotonic() < deadline, server.descriptors()
                time.sleep(0.01)


BESIDE_A_BUSY_THREAD = """
import signal, sys, threading

import asyncio_native as an
from cython_echo import EchoServer

with an.CompletionPort() as port:
    listener = an.AsyncSocket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port.associate(listener)
    server = EchoServer(port, listener)
    thread = threading.Thread(target=server.serve)
    thread.start()
    busy = [True]
    signal.signal(signal.SIGTERM, lambda *_: busy.clear())
    sys.setswitchinterval(100)  # who wants the interpreter lock of the busy thread waits so long
    print("listening on {}:{}".format(*listener.getsockname()), flush=True)
    while busy:
        pass
    port.post()
    thread.join()
    assert (server.connections, server.messages) == (1, 1000)
"""


def test_the_handler_does_not_wait_for_a_busy_python_thread(folder: Path, backend: str) -> None:
    with Server(folder, backend, "-c", BESIDE_A_BUSY_THREAD) as server, server.dial() as client:
        began = time.monotonic()
        for _ in range(1000):
            client.sendall(b"ping")
            assert read_exactly(client, 4) == b"ping"
        assert time.monotonic() - began < PATIENCE
        server.ends_in_order()
        assert read_to_end(client) == b""
