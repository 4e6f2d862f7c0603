"""What was measured, as tables for the terminal and as JSON for later."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import servers
from bench.build import ROOT, Environment
from bench.goals import judge
from bench.measure import Results, Spread
from bench.scenarios import Scenario, by_name

RESULTS = ROOT / "bench" / "results"
NOT_BUSY = 0.9  # below this share of its core a server was not the bottleneck
LOAD_IDLE = 0.03  # a generator with less idle time may have been it
PACE_KEPT = 0.97  # of the messages a second that were asked for
FIGURES = (
    *("cpu_us", "rate", "busy", "load_idle", "p50_us", "p99_us", "p999_us"),
    *("memory_kib", "stays_kib", "connections", "per_wait", "others"),
)


def shown(spread: Spread | None, digits: int = 2) -> str:
    """The median, and the quartiles in brackets."""
    if spread is None:
        return "failed"
    if digits == 0:
        return f"{spread.median:,.0f} ({spread.low:,.0f} to {spread.high:,.0f})"
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table, its columns aligned so that it reads well as text, too."""
    lines = [header, ["---"] * len(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "| "
        + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def called(server: str) -> str:
    """A server's name in tables; one that is at fault is marked."""
    return f"{server} *" if servers.by_name(server).fault else server


def header_of(scenario: Scenario, peer: str | None) -> list[str]:
    """The columns' names; the scenario's own figure comes first."""
    if scenario.kind == "memory":
        return ["server", "KiB a connection", "least", "KiB that stay", "others' cores"]
    own = {
        "cpu_us": f"µs CPU a {scenario.unit}",
        "rate": f"{scenario.units}/s",
        "p99_us": "p99 µs",
    }
    rest = [name for figure, name in own.items() if figure != scenario.figure]
    return [
        "server",
        own[scenario.figure],
        "most" if scenario.figure == "rate" else "least",
        f"ratio to {peer}" if peer else "ratio",
        *rest,
        "p50 µs",
        "p99.9 µs",
        "busy",
        "load idle",
        "others' cores",
    ]


def marked(scenario: Scenario, figure: str, spread: Spread, wanted: float) -> str:
    """A share or a rate; one that makes the run doubtful has a mark."""
    text = f"{spread.median:,.0f}" if figure == "rate" else f"{spread.median:.0%}"
    paced = scenario.kind == "paced"
    # Where nothing is to be saturated, what counts is that the load's pace was kept.
    doubtful = spread.median < wanted and paced == (figure == "rate")
    return f"{text} !" if doubtful else text


def row_of(results: Results, scenario: Scenario, server: str, peer: str | None) -> list[str]:
    """A server's line."""
    spreads = {
        figure: spread
        for figure in FIGURES
        if (spread := results.spread(scenario.name, server, figure)) is not None
    }
    if not spreads:
        return [called(server), "failed", *[""] * (len(header_of(scenario, peer)) - 2)]
    others = f"{spreads['others'].median:.2f}"
    if scenario.kind == "memory":
        held, stays = spreads["memory_kib"], spreads["stays_kib"]
        return [called(server), shown(held), f"{held.least:.2f}", shown(stays), others]
    own = spreads[scenario.figure]
    digits = 2 if scenario.figure == "cpu_us" else 0
    least = own.most if scenario.figure == "rate" else own.least
    ratio = None
    if peer:
        ratio = results.ratio((scenario.name, server), (scenario.name, peer), scenario.figure)
    rest = {
        "cpu_us": f"{spreads['cpu_us'].median:.2f}",
        "rate": marked(scenario, "rate", spreads["rate"], results.paced_rate * PACE_KEPT),
        "p99_us": f"{spreads['p99_us'].median:,.0f}",
    }
    return [
        called(server),
        shown(own, digits),
        f"{least:,.{digits}f}",
        shown(ratio, 3) if ratio else "",
        *(text for figure, text in rest.items() if figure != scenario.figure),
        f"{spreads['p50_us'].median:,.0f}",
        f"{spreads['p999_us'].median:,.0f}",
        marked(scenario, "busy", spreads["busy"], NOT_BUSY),
        ""
        if scenario.kind == "paced"
        else marked(scenario, "idle", spreads["load_idle"], LOAD_IDLE),
        others,
    ]


def scenario_table(results: Results, scenario: Scenario) -> str:
    """All servers of one scenario; ratios are to the best peer, by the scenario's own figure."""
    names = list(results.rounds[scenario.name])
    peer = results.best_peer(scenario.name, scenario.figure)
    if peer is None and scenario.kind != "memory":
        peer = names[0]
    rows = [row_of(results, scenario, name, peer) for name in names]
    faults = {servers.by_name(name).fault for name in names} - {""}
    notes = "".join(f"\n\\* {fault}: it is measured, but not compared with.\n" for fault in faults)
    rate = f" ({results.paced_rate:,}/s)" if scenario.kind == "paced" else ""
    return f"### {scenario.title}{rate}\n\n{markdown(header_of(scenario, peer), rows)}\n{notes}"


def goals_table(results: Results) -> str:
    """Which goals were reached; empty when nothing that belongs to one was measured."""
    rows = []
    for verdict in judge(results):
        goal, measured = verdict.goal, verdict.measured
        peer = verdict.peer or "-"
        if goal.peer_scenario:
            peer += f" in {goal.peer_scenario}"
        sign = "≥" if goal.at_least else "≤"
        rows.append(
            [
                goal.scenario,
                goal.what,
                goal.server,
                peer,
                f"{sign} {goal.limit:.2f}",
                shown(measured, 3),
                str(measured.rounds),
                "reached" if verdict.reached else "NOT REACHED",
            ]
        )
    header = ["scenario", "figure", "server", "against", "goal", "measured", "rounds", ""]
    return f"### Goals\n\n{markdown(header, rows)}\n" if rows else ""


@functools.cache
def commit() -> str:
    """The commit of this checkout when first asked; with a plus when it was changed since."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """Where it was measured."""
    processor = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
    }


def as_json(results: Results, environment: Environment | None, quick: bool) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "quick": quick,
        "machine": machine(),
        "python": environment.version if environment else None,
        "packages": environment.packages if environment else {},
        "missing": environment.missing if environment else {},
        "paced_rate": results.paced_rate,
        "failures": results.failures,
        "goals": [
            {
                "scenario": verdict.goal.scenario,
                "figure": verdict.goal.figure,
                "server": verdict.goal.server,
                "against": verdict.peer,
                "against_scenario": verdict.goal.peer_scenario or verdict.goal.scenario,
                "at_least": verdict.goal.at_least,
                "limit": verdict.goal.limit,
                "measured": asdict(verdict.measured),
                "reached": verdict.reached,
            }
            for verdict in judge(results)
        ],
        "medians": {
            name: {
                server: medians
                for server in servers
                if (medians := medians_of(results, name, server))
            }
            for name, servers in results.rounds.items()
        },
        "rounds": results.rounds,
    }


def medians_of(results: Results, scenario: str, server: str) -> dict[str, Any]:
    """Each figure's spread."""
    spreads = {figure: results.spread(scenario, server, figure) for figure in FIGURES}
    return {figure: asdict(spread) for figure, spread in spreads.items() if spread is not None}


def load(path: Path) -> Results:
    """The rounds of a file."""
    data = json.loads(path.read_text())
    return Results(data["rounds"], data["failures"], data["paced_rate"])


def all_tables(results: Results) -> str:
    """All scenarios that were measured, then the goals."""
    tables = [scenario_table(results, by_name(name)) for name in results.rounds]
    return "\n".join([*tables, goals_table(results)])
