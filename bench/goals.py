"""What the project wants to reach, and whether it was."""

from __future__ import annotations

from dataclasses import dataclass

from bench.measure import Results, Spread

#: What backend="auto" takes on a Linux with io_uring, used from one thread.
OURS = "native-io_uring-1"
OURS_ON_EPOLL = "native-epoll-1"
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


GOALS = (
    *against("best", ECHOES, OURS, 0.95),
    *against("uvloop", ECHOES, OURS_ON_EPOLL, 0.90),
    *against("c-epoll", ECHOES, OURS_ON_EPOLL, 1.08),
    *against("c-io_uring", ECHOES, OURS, 1.08),
    *against("c-epoll", ECHOES, "capi-epoll-1", 1.03),
    *against("c-io_uring", ECHOES, "capi-io_uring-1", 1.03),
    *against("c-epoll", ECHOES, "cython-epoll-1", 1.03),
    *against("c-io_uring", ECHOES, "cython-io_uring-1", 1.03),
    *against("uvloop", ("echo-64x50",), "native-io_uring-plain-1", 1.00),
    *against("uvloop", ("echo-64x50",), "native-epoll-plain-1", 1.00),
    Goal("CPU per cycle", "cycles", OURS, 0.80, "uvloop"),
    Goal("CPU per packet", "udp", OURS, 0.60, "uvloop"),
    Goal("CPU per delivery", "fanout", OURS, 0.80, "uvloop"),
    Goal("echoes a second", "busy", OURS, 2.5, "uvloop", figure="rate", at_least=True),
    Goal("CPU per message", "active-10-of-10010", OURS, 1.10, OURS, "active-10"),
    Goal("CPU per message", "active-10-of-10010", OURS_ON_EPOLL, 1.10, OURS_ON_EPOLL, "active-10"),
    Goal("CPU per message", "deadline", OURS, 1.02, OURS, "deadline-none"),
    Goal("CPU per message", "deadline", OURS_ON_EPOLL, 1.02, OURS_ON_EPOLL, "deadline-none"),
    Goal("p99 latency", "latency", OURS, 1.00, "best", figure="p99_us"),
    Goal("KiB a connection", "memory", OURS, 0.75, figure="memory_kib"),
    Goal("KiB that stay", "memory", OURS, 0.10, figure="stays_kib"),
    Goal("KiB a connection", "memory", OURS_ON_EPOLL, 0.75, figure="memory_kib"),
    Goal("KiB that stay", "memory", OURS_ON_EPOLL, 0.10, figure="stays_kib"),
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
