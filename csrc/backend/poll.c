/* poll.c - the reactor on poll(2), for systems that have nothing better: level-triggered, asked per direction.
 *
 * An entry stands at the index that its tag's low half gives. A direction is asked for by expect and reported once. The
 * one thread that waits polls a list of its own, as others change the entries meanwhile; who changes them ends its poll, also
 * because poll(2) holds the files that it watches: one closed meanwhile would tell its peer only later.
 * Cost: a wait is proportional to the number of descriptors, which is poll's nature.
 */
#if !defined(_WIN32)

#include "reactor.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>

struct entry {
    int descriptor;      /* -1: free */
    uint32_t generation; /* the tag's high half */
    uint32_t expected;   /* enum reactor_event: directions asked for */
};

struct an_reactor {
    struct an_mutex lock;
    struct entry *entries; /* lock */
    uint32_t count;        /* lock */
    bool waiting;          /* lock: a thread is in poll */
    bool wake_written;     /* lock: the pipe holds a byte */
    struct an_wakeup wakeup;
    /* The waiting thread's: what it polls, and how far it has reported what the last poll found. */
    struct pollfd *polled; /* [0] is the pipe */
    uint64_t *tags;        /* of polled[i] */
    uint32_t polled_count;
    uint32_t capacity;
    uint32_t cursor;
};

static void close_reactor(struct an_reactor *reactor) {
    an_wakeup_close(&reactor->wakeup);
    free(reactor->entries);
    free(reactor->polled);
    free(reactor->tags);
    an_mutex_destroy(&reactor->lock);
    free(reactor);
}

static int open_reactor(struct an_reactor **opened) {
    struct an_reactor *reactor = calloc(1, sizeof *reactor);
    if (reactor == NULL)
        return ENOMEM;
    int error = an_wakeup_open(&reactor->wakeup);
    if (error != 0) {
        free(reactor);
        return error;
    }
    an_mutex_init(&reactor->lock);
    *opened = reactor;
    return 0;
}

static void wake_locked(struct an_reactor *reactor) {
    if (!reactor->wake_written)
        an_wakeup_ring(&reactor->wakeup);
    reactor->wake_written = true;
}

static bool make_room(struct an_reactor *reactor, uint32_t index) {
    uint32_t needed = reactor->count;
    while (needed <= index)
        needed = needed == 0 ? 64 : needed * 2;
    if (needed == reactor->count)
        return true;
    struct entry *entries = realloc(reactor->entries, needed * sizeof *entries);
    if (entries == NULL)
        return false;
    for (uint32_t i = reactor->count; i < needed; i++)
        entries[i] = (struct entry){.descriptor = -1};
    reactor->entries = entries;
    reactor->count = needed;
    return true;
}

static int add(struct an_reactor *reactor, an_descriptor descriptor, uint64_t tag) {
    uint32_t index = (uint32_t)tag;
    an_mutex_lock(&reactor->lock);
    int error = make_room(reactor, index) ? 0 : ENOMEM;
    if (error == 0)
        reactor->entries[index] = (struct entry){.descriptor = (int)descriptor, .generation = (uint32_t)(tag >> 32)};
    an_mutex_unlock(&reactor->lock);
    return error;
}

static void remove_descriptor(struct an_reactor *reactor, an_descriptor descriptor, uint64_t tag) {
    (void)descriptor;
    an_mutex_lock(&reactor->lock);
    reactor->entries[(uint32_t)tag] = (struct entry){.descriptor = -1};
    if (reactor->waiting)
        wake_locked(reactor);
    an_mutex_unlock(&reactor->lock);
}

static void expect(struct an_reactor *reactor, uint64_t tag, uint32_t direction) {
    an_mutex_lock(&reactor->lock);
    struct entry *entry = &reactor->entries[(uint32_t)tag];
    assert(entry->generation == (uint32_t)(tag >> 32));
    entry->expected |= direction;
    if (reactor->waiting)
        wake_locked(reactor);
    an_mutex_unlock(&reactor->lock);
}

static bool make_room_to_poll(struct an_reactor *reactor) {
    uint32_t needed = reactor->count + 1;
    if (reactor->capacity >= needed)
        return true;
    struct pollfd *polled = realloc(reactor->polled, needed * sizeof *polled);
    if (polled != NULL)
        reactor->polled = polled;
    uint64_t *tags = realloc(reactor->tags, needed * sizeof *tags);
    if (tags != NULL)
        reactor->tags = tags;
    if (polled == NULL || tags == NULL)
        return false;
    reactor->capacity = needed;
    return true;
}

