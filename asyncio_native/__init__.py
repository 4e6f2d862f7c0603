"""A completion port for Python, the model of Windows' IOCP on every system.

Start an operation on a socket, later dequeue its completion from the port, on a thread that you
choose. There are no callbacks::

    import asyncio_native as an

    port = an.CompletionPort()
    listener = an.AsyncSocket()
    listener.bind(("127.0.0.1", 5555))
    listener.listen()
    port.associate(listener)
    listener.accept(multishot=True)
    while True:
        for c in port.dequeue_many(timeout=1.0):
            if c.kind is an.RECV and c.data:
                c.socket.send(c.data, quiet=True)
            elif c.kind is an.RECV:
                c.socket.close(flush=True)
            elif c.kind is an.ACCEPT and c.accepted:
                port.associate(c.accepted)
                c.accepted.recv(multishot=True, pause_above=1 << 20)

The C interface below it is documented in the header asyncio_native.h; see `get_include`. In Cython
it is `cimport asyncio_native`.
"""

from __future__ import annotations

from pathlib import Path as _Path

from ._backends import Backend, backends
from ._binding import AsyncSocket, Completion, CompletionPort, Operation, binding
from ._constants import (
    ACCEPT,
    CONNECT,
    DISCONNECT,
    POST,
    RECV,
    RECVFROM,
    SEND,
    SENDFILE,
    SENDTO,
    TIMER,
    OperationKind,
)
from ._errors import BackendUnavailableError, OperationCancelledError, PortClosedError
from ._native import ffi as _ffi
from ._native import lib as _lib
from ._statistics import SocketStatistics, Statistics

__all__ = [
    "ACCEPT",
    "CONNECT",
    "DISCONNECT",
    "POST",
    "RECV",
    "RECVFROM",
    "SEND",
    "SENDFILE",
    "SENDTO",
    "TIMER",
    "AsyncSocket",
    "Backend",
    "BackendUnavailableError",
    "Completion",
    "CompletionPort",
    "Operation",
    "OperationCancelledError",
    "OperationKind",
    "PortClosedError",
    "SocketStatistics",
    "Statistics",
    "__version__",
    "backends",
    "binding",
    "get_include",
]

__version__: str = _ffi.string(_lib.an_version()).decode()


def get_include() -> str:
    """The folder of the C headers, for a compiler's -I.

    `asyncio_native.h` is the C interface; an extension in C or Cython includes
    `asyncio_native_capi.h`, with which it calls the library in this package and links nothing.
    """
    return str(_Path(__file__).parent / "include")


for _public in (
    AsyncSocket,
    Backend,
    BackendUnavailableError,
    Completion,
    CompletionPort,
    Operation,
    OperationCancelledError,
    OperationKind,
    PortClosedError,
    SocketStatistics,
    Statistics,
    backends,
):
    _public.__module__ = __name__
del _public
