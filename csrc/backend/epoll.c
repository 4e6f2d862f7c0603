/* epoll.c - the reactor on Linux' epoll(7): each socket registered once, edge-triggered, for both directions.
 *
 * No call per operation: what was ready at registration and each edge after it is reported. Waking is an eventfd that is
 * never read, as each write makes an edge. Knows descriptors and tags only.
 */
#if defined(__linux__)

#include "reactor.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

struct an_reactor {
    int epoll;
    int wakeup;
    int alarm; /* -1 until somebody watches the port; under the port's lock */
    struct epoll_event events[AN_REPORTS];
};

/* No socket has these: a tag's low half is an index that counts from 0. */
static const uint64_t TAG_WAKEUP = UINT64_MAX;
static const uint64_t TAG_ALARM = UINT64_MAX - 1;

static void close_reactor(struct an_reactor *reactor) {
    if (reactor->alarm >= 0)
        close(reactor->alarm);
    if (reactor->wakeup >= 0)
        close(reactor->wakeup);
    if (reactor->epoll >= 0)
        close(reactor->epoll);
    free(reactor);
}

static int watch_for_input(struct an_reactor *reactor, int descriptor, uint64_t tag) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = tag};
    return epoll_ctl(reactor->epoll, EPOLL_CTL_ADD, descriptor, &event) < 0 ? errno : 0;
}

static int open_reactor(struct an_reactor **opened) {
    struct an_reactor *reactor = malloc(sizeof *reactor);
    if (reactor == NULL)
        return ENOMEM;
    reactor->alarm = -1;
    reactor->wakeup = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    int error = reactor->wakeup < 0 ? errno : 0;
    reactor->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (error == 0 && reactor->epoll < 0)
        error = errno;
    if (error == 0)
        error = watch_for_input(reactor, reactor->wakeup, TAG_WAKEUP);
    if (error != 0) {
        close_reactor(reactor);
        return error;
    }
    *opened = reactor;
    return 0;
}

static int add(struct an_reactor *reactor, an_descriptor descriptor, uint64_t tag) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLPRI | EPOLLRDHUP | EPOLLET, .data.u64 = tag};
    return epoll_ctl(reactor->epoll, EPOLL_CTL_ADD, (int)descriptor, &event) < 0 ? errno : 0;
}

/* Left to close only by who knows that there is no other descriptor: one that a forked child holds open keeps the
 * registration as well. */
static void remove_descriptor(struct an_reactor *reactor, an_descriptor descriptor, uint64_t tag) {
    struct epoll_event unused = {0};
    (void)tag;
    epoll_ctl(reactor->epoll, EPOLL_CTL_DEL, (int)descriptor, &unused);
}

static uint32_t translate(uint32_t native) {
    const uint32_t ended = EPOLLHUP | EPOLLERR;
    uint32_t events = 0;
    if ((native & (EPOLLIN | EPOLLPRI | EPOLLRDHUP | ended)) != 0)
        events |= REACTOR_RECEIVE;
    if ((native & (EPOLLOUT | ended)) != 0)
        events |= REACTOR_TRANSMIT;
    if ((native & (EPOLLPRI | EPOLLRDHUP | ended)) != 0)
        events |= REACTOR_HIDDEN;
    return events;
}

static int wait_for_reports(struct an_reactor *reactor, int64_t until_ns, struct an_reactor_report *reports,
                            size_t *count, bool *woken) {
    int found = epoll_wait(reactor->epoll, reactor->events, AN_REPORTS, an_milliseconds_until(until_ns));
    *count = 0;
    *woken = false;
    if (found < 0)
        return errno;
    for (int i = 0; i < found; i++) {
        uint64_t tag = reactor->events[i].data.u64;
        if (tag == TAG_WAKEUP)
            *woken = true;
        else if (tag != TAG_ALARM)
            reports[(*count)++] = (struct an_reactor_report){tag, translate(reactor->events[i].events)};
    }
    return 0;
}

static void wake(struct an_reactor *reactor) {
    uint64_t one = 1;
    ssize_t written;
    do
        written = write(reactor->wakeup, &one, sizeof one);
    while (written < 0 && errno == EINTR);
    assert(written == sizeof one || errno == EAGAIN); /* 2^64 - 2 wake-ups do not come */
}

static int get_descriptor(struct an_reactor *reactor, an_descriptor *descriptor) {
    if (reactor->alarm < 0) {
        int alarm = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        int error = alarm < 0 ? errno : watch_for_input(reactor, alarm, TAG_ALARM);
        if (error != 0) {
            if (alarm >= 0)
                close(alarm);
            return error;
        }
        reactor->alarm = alarm;
    }
    *descriptor = reactor->epoll;
    return 0;
}

static void set_alarm(struct an_reactor *reactor, int64_t due_ns) {
    struct itimerspec when = {0}; /* all zero disarms: timerfd_settime(2) */
    if (due_ns != AN_NEVER) {
        when.it_value.tv_sec = (time_t)(due_ns / 1000000000);
        when.it_value.tv_nsec = (long)(due_ns % 1000000000);
    }
    int result = timerfd_settime(reactor->alarm, TFD_TIMER_ABSTIME, &when, NULL);
    assert(result == 0); /* it takes any time after 0 */
    (void)result;
}

const struct an_reactor_interface an_reactor_epoll = {
    .name = "epoll",
    .forgets = true,
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
