/* proactor.c - the adapter that makes a readiness system into a completion port: try without blocking; where the system
 * says "not now", try again when the reactor reports the socket; only then queue the completion.
 *
 * Written once for all reactors. Knows operations and sockets, and a reactor only through reactor.h.
 *
 * Receives are made by the leader alone (they borrow from the pool, which is its). Sends are made by whoever starts them,
 * and by the leader when the way is free again. A direction's `ready` bit is false from "not now" until the reactor
 * reports it: nothing is tried in between, so that the steady state of a server is one wait, and one receive and one send
 * a message.
 *
 *                      tried: not now, or came back short
 *          READY  ------------------------------------------->  NOT READY
 *            ^  (work left over: the port's ready list)              |  (armed, where the reactor must be asked)
 *            +-------------------------------------------------------+
 *                      reported by the reactor
 */
#include "core.h"

#include "backend.h"
#include "proactor.h"

#include <errno.h>
#include <stdlib.h>

struct an_backend {
    an_port *port;
    const struct an_reactor_interface *interface;
    struct an_reactor *reactor;
    /* A second reactor that sees the same sockets, once somebody watches the port: for one without a descriptor. */
    const struct an_reactor_interface *mirror_interface; /* NULL: not needed, or none can be had */
    bool mirror_filled;                                  /* port.lock */
    struct an_reactor *mirror;                           /* atomic */
    struct an_reactor_report reports[AN_REPORTS];        /* leader */
    an_socket *sockets[AN_REPORTS];                      /* leader */
};

/* One socket's share of a pass; then it is the others' turn. */
enum { SHARE_STEPS = 16, SHARE_BYTES = 256 << 10, SHARE_ACCEPTS = 64 };

enum {
    RETRY_STARVED_NS = 100000000, /* another process may give descriptors back, which no event tells */
    RETRY_EMPTY_NS = 1000000,     /* a level-triggered reactor reports it, and nothing is there */
    RETRY_BACKLOG_NS = 2000000    /* a local listener makes room within a turn of its loop, which no event tells */
};

/* What one step of a direction came to. */
enum step { STEP_ON, STEP_WAIT };

static struct an_reactor *mirror_of(struct an_backend *backend) {
    return an_atomic_load_pointer((void *const *)&backend->mirror);
}

/* ---- readiness ----------------------------------------------------------------------------------------------------------- */

static void await(struct an_backend *backend, an_socket *socket, struct an_direction *direction) {
    if (backend->interface->expect == NULL || direction->armed)
        return;
    direction->armed = true;
    uint32_t event = direction == &socket->receive ? REACTOR_RECEIVE : REACTOR_TRANSMIT;
    backend->interface->expect(backend->reactor, socket->tag, event);
    struct an_reactor *mirror = mirror_of(backend);
    if (mirror != NULL) /* what stands there already makes no further edge in it */
        backend->mirror_interface->wake(mirror);
}

static enum step not_now(struct an_direction *direction) {
    direction->ready = false;
    return STEP_WAIT;
}

static enum step retry_later(an_socket *socket, struct an_direction *direction, int64_t delay_ns) {
    direction->retry_ns = an_clock() + delay_ns;
    an_socket_schedule(socket, direction->retry_ns);
    return STEP_WAIT;
}

static void count_received(an_socket *socket, uint64_t bytes) {
    socket->bytes_received += bytes;
    an_atomic_add64(&socket->port->bytes_received, bytes);
}

static void count_sent(an_socket *socket, uint64_t bytes) {
    socket->bytes_sent += bytes;
    an_atomic_add64(&socket->port->bytes_sent, bytes);
}

/* ---- receiving: leader only ------------------------------------------------------------------------------------------------ */

static bool is_multishot(const struct operation *operation) { return (operation->flags & OPERATION_MULTISHOT) != 0; }

/* One completion of a multishot that stays armed; its record lives in the block, which was taken. */
static void queue_more(an_socket *socket, struct operation *operation, struct an_block *block,
                       struct an_record result) {
    result.operation = an_operation_public(operation);
    result.socket = socket;
    result.lent = block;
    result.kind = operation->record.kind;
    result.flags |= RECORD_MORE;
    result.home = RECORD_IN_BLOCK;
    block->record = result;
    if (operation->timeout_ns >= 0)
        operation->deadline_ns = an_deadline(an_port_now(socket->port), operation->timeout_ns);
    an_socket_hold(socket);
    an_port_queue(socket->port, &block->record);
}

