/* test_review_findings.c - traps that a review of the core found. */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

#include "check.h"

static bool readable(an_descriptor d, int ms) {
    struct pollfd p = {.fd = (int)d, .events = POLLIN};
    return poll(&p, 1, ms) == 1;
}

static size_t drain(an_port *port, an_completion *c, size_t max) {
    size_t n = 0;
    CHECK_OK(an_port_dequeue(port, c, max, 0, &n));
    return n;
}

/* 1: more than 512 sockets under a limit of 1024 descriptors: poll(2) refuses more entries than the limit. */
static void test_many(const char *backend) {
    struct rlimit before, limit;
    getrlimit(RLIMIT_NOFILE, &before);
    limit = before;
    limit.rlim_cur = 1024;
    setrlimit(RLIMIT_NOFILE, &limit);
    an_port *port = open_port(backend);
    enum { N = 520 };
    static an_socket *s[N];
    for (int i = 0; i < N; i++) {
        CHECK_OK(an_socket_open(&s[i], AF_INET, SOCK_DGRAM, 0));
        CHECK_OK(an_port_associate(port, s[i], NULL));
    }
    an_address a;
    an_socket *l = open_listener(port, &a);
    an_operation acc, con;
    an_socket *c;
    CHECK_OK(an_socket_accept(l, &acc, 0, AN_FOREVER));
    CHECK_OK(an_socket_open(&c, AF_INET, SOCK_STREAM, 0));
    CHECK_OK(an_port_associate(port, c, NULL));
    CHECK_OK(an_socket_connect(c, &con, &a, AN_FOREVER));
    an_completion comp[2];
    size_t n = 0;
    int got = 0;
    for (int i = 0; i < 2 && got < 2; i++) {
        CHECK_OK(an_port_dequeue(port, comp, 2, SECOND, &n));
        for (size_t k = 0; k < n; k++) {
            CHECK(comp[k].error == 0);
            if (comp[k].accepted)
                an_socket_free(comp[k].accepted, 0);
        }
        an_completion_release(comp, n);
        got += (int)n;
    }
    CHECK(got == 2);
    for (int i = 0; i < N; i++)
        an_socket_free(s[i], 0);
    an_socket_free(l, 0);
    an_socket_free(c, 0);
    an_port_free(port);
    setrlimit(RLIMIT_NOFILE, &before);
}

/* 2: data and end of stream in one go, seen through the descriptor alone. */
static void test_watch_end(const char *backend) {
    an_port *port = open_port(backend);
    an_descriptor d;
    CHECK_OK(an_port_descriptor(port, &d));
    an_socket *s;
    int peer;
    open_pair(port, &s, NULL, &peer);
    an_operation op;
    CHECK_OK(an_socket_recv(s, &op, NULL, 4096, AN_MULTISHOT, UINT64_MAX, AN_FOREVER));
    an_completion c[8];
    while (readable(d, 0))
        CHECK(drain(port, c, 8) == 0);
    CHECK(write(peer, "hello", 5) == 5);
    shutdown(peer, SHUT_WR);
    bool data = false, end = false;
    while (!end) {
        CHECK(readable(d, 1000));
        size_t n = drain(port, c, 8);
        for (size_t i = 0; i < n; i++) {
            if (c[i].transferred == 5)
                data = true;
            else
                end = true;
        }
        an_completion_release(c, n);
    }
    CHECK(data);
    close(peer);
    an_socket_free(s, 0);
    an_port_free(port);
}

