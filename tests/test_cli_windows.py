"""The commands on Windows, each in a process of its own; see test_cli_*.py for more of each."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cli_support import COMMAND, run_cli
from support import PATIENCE, pattern, read_exactly, read_to_end

pytestmark = pytest.mark.skipif(
    sys.platform != "win32", reason="test_cli_echo, _proxy and _c10k say more of these commands"
)


@contextmanager
def running(*arguments: str) -> Iterator[tuple[str, int]]:
    """A command that serves, and the address that it says in its first line."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # Pipes cannot be waited for with a limit here: one that says nothing is ended.
    limit = threading.Timer(PATIENCE, process.kill)
    limit.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), line
        host, _, number = line.split()[2].rstrip(",").rpartition(":")
        yield host, int(number)
    finally:
        limit.cancel()
        process.kill()
        process.communicate()


def exchange(address: tuple[str, int], size: int) -> None:
    """Bytes go and come back, and the end behind them."""
    with socket.create_connection(address, timeout=PATIENCE) as client:
        sender = threading.Thread(target=client.sendall, args=(pattern(size),))
        sender.start()
        assert read_exactly(client, size) == pattern(size)
        sender.join()
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b""


@pytest.mark.parametrize("size", [5, 3_000_000])
def test_echo_sends_back_what_came(backend: str, size: int) -> None:
    with running("echo", "--port", "0", "--backend", backend) as address:
        for _ in range(3):
            exchange(address, size)


@pytest.mark.parametrize("size", [5, 3_000_000])
def test_proxy_passes_bytes_both_ways(backend: str, size: int) -> None:
    with running("echo", "--port", "0", "--backend", backend) as (host, number):
        target = f"{host}:{number}"
        with running("proxy", "127.0.0.1:0", target) as address:
            for _ in range(3):
                exchange(address, size)


def test_c10k_loses_no_byte_and_no_client(backend: str) -> None:
    ended = run_cli("c10k", "--clients", "300", "--messages", "5", "--json", "--backend", backend)
    assert ended.returncode == 0, ended
    report = json.loads(ended.stdout)
    assert report["backend"] == backend
    assert report["messages"] == 5
