/* load.c - the load: a closed loop of echoes over TCP or UDP, cycles of connect, echo and close, a message that the
 * server gives to all, or a download; every byte checked.
 *
 *     load port=N [mode=echo|cycles|udp|fanout|download] [connections=50] [idle=0] [size=64] [ms=400] [warm_up_ms=100]
 *          [rate=0] [pid=N] [wait=0] [check=1]
 *
 * One message is outstanding on each connection. With rate=N messages a second start at even distances, on the
 * connection that has been idle longest; their latency counts from when they were due, so that a server which keeps the
 * load waiting does not look faster for it. Beside the connections that are used stand idle=N that are not. In a fanout
 * one connection sends, and what counts is each delivery. In a download size is that of the file, of which byte i is
 * pattern(i). check=0 counts bytes without looking at them. With wait=1 it prints "ready" when all are connected and goes on after a line on its standard input.
 * Prints one line of JSON: messages, seconds, its own idle share, latencies, and the CPU time that all threads of the
 * server pid= took meanwhile. To be cheap it is an io_uring program itself: small messages come through provided
 * buffers, large ones by readiness into one warm buffer.
 */
#define _GNU_SOURCE
#include "ring.h"
#include "server.h"

#include <dirent.h>
#include <poll.h>
#include <time.h>

enum mode { ECHO, CYCLES, UDP, FANOUT, DOWNLOAD };
enum kind { DATA, READABLE, WRITABLE };

enum {
    SQ_ENTRIES = 1024,
    CQ_ENTRIES = 32768,
    SMALL = 4096, /* up to here a message comes through provided buffers */
    SMALLEST_BUFFER = 256,
    FEWEST_BUFFERS = 1024,
    MOST_BUFFERS = 32768, /* the kernel's limit */
    LEAST_TURNS = 10,     /* messages of each connection that a window should hold */
    LONGEST = 5,          /* how many times as long it may become for that */
    LARGE_BUFFER = 1 << 20,
    CONNECT_BATCH = 500,
    PATIENCE_MS = 10000,
    SHIFTS = 251, /* connections send different bytes: a mix-up is seen */
    SOURCES = 64, /* addresses to connect from, so that ports in TIME_WAIT do not run out */
    SUB_BUCKETS = 32,
    BUCKETS = 64 * SUB_BUCKETS
};

struct peer {
    int descriptor;
    size_t sent, received;
    uint64_t sent_at_ns;
    int next_idle;
};

static struct ring ring;
static struct buffer_ring buffers;
static struct peer peers[CONNECTION_LIMIT];
static unsigned char *payload, *large_buffer;
static enum mode mode;
static bool checking;
static unsigned connections, running, undelivered; /* undelivered: fanout, how many wait for the message */
static size_t size;
static struct sockaddr_in server;
static uint64_t messages, received_bytes, out_of_buffers, histogram[BUCKETS];
static uint64_t interval_ns, due_ns; /* pacing */
static int first_idle = -1, last_idle = -1;

static uint64_t clock_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* The CPU time of all threads of a process, in ns; 0 without one. */
static uint64_t cpu_ns_of(unsigned pid) {
    char path[300];
    snprintf(path, sizeof path, "/proc/%u/task", pid);
    DIR *tasks = pid != 0 ? opendir(path) : NULL;
    uint64_t sum = 0;
    for (struct dirent *task; tasks != NULL && (task = readdir(tasks)) != NULL;) {
        unsigned long long ns = 0;
        snprintf(path, sizeof path, "/proc/%u/task/%s/schedstat", pid, task->d_name);
        FILE *file = task->d_name[0] != '.' ? fopen(path, "r") : NULL;
        if (file != NULL && fscanf(file, "%llu", &ns) == 1)
            sum += ns;
        if (file != NULL)
            fclose(file);
    }
    if (tasks != NULL)
        closedir(tasks);
    return sum;
}

static unsigned char pattern(size_t i) { return (unsigned char)((i * 2654435761U) >> 13); }

/* Buckets are a power of two each, cut into SUB_BUCKETS: 3 % wide. */
static void count_latency(uint64_t ns) {
    unsigned power = 63 - (unsigned)__builtin_clzll(ns | SUB_BUCKETS);
    uint64_t sub = (ns >> (power - 5)) & (SUB_BUCKETS - 1);
    histogram[power * SUB_BUCKETS + sub]++;
}

