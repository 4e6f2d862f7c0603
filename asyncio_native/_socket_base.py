"""What sockets have in common, whichever binding starts their operations: all that is not hot.

It is Python over cffi. A class beside it brings the operations, and the four attributes that this
one lives on. What raises `NotImplementedError` here is abstract, and each binding has it.
"""

from __future__ import annotations

import io
import socket as stdlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, Self, overload

from ._address import Address, AddressSlot, encode
from ._arguments import integer, readable
from ._errors import port_closed, shown_as, socket_closed, system_error
from ._native import ffi, lib
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

_SOCKET_OUT = ffi.typeof("an_socket **")
_DESCRIPTOR = ffi.typeof("an_descriptor *")
_SIZE = ffi.typeof("size_t *")
_STATISTICS = ffi.typeof("an_socket_statistics *")
_INT = ffi.typeof("int *")
_INT_SIZE = ffi.sizeof("int")
_CHARS = ffi.typeof("char[]")
_OPTION_SIZE_MAX = 65536
"""No socket option is longer; the memory for it is allocated before the system is asked."""

BACKLOG = max(stdlib.SOMAXCONN, 4096)
"""The default of `listen`: the interpreter's constant may be the one of an old system's headers."""


@shown_as("AsyncSocket")
class SocketBase:
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

    __slots__ = ()

    # Brought by the class beside it. The handle is a pointer of cffi; an AttributeError once it was
    # given back.
    _handle: Any
    _family: int
    _port: CompletionPort | None
    _state: Any

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
        self._take(made[0], int(family))

    def _take(self, handle: Any, family: int) -> None:
        """Makes a new object the owner of that handle."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Gives the handle up without closing it: it belongs to C code again."""
        raise NotImplementedError

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
        adopted._take(made[0], lib.an_socket_family(made[0]))
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
        """Closes the socket, see the class beside this one."""
        raise NotImplementedError

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

    # -- within -----------------------------------------------------------------------------------

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


def file_descriptor(file: Any) -> int:
    """What the system knows an open file by, of a file object or a descriptor."""
    number = file
    if not isinstance(file, int):
        try:
            fileno = file.fileno
        except AttributeError:
            raise TypeError(
                f"an open file or a file descriptor is needed, not {type(file).__name__}"
            ) from None
        try:
            number = fileno()
        except io.UnsupportedOperation:
            raise TypeError(
                f"sendfile needs a file that the system has a descriptor of, which a "
                f"{type(file).__name__} is not; send() takes bytes"
            ) from None
    return _system_file(integer(number, "the file descriptor", 0, 2**31 - 1))


def _system_file(descriptor: int) -> int:
    """The same on POSIX; on Windows the handle that the C library's descriptor stands for."""
    if sys.platform == "win32":
        import msvcrt

        return msvcrt.get_osfhandle(descriptor)
    return descriptor
