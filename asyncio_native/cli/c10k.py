"""``asyncio-native c10k``: ten thousand clients at once against the echo server, on this machine.

The server runs in a process of its own, the clients in one or more others; this process only gives
the orders, counts and reports. All clients connect and stay connected; then each sends its messages
one after the other, the next when the last has come back whole, every byte compared; at the end
each half-closes and must see the end of the stream. Each of these phases has a deadline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing.connection
import signal
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeAlias, TypeVar

from .c10k_board import (
    CONTEXT,
    Board,
    Column,
    CpuTime,
    Failed,
    Listening,
    Order,
    Phase,
    PhaseEnded,
    Ready,
)
from .c10k_client import Task, work
from .c10k_server import serve
from .common import (
    PROGRAM,
    CommandError,
    Subparsers,
    add_backend_argument,
    choose_backend,
    counted,
    seconds,
    whole_number,
)
from .progress import Progress
from .system import (
    backlog_limit,
    ephemeral_ports,
    loopback_addresses,
    processors,
    raise_descriptor_limit,
    resident_bytes,
    scheduled_seconds,
)

DESCRIPTORS_RESERVED = 64
"""For what a process has open besides connections: standard streams, pipes, the port's own."""

CONNECTING_TOP = 1024
"""Connections that may wait for the server at once, where the system's backlog allows more."""

PORTS_QUICK_SHARE = 0.5
"""Of one source address' ports. Linux gives every second port first; the others it has to look for,
and connecting slows down tenfold: then another address is taken where there is one."""

PORTS_USABLE_SHARE = 0.9
"""Of one source address' ports where there is no other; some are in use by what else runs."""

PROCESSES_BY_DEFAULT = 4
"""More generate no more load than one server in Python can take."""

START_SECONDS = 60.0
"""For a new interpreter to be ready."""

GRACE_SECONDS = 10.0
"""Client processes keep the deadlines themselves; one that is so much later is ended."""

STOP_SECONDS = 5.0
"""For a process to end when it is told to."""

LAST_MOMENTS_SECONDS = 2.0
"""For a server that may be dying, to tell its death from mere errors, also on a busy machine."""

TICK_SECONDS = 0.1
"""How often the progress bar moves."""

ServerMain: TypeAlias = Callable[[Connection, Board, str], None]
Answer = TypeVar("Answer")