static double quantile_us(double share) {
    uint64_t all = 0, seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++)
        all += histogram[i];
    for (unsigned i = 0; i < BUCKETS && all > 0; i++) {
        seen += histogram[i];
        if ((double)seen >= share * (double)all)
            return (double)((uint64_t)(SUB_BUCKETS + i % SUB_BUCKETS) << (i / SUB_BUCKETS - 5)) / 1000;
    }
    return 0;
}

static void broken(const char *what) {
    fprintf(stderr, "load: %s\n", what);
    exit(1);
}

static void arm(unsigned peer, enum kind kind) {
    struct io_uring_sqe *sqe = ring_next_sqe(&ring);
    sqe->fd = peers[peer].descriptor;
    sqe->user_data = (uint64_t)kind << 32 | peer;
    if (kind == DATA) {
        sqe->opcode = IORING_OP_RECV;
        sqe->flags = IOSQE_BUFFER_SELECT;
        sqe->ioprio = IORING_RECV_MULTISHOT;
        return;
    }
    sqe->opcode = IORING_OP_POLL_ADD;
    sqe->poll32_events = kind == READABLE ? POLLIN : POLLOUT;
    sqe->len = kind == READABLE && mode == ECHO ? IORING_POLL_ADD_MULTI : 0;
}

/* In a fanout all receive what the first one sent. */
static const unsigned char *expected_by(unsigned peer) { return payload + (mode == FANOUT ? 0 : peer % SHIFTS); }

static void connect_peer(unsigned peer) {
    static unsigned turn;
    int descriptor = socket(AF_INET, (mode == UDP ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK + turn++ % SOURCES)};
    if (descriptor < 0 || (mode != UDP && setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0) ||
        setsockopt(descriptor, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one) < 0 ||
        bind(descriptor, (struct sockaddr *)&source, sizeof source) < 0 ||
        connect(descriptor, (struct sockaddr *)&server, sizeof server) < 0)
        die("connect");
    peers[peer] = (struct peer){.descriptor = descriptor, .next_idle = -1};
}

/* One byte there and back shows that the server has accepted this connection and those before it. */
static void prove_accepted(unsigned peer) {
    struct pollfd reply = {.fd = peers[peer].descriptor, .events = POLLIN};
    unsigned char byte = 1;
    if (send(reply.fd, &byte, 1, MSG_NOSIGNAL) != 1 || poll(&reply, 1, PATIENCE_MS) != 1 ||
        recv(reply.fd, &byte, 1, 0) != 1 || byte != 1)
        broken("the first byte did not come back");
}

/* For a fanout each connection asks, as a server may well hear the last before it has counted the others in. */
static void connect_all(unsigned count) {
    for (unsigned peer = 0; peer < count; peer++) {
        connect_peer(peer);
        if (mode == FANOUT || (mode == ECHO && (peer % CONNECT_BATCH == CONNECT_BATCH - 1 || peer == count - 1)))
            prove_accepted(peer);
    }
}

static void go_on_sending(unsigned peer) {
    struct peer *state = &peers[peer];
    ssize_t sent = send_now(state->descriptor, expected_by(peer) + state->sent, size - state->sent);
    if (sent < 0)
        broken("the server reset a connection");
    state->sent += (size_t)sent;
    if (state->sent < size)
        arm(peer, WRITABLE);
}

static void start_message(unsigned peer, uint64_t now_ns) {
    peers[peer].sent = peers[peer].received = 0;
    peers[peer].sent_at_ns = now_ns;
    undelivered = connections;
    go_on_sending(peer);
}

static void become_idle(unsigned peer) {
    peers[peer].next_idle = -1;
    if (first_idle < 0)
        first_idle = (int)peer;
    else
        peers[last_idle].next_idle = (int)peer;
    last_idle = (int)peer;
}

static void start_what_is_due(void) {
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    for (; first_idle >= 0 && due_ns <= now; due_ns += interval_ns) {
        unsigned peer = (unsigned)first_idle;
        first_idle = peers[peer].next_idle;
        start_message(peer, due_ns);
    }
}

