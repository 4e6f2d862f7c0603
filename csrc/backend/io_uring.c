/* io_uring.c - the backend on Linux' io_uring(7), a proactor by nature.
 *
 * What it asks the ring for, per socket (REQUEST_...):
 *   - a multishot accept; a multishot receive, or one receive, into buffers that the ring lends when data is there. What
 *     arrives goes to the first operation; without one that may take it, it waits as a parcel;
 *   - readiness (a poll that ends with its first event), where a call of our own serves better: receives into the user's
 *     buffer, datagrams, messages so large that one call into a large buffer beats many small ones, room to send, connects.
 * So user's memory is never in the kernel's hands: cancelling and closing need not wait for it. Sends are tried at once,
 * as everywhere (perform.c): sending through the ring as well was measured to bring nothing (bench/README.md).
 *
 *   request:   none ---prepared, submitted---> ARMED ---completion without MORE---> none
 *                                                |
 *                                                +--no longer wanted: cancel submitted, CANCELLED until that completion
 *
 * Threads: the ring is the leader's. It prepares what sockets need (those in the port's ready list), submits and waits in
 * one system call, and works on what came. Nothing stands in the ring unsubmitted but between prepare and enter, so that a
 * descriptor's number can only be looked at then: such a "round" holds back the closing of the numbers it prepared.
 * Requests hold their file, not its number; a late completion finds by its tag that its socket is gone.
 */
#if defined(__linux__) && defined(AN_HAVE_LIBURING)

#include "backend/io_uring.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "backend/ring.h"
#include "perform.h"

enum request {
    REQUEST_RECEIVE = 0,
    REQUEST_ACCEPT = 1,
    REQUEST_READABLE = 2,
    REQUEST_WRITABLE = 3,
    REQUEST_KINDS = 4,
    /* The ring's own, with the tag OWN_TAG. */
    REQUEST_WAKE = 4,
    REQUEST_ALARM = 5,
    REQUEST_CANCEL = 6
};

enum { ENTRIES = 256 }; /* completions worked on in one pass */

struct entry {
    an_socket *socket; /* a reference, or NULL */
    uint64_t data;
    int32_t result;
    uint32_t flags;
};

struct an_backend {
    an_port *port;
    struct ring ring;      /* leader */
    uint32_t features;     /* leader: enum ring_feature */
    bool single;           /* constant: only one thread may submit */
    int wakeup;            /* an eventfd that the ring reads */
    int alarm;             /* a timerfd that the ring reads; -1 until somebody watches the port; port.lock */
    int watched;           /* an eventfd that tells of completions to who watches the port; -1; port.lock */
    bool told;             /* the kernel was told of it; port.lock */
    uint32_t own_armed;    /* leader: bits of REQUEST_WAKE, REQUEST_ALARM */
    uint32_t outstanding;  /* leader: requests whose last completion did not come yet */
    bool short_of_buffers; /* leader: the kernel found none in this pass */
    struct an_mutex lock;  /* after a socket's */
    uint32_t round;        /* lock; written by the leader alone */
    bool in_round;         /* lock; likewise */
    an_socket *dead;       /* lock: their descriptors are closed at the end of the round; holds references */
    struct entry entries[ENTRIES];
};

/* ---- tags --------------------------------------------------------------------------------------------------------------- */

/* A socket's tag is generation << 32 | slot; three bits of the slot's half tell the request. */
enum { REQUEST_BITS = 3 };
static const uint32_t SLOT_MOST = UINT32_MAX >> REQUEST_BITS;
static const uint64_t OWN_TAG = UINT64_C(0xffffffff00000000) | (UINT32_MAX >> REQUEST_BITS);

static uint64_t data_of(uint64_t tag, enum request request) {
    assert((uint32_t)tag <= SLOT_MOST);
    return (tag & UINT64_C(0xffffffff00000000)) | (uint32_t)(tag << REQUEST_BITS) | request;
}

static enum request request_of(uint64_t data) { return (enum request)(data & ((1u << REQUEST_BITS) - 1)); }

static uint64_t tag_of(uint64_t data) { return (data & UINT64_C(0xffffffff00000000)) | (uint32_t)data >> REQUEST_BITS; }

static uint8_t bit(enum request request) { return (uint8_t)(1u << request); }

/* ---- parcels: what came before it was asked for -------------------------------------------------------------------------------- */

static void free_parcel(struct an_parcel *parcel) {
    if (parcel->accepted >= 0)
        an_os_close(parcel->accepted);
    free(parcel);
}

