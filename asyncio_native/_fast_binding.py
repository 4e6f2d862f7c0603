"""The public classes over the hot paths in C (csrc/python); what is not hot they have from Python.

Nothing may get lost when a signal handler of Python raises. In C none runs, but where this says so;
one may run between the return of a C call and the next instruction, which is why a batch comes in a
list that Python has already.
"""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

from . import _address, _arguments, _completion, _errors, _operation, _port_base
from . import _socket_base as base
from ._constants import KINDS
from ._extension import load
from ._memory import address_of
from ._native import ffi
from ._port_base import PortBase, open_port
from ._socket_base import SocketBase

_SOCKET = ffi.typeof("an_socket *")
_PORT = ffi.typeof("an_port *")


if TYPE_CHECKING:
    from . import _fast
else:
    _fast = load("_fast")

Completion = _fast.Completion
Operation = _fast.Operation


class AsyncSocket(_fast.Socket, SocketBase):
    __doc__ = SocketBase.__doc__

    __slots__ = ()

    # Not hot, so that a pointer may be made each time.
    _handle = property(lambda self: ffi.cast(_SOCKET, self._address))

    def _take(self, handle: Any, family: int) -> None:
        self._give(address_of(handle), family)


class CompletionPort(_fast.Port, PortBase):
    __doc__ = PortBase.__doc__

    __slots__ = ()

    _handle = property(lambda self: ffi.cast(_PORT, self._address))

    def __init__(self, backend: str = "auto", *, concurrency: int = 0) -> None:
        handle = open_port(backend, concurrency)
        # Python runs signal handlers in the main thread only.
        self._open(address_of(handle), threading.main_thread().ident)

    def dequeue_many(self, max_count: int = 256, timeout: float | None = None) -> list[Any]:
        """Waits for completions, and returns 1 to `max_count` of them; see `dequeue`.

        Returns an empty list at the timeout. No more than 4096 are returned at once.
        """
        done: list[Any] = []
        try:
            self._fill(done, max_count, timeout)
        except BaseException:
            if done:
                self._abandon(done)
            raise
        return done


def _associate_error(sock: Any, error: int) -> Exception:
    return _port_base.associate_error(sock, error) if error else _port_base.not_a_socket(sock)


def _share(fast: Any, portable: type, *names: str) -> None:
    """Gives a class in C what stands in the Python class of its name."""
    for name in ("__doc__", *names):
        setattr(fast, name, vars(portable)[name])


_share(Completion, _completion.Completion, "__repr__")
_share(Operation, _operation.Operation, "__repr__")
_fast.bind(
    AsyncSocket,
    KINDS,
    (socket.AF_INET, getattr(socket, "AF_INET6", -1), socket.SOCK_STREAM),
    timeout_ns=_arguments.timeout_ns,
    nanoseconds=_arguments.nanoseconds,
    integer=_arguments.integer,
    readable=_arguments.readable,
    writable=_arguments.writable,
    encode=_address.encode,
    address_of=address_of,
    decode=_address.decode,
    file_descriptor=base.file_descriptor,
    refusal=SocketBase._refusal,
    dequeue_error=_port_base.dequeue_error,
    start_error=_port_base.start_error,
    associate_error=_associate_error,
    port_closed=_errors.port_closed,
    no_handler=_errors.no_handler,
    other_port=_errors.other_port,
    result=_completion.Completion.result,
    error_number=_errors.TRANSLATED.get if _errors.TRANSLATED else None,
)
