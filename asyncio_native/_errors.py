"""The exceptions, and which one a system error number becomes."""

from __future__ import annotations

import os

from ._native import lib


class BackendUnavailableError(OSError):
    """The backend is unknown, not compiled in or refused by the system; the text says which."""


class PortClosedError(OSError):
    """The completion port is closed, or belongs to the parent of this process (after a fork)."""


class OperationCancelledError(OSError):
    """The operation was cancelled, or its socket was closed before it was done."""


def system_error(number: int) -> OSError:
    """The exception of a system call's error number: the fitting subclass of `OSError`."""
    return OSError(number, os.strerror(number))


def completion_error(number: int) -> OSError:
    """The exception of a completion's error number."""
    if number == lib.AN_ECANCELED:
        return OperationCancelledError(number, "the operation was cancelled")
    if number == lib.AN_ETIMEDOUT:
        return TimeoutError(number, os.strerror(number))
    return system_error(number)


def port_closed() -> PortClosedError:
    """The exception of every call that would start or wait on a closed port."""
    return PortClosedError(lib.AN_EPORTCLOSED, "the completion port is closed")


def socket_closed() -> OSError:
    """The exception of every call that would use a closed socket."""
    return OSError(lib.AN_EBADF, "the socket is closed")