def add_parser(subparsers: Subparsers) -> None:
    """Declares the command's arguments."""
    parser = subparsers.add_parser(
        "c10k",
        help="measure an echo server with ten thousand clients",
        description="Runs an echo server and its clients in separate processes of this machine, "
        "compares every byte and reports. The exit status is 1 if a byte or a client was lost.",
    )
    parser.add_argument(
        "--clients",
        type=whole_number(1, 1_000_000),
        default=10_000,
        help="connections open at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--messages",
        type=whole_number(1, 1_000_000),
        default=20,
        help="messages that each client sends (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=whole_number(1, 1 << 24),
        default=64,
        help="bytes of a message (default: %(default)s)",
    )
    add_backend_argument(parser)
    parser.add_argument(
        "--processes",
        type=whole_number(1, 64),
        help="client processes at least (default: one, more on more than two processors); "
        "more are used where the limit of open files asks for it",
    )
    parser.add_argument(
        "--timeout",
        type=seconds(0.1, 86_400),
        default=60.0,
        metavar="SECONDS",
        help="for each phase: connecting, messages, finishing; a client that is not done by then "
        "is lost (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, server_main: ServerMain = serve) -> int:
    """Measures and prints the report.

    server_main: what the server process runs; another than our own only to test the clients.
    """
    plan = make_plan(arguments)
    result = measure(plan, server_main)
    if arguments.json:
        print(json.dumps(report_object(plan, result), indent=2))
    else:
        print(report_text(plan, result))
    return 0 if result.nothing_lost(plan) else 1


@dataclass(frozen=True)
class Plan:
    """What will be run: what was asked for, less what this machine does not allow."""

    backend: str
    clients_requested: int
    clients: int
    messages: int
    size: int
    processes: int
    source_addresses: int
    connecting: int
    timeout: float
    reduced: tuple[str, ...] = ()


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Fits the wish to the limits, and raises that of descriptors for this and later processes."""
    backend = choose_backend(arguments.backend)
    wanted = arguments.clients
    clients = wanted
    reduced = []

    descriptors = raise_descriptor_limit(clients + DESCRIPTORS_RESERVED)
    per_process = max(1, descriptors - DESCRIPTORS_RESERVED)
    if clients > per_process:
        clients = per_process
        reduced.append(
            f"{counted(clients, 'client')} instead of {wanted:,}: the server may open only "
            f"{descriptors} files (raise it with: ulimit -n {wanted + DESCRIPTORS_RESERVED}, "
            "as root if it is refused)"
        )

    ports = ephemeral_ports()
    sources = min(loopback_addresses(), math.ceil(clients / (ports * PORTS_QUICK_SHARE)))
    reachable = sources * max(1, int(ports * PORTS_USABLE_SHARE))
    if clients > reachable:
        reduced.append(
            f"{counted(reachable, 'client')} instead of {clients:,}: {sources} loopback "
            f"{'address' if sources == 1 else 'addresses'} of {ports} local ports "
            "(widen it, on Linux with: sysctl -w net.ipv4.ip_local_port_range='1024 65535')"
        )
        clients = reachable

    processes = arguments.processes or min(PROCESSES_BY_DEFAULT, max(1, processors() - 1))
    processes = min(clients, max(processes, math.ceil(clients / per_process)))

    backlog = backlog_limit()
    connecting = max(1, min(CONNECTING_TOP, backlog // processes))
    if backlog < min(CONNECTING_TOP, clients):
        reduced.append(
            f"at most {connecting} connections wait to be accepted at once: "
            f"the system's listen backlog is {backlog} "
            "(raise it, on Linux with: sysctl -w net.core.somaxconn=4096)"
        )
    return Plan(
        backend=backend,
        clients_requested=wanted,
        clients=clients,
        messages=arguments.messages,
        size=arguments.size,
        processes=processes,
        source_addresses=sources,
        connecting=connecting,
        timeout=arguments.timeout,
        reduced=tuple(reduced),
    )


@dataclass
class Result:
    """What was measured. Times in seconds, memory in bytes; None where the system does not tell."""

    connections: int = 0
    connect_seconds: float = 0.0
    echoed: int = 0
    message_seconds: float = 0.0
    latency_p50: float | None = None
    latency_p99: float | None = None
    latency_max: float | None = None
    finished: int = 0
    memory_before: int | None = None
    memory_connected: int | None = None
    cpu_seconds: float | None = None
    cpu_source: str | None = None
    errors: Counter[str] = field(default_factory=Counter)

    def nothing_lost(self, plan: Plan) -> bool:
        """True if every client saw every byte of every message and the end of its stream."""
        whole = self.finished == plan.clients and self.echoed == plan.clients * plan.messages
        return whole and not self.errors

    @property
    def memory_per_connection(self) -> float | None:
        """Resident bytes that the server needs more with all connected, for each connection."""
        if self.memory_before is None or self.memory_connected is None or not self.connections:
            return None
        return (self.memory_connected - self.memory_before) / self.connections


class Child:
    """A process of ours: orders go to it, answers come back, and its death is noticed."""

    def __init__(self, name: str, main: Callable[..., None], *arguments: object) -> None:
        self.name = name
        self.connection, far_end = CONTEXT.Pipe()
        self._process: BaseProcess = CONTEXT.Process(
            target=main, args=(far_end, *arguments), name=name, daemon=True
        )
        with _interrupt_blocked():
            self._process.start()
        # Only the child holds the far end now: its end is the end of the stream here.
        far_end.close()
        self.listens = True

    @property
    def process_id(self) -> int:
        """The system's number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """False once it has ended."""
        return self._process.is_alive()

    def order(self, order: Phase | Order) -> None:
        """Tells it what to do; nothing happens if it has died, which the next answer will show."""
        with contextlib.suppress(OSError):
            self.connection.send(order)

    def wait(self, timeout: float) -> None:
        """Waits until it has ended, at most so long.

        Its sentinel alone would not do: a dying process closes it before its status is there.
        """
        self._process.join(timeout)

    def fate(self) -> str:
        """How it ended, in words; it is ended if it has not."""
        self._process.join(STOP_SECONDS)
        status = self._process.exitcode
        if status is None:
            self._process.kill()
            return "stopped talking"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def kill(self) -> None:
        """Ends it, whatever it does."""
        self.listens = False
        self._process.kill()

    def stop(self, patience: float) -> None:
        """Lets it end within `patience` seconds, else ends it; then forgets it."""
        self._process.join(patience)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self.connection.close()
        self._process.close()


class Run:
    """One measurement: the processes, the phases, what came out."""

    def __init__(self, plan: Plan, server_main: ServerMain, progress: Progress) -> None:
        self._plan = plan
        self._server_main = server_main
        self._progress = progress
        self._board = Board(plan.processes)
        self._children: list[Child] = []
        self._clients: list[Child] = []
        self._latencies = array("f")
        self.result = Result()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_details: object) -> None:
        patience = STOP_SECONDS if failure is None else 0.0
        for child in self._children:
            child.order(Order.STOP)
        deadline = time.monotonic() + patience
        for child in self._children:
            child.stop(max(0.0, deadline - time.monotonic()))

    def go(self) -> None:
        """Runs all phases. Raises `CommandError` if they cannot begin."""
        try:
            self._start()
        except OSError as error:
            raise CommandError(f"cannot start a process: {error.strerror or error}") from None
        self._connect()
        self._exchange()
        self._phase(Phase.FINISH)
        self._count()

    def _start(self) -> None:
        plan = self._plan
        self._server = Child("the server", self._server_main, self._board, plan.backend)
        self._children.append(self._server)
        listening = self._begin([self._server], Listening)[0]
        share, left_over = divmod(plan.clients, plan.processes)
        first = 0
        for row in range(plan.processes):
            count = share + (row < left_over)
            task = Task(
                row=row,
                first=first,
                count=count,
                clients=plan.clients,
                messages=plan.messages,
                size=plan.size,
                backend=plan.backend,
                server=listening.address,
                connecting=plan.connecting,
                clients_per_source=(
                    math.ceil(plan.clients / plan.source_addresses)
                    if plan.source_addresses > 1
                    else 0
                ),
                timeout=plan.timeout,
            )
            child = Child(f"client process {row + 1}", work, self._board, task)
            self._children.append(child)
            self._clients.append(child)
            first += count
        self._begin(self._clients, Ready)

    def _begin(self, children: Sequence[Child], kind: type[Answer]) -> list[Answer]:
        """The first words of new processes; without them there is nothing to measure."""
        answers = self._gather(children, kind, START_SECONDS)
        if self.result.errors:
            raise CommandError("; ".join(self.result.errors))
        return answers

    def _connect(self) -> None:
        plan, board, result = self._plan, self._board, self.result
        result.memory_before = resident_bytes(self._server.process_id)
        begun_ns = time.monotonic_ns()
        deadline = time.monotonic() + plan.timeout
        with self._progress.bar("connections", plan.clients) as show:
            self._phase(Phase.CONNECT, lambda: show(board.accepted))
            # Connected is what the system has queued; the server accepts it a little later.
            connected = board.total(Column.CONNECTED)
            while (
                board.accepted < connected and time.monotonic() < deadline and self._server.running
            ):
                self._server.wait(0.005)
                show(board.accepted)
            show(board.accepted)
        result.memory_connected = resident_bytes(self._server.process_id)
        result.connections = board.accepted
        result.connect_seconds = max(0, board.last_accept_ns - begun_ns) / 1e9

    def _exchange(self) -> None:
        board, result = self._board, self.result
        cpu_before, source = self._server_cpu()
        begun = time.monotonic()
        with self._progress.bar("messages", self._plan.clients * self._plan.messages) as show:
            self._phase(Phase.MESSAGES, lambda: show(board.total(Column.ECHOED)))
            show(board.total(Column.ECHOED))
        result.message_seconds = time.monotonic() - begun
        cpu_after, _ = self._server_cpu()
        if cpu_before is not None and cpu_after is not None:
            result.cpu_seconds = cpu_after - cpu_before
            result.cpu_source = source

    def _phase(self, phase: Phase, show: Callable[[], None] = lambda: None) -> None:
        for child in self._clients:
            child.order(phase)
        errors_before = self.result.errors.total()
        limit = self._plan.timeout + GRACE_SECONDS
        for ended in self._gather(self._clients, PhaseEnded, limit, show):
            self._latencies.frombytes(ended.latencies)
            self.result.errors.update(ended.errors)
        if self.result.errors.total() > errors_before:
            # Connections of a process that is being killed end before the process has.
            self._server.wait(LAST_MOMENTS_SECONDS)
        if self._server.listens and not self._server.running:
            self._server.listens = False
            self.result.errors[f"{self._server.name} {self._server.fate()}"] += 1

    def _server_cpu(self) -> tuple[float | None, str]:
        """CPU time that the server has used, and who tells it."""
        told = scheduled_seconds(self._server.process_id)
        if told is not None:
            return told, "schedstat"
        self._server.order(Order.TELL_CPU_TIME)
        answers = self._gather([self._server], CpuTime, GRACE_SECONDS)
        return (answers[0].seconds if answers else None), "process time"

    def _gather(
        self,
        children: Sequence[Child],
        kind: type[Answer],
        limit: float,
        show: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """An answer of each process that lives, within `limit` seconds; others become errors."""
        deadline = time.monotonic() + limit
        waiting = {child.connection: child for child in children if child.listens}
        answers = []
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                for child in waiting.values():
                    child.kill()
                    self.result.errors[f"{child.name} did not answer in time"] += 1
                break
            readable = multiprocessing.connection.wait(list(waiting), min(left, TICK_SECONDS))
            for connection in waiting.keys() & set(readable):
                child = waiting.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, OSError):
                    child.listens = False
                    self.result.errors[f"{child.name} {child.fate()}"] += 1
                    continue
                if isinstance(answer, Failed):
                    child.listens = False
                    self.result.errors[answer.reason] += 1
                elif isinstance(answer, kind):
                    answers.append(answer)
            show()
        return answers

    def _count(self) -> None:
        result = self.result
        result.echoed = self._board.total(Column.ECHOED)
        result.finished = self._board.total(Column.FINISHED)
        if self._latencies:
            ordered = sorted(self._latencies)
            result.latency_p50 = percentile(ordered, 50)
            result.latency_p99 = percentile(ordered, 99)
            result.latency_max = ordered[-1]


