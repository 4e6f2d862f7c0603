/* proactor.c - the adapter that makes a readiness system into a completion port: try without blocking; where the system
 * says "not now", try again when the reactor reports the socket; only then queue the completion.
 *
 * Written once for all reactors. How an operation is tried stands in perform.c; here is when: what the reactor reports,
 * and what it is asked to report. Knows a reactor only through reactor.h.
 */
#include "core.h"

#include "backend.h"
#include "perform.h"
#include "proactor.h"

#include <errno.h>
#include <stdlib.h>

struct an_backend {
    an_port *port;
    const struct an_reactor_interface *interface;
    struct an_reactor *reactor;
    /* A second reactor that sees the same sockets, once somebody watches the port: for one without a descriptor. */
    const struct an_reactor_interface *mirror_interface; /* NULL: not needed, or none can be had */
    bool mirror_filled;                                  /* port.lock */
    struct an_reactor *mirror;                           /* atomic */
    struct an_reactor_report reports[AN_REPORTS];        /* leader */
    an_socket *sockets[AN_REPORTS];                      /* leader */
};

static struct an_reactor *mirror_of(struct an_backend *backend) {
    return an_atomic_load_pointer((void *const *)&backend->mirror);
}

/* ---- readiness ----------------------------------------------------------------------------------------------------------- */

static void await(struct an_backend *backend, an_socket *socket, struct an_direction *direction) {
    if (backend->interface->expect == NULL || direction->armed)
        return;
    direction->armed = true;
    uint32_t event = direction == &socket->receive ? REACTOR_RECEIVE : REACTOR_TRANSMIT;
    backend->interface->expect(backend->reactor, socket->tag, event);
    struct an_reactor *mirror = mirror_of(backend);
    if (mirror != NULL) /* what stands there already makes no further edge in it */
        backend->mirror_interface->wake(mirror);
}

/* ---- the interface, in the header's order ---------------------------------------------------------------------------------------- */

static int adapter_open(struct an_backend **opened, an_port *port, const void *detail) {
    const struct an_proactor_detail *reactors = detail;
    struct an_backend *backend = calloc(1, sizeof *backend);
    if (backend == NULL)
        return AN_ENOMEM;
    backend->port = port;
    backend->interface = reactors->reactor;
    backend->mirror_interface = reactors->mirror;
    int error = backend->interface->open(&backend->reactor);
    if (error != 0) {
        free(backend);
        return error;
    }
    port->edge_triggered = backend->interface->expect == NULL;
    *opened = backend;
    return 0;
}

static void adapter_close(struct an_backend *backend) {
    if (backend->mirror != NULL)
        backend->mirror_interface->close(backend->mirror);
    backend->interface->close(backend->reactor);
    free(backend);
}

/* Attaching and opening the mirror may meet: then it is there already. */
static int add_to_mirror(struct an_backend *backend, struct an_reactor *mirror, const an_socket *socket) {
    int error = backend->mirror_interface->add(mirror, socket->descriptor, socket->tag);
    return error == EEXIST ? 0 : error;
}

static int adapter_attach(struct an_backend *backend, an_socket *socket) {
    int error = backend->interface->add(backend->reactor, socket->descriptor, socket->tag);
    struct an_reactor *mirror = mirror_of(backend);
    if (error == 0 && backend->interface->silent && !socket->accepted)
        socket->receive.ready = true;
    if (error != 0 || mirror == NULL)
        return error;
    error = add_to_mirror(backend, mirror, socket);
    if (error != 0)
        backend->interface->remove(backend->reactor, socket->descriptor, socket->tag);
    return error;
}

static bool adapter_detach(struct an_backend *backend, an_socket *socket) {
    struct an_reactor *mirror = mirror_of(backend);
    if (!backend->interface->forgets || !an_socket_is_sole_holder(socket))
        backend->interface->remove(backend->reactor, socket->descriptor, socket->tag);
    if (mirror != NULL)
        backend->mirror_interface->remove(mirror, socket->descriptor, socket->tag);
    return false;
}

static void handle_report(struct an_backend *backend, an_socket *socket, uint32_t events) {
    an_mutex_lock(&socket->lock);
    if ((events & REACTOR_RECEIVE) != 0) {
        socket->receive.ready = true;
        socket->receive.armed = false;
        socket->hidden = (events & REACTOR_HIDDEN) != 0;
        socket->reported = backend->interface->expect != NULL;
    }
    if ((events & REACTOR_TRANSMIT) != 0) {
        socket->transmit.ready = true;
        socket->transmit.armed = false;
    }
    an_perform_both(socket);
    an_mutex_unlock(&socket->lock);
}

