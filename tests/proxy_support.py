"""Helpers of the tests of `proxy`: it runs as a user runs it, in a process of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

from cli_support import COMMAND, Echo
from support import PATIENCE, eventually


def at(address: Any) -> str:
    """HOST:PORT as the command line takes it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Proxy(Echo):
    """A running `proxy` command; on leaving it is ended if the test has not done so."""

    def __init__(
        self, backend: str, target: Any, *arguments: str, listen: str = "127.0.0.1:0"
    ) -> None:
        where = target if isinstance(target, str) else at(target)
        self.process = subprocess.Popen(
            [*COMMAND, "proxy", listen, where, "--backend", backend, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.told = ""

    def __enter__(self) -> Proxy:
        super().__enter__()
        return self

    def statistics(self) -> dict[str, str]:
        """What it prints on SIGUSR1; other lines that it has printed are kept in `told`.

        For tests marked `by_signal`."""
        assert sys.platform != "win32"
        assert self.process.stderr is not None
        descriptor = self.process.stderr.fileno()
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + PATIENCE
        text = ""
        while "bytes from target" not in text or not text.endswith("\n"):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([descriptor], [], [], left)
            piece = os.read(descriptor, 65_536).decode() if ready else ""
            assert piece, f"no statistics: {text!r}"
            text += piece
        before, _, block = text.partition("proxy statistics")
        self.told += before
        lines = block.splitlines()[1:]
        return {line[2:21].strip(): line[21:].strip() for line in lines}

    def await_no_connections(self) -> None:
        """Waits until it has none, as it says on SIGUSR1. On Windows it cannot be asked: there it
        must still run."""
        if sys.platform == "win32":
            assert self.process.poll() is None
        else:
            eventually(lambda: self.statistics()["connections now"] == "0")