static void message_came_back(unsigned peer) {
    uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
    messages++;
    count_latency(now_ns - peers[mode == FANOUT ? 0 : peer].sent_at_ns);
    if (mode == CYCLES) {
        close(peers[peer].descriptor);
        connect_peer(peer);
        arm(peer, READABLE);
    }
    if (mode == FANOUT) {
        peers[peer].received = 0;
        if (--undelivered == 0)
            start_message(0, now_ns);
    } else if (interval_ns > 0) {
        become_idle(peer);
    } else {
        start_message(peer, now_ns);
    }
}

static void check(unsigned peer, const unsigned char *data, size_t length) {
    struct peer *state = &peers[peer];
    const unsigned char *expected = mode == DOWNLOAD ? payload : expected_by(peer);
    if (state->received + length > size || (checking && memcmp(data, expected + state->received, length) != 0))
        broken("other bytes came back than were sent");
    state->received += length;
    received_bytes += length;
}

/* False if this connection is not to be watched any longer. */
static bool read_large(unsigned peer) {
    struct peer *state = &peers[peer];
    ssize_t length;
    do {
        length = recv(state->descriptor, large_buffer, LARGE_BUFFER, MSG_DONTWAIT);
        if (length < 0 && errno == EAGAIN)
            return true;
        if (length < 0 || (length == 0 && mode != DOWNLOAD))
            broken("the server closed a connection");
        if (length == 0) {
            if (state->received != size)
                broken("the file ended early");
            messages++;
            running--;
            return false;
        }
        check(peer, large_buffer, (size_t)length);
        if (mode != DOWNLOAD && state->received == size) {
            message_came_back(peer);
            return mode != CYCLES; /* a new cycle watches its new connection itself */
        }
    } while (length == LARGE_BUFFER);
    return true;
}

static void handle(const struct io_uring_cqe *cqe) {
    unsigned peer = (unsigned)(cqe->user_data & UINT32_MAX);
    switch ((enum kind)(cqe->user_data >> 32)) {
    case DATA:
        if (cqe->res == -ENOBUFS) {
            out_of_buffers++;
        } else if (cqe->res <= 0) {
            broken("the server closed a connection");
        } else {
            unsigned buffer = cqe->flags >> IORING_CQE_BUFFER_SHIFT;
            check(peer, buffers.memory + (size_t)buffer * buffers.size, (size_t)cqe->res);
            buffer_ring_put(&buffers, buffer);
            if (peers[peer].received == size)
                message_came_back(peer);
        }
        if ((cqe->flags & IORING_CQE_F_MORE) == 0)
            arm(peer, DATA);
        break;
    case READABLE:
        if (read_large(peer) && (cqe->flags & IORING_CQE_F_MORE) == 0)
            arm(peer, READABLE);
        break;
    case WRITABLE:
        go_on_sending(peer);
        break;
    }
}

/* Runs until that time, or until nothing is left to do. */
static void run_until(uint64_t end_ns) {
    struct __kernel_timespec timeout = {.tv_nsec = 50000000};
    struct wait_argument argument = {.timeout = (uint64_t)(uintptr_t)&timeout};
    while (running > 0 && clock_ns(CLOCK_MONOTONIC) < end_ns) {
        struct io_uring_cqe cqe;
        if (interval_ns > 0) { /* spins, as a timer's grain would show in the latency */
            start_what_is_due();
            timeout.tv_nsec = 0;
        }
        ring_enter(&ring, 1, &argument);
        /* Not more than there is now: a receive without a buffer fails at once, again and again, until they are given
         * back behind the loop. */
        for (unsigned left = ring_ready(&ring); left > 0 && ring_take(&ring, &cqe); left--)
            handle(&cqe);
        if (buffers.count > 0)
            buffer_ring_publish(&buffers);
    }
}

static void configure(char **arguments) {
    check_options(arguments, (const char *const[]){"port", "mode", "connections", "idle", "size", "ms", "warm_up_ms",
                                                   "rate", "pid", "wait", "check", NULL});
    mode = (enum mode)choice(arguments, "mode",
                             (const char *const[]){"echo", "cycles", "udp", "fanout", "download", NULL});
    connections = running = number(arguments, "connections", 50);
    size = number(arguments, "size", 64);
    checking = number(arguments, "check", 1) != 0;
    unsigned rate = number(arguments, "rate", 0);
    interval_ns = rate > 0 ? 1000000000 / rate : 0;
    server = (struct sockaddr_in){.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)number(arguments, "port", 0))};
    payload = malloc(size + SHIFTS);
    large_buffer = malloc(LARGE_BUFFER);
    if (payload == NULL || large_buffer == NULL)
        die("malloc");
    for (size_t i = 0; i < size + SHIFTS; i++)
        payload[i] = pattern(i);
}