/* An error that a multishot survives. Without memory for its record it is not reported, as it changes nothing. */
static void queue_more_error(an_socket *socket, struct operation *operation, int error) {
    struct an_pool *pool = &socket->port->pool;
    struct an_block *block = an_pool_offer(pool, false, 0);
    if (block == NULL)
        return;
    an_pool_take(pool, block, false, 0);
    queue_more(socket, operation, block, (struct an_record){.error = error});
}

static enum step accept_starved(an_socket *socket, struct operation *operation, int error) {
    bool reported = socket->receive.starved;
    socket->receive.starved = true;
    an_port_starve(socket->port, socket);
    retry_later(socket, &socket->receive, RETRY_STARVED_NS);
    if (!reported && is_multishot(operation))
        queue_more_error(socket, operation, error);
    else if (!reported)
        an_operation_complete(socket, operation, error);
    return STEP_WAIT;
}

static enum step accept_failed(an_socket *socket, struct operation *operation, int error) {
    if (error == AN_EAGAIN)
        return not_now(&socket->receive);
    if (an_os_accept_is_transient(error))
        return STEP_ON;
    if (an_os_is_exhausted(error))
        return accept_starved(socket, operation, error);
    an_operation_complete(socket, operation, error);
    return STEP_ON;
}

static enum step step_accept(an_socket *socket, struct operation *operation) {
    struct an_pool *pool = &socket->port->pool;
    struct an_block *block = an_pool_offer(pool, true, 0);
    an_socket *accepted = an_socket_create(-1, socket->family, socket->type, socket->protocol);
    int error = block != NULL && accepted != NULL ? 0 : AN_ENOMEM;
    if (error == 0)
        error = an_os_accept(socket->descriptor, &accepted->descriptor, an_block_address(block));
    if (error != 0) {
        if (accepted != NULL) {
            accepted->state = SOCKET_CLOSED;
            an_socket_drop(accepted);
        }
        return accept_failed(socket, operation, error);
    }
    socket->receive.starved = false;
    accepted->accepted = true;
    an_pool_take(pool, block, true, 0);
    if (is_multishot(operation)) {
        queue_more(socket, operation, block, (struct an_record){.accepted = accepted, .flags = RECORD_ADDRESS});
    } else {
        operation->record.accepted = accepted;
        operation->record.lent = block;
        operation->record.flags = RECORD_ADDRESS;
        an_operation_complete(socket, operation, 0);
    }
    return STEP_ON;
}

static enum step receive_failed(an_socket *socket, struct operation *operation, int error) {
    if (error == AN_EAGAIN && socket->reported && an_os_is_datagram(socket->type))
        return retry_later(socket, &socket->receive, RETRY_EMPTY_NS); /* shut down, it is "readable" for ever */
    if (error == AN_EAGAIN)
        return not_now(&socket->receive);
    bool survives = an_os_is_datagram(socket->type) && error == AN_ECONNREFUSED && is_multishot(operation);
    if (survives)
        queue_more_error(socket, operation, error);
    else
        an_operation_complete(socket, operation, error);
    return STEP_ON;
}

/* A stream's receive that came back shorter than asked has emptied the socket, unless the end, an error, an urgent byte
 * or a passed descriptor may stand behind it, for which an edge-triggered reactor has no further edge. */
static bool short_means_empty(const struct an_backend *backend, const an_socket *socket) {
    if (!an_os_is_stream(socket->type))
        return false;
    bool level_triggered = backend->interface->expect != NULL;
    return level_triggered || (an_os_is_internet(socket->family) && !socket->hidden);
}

