/* kqueue.c - a stand-in for kqueue(2) on Linux, so that the logic of csrc/backend/kqueue.c is tested where no BSD is.
 *
 * It is a kqueue in what that file relies on: a descriptor has two filters with states of their own; EV_CLEAR reports what
 * is there at EV_ADD and then each edge; EV_EOF comes with what is still to read; a filter that was deleted is reported
 * no more, also by a thread that looks just then; a timer fires once; a user's event once for all triggers before it is
 * taken; the queue's descriptor is readable while events stand in it; timeouts are relative and fine; a signal ends a wait;
 * a forked child has no kqueue. What it does not do it refuses (EINVAL).
 *
 * How: an epoll for each filter with each descriptor edge-triggered, the timer and the user's event within one epoll, which is
 * the queue's descriptor. No descriptor is duplicated: that would keep a closed connection open.
 *
 * It does not prove what the systems' kernels do: when they make an edge (they wake a writer at each acknowledgement), what
 * they say of half-closed and reset connections, of urgent bytes, of AF_UNIX, of a socket that was never connected; how
 * exact their timers are; their limits; fflags (the socket's error), which is always 0 here; what happens to filters of a
 * descriptor that is closed with a duplicate elsewhere. Nor does it prove anything of speed.
 */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* ppoll, POLLRDHUP */
#endif

#include <sys/event.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>

#undef close

enum { FILTER_READ, FILTER_WRITE, FILTERS, BATCH = 256 };

/* A filter of a descriptor. The generation tells an event of an earlier one, which epoll may have handed out already. */
struct watch {
    void *udata;
    uint32_t generation;
    bool present;
};

struct queue {
    struct queue *next; /* queues_lock */
    int outer;          /* the queue's descriptor */
    int inner[FILTERS];
    int timer; /* -1 until there was one */
    int user;  /* likewise */
    pthread_mutex_t lock;
    struct watch *watches[FILTERS]; /* lock; by descriptor */
    int watch_count;                /* lock */
    bool timer_present;             /* lock */
    uintptr_t timer_ident;          /* lock */
    void *timer_udata;              /* lock */
    uintptr_t user_ident;           /* lock */
    void *user_udata;               /* lock */
    int turn;                       /* lock: the filter that is looked at first, so that none starves */
};

static pthread_mutex_t queues_lock = PTHREAD_MUTEX_INITIALIZER;
static struct queue *queues;

static void give_back(struct queue *queue) {
    for (int filter = 0; filter < FILTERS; filter++) {
        if (queue->inner[filter] >= 0)
            close(queue->inner[filter]);
        free(queue->watches[filter]);
    }
    if (queue->timer >= 0)
        close(queue->timer);
    if (queue->user >= 0)
        close(queue->user);
    if (queue->outer >= 0)
        close(queue->outer);
    free(queue);
}

/* ---- fork: the child has no kqueues --------------------------------------------------------------------------------- */

static void before_fork(void) { pthread_mutex_lock(&queues_lock); }

static void after_fork_in_parent(void) { pthread_mutex_unlock(&queues_lock); }

static void after_fork_in_child(void) {
    while (queues != NULL) {
        struct queue *queue = queues;
        queues = queue->next;
        give_back(queue);
    }
    pthread_mutex_unlock(&queues_lock);
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }

/* ---- life ---------------------------------------------------------------------------------------------------------- */

static bool nest(struct queue *queue, int descriptor) {
    struct epoll_event event = {.events = EPOLLIN};
    return epoll_ctl(queue->outer, EPOLL_CTL_ADD, descriptor, &event) == 0;
}

