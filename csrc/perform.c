/* perform.c - performing operations by calls that do not block: try; where the system says "not now", leave it to the
 * backend to tell when to try again; complete what is done. Written once for all backends that know readiness.
 *
 * Knows operations, sockets and the pool; of the backend below only that it can be asked to await a direction.
 *
 * Receives are made by the leader alone (they borrow from the pool, which is its). Sends are made by whoever starts them,
 * and by the leader when the way is free again. A direction's `ready` bit is false from "not now" until the backend
 * reports it: nothing is tried in between, so that the steady state of a server is one wait, and one receive and one send
 * a message.
 *
 *                      tried: not now, or came back short
 *          READY  ------------------------------------------->  NOT READY
 *            ^  (work left over: the port's ready list)              |  (awaited, where the system must be asked)
 *            +-------------------------------------------------------+
 *                      reported by the backend
 */
#include "perform.h"

#include "backend.h"

#include <stdlib.h>
#include <string.h>

/* One socket's share of a pass; then it is the others' turn. What it may receive is bounded by AN_PASS_BYTES. */
enum { SHARE_STEPS = 16, SHARE_ACCEPTS = 64, SHARE_BYTES_SENT = 1 << 20 };

enum {
    RETRY_STARVED_NS = 100000000, /* another process may give descriptors back, which no event tells */
    RETRY_EMPTY_NS = 1000000,     /* a level-triggered system reports it, and nothing is there */
    RETRY_BACKLOG_NS = 2000000    /* a local listener makes room within a turn of its loop, which no event tells */
};

/* What one step of a direction came to. */
enum step { STEP_ON, STEP_WAIT };

