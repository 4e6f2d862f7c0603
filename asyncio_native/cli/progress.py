"""A progress bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TextIO


class Progress:
    """Shows bars on `stream` if that is a terminal, and leaves no trace of them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = stream.isatty()

    @contextlib.contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar; the function that it yields is called with what has been done so far."""
        if not self._shown:
            yield lambda done: None
            return
        from tqdm import tqdm  # here, as it takes longer to import than most commands run

        tqdm.monitor_interval = 0  # no thread that watches for bars that nobody updates
        with tqdm(
            total=total,
            desc=name,
            unit="",
            file=self._stream,
            leave=False,
            ncols=self._columns(),
            nrows=24,  # any number above one: there is one bar at a time
        ) as shown:

            def show(done: int) -> None:
                shown.update(done - shown.n)

            yield show

    def _columns(self) -> int:
        """The terminal's width; 80 where it does not know it, for which tqdm would show nothing."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            columns = 0
        return columns - 1 if columns > 1 else 80
