"""One run: a server on one core, a load on another, and the figures that come out of it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.build import ROOT, Environment
from bench.scenarios import Scenario
from bench.servers import Server

Figures = dict[str, float]

PYTHON_PROGRAMS = ROOT / "bench" / "python"
TIME_LIMIT_S = 40  # for one run; the longest takes a few seconds
PROOF_EVERY = 500  # connections, so that a server's backlog is never full
SOURCES = 64  # addresses to connect from, as ports in TIME_WAIT are not free
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h
PROCESS_LIMIT = 8
KIB_PER_CONNECTION = 64  # both ends' share of the kernel's memory, and of both processes, amply


class RunFailedError(Exception):
    """A server or the load failed; the text says how."""


@dataclass(frozen=True)
class Place:
    """Where things run."""

    programs: Path
    environment: Environment | None
    server_core: int
    load_core: int


def cores() -> tuple[int, int]:
    """The server's core and the load's."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


def raise_descriptor_limit() -> int:
    """As many descriptors as are allowed; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def server_command(place: Place, server: Server, scenario: Scenario) -> list[str]:
    """The command line; a server's own options go before the scenario's."""
    options = list(server.options)
    if server.program == "echo_io_uring":
        options += scenario.ring
    if scenario.role in ("udp", "fanout"):
        options.append(f"role={scenario.role}")
    options += scenario.options
    pinned = ["taskset", "-c", str(place.server_core)]
    if not server.in_python:
        return [*pinned, str(place.programs / server.program), *options]
    if place.environment is None:
        raise RunFailedError("no environment was built for it")
    program = str(PYTHON_PROGRAMS / server.program)
    return [*pinned, str(place.environment.python), "-I", program, *options]


def end(process: subprocess.Popen[str], pid: int) -> str:
    """Ends a server by SIGTERM to `pid`, its own; returns what it still printed.

    Told again each second: the bare C servers do not hear a signal that comes just before a wait.
    """
    for _ in range(TIME_LIMIT_S):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=1)[0]
    raise RunFailedError("the server did not end")


@dataclass
class Running:
    """A server that runs, and the port where it listens."""

    process: subprocess.Popen[str]
    port: int

    def stop(self) -> dict[str, float]:
        """Ends it; returns what it counted, if it counts."""
        if self.process.poll() is not None:
            raise RunFailedError(f"the server ended with status {self.process.returncode}")
        reported = end(self.process, self.process.pid)
        counted: dict[str, float] = json.loads(reported) if reported.strip() else {}
        return counted


@contextlib.contextmanager
def started(place: Place, server: Server, scenario: Scenario, port: int = 0) -> Iterator[Running]:
    """A server that listens; it is ended behind the block, whatever happens."""
    command = server_command(place, server, scenario)
    if port:
        command.append(f"port={port}")
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **dict(server.environment)},
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line:
                raise RunFailedError("the server did not start")
            yield Running(process, int(line))
        finally:
            if process.poll() is None:
                process.kill()


def load_command(place: Place, load: dict[str, int | str], running: Running) -> list[str]:
    """The generator's command line."""
    options = {"port": running.port, "pid": running.process.pid, **load}
    given = [f"{name}={value}" for name, value in options.items()]
    return ["taskset", "-c", str(place.load_core), str(place.programs / "load"), *given]