static bool keep(struct an_requests *requests, an_descriptor accepted, const void *data, size_t length) {
    struct an_parcel *parcel = malloc(sizeof *parcel + length);
    if (parcel == NULL)
        return false;
    *parcel = (struct an_parcel){.accepted = accepted, .length = length};
    if (length > 0)
        memcpy(parcel->data, data, length);
    if (requests->last != NULL)
        requests->last->next = parcel;
    else
        requests->first = parcel;
    requests->last = parcel;
    return true;
}

static struct an_parcel *unlink_first(struct an_requests *requests) {
    struct an_parcel *parcel = requests->first;
    requests->first = parcel->next;
    if (requests->first == NULL)
        requests->last = NULL;
    return parcel;
}

static void free_parcels(struct an_requests *requests) {
    while (requests->first != NULL)
        free_parcel(unlink_first(requests));
}

/* ---- preparing requests: leader, in a round, socket.lock held ------------------------------------------------------------------ */

/* NULL: the kernel takes none now; the socket is looked at again in the next round. */
static struct io_uring_sqe *prepare(struct an_backend *backend, an_socket *socket) {
    struct io_uring_sqe *submission = ring_submission(&backend->ring);
    if (submission == NULL)
        an_port_make_ready(backend->port, socket);
    return submission;
}

static void arm(struct an_backend *backend, an_socket *socket, struct io_uring_sqe *submission, enum request request) {
    io_uring_sqe_set_data64(submission, data_of(socket->tag, request));
    socket->requests.armed |= bit(request);
    socket->requests.cancelled &= (uint8_t)~bit(request);
    socket->requests.round = backend->round;
    backend->outstanding++;
}

static void cancel(struct an_backend *backend, an_socket *socket, enum request request) {
    struct an_requests *requests = &socket->requests;
    if ((requests->armed & bit(request)) == 0 || (requests->cancelled & bit(request)) != 0)
        return;
    struct io_uring_sqe *submission = prepare(backend, socket);
    if (submission == NULL)
        return;
    io_uring_prep_cancel64(submission, data_of(socket->tag, request), 0);
    if ((backend->features & RING_SKIP_SUCCESS) != 0)
        submission->flags |= IOSQE_CQE_SKIP_SUCCESS;
    io_uring_sqe_set_data64(submission, data_of(OWN_TAG, REQUEST_CANCEL));
    requests->cancelled |= bit(request);
}

static void arm_poll(struct an_backend *backend, an_socket *socket, enum request request) {
    if ((socket->requests.armed & bit(request)) != 0)
        return;
    struct io_uring_sqe *submission = prepare(backend, socket);
    if (submission == NULL)
        return;
    io_uring_prep_poll_add(submission, (int)socket->descriptor, request == REQUEST_READABLE ? POLLIN : POLLOUT);
    arm(backend, socket, submission, request);
}

static void arm_receive(struct an_backend *backend, an_socket *socket, bool once) {
    struct io_uring_sqe *submission = prepare(backend, socket);
    if (submission == NULL)
        return;
    if (once)
        io_uring_prep_recv(submission, (int)socket->descriptor, NULL, RING_BUFFER_SIZE, 0);
    else
        io_uring_prep_recv_multishot(submission, (int)socket->descriptor, NULL, 0, 0);
    submission->flags |= IOSQE_BUFFER_SELECT;
    submission->buf_group = 0;
    arm(backend, socket, submission, REQUEST_RECEIVE);
    socket->requests.once = once;
}

static void arm_accept(struct an_backend *backend, an_socket *socket) {
    struct io_uring_sqe *submission = prepare(backend, socket);
    if (submission == NULL)
        return;
    io_uring_prep_multishot_accept(submission, (int)socket->descriptor, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    arm(backend, socket, submission, REQUEST_ACCEPT);
    socket->requests.fork_count = an_fork_count();
}

/* ---- receiving: leader, socket.lock held ---------------------------------------------------------------------------------------- */

enum way { WAY_CALL, WAY_ACCEPT, WAY_RECEIVE, WAY_RECEIVE_ONCE };

/* How the first receive is served best. */
static enum way way_of(const struct an_backend *backend, const an_socket *socket, const struct operation *operation) {
    bool multishot = (operation->flags & OPERATION_MULTISHOT) != 0;
    if (operation->record.kind == AN_ACCEPT)
        return multishot && (backend->features & RING_MULTISHOT_ACCEPT) != 0 ? WAY_ACCEPT : WAY_CALL;
    bool fits = operation->record.kind == AN_RECV && an_os_is_stream(socket->type) && operation->at.buffer == NULL &&
                operation->length >= RING_BUFFER_SIZE;
    if (!fits || socket->requests.bulk || (backend->features & RING_BUFFER_RING) == 0)
        return WAY_CALL;
    return multishot && (backend->features & RING_MULTISHOT_RECEIVE) != 0 ? WAY_RECEIVE : WAY_RECEIVE_ONCE;
}

/* The first receive, if it may take something now. */
static struct operation *taker(an_socket *socket) {
    struct operation *operation = socket->state == SOCKET_OPEN ? socket->receive.head : NULL;
    return operation != NULL && !an_perform_stands_still(socket, operation) ? operation : NULL;
}

/* `length` bytes for an operation that has room for them. False without memory. */
static bool hand_data(an_socket *socket, struct operation *operation, const char *data, size_t length) {
    if (operation->at.buffer != NULL) {
        memcpy(operation->at.buffer, data, length);
        an_perform_received(socket, operation, NULL, length);
        return true;
    }
    struct an_block *block = an_pool_offer(&socket->port->pool, false, length);
    if (block == NULL)
        return false;
    memcpy(an_block_data(block, false), data, length);
    an_perform_received(socket, operation, block, length);
    return true;
}

/* A multishot accept goes by the limit of descriptors that stood when it was armed. One above today's limit is moved below
 * it, or is as good as none: EMFILE. */
static int keep_to_limit(an_descriptor *descriptor) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || (rlim_t)*descriptor < limit.rlim_cur)
        return 0;
    int moved = fcntl((int)*descriptor, F_DUPFD_CLOEXEC, 0);
    if (moved < 0)
        return EMFILE; /* EINVAL as well: a limit of none at all */
    an_os_close(*descriptor);
    *descriptor = moved;
    return 0;
}

