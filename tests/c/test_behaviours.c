/* Behaviours at the edges of what the system does: errors that a receive could take, ends without an event of their own,
 * silence that is nobody's fault, limits. Each runs in a process of its own, so that one that hangs hides no other.
 *
 * ./test_behaviours [TITLE] runs all, or the one of that title.
 */
#include "check.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

#define MILLISECOND (SECOND / 1000)

static int64_t clock_ns(clockid_t clock) {
    struct timespec now;
    CHECK(clock_gettime(clock, &now) == 0);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static bool is_readable(an_descriptor descriptor, int timeout_ms) {
    struct pollfd polled = {.fd = (int)descriptor, .events = POLLIN};
    return poll(&polled, 1, timeout_ms) == 1;
}

static size_t dequeue_what_is_there(an_port *port, an_completion *completions, size_t max) {
    size_t count;
    CHECK_OK(an_port_dequeue(port, completions, max, 0, &count));
    return count;
}

/* The one completion that must come, as its kind, error and bytes alone. */
static an_completion dequeue_and_release(an_port *port) {
    an_completion completion = dequeue_one(port);
    an_completion result = completion;
    an_completion_release(&completion, 1);
    return result;
}

static void dequeue_nothing_for(an_port *port, int64_t timeout_ns) {
    an_completion completion;
    size_t count;
    CHECK_OK(an_port_dequeue(port, &completion, 1, timeout_ns, &count));
    CHECK(count == 0);
}

static an_socket *open_socket(an_port *port, int type) {
    an_socket *socket;
    CHECK_OK(an_socket_open(&socket, AF_INET, type, 0));
    CHECK_OK(an_port_associate(port, socket, NULL));
    return socket;
}

/* ---- limits ------------------------------------------------------------------------------------------------------ */

/* poll(2) refuses more entries than the process may have descriptors. */
static void more_sockets_than_half_of_the_descriptors_allowed(const char *backend) {
    enum { SOCKETS = 520, DESCRIPTORS = 1024 };
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = DESCRIPTORS;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    an_port *port = open_port(backend);
    static an_socket *sockets[SOCKETS];
    for (int i = 0; i < SOCKETS; i++)
        sockets[i] = open_socket(port, SOCK_DGRAM);
    an_address address;
    an_operation accept, connect;
    an_socket *listener = open_listener(port, &address), *client = open_socket(port, SOCK_STREAM);
    CHECK_OK(an_socket_accept(listener, &accept, 0, AN_FOREVER));
    CHECK_OK(an_socket_connect(client, &connect, &address, AN_FOREVER));
    for (int i = 0; i < 2; i++) {
        an_completion completion = dequeue_and_release(port);
        CHECK(completion.error == 0);
        if (completion.accepted != NULL)
            an_socket_free(completion.accepted, 0);
    }
    for (int i = 0; i < SOCKETS; i++)
        an_socket_free(sockets[i], 0);
    an_socket_free(listener, 0);
    an_socket_free(client, 0);
    an_port_free(port);
}

static void fill(int descriptor, int size) {
    static char data[64 << 10];
    CHECK(setsockopt(descriptor, SOL_SOCKET, SO_SNDBUF, &size, sizeof size) == 0);
    CHECK(fcntl(descriptor, F_SETFL, O_NONBLOCK) == 0);
    while (write(descriptor, data, sizeof data) > 0) {
    }
}

static void one_shot_receives_read_ahead_within_the_bound_of_the_port(const char *backend) {
    enum { SOCKETS = 400, SIZE = 256 << 10, BOUND_MIB = 64, PASSES = 500, POSTS = PASSES * 64 };
    static an_operation posts[POSTS];
    static an_socket *sockets[SOCKETS];
    static int peers[SOCKETS];
    static an_operation receives[SOCKETS];
    an_port *port = open_port(backend);
    for (int i = 0; i < SOCKETS; i++) {
        open_pair(port, &sockets[i], NULL, &peers[i]);
        fill(peers[i], 2 * SIZE);
        CHECK_OK(an_socket_recv(sockets[i], &receives[i], NULL, SIZE, 0, UINT64_MAX, AN_FOREVER));
    }
    for (int i = 0; i < POSTS; i++)
        CHECK_OK(an_port_post(port, &posts[i], NULL));
    for (int i = 0; i < POSTS; i++) /* the port receives in between, behind the posts */
        CHECK(dequeue_and_release(port).kind == AN_POST);
    an_statistics statistics;
    CHECK_OK(an_port_statistics(port, &statistics));
    CHECK(statistics.gauge_queued >= (BOUND_MIB - 2) * 4); /* four of SIZE make a MiB; what a ring brings is smaller */
    CHECK(statistics.bytes_received <= BOUND_MIB << 20);
    CHECK(statistics.gauge_buffers <= BOUND_MIB + 2); /* of 1 MiB each, and those that are kept for the next burst */
    for (int i = 0; i < SOCKETS; i++) {
        an_socket_free(sockets[i], 0);
        close(peers[i]);
    }
    an_port_free(port);
}

static void the_largest_timeout_does_not_overflow(const char *backend) {
    an_port *port = open_port(backend);
    an_socket *socket;
    an_operation receive;
    int peer;
    open_pair(port, &socket, NULL, &peer);
    CHECK_OK(an_socket_recv(socket, &receive, NULL, 4096, AN_MULTISHOT, UINT64_MAX, INT64_MAX));
    for (int i = 0; i < 3; i++) {
        CHECK(write(peer, "x", 1) == 1);
        an_completion completion = dequeue_and_release(port);
        CHECK(completion.error == 0 && completion.transferred == 1);
        CHECK_OK(an_operation_pause(socket, &receive));
        CHECK_OK(an_operation_resume(socket, &receive));
    }
    close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
}

static void sendfile_past_the_end_of_any_file_sends_nothing(const char *backend) {
    an_port *port = open_port(backend);
    an_socket *socket;
    an_operation send;
    int peer;
    open_pair(port, &socket, NULL, &peer);
    int file = open("/proc/self/exe", O_RDONLY);
    CHECK(file >= 0);
    CHECK_OK(an_socket_sendfile(socket, &send, file, INT64_MAX, UINT64_MAX, AN_FOREVER));
    an_completion completion = dequeue_and_release(port);
    CHECK(completion.error == 0 && completion.transferred == 0);
    close(peer);
    close(file);
    an_socket_free(socket, 0);
    an_port_free(port);
}

static void other_types_are_refused_and_their_descriptors_stay_open(const char *backend) {
    int ends[2];
    char byte;
    an_socket *socket = NULL;
    (void)backend;
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0);
    CHECK(an_socket_adopt(&socket, ends[0]) == AN_ENOTSUP);
    CHECK((fcntl(ends[0], F_GETFL) & O_NONBLOCK) == 0 && (fcntl(ends[0], F_GETFD) & FD_CLOEXEC) == 0);
    CHECK(write(ends[0], "x", 1) == 1 && read(ends[1], &byte, 1) == 1);
    CHECK(close(ends[0]) == 0 && close(ends[1]) == 0);
    CHECK(an_socket_open(&socket, AF_UNIX, SOCK_SEQPACKET, 0) == AN_ENOTSUP);
    CHECK(socket == NULL);
}

