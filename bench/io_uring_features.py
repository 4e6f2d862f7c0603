"""What each feature of io_uring brings a TCP server on loopback: its CPU time for each message.

    python -m bench.io_uring_features [GROUP ...] [--quick] [--rounds 7] [--json FILE]

Builds the C programs of `bench/c` and runs them, the server on one core and the load on another.
All variants of a group run once in each round, in an order that moves on from round to round; a
variant's ratio is taken to the base of the same round. Printed are the medians with their
quartiles. CPU time is that of all threads of the server, from /proc/PID/task/*/schedstat. Without a
group, all run. `--quick` shows in two minutes that everything works; its figures are no
measurement. A run counts little when others worked beside it (the last column: cores they took),
when the server was not busy, or when it ran out of provided buffers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import build
from bench.measure import Spread
from bench.report import shown
from bench.run import (
    TIME_LIMIT_S,
    RunFailedError,
    busy_seconds,
    cores,
    end,
    own_seconds,
    raise_descriptor_limit,
)

FILE_MIB = 64


@dataclass(frozen=True)
class Variant:
    """A server with its options."""

    name: str
    options: str = ""
    program: str = "echo_io_uring"


@dataclass(frozen=True)
class Workload:
    """What the load does; `buffers` are what suits it, if a variant does not set them itself."""

    name: str
    options: str
    buffers: str = "buffer=4096 buffers=2048"
    unit: str = "message"


@dataclass(frozen=True)
class Group:
    """Variants that are compared, the first of them the base."""

    name: str
    title: str
    workloads: tuple[Workload, ...]
    variants: tuple[Variant, ...]


@dataclass
class Result:
    """What the rounds of one variant under one workload gave."""

    cpu_us: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    load_idle: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)
    per_wait: list[float] = field(default_factory=list)
    out_of_buffers: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


LARGE = "buffer=262144 buffers=64"
LARGE_HELD = "buffer=262144 buffers=256"  # a send in the ring holds its buffer
W64 = Workload("64 B x 50", "size=64 connections=50")
W64_1000 = Workload("64 B x 1,000", "size=64 connections=1000")
W64_8000 = Workload("64 B x 8,000", "size=64 connections=8000 ms=700 warm_up_ms=200")
W16K = Workload("16 KiB x 50", "size=16384 connections=50", "buffer=16384 buffers=256")
W256K = Workload("256 KiB x 50", "size=262144 connections=50 ms=600", LARGE)
W64_8000_HELD = Workload(W64_8000.name, W64_8000.options, "buffer=512 buffers=16384")
W256K_HELD = Workload(W256K.name, W256K.options, LARGE_HELD)
ALL = (W64, W64_1000, W64_8000, W16K, W256K)
SMALL = (W64, W64_1000, W64_8000)
BASE = Variant("base")
READY = "receive=poll buffer=262144"


def paced(rate: int, size: str, connections: int, buffers: str) -> Workload:
    """Messages that start at even distances."""
    name = f"{size} B x {connections}, {rate:,}/s"
    return Workload(name, f"size={size} connections={connections} rate={rate} ms=1500", buffers)


def download(clients: int) -> Workload:
    """A file to that many readers at once."""
    size = FILE_MIB * 1024 * 1024
    options = f"mode=download size={size} connections={clients} ms=30000"
    return Workload(f"{FILE_MIB} MiB x {clients}", options, unit="MiB")


GROUPS = (
    Group(
        "receive",
        "h. Receive memory",
        ALL,
        (
            Variant("ring 4 KiB x 1024", "buffer=4096 buffers=1024"),
            Variant("ring 16 KiB x 256", "buffer=16384 buffers=256"),
            Variant("ring 64 KiB x 64", "buffer=65536 buffers=64"),
            Variant("ring 256 KiB x 64", "buffer=262144 buffers=64"),
            Variant("ring 256 KiB x 8", "buffer=262144 buffers=8"),
            Variant("incremental 1 MiB x 16", "buffer=1048576 buffers=16 incremental=1"),
            Variant("incremental 1 MiB x 2", "buffer=1048576 buffers=2 incremental=1"),
            Variant("one-shot recv, ring 16 KiB x 256", "receive=oneshot buffer=16384 buffers=256"),
            Variant("one-shot poll + recv(2) 256 KiB", READY),
            Variant("multishot poll + recv(2) 256 KiB", "receive=poll_multishot buffer=262144"),
            Variant("epoll + recv(2) 256 KiB", program="echo_epoll"),
        ),
    ),
    Group(
        "copy",
        "h. A copy of each message out of the ring's buffer",
        (
            W64,
            Workload("1 KiB x 50", "size=1024 connections=50"),
            Workload("4 KiB x 50", "size=4096 connections=50"),
        ),
        (Variant("in place"), Variant("copied", "copy=1")),
    ),
    Group(
        "concurrency",
        "i. How the kernel hands work to the thread",
        ALL,
        (
            Variant("SINGLE_ISSUER, DEFER_TASKRUN"),
            Variant("COOP_TASKRUN", "concurrency=coop"),
            Variant("COOP_TASKRUN, TASKRUN_FLAG", "concurrency=coop_flag"),
            Variant("COOP_TASKRUN, SINGLE_ISSUER", "concurrency=coop_single"),
            Variant("nothing", "concurrency=none"),
        ),
    ),
    Group(
        "file",
        f"j. A file of {FILE_MIB} MiB",
        (download(1), download(50)),
        (
            Variant("sendfile(2) + POLLOUT", "way=sendfile", "file_server"),
            Variant("splice through a pipe, linked", "way=splice", "file_server"),
        ),
    ),
    Group("epoll", "a. epoll", ALL, (BASE, Variant("epoll", program="echo_epoll"))),
    Group(
        "registered",
        "b. Registered ring, no index array",
        ALL,
        (
            BASE,
            Variant("registered ring", "registered_ring=1"),
            Variant("NO_SQARRAY", "no_sqarray=1"),
            Variant("both", "registered_ring=1 no_sqarray=1"),
        ),
    ),
    Group(
        "files",
        "c. Registered files, direct descriptors",
        ALL,
        (
            BASE,
            Variant("registered files", "files=registered"),
            Variant("plain, sends as entries", "send=entry"),
            Variant("registered, sends as entries", "files=registered send=entry"),
            Variant("direct, sends as entries", "files=direct send=entry"),
            Variant("plain, entries skipping success", "send=skip"),
            Variant("direct, entries skipping success", "files=direct send=skip"),
        ),
    ),
    Group(
        "send",
        "d, e. Sends as entries; bundles; poll first",
        ALL,
        (
            BASE,
            Variant("entry with completion", "send=entry"),
            Variant("entry, CQE_SKIP_SUCCESS", "send=skip"),
            Variant("entry, POLL_FIRST on the send", "send=entry send_poll_first=1"),
            Variant("receive bundle", "bundle=1"),
            Variant("POLL_FIRST on the receive", "receive_poll_first=1"),
            Variant("one-shot recv", "receive=oneshot"),
            Variant("one-shot recv, POLL_FIRST", "receive=oneshot receive_poll_first=1"),
        ),
    ),
    Group(
        "held",
        "d, e. The same with a buffer for each connection",
        (W64_8000_HELD,),
        (
            BASE,
            Variant("entry with completion", "send=entry"),
            Variant("entry, CQE_SKIP_SUCCESS", "send=skip"),
            Variant("entry, POLL_FIRST on the send", "send=entry send_poll_first=1"),
        ),
    ),
    Group(
        "bundle",
        "e. Bundles of small buffers",
        (W16K, W256K),
        (
            Variant("ring 4 KiB x 1024", "buffer=4096 buffers=1024"),
            Variant("the same, bundles", "buffer=4096 buffers=1024 bundle=1"),
            Variant("ring 16 KiB x 256", "buffer=16384 buffers=256"),
            Variant("the same, bundles ", "buffer=16384 buffers=256 bundle=1"),
        ),
    ),
    Group(
        "zerocopy",
        "f. SEND_ZC",
        (W16K, W256K_HELD),
        (BASE, Variant("SEND", "send=entry"), Variant("SEND_ZC", "send=zerocopy")),
    ),
    Group(
        "wait",
        "g. Waiting for more than one completion",
        (
            *SMALL,
            paced(100_000, "64", 50, W64.buffers),
            paced(100_000, "64", 1000, W64.buffers),
            paced(20_000, "64", 50, W64.buffers),
        ),
        (
            BASE,
            Variant("minimum wait 20 us, 8", "min_wait_us=20 wait_count=8"),
            Variant("minimum wait 50 us, 32", "min_wait_us=50 wait_count=32"),
            Variant("minimum wait 200 us, 64", "min_wait_us=200 wait_count=64"),
            Variant("32 or 50 us", "wait_us=50 wait_count=32"),
            Variant("64 or 200 us", "wait_us=200 wait_count=64"),
            Variant("epoll", program="echo_epoll"),
        ),
    ),
    Group(
        "cycles",
        "k. Connect, one echo, close",
        (Workload("64 B x 50 cycles", "mode=cycles size=64 connections=50", unit="cycle"),),
        (
            Variant("multishot accept"),
            Variant("readiness + accept4", "accept=readiness"),
            Variant("direct, entries skipping success", "files=direct send=skip"),
            Variant("multishot accept, one-shot poll + recv(2)", READY),
            Variant("epoll", program="echo_epoll"),
        ),
    ),
)


def options_of(variant: Variant, workload: Workload) -> list[str]:
    """The server's options: the variant's own go before the workload's."""
    chosen = dict(option.split("=") for option in variant.options.split())
    if variant.program == "echo_io_uring":
        for option in workload.buffers.split():
            chosen.setdefault(*option.split("="))
        if chosen.get("receive", "ring").startswith("poll"):
            chosen.pop("buffers", None)
    return [f"{name}={value}" for name, value in chosen.items()]


