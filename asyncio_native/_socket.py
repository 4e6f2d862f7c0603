"""A socket that starts operations."""

from __future__ import annotations

import socket as stdlib
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, overload

from ._address import Address, AddressSlot, encode
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
from ._errors import port_closed, socket_closed, system_error
from ._memory import address_of
from ._native import ffi, lib
from ._operation import Operation
from ._statistics import SocketStatistics

if TYPE_CHECKING:
    # The type checker knows this name without the package; collections.abc has it from 3.12 on.
    from typing_extensions import Buffer

    from ._port import CompletionPort


class HasFileno(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """The file's descriptor."""
        ...


_NULL = ffi.NULL
_MULTISHOT = lib.AN_MULTISHOT
_FLUSH = lib.AN_FLUSH
_FOREVER_NS = lib.AN_FOREVER
_send = lib.an_socket_send

_SOCKET_OUT = ffi.typeof("an_socket **")
_DESCRIPTOR = ffi.typeof("an_descriptor *")
_SIZE = ffi.typeof("size_t *")
_STATISTICS = ffi.typeof("an_socket_statistics *")
_INT = ffi.typeof("int *")
_INT_SIZE = ffi.sizeof("int")
_CHARS = ffi.typeof("char[]")
_BUFFERS = ffi.typeof("an_buffer[]")
_OPTION_SIZE_MAX = 65536
"""No socket option is longer; the memory for it is allocated before the system is asked."""

BACKLOG = max(stdlib.SOMAXCONN, 4096)
"""The default of `listen`: the interpreter's constant may be the one of an old system's headers."""


class AsyncSocket:
    """A non-blocking socket that starts overlapped operations on a completion port.

    It is not inherited by child processes across exec. Its operations need a port: see
    `CompletionPort.associate`. Each returns an `Operation` at once, and its completion comes
    through the port. Any thread may call anything at any time.

    family, type, proto: as for `socket.socket`, the system's numbers for socket(2). Raises
    `OSError` when the system refuses.

    It is a context manager, which closes it. One that is dropped without `close` is closed with a
    `ResourceWarning` (what was sent quietly still goes out); with operations in flight it is kept
    by its port until they are done.

    Misuse raises: `PortClosedError` after its port was closed and in a forked child, `OSError` with
    EBADF after its own close, `ValueError` when it is not associated, for a value out of range and
    for what this type of socket cannot do, `TypeError` for wrong types. What the network does is
    never raised: it arrives as a completion.
    """

    __slots__ = ("__weakref__", "_family", "_handle", "_key", "_port", "_state")

    _handle: Any
    _family: int
    _port: CompletionPort | None
    _state: Any
    # Its key in the port's dict of sockets; 0 before its first quiet send. Only failures of quiet
    # sends have to find their socket there, and an idle connection saves the memory.
    _key: int

    def __init__(
        self,
        family: int = stdlib.AF_INET,
        type: int = stdlib.SOCK_STREAM,
        proto: int = 0,
    ) -> None:
        _number_arguments(family=family, type=type, proto=proto)
        made = ffi.new(_SOCKET_OUT)
        if error := lib.an_socket_open(made, family, type, proto):
            raise system_error(error)
        self._begin(int(family))
        self._handle = made[0]

    def _begin(self, family: int) -> None:
        self._family = family
        self._port = None
        self._state = None
        self._key = 0

    @classmethod
    def adopt(cls, sock: stdlib.socket | int) -> Self:
        """Takes over an open `socket.socket`, or a file descriptor, and owns it from then on.

        It becomes non-blocking and not inheritable; the `socket.socket` is detached. When this
        raises (`OSError`: not a socket), nothing was taken over.
        """
        if isinstance(sock, stdlib.socket):
            descriptor = sock.fileno()
            if descriptor < 0:
                raise socket_closed()
        else:
            descriptor = integer(sock, "the descriptor", 0, 2**31 - 1)
        made = ffi.new(_SOCKET_OUT)
        if error := lib.an_socket_adopt(made, descriptor):
            raise system_error(error)
        adopted = cls.__new__(cls)
        adopted._begin(lib.an_socket_family(made[0]))
        adopted._handle = made[0]
        if isinstance(sock, stdlib.socket):
            sock.detach()
        return adopted

    def detach(self) -> stdlib.socket:
        """Gives the socket back as a non-blocking `socket.socket`; this object is closed then.

        Raises `ValueError` once it was associated with a port.
        """
        descriptor = ffi.new(_DESCRIPTOR)
        if error := lib.an_socket_detach(self._handle, descriptor):
            if error == lib.AN_EINVAL or self._port is not None:
                raise ValueError("a socket that was associated with a port cannot be detached")
            raise self._refusal(error)
        try:
            sock = stdlib.socket(fileno=descriptor[0])
        except BaseException:
            stdlib.close(descriptor[0])
            raise
        sock.setblocking(False)
        return sock

    # -- synchronous ------------------------------------------------------------------------------

    def bind(self, address: Address) -> None:
        """Sets its own address: `(host, port)`, '' for any host; a path for AF_UNIX (bind(2))."""
        self._check(lib.an_socket_bind(self._handle, encode(self._family, address)))

    def listen(self, backlog: int = BACKLOG) -> None:
        """Begins to take connections (listen(2)).

        backlog: connections that may wait to be accepted; the system has a limit of its own.
        """
        self._check(lib.an_socket_listen(self._handle, _backlog(backlog)))

    def shutdown(self, how: int) -> None:
        """Ends one or both directions at once (shutdown(2)); see also `disconnect`.

        how: `socket.SHUT_RD`, `SHUT_WR` or `SHUT_RDWR`.
        """
        self._check(lib.an_socket_shutdown(self._handle, integer(how, "how", 0, 2)))

    def fileno(self) -> int:
        """The descriptor, to look at and not to read, write or close; -1 when closed."""
        return lib.an_socket_descriptor(self._handle)

    def getsockname(self) -> Any:
        """Its own address, as the stdlib shows it (getsockname(2))."""
        slot = AddressSlot()
        self._check(lib.an_socket_local_address(self._handle, slot.pointer))
        return slot.decode(self._family)

    def getpeername(self) -> Any:
        """The peer's address, as the stdlib shows it (getpeername(2))."""
        slot = AddressSlot()
        self._check(lib.an_socket_peer_address(self._handle, slot.pointer))
        return slot.decode(self._family)

    def setsockopt(
        self, level: int, optname: int, value: int | Buffer | None, optlen: int | None = None
    ) -> None:
        """Sets an option, as in `socket` (setsockopt(2)).

        value: an integer, bytes, or None with a length `optlen`.
        """
        _number_arguments(level=level, optname=optname)
        if value is None:
            size = integer(optlen, "optlen", 0, 2**31 - 1)
            error = lib.an_socket_set_option(self._handle, level, optname, _NULL, size)
        elif isinstance(value, int):
            number = ffi.new(_INT, integer(value, "the value", -(2**31), 2**31 - 1))
            error = lib.an_socket_set_option(self._handle, level, optname, number, _INT_SIZE)
        else:
            with readable(value) as view:
                error = lib.an_socket_set_option(self._handle, level, optname, view, len(view))
        self._check(error)

    @overload
    def getsockopt(self, level: int, optname: int) -> int: ...
    @overload
    def getsockopt(self, level: int, optname: int, buflen: int) -> bytes: ...
    def getsockopt(self, level: int, optname: int, buflen: int = 0) -> int | bytes:
        """An option's value, as in `socket` (getsockopt(2)).

        Returns an integer; with `buflen` at most that many bytes.
        """
        _number_arguments(level=level, optname=optname)
        size = integer(buflen, "buflen", 0, _OPTION_SIZE_MAX)
        value = ffi.new(_CHARS, size) if size else ffi.new(_INT)
        length = ffi.new(_SIZE, size or _INT_SIZE)
        self._check(lib.an_socket_get_option(self._handle, level, optname, value, length))
        if not size:
            number: int = value[0]
            return number
        data: bytes = ffi.buffer(value)[: length[0]]
        return data

    def close(self, *, flush: bool = False) -> None:
        """Closes the socket, and returns at once.

        Plainly: the peer is told now, operations in flight complete as cancelled, what was not yet
        handed to the system is dropped. `flush=True` hands over what was sent before, while the
        port is dequeued from, and then closes; a failure of that is one completion. A plain close
        afterwards stops the flush. Never raises on what is closed.
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

    @property
    def family(self) -> int:
        """The address family, a `socket.AddressFamily` where that has it."""
        return _enum_member(stdlib.AddressFamily, self._family)

    @property
    def type(self) -> int:
        """The type, a `socket.SocketKind` where that has it."""
        return _enum_member(stdlib.SocketKind, lib.an_socket_type(self._handle))

    @property
    def proto(self) -> int:
        """The protocol's number."""
        return lib.an_socket_protocol(self._handle)

    @property
    def port(self) -> CompletionPort | None:
        """The completion port that it is associated with."""
        return self._port

    @property
    def state(self) -> Any:
        """What it was associated with; `CompletionPort.associate` replaces it."""
        return self._state

    @property
    def closed(self) -> bool:
        """Whether it or its port was closed (also with a flush that still goes on)."""
        return bool(lib.an_socket_is_closed(self._handle))

    @property
    def unsent(self) -> int:
        """Bytes that sends took and that have not yet been handed to the system."""
        return lib.an_socket_unsent(self._handle)

    def statistics(self) -> SocketStatistics:
        """Counts since the socket was made; they can be read when it is closed, too.

        Raises `PortClosedError` in a forked child.
        """
        counts = ffi.new(_STATISTICS)
        if error := lib.an_socket_statistics_get(self._handle, counts):
            raise self._refusal(error)
        return SocketStatistics(counts.bytes_received, counts.bytes_sent, self.unsent)

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
        operation._buffer = target
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
        operation = self._operation(RECV, None, view)
        length = len(view)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_recv(
            self._handle, operation._handle, view, length, 0, UINT64_MAX, wait_ns
        )
        if error:
            raise self._failed(operation, error, view)
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
        operation = self._operation(RECVFROM, None, view)
        length = len(view)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_recvfrom(self._handle, operation._handle, view, length, 0, wait_ns)
        if error:
            raise self._failed(operation, error, view)
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
            error = _send(self._handle, _NULL, data, len(data), _FOREVER_NS)
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
                error = _send(self._handle, _NULL, view, len(view), wait_ns)
            if error:
                raise self._refusal(error)
            return None
        # bytes cannot change, so that holding them is enough.
        source: Any = data if type(data) is bytes else readable(data)
        operation = self._operation(SEND, None, source)
        length = len(source)
        operation._port._operations[operation._key] = operation
        error = _send(self._handle, operation._handle, source, length, wait_ns)
        if error:
            raise self._failed(operation, error, source)
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
                error = lib.an_socket_sendv(self._handle, _NULL, pieces, len(views), wait_ns)
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
        operation._buffer = (pieces, views)
        count = len(views)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_sendv(self._handle, operation._handle, pieces, count, wait_ns)
        if error:
            raise self._failed(operation, error, *views)
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
            error = lib.an_socket_sendto(self._handle, _NULL, source, len(source), target, wait_ns)
            if source is not data:
                ffi.release(source)
            if error:
                raise self._refusal(error)
            return None
        operation = self._operation(SENDTO, None, source)
        operation._buffer = (source, target)
        length = len(source)
        operation._port._operations[operation._key] = operation
        error = lib.an_socket_sendto(
            self._handle, operation._handle, source, length, target, wait_ns
        )
        if error:
            raise self._failed(operation, error, source)
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
        descriptor = _file_descriptor(file)
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
            if held is not None and held.__class__ is not bytes:
                ffi.release(held)
            raise self._refusal(lib.AN_EINVAL)
        operation = Operation(kind, self, port, value)
        operation._buffer = held
        return operation

    def _failed(self, operation: Operation, error: int, *held: Any) -> Exception:
        """Takes back an operation that did not start, and returns what to raise."""
        operation._port._operations.pop(operation._key, None)
        operation._buffer = None
        # The traceback of the exception keeps the caller's variables: buffers must not stay locked.
        for view in held:
            if view.__class__ is not bytes:
                ffi.release(view)
        return self._refusal(error)

    def _refusal(self, error: int) -> Exception:
        """What to raise when an operation was refused with that number."""
        if error == lib.AN_EPORTCLOSED:
            return port_closed()
        if error == lib.AN_EBADF and self.closed:
            return socket_closed()
        if error == lib.AN_EINVAL:
            if self._port is None:
                if self.closed:
                    return socket_closed()
                return ValueError("the socket is not associated with a port")
            return ValueError("a value is out of range")
        if error == lib.AN_ENOTSUP:
            return ValueError("a socket of this type cannot do that")
        return system_error(error)

    def _check(self, error: int) -> None:
        """Raises the error of a synchronous call; 0 is none."""
        if not error:
            return
        if error == lib.AN_EPORTCLOSED and self._port is not None and self._port.closed:
            raise port_closed()
        if error == lib.AN_EBADF:
            raise socket_closed()
        raise system_error(error)

    def _enlist(self) -> None:
        """Lets the failure of a quiet send find this object."""
        port = self._port
        if port is not None:
            key = address_of(self._handle)
            port._sockets[key] = weakref.ref(self)
            self._key = key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        try:
            closed = self.closed
        except AttributeError:
            return f"<{type(self).__name__} finalized>"
        if closed:
            return f"<{type(self).__name__} closed>"
        return (
            f"<{type(self).__name__} fd={self.fileno()} family={self.family!r} type={self.type!r}>"
        )

    def __del__(
        self,
        _lib: Any = lib,
        _warn: Callable[..., None] = warnings.warn,
    ) -> None:
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
                _lib.an_socket_free(handle, _FLUSH)
        else:
            del self._handle
            _lib.an_socket_free(handle, _FLUSH)
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


def _number_arguments(**numbers: Any) -> None:
    for name, number in numbers.items():
        integer(number, name, -(2**31), 2**31 - 1)


def _backlog(backlog: int) -> int:
    """As the stdlib: below 0 is 0, and no system takes more than an int."""
    return max(0, integer(backlog, "backlog", -(2**31), 2**31 - 1))


def _enum_member(kind: Callable[[int], int], number: int) -> int:
    try:
        return kind(number)
    except ValueError:
        return number


def _file_descriptor(file: Any) -> int:
    """The descriptor of a file object or of an integer."""
    if isinstance(file, int):
        return integer(file, "the file descriptor", 0, 2**31 - 1)
    try:
        fileno = file.fileno
    except AttributeError:
        raise TypeError(
            f"an open file or a file descriptor is needed, not {type(file).__name__}"
        ) from None
    return integer(fileno(), "the file descriptor", 0, 2**31 - 1)