static enum step step_receive(struct an_backend *backend, an_socket *socket, struct operation *operation,
                              uint64_t *bytes) {
    struct an_pool *pool = &socket->port->pool;
    bool datagram = an_os_is_datagram(socket->type);
    bool lent = operation->at.buffer == NULL;
    bool addressed = operation->record.kind == AN_RECVFROM;
    size_t size = lent && operation->length > AN_RECEIVE_LARGEST ? AN_RECEIVE_LARGEST : (size_t)operation->length;
    struct an_block *block = NULL;
    if (lent || addressed) {
        block = an_pool_offer(pool, addressed, lent ? size : 0);
        if (block == NULL)
            return retry_later(socket, &socket->receive, RETRY_STARVED_NS);
    }
    void *data = lent ? an_block_data(block, addressed) : operation->at.buffer;
    size_t received = 0;
    bool truncated = false;
    int error = datagram ? an_os_receive_message(socket->descriptor, data, size, &received,
                                                 addressed ? an_block_address(block) : NULL, &truncated)
                         : an_os_receive(socket->descriptor, data, size, &received);
    if (error != 0)
        return receive_failed(socket, operation, error);
    bool end = !datagram && received == 0;
    if (!end && received < size && short_means_empty(backend, socket))
        socket->receive.ready = false;
    socket->reported = false;
    count_received(socket, received);
    *bytes += received;
    if (end) {
        socket->ended = true;
        block = NULL; /* it was only offered */
    }
    if (block != NULL)
        an_pool_take(pool, block, addressed, lent ? received : 0);
    uint8_t flags = (uint8_t)((truncated ? RECORD_TRUNCATED : 0) | (block != NULL && lent ? RECORD_DATA : 0) |
                              (block != NULL && addressed ? RECORD_ADDRESS : 0));
    if (is_multishot(operation) && !end) {
        queue_more(socket, operation, block, (struct an_record){.transferred = received, .flags = flags});
    } else {
        operation->record.lent = block;
        operation->record.flags = flags;
        operation->record.transferred = received;
        an_operation_complete(socket, operation, 0);
    }
    return STEP_ON;
}

/* Whether the first receive must stand still although something may be there. */
static bool stands_still(an_socket *socket, const struct operation *operation) {
    const struct operation *first = socket->transmit.head;
    if (first != NULL && first->record.kind == AN_CONNECT && (first->flags & OPERATION_BEGUN) != 0)
        return true; /* a receive would take the error that the connect must tell */
    if (socket->receive.retry_ns != AN_NEVER || (operation->flags & OPERATION_PAUSED) != 0)
        return true;
    socket->receive.held =
        is_multishot(operation) && operation->record.kind == AN_RECV && socket->unsent > operation->to.pause_above;
    if (socket->receive.held)
        return true;
    bool borrows = operation->record.kind == AN_ACCEPT || operation->at.buffer == NULL;
    return borrows && an_port_throttles(socket->port, socket);
}

static void run_receive(struct an_backend *backend, an_socket *socket) {
    struct an_direction *direction = &socket->receive;
    uint64_t bytes = 0;
    int steps = 0;
    while (direction->head != NULL && direction->ready) {
        struct operation *operation = direction->head;
        if (stands_still(socket, operation))
            return;
        bool accepts = operation->record.kind == AN_ACCEPT;
        if (steps++ >= (accepts ? SHARE_ACCEPTS : SHARE_STEPS) || bytes >= SHARE_BYTES) {
            an_port_make_ready(socket->port, socket);
            return;
        }
        enum step step = accepts ? step_accept(socket, operation) : step_receive(backend, socket, operation, &bytes);
        if (step == STEP_WAIT)
            break;
    }
    if (direction->head != NULL && !direction->ready)
        await(backend, socket, direction);
}

/* ---- sending ------------------------------------------------------------------------------------------------------------------ */

/* Lists what of a send has not gone out; returns how many buffers that took. */
static size_t list_pieces(const struct operation *operation, an_buffer *buffers, size_t room) {
    if ((operation->flags & OPERATION_VECTOR) == 0) {
        uint64_t done = operation->record.transferred;
        buffers[0] = (an_buffer){(const char *)operation->at.data + done, (size_t)(operation->length - done)};
        return 1;
    }
    size_t count = 0;
    uint64_t skip = operation->more.piece.offset;
    for (uint32_t i = operation->more.piece.index; i < operation->more.piece.count && count < room; i++, skip = 0) {
        const an_buffer *buffer = &operation->at.vector[i];
        buffers[count++] = (an_buffer){(const char *)buffer->data + skip, buffer->length - (size_t)skip};
    }
    return count;
}

