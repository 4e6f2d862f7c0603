"""What the C interface for extensions does with Python objects: csrc/python/capi.c calls it.

An extension imports this module, by the header asyncio_native_capi.h, and takes `table` from it.
Handles are given as integers, their addresses. The header says what each function does.
"""

from __future__ import annotations

import contextlib
import errno
import weakref
from collections.abc import Callable
from typing import Any

from ._binding import AsyncSocket, Completion, CompletionPort
from ._errors import TRANSLATED, completion_error, port_closed, socket_closed
from ._extension import load
from ._memory import address_of
from ._native import ffi, lib
from ._port_base import not_a_socket

_SOCKET = ffi.typeof("an_socket *")

table: Any = load("_table").table
"""The capsule with the functions, see `struct an_capi` in the header."""

# What C code has, by the address of its handle.
_ports: weakref.WeakValueDictionary[int, CompletionPort] = weakref.WeakValueDictionary()
_sockets: weakref.WeakValueDictionary[int, AsyncSocket] = weakref.WeakValueDictionary()


def _checked(port: object) -> CompletionPort:
    if not isinstance(port, CompletionPort):
        raise TypeError(f"a CompletionPort is needed, not {type(port).__name__}")
    return port


def port_address(port: object) -> int:
    """The handle of a port; from now on C code may dequeue from it."""
    checked = _checked(port)
    if checked.closed:
        raise port_closed()
    checked._lend()
    address = address_of(checked._handle)
    _ports[address] = checked
    return address


def socket_address(sock: object) -> int:
    """The handle of a socket."""
    if not isinstance(sock, AsyncSocket):
        raise not_a_socket(sock)
    if sock.closed:
        raise _closed(sock.port)
    address = address_of(sock._handle)
    _sockets[address] = sock
    return address


def _closed(port: CompletionPort | None) -> OSError:
    return port_closed() if port is not None and port.closed else socket_closed()


def new_socket(address: int) -> AsyncSocket:
    """An `AsyncSocket` that owns a handle of C code; or the one that it has been from the start."""
    known = _sockets.get(address)
    with contextlib.suppress(AttributeError):  # it has given its handle back
        if known is not None and address_of(known._handle) == address:
            return known
    handle = ffi.cast(_SOCKET, address)
    owner = lib.an_socket_port(handle)
    port = _ports.get(address_of(owner))
    if port is None and owner != ffi.NULL:
        raise ValueError("the socket is associated with a port that Python does not have")
    if lib.an_socket_is_closed(handle):
        raise _closed(port)
    sock = AsyncSocket.__new__(AsyncSocket)
    family = lib.an_socket_family(handle)
    try:
        sock._take(handle, family)
        if port is not None:
            # If another thread closes it just now, then it is closed.
            with contextlib.suppress(OSError):
                port.associate(sock)
        return sock
    except BaseException:  # a signal handler raised, or memory ran out: it stays with C code
        sock._forget()
        raise


def new_completion(port: object, address: int) -> Completion | None:
    """What Python has for an entry that C code dequeued; None if it is not to be shown."""
    return _checked(port)._decode(address)


def set_handler(port: object, handler: Callable[..., None] | None) -> None:
    """What takes completions of operations that C code started, when Python dequeues them."""
    _checked(port)._foreign = handler


def exception(number: int) -> OSError:
    """The exception of an error number of the library."""
    if number == lib.AN_EPORTCLOSED:
        return port_closed()
    number = TRANSLATED.get(number, number)
    return socket_closed() if number == errno.EBADF else completion_error(number)
