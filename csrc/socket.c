/* socket.c - sockets: their life, the synchronous calls, and the start of each operation.
 *
 * A start checks what can be known at once, fills in the operation and hands it to the backend. Everything is under the
 * socket's lock; the operation must not be touched after it went to the backend, as another thread may have dequeued
 * its completion already.
 */
#include "core.h"

#include "backend.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* ---- life -------------------------------------------------------------------------------------------------------------- */

void an_socket_hold(an_socket *socket) { an_atomic_add32(&socket->references, 1); }

void an_socket_drop(an_socket *socket) {
    if (an_atomic_add32(&socket->references, (uint32_t)-1) != 1)
        return;
    assert(socket->state == SOCKET_CLOSED);
    an_mutex_destroy(&socket->lock);
    if (socket->port != NULL)
        an_port_drop(socket->port);
    free(socket->overlapped);
    if (socket->slab != NULL)
        an_slab_give_back(socket);
    else
        free(socket);
}

static void fill_in(an_socket *socket, an_descriptor descriptor, int family, int type, int protocol) {
    an_mutex_init(&socket->lock);
    socket->references = 1;
    socket->descriptor = descriptor;
    socket->family = family;
    socket->type = type;
    socket->protocol = protocol;
    socket->tells_length = an_os_tells_length(family, type, protocol);
    socket->fork_count = an_fork_count();
    socket->receive.retry_ns = socket->transmit.retry_ns = AN_NEVER;
    socket->transmit.ready = true;
    socket->scheduled_ns = AN_NEVER;
    socket->timer.kind = TIMER_OF_SOCKET;
}

an_socket *an_socket_create(an_descriptor descriptor, int family, int type, int protocol) {
    an_socket *socket = calloc(1, sizeof *socket);
    if (socket != NULL)
        fill_in(socket, descriptor, family, type, protocol);
    return socket;
}

an_socket *an_socket_create_accepted(const an_socket *listener, an_descriptor descriptor) {
    an_socket *socket = an_slabs_take(listener->port->slabs);
    if (socket == NULL)
        return NULL;
    fill_in(socket, descriptor, listener->family, listener->type, listener->protocol);
    socket->lingers = listener->lingers || !an_socket_is_sole_holder(listener);
    return socket;
}

static void set_state(an_socket *socket, enum socket_state state) { an_atomic_store32(&socket->state, state); }

/* Other types (SOCK_SEQPACKET) are connected and keep boundaries: neither half of the rules fits them. */
static bool is_served(int type) { return an_os_is_stream(type) || an_os_is_datagram(type); }

int an_socket_open(an_socket **opened, int family, int type, int protocol) {
    an_descriptor descriptor;
    if (!is_served(type))
        return AN_ENOTSUP;
    uint32_t fork_count = an_fork_count(); /* the child of a fork from here on may have it as well */
    int error = an_os_open(family, type, protocol, &descriptor);
    if (error != 0)
        return error;
    *opened = an_socket_create(descriptor, family, type, protocol);
    if (*opened == NULL) {
        an_os_close(descriptor);
        return AN_ENOMEM;
    }
    (*opened)->fork_count = fork_count;
    return 0;
}

int an_socket_adopt(an_socket **adopted, an_descriptor descriptor) {
    int family, type, protocol;
    bool listening = false;
    an_socket *socket = an_socket_create(descriptor, 0, 0, 0);
    if (socket == NULL)
        return AN_ENOMEM;
    int error = an_os_describe(descriptor, &family, &type, &protocol);
    if (error == 0)
        error = is_served(type) ? an_os_prepare(descriptor) : AN_ENOTSUP;
    if (error != 0) {
        socket->state = SOCKET_CLOSED;
        an_socket_drop(socket);
        return error;
    }
    if (an_os_is_stream(type) && an_os_is_listening(descriptor, &listening) != 0)
        listening = false;
    socket->family = family;
    socket->type = type;
    socket->protocol = protocol;
    socket->tells_length = an_os_tells_length(family, type, protocol);
    socket->adopted = true;
    socket->listening = listening;
    *adopted = socket;
    return 0;
}

