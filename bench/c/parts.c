/* parts.c - what the parts of the C interface cost, in ns of the calling thread's CPU time an operation.
 *
 *     parts [backend=auto] [rounds=15]
 *
 * Each part is measured in rounds of 64 operations a batch; printed is the least of the rounds, as one line of JSON: what
 * else ran on the machine can only have added. Sends go over a socket pair whose other side is read between the
 * measured pieces.
 */
#define _GNU_SOURCE
#include "server.h"

#include <asyncio_native.h>
#include <time.h>

enum { BATCH = 64, BATCHES = 400, MESSAGE = 64 };

struct part {
    const char *name;
    void (*run)(void); /* BATCH operations; measures its own piece by begin and end */
    double least_ns;
};

static an_port *port;
static an_socket *ours;
static int peer;
static an_operation operations[BATCH], receiving;
static an_completion batch[BATCH];
static unsigned char message[MESSAGE], drained[BATCH * MESSAGE];
static uint64_t began_ns, taken_ns;

static void check(const char *what, int error) {
    if (error != 0) {
        errno = error;
        fail(what);
    }
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void begin(void) { began_ns = now_ns(); }

static void end(void) { taken_ns += now_ns() - began_ns; }

static void drain(void) {
    for (ssize_t left = BATCH * MESSAGE, length; left > 0; left -= length)
        if ((length = read(peer, drained, (size_t)left)) <= 0)
            fail("read");
}

/* Dequeues and gives back that many completions. */
static void dequeue(size_t wanted) {
    for (size_t found = 0; wanted > 0; wanted -= found) {
        check("an_port_dequeue", an_port_dequeue(port, batch, BATCH, AN_FOREVER, &found));
        for (size_t i = 0; i < found; i++)
            check("a completion", batch[i].error == AN_ECANCELED ? 0 : batch[i].error);
        an_completion_release(batch, found);
    }
}

static void quiet_send(void) {
    begin();
    for (int i = 0; i < BATCH; i++)
        check("an_socket_send", an_socket_send(ours, NULL, message, MESSAGE, AN_FOREVER));
    end();
    drain();
}

/* The system call that stands behind each send, for comparison. */
static void bare_send(void) {
    begin();
    for (int i = 0; i < BATCH; i++)
        if (send((int)an_socket_descriptor(ours), message, MESSAGE, MSG_NOSIGNAL | MSG_DONTWAIT) != MESSAGE)
            fail("send");
    end();
    drain();
}

static void send_and_dequeue(void) {
    begin();
    for (int i = 0; i < BATCH; i++)
        check("an_socket_send", an_socket_send(ours, &operations[i], message, MESSAGE, AN_FOREVER));
    dequeue(BATCH);
    end();
    drain();
}

static void post_and_dequeue(void) {
    begin();
    for (int i = 0; i < BATCH; i++)
        check("an_port_post", an_port_post(port, &operations[i], NULL));
    dequeue(BATCH);
    end();
}

static void timer_and_cancel(void) {
    begin();
    for (int i = 0; i < BATCH; i++)
        check("an_port_timer", an_port_timer(port, &operations[i], 60000000000, NULL));
    for (int i = 0; i < BATCH; i++)
        check("an_port_cancel", an_port_cancel(port, &operations[i], NULL));
    dequeue(BATCH);
    end();
}

static void timer_that_ends(void) {
    begin();
    for (int i = 0; i < BATCH; i++)
        check("an_port_timer", an_port_timer(port, &operations[i], 0, NULL));
    dequeue(BATCH);
    end();
}

/* One message a wait: the receive, its completion and the wait itself. */
static void receive_one_by_one(void) {
    for (int i = 0; i < BATCH; i++) {
        if (write(peer, message, MESSAGE) != MESSAGE)
            fail("write");
        begin();
        dequeue(1);
        end();
    }
}

static void measure(struct part *part, unsigned rounds) {
    part->least_ns = 1e18;
    for (unsigned round = 0; round < rounds; round++) {
        taken_ns = 0;
        for (int i = 0; i < BATCHES; i++)
            part->run();
        double ns = (double)taken_ns / (BATCHES * BATCH);
        part->least_ns = ns < part->least_ns ? ns : part->least_ns;
    }
}

int main(int count, char **arguments) {
    (void)count;
    check_options(arguments, (const char *const[]){"backend", "rounds", NULL});
    an_port_options options = {.backend = option(arguments, "backend", "auto"), .concurrency = 1};
    unsigned rounds = number(arguments, "rounds", 15);
    int pair[2];
    struct part parts[] = {
        {"send_system_call", bare_send, 0},        {"send_quiet", quiet_send, 0},
        {"send_and_dequeue", send_and_dequeue, 0}, {"post_and_dequeue", post_and_dequeue, 0},
        {"timer_and_cancel", timer_and_cancel, 0}, {"timer_that_ends", timer_that_ends, 0},
        {"receive_one", receive_one_by_one, 0},
    };
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        fail("socketpair");
    peer = pair[1];
    check("an_port_open", an_port_open(&port, &options));
    check("an_socket_adopt", an_socket_adopt(&ours, pair[0]));
    check("an_port_associate", an_port_associate(port, ours, NULL));
    check("an_socket_recv", an_socket_recv(ours, &receiving, NULL, 65536, AN_MULTISHOT, UINT64_MAX, AN_FOREVER));
    printf("{\"backend\": \"%s\"", an_port_backend(port));
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        measure(&parts[i], rounds);
        printf(", \"%s\": %.1f", parts[i].name, parts[i].least_ns);
    }
    printf("}\n");
    an_socket_free(ours, 0);
    an_port_free(port);
    close(peer);
    return 0;
}
