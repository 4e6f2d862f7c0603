/* echo_io_uring.c - a TCP echo server on io_uring in which each feature is a switch: what does it bring?
 *
 *     echo_io_uring [name=value ...]
 *
 * concurrency     defer | coop | coop_flag | coop_single | none    (how the kernel hands work to the thread)
 * registered_ring 0 | 1, no_sqarray 0 | 1
 * files           plain | registered | direct      (direct: accepted into the ring's table, no descriptor at all)
 * accept          multishot | readiness
 * receive         ring | oneshot | poll | poll_multishot           (ring: multishot into provided buffers)
 * buffer, buffers size and count of the provided ones; with poll the size of the one that all share
 * incremental, bundle, copy, receive_poll_first    0 | 1           (copy: each message into memory of its own)
 * send            direct | entry | skip | zerocopy                 (direct: send(2); skip: told only if it was short)
 * send_poll_first 0 | 1
 * wait_count, wait_us, min_wait_us    completions to wait for, for how long at most; the minimum wait
 *
 * One enter for each batch of completions. A connection has at most one send in the ring: what comes meanwhile waits.
 */
#define _GNU_SOURCE
#include "ring.h"
#include "server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/uio.h>

enum concurrency { DEFER, COOP, COOP_FLAG, COOP_SINGLE, NO_PROMISE };
enum files { PLAIN, REGISTERED, DIRECT };
enum accepting { ACCEPT_MULTISHOT, ACCEPT_READINESS };
enum receiving { RECEIVE_RING, RECEIVE_ONESHOT, RECEIVE_POLL, RECEIVE_POLL_MULTISHOT };
enum sending { SEND_DIRECT, SEND_ENTRY, SEND_SKIP, SEND_ZEROCOPY };

/* What a completion belongs to: kind, buffer and connection share its 64 bits of user data. */
enum kind { ACCEPTED, ACCEPTABLE, RECEIVED, READABLE, SENT_REST, SENT_BUFFER, SENT_SKIPPED, CLOSED };

enum { SQ_ENTRIES = 1024, CQ_ENTRIES = 32768, FILES = 16384, PIECES = 64, NONE = -1 };

struct connection {
    struct bytes rest[2]; /* [active] is in the ring while `sending`; the other gathers what comes meanwhile */
    int active;
    int first, last; /* received buffers that wait for the send before them */
    bool sending, ended;
};

static struct ring ring;
static struct buffer_ring buffers;
static struct connection connections[CONNECTION_LIMIT]; /* by descriptor or, direct, by index in the table */
static struct {
    int next;
    unsigned length;
} chunks[32768];                                    /* by buffer: the lists of struct connection */
static unsigned skipped[CQ_ENTRIES], skipped_count; /* buffers whose send was submitted and may go without a word */
static unsigned char *scratch;
static int listener;
static enum files files;
static enum accepting accepting;
static enum receiving receiving;
static enum sending sending;
static unsigned buffer_size;
static bool bundle, copying, receive_poll_first, send_poll_first;
static uint64_t messages, short_sends, out_of_buffers;

static uint64_t tag(enum kind kind, unsigned buffer, int connection) {
    return (uint64_t)kind << 56 | (uint64_t)buffer << 32 | (uint32_t)connection;
}

/* An entry on a connection's socket, by the kind of file that it is. */
static struct io_uring_sqe *prepare(enum io_uring_op operation, int connection, uint64_t user_data) {
    struct io_uring_sqe *sqe = ring_next_sqe(&ring);
    sqe->opcode = (uint8_t)operation;
    sqe->fd = connection;
    sqe->flags = (uint8_t)(files == PLAIN ? 0U : IOSQE_FIXED_FILE);
    sqe->user_data = user_data;
    return sqe;
}

static void arm_accept(void) {
    if (accepting == ACCEPT_READINESS) {
        struct io_uring_sqe *sqe = prepare(IORING_OP_POLL_ADD, listener, tag(ACCEPTABLE, 0, listener));
        sqe->flags = 0;
        sqe->poll32_events = POLLIN;
        return;
    }
    struct io_uring_sqe *sqe = prepare(IORING_OP_ACCEPT, listener, tag(ACCEPTED, 0, listener));
    sqe->ioprio = IORING_ACCEPT_MULTISHOT;
    sqe->flags = 0;
    sqe->accept_flags = files == DIRECT ? 0 : SOCK_CLOEXEC;
    sqe->file_index = files == DIRECT ? IORING_FILE_INDEX_ALLOC : 0;
}

