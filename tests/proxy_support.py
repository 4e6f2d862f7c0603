"""Helpers of the tests of `proxy`: it runs as a user runs it, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from cli_support import COMMAND, Echo
from support import OWN_CONSOLE, PATIENCE, WINE, eventually, send_signal

#: The signal that asks it for its statistics.
TELL: signal.Signals
if sys.platform == "win32":
    TELL = signal.SIGBREAK
else:
    TELL = signal.SIGUSR1


def at(address: Any) -> str:
    """HOST:PORT as the command line takes it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


#: For tests of the statistics.
asks_statistics = pytest.mark.skipif(
    WINE,
    reason="Wine 8 has no Ctrl-Break: GenerateConsoleCtrlEvent refuses it with 12, invalid access",
)


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
            creationflags=OWN_CONSOLE,
        )
        self.told = ""

    def __enter__(self) -> Proxy:
        super().__enter__()
        return self

    def statistics(self) -> dict[str, str]:
        """What it prints on SIGUSR1 or Ctrl-Break; other lines that it printed are in `told`.

        For tests marked `asks_statistics`."""
        assert self.process.stderr is not None
        descriptor = self.process.stderr.fileno()
        send_signal(self.process, TELL)
        text = ""
        # Windows' pipes cannot be waited for with a limit: a program that says nothing is ended.
        limit = threading.Timer(PATIENCE, self.process.kill)
        limit.start()
        try:
            while "bytes from target" not in text or not text.endswith("\n"):
                piece = os.read(descriptor, 65_536).decode().replace("\r\n", "\n")
                assert piece, f"no statistics: {text!r}"
                text += piece
        finally:
            limit.cancel()
        before, _, block = text.partition("proxy statistics")
        self.told += before
        lines = block.splitlines()[1:]
        return {line[2:21].strip(): line[21:].strip() for line in lines}

    def await_no_connections(self) -> None:
        """Waits until it has none, as it says itself; under Wine, which cannot ask, it must run."""
        if WINE:
            assert self.process.poll() is None
        else:
            eventually(lambda: self.statistics()["connections now"] == "0")
