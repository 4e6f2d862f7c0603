"""Counts the instructions that a server spends in user space on an echoed message.

    python -m bench.instructions [--record] [SERVER ...]

A count that no other load on the machine changes, by `perf stat` where the processor's counters may
be used, else by valgrind (callgrind). One client sends 64 B and waits for them, a first time few
messages and a second time more; the difference between both, for a message, is the count: start and
end of the process cancel out. Each message so costs a whole wait of its own.

It is compared with `bench/instructions.json`; a count that grew by more than 3 % ends with status
1, unless another compiler or interpreter was recorded. `--record` writes the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import build
from bench.run import PYTHON_PROGRAMS, TIME_LIMIT_S, RunFailedError, end
from bench.servers import Server, by_name

RECORD = Path(__file__).with_name("instructions.json")
SERVERS = (
    *("c-epoll", "capi-epoll-1", "capi-io_uring-1"),
    *("native-epoll-1", "native-io_uring-1", "native-epoll-plain-1", "native-io_uring-plain-1"),
)
FEW, MANY = 500, 2500  # messages
TOLERANCE = 1.03  # a count itself varies by some tenths of a percent
MESSAGE = bytes(range(64))


class CountError(Exception):
    """The instructions could not be counted; the text says why."""


def counter() -> str:
    """`perf` or `valgrind`, whichever works here."""
    if shutil.which("perf"):
        command = ["perf", "stat", "-x,", "-e", "instructions:u", "true"]
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
        if tried.returncode == 0 and tried.stderr.strip().split(",")[0].isdigit():
            return "perf"
    if shutil.which("valgrind"):
        return "valgrind"
    raise CountError("neither perf's counters nor valgrind can be used here")


def wrapped(tool: str, command: list[str], report: Path) -> list[str]:
    """The command under that tool, which writes its report into a file."""
    if tool == "perf":
        return ["perf", "stat", "-x,", "-e", "instructions:u", "-o", str(report), "--", *command]
    callgrind = ["--tool=callgrind", "--callgrind-out-file=/dev/null", f"--log-file={report}"]
    return ["valgrind", *callgrind, *command]


def read_count(tool: str, report: Path) -> int:
    """The number in a tool's report."""
    pattern = r"^(\d+),.*instructions:u" if tool == "perf" else r"Collected : (\d+)"
    found = re.search(pattern, report.read_text(), re.MULTILINE)
    if found is None:
        raise CountError(f"{tool} reported no count:\n{report.read_text().strip()}")
    return int(found[1])


def command_of(server: Server, environment: build.Environment) -> list[str]:
    """As in bench.run, but not pinned; and with `-sP`, as `-I` would hide PYTHONHASHSEED."""
    if server.in_python:
        program = str(PYTHON_PROGRAMS / server.program)
        return [str(environment.python), "-sP", program, *server.options]
    return [str(build.DEFAULT_FOLDER / server.program), *server.options]


def talk(port: int, messages: int) -> None:
    """The client."""
    with socket.create_connection(("127.0.0.1", port), TIME_LIMIT_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(messages):
            sock.sendall(MESSAGE)
            reply = b""
            while len(reply) < len(MESSAGE):
                piece = sock.recv(len(MESSAGE) - len(reply))
                if not piece:
                    raise CountError("the server closed the connection")
                reply += piece
            if reply != MESSAGE:
                raise CountError("other bytes came back than were sent")


def own_pid(process: subprocess.Popen[str], tool: str) -> int:
    """The server's process: perf starts it as its child, valgrind becomes it."""
    if tool == "valgrind":
        return process.pid
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


def total(tool: str, command: list[str], messages: int) -> int:
    """Of one run of a server, from its start to its end."""
    # Valgrind keeps signals back while a server waits in io_uring_enter: ours end by themselves.
    by_itself = True
    if Path(command[0]).name == "echo_native":
        command = [*command, f"messages={messages}"]
    elif any(Path(word).name == "native_server.py" for word in command):
        command = [*command, "connections=1"]
    else:
        by_itself = False
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        with subprocess.Popen(
            wrapped(tool, command, report),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline().strip()
                if not line:
                    raise CountError(f"{command[0]} did not start under {tool}")
                talk(int(line), messages)
                if by_itself:
                    process.communicate(timeout=TIME_LIMIT_S)
                else:
                    end(process, own_pid(process, tool))
            finally:
                process.kill()
        return read_count(tool, report)


def per_message(tool: str, command: list[str]) -> float:
    """The difference of two runs."""
    return (total(tool, command, MANY) - total(tool, command, FEW)) / (MANY - FEW)


def setting(tool: str, environment: build.Environment) -> dict[str, str]:
    """What a count depends on beside the sources."""
    compiler = build.run([os.environ.get("CC", "cc"), "--version"]).splitlines()[0]
    return {"counter": tool, "compiler": compiler, "python": environment.version}


def compare(counts: dict[str, float], recorded: dict[str, Any], now: dict[str, str]) -> list[str]:
    """Prints a table; returns the servers whose count grew."""
    known: dict[str, float] = recorded.get("counts", {})
    same = recorded.get("setting") == now
    grown = []
    for name, count in counts.items():
        if name not in known:
            print(f"{name:26} {count:8.0f}   not recorded")
            continue
        change = count / known[name]
        too_much = same and change > TOLERANCE
        print(
            f"{name:26} {count:8.0f}   recorded {known[name]:8.0f}   {change - 1:+.1%}"
            f"{'   GREW' if too_much else ''}"
        )
        if too_much:
            grown.append(name)
    if known and not same:
        print(f"recorded with {recorded['setting']}, counted with {now}: not judged")
    return grown


def main(arguments: list[str] | None = None) -> int:
    """Counts, compares, records."""
    parser = argparse.ArgumentParser(prog="python -m bench.instructions")
    parser.add_argument("servers", nargs="*", default=SERVERS, metavar="SERVER")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--python", default="")
    options = parser.parse_args(arguments)
    try:
        tool = counter()
        build.build_programs()
        build.build_native_programs()
        environment = build.build_environment(options.python, peers=False)
        now = setting(tool, environment)
        counts = {}
        for name in options.servers:
            counts[name] = per_message(tool, command_of(by_name(name), environment))
    except (
        CountError,
        RunFailedError,
        build.BuildError,
        OSError,
        subprocess.SubprocessError,
    ) as error:
        print(error, file=sys.stderr)
        return 1
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    print(f"instructions in user space for a message, by {tool}:")
    grown = compare(counts, recorded, now)
    if options.record:
        kept = recorded.get("counts", {}) if recorded.get("setting") == now else {}
        rounded = {name: round(count) for name, count in counts.items()}
        data = {"setting": now, "counts": {**kept, **rounded}}
        RECORD.write_text(json.dumps(data, indent=1) + "\n")
        return 0
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
