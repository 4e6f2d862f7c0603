"""What completion ports have in common, whichever binding serves: all that is not hot.

It is Python over cffi. A class beside it brings the rest: what raises `NotImplementedError` here is
abstract, and stands before or over this class in both bindings.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Self

from ._arguments import integer
from ._backends import opening_error, unavailable
from ._errors import port_closed, shown_as, socket_closed, system_error
from ._native import ffi, lib
from ._statistics import Statistics, new_statistics, read_statistics

if TYPE_CHECKING:
    from ._completion import Completion

_PORT_OUT = ffi.typeof("an_port **")
_OPTIONS = ffi.typeof("an_port_options *")
_CHARS = ffi.typeof("char[]")
_DESCRIPTOR = ffi.typeof("an_descriptor *")


@shown_as("CompletionPort")
class PortBase:
    """A completion port: operations are started on sockets, their completions dequeued here.

    backend: "auto", "iocp", "io_uring", "epoll", "kqueue" or "poll". "auto" reads the environment
        variable ASYNCIO_NATIVE_BACKEND, else takes the fastest that works here.
    concurrency: 1 promises that the first thread that dequeues is the only one that ever will
        (another gets `RuntimeError`), which a backend may use to go faster; any thread may still
        start, post, cancel and close. 0 makes no promise.

    Raises `BackendUnavailableError` when the backend is unknown, not compiled in or refused by the
    system, `OSError` when that is out of descriptors or memory.

    It is a context manager, which closes it. Any thread may call anything at any time. After
    `close`, and in a forked child, every call that would start something or wait raises
    `PortClosedError`; reading properties and closing again never raise.
    """

    __slots__ = ()

    # Brought by the class beside it: a pointer of cffi; an AttributeError once it was given back.
    _handle: Any

    @property
    def backend(self) -> str:
        """The name of the backend in use."""
        return ffi.string(lib.an_port_backend(self._handle)).decode()

    @property
    def closed(self) -> bool:
        """Whether it was closed; true in a forked child, too."""
        try:
            return bool(lib.an_port_is_closed(self._handle))
        except AttributeError:
            return True  # finalized: another finalizer still found it

    @property
    def in_flight(self) -> int:
        """Operations started and not yet dequeued, see the class beside this one."""
        raise NotImplementedError

    def dequeue(self, timeout: float | None = None) -> Completion | None:
        """Waits for one completion; None at the timeout.

        timeout: seconds; None waits for ever, 0 polls. The interpreter lock is released meanwhile.
        A signal handler that raises ends the wait with its exception, and nothing is lost; after
        another one the wait goes on with the time left.
        """
        # No call stands between the return of the first and our own: no signal handler runs there.
        completions = self.dequeue_many(1, timeout)
        return completions[0] if completions else None

    def dequeue_many(self, max_count: int = 256, timeout: float | None = None) -> list[Completion]:
        """Waits for completions, see the class beside this one."""
        raise NotImplementedError

    # -- for C code that shares the port: see _capi -----------------------------------------------

    #: Takes completions of operations that it started: (the entry's address, ...).
    _foreign: Any

    def _lend(self) -> None:
        """It is about to get the handle, and may dequeue."""

    def _decode(self, address: int) -> Completion | None:
        """The completion of an entry that it dequeued; None if it is not to be shown.

        The entry is Python's then, which its flags tell; so is what it accepted.
        """
        raise NotImplementedError

    def statistics(self) -> Statistics:
        """Counts since the port was opened; cheap enough to read every second."""
        counts = new_statistics()
        if error := lib.an_port_statistics(self._handle, counts):
            raise port_closed() if error == lib.AN_EPORTCLOSED else system_error(error)
        return read_statistics(counts)

    def fileno(self) -> int:
        """A descriptor for another event loop to watch; -1 when closed.

        It polls readable whenever `dequeue(0)` may return something. The port keeps it. Raises
        `OSError` where there is none (Windows).
        """
        descriptor = ffi.new(_DESCRIPTOR)
        if error := lib.an_port_descriptor(self._handle, descriptor):
            if error == lib.AN_EPORTCLOSED:
                return -1
            raise system_error(error)
        number: int = descriptor[0]
        return number

    def close(self) -> None:
        """Closes the port, see the class beside this one."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<{type(self).__name__} closed>"
        return f"<{type(self).__name__} {self.backend} in_flight={self.in_flight}>"


def open_port(backend: str, concurrency: int) -> Any:
    """Opens a port and returns its handle."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str, not {type(backend).__name__}")
    promised = integer(concurrency, "concurrency", 0, 1)
    if "\0" in backend:
        raise unavailable(backend)
    name = ffi.new(_CHARS, backend.encode("utf-8", "surrogatepass"))
    options = ffi.new(_OPTIONS)
    options.backend = name
    options.concurrency = promised
    options.flags = lib.AN_PORT_INTERRUPTIBLE
    opened = ffi.new(_PORT_OUT)
    if error := lib.an_port_open(opened, options):
        raise opening_error(backend, error)
    return opened[0]


def dequeue_error(error: int) -> Exception:
    """What to raise when dequeuing was refused with that number."""
    if error == lib.AN_EPORTCLOSED:
        return port_closed()
    if error == lib.AN_EPERM:
        return RuntimeError(
            "this port was made with concurrency=1, and another thread was the first to dequeue"
        )
    return system_error(error)


def start_error(error: int) -> OSError:
    """What to raise when a post or a timer was refused with that number."""
    return port_closed() if error == lib.AN_EPORTCLOSED else system_error(error)


def not_a_socket(sock: object) -> TypeError:
    """What to raise when something else than a socket was to be associated."""
    return TypeError(f"an AsyncSocket is needed, not {type(sock).__name__}")


def associate_error(sock: Any, error: int) -> Exception:
    """What to raise when associating that socket was refused with that number."""
    if error == lib.AN_EPORTCLOSED:
        return port_closed()
    if error == lib.AN_EINVAL:
        also = ", or was made without overlapped operations" if sys.platform == "win32" else ""
        return ValueError(f"the socket belongs to another completion port{also}")
    return socket_closed() if error == lib.AN_EBADF else system_error(error)