/* ---- the descriptor of a port -------------------------------------------------------------------------------------- */

static void a_watched_descriptor_tells_the_end_behind_the_last_bytes(const char *backend) {
    an_port *port = open_port(backend);
    an_descriptor descriptor;
    an_socket *socket;
    an_operation receive;
    an_completion completions[8];
    int peer;
    CHECK_OK(an_port_descriptor(port, &descriptor));
    open_pair(port, &socket, NULL, &peer);
    CHECK_OK(an_socket_recv(socket, &receive, NULL, 4096, AN_MULTISHOT, UINT64_MAX, AN_FOREVER));
    for (int i = 0; i < 100 && is_readable(descriptor, 0); i++)
        CHECK(dequeue_what_is_there(port, completions, 8) == 0);
    CHECK(write(peer, "hello", 5) == 5 && shutdown(peer, SHUT_WR) == 0);
    uint64_t bytes = 0;
    bool ended = false;
    for (int i = 0; i < 100 && !ended; i++) {
        CHECK(is_readable(descriptor, 5000));
        size_t count = dequeue_what_is_there(port, completions, 8);
        for (size_t k = 0; k < count; k++) {
            bytes += completions[k].transferred;
            ended = completions[k].transferred == 0;
        }
        an_completion_release(completions, count);
    }
    CHECK(ended && bytes == 5);
    close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
}

