/* Threads that wait in the system together (backend.h), on a stand-in for Windows' completion port: as there, one packet
 * ends the wait of one thread, and one wait may take several packets. So what port.c promises of it is tried natively, under
 * ThreadSanitizer as well. This file defines the choice of backends anew: the linker takes it not from the library. */
#include "backend.h"
#include "check.h"

#include <pthread.h>
#include <sched.h>

enum {
    PACKETS = 1 << 10, /* room; more are never under way */
    TAKEN = 3,         /* by one wait at most */
    DEQUEUERS = 4,
    PRODUCERS = 3,
    ROUNDS = 3000, /* of each producer, in each of its ways */
    WAYS = 3
};

/* ---- the completion port ----------------------------------------------------------------------------------------------- */

struct an_backend {
    an_port *port;
    struct an_mutex lock;
    struct an_condition arrived;
    an_operation *packets[PACKETS]; /* lock; NULL: a wake-up */
    uint32_t first;                 /* lock */
    uint32_t count;                 /* lock */
    uint32_t performing;            /* atomic: threads whose turn it is */
};

static void put_locked(struct an_backend *backend, an_operation *operation) {
    CHECK(backend->count < PACKETS);
    backend->packets[(backend->first + backend->count++) % PACKETS] = operation;
    an_condition_signal(&backend->arrived);
}

static uint32_t get(struct an_backend *backend, int64_t until_ns, an_operation **packets) {
    uint32_t taken = 0;
    an_mutex_lock(&backend->lock);
    while (backend->count == 0 && until_ns > an_clock())
        an_condition_wait(&backend->arrived, &backend->lock, until_ns);
    for (; taken < TAKEN && backend->count > 0; backend->count--) {
        packets[taken++] = backend->packets[backend->first];
        backend->first = (backend->first + 1) % PACKETS;
    }
    an_mutex_unlock(&backend->lock);
    return taken;
}

static void perform(struct an_backend *backend, an_operation **packets, uint32_t count) {
    CHECK(an_atomic_add32(&backend->performing, 1) == 0);
    sched_yield(); /* the others come back meanwhile */
    for (uint32_t i = 0; i < count; i++) {
        if (packets[i] != NULL)
            an_port_queue(backend->port, &an_operation_private(packets[i])->record);
    }
    CHECK(an_atomic_add32(&backend->performing, (uint32_t)-1) == 1);
}

static int wait_for_packets(struct an_backend *backend, int64_t until_ns) {
    an_port *port = backend->port;
    an_operation *packets[TAKEN];
    uint32_t wakes = 0;
    uint32_t count = get(backend, until_ns, packets);
    for (uint32_t i = 0; i < count; i++)
        wakes += packets[i] == NULL ? 1 : 0;
    an_mutex_lock(&port->lock);
    if (an_port_take_turn(port, until_ns, wakes, count > wakes)) {
        CHECK(an_port_begin_pass(port, false) == NULL && an_port_take_ready(port) == NULL); /* there are no sockets */
        an_mutex_unlock(&port->lock);
        perform(backend, packets, count);
        an_mutex_lock(&port->lock);
        an_port_end_turn(port);
    }
    an_mutex_unlock(&port->lock);
    return 0;
}

static void wake(struct an_backend *backend) {
    an_mutex_lock(&backend->lock);
    put_locked(backend, NULL);
    an_mutex_unlock(&backend->lock);
}

static void close_backend(struct an_backend *backend) {
    an_condition_destroy(&backend->arrived);
    an_mutex_destroy(&backend->lock);
    free(backend);
}

static const struct an_backend_interface completion_port = {
    .close = close_backend,
    .together = true,
    .wait = wait_for_packets,
    .wake = wake,
};

int an_backend_open(an_port *port, const char *name) {
    (void)name;
    struct an_backend *backend = calloc(1, sizeof *backend);
    CHECK(backend != NULL);
    backend->port = port;
    an_mutex_init(&backend->lock);
    an_condition_init(&backend->arrived);
    port->name = "stand-in";
    port->interface = &completion_port;
    port->backend = backend;
    return 0;
}

