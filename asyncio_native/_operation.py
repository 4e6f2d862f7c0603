"""An operation in flight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._constants import OperationKind
from ._errors import port_closed
from ._native import ffi, lib

if TYPE_CHECKING:
    from ._port import CompletionPort
    from ._socket import AsyncSocket

# Each operation that is started calls these: no attribute is looked up for it.
_new = ffi.new
_cast = ffi.cast
_OPERATION = ffi.typeof("an_operation *")
_UINTPTR = ffi.typeof("uintptr_t")
_INT32 = ffi.typeof("int32_t *")


def let_go(held: Any) -> None:
    """Gives back what an operation held: views of buffers are released, so that these may change.

    By name and not with the last reference, which a free-threaded interpreter may drop only when
    the thread that made the view runs again. Several threads may do it for one operation: an item
    is popped by one of them.
    """
    if held.__class__ is not tuple:
        return
    views: list[Any] = held[0]
    while views:
        try:
            view = views.pop()
        except IndexError:
            return  # another thread was faster
        ffi.release(view)


class Operation:
    """What the calls that start something return; its completion refers to it.

    kind: the `OperationKind`.
    socket: the `AsyncSocket` that it was started on; None for a timer.

    It cannot be started again. It may be dropped: its port keeps it until its last completion is
    dequeued.
    """

    # It owns the memory of its C operation as long as the object lives: `cancel` in another thread
    # may stand just before its call, and must not find the memory in use for something else.
    __slots__ = (
        "_decoded",
        "_handle",
        "_held",
        "_key",
        "_memory",
        "_port",
        "_value",
        "kind",
        "socket",
    )

    kind: OperationKind
    socket: AsyncSocket | Any

    def __init__(
        self, kind: OperationKind, socket: AsyncSocket | None, port: CompletionPort, value: Any
    ) -> None:
        self.kind = kind
        self.socket = socket
        self._port = port
        # What a completion without lent data has in `data`; for a post or timer its state.
        self._value = value
        # What must live until the completion is dequeued: data, an address, or a pair of a list of
        # views of buffers and what is beside them.
        self._held: Any = None
        self._memory = memory = _new(_OPERATION)
        # The port's dict of operations in flight has this as its key.
        self._key = key = int(_cast(_UINTPTR, memory))
        # The lowest bit is the mark that tells Python's operations from those of C code.
        self._handle = _cast(_OPERATION, key | 1)
        # A multishot's completions with `more` that were decoded; None where nobody counted.
        self._decoded: int | None = 0

    @property
    def pending(self) -> bool:
        """Whether its last completion has not been dequeued yet; False on a closed port."""
        return self._key in self._port._operations and not self._port.closed

    def cancel(self) -> bool:
        """Cancels the operation, and returns at once.

        Returns whether its outcome was still open; its completion then comes through the queue
        with the cancelled error. False when it was done already. Never raises.
        """
        if self._key not in self._port._operations:
            return False
        cancelled = ffi.new(_INT32)
        if self.socket is None:
            error = lib.an_port_cancel(self._port._handle, self._handle, cancelled)
        else:
            error = lib.an_operation_cancel(self.socket._handle, self._handle, cancelled)
        return not error and cancelled[0] != 0

    def pause(self) -> None:
        """Stops a multishot from taking more: the rest waits in the kernel until `resume`.

        What is queued already still comes. Raises ValueError when it is no multishot in flight.
        """
        self._control(lib.an_operation_pause)

    def resume(self) -> None:
        """Ends a `pause`. Raises ValueError when it is no multishot in flight."""
        self._control(lib.an_operation_resume)

    def _control(self, call: Any) -> None:
        if self._port.closed:
            raise port_closed()
        if (
            self.socket is None
            or self._key not in self._port._operations
            or call(self.socket._handle, self._handle)
        ):
            raise ValueError("only a multishot that is in flight can be paused and resumed")

    def _let_go(self) -> None:
        """Gives back what had to live until the completion was dequeued, see `let_go`."""
        held = self._held
        self._held = None
        let_go(held)

    def __repr__(self) -> str:
        pending = "pending" if self.pending else "done"
        return f"<{type(self).__name__} {self.kind.name} {pending} socket={self.socket!r}>"