static void a_watched_descriptor_tells_more_sockets_than_one_wait_reports(const char *backend) {
    enum { SOCKETS = 300 };
    static an_socket *sockets[SOCKETS];
    static int peers[SOCKETS];
    static an_operation receives[SOCKETS];
    static an_completion completions[SOCKETS];
    an_port *port = open_port(backend);
    an_descriptor descriptor;
    CHECK_OK(an_port_descriptor(port, &descriptor));
    for (int i = 0; i < SOCKETS; i++) {
        open_pair(port, &sockets[i], NULL, &peers[i]);
        CHECK(write(peers[i], "x", 1) == 1);
    }
    for (int i = 0; i < SOCKETS && is_readable(descriptor, 0); i++)
        CHECK(dequeue_what_is_there(port, completions, SOCKETS) == 0);
    for (int i = 0; i < SOCKETS; i++)
        CHECK_OK(an_socket_recv(sockets[i], &receives[i], NULL, 4096, 0, UINT64_MAX, AN_FOREVER));
    size_t total = 0;
    for (int i = 0; i < 10 * SOCKETS && total < SOCKETS; i++) {
        CHECK(is_readable(descriptor, 5000));
        size_t count = dequeue_what_is_there(port, completions, SOCKETS);
        an_completion_release(completions, count);
        total += count;
    }
    CHECK(total == SOCKETS);
    for (int i = 0; i < SOCKETS; i++) {
        an_socket_free(sockets[i], 0);
        close(peers[i]);
    }
    an_port_free(port);
}

/* ---- connecting ------------------------------------------------------------------------------------------------------ */

static void a_receive_leaves_a_connect_under_way_its_error(const char *backend) {
    enum { SOCKETS = 300 };
    static an_socket *sockets[SOCKETS];
    static an_operation connects[SOCKETS], receives[SOCKETS];
    an_port *port = open_port(backend);
    an_address address;
    an_socket_free(open_listener(port, &address), 0); /* nobody listens there any more */
    for (int i = 0; i < SOCKETS; i++)
        sockets[i] = open_socket(port, SOCK_STREAM);
    dequeue_nothing_for(port, 0); /* what a fresh socket reports is behind us */
    for (int i = 0; i < SOCKETS; i++) {
        CHECK_OK(an_socket_connect(sockets[i], &connects[i], &address, AN_FOREVER));
        CHECK_OK(an_socket_recv(sockets[i], &receives[i], NULL, 4096, 0, UINT64_MAX, AN_FOREVER));
    }
    int failed_connects = 0;
    for (int i = 0; i < 2 * SOCKETS; i++) {
        an_completion completion = dequeue_and_release(port);
        if (completion.kind == AN_CONNECT)
            failed_connects += completion.error == AN_ECONNREFUSED;
    }
    CHECK(failed_connects == SOCKETS);
    for (int i = 0; i < SOCKETS; i++)
        an_socket_free(sockets[i], 0);
    an_port_free(port);
}

/* What a send comes to after a connect that was cancelled while it was under way. */
static int send_after_cancelled_connect(const char *backend, bool whole_socket) {
    an_port *port = open_port(backend);
    an_address address;
    an_operation connect, send;
    an_socket *listener = open_listener(port, &address), *socket = open_socket(port, SOCK_STREAM);
    size_t count = 0;
    int32_t cancelled = 0;
    CHECK_OK(an_socket_connect(socket, &connect, &address, AN_FOREVER));
    if (whole_socket)
        CHECK_OK(an_socket_cancel(socket, &count));
    else
        CHECK_OK(an_operation_cancel(socket, &connect, &cancelled));
    bool was_open = count == 1 || cancelled == 1; /* on loopback it may have been connected at once */
    CHECK(dequeue_and_release(port).error == (was_open ? AN_ECANCELED : 0));
    CHECK_OK(an_socket_send(socket, &send, "x", 1, AN_FOREVER));
    int error = dequeue_and_release(port).error;
    an_socket_free(listener, 0);
    an_socket_free(socket, 0);
    an_port_free(port);
    return error;
}

