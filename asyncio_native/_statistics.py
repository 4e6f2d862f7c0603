"""The counts of a port, and of a socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ._constants import OperationKind
from ._native import ffi

_STATISTICS = ffi.typeof("an_statistics *")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of a port since it was opened, as `CompletionPort.statistics` returns them.

    They only grow, but for the gauges, which are values of the moment. A flush that a closed socket
    leaves behind may count as one send of no bytes.
    """

    started: Mapping[OperationKind, int]
    """Operations started, by kind, without the quiet ones."""
    completed: Mapping[OperationKind, int]
    """Completions without an error, by kind; each one of a multishot counts."""
    failed: Mapping[OperationKind, int]
    """Completions with an error other than cancelled, by kind; those of quiet sends too."""
    cancelled: Mapping[OperationKind, int]
    """Completions of cancelled operations, by kind."""
    quiet_sends: int
    """Quiet sends taken."""
    bytes_received: int
    """Bytes received on the port's sockets."""
    bytes_sent: int
    """Bytes handed to the system on the port's sockets."""
    waits: int
    """Times that the system was asked for events."""
    wakeups: int
    """Times that a thread had to wake one that waits in the system."""
    batches: int
    """Dequeues that returned at least one completion."""
    dequeued: int
    """Completions returned by dequeues."""
    batch_largest: int
    """Completions in the largest batch so far."""
    gauge_sockets: int
    """Gauge: sockets associated and not yet closed; each has a descriptor."""
    gauge_queued: int
    """Gauge: completions queued and not yet dequeued."""
    gauge_buffers: int
    """Gauge: receive buffers in the port's pool."""
    gauge_timers: int
    """Gauge: timers pending, and sockets that have or had a deadline to be looked at."""
    gauge_in_flight: int
    """Gauge: operations started whose last completion was not dequeued yet."""
    gauge_waiting: int
    """Gauge: threads that wait in the system; with iocp all that dequeue and find nothing."""


@dataclass(frozen=True, slots=True)
class SocketStatistics:
    """Counts of a socket since it was made, as `AsyncSocket.statistics` returns them.

    They only grow, but for the gauge, which is a value of the moment.
    """

    bytes_received: int
    """Bytes received."""
    bytes_sent: int
    """Bytes handed to the system."""
    gauge_unsent: int
    """Gauge: bytes that sends took and that have not yet been handed to the system."""


def new_statistics() -> Any:
    """Memory for the C counts."""
    return ffi.new(_STATISTICS)


def read_statistics(counts: Any) -> Statistics:
    """The C counts as an object."""

    def by_kind(array: Any) -> Mapping[OperationKind, int]:
        return MappingProxyType({kind: array[kind] for kind in OperationKind})

    return Statistics(
        started=by_kind(counts.started),
        completed=by_kind(counts.completed),
        failed=by_kind(counts.failed),
        cancelled=by_kind(counts.cancelled),
        quiet_sends=counts.quiet_sends,
        bytes_received=counts.bytes_received,
        bytes_sent=counts.bytes_sent,
        waits=counts.waits,
        wakeups=counts.wakeups,
        batches=counts.batches,
        dequeued=counts.dequeued,
        batch_largest=counts.batch_largest,
        gauge_sockets=counts.gauge_sockets,
        gauge_queued=counts.gauge_queued,
        gauge_buffers=counts.gauge_buffers,
        gauge_timers=counts.gauge_timers,
        gauge_in_flight=counts.gauge_inflight,
        gauge_waiting=counts.gauge_waiting,
    )
