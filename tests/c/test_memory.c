/* Without memory: a program that uses most of the library runs again and again, and each time another allocation fails,
 * the first, the second, ... until a run needs no more. Every call that fails says so by AN_ENOMEM, may be made again, and
 * neither bytes, operations, memory nor descriptors are lost. Where malloc cannot be replaced (sanitizers, other C
 * libraries) the program runs once with nothing failing, and says so.
 */
#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FAILS_ALLOCATIONS 1
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *memory, size_t size);
extern void __libc_free(void *memory);

/* volatile: compilers know that malloc changes no variables */
static volatile bool counting;
static volatile unsigned long allocations;
static volatile unsigned long failing; /* the one that fails */
static volatile bool failed;
static volatile long live_blocks;

static bool fails(void) {
    if (!counting || ++allocations != failing)
        return false;
    failed = true;
    return true;
}

void *malloc(size_t size) {
    if (fails())
        return NULL;
    live_blocks++;
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
    if (fails())
        return NULL;
    live_blocks++;
    return __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size) {
    if (fails())
        return NULL;
    live_blocks += memory == NULL;
    return __libc_realloc(memory, size);
}

void free(void *memory) {
    live_blocks -= memory != NULL;
    __libc_free(memory);
}
#else
#define FAILS_ALLOCATIONS 0
static bool counting;
static unsigned long allocations, failing;
static const bool failed = false;
static const long live_blocks = 0;
#endif

/* A call that may find no memory, once: then it is made again. */
#define NEEDS_MEMORY(call)                                                                                             \
    do {                                                                                                               \
        int first_error = (call);                                                                                      \
        CHECK(first_error == 0 || (first_error == AN_ENOMEM && failed));                                               \
        if (first_error != 0)                                                                                          \
            CHECK_OK(call);                                                                                            \
    } while (0)

/* A multishot accept that found no memory says so and goes on by itself, also when nobody is there to be accepted yet. */
static bool is_accept_without_memory(const an_completion *completion) {
    bool is_so = completion->kind == AN_ACCEPT && completion->error == AN_ENOMEM;
    CHECK(!is_so || (failed && completion->flags == AN_MORE && completion->accepted == NULL));
    return is_so;
}

/* The next completion, which must come. Waiting may find no memory, too. */
static an_completion dequeue_next(an_port *port) {
    an_completion completion;
    size_t count = 0;
    for (int i = 0; i < 3 && count == 0; i++) {
        int error = an_port_dequeue(port, &completion, 1, 10 * SECOND, &count);
        CHECK(error == 0 || (error == AN_ENOMEM && failed));
        if (count == 0 || !is_accept_without_memory(&completion))
            continue;
        an_completion_release(&completion, 1);
        count = 0;
    }
    CHECK(count == 1);
    return completion;
}

static an_completion dequeue_operation(an_port *port, const an_operation *operation) {
    an_completion completion = dequeue_next(port);
    CHECK(completion.operation == operation);
    return completion;
}

/* ---- the program --------------------------------------------------------------------------------------------------- */

static an_port *open_watched_port(const char *backend) {
    an_port *port;
    an_descriptor descriptor;
    an_port_options options = {.backend = backend};
    NEEDS_MEMORY(an_port_open(&port, &options));
    NEEDS_MEMORY(an_port_descriptor(port, &descriptor));
    return port;
}

static an_socket *listen_on_loopback(an_port *port, an_address *address) {
    an_socket *listener;
    NEEDS_MEMORY(an_socket_open(&listener, AF_INET, SOCK_STREAM, 0));
    CHECK_OK(an_address_ip(address, AF_INET, "127.0.0.1", 0, 0, 0));
    CHECK_OK(an_socket_bind(listener, address));
    CHECK_OK(an_socket_listen(listener, 16));
    CHECK_OK(an_socket_local_address(listener, address));
    NEEDS_MEMORY(an_port_associate(port, listener, NULL));
    return listener;
}