static void a_connect_is_cancelled_alike_by_itself_and_with_its_socket(const char *backend) {
    CHECK(send_after_cancelled_connect(backend, true) == send_after_cancelled_connect(backend, false));
}

/* ---- timeouts ---------------------------------------------------------------------------------------------------------- */

struct counts {
    size_t of_first;
    size_t of_second;
};

static void count_letters(int descriptor, struct counts *counts) {
    static char buffer[64 << 10];
    ssize_t length;
    while ((length = read(descriptor, buffer, sizeof buffer)) > 0) {
        for (ssize_t i = 0; i < length; i++) {
            counts->of_first += buffer[i] == 'A';
            counts->of_second += buffer[i] == 'C';
        }
    }
}

static void a_quiet_send_that_times_out_takes_none_before_it_away(const char *backend) {
    enum { LENGTH = 4 << 20, MOST_ROUNDS = 100000 };
    static char first[LENGTH];
    an_port *port = open_port(backend);
    an_socket *socket;
    an_operation last;
    int peer;
    open_pair(port, &socket, NULL, &peer);
    memset(first, 'A', LENGTH);
    CHECK_OK(an_socket_send(socket, NULL, first, LENGTH, AN_FOREVER));
    CHECK_OK(an_socket_send(socket, NULL, "BBBB", 4, 10 * MILLISECOND));
    an_completion completion = dequeue_and_release(port);
    CHECK(completion.kind == AN_SEND && completion.operation == NULL);
    CHECK(completion.error == AN_ETIMEDOUT && completion.transferred == 4);
    CHECK_OK(an_socket_send(socket, &last, "CCCC", 4, AN_FOREVER));
    CHECK(fcntl(peer, F_SETFL, O_NONBLOCK) == 0);
    struct counts counts = {0};
    size_t count = 0;
    for (int i = 0; i < MOST_ROUNDS && count == 0; i++) {
        count_letters(peer, &counts);
        CHECK_OK(an_port_dequeue(port, &completion, 1, MILLISECOND, &count));
    }
    CHECK(count == 1 && completion.error == 0);
    count_letters(peer, &counts);
    CHECK(counts.of_first == LENGTH && counts.of_second == 4);
    an_completion_release(&completion, 1);
    close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
}

static void a_receive_held_back_by_unsent_bytes_times_out_once(const char *backend) {
    static char unread[4 << 20];
    an_port *port = open_port(backend);
    an_socket *socket;
    an_operation receive;
    int peer;
    open_pair(port, &socket, NULL, &peer);
    CHECK_OK(an_socket_send(socket, NULL, unread, sizeof unread, AN_FOREVER));
    CHECK(an_socket_unsent(socket) > 1000);
    CHECK_OK(an_socket_recv(socket, &receive, NULL, 4096, AN_MULTISHOT, 1000, 50 * MILLISECOND));
    CHECK(write(peer, "x", 1) == 1); /* it must not be received: the peer reads nothing */
    an_completion completion = dequeue_and_release(port);
    CHECK(completion.operation == &receive && completion.flags == 0);
    CHECK(completion.error == AN_ETIMEDOUT && completion.transferred == 0);
    CHECK(an_port_in_flight(port) == 0);
    dequeue_nothing_for(port, 100 * MILLISECOND);
    close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
}