/* An accepted descriptor for an operation. Without memory it stays the caller's, and the operation was told. */
static bool hand_accepted(an_socket *socket, struct operation *operation, an_descriptor descriptor) {
    struct an_block *block = an_pool_offer(&socket->port->pool, true, 0);
    an_socket *accepted = an_socket_create_accepted(socket, descriptor);
    if (block != NULL && accepted != NULL) {
        accepted->fork_count = socket->requests.fork_count; /* the child of a later fork may have it as well */
        if (an_os_peer_address(descriptor, an_block_address(block)) != 0)
            an_block_address(block)->length = 0; /* reset meanwhile: it has no peer any more */
        an_perform_accepted(socket, operation, block, accepted);
        return true;
    }
    if (accepted != NULL) {
        accepted->state = SOCKET_CLOSED;
        an_socket_drop(accepted);
    }
    an_perform_accept_failed(socket, operation, AN_ENOMEM);
    return false;
}

/* The first parcel, as much of it as the operation takes. False without memory or descriptors: then a timer looks again. */
static bool hand_parcel(an_socket *socket, struct operation *operation) {
    struct an_requests *requests = &socket->requests;
    struct an_parcel *parcel = requests->first;
    if (parcel->accepted >= 0) {
        int error = keep_to_limit(&parcel->accepted);
        if (error != 0)
            an_perform_accept_failed(socket, operation, error);
        if (error != 0 || !hand_accepted(socket, operation, parcel->accepted))
            return false;
        parcel->accepted = -1;
        free_parcel(unlink_first(requests));
        return true;
    }
    size_t left = parcel->length - parcel->offset;
    size_t length = operation->length < left ? (size_t)operation->length : left;
    const char *data = parcel->data + parcel->offset;
    parcel->offset += length; /* before the operation may be dequeued and the next be started by another thread */
    if (!hand_data(socket, operation, data, length)) {
        parcel->offset -= length;
        an_perform_retry_receive(socket);
        return false;
    }
    if (parcel->offset == parcel->length)
        free_parcel(unlink_first(requests));
    return true;
}

/* Gives operations what waits for them. True: nothing is left. */
static bool hand_over_parcels(an_socket *socket) {
    enum { SHARE = 16 }; /* then it is the others' turn */
    struct an_requests *requests = &socket->requests;
    struct operation *operation;
    for (int steps = 0; requests->first != NULL && (operation = taker(socket)) != NULL; steps++) {
        if (steps == SHARE) {
            an_port_make_ready(socket->port, socket);
            return false;
        }
        if (!hand_parcel(socket, operation))
            return false;
    }
    if (requests->first == NULL && requests->error != 0 && (operation = taker(socket)) != NULL) {
        int error = requests->error;
        requests->error = 0;
        an_perform_receive_failed(socket, operation, error);
    }
    return requests->first == NULL && requests->error == 0;
}

/* Large messages are better received by one call into a large buffer than by many small buffers of the ring, and small
 * ones by the ring, which needs no call at all. */
enum {
    STREAK_TO_BULK = 2, /* full buffers in a row */
    STREAK_TO_RING = 16 /* receives in a row that would have fitted into a buffer */
};

static void note_size(struct an_requests *requests, size_t length) {
    bool other = requests->bulk ? length < RING_BUFFER_SIZE : length >= RING_BUFFER_SIZE;
    requests->streak = other ? (uint8_t)(requests->streak + 1) : 0;
    if (requests->streak < (requests->bulk ? STREAK_TO_RING : STREAK_TO_BULK))
        return;
    requests->bulk = !requests->bulk;
    requests->streak = 0;
}