/* ---- those who dequeue ----------------------------------------------------------------------------------------------------- */

struct item {
    an_operation operation;
    uint32_t handled; /* atomic */
};

static an_port *port;
static uint32_t handled;      /* atomic */
static uint32_t side_by_side; /* so many must be handled before one of those who handle them goes on */
static pthread_t dequeuers[DEQUEUERS];

static an_statistics counts(void) {
    an_statistics statistics;
    CHECK_OK(an_port_statistics(port, &statistics));
    return statistics;
}

/* At first it comes back at once, so that the race is close; then it leaves a busy processor to those it waits for. */
static void pass_time(uint32_t *turns, int64_t until_ns) {
    CHECK(an_clock() < until_ns);
    if (++*turns < 200)
        sched_yield();
    else
        rest_us(100);
}

static void until(uint32_t *value, uint32_t expected) {
    int64_t until_ns = an_clock() + 20 * SECOND;
    uint32_t turns = 0;
    while (an_atomic_load32(value) != expected)
        pass_time(&turns, until_ns);
}

static void handle(const an_completion *completion) {
    struct item *item = completion->state;
    CHECK(completion->operation == &item->operation);
    an_atomic_add32(&handled, 1);
    if (side_by_side > 0)
        until(&handled, side_by_side);
    an_atomic_add32(&item->handled, 1); /* from here on it is its producer's */
}

/* Some take more at once than others, and some wait for a short time only. */
static void *dequeue_until_closed(void *number_as_pointer) {
    size_t number = (size_t)(uintptr_t)number_as_pointer;
    an_completion batch[2];
    size_t count;
    int error;
    while ((error = an_port_dequeue(port, batch, 1 + number % 2, number < 2 ? AN_FOREVER : SECOND / 1000, &count)) ==
           0) {
        for (size_t i = 0; i < count; i++)
            handle(&batch[i]);
    }
    CHECK(error == AN_EPORTCLOSED);
    return NULL;
}

static void *dequeue_for_ever(void *unused) {
    (void)unused;
    return dequeue_until_closed(NULL);
}

static void start_dequeuers(void *(*dequeue)(void *number)) {
    handled = 0;
    for (size_t i = 0; i < DEQUEUERS; i++)
        CHECK_OK(pthread_create(&dequeuers[i], NULL, dequeue, (void *)(uintptr_t)i));
}

static void close_with_dequeuers(void) {
    CHECK_OK(an_port_close(port));
    for (int i = 0; i < DEQUEUERS; i++)
        CHECK_OK(pthread_join(dequeuers[i], NULL));
    CHECK(an_port_in_flight(port) == 0);
    an_port_free(port);
}

/* ---- those who start, or whose events come ------------------------------------------------------------------------------------- */

/* What the system brings by itself, all at the same time. */
static void bring(struct item *items, size_t count) {
    struct an_backend *backend = port->backend;
    for (size_t i = 0; i < count; i++) {
        struct operation *operation = an_operation_private(&items[i].operation);
        memset(operation, 0, sizeof *operation);
        operation->record = (struct an_record){.operation = &items[i].operation, .lent = &items[i], .kind = AN_POST};
        an_atomic_add64(&port->started[AN_POST], 1);
    }
    an_mutex_lock(&backend->lock);
    for (size_t i = 0; i < count; i++)
        put_locked(backend, &items[i].operation);
    an_mutex_unlock(&backend->lock);
}

static void start(struct item *item, int way) {
    if (way == 0)
        bring(item, 1);
    else if (way == 1)
        CHECK_OK(an_port_post(port, &item->operation, item));
    else
        CHECK_OK(an_port_timer(port, &item->operation, SECOND / 10000, item));
}

/* One at a time, so that a wake-up that is lost leaves all of them asleep. */
static void *produce(void *unused) {
    struct item item = {.handled = 0};
    (void)unused;
    for (uint32_t round = 0; round < ROUNDS * WAYS; round++) {
        start(&item, (int)(round % WAYS));
        until(&item.handled, round + 1);
    }
    return NULL;
}

