"""The command line: ``python -m asyncio_native`` and the script ``asyncio-native``.

Each command is a module with two functions: ``add_parser(subparsers)`` declares its arguments and
``run(arguments)`` does the work and returns the exit status. A new command is a new module and one
more entry in `COMMANDS`.

Exit status: 0 success, 1 failure while running, 2 wrong usage, 130 interrupted. A failure is one
line on standard error, ``asyncio-native: error: ...``, never a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import asyncio_native as an

from . import backends, c10k, echo, proxy
from .common import PROGRAM, CommandError, Parser, UsageError, error_text, give_up, tell

__all__ = ["main"]

COMMANDS = (backends, echo, proxy, c10k)


def _build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="A completion port (proactor) for Python: see its backends, run a server, "
        "measure ten thousand clients on this machine.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {an.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def _fail(message: str, status: int) -> int:
    tell(f"{PROGRAM}: error: {message}")
    return status


def _run(argv: Sequence[str] | None) -> int:
    status: int
    try:
        arguments = _build_parser().parse_args(argv)
        status = arguments.run(arguments)
    except SystemExit as exit_request:  # argparse after --help and --version
        status = exit_request.code if isinstance(exit_request.code, int) else 0
    sys.stdout.flush()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: that of the process) and returns its exit status."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except UsageError as error:
        return _fail(str(error), 2)
    except CommandError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        give_up(sys.stdout)
        return 1
    except OSError as error:
        return _fail(error_text(error), 1)