/* Counts `sent` bytes of an operation as gone. `linked`: it stands in its direction, so in unsent as well. */
static void advance(an_socket *socket, struct operation *operation, uint64_t sent, bool linked) {
    operation->record.transferred += sent;
    if (linked)
        socket->unsent -= sent;
    if ((operation->flags & OPERATION_VECTOR) == 0)
        return;
    sent += operation->more.piece.offset;
    uint32_t index = operation->more.piece.index;
    while (index < operation->more.piece.count && sent >= operation->at.vector[index].length)
        sent -= operation->at.vector[index++].length;
    operation->more.piece.index = index;
    operation->more.piece.offset = sent;
}

static int hand_over(an_socket *socket, const an_buffer *buffers, size_t count, const an_address *address,
                     size_t *sent) {
    int error = count == 1 && address == NULL ? an_os_send(socket->descriptor, buffers[0].data, buffers[0].length, sent)
                                              : an_os_send_message(socket->descriptor, buffers, count, address, sent);
    if (error == 0)
        count_sent(socket, *sent);
    return error;
}

/* The reactor reports room, but not that of a local datagram socket to which this one is not connected. */
static void sending_must_wait(an_socket *socket) {
    if (an_os_is_datagram(socket->type) && !an_os_is_internet(socket->family))
        retry_later(socket, &socket->transmit, RETRY_BACKLOG_NS);
    else
        socket->transmit.ready = false;
}

/* One operation whole, as far as the system takes it now. A datagram goes or stays in one. */
static enum attempt attempt_send(an_socket *socket, struct operation *operation, bool linked, int *error) {
    bool datagram = an_os_is_datagram(socket->type);
    const an_address *address = operation->record.kind == AN_SENDTO ? operation->to.address : NULL;
    for (int steps = 0; steps < SHARE_STEPS; steps++) {
        an_buffer buffers[AN_GATHER];
        size_t sent = 0;
        size_t count = list_pieces(operation, buffers, AN_GATHER);
        *error = hand_over(socket, buffers, count, address, &sent);
        if (*error == AN_EAGAIN) {
            sending_must_wait(socket);
            return ATTEMPT_AGAIN;
        }
        if (*error != 0)
            return ATTEMPT_FAILED;
        advance(socket, operation, datagram ? operation->length : sent, linked);
        if (an_operation_remaining(operation) == 0)
            return ATTEMPT_DONE;
    }
    return ATTEMPT_AGAIN;
}

static enum attempt try_send(struct an_backend *backend, an_socket *socket, struct operation *operation, int *error) {
    (void)backend;
    if (!socket->transmit.ready || socket->transmit.retry_ns != AN_NEVER)
        return ATTEMPT_AGAIN;
    return attempt_send(socket, operation, false, error);
}

static void fail_head(an_socket *socket, int error) {
    struct operation *operation = socket->transmit.head;
    an_direction_remove(&socket->transmit, operation);
    an_operation_fail_send(socket, operation, error, false);
}

static enum step step_message(an_socket *socket, struct operation *operation) {
    int error = 0;
    switch (attempt_send(socket, operation, true, &error)) {
    case ATTEMPT_DONE:
        an_operation_complete(socket, operation, 0);
        return STEP_ON;
    case ATTEMPT_FAILED:
        fail_head(socket, error);
        return STEP_ON;
    default:
        return STEP_WAIT;
    }
}

static bool is_next_send(const struct operation *operation) {
    return operation != NULL && operation->record.kind == AN_SEND;
}

/* The sends that wait on a stream, gathered into one call. */
static enum step step_stream(an_socket *socket, uint64_t *bytes) {
    an_buffer buffers[AN_GATHER];
    size_t count = 0, sent = 0;
    struct operation *operation = socket->transmit.head;
    bool empty = an_operation_remaining(operation) == 0; /* goes alone: it needs no room, those behind it may */
    for (; is_next_send(operation) && count < AN_GATHER; operation = empty ? NULL : an_operation_next(operation))
        count += list_pieces(operation, &buffers[count], AN_GATHER - count);
    int error = hand_over(socket, buffers, count, NULL, &sent);
    if (error == AN_EAGAIN)
        return not_now(&socket->transmit);
    if (error != 0) {
        fail_head(socket, error);
        return STEP_ON;
    }
    *bytes += sent;
    while (is_next_send(operation = socket->transmit.head)) {
        uint64_t remaining = an_operation_remaining(operation);
        uint64_t share = sent < remaining ? sent : remaining;
        advance(socket, operation, share, true);
        sent -= (size_t)share;
        if (share < remaining)
            break;
        an_operation_complete(socket, operation, 0);
    }
    return STEP_ON;
}

