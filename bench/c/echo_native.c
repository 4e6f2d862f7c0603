/* echo_native.c - a TCP echo server on the C interface of asyncio-native: what the library costs a C program.
 *
 *     echo_native [backend=auto] [concurrency=1] [style=quiet|plain] [deadline_s=0] [max_bytes=262144]
 *                 [port=0] [messages=0]
 *
 * quiet: one multishot receive a connection and quiet sends. plain: an operation and a completion for everything; a
 * received block is given back when its send has completed. deadline_s: a receive that long without data ends the
 * connection. With messages=N it ends by itself after so many, for instruments that hold signals back.
 */
#include "server.h"

#include <asyncio_native.h>

enum style { QUIET, PLAIN };
enum { BATCH = 256 };

struct connection {
    an_operation receiving, sending;
    an_completion received; /* plain: lent until its send has completed */
};

static an_port *port;
static enum style style;
static int64_t deadline_ns;
static size_t max_bytes;
static uint64_t messages;

static void check(const char *what, int error) {
    if (error != 0) {
        errno = error;
        fail(what);
    }
}

static void end(an_socket *socket, struct connection *connection) {
    an_socket_free(socket, AN_FLUSH);
    free(connection);
}

static void receive(an_socket *socket, struct connection *connection) {
    uint32_t flags = style == QUIET ? AN_MULTISHOT : 0;
    check("an_socket_recv",
          an_socket_recv(socket, &connection->receiving, NULL, max_bytes, flags, UINT64_MAX, deadline_ns));
}

static void accepted(an_socket *socket) {
    struct connection *connection = calloc(1, sizeof *connection);
    if (connection == NULL)
        fail("calloc");
    check("an_port_associate", an_port_associate(port, socket, connection));
    receive(socket, connection);
}

static void received(an_completion *completion) {
    struct connection *connection = completion->state;
    size_t length = (size_t)completion->transferred;
    messages += length > 0;
    if (length > 0 && style == PLAIN) {
        connection->received = *completion;
        check("an_socket_send",
              an_socket_send(completion->socket, &connection->sending, completion->data, length, AN_FOREVER));
        return;
    }
    if (length > 0) /* its failure is told by the end of the stream as well */
        (void)an_socket_send(completion->socket, NULL, completion->data, length, AN_FOREVER);
    if (style == PLAIN || (completion->flags & AN_MORE) == 0)
        end(completion->socket, connection);
    an_completion_release(completion, 1);
}

static void sent(an_completion *completion) {
    struct connection *connection = completion->state;
    if (completion->operation != NULL && completion->error == 0)
        receive(completion->socket, connection);
    else if (completion->operation != NULL)
        end(completion->socket, connection);
    if (completion->operation != NULL)
        an_completion_release(&connection->received, 1);
    an_completion_release(completion, 1);
}

static void serve(an_completion *completion) {
    switch (completion->kind) {
    case AN_ACCEPT:
        check("accept", completion->error);
        accepted(completion->accepted);
        an_completion_release(completion, 1);
        break;
    case AN_RECV:
        received(completion);
        break;
    case AN_SEND:
        sent(completion);
        break;
    default:
        fail("a completion of a kind that was not started");
    }
}

int main(int count, char **arguments) {
    (void)count;
    check_options(arguments, (const char *const[]){"backend", "concurrency", "style", "deadline_s", "max_bytes", "port",
                                                   "messages", NULL});
    an_port_options options = {.backend = option(arguments, "backend", "auto"),
                               .concurrency = number(arguments, "concurrency", 1),
                               .flags = AN_PORT_INTERRUPTIBLE};
    uint64_t limit = number(arguments, "messages", 0);
    an_socket *listener;
    an_operation accepting;
    an_completion batch[BATCH];
    unsigned deadline_s = number(arguments, "deadline_s", 0);
    style = (enum style)choice(arguments, "style", (const char *const[]){"quiet", "plain", NULL});
    deadline_ns = deadline_s > 0 ? (int64_t)deadline_s * 1000000000 : AN_FOREVER;
    max_bytes = number(arguments, "max_bytes", 256 * 1024);
    check("an_port_open", an_port_open(&port, &options));
    check("an_socket_adopt", an_socket_adopt(&listener, listen_on_loopback(arguments)));
    check("an_port_associate", an_port_associate(port, listener, NULL));
    check("an_socket_accept", an_socket_accept(listener, &accepting, AN_MULTISHOT, AN_FOREVER));
    while (!stopping && (limit == 0 || messages < limit)) {
        size_t found = 0;
        int error = an_port_dequeue(port, batch, BATCH, AN_FOREVER, &found);
        if (error != AN_EINTR)
            check("an_port_dequeue", error);
        for (size_t i = 0; i < found; i++)
            serve(&batch[i]);
    }
    an_statistics statistics;
    check("an_port_statistics", an_port_statistics(port, &statistics));
    printf("{\"waits\": %llu, \"receives\": %llu}\n", (unsigned long long)statistics.waits,
           (unsigned long long)messages);
    return 0;
}
