/* What only a C user sees: operations embedded in his own structures, lent data, no allocation, errors as numbers. */
#include "check.h"

#include <stdbool.h>

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define COUNTS_ALLOCATIONS 1
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
static unsigned long allocations;

void *malloc(size_t size) {
    allocations++;
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
    allocations++;
    return __libc_calloc(count, size);
}
#else
#define COUNTS_ALLOCATIONS 0
static const unsigned long allocations = 0;
#endif

/* As a user's server has it. */
struct connection {
    int number;
    an_operation receive;
    an_operation send;
};

static struct connection *connection_of(an_operation *receive) {
    return (struct connection *)((char *)receive - offsetof(struct connection, receive));
}

static void embedded_operations_find_their_owner(const char *backend) {
    an_port *port = open_port(backend);
    struct connection connections[8];
    an_socket *sockets[8];
    int peers[8];
    for (int i = 0; i < 8; i++) {
        memset(&connections[i], 0xa5, sizeof connections[i]); /* operations need no initialisation */
        connections[i].number = i;
        open_pair(port, &sockets[i], NULL, &peers[i]);
        CHECK_OK(an_socket_recv(sockets[i], &connections[i].receive, NULL, 100, 0, UINT64_MAX, AN_FOREVER));
    }
    for (int i = 0; i < 8; i++) {
        char byte = (char)i;
        CHECK(peer_write(peers[i], &byte, 1) == 1);
    }
    for (int i = 0; i < 8; i++) {
        an_completion completion = dequeue_one(port);
        struct connection *connection = connection_of(completion.operation);
        CHECK(completion.error == 0 && completion.transferred == 1 && completion.kind == AN_RECV);
        CHECK(completion.socket == sockets[connection->number]);
        CHECK(*(const char *)completion.data == connection->number);
        an_completion_release(&completion, 1);
    }
    for (int i = 0; i < 8; i++) {
        peer_close(peers[i]);
        an_socket_free(sockets[i], 0);
    }
    CHECK(an_port_in_flight(port) == 0);
    an_port_free(port);
}

static void echo_once(an_port *port, an_socket *socket, int peer, struct connection *connection) {
    char text[64] = "the same message again and again";
    CHECK_OK(an_socket_recv(socket, &connection->receive, NULL, 65536, 0, UINT64_MAX, AN_FOREVER));
    CHECK(peer_write(peer, text, sizeof text) == sizeof text);
    an_completion completion = dequeue_one(port);
    CHECK(completion.transferred == sizeof text);
    CHECK_OK(an_socket_send(socket, NULL, completion.data, completion.transferred, AN_FOREVER));
    CHECK_OK(an_socket_send(socket, &connection->send, completion.data, completion.transferred, AN_FOREVER));
    an_completion_release(&completion, 1);
    completion = dequeue_one(port);
    CHECK(completion.kind == AN_SEND && completion.transferred == sizeof text);
    an_completion_release(&completion, 1);
    CHECK(peer_read(peer, text, sizeof text) == sizeof text && peer_read(peer, text, sizeof text) == sizeof text);
}

static void steady_state_allocates_nothing(const char *backend) {
    an_port *port = open_port(backend);
    struct connection connection;
    an_socket *socket;
    int peer;
    open_pair(port, &socket, NULL, &peer);
    for (int i = 0; i < 10; i++)
        echo_once(port, socket, peer, &connection);
    unsigned long before = allocations;
    for (int i = 0; i < 1000; i++)
        echo_once(port, socket, peer, &connection);
    CHECK(allocations == before);
    if (COUNTS_ALLOCATIONS)
        CHECK(allocations > 0); /* the counter counts */
    peer_close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
}

static void lent_data_outlives_socket_and_port(const char *backend) {
    an_port *port = open_port(backend);
    an_operation receive;
    an_socket *socket;
    int peer;
    open_pair(port, &socket, NULL, &peer);
    CHECK_OK(an_socket_recv(socket, &receive, NULL, 65536, 0, UINT64_MAX, AN_FOREVER));
    CHECK(peer_write(peer, "still here", 10) == 10);
    an_completion completion = dequeue_one(port);
    an_socket_free(socket, 0);
    an_port_free(port);
    CHECK(memcmp(completion.data, "still here", 10) == 0);
    an_completion_release(&completion, 1);
    an_completion_release(&completion, 1); /* given back already: nothing */
    peer_close(peer);
}