static enum step step_file(an_socket *socket, struct operation *operation, uint64_t *bytes) {
    uint64_t remaining = an_operation_remaining(operation);
    size_t sent = 0;
    int error = 0;
    if (remaining > 0)
        error = an_os_send_file(socket->descriptor, operation->at.descriptor,
                                operation->to.offset + operation->record.transferred, remaining, &sent);
    if (error == AN_EAGAIN)
        return not_now(&socket->transmit);
    if (error != 0) {
        fail_head(socket, error);
        return STEP_ON;
    }
    count_sent(socket, sent);
    *bytes += sent;
    operation->record.transferred += sent;
    if (sent == 0 || sent == remaining)
        an_operation_complete(socket, operation, 0);
    return STEP_ON;
}

static enum step connect_done(an_socket *socket, struct operation *operation, int error) {
    an_operation_complete(socket, operation, error);
    if (socket->receive.head != NULL && socket->receive.ready)
        an_port_make_ready(socket->port, socket); /* it stood still meanwhile */
    return STEP_ON;
}

static enum step step_connect(an_socket *socket, struct operation *operation) {
    bool waiting = false;
    if ((operation->flags & OPERATION_BEGUN) != 0) {
        int error = an_os_connect_result(socket->descriptor);
        return error == AN_EAGAIN ? not_now(&socket->transmit) : connect_done(socket, operation, error);
    }
    int error = an_os_connect(socket->descriptor, operation->to.address, &waiting);
    if (error == AN_EAGAIN && !an_os_is_internet(socket->family))
        return retry_later(socket, &socket->transmit, RETRY_BACKLOG_NS);
    if (!waiting)
        return connect_done(socket, operation, error);
    operation->flags |= OPERATION_BEGUN;
    return not_now(&socket->transmit);
}

static enum step step_disconnect(an_socket *socket, struct operation *operation) {
    enum { SEND_SIDE = 1 };
    an_operation_complete(socket, operation, an_os_shutdown(socket->descriptor, SEND_SIDE));
    return STEP_ON;
}

static enum step step_transmit(an_socket *socket, struct operation *operation, uint64_t *bytes) {
    switch (operation->record.kind) {
    case AN_CONNECT:
        return step_connect(socket, operation);
    case AN_SENDFILE:
        return step_file(socket, operation, bytes);
    case AN_DISCONNECT:
        return step_disconnect(socket, operation);
    default:
        return an_os_is_datagram(socket->type) ? step_message(socket, operation) : step_stream(socket, bytes);
    }
}

/* A receive that stood still for too much unsent goes on when that has gone down. */
static void let_receive_go(an_socket *socket) {
    struct operation *operation = socket->receive.head;
    if (!socket->receive.held || (operation != NULL && socket->unsent > operation->to.pause_above))
        return;
    socket->receive.held = false;
    if (operation != NULL)
        an_port_make_ready(socket->port, socket);
}

/* Whether an operation can only go on when the socket is ready to send. */
static bool needs_room(const an_socket *socket, const struct operation *operation) {
    switch (operation->record.kind) {
    case AN_CONNECT:
        return (operation->flags & OPERATION_BEGUN) != 0;
    case AN_DISCONNECT:
        return false;
    default:
        return an_operation_remaining(operation) > 0 || an_os_is_datagram(socket->type);
    }
}

static bool may_try(const an_socket *socket) {
    const struct an_direction *direction = &socket->transmit;
    if (direction->head == NULL || direction->retry_ns != AN_NEVER)
        return false;
    return direction->ready || !needs_room(socket, direction->head);
}