static an_port *port_of(an_socket *socket) { return an_atomic_load_pointer((void *const *)&socket->port); }

static bool is_foreign(an_socket *socket) {
    an_port *port = port_of(socket);
    return port != NULL && an_port_is_foreign(port);
}

/* What a socket that was closed or whose port is gone answers. */
static int lock_open(an_socket *socket) {
    an_port *port = port_of(socket);
    if (port != NULL && an_port_is_closed(port))
        return AN_EPORTCLOSED;
    an_mutex_lock(&socket->lock);
    if (socket->state == SOCKET_OPEN)
        return 0;
    an_mutex_unlock(&socket->lock);
    return port != NULL && an_port_is_closed(port) ? AN_EPORTCLOSED : AN_EBADF;
}

int an_socket_detach(an_socket *socket, an_descriptor *descriptor) {
    int error = lock_open(socket);
    if (error != 0)
        return error;
    if (socket->port != NULL) {
        error = AN_EINVAL;
    } else {
        *descriptor = socket->descriptor;
        socket->descriptor = -1;
        set_state(socket, SOCKET_CLOSED);
    }
    an_mutex_unlock(&socket->lock);
    return error;
}

bool an_socket_is_sole_holder(const an_socket *socket) {
    return !socket->adopted && !socket->shown && socket->fork_count == an_fork_count();
}

/* Closing a descriptor tells the peer only when nobody else holds the file: another process, or the system itself
 * (`held`). Where one may, say it with shutdown; but not to a listener that another process may go on serving. */
static void tell_peer(an_socket *socket, bool held) {
    enum { RECEIVE_AND_SEND = 2 };
    bool shared = held || socket->adopted || socket->fork_count != an_fork_count();
    bool ours = socket->port != NULL || socket->accepted;
    if (!ours || !shared || (socket->listening && !socket->private_listener))
        return;
    if (!held || !an_os_reset_if_asked(socket->descriptor))
        an_os_shutdown(socket->descriptor, RECEIVE_AND_SEND);
}

static void end_all(an_socket *socket) {
    while (socket->receive.head != NULL)
        an_operation_complete(socket, socket->receive.head, AN_ECANCELED);
    while (socket->transmit.head != NULL) {
        struct operation *operation = socket->transmit.head;
        if (an_operation_withdraw(socket, operation))
            continue;
        an_direction_remove(&socket->transmit, operation);
        if ((operation->flags & OPERATION_QUIET) != 0)
            an_operation_discard_quiet(socket, operation);
        else
            an_operation_complete_unlinked(socket, operation, AN_ECANCELED);
    }
}

static void close_descriptor(an_socket *socket) {
    if (socket->port != NULL && socket->port->interface->close_descriptor != NULL)
        socket->port->interface->close_descriptor(socket->port->backend, socket);
    else
        an_os_close(socket->descriptor);
    socket->descriptor = -1;
}

void an_socket_finish(an_socket *socket) {
    if (socket->state == SOCKET_CLOSED)
        return;
    bool polite = socket->state == SOCKET_FLUSHING && an_os_is_stream(socket->type) && !socket->listening;
    set_state(socket, SOCKET_CLOSED);
    if (polite && !socket->ended && !socket->broken)
        an_os_end_politely(socket->descriptor);
    bool held = false;
    if (socket->port != NULL) {
        end_all(socket);
        held = socket->port->interface->detach(socket->port->backend, socket);
        an_port_leave(socket->port, socket);
    }
    tell_peer(socket, held);
    close_descriptor(socket);
    if (socket->port != NULL)
        an_port_feed(socket->port);
}

void an_socket_abort(an_socket *socket) {
    an_mutex_lock(&socket->lock);
    if (socket->port != NULL) /* else its association has just failed, and it is the caller's still */
        an_socket_finish(socket);
    an_mutex_unlock(&socket->lock);
}

