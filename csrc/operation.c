/* operation.c - operations in the directions of a socket, and how they end.
 *
 * Everything here runs under the socket's lock. It decides what completes, in which order and with which error; who
 * performs the operations is the backend's business, who dequeues them the port's.
 */
#include "core.h"

#include "backend.h"

#include <assert.h>
#include <stdlib.h>

struct an_direction *an_direction_of(an_socket *socket, uint8_t kind) {
    bool receives = kind == AN_ACCEPT || kind == AN_RECV || kind == AN_RECVFROM;
    return receives ? &socket->receive : &socket->transmit;
}

static bool is_send(const struct operation *operation) {
    return operation->record.kind == AN_SEND || operation->record.kind == AN_SENDTO;
}

uint64_t an_operation_remaining(const struct operation *operation) {
    return operation->length - operation->record.transferred;
}

bool an_operation_has_begun(const struct operation *operation) {
    return operation->record.transferred > 0 || (operation->flags & OPERATION_BEGUN) != 0;
}

void an_direction_append(struct an_direction *direction, struct operation *operation) {
    operation->record.next = NULL;
    operation->previous = direction->tail;
    if (direction->tail != NULL)
        direction->tail->record.next = &operation->record;
    else
        direction->head = operation;
    direction->tail = operation;
    if (is_send(operation))
        an_atomic_bump64(&operation->record.socket->unsent, an_operation_remaining(operation));
}

void an_direction_remove(struct an_direction *direction, struct operation *operation) {
    struct operation *next = an_operation_next(operation);
    if (next != NULL)
        next->previous = operation->previous;
    else
        direction->tail = operation->previous;
    if (operation->previous != NULL)
        operation->previous->record.next = operation->record.next;
    else
        direction->head = next;
    if (is_send(operation))
        an_atomic_bump64(&operation->record.socket->unsent, 0 - an_operation_remaining(operation));
}

void an_operation_let_go(struct operation *operation) {
    if (operation->record.kind == AN_SENDFILE)
        an_os_close_file(operation->at.descriptor);
}

void an_operation_discard_quiet(an_socket *socket, struct operation *operation) {
    assert((operation->flags & OPERATION_QUIET) != 0);
    free(operation);
    an_socket_drop(socket); /* never the last: whoever holds the lock holds one */
}

void an_operation_complete_unlinked(an_socket *socket, struct operation *operation, int error) {
    if ((operation->flags & OPERATION_QUIET) != 0 && error == 0) {
        an_operation_discard_quiet(socket, operation);
        return;
    }
    an_operation_let_go(operation);
    operation->record.error = error;
    an_port_queue(socket->port, &operation->record);
}

/* One completion for this quiet send, in no direction any more, and on a stream for all quiet ones that wait: their
 * bytes are lost together. Silent if the stream's failure was reported before. */
static void report_quiet(an_socket *socket, struct operation *operation, struct operation *behind, int error) {
    uint64_t lost = an_operation_remaining(operation);
    if (an_os_is_stream(socket->type)) {
        struct operation *next;
        for (struct operation *other = behind; other != NULL; other = next) {
            next = an_operation_next(other);
            if ((other->flags & OPERATION_QUIET) == 0)
                continue;
            lost += an_operation_remaining(other);
            an_direction_remove(&socket->transmit, other);
            an_operation_discard_quiet(socket, other);
        }
    }
    if (socket->quiet_failed) {
        an_operation_discard_quiet(socket, operation);
        return;
    }
    socket->quiet_failed = socket->broken;
    operation->record.transferred = lost;
    an_operation_complete_unlinked(socket, operation, error);
}

/* The stream broke off: what waits cannot go out any more. */
static void fail_all_behind(an_socket *socket) {
    while (socket->transmit.head != NULL) {
        struct operation *operation = socket->transmit.head;
        an_direction_remove(&socket->transmit, operation);
        if ((operation->flags & OPERATION_QUIET) != 0)
            report_quiet(socket, operation, socket->transmit.head, AN_EPIPE);
        else
            an_operation_complete_unlinked(socket, operation, AN_EPIPE);
    }
}

