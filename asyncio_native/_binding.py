"""Which binding serves: the hot paths in C where they are there, else all of it over cffi.

The environment variable ASYNCIO_NATIVE_BINDING forces one: "c" or "cffi". Both stand on the very
same core, in the same extension file.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ._interpreter import FREE_THREADED


def _choose() -> str:
    wanted = os.environ.get("ASYNCIO_NATIVE_BINDING", "")
    if wanted not in ("", "c", "cffi"):
        raise ImportError(f"ASYNCIO_NATIVE_BINDING is c or cffi, not {wanted!r}")
    if sys.implementation.name != "cpython" or FREE_THREADED:
        if wanted == "c":
            raise ImportError("the binding in C is for CPython with the interpreter lock")
        return "cffi"
    return wanted or "c"


binding = _choose()
"""How Python calls the C library: "c" or "cffi"."""

if TYPE_CHECKING or binding == "cffi":
    from ._completion import Completion
    from ._operation import Operation
    from ._port import CompletionPort
    from ._socket import AsyncSocket
else:
    from ._fast_binding import AsyncSocket, Completion, CompletionPort, Operation

__all__ = ["AsyncSocket", "Completion", "CompletionPort", "Operation", "binding"]
