/* An echo server in C: sends back what it receives.
 *
 *   cc echo.c $(pkg-config --cflags --libs asyncio-native) -o echo && ./echo 5555
 */
#include <asyncio_native.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32) /* the header brings what is needed; SO_REUSEADDR would let two servers share the address */
#define ADDRESS_OPTION SO_EXCLUSIVEADDRUSE
#else /* a restart need not wait until the connections from before are forgotten */
#include <sys/socket.h>
#define ADDRESS_OPTION SO_REUSEADDR
#endif

/* The operation lives in the caller's own structure: starting one allocates nothing. */
typedef struct connection {
    an_operation receiving;
    uint64_t bytes;
} connection;

static void check(const char *what, int error) {
    if (error != 0) {
        fprintf(stderr, "%s: %s\n", what, strerror(error));
        exit(1);
    }
}

static void accepted(an_port *port, an_socket *socket) {
    connection *peer = calloc(1, sizeof *peer);
    if (peer == NULL || an_port_associate(port, socket, peer) != 0 ||
        an_socket_recv(socket, &peer->receiving, NULL, 65536, AN_MULTISHOT, UINT64_MAX, AN_FOREVER) != 0) {
        an_socket_free(socket, 0);
        free(peer);
    }
}

static void received(const an_completion *completion) {
    connection *peer = completion->state;
    peer->bytes += completion->transferred;
    if (completion->transferred > 0) {
        /* No operation: a quiet send. It completes only if it fails, and the buffer is free again at once. */
        (void)an_socket_send(completion->socket, NULL, completion->data, (size_t)completion->transferred, AN_FOREVER);
    }
    if ((completion->flags & AN_MORE) == 0) { /* the last one: end of stream, or an error */
        an_socket_free(completion->socket, AN_FLUSH);
        free(peer);
    }
}

int main(int argc, char **argv) {
    an_port *port;
    an_socket *listener;
    an_address address;
    an_operation accepting;
    char host[AN_HOST_SIZE];
    uint16_t number = argc > 1 ? (uint16_t)atoi(argv[1]) : 5555;
    uint32_t flow, scope;
    int on = 1;

    check("port", an_port_open(&port, NULL));
    check("socket", an_socket_open(&listener, AF_INET, SOCK_STREAM, 0));
    check("address", an_address_ip(&address, AF_INET, "127.0.0.1", number, 0, 0));
    check("option", an_socket_set_option(listener, SOL_SOCKET, ADDRESS_OPTION, &on, sizeof on));
    check("bind", an_socket_bind(listener, &address));
    check("listen", an_socket_listen(listener, 1024));
    check("associate", an_port_associate(port, listener, NULL));
    check("accept", an_socket_accept(listener, &accepting, AN_MULTISHOT, AN_FOREVER));
    check("local address", an_socket_local_address(listener, &address));
    check("format", an_address_format(&address, host, &number, &flow, &scope));
    printf("listening on %s:%d\n", host, number);
    fflush(stdout);

    for (;;) {
        an_completion batch[64];
        size_t count;
        check("dequeue", an_port_dequeue(port, batch, 64, AN_FOREVER, &count));
        for (size_t i = 0; i < count; i++) {
            if (batch[i].kind == AN_ACCEPT && batch[i].accepted != NULL) {
                accepted(port, batch[i].accepted);
            } else if (batch[i].kind == AN_RECV) {
                received(&batch[i]);
            } else {
                fprintf(stderr, "failed: %s\n", strerror(batch[i].error));
            }
        }
        an_completion_release(batch, count);
    }
}