static void a_paused_receive_does_not_time_out_and_counts_anew_after_resume(const char *backend) {
    const int64_t timeout_ns = SECOND / 4; /* what comes before it must take less, on a busy machine too */
    an_port *port = open_port(backend);
    an_socket *socket;
    an_operation receive;
    int peer;
    open_pair(port, &socket, NULL, &peer);
    CHECK_OK(an_socket_recv(socket, &receive, NULL, 4096, AN_MULTISHOT, UINT64_MAX, timeout_ns));
    CHECK_OK(an_operation_pause(socket, &receive));
    dequeue_nothing_for(port, 4 * timeout_ns);
    CHECK(an_port_in_flight(port) == 1);
    int64_t resumed_ns = clock_ns(CLOCK_MONOTONIC);
    CHECK_OK(an_operation_resume(socket, &receive));
    an_completion completion = dequeue_and_release(port);
    CHECK(completion.operation == &receive && completion.error == AN_ETIMEDOUT && completion.flags == 0);
    CHECK(clock_ns(CLOCK_MONOTONIC) - resumed_ns >= timeout_ns);
    dequeue_nothing_for(port, 2 * timeout_ns);
    close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
}

/* Posts stand before the bytes in the queue, and the system is asked in between (each 64 completions): the deadline passes
 * in the eyes of the port while the bytes wait for a program that is busy elsewhere. */
static void a_receive_whose_bytes_nobody_dequeued_yet_does_not_time_out(const char *backend) {
    enum { POSTS = 200, BATCH = 64, BYTES = 4 };
    static an_operation posts[POSTS], receive;
    const int64_t timeout_ns = SECOND / 4; /* what comes before it must take less, on a busy machine too */
    an_port *port = open_port(backend);
    an_completion completions[BATCH];
    an_socket *socket;
    int peer;
    open_pair(port, &socket, NULL, &peer);
    CHECK_OK(an_socket_recv(socket, &receive, NULL, 1, AN_MULTISHOT, UINT64_MAX, timeout_ns));
    CHECK(write(peer, "four", BYTES) == BYTES);
    for (int i = 0; i < POSTS; i++)
        CHECK_OK(an_port_post(port, &posts[i], NULL));
    for (int i = 0; i < 2; i++) /* the bytes are received after the first */
        CHECK(dequeue_what_is_there(port, completions, BATCH) == BATCH);
    an_socket_statistics statistics;
    CHECK_OK(an_socket_statistics_get(socket, &statistics));
    CHECK(statistics.bytes_received == BYTES);
    CHECK(poll(NULL, 0, (int)(2 * timeout_ns / MILLISECOND)) == 0);  /* busy elsewhere */
    CHECK(dequeue_what_is_there(port, completions, BATCH) == BATCH); /* asks the system, the deadline has passed */
    CHECK(dequeue_what_is_there(port, completions, BATCH) == POSTS - 3 * BATCH + BYTES);
    for (size_t i = POSTS - 3 * BATCH; i < POSTS - 3 * BATCH + BYTES; i++)
        CHECK(completions[i].error == 0 && completions[i].transferred == 1 && completions[i].flags == AN_MORE);
    an_completion_release(completions, POSTS - 3 * BATCH + BYTES);
    an_completion completion = dequeue_and_release(port); /* silence from here on does end it */
    CHECK(completion.operation == &receive && completion.error == AN_ETIMEDOUT && completion.flags == 0);
    close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
}

/* ---- ends ------------------------------------------------------------------------------------------------------------------ */

/* It is readable for ever, and nothing is there. */
static void a_datagram_socket_that_was_shut_down_costs_no_processor(const char *backend) {
    const int64_t waited_ns = SECOND / 2;
    an_port *port = open_port(backend);
    an_address address;
    an_operation connect, receive;
    an_completion completion;
    size_t count;
    an_socket *socket = open_socket(port, SOCK_DGRAM);
    CHECK_OK(an_address_ip(&address, AF_INET, "127.0.0.1", 9, 0, 0));
    CHECK_OK(an_socket_connect(socket, &connect, &address, AN_FOREVER));
    CHECK(dequeue_and_release(port).error == 0);
    CHECK_OK(an_socket_shutdown(socket, SHUT_RD));
    CHECK_OK(an_socket_recv(socket, &receive, NULL, 4096, AN_MULTISHOT, UINT64_MAX, AN_FOREVER));
    int64_t before_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    CHECK_OK(an_port_dequeue(port, &completion, 1, waited_ns, &count));
    CHECK(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - before_ns < waited_ns / 3);
    an_completion_release(&completion, count);
    an_socket_free(socket, 0);
    an_port_free(port);
}

