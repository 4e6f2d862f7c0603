/* kqueue.c - the reactor on kqueue(2) of macOS and the BSDs: each socket registered once in both directions, with EV_CLEAR.
 *
 * No call per operation: what was ready at registration and each edge after it is reported. A kqueue knows a descriptor's
 * two directions as two filters, whose events are two reports. Waking is an event of our own (EVFILT_USER), or a pipe where
 * the system is too old for it. Knows descriptors and tags only.
 */
#include "reactor.h"

#if defined(AN_HAVE_KQUEUE)

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/types.h>

#include <sys/event.h>
#include <sys/time.h>
#include <unistd.h>

_Static_assert(sizeof((struct kevent){0}.udata) == sizeof(uint64_t), "a tag travels as udata");

struct an_reactor {
    int kqueue;
    struct an_wakeup pipe;    /* -1: EVFILT_USER serves */
    uint32_t fork_generation; /* of the process that the kqueue belongs to */
    struct kevent events[AN_REPORTS];
};

/* No socket has these: a tag's low half is an index that counts from 0. */
static const uint64_t TAG_WAKEUP = UINT64_MAX;
static const uint64_t TAG_ALARM = UINT64_MAX - 1;

enum { ALARM_IDENT = 1, WAKEUP_IDENT = 2 };

/* udata is a pointer, or an intptr_t on older NetBSD; filter is signed, or unsigned on NetBSD. */
static struct kevent change(an_descriptor ident, int filter, unsigned short flags, uint64_t tag) {
    struct kevent made = {0};
    made.ident = (uintptr_t)ident;
    made.filter = (__typeof__(made.filter))filter;
    made.flags = flags;
    made.udata = (__typeof__(made.udata))(uintptr_t)tag;
    return made;
}

/* Makes the changes and takes no events. They have been made also where a signal came meanwhile. Stops at the first one
 * that is refused. */
static int apply(const struct an_reactor *reactor, const struct kevent *changes, unsigned short count) {
    static const struct timespec at_once = {0, 0};
    return kevent(reactor->kqueue, changes, count, NULL, 0, &at_once) < 0 && errno != EINTR ? errno : 0;
}

/* ---- waking ------------------------------------------------------------------------------------------------------------- */

#if defined(EVFILT_USER)

static int open_wakeup(struct an_reactor *reactor) {
    struct kevent wakeup = change(WAKEUP_IDENT, EVFILT_USER, EV_ADD | EV_CLEAR, TAG_WAKEUP);
    return apply(reactor, &wakeup, 1);
}

static void ring(struct an_reactor *reactor) {
    struct kevent wakeup = change(WAKEUP_IDENT, EVFILT_USER, 0, TAG_WAKEUP);
    wakeup.fflags = NOTE_TRIGGER;
    int error = apply(reactor, &wakeup, 1);
    assert(error == 0); /* what is there already needs no memory */
    (void)error;
}

static void drain(const struct an_reactor *reactor) { (void)reactor; } /* EV_CLEAR did */

#else

static int open_wakeup(struct an_reactor *reactor) {
    int error = an_wakeup_open(&reactor->pipe);
    if (error != 0)
        return error;
    struct kevent wakeup = change(reactor->pipe.read_end, EVFILT_READ, EV_ADD | EV_CLEAR, TAG_WAKEUP);
    return apply(reactor, &wakeup, 1);
}

static void ring(struct an_reactor *reactor) { an_wakeup_ring(&reactor->pipe); }

/* One that rings after the bytes were taken makes a new edge; before, and this wait answers for it. */
static void drain(const struct an_reactor *reactor) { an_wakeup_drain(&reactor->pipe); }

#endif

/* ---- the interface, in the header's order ---------------------------------------------------------------------------- */

/* A forked child has a copy of the pipe and none of the kqueue: its number may be another file's there. */
static void close_reactor(struct an_reactor *reactor) {
    if (reactor->pipe.read_end >= 0)
        an_wakeup_close(&reactor->pipe);
    if (reactor->kqueue >= 0 && reactor->fork_generation == an_fork_generation())
        close(reactor->kqueue);
    free(reactor);
}

/* Not inherited by fork, but kept by exec. */
static int open_kqueue(struct an_reactor *reactor) {
    reactor->kqueue = kqueue();
    if (reactor->kqueue < 0 || fcntl(reactor->kqueue, F_SETFD, FD_CLOEXEC) < 0)
        return errno;
    return 0;
}

static int open_reactor(struct an_reactor **opened) {
    struct an_reactor *reactor = malloc(sizeof *reactor);
    if (reactor == NULL)
        return ENOMEM;
    reactor->pipe.read_end = -1;
    reactor->fork_generation = an_fork_generation();
    int error = open_kqueue(reactor);
    if (error == 0)
        error = open_wakeup(reactor);
    if (error != 0) {
        close_reactor(reactor);
        return error;
    }
    *opened = reactor;
    return 0;
}