static an_socket *accept_one(an_port *port, an_operation *accept) {
    an_completion completion = dequeue_operation(port, accept);
    CHECK(completion.error == 0 && completion.accepted != NULL && (completion.flags & AN_MORE) != 0);
    an_socket *accepted = completion.accepted;
    an_completion_release(&completion, 1);
    NEEDS_MEMORY(an_port_associate(port, accepted, NULL));
    return accepted;
}

static void echo(an_port *port, an_socket *socket, int peer, an_operation *receive) {
    char text[] = "sent and back", back[sizeof text];
    CHECK(write(peer, text, sizeof text) == sizeof text);
    an_completion completion = dequeue_operation(port, receive);
    CHECK(completion.error == 0 && completion.transferred == sizeof text);
    CHECK(memcmp(completion.data, text, sizeof text) == 0);
    CHECK_OK(an_socket_send(socket, NULL, completion.data, completion.transferred, AN_FOREVER));
    an_completion_release(&completion, 1);
    CHECK(recv(peer, back, sizeof back, MSG_WAITALL) == sizeof back && memcmp(text, back, sizeof back) == 0);
}

static size_t read_what_is_there(int descriptor) {
    static char buffer[64 << 10];
    size_t total = 0;
    ssize_t length;
    while ((length = recv(descriptor, buffer, sizeof buffer, MSG_DONTWAIT)) > 0)
        total += (size_t)length;
    return total;
}

static size_t read_while_sending(an_port *port, an_socket *socket, int peer) {
    size_t total = 0;
    for (int i = 0; i < 100000 && an_socket_unsent(socket) > 0; i++) {
        an_completion completion;
        size_t count;
        total += read_what_is_there(peer);
        int error = an_port_dequeue(port, &completion, 1, SECOND / 1000, &count);
        CHECK(error == 0 || (error == AN_ENOMEM && failed));
        CHECK(count == 0 || is_accept_without_memory(&completion)); /* else it is quiet */
        an_completion_release(&completion, count);
    }
    return total;
}

/* More than the window takes: the rest is copied. Without memory for it the stream is broken, which the call and the next
 * send tell. Returns whether it is whole. */
static bool send_quietly_with_a_rest(an_port *port, an_socket *socket, int peer) {
    static char data[8 << 20];
    an_operation send;
    int error = an_socket_send(socket, NULL, data, sizeof data, AN_FOREVER);
    CHECK(error == 0 || (error == AN_ENOMEM && failed));
    if (error == 0) {
        size_t total = read_while_sending(port, socket, peer);
        for (int i = 0; i < 1000 && total < sizeof data; i++) {
            struct pollfd polled = {.fd = peer, .events = POLLIN};
            CHECK(poll(&polled, 1, 10000) == 1);
            total += read_what_is_there(peer);
        }
        CHECK(total == sizeof data);
        return true;
    }
    CHECK(an_socket_unsent(socket) == 0);
    CHECK_OK(an_socket_send(socket, &send, "x", 1, AN_FOREVER));
    an_completion completion = dequeue_operation(port, &send);
    CHECK(completion.error == AN_EPIPE && completion.transferred == 0);
    an_completion_release(&completion, 1);
    return false;
}

/* More than the port has room for at first. */
static void start_and_cancel_many_timers(an_port *port) {
    enum { TIMERS = 100 };
    static an_operation timers[TIMERS];
    for (int i = 0; i < TIMERS; i++)
        NEEDS_MEMORY(an_port_timer(port, &timers[i], 1000 * SECOND, NULL));
    for (int i = 0; i < TIMERS; i++) {
        int32_t cancelled;
        CHECK_OK(an_port_cancel(port, &timers[i], &cancelled));
        CHECK(cancelled == 1);
        an_completion completion = dequeue_operation(port, &timers[i]);
        CHECK(completion.error == AN_ECANCELED);
        an_completion_release(&completion, 1);
    }
}

