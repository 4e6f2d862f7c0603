"""A batch of dequeued completions, from the C library's array to Python objects.

Nothing may get lost when an exception strikes in the middle: a signal handler of Python may raise
between any two of our instructions on the main thread, and memory may run out. So a batch always
knows how far it is:

- `count[0]`, which the C call itself sets, is the number of entries in the array that still are to
  be released. Only after that it becomes 0.
- `done` has one item for each entry that was decoded. Appending it is the commit; what must follow
  a commit can be done twice without harm, and is done again for the last entry when the decoding
  of a batch is taken up later.

Threads decode side by side. One may decode the last completion of a multishot while another, which
got earlier ones of it, has not come to them yet: that finds the operation in its batch's `late`.

C code may share the port (_capi): it starts operations, whose completions we hand to its handler,
and it dequeues completions of ours, which it gives us one by one. `Strangers` has what that takes.

A batch belongs to one call at a time. When an exception ends that call, the batch goes to the
port's deque of abandoned ones, from which the next call takes it up before it dequeues more.
"""

from __future__ import annotations

import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._address import decode as decode_address
from ._completion import Completion
from ._constants import KINDS, POST, OperationKind
from ._errors import TRANSLATED, no_handler, other_port
from ._memory import address_of, memory
from ._native import ffi, lib
from ._socket import accepted_socket

if TYPE_CHECKING:
    from ._operation import Operation
    from ._port import CompletionPort

_COMPLETION = ffi.typeof("an_completion *")
_COMPLETIONS = ffi.typeof("an_completion[]")
_SIZE = ffi.typeof("size_t *")
_SOCKET = ffi.typeof("an_socket *")

_MORE = lib.AN_MORE
_TRUNCATED = lib.AN_TRUNCATED
_MARKED = lib.AN_MARKED

#: One `an_completion`. Reading all fields of an entry at once costs as much as two through cffi.
_ENTRY = struct.Struct("@PPPPPPQiHHP")
_ENTRY_FIELDS = (
    "operation",
    "socket",
    "state",
    "data",
    "accepted",
    "address",
    "transferred",
    "error",
    "kind",
    "flags",
    "reserved",
)
_ENTRY_SIZE = _ENTRY.size


def _check_layout() -> None:
    """Fails the import when the header's an_completion is not what `_ENTRY` reads."""
    offset = 0
    for code, field in zip(_ENTRY.format[1:], _ENTRY_FIELDS, strict=True):
        size = struct.calcsize(code)
        offset += -offset % size
        if ffi.offsetof("an_completion", field) != offset:
            raise ImportError(f"an_completion.{field} is not where it was expected")
        offset += size
    if ffi.sizeof("an_completion") != _ENTRY_SIZE:
        raise ImportError("an_completion has not the size that was expected")


_check_layout()


class Strangers:
    """What a port knows of the C code that shares it.

    handler: takes completions of operations that it started: the entry's address, and the list to
        which None is appended for it.
    counts: whether it may dequeue. From then on completions with `more` are counted, to know what
        it has in its hands when the last one of a multishot is decoded.
    ended: multishots of which that was decoded while it had earlier ones, by their keys.
    """

    __slots__ = ("counts", "ended", "handler", "lock")

    def __init__(self) -> None:
        self.handler: Callable[[int, list[Any]], None] | None = None
        self.counts = False
        self.ended: dict[int, Operation] = {}
        # Reentrant: a signal handler may dequeue.
        self.lock = threading.RLock()

    def count(self, operation: Operation) -> None:
        """A completion with `more` was decoded."""
        with self.lock:
            if operation._decoded is None:
                return
            operation._decoded += 1
            if operation._key in self.ended and operation._decoded == _more_count(operation):
                del self.ended[operation._key]

    def end(self, operation: Operation) -> None:
        """The last completion was decoded. One that nobody counted stays until the port closes."""
        with self.lock:
            count = _more_count(operation)
            if count and operation._decoded != count:
                self.ended[operation._key] = operation