def measure(plan: Plan, server_main: ServerMain = serve) -> Result:
    """Runs the plan against a server, in processes that have ended when it returns or raises."""
    with Run(plan, server_main, Progress(sys.stderr)) as run_:
        run_.go()
    return run_.result


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest of the ordered values that at least `percent` % of them do not exceed."""
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[rank - 1]


@contextlib.contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """A process started within it never sees Ctrl-C, not even before it runs its first line.

    In this process a Ctrl-C is only put off until the end. Where there are no signal masks the
    child ignores it as soon as it runs.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Starting multiprocessing's own helper unblocks the signal: that must have happened before.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def report_object(plan: Plan, result: Result) -> dict[str, object]:
    """The report for programs; the names carry the units."""

    def rounded(value: float | None, scale: float = 1.0) -> float | None:
        return None if value is None else round(value * scale, 3)

    cpu = result.cpu_seconds
    messages = plan.clients * plan.messages
    report = asdict(plan)
    report |= {
        "ok": result.nothing_lost(plan),
        "connections": result.connections,
        "connect_seconds": rounded(result.connect_seconds),
        "connections_per_second": rounded(_rate(result.connections, result.connect_seconds)),
        "messages_echoed": result.echoed,
        "message_seconds": rounded(result.message_seconds),
        "messages_per_second": rounded(_rate(result.echoed, result.message_seconds)),
        "latency_p50_ms": rounded(result.latency_p50, 1e3),
        "latency_p99_ms": rounded(result.latency_p99, 1e3),
        "latency_max_ms": rounded(result.latency_max, 1e3),
        "server_memory_bytes": result.memory_connected,
        "server_memory_per_connection_bytes": rounded(result.memory_per_connection),
        "server_cpu_us_per_message": rounded(_cpu_per_message(result), 1e6),
        "server_cpu_source": result.cpu_source,
        "server_busy_share": rounded(
            None if cpu is None or not result.message_seconds else cpu / result.message_seconds
        ),
        "clients_lost": plan.clients - result.finished,
        "messages_lost": messages - result.echoed,
        "errors": dict(result.errors),
    }
    return report