void an_operation_complete(an_socket *socket, struct operation *operation, int error) {
    bool stays_broken = error != 0 && (operation->flags & OPERATION_REVIVES) != 0;
    an_direction_remove(an_direction_of(socket, operation->record.kind), operation);
    an_operation_complete_unlinked(socket, operation, error);
    if (!stays_broken)
        return;
    socket->broken = true;
    fail_all_behind(socket);
}

void an_operation_fail_send(an_socket *socket, struct operation *operation, int error, bool forced) {
    bool quiet = (operation->flags & OPERATION_QUIET) != 0;
    if (an_os_is_stream(socket->type)) {
        /* A quiet send that the system refused leaves a gap that its sender does not know of yet. */
        if (an_operation_has_begun(operation) || (quiet && !forced))
            socket->broken = true;
    }
    if (quiet)
        report_quiet(socket, operation, an_operation_next(operation), error);
    else
        an_operation_complete_unlinked(socket, operation, error);
    if (socket->broken)
        fail_all_behind(socket);
}

bool an_operation_withdraw(an_socket *socket, struct operation *operation) {
    const struct an_backend_interface *interface = socket->port->interface;
    if (interface->withdraw == NULL || operation != socket->transmit.head)
        return false;
    interface->withdraw(socket->port->backend, socket, operation);
    if (!is_send(operation) || operation->record.transferred == 0 || an_operation_remaining(operation) > 0)
        return false;
    an_operation_complete(socket, operation, 0);
    return true;
}

void an_operation_end(an_socket *socket, struct operation *operation, int error) {
    uint8_t kind = operation->record.kind;
    if (an_operation_withdraw(socket, operation))
        return;
    if (is_send(operation) || kind == AN_SENDFILE) {
        an_direction_remove(&socket->transmit, operation);
        an_operation_fail_send(socket, operation, error, true);
    } else {
        an_operation_complete(socket, operation, error);
    }
}

/* ---- the public functions: they name an operation, which must be found before it may be looked at -------------------- */

static struct operation *find_in(struct an_direction *direction, struct operation *wanted) {
    if (direction->tail == wanted)
        return wanted; /* what is cancelled is mostly what was started last */
    struct operation *operation = direction->head;
    while (operation != NULL && operation != wanted)
        operation = an_operation_next(operation);
    return operation;
}

static struct operation *find(an_socket *socket, an_operation *wanted) {
    struct operation *operation = find_in(&socket->receive, an_operation_private(wanted));
    return operation != NULL ? operation : find_in(&socket->transmit, an_operation_private(wanted));
}

static int lock_for_operations(an_socket *socket) {
    an_port *port = an_atomic_load_pointer((void *const *)&socket->port);
    if (port == NULL)
        return AN_EINVAL;
    if (an_port_is_foreign(port) || an_atomic_load32(&port->closed))
        return AN_EPORTCLOSED;
    an_mutex_lock(&socket->lock);
    return 0;
}

/* Operations left their place ahead of their turn: others may go on, a flush may be over. */
static void settle(an_socket *socket) {
    const struct an_backend_interface *interface = socket->port->interface;
    if (socket->state == SOCKET_FLUSHING && socket->transmit.head == NULL)
        an_socket_finish(socket);
    if (socket->state == SOCKET_CLOSED)
        return;
    interface->proceed(socket->port->backend, socket, &socket->transmit);
    if (socket->state != SOCKET_CLOSED)
        interface->proceed(socket->port->backend, socket, &socket->receive);
}

int an_operation_cancel(an_socket *socket, an_operation *wanted, int32_t *cancelled) {
    if (cancelled != NULL)
        *cancelled = 0;
    int error = lock_for_operations(socket);
    if (error != 0)
        return error;
    struct operation *operation = find(socket, wanted);
    if (operation != NULL) {
        an_operation_end(socket, operation, AN_ECANCELED);
        settle(socket);
        if (cancelled != NULL)
            *cancelled = 1;
    }
    an_mutex_unlock(&socket->lock);
    return 0;
}