static void receive_by_call(an_socket *socket) {
    uint64_t before = socket->bytes_received;
    an_perform_receive(socket);
    if (socket->requests.bulk && socket->bytes_received != before)
        note_size(&socket->requests, (size_t)(socket->bytes_received - before));
}

/* Whether what the system has in hand serves the operation as well. */
static bool is_served(const struct an_requests *requests, enum way way) {
    switch (way) {
    case WAY_ACCEPT:
        return (requests->armed & bit(REQUEST_ACCEPT)) != 0;
    case WAY_RECEIVE:
        return (requests->armed & bit(REQUEST_RECEIVE)) != 0;
    case WAY_RECEIVE_ONCE:
        return (requests->armed & bit(REQUEST_RECEIVE)) != 0 && requests->once;
    default:
        return false;
    }
}

/* Requests for what the receiving direction needs. Only one of the system and our own calls may take from the socket at a
 * time, or bytes would change places: a request that is in the way must end first. */
static void prepare_receive(struct an_backend *backend, an_socket *socket) {
    struct an_requests *requests = &socket->requests;
    const uint8_t taking = bit(REQUEST_RECEIVE) | bit(REQUEST_ACCEPT);
    struct operation *operation = hand_over_parcels(socket) ? taker(socket) : NULL;
    enum way way = operation != NULL ? way_of(backend, socket, operation) : WAY_CALL;
    if ((requests->armed & taking) != 0) {
        if (operation != NULL && is_served(requests, way))
            return;
        cancel(backend, socket, REQUEST_RECEIVE);
        cancel(backend, socket, REQUEST_ACCEPT);
        return;
    }
    if (operation == NULL)
        return;
    if (way == WAY_ACCEPT) {
        arm_accept(backend, socket);
    } else if (way != WAY_CALL) {
        arm_receive(backend, socket, way == WAY_RECEIVE_ONCE);
    } else {
        receive_by_call(socket);
        if (socket->receive.head != NULL && !socket->receive.ready)
            arm_poll(backend, socket, REQUEST_READABLE);
    }
}

static void prepare_transmit(struct an_backend *backend, an_socket *socket) {
    struct an_direction *direction = &socket->transmit;
    an_perform_transmit(socket);
    if (socket->state != SOCKET_CLOSED && direction->head != NULL && !direction->ready)
        arm_poll(backend, socket, REQUEST_WRITABLE);
}

/* A socket of the ready list. */
static void prepare_socket(struct an_backend *backend, an_socket *socket) {
    an_mutex_lock(&socket->lock);
    if (socket->state == SOCKET_CLOSED) {
        for (int request = 0; request < REQUEST_KINDS; request++)
            cancel(backend, socket, (enum request)request);
    } else {
        if (socket->receive.starved)
            socket->receive.retry_ns = AN_NEVER; /* a descriptor may be free now */
        socket->requests.preparing = true;
        prepare_transmit(backend, socket);
        if (socket->state != SOCKET_CLOSED)
            prepare_receive(backend, socket);
        socket->requests.preparing = false;
    }
    an_mutex_unlock(&socket->lock);
}

/* ---- working on completions: leader, socket.lock held ------------------------------------------------------------------------------ */

/* Not prepared here: nothing may stand in the ring unsubmitted while the user works on a batch. */
static void look_again(an_socket *socket) {
    if (socket->receive.head != NULL && socket->receive.retry_ns == AN_NEVER)
        an_port_make_ready(socket->port, socket);
}

static void receive_error(an_socket *socket, int error) {
    struct operation *operation = socket->requests.first == NULL ? taker(socket) : NULL;
    if (operation != NULL)
        an_perform_receive_failed(socket, operation, error);
    else if (socket->requests.error == 0)
        socket->requests.error = error;
}

static void receive_data(struct an_backend *backend, an_socket *socket, const char *data, size_t length) {
    struct an_requests *requests = &socket->requests;
    struct operation *operation = requests->first == NULL && requests->error == 0 ? taker(socket) : NULL;
    if (socket->state != SOCKET_OPEN)
        return;
    bool fits = operation != NULL && operation->record.kind == AN_RECV && operation->length >= length;
    note_size(requests, length);
    if (!(fits && hand_data(socket, operation, data, length))) {
        if (!keep(requests, -1, data, length) && requests->error == 0)
            requests->error = AN_ENOMEM; /* bytes are lost: the stream cannot go on, and its reader learns it */
        an_port_make_ready(backend->port, socket);
    } else if (requests->bulk) {
        an_port_make_ready(backend->port, socket);
    }
}

