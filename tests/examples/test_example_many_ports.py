"""examples/many_ports.py, driven by nc and socat."""

from __future__ import annotations

import os
import signal
import socket

import pytest
from cli_support import children, command_line, has_ended
from example_support import Example, flood, nc, resident_bytes, run
from support import ENDING_SIGNALS, PATIENCE, dial, eventually, pattern, read_to_end

pytestmark = pytest.mark.posix(
    "several processes listen on one port by SO_REUSEPORT, which Windows has not"
)

TWO = ("--processes", "2")


def workers(example: Example) -> list[int]:
    """The processes that serve; the stdlib has one more of its own."""
    return [
        child
        for child in children(example.process.pid)
        if b"spawn_main" in command_line(child).encode()
    ]


@pytest.mark.parametrize("number", ENDING_SIGNALS, ids=lambda number: number.name)
def test_the_connections_are_spread_over_the_processes(backend: str, number: int) -> None:
    with Example("many_ports.py", backend, *TWO) as example:
        expected = workers(example)
        assert len(expected) == 2
        seen = set()
        # With two processes, all of 40 connections at one of them is one chance in 10 ** 11.
        for count in range(40):
            text = b"connection %d\n" % count
            greeting, _, echoed = nc(example, text).partition(b"\n")
            assert echoed == text
            seen.add(int(greeting.removeprefix(b"process ")))
            if len(seen) == 2:
                break
        assert sorted(seen) == expected
        example.ends_in_order(number)
        assert all(has_ended(worker) for worker in expected)


def test_socat_gets_a_long_stream_back(backend: str) -> None:
    data = pattern(5_000_000)
    with Example("many_ports.py", backend, *TWO) as example:
        command = ["socat", "-t", str(PATIENCE), "-", f"TCP:{example.host}:{example.port}"]
        greeting, _, echoed = run(command, data).partition(b"\n")
        assert greeting.startswith(b"process ")
        assert echoed == data


def test_who_reads_late_gets_all_and_costs_little(backend: str) -> None:
    data = pattern(4_500_000)
    with Example("many_ports.py", backend, *TWO) as example:
        # The echo of some fits into the system's buffers, that of others does not.
        counts = {}
        for limit in range(500_000, len(data) + 1, 500_000):
            client = dial(example.address, receive_buffer=16384)
            (counts[client],) = flood([client], data, limit=limit)
            client.shutdown(socket.SHUT_WR)
        for client, count in counts.items():
            greeting, _, echoed = read_to_end(client).partition(b"\n")
            assert greeting.startswith(b"process ")
            assert echoed == data[:count]
        resident = sum(resident_bytes(worker) for worker in workers(example))
        flood([dial(example.address, receive_buffer=16384)], data)
        assert sum(resident_bytes(worker) for worker in workers(example)) - resident < 8_000_000


def test_the_end_of_one_process_ends_all(backend: str) -> None:
    with Example("many_ports.py", backend, *TWO) as example:
        first, second = workers(example)
        os.kill(first, signal.SIGKILL)
        assert example.process.wait(PATIENCE) == 1
        assert has_ended(second)


def test_no_process_stays_behind_a_killed_parent(backend: str) -> None:
    with Example("many_ports.py", backend, *TWO) as example:
        left = workers(example)
        example.process.kill()
        eventually(lambda: all(has_ended(worker) for worker in left))
