"""`python -m asyncio_native c10k`: the report, and that no loss goes unnoticed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from asyncio_native.cli import c10k, c10k_client, common
from cli_support import (
    COMMAND,
    children,
    command_line,
    descriptors,
    has_ended,
    processor_seconds,
    run_cli,
)
from support import PATIENCE, PROGRAM_SECONDS, SOON_SECONDS, WINE, eventually

#: How the report tells of a process that was killed; Windows has no signal to name.
KILLED = "ended with status 15" if sys.platform == "win32" else "was killed by signal 9"

#: A server that is not ours and does as `mode` says with its third connection, after the first
#: message: the script takes the mode, a path to write to, and the command's own arguments.
STAND_IN = """
import functools, os, signal, socket, sys, threading, time
from asyncio_native.cli import c10k, common
from asyncio_native.cli.c10k_board import CpuTime, Listening, Order

def talk(mode, number, peer):
    messages = 0
    while data := peer.recv(65536):
        messages += 1
        if number == 3 and messages == 2:
            if mode == "flip":
                data = data[:5] + bytes([data[5] ^ 1]) + data[6:]
            elif mode == "drop":
                data = data[:5] + data[6:]
            elif mode == "cut":
                data = data[:-1]
            elif mode == "extra":
                data += b"!"
            elif mode == "other":
                data = bytes(len(data))
            elif mode == "close":
                break
            elif mode == "silent":
                continue
            elif mode == "die":
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        peer.sendall(data)
    if mode == "never end" and number == 3:
        threading.Event().wait()
    if mode == "last word" and number == 3:
        peer.sendall(b"!")
    peer.close()