/* 3: a quiet send that timed out must not take away those that stand before it, least of all one that is half out. */
static void test_quiet_timeout(const char *backend) {
    an_port *port = open_port(backend);
    an_socket *s;
    int peer;
    open_pair(port, &s, NULL, &peer);
    enum { BIG = 4 << 20 };
    char *big = malloc(BIG);
    memset(big, 'A', BIG);
    CHECK_OK(an_socket_send(s, NULL, big, BIG, AN_FOREVER));
    CHECK_OK(an_socket_send(s, NULL, "BBBB", 4, 10 * 1000000));
    an_completion c = dequeue_one(port);
    printf("   completion: kind %d error %d lost %llu unsent %llu\n", c.kind, c.error, (unsigned long long)c.transferred,
           (unsigned long long)an_socket_unsent(s));
    an_completion_release(&c, 1);
    an_operation op;
    CHECK_OK(an_socket_send(s, &op, "CCCC", 4, AN_FOREVER));
    fcntl(peer, F_SETFL, O_NONBLOCK);
    size_t as = 0, cs = 0;
    char buffer[65536];
    size_t n = 0;
    for (int i = 0; i < 100000 && n == 0; i++) {
        ssize_t got;
        while ((got = read(peer, buffer, sizeof buffer)) > 0)
            for (ssize_t k = 0; k < got; k++) {
                as += buffer[k] == 'A';
                cs += buffer[k] == 'C';
            }
        CHECK_OK(an_port_dequeue(port, &c, 1, 1000000, &n));
    }
    CHECK(n == 1);
    ssize_t got;
    while ((got = read(peer, buffer, sizeof buffer)) > 0)
        for (ssize_t k = 0; k < got; k++) {
            as += buffer[k] == 'A';
            cs += buffer[k] == 'C';
        }
    printf("   C send: error %d; peer got A %zu of %d, C %zu\n", c.error, as, BIG, cs);
    CHECK(cs == 0 || as == BIG);
    an_completion_release(&c, 1);
    close(peer);
    free(big);
    an_socket_free(s, 0);
    an_port_free(port);
}

/* 4: a receive that starts with the connect must not take the connect's error away from it. */
static void test_connect_and_receive(const char *backend) {
    an_port *port = open_port(backend);
    enum { N = 300 };
    static an_socket *s[N];
    static an_operation con[N], rec[N];
    static an_completion c[1024];
    an_address a;
    an_socket *l = open_listener(port, &a);
    an_socket_free(l, 0); /* nobody listens there now */
    for (int i = 0; i < N; i++) {
        CHECK_OK(an_socket_open(&s[i], AF_INET, SOCK_STREAM, 0));
        CHECK_OK(an_port_associate(port, s[i], NULL));
    }
    for (int i = 0; i < 4; i++)
        CHECK(drain(port, c, 1024) == 0);
    for (int i = 0; i < N; i++) {
        CHECK_OK(an_socket_connect(s[i], &con[i], &a, AN_FOREVER));
        CHECK_OK(an_socket_recv(s[i], &rec[i], NULL, 4096, 0, UINT64_MAX, AN_FOREVER));
    }
    size_t total = 0, connects = 0;
    while (total < 2 * N) {
        size_t n = 0;
        CHECK_OK(an_port_dequeue(port, c, 1024, SECOND, &n));
        if (n == 0)
            break;
        for (size_t i = 0; i < n; i++)
            connects += c[i].kind == AN_CONNECT;
        an_completion_release(c, n);
        total += n;
    }
    printf("   %zu of %d, connects %zu\n", total, 2 * N, connects);
    CHECK(total == 2 * N);
    for (int i = 0; i < N; i++)
        an_socket_free(s[i], 0);
    an_port_free(port);
}

/* 5: more reports than one wait takes, seen through the descriptor alone. */
static void test_watch_many(const char *backend) {
    an_port *port = open_port(backend);
    an_descriptor d;
    CHECK_OK(an_port_descriptor(port, &d));
    enum { N = 300 };
    static an_socket *s[N];
    static int peer[N];
    static an_operation op[N];
    static an_completion c[1024];
    for (int i = 0; i < N; i++) {
        open_pair(port, &s[i], NULL, &peer[i]);
        CHECK(write(peer[i], "x", 1) == 1);
    }
    while (readable(d, 0))
        CHECK(drain(port, c, 1024) == 0);
    for (int i = 0; i < N; i++)
        CHECK_OK(an_socket_recv(s[i], &op[i], NULL, 4096, 0, UINT64_MAX, AN_FOREVER));
    size_t total = 0;
    while (total < N) {
        CHECK(readable(d, 1000));
        size_t n = drain(port, c, 1024);
        an_completion_release(c, n);
        total += n;
    }
    for (int i = 0; i < N; i++) {
        an_socket_free(s[i], 0);
        close(peer[i]);
    }
    an_port_free(port);
}