def report_text(plan: Plan, result: Result) -> str:
    """The report for people."""
    rows = [
        (
            "connections",
            f"{result.connections:,} accepted in {result.connect_seconds:.2f} s: "
            f"{_rate(result.connections, result.connect_seconds):,.0f} per second",
        ),
        (
            "messages",
            f"{result.echoed:,} echoed in {result.message_seconds:.2f} s: "
            f"{_rate(result.echoed, result.message_seconds):,.0f} per second, every byte compared",
        ),
        ("latency", _latency_text(plan, result)),
        ("server memory", _memory_text(result)),
        ("server CPU", _cpu_text(result)),
    ]
    lost_clients = plan.clients - result.finished
    lost_messages = plan.clients * plan.messages - result.echoed
    if result.nothing_lost(plan):
        rows.append(("errors", "none; no byte and no client lost"))
    else:
        rows.append(
            ("LOST", f"{counted(lost_clients, 'client')}, {counted(lost_messages, 'message')}")
        )
        rows += [("error", f"{count:,} x {text}") for text, count in result.errors.most_common()]
    rows += [("reduced", text) for text in plan.reduced]
    processes = "1 process" if plan.processes == 1 else f"{plan.processes} processes"
    sources = "" if plan.source_addresses == 1 else f" on {plan.source_addresses} addresses"
    title = (
        f"{PROGRAM} c10k: backend {plan.backend}, {counted(plan.clients, 'client')} x "
        f"{counted(plan.messages, 'message')} x {counted(plan.size, 'byte')}, "
        f"clients in {processes}{sources}"
    )
    return "\n".join([title, *(f"  {name:<13}  {text}" for name, text in rows)])