/* The child's copy of the descriptor goes; the parent's connection must not feel it. No lock, see close_in_child. */
static void close_child_copy(an_socket *socket) {
    if (socket->state == SOCKET_CLOSED)
        return;
    set_state(socket, SOCKET_CLOSED);
    an_os_close(socket->descriptor);
    socket->descriptor = -1;
}

/* Receives end, sends go on. */
static void flush(an_socket *socket) {
    set_state(socket, SOCKET_FLUSHING);
    while (socket->receive.head != NULL)
        an_operation_complete(socket, socket->receive.head, AN_ECANCELED);
    if (socket->transmit.head == NULL)
        an_socket_finish(socket);
}

int an_socket_close(an_socket *socket, uint32_t flags) {
    if ((flags & ~(uint32_t)AN_FLUSH) != 0)
        return AN_EINVAL;
    if (is_foreign(socket)) {
        close_child_copy(socket);
        return 0;
    }
    an_mutex_lock(&socket->lock);
    if (flags == 0)
        an_socket_finish(socket);
    else if (socket->state == SOCKET_OPEN)
        flush(socket);
    an_mutex_unlock(&socket->lock);
    return 0;
}

/* A closed one's lock is passed as well: who closes it has queued the last completion, and may not be done. */
void an_socket_free(an_socket *socket, uint32_t flags) {
    an_socket_close(socket, flags & AN_FLUSH);
    an_socket_drop(socket);
}

/* ---- association -------------------------------------------------------------------------------------------------------- */

static int associate_first(an_port *port, an_socket *socket) {
    int error = an_port_enter(port, socket);
    if (error != 0)
        return error;
    socket->private_listener = !socket->adopted && socket->fork_count == an_fork_count();
    an_port_hold(port);
    an_atomic_store_pointer((void **)&socket->port, port);
    error = port->interface->attach(port->backend, socket);
    if (error != 0) {
        an_port_leave(port, socket);
        an_atomic_store_pointer((void **)&socket->port, NULL);
        an_port_drop(port);
    }
    return error;
}

int an_port_associate(an_port *port, an_socket *socket, void *state) {
    if (an_port_is_closed(port))
        return AN_EPORTCLOSED;
    an_port *present = port_of(socket);
    if (present != NULL && present != port)
        return an_port_is_closed(present) ? AN_EPORTCLOSED : AN_EINVAL;
    int error = lock_open(socket);
    if (error != 0)
        return error;
    if (socket->port == NULL)
        error = associate_first(port, socket);
    else if (socket->port != port)
        error = AN_EINVAL;
    if (error == 0)
        an_atomic_store_pointer(&socket->user_state, state);
    an_mutex_unlock(&socket->lock);
    return error;
}

/* ---- synchronous calls ---------------------------------------------------------------------------------------------------- */

static int unlock_with(an_socket *socket, int error) {
    an_mutex_unlock(&socket->lock);
    return error;
}

int an_socket_bind(an_socket *socket, const an_address *address) {
    int error = lock_open(socket);
    return error != 0 ? error : unlock_with(socket, an_os_bind(socket->descriptor, address));
}

int an_socket_listen(an_socket *socket, int backlog) {
    int error = lock_open(socket);
    if (error != 0)
        return error;
    error = an_os_listen(socket->descriptor, backlog);
    if (error == 0)
        socket->listening = true;
    return unlock_with(socket, error);
}

int an_socket_shutdown(an_socket *socket, int how) {
    int error = lock_open(socket);
    if (error != 0)
        return error;
    error = an_os_shutdown(socket->descriptor, how);
    if (error == 0 && socket->port != NULL && socket->port->interface->shut != NULL)
        socket->port->interface->shut(socket->port->backend, socket, how);
    return unlock_with(socket, error);
}

int an_socket_local_address(an_socket *socket, an_address *address) {
    int error = lock_open(socket);
    return error != 0 ? error : unlock_with(socket, an_os_local_address(socket->descriptor, address));
}

int an_socket_peer_address(an_socket *socket, an_address *address) {
    int error = lock_open(socket);
    return error != 0 ? error : unlock_with(socket, an_os_peer_address(socket->descriptor, address));
}

