"""Draws the results of a run as SVG files that stand beside its JSON file.

python -m bench.plot bench/results/FILE.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench import scenarios, servers
from bench.measure import Results, Spread
from bench.report import load
from bench.scenarios import Scenario

#: What stands on one sheet.
SHEETS = {
    "echo": ("echo-64x50", "echo-64x1000", "echo-64x9000", "echo-16k", "echo-256k"),
    "more": ("cycles", "udp", "fanout", "busy", "latency", "memory"),
}
COLORS = {
    "c": "#9a9a9a",
    "capi": "#1f6f8b",
    "cython": "#3f9e8f",
    "native": "#e07a1f",
    "peer": "#b9c7d1",
}
MEANING = {
    "c": "bare C",
    "capi": "C on asyncio-native",
    "cython": "Cython on asyncio-native",
    "native": "Python on asyncio-native",
    "peer": "Python on an event loop",
}
LABELS = {
    "cpu_us": "µs CPU a {unit}",
    "rate": "{units} a second (more is better)",
    "p99_us": "µs, 99 of 100 took less",
    "memory_kib": "KiB a {unit}",
}
COLUMNS = 3
INCHES_WIDE, INCHES_A_BAR, INCHES_AROUND = 4.2, 0.22, 1.1


def spreads_of(results: Results, scenario: Scenario) -> dict[str, Spread]:
    """Each server's figure, the best one first; those at fault are left out."""
    found = {
        name: spread
        for name in results.rounds.get(scenario.name, {})
        if not servers.by_name(name).fault
        and (spread := results.spread(scenario.name, name, scenario.figure)) is not None
    }
    more_is_better = scenario.figure == "rate"
    return dict(sorted(found.items(), key=lambda item: item[1].median, reverse=more_is_better))


def draw_panel(axes: Any, scenario: Scenario, spreads: dict[str, Spread]) -> None:
    """One scenario: a bar for each server, with its quartiles."""
    names = list(spreads)
    medians = [spread.median for spread in spreads.values()]
    low = [max(0.0, spread.median - spread.low) for spread in spreads.values()]
    high = [max(0.0, spread.high - spread.median) for spread in spreads.values()]
    colors = [COLORS[servers.by_name(name).family] for name in names]
    error = {"elinewidth": 0.8, "ecolor": "#333333"}
    axes.barh(names, medians, xerr=[low, high], color=colors, height=0.72, error_kw=error)
    axes.invert_yaxis()
    axes.set_title(scenario.title, fontsize=8, loc="left")
    label = LABELS[scenario.figure].format(unit=scenario.unit, units=scenario.units)
    axes.set_xlabel(label, fontsize=7)
    axes.tick_params(labelsize=6.5)
    axes.spines[["top", "right"]].set_visible(False)


def draw_sheet(path: Path, results: Results, names: tuple[str, ...]) -> bool:
    """One file with a panel for each of these scenarios; false if none was measured."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "path"})
    panels = [(scenarios.by_name(name), results) for name in names]
    drawn = [(scenario, spreads_of(results, scenario)) for scenario, results in panels]
    drawn = [(scenario, spreads) for scenario, spreads in drawn if spreads]
    if not drawn:
        return False
    columns = min(COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    bars = max(len(spreads) for _, spreads in drawn)
    size = (INCHES_WIDE * columns, rows * (INCHES_AROUND + INCHES_A_BAR * bars))
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    cells = list(grid.flat)
    for axes, (scenario, spreads) in zip(cells, drawn, strict=False):
        draw_panel(axes, scenario, spreads)
    for axes in cells[len(drawn) :]:
        axes.set_visible(False)
    patches = [Patch(color=color, label=MEANING[family]) for family, color in COLORS.items()]
    figure.legend(handles=patches, loc="lower right", fontsize=7, frameon=False, ncols=len(COLORS))
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def draw(path: Path) -> list[Path]:
    """All sheets of a JSON file; returns those that were written."""
    results = load(path)
    sheets = {path.with_name(f"{path.stem}-{name}.svg"): names for name, names in SHEETS.items()}
    return [sheet for sheet, names in sheets.items() if draw_sheet(sheet, results, names)]


def main() -> None:
    """Draws the files that were named."""
    if len(sys.argv) < 2:
        raise SystemExit("python -m bench.plot FILE.json ...")
    for name in sys.argv[1:]:
        for sheet in draw(Path(name)):
            print(sheet)


if __name__ == "__main__":
    main()