static volatile sig_atomic_t pipe_signals;

static void count_pipe_signal(int number) {
    (void)number;
    pipe_signals++;
}

struct leaving_peers {
    int rounds;
    int descriptor;
    uint32_t there; /* atomic: `descriptor` waits to be closed */
};

static void *read_a_little_and_leave(void *argument) {
    static char buffer[256 << 10];
    struct leaving_peers *peers = argument;
    for (int i = 0; i < peers->rounds; i++) {
        while (!__atomic_load_n(&peers->there, __ATOMIC_ACQUIRE))
            sched_yield();
        for (int reads = i % 6; reads > 0; reads--)
            CHECK(read(peers->descriptor, buffer, sizeof buffer) >= 0);
        close(peers->descriptor);
        __atomic_store_n(&peers->there, 0, __ATOMIC_RELEASE);
    }
    return NULL;
}

static int open_large_file(off_t size) {
    char name[] = "/tmp/an_test_XXXXXX";
    int file = mkstemp(name);
    CHECK(file >= 0 && unlink(name) == 0 && ftruncate(file, size) == 0);
    return file;
}

/* sendfile(2) has no MSG_NOSIGNAL, and raises the signal also when a part went out first. */
static void sendfile_to_a_peer_that_leaves_raises_no_signal(const char *backend) {
    enum { FILE_SIZE = 16 << 20, SEND_BUFFER = 8 << 20 };
    struct leaving_peers peers = {.rounds = 300};
    int file = open_large_file(FILE_SIZE), buffer_size = SEND_BUFFER;
    an_port *port = open_port(backend);
    pthread_t thread;
    CHECK(signal(SIGPIPE, count_pipe_signal) != SIG_ERR);
    CHECK(pthread_create(&thread, NULL, read_a_little_and_leave, &peers) == 0);
    for (int i = 0; i < peers.rounds; i++) {
        an_socket *socket;
        an_operation send;
        open_pair(port, &socket, NULL, &peers.descriptor);
        CHECK_OK(an_socket_set_option(socket, SOL_SOCKET, SO_SNDBUF, &buffer_size, sizeof buffer_size));
        __atomic_store_n(&peers.there, 1, __ATOMIC_RELEASE);
        CHECK_OK(an_socket_sendfile(socket, &send, file, 0, UINT64_MAX, AN_FOREVER));
        int error = dequeue_and_release(port).error;
        CHECK(error == AN_EPIPE || error == AN_ECONNRESET);
        while (__atomic_load_n(&peers.there, __ATOMIC_ACQUIRE))
            sched_yield();
        an_socket_free(socket, 0);
    }
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(pipe_signals == 0);
    close(file);
    an_port_free(port);
}

/* ---- state ------------------------------------------------------------------------------------------------------- */

/* What a completion shows is the state at its dequeuing, and an owner that goes can take itself out of a closed socket. */
static void the_state_is_replaced_also_on_a_closed_socket(const char *backend) {
    int first, second;
    an_operation operation;
    an_port *port = open_port(backend);
    an_socket *socket = open_socket(port, SOCK_DGRAM);
    CHECK_OK(an_port_associate(port, socket, &first));
    CHECK(an_socket_state(socket) == &first);
    CHECK_OK(an_socket_recv(socket, &operation, NULL, 1, 0, UINT64_MAX, AN_FOREVER));
    CHECK_OK(an_socket_close(socket, 0));
    an_socket_set_state(socket, &second);
    CHECK(an_socket_state(socket) == &second);
    an_completion completion = dequeue_one(port);
    CHECK(completion.error == AN_ECANCELED && completion.state == &second);
    an_socket_set_state(socket, NULL);
    CHECK(an_socket_state(completion.socket) == NULL);
    an_completion_release(&completion, 1);
    an_socket_free(socket, 0);
    an_port_free(port);
}