int an_socket_set_option(an_socket *socket, int level, int name, const void *value, size_t length) {
    int error = lock_open(socket);
    if (error != 0)
        return error;
    socket->lingers |= an_os_is_linger(level, name);
    return unlock_with(socket, an_os_set_option(socket->descriptor, level, name, value, length));
}

int an_socket_get_option(an_socket *socket, int level, int name, void *value, size_t *length) {
    int error = lock_open(socket);
    return error != 0 ? error : unlock_with(socket, an_os_get_option(socket->descriptor, level, name, value, length));
}

/* ---- looking in: never an error --------------------------------------------------------------------------------------------- */

an_descriptor an_socket_descriptor(an_socket *socket) {
    if (is_foreign(socket))
        return -1;
    an_mutex_lock(&socket->lock);
    an_descriptor descriptor = socket->state == SOCKET_OPEN ? socket->descriptor : -1;
    socket->shown = true;
    an_mutex_unlock(&socket->lock);
    return descriptor;
}

int an_socket_family(const an_socket *socket) { return socket->family; }

int an_socket_type(const an_socket *socket) { return socket->type; }

int an_socket_protocol(const an_socket *socket) { return socket->protocol; }

an_port *an_socket_port(an_socket *socket) { return port_of(socket); }

void *an_socket_state(an_socket *socket) { return an_atomic_load_pointer(&socket->user_state); }

void an_socket_set_state(an_socket *socket, void *state) { an_atomic_store_pointer(&socket->user_state, state); }

int an_socket_is_closed(an_socket *socket) {
    if (is_foreign(socket))
        return 1;
    return an_atomic_load32(&socket->state) != SOCKET_OPEN;
}

int an_socket_may_linger(an_socket *socket) {
    if (is_foreign(socket))
        return 1;
    an_mutex_lock(&socket->lock);
    bool may = socket->lingers || !an_socket_is_sole_holder(socket);
    an_mutex_unlock(&socket->lock);
    return may;
}

uint64_t an_socket_unsent(an_socket *socket) {
    if (is_foreign(socket))
        return 0;
    return an_atomic_load64(&socket->unsent);
}

uint32_t an_socket_unreported(const an_socket *socket) { return an_atomic_load32(&socket->unreported); }

int an_socket_statistics_get(an_socket *socket, an_socket_statistics *statistics) {
    if (is_foreign(socket))
        return AN_EPORTCLOSED;
    an_mutex_lock(&socket->lock);
    statistics->bytes_received = socket->bytes_received;
    statistics->bytes_sent = socket->bytes_sent;
    an_mutex_unlock(&socket->lock);
    return 0;
}

/* ---- starting ------------------------------------------------------------------------------------------------------------------ */

/* Locks a socket on which an operation may start. */
static int lock_associated(an_socket *socket) {
    int error = lock_open(socket);
    if (error == 0 && socket->port == NULL)
        error = unlock_with(socket, AN_EINVAL);
    return error;
}

static struct operation *prepare(an_socket *socket, an_operation *memory, uint8_t kind, int64_t timeout_ns) {
    struct operation *operation = an_operation_private(memory);
    memset(operation, 0, sizeof *operation);
    operation->record.operation = memory;
    operation->record.socket = socket;
    operation->record.kind = kind;
    operation->deadline_ns = AN_NEVER;
    operation->timeout_ns = timeout_ns;
    return operation;
}

/* The operation is the library's from here on. */
static void commit(an_socket *socket, struct operation *operation) {
    if ((operation->flags & OPERATION_QUIET) == 0)
        an_atomic_add64(&socket->port->started[operation->record.kind], 1);
    an_socket_hold(socket);
}

static void set_deadline(an_socket *socket, struct operation *operation) {
    if (operation->timeout_ns < 0)
        return;
    operation->deadline_ns = an_deadline(an_clock(), operation->timeout_ns);
    an_socket_schedule(socket, operation->deadline_ns);
}