static void run_transmit(struct an_backend *backend, an_socket *socket) {
    struct an_direction *direction = &socket->transmit;
    uint64_t bytes = 0;
    int steps = 0;
    while (may_try(socket)) {
        if (steps++ >= SHARE_STEPS || bytes >= SHARE_BYTES * 4) {
            an_port_make_ready(socket->port, socket);
            break;
        }
        if (step_transmit(socket, direction->head, &bytes) == STEP_WAIT)
            break;
    }
    if (direction->head != NULL && !direction->ready)
        await(backend, socket, direction);
    let_receive_go(socket);
    if (socket->state == SOCKET_FLUSHING && direction->head == NULL)
        an_socket_finish(socket);
}

/* ---- the interface, in the header's order ---------------------------------------------------------------------------------------- */

static int adapter_open(struct an_backend **opened, an_port *port, const void *detail) {
    const struct an_proactor_detail *reactors = detail;
    struct an_backend *backend = calloc(1, sizeof *backend);
    if (backend == NULL)
        return AN_ENOMEM;
    backend->port = port;
    backend->interface = reactors->reactor;
    backend->mirror_interface = reactors->mirror;
    int error = backend->interface->open(&backend->reactor);
    if (error != 0) {
        free(backend);
        return error;
    }
    *opened = backend;
    return 0;
}

static void adapter_close(struct an_backend *backend) {
    if (backend->mirror != NULL)
        backend->mirror_interface->close(backend->mirror);
    backend->interface->close(backend->reactor);
    free(backend);
}

/* Attaching and opening the mirror may meet: then it is there already. */
static int add_to_mirror(struct an_backend *backend, struct an_reactor *mirror, const an_socket *socket) {
    int error = backend->mirror_interface->add(mirror, socket->descriptor, socket->tag);
    return error == EEXIST ? 0 : error;
}

static int adapter_attach(struct an_backend *backend, an_socket *socket) {
    int error = backend->interface->add(backend->reactor, socket->descriptor, socket->tag);
    struct an_reactor *mirror = mirror_of(backend);
    if (error != 0 || mirror == NULL)
        return error;
    error = add_to_mirror(backend, mirror, socket);
    if (error != 0)
        backend->interface->remove(backend->reactor, socket->descriptor, socket->tag);
    return error;
}

static void adapter_detach(struct an_backend *backend, an_socket *socket) {
    struct an_reactor *mirror = mirror_of(backend);
    backend->interface->remove(backend->reactor, socket->descriptor, socket->tag);
    if (mirror != NULL)
        backend->mirror_interface->remove(mirror, socket->descriptor, socket->tag);
}

static void adapter_start(struct an_backend *backend, an_socket *socket, struct operation *operation) {
    struct an_direction *direction = an_direction_of(socket, operation->record.kind);
    if (direction->head != operation)
        return;
    if (direction == &socket->transmit)
        run_transmit(backend, socket);
    else if (direction->ready)
        an_port_make_ready(socket->port, socket);
    else
        await(backend, socket, direction);
}

static void adapter_proceed(struct an_backend *backend, an_socket *socket, struct an_direction *direction) {
    if (direction == &socket->transmit)
        run_transmit(backend, socket);
    else if (direction->head != NULL && direction->ready)
        an_port_make_ready(socket->port, socket);
    else if (direction->head != NULL)
        await(backend, socket, direction);
}

static void run_both(struct an_backend *backend, an_socket *socket) {
    if (socket->state == SOCKET_CLOSED)
        return;
    if (socket->transmit.head != NULL)
        run_transmit(backend, socket);
    if (socket->state == SOCKET_OPEN)
        run_receive(backend, socket);
}

static void handle_report(struct an_backend *backend, an_socket *socket, uint32_t events) {
    an_mutex_lock(&socket->lock);
    if ((events & REACTOR_RECEIVE) != 0) {
        socket->receive.ready = true;
        socket->receive.armed = false;
        socket->hidden = (events & REACTOR_HIDDEN) != 0;
        socket->reported = backend->interface->expect != NULL;
    }
    if ((events & REACTOR_TRANSMIT) != 0) {
        socket->transmit.ready = true;
        socket->transmit.armed = false;
    }
    run_both(backend, socket);
    an_mutex_unlock(&socket->lock);
}

