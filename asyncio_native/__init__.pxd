"""The C interface for Cython: `cimport asyncio_native`; written by tools/capi_table.py.

The header asyncio_native.h says what each of these does. A module that uses them calls
`asyncio_native.asyncio_native_import()` first, and is compiled with the folder of
`asyncio_native.get_include()`.
"""

from libc.stdint cimport int32_t, int64_t, intptr_t, uint16_t, uint32_t, uint64_t

cdef extern from "asyncio_native_capi.h" nogil:
    enum:
        AN_EAGAIN
        AN_EBADF
        AN_ECANCELED
        AN_ECONNREFUSED
        AN_ECONNRESET
        AN_EINTR
        AN_EINVAL
        AN_EMFILE
        AN_ENOMEM
        AN_ENOTCONN
        AN_ENOTSUP
        AN_EPERM
        AN_EPIPE
        AN_EPORTCLOSED
        AN_ETIMEDOUT

    ctypedef struct an_port:
        pass

    ctypedef struct an_socket:
        pass

    ctypedef intptr_t an_descriptor

    ctypedef struct an_operation:
        pass

    enum an_kind:
        AN_ACCEPT
        AN_CONNECT
        AN_RECV
        AN_RECVFROM
        AN_SEND
        AN_SENDTO
        AN_SENDFILE
        AN_DISCONNECT
        AN_POST
        AN_TIMER
        AN_KIND_COUNT

    enum an_start_flag:
        AN_MULTISHOT
        AN_FLUSH

    enum an_completion_flag:
        AN_MORE
        AN_TRUNCATED
        AN_MARKED
        AN_TAKEN

    enum an_port_flag:
        AN_PORT_INTERRUPTIBLE

    enum an_limit:
        AN_FOREVER
        AN_REASON_SIZE
        AN_HOST_SIZE

    ctypedef struct an_address:
        uint32_t length
        uint64_t storage[16]

    ctypedef struct an_buffer:
        const void *data
        size_t length

    ctypedef struct an_completion:
        an_operation *operation
        an_socket *socket
        void *state
        const void *data
        an_socket *accepted
        const an_address *address
        uint64_t transferred
        int32_t error
        uint16_t kind
        uint16_t flags

    ctypedef struct an_backend_description:
        const char *name
        int32_t available
        char reason[AN_REASON_SIZE]

    ctypedef struct an_port_options:
        const char *backend
        uint32_t concurrency
        uint32_t flags

    ctypedef struct an_statistics:
        uint64_t started[AN_KIND_COUNT]
        uint64_t completed[AN_KIND_COUNT]
        uint64_t failed[AN_KIND_COUNT]
        uint64_t cancelled[AN_KIND_COUNT]
        uint64_t quiet_sends
        uint64_t bytes_received
        uint64_t bytes_sent
        uint64_t waits
        uint64_t wakeups
        uint64_t batches
        uint64_t dequeued
        uint64_t batch_largest
        uint64_t gauge_sockets
        uint64_t gauge_queued
        uint64_t gauge_buffers
        uint64_t gauge_timers
        uint64_t gauge_inflight
        uint64_t gauge_waiting

    ctypedef struct an_socket_statistics:
        uint64_t bytes_received
        uint64_t bytes_sent

    const char *an_version()
    size_t an_backends(an_backend_description *descriptions, size_t capacity)
    int an_address_ip(an_address *address, int family, const char *host, uint16_t port, uint32_t flow, uint32_t scope)
    int an_address_path(an_address *address, const char *path, size_t length)
    int an_address_family(const an_address *address)
    int an_address_format(const an_address *address, char *host, uint16_t *port, uint32_t *flow, uint32_t *scope)
    int an_address_format_path(const an_address *address, char *path, size_t *length)
    int an_port_open(an_port **port, const an_port_options *options)
    int an_port_close(an_port *port)
    void an_port_free(an_port *port)
    const char *an_port_backend(const an_port *port)
    int an_port_associate(an_port *port, an_socket *socket, void *state)
    int an_port_post(an_port *port, an_operation *operation, void *state)
    int an_port_timer(an_port *port, an_operation *operation, int64_t delay_ns, void *state)
    int an_port_cancel(an_port *port, an_operation *operation, int32_t *cancelled)
    int an_port_dequeue(an_port *port, an_completion *completions, size_t max, int64_t timeout_ns, size_t *count)
    void an_completion_release(an_completion *completions, size_t count)
    uint64_t an_port_in_flight(an_port *port)
    int an_port_is_closed(an_port *port)
    int an_port_descriptor(an_port *port, an_descriptor *descriptor)
    int an_port_statistics(an_port *port, an_statistics *statistics)
    int an_socket_open(an_socket **socket, int family, int type, int protocol)
    int an_socket_adopt(an_socket **socket, an_descriptor descriptor)
    int an_socket_detach(an_socket *socket, an_descriptor *descriptor)
    int an_socket_close(an_socket *socket, uint32_t flags)
    void an_socket_free(an_socket *socket, uint32_t flags)
    int an_socket_bind(an_socket *socket, const an_address *address)
    int an_socket_listen(an_socket *socket, int backlog)
    int an_socket_shutdown(an_socket *socket, int how)
    int an_socket_local_address(an_socket *socket, an_address *address)
    int an_socket_peer_address(an_socket *socket, an_address *address)
    int an_socket_set_option(an_socket *socket, int level, int name, const void *value, size_t length)
    int an_socket_get_option(an_socket *socket, int level, int name, void *value, size_t *length)
    an_descriptor an_socket_descriptor(an_socket *socket)
    int an_socket_family(const an_socket *socket)
    int an_socket_type(const an_socket *socket)
    int an_socket_protocol(const an_socket *socket)
    an_port *an_socket_port(an_socket *socket)
    void *an_socket_state(an_socket *socket)
    void an_socket_set_state(an_socket *socket, void *state)
    int an_socket_is_closed(an_socket *socket)
    int an_socket_may_linger(an_socket *socket)
    uint64_t an_socket_unsent(an_socket *socket)
    uint32_t an_socket_unreported(const an_socket *socket)
    int an_socket_statistics_get(an_socket *socket, an_socket_statistics *statistics)
    int an_socket_accept(an_socket *socket, an_operation *operation, uint32_t flags, int64_t timeout_ns)
    int an_socket_connect(an_socket *socket, an_operation *operation, const an_address *address, int64_t timeout_ns)
    int an_socket_recv(an_socket *socket, an_operation *operation, void *buffer, size_t length, uint32_t flags, uint64_t pause_above, int64_t timeout_ns)
    int an_socket_recvfrom(an_socket *socket, an_operation *operation, void *buffer, size_t length, uint32_t flags, int64_t timeout_ns)
    int an_socket_send(an_socket *socket, an_operation *operation, const void *data, size_t length, int64_t timeout_ns)
    int an_socket_sendv(an_socket *socket, an_operation *operation, const an_buffer *buffers, size_t count, int64_t timeout_ns)
    int an_socket_sendto(an_socket *socket, an_operation *operation, const void *data, size_t length, const an_address *address, int64_t timeout_ns)
    int an_socket_sendfile(an_socket *socket, an_operation *operation, an_descriptor file, uint64_t offset, uint64_t count, int64_t timeout_ns)
    int an_socket_disconnect(an_socket *socket, an_operation *operation, int64_t timeout_ns)
    int an_socket_cancel(an_socket *socket, size_t *count)
    int an_operation_cancel(an_socket *socket, an_operation *operation, int32_t *cancelled)
    int an_operation_pause(an_socket *socket, an_operation *operation)
    int an_operation_resume(an_socket *socket, an_operation *operation)
    uint32_t an_operation_more_count(const an_operation *operation)

cdef extern from "asyncio_native_capi.h":
    ctypedef void (*an_py_handler)(an_completion *completion, void *context) noexcept

    int asyncio_native_import() except -1

    an_port *an_py_port_handle(object port) except NULL
    an_socket *an_py_socket_handle(object socket) except NULL
    object an_py_socket_new(an_socket *socket)
    object an_py_completion_new(object port, an_completion *completion)
    int an_py_port_set_handler(object port, an_py_handler handler, void *context) except -1
    object an_py_raise(int error)
