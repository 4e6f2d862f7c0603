"""The counts of a port and of a socket."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from support import (
    datagram,
    dial,
    drain,
    listening,
    nothing,
    one,
    pair,
    pattern,
    pump,
    refusing_address,
    settle,
    stall,
)


def shrunk(old: Any, new: Any) -> list[str]:
    """The fields that are no gauges and became smaller."""
    smaller = []
    for field in dataclasses.fields(old):
        if field.name.startswith("gauge"):
            continue
        before, after = getattr(old, field.name), getattr(new, field.name)
        if isinstance(before, Mapping):
            if any(after[kind] < count for kind, count in before.items()):
                smaller.append(field.name)
        elif after < before:
            smaller.append(field.name)
    return smaller


def test_a_fresh_port_has_counted_nothing(port: an.CompletionPort) -> None:
    statistics = port.statistics()
    for name in ("started", "completed", "failed", "cancelled"):
        assert dict(getattr(statistics, name)) == dict.fromkeys(an.OperationKind, 0)
    assert statistics.bytes_received == statistics.bytes_sent == statistics.dequeued == 0
    assert statistics.gauge_sockets == statistics.gauge_in_flight == 0


def test_statistics_are_frozen(port: an.CompletionPort) -> None:
    statistics: Any = port.statistics()
    with pytest.raises(AttributeError):
        statistics.waits = 5
    with pytest.raises(TypeError):
        statistics.started[an.SEND] = 5
    port.post()
    before = dict(statistics.started)
    assert dict(statistics.started) == before
    assert port.statistics().started[an.POST] == before[an.POST] + 1


def test_started_and_completed_count_by_kind(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    for _ in range(3):
        sock.send(b"x")
    sock.recv(multishot=True)
    port.post()
    drain(port, 4)
    for _ in range(2):
        peer.sendall(b"y")
        one(port)
    statistics = port.statistics()
    assert statistics.started[an.SEND] == statistics.completed[an.SEND] == 3
    assert statistics.started[an.POST] == statistics.completed[an.POST] == 1
    assert statistics.started[an.RECV] == 1
    assert statistics.completed[an.RECV] == 2, "each completion of a multishot"
    assert statistics.started[an.ACCEPT] == 0


def test_failed_counts_by_kind(port: an.CompletionPort) -> None:
    sock = an.AsyncSocket()
    port.associate(sock)
    sock.connect(refusing_address())
    one(port)
    dead, peer = pair(port, "unix")
    peer.close()
    dead.send(b"x", quiet=True)
    one(port)
    statistics = port.statistics()
    assert statistics.failed[an.CONNECT] == 1
    assert statistics.failed[an.SEND] == 1, "the quiet failure"
    assert statistics.completed[an.CONNECT] == 0
    assert sum(statistics.cancelled.values()) == 0


def test_cancelled_counts_by_kind(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    for _ in range(4):
        sock.recv()
    sock.cancel()
    listening(port)[0].accept().cancel()
    drain(port, 5)
    statistics = port.statistics()
    assert statistics.cancelled[an.RECV] == 4
    assert statistics.cancelled[an.ACCEPT] == 1
    assert sum(statistics.failed.values()) == 0


def test_bytes_are_counted(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    before = port.statistics()
    sock.send(pattern(1_000_000))
    sock.send(pattern(500_000), quiet=True)
    pump(port, peer, 1_500_000)
    sock.recv(multishot=True)
    peer.sendall(bytes(12_345))
    drain(port, lambda found: sum(c.transferred for c in found if c.kind is an.RECV) == 12_345)
    gram, address = datagram(port)
    gram.recvfrom()
    gram.sendto(b"12345", address)
    drain(port, 2)
    after = port.statistics()
    assert after.bytes_sent - before.bytes_sent == 1_500_005
    assert after.bytes_received - before.bytes_received == 12_350
    assert after.quiet_sends - before.quiet_sends == 1


def test_waits_and_batches_are_counted(port: an.CompletionPort) -> None:
    for _ in range(10):
        port.post()
    assert len(port.dequeue_many(7, timeout=0)) == 7
    assert len(port.dequeue_many(7, timeout=0)) == 3
    nothing(port)
    statistics = port.statistics()
    assert statistics.batches == 2
    assert statistics.dequeued == 10
    assert statistics.batch_largest == 7
    assert statistics.waits >= 1


def test_gauges_show_the_moment(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    other, _ = pair(port)
    other.recv()
    port.post()
    statistics = port.statistics()
    assert statistics.gauge_sockets == 2
    assert statistics.gauge_in_flight == 2
    assert statistics.gauge_queued == 1
    sock.close()
    other.close()
    settle(port)
    statistics = port.statistics()
    assert statistics.gauge_sockets == 0
    assert statistics.gauge_in_flight == 0
    assert statistics.gauge_queued == 0


def test_timers_and_deadlines_are_a_gauge(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    timer = port.timer(60)
    assert port.statistics().gauge_timers == 1
    sock.recv(timeout=60)
    sock.recv(timeout=61)
    assert 2 <= port.statistics().gauge_timers <= 3, "a socket may keep one for all its deadlines"
    timer.cancel()
    sock.close()
    drain(port, 3)
    assert port.statistics().gauge_timers == 0


def test_buffers_are_a_gauge_that_shrinks_again(port: an.CompletionPort) -> None:
    pairs = [pair(port) for _ in range(50)]
    for sock, _ in pairs:
        sock.recv(multishot=True)
    nothing(port)
    assert port.statistics().gauge_buffers <= 4, "idle connections hold none"
    for _, peer in pairs:
        peer.sendall(bytes(60_000))
    drain(port, lambda found: sum(c.transferred for c in found) == 50 * 60_000)
    for sock, _ in pairs:
        sock.close()
    settle(port)
    assert port.statistics().gauge_buffers <= 50


def test_counts_only_grow(port: an.CompletionPort) -> None:
    before = port.statistics()
    sock, peer = pair(port, small=True)
    for step in (
        lambda: stall(port, sock, 4 << 20),
        lambda: pump(port, peer, 1 << 20),
        lambda: sock.recv(multishot=True),
        lambda: peer.sendall(b"x"),
        lambda: settle(port),
        lambda: sock.cancel(),
        lambda: settle(port),
        lambda: sock.close(),
        lambda: settle(port),
    ):
        step()
        after = port.statistics()
        assert shrunk(before, after) == []
        before = after


def test_accepted_connections_add_up(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept(multishot=True)
    for _ in range(5):
        dial(address)
    completions = drain(port, 5)
    for completion in completions:
        assert completion.accepted is not None
        port.associate(completion.accepted)
    statistics = port.statistics()
    assert statistics.completed[an.ACCEPT] == 5
    assert statistics.gauge_sockets == 6


def test_statistics_of_a_closed_port_can_be_read(backend: str) -> None:
    with an.CompletionPort(backend) as port:
        port.post()
        one(port)
    statistics = port.statistics()
    assert statistics.completed[an.POST] == 1
    assert statistics.gauge_sockets == statistics.gauge_in_flight == 0


def test_each_field_is_documented() -> None:
    with an.CompletionPort() as port:
        kind = type(port.statistics())
    sources = [path.read_text() for path in Path(an.__file__).parent.glob("*.py")]
    [source] = [text for text in sources if f"class {kind.__name__}:" in text]
    for field in dataclasses.fields(kind):
        declaration = source.index(f"\n    {field.name}: ") + 1
        following = source[declaration:].split("\n", 2)[1]
        assert following.strip().startswith('"""'), field.name


def test_statistics_of_a_socket_count_its_bytes_both_ways(
    port: an.CompletionPort, family: str
) -> None:
    sock, peer = pair(port, family)
    other, _ = pair(port, family)
    assert dataclasses.astuple(sock.statistics()) == (0, 0, 0)
    sock.send(b"four", quiet=True)
    sock.send(b"and more")
    one(port)
    peer.sendall(b"reply")
    sock.recv()
    one(port)
    statistics = sock.statistics()
    assert statistics == an.SocketStatistics(bytes_received=5, bytes_sent=12, gauge_unsent=0)
    assert dataclasses.astuple(other.statistics()) == (0, 0, 0)
    sock.close()
    assert sock.statistics() == statistics


def test_statistics_of_a_socket_show_what_waits_to_be_sent(port: an.CompletionPort) -> None:
    sock, _ = pair(port, "unix", small=True)
    sock.send(bytes(1 << 20), quiet=True)
    statistics = sock.statistics()
    assert statistics.gauge_unsent == sock.unsent > 0
    assert statistics.bytes_sent + statistics.gauge_unsent == 1 << 20
