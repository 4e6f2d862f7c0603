"""Helpers of the tests of the command line: they run it as a user does, in processes of its own."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from asyncio_native.cli.system import resident_bytes, scheduled_seconds
from support import (
    ENDING_SIGNALS,
    OWN_CONSOLE,
    PATIENCE,
    PROGRAM_SECONDS,
    WINE,
    first_line,
    keep,
    send_signal,
)

#: -P: the current folder must not hide the installed package.
COMMAND = [sys.executable, "-P", "-m", "asyncio_native"]


def unchosen_address() -> tuple[str, int]:
    """An address of the loopback that is free, for a program that is told its port by number.

    A port that the system chose and got back it may choose for another test at once. Linux, macOS
    and Windows choose from 32768 up, or higher, unless told otherwise: below that a port goes to
    who names it."""
    for port in random.sample(range(20_000, 32_768), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return "127.0.0.1", port
    raise AssertionError("no port is free")


def run_cli(*arguments: str, seconds: float = PROGRAM_SECONDS) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def assert_usage_error(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    """Status 2 and one line that says what is wrong."""
    assert_one_line_error(ended, 2, *words)


def assert_one_line_error(
    ended: subprocess.CompletedProcess[str], status: int, *words: str
) -> None:
    assert ended.returncode == status, ended
    assert ended.stdout == ""
    assert ended.stderr.startswith("asyncio-native: error: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith("\n")
    for word in words:
        assert word in ended.stderr


#: How the system says that an address is taken.
IN_USE = "in use"
if WINE:
    IN_USE = "<no description>"  # Wine 8 has no texts for the errors of Winsock
elif sys.platform == "win32":
    IN_USE = "Only one usage of each socket address"

linux_limits = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux limits the descriptors of another process (prlimit)"
)


def limit_descriptors(process_id: int, limit: int) -> None:
    """How many descriptors another process may have open; for tests marked `linux_limits`."""
    assert sys.platform == "linux"
    import resource

    resource.prlimit(process_id, resource.RLIMIT_NOFILE, (limit, limit))


class Echo:
    """A running `echo` command; on leaving it is ended if the test has not done so."""

    def __init__(self, backend: str, *arguments: str) -> None:
        command = [*COMMAND, "echo", "--port", "0", "--backend", backend, *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            creationflags=OWN_CONSOLE,
        )

    def __enter__(self) -> Echo:
        self.line = first_line(self.process)
        if not self.line.startswith("listening on "):
            self.process.kill()
            raise AssertionError(f"{self.line!r} {self.process.communicate()}")
        host, _, port = self.line.removeprefix("listening on ").strip().rpartition(":")
        self.address = (host.strip("[]"), int(port))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def dial(self) -> socket.socket:
        """A connected stdlib socket."""
        return keep(socket.create_connection(self.address, timeout=PATIENCE))

    def end(self, number: int = ENDING_SIGNALS[-1]) -> tuple[int, str, str]:
        """Sends a signal; the status, and the rest of both outputs."""
        send_signal(self.process, number)
        output, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output, errors


def memory_of(process_id: int) -> int:
    """The resident memory of another process in bytes."""
    resident = resident_bytes(process_id)
    if resident is None:
        pytest.skip("this system does not tell the memory of another process")
    return resident


def processor_seconds(process_id: int) -> float:
    """The processor time of another process, all its threads."""
    if sys.platform == "win32":
        from asyncio_native.cli import windows

        seconds = windows.processor_seconds(process_id)
    else:
        seconds = scheduled_seconds(process_id)
    if seconds is None:
        pytest.skip("this system does not tell the processor time of another process")
    return seconds


def children(process_id: int) -> list[int]:
    """The processes that a process has started and that have not ended, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _parent(int(entry.name)) == process_id:
            found.append(int(entry.name))
    return sorted(found)


def command_line(process_id: int) -> str:
    """What a process was started with; empty if it has ended."""
    try:
        return Path(f"/proc/{process_id}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def has_ended(process_id: int) -> bool:
    """True if a process is gone, or a zombie that nobody has waited for."""
    status = _status(process_id)
    return status is None or status[0] == "Z"


def descriptors(process_id: int) -> int:
    """How many descriptors, or handles, another process has open; 0 if it has ended."""
    if sys.platform == "win32":
        from asyncio_native.cli import windows

        return windows.handles(process_id) or 0
    try:
        return len(os.listdir(f"/proc/{process_id}/fd"))
    except OSError:
        return 0


def _status(process_id: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _parent(process_id: int) -> Any:
    status = _status(process_id)
    return None if status is None else int(status[1])