static void produce_all(void) {
    pthread_t producers[PRODUCERS];
    for (int i = 0; i < PRODUCERS; i++)
        CHECK_OK(pthread_create(&producers[i], NULL, produce, NULL));
    for (int i = 0; i < PRODUCERS; i++)
        CHECK_OK(pthread_join(producers[i], NULL));
    CHECK(handled == PRODUCERS * WAYS * ROUNDS);
}

static void open_port_with(void *(*dequeue)(void *number)) {
    CHECK_OK(an_port_open(&port, NULL));
    start_dequeuers(dequeue);
}

static void nothing_is_lost(void) {
    open_port_with(dequeue_until_closed);
    produce_all();
    close_with_dequeuers();
}

static void nothing_is_lost_where_nobody_wakes_up_by_himself(void) {
    open_port_with(dequeue_for_ever);
    produce_all();
    close_with_dequeuers();
}

/* ---- how many wake up ------------------------------------------------------------------------------------------------------------ */

static void until_all_wait(void) {
    int64_t until_ns = an_clock() + 20 * SECOND;
    uint32_t turns = 0;
    while (counts().gauge_waiting != DEQUEUERS)
        pass_time(&turns, until_ns);
}

/* `most`: waits of all threads together, until all of them wait again. */
static void costs(int way, uint64_t wakeups, uint64_t most) {
    struct item item = {.handled = 0};
    open_port_with(dequeue_for_ever);
    until_all_wait();
    an_statistics before = counts();
    start(&item, way);
    until(&item.handled, 1);
    until_all_wait();
    CHECK(counts().wakeups - before.wakeups == wakeups);
    uint64_t waits = counts().waits - before.waits;
    CHECK(waits >= 1 && waits <= most);
    close_with_dequeuers();
}

static void one_thread_wakes_up_for_each(void) {
    costs(0, 0, 1); /* an event: no wake-up of ours */
    costs(1, 1, 1);
    costs(2, 1, 2); /* who was told of the timer waits for it, unless it was due by then */
}

static void one_thread_looks_after_a_timer_that_all_find(void) {
    struct item item = {.handled = 0};
    CHECK_OK(an_port_open(&port, NULL));
    CHECK_OK(an_port_timer(port, &item.operation, SECOND, &item));
    start_dequeuers(dequeue_for_ever);
    until_all_wait();
    an_statistics before = counts();
    until(&item.handled, 1);
    until_all_wait();
    CHECK(counts().wakeups == before.wakeups);
    CHECK(counts().waits - before.waits == 1);
    close_with_dequeuers();
}

/* ---- who leaves hands on ------------------------------------------------------------------------------------------------------------ */

/* One wait takes all of them; who took them handles one, and does not come back before the others are handled. */
static void events_of_one_wait_go_to_a_thread_each(void) {
    struct item items[TAKEN] = {{.handled = 0}};
    side_by_side = TAKEN;
    open_port_with(dequeue_for_ever);
    until_all_wait();
    bring(items, TAKEN);
    until(&handled, TAKEN);
    close_with_dequeuers();
    side_by_side = 0;
}

/* Who looked after the first has left when the second one is due. */
static void timers_go_to_a_thread_each(void) {
    struct item items[2] = {{.handled = 0}};
    side_by_side = 2;
    open_port_with(dequeue_for_ever);
    until_all_wait();
    for (int i = 0; i < 2; i++)
        CHECK_OK(an_port_timer(port, &items[i].operation, (i * 20 + 1) * SECOND / 1000, &items[i]));
    until(&handled, 2);
    close_with_dequeuers();
    side_by_side = 0;
}

int main(void) {
    one_thread_wakes_up_for_each();
    one_thread_looks_after_a_timer_that_all_find();
    events_of_one_wait_go_to_a_thread_each();
    timers_go_to_a_thread_each();
    nothing_is_lost();
    nothing_is_lost_where_nobody_wakes_up_by_himself();
    return 0;
}
