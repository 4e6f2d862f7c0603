"""Helpers of the tests of the examples: they run a file of the folder `examples` as a user does.

`Example(name, backend, ...)` is a running one, `program(name)` a client that we did not write; a
test whose client is not installed is skipped. `run(command, ...)` runs such a client to its end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import pytest
import readme
from cli_support import descriptors
from support import ENDING_SIGNALS, OWN_CONSOLE, PATIENCE, dial, first_line, send_signal

EXAMPLES = readme.README.parent / "examples"

#: Which Debian package has a program.
PACKAGES = {
    "curl": "curl",
    "nc": "netcat-openbsd",
    "openssl": "openssl",
    "socat": "socat",
    "wrk": "wrk",
}

#: A sanitizer's runtime that is preloaded into the examples has no business in the clients.
CLIENT_ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONMALLOC")
}


EXAMPLE_ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "default"}
if "ASAN_OPTIONS" in os.environ:
    # What was freed is kept aside for a while; not so much of it that it looks like growth.
    EXAMPLE_ENVIRONMENT["ASAN_OPTIONS"] += (
        ":quarantine_size_mb=1:thread_local_quarantine_size_kb=64"
    )


class Example:
    """A running example; on leaving it must end in order, unless the test has seen to that."""

    def __init__(self, name: str, backend: str, *arguments: str) -> None:
        # -P: the current folder must not hide the installed package.
        self.start([sys.executable, "-P", str(EXAMPLES / name), "--port", "0", *arguments], backend)

    def start(self, command: list[str], backend: str) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**EXAMPLE_ENVIRONMENT, "ASYNCIO_NATIVE_BACKEND": backend},
            text=True,
            creationflags=OWN_CONSOLE,
        )

    def __enter__(self) -> Example:
        line = first_line(self.process)
        if not line.startswith("listening on "):
            self.process.kill()
            raise AssertionError(f"{line!r} {self.process.communicate()}")
        host, _, port = line.removeprefix("listening on ").strip().rpartition(":")
        self.host, self.port = host, int(port)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self.process.poll() is None:
                self.ends_in_order()
        finally:
            if self.process.poll() is None:
                self.process.kill()
            output, errors = self.process.communicate()
            if kind is not None:  # pytest shows it beside the failure
                print(output, errors, sep="\n")

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://{self.host}:{self.port}{path}"

    def dial(self) -> socket.socket:
        """A connected stdlib socket."""
        return dial(self.address)

    def descriptors(self) -> int:
        """How many descriptors the example has open."""
        return descriptors(self.process.pid)

    def ends_in_order(self, number: int = ENDING_SIGNALS[-1]) -> None:
        """A signal ends it with status 0, and it had nothing to complain about."""
        send_signal(self.process, number)
        output, errors = self.process.communicate(timeout=PATIENCE)
        assert (self.process.returncode, output, errors) == (0, "", "")


def program(name: str) -> str:
    """The path of a client; the test is skipped where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian package {PACKAGES[name]})")
    return path


def say(client: subprocess.Popen[bytes], data: bytes) -> None:
    """Gives a client something to send."""
    assert client.stdin is not None
    client.stdin.write(data)
    client.stdin.flush()


def line_from(client: subprocess.Popen[bytes]) -> bytes:
    """The next line that a client has received; b"" at its end."""
    assert client.stdout is not None
    return client.stdout.readline()


def run(
    command: list[str], data: bytes = b"", *, status: int | None = 0, seconds: float = PATIENCE
) -> bytes:
    """Runs a client to its end, with input, and returns its output.

    status: what it must end with; None for any."""
    ended = subprocess.run(
        [program(command[0]), *command[1:]],
        input=data,
        capture_output=True,
        timeout=seconds,
        env=CLIENT_ENVIRONMENT,
    )
    assert status is None or ended.returncode == status, ended
    return ended.stdout


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Starts a client with pipes to talk to it; a context manager of the test ends it."""
    return subprocess.Popen(
        [program(command[0]), *command[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=CLIENT_ENVIRONMENT,
    )


def flood(clients: list[socket.socket], data: bytes, *, limit: int | None = None) -> list[int]:
    """Sends `data` again and again without reading, until the server has stopped receiving.

    It has when nobody could send anything for 0.3 s, which must be within `PATIENCE`.
    limit: bytes after which each client stops. Returns how many bytes each one has sent."""
    counts = [0] * len(clients)
    for client in clients:
        client.setblocking(False)
    began = last = time.monotonic()
    while (now := time.monotonic()) - last < 0.3 and counts != [limit] * len(clients):
        assert now - began < PATIENCE, f"the server never stops to receive: {counts}"
        before = sum(counts)
        for number, client in enumerate(clients):
            with contextlib.suppress(BlockingIOError):
                start = counts[number] % len(data)
                end = None if limit is None else start + limit - counts[number]
                counts[number] += client.send(data[start:end])
        if sum(counts) > before:
            last = time.monotonic()
        else:
            time.sleep(0.001)
    for client in clients:
        client.settimeout(PATIENCE)
    return counts


def resident_bytes(process_id: int) -> int:
    """How much memory of a process is in use."""
    pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def nc(example: Example, data: bytes, *, seconds: float = PATIENCE) -> bytes:
    """Sends all data, then the end of the stream, and returns all that comes until its end."""
    return run(["nc", "-N", example.host, str(example.port)], data, seconds=seconds)