static void misuse_is_a_number_and_leaves_nothing_in_flight(const char *backend) {
    an_port *port = open_port(backend), *other = open_port(backend);
    an_operation operation;
    an_socket *socket, *datagram;
    size_t count;
    an_completion completion;
    CHECK_OK(an_socket_open(&socket, AF_INET, SOCK_STREAM, 0));
    CHECK_OK(an_socket_open(&datagram, AF_INET, SOCK_DGRAM, 0));
    CHECK(an_socket_recv(socket, &operation, NULL, 10, 0, UINT64_MAX, AN_FOREVER) == AN_EINVAL);
    CHECK_OK(an_port_associate(port, socket, NULL));
    CHECK_OK(an_port_associate(port, datagram, NULL));
    CHECK(an_port_associate(other, socket, NULL) == AN_EINVAL);
    CHECK(an_socket_recv(socket, &operation, NULL, 0, 0, UINT64_MAX, AN_FOREVER) == AN_EINVAL);
    CHECK(an_socket_recv(socket, &operation, &operation, 8, AN_MULTISHOT, UINT64_MAX, AN_FOREVER) == AN_EINVAL);
    CHECK(an_socket_recv(socket, &operation, NULL, 8, 0, UINT64_MAX, -2) == AN_EINVAL);
    CHECK(an_socket_recvfrom(socket, &operation, NULL, 8, 0, AN_FOREVER) == AN_ENOTSUP);
    CHECK(an_socket_accept(datagram, &operation, 0, AN_FOREVER) == AN_ENOTSUP);
    CHECK(an_socket_sendfile(datagram, &operation, 0, 0, 1, AN_FOREVER) == AN_ENOTSUP);
    CHECK(an_socket_sendfile(socket, &operation, 987654, 0, 1, AN_FOREVER) == AN_EBADF);
    CHECK(an_socket_disconnect(datagram, &operation, AN_FOREVER) == AN_ENOTSUP);
    CHECK(an_operation_pause(socket, &operation) == AN_EINVAL);
    CHECK(an_port_dequeue(port, &completion, 0, 0, &count) == AN_EINVAL);
    CHECK(an_port_dequeue(port, &completion, 1, -2, &count) == AN_EINVAL);
    CHECK(an_port_timer(port, &operation, -1, NULL) == AN_EINVAL);
    CHECK(an_port_in_flight(port) == 0);
    CHECK_OK(an_port_dequeue(port, &completion, 1, 0, &count));
    CHECK(count == 0);
    CHECK_OK(an_socket_close(socket, 0));
    CHECK(an_socket_recv(socket, &operation, NULL, 10, 0, UINT64_MAX, AN_FOREVER) == AN_EBADF);
    CHECK(an_socket_descriptor(socket) == -1 && an_socket_is_closed(socket));
    CHECK_OK(an_port_close(port));
    CHECK_OK(an_port_close(port));
    CHECK(an_socket_send(datagram, &operation, "x", 1, AN_FOREVER) == AN_EPORTCLOSED);
    CHECK(an_port_post(port, &operation, NULL) == AN_EPORTCLOSED);
    CHECK(an_port_dequeue(port, &completion, 1, 0, &count) == AN_EPORTCLOSED);
    an_socket_free(socket, 0);
    an_socket_free(datagram, 0);
    an_port_free(port);
    an_port_free(other);
}

/* Dequeues one completion; true if it has the mark. */
static bool comes_marked(an_port *port, uint16_t kind, const an_operation *operation) {
    an_completion completion = dequeue_one(port);
    CHECK(completion.kind == kind && completion.operation == operation);
    bool marked = (completion.flags & AN_MARKED) != 0;
    an_completion_release(&completion, 1);
    return marked;
}

static void a_marked_operation_comes_back_marked_and_an_other_does_not(const char *backend) {
    an_port *port = open_port(backend);
    an_operation mine, other;
    an_socket *socket;
    int peer;
    int32_t cancelled;
    open_pair(port, &socket, NULL, &peer);
    CHECK_OK(an_port_post(port, an_operation_marked(&mine), NULL));
    CHECK_OK(an_port_post(port, &other, NULL));
    CHECK(comes_marked(port, AN_POST, &mine) && !comes_marked(port, AN_POST, &other));
    CHECK_OK(an_port_timer(port, an_operation_marked(&mine), 0, NULL));
    CHECK_OK(an_port_timer(port, &other, 1, NULL));
    CHECK(comes_marked(port, AN_TIMER, &mine) && !comes_marked(port, AN_TIMER, &other));
    CHECK_OK(an_socket_send(socket, an_operation_marked(&mine), "x", 1, AN_FOREVER));
    CHECK_OK(an_socket_send(socket, &other, "y", 1, AN_FOREVER));
    CHECK(comes_marked(port, AN_SEND, &mine) && !comes_marked(port, AN_SEND, &other));
    CHECK_OK(an_socket_recv(socket, an_operation_marked(&mine), NULL, 8, 0, UINT64_MAX, AN_FOREVER));
    CHECK_OK(an_socket_recv(socket, &other, NULL, 8, 0, UINT64_MAX, AN_FOREVER));
    CHECK_OK(an_operation_cancel(socket, an_operation_marked(&other), &cancelled)); /* taken with the mark or without */
    CHECK(cancelled == 1 && !comes_marked(port, AN_RECV, &other));
    CHECK_OK(an_operation_cancel(socket, &mine, &cancelled));
    CHECK(cancelled == 1 && comes_marked(port, AN_RECV, &mine));
    peer_close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
}