static size_t cancel_all(an_socket *socket, struct an_direction *direction) {
    size_t count = 0;
    for (struct operation *operation = direction->head; operation != NULL; operation = an_operation_next(operation))
        count += (operation->flags & OPERATION_QUIET) == 0;
    while (direction->head != NULL)
        an_operation_end(socket, direction->head, AN_ECANCELED);
    return count;
}

static bool breaks_stream(const an_socket *socket, const struct operation *operation) {
    bool sends = is_send(operation) || operation->record.kind == AN_SENDFILE;
    return sends && an_os_is_stream(socket->type) && an_operation_has_begun(operation);
}

/* A connect that does not revive the stream leaves it broken, which must not turn those behind it from cancelled into
 * failed. */
static size_t cancel_revival(an_socket *socket, struct operation *connect) {
    connect->flags &= ~(uint32_t)OPERATION_REVIVES;
    size_t count = cancel_all(socket, &socket->transmit);
    socket->broken = true;
    return count;
}

/* Nor must a send that has begun, and so breaks the stream: it ends first, as it was started first, and the stream is
 * called broken last. */
static size_t cancel_sends(an_socket *socket) {
    struct operation *first = socket->transmit.head;
    if (first == NULL)
        return 0;
    bool quiet = (first->flags & OPERATION_QUIET) != 0;
    if ((first->flags & OPERATION_REVIVES) != 0)
        return cancel_revival(socket, first);
    if (an_operation_withdraw(socket, first))
        return (quiet ? 0 : 1) + cancel_all(socket, &socket->transmit);
    if (!breaks_stream(socket, first))
        return cancel_all(socket, &socket->transmit);
    an_direction_remove(&socket->transmit, first);
    if (quiet)
        report_quiet(socket, first, socket->transmit.head, AN_ECANCELED);
    else
        an_operation_complete_unlinked(socket, first, AN_ECANCELED);
    size_t count = (quiet ? 0 : 1) + cancel_all(socket, &socket->transmit);
    socket->broken = true;
    socket->quiet_failed = socket->quiet_failed || quiet;
    return count;
}

int an_socket_cancel(an_socket *socket, size_t *count) {
    if (count != NULL)
        *count = 0;
    int error = lock_for_operations(socket);
    if (error != 0)
        return error;
    size_t cancelled = cancel_all(socket, &socket->receive) + cancel_sends(socket);
    settle(socket);
    if (count != NULL)
        *count = cancelled;
    an_mutex_unlock(&socket->lock);
    return 0;
}

static int set_paused(an_socket *socket, an_operation *wanted, bool paused) {
    int error = lock_for_operations(socket);
    if (error != 0)
        return error;
    struct operation *operation = find_in(&socket->receive, an_operation_private(wanted));
    if (operation == NULL || (operation->flags & OPERATION_MULTISHOT) == 0) {
        error = AN_EINVAL;
    } else if (paused) {
        operation->flags |= OPERATION_PAUSED;
    } else {
        operation->flags &= ~(uint32_t)OPERATION_PAUSED;
        if (operation->timeout_ns >= 0) { /* silence counts from here on, not from before the pause */
            operation->deadline_ns = an_deadline(an_clock(), operation->timeout_ns);
            an_socket_schedule(socket, operation->deadline_ns);
        }
        settle(socket);
    }
    an_mutex_unlock(&socket->lock);
    return error;
}

int an_operation_pause(an_socket *socket, an_operation *operation) { return set_paused(socket, operation, true); }

int an_operation_resume(an_socket *socket, an_operation *operation) { return set_paused(socket, operation, false); }

uint32_t an_operation_more_count(const an_operation *operation) {
    return an_operation_private((an_operation *)(uintptr_t)operation)->more_count;
}
