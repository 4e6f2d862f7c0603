/* backends.c - which backends there are, and the choice among them. The one place where their names stand together. */
#include "backend/io_uring.h"
#include "backend/iocp.h"
#include "proactor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define IOCP (&an_iocp)
#define POLL NULL
#define POLL_REACTOR NULL
#else
#define IOCP NULL
#define POLL (&an_proactor)
#define POLL_REACTOR (&an_reactor_poll)
#endif

#if defined(__linux__)
#define EPOLL (&an_proactor)
#define EPOLL_REACTOR (&an_reactor_epoll)
#else
#define EPOLL NULL
#define EPOLL_REACTOR NULL
#endif

#if defined(AN_HAVE_KQUEUE)
#define KQUEUE (&an_proactor)
#define KQUEUE_REACTOR (&an_reactor_kqueue)
#define POLL_MIRROR KQUEUE_REACTOR
#else
#define KQUEUE NULL
#define KQUEUE_REACTOR NULL
#define POLL_MIRROR EPOLL_REACTOR
#endif

#if defined(__linux__) && defined(AN_HAVE_LIBURING)
#define IO_URING (&an_io_uring)
#else
#define IO_URING NULL
#endif

#if defined(__linux__)
#define IO_URING_ABSENCE "built without liburing"
#else
#define IO_URING_ABSENCE "Linux only"
#endif

static const struct an_proactor_detail epoll_detail = {.reactor = EPOLL_REACTOR};
static const struct an_proactor_detail kqueue_detail = {.reactor = KQUEUE_REACTOR};
static const struct an_proactor_detail poll_detail = {.reactor = POLL_REACTOR, .mirror = POLL_MIRROR};

/* "auto" takes the first that works, so the order is that of speed as it was measured (bench/README.md): a server on
 * io_uring is as fast as one on epoll where one thread dequeues (concurrency 1), and a tenth slower where any may. */
const struct an_backend_row an_backend_rows[AN_BACKEND_ROWS] = {
    {"iocp", IOCP, NULL, "Windows only"},           {"epoll", EPOLL, &epoll_detail, "Linux only"},
    {"io_uring", IO_URING, NULL, IO_URING_ABSENCE}, {"kqueue", KQUEUE, &kqueue_detail, "macOS and the BSDs only"},
    {"poll", POLL, &poll_detail, "not on Windows"},
};

static int open_row(an_port *port, const struct an_backend_row *row) {
    if (row->interface == NULL)
        return AN_ENOTSUP;
    port->name = row->name;
    port->interface = row->interface;
    return row->interface->open(&port->backend, port, row->detail);
}

/* The first that works; where none does, the error of the last. */
static int open_fastest(an_port *port) {
    int error = AN_ENOTSUP;
    for (int i = 0; i < AN_BACKEND_ROWS && error != 0; i++)
        error = open_row(port, &an_backend_rows[i]);
    return error;
}

int an_backend_open(an_port *port, const char *name) {
    char chosen[64];
    if (name == NULL || strcmp(name, "auto") == 0)
        name = an_os_environment("ASYNCIO_NATIVE_BACKEND", chosen, sizeof chosen) ? chosen : NULL;
    if (name == NULL || *name == '\0' || strcmp(name, "auto") == 0)
        return open_fastest(port);
    for (int i = 0; i < AN_BACKEND_ROWS; i++) {
        if (strcmp(an_backend_rows[i].name, name) == 0)
            return open_row(port, &an_backend_rows[i]);
    }
    return AN_ENOTSUP;
}

static const char *probe(const struct an_backend_row *row, char *reason) {
    if (row->interface == NULL)
        return row->absence;
    an_port *port;
    an_port_options options = {.backend = row->name};
    int error = an_port_open(&port, &options);
    if (error == 0)
        an_port_free(port);
    else if (row->interface->explain != NULL)
        row->interface->explain(error, reason, AN_REASON_SIZE);
    else
        snprintf(reason, AN_REASON_SIZE, "refused by the system: %s", strerror(error));
    return error == 0 ? NULL : reason;
}

size_t an_backends(an_backend_description *descriptions, size_t capacity) {
    for (size_t i = 0; i < AN_BACKEND_ROWS && i < capacity; i++) {
        char reason[AN_REASON_SIZE];
        const char *absence = probe(&an_backend_rows[i], reason);
        descriptions[i].name = an_backend_rows[i].name;
        descriptions[i].available = absence == NULL;
        snprintf(descriptions[i].reason, AN_REASON_SIZE, "%s", absence != NULL ? absence : "");
    }
    return AN_BACKEND_ROWS;
}

#if !defined(AN_VERSION_STRING)
#error "AN_VERSION_STRING comes from the build, which takes it from pyproject.toml"
#endif

const char *an_version(void) { return AN_VERSION_STRING; }