static void arm_receive(int connection) {
    struct io_uring_sqe *sqe;
    if (receiving == RECEIVE_POLL || receiving == RECEIVE_POLL_MULTISHOT) {
        sqe = prepare(IORING_OP_POLL_ADD, connection, tag(READABLE, 0, connection));
        sqe->poll32_events = POLLIN | POLLRDHUP;
        sqe->len = receiving == RECEIVE_POLL_MULTISHOT ? IORING_POLL_ADD_MULTI : 0;
        return;
    }
    sqe = prepare(IORING_OP_RECV, connection, tag(RECEIVED, 0, connection));
    sqe->flags |= IOSQE_BUFFER_SELECT;
    unsigned flags = receiving == RECEIVE_RING ? IORING_RECV_MULTISHOT : 0;
    flags |= receive_poll_first ? IORING_RECVSEND_POLL_FIRST : 0;
    flags |= bundle ? RECVSEND_BUNDLE : 0;
    sqe->ioprio = (uint16_t)flags;
}

static void close_connection(int connection) {
    struct connection *state = &connections[connection];
    bytes_clear(&state->rest[0]);
    bytes_clear(&state->rest[1]);
    state->ended = false;
    if (receiving == RECEIVE_POLL_MULTISHOT) { /* it holds the socket: closing alone would end nothing */
        struct io_uring_sqe *sqe = prepare(IORING_OP_POLL_REMOVE, -1, tag(CLOSED, 0, 0));
        sqe->addr = tag(READABLE, 0, connection);
        sqe->flags = IOSQE_CQE_SKIP_SUCCESS;
        ring_enter(&ring, 0, NULL);
    }
    if (files == REGISTERED) {
        int none = -1;
        struct io_uring_files_update update = {.offset = (unsigned)connection, .fds = (uint64_t)(uintptr_t)&none};
        register_with_ring(&ring, IORING_REGISTER_FILES_UPDATE, &update, 1);
    }
    if (files == DIRECT) {
        struct io_uring_sqe *sqe = prepare(IORING_OP_CLOSE, 0, tag(CLOSED, 0, 0));
        sqe->file_index = (unsigned)connection + 1;
        sqe->flags = IOSQE_CQE_SKIP_SUCCESS;
        return;
    }
    close(connection);
}

static void end(int connection) {
    connections[connection].ended = true;
    if (!connections[connection].sending)
        close_connection(connection);
}

static void welcome(int connection) {
    if (connection >= CONNECTION_LIMIT)
        fail("too many connections");
    connections[connection].first = connections[connection].last = NONE;
    if (files == REGISTERED) {
        struct io_uring_files_update update = {.offset = (unsigned)connection, .fds = (uint64_t)(uintptr_t)&connection};
        if (register_with_ring(&ring, IORING_REGISTER_FILES_UPDATE, &update, 1) != 1)
            fail("IORING_REGISTER_FILES_UPDATE");
    }
    arm_receive(connection);
}

/* Sends. */

static void prepare_send(int connection, const void *data, size_t length, uint64_t user_data) {
    struct io_uring_sqe *sqe = prepare(IORING_OP_SEND, connection, user_data);
    sqe->addr = (uint64_t)(uintptr_t)data;
    sqe->len = (uint32_t)length;
    sqe->msg_flags = MSG_NOSIGNAL | MSG_WAITALL;
    sqe->ioprio = send_poll_first ? IORING_RECVSEND_POLL_FIRST : 0;
}

static void send_rest(int connection) {
    struct connection *state = &connections[connection];
    if (state->rest[state->active].length == 0)
        state->active = 1 - state->active;
    struct bytes *bytes = &state->rest[state->active];
    state->sending = bytes->length > 0;
    if (state->sending)
        prepare_send(connection, bytes->data + bytes->from, bytes->length - bytes->from, tag(SENT_REST, 0, connection));
    else if (state->ended)
        close_connection(connection);
}

/* Keeps what could not be sent yet; the caller's memory is free again. */
static void keep_rest(int connection, const void *data, size_t length) {
    struct connection *state = &connections[connection];
    bytes_append(&state->rest[state->sending ? 1 - state->active : state->active], data, length);
    short_sends++;
    if (!state->sending)
        send_rest(connection);
}