static void receive_end(an_socket *socket) {
    struct operation *operation = socket->requests.first == NULL ? taker(socket) : NULL;
    if (operation != NULL && operation->record.kind == AN_RECV)
        an_perform_received(socket, operation, NULL, 0);
    /* else the next receive is told so again */
}

static void on_receive(struct an_backend *backend, an_socket *socket, const struct entry *entry) {
    if (entry->result > 0) {
        uint32_t number = entry->flags >> IORING_CQE_BUFFER_SHIFT;
        receive_data(backend, socket, ring_buffer(&backend->ring, number), (size_t)entry->result);
    } else if (entry->result == 0) {
        receive_end(socket);
    } else if (entry->result == -ENOBUFS) {
        backend->short_of_buffers = true; /* the data waits in the socket */
    } else if (entry->result != -ECANCELED && entry->result != -EINTR && entry->result != -EAGAIN) {
        /* (cancelled: by us, or because the thread that submitted it ended) */
        receive_error(socket, -entry->result);
    }
    if ((socket->requests.armed & bit(REQUEST_RECEIVE)) == 0)
        look_again(socket);
}

static void accept_descriptor(an_socket *socket, struct operation *operation, an_descriptor accepted) {
    int error = operation != NULL ? keep_to_limit(&accepted) : 0;
    if (error != 0)
        an_perform_accept_failed(socket, operation, error);
    else if (operation != NULL && hand_accepted(socket, operation, accepted))
        return;
    if (socket->state != SOCKET_OPEN || !keep(&socket->requests, accepted, NULL, 0))
        an_os_close(accepted);
}

static void on_accept(an_socket *socket, const struct entry *entry) {
    struct operation *operation = socket->requests.first == NULL ? taker(socket) : NULL;
    if (operation != NULL && operation->record.kind != AN_ACCEPT)
        operation = NULL;
    if (entry->result >= 0) {
        accept_descriptor(socket, operation, entry->result);
    } else if (operation != NULL && entry->result != -ECANCELED && entry->result != -EINTR) {
        an_perform_accept_failed(socket, operation, -entry->result); /* else it is told again */
    }
    if ((socket->requests.armed & bit(REQUEST_ACCEPT)) == 0 || socket->requests.first != NULL)
        look_again(socket);
}

static void on_readable(an_socket *socket) {
    const uint8_t taking = bit(REQUEST_RECEIVE) | bit(REQUEST_ACCEPT);
    socket->receive.ready = true;
    socket->reported = true;
    if (socket->state != SOCKET_OPEN || socket->receive.head == NULL)
        return;
    bool by_call = way_of(socket->port->backend, socket, socket->receive.head) == WAY_CALL;
    if (by_call && (socket->requests.armed & taking) == 0 && hand_over_parcels(socket))
        receive_by_call(socket);
    else
        an_port_make_ready(socket->port, socket);
}

static void on_writable(an_socket *socket) {
    socket->transmit.ready = true;
    an_perform_transmit(socket);
}

static void work_on(struct an_backend *backend, const struct entry *entry) {
    an_socket *socket = entry->socket;
    enum request request = request_of(entry->data);
    an_mutex_lock(&socket->lock);
    if ((entry->flags & IORING_CQE_F_MORE) == 0)
        socket->requests.armed &= (uint8_t)~bit(request);
    if (socket->state == SOCKET_CLOSED) {
        if (request == REQUEST_ACCEPT && entry->result >= 0)
            an_os_close(entry->result);
    } else if (request == REQUEST_RECEIVE) {
        on_receive(backend, socket, entry);
    } else if (request == REQUEST_ACCEPT) {
        on_accept(socket, entry);
    } else if (request == REQUEST_READABLE) {
        on_readable(socket);
    } else {
        on_writable(socket);
    }
    an_mutex_unlock(&socket->lock);
}

/* ---- rounds: leader ----------------------------------------------------------------------------------------------------------------- */

static void begin_round(struct an_backend *backend) {
    an_mutex_lock(&backend->lock);
    if (!backend->in_round) /* else the kernel took not everything of the last one, which goes on */
        backend->round++;
    backend->in_round = true;
    an_mutex_unlock(&backend->lock);
}

static void close_dead(an_socket *first) {
    an_socket *next;
    for (an_socket *socket = first; socket != NULL; socket = next) {
        next = socket->requests.next;
        an_os_close(socket->requests.descriptor);
        an_socket_drop(socket);
    }
}

static void end_round(struct an_backend *backend) {
    if (!ring_is_submitted(&backend->ring))
        return;
    an_mutex_lock(&backend->lock);
    an_socket *dead = backend->dead;
    backend->in_round = false;
    backend->dead = NULL;
    an_mutex_unlock(&backend->lock);
    close_dead(dead);
}