/* Lists the entries that expect something, and only those: others would report their end for ever, and poll(2) refuses
 * more entries than the process may have descriptors. */
static int list_expecting(struct an_reactor *reactor) {
    if (!make_room_to_poll(reactor))
        return ENOMEM;
    reactor->polled[0] = (struct pollfd){.fd = (int)reactor->wakeup.read_end, .events = POLLIN};
    uint32_t count = 1;
    for (uint32_t i = 0; i < reactor->count; i++) {
        const struct entry *entry = &reactor->entries[i];
        short events = 0;
        if ((entry->expected & REACTOR_RECEIVE) != 0)
            events |= POLLIN; /* not POLLPRI: it stays on while an urgent byte stands, and receives do not take it */
        if ((entry->expected & REACTOR_TRANSMIT) != 0)
            events |= POLLOUT;
        if (events == 0)
            continue;
        reactor->polled[count] = (struct pollfd){.fd = entry->descriptor, .events = events};
        reactor->tags[count++] = (uint64_t)entry->generation << 32 | i;
    }
    reactor->polled_count = count;
    return 0;
}

static uint32_t translate(short native) {
    const short ended = POLLHUP | POLLERR | POLLNVAL;
    uint32_t events = 0;
    if ((native & (POLLIN | ended)) != 0)
        events |= REACTOR_RECEIVE;
    if ((native & (POLLOUT | ended)) != 0)
        events |= REACTOR_TRANSMIT;
    return events;
}

/* Reports what the last poll found and nobody was told yet, as far as it is still expected. lock held. */
static size_t report(struct an_reactor *reactor, struct an_reactor_report *reports) {
    size_t count = 0;
    while (reactor->cursor < reactor->polled_count && count < AN_REPORTS) {
        uint32_t place = reactor->cursor++;
        short found = reactor->polled[place].revents;
        uint64_t tag = reactor->tags[place];
        struct entry *entry = &reactor->entries[(uint32_t)tag];
        if (found == 0 || entry->descriptor < 0 || entry->generation != (uint32_t)(tag >> 32))
            continue;
        uint32_t events = translate(found) & entry->expected;
        entry->expected &= ~events;
        if (events != 0)
            reports[count++] = (struct an_reactor_report){tag, events};
    }
    return count;
}

static int poll_once(struct an_reactor *reactor, int64_t until_ns, bool *woken) {
    int error = list_expecting(reactor);
    if (error != 0)
        return error;
    reactor->waiting = true;
    an_mutex_unlock(&reactor->lock);
    int found = poll(reactor->polled, reactor->polled_count, an_milliseconds_until(until_ns));
    error = found < 0 ? errno : 0;
    an_mutex_lock(&reactor->lock);
    reactor->waiting = false;
    reactor->cursor = found > 0 ? 1 : reactor->polled_count;
    *woken = found > 0 && reactor->polled[0].revents != 0;
    if (*woken) {
        an_wakeup_drain(&reactor->wakeup);
        reactor->wake_written = false;
    }
    return error;
}

static int wait_for_reports(struct an_reactor *reactor, int64_t until_ns, struct an_reactor_report *reports,
                            size_t *count, bool *woken) {
    int error = 0;
    *woken = false;
    an_mutex_lock(&reactor->lock);
    *count = report(reactor, reports);
    if (*count == 0) {
        error = poll_once(reactor, until_ns, woken);
        if (error == 0)
            *count = report(reactor, reports);
    }
    an_mutex_unlock(&reactor->lock);
    return error;
}

static void wake(struct an_reactor *reactor) {
    an_mutex_lock(&reactor->lock);
    wake_locked(reactor);
    an_mutex_unlock(&reactor->lock);
}

const struct an_reactor_interface an_reactor_poll = {
    .name = "poll",
    .open = open_reactor,
    .close = close_reactor,
    .add = add,
    .remove = remove_descriptor,
    .expect = expect,
    .wait = wait_for_reports,
    .wake = wake,
    .descriptor = NULL,
    .alarm = NULL,
};

#endif