def discard(address: int, done: list[Any]) -> None:
    """The handler of a closed port whose C code has set none."""
    done.append(None)
    entry = ffi.cast(_COMPLETION, address)
    if entry.accepted:
        lib.an_socket_free(entry.accepted, 0)


def _more_count(operation: Operation) -> int:
    return lib.an_operation_more_count(operation._handle)


class Batch:
    """An array for completions and what was decoded from it; see the module.

    capacity: entries in the array. slice_ns: the longest that its thread may wait in one call.
    """

    __slots__ = (
        "__weakref__",
        "array",
        "batches",
        "capacity",
        "count",
        "current",
        "done",
        "flushes",
        "foreign",
        "hidden",
        "late",
        "lingering",
        "memory",
        "operations",
        "slice_ns",
        "sockets",
        "strangers",
    )

    def __init__(self, port: CompletionPort, capacity: int, slice_ns: int) -> None:
        self.capacity = capacity
        self.slice_ns = slice_ns
        self.array = ffi.new(_COMPLETIONS, capacity)
        self.memory = ffi.buffer(self.array)
        self.count = ffi.new(_SIZE)
        self.done: list[Completion | None] = []
        # Whether `done` may have a None in it, which stands for an entry that is not for the user.
        self.hidden = False
        # Whether one of them was for C code.
        self.foreign = False
        # Keeps the operation of the last entry: while it lives, its address is no other's.
        self.current: Operation | None = None
        # The port's own dicts, which it replaces when it closes: a batch dequeued before that is
        # still decoded with them.
        self.operations = port._operations
        self.flushes = port._flushes
        self.sockets = port._sockets
        self.lingering = port._lingering
        # Operations that others have seen the end of, by their keys.
        self.late: dict[int, Operation] = {}
        self.strangers = port._strangers
        self.batches = port._batches
        self.batches.add(weakref.ref(self))

    def finish(self) -> list[Completion | None]:
        """Decodes the entries that are not decoded yet, gives all back and returns `done`."""
        count: int = self.count[0]
        if count:
            self._decode(count)
            lib.an_completion_release(self.array, count)
            self.count[0] = 0
            self.current = None
            self.late.clear()
            if self.lingering:
                self._dismiss()
        return self.done

    def _decode(self, count: int) -> None:
        done = self.done
        append = done.append
        operations = self.operations
        find = operations.get
        remove = operations.pop
        # One that was made later has nothing of what we got earlier.
        shared = len(self.batches) > 1
        strangers = self.strangers
        counts = strangers.counts
        first = len(done)
        if first:
            self._settle(first - 1)
        entries = self.memory[first * _ENTRY_SIZE : count * _ENTRY_SIZE]
        # The hot loop of a server: attributes are set here and not by a constructor, because a
        # call with eleven arguments costs more than all of the rest.
        for (
            key,
            socket_key,
            _state,
            data,
            accepted,
            address,
            transferred,
            error,
            kind,
            flags,
            _reserved,
        ) in _ENTRY.iter_unpack(entries):
            operation = find(key) or self.late.get(key) or strangers.ended.get(key)
            if operation is None:
                if flags & _MARKED:
                    self._decode_unusual(key, socket_key, transferred, error, kind)
                else:
                    self._hand_to_foreign()
                continue
            self.current = operation
            completion = Completion()
            completion.kind = operation.kind
            completion.socket = sock = operation.socket
            if sock is not None:
                completion.operation = operation
                completion.state = sock._state
                completion.data = memory[data : data + transferred] if data else operation._value
                completion.address = decode_address(sock._family, address) if address else None
            else:
                completion.operation = None if operation.kind is POST else operation
                completion.state = operation._value
                completion.data = None
                completion.address = None
            completion.error = error and TRANSLATED.get(error, error)
            completion.transferred = transferred
            completion.truncated = flags & _TRUNCATED != 0
            completion.more = flags & _MORE != 0
            # Its handle follows after the commit: without one it closes nothing when it is dropped.
            completion.accepted = peer = accepted_socket(sock._family) if accepted else None
            append(completion)
            if peer is not None:
                peer._handle = ffi.cast(_SOCKET, accepted)
            if operation._held is not None:
                operation._let_go()
            if not flags & _MORE:
                if shared:
                    self._share(operation)
                if counts:
                    strangers.end(operation)
                remove(key, None)
            elif counts:
                strangers.count(operation)

    def _share(self, operation: Operation) -> None:
        """The operation has ended: others that have completions of it still have to find it.

        Whoever has some took them before us, under the port's lock, and its count with them.
        """
        for reference in self.batches.copy():
            batch = reference()
            if batch is None:
                self.batches.discard(reference)  # its thread has ended
                continue
            if batch is self or not batch.count[0]:
                continue
            batch.late[operation._key] = operation
            if not batch.count[0]:
                # It was done meanwhile, and may have cleared before we stored.
                batch.late.pop(operation._key, None)

    def _decode_unusual(
        self, key: int, socket_key: int, transferred: int, error: int, kind: int
    ) -> None:
        """An entry whose operation is not one of the user's."""
        if key:
            # The end of a flush, or of something that another thread started while the port was
            # being closed.
            self.current = self.flushes.get(key)
            self.hidden = True
            self.done.append(None)
            self.flushes.pop(key, None)
            return
        reference = self.sockets.get(socket_key)
        sock = reference() if reference is not None else None
        if sock is None:
            sock = self.lingering.get(socket_key)
        completion = Completion()
        completion.operation = None
        completion.kind = _kind(kind)
        completion.socket = sock
        completion.state = sock._state if sock is not None else None
        completion.error = error and TRANSLATED.get(error, error)
        completion.transferred = transferred
        completion.data = None
        completion.accepted = None
        completion.address = None
        completion.truncated = False
        completion.more = False
        self.done.append(completion)

    def _hand_to_foreign(self) -> None:
        """C code started it; its handler commits the entry before it takes it."""
        handler = self.strangers.handler
        if handler is None:
            raise no_handler()
        self.hidden = self.foreign = True
        handler(address_of(self.array) + len(self.done) * _ENTRY_SIZE, self.done)

    def decode_copy(self, entry: Any) -> Completion | None:
        """Decodes a copy of an entry that C code dequeued, and which that releases."""
        key = address_of(entry.operation)
        places = (self.operations, self.flushes, self.late, self.strangers.ended)
        if key and not any(key in place for place in places):
            raise other_port()
        ffi.memmove(self.array, entry, _ENTRY_SIZE)
        self.count[0] = 1
        try:
            self._decode(1)
        finally:
            if self.done:
                entry.flags |= lib.AN_TAKEN
                entry.accepted = ffi.NULL
            self.count[0] = 0
            self.batches.discard(weakref.ref(self))
        return self.done[0]

    def _dismiss(self) -> None:
        """Dropped sockets whose failures have all been reported need not be kept any more."""
        for socket_key, sock in list(self.lingering.items()):
            if not lib.an_socket_unreported(sock._handle):
                self.lingering.pop(socket_key, None)

    def _settle(self, position: int) -> None:
        """Does what follows the commit of an entry, as far as that was not done."""
        completion = self.done[position]
        entry = _ENTRY.unpack_from(self.memory, position * _ENTRY_SIZE)
        if not entry[0]:
            return
        operation = self.current
        if operation is None or operation._key != entry[0]:
            return  # the next entry's operation: this one's entry had been settled before
        if completion is None:
            self.flushes.pop(operation._key, None)
            return
        if completion.accepted is not None and not hasattr(completion.accepted, "_handle"):
            accepted = entry[_ENTRY_FIELDS.index("accepted")]
            completion.accepted._handle = ffi.cast(_SOCKET, accepted)
        operation._let_go()
        if not completion.more:
            self._share(operation)
            if self.strangers.counts:
                self.strangers.end(operation)
            self.operations.pop(operation._key, None)


class Remainder:
    """Completions of an abandoned batch, on their way to the user."""

    __slots__ = ("completions",)

    def __init__(self, done: list[Completion | None]) -> None:
        self.completions = deque(item for item in done if item is not None)


def _kind(number: int) -> OperationKind:
    kind = KINDS[number]
    assert kind is not None
    return kind
