"""The completion port over cffi: the portable binding."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from itertools import islice
from time import perf_counter_ns
from typing import Any

from ._arguments import LONGEST_NS, integer, nanoseconds, timeout_ns
from ._batch import Batch, Remainder, Strangers, discard
from ._completion import Completion
from ._constants import POST, TIMER
from ._errors import port_closed
from ._interpreter import FREE_THREADED
from ._native import ffi, lib
from ._operation import Operation
from ._port_base import (
    PortBase,
    associate_error,
    dequeue_error,
    not_a_socket,
    open_port,
    start_error,
)
from ._socket import AsyncSocket

_NULL = ffi.NULL
_FOREVER_NS = lib.AN_FOREVER
_COMPLETION = ffi.typeof("an_completion *")
_dequeue = lib.an_port_dequeue

_SLICE_NS = 200_000_000
"""The longest wait of the main thread in one C call, where Python cannot run signal handlers.

A signal that arrives just before the wait, or that the system gives to another thread, does not end
it; Ctrl-C has to work within 0.3 s all the same.
"""

_CAPACITIES = (16, 256, 4096)
"""The sizes of the arrays for completions; 72 bytes an entry, one array for each thread."""


class _ThreadLocal(threading.local):
    """The batch of a thread, while no call of that thread uses it."""

    batch: Batch | None = None


class _Forks:
    """The ports of the process, and what its forked children leave; for free threads.

    There each dict has a lock, and a fork copies it as it is: one that another thread holds stays
    locked in the child. The interpreter sees to its own, and we to what the threads share of ours.
    """

    def __init__(self) -> None:
        self.left: list[object] = []
        # Held across a fork, so that the tuple is not just being replaced. Reentrant: a signal
        # handler may open a port.
        self._lock = threading.RLock()
        self._ports: tuple[weakref.ref[CompletionPort], ...] = ()

    def watch(self) -> None:
        """Has the interpreter tell of forks."""
        os.register_at_fork(
            before=self._lock.acquire,
            after_in_parent=self._lock.release,
            after_in_child=self._in_child,
        )

    def remember(self, port: CompletionPort) -> None:
        """Adds a port, and drops those that are gone."""
        mine = weakref.ref(port)
        while mine not in self._ports:
            before = self._ports
            after = (*(other for other in before if other() is not None), mine)
            with self._lock:
                if self._ports is before:
                    self._ports = after

    def _in_child(self) -> None:
        for reference in self._ports:
            port = reference()
            if port is not None:
                port._forget()
        self._lock.release()


_forks = _Forks()
if FREE_THREADED and hasattr(os, "register_at_fork"):
    _forks.watch()


class CompletionPort(PortBase):
    __doc__ = PortBase.__doc__

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_batches",
        "_flushes",
        "_handle",
        "_lingering",
        "_local",
        "_main_thread",
        "_operations",
        "_sockets",
        "_strangers",
    )

    def __init__(self, backend: str = "auto", *, concurrency: int = 0) -> None:
        opened = open_port(backend, concurrency)
        # What is in flight, by the address of its C operation: this keeps operations, and with them
        # sockets and buffers, alive. An operation is in it before the C call that starts it.
        self._operations: dict[int, Operation] = {}
        # Sends that watch over a flush, see AsyncSocket.close; the user does not see them.
        self._flushes: dict[int, Operation] = {}
        # Sockets that have sent quietly, by the address of their handle.
        self._sockets: dict[int, weakref.ref[AsyncSocket]] = {}
        # Sockets that were dropped while the failure of their quiet sends was queued.
        self._lingering: dict[int, AsyncSocket] = {}
        # Batches whose call ended by an exception, see _batch.
        self._abandoned: deque[Batch | Remainder] = deque()
        # Those of all threads: who decodes the end of an operation tells the others.
        # A plain set and not a WeakSet: that may not be read while another thread adds to it.
        self._batches: set[weakref.ref[Batch]] = set()
        self._strangers = Strangers()
        self._local = _ThreadLocal()
        # Python runs signal handlers in this thread only.
        self._main_thread = threading.main_thread().ident
        self._handle = opened
        if FREE_THREADED:
            _forks.remember(self)

    @property
    def in_flight(self) -> int:
        """Operations started and not yet dequeued.

        A multishot counts as one, a post as one, a quiet operation not at all; 0 once closed.
        """
        return 0 if self.closed else len(self._operations)

    def associate(self, sock: AsyncSocket, state: Any = None) -> None:
        """Binds a socket to this port for good.

        state: comes back with each completion of the socket, as it is when that is dequeued; again
        on the same port replaces it. Raises `ValueError` when it belongs to another port
        (on Windows also one that is not this library's, as an adopted socket's may).
        """
        if not isinstance(sock, AsyncSocket):
            raise not_a_socket(sock)
        if error := lib.an_port_associate(self._handle, sock._handle, _NULL):
            raise associate_error(sock, error)
        sock._state = state
        sock._port = self

    def post(self, state: Any = None) -> None:
        """Queues a completion of kind `POST` that carries `state`; from any thread.

        In order for each posting thread. It is what Windows' PostQueuedCompletionStatus does.
        """
        operation = Operation(POST, None, self, state)
        self._operations[operation._key] = operation
        error = lib.an_port_post(self._handle, operation._handle, _NULL)
        if error:
            raise self._failed(operation, error)

    def timer(self, seconds: float, state: Any = None) -> Operation:
        """Starts a timer, which completes after `seconds` (0 or more), never early.

        state: comes back with the completion. `Operation.cancel` ends it.
        """
        delay_ns = min(nanoseconds(seconds, "seconds"), LONGEST_NS)
        operation = Operation(TIMER, None, self, state)
        self._operations[operation._key] = operation
        error = lib.an_port_timer(self._handle, operation._handle, delay_ns, _NULL)
        if error:
            raise self._failed(operation, error)
        return operation

    def _failed(self, operation: Operation, error: int) -> OSError:
        """Takes back an operation that did not start, and returns what to raise."""
        self._operations.pop(operation._key, None)
        return start_error(error)

    def dequeue_many(self, max_count: int = 256, timeout: float | None = None) -> list[Completion]:
        """Waits for completions, and returns 1 to `max_count` of them; see `dequeue`.

        Returns an empty list at the timeout. No more than 4096 are returned at once.
        """
        limit = max_count
        if type(max_count) is not int or max_count < 1:
            limit = integer(max_count, "max_count", 1)
        wait_ns = _FOREVER_NS if timeout is None else timeout_ns(timeout)
        local = self._local
        batch = local.batch
        if batch is None or batch.capacity < limit:
            batch = self._new_batch(limit)
            limit = min(limit, batch.capacity)
        # From here on the batch is this call's: a signal handler may dequeue as well.
        local.batch = None
        done: list[Any] = batch.done
        count = batch.count
        try:
            while self._abandoned:
                self._take_up(limit, done)
                if done:
                    batch.done = []
                    local.batch = batch
                    return done
            slice_ns = batch.slice_ns
            deadline_ns = perf_counter_ns() + wait_ns if wait_ns > 0 else 0
            while True:
                this_ns = wait_ns
                if slice_ns != _FOREVER_NS and not 0 <= wait_ns <= slice_ns:
                    this_ns = slice_ns
                error = _dequeue(self._handle, batch.array, limit, this_ns, count)
                if count[0]:
                    batch.finish()
                    if batch.hidden:
                        batch.hidden = False
                        batch.done = done = [item for item in done if item is not None]
                        foreign, batch.foreign = batch.foreign, False
                        if foreign and not wait_ns:
                            break  # a poll does not go on for others' sake
                    if done:
                        break
                    if wait_ns > 0:
                        wait_ns = max(0, deadline_ns - perf_counter_ns())
                elif error and error != lib.AN_EINTR:
                    raise dequeue_error(error)
                elif wait_ns >= 0:
                    wait_ns = deadline_ns - perf_counter_ns() if wait_ns else 0
                    if wait_ns <= 0:
                        break
            batch.done = []
            # Back to the thread, by a store: a call could be followed by a signal handler.
            local.batch = batch
            return done
        except BaseException:
            # Stores and one call: no signal handler runs before that call has been made.
            if count[0] or done:
                batch.done = done
                local.batch = None
                self._abandoned.appendleft(batch)
            else:
                local.batch = batch
            raise

    def _new_batch(self, limit: int) -> Batch:
        capacity = next((size for size in _CAPACITIES if size >= limit), _CAPACITIES[-1])
        on_main_thread = threading.get_ident() == self._main_thread
        return Batch(self, capacity, _SLICE_NS if on_main_thread else _FOREVER_NS)

    def _take_up(self, limit: int, done: list[Any]) -> None:
        """Moves up to `limit` completions that an interrupted call left behind into `done`.

        Each move is one C call, `extend` with an iterator that pops: a signal handler that raises
        finds them in one place or the other, never in none and never in both.
        """
        abandoned = self._abandoned
        mine: list[Batch | Remainder] = []
        try:
            try:
                mine.extend(islice(iter(abandoned.popleft, None), 1))
            except IndexError:
                return  # another thread was faster
            left = mine[0]
            if isinstance(left, Batch):
                left = Remainder(left.finish())
                mine[0] = left
            completions = left.completions
            done.extend(islice(iter(completions.popleft, None), min(limit, len(completions))))
            if completions:
                abandoned.extendleft(mine)
        except BaseException:
            # Perhaps once more than needed; it is harmless when it is empty.
            abandoned.extendleft(mine)
            raise

    @property
    def _foreign(self) -> Callable[[int, list[Any]], None] | None:
        """What takes completions of operations that C code started."""
        return self._strangers.handler

    @_foreign.setter
    def _foreign(self, handler: Callable[[int, list[Any]], None] | None) -> None:
        self._strangers.handler = handler

    def _lend(self) -> None:
        if not self._strangers.counts:
            self._strangers.counts = True
            for operation in list(self._operations.values()):
                operation._decoded = None

    def _decode(self, address: int) -> Completion | None:
        if self.closed:
            raise port_closed()
        batch = Batch(self, 1, _FOREVER_NS)
        try:
            return batch.decode_copy(ffi.cast(_COMPLETION, address))
        except BaseException:
            if batch.done:
                batch._settle(0)
                self._abandoned.append(Remainder(batch.done))
            raise

    def close(self) -> None:
        """Closes the port and its sockets, cancels what is in flight, and releases all.

        Returns when no buffer can be touched any more. What is queued is discarded. Blocked
        dequeues raise `PortClosedError`. Idempotent.
        """
        lib.an_port_close(self._handle)
        self._let_go()

    def _let_go(self) -> None:
        """Releases what was held for the C library, which has let go of all of it."""
        # Who closes beside us finds the same dict until all is given back: closed means that.
        for operation in list(self._operations.values()):
            operation._let_go()
        # A thread that has just dequeued still decodes with the dict that its batch refers to.
        self._operations = {}
        self._flushes.clear()
        self._lingering.clear()
        self._strangers.ended.clear()
        if self._strangers.handler is None:
            self._strangers.handler = discard
        while True:
            try:
                batch = self._abandoned.popleft()
            except IndexError:
                return
            left = Remainder(batch.finish()) if isinstance(batch, Batch) else batch
            for completion in left.completions:
                # One that is garbage together with the port may have been finalized before it.
                accepted = completion.accepted
                if accepted is not None and hasattr(accepted, "_handle"):
                    accepted.close()

    def _forget(self) -> None:
        """Leaves all that several threads have used, in a forked child of this process.

        A thread that is not here may have locked it. It stays in memory, as giving it back would
        take the locks.
        """
        _forks.left.append((self._operations, self._flushes, self._sockets, self._lingering))
        _forks.left.append((self._abandoned, self._batches, self._local, self._strangers))
        self._operations, self._flushes, self._sockets, self._lingering = {}, {}, {}, {}
        self._abandoned, self._batches, self._local = deque(), set(), _ThreadLocal()
        self._strangers = Strangers()

    def __del__(
        self,
        _lib: Any = lib,
        _warn: Callable[..., None] = warnings.warn,
    ) -> None:
        # Finalizers run before garbage collection clears anything: after this, the C library
        # touches neither operations nor buffers any more, and they may go in any order.
        try:
            handle = self._handle
        except AttributeError:
            return  # never opened
        text = "" if self.closed else f"unclosed {self!r}"
        _lib.an_port_close(handle)
        self._let_go()
        # The C library keeps its memory until the last socket was given back.
        del self._handle
        _lib.an_port_free(handle)
        if text:
            _warn(text, ResourceWarning, stacklevel=2, source=self)
