"""Rounds: every server in every scenario once, in an order that moves on from round to round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from tqdm import tqdm

from bench.run import Figures, Place, RunFailedError, run_once
from bench.scenarios import SCENARIOS, Scenario
from bench.servers import SERVERS, Server, by_name

Cell = tuple[Scenario, Server]

GIVE_UP_AFTER = 2  # failures one after the other
CALIBRATIONS = 3
QUICK = {"ms": 150, "warm_up_ms": 50}


@dataclass
class Spread:
    """The distribution of what the rounds gave."""

    median: float
    low: float  # quartiles
    high: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None without values."""
        found = sorted(values)
        if not found:
            return None
        low, middle, high = (
            statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
        )
        return cls(middle, low, high, found[0], found[-1], len(found))


@dataclass
class Results:
    """All rounds: by scenario and server the figures of each, None where a run failed."""

    rounds: dict[str, dict[str, list[Figures | None]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    paced_rate: int = 0  # messages a second of the scenarios at half load

    def of(self, scenario: str, server: str, figure: str) -> list[float | None]:
        """One figure, round by round."""
        rounds = self.rounds.get(scenario, {}).get(server, [])
        return [None if figures is None else figures.get(figure) for figures in rounds]

    def spread(self, scenario: str, server: str, figure: str) -> Spread | None:
        """Its distribution."""
        return Spread.of(v for v in self.of(scenario, server, figure) if v is not None)

    def ratio(self, one: tuple[str, str], other: tuple[str, str], figure: str) -> Spread | None:
        """Of two (scenario, server), each round's figure to that of the same round."""
        pairs = zip(self.of(*one, figure), self.of(*other, figure), strict=False)
        return Spread.of(a / b for a, b in pairs if a is not None and b)

    def best_peer(self, scenario: str, figure: str) -> str | None:
        """The peer with the best median, of those that give back the right bytes."""
        medians = {
            name: spread.median
            for name in self.rounds.get(scenario, {})
            if by_name(name).family == "peer"
            and not by_name(name).fault
            and (spread := self.spread(scenario, name, figure)) is not None
        }
        best = max if figure == "rate" else min
        return best(medians, key=lambda name: medians[name]) if medians else None


def chosen(names: list[str], available: set[str], peers: bool) -> list[list[Cell]]:
    """The groups of cells that these names of scenarios, groups, servers and families select."""
    scenarios = [s for s in SCENARIOS if s.name in names or s.group in names] or list(SCENARIOS)
    groups: dict[str, list[Cell]] = {}
    for scenario in scenarios:
        playing = [s for s in scenario.servers() if peers or s.family != "peer"]
        playing = [s for s in playing if not s.package or s.package in available]
        named = [s for s in playing if s.name in names or s.family in names]
        some_named = any(name in known_servers() for name in names)
        for server in named if some_named else playing:
            groups.setdefault(scenario.group, []).append((scenario, server))
    return list(groups.values())


def known_servers() -> set[str]:
    """Names and families."""
    return {server.name for server in SERVERS} | {server.family for server in SERVERS}


def half_load(place: Place, cells: list[Cell]) -> int:
    """Half of what uvloop could serve, or the first server here without it, in messages a second.

    By CPU time, which others that load the machine change less than a rate.
    """
    scenario = next(s for s in SCENARIOS if s.name == "echo-64x50")
    servers = [server for _, server in cells]
    base = next((server for server in servers if server.name == "uvloop"), servers[0])
    costs = [run_once(place, base, scenario, scenario.load)["cpu_us"] for _ in range(CALIBRATIONS)]
    return round(1e6 / statistics.median(costs) / 2)


def in_turn(cells: list[Cell], rounds: int) -> Iterator[list[Cell]]:
    """The cells of each round, each time beginning with another."""
    for turn in range(rounds):
        shift = turn % len(cells)
        yield cells[shift:] + cells[:shift]


def measure(
    place: Place,
    results: Results,
    cells: list[Cell],
    rounds: int,
    *,
    quick: bool,
    bar: tqdm[NoReturn],
) -> None:
    """All rounds of the cells of one group."""
    failed: dict[tuple[str, str], int] = {}
    load_of: dict[str, dict[str, int | str]] = {}
    for scenario, server in cells:
        results.rounds.setdefault(scenario.name, {}).setdefault(server.name, [])
        load = {**scenario.load, **(QUICK if quick and scenario.kind != "processes" else {})}
        if scenario.kind == "paced":
            results.paced_rate = results.paced_rate or half_load(place, cells)
            load["rate"] = results.paced_rate
        load_of[scenario.name] = load
    for number, turn in enumerate(in_turn(cells, rounds), 1):
        for scenario, server in turn:
            bar.set_postfix_str(f"{scenario.name} {server.name}, round {number}")
            key, figures = (scenario.name, server.name), None
            if failed.get(key, 0) < GIVE_UP_AFTER:
                try:
                    figures = run_once(place, server, scenario, load_of[scenario.name])
                    failed[key] = 0
                except RunFailedError as error:
                    failed[key] = failed.get(key, 0) + 1
                    results.failures.append(f"{scenario.name}, {server.name}: {error}")
            results.rounds[scenario.name][server.name].append(figures)
            bar.update()