static void await(an_socket *socket, struct an_direction *direction) {
    socket->port->interface->await(socket->port->backend, socket, direction);
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
    result.operation = operation->record.operation;
    result.socket = socket;
    result.lent = block;
    result.kind = operation->record.kind;
    result.flags |= RECORD_MORE;
    result.home = RECORD_IN_BLOCK;
    block->record = result;
    operation->more_count++;
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

void an_perform_accepted(an_socket *socket, struct operation *operation, struct an_block *block, an_socket *accepted) {
    socket->receive.starved = false;
    accepted->accepted = true;
    an_pool_take(&socket->port->pool, block, true, 0);
    if (is_multishot(operation)) {
        queue_more(socket, operation, block, (struct an_record){.accepted = accepted, .flags = RECORD_ADDRESS});
    } else {
        operation->record.accepted = accepted;
        operation->record.lent = block;
        operation->record.flags = RECORD_ADDRESS;
        an_operation_complete(socket, operation, 0);
    }
}

static enum step step_accept(an_socket *socket, struct operation *operation) {
    struct an_pool *pool = &socket->port->pool;
    struct an_block *block = an_pool_offer(pool, true, 0);
    an_socket *accepted = an_socket_create_accepted(socket, -1);
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
    an_perform_accepted(socket, operation, block, accepted);
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

void an_perform_accept_failed(an_socket *socket, struct operation *operation, int error) {
    accept_failed(socket, operation, error);
}

void an_perform_receive_failed(an_socket *socket, struct operation *operation, int error) {
    receive_failed(socket, operation, error);
}

void an_perform_retry_receive(an_socket *socket) { retry_later(socket, &socket->receive, RETRY_STARVED_NS); }

/* A stream's receive that came back shorter than asked has emptied the socket, unless the end, an error, an urgent byte
 * or a passed descriptor may stand behind it, for which an edge-triggered system has no further edge. */
static bool short_means_empty(const an_socket *socket) {
    if (!an_os_is_stream(socket->type))
        return false;
    return !socket->port->edge_triggered || (an_os_is_internet(socket->family) && !socket->hidden);
}

/* What was received completes the operation, or is one of a multishot's. */
static void deliver(an_socket *socket, struct operation *operation, struct an_block *block, size_t received,
                    bool truncated) {
    bool end = received == 0 && !an_os_is_datagram(socket->type);
    bool lent = operation->at.buffer == NULL;
    bool addressed = operation->record.kind == AN_RECVFROM;
    socket->reported = false;
    count_received(socket, received);
    if (end) {
        socket->ended = true;
        block = NULL; /* it was only offered */
    }
    if (block != NULL)
        an_pool_take(&socket->port->pool, block, addressed, lent ? received : 0);
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
}

void an_perform_received(an_socket *socket, struct operation *operation, struct an_block *block, size_t length) {
    deliver(socket, operation, block, length, false);
}

static enum step step_receive(an_socket *socket, struct operation *operation) {
    struct an_pool *pool = &socket->port->pool;
    bool datagram = an_os_is_datagram(socket->type);
    bool lent = operation->at.buffer == NULL;
    bool addressed = operation->record.kind == AN_RECVFROM;
    size_t most = lent ? AN_RECEIVE_LARGEST : AN_CALL_BYTES;
    size_t size = operation->length < most ? (size_t)operation->length : most;
    struct an_block *block = NULL;
    if (lent || addressed) {
        block = an_pool_offer(pool, addressed, lent ? size : 0);
        if (block == NULL)
            return retry_later(socket, &socket->receive, RETRY_STARVED_NS);
    }
    void *data = lent ? an_block_data(block, addressed) : operation->at.buffer;
    size_t received = 0;
    bool truncated = false;
    int error = datagram ? an_os_receive_message(socket->descriptor, socket->tells_length, data, size, &received,
                                                 addressed ? an_block_address(block) : NULL, &truncated)
                         : an_os_receive(socket->descriptor, data, size, &received);
    if (error != 0)
        return receive_failed(socket, operation, error);
    bool end = !datagram && received == 0;
    if (!end && received < size && short_means_empty(socket))
        socket->receive.ready = false;
    socket->port->pass_bytes += received;
    deliver(socket, operation, block, received, truncated);
    return STEP_ON;
}

bool an_perform_stands_still(an_socket *socket, const struct operation *operation) {
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

void an_perform_receive(an_socket *socket) {
    struct an_direction *direction = &socket->receive;
    int steps = 0;
    while (direction->head != NULL && direction->ready) {
        struct operation *operation = direction->head;
        if (an_perform_stands_still(socket, operation))
            return;
        bool accepts = operation->record.kind == AN_ACCEPT;
        if (steps++ >= (accepts ? SHARE_ACCEPTS : SHARE_STEPS) || socket->port->pass_bytes >= AN_PASS_BYTES) {
            an_port_make_ready(socket->port, socket);
            return;
        }
        enum step step = accepts ? step_accept(socket, operation) : step_receive(socket, operation);
        if (step == STEP_WAIT)
            break;
    }
    if (direction->head != NULL && !direction->ready)
        await(socket, direction);
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

/* Cuts what a stream has to send to what one call may take; returns how many buffers are left of it. */
static size_t cut_to_one_call(an_buffer *buffers, size_t count) {
    size_t room = AN_CALL_BYTES;
    for (size_t i = 0; i < count; i++) {
        if (buffers[i].length > room) {
            buffers[i].length = room;
            return i + 1;
        }
        room -= buffers[i].length;
    }
    return count;
}

/* Counts `sent` bytes of an operation as gone. `linked`: it stands in its direction, so in unsent as well. */
static void advance(an_socket *socket, struct operation *operation, uint64_t sent, bool linked) {
    operation->record.transferred += sent;
    if (linked)
        an_atomic_bump64(&socket->unsent, 0 - sent);
    if ((operation->flags & OPERATION_VECTOR) == 0)
        return;
    sent += operation->more.piece.offset;
    uint32_t index = operation->more.piece.index;
    while (index < operation->more.piece.count && sent >= operation->at.vector[index].length)
        sent -= operation->at.vector[index++].length;
    operation->more.piece.index = index;
    operation->more.piece.offset = sent;
}

size_t an_perform_copy(const struct operation *operation, char *room, size_t most) {
    an_buffer buffers[AN_GATHER];
    size_t count = list_pieces(operation, buffers, AN_GATHER);
    size_t copied = 0;
    for (size_t i = 0; i < count && copied < most; i++) {
        size_t length = buffers[i].length < most - copied ? buffers[i].length : most - copied;
        if (length > 0) /* an empty buffer may have no address at all */
            memcpy(room + copied, buffers[i].data, length);
        copied += length;
    }
    return copied;
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
        if (!datagram)
            count = cut_to_one_call(buffers, count);
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

enum attempt an_perform_try_send(struct an_backend *backend, an_socket *socket, struct operation *operation,
                                 int *error) {
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
    int error = hand_over(socket, buffers, cut_to_one_call(buffers, count), NULL, &sent);
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

static void file_sent(an_socket *socket, struct operation *operation, uint64_t sent) {
    uint64_t remaining = an_operation_remaining(operation);
    count_sent(socket, sent);
    operation->record.transferred += sent;
    if (sent == 0 || sent == remaining)
        an_operation_complete(socket, operation, 0);
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
    *bytes += sent;
    file_sent(socket, operation, sent);
    return STEP_ON;
}

static enum step connect_done(an_socket *socket, struct operation *operation, int error) {
    an_operation_complete(socket, operation, error);
    an_perform_proceed(socket->port->backend, socket, &socket->receive); /* it stood still meanwhile */
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

void an_perform_count(an_socket *socket, struct operation *operation, uint64_t bytes) {
    count_sent(socket, bytes);
    if (operation->record.kind == AN_SENDFILE)
        operation->record.transferred += bytes;
    else
        advance(socket, operation, bytes, true);
}

void an_perform_sent(an_socket *socket, struct operation *operation, uint64_t bytes) {
    if (operation->record.kind == AN_SENDFILE) {
        file_sent(socket, operation, bytes);
        return;
    }
    an_perform_count(socket, operation, bytes);
    if (an_operation_remaining(operation) == 0)
        an_operation_complete(socket, operation, 0);
}

void an_perform_send_failed(an_socket *socket, int error) { fail_head(socket, error); }

void an_perform_connected(an_socket *socket, struct operation *operation, int error) {
    connect_done(socket, operation, error);
}

void an_perform_retry_transmit(an_socket *socket) { retry_later(socket, &socket->transmit, RETRY_STARVED_NS); }

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
        return socket->transmit.under_way;
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

void an_perform_transmit(an_socket *socket) {
    struct an_direction *direction = &socket->transmit;
    uint64_t bytes = 0;
    int steps = 0;
    while (may_try(socket)) {
        if (steps++ >= SHARE_STEPS || bytes >= SHARE_BYTES_SENT) {
            an_port_make_ready(socket->port, socket);
            break;
        }
        if (step_transmit(socket, direction->head, &bytes) == STEP_WAIT)
            break;
    }
    if (direction->head != NULL && !direction->ready)
        await(socket, direction);
    let_receive_go(socket);
    if (socket->state == SOCKET_FLUSHING && direction->head == NULL)
        an_socket_finish(socket);
}

/* ---- both directions ------------------------------------------------------------------------------------------------------------- */

void an_perform_both(an_socket *socket) {
    if (socket->state == SOCKET_CLOSED)
        return;
    if (socket->transmit.head != NULL)
        an_perform_transmit(socket);
    if (socket->state == SOCKET_OPEN)
        an_perform_receive(socket);
}

void an_perform_start(struct an_backend *backend, an_socket *socket, struct operation *operation) {
    struct an_direction *direction = an_direction_of(socket, operation->record.kind);
    if (direction->head == operation)
        an_perform_proceed(backend, socket, direction);
}

void an_perform_proceed(struct an_backend *backend, an_socket *socket, struct an_direction *direction) {
    (void)backend;
    if (direction == &socket->transmit)
        an_perform_transmit(socket);
    else if (direction->head != NULL && direction->ready)
        an_port_make_ready(socket->port, socket);
    else if (direction->head != NULL)
        await(socket, direction);
}
