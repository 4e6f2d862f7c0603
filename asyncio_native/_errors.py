"""The exceptions, and which one a system error number becomes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from types import FunctionType
from typing import TypeVar

from ._native import lib


class BackendUnavailableError(OSError):
    """The backend is unknown, not compiled in or refused by the system; the text says which."""


class PortClosedError(OSError):
    """The completion port is closed, or belongs to the parent of this process (after a fork)."""


class OperationCancelledError(OSError):
    """The operation was cancelled, or its socket was closed before it was done."""


_Class = TypeVar("_Class", bound=type)


def shown_as(name: str) -> Callable[[_Class], _Class]:
    """Gives a base class's methods the name of the class that users know.

    So that the interpreter's own errors say "AsyncSocket.bind() takes 2 positional arguments ...".
    """

    def rename(base: _Class) -> _Class:
        for member in vars(base).values():
            function = getattr(member, "__func__", member)
            if isinstance(function, FunctionType):
                function.__qualname__ = f"{name}.{function.__name__}"
        return base

    return rename


_WINSOCK = 10000  # its first number; os.strerror knows none of them

#: Numbers of the C library that the module `errno` knows by others. On Windows that has Winsock's
#: for what only sockets have (ECONNRESET is 10054), and the C language's for the rest; a send on a
#: broken stream is EPIPE there too.
TRANSLATED = {
    number: portable
    for number, portable in (
        (lib.AN_ECANCELED, errno.ECANCELED),
        (lib.AN_EPIPE, errno.EPIPE),
        (lib.AN_ENOMEM, errno.ENOMEM),
        (lib.AN_EINTR, errno.EINTR),
        (lib.AN_EBADF, errno.EBADF),
        (lib.AN_EPERM, errno.EACCES),
        (lib.AN_EINVAL, errno.EINVAL),
        (lib.AN_EMFILE, errno.EMFILE),
        (lib.AN_EPORTCLOSED, errno.ESHUTDOWN),
    )
    if sys.platform == "win32"
}


def system_error(number: int) -> OSError:
    """The exception of an error number of the C library: the fitting subclass of `OSError`."""
    number = TRANSLATED.get(number, number)
    return OSError(number, _text(number))


def completion_error(number: int) -> OSError:
    """The exception of a completion's error number, which is translated."""
    if number == errno.ECANCELED:
        return OperationCancelledError(number, "the operation was cancelled")
    return OSError(number, _text(number))


def _text(number: int) -> str:
    if sys.platform == "win32" and (number >= _WINSOCK or number not in errno.errorcode):
        import ctypes

        return ctypes.FormatError(number).strip()
    return os.strerror(number)


def port_closed() -> PortClosedError:
    """The exception of every call that would start or wait on a closed port."""
    return PortClosedError(errno.ESHUTDOWN, "the completion port is closed")


def no_handler() -> RuntimeError:
    """The exception of a dequeue that met a completion of C code, which has no handler for them."""
    return RuntimeError(
        "a completion of an operation that C code started was dequeued, but that code has set no "
        "handler (an_py_port_set_handler); the completion waits for one"
    )


def other_port() -> ValueError:
    """The exception of C code that gives a port the completion of another one."""
    return ValueError("the completion is not of this port")


def socket_closed() -> OSError:
    """The exception of every call that would use a closed socket."""
    return OSError(errno.EBADF, "the socket is closed")
