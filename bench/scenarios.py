"""What is measured: each scenario is a load, the role that the servers play in it, and a figure.

Scenarios of one group run interleaved, so that they can be compared with each other as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bench.servers import SERVERS, Server

Kind = Literal["load", "paced", "memory", "processes"]


@dataclass(frozen=True, eq=False)  # there is one of each
class Scenario:
    """One row of measurements.

    `load` are options of bench/c/load.c; `options` those of the servers; `ring` what suits the bare
    C server on io_uring, whose buffers have one size.
    """

    name: str
    title: str
    group: str
    load: dict[str, int | str] = field(default_factory=dict)
    kind: Kind = "load"
    role: str = "echo"
    options: tuple[str, ...] = ()
    ring: tuple[str, ...] = ("buffer=4096", "buffers=2048")
    figure: str = "cpu_us"  # what tables and plots show first
    unit: str = "message"
    only: tuple[str, ...] = ()  # servers' names or families; empty: all that play the role
    plain: bool = False  # whether the plain style takes part

    @property
    def units(self) -> str:
        """The unit's plural."""
        return "deliveries" if self.unit == "delivery" else f"{self.unit}s"

    @property
    def connections(self) -> int:
        """How many are used; beside them may be idle ones."""
        return int(self.load.get("connections", 50))

    def servers(self) -> list[Server]:
        """Those that take part."""
        return [
            server
            for server in SERVERS
            if self.role in server.roles
            and (not self.only or server.name in self.only or server.family in self.only)
            and (self.plain or not server.is_plain)
        ]


LARGE_RING = ("buffer=262144", "buffers=64")
BY_ONE_THREAD = ("native-epoll-1", "native-io_uring-1")
#: Where each run is long, or holds many connections, the other variants would add nothing.
FEWER = ("c", "capi-epoll-1", "capi-io_uring-1", *BY_ONE_THREAD, "peer")


def echo(name: str, title: str, size: int, connections: int, **changes: object) -> Scenario:
    """A closed loop of echoes."""
    load: dict[str, int | str] = {"size": size, "connections": connections}
    if connections > 1000:
        load |= {"ms": 800, "warm_up_ms": 200}
    if size > 65536:
        load |= {"ms": 600}
    given = {"group": name, "load": load} | changes
    return Scenario(name, title, **given)  # type: ignore[arg-type]


SCENARIOS = (
    echo("echo-64x50", "Echo, 64 B x 50 connections", 64, 50, plain=True),
    echo("echo-64x1000", "Echo, 64 B x 1,000", 64, 1000),
    echo("echo-64x9000", "Echo, 64 B x 9,000", 64, 9000),
    echo("echo-16k", "Echo, 16 KiB x 50", 16384, 50, ring=("buffer=16384", "buffers=256")),
    echo("echo-256k", "Echo, 256 KiB x 50", 262144, 50, ring=LARGE_RING),
    Scenario(
        "cycles",
        "Connect, one 64 B echo, close; 50 at a time",
        "cycles",
        {"mode": "cycles", "ms": 600},
        unit="cycle",
    ),
    Scenario(
        "udp",
        "UDP echo, 64 B, 50 clients",
        "udp",
        {"mode": "udp"},
        role="udp",
        unit="packet",
    ),
    Scenario(
        "fanout",
        "One 64 B message to 5,000 connections",
        "fanout",
        {"mode": "fanout", "connections": 5000, "ms": 800, "warm_up_ms": 200},
        role="fanout",
        unit="delivery",
    ),
    Scenario(
        "busy",
        "Echo, 64 B x 50, beside one busy Python thread",
        "busy",
        {"ms": 1000, "warm_up_ms": 200},
        role="busy",
        options=("busy=1",),
        figure="rate",
        plain=True,
    ),
    Scenario("active-10", "Echo, 64 B x 10", "idle", {"connections": 10}, only=FEWER),
    Scenario(
        "active-10-of-10010",
        "Echo, 64 B x 10, beside 10,000 idle connections",
        "idle",
        {"connections": 10, "idle": 10000},
        only=FEWER,
    ),
    Scenario(
        "deadline-none",
        "Echo, 64 B x 50, no deadline",
        "deadline",
        only=("capi", *BY_ONE_THREAD),
    ),
    Scenario(
        "deadline",
        "Echo, 64 B x 50, each message pushes back a deadline of 30 s",
        "deadline",
        options=("deadline_s=30",),
        only=("capi", *BY_ONE_THREAD),
    ),
    Scenario(
        "latency",
        "Latency, 64 B x 50 at half of uvloop's load",
        "latency",
        {"ms": 1500},
        kind="paced",
        figure="p99_us",
        only=FEWER,
    ),
    Scenario(
        "memory",
        "Resident memory for each of 10,000 idle connections",
        "memory",
        {"connections": 10000},
        kind="memory",
        figure="memory_kib",
        unit="connection",
    ),
    echo("scale-100", "Echo, 64 B x 100", 64, 100, group="scale", only=FEWER),
    echo("scale-10000", "Echo, 64 B x 10,000", 64, 10000, group="scale", only=FEWER),
    Scenario(
        "scale-most",
        "Echo, 64 B, as many connections as the machine allows, over several processes",
        "scale-most",
        {"ms": 3000, "warm_up_ms": 1000},
        kind="processes",
        only=FEWER,
    ),
)


def by_name(name: str) -> Scenario:
    """The scenario of that name."""
    return next(scenario for scenario in SCENARIOS if scenario.name == name)
