# cython: language_level=3, freethreading_compatible=True
"""What a test does in C: starts operations of its own on Python's ports and sockets, and dequeues."""

cimport asyncio_native as an
from libc.stdint cimport int64_t, intptr_t, uintptr_t
from libc.stdlib cimport calloc, free

an.asyncio_native_import()

cdef enum:
    BATCH = 64

# As a user's own structure: the operation is embedded.
cdef struct mine:
    an.an_operation operation
    int number
    char buffer[64]

cdef int living = 0
cdef list refusals = []

cdef mine *create(int number) except NULL:
    global living
    cdef mine *made = <mine *>calloc(1, sizeof(mine))
    if made == NULL:
        raise MemoryError
    made.number = number
    living += 1
    return made

cdef void give_back(an.an_operation *operation) noexcept:
    global living
    living -= 1
    free(operation)

cdef int started(int error, mine *operation) except -1:
    if error != 0:
        give_back(&operation.operation)
        an.an_py_raise(error)
    return 0

cdef tuple shown(const an.an_completion *c):
    """(kind, marked, more, the number of an own operation, error, transferred, data)"""
    own = c.operation != NULL and not c.flags & an.AN_MARKED
    data = (<const char *>c.data)[:c.transferred] if c.data != NULL else None
    number = (<mine *>c.operation).number if own else None
    marked = c.flags & an.AN_MARKED != 0
    return c.kind, marked, c.flags & an.AN_MORE != 0, number, c.error, c.transferred, data

cdef void count(an.an_completion *c, void *context) noexcept with gil:
    (<list>context).append(shown(c))
    if c.accepted != NULL:
        an.an_socket_free(c.accepted, 0)
    if c.operation != NULL and not c.flags & an.AN_MORE:
        give_back(c.operation)

cdef void complain(an.an_completion *c, void *context) noexcept with gil:
    count(c, context)
    try:
        raise ValueError("out of a handler")
    except ValueError as error:
        refusals.append(error)

def alive():
    return living

def forget(int count):
    """So many operations were given back by the port's close; the test ends with their memory."""
    global living
    living -= count

def version():
    return an.an_version().decode()

def port_address(port):
    return <uintptr_t>an.an_py_port_handle(port)

def socket_address(sock):
    return <uintptr_t>an.an_py_socket_handle(sock)

def raise_error(int error):
    an.an_py_raise(error)

def numbers():
    return {"EPORTCLOSED": an.AN_EPORTCLOSED, "EBADF": an.AN_EBADF, "ECANCELED": an.AN_ECANCELED,
            "ECONNRESET": an.AN_ECONNRESET}

# -- operations of its own --------------------------------------------------------------------------

def post(port, int number):
    cdef an.an_port *handle = an.an_py_port_handle(port)
    cdef mine *operation = create(number)
    started(an.an_port_post(handle, &operation.operation, NULL), operation)

def timer(port, int number, int64_t delay_ns):
    cdef an.an_port *handle = an.an_py_port_handle(port)
    cdef mine *operation = create(number)
    started(an.an_port_timer(handle, &operation.operation, delay_ns, NULL), operation)

def accept(sock, int number, bint multishot=False):
    cdef an.an_socket *handle = an.an_py_socket_handle(sock)
    cdef mine *operation = create(number)
    flags = an.AN_MULTISHOT if multishot else 0
    started(an.an_socket_accept(handle, &operation.operation, flags, an.AN_FOREVER), operation)

def recv(sock, int number, bint multishot=False):
    cdef an.an_socket *handle = an.an_py_socket_handle(sock)
    cdef mine *operation = create(number)
    flags = an.AN_MULTISHOT if multishot else 0
    started(an.an_socket_recv(handle, &operation.operation, NULL, 4096, flags, -1, an.AN_FOREVER),
            operation)

def send(sock, int number, bytes data):
    """Up to 64 bytes."""
    cdef an.an_socket *handle = an.an_py_socket_handle(sock)
    cdef mine *operation = create(number)
    operation.buffer[:len(data)] = data
    started(an.an_socket_send(handle, &operation.operation, operation.buffer, len(data),
                              an.AN_FOREVER), operation)

def send_quietly(sock, bytes data):
    cdef an.an_socket *handle = an.an_py_socket_handle(sock)
    cdef const char *begin = data
    error = an.an_socket_send(handle, NULL, begin, len(data), an.AN_FOREVER)
    if error:
        an.an_py_raise(error)

# -- sockets of its own -----------------------------------------------------------------------------

