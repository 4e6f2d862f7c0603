"""examples/inside_asyncio.py, driven by nc and socat."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from example_support import Example, flood, nc, run
from support import ENDING_SIGNALS, PATIENCE, dial, eventually, pattern, read_to_end, reset

pytestmark = pytest.mark.posix("watches the port by its descriptor, which Windows has not")


@pytest.mark.parametrize("number", ENDING_SIGNALS, ids=lambda number: number.name)
def test_nc_gets_its_bytes_back(backend: str, number: int) -> None:
    with Example("inside_asyncio.py", backend) as example:
        assert nc(example, b"hello\n") == b"hello\n"
        silent = example.dial()  # its task is in the middle of a receive
        silent.sendall(b"x")
        assert silent.recv(1) == b"x"
        example.ends_in_order(number)
        assert silent.recv(1) == b""


def test_many_at_the_same_time(backend: str) -> None:
    with Example("inside_asyncio.py", backend) as example:
        command = ["socat", "-t", str(PATIENCE), "-", f"TCP:{example.host}:{example.port}"]
        data = [pattern(500_000, start=client * 1000) for client in range(12)]
        with ThreadPoolExecutor(len(data)) as clients:
            assert list(clients.map(lambda each: run(command, each), data)) == data


def test_who_reads_late_gets_all_and_costs_little(backend: str) -> None:
    data = pattern(1 << 20)
    with Example("inside_asyncio.py", backend) as example:
        client = dial(example.address, receive_buffer=16384)
        (count,) = flood([client], data)
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == (data * (count // len(data) + 1))[:count]


def test_connections_that_fail_leave_nothing_behind(backend: str) -> None:
    with Example("inside_asyncio.py", backend) as example:
        before = example.descriptors()
        for _ in range(20):
            client = example.dial()
            client.sendall(b"x" * 100_000)
            reset(client)
        eventually(lambda: example.descriptors() == before)
        assert nc(example, b"still here\n") == b"still here\n"