static void exchange_datagrams_over_many_sockets(an_port *port) {
    enum { SOCKETS = 70 };
    static an_socket *sockets[SOCKETS];
    static an_operation receives[SOCKETS];
    an_address address;
    for (int i = 0; i < SOCKETS; i++) {
        NEEDS_MEMORY(an_socket_open(&sockets[i], AF_INET, SOCK_DGRAM, 0));
        CHECK_OK(an_address_ip(&address, AF_INET, "127.0.0.1", 0, 0, 0));
        CHECK_OK(an_socket_bind(sockets[i], &address));
        NEEDS_MEMORY(an_port_associate(port, sockets[i], NULL));
        CHECK_OK(an_socket_recvfrom(sockets[i], &receives[i], NULL, 100, 0, 10 * SECOND));
    }
    for (int i = 0; i < SOCKETS; i++) {
        CHECK_OK(an_socket_local_address(sockets[i], &address));
        CHECK_OK(an_socket_sendto(sockets[0], NULL, "datagram", 8, &address, AN_FOREVER));
        an_completion completion = dequeue_operation(port, &receives[i]);
        CHECK(completion.error == 0 && completion.transferred == 8 && completion.address != NULL);
        an_completion_release(&completion, 1);
    }
    for (int i = 0; i < SOCKETS; i++)
        an_socket_free(sockets[i], 0);
}

static void finish_receive(an_port *port, an_operation *receive, int peer, bool whole) {
    close(peer);
    an_completion completion = dequeue_operation(port, receive);
    CHECK(completion.flags == 0 && (completion.error == 0 || !whole));
    an_completion_release(&completion, 1);
}

static int connect_to(const an_address *address) {
    int descriptor = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(descriptor >= 0);
    CHECK(connect(descriptor, (const struct sockaddr *)address->storage, address->length) == 0);
    return descriptor;
}

static void use_most_of_the_library(const char *backend) {
    an_port *port = open_watched_port(backend);
    an_address address;
    an_operation accept, receive, post;
    an_socket *listener = listen_on_loopback(port, &address);
    CHECK_OK(an_socket_accept(listener, &accept, AN_MULTISHOT, AN_FOREVER));
    int peer = connect_to(&address);
    an_socket *server = accept_one(port, &accept);
    CHECK_OK(an_socket_recv(server, &receive, NULL, 65536, AN_MULTISHOT, UINT64_MAX, 100 * SECOND));
    echo(port, server, peer, &receive);
    bool whole = send_quietly_with_a_rest(port, server, peer);
    start_and_cancel_many_timers(port);
    exchange_datagrams_over_many_sockets(port);
    CHECK_OK(an_port_post(port, &post, &post));
    CHECK(dequeue_operation(port, &post).state == &post);
    finish_receive(port, &receive, peer, whole);
    CHECK(an_port_in_flight(port) == 1); /* the accept */
    an_socket_free(server, 0);
    an_port_free(port);
    an_socket_free(listener, 0);
}

/* ---- running --------------------------------------------------------------------------------------------------------- */

static int count_descriptors(void) {
    int count = 0;
    for (int i = 0; i < 1024; i++)
        count += fcntl(i, F_GETFD) != -1;
    return count;
}

static void fail_each_allocation_in_turn(const char *backend) {
    enum { RUNS_MOST = 1000 };
    bool more = true;
    for (failing = 1; more; failing++) {
        CHECK(failing < RUNS_MOST);
        long blocks_before = live_blocks;
        int descriptors_before = count_descriptors();
        allocations = 0;
        counting = true;
#if FAILS_ALLOCATIONS
        failed = false;
#endif
        use_most_of_the_library(backend);
        counting = false;
        CHECK(live_blocks == blocks_before);
        CHECK(count_descriptors() == descriptors_before);
        more = failed;
    }
    const unsigned long least = 70; /* the sockets alone need as many */
    CHECK(!FAILS_ALLOCATIONS || failing > least);
}

int main(void) {
    if (!FAILS_ALLOCATIONS)
        puts("malloc cannot be replaced here: no allocation fails in this build");
    on_each_backend("each allocation fails in turn", fail_each_allocation_in_turn);
    return 0;
}