/* 6: a timeout close to INT64_MAX on a multishot. */
static void test_huge_timeout(const char *backend) {
    an_port *port = open_port(backend);
    an_socket *s;
    int peer;
    open_pair(port, &s, NULL, &peer);
    an_operation op;
    CHECK_OK(an_socket_recv(s, &op, NULL, 4096, AN_MULTISHOT, UINT64_MAX, INT64_MAX));
    for (int i = 0; i < 3; i++) {
        CHECK(write(peer, "x", 1) == 1);
        an_completion c = dequeue_one(port);
        CHECK(c.error == 0 && c.transferred == 1);
        an_completion_release(&c, 1);
        CHECK_OK(an_operation_pause(s, &op));
        CHECK_OK(an_operation_resume(s, &op));
    }
    close(peer);
    an_socket_free(s, 0);
    an_port_free(port);
}

/* 7: messages of SOCK_SEQPACKET stay apart (or the type is refused). */
static void test_seqpacket(const char *backend) {
    an_port *port = open_port(backend);
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0);
    an_socket *s;
    if (an_socket_adopt(&s, ends[0]) != 0)
        return;
    CHECK_OK(an_port_associate(port, s, NULL));
    static an_operation op[1000];
    static char data[2000];
    int started = 0;
    for (; started < 1000; started++)
        CHECK_OK(an_socket_send(s, &op[started], data, sizeof data, AN_FOREVER));
    static char big[1 << 20];
    fcntl(ends[1], F_SETFL, O_NONBLOCK);
    size_t n = 0, done = 0;
    static an_completion c[64];
    for (int i = 0; i < 100000 && done < 1000; i++) {
        ssize_t got;
        while ((got = recv(ends[1], big, sizeof big, 0)) > 0) {
            if (got != sizeof data)
                printf("   a message of %zd bytes\n", got);
            CHECK(got == sizeof data);
        }
        CHECK_OK(an_port_dequeue(port, c, 64, 1000000, &n));
        an_completion_release(c, n);
        done += n;
    }
    CHECK(done == 1000);
    close(ends[1]);
    an_socket_free(s, 0);
    an_port_free(port);
}

