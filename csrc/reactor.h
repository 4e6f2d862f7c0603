/* reactor.h - what the adapter asks of a readiness system (epoll, poll, kqueue): tell when a socket may be tried again.
 *
 * A reactor names no operation and no socket; it knows descriptors, tags and two directions. A new one is one file
 * with these functions in this order and a row in backends.c.
 */
#ifndef AN_REACTOR_H
#define AN_REACTOR_H

#include "os.h"

/* Systems with kqueue(2). A build defines it by itself to try that reactor elsewhere, on a stand-in. */
#if defined(__APPLE__) || defined(__FreeBSD__) || defined(__OpenBSD__) || defined(__NetBSD__) || defined(__DragonFly__)
#define AN_HAVE_KQUEUE 1
#endif

enum reactor_event {
    REACTOR_RECEIVE = 1, /* a receive is worth a try */
    REACTOR_TRANSMIT = 2,
    REACTOR_HIDDEN =
        4 /* edge-triggered, with RECEIVE: an end, error or urgent byte may stand behind a receive that comes back short */
};

struct an_reactor_report {
    uint64_t tag;
    uint32_t events; /* enum reactor_event */
};

enum { AN_REPORTS = 256 }; /* reports of one wait */

struct an_reactor; /* each reactor's own */

struct an_reactor_interface {
    const char *name;
    /* Edge-triggered, and silent of a stream that was neither connected nor listened on, which others report as hung up:
     * the adapter tries the first receive of a socket unasked, and so finds the misuse. */
    bool silent;
    /* Closing the last descriptor of a file ends the watching: then remove may be left out. */
    bool forgets;
    int (*open)(struct an_reactor **reactor);
    void (*close)(struct an_reactor *reactor);
    /* Watches a descriptor in both directions until remove. The low half of `tag` is a small index that no other
     * descriptor in the reactor has. Any thread. */
    int (*add)(struct an_reactor *reactor, an_descriptor descriptor, uint64_t tag);
    /* After it no wait that begins later reports the tag. Before the descriptor is closed (see forgets). Any thread. */
    void (*remove)(struct an_reactor *reactor, an_descriptor descriptor, uint64_t tag);
    /* Level-triggered reactors: report that direction once when it is ready. NULL: edge-triggered, each edge is
     * reported anyhow, and what was ready at add as well. Any thread. */
    void (*expect)(struct an_reactor *reactor, uint64_t tag, uint32_t direction);
    /* Waits until `until_ns` on an_clock (0: not at all) for up to AN_REPORTS reports. *woken: wake was called. One
     * thread at a time. AN_EINTR: a signal. */
    int (*wait)(struct an_reactor *reactor, int64_t until_ns, struct an_reactor_report *reports, size_t *count,
                bool *woken);
    /* Ends a wait, also the next one if none is under way. Any thread. */
    void (*wake)(struct an_reactor *reactor);
    /* A descriptor that is readable while a wait would report something or be woken. NULL: has none. */
    int (*descriptor)(struct an_reactor *reactor, an_descriptor *descriptor);
    /* That descriptor turns readable at due_ns as well (AN_NEVER: not), which ends a wait. After descriptor only. */
    void (*alarm)(struct an_reactor *reactor, int64_t due_ns);
};

extern const struct an_reactor_interface an_reactor_epoll;
extern const struct an_reactor_interface an_reactor_kqueue;
extern const struct an_reactor_interface an_reactor_poll;

#endif
