/* check.h - what the C tests share: checks that end the test with the place, backends to run on, connected pairs. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "asyncio_native.h"

#if defined(_WIN32)
#include "check_windows.h"
#else
#include "check_posix.h"
#endif

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                                    \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#define CHECK_OK(call)                                                                                                 \
    do {                                                                                                               \
        int check_error = (call);                                                                                      \
        if (check_error != 0) {                                                                                        \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, strerror(check_error));                      \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#define SECOND INT64_C(1000000000)

/* Runs a test on every backend that works here. */
static inline void on_each_backend(const char *title, void (*test)(const char *backend)) {
    an_backend_description backends[8];
    size_t count = an_backends(backends, 8);
    int ran = 0;
    for (size_t i = 0; i < count; i++) {
        if (!backends[i].available)
            continue;
        printf("%s [%s]\n", title, backends[i].name);
        fflush(stdout);
        test(backends[i].name);
        ran++;
    }
    CHECK(ran > 0);
}

static inline an_port *open_port(const char *backend) {
    an_port *port;
    an_port_options options = {.backend = backend};
    CHECK_OK(an_port_open(&port, &options));
    return port;
}

/* Two connected local stream sockets in the port; `peer` may be NULL for a plain descriptor in *descriptor instead. */
static inline void open_pair(an_port *port, an_socket **socket, an_socket **peer, int *descriptor) {
    int ends[2];
    CHECK(connect_ends(ends));
    CHECK_OK(an_socket_adopt(socket, ends[0]));
    CHECK_OK(an_port_associate(port, *socket, NULL));
    if (peer == NULL) {
        *descriptor = ends[1];
        return;
    }
    CHECK_OK(an_socket_adopt(peer, ends[1]));
    CHECK_OK(an_port_associate(port, *peer, NULL));
}

static inline an_socket *open_listener(an_port *port, an_address *address) {
    an_socket *listener;
    CHECK_OK(an_socket_open(&listener, AF_INET, SOCK_STREAM, 0));
    CHECK_OK(an_address_ip(address, AF_INET, "127.0.0.1", 0, 0, 0));
    CHECK_OK(an_socket_bind(listener, address));
    CHECK_OK(an_socket_listen(listener, 128));
    CHECK_OK(an_socket_local_address(listener, address));
    CHECK_OK(an_port_associate(port, listener, NULL));
    return listener;
}

/* The one completion that must come within ten seconds. */
static inline an_completion dequeue_one(an_port *port) {
    an_completion completion;
    size_t count = 0;
    CHECK_OK(an_port_dequeue(port, &completion, 1, 10 * SECOND, &count));
    CHECK(count == 1);
    return completion;
}

#endif