static void sent_rest(int connection, int result) {
    struct connection *state = &connections[connection];
    struct bytes *bytes = &state->rest[state->active];
    if (result < 0) {
        close_connection(connection);
        state->sending = false;
        return;
    }
    bytes->from += (size_t)result;
    if (bytes->from == bytes->length)
        bytes_clear(bytes);
    send_rest(connection);
}

static void reply_at_once(int connection, const unsigned char *data, size_t length) {
    ssize_t sent = connections[connection].sending ? 0 : send_now(connection, data, length);
    if (sent >= 0 && (size_t)sent < length)
        keep_rest(connection, data + sent, length - (size_t)sent);
}

/* One copy of the message, as a caller makes who keeps it. */
static void reply_with_copy(int connection, const unsigned char *data, size_t length) {
    unsigned char *copy = malloc(length);
    if (copy == NULL)
        fail("malloc");
    memcpy(copy, data, length);
    reply_at_once(connection, copy, length);
    free(copy);
}

static unsigned char *memory_of(unsigned buffer) { return buffers.memory + (size_t)buffer * buffers.size; }

static void send_buffer(int connection, unsigned buffer, unsigned length) {
    connections[connection].sending = true;
    prepare_send(connection, memory_of(buffer), length, tag(SENT_BUFFER, buffer, connection));
    if (sending == SEND_ZEROCOPY)
        ring.sqes[(ring.tail - 1) & ring.sq_mask].opcode = IORING_OP_SEND_ZC;
}

static void reply_by_entry(int connection, unsigned buffer, unsigned length) {
    struct connection *state = &connections[connection];
    if (!state->sending) {
        send_buffer(connection, buffer, length);
        return;
    }
    chunks[buffer].next = NONE;
    chunks[buffer].length = length;
    if (state->first == NONE)
        state->first = (int)buffer;
    else
        chunks[state->last].next = (int)buffer;
    state->last = (int)buffer;
}

static void sent_buffer(int connection, unsigned buffer, const struct io_uring_cqe *cqe) {
    struct connection *state = &connections[connection];
    if ((cqe->flags & IORING_CQE_F_MORE) == 0)
        buffer_ring_put(&buffers, buffer);
    if ((cqe->flags & IORING_CQE_F_NOTIF) != 0)
        return;
    state->sending = false;
    if (state->first != NONE) {
        unsigned next = (unsigned)state->first;
        state->first = chunks[next].next;
        send_buffer(connection, next, chunks[next].length);
    } else if (state->ended) {
        close_connection(connection);
    }
}

/* The kernel tries it while it is submitted and then has no more use for the buffer; only a short one is told of, and
 * that before the buffer is given away: see give_back. */
static void reply_silently(int connection, unsigned buffer, unsigned length) {
    if (connections[connection].sending) {
        keep_rest(connection, memory_of(buffer), length);
        buffer_ring_put(&buffers, buffer);
        return;
    }
    prepare_send(connection, memory_of(buffer), length, tag(SENT_SKIPPED, buffer, connection));
    struct io_uring_sqe *sqe = &ring.sqes[(ring.tail - 1) & ring.sq_mask];
    sqe->msg_flags |= MSG_DONTWAIT;
    sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
    chunks[buffer].length = length;
    skipped[skipped_count++] = buffer;
}

static void sent_short(int connection, unsigned buffer, int result) {
    unsigned sent = result > 0 ? (unsigned)result : 0;
    if (result >= 0 || result == -EAGAIN)
        keep_rest(connection, memory_of(buffer) + sent, chunks[buffer].length - sent);
}

/* Receives. */