int kqueue(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    struct queue *queue = calloc(1, sizeof *queue);
    if (queue == NULL) {
        errno = ENOMEM; /* not left to calloc: a test's own may not set it */
        return -1;
    }
    queue->timer = queue->user = -1;
    queue->outer = epoll_create1(0);
    for (int filter = 0; filter < FILTERS; filter++)
        queue->inner[filter] = epoll_create1(EPOLL_CLOEXEC);
    bool whole = queue->outer >= 0;
    for (int filter = 0; filter < FILTERS; filter++)
        whole = whole && queue->inner[filter] >= 0 && nest(queue, queue->inner[filter]);
    if (!whole) {
        int error = errno;
        give_back(queue);
        errno = error;
        return -1;
    }
    pthread_mutex_init(&queue->lock, NULL);
    pthread_mutex_lock(&queues_lock);
    queue->next = queues;
    queues = queue;
    pthread_mutex_unlock(&queues_lock);
    return queue->outer;
}

static struct queue *find(int descriptor) {
    pthread_mutex_lock(&queues_lock);
    struct queue *queue = queues;
    while (queue != NULL && queue->outer != descriptor)
        queue = queue->next;
    pthread_mutex_unlock(&queues_lock);
    return queue;
}

int kqueue_close(int descriptor) {
    pthread_mutex_lock(&queues_lock);
    struct queue **place = &queues;
    while (*place != NULL && (*place)->outer != descriptor)
        place = &(*place)->next;
    struct queue *queue = *place;
    if (queue != NULL)
        *place = queue->next;
    pthread_mutex_unlock(&queues_lock);
    if (queue == NULL)
        return close(descriptor);
    pthread_mutex_destroy(&queue->lock);
    give_back(queue);
    return 0;
}

/* ---- changes: queue->lock held; 0 or an error ------------------------------------------------------------------------- */

static bool make_room(struct queue *queue, int descriptor) {
    int needed = queue->watch_count;
    while (needed <= descriptor)
        needed = needed == 0 ? 64 : needed * 2;
    for (int filter = 0; needed > queue->watch_count && filter < FILTERS; filter++) {
        struct watch *watches = realloc(queue->watches[filter], (size_t)needed * sizeof *watches);
        if (watches == NULL)
            return false;
        for (int i = queue->watch_count; i < needed; i++)
            watches[i] = (struct watch){0};
        queue->watches[filter] = watches;
    }
    queue->watch_count = needed;
    return true;
}

static int add_watch(struct queue *queue, int filter, int descriptor, void *udata) {
    if (!make_room(queue, descriptor))
        return ENOMEM;
    struct watch *watch = &queue->watches[filter][descriptor];
    uint32_t generation = watch->generation + 1;
    struct epoll_event event = {.events = EPOLLET | (filter == FILTER_READ ? EPOLLIN | EPOLLRDHUP : EPOLLOUT),
                                .data.u64 = (uint64_t)generation << 32 | (uint32_t)descriptor};
    int result = epoll_ctl(queue->inner[filter], EPOLL_CTL_ADD, descriptor, &event);
    if (result < 0 && errno == EEXIST)
        result = epoll_ctl(queue->inner[filter], EPOLL_CTL_MOD, descriptor, &event);
    if (result < 0)
        return errno;
    *watch = (struct watch){.udata = udata, .generation = generation, .present = true};
    return 0;
}

static int delete_watch(struct queue *queue, int filter, int descriptor) {
    struct epoll_event unused = {0};
    if (descriptor >= queue->watch_count || !queue->watches[filter][descriptor].present)
        return ENOENT;
    queue->watches[filter][descriptor].present = false;
    return epoll_ctl(queue->inner[filter], EPOLL_CTL_DEL, descriptor, &unused) < 0 ? errno : 0;
}

static int set_timer(struct queue *queue, int64_t ms) {
    struct itimerspec when = {.it_value = {.tv_sec = (time_t)(ms / 1000), .tv_nsec = (long)(ms % 1000) * 1000000}};
    return timerfd_settime(queue->timer, 0, &when, NULL) < 0 ? errno : 0;
}