def run_once(
    folder: Path, variant: Variant, workload: Workload, quick: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """One run: what the load and the server report, with the share of others' work beside it."""
    all_before, own_before, began = busy_seconds(), own_seconds(), time.monotonic()
    server_core, load_core = map(str, cores())
    server = subprocess.Popen(
        ["taskset", "-c", server_core, folder / variant.program, *options_of(variant, workload)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        options = [f"port={port}", f"pid={server.pid}", *workload.options.split()]
        if quick and "download" not in workload.options:
            options[2:2] = ["ms=150", "warm_up_ms=50"]
        load = subprocess.run(
            ["taskset", "-c", load_core, folder / "load", *options],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=TIME_LIMIT_S,
        )
        reported = end(server, server.pid)
        others = busy_seconds() - all_before - (own_seconds() - own_before)
        figures = json.loads(load.stdout)
        figures["others"] = max(0.0, others) / (time.monotonic() - began)
        return figures, json.loads(reported)
    except (subprocess.SubprocessError, RunFailedError, ValueError) as error:
        raise SystemExit(f"{variant.name} under {workload.name} failed: {error}") from error
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def add(result: Result, unit: str, load: dict[str, float], server: dict[str, float]) -> None:
    """Enters a run into a variant's results."""
    count = load["bytes"] / 2**20 if unit == "MiB" else load["messages"]
    result.cpu_us.append(load["server_cpu_ns"] / 1000 / count)
    result.rate.append(count / load["seconds"])
    result.busy.append(load["server_cpu_ns"] / 1e9 / load["seconds"])
    result.load_idle.append(load["idle"])
    result.p50_us.append(load["p50_us"])
    result.p99_us.append(load["p99_us"])
    result.seconds.append(load["seconds"])
    result.others.append(load["others"])
    if server.get("receives") and server.get("waits"):
        result.out_of_buffers.append(server["out_of_buffers"] / server["receives"])
        result.per_wait.append(server["receives"] / server["waits"])


def measure(
    folder: Path, group: Group, workload: Workload, rounds: int, quick: bool
) -> dict[str, Result]:
    """All rounds of a group under one workload."""
    results = {variant.name: Result() for variant in group.variants}
    for turn in range(rounds):
        shift = turn % len(group.variants)
        for variant in group.variants[shift:] + group.variants[:shift]:
            if sys.stderr.isatty():
                where = f"{group.name}, {workload.name}, round {turn + 1} of {rounds}"
                print(f"\r\x1b[K{where}: {variant.name}", end="", file=sys.stderr, flush=True)
            load, server = run_once(folder, variant, workload, quick)
            add(results[variant.name], workload.unit, load, server)
        base = results[group.variants[0].name]
        for result in results.values():
            result.ratio.append(result.cpu_us[-1] / base.cpu_us[-1])
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return results


def spread(values: list[float], digits: int) -> str:
    """The median, and the quartiles in brackets."""
    return shown(Spread.of(values), digits)


def table(workload: Workload, results: dict[str, Result]) -> str:
    """A Markdown table."""
    unit = workload.unit
    lines = [
        f"**{workload.name}**",
        "",
        f"| variant | µs CPU a {unit} | ratio to the first | {unit}s/s | server busy "
        "| p50 µs | p99 µs | receives a wait | ENOBUFS a receive | others' cores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        median = statistics.median
        per_wait = f"{median(result.per_wait):.1f}" if result.per_wait else ""
        starved = f"{median(result.out_of_buffers):.2f}" if result.out_of_buffers else ""
        lines.append(
            f"| {name} | {spread(result.cpu_us, 2)} | {spread(result.ratio, 3)} "
            f"| {median(result.rate):,.0f} | {median(result.busy):.0%} "
            f"| {median(result.p50_us):,.0f} | {median(result.p99_us):,.0f} | {per_wait} "
            f"| {starved} | {median(result.others):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the groups that were named."""
    names = [group.name for group in GROUPS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two short rounds of everything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rounds' figures")
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(names)
    if unknown:
        parser.error(f"no group is called {', '.join(sorted(unknown))}")
    rounds = 2 if arguments.quick else max(arguments.rounds, 2)
    machine = {"kernel": platform.release(), "machine": platform.machine(), "cores": os.cpu_count()}
    recorded: dict[str, Any] = {"machine": machine, "rounds": rounds, "groups": {}}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    build.build_programs()
    raise_descriptor_limit()
    for group in GROUPS:
        if arguments.groups and group.name not in arguments.groups:
            continue
        print(f"\n### {group.title}\n", flush=True)
        for workload in group.workloads:
            results = measure(build.DEFAULT_FOLDER, group, workload, rounds, arguments.quick)
            print(table(workload, results) + "\n", flush=True)
            figures = {variant: vars(result) for variant, result in results.items()}
            recorded["groups"].setdefault(group.name, {})[workload.name] = figures
            if arguments.json:
                arguments.json.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
