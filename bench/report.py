"""What was measured, as tables for the terminal and as JSON for later."""

from __future__ import annotations

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
from bench.measure import NOT_BUSY, Results, Spread
from bench.scenarios import UNITS, Scenario, by_name

RESULTS = ROOT / "bench" / "results"
LOAD_NOT_IDLE = 0.03  # a generator without idle time may be the bottleneck


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
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def header_of(scenario: Scenario, peer: str | None) -> list[str]:
    """The columns' names."""
    if scenario.kind == "memory":
        return ["server", "KiB a connection", "least", "KiB that stay"]
    ratio = f"ratio to {peer}" if peer else "ratio"
    shared = [f"{scenario.unit}s/s", "busy", "load idle", "p50 µs", "p99 µs", "p99.9 µs"]
    return ["server", f"µs CPU a {scenario.unit}", "least", ratio, *shared, "others' cores"]


def called(server: str) -> str:
    """A server's name in tables; one that is at fault is marked."""
    return f"{server} *" if servers.by_name(server).fault else server


def row_of(results: Results, scenario: Scenario, server: str, peer: str | None) -> list[str]:
    """A server's line."""
    name = scenario.name

    def median(figure: str, form: str) -> str:
        spread = results.spread(name, server, figure)
        return "" if spread is None else format(spread.median, form)

    if scenario.kind == "memory":
        memory = results.spread(name, server, "memory_kib")
        least = "" if memory is None else f"{memory.least:.2f}"
        return [called(server), shown(memory), least, shown(results.spread(name, server, "stays_kib"))]
    cpu = results.spread(name, server, "cpu_us")
    if cpu is None:
        return [called(server), "failed", *[""] * 9]
    figure = "cpu_us" if scenario.kind == "paced" else scenario.figure
    ratio = results.ratio((name, server), (name, peer), figure) if peer else None
    busy = results.spread(name, server, "busy")
    mark = " !" if scenario.kind != "paced" and busy and busy.median < NOT_BUSY else ""
    idle = results.spread(name, server, "load_idle")
    load_mark = " !" if scenario.kind != "paced" and idle and idle.median < LOAD_NOT_IDLE else ""
    return [
        called(server),
        shown(cpu),
        f"{cpu.least:.2f}",
        "" if ratio is None else shown(ratio, 3),
        median("rate", ",.0f"),
        median("busy", ".0%") + mark,
        "" if scenario.kind == "paced" else median("load_idle", ".0%") + load_mark,
        *(median(latency, ",.0f") for latency in ("p50_us", "p99_us", "p999_us")),
        median("others", ".2f"),
    ]


def scenario_table(results: Results, scenario: Scenario) -> str:
    """All servers of one scenario; ratios are to the best peer, by the scenario's own figure."""
    figure = "cpu_us" if scenario.kind == "paced" else scenario.figure
    names = list(results.rounds[scenario.name])
    peer = results.best_peer(scenario.name, figure)
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


def commit() -> str:
    """The commit of this checkout; with a plus when something was changed since."""
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
    figures = ["cpu_us", "rate", "busy", "load_idle", "p50_us", "p99_us", "p999_us", *UNITS]
    spreads = {
        figure: results.spread(scenario, server, figure) for figure in dict.fromkeys(figures)
    }
    return {figure: asdict(spread) for figure, spread in spreads.items() if spread is not None}


def load(path: Path) -> Results:
    """The rounds of a file."""
    data = json.loads(path.read_text())
    return Results(data["rounds"], data["failures"], data["paced_rate"])


def all_tables(results: Results) -> str:
    """All scenarios that were measured, then the goals."""
    tables = [scenario_table(results, by_name(name)) for name in results.rounds]
    return "\n".join([*tables, goals_table(results)])