/* As few as will do, as the kernel takes them in turn and each one used has its place in the cache. */
static void open_buffers(void) {
    unsigned count = FEWEST_BUFFERS, bytes = SMALLEST_BUFFER;
    while (count < MOST_BUFFERS && count < connections)
        count *= 2;
    while (bytes < size)
        bytes *= 2;
    buffer_ring_open(&buffers, &ring, count, bytes, false);
}

static void await_start(void) {
    printf("ready\n");
    fflush(stdout);
    if (getchar() != '\n')
        broken("was not told to start");
}

static void start_all(bool small) {
    due_ns = clock_ns(CLOCK_MONOTONIC);
    for (unsigned peer = 0; peer < connections; peer++) {
        arm(peer, small ? DATA : READABLE);
        if (interval_ns > 0)
            become_idle(peer);
        else if (mode != DOWNLOAD && (mode != FANOUT || peer == connections - 1))
            start_message(mode == FANOUT ? 0 : peer, clock_ns(CLOCK_MONOTONIC));
    }
}

/* What comes in at the window's edges was worked for outside of it, which must not weigh. */
static void extend_window(uint64_t began_ns, uint64_t limit_ns) {
    for (unsigned times = 2; times <= LONGEST && messages < (uint64_t)LEAST_TURNS * connections; times++)
        run_until(began_ns + times * limit_ns);
}

int main(int count, char **arguments) {
    (void)count;
    configure(arguments);
    unsigned idle = number(arguments, "idle", 0), pid = number(arguments, "pid", 0);
    bool small = (mode == ECHO || mode == UDP || mode == FANOUT) && size <= SMALL;
    if (connections == 0 || connections + idle > CONNECTION_LIMIT || ((mode == UDP || mode == FANOUT) && !small))
        broken("so many connections, or messages so large, are not provided for");
    ring_open(&ring, SQ_ENTRIES, CQ_ENTRIES, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
    ring_register_descriptor(&ring);
    if (small)
        open_buffers();
    uint64_t cpu_before = cpu_ns_of(pid), own_before = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    uint64_t began_ns = clock_ns(CLOCK_MONOTONIC);
    connect_all(connections + idle);
    if (number(arguments, "wait", 0) != 0)
        await_start();
    start_all(small);
    uint64_t limit_ns = (uint64_t)number(arguments, "ms", 400) * 1000000;
    if (mode != DOWNLOAD) {
        run_until(clock_ns(CLOCK_MONOTONIC) + (uint64_t)number(arguments, "warm_up_ms", 100) * 1000000);
        memset(histogram, 0, sizeof histogram);
        messages = received_bytes = 0;
        cpu_before = cpu_ns_of(pid);
        own_before = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
        began_ns = clock_ns(CLOCK_MONOTONIC);
    }
    run_until(began_ns + limit_ns);
    if (mode != DOWNLOAD && interval_ns == 0)
        extend_window(began_ns, limit_ns);
    uint64_t lasted_ns = clock_ns(CLOCK_MONOTONIC) - began_ns;
    uint64_t own_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - own_before, server_ns = cpu_ns_of(pid) - cpu_before;
    if (mode == DOWNLOAD && running > 0)
        broken("the download did not end in time");
    printf("{\"messages\": %llu, \"bytes\": %llu, \"seconds\": %.6f, \"idle\": %.4f, \"server_cpu_ns\": %llu, "
           "\"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f, \"out_of_buffers\": %llu}\n",
           (unsigned long long)messages, (unsigned long long)received_bytes, (double)lasted_ns / 1e9,
           1 - (double)own_ns / (double)lasted_ns, (unsigned long long)server_ns, quantile_us(0.5), quantile_us(0.99),
           quantile_us(0.999), (unsigned long long)out_of_buffers);
    return 0;
}
