"""Measures asyncio-native and its peers side by side, on this machine.

    python -m bench                                  everything: about an hour and a half
    python -m bench --quick                          everything once, to see that it works
    python -m bench echo-64x50 uvloop native         these scenarios, these servers
    python -m bench --list                           what there is
    python -m bench --show bench/results/FILE.json   the tables of an earlier run

The first time it builds the programs and an environment with the peers, in build/bench.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from bench import build, plot, report
from bench.measure import Results, chosen, known_servers, measure
from bench.run import Place, cores, raise_descriptor_limit
from bench.scenarios import SCENARIOS
from bench.servers import SERVERS

LEAST_ROUNDS = 7


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="scenarios, servers, and groups of either")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS)
    parser.add_argument("--quick", action="store_true", help="one short round; no measurement")
    parser.add_argument("--python", default="", help="the interpreter that serves")
    parser.add_argument(
        "--this-python", action="store_true", help="serve by this one, with what is installed here"
    )
    parser.add_argument(
        "--folder", type=Path, default=build.DEFAULT_FOLDER, help="where things are built"
    )
    parser.add_argument("--no-peers", action="store_true", help="install and measure none")
    parser.add_argument("--output", type=Path, help="the JSON file (not with --quick by default)")
    parser.add_argument("--list", action="store_true", help="scenarios and servers")
    parser.add_argument("--show", type=Path, metavar="FILE", help="an earlier run's tables")
    parsed = parser.parse_args(arguments)
    known = known_servers() | {s.name for s in SCENARIOS} | {s.group for s in SCENARIOS}
    if unknown := set(parsed.names) - known:
        parser.error(f"not known: {', '.join(sorted(unknown))}; see --list")
    if parsed.rounds < 1:
        parser.error("--rounds is at least 1")
    return parsed


def print_list() -> None:
    """What there is to measure."""
    for scenario in SCENARIOS:
        print(f"{scenario.name:20} {scenario.title}")
    print()
    for server in SERVERS:
        print(f"{server.name:24} {server.family:8} {' '.join([server.program, *server.options])}")


def file_name() -> Path:
    """Where the results of a run that begins now go."""
    moment = time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime())
    return report.RESULTS / f"{moment}.json"


def write(path: Path, results: Results, environment: build.Environment, quick: bool) -> None:
    """Writes the JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = report.as_json(results, environment, quick)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def draw(path: Path) -> None:
    """The plots beside a JSON file."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (extra `bench`)", file=sys.stderr)
        return
    for sheet in plot.draw(path):
        print(f"drawn: {sheet}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Builds, measures, prints; 1 if a run failed."""
    options = parse(arguments)
    if options.list:
        print_list()
        return 0
    if options.show:
        print(report.all_tables(report.load(options.show)))
        return 0
    rounds = 1 if options.quick else options.rounds
    output = options.output or (None if options.quick else file_name())
    report.commit()  # what is measured, not what is there at the end
    print("building ...", file=sys.stderr, flush=True)
    try:
        build.build_programs(options.folder)
        build.build_native_programs(options.folder)
        if options.this_python:
            environment = build.this_environment()
        else:
            environment = build.build_environment(
                options.python, not options.no_peers, options.folder
            )
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for package, reason in environment.missing.items():
        print(f"without {package}: {reason}", file=sys.stderr)
    raise_descriptor_limit()
    place = Place(options.folder, environment, *cores())
    available = {"asyncio", *environment.packages}
    groups = chosen(options.names, available, not options.no_peers)
    results = Results()
    with tqdm(total=rounds * sum(map(len, groups)), unit="run", disable=None) as bar:
        for cells in groups:
            measure(place, results, cells, rounds, quick=options.quick, bar=bar)
            with tqdm.external_write_mode():
                for scenario in dict.fromkeys(scenario for scenario, _ in cells):
                    print(report.scenario_table(results, scenario), flush=True)
            if output:
                write(output, results, environment, options.quick)
    print(report.goals_table(results))
    for failure in dict.fromkeys(results.failures):
        print(f"failed: {failure}", file=sys.stderr)
    if output:
        print(f"written to {output}", file=sys.stderr)
        draw(output)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