/* What rings read from their own descriptors: of no use. Not a backend's, as a kernel may end a read after the close. */
static uint64_t own_buffer;

/* The ring reads the descriptor that wakes it, or the alarm's. */
static void arm_own(struct an_backend *backend, int descriptor, enum request request) {
    if (descriptor < 0 || (backend->own_armed & bit(request)) != 0)
        return;
    struct io_uring_sqe *submission = ring_submission(&backend->ring);
    if (submission == NULL)
        return;
    io_uring_prep_read(submission, descriptor, &own_buffer, sizeof own_buffer, 0);
    io_uring_sqe_set_data64(submission, data_of(OWN_TAG, request));
    backend->own_armed |= bit(request);
    backend->outstanding++;
}

static void prepare_round(struct an_backend *backend) {
    an_port *port = backend->port;
    an_mutex_lock(&port->lock);
    an_socket *ready = an_port_take_ready(port);
    int alarm = backend->alarm;
    an_mutex_unlock(&port->lock);
    begin_round(backend);
    port->now_ns = 0;
    arm_own(backend, backend->wakeup, REQUEST_WAKE);
    arm_own(backend, alarm, REQUEST_ALARM);
    an_socket *socket, *next;
    for (socket = ready; socket != NULL && port->pass_bytes < AN_PASS_BYTES; socket = next) {
        next = socket->pass_next;
        prepare_socket(backend, socket);
        an_socket_drop(socket);
    }
    if (socket != NULL)
        an_port_return_ready(port, socket);
}

/* Takes completions out of the ring, for a pass at most. *woken: wake was called. Returns how many are in entries. */
static size_t reap(struct an_backend *backend, bool *woken) {
    struct io_uring *native = &backend->ring.native;
    struct io_uring_cqe *completion;
    size_t count = 0;
    uint64_t bytes = 0;
    unsigned head, taken = 0;
    *woken = false;
    io_uring_for_each_cqe(native, head, completion) {
        if (count == ENTRIES || bytes >= AN_PASS_BYTES)
            break;
        if ((completion->flags & IORING_CQE_F_BUFFER) != 0 && completion->res > 0)
            bytes += (uint64_t)completion->res;
        taken++;
        enum request request = request_of(completion->user_data);
        if ((completion->flags & IORING_CQE_F_MORE) == 0 && request != REQUEST_CANCEL)
            backend->outstanding--;
        if (tag_of(completion->user_data) != OWN_TAG) {
            backend->entries[count++] =
                (struct entry){.data = completion->user_data, .result = completion->res, .flags = completion->flags};
            continue;
        }
        if (request != REQUEST_CANCEL)
            backend->own_armed &= ~(uint32_t)bit(request);
        *woken |= request == REQUEST_WAKE;
    }
    io_uring_cq_advance(native, taken);
    return count;
}

/* Buffers go back as soon as what they held was copied. */
static uint32_t work_on_all(struct an_backend *backend, size_t count) {
    uint32_t buffers = 0;
    for (size_t i = 0; i < count; i++) {
        struct entry *entry = &backend->entries[i];
        if (entry->socket != NULL) {
            work_on(backend, entry);
            an_socket_drop(entry->socket);
        } else if (request_of(entry->data) == REQUEST_ACCEPT && entry->result >= 0) {
            an_os_close(entry->result); /* its listener is gone */
        }
        if ((entry->flags & IORING_CQE_F_BUFFER) != 0) {
            ring_recycle(&backend->ring, entry->flags >> IORING_CQE_BUFFER_SHIFT);
            buffers++;
        }
    }
    return buffers;
}

static void settle_buffers(struct an_backend *backend, uint32_t taken) {
    if ((backend->features & RING_BUFFER_RING) == 0)
        return;
    if (backend->short_of_buffers)
        ring_grow(&backend->ring);
    else
        ring_settle(&backend->ring, taken);
    backend->short_of_buffers = false;
}

/* ---- being watched ---------------------------------------------------------------------------------------------------------------------- */

static void write_one(int descriptor) {
    uint64_t one = 1;
    ssize_t written;
    do
        written = write(descriptor, &one, sizeof one);
    while (written < 0 && errno == EINTR);
    assert(written == sizeof one || errno == EAGAIN); /* 2^64 - 2 of them do not come */
}

static void drain(int descriptor) {
    uint64_t unused;
    while (read(descriptor, &unused, sizeof unused) < 0 && errno == EINTR) {
    }
}

/* The kernel signals the watched descriptor with each completion; in a ring of one thread that thread must tell it so. */
static void tell_kernel(struct an_backend *backend) {
    if (!backend->told)
        backend->told = io_uring_register_eventfd(&backend->ring.native, backend->watched) == 0;
}