static void the_failure_of_a_marked_quiet_send_is_marked(const char *backend) {
    for (int marked = 0; marked < 2; marked++) {
        an_port *port = open_port(backend);
        an_operation *quiet = marked ? an_operation_marked(NULL) : NULL;
        an_socket *socket;
        int peer;
        open_pair(port, &socket, NULL, &peer);
        CHECK_OK(an_socket_shutdown(socket, 1));
        CHECK_OK(an_socket_send(socket, quiet, "lost", 4, AN_FOREVER));
        CHECK(comes_marked(port, AN_SEND, NULL) == marked);
        peer_close(peer);
        an_socket_free(socket, 0);
        an_port_free(port);
    }
}

static void a_multishot_tells_how_many_completions_with_more_it_had(const char *backend) {
    an_port *port = open_port(backend);
    an_operation receive;
    an_socket *socket;
    int peer;
    uint32_t count = 0;
    open_pair(port, &socket, NULL, &peer);
    CHECK_OK(an_socket_recv(socket, an_operation_marked(&receive), NULL, 1, AN_MULTISHOT, UINT64_MAX, AN_FOREVER));
    CHECK(peer_write(peer, "five!", 5) == 5);
    peer_close(peer);
    for (bool more = true; more;) {
        an_completion completion = dequeue_one(port);
        CHECK(completion.operation == &receive && (completion.flags & AN_MARKED) != 0);
        more = (completion.flags & AN_MORE) != 0;
        count += more;
        an_completion_release(&completion, 1);
    }
    CHECK(count == 5 && an_operation_more_count(&receive) == 5);
    an_socket_free(socket, 0);
    an_port_free(port);
}

static void accepted_but_unclaimed_connections_are_closed_with_the_port(const char *backend) {
    an_port *port = open_port(backend);
    an_address address;
    an_operation accept;
    an_socket *listener = open_listener(port, &address);
    CHECK_OK(an_socket_accept(listener, &accept, AN_MULTISHOT, AN_FOREVER));
    int clients[3];
    for (int i = 0; i < 3; i++) {
        clients[i] = (int)socket(AF_INET, SOCK_STREAM, 0);
        CHECK(peer_connect(clients[i], &address));
    }
    an_completion completion = dequeue_one(port); /* the others stay queued */
    CHECK(completion.accepted != NULL && (completion.flags & AN_MORE) != 0 && completion.address != NULL);
    CHECK(an_address_family(completion.address) == AF_INET);
    an_socket *accepted = completion.accepted;
    an_completion_release(&completion, 1);
    an_port_free(port);
    an_socket_free(accepted, 0);
    an_socket_free(listener, 0);
    for (int i = 0; i < 3; i++) {
        char byte;
        CHECK(peer_read(clients[i], &byte, 1) <= 0); /* an end or a reset: told */
        peer_close(clients[i]);
    }
}

static void ten_thousand_operations_in_flight_are_given_back_by_close(const char *backend) {
    enum { OPERATIONS = 10000 };
    static an_operation operations[OPERATIONS];
    an_port *port = open_port(backend);
    an_socket *socket;
    int peer;
    open_pair(port, &socket, NULL, &peer);
    for (int i = 0; i < OPERATIONS; i++) {
        if (i % 3 == 0)
            CHECK_OK(an_port_timer(port, &operations[i], (i + 1) * SECOND, NULL));
        else if (i % 3 == 1)
            CHECK_OK(an_socket_recv(socket, &operations[i], NULL, 10, 0, UINT64_MAX, i * SECOND));
        else
            CHECK_OK(an_port_post(port, &operations[i], NULL));
    }
    CHECK(an_port_in_flight(port) == OPERATIONS);
    CHECK_OK(an_port_close(port));
    CHECK(an_port_in_flight(port) == 0);
    memset(operations, 0xff, sizeof operations); /* ours again: nothing may look at them */
    an_socket_free(socket, 0);
    an_port_free(port);
    peer_close(peer);
}

int main(void) {
    CHECK(sizeof(an_operation) <= 128);
    on_each_backend("embedded operations find their owner", embedded_operations_find_their_owner);
    on_each_backend("the steady state allocates nothing", steady_state_allocates_nothing);
    on_each_backend("lent data outlives socket and port", lent_data_outlives_socket_and_port);
    on_each_backend("misuse is a number and leaves nothing in flight", misuse_is_a_number_and_leaves_nothing_in_flight);
    on_each_backend("accepted but unclaimed connections are closed with the port",
                    accepted_but_unclaimed_connections_are_closed_with_the_port);
    on_each_backend("a marked operation comes back marked and an other does not",
                    a_marked_operation_comes_back_marked_and_an_other_does_not);
    on_each_backend("the failure of a marked quiet send is marked", the_failure_of_a_marked_quiet_send_is_marked);
    on_each_backend("a multishot tells how many completions with more it had",
                    a_multishot_tells_how_many_completions_with_more_it_had);
    on_each_backend("ten thousand operations in flight are given back by close",
                    ten_thousand_operations_in_flight_are_given_back_by_close);
    return 0;
}