static void received_bundle(int connection, unsigned first, unsigned length) {
    struct iovec pieces[PIECES];
    unsigned used[PIECES], count = 0, position = buffers.position[first];
    for (unsigned left = length; left > 0; count++) {
        unsigned size = left < buffers.size ? left : buffers.size;
        if (count == PIECES)
            fail("a bundle of too many buffers");
        used[count] = buffers.entries->bufs[(position + count) & (buffers.count - 1)].bid;
        pieces[count] = (struct iovec){memory_of(used[count]), size};
        left -= size;
    }
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
    ssize_t sent = 0;
    if (!connections[connection].sending)
        sent = sendmsg(connection, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    size_t skip = sent > 0 ? (size_t)sent : 0;
    for (unsigned i = 0; i < count; i++) {
        size_t done = skip < pieces[i].iov_len ? skip : pieces[i].iov_len;
        if (done < pieces[i].iov_len)
            keep_rest(connection, (unsigned char *)pieces[i].iov_base + done, pieces[i].iov_len - done);
        skip -= done;
        buffer_ring_put(&buffers, used[i]);
    }
}

static void received(int connection, const struct io_uring_cqe *cqe) {
    if (cqe->res == -ENOBUFS) {
        out_of_buffers++;
        arm_receive(connection);
        return;
    }
    unsigned buffer = cqe->flags >> IORING_CQE_BUFFER_SHIFT, length = (unsigned)cqe->res;
    if (cqe->res <= 0) {
        if ((cqe->flags & IORING_CQE_F_BUFFER) != 0)
            buffer_ring_put(&buffers, buffer);
        end(connection);
        return;
    }
    messages++;
    if (bundle) {
        received_bundle(connection, buffer, length);
    } else if (sending == SEND_DIRECT) {
        (copying ? reply_with_copy : reply_at_once)(connection, memory_of(buffer) + buffers.consumed[buffer], length);
        buffers.consumed[buffer] += length;
        if ((cqe->flags & CQE_BUFFER_GOES_ON) == 0)
            buffer_ring_put(&buffers, buffer);
    } else if (sending == SEND_SKIP) {
        reply_silently(connection, buffer, length);
    } else {
        reply_by_entry(connection, buffer, length);
    }
    if ((cqe->flags & IORING_CQE_F_MORE) == 0)
        arm_receive(connection);
}

static void readable(int connection, const struct io_uring_cqe *cqe) {
    if (cqe->res < 0) /* cancelled by close_connection */
        return;
    bool may_hide_the_end = ((unsigned)cqe->res & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
    ssize_t length;
    do {
        length = recv(connection, scratch, buffer_size, MSG_DONTWAIT);
        if (length == 0 || (length < 0 && errno != EAGAIN)) {
            end(connection);
            return;
        }
        if (length > 0) {
            messages++;
            reply_at_once(connection, scratch, (size_t)length);
        }
    } while (length > 0 && ((size_t)length == buffer_size || may_hide_the_end));
    if ((cqe->flags & IORING_CQE_F_MORE) == 0)
        arm_receive(connection);
}

/* The loop. */

static void accepted(const struct io_uring_cqe *cqe) {
    if (cqe->res >= 0)
        welcome(cqe->res);
    if ((cqe->flags & IORING_CQE_F_MORE) == 0)
        arm_accept();
}

static void accept_all(void) {
    int connection;
    while ((connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0)
        welcome(connection);
    arm_accept();
}

static void dispatch(const struct io_uring_cqe *cqe) {
    int connection = (int)(cqe->user_data & UINT32_MAX);
    unsigned buffer = (unsigned)(cqe->user_data >> 32) & 0xffff;
    switch ((enum kind)(cqe->user_data >> 56)) {
    case ACCEPTED:
        accepted(cqe);
        break;
    case ACCEPTABLE:
        accept_all();
        break;
    case RECEIVED:
        received(connection, cqe);
        break;
    case READABLE:
        readable(connection, cqe);
        break;
    case SENT_REST:
        sent_rest(connection, cqe->res);
        break;
    case SENT_BUFFER:
        sent_buffer(connection, buffer, cqe);
        break;
    case SENT_SKIPPED:
        sent_short(connection, buffer, cqe->res);
        break;
    case CLOSED:
        break;
    }
}

/* A batch: first everything that the last enter left in the ring, among it each short send of the batch before; only
 * then are that batch's buffers given back. */
static void serve_batch(void) {
    static unsigned before[CQ_ENTRIES];
    unsigned before_count = skipped_count;
    struct io_uring_cqe cqe;
    memcpy(before, skipped, before_count * sizeof *before);
    skipped_count = 0;
    for (unsigned left = ring_ready(&ring); left > 0 && ring_take(&ring, &cqe); left--)
        dispatch(&cqe);
    for (unsigned i = 0; i < before_count; i++)
        buffer_ring_put(&buffers, before[i]);
    if (buffers.count > 0)
        buffer_ring_publish(&buffers);
}

static void configure(char **arguments) {
    static const unsigned setup[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        IORING_SETUP_COOP_TASKRUN,
        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SINGLE_ISSUER,
        0,
    };
    int concurrency = choice(arguments, "concurrency",
                             (const char *const[]){"defer", "coop", "coop_flag", "coop_single", "none", NULL});
    files = (enum files)choice(arguments, "files", (const char *const[]){"plain", "registered", "direct", NULL});
    accepting = (enum accepting)choice(arguments, "accept", (const char *const[]){"multishot", "readiness", NULL});
    receiving = (enum receiving)choice(arguments, "receive",
                                       (const char *const[]){"ring", "oneshot", "poll", "poll_multishot", NULL});
    sending =
        (enum sending)choice(arguments, "send", (const char *const[]){"direct", "entry", "skip", "zerocopy", NULL});
    bundle = number(arguments, "bundle", 0) != 0;
    copying = number(arguments, "copy", 0) != 0;
    receive_poll_first = number(arguments, "receive_poll_first", 0) != 0;
    send_poll_first = number(arguments, "send_poll_first", 0) != 0;
    buffer_size = number(arguments, "buffer", 4096);
    if ((sending == SEND_DIRECT && files == DIRECT) || (bundle && sending != SEND_DIRECT)) {
        fprintf(stderr, "send(2) needs descriptors, and only it knows bundles here\n");
        exit(2);
    }
    ring_open(&ring, SQ_ENTRIES, CQ_ENTRIES,
              setup[concurrency] | (number(arguments, "no_sqarray", 0) != 0 ? SETUP_NO_SQARRAY : 0));
    if (number(arguments, "registered_ring", 0) != 0)
        ring_register_descriptor(&ring);
    if (receiving == RECEIVE_RING || receiving == RECEIVE_ONESHOT)
        buffer_ring_open(&buffers, &ring, number(arguments, "buffers", 1024), buffer_size,
                         number(arguments, "incremental", 0) != 0);
    else if ((scratch = malloc(buffer_size)) == NULL)
        fail("malloc");
    if (files != PLAIN) {
        struct io_uring_rsrc_register table = {.nr = FILES, .flags = IORING_RSRC_REGISTER_SPARSE};
        if (register_with_ring(&ring, IORING_REGISTER_FILES2, &table, sizeof table) != 0)
            fail("IORING_REGISTER_FILES2");
    }
}

int main(int count, char **arguments) {
    (void)count;
    check_options(arguments, (const char *const[]){"concurrency", "registered_ring", "no_sqarray", "files", "accept",
                                                   "receive", "buffer", "buffers", "incremental", "bundle", "copy",
                                                   "receive_poll_first", "send", "send_poll_first", "wait_count",
                                                   "wait_us", "min_wait_us", "port", NULL});
    configure(arguments);
    unsigned wait_count = number(arguments, "wait_count", 1);
    uint64_t wait_ns = (uint64_t)number(arguments, "wait_us", 0) * 1000;
    struct __kernel_timespec timeout = {.tv_sec = (int64_t)(wait_ns / 1000000000),
                                        .tv_nsec = (int64_t)(wait_ns % 1000000000)};
    struct wait_argument argument = {.min_wait_us = number(arguments, "min_wait_us", 0),
                                     .timeout = wait_ns > 0 ? (uint64_t)(uintptr_t)&timeout : 0};
    bool with_argument = argument.timeout != 0 || argument.min_wait_us != 0;
    if (argument.min_wait_us != 0 && (ring.features & FEATURE_MIN_TIMEOUT) == 0)
        fail("this kernel has no minimum wait");
    listener = listen_on_loopback(arguments);
    if (accepting == ACCEPT_READINESS && fcntl(listener, F_SETFL, O_NONBLOCK) < 0)
        fail("fcntl");
    arm_accept();
    while (!stopping) {
        ring_enter(&ring, wait_count, with_argument ? &argument : NULL);
        serve_batch();
    }
    printf("{\"waits\": %llu, \"receives\": %llu, \"short_sends\": %llu, \"out_of_buffers\": %llu}\n",
           (unsigned long long)ring.enters, (unsigned long long)messages, (unsigned long long)short_sends,
           (unsigned long long)out_of_buffers);
    return 0;
}
