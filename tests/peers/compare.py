"""What a forwarder costs: `proxy` beside a direct connection, socat and HAProxy.

    python tests/peers/compare.py [--rounds N] [--backend B]

Runs redis-benchmark, wrk and pgbench to the same servers through each of them, interleaved, and
prints the medians and their ratio to the direct connection. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

from servers import (
    Address,
    NotInstalledError,
    folder,
    need,
    nginx,
    path_of,
    postgresql,
    program,
    redis,
    running,
)

HAPROXY_CONFIGURATION = """
global
    maxconn 2000
defaults
    mode tcp
    timeout connect 10s
    timeout client 60s
    timeout server 60s
listen forwarder
    bind {host}:{port}
    server target {target_host}:{target_port}
"""

UNITS = {"": 1.0, "KB": 1 / 1024, "MB": 1.0, "GB": 1024.0}
"""What wrk writes behind a figure, in MiB; nothing behind a count."""

Forwarder = Callable[[Address], contextlib.AbstractContextManager[Address]]


@contextlib.contextmanager
def direct(target: Address) -> Iterator[Address]:
    """No forwarder at all."""
    yield target


def asyncio_native(backend: str) -> Forwarder:
    """Our own."""

    @contextlib.contextmanager
    def forward(target: Address) -> Iterator[Address]:
        host, port = target

        def command(address: Address) -> list[str]:
            words = [sys.executable, "-P", "-m", "asyncio_native", "proxy", "--backend", backend]
            return [*words, f"{address[0]}:{address[1]}", f"{host}:{port}"]

        with running(command) as (address, _):
            yield address

    return forward


@contextlib.contextmanager
def socat(target: Address) -> Iterator[Address]:
    """A process for each connection."""
    host, port = target

    def command(address: Address) -> list[str]:
        listen = f"TCP4-LISTEN:{address[1]},bind={address[0]},fork,reuseaddr,backlog=1024,nodelay"
        return [path_of("socat"), listen, f"TCP4:{host}:{port},nodelay"]

    with running(command) as (address, _):
        yield address


@contextlib.contextmanager
def haproxy(target: Address) -> Iterator[Address]:
    """HAProxy in TCP mode, one process with its own default number of threads."""
    host, port = target
    with folder() as place:
        configuration = place / "haproxy.cfg"

        def command(address: Address) -> list[str]:
            configuration.write_text(
                HAPROXY_CONFIGURATION.format(
                    host=address[0], port=address[1], target_host=host, target_port=port
                )
            )
            return [path_of("haproxy"), "-db", "-q", "-f", str(configuration)]

        with running(command) as (address, _):
            yield address


def requests_of_redis(*arguments: str) -> Callable[[Address], float]:
    """Requests a second of redis-benchmark."""

    def measure(address: Address) -> float:
        host, port = address
        command = [path_of("redis-benchmark"), "-h", host, "-p", str(port), "--csv"]
        # SET first: it gives the value that is got its size.
        output = _run([*command, "-t", "set,get", *arguments])
        return float([row["rps"] for row in csv.DictReader(output.splitlines())][1])

    return measure


def wrk(path: str, connections: int, pattern: str) -> Callable[[Address], float]:
    """A figure of wrk's output: requests or MiB a second."""

    def measure(address: Address) -> float:
        host, port = address
        command = [path_of("wrk"), "-t", "1", "-c", str(connections), "-d", "3s"]
        output = _run([*command, f"http://{host}:{port}/{path}"])
        found = re.search(pattern, output)
        assert found is not None, output
        return float(found[1]) * UNITS[found[2]]

    return measure


def pgbench(address: Address) -> float:
    """Transactions a second of pgbench, each one a single select."""
    host, port = address
    where = ["-h", host, "-p", str(port), "-U", "postgres"]
    output = _run([path_of("pgbench"), *where, "-n", "-S", "-M", "prepared"] + PGBENCH_LOAD)
    found = re.search(r"tps = ([\d.]+)", output)
    assert found is not None, output
    return float(found[1])


def _run(command: list[str]) -> str:
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended
    return ended.stdout


PGBENCH_LOAD = ["-c", "8", "-T", "3", "postgres"]
REDIS_WORKLOADS: dict[str, Callable[[Address], float]] = {
    "redis GET, requests/s": requests_of_redis("-n", "50000"),
    "redis GET -P 16, requests/s": requests_of_redis("-n", "300000", "-P", "16"),
    "redis GET -d 10000, requests/s": requests_of_redis("-n", "30000", "-d", "10000"),
}
NGINX_WORKLOADS: dict[str, Callable[[Address], float]] = {
    "wrk 200 B, requests/s": wrk("small", 50, r"Requests/sec:\s+([\d.]+)()"),
    "wrk 20 MiB, MiB/s": wrk("big", 8, r"Transfer/sec:\s+([\d.]+)([KMG]B)"),
}

POSTGRESQL_WORKLOADS: dict[str, Callable[[Address], float]] = {
    "pgbench -S -c 8, transactions/s": pgbench,
}


def compare(
    target: Address,
    workloads: dict[str, Callable[[Address], float]],
    forwarders: dict[str, Forwarder],
    rounds: int,
) -> None:
    """Measures round by round, so that what else the machine does falls on all alike."""
    found: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        addresses = {
            name: stack.enter_context(forward(target)) for name, forward in forwarders.items()
        }
        for _ in range(rounds):
            for workload, measure in workloads.items():
                for name, address in addresses.items():
                    found.setdefault((workload, name), []).append(measure(address))
    for workload in workloads:
        base = statistics.median(found[workload, "direct"])
        print(workload)
        for name in forwarders:
            median = statistics.median(found[workload, name])
            print(f"  {name:<24} {median:>10,.0f}  {median / base:6.1%} of direct", flush=True)


def main() -> int:
    """Runs it all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="epoll")
    arguments = parser.parse_args()
    forwarders: dict[str, Forwarder] = {
        "direct": direct,
        "asyncio-native proxy": asyncio_native(arguments.backend),
    }
    for name, forward in (("socat", socat), ("haproxy", haproxy)):
        try:
            program(name, name)
        except NotInstalledError as missing:
            print(f"left out: {missing}")
        else:
            forwarders[name] = forward
    try:
        need("wrk")
        with redis() as (address, _):
            compare(address, REDIS_WORKLOADS, forwarders, arguments.rounds)
        with nginx(bytes(20 << 20), bytes(200)) as (address, _):
            compare(address, NGINX_WORKLOADS, forwarders, arguments.rounds)
        with postgresql() as (address, _):
            where = ["-h", address[0], "-p", str(address[1]), "-U", "postgres"]
            _run([path_of("pgbench"), *where, "-i", "-s", "1", "-q", "postgres"])
            compare(address, POSTGRESQL_WORKLOADS, forwarders, arguments.rounds)
    except NotInstalledError as missing:
        print(missing)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