/* ---- closing ---------------------------------------------------------------------------------------------------- */

static an_socket *accept_one(an_port *port, an_socket *listener, const an_address *address, int *client) {
    an_operation accept;
    CHECK_OK(an_socket_accept(listener, &accept, 0, AN_FOREVER));
    *client = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(connect(*client, (const struct sockaddr *)address->storage, (socklen_t)address->length) == 0);
    an_completion completion = dequeue_one(port);
    an_socket *accepted = completion.accepted;
    completion.flags |= AN_TAKEN;
    an_completion_release(&completion, 1);
    CHECK(accepted != NULL);
    return accepted;
}

static void it_is_told_which_sockets_may_linger(const char *backend) {
    const struct linger linger = {.l_onoff = 1, .l_linger = 1};
    const int one = 1;
    an_address address;
    int ends[2], clients[3];
    an_port *port = open_port(backend);
    an_socket *listener = open_listener(port, &address);
    an_socket *plain = accept_one(port, listener, &address, &clients[0]);
    CHECK_OK(an_socket_set_option(plain, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one));
    CHECK(!an_socket_may_linger(listener) && !an_socket_may_linger(plain));
    CHECK_OK(an_socket_set_option(listener, SOL_SOCKET, SO_LINGER, &linger, sizeof linger));
    an_socket *inheriting = accept_one(port, listener, &address, &clients[1]);
    CHECK(an_socket_may_linger(listener) && an_socket_may_linger(inheriting) && !an_socket_may_linger(plain));
    CHECK(an_socket_descriptor(plain) >= 0);
    CHECK(an_socket_may_linger(plain));

    an_address shown_address;
    an_socket *shown = open_listener(port, &shown_address);
    CHECK(an_socket_descriptor(shown) >= 0); /* whoever was told may have set it */
    an_socket *of_shown = accept_one(port, shown, &shown_address, &clients[2]);
    CHECK(an_socket_may_linger(of_shown));

    an_socket *adopted;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    CHECK_OK(an_socket_adopt(&adopted, ends[0]));
    CHECK(an_socket_may_linger(adopted));

    an_socket *const all[] = {adopted, of_shown, shown, inheriting, plain, listener};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        an_socket_free(all[i], 0);
    for (size_t i = 0; i < sizeof clients / sizeof *clients; i++)
        CHECK(close(clients[i]) == 0);
    CHECK(close(ends[1]) == 0);
    an_port_free(port);
}

/* ---- what a close gives back -------------------------------------------------------------------------------------------------- */

/* Another thread may close just before the call gets to it, and then let go of all that it holds for what is started. */
static void a_refused_send_reads_nothing_of_its_callers(const char *backend) {
    an_operation operation;
    const an_address *no_address = (const an_address *)sizeof(an_address); /* read, they are a fault */
    const an_buffer *no_buffers = (const an_buffer *)sizeof(an_buffer);
    an_port *port = open_port(backend);
    an_socket *closed = open_socket(port, SOCK_DGRAM), *aborted = open_socket(port, SOCK_DGRAM);
    CHECK_OK(an_port_associate(port, closed, NULL));
    CHECK_OK(an_port_associate(port, aborted, NULL));
    CHECK_OK(an_socket_close(closed, 0));
    CHECK(an_socket_sendv(closed, &operation, no_buffers, 2, AN_FOREVER) == AN_EBADF);
    CHECK(an_socket_sendto(closed, &operation, no_buffers, 2, no_address, AN_FOREVER) == AN_EBADF);
    CHECK_OK(an_port_close(port));
    CHECK(an_socket_sendv(aborted, &operation, no_buffers, 2, AN_FOREVER) == AN_EPORTCLOSED);
    CHECK(an_socket_sendto(aborted, &operation, no_buffers, 2, no_address, AN_FOREVER) == AN_EPORTCLOSED);
    an_socket_free(closed, 0);
    an_socket_free(aborted, 0);
    an_port_free(port);
}