static void start(an_socket *socket, struct operation *operation) {
    commit(socket, operation);
    set_deadline(socket, operation);
    an_direction_append(an_direction_of(socket, operation->record.kind), operation);
    socket->port->interface->start(socket->port->backend, socket, operation);
}

/* No readiness ever tells of what the system refuses outright: to accept where nobody listens, to receive where somebody
 * does. Such an operation is tried at once. */
static void start_receiving(an_socket *socket, struct operation *operation) {
    if ((operation->record.kind == AN_ACCEPT) != socket->listening)
        socket->receive.ready = true;
    start(socket, operation);
}

static bool bad_timeout(int64_t timeout_ns) { return timeout_ns < AN_FOREVER; }

int an_socket_accept(an_socket *socket, an_operation *memory, uint32_t flags, int64_t timeout_ns) {
    if (bad_timeout(timeout_ns) || (flags & ~(uint32_t)AN_MULTISHOT) != 0)
        return AN_EINVAL;
    if (an_os_is_datagram(socket->type))
        return AN_ENOTSUP;
    int error = lock_associated(socket);
    if (error != 0)
        return error;
    struct operation *operation = prepare(socket, memory, AN_ACCEPT, timeout_ns);
    operation->flags = (flags & AN_MULTISHOT) != 0 ? OPERATION_MULTISHOT : 0;
    start_receiving(socket, operation);
    return unlock_with(socket, 0);
}

int an_socket_connect(an_socket *socket, an_operation *memory, const an_address *address, int64_t timeout_ns) {
    if (bad_timeout(timeout_ns) || address == NULL)
        return AN_EINVAL;
    int error = lock_associated(socket);
    if (error != 0)
        return error;
    struct operation *operation = prepare(socket, memory, AN_CONNECT, timeout_ns);
    operation->to.address = address;
    if (socket->broken) { /* what is sent behind it is for another stream; without one it is broken again */
        operation->flags |= OPERATION_REVIVES;
        socket->broken = socket->quiet_failed = false;
    }
    start(socket, operation);
    return unlock_with(socket, 0);
}

static int start_receive(an_socket *socket, an_operation *memory, uint8_t kind, void *buffer, size_t length,
                         uint32_t flags, uint64_t pause_above, int64_t timeout_ns) {
    bool multishot = (flags & AN_MULTISHOT) != 0;
    if (bad_timeout(timeout_ns) || length == 0 || (flags & ~(uint32_t)AN_MULTISHOT) != 0)
        return AN_EINVAL;
    if (multishot && buffer != NULL)
        return AN_EINVAL;
    int error = lock_associated(socket);
    if (error != 0)
        return error;
    struct operation *operation = prepare(socket, memory, kind, timeout_ns);
    operation->flags = multishot ? OPERATION_MULTISHOT : 0;
    operation->at.buffer = buffer;
    operation->length = length;
    operation->to.pause_above = multishot ? pause_above : UINT64_MAX;
    start_receiving(socket, operation);
    return unlock_with(socket, 0);
}

int an_socket_recv(an_socket *socket, an_operation *operation, void *buffer, size_t length, uint32_t flags,
                   uint64_t pause_above, int64_t timeout_ns) {
    return start_receive(socket, operation, AN_RECV, buffer, length, flags, pause_above, timeout_ns);
}

int an_socket_recvfrom(an_socket *socket, an_operation *operation, void *buffer, size_t length, uint32_t flags,
                       int64_t timeout_ns) {
    if (!an_os_is_datagram(socket->type))
        return AN_ENOTSUP;
    return start_receive(socket, operation, AN_RECVFROM, buffer, length, flags, UINT64_MAX, timeout_ns);
}

/* ---- sends ------------------------------------------------------------------------------------------------------------------------ */

/* Memory of ours for a quiet send, with `room` bytes behind it. NULL without memory. */
static struct operation *create_quiet(const struct operation *draft, size_t room) {
    struct operation *operation = room < SIZE_MAX / 2 ? malloc(sizeof *operation + room) : NULL;
    if (operation == NULL)
        return NULL;
    *operation = *draft;
    operation->length = an_operation_remaining(draft);
    operation->flags = OPERATION_QUIET | (an_operation_has_begun(draft) ? OPERATION_BEGUN : 0);
    operation->record.transferred = 0;
    operation->record.home = RECORD_IN_QUIET;
    return operation;
}

