"""The kinds of operations."""

from __future__ import annotations

from enum import IntEnum

from ._native import lib


class OperationKind(IntEnum):
    """What an operation is. The members are names of the module, too: `asyncio_native.RECV`.

    Members are unique objects, so `completion.kind is asyncio_native.RECV` is the fast comparison.
    """

    ACCEPT = lib.AN_ACCEPT
    """`AsyncSocket.accept`: accept4(2), AcceptEx."""
    CONNECT = lib.AN_CONNECT
    """`AsyncSocket.connect`: connect(2), ConnectEx."""
    RECV = lib.AN_RECV
    """`AsyncSocket.recv` and `recv_into`: recv(2), WSARecv."""
    RECVFROM = lib.AN_RECVFROM
    """`AsyncSocket.recvfrom` and `recvfrom_into`: recvfrom(2), WSARecvFrom."""
    SEND = lib.AN_SEND
    """`AsyncSocket.send` and `sendv`: send(2), sendmsg(2), WSASend."""
    SENDTO = lib.AN_SENDTO
    """`AsyncSocket.sendto`: sendto(2), WSASendTo."""
    SENDFILE = lib.AN_SENDFILE
    """`AsyncSocket.sendfile`: sendfile(2), TransmitFile."""
    DISCONNECT = lib.AN_DISCONNECT
    """`AsyncSocket.disconnect`: shutdown(2) of the sending side."""
    POST = lib.AN_POST
    """`CompletionPort.post`: what PostQueuedCompletionStatus does."""
    TIMER = lib.AN_TIMER
    """`CompletionPort.timer`: the monotonic clock."""


ACCEPT = OperationKind.ACCEPT
CONNECT = OperationKind.CONNECT
RECV = OperationKind.RECV
RECVFROM = OperationKind.RECVFROM
SEND = OperationKind.SEND
SENDTO = OperationKind.SENDTO
SENDFILE = OperationKind.SENDFILE
DISCONNECT = OperationKind.DISCONNECT
POST = OperationKind.POST
TIMER = OperationKind.TIMER

KINDS: tuple[OperationKind | None, ...] = (None, *OperationKind)
"""The member of each number."""