static void handle_ready(an_socket *socket) {
    an_mutex_lock(&socket->lock);
    if (socket->receive.starved)
        socket->receive.retry_ns = AN_NEVER; /* a descriptor may be free now */
    an_perform_both(socket);
    an_mutex_unlock(&socket->lock);
}

static void handle_all_reports(struct an_backend *backend, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (backend->sockets[i] == NULL)
            continue;
        handle_report(backend, backend->sockets[i], backend->reports[i].events);
        an_socket_drop(backend->sockets[i]);
    }
}

static void handle_all_ready(an_port *port, an_socket *first) {
    an_socket *socket, *next;
    for (socket = first; socket != NULL && port->pass_bytes < AN_PASS_BYTES; socket = next) {
        next = socket->pass_next;
        handle_ready(socket);
        an_socket_drop(socket);
    }
    if (socket != NULL)
        an_port_return_ready(port, socket);
}

static int adapter_wait(struct an_backend *backend, int64_t until_ns) {
    an_port *port = backend->port;
    struct an_reactor *mirror = mirror_of(backend);
    size_t count = 0;
    bool woken = false, mirror_woken = false;
    if (mirror != NULL) /* it only has to turn readable; what it saw until now is seen below as well */
        backend->mirror_interface->wait(mirror, 0, backend->reports, &count, &mirror_woken);
    count = 0;
    int error = backend->interface->wait(backend->reactor, until_ns, backend->reports, &count, &woken);
    if (mirror != NULL && (count == AN_REPORTS || error != 0))
        backend->mirror_interface->wake(mirror); /* there is more to tell than this pass took */
    an_mutex_lock(&port->lock);
    an_socket *expired = an_port_begin_pass(port, woken || mirror_woken);
    an_socket *ready = an_port_take_ready(port);
    for (size_t i = 0; i < count; i++)
        backend->sockets[i] = an_port_find(port, backend->reports[i].tag);
    an_mutex_unlock(&port->lock);
    handle_all_ready(port, ready); /* first: they have waited longer, and there is an end to what a pass receives */
    handle_all_reports(backend, count);
    an_socket_expire_all(expired);
    return error;
}

static void adapter_wake(struct an_backend *backend) {
    struct an_reactor *mirror = mirror_of(backend);
    backend->interface->wake(backend->reactor);
    if (mirror != NULL)
        backend->mirror_interface->wake(mirror);
}

/* Opens the mirror and shows it the sockets that are there; those that come later attach to it. port.lock held. */
static int fill_mirror(struct an_backend *backend) {
    an_port *port = backend->port;
    int error = 0;
    if (backend->mirror == NULL) {
        struct an_reactor *mirror;
        error = backend->mirror_interface->open(&mirror);
        if (error != 0)
            return error;
        an_atomic_store_pointer((void **)&backend->mirror, mirror);
    }
    for (uint32_t i = 0; i < port->slot_count && error == 0; i++) {
        an_socket *socket = port->slots[i].socket; /* it must pass port.lock before its descriptor is closed */
        if (socket != NULL)
            error = add_to_mirror(backend, backend->mirror, socket);
    }
    backend->mirror_filled = error == 0;
    return error;
}

static int adapter_watch(struct an_backend *backend, an_descriptor *descriptor) {
    if (backend->interface->descriptor != NULL)
        return backend->interface->descriptor(backend->reactor, descriptor);
    if (backend->mirror_interface == NULL)
        return AN_ENOTSUP;
    int error = backend->mirror_filled ? 0 : fill_mirror(backend);
    return error != 0 ? error : backend->mirror_interface->descriptor(backend->mirror, descriptor);
}

static void adapter_alarm(struct an_backend *backend, int64_t due_ns) {
    struct an_reactor *mirror = mirror_of(backend);
    if (mirror != NULL)
        backend->mirror_interface->alarm(mirror, due_ns);
    else if (backend->interface->alarm != NULL)
        backend->interface->alarm(backend->reactor, due_ns);
}

const struct an_backend_interface an_proactor = {
    .open = adapter_open,
    .close = adapter_close,
    .attach = adapter_attach,
    .detach = adapter_detach,
    .close_descriptor = NULL,
    .try_send = an_perform_try_send,
    .start = an_perform_start,
    .proceed = an_perform_proceed,
    .await = await,
    .wait = adapter_wait,
    .wake = adapter_wake,
    .watch = adapter_watch,
    .alarm = adapter_alarm,
};