/* What was signalled until now has been worked on; what came meanwhile is signalled again. */
static void rearm_watched(struct an_backend *backend, int watched, bool left) {
    if (watched < 0)
        return;
    an_mutex_lock(&backend->port->lock);
    tell_kernel(backend);
    an_mutex_unlock(&backend->port->lock);
    drain(watched);
    io_uring_get_events(&backend->ring.native);
    if (left || io_uring_cq_ready(&backend->ring.native) > 0)
        write_one(watched);
}

/* ---- the interface, in the header's order ---------------------------------------------------------------------------------------------- */

static int uring_open(struct an_backend **opened, an_port *port, const void *detail) {
    (void)detail;
    struct an_backend *backend = calloc(1, sizeof *backend);
    if (backend == NULL)
        return AN_ENOMEM;
    backend->wakeup = eventfd(0, EFD_CLOEXEC); /* blocking, or the ring's read would not wait either */
    int error = backend->wakeup < 0 ? errno : ring_open(&backend->ring, port->concurrency == 1);
    if (error != 0) {
        if (backend->wakeup >= 0)
            close(backend->wakeup);
        free(backend);
        return error;
    }
    an_mutex_init(&backend->lock);
    backend->port = port;
    backend->features = backend->ring.features;
    backend->single = (backend->features & RING_DEFER_TASKRUN) != 0;
    backend->alarm = backend->watched = -1;
    *opened = backend;
    return 0;
}

/* What is in the ring already, but no more: whoever closes may read it, though not enter. */
static void work_on_the_rest(struct an_backend *backend) {
    bool woken;
    for (size_t count = reap(backend, &woken); count > 0; count = reap(backend, &woken))
        work_on_all(backend, count); /* no entry has a socket: buffers go back, accepted descriptors are closed */
}

/* False: nothing can be submitted now. */
static bool submit_cancel(struct an_backend *backend, uint64_t data, int flags) {
    struct io_uring_sqe *submission = ring_submission(&backend->ring);
    if (submission == NULL)
        return false;
    io_uring_prep_cancel64(submission, data, flags);
    io_uring_sqe_set_data64(submission, data_of(OWN_TAG, REQUEST_CANCEL));
    return true;
}

/* Without CANCEL_ANY only the ring's own are left: what a socket asked for ended when its connection was shut down. */
static bool submit_cancels(struct an_backend *backend) {
    if ((backend->features & RING_CANCEL_ANY) != 0)
        return submit_cancel(backend, 0, IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL);
    return submit_cancel(backend, data_of(OWN_TAG, REQUEST_WAKE), 0) &&
           submit_cancel(backend, data_of(OWN_TAG, REQUEST_ALARM), 0);
}

/* Ends all requests, so that no file is held when close returns (a listener's address is free again). Not where another
 * thread alone may submit: that one does it if it waits here, else the kernel by itself, a little later. */
static void end_requests(struct an_backend *backend) {
    enum { TRIES = 100, TRY_NS = 10000000 };
    bool may_submit = !backend->single || backend->port->dequeuer == an_thread_identity();
    if (!may_submit || backend->ring.disabled || backend->outstanding == 0 || !submit_cancels(backend))
        return;
    int error = 0;
    for (int i = 0; i < TRIES && backend->outstanding > 0 && (error == 0 || error == AN_EINTR); i++) {
        error = ring_enter(&backend->ring, an_clock() + TRY_NS);
        work_on_the_rest(backend);
    }
}

static void uring_close(struct an_backend *backend) {
    if (an_port_is_foreign(backend->port)) {
        ring_close_copy(&backend->ring);
    } else {
        end_requests(backend);
        work_on_the_rest(backend);
        close_dead(backend->dead);
        ring_close(&backend->ring);
    }
    close(backend->wakeup);
    if (backend->alarm >= 0)
        close(backend->alarm);
    if (backend->watched >= 0)
        close(backend->watched);
    an_mutex_destroy(&backend->lock);
    free(backend);
}

static int uring_attach(struct an_backend *backend, an_socket *socket) {
    (void)backend;
    socket->requests = (struct an_requests){0};
    return (uint32_t)socket->tag < SLOT_MOST ? 0 : AN_ENOMEM;
}

static bool uring_detach(struct an_backend *backend, an_socket *socket) {
    free_parcels(&socket->requests);
    if (socket->requests.armed == 0)
        return false;
    an_port_make_ready(backend->port, socket); /* there its requests are cancelled */
    return true;
}

static void uring_close_descriptor(struct an_backend *backend, an_socket *socket) {
    an_mutex_lock(&backend->lock);
    bool looked_at = backend->in_round && socket->requests.round == backend->round;
    if (looked_at) {
        an_socket_hold(socket);
        socket->requests.descriptor = socket->descriptor;
        socket->requests.next = backend->dead;
        backend->dead = socket;
    }
    an_mutex_unlock(&backend->lock);
    if (!looked_at)
        an_os_close(socket->descriptor);
}