cdef class Socket:
    """A socket that C owns, until it is given to Python."""

    cdef an.an_socket *handle

    def __dealloc__(self):
        if self.handle != NULL:
            an.an_socket_free(self.handle, 0)

    def associate(self, port):
        error = an.an_port_associate(an.an_py_port_handle(port), self.handle, NULL)
        if error:
            an.an_py_raise(error)

    def send_quietly(self, bytes data):
        cdef const char *begin = data
        return an.an_socket_send(self.handle, NULL, begin, len(data), an.AN_FOREVER)

    def shutdown(self):
        return an.an_socket_shutdown(self.handle, 1)

    def close(self):
        an.an_socket_close(self.handle, 0)

    def to_python(self):
        made = an.an_py_socket_new(self.handle)
        self.handle = NULL
        return made

    def is_kept(self):
        return self.handle != NULL

    def unsent(self):
        return an.an_socket_unsent(self.handle)

def open_socket(int family, int kind):
    made = Socket()
    error = an.an_socket_open(&made.handle, family, kind, 0)
    if error:
        an.an_py_raise(error)
    return made

def adopt(intptr_t descriptor):
    made = Socket()
    error = an.an_socket_adopt(&made.handle, descriptor)
    if error:
        an.an_py_raise(error)
    return made

def again(sock):
    """A socket of Python's through C and back."""
    return an.an_py_socket_new(an.an_py_socket_handle(sock))

def on_a_port_of_its_own():
    """What Python says of a socket on a port that is C's alone."""
    cdef an.an_port *port
    made = open_socket(2, 1)
    if an.an_port_open(&port, NULL) != 0:
        raise MemoryError
    try:
        an.an_port_associate(port, (<Socket>made).handle, NULL)
        return made.to_python()
    finally:
        an.an_port_free(port)

# -- dequeuing --------------------------------------------------------------------------------------

cdef class Hand:
    """Completions that C dequeued."""

    cdef an.an_completion entries[BATCH]
    cdef size_t count
    cdef object port

    def __cinit__(self, port):
        self.port = port
        self.count = 0

    def dequeue(self, double seconds, size_t most=BATCH):
        """Dequeues without the interpreter lock, behind what it has; shows what came."""
        cdef an.an_port *handle = an.an_py_port_handle(self.port)
        cdef size_t found = 0
        cdef int error
        cdef int64_t timeout_ns = <int64_t>(seconds * 1e9) if seconds >= 0 else an.AN_FOREVER
        most = min(most, BATCH - self.count)
        with nogil:
            error = an.an_port_dequeue(handle, &self.entries[self.count], most, timeout_ns, &found)
        first = self.count
        self.count += found
        if error and error != an.AN_EINTR:
            an.an_py_raise(error)
        return [shown(&self.entries[i]) for i in range(first, self.count)]

    def completion(self, size_t index):
        """What Python has for it."""
        return an.an_py_completion_new(self.port, &self.entries[index])

    def completion_for(self, port, size_t index):
        return an.an_py_completion_new(port, &self.entries[index])

    def accepted(self, size_t index):
        """The accepted socket, taken."""
        made = Socket()
        made.handle = self.entries[index].accepted
        self.entries[index].accepted = NULL
        return made if made.handle != NULL else None

    def release(self):
        for i in range(self.count):
            c = &self.entries[i]
            own = c.operation != NULL and not c.flags & an.AN_MARKED
            if c.accepted != NULL:
                an.an_socket_free(c.accepted, 0)
            if own and not c.flags & an.AN_MORE:
                give_back(c.operation)
        an.an_completion_release(self.entries, self.count)
        self.count = 0

    def __dealloc__(self):
        an.an_completion_release(self.entries, self.count)

# -- handlers ---------------------------------------------------------------------------------------

def handle(port, list seen):
    """Completions of its own operations go into the list, which the caller keeps."""
    an.an_py_port_set_handler(port, count, <void *>seen)

def handle_badly(port, list seen):
    an.an_py_port_set_handler(port, complain, <void *>seen)

cdef void end(an.an_completion *c, void *context) noexcept with gil:
    port, seen = <tuple>context
    count(c, <void *>seen)
    port.close()

def handle_and_close(port, tuple port_and_seen):
    """The first completion closes the port."""
    an.an_py_port_set_handler(port, end, <void *>port_and_seen)

cdef void enter(an.an_completion *c, void *context) noexcept with gil:
    port, seen = <tuple>context
    count(c, <void *>seen)
    seen.extend(port.dequeue_many(1, 0))

def handle_and_dequeue(port, tuple port_and_seen):
    """Each completion dequeues one from Python's side, too."""
    an.an_py_port_set_handler(port, enter, <void *>port_and_seen)

def handle_no_more(port):
    an.an_py_port_set_handler(port, NULL, NULL)