static int add_timer(struct queue *queue, const struct kevent *change) {
    if ((change->flags & EV_ONESHOT) == 0 || change->data < 1 || change->fflags != 0)
        return EINVAL;
    if (queue->timer_present && queue->timer_ident != change->ident)
        return EINVAL;
    if (queue->timer < 0) {
        queue->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        if (queue->timer < 0 || !nest(queue, queue->timer))
            return errno;
    }
    queue->timer_present = true;
    queue->timer_ident = change->ident;
    queue->timer_udata = change->udata;
    return set_timer(queue, change->data);
}

static int delete_timer(struct queue *queue, const struct kevent *change) {
    if (!queue->timer_present || queue->timer_ident != change->ident)
        return ENOENT;
    queue->timer_present = false;
    return set_timer(queue, 0);
}

static int add_user(struct queue *queue, const struct kevent *change) {
    if (change->flags != (EV_ADD | EV_CLEAR) || change->fflags != 0 || queue->user >= 0)
        return EINVAL;
    queue->user = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (queue->user < 0 || !nest(queue, queue->user))
        return errno;
    queue->user_ident = change->ident;
    queue->user_udata = change->udata;
    return 0;
}

static int trigger_user(struct queue *queue, const struct kevent *change) {
    uint64_t one = 1;
    if (change->flags != 0 || change->fflags != NOTE_TRIGGER)
        return EINVAL;
    if (queue->user < 0 || queue->user_ident != change->ident)
        return ENOENT;
    return write(queue->user, &one, sizeof one) == sizeof one ? 0 : errno;
}

static int apply(struct queue *queue, const struct kevent *change) {
    bool adds = (change->flags & EV_ADD) != 0;
    bool is_timer = change->filter == EVFILT_TIMER;
    if (change->filter == AN_STAND_IN_USER)
        return adds ? add_user(queue, change) : trigger_user(queue, change);
    int known = EV_ADD | EV_DELETE | (is_timer ? EV_ONESHOT : EV_CLEAR);
    if ((change->flags & ~known) != 0 || adds == ((change->flags & EV_DELETE) != 0))
        return EINVAL;
    if (is_timer)
        return adds ? add_timer(queue, change) : delete_timer(queue, change);
    if (change->filter != EVFILT_READ && change->filter != EVFILT_WRITE)
        return EINVAL;
    if (adds && (change->flags & EV_CLEAR) == 0)
        return EINVAL;
    if (change->ident > INT32_MAX)
        return EBADF;
    int filter = change->filter == EVFILT_READ ? FILTER_READ : FILTER_WRITE;
    return adds ? add_watch(queue, filter, (int)change->ident, change->udata)
                : delete_watch(queue, filter, (int)change->ident);
}

/* ---- events -------------------------------------------------------------------------------------------------------- */

/* Linux says "hung up" of a stream that was never connected, of which a kqueue says nothing. */
static bool was_never_connected(int descriptor) {
    struct pollfd asked = {.fd = descriptor, .events = POLLRDHUP};
    return poll(&asked, 1, 0) == 1 && (asked.revents & (POLLHUP | POLLRDHUP | POLLERR)) == POLLHUP;
}

static bool translate(const struct queue *queue, int filter, const struct epoll_event *native, struct kevent *event) {
    int descriptor = (int)(uint32_t)native->data.u64;
    const struct watch *watch = &queue->watches[filter][descriptor];
    if (!watch->present || watch->generation != (uint32_t)(native->data.u64 >> 32))
        return false;
    if ((native->events & EPOLLHUP) != 0 && was_never_connected(descriptor))
        return false;
    uint32_t ended = filter == FILTER_READ ? EPOLLHUP | EPOLLRDHUP : EPOLLHUP;
    int unread = 0;
    if (filter == FILTER_READ && ioctl(descriptor, FIONREAD, &unread) < 0)
        unread = 1; /* a listener: at least one connection */
    *event = (struct kevent){.ident = (uintptr_t)descriptor,
                             .filter = filter == FILTER_READ ? EVFILT_READ : EVFILT_WRITE,
                             .flags = EV_ADD | EV_CLEAR | ((native->events & ended) != 0 ? EV_EOF : 0),
                             .data = unread,
                             .udata = watch->udata};
    return true;
}