static char *copy_to(char *room, const void *data, uint64_t length) {
    if (length > 0) /* an empty buffer may have no address at all */
        memcpy(room, data, (size_t)length);
    return room + length;
}

/* One that holds a copy of what has not gone out, and of the address. */
static struct operation *copy_quiet(const struct operation *draft) {
    size_t remaining = (size_t)an_operation_remaining(draft);
    bool addressed = draft->to.address != NULL;
    if (remaining > SIZE_MAX / 4)
        return NULL;
    struct operation *operation = create_quiet(draft, (addressed ? sizeof(an_address) : 0) + remaining);
    if (operation == NULL)
        return NULL;
    char *room = (char *)(operation + 1);
    if (addressed) {
        operation->to.address = (const an_address *)room;
        room = copy_to(room, draft->to.address, sizeof(an_address));
    }
    operation->at.data = room;
    if ((draft->flags & OPERATION_VECTOR) == 0) {
        copy_to(room, (const char *)draft->at.data + draft->record.transferred, remaining);
        return operation;
    }
    uint64_t skip = draft->more.piece.offset;
    for (uint32_t i = draft->more.piece.index; i < draft->more.piece.count; i++, skip = 0) {
        const an_buffer *buffer = &draft->at.vector[i];
        room = copy_to(room, (const char *)buffer->data + skip, buffer->length - skip);
    }
    return operation;
}

/* Without memory for the rest of a quiet send: before the first byte the call just fails; after it the stream is broken,
 * which the next send learns. */
static int lose_quiet(an_socket *socket, const struct operation *draft) {
    if (an_operation_has_begun(draft))
        socket->broken = true;
    return AN_ENOMEM;
}

static int start_quiet(an_socket *socket, struct operation *draft, enum attempt attempt, int error) {
    struct operation *operation = attempt == ATTEMPT_FAILED ? create_quiet(draft, 0) : copy_quiet(draft);
    if (operation == NULL)
        return lose_quiet(socket, draft);
    commit(socket, operation);
    if (attempt == ATTEMPT_FAILED) {
        an_operation_fail_send(socket, operation, error, false);
        return 0;
    }
    set_deadline(socket, operation);
    an_direction_append(&socket->transmit, operation);
    socket->port->interface->start(socket->port->backend, socket, operation);
    return 0;
}

/* A quiet send was taken, or not. Unlocks. */
static int finish_quiet(an_socket *socket, int error) {
    if (error == 0)
        an_atomic_add64(&socket->port->quiet_sends, 1);
    return unlock_with(socket, error);
}

static void start_or_refuse(an_socket *socket, struct operation *operation) {
    if (!socket->broken) {
        start(socket, operation);
        return;
    }
    commit(socket, operation);
    an_operation_complete_unlinked(socket, operation, AN_EPIPE);
}

/* A send: tried at once if none waits before it, else put behind them. `draft` is the caller's operation, or on the
 * stack for a quiet one. Unlocks. */
static int start_send(an_socket *socket, struct operation *draft) {
    bool quiet = (draft->flags & OPERATION_QUIET) != 0;
    int error = 0;
    enum attempt attempt = ATTEMPT_AGAIN;
    if (socket->broken) {
        if (quiet && socket->quiet_failed)
            return finish_quiet(socket, 0);
        attempt = ATTEMPT_FAILED;
        error = AN_EPIPE;
    } else if (socket->transmit.head == NULL) {
        attempt = socket->port->interface->try_send(socket->port->backend, socket, draft, &error);
    }
    if (quiet)
        return finish_quiet(socket, attempt == ATTEMPT_DONE ? 0 : start_quiet(socket, draft, attempt, error));
    if (attempt == ATTEMPT_AGAIN) {
        start(socket, draft);
        return unlock_with(socket, 0);
    }
    commit(socket, draft);
    if (attempt == ATTEMPT_DONE)
        an_operation_complete_unlinked(socket, draft, 0);
    else
        an_operation_fail_send(socket, draft, error, false);
    return unlock_with(socket, 0);
}