static double cpu(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* 9: a datagram socket whose receiving side was shut down is readable for ever and has nothing. */
static void test_datagram_shutdown(const char *backend) {
    an_port *port = open_port(backend);
    an_socket *s;
    an_address a;
    CHECK_OK(an_socket_open(&s, AF_INET, SOCK_DGRAM, 0));
    CHECK_OK(an_address_ip(&a, AF_INET, "127.0.0.1", 9, 0, 0));
    CHECK_OK(an_port_associate(port, s, NULL));
    an_operation con, op;
    CHECK_OK(an_socket_connect(s, &con, &a, AN_FOREVER));
    an_completion c = dequeue_one(port);
    CHECK(c.error == 0);
    an_completion_release(&c, 1);
    CHECK_OK(an_socket_shutdown(s, 0));
    CHECK_OK(an_socket_recv(s, &op, NULL, 4096, AN_MULTISHOT, UINT64_MAX, AN_FOREVER));
    double before = cpu();
    size_t n;
    CHECK_OK(an_port_dequeue(port, &c, 1, SECOND, &n));
    double used = cpu() - before;
    printf("   %zu completions, CPU %.3f s of 1\n", n, used);
    CHECK(used < 0.3);
    an_completion_release(&c, n);
    an_socket_free(s, 0);
    an_port_free(port);
}

/* 10: read ahead of one-shot receives. */
static void test_one_shot_ahead(const char *backend) {
    an_port *port = open_port(backend);
    enum { N = 400, SIZE = 256 << 10 };
    static an_socket *s[N];
    static int peer[N];
    static an_operation op[N];
    static char data[SIZE];
    for (int i = 0; i < N; i++) {
        open_pair(port, &s[i], NULL, &peer[i]);
        int size = 2 * SIZE;
        setsockopt(peer[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        fcntl(peer[i], F_SETFL, O_NONBLOCK);
        while (write(peer[i], data, sizeof data) > 0) {
        }
        CHECK_OK(an_socket_recv(s[i], &op[i], NULL, SIZE, 0, UINT64_MAX, AN_FOREVER));
    }
    an_operation post;
    CHECK_OK(an_port_post(port, &post, NULL));
    for (int i = 0; i < 1; i++) {
        an_completion c;
        size_t n;
        CHECK_OK(an_port_dequeue(port, &c, 1, SECOND, &n));
        an_completion_release(&c, n);
    }
    for (int i = 0; i < 70; i++) {
        an_completion c;
        size_t n;
        CHECK_OK(an_port_dequeue(port, &c, 1, SECOND, &n));
        an_completion_release(&c, n);
    }
    an_statistics st;
    CHECK_OK(an_port_statistics(port, &st));
    printf("   read ahead: %llu records, chunks %llu MiB\n", (unsigned long long)st.gauge_queued,
           (unsigned long long)st.gauge_buffers);
    for (int i = 0; i < N; i++) {
        an_socket_free(s[i], 0);
        close(peer[i]);
    }
    an_port_free(port);
    CHECK(st.gauge_buffers <= 66);
}

/* 11: a multishot that stands still because of its own unsent bytes must not time out for silence. */
static void test_held_timeout(const char *backend) {
    an_port *port = open_port(backend);
    an_socket *s;
    int peer;
    open_pair(port, &s, NULL, &peer);
    static char big[4 << 20];
    an_operation op;
    CHECK_OK(an_socket_send(s, NULL, big, sizeof big, AN_FOREVER));
    CHECK_OK(an_socket_recv(s, &op, NULL, 4096, AN_MULTISHOT, 1000, SECOND / 5));
    CHECK(write(peer, "x", 1) == 1);
    an_completion c;
    size_t n;
    CHECK_OK(an_port_dequeue(port, &c, 1, SECOND / 2, &n));
    if (n)
        printf("   error %d although a byte is there\n", c.error);
    CHECK(n == 0);
    close(peer);
    an_socket_free(s, 0);
    an_port_free(port);
}

/* 14: sendfile at the largest offset is just past the end. */
static void test_sendfile_far(const char *backend) {
    an_port *port = open_port(backend);
    an_socket *s;
    int peer;
    open_pair(port, &s, NULL, &peer);
    int file = open("/proc/self/exe", O_RDONLY);
    an_operation op;
    CHECK_OK(an_socket_sendfile(s, &op, file, INT64_MAX, UINT64_MAX, AN_FOREVER));
    an_completion c = dequeue_one(port);
    printf("   error %d transferred %llu\n", c.error, (unsigned long long)c.transferred);
    CHECK(c.error == 0);
    an_completion_release(&c, 1);
    close(peer);
    close(file);
    an_socket_free(s, 0);
    an_port_free(port);
}

/* 15: cancelling a connect that is under way: the same through the socket and through the operation. */
static void test_cancel_connect(const char *backend) {
    int after[2];
    for (int whole = 0; whole < 2; whole++) {
        an_port *port = open_port(backend);
        an_address a;
        an_socket *l = open_listener(port, &a), *s;
        CHECK_OK(an_socket_open(&s, AF_INET, SOCK_STREAM, 0));
        CHECK_OK(an_port_associate(port, s, NULL));
        an_operation con, op;
        CHECK_OK(an_socket_connect(s, &con, &a, AN_FOREVER));
        size_t count = 0;
        int32_t was = 0;
        if (whole)
            CHECK_OK(an_socket_cancel(s, &count));
        else
            CHECK_OK(an_operation_cancel(s, &con, &was));
        an_completion c = dequeue_one(port);
        int first = c.error;
        an_completion_release(&c, 1);
        CHECK_OK(an_socket_send(s, &op, "x", 1, AN_FOREVER));
        c = dequeue_one(port);
        printf("   %s: connect %d, then send %d\n", whole ? "socket" : "operation", first, c.error);
        an_completion_release(&c, 1);
        after[whole] = c.error;
        an_socket_free(l, 0);
        an_socket_free(s, 0);
        an_port_free(port);
    }
    CHECK(after[0] == after[1]);
}

/* 8: SIGPIPE out of a sendfile of which a part went out before the peer was gone. */
static int victim;
static int victim_ready; /* atomic */
static volatile sig_atomic_t pipe_signals;

static void on_pipe(int number) {
    (void)number;
    pipe_signals++;
}

static void *close_victims(void *rounds) {
    static char buffer[262144];
    for (int i = 0; i < *(int *)rounds; i++) {
        while (!__atomic_load_n(&victim_ready, __ATOMIC_ACQUIRE))
            sched_yield();
        for (int reads = i % 6; reads > 0; reads--)
            CHECK(read(victim, buffer, sizeof buffer) >= 0);
        close(victim);
        __atomic_store_n(&victim_ready, 0, __ATOMIC_RELEASE);
    }
    return NULL;
}

static void test_sendfile_sigpipe(const char *backend) {
    enum { SIZE = 16 << 20 };
    int rounds = 1000;
    signal(SIGPIPE, on_pipe);
    char name[] = "/tmp/review-XXXXXX";
    int file = mkstemp(name);
    CHECK(file >= 0 && unlink(name) == 0);
    char *data = calloc(1, SIZE);
    CHECK(pwrite(file, data, SIZE, 0) == SIZE);
    free(data);
    an_port *port = open_port(backend);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, close_victims, &rounds) == 0);
    for (int i = 0; i < rounds; i++) {
        an_socket *s;
        int size = 8 << 20;
        open_pair(port, &s, NULL, &victim);
        CHECK_OK(an_socket_set_option(s, SOL_SOCKET, SO_SNDBUF, &size, sizeof size));
        __atomic_store_n(&victim_ready, 1, __ATOMIC_RELEASE);
        an_operation op;
        CHECK_OK(an_socket_sendfile(s, &op, file, 0, UINT64_MAX, AN_FOREVER));
        an_completion c = dequeue_one(port);
        CHECK(c.error == EPIPE || c.error == ECONNRESET);
        an_completion_release(&c, 1);
        while (__atomic_load_n(&victim_ready, __ATOMIC_ACQUIRE))
            sched_yield();
        an_socket_free(s, 0);
    }
    pthread_join(thread, NULL);
    close(file);
    an_port_free(port);
    printf("   SIGPIPE: %d\n", (int)pipe_signals);
    CHECK(pipe_signals == 0);
}

struct review {
    const char *name;
    void (*test)(const char *backend);
};

static const struct review reviews[] = {
    {"many", test_many},
    {"watch_end", test_watch_end},
    {"quiet_timeout", test_quiet_timeout},
    {"connect_receive", test_connect_and_receive},
    {"watch_many", test_watch_many},
    {"huge_timeout", test_huge_timeout},
    {"seqpacket", test_seqpacket},
    {"sendfile_sigpipe", test_sendfile_sigpipe},
    {"datagram_shutdown", test_datagram_shutdown},
    {"one_shot_ahead", test_one_shot_ahead},
    {"held_timeout", test_held_timeout},
    {"sendfile_far", test_sendfile_far},
    {"cancel_connect", test_cancel_connect},
};

static const char *wanted;
static int failures;

/* Each in a process of its own, so that one that fails or hangs does not hide the others. */
static void run_all(const char *backend) {
    for (size_t i = 0; i < sizeof reviews / sizeof *reviews; i++) {
        if (wanted != NULL && strcmp(wanted, reviews[i].name) != 0)
            continue;
        fflush(stdout);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            alarm(30);
            reviews[i].test(backend);
            fflush(stdout);
            _exit(0);
        }
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child);
        printf("%s %s\n", reviews[i].name, status == 0 ? "ok" : "FAILED");
        failures += status != 0;
    }
}

int main(int argc, char **argv) {
    wanted = argc > 1 ? argv[1] : NULL;
    on_each_backend("review", run_all);
    return failures != 0;
}