def serve(mode, path, connection, board, backend):
    if mode == "cannot begin":
        raise SystemExit(5)
    hosts = set()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def accept():
        for number in range(1, 1000):
            peer, address = listener.accept()
            hosts.add(address[0])
            board.count_accepted()
            threading.Thread(target=talk, args=(mode, number, peer), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    connection.send(Listening(listener.getsockname()))
    while (order := connection.recv()) is not Order.STOP:
        if order is Order.TELL_CPU_TIME:  # asked where the system does not tell it
            connection.send(CpuTime(time.process_time()))
    with open(path, "w") as told:
        print(*sorted(hosts), file=told)
    os._exit(0)

if __name__ == "__main__":
    mode, path, *arguments = sys.argv[1:]
    if mode == "two sources":
        c10k.ephemeral_ports = lambda: 12
    parser = common.Parser()
    c10k.add_parser(parser.add_subparsers())
    chosen = parser.parse_args(["c10k", *arguments])
    try:
        sys.exit(c10k.run(chosen, functools.partial(serve, mode, path)))
    except common.CommandError as error:
        sys.exit(f"refused: {error}")
"""


def run_stand_in(
    folder: Path, mode: str, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    script = folder / "stand_in.py"
    script.write_text(STAND_IN)
    told = folder / "told"
    ended = subprocess.run(
        [sys.executable, "-P", str(script), mode, str(told), "--clients", "12", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
    )
    return ended, told


def report_of(ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


def spawned(process_id: int) -> list[int]:
    """The server and the client processes of a running c10k, in the order started."""
    return [child for child in children(process_id) if "spawn_main" in command_line(child)]


def start_long(backend: str, *arguments: str) -> subprocess.Popen[str]:
    """A c10k that would take minutes, with two client processes and all clients connected."""
    process = subprocess.Popen(
        [
            *COMMAND,
            *("c10k", "--backend", backend, "--clients", "60", "--processes", "2"),
            *("--messages", "1000000", *arguments),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    eventually(lambda: process.poll() is not None or len(spawned(process.pid)) == 3)
    assert process.poll() is None, process.communicate()
    server = spawned(process.pid)[0]
    # It has some descriptors of its own, so that this many are not yet all connections. What it
    # works after that is for messages: the last connections take a thousandth of it.
    eventually(lambda: descriptors(server) > 60)
    connecting = processor_seconds(server)
    eventually(lambda: processor_seconds(server) > connecting + 0.1)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return process.returncode, output, errors


# -- the report -----------------------------------------------------------------------------------


def test_two_hundred_clients_lose_nothing(backend: str) -> None:
    ended = run_cli(
        "c10k",
        "--clients",
        "200",
        "--messages",
        "5",
        "--size",
        "100",
        "--backend",
        backend,
        "--json",
    )
    assert ended.returncode == 0, ended
    # Standard error is no terminal here: no progress bar.
    assert ended.stderr == ""
    report = report_of(ended)
    assert report["ok"] is True
    assert report["backend"] == backend
    assert report["clients"] == report["clients_requested"] == report["connections"] == 200
    assert report["messages_echoed"] == 1000
    assert report["clients_lost"] == report["messages_lost"] == 0
    assert report["errors"] == {}
    assert report["connections_per_second"] > 0
    assert report["messages_per_second"] > 0
    assert 0 < report["latency_p50_ms"] <= report["latency_p99_ms"] <= report["latency_max_ms"]
    assert report["server_cpu_us_per_message"] > 0
    assert 0 < report["server_busy_share"] < 1.5
    if sys.platform == "linux":
        assert report["server_cpu_source"] == "schedstat"
        assert report["server_memory_bytes"] > 0
        assert report["server_memory_per_connection_bytes"] is not None


def test_the_report_on_a_single_client_says_client() -> None:
    ended = run_cli("c10k", "--clients", "1", "--messages", "1", "--size", "1")
    assert ended.returncode == 0, ended
    assert ", 1 client x 1 message x 1 byte, clients in 1 process" in ended.stdout
    assert "with 1 message under way at once" in ended.stdout


def test_the_report_for_people(backend: str) -> None:
    ended = run_cli("c10k", "--clients", "50", "--messages", "2", "--backend", backend)
    assert ended.returncode == 0, ended
    assert ended.stderr == ""
    assert f"backend {backend}, 50 clients x 2 messages x 64 bytes" in ended.stdout
    for words in (
        "50 accepted in",
        "100 echoed in",
        "p50",
        "p99",
        "max",
        "resident per connection",
        "us per message",
        "no byte and no client lost",
    ):
        assert words in ended.stdout


def test_messages_larger_than_any_buffer(backend: str) -> None:
    ended = run_cli(
        "c10k",
        "--clients",
        "5",
        "--messages",
        "3",
        "--size",
        "5000000",
        "--backend",
        backend,
        "--json",
    )
    assert ended.returncode == 0, ended
    assert report_of(ended)["messages_echoed"] == 15


def test_messages_of_one_byte(backend: str) -> None:
    ended = run_cli(
        "c10k", "--clients", "20", "--messages", "30", "--size", "1", "--backend", backend, "--json"
    )
    assert ended.returncode == 0, ended
    assert report_of(ended)["messages_echoed"] == 600


def test_clients_in_several_processes(backend: str) -> None:
    ended = run_cli(
        "c10k",
        "--clients",
        "50",
        "--messages",
        "4",
        "--processes",
        "3",
        "--backend",
        backend,
        "--json",
    )
    assert ended.returncode == 0, ended
    report = report_of(ended)
    assert report["processes"] == 3
    assert report["messages_echoed"] == 200


def test_a_terminal_gets_a_progress_bar() -> None:
    pty = pytest.importorskip("pty", reason="makes a terminal by a pseudo-terminal of POSIX")
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, "c10k", "--clients", "20", "--messages", "2"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
        ) as process:
            os.close(theirs)
            shown = b""
            try:
                while piece := os.read(ours, 65_536):
                    shown += piece
            except OSError:
                pass  # how Linux tells that the last writer has gone
            output, _ = process.communicate(timeout=PATIENCE)
    finally:
        os.close(ours)
    assert process.returncode == 0
    assert "no client lost" in output
    assert b"connections" in shown
    assert b"messages" in shown


# -- loss is noticed ------------------------------------------------------------------------------


def test_a_server_that_is_right_passes(tmp_path: Path, backend: str) -> None:
    ended, _ = run_stand_in(tmp_path, "right", "--backend", backend)
    assert ended.returncode == 0, ended


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("flip", "messages: bytes came back that are not those sent"),
        ("other", "messages: bytes came back that are not those sent"),
        ("extra", "bytes came back that are not those sent"),
        ("drop", "messages: bytes came back that are not those sent"),
        ("close", "messages: the server closed the connection"),
        ("last word", "finish: bytes came back that are not those sent"),
    ],
)
def test_one_bad_connection_is_one_client_lost(
    tmp_path: Path, backend: str, mode: str, words: str
) -> None:
    ended, _ = run_stand_in(tmp_path, mode, "--messages", "2", "--backend", backend, "--json")
    assert_one_client_lost(ended, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "phase"),
    [
        ("cut", "messages"),
        ("silent", "messages"),
        ("never end", "finish"),
    ],
)
def test_a_client_that_gets_too_little_is_lost_at_the_deadline(
    tmp_path: Path, backend: str, mode: str, phase: str
) -> None:
    # The others must be done by then.
    limit = f"{SOON_SECONDS:g}"
    ended, _ = run_stand_in(
        tmp_path, mode, "--messages", "2", "--timeout", limit, "--backend", backend, "--json"
    )
    assert_one_client_lost(ended, f"{phase}: not done within {limit} s")


def assert_one_client_lost(ended: subprocess.CompletedProcess[str], words: str) -> None:
    assert ended.returncode == 1, ended
    report = report_of(ended)
    assert report["ok"] is False
    assert report["clients_lost"] == 1
    [(text, count)] = report["errors"].items()
    assert words in text
    assert count == 1


def test_the_report_for_people_says_what_was_lost(tmp_path: Path) -> None:
    ended, _ = run_stand_in(tmp_path, "flip", "--messages", "2")
    assert ended.returncode == 1
    assert "1 client, 1 message\n" in ended.stdout
    assert "bytes came back that are not those sent" in ended.stdout
    assert "no byte" not in ended.stdout


@pytest.mark.skipif(
    WINE,
    reason="Wine 8: a process whose threads receive when it ends may stay, with its connections: "
    "in 4 of 14 tries two of its threads went on waiting for wineserver",
)
def test_a_server_that_dies_is_noticed(tmp_path: Path, backend: str) -> None:
    ended, _ = run_stand_in(tmp_path, "die", "--messages", "50", "--backend", backend, "--json")
    assert ended.returncode == 1, ended
    report = report_of(ended)
    assert report["clients_lost"] == 12
    assert report["errors"][f"the server {KILLED}"] == 1


def test_a_server_that_cannot_begin_is_an_error(tmp_path: Path) -> None:
    ended, _ = run_stand_in(tmp_path, "cannot begin")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "refused: the server ended with status 5" in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_our_own_server_killed_in_the_middle(backend: str) -> None:
    process = start_long(backend, "--json")
    os.kill(spawned(process.pid)[0], signal.SIGKILL)
    status, output, errors = finish(process)
    assert (status, errors) == (1, "")
    report = json.loads(output)
    assert report["clients_lost"] == 60
    assert report["errors"]["the server was killed by signal 9"] == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_client_process_killed_in_the_middle(backend: str) -> None:
    limit = f"{2 * SOON_SECONDS:g}"
    process = start_long(backend, "--timeout", limit, "--json")
    os.kill(spawned(process.pid)[1], signal.SIGKILL)
    status, output, errors = finish(process)
    assert (status, errors) == (1, "")
    report = json.loads(output)
    assert report["clients_lost"] == 60
    assert report["errors"]["client process 1 was killed by signal 9"] == 1
    assert report["errors"][f"messages: not done within {limit} s"] == 30


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_ctrl_c_ends_all_processes(backend: str) -> None:
    process = start_long(backend)
    family = [process.pid, *children(process.pid)]
    assert len(family) >= 4
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    assert finish(process) == (130, "", "")
    eventually(lambda: all(has_ended(member) for member in family))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_no_process_outlives_a_parent_that_was_killed(backend: str) -> None:
    process = start_long(backend)
    family = children(process.pid)
    assert len(family) >= 3
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    eventually(lambda: all(has_ended(member) for member in family))


# -- the plan -------------------------------------------------------------------------------------


def plan_for(*arguments: str) -> c10k.Plan:
    parser = common.Parser()
    subparsers: common.Subparsers = parser.add_subparsers()
    c10k.add_parser(subparsers)
    return c10k.make_plan(parser.parse_args(["c10k", *arguments]))


@pytest.fixture
def roomy_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine of 9 processors on which nothing needs to be reduced, for a test to take from."""
    monkeypatch.setattr(c10k, "raise_descriptor_limit", lambda wanted: 1 << 20)
    monkeypatch.setattr(c10k, "ephemeral_ports", lambda: 30_000)
    monkeypatch.setattr(c10k, "loopback_addresses", lambda: 254)
    monkeypatch.setattr(c10k, "backlog_limit", lambda: 4096)
    monkeypatch.setattr(c10k, "processors", lambda: 9)
    return monkeypatch


@pytest.mark.usefixtures("roomy_machine")
def test_ten_thousand_clients_are_the_default() -> None:
    plan = plan_for()
    assert plan.clients == plan.clients_requested == 10_000
    assert plan.reduced == ()
    assert plan.source_addresses == 1
    assert plan.processes == 4
    assert plan.processes * plan.connecting <= 4096


@pytest.mark.usefixtures("roomy_machine")
def test_there_are_never_more_processes_than_clients() -> None:
    assert plan_for("--clients", "2", "--processes", "8").processes == 2


@pytest.mark.usefixtures("roomy_machine")
def test_more_clients_than_an_address_has_ports_use_several_addresses() -> None:
    plan = plan_for("--clients", "100000")
    assert plan.clients == 100_000
    assert plan.source_addresses == 7
    assert plan.reduced == ()


def test_few_descriptors_reduce_the_clients(roomy_machine: pytest.MonkeyPatch) -> None:
    roomy_machine.setattr(c10k, "raise_descriptor_limit", lambda wanted: 1024)
    plan = plan_for()
    assert plan.clients_requested == 10_000
    assert plan.clients == 1024 - c10k.DESCRIPTORS_RESERVED
    assert len(plan.reduced) == 1
    assert "ulimit -n 10064" in plan.reduced[0]


def test_few_ports_on_one_address_reduce_the_clients(roomy_machine: pytest.MonkeyPatch) -> None:
    roomy_machine.setattr(c10k, "ephemeral_ports", lambda: 1000)
    roomy_machine.setattr(c10k, "loopback_addresses", lambda: 1)
    plan = plan_for()
    assert plan.clients == 900
    assert len(plan.reduced) == 1
    assert "ip_local_port_range" in plan.reduced[0]


def test_a_short_backlog_is_respected_and_said(roomy_machine: pytest.MonkeyPatch) -> None:
    roomy_machine.setattr(c10k, "backlog_limit", lambda: 128)
    plan = plan_for()
    assert plan.clients == 10_000
    assert plan.processes * plan.connecting <= 128
    assert len(plan.reduced) == 1
    assert "net.core.somaxconn" in plan.reduced[0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_clients_really_come_from_several_addresses(tmp_path: Path, backend: str) -> None:
    ended, told = run_stand_in(tmp_path, "two sources", "--backend", backend, "--json")
    assert ended.returncode == 0, ended
    assert report_of(ended)["source_addresses"] == 2
    assert told.read_text().split() == ["127.0.0.1", "127.0.0.2"]


# -- parts ----------------------------------------------------------------------------------------


def test_every_message_of_every_client_differs() -> None:
    pattern = c10k_client.Pattern(clients=50, messages=40, size=16)
    pieces = {
        pattern.table[start : start + 16]
        for client in range(50)
        for message in range(40)
        for start in [pattern.offset(client, message)]
    }
    assert len(pieces) == 50 * 40


def test_all_processes_agree_on_the_messages() -> None:
    first = c10k_client.Pattern(clients=9, messages=3, size=100)
    assert first.table == c10k_client.Pattern(clients=9, messages=3, size=100).table


def test_the_table_stays_small_for_a_long_run() -> None:
    pattern = c10k_client.Pattern(clients=10_000, messages=1_000_000, size=64)
    assert len(pattern.table) <= c10k_client.WINDOWS_TOP + 64
    assert pattern.offset(9_999, 999_999) + 64 <= len(pattern.table)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 50, 7.0),
        ([7.0], 99, 7.0),
        ([1.0, 2.0], 50, 1.0),
        ([1.0, 2.0, 3.0], 50, 2.0),
        ([float(number) for number in range(1, 101)], 99, 99.0),
        ([float(number) for number in range(1, 102)], 99, 100.0),
    ],
)
def test_percentiles(values: list[float], percent: int, expected: float) -> None:
    assert c10k.percentile(values, percent) == expected


def test_numbers_may_be_grouped() -> None:
    namespace = argparse.Namespace(number=common.whole_number(1, 20_000)("10_000"))
    assert namespace.number == 10_000
