"""`proxy` in front of a real redis-server, driven by redis-benchmark and redis-cli."""

from __future__ import annotations

import csv
import subprocess
import threading
from collections.abc import Iterator

import pytest
import servers
from proxy_support import Proxy
from support import PATIENCE, pattern

pytestmark = [pytest.mark.peers, pytest.mark.posix("redis is started as Debian has it")]


@pytest.fixture(scope="module")
def redis() -> Iterator[servers.Address]:
    try:
        with servers.redis() as (address, _):
            yield address
    except servers.NotInstalledError as missing:
        pytest.skip(str(missing))


def benchmark(proxy: Proxy, *arguments: str) -> list[dict[str, str]]:
    """The rows of redis-benchmark's table, one for each kind of request."""
    host, port = proxy.address
    ended = subprocess.run(
        env=servers.ENVIRONMENT,
        args=[servers.path_of("redis-benchmark"), "-h", host, "-p", str(port), "--csv", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert ended.returncode == 0, ended
    return list(csv.DictReader(ended.stdout.splitlines()))


def cli(proxy: Proxy, *arguments: str, data: bytes | None = None) -> bytes:
    host, port = proxy.address
    ended = subprocess.run(
        env=servers.ENVIRONMENT,
        args=[servers.path_of("redis-cli"), "-h", host, "-p", str(port), *arguments],
        input=data or b"",
        capture_output=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("requests", "arguments"),
    [
        (10_000, []),
        (100_000, ["-P", "16"]),
        (10_000, ["-d", "10000"]),
        (10_000, ["-d", "10000", "-P", "16"]),
        (3_000, ["-k", "0"]),  # a connection for each request
    ],
    ids=["plain", "pipelined", "10kB", "10kB-pipelined", "reconnecting"],
)
def test_redis_benchmark(
    backend: str, redis: servers.Address, requests: int, arguments: list[str]
) -> None:
    with Proxy(backend, redis) as proxy:
        cli(proxy, "flushall")
        rows = benchmark(proxy, "-t", "set,get", "-n", str(requests), "-c", "50", *arguments)
        assert [row["test"] for row in rows] == ["SET", "GET"]
        assert all(float(row["rps"]) > 0 for row in rows)
        assert cli(proxy, "exists", "key:__rand_int__") == b"1\n"
        assert proxy.end() == (0, "", "")


@pytest.mark.parametrize("size", [1, 10_000, 16_384, 8 << 20])
def test_values_come_back_as_they_were_set(backend: str, redis: servers.Address, size: int) -> None:
    value = pattern(size, size)
    with Proxy(backend, redis) as proxy:
        assert cli(proxy, "-x", "set", "value", data=value) == b"OK\n"
        assert cli(proxy, "get", "value") == value + b"\n"
        assert proxy.end() == (0, "", "")


def test_redis_killed_in_the_middle_ends_the_benchmark(backend: str) -> None:
    try:
        with servers.redis() as (address, server), Proxy(backend, address) as proxy:
            host, port = proxy.address
            command = [servers.path_of("redis-benchmark"), "-h", host, "-p", str(port), "-l", "-q"]
            with subprocess.Popen(
                env=servers.ENVIRONMENT,
                args=[*command, "-t", "set"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as process:
                giving_up = threading.Timer(PATIENCE, process.kill)
                giving_up.start()
                assert process.stdout is not None
                process.stdout.read(200)  # it is running
                server.kill()
                rest = process.stdout.read()
                giving_up.cancel()
                assert process.wait() == 1, rest
            assert b"closed" in rest or b"reset" in rest
            assert proxy.end()[0] == 0
    except servers.NotInstalledError as missing:
        pytest.skip(str(missing))