static struct operation *prepare_send(an_socket *socket, an_operation *memory, an_operation *stack, uint8_t kind,
                                      int64_t timeout_ns) {
    bool quiet = an_operation_unmarked(memory) == NULL;
    struct operation *draft = prepare(socket, quiet ? stack : memory, kind, timeout_ns);
    draft->record.operation = memory; /* also of a quiet one: it may be marked */
    draft->flags = quiet ? OPERATION_QUIET : 0;
    return draft;
}

int an_socket_send(an_socket *socket, an_operation *memory, const void *data, size_t length, int64_t timeout_ns) {
    an_operation stack;
    if (bad_timeout(timeout_ns))
        return AN_EINVAL;
    int error = lock_associated(socket);
    if (error != 0)
        return error;
    struct operation *draft = prepare_send(socket, memory, &stack, AN_SEND, timeout_ns);
    draft->at.data = data;
    draft->length = length;
    return start_send(socket, draft);
}

/* False if that is more than a size can tell. */
static bool add_lengths(const an_buffer *buffers, size_t count, uint64_t *length) {
    *length = 0;
    for (size_t i = 0; i < count; i++) {
        if (buffers[i].length > SIZE_MAX / 2 - *length)
            return false;
        *length += buffers[i].length;
    }
    return true;
}

/* The array is read under the lock, when the socket is known to be open: a thread that closes the port beside this call may
 * give back what it holds for the operation, as a binding does for its callers. */
int an_socket_sendv(an_socket *socket, an_operation *memory, const an_buffer *buffers, size_t count,
                    int64_t timeout_ns) {
    an_operation stack;
    if (bad_timeout(timeout_ns) || count > UINT32_MAX)
        return AN_EINVAL;
    if (an_os_is_datagram(socket->type) && count > AN_GATHER)
        return AN_EINVAL;
    uint64_t length;
    int error = lock_associated(socket);
    if (error != 0)
        return error;
    if (!add_lengths(buffers, count, &length))
        return unlock_with(socket, AN_EINVAL);
    struct operation *draft = prepare_send(socket, memory, &stack, AN_SEND, timeout_ns);
    draft->flags |= OPERATION_VECTOR;
    draft->at.vector = buffers;
    draft->more.piece.count = (uint32_t)count;
    draft->length = length;
    return start_send(socket, draft);
}

int an_socket_sendto(an_socket *socket, an_operation *memory, const void *data, size_t length,
                     const an_address *address, int64_t timeout_ns) {
    an_operation stack;
    if (bad_timeout(timeout_ns) || address == NULL)
        return AN_EINVAL;
    if (!an_os_is_datagram(socket->type))
        return AN_ENOTSUP;
    int error = lock_associated(socket);
    if (error != 0)
        return error;
    struct operation *draft = prepare_send(socket, memory, &stack, AN_SENDTO, timeout_ns);
    draft->at.data = data;
    draft->length = length;
    draft->to.address = address;
    return start_send(socket, draft);
}

int an_socket_sendfile(an_socket *socket, an_operation *memory, an_descriptor file, uint64_t offset, uint64_t count,
                       int64_t timeout_ns) {
    if (bad_timeout(timeout_ns) || offset > INT64_MAX)
        return AN_EINVAL;
    if (!an_os_is_stream(socket->type))
        return AN_ENOTSUP;
    an_descriptor duplicate;
    int error = lock_associated(socket);
    if (error != 0)
        return error;
    error = an_os_duplicate_file(file, &duplicate);
    if (error != 0)
        return unlock_with(socket, error);
    struct operation *operation = prepare(socket, memory, AN_SENDFILE, timeout_ns);
    operation->at.descriptor = duplicate;
    operation->to.offset = offset;
    operation->length = count;
    start_or_refuse(socket, operation);
    return unlock_with(socket, 0);
}

