# cython: language_level=3, freethreading_compatible=True
"""The handler: all of it runs without the interpreter lock, but for what Python started itself."""

import threading

cimport asyncio_native as an
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free

an.asyncio_native_import()

cdef enum:
    BATCH = 256
    RECEIVE_BYTES = 256 * 1024
    UNSENT_LIMIT_BYTES = 1 << 20  # a peer that does not read what it gets back is not read either

# The longest wait of the main thread in one call: Python's signal handlers run in between.
cdef int64_t SLICE_NS = 200_000_000


# What a connection needs, with the operation inside: starting it allocates nothing. It may go when
# the last completion of the operation has been dequeued.
cdef struct connection:
    an.an_operation receiving
    an.an_socket *socket
    connection *next
    connection *previous


@cython.no_gc_clear  # __dealloc__ needs the port
cdef class EchoServer:
    """Sends back what comes. Python has the port and the listener, and ends it by `port.post()`."""

    cdef object port  # these two keep what the pointers below point to
    cdef object listener
    cdef an.an_port *port_handle
    cdef an.an_socket *listener_handle
    cdef an.an_operation accepting
    cdef int64_t wait_ns
    cdef bint accepts
    cdef bint stopping
    cdef connection *first
    cdef readonly uint64_t connections
    """How many there have been."""
    cdef readonly uint64_t messages
    """How many pieces of data came."""

    def __init__(self, port, listener):
        if self.accepts:
            raise RuntimeError("it serves already")
        self.port_handle = an.an_py_port_handle(port)
        self.listener_handle = an.an_py_socket_handle(listener)
        self.port = port
        self.listener = listener

    def __dealloc__(self):
        # An exception ended `serve`: the port has to let go of the operations first.
        if self.first != NULL or self.accepts:
            self.port.close()
        while self.first != NULL:
            self.leave(self.first)

    def serve(self):
        """Serves until something is posted, then ends all connections and returns."""
        cdef int error = an.an_socket_accept(
            self.listener_handle, &self.accepting, an.AN_MULTISHOT, an.AN_FOREVER
        )
        if error != 0:
            an.an_py_raise(error)
        self.accepts = True
        self.stopping = False
        on_main_thread = threading.current_thread() is threading.main_thread()
        self.wait_ns = SLICE_NS if on_main_thread else an.AN_FOREVER
        while self.accepts or self.first != NULL:
            with nogil:
                error = self.turn()
            if error != 0 and error != an.AN_EINTR:
                an.an_py_raise(error)
            PyErr_CheckSignals()

    def completed(self, completion):
        """What Python started itself on this port has completed: a post, here."""
        self.stopping = True
        self.listener.close()

    cdef int turn(self) noexcept nogil:
        """Dequeues and handles until nothing came for a slice; returns an error of the library."""
        cdef an.an_completion batch[BATCH]
        cdef size_t count = 1
        cdef size_t i
        cdef int error = 0
        while count > 0 and error == 0 and (self.accepts or self.first != NULL):
            error = an.an_port_dequeue(self.port_handle, batch, BATCH, self.wait_ns, &count)
            for i in range(count):
                self.handle(&batch[i])
            an.an_completion_release(batch, count)
        return error

    cdef void handle(self, an.an_completion *c) noexcept nogil:
        if c.flags & an.AN_MARKED:
            self.give_to_python(c)
        elif c.kind == an.AN_RECV:
            self.received(c)
        elif c.kind == an.AN_ACCEPT:
            if c.accepted != NULL:
                self.accepted(c.accepted)
            if not c.flags & an.AN_MORE:
                self.accepts = False
        # Else a quiet send failed, which the receive of its connection tells as well.

    cdef void give_to_python(self, an.an_completion *c) noexcept with gil:
        cdef connection *each
        try:
            self.completed(an.an_py_completion_new(self.port, c))
        finally:
            if self.stopping:
                each = self.first
                while each != NULL:
                    an.an_socket_close(each.socket, 0)  # its receive completes, as cancelled
                    each = each.next

    cdef void accepted(self, an.an_socket *socket) noexcept nogil:
        cdef connection *peer = <connection *>calloc(1, sizeof(connection))
        if peer == NULL or self.stopping:
            free(peer)
            an.an_socket_free(socket, 0)
            return
        self.enter(peer, socket)
        if an.an_port_associate(self.port_handle, socket, peer) != 0 or an.an_socket_recv(
            socket, &peer.receiving, NULL, RECEIVE_BYTES, an.AN_MULTISHOT, UNSENT_LIMIT_BYTES,
            an.AN_FOREVER
        ) != 0:
            self.leave(peer)

    cdef void received(self, an.an_completion *c) noexcept nogil:
        if c.transferred > 0:
            self.messages += 1
            # Without an operation it is a quiet send: the data is the library's again at once.
            an.an_socket_send(c.socket, NULL, c.data, c.transferred, an.AN_FOREVER)
        if not c.flags & an.AN_MORE:  # the last one: the end of the stream, or an error
            self.leave(<connection *>c.state)

    cdef void enter(self, connection *peer, an.an_socket *socket) noexcept nogil:
        peer.socket = socket
        peer.next = self.first
        if self.first != NULL:
            self.first.previous = peer
        self.first = peer
        self.connections += 1

    cdef void leave(self, connection *peer) noexcept nogil:
        if peer.previous != NULL:
            peer.previous.next = peer.next
        else:
            self.first = peer.next
        if peer.next != NULL:
            peer.next.previous = peer.previous
        an.an_socket_free(peer.socket, an.AN_FLUSH)
        free(peer)
