"""What pending timers and moving deadlines cost a server, for each message.

    python -m bench.pending_timers [--backend epoll] [--timers 100000] [--rounds 9]

One process echoes over local socket pairs, both sides of which it drives itself, and measures its
own CPU time for each message in three states that are interleaved, round by round: without any
timer; with a deadline on each connection that every message pushes back (`recv(timeout=30)`); and
with 100,000 timers pending beside. Prints the medians with their least and most, and the ratios.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time

import asyncio_native as an

CONNECTIONS = 50
MESSAGES = 40_000
PAYLOAD = b"x" * 64


class Server:
    """An echo server on a port of its own, with the peers that talk to it."""

    def __init__(self, backend: str, timeout: float | None, timers: int) -> None:
        self.port = an.CompletionPort(backend)
        self.peers: list[socket.socket] = []
        for _ in range(CONNECTIONS):
            ours, peer = socket.socketpair()
            sock = an.AsyncSocket.adopt(ours)
            self.port.associate(sock, peer)
            sock.recv(multishot=True, timeout=timeout)
            self.peers.append(peer)
        self.timers = [self.port.timer(600 + number / 1000) for number in range(timers)]

    def run(self, messages: int) -> float:
        """Echoes that many messages; returns the CPU time of each in nanoseconds."""
        for peer in self.peers:
            peer.send(PAYLOAD)
        left = messages
        began = time.process_time_ns()
        while left > 0:
            for completion in self.port.dequeue_many():
                completion.socket.send(completion.data, quiet=True)
                completion.state.recv(100)
                left -= 1
                if left >= CONNECTIONS:
                    completion.state.send(PAYLOAD)
        return (time.process_time_ns() - began) / messages

    def close(self) -> None:
        """Closes everything."""
        self.port.close()
        for peer in self.peers:
            peer.close()


def start_costs(backend: str, timers: int) -> tuple[float, float]:
    """Nanoseconds to start and to cancel a timer beside that many others."""
    with an.CompletionPort(backend) as port:
        others = [port.timer(600 + number / 1000) for number in range(timers)]
        began = time.process_time_ns()
        mine = [port.timer(300 + number / 1000) for number in range(10_000)]
        started = time.process_time_ns()
        for timer in mine:
            timer.cancel()
        ended = time.process_time_ns()
        assert len(others) == timers
        return (started - began) / len(mine), (ended - started) / len(mine)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="the cost of pending timers")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--timers", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    servers = {
        "no timer": Server(arguments.backend, None, 0),
        "deadline on each": Server(arguments.backend, 30, 0),
        f"and {arguments.timers:,} timers": Server(arguments.backend, 30, arguments.timers),
    }
    costs: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(arguments.rounds):
        for name, server in servers.items():
            costs[name].append(server.run(MESSAGES))
    base = statistics.median(costs["no timer"])
    for name, values in costs.items():
        median = statistics.median(values)
        print(
            f"{name:22} {median:7.0f} ns a message ({min(values):.0f} to {max(values):.0f}),"
            f" ratio {median / base:.3f}"
        )
    for timers in (0, arguments.timers):
        start, cancel = start_costs(arguments.backend, timers)
        print(f"beside {timers:7,} timers: {start:6.0f} ns to start one, {cancel:6.0f} to cancel")
    for server in servers.values():
        server.close()


if __name__ == "__main__":
    main()