def _rate(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0


def _cpu_per_message(result: Result) -> float | None:
    if result.cpu_seconds is None or not result.echoed:
        return None
    return result.cpu_seconds / result.echoed


def _latency_text(plan: Plan, result: Result) -> str:
    if result.latency_p50 is None or result.latency_p99 is None or result.latency_max is None:
        return "no message came back"
    return (
        f"p50 {result.latency_p50 * 1e3:.1f} ms, p99 {result.latency_p99 * 1e3:.1f} ms, "
        f"max {result.latency_max * 1e3:.1f} ms, "
        f"with {counted(plan.clients, 'message')} under way at once"
    )


def _memory_text(result: Result) -> str:
    each = result.memory_per_connection
    if each is None or result.memory_connected is None:
        return "not told by this system"
    return (
        f"{each / 1024:.2f} KiB resident per connection, "
        f"{result.memory_connected / (1 << 20):.1f} MiB in all"
    )


def _cpu_text(result: Result) -> str:
    each = _cpu_per_message(result)
    if each is None or result.cpu_seconds is None:
        return "not measured"
    busy = result.cpu_seconds / result.message_seconds if result.message_seconds else 0.0
    return f"{each * 1e6:.2f} us per message ({result.cpu_source}), busy {busy:.0%} of the time"