/* The leader prepares it in its next round; nothing to do for what was asked for already. */
static void uring_await(struct an_backend *backend, an_socket *socket, struct an_direction *direction) {
    enum request request = direction == &socket->receive ? REQUEST_READABLE : REQUEST_WRITABLE;
    if (!socket->requests.preparing && (socket->requests.armed & bit(request)) == 0)
        an_port_make_ready(backend->port, socket);
}

static void uring_start(struct an_backend *backend, an_socket *socket, struct operation *operation) {
    struct an_direction *direction = an_direction_of(socket, operation->record.kind);
    if (direction == &socket->transmit)
        an_perform_start(backend, socket, operation);
    else if (direction->head == operation)
        an_port_make_ready(backend->port, socket);
}

static void uring_proceed(struct an_backend *backend, an_socket *socket, struct an_direction *direction) {
    const uint8_t taking = bit(REQUEST_RECEIVE) | bit(REQUEST_ACCEPT);
    if (direction == &socket->transmit)
        an_perform_transmit(socket);
    else if (direction->head != NULL || (socket->requests.armed & taking) != 0)
        an_port_make_ready(backend->port, socket); /* also to end a request that nobody wants any more */
}

static int uring_wait(struct an_backend *backend, int64_t until_ns) {
    an_port *port = backend->port;
    bool woken = false;
    int error = ring_enable(&backend->ring);
    if (error != 0)
        return error;
    prepare_round(backend);
    until_ns = an_port_begin_wait(port, until_ns);
    bool deaf = (backend->own_armed & bit(REQUEST_WAKE)) == 0; /* the kernel took no more: nothing would end the wait */
    if (deaf || io_uring_cq_ready(&backend->ring.native) > 0)  /* left by the last pass */
        until_ns = 0;
    error = ring_enter(&backend->ring, until_ns);
    end_round(backend);
    size_t count = reap(backend, &woken);
    an_mutex_lock(&port->lock);
    an_socket *expired = an_port_begin_pass(port, woken);
    int watched = backend->watched;
    for (size_t i = 0; i < count; i++)
        backend->entries[i].socket = an_port_find(port, tag_of(backend->entries[i].data));
    an_mutex_unlock(&port->lock);
    uint32_t buffers = work_on_all(backend, count);
    an_socket_expire_all(expired);
    settle_buffers(backend, buffers);
    rearm_watched(backend, watched, io_uring_cq_ready(&backend->ring.native) > 0);
    if ((backend->features & RING_CANCEL_ANY) != 0 && an_atomic_load32(&port->closed))
        end_requests(backend); /* here a ring of one thread still can */
    return error;
}

static void uring_wake(struct an_backend *backend) {
    write_one(backend->wakeup);
    if (backend->watched >= 0)
        write_one(backend->watched);
}

static int uring_watch(struct an_backend *backend, an_descriptor *descriptor) {
    if (backend->alarm < 0)
        backend->alarm = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC); /* blocking, as wakeup */
    if (backend->alarm < 0)
        return errno;
    if (backend->watched < 0) {
        backend->watched = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (backend->watched < 0)
            return errno;
        write_one(backend->watched); /* the first dequeue tells the kernel of it, and of the alarm */
        write_one(backend->wakeup);  /* so does a wait that is under way */
    }
    *descriptor = backend->watched;
    return 0;
}

static void uring_alarm(struct an_backend *backend, int64_t due_ns) {
    struct itimerspec when = {0}; /* all zero disarms: timerfd_settime(2) */
    if (due_ns != AN_NEVER) {
        when.it_value.tv_sec = (time_t)(due_ns / 1000000000);
        when.it_value.tv_nsec = (long)(due_ns % 1000000000);
    }
    int result = timerfd_settime(backend->alarm, TFD_TIMER_ABSTIME, &when, NULL);
    assert(result == 0); /* it takes any time after 0 */
    (void)result;
}

static void uring_explain(int error, char *reason, size_t size) { ring_explain(error, reason, size); }

const struct an_backend_interface an_io_uring = {
    .open = uring_open,
    .close = uring_close,
    .attach = uring_attach,
    .detach = uring_detach,
    .close_descriptor = uring_close_descriptor,
    .try_send = an_perform_try_send,
    .start = uring_start,
    .proceed = uring_proceed,
    .await = uring_await,
    .prepares = true,
    .wait = uring_wait,
    .wake = uring_wake,
    .watch = uring_watch,
    .alarm = uring_alarm,
    .explain = uring_explain,
};

#endif