static void handle_ready(struct an_backend *backend, an_socket *socket) {
    an_mutex_lock(&socket->lock);
    if (socket->receive.starved)
        socket->receive.retry_ns = AN_NEVER; /* a descriptor may be free now */
    run_both(backend, socket);
    an_mutex_unlock(&socket->lock);
}

static void perform(struct an_backend *backend, const struct an_pass *pass, size_t count) {
    an_socket *next;
    for (size_t i = 0; i < count; i++) {
        if (backend->sockets[i] == NULL)
            continue;
        handle_report(backend, backend->sockets[i], backend->reports[i].events);
        an_socket_drop(backend->sockets[i]);
    }
    for (an_socket *socket = pass->ready; socket != NULL; socket = next) {
        next = socket->pass_next;
        handle_ready(backend, socket);
        an_socket_drop(socket);
    }
    for (an_socket *socket = pass->expired; socket != NULL; socket = next) {
        next = socket->expired_next;
        an_socket_expire(socket, an_port_now(backend->port));
        an_socket_drop(socket);
    }
}

static int adapter_wait(struct an_backend *backend, int64_t until_ns) {
    an_port *port = backend->port;
    struct an_reactor *mirror = mirror_of(backend);
    struct an_pass pass;
    size_t count = 0;
    bool woken = false, mirror_woken = false;
    if (mirror != NULL) /* it only has to turn readable; what it saw until now is seen below as well */
        backend->mirror_interface->wait(mirror, 0, backend->reports, &count, &mirror_woken);
    count = 0;
    int error = backend->interface->wait(backend->reactor, until_ns, backend->reports, &count, &woken);
    if (mirror != NULL && (count == AN_REPORTS || error != 0))
        backend->mirror_interface->wake(mirror); /* there is more to tell than this pass took */
    an_mutex_lock(&port->lock);
    an_port_begin_pass(port, woken || mirror_woken, &pass);
    for (size_t i = 0; i < count; i++)
        backend->sockets[i] = an_port_find(port, backend->reports[i].tag);
    an_mutex_unlock(&port->lock);
    perform(backend, &pass, count);
    return error;
}

static void adapter_wake(struct an_backend *backend) {
    struct an_reactor *mirror = mirror_of(backend);
    backend->interface->wake(backend->reactor);
    if (mirror != NULL)
        backend->mirror_interface->wake(mirror);
}

/* Opens the mirror and shows it the sockets that are there; those that come later attach to it. port.lock held. */
static int fill_mirror(struct an_backend *backend) {
    an_port *port = backend->port;
    int error = 0;
    if (backend->mirror == NULL) {
        struct an_reactor *mirror;
        error = backend->mirror_interface->open(&mirror);
        if (error != 0)
            return error;
        an_atomic_store_pointer((void **)&backend->mirror, mirror);
    }
    for (uint32_t i = 0; i < port->slot_count && error == 0; i++) {
        an_socket *socket = port->slots[i].socket; /* it must pass port.lock before its descriptor is closed */
        if (socket != NULL)
            error = add_to_mirror(backend, backend->mirror, socket);
    }
    backend->mirror_filled = error == 0;
    return error;
}

static int adapter_watch(struct an_backend *backend, an_descriptor *descriptor) {
    if (backend->interface->descriptor != NULL)
        return backend->interface->descriptor(backend->reactor, descriptor);
    if (backend->mirror_interface == NULL)
        return AN_ENOTSUP;
    int error = backend->mirror_filled ? 0 : fill_mirror(backend);
    return error != 0 ? error : backend->mirror_interface->descriptor(backend->mirror, descriptor);
}

static void adapter_alarm(struct an_backend *backend, int64_t due_ns) {
    struct an_reactor *mirror = mirror_of(backend);
    if (mirror != NULL)
        backend->mirror_interface->alarm(mirror, due_ns);
    else if (backend->interface->alarm != NULL)
        backend->interface->alarm(backend->reactor, due_ns);
}

const struct an_backend_interface an_proactor = {
    .open = adapter_open,
    .close = adapter_close,
    .attach = adapter_attach,
    .detach = adapter_detach,
    .try_send = try_send,
    .start = adapter_start,
    .proceed = adapter_proceed,
    .wait = adapter_wait,
    .wake = adapter_wake,
    .watch = adapter_watch,
    .alarm = adapter_alarm,
};
