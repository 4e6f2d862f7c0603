"""A socket that starts operations, over cffi: the portable binding."""

from __future__ import annotations

import socket as stdlib
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

from ._address import Address, encode
from ._arguments import UINT64_MAX, integer, readable, timeout_ns, writable
from ._constants import (
    ACCEPT,
    CONNECT,
    DISCONNECT,
    RECV,
    RECVFROM,
    SEND,
    SENDFILE,
    SENDTO,
    OperationKind,
)
from ._memory import address_of
from ._native import ffi, lib
from ._operation import Operation, let_go
from ._socket_base import HasFileno, SocketBase, file_descriptor

if TYPE_CHECKING:
    # The type checker knows this name without the package; collections.abc has it from 3.12 on.
    from typing_extensions import Buffer

    from ._port import CompletionPort


_NULL = ffi.NULL
# No operation, with the mark that the failure of a quiet send is Python's to report.
_QUIET = ffi.cast("an_operation *", 1)
_MULTISHOT = lib.AN_MULTISHOT
_FLUSH = lib.AN_FLUSH
_FOREVER_NS = lib.AN_FOREVER
_send = lib.an_socket_send

_SIZE = ffi.typeof("size_t *")
_BUFFERS = ffi.typeof("an_buffer[]")


class AsyncSocket(SocketBase):
    __doc__ = SocketBase.__doc__

    __slots__ = ("__weakref__", "_family", "_handle", "_key", "_port", "_state")

    # Its key in the port's dict of sockets; 0 before its first quiet send. Only failures of quiet
    # sends have to find their socket there, and an idle connection saves the memory.
    _key: int

    def _take(self, handle: Any, family: int) -> None:
        self._family = family
        self._port = None
        self._state = None
        self._key = 0
        self._handle = handle

    def _forget(self) -> None:
        if hasattr(self, "_handle"):
            del self._handle
        self._port = None

    def close(self, *, flush: bool = False) -> None:
        """Closes the socket, and returns at once.

        Plainly: the peer is told now, operations in flight complete as cancelled, what was not yet
        handed to the system is dropped. `flush=True` hands over what was sent before, while the
        port is dequeued from, and then closes; a failure of that is one completion. A plain close
        while that goes on, also at the end of a `with` block, stops it and drops the rest. Never
        raises on what is closed.
        """
        if flush and self._key and lib.an_socket_unsent(self._handle):
            self._keep_while_flushing()
        lib.an_socket_close(self._handle, _FLUSH if flush else 0)

    def _keep_while_flushing(self) -> None:
        """Keeps this object until its quiet sends have gone out or failed.

        The completion of a failure has to find it, also when the program has let go of it. An empty
        send completes behind all that was sent before it; its completion is not shown to the user.
        """
        port = self._port
        if port is None or lib.an_socket_type(self._handle) != stdlib.SOCK_STREAM:
            return
        operation = Operation(SEND, self, port, None)
        port._flushes[operation._key] = operation
        if _send(self._handle, operation._handle, _NULL, 0, _FOREVER_NS):
            port._flushes.pop(operation._key, None)

    # -- overlapped -------------------------------------------------------------------------------

    def accept(self, *, multishot: bool = False, timeout: float | None = None) -> Operation:
        """Completes with a connection in `accepted` and its `address` (accept4(2), AcceptEx).

        multishot: goes on, with one completion for each connection. Running out of descriptors is a
        completion with `more`, and accepting goes on by itself when there are some again.
        timeout: seconds, after which it completes with `TimeoutError`; for a multishot, when
        nothing came for that long.
        """
        wait_ns = timeout_ns(timeout)
        flags = _MULTISHOT if multishot else 0
        operation = self._operation(ACCEPT)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_accept(self._handle, operation._handle, flags, wait_ns)
        if error:
            raise self._failed(operation, error)
        return operation

    def connect(self, address: Address, *, timeout: float | None = None) -> Operation:
        """Completes when connected or failed (connect(2), ConnectEx).

        address: with a numeric host. timeout: seconds.
        """
        wait_ns = timeout_ns(timeout)
        target = encode(self._family, address)
        operation = self._operation(CONNECT)
        operation._held = target
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_connect(self._handle, operation._handle, target, wait_ns)
        if error:
            raise self._failed(operation, error)
        return operation

    def recv(
        self,
        max_bytes: int = 65536,
        *,
        multishot: bool = False,
        pause_above: int | None = None,
        timeout: float | None = None,
    ) -> Operation:
        """Completes when at least one byte is there, with `data`; b"" at the end of the stream.

        No memory is tied to it while nothing comes: the port lends a buffer when data is there. On
        a datagram socket, which must be connected, b"" is an empty datagram. As recv(2).

        max_bytes: the most that one completion carries. multishot: goes on until the end, an
        error or a cancel. pause_above: the multishot receives nothing while `unsent` is over that
        many bytes, and goes on by itself. timeout: seconds; for a multishot, without anything.
        """
        wait_ns = timeout_ns(timeout)
        length = integer(max_bytes, "max_bytes", 1)
        limit = UINT64_MAX if pause_above is None else integer(pause_above, "pause_above", 0)
        flags = _MULTISHOT if multishot else 0
        operation = self._operation(RECV, b"")
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_recv(
            self._handle, operation._handle, _NULL, length, flags, limit, wait_ns
        )
        if error:
            raise self._failed(operation, error)
        return operation

    def recv_into(self, buffer: Buffer, *, timeout: float | None = None) -> Operation:
        """As `recv`, but into the caller's memory, with the count in `transferred` (recv(2)).

        buffer: writable, contiguous, not empty; it must not be resized until the completion is
        dequeued (a `bytearray` raises `BufferError` then). timeout: seconds.
        """
        wait_ns = timeout_ns(timeout)
        view = writable(buffer)
        operation = self._operation(RECV, None, ([view], None))
        length = len(view)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_recv(
            self._handle, operation._handle, view, length, 0, UINT64_MAX, wait_ns
        )
        if error:
            raise self._failed(operation, error)
        return operation

    def recvfrom(
        self, max_bytes: int = 65536, *, multishot: bool = False, timeout: float | None = None
    ) -> Operation:
        """Completes with a datagram in `data`, its sender's `address`, and `truncated`.

        As recvfrom(2). max_bytes: a longer datagram is cut to it. multishot: one for each datagram.
        timeout: seconds; for a multishot, without any. Raises `ValueError` on a stream.
        """
        wait_ns = timeout_ns(timeout)
        length = integer(max_bytes, "max_bytes", 1)
        flags = _MULTISHOT if multishot else 0
        operation = self._operation(RECVFROM, b"")
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_recvfrom(
            self._handle, operation._handle, _NULL, length, flags, wait_ns
        )
        if error:
            raise self._failed(operation, error)
        return operation

    def recvfrom_into(self, buffer: Buffer, *, timeout: float | None = None) -> Operation:
        """As `recvfrom`, but into the caller's memory, with the count in `transferred`.

        buffer: as for `recv_into`. timeout: seconds.
        """
        wait_ns = timeout_ns(timeout)
        view = writable(buffer)
        operation = self._operation(RECVFROM, None, ([view], None))
        length = len(view)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_recvfrom(self._handle, operation._handle, view, length, 0, wait_ns)
        if error:
            raise self._failed(operation, error)
        return operation

    @overload
    def send(
        self, data: Buffer, *, quiet: Literal[False] = ..., timeout: float | None = ...
    ) -> Operation: ...
    @overload
    def send(self, data: Buffer, *, quiet: Literal[True], timeout: float | None = ...) -> None: ...
    @overload
    def send(
        self, data: Buffer, *, quiet: bool, timeout: float | None = ...
    ) -> Operation | None: ...
    def send(
        self, data: Buffer, *, quiet: bool = False, timeout: float | None = None
    ) -> Operation | None:
        """Completes when ALL bytes were handed to the system, or at a failure (send(2)).

        `transferred` is the number of bytes handed over. On a stream `send(b"")` completes when all
        that was sent before it has been. The data is held, and must not change, until then.

        quiet: returns None and completes only at a failure, as a `SEND` with `operation` None, and
        in `transferred` the bytes lost; the data is the caller's again at once. timeout: seconds.
        """
        if quiet and timeout is None and type(data) is bytes:
            if not self._key:
                self._enlist()
            error = _send(self._handle, _QUIET, data, len(data), _FOREVER_NS)
            if error:
                raise self._refusal(error)
            return None
        return self._send_any(data, quiet, timeout)

    def _send_any(self, data: Buffer, quiet: bool, timeout: float | None) -> Operation | None:
        wait_ns = timeout_ns(timeout)
        if quiet:
            if not self._key:
                self._enlist()
            with readable(data) as view:
                error = _send(self._handle, _QUIET, view, len(view), wait_ns)
            if error:
                raise self._refusal(error)
            return None
        # bytes cannot change, so that holding them is enough.
        source: Any = data if type(data) is bytes else readable(data)
        operation = self._operation(SEND, None, data if source is data else ([source], None))
        length = len(source)
        operation._port._operations[operation._key] = operation
        error = _send(self._handle, operation._handle, source, length, wait_ns)
        if error:
            raise self._failed(operation, error)
        return operation

    @overload
    def sendv(
        self, buffers: Iterable[Buffer], *, quiet: Literal[False] = ..., timeout: float | None = ...
    ) -> Operation: ...
    @overload
    def sendv(
        self, buffers: Iterable[Buffer], *, quiet: Literal[True], timeout: float | None = ...
    ) -> None: ...
    @overload
    def sendv(
        self, buffers: Iterable[Buffer], *, quiet: bool, timeout: float | None = ...
    ) -> Operation | None: ...
    def sendv(
        self, buffers: Iterable[Buffer], *, quiet: bool = False, timeout: float | None = None
    ) -> Operation | None:
        """Sends several buffers as if they were joined, else as `send` (sendmsg(2)).

        On a datagram socket they are one datagram.
        """
        wait_ns = timeout_ns(timeout)
        if isinstance(buffers, (str, bytes, bytearray, memoryview)):
            raise TypeError("sendv takes an iterable of bytes-like objects; send takes one of them")
        views: list[Any] = []
        try:
            for buffer in buffers:
                views.append(readable(buffer))
            pieces = ffi.new(_BUFFERS, len(views))
            for piece, view in zip(pieces, views, strict=True):
                piece.data = view
                piece.length = len(view)
            if quiet:
                if not self._key:
                    self._enlist()
                error = lib.an_socket_sendv(self._handle, _QUIET, pieces, len(views), wait_ns)
                if error:
                    raise self._refusal(error)
                for view in views:
                    ffi.release(view)
                return None
            operation = self._operation(SEND)
        except BaseException:
            for view in views:
                ffi.release(view)
            raise
        count = len(views)
        operation._held = (views, pieces)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_sendv(self._handle, operation._handle, pieces, count, wait_ns)
        if error:
            raise self._failed(operation, error)
        return operation

    @overload
    def sendto(
        self,
        data: Buffer,
        address: Address,
        *,
        quiet: Literal[False] = ...,
        timeout: float | None = ...,
    ) -> Operation: ...
    @overload
    def sendto(
        self, data: Buffer, address: Address, *, quiet: Literal[True], timeout: float | None = ...
    ) -> None: ...
    @overload
    def sendto(
        self, data: Buffer, address: Address, *, quiet: bool, timeout: float | None = ...
    ) -> Operation | None: ...
    def sendto(
        self,
        data: Buffer,
        address: Address,
        *,
        quiet: bool = False,
        timeout: float | None = None,
    ) -> Operation | None:
        """Sends one datagram to an address with a numeric host; else as `send`.

        As sendto(2). A quiet one fails as `SENDTO`. Raises `ValueError` on a stream.
        """
        wait_ns = _FOREVER_NS if timeout is None else timeout_ns(timeout)
        target = encode(self._family, address)
        source: Any = data if type(data) is bytes else readable(data)
        if quiet:
            if not self._key:
                self._enlist()
            error = lib.an_socket_sendto(self._handle, _QUIET, source, len(source), target, wait_ns)
            if source is not data:
                ffi.release(source)
            if error:
                raise self._refusal(error)
            return None
        held = ([] if source is data else [source], (source, target))
        operation = self._operation(SENDTO, None, held)
        length = len(source)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_sendto(
            self._handle, operation._handle, source, length, target, wait_ns
        )
        if error:
            raise self._failed(operation, error)
        return operation

    def sendfile(
        self,
        file: HasFileno | int,
        offset: int = 0,
        count: int | None = None,
        *,
        timeout: float | None = None,
    ) -> Operation:
        """Sends bytes of an open file, with no copy through Python.

        As sendfile(2) and TransmitFile do it. file: a file object or descriptor; the descriptor is
        duplicated, and the file's own position neither used nor moved. offset: bytes from its
        start. count: bytes; None for up to its end. Past the end it completes with what was there.
        timeout: seconds. Raises `ValueError` on a datagram socket.
        """
        wait_ns = timeout_ns(timeout)
        start = integer(offset, "offset", 0)
        length = UINT64_MAX if count is None else integer(count, "count", 0)
        descriptor = file_descriptor(file)
        operation = self._operation(SENDFILE)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_sendfile(
            self._handle, operation._handle, descriptor, start, length, wait_ns
        )
        if error:
            raise self._failed(operation, error)
        return operation

    def disconnect(self, *, timeout: float | None = None) -> Operation:
        """Ends the sending side, after what was sent before it has been handed over.

        The peer gets the end of the stream; receiving goes on. It is shutdown(2) at the right
        moment. timeout: seconds. Raises `ValueError` on a datagram socket.
        """
        wait_ns = timeout_ns(timeout)
        operation = self._operation(DISCONNECT)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_disconnect(self._handle, operation._handle, wait_ns)
        if error:
            raise self._failed(operation, error)
        return operation

    def cancel(self) -> int:
        """Cancels all that is in flight on this socket, quiet sends too, and returns at once.

        Returns the number of operations whose outcome was still open, without the quiet ones; they
        complete with the cancelled error.
        """
        count = ffi.new(_SIZE)
        if error := lib.an_socket_cancel(self._handle, count):
            raise self._refusal(error)
        cancelled: int = count[0]
        return cancelled

    # -- within -----------------------------------------------------------------------------------

    def _operation(self, kind: OperationKind, value: Any = None, held: Any = None) -> Operation:
        """A new operation, not started.

        It goes into the port's dict just before the C call that starts it, because another thread
        may dequeue its completion before that call returns; no Python call may stand between the
        two, as a signal handler could raise there.
        """
        port = self._port
        if port is None:
            let_go(held)
            raise self._refusal(lib.AN_EINVAL)
        operation = Operation(kind, self, port, value)
        operation._held = held
        return operation

    def _failed(self, operation: Operation, error: int) -> Exception:
        """Takes back an operation that did not start, and returns what to raise.

        The traceback of the exception keeps the caller's variables: buffers must not stay locked.
        """
        operation._port._operations.pop(operation._key, None)
        operation._let_go()
        return self._refusal(error)

    def _enlist(self) -> None:
        """Lets the failure of a quiet send find this object."""
        port = self._port
        if port is not None:
            key = address_of(self._handle)
            port._sockets[key] = weakref.ref(self)
            self._key = key

    def __del__(
        self,
        _lib: Any = lib,
        _warn: Callable[..., None] = warnings.warn,
        _flush: int = _FLUSH,
    ) -> None:
        # What it needs is bound here: at the interpreter's exit the module may be empty already.
        try:
            handle = self._handle
        except AttributeError:
            return  # never opened
        closed = _lib.an_socket_is_closed(handle)
        text = "" if closed else f"unclosed {self!r}"
        port = self._port
        if port is not None and self._key:
            if not port.closed and (
                _lib.an_socket_unsent(handle) or _lib.an_socket_unreported(handle)
            ):
                self._linger(handle, port)
            else:
                # Before the handle is given back: its address may be another socket's soon.
                port._sockets.pop(self._key, None)
                # No use of the handle from here on, also by a finalizer that still finds us.
                del self._handle
                _lib.an_socket_free(handle, _flush)
        else:
            del self._handle
            _lib.an_socket_free(handle, _flush)
        if text:
            _warn(text, ResourceWarning, stacklevel=2, source=self)

    def _linger(self, handle: Any, port: CompletionPort) -> None:
        """Keeps this object, which its last user has dropped, for a failure that may be reported.

        Until its quiet sends have gone out, or the completion of their failure was dequeued. Python
        does not finalize an object again, so that the handle frees itself from here on.
        """
        key = self._key
        sockets = port._sockets

        def give_back(handle: Any) -> None:
            sockets.pop(key, None)
            lib.an_socket_free(handle, _FLUSH)

        self._handle = ffi.gc(handle, give_back)
        self._enlist()  # garbage collection has cleared the weak reference
        if lib.an_socket_unreported(handle):
            port._lingering[key] = self
        self.close(flush=True)


def accepted_socket(family: int) -> AsyncSocket:
    """An `AsyncSocket` without a handle yet."""
    sock = AsyncSocket.__new__(AsyncSocket)
    sock._family = family
    sock._port = None
    sock._state = None
    sock._key = 0
    return sock
