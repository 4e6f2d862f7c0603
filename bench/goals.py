"""What the project wants to reach, and whether it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.measure import Results, Spread

ON_EPOLL = "native-epoll-1"  #: what backend="auto" takes on Linux
ON_IO_URING = "native-io_uring-1"
OURS = (ON_EPOLL, ON_IO_URING)
ECHOES = ("echo-64x50", "echo-64x1000", "echo-64x9000", "echo-16k", "echo-256k")


@dataclass(frozen=True)
class Goal:
    """A server's figure in a scenario, as a ratio to a peer's or, without a peer, by itself.

    The peer `best` is the one with the best median of that scenario.
    """

    what: str
    scenario: str
    server: str
    limit: float
    peer: str = ""
    peer_scenario: str = ""  # if it is another one
    figure: str = "cpu_us"
    at_least: bool = False


@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured."""

    goal: Goal
    peer: str  # which it was
    measured: Spread

    @property
    def reached(self) -> bool:
        """By the median."""
        if self.goal.at_least:
            return self.measured.median >= self.goal.limit
        return self.measured.median <= self.goal.limit


def against(peer: str, scenarios: tuple[str, ...], server: str, limit: float) -> list[Goal]:
    """The same goal in several scenarios."""
    return [Goal("CPU per message", name, server, limit, peer) for name in scenarios]


def both(what: str, scenario: str, limit: float, peer: str = "", **more: Any) -> list[Goal]:
    """The same goal on epoll and on io_uring."""
    return [Goal(what, scenario, server, limit, peer, **more) for server in OURS]


def beside_itself(scenario: str, other: str, limit: float) -> list[Goal]:
    """One scenario against another of the same server."""
    return [Goal("CPU per message", scenario, name, limit, name, other) for name in OURS]


GOALS = (
    *against("best", ECHOES, ON_EPOLL, 0.95),
    *against("best", ECHOES, ON_IO_URING, 0.95),
    *against("uvloop", ECHOES, ON_EPOLL, 0.90),
    *against("c-epoll", ECHOES, ON_EPOLL, 1.08),
    *against("c-io_uring", ECHOES, ON_IO_URING, 1.08),
    *against("c-epoll", ECHOES, "capi-epoll-1", 1.03),
    *against("c-io_uring", ECHOES, "capi-io_uring-1", 1.03),
    *against("c-epoll", ECHOES, "cython-epoll-1", 1.03),
    *against("c-io_uring", ECHOES, "cython-io_uring-1", 1.03),
    *against("uvloop", ("echo-64x50",), "native-epoll-plain-1", 1.00),
    *against("uvloop", ("echo-64x50",), "native-io_uring-plain-1", 1.00),
    *both("CPU per cycle", "cycles", 0.80, "uvloop"),
    *both("CPU per packet", "udp", 0.60, "uvloop"),
    *both("CPU per delivery", "fanout", 0.80, "uvloop"),
    *both("echoes a second", "busy", 2.5, "uvloop", figure="rate", at_least=True),
    *beside_itself("active-10-of-10010", "active-10", 1.10),
    *beside_itself("deadline", "deadline-none", 1.02),
    *both("p99 latency", "latency", 1.00, "best", figure="p99_us"),
    *both("KiB a connection", "memory", 0.75, figure="memory_kib"),
    *both("KiB that stay", "memory", 0.10, figure="stays_kib"),
)


def judge(results: Results) -> list[Verdict]:
    """The goals of which everything was measured."""
    verdicts = []
    for goal in GOALS:
        peer = goal.peer
        if peer == "best":
            peer = results.best_peer(goal.scenario, goal.figure) or ""
        own = (goal.scenario, goal.server)
        if not goal.peer:
            measured = results.spread(*own, goal.figure)
        else:
            other = (goal.peer_scenario or goal.scenario, peer)
            measured = results.ratio(own, other, goal.figure)
        if measured is not None:
            verdicts.append(Verdict(goal, peer, measured))
    return verdicts