/* ---- running ----------------------------------------------------------------------------------------------------------------- */

/* Each value at each place. */
static void an_address_is_shown_as_inet_ntop_shows_it(const char *backend) {
    (void)backend;
    for (uint32_t number = 0; number < 4 * 256; number++) {
        uint32_t host = htonl(0x0a640900u ^ (number % 256) << number / 256 * 8);
        char expected[INET_ADDRSTRLEN], shown[AN_HOST_SIZE];
        uint16_t port;
        uint32_t flow, scope;
        an_address address;
        CHECK(inet_ntop(AF_INET, &host, expected, sizeof expected) != NULL);
        CHECK_OK(an_address_ip(&address, AF_INET, expected, 60000, 0, 0));
        CHECK_OK(an_address_format(&address, shown, &port, &flow, &scope));
        CHECK(strcmp(shown, expected) == 0 && port == 60000);
    }
}

struct behaviour {
    const char *title;
    void (*test)(const char *backend);
};

static const struct behaviour behaviours[] = {
    {"more sockets than half of the descriptors allowed", more_sockets_than_half_of_the_descriptors_allowed},
    {"one-shot receives read ahead within the bound of the port",
     one_shot_receives_read_ahead_within_the_bound_of_the_port},
    {"the largest timeout does not overflow", the_largest_timeout_does_not_overflow},
    {"sendfile past the end of any file sends nothing", sendfile_past_the_end_of_any_file_sends_nothing},
    {"other types are refused and their descriptors stay open",
     other_types_are_refused_and_their_descriptors_stay_open},
    {"a watched descriptor tells the end behind the last bytes",
     a_watched_descriptor_tells_the_end_behind_the_last_bytes},
    {"a watched descriptor tells more sockets than one wait reports",
     a_watched_descriptor_tells_more_sockets_than_one_wait_reports},
    {"a receive leaves a connect under way its error", a_receive_leaves_a_connect_under_way_its_error},
    {"a connect is cancelled alike by itself and with its socket",
     a_connect_is_cancelled_alike_by_itself_and_with_its_socket},
    {"a quiet send that times out takes none before it away", a_quiet_send_that_times_out_takes_none_before_it_away},
    {"a receive held back by unsent bytes times out once", a_receive_held_back_by_unsent_bytes_times_out_once},
    {"a paused receive does not time out and counts anew after resume",
     a_paused_receive_does_not_time_out_and_counts_anew_after_resume},
    {"a receive whose bytes nobody dequeued yet does not time out",
     a_receive_whose_bytes_nobody_dequeued_yet_does_not_time_out},
    {"a datagram socket that was shut down costs no processor",
     a_datagram_socket_that_was_shut_down_costs_no_processor},
    {"sendfile to a peer that leaves raises no signal", sendfile_to_a_peer_that_leaves_raises_no_signal},
    {"the state is replaced also on a closed socket", the_state_is_replaced_also_on_a_closed_socket},
    {"it is told which sockets may linger", it_is_told_which_sockets_may_linger},
    {"a refused send reads nothing of its caller's", a_refused_send_reads_nothing_of_its_callers},
    {"an address is shown as inet_ntop shows it", an_address_is_shown_as_inet_ntop_shows_it},
};

static const struct behaviour *current;
static int failures;

static void run_in_a_process_of_its_own(const char *backend) {
    enum { MOST_SECONDS = 60 };
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(MOST_SECONDS);
        current->test(backend);
        exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    if (status == 0)
        return;
    failures++;
    fprintf(stderr, "failed: %s [%s], wait status %#x\n", current->title, backend, (unsigned)status);
}

int main(int argc, char **argv) {
    const size_t count = sizeof behaviours / sizeof *behaviours;
    int matches = 0;
    for (current = behaviours; current < behaviours + count; current++) {
        if (argc > 1 && strcmp(argv[1], current->title) != 0)
            continue;
        matches++;
        on_each_backend(current->title, run_in_a_process_of_its_own);
    }
    CHECK(matches > 0);
    return failures == 0 ? 0 : 1;
}
