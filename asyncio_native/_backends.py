"""Which backends there are."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from ._errors import BackendUnavailableError, system_error
from ._native import ffi, lib

_DESCRIPTIONS = ffi.typeof("an_backend_description[]")
_CAPACITY = 16
"""More than there are: five."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A system's interface for events, and whether it can be used here."""

    name: str
    """What `CompletionPort` takes: "iocp", "io_uring", "epoll", "kqueue" or "poll"."""
    available: bool
    """Whether a port can be opened with it here."""
    reason: str
    """Why not; empty when it is available."""


def backends() -> tuple[Backend, ...]:
    """All five backends, the fastest first; each one is tried to see whether it works here."""
    descriptions = ffi.new(_DESCRIPTIONS, _CAPACITY)
    count = lib.an_backends(descriptions, _CAPACITY)
    return tuple(
        Backend(
            ffi.string(descriptions[i].name).decode(),
            bool(descriptions[i].available),
            ffi.string(descriptions[i].reason).decode("utf-8", "replace"),
        )
        for i in range(count)
    )


def unavailable(name: str) -> BackendUnavailableError:
    """The error for a port that could not be opened with that backend: which, and why."""
    source = ""
    if name == "auto" and (chosen := os.environ.get("ASYNCIO_NATIVE_BACKEND")):
        name, source = chosen, " (from the environment variable ASYNCIO_NATIVE_BACKEND)"
    known = backends()
    for backend in known:
        if backend.name == name:
            why = backend.reason or "the system refused it"
            text = f"the backend {name!r}{source} is not available: {why}"
            break
    else:
        names = ", ".join(backend.name for backend in known)
        text = f"there is no backend {name!r}{source}; there are: auto, {names}"
    return BackendUnavailableError(errno.EOPNOTSUPP, text)


def opening_error(name: str, number: int) -> OSError:
    """The error for a port that the system did not open, by the number that it gave.

    Out of descriptors speaks of this process, not of the backend; so does out of memory, unless the
    backend cannot be opened by itself either (io_uring, where too little memory may be locked).
    """
    if number == lib.AN_ENOTSUP:
        return unavailable(name)
    chosen = os.environ.get("ASYNCIO_NATIVE_BACKEND", "") if name == "auto" else name
    works = {backend.name for backend in backends() if backend.available}
    if number in (errno.EMFILE, errno.ENFILE) or chosen in ("", "auto", *works):
        return system_error(number)
    return unavailable(name)
