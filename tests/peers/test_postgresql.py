"""`proxy` in front of a real PostgreSQL, driven by pgbench and psql."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest
import servers
from proxy_support import Proxy
from support import PATIENCE

pytestmark = [pytest.mark.peers, pytest.mark.posix("PostgreSQL is started as Debian has it")]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[servers.Address]:
    try:
        with servers.postgresql() as (address, _):
            yield address
    except servers.NotInstalledError as missing:
        pytest.skip(str(missing))


def pgbench(proxy: Proxy, *arguments: str) -> str:
    host, port = proxy.address
    where = ["-h", host, "-p", str(port), "-U", "postgres"]
    ended = subprocess.run(
        env=servers.ENVIRONMENT,
        args=[servers.path_of("pgbench"), *where, *arguments, "postgres"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert ended.returncode == 0, ended
    return ended.stdout


def psql(proxy: Proxy, statement: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        env=servers.ENVIRONMENT,
        args=servers.psql_command(proxy.address, statement),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )


def test_pgbench_and_its_books_balance(backend: str, postgresql: servers.Address) -> None:
    with Proxy(backend, postgresql) as proxy:
        pgbench(proxy, "-i", "-s", "1", "-q")
        for mode in ("simple", "prepared"):
            output = pgbench(proxy, "-n", "-c", "8", "-t", "100", "-M", mode)
            assert "transactions actually processed: 800/800" in output
            assert "failed transactions: 0 " in output
        sums = psql(
            proxy,
            "select (select sum(abalance) from pgbench_accounts)"
            " = (select sum(delta) from pgbench_history),"
            " (select count(*) from pgbench_history)",
        )
        assert sums.stdout == "t|1600\n", sums
        assert proxy.end() == (0, "", "")


def test_pgbench_with_a_connection_for_each_transaction(
    backend: str, postgresql: servers.Address
) -> None:
    with Proxy(backend, postgresql) as proxy:
        pgbench(proxy, "-i", "-s", "1", "-q")
        output = pgbench(proxy, "-n", "-C", "-S", "-c", "4", "-t", "50")
        counted = re.search(r"transactions actually processed: (\d+)/", output)
        assert counted is not None
        assert counted[1] == "200"
        assert int(proxy.statistics()["connections total"]) > 200
        assert proxy.end() == (0, "", "")


def test_a_large_result_arrives_whole(backend: str, postgresql: servers.Address) -> None:
    with Proxy(backend, postgresql) as proxy:
        rows = 100_000
        got = psql(proxy, f"select md5(n::text) from generate_series(1, {rows}) n")
        assert got.returncode == 0, got.stderr
        expected = [hashlib.md5(str(n).encode()).hexdigest() for n in range(1, rows + 1)]
        assert got.stdout.splitlines() == expected


def test_a_session_that_is_idle_too_long_is_told(backend: str, postgresql: servers.Address) -> None:
    with Proxy(backend, postgresql, "--idle-timeout", "0.5") as proxy:
        got = psql(proxy, "select pg_sleep(30)")
        assert got.returncode == 2
        assert "closed the connection unexpectedly" in got.stderr
        assert proxy.statistics()["closed as idle"] == "1"


def test_postgresql_that_ends_at_once_tells_its_clients(backend: str) -> None:
    try:
        with servers.postgresql() as (address, server), Proxy(backend, address) as proxy:
            command = servers.psql_command(proxy.address, "select pg_sleep(30)")
            with subprocess.Popen(
                env=servers.ENVIRONMENT,
                args=command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as client:
                servers.wait_for_activity(address, "pg_sleep")
                server.send_signal(signal.SIGINT)  # its fast shutdown
                _, errors = client.communicate(timeout=4 * PATIENCE)
            assert client.returncode == 2
            # Its last words were passed on before the end.
            assert "terminating connection due to administrator command" in errors
            assert proxy.end()[0] == 0
    except servers.NotInstalledError as missing:
        pytest.skip(str(missing))
