"""What a dequeue returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._constants import ACCEPT, POST, RECV, RECVFROM, SEND, SENDFILE, SENDTO, OperationKind
from ._errors import completion_error

if TYPE_CHECKING:
    from ._operation import Operation
    from ._socket import AsyncSocket


class Completion:
    """The outcome of an operation; one of several for a multishot.

    operation: the `Operation`; None for a post and for quiet sends that failed.
    kind: the `OperationKind`.
    socket: the `AsyncSocket`; None for a post and a timer, and when quiet datagrams of a socket
        failed that the program had already dropped.
    state: what the socket was associated with, or what the post or timer was given.
    error: 0, or the system's error number as the module `errno` names it: ECANCELED when cancelled,
        ETIMEDOUT at a deadline, EPIPE on a broken stream, ECONNRESET, ECONNREFUSED, EMFILE, ... On
        Windows those are the numbers of `errno` too: the C language's for ECANCELED, EPIPE, EMFILE,
        ENOMEM, EBADF and EINVAL, Winsock's (10000 and more) for the rest; a file's error is the
        system's own. The reference has a page on which number says what.
    transferred: bytes received or handed over; for quiet sends that failed, the bytes lost.
    data: for `recv` and `recvfrom` the bytes received, b"" at the end of a stream and with an
        error; None for everything else.
    accepted: the new `AsyncSocket` of an accept, not yet associated; None when it failed.
    address: the peer's address for an accept and for datagrams; else None.
    truncated: whether the datagram was longer than the buffer; its rest is lost.
    more: whether the multishot stays armed and further completions follow.
    """

    __slots__ = (
        "accepted",
        "address",
        "data",
        "error",
        "kind",
        "more",
        "operation",
        "socket",
        "state",
        "transferred",
        "truncated",
    )

    # "| Any": known by the kind, so that users need not assert it again for the type checker.
    operation: Operation | None
    kind: OperationKind
    socket: AsyncSocket | Any
    state: Any
    error: int
    transferred: int
    data: bytes | Any
    accepted: AsyncSocket | None
    address: Any
    truncated: bool
    more: bool

    def result(self) -> Any:
        """The natural value of the operation, or the error as an exception.

        accept: `(accepted, address)`; recv: `data`; recvfrom: `(data, address)`; recv_into: the
        count of bytes; recvfrom_into: `(count, address)`; send, sendv, sendto and sendfile: the
        count of bytes; connect, disconnect and timer: None; post: the state.

        Raises the fitting subclass of `OSError`, such as `ConnectionResetError` or `TimeoutError`;
        `OperationCancelledError` when it was cancelled.
        """
        if self.error:
            raise completion_error(self.error)
        kind = self.kind
        if kind is RECV:
            return self.transferred if self.data is None else self.data
        if kind is RECVFROM:
            return (self.transferred if self.data is None else self.data), self.address
        if kind is ACCEPT:
            return self.accepted, self.address
        if kind is SEND or kind is SENDTO or kind is SENDFILE:
            return self.transferred
        return self.state if kind is POST else None

    def __repr__(self) -> str:
        shown = [self.kind.name]
        if self.error:
            shown.append(f"error={self.error}")
        shown.append(f"transferred={self.transferred}")
        if self.accepted is not None:
            shown.append(f"accepted={self.accepted!r}")
        if self.address is not None:
            shown.append(f"address={self.address!r}")
        shown += [name for name in ("truncated", "more") if getattr(self, name)]
        return f"<{type(self).__name__} {' '.join(shown)} socket={self.socket!r}>"
