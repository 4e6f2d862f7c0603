/* backend.h - what the core asks of a backend: a completion port on one system interface.
 *
 * A backend performs the operations that stand in a socket's directions and completes them through operation.c. It
 * knows sockets and operations, never the queue or the threads. Readiness systems do not implement this: they are
 * reactors (reactor.h) under the one adapter, proactor.c.
 */
#ifndef AN_BACKEND_H
#define AN_BACKEND_H

#include "core.h"

/* What a try at a send came to. */
enum attempt { ATTEMPT_DONE, ATTEMPT_AGAIN, ATTEMPT_FAILED };

struct an_backend_interface {
    /* 0 or why not; `port` is where its events belong. */
    int (*open)(struct an_backend **backend, an_port *port, const void *detail);
    /* No thread waits, no socket is attached any more. In a forked child: only the child's descriptors are closed. */
    void (*close)(struct an_backend *backend);
    /* A socket came to the port. socket.lock held. */
    int (*attach)(struct an_backend *backend, an_socket *socket);
    /* It leaves; its descriptor is closed next. True: the system holds its file for requests under way, so that closing
     * the descriptor alone would tell the peer nothing. socket.lock held. */
    bool (*detach)(struct an_backend *backend, an_socket *socket);
    /* Closes the descriptor of a detached socket now, or as soon as nothing looks at its number any more. NULL: now, which
     * the core does. socket.lock held. */
    void (*close_descriptor)(struct an_backend *backend, an_socket *socket);
    /* Tries a send at once that has none before it. Moves record.transferred on; *error for ATTEMPT_FAILED. The
     * operation is in no direction and may be a draft on the stack. socket.lock held. */
    enum attempt (*try_send)(struct an_backend *backend, an_socket *socket, struct operation *operation, int *error);
    /* The operation was appended to its direction. socket.lock held. */
    void (*start)(struct an_backend *backend, an_socket *socket, struct operation *operation);
    /* What held the direction back may be over (resumed, less unsent, retry is due, an operation ended before its turn).
     * socket.lock held. */
    void (*proceed)(struct an_backend *backend, an_socket *socket, struct an_direction *direction);
    /* The first operation of the transmit direction ends before its time: what the system does for it goes on without it or
     * is broken off, and what went out is counted (an_perform_count). NULL: the system has nothing in hand. socket.lock
     * held. */
    void (*withdraw)(struct an_backend *backend, an_socket *socket, struct operation *operation);
    /* A synchronous call has shut one or both sides: what waits there in the system must end. NULL: it does by itself.
     * socket.lock held. */
    void (*shut)(struct an_backend *backend, an_socket *socket, int how);
    /* The direction has operations and is not ready: see that it is made ready when it may be. socket.lock held. */
    void (*await)(struct an_backend *backend, an_socket *socket, struct an_direction *direction);
    /* Whether wait looks at the port's ready list before it waits (an_port_take_ready, an_port_begin_wait); else it is
     * called with until_ns 0 when something stands there. */
    bool prepares;
    /* Threads wait in the system together, each by a call of its own, and no follower waits outside: one event ends the
     * wait of one of them, and so does one wake. What came they perform in turns (an_port_take_turn). Else one thread at a
     * time waits, the leader. */
    bool together;
    /* Waits for events until `until_ns` (0: not at all) and performs what they allow. The leader, or any number of threads
     * (together); without locks. Returns 0 or AN_EINTR. */
    int (*wait)(struct an_backend *backend, int64_t until_ns);
    /* Ends a wait, also one that has not begun yet. Together: of one thread, each time; what a wait took of them it tells
     * an_port_take_turn. Any thread. */
    void (*wake)(struct an_backend *backend);
    /* See an_port_descriptor. port.lock held. */
    int (*watch)(struct an_backend *backend, an_descriptor *descriptor);
    /* Watched: the descriptor must turn readable at due_ns (AN_NEVER: not). port.lock held. */
    void (*alarm)(struct an_backend *backend, int64_t due_ns);
    /* Writes what an error of open means to a user. NULL: the system's own text for it says enough. */
    void (*explain)(int error, char *reason, size_t size);
};

/* One row for each backend that the API knows, the fastest first. `interface` NULL: not compiled in. */
struct an_backend_row {
    const char *name;
    const struct an_backend_interface *interface;
    const void *detail; /* handed to open */
    const char *absence;
};

enum { AN_BACKEND_ROWS = 5 };

extern const struct an_backend_row an_backend_rows[AN_BACKEND_ROWS];

/* Gives a new port the backend of that name (NULL and "auto" included). AN_ENOTSUP, or the error of the system. */
int an_backend_open(an_port *port, const char *name);

#endif