int an_socket_disconnect(an_socket *socket, an_operation *memory, int64_t timeout_ns) {
    if (bad_timeout(timeout_ns))
        return AN_EINVAL;
    if (!an_os_is_stream(socket->type))
        return AN_ENOTSUP;
    int error = lock_associated(socket);
    if (error != 0)
        return error;
    start_or_refuse(socket, prepare(socket, memory, AN_DISCONNECT, timeout_ns));
    return unlock_with(socket, 0);
}

/* ---- deadlines --------------------------------------------------------------------------------------------------------------------- */

void an_socket_schedule(an_socket *socket, int64_t due_ns) {
    if (due_ns >= socket->scheduled_ns)
        return;
    socket->scheduled_ns = due_ns;
    an_port_set_timer(socket->port, &socket->timer, due_ns);
}

static bool suspended(const struct operation *operation) { return (operation->flags & OPERATION_PAUSED) != 0; }

/* Something came for a multishot that nobody dequeued yet: it is not the peer who is silent. (One that pause_above holds
 * back goes on counting: there the peer does not read, and is ended as well.) */
static bool has_undelivered(an_socket *socket, const struct operation *operation) {
    return (operation->flags & OPERATION_MULTISHOT) != 0 && an_atomic_load64(&socket->ahead) > 0;
}

/* Ends one operation whose deadline passed; false when none has. Ending one may end others, so the list is walked anew. */
static bool expire_one(an_socket *socket, struct an_direction *direction, int64_t now_ns) {
    for (struct operation *operation = direction->head; operation != NULL; operation = an_operation_next(operation)) {
        if (operation->deadline_ns > now_ns || suspended(operation))
            continue;
        if (has_undelivered(socket, operation)) {
            operation->deadline_ns = an_deadline(now_ns, operation->timeout_ns);
            continue;
        }
        an_operation_end(socket, operation, AN_ETIMEDOUT);
        return true;
    }
    return false;
}

static int64_t earliest(const struct an_direction *direction) {
    int64_t due_ns = direction->retry_ns;
    for (struct operation *operation = direction->head; operation != NULL; operation = an_operation_next(operation)) {
        if (operation->deadline_ns < due_ns && !suspended(operation))
            due_ns = operation->deadline_ns;
    }
    return due_ns;
}

static void expire_direction(an_socket *socket, struct an_direction *direction, int64_t now_ns) {
    while (expire_one(socket, direction, now_ns)) {
    }
    if (socket->state == SOCKET_FLUSHING && socket->transmit.head == NULL)
        an_socket_finish(socket);
    if (direction->retry_ns <= now_ns) {
        direction->retry_ns = AN_NEVER;
        direction->ready = true;
    }
    if (socket->state != SOCKET_CLOSED)
        socket->port->interface->proceed(socket->port->backend, socket, direction);
}

static void expire(an_socket *socket, int64_t now_ns) {
    an_mutex_lock(&socket->lock);
    socket->scheduled_ns = AN_NEVER;
    if (socket->state != SOCKET_CLOSED)
        expire_direction(socket, &socket->transmit, now_ns);
    if (socket->state != SOCKET_CLOSED)
        expire_direction(socket, &socket->receive, now_ns); /* last: a connect that ended may have held it */
    if (socket->state != SOCKET_CLOSED) {
        int64_t receive_ns = earliest(&socket->receive), transmit_ns = earliest(&socket->transmit);
        int64_t due_ns = receive_ns < transmit_ns ? receive_ns : transmit_ns;
        if (due_ns != AN_NEVER)
            an_socket_schedule(socket, due_ns);
    }
    an_mutex_unlock(&socket->lock);
}

void an_socket_expire_all(an_socket *first) {
    an_socket *next;
    for (an_socket *socket = first; socket != NULL; socket = next) {
        next = socket->expired_next;
        expire(socket, an_port_now(socket->port));
        an_socket_drop(socket);
    }
}
