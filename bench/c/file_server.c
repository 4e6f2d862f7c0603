/* file_server.c - one file to each client that connects: sendfile(2) by readiness against splice in the ring.
 *
 *     file_server [way=sendfile|splice] [mib=64] [piece=1048576]
 *
 * sendfile: without blocking until the socket is full, then a one-shot poll; after one piece it is the next client's turn.
 * splice: through a pipe for each client, file to pipe linked with pipe to socket; what a link breaks off in the middle
 * is sent on from the pipe. The kernel runs splice on worker threads of the process; they stay on the server's core.
 * The file is anonymous memory in which byte i is pattern(i), and so in the page cache.
 */
#define _GNU_SOURCE
#include "ring.h"
#include "server.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/sendfile.h>

enum kind { ACCEPTED, WRITABLE, FILLED, DRAINED };

enum { SQ_ENTRIES = 1024, CQ_ENTRIES = 8192, CONNECTIONS = 1024, REGISTER_IOWQ_AFF = 17 };

struct client {
    loff_t offset; /* of the file, what went out or into the pipe */
    int pipe[2];
    unsigned in_pipe;
    unsigned pending; /* completions of the linked pair that are still to come */
};

static struct ring ring;
static struct client clients[CONNECTIONS];
static int listener, file;
static loff_t size;
static unsigned piece;
static bool splicing;

static unsigned char pattern(size_t i) { return (unsigned char)((i * 2654435761U) >> 13); }

static void make_file(void) {
    file = memfd_create("file", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, size) < 0)
        fail("memfd_create");
    unsigned char *memory = map_memory((size_t)size, file, 0);
    for (size_t i = 0; i < (size_t)size; i++)
        memory[i] = pattern(i);
    munmap(memory, (size_t)size);
}

static struct io_uring_sqe *prepare(enum io_uring_op operation, int descriptor, enum kind kind, int client) {
    struct io_uring_sqe *sqe = ring_next_sqe(&ring);
    sqe->opcode = (uint8_t)operation;
    sqe->fd = descriptor;
    sqe->user_data = (uint64_t)kind << 32 | (unsigned)client;
    return sqe;
}

static void arm_accept(void) { prepare(IORING_OP_ACCEPT, listener, ACCEPTED, 0)->ioprio = IORING_ACCEPT_MULTISHOT; }

static void end(int client) {
    if (splicing) {
        close(clients[client].pipe[0]);
        close(clients[client].pipe[1]);
    }
    close(client);
}

static void send_piece(int client) {
    struct client *state = &clients[client];
    loff_t until = state->offset + piece < size ? state->offset + piece : size;
    ssize_t sent = 1;
    while (sent > 0 && state->offset < until)
        sent = sendfile(client, file, &state->offset, (size_t)(until - state->offset));
    if (state->offset == size || (sent < 0 && errno != EAGAIN))
        end(client);
    else
        prepare(IORING_OP_POLL_ADD, client, WRITABLE, client)->poll32_events = POLLOUT;
}

static void prepare_splice(int client, enum kind kind, unsigned length, uint8_t flags) {
    struct client *state = &clients[client];
    struct io_uring_sqe *sqe = prepare(IORING_OP_SPLICE, kind == FILLED ? state->pipe[1] : client, kind, client);
    sqe->splice_fd_in = kind == FILLED ? file : state->pipe[0];
    sqe->splice_off_in = kind == FILLED ? (uint64_t)state->offset : UINT64_MAX;
    sqe->off = UINT64_MAX;
    sqe->len = length;
    sqe->flags = flags;
    state->pending++;
}

static void splice_piece(int client) {
    struct client *state = &clients[client];
    loff_t left = size - state->offset;
    unsigned length = left < piece ? (unsigned)left : piece;
    if (state->in_pipe > 0) {
        prepare_splice(client, DRAINED, state->in_pipe, 0);
    } else if (left == 0) {
        end(client);
    } else {
        if (ring.sq_entries - (ring.tail - ring.submitted) < 2) /* a link must not be cut by a submission */
            ring_enter(&ring, 0, NULL);
        prepare_splice(client, FILLED, length, IOSQE_IO_LINK);
        prepare_splice(client, DRAINED, length, 0);
    }
}

static void spliced(int client, enum kind kind, int result) {
    struct client *state = &clients[client];
    state->pending--;
    if (kind == FILLED && result > 0) {
        state->offset += result;
        state->in_pipe += (unsigned)result;
    } else if (kind == DRAINED && result > 0) {
        state->in_pipe -= (unsigned)result;
    } else if (result != -ECANCELED && result != -EINTR && result != -EAGAIN) {
        state->in_pipe = 0;
        state->offset = size; /* the peer is gone */
    }
    if (state->pending == 0)
        splice_piece(client);
}

static void welcome(int client) {
    if (client < 0)
        return;
    if (client >= CONNECTIONS)
        fail("too many connections");
    clients[client] = (struct client){0};
    if (!splicing) {
        if (fcntl(client, F_SETFL, O_NONBLOCK) < 0)
            fail("fcntl");
        send_piece(client);
        return;
    }
    if (pipe2(clients[client].pipe, O_CLOEXEC) < 0 || fcntl(clients[client].pipe[1], F_SETPIPE_SZ, piece) < 0)
        fail("pipe");
    splice_piece(client);
}

static void dispatch(const struct io_uring_cqe *cqe) {
    int client = (int)(cqe->user_data & UINT32_MAX);
    enum kind kind = (enum kind)(cqe->user_data >> 32);
    if (kind == ACCEPTED)
        welcome(cqe->res);
    else if (kind == WRITABLE)
        send_piece(client);
    else
        spliced(client, kind, cqe->res);
    if (kind == ACCEPTED && (cqe->flags & IORING_CQE_F_MORE) == 0)
        arm_accept();
}

int main(int count, char **arguments) {
    (void)count;
    check_options(arguments, (const char *const[]){"way", "mib", "piece", NULL});
    splicing = choice(arguments, "way", (const char *const[]){"sendfile", "splice", NULL}) == 1;
    size = (loff_t)number(arguments, "mib", 64) << 20;
    piece = number(arguments, "piece", 1 << 20);
    make_file();
    ring_open(&ring, SQ_ENTRIES, CQ_ENTRIES, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores) < 0 ||
        register_with_ring(&ring, REGISTER_IOWQ_AFF, &cores, sizeof cores) < 0)
        fail("IORING_REGISTER_IOWQ_AFF");
    listener = listen_on_loopback(arguments);
    arm_accept();
    while (!stopping) {
        struct io_uring_cqe cqe;
        ring_enter(&ring, 1, NULL);
        while (ring_take(&ring, &cqe))
            dispatch(&cqe);
    }
    printf("{\"waits\": %llu}\n", (unsigned long long)ring.enters);
    return 0;
}