def checked(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the load printed."""
    if process.returncode != 0:
        raise RunFailedError(process.stderr.strip() or f"status {process.returncode}")
    figures: dict[str, Any] = json.loads(process.stdout)
    return figures


def figures_of(loads: list[dict[str, Any]]) -> Figures:
    """The figures of one run from what its generators saw of their servers."""
    messages = sum(load["messages"] for load in loads)
    if messages == 0:
        raise RunFailedError("no message came back")
    cpu_ns = sum(load["server_cpu_ns"] for load in loads)
    seconds = max(load["seconds"] for load in loads)
    return {
        "messages": messages,
        "cpu_us": cpu_ns / 1000 / messages,
        "rate": messages / seconds,
        "busy": cpu_ns / 1e9 / seconds,
        "load_idle": 1 - sum(1 - load["idle"] for load in loads),
        **{name: max(load[name] for load in loads) for name in ("p50_us", "p99_us", "p999_us")},
    }


def run_load(
    place: Place, server: Server, scenario: Scenario, load: dict[str, int | str]
) -> Figures:
    """One server, one generator."""
    with started(place, server, scenario) as running:
        ended = subprocess.run(
            load_command(place, load, running),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIME_LIMIT_S,
        )
        figures = figures_of([checked(ended)])
        counted = running.stop()
    if counted.get("receives") and counted.get("waits"):
        figures["per_wait"] = counted["receives"] / counted["waits"]
    return figures


# Several processes that share a port.


def most_connections() -> tuple[int, int]:
    """How many processes, and how many connections each: what descriptors and memory allow."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The kernel spreads connections by hash: one process gets some hundreds more than another.
    each = min(descriptors - 1500, 60_000)
    text = Path("/proc/meminfo").read_text()
    available_kib = int(text.partition("MemAvailable:")[2].split()[0])
    files = int(Path("/proc/sys/fs/file-max").read_text())
    total = min(available_kib // 2 // KIB_PER_CONNECTION, files // 4)
    return max(1, min(PROCESS_LIMIT, total // each)), min(each, total)


def run_processes(
    place: Place, server: Server, scenario: Scenario, load: dict[str, int | str]
) -> Figures:
    """As many servers as generators; all generators begin at once when all have connected."""
    processes, each = most_connections()
    load = {"connections": each, **load, "wait": 1}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(started(place, server, scenario))]
        for _ in range(1, processes):
            servers.append(stack.enter_context(started(place, server, scenario, servers[0].port)))
        generators = [
            stack.enter_context(
                subprocess.Popen(
                    load_command(place, load, running),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for running in servers
        ]
        try:
            for generator in generators:
                assert generator.stdout is not None
                if generator.stdout.readline() != "ready\n":
                    raise RunFailedError("a generator could not connect")
            for generator in generators:
                assert generator.stdin is not None
                generator.stdin.write("\n")
                generator.stdin.flush()
            ended = [generator.communicate(timeout=TIME_LIMIT_S) for generator in generators]
        finally:
            for generator in generators:
                generator.kill()
        loads = [
            checked(subprocess.CompletedProcess([], generator.returncode, *outputs))
            for generator, outputs in zip(generators, ended, strict=True)
        ]
    return {**figures_of(loads), "connections": processes * float(load["connections"])}


# Memory.


def resident_kib(pid: int) -> int:
    """A process' resident memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


def descriptors_of(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def dial(port: int, number: int) -> socket.socket:
    """A connection, from one of several addresses."""
    sock = socket.socket()
    sock.settimeout(TIME_LIMIT_S)
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((f"127.0.0.{1 + number % SOURCES}", 0))
    sock.connect(("127.0.0.1", port))
    return sock


def prove(sock: socket.socket) -> None:
    """One byte there and back: this connection and those before it are served."""
    sock.sendall(b"x")
    if sock.recv(1) != b"x":
        raise RunFailedError("the first byte did not come back")


def run_memory(place: Place, server: Server, scenario: Scenario) -> Figures:
    """What a server holds for each connection that is idle, and what stays when all are gone."""
    count = scenario.connections
    with started(place, server, scenario) as running:
        pid = running.process.pid
        with dial(running.port, 0) as first:
            prove(first)
            open_before = descriptors_of(pid) - 1
        await_descriptors(pid, open_before)
        before = resident_kib(pid)
        with contextlib.ExitStack() as stack:
            for number in range(count):
                sock = stack.enter_context(dial(running.port, number))
                if number % PROOF_EVERY == PROOF_EVERY - 1 or number == count - 1:
                    prove(sock)
            held = resident_kib(pid)
        await_descriptors(pid, open_before)
        with dial(running.port, 0) as last:  # another turn, in which it may give memory back
            prove(last)
        await_descriptors(pid, open_before)
        after = resident_kib(pid)
    return {"memory_kib": (held - before) / count, "stays_kib": (after - before) / count}


def await_descriptors(pid: int, count: int) -> None:
    """Waits until a server has closed all but so many."""
    deadline = time.monotonic() + TIME_LIMIT_S
    while descriptors_of(pid) > count:
        if time.monotonic() > deadline:
            raise RunFailedError("the server did not close its connections")
        time.sleep(0.02)


# What else the machine did.


def busy_seconds() -> float:
    """What all cores have worked since the start of the machine."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """What this process and its children that have ended worked."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_once(
    place: Place, server: Server, scenario: Scenario, load: dict[str, int | str]
) -> Figures:
    """One run of a server in a scenario; `others` are the cores that others' work took."""
    all_before, own_before, began = busy_seconds(), own_seconds(), time.monotonic()
    if server.fault:
        load = {**load, "check": 0}
    try:
        if scenario.kind == "memory":
            figures = run_memory(place, server, scenario)
        elif scenario.kind == "processes":
            figures = run_processes(place, server, scenario, load)
        else:
            figures = run_load(place, server, scenario, load)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RunFailedError(f"{type(error).__name__}: {error}") from error
    others = busy_seconds() - all_before - (own_seconds() - own_before)
    figures["others"] = max(0.0, others) / (time.monotonic() - began)
    return figures