static int collect_filter(struct queue *queue, int filter, struct kevent *events, int room) {
    struct epoll_event native[BATCH];
    int count = 0;
    if (room == 0)
        return 0;
    int found = epoll_wait(queue->inner[filter], native, room < BATCH ? room : BATCH, 0);
    for (int i = 0; i < found; i++)
        count += translate(queue, filter, &native[i], &events[count]);
    return count;
}

static int collect_timer(struct queue *queue, struct kevent *events, int room) {
    uint64_t expirations;
    if (room == 0 || !queue->timer_present ||
        read(queue->timer, &expirations, sizeof expirations) != sizeof expirations)
        return 0;
    queue->timer_present = false;
    events[0] = (struct kevent){.ident = queue->timer_ident,
                                .filter = EVFILT_TIMER,
                                .flags = EV_ADD | EV_ONESHOT,
                                .data = 1,
                                .udata = queue->timer_udata};
    return 1;
}

static int collect_user(struct queue *queue, struct kevent *events, int room) {
    uint64_t triggers;
    if (room == 0 || queue->user < 0 || read(queue->user, &triggers, sizeof triggers) != sizeof triggers)
        return 0;
    events[0] = (struct kevent){
        .ident = queue->user_ident, .filter = AN_STAND_IN_USER, .flags = EV_ADD | EV_CLEAR, .udata = queue->user_udata};
    return 1;
}

static int collect(struct queue *queue, struct kevent *events, int room) {
    pthread_mutex_lock(&queue->lock);
    int count = collect_timer(queue, events, room);
    count += collect_user(queue, events + count, room - count);
    int first = queue->turn;
    queue->turn = FILTERS - 1 - first;
    count += collect_filter(queue, first, events + count, room - count);
    count += collect_filter(queue, FILTERS - 1 - first, events + count, room - count);
    pthread_mutex_unlock(&queue->lock);
    return count;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Also 0 when only events stood there that are none: the caller looks at the time. */
static int wait_and_collect(struct queue *queue, struct kevent *events, int room, int64_t until_ns) {
    struct pollfd asked = {.fd = queue->outer, .events = POLLIN};
    struct timespec left;
    if (until_ns >= 0) {
        int64_t left_ns = until_ns - now_ns();
        left_ns = left_ns > 0 ? left_ns : 0;
        left = (struct timespec){.tv_sec = left_ns / 1000000000, .tv_nsec = left_ns % 1000000000};
    }
    if (ppoll(&asked, 1, until_ns >= 0 ? &left : NULL, NULL) < 0)
        return -1;
    return collect(queue, events, room);
}

int kevent(int descriptor, const struct kevent *changes, int change_count, struct kevent *events, int event_count,
           const struct timespec *timeout) {
    struct queue *queue = find(descriptor);
    int count = 0;
    if (queue == NULL) {
        errno = EBADF;
        return -1;
    }
    for (int i = 0; i < change_count; i++) {
        pthread_mutex_lock(&queue->lock);
        int error = apply(queue, &changes[i]);
        pthread_mutex_unlock(&queue->lock);
        if (error != 0 && count == event_count) {
            errno = error;
            return -1;
        }
        if (error != 0) {
            events[count] = changes[i];
            events[count].flags = EV_ERROR;
            events[count++].data = error;
        }
    }
    if (count > 0 || event_count == 0)
        return count;
    if (timeout != NULL && (timeout->tv_sec < 0 || timeout->tv_nsec < 0 || timeout->tv_nsec > 999999999)) {
        errno = EINVAL;
        return -1;
    }
    int64_t until_ns = timeout == NULL ? -1 : now_ns() + (int64_t)timeout->tv_sec * 1000000000 + timeout->tv_nsec;
    count = collect(queue, events, event_count);
    while (count == 0 && (until_ns < 0 || now_ns() < until_ns))
        count = wait_and_collect(queue, events, event_count, until_ns);
    return count;
}
