"""``asyncio-native backends``: which system interfaces work here, and why the others do not."""

from __future__ import annotations

import argparse
import json

import asyncio_native as an

from .common import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Declares the command's arguments."""
    parser = subparsers.add_parser(
        "backends",
        help="list the backends, available or why not",
        description="Lists the backends: available here, or the reason why not.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array of objects")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the list, one line or one object for each backend."""
    found = an.backends()
    if arguments.json:
        objects = [
            {"name": backend.name, "available": backend.available, "reason": backend.reason}
            for backend in found
        ]
        print(json.dumps(objects, indent=2))
        return 0
    width = max(len(backend.name) for backend in found)
    for backend in found:
        verdict = "available" if backend.available else f"not available: {backend.reason}"
        print(f"{backend.name:<{width}}  {verdict}")
    return 0
