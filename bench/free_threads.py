"""What a second thread brings: echoes a second by one thread and by two, on this interpreter.

    python -m bench.free_threads [--backend epoll] [--rounds 7] [--seconds 1]

Each thread plays a kind of ping-pong: both ends of local socket pairs stand on one port, and what
an end receives it sends back. So there is no load beside it, and all that runs is Python on this
library. Measured, interleaved round by round: one thread; two threads, each with a port of its own;
two threads that dequeue from one port. Prints messages a second, the median with the least and the
most, and the ratio to one thread. Needs a core for each thread, and otherwise a quiet machine.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable

import asyncio_native as an

PAIRS = 32
PAYLOAD = b"x" * 64


def set_up(backend: str, pairs: int = PAIRS) -> an.CompletionPort:
    """A port with that many pairs, on each of which one message is under way."""
    port = an.CompletionPort(backend)
    for _ in range(pairs):
        ends = [an.AsyncSocket.adopt(end) for end in socket.socketpair()]
        for end in ends:
            port.associate(end, 0)
            end.recv()
        ends[0].send(PAYLOAD, quiet=True)
    return port


def play(port: an.CompletionPort, until: float) -> int:
    """Sends each message on, and returns how many it were."""
    count = 0
    while time.perf_counter() < until:
        for completion in port.dequeue_many(timeout=1):
            completion.socket.recv()
            completion.socket.send(completion.data, quiet=True)
            count += 1
    return count


def rate(ports: list[an.CompletionPort], seconds: float) -> float:
    """Messages a second of a thread for each item of `ports`, all at once."""
    counts: list[int] = []
    until = time.perf_counter() + seconds
    threads = [
        threading.Thread(target=lambda port=port: counts.append(play(port, until)))
        for port in ports
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="what a second thread brings")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1)
    arguments = parser.parse_args()
    lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"CPython {sys.version.split()[0]}, lock {'on' if lock else 'off'}, {an.binding} binding")
    alone, other = set_up(arguments.backend), set_up(arguments.backend)
    shared = set_up(arguments.backend, 2 * PAIRS)
    ways: dict[str, Callable[[], float]] = {
        "one thread": lambda: rate([alone], arguments.seconds),
        "two threads, a port each": lambda: rate([alone, other], arguments.seconds),
        "two threads on one port": lambda: rate([shared, shared], arguments.seconds),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, measure in ways.items():
            rates[name].append(measure())
    base = statistics.median(rates["one thread"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(
            f"{name:26} {median:9,.0f} messages a second ({min(values):,.0f} to"
            f" {max(values):,.0f}), ratio {median / base:.2f}"
        )
    for port in (alone, other, shared):
        port.close()


if __name__ == "__main__":
    main()
