"""What the commands share: the parser's manners, types of arguments, the choice of the backend."""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO, TypeAlias

import asyncio_native as an

PROGRAM = "asyncio-native"


class UsageError(Exception):
    """The command line is wrong: one line, exit status 2."""


class CommandError(Exception):
    """The command could not do its work: one line, exit status 1."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line (argparse prints the usage before)."""

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError`."""
        raise UsageError(message)


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


def give_up(stream: TextIO) -> None:
    """Closes a standard stream whose reader is gone, else the exit would fail to flush it."""
    with contextlib.suppress(OSError):  # of the last flush; the stream is closed nevertheless
        stream.close()


def tell(text: str) -> None:
    """Prints to standard error; that nobody reads it any more is no reason to end."""
    if sys.stderr is None or sys.stderr.closed:  # None: the process was started without one
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError as error:
        # Another error (a full disk) may pass. Windows has EINVAL for a pipe without a reader.
        if error.errno in (errno.EPIPE, errno.EINVAL):
            give_up(sys.stderr)


def counted(count: int, noun: str) -> str:
    """A number of things, in words: "1 client", "10,000 clients"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def error_text(error: OSError) -> str:
    """What went wrong in the system's words, without number and file name decorations."""
    return error.strerror or str(error) or type(error).__name__


def whole_number(minimum: int, maximum: int) -> Callable[[str], int]:
    """A type for argparse: an integer from `minimum` to `maximum`; 10_000 may be written so."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"not a whole number: {text!r}") from None
        if not minimum <= number <= maximum:
            raise argparse.ArgumentTypeError(f"must be from {minimum} to {maximum}, not {number}")
        return number

    return convert


def seconds(minimum: float, maximum: float) -> Callable[[str], float]:
    """A type for argparse: a time in seconds from `minimum` to `maximum`."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None
        if not minimum <= number <= maximum:  # also refuses what is not a number at all (nan)
            raise argparse.ArgumentTypeError(
                f"must be from {minimum:g} to {maximum:g} s, not {text}"
            )
        return number

    return convert


def add_backend_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--backend``."""
    names = [backend.name for backend in an.backends()]
    parser.add_argument(
        "--backend",
        choices=["auto", *names],
        default="auto",
        help="the system interface to use (default: auto, the fastest that works here; "
        "the environment variable ASYNCIO_NATIVE_BACKEND overrides auto)",
    )


def choose_backend(name: str) -> str:
    """The name of the backend that a port opened with `name` really uses.

    Raises `UsageError` with the reason if it is not available here.
    """
    try:
        with an.CompletionPort(name) as port:
            return port.backend
    except an.BackendUnavailableError as error:
        raise UsageError(error_text(error)) from None