/* Where the second change was the refused one, the first is undone. */
static int add(struct an_reactor *reactor, an_descriptor descriptor, uint64_t tag) {
    struct kevent changes[] = {
        change(descriptor, EVFILT_READ, EV_ADD | EV_CLEAR, tag),
        change(descriptor, EVFILT_WRITE, EV_ADD | EV_CLEAR, tag),
    };
    int error = apply(reactor, changes, 2);
    if (error != 0) {
        struct kevent undo = change(descriptor, EVFILT_READ, EV_DELETE, tag);
        apply(reactor, &undo, 1);
    }
    return error;
}

/* Closing the descriptor would do it as well, but a wait that begins before that must not report it. Each change has its
 * own call where the first is refused (ENOENT): it keeps the second from being made. */
static void remove_descriptor(struct an_reactor *reactor, an_descriptor descriptor, uint64_t tag) {
    struct kevent changes[] = {
        change(descriptor, EVFILT_READ, EV_DELETE, tag),
        change(descriptor, EVFILT_WRITE, EV_DELETE, tag),
    };
    if (apply(reactor, changes, 2) != 0)
        apply(reactor, &changes[1], 1);
}

/* An end that was there is told by EV_EOF; but no flag that all systems have tells of an urgent byte, at which a receive
 * stops with more behind it. So a receive that comes back short never means "empty" here: it costs a server one more
 * receive a message, and is right. The end of one direction is told to both: a send may have to fail now. */
static uint32_t translate(const struct kevent *event) {
    if ((event->flags & (EV_EOF | EV_ERROR)) != 0)
        return REACTOR_RECEIVE | REACTOR_HIDDEN | REACTOR_TRANSMIT;
    return event->filter == EVFILT_READ ? REACTOR_RECEIVE | REACTOR_HIDDEN : REACTOR_TRANSMIT;
}

/* The time left, NULL for AN_NEVER. A day at most: some systems refuse years (macOS: over 10^8 s), and a wait may end
 * without reports before its time. */
static const struct timespec *time_left(int64_t until_ns, struct timespec *left) {
    const int64_t day_ns = INT64_C(86400000000000);
    if (until_ns == AN_NEVER)
        return NULL;
    int64_t left_ns = until_ns == 0 ? 0 : until_ns - an_clock();
    if (left_ns < 0)
        left_ns = 0;
    if (left_ns > day_ns)
        left_ns = day_ns;
    left->tv_sec = (time_t)(left_ns / 1000000000);
    left->tv_nsec = (long)(left_ns % 1000000000);
    return left;
}

static int wait_for_reports(struct an_reactor *reactor, int64_t until_ns, struct an_reactor_report *reports,
                            size_t *count, bool *woken) {
    struct timespec left;
    int found = kevent(reactor->kqueue, NULL, 0, reactor->events, AN_REPORTS, time_left(until_ns, &left));
    *count = 0;
    *woken = false;
    if (found < 0)
        return errno;
    for (int i = 0; i < found; i++) {
        uint64_t tag = (uint64_t)(uintptr_t)reactor->events[i].udata;
        if (tag == TAG_WAKEUP)
            *woken = true;
        else if (tag != TAG_ALARM)
            reports[(*count)++] = (struct an_reactor_report){tag, translate(&reactor->events[i])};
    }
    if (*woken)
        drain(reactor);
    return 0;
}

static void wake(struct an_reactor *reactor) { ring(reactor); }

static int get_descriptor(struct an_reactor *reactor, an_descriptor *descriptor) {
    *descriptor = reactor->kqueue;
    return 0;
}

/* Milliseconds are the one unit that all systems share. Deleted first: older systems leave a timer that is there its time
 * when it is added again. Where the system has no room for one (FreeBSD: kern.kq_calloutmax) the descriptor turns readable
 * at once: too early does less harm than never. */
static void set_alarm(struct an_reactor *reactor, int64_t due_ns) {
    struct kevent timer = change(ALARM_IDENT, EVFILT_TIMER, EV_DELETE, TAG_ALARM);
    apply(reactor, &timer, 1);
    if (due_ns == AN_NEVER)
        return;
    int64_t left_ns = due_ns - an_clock();
    timer = change(ALARM_IDENT, EVFILT_TIMER, EV_ADD | EV_ONESHOT, TAG_ALARM);
    timer.data = (__typeof__(timer.data))(left_ns <= 0 ? 1 : (left_ns - 1) / 1000000 + 1);
    if (apply(reactor, &timer, 1) != 0)
        wake(reactor);
}

const struct an_reactor_interface an_reactor_kqueue = {
    .name = "kqueue",
    .silent = true,
    .open = open_reactor,
    .close = close_reactor,
    .add = add,
    .remove = remove_descriptor,
    .expect = NULL,
    .wait = wait_for_reports,
    .wake = wake,
    .descriptor = get_descriptor,
    .alarm = set_alarm,
};

#endif
