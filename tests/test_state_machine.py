"""Exactly once, in order, nothing lost: a state machine that Hypothesis drives.

It starts operations of every kind on streams, cancels, closes, posts and dequeues in any order,
while stdlib peers in the same thread read slowly, write, half-close, close and reset. After each
step the port's own counts must agree with what was started. At the end every operation has
completed exactly once, each stream's bytes are those that were sent, in order and in one piece,
and nothing is in flight.

`--hypothesis-profile=thorough` takes many more and longer runs (`conftest.py` has the profiles).
No rule's draws depend on timing: a target that is not there makes the rule do nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import asyncio_native as an
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support import (
    LOCAL,
    PATIENCE,
    eventually,
    open_descriptors,
    refusing_address,
    release_kept,
    stdlib_pair,
)

#: Sizes around what matters: one byte, a page, the default of `recv`, more than small buffers hold.
SIZES = st.sampled_from([1, 2, 100, 4095, 4096, 16384, 65535, 65536, 65537, 300_000])
#: Which link: modulo their number, or, for what ends a link and so must be rare, none beyond it.
INDEX = st.integers(min_value=0, max_value=11)
RARELY = st.integers(min_value=0, max_value=30)
LINK = st.tuples(st.sampled_from(["ipv4", LOCAL]), st.sampled_from([True, True, False]))
RECEIVES = st.tuples(st.sampled_from(["one-shot", "into", "multishot"]), SIZES)
SENDS = st.tuples(
    st.sampled_from(
        ["send", "quiet send", "sendv", "quiet sendv", "sendfile", "send", "quiet send", "sendv"]
        + ["sendfile", "disconnect"]
    ),
    SIZES,
)
FILE_SIZE = 400_000
MAX_LINKS = 12
MAX_OPERATIONS = 200

GONE = {errno.EPIPE, errno.ECONNRESET}


def numbered(number: int, size: int) -> bytes:
    """`size` bytes of which each four name the send and the place in it."""
    words = (size + 3) // 4
    return struct.pack(f">{words}I", *(number << 17 | place for place in range(words)))[:size]


@dataclass
class Sent:
    """One send in the order started; `operation` is None for a quiet one."""

    operation: an.Operation | None
    data: bytes
    transferred: int | None = None


@dataclass(eq=False)
class Link:
    """A connection, and what both ends did with it."""

    sock: an.AsyncSocket
    peer: socket.socket
    sent: list[Sent] = field(default_factory=list)
    peer_got: bytearray = field(default_factory=bytearray)
    peer_sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    #: What was started in each direction, in order, and where completions have got to.
    receives: list[an.Operation] = field(default_factory=list)
    sends: list[an.Operation] = field(default_factory=list)
    last_receive: int = 0
    last_send: int = 0
    ended: bool = False  # the end of the peer's stream was received
    peer_writes: int = 0
    peer_shut: bool = False  # the peer has ended its sending side
    peer_closed: bool = False
    closed: bool = False  # by a plain close
    flushed: bool = False  # by close(flush=True)
    stopped: bool = False  # everything on the socket was cancelled
    disturbed: bool = False  # a quiet send may have been stopped or have failed
    unread_at_close: bool = False  # then the system resets, and may drop what it was handed

    @property
    def open(self) -> bool:
        return not (self.closed or self.flushed)

    def peer_reads(self, size: int) -> bool:
        """The peer takes what is there, at most `size`; true when its stream is over."""
        if self.peer_closed:
            return True
        left = size
        while left > 0:
            try:
                piece = self.peer.recv(min(left, 1 << 18))
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in GONE:
                    raise
                return True
            if not piece:
                return True
            self.peer_got += piece
            left -= len(piece)
        return False

    def explains(self, whole: bool) -> bool:
        """Whether the sends, in order and in one piece each, make up what the peer got.

        A non-quiet send gives exactly the bytes that its completion tells. A quiet one gives all
        of its own; only when something stopped it none, or a part with nothing behind it.
        """
        got = bytes(self.peer_got)
        # Where the stream may have got to, and whether a send broke off in the middle.
        places = {(0, False)}
        for send in self.sent:
            reached: set[tuple[int, bool]] = set()
            for at, broken in places:
                if not whole and at == len(got):
                    return True
                for count in self._contributions(send, len(got) - at, broken):
                    piece = send.data[:count]
                    there = got[at : at + count]
                    if there == piece:
                        reached.add((at + count, broken or 0 < count < len(send.data)))
                    elif not whole and piece.startswith(there) and at + len(there) == len(got):
                        return True
            places = reached
        return any(at == len(got) for at, _ in places)

    def _contributions(self, send: Sent, left: int, broken: bool) -> list[int]:
        """How many of its bytes the send may have put into the stream."""
        size = len(send.data)
        if send.operation is not None and send.transferred is not None:
            counts = [send.transferred]
        elif send.operation is not None or not self.disturbed:
            # Non-quiet: ended with the port and never told. What of it came is found by the caller.
            counts = [size]
        else:
            counts = [size, 0, *([left] if 0 < left < size else [])]
        if broken:
            return [0] if 0 in counts or send.transferred is None else []
        return counts


class PortMachine(RuleBasedStateMachine):
    """The port under test, its links, and every operation that was started."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.port = an.CompletionPort(backend)
        self.links: list[Link] = []
        self.operations: list[an.Operation] = []
        self.outstanding: dict[an.Operation, Link | None] = {}
        self.completed: dict[an.Operation, an.Completion] = {}
        self.multishots: set[an.Operation] = set()
        self.buffers: dict[an.Operation, bytearray] = {}
        self.cancelled: set[an.Operation] = set()
        self.sends = 0
        self.posts = 0
        self.posts_seen = 0
        self.taken = 0
        self.quiet_failures = 0
        self.ending = "finish"
        self.file = tempfile.TemporaryFile()
        self.file_bytes = numbered(0x7000, FILE_SIZE)
        self.file.write(self.file_bytes)
        self.file.flush()
        self.listener = an.AsyncSocket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.port.associate(self.listener, "listener")
        self.clients: dict[Any, socket.socket] = {}
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.served: dict[Any, socket.socket] = {}
        self.connecting: dict[an.Operation, an.AsyncSocket] = {}
        self.refused_at = refusing_address()

    # -- what it is made of --

    @initialize(
        links=st.lists(LINK, min_size=1, max_size=4),
        ending=st.sampled_from(["finish", "finish", "close", "close port"]),
    )
    def begin(self, links: list[tuple[str, bool]], ending: str) -> None:
        self.ending = ending
        for link in links:
            self.open_a_link(link)

    def add(self, sock: an.AsyncSocket, peer: socket.socket) -> Link:
        peer.setblocking(False)
        link = Link(sock, peer)
        self.port.associate(sock, link)
        self.links.append(link)
        return link

    def link(self, index: int) -> Link:
        return self.links[index % len(self.links)]

    def rare_link(self, index: int) -> Link | None:
        return self.links[index] if index < len(self.links) else None

    def started(self, operation: an.Operation | None, link: Link | None) -> an.Operation:
        assert operation is not None
        assert operation.pending
        assert operation not in self.outstanding
        self.operations.append(operation)
        self.outstanding[operation] = link
        return operation

    def refuses(self, link: Link) -> bool:
        """Checks that a closed socket starts nothing; false when it is open."""
        if link.open:
            return len(self.operations) >= MAX_OPERATIONS
        before = self.port.in_flight
        starts: list[Callable[[], object]] = [
            link.sock.recv,
            lambda: link.sock.send(b"x"),
            link.sock.disconnect,
        ]
        for start in starts:
            with pytest.raises(OSError) as raised:
                start()
            assert raised.value.errno == errno.EBADF
        assert self.port.in_flight == before
        return True

    @rule(link=LINK)
    def open_a_link(self, link: tuple[str, bool]) -> None:
        if len(self.links) < MAX_LINKS:
            ours, peer = stdlib_pair(link[0], small=link[1])
            self.add(an.AsyncSocket.adopt(ours), peer)

    # -- starts --

    @rule(index=INDEX, receives=st.lists(RECEIVES, min_size=1, max_size=3))
    def receive(self, index: int, receives: list[tuple[str, int]]) -> None:
        link = self.link(index)
        for way, size in receives:
            if self.refuses(link):
                return
            self.start_receive(link, way, size)

    def start_receive(self, link: Link, way: str, size: int) -> None:
        if way == "into":
            buffer = bytearray(size)
            operation = self.started(link.sock.recv_into(buffer), link)
            self.buffers[operation] = buffer
        else:
            multishot = way == "multishot"
            if multishot:
                size = max(size, 1000)  # else one completion for each byte of a megabyte
            operation = self.started(link.sock.recv(size, multishot=multishot), link)
            if multishot:
                self.multishots.add(operation)
        link.receives.append(operation)

    @rule(index=INDEX, sends=st.lists(SENDS, min_size=1, max_size=4))
    def send(self, index: int, sends: list[tuple[str, int]]) -> None:
        link = self.link(index)
        for way, size in sends:
            if self.refuses(link):
                return
            self.start_send(link, way, size)

    def start_send(self, link: Link, way: str, size: int) -> None:
        if way == "disconnect":
            operation = self.started(link.sock.disconnect(), link)
            link.sends.append(operation)
            link.sent.append(Sent(operation, b""))
            return
        self.sends += 1
        data = numbered(self.sends, size)
        quiet = way.startswith("quiet")
        started: an.Operation | None
        if way == "sendfile":
            offset = self.sends * 1000 % (FILE_SIZE - size)
            data = self.file_bytes[offset : offset + size]
            started = link.sock.sendfile(self.file, offset, size)
        elif way.endswith("sendv"):
            cut = size // 3
            started = link.sock.sendv([data[:cut], bytearray(data[cut:])], quiet=quiet)
        elif quiet:
            changing = bytearray(data)
            started = link.sock.send(changing, quiet=True)
            changing[:] = bytes(size)  # free again when the call has returned
        else:
            started = link.sock.send(data)
        link.sent.append(Sent(started, data))
        if quiet:
            assert started is None
        else:
            link.sends.append(self.started(started, link))

    @rule(multishot=st.booleans())
    def accept(self, multishot: bool) -> None:
        if len(self.operations) < MAX_OPERATIONS:
            operation = self.started(self.listener.accept(multishot=multishot), None)
            if multishot:
                self.multishots.add(operation)

    @rule()
    def a_client_dials(self) -> None:
        if len(self.clients) < MAX_LINKS:
            client = socket.create_connection(self.listener.getsockname())
            client.setblocking(False)
            self.clients[client.getsockname()] = client

    @rule(refused=st.booleans())
    def connect(self, refused: bool) -> None:
        if len(self.links) < MAX_LINKS and len(self.operations) < MAX_OPERATIONS:
            sock = an.AsyncSocket()
            self.port.associate(sock)
            address = self.refused_at if refused else self.server.getsockname()
            operation = self.started(sock.connect(address), None)
            self.connecting[operation] = sock

    @rule()
    def post(self) -> None:
        self.posts += 1
        self.port.post(self.posts)

    # -- stops --

    @rule(index=st.integers(min_value=0, max_value=MAX_OPERATIONS))
    def cancel_an_operation(self, index: int) -> None:
        if self.operations:
            # Mostly one that is not done yet.
            candidates = list(self.outstanding) if index % 4 else []
            candidates = candidates or self.operations
            operation = candidates[index % len(candidates)]
            self.cancel(operation)

    @rule(index=INDEX)
    def cancel_the_send_under_way(self, index: int) -> None:
        """The one that may break the stream in the middle."""
        under_way = [o for o in self.link(index).sends if o in self.outstanding]
        if under_way:
            self.cancel(under_way[0])

    def cancel(self, operation: an.Operation) -> None:
        was_pending = operation in self.outstanding
        if operation.cancel():
            assert was_pending
            self.cancelled.add(operation)
            assert not operation.cancel(), "its outcome is decided"

    @rule(index=RARELY)
    def cancel_a_socket(self, index: int) -> None:
        link = self.rare_link(index)
        if link is None or not link.open:
            return
        mine = [o for o, other in self.outstanding.items() if other is link]
        count = link.sock.cancel()
        assert 0 <= count <= len(mine)
        self.cancelled.update(mine)
        link.disturbed = link.stopped = True
        assert link.sock.cancel() == 0

    @rule(index=RARELY, flush=st.booleans())
    def close(self, index: int, flush: bool) -> None:
        link = self.rare_link(index)
        if link is None:
            return
        if flush and link.open:
            self.close_after_flushing(link)
        elif not flush:
            self.close_plainly(link)
        assert link.sock.closed or link.open

    # -- what the peers do --

    @rule(index=INDEX, size=SIZES)
    def peer_writes(self, index: int, size: int) -> None:
        link = self.link(index)
        if link.peer_closed or link.peer_shut:
            return
        link.peer_writes += 1
        data = numbered(link.peer_writes, size)
        try:
            link.peer_sent += data[: link.peer.send(data)]
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in GONE:
                raise
            return
        if link.flushed:
            link.unread_at_close = True

    @rule(index=INDEX, size=SIZES)
    def peer_reads(self, index: int, size: int) -> None:
        self.link(index).peer_reads(size)

    @rule(index=RARELY)
    def peer_shuts_down(self, index: int) -> None:
        link = self.rare_link(index)
        if link is not None:
            self.shut_down_peer(link)

    def shut_down_peer(self, link: Link) -> None:
        if not link.peer_closed and not link.peer_shut:
            try:
                link.peer.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno not in (errno.ENOTCONN, *GONE):
                    raise
            link.peer_shut = True

    @rule(index=RARELY, reset=st.booleans())
    def peer_closes(self, index: int, reset: bool) -> None:
        link = self.rare_link(index)
        if link is None or link.peer_closed:
            return
        if reset:
            link.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.peer.close()
        link.peer_closed = True
        link.disturbed = True

    # -- completions --

    @rule(count=st.sampled_from([1, 2, 7, 64, 256]))
    def dequeue(self, count: int) -> None:
        completions = self.port.dequeue_many(count, 0)
        assert len(completions) <= count
        for completion in completions:
            self.take(completion)

    @rule()
    def dequeue_one(self) -> None:
        completion = self.port.dequeue(0)
        if completion is not None:
            self.take(completion)

    def take(self, completion: an.Completion) -> None:
        self.taken += 1
        if completion.kind is an.POST:
            self.posts_seen += 1
            assert completion.state == self.posts_seen, "posts come in the order posted"
            return
        operation = completion.operation
        if operation is None:
            self.take_quiet_failure(completion)
            return
        assert operation in self.outstanding, f"a completion too many: {completion}"
        assert completion.kind is operation.kind
        link = self.outstanding[operation]
        if completion.more:
            assert operation in self.multishots
        else:
            assert not operation.pending
            assert not operation.cancel()
            del self.outstanding[operation]
            self.completed[operation] = completion
        if completion.error == errno.ECANCELED:
            assert operation in self.cancelled, "nobody cancelled it"
            assert not completion.more
        if completion.kind is an.ACCEPT:
            self.take_accepted(completion)
        elif completion.kind is an.CONNECT:
            self.take_connected(completion, operation)
        else:
            assert link is not None
            assert completion.socket is link.sock
            assert completion.state is link
            if completion.kind is an.RECV:
                self.take_received(completion, operation, link)
            else:
                self.take_sent(completion, operation, link)

    def take_quiet_failure(self, completion: an.Completion) -> None:
        assert completion.kind is an.SEND
        assert completion.error != 0
        assert not completion.more
        link = completion.state
        assert isinstance(link, Link)
        if completion.error == errno.ECANCELED:
            assert link.stopped, "what one's own close drops is silent"
        assert link.peer_closed or link.disturbed or self.stopped_midway(link)
        link.disturbed = True
        self.quiet_failures += 1
        assert self.quiet_failures <= self.sends + len(self.links)

    def stopped_midway(self, link: Link) -> bool:
        """Whether a cancelled send or a disconnect may have broken the stream."""
        return any(o in self.cancelled or o.kind is an.DISCONNECT for o in link.sends)

    def take_accepted(self, completion: an.Completion) -> None:
        if completion.error:
            assert completion.error == errno.ECANCELED
            return
        sock, address = completion.result()
        client = self.clients[address]
        assert all(link.peer is not client for link in self.links), "accepted twice"
        self.add(sock, client)

    def take_connected(self, completion: an.Completion, operation: an.Operation) -> None:
        sock = self.connecting.pop(operation)
        if completion.error:
            assert completion.error in (errno.ECANCELED, errno.ECONNREFUSED)
            sock.close()
            return
        if sock.closed:
            return  # the connect won the race against its close
        address = sock.getsockname()
        # The system tells of a connection on this side first.
        eventually(lambda: self.serves(address))
        self.add(sock, self.served.pop(address))

    def serves(self, client: Any) -> bool:
        """Whether the peers' server has that client's connection, of all that it can have now."""
        while True:
            try:
                peer, address = self.server.accept()
            except BlockingIOError:
                return client in self.served
            self.served[address] = peer

    def take_received(self, completion: an.Completion, operation: an.Operation, link: Link) -> None:
        buffer = self.buffers.pop(operation, None)
        if completion.error:
            assert completion.error in (errno.ECANCELED, errno.ECONNRESET, errno.EPIPE)
            assert not completion.data
            if completion.error == errno.ECANCELED:
                return
            assert link.peer_closed
        else:
            if buffer is not None:
                data = bytes(buffer[: completion.transferred])
            else:
                assert completion.data is not None
                data = completion.data
            link.received += data
            assert link.peer_sent.startswith(link.received), "not what the peer sent"
            if data:
                assert not link.ended, "data behind the end"
                assert completion.more == (operation in self.multishots) or (
                    operation in self.cancelled
                )
            else:
                assert not completion.more
                assert link.peer_shut or link.peer_closed
                # A reset may be told once, to a send; then a receive only sees an end.
                assert link.peer_closed or link.received == link.peer_sent, "an end before data"
                link.ended = True
        place = link.receives.index(operation)
        assert place >= link.last_receive, "receives complete in the order started"
        link.last_receive = place

    def take_sent(self, completion: an.Completion, operation: an.Operation, link: Link) -> None:
        sent = next(sent for sent in link.sent if sent.operation is operation)
        assert 0 <= completion.transferred <= len(sent.data)
        sent.transferred = completion.transferred
        if completion.error == 0:
            assert completion.transferred == len(sent.data)
        else:
            allowed = {errno.ECANCELED, *GONE}
            if operation.kind is an.DISCONNECT:
                allowed.add(errno.ENOTCONN)
            assert completion.error in allowed, errno.errorcode[completion.error]
            explained = link.peer_closed or link.disturbed or self.stopped_midway(link)
            link.disturbed = True
            if completion.error == errno.ECANCELED:
                return
            assert explained, errno.errorcode[completion.error]
        place = link.sends.index(operation)
        assert place >= link.last_send, "sends complete in the order started"
        link.last_send = place

    # -- what holds after each step --

    @invariant()
    def counts_agree(self) -> None:
        expected = len(self.outstanding) + self.posts - self.posts_seen
        assert self.port.in_flight == expected
        assert all(operation.pending for operation in self.outstanding)

    @invariant()
    def nothing_is_unsent_beyond_what_was_given(self) -> None:
        for link in self.links:
            given = sum(len(sent.data) for sent in link.sent)
            assert 0 <= link.sock.unsent <= given - len(link.peer_got)

    # -- the end --

    def teardown(self) -> None:
        try:
            if self.ending == "finish":
                self.finish()
            if self.ending == "close port":
                self.port.close()
                for operation in self.outstanding:
                    assert not operation.cancel()
                self.outstanding.clear()
                for link in self.links:
                    link.disturbed = True
            else:
                self.close_all()
            assert self.port.in_flight == 0
            assert not any(operation.pending for operation in self.operations)
            if self.ending != "close port":
                assert set(self.completed) == set(self.operations)
                assert self.posts_seen == self.posts
            for link in self.links:
                self.wait_for(lambda: link.peer_reads(1 << 24))
                assert link.explains(whole=False)
        finally:
            self.port.close()
            release_kept()
            for sock in self.connecting.values():
                sock.close()
            for link in self.links:
                link.sock.close()
                link.peer.close()
            for other in (*self.clients.values(), *self.served.values(), self.server):
                other.close()
            self.listener.close()
            self.file.close()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Dequeues until the condition holds, as long as that goes on.

        How long all of it takes depends on what else the machine does: what fails is that nothing
        comes any more. Failing runs are repeated to shrink them, so that is waited for briefly."""
        latest = now = time.monotonic()
        limit = now + PATIENCE
        reached = -1
        while not condition():
            if self.ending != "close port":
                for completion in self.port.dequeue_many(timeout=0.005):
                    self.take(completion)
            now = time.monotonic()
            done = self.taken + sum(len(link.peer_got) for link in self.links)
            if done != reached:
                reached, latest = done, now
            left_over = f"{len(self.outstanding)} operations are left over"
            assert now < latest + PATIENCE / 5, f"{left_over}, and nothing comes any more"
            assert now < limit, f"{left_over} after {PATIENCE} s"

    def finish(self) -> None:
        """Lets everything that was started come to its natural end, and compares every byte."""
        for operation in list(self.outstanding):
            if operation.kind is an.ACCEPT and operation.cancel():
                self.cancelled.add(operation)
        for link in self.links[::2]:
            # Half of them with whatever is still queued, the others when all is out.
            if link.open and not link.peer_closed and link.received == link.peer_sent:
                self.close_after_flushing(link)
        links_seen = 0

        def nothing_left() -> bool:
            nonlocal links_seen
            for link in self.links[links_seen:]:
                # Links may still come from connections that are under way.
                self.shut_down_peer(link)
                if link.open and not link.ended:
                    last = self.started(link.sock.recv(multishot=True), link)
                    self.multishots.add(last)
                    link.receives.append(last)
            links_seen = len(self.links)
            for link in self.links:
                link.peer_reads(1 << 20)
            return not self.outstanding and self.posts_seen == self.posts

        self.wait_for(nothing_left)
        for link in self.links:
            if link.open:
                if not link.peer_closed:
                    assert link.ended
                    assert link.received == link.peer_sent
                # Whatever is quiet and not yet out goes out now.
                self.close_after_flushing(link)
            self.wait_for(lambda: link.peer_reads(1 << 24))
            whole = not (link.peer_closed or link.closed or link.unread_at_close)
            assert link.explains(whole), (
                f"{len(link.peer_got)} bytes are not what was sent: "
                f"{[(len(s.data), s.transferred) for s in link.sent]}"
            )

    def close_all(self) -> None:
        self.listener.close()
        for operation in self.outstanding:
            if operation.kind is an.ACCEPT:
                self.cancelled.add(operation)
        for operation, sock in self.connecting.items():
            self.cancelled.add(operation)
            sock.close()
        # Connections that were accepted or made before may still come, and are closed then.
        for _ in range(len(self.clients) + len(self.operations) + 1):
            for link in self.links:
                self.close_plainly(link)
            self.wait_for(lambda: not self.outstanding and self.posts_seen == self.posts)
            if all(link.closed for link in self.links):
                return
        raise AssertionError("connections never cease")

    def close_after_flushing(self, link: Link) -> None:
        link.sock.close(flush=True)
        link.flushed = True
        self.cancelled.update(o for o in link.receives if o in self.outstanding)
        link.unread_at_close = link.received != link.peer_sent

    def close_plainly(self, link: Link) -> None:
        link.sock.close()
        link.closed = True
        link.disturbed = True
        self.cancelled.update(o for o, other in self.outstanding.items() if other is link)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_operation_completes_exactly_once_whatever_happens(backend: str) -> None:
    """The settings come from the profile; the timeout is for the thorough one."""
    before = len(open_descriptors())

    class Machine(PortMachine):
        def __init__(self) -> None:
            super().__init__(backend)

    run_state_machine_as_test(Machine, settings=settings())
    if before:
        assert len(open_descriptors()) <= before + 5
