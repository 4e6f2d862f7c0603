/* port.c - the port: its queue, the threads that wait for it, its sockets' slots, its timers.
 *
 * One queue, a leader and followers. Whoever dequeues and finds the queue empty becomes the leader if there is none, and
 * waits in the system; the others wait on a condition. The leader performs what the events allow, which queues
 * completions; then it takes its share and leaves, waking a follower that leads on. Who queues something wakes a follower
 * before the leader: the leader's wait in the system is dear to break off and dear to begin.
 *
 *            queue empty, no leader            events, or woken              nothing left to do
 *   (NONE) -----------------------> WAITING -------------------> PROCESSING ------------------> (NONE)
 *
 * On a completion port of the system's own, threads wait in the system together and nobody follows. Then PROCESSING says
 * that one of them performs, and WAITING that none does and at least one waits. What holds, under port.lock:
 *   - one thread performs at a time, the others that came back with something wait for their turn, which is passed on: so
 *     all that is the leader's is that thread's. Handling what was dequeued goes on side by side;
 *   - whenever there is something in the queue or the ready list, or a timer is due before a waiting thread is known to look,
 *     then nobody waits, or a thread is on its way to look: one performs, or has its turn to come, or a wake-up was sent that
 *     no wait has reported. Who performs looks again before it leaves, and who leaves wakes one for what it leaves behind;
 *   - no more wake-ups are under way than threads wait. One wait may take several of them: who took them hands on;
 *   - one of the waiting threads looks after the timers, so that not all of them wake up for each.
 *
 * Knows sockets only as what has a slot, a ready mark and a deadline; knows no backend by name.
 */
#include "core.h"

#include "backend.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { SLOTS_LEAST = 64 };
enum { POLL_EVERY = 64 }; /* completions handed out before the system is asked again: posts cannot starve sockets */

/* ---- life ---------------------------------------------------------------------------------------------------------- */

void an_port_hold(an_port *port) { an_atomic_add32(&port->references, 1); }

void an_port_drop(an_port *port) {
    if (an_atomic_add32(&port->references, (uint32_t)-1) != 1)
        return;
    an_pool_destroy(&port->pool);
    an_slabs_drop(port->slabs);
    an_condition_destroy(&port->turn);
    an_condition_destroy(&port->changed);
    an_mutex_destroy(&port->lock);
    free(port->timers.heap);
    free(port->slots);
    free(port);
}

bool an_port_is_foreign(const an_port *port) { return port->fork_generation != an_fork_generation(); }

static an_port *port_create(const an_port_options *options) {
    an_fork_count(); /* from here on forks are counted */
    an_port *port = calloc(1, sizeof *port);
    struct an_slabs *slabs = an_slabs_create();
    if (port == NULL || slabs == NULL) {
        if (slabs != NULL)
            an_slabs_drop(slabs);
        free(port);
        return NULL;
    }
    port->slabs = slabs;
    port->fork_generation = an_fork_generation();
    port->references = 1;
    port->concurrency = options->concurrency;
    port->flags = options->flags;
    an_mutex_init(&port->lock);
    an_condition_init(&port->changed);
    an_condition_init(&port->turn);
    an_pool_init(&port->pool);
    return port;
}

int an_port_open(an_port **opened, const an_port_options *options) {
    static const an_port_options defaults = {0};
    if (options == NULL)
        options = &defaults;
    if (options->concurrency > 1 || (options->flags & ~(uint32_t)AN_PORT_INTERRUPTIBLE) != 0)
        return AN_EINVAL;
    an_port *port = port_create(options);
    if (port == NULL)
        return AN_ENOMEM;
    int error = an_backend_open(port, options->backend);
    if (error != 0) {
        an_port_drop(port);
        return error;
    }
    port->together = port->interface->together;
    port->leader_until_ns = AN_NEVER;
    *opened = port;
    return 0;
}

const char *an_port_backend(const an_port *port) { return port->name; }

int an_port_is_closed(an_port *port) { return an_port_is_foreign(port) || an_atomic_load32(&port->closed) != 0; }

/* ---- waking ---------------------------------------------------------------------------------------------------------- */

static void wake_backend(an_port *port) {
    if (port->wakes >= (port->together ? port->waiting : 1))
        return;
    port->wakes++;
    port->counts.wakeups++;
    port->interface->wake(port->backend);
}

static bool has_follower_to_wake(const an_port *port) { return port->followers > port->signalled; }

static void wake_follower(an_port *port) {
    port->signalled++;
    an_condition_signal(&port->changed);
}

/* There is something in the queue, or for the leader to do. A leader that processes looks again before it leaves. */
static void wake_for_completion(an_port *port) {
    if (port->leader == LEADER_PROCESSING)
        return;
    if (has_follower_to_wake(port))
        wake_follower(port);
    else if (port->leader == LEADER_WAITING || port->watched)
        wake_backend(port);
}

static void wake_for_leader(an_port *port) {
    if (port->leader == LEADER_WAITING || (port->leader == LEADER_NONE && port->watched))
        wake_backend(port);
}

/* ---- the queue --------------------------------------------------------------------------------------------------------- */

static void count_completion(an_port *port, const struct an_record *record) {
    if (record->error == 0)
        port->counts.completed[record->kind]++;
    else if (record->error == AN_ECANCELED)
        port->counts.cancelled[record->kind]++;
    else
        port->counts.failed[record->kind]++;
}

/* What a record counts against the bounds of reading ahead, if it borrows from the pool: its bytes and its own room; an
 * accepted connection much more, as it holds a descriptor: some 180 of them for a listener. */
static uint64_t weight(const struct an_record *record) {
    if (record->socket == NULL || record->lent == NULL)
        return 0;
    return record->transferred + (record->accepted != NULL ? 4096 : sizeof(struct an_block));
}

static void queue_locked(an_port *port, struct an_record *record) {
    record->next = NULL;
    if (port->tail != NULL)
        port->tail->next = record;
    else
        port->head = record;
    port->tail = record;
    port->queued++;
    count_completion(port, record);
    uint64_t bytes = weight(record);
    if (bytes != 0) {
        an_atomic_bump64(&port->ahead, bytes);
        an_atomic_bump64(&record->socket->ahead, bytes);
    }
    if (record->home == RECORD_IN_QUIET)
        an_atomic_add32(&record->socket->unreported, 1);
    wake_for_completion(port);
}

void an_port_queue(an_port *port, struct an_record *record) {
    an_mutex_lock(&port->lock);
    queue_locked(port, record);
    an_mutex_unlock(&port->lock);
}

static void append_ready(an_port *port, an_socket *socket) {
    if (socket->on_ready)
        return;
    socket->on_ready = true;
    socket->ready_next = NULL;
    an_socket_hold(socket);
    if (port->ready_tail != NULL)
        port->ready_tail->ready_next = socket;
    else
        port->ready_head = socket;
    port->ready_tail = socket;
}

static void make_ready_locked(an_port *port, an_socket *socket) {
    append_ready(port, socket);
    wake_for_leader(port);
}

void an_port_make_ready(an_port *port, an_socket *socket) {
    an_mutex_lock(&port->lock);
    make_ready_locked(port, socket);
    an_mutex_unlock(&port->lock);
}

/* ---- bounds of reading ahead --------------------------------------------------------------------------------------------- */

/* Both counts grow in the leader alone, who asks: what it reads without the lock can only be too much. */
bool an_port_throttles(an_port *port, an_socket *socket) {
    const uint64_t of_socket = AN_AHEAD_OF_SOCKET - AN_RECEIVE_LARGEST;
    const uint64_t of_port = AN_AHEAD_OF_PORT - AN_RECEIVE_LARGEST;
    if (an_atomic_load64(&socket->ahead) <= of_socket && an_atomic_load64(&port->ahead) <= of_port)
        return false;
    an_mutex_lock(&port->lock);
    if (socket->ahead > of_socket)
        socket->throttled = true;
    if (port->ahead > of_port && !socket->on_throttled) {
        socket->on_throttled = true;
        socket->throttled_next = port->throttled;
        port->throttled = socket;
        an_socket_hold(socket);
    }
    bool throttles = socket->throttled || socket->on_throttled;
    an_mutex_unlock(&port->lock);
    return throttles;
}

/* A record left the queue: who waited for its room goes on. */
static void relax(an_port *port, const struct an_record *record) {
    uint64_t bytes = weight(record);
    if (bytes == 0)
        return;
    an_socket *socket = record->socket;
    an_atomic_bump64(&socket->ahead, 0 - bytes);
    an_atomic_bump64(&port->ahead, 0 - bytes);
    if (socket->throttled && socket->ahead <= AN_AHEAD_OF_SOCKET / 2) {
        socket->throttled = false;
        make_ready_locked(port, socket);
    }
    while (port->throttled != NULL && port->ahead <= AN_AHEAD_OF_PORT / 2) {
        an_socket *waiting = port->throttled;
        port->throttled = waiting->throttled_next;
        waiting->on_throttled = false;
        make_ready_locked(port, waiting);
        an_socket_drop(waiting); /* the ready list holds it now */
    }
}

void an_port_starve(an_port *port, an_socket *socket) {
    an_mutex_lock(&port->lock);
    if (!socket->on_starved) {
        socket->on_starved = true;
        socket->starved_next = port->starved;
        an_atomic_store_pointer((void **)&port->starved, socket);
        an_socket_hold(socket);
    }
    an_mutex_unlock(&port->lock);
}

/* ---- slots ----------------------------------------------------------------------------------------------------------------- */

an_socket *an_port_find(an_port *port, uint64_t tag) {
    uint32_t slot = (uint32_t)tag;
    if (slot >= port->slot_count || port->slots[slot].generation != (uint32_t)(tag >> 32))
        return NULL;
    an_socket *socket = port->slots[slot].socket;
    if (socket != NULL)
        an_socket_hold(socket);
    return socket;
}

static bool grow_slots(an_port *port) {
    if (port->free_slot != 0 || port->slot_count < port->slot_capacity)
        return true;
    uint32_t capacity = port->slot_capacity == 0 ? SLOTS_LEAST : port->slot_capacity * 2;
    struct an_slot *slots = realloc(port->slots, capacity * sizeof *slots);
    if (slots == NULL)
        return false;
    port->slots = slots;
    port->slot_capacity = capacity;
    return true;
}

/* Those behind the last socket go, and the free ones before it are taken from the first on, so that it is reached at all. */
static void tidy_slots(an_port *port) {
    while (port->slot_count > 0 && port->slots[port->slot_count - 1].socket == NULL)
        port->slot_count--;
    port->free_slot = 0;
    for (uint32_t index = port->slot_count; index > 0; index--) {
        struct an_slot *slot = &port->slots[index - 1];
        if (slot->socket != NULL)
            continue;
        slot->next_free = port->free_slot;
        port->free_slot = index;
    }
}

/* A socket left. Looks when half of the slots are free and a quarter of them were left since it last looked, which makes it
 * cheap for each; so also who stood behind all others for long keeps them no longer. To fresh memory, as in timer.c. */
static void shrink_slots(an_port *port) {
    uint32_t sockets = (uint32_t)port->counts.gauge_sockets;
    uint32_t capacity = SLOTS_LEAST;
    port->slots_left++;
    if (port->slot_capacity <= SLOTS_LEAST || sockets > port->slot_count / 2)
        return;
    if (sockets > 0 && port->slots_left < port->slot_count / 4)
        return;
    port->slots_left = 0;
    tidy_slots(port);
    while (capacity / 2 < port->slot_count)
        capacity *= 2;
    struct an_slot *slots = capacity < port->slot_capacity ? malloc(capacity * sizeof *slots) : NULL;
    if (slots == NULL)
        return;
    memcpy(slots, port->slots, port->slot_count * sizeof *slots);
    free(port->slots);
    port->slots = slots;
    port->slot_capacity = capacity;
}

static uint32_t take_slot(an_port *port) {
    if (port->free_slot == 0) {
        port->slots[port->slot_count] = (struct an_slot){0};
        return port->slot_count++;
    }
    uint32_t slot = port->free_slot - 1;
    port->free_slot = port->slots[slot].next_free;
    return slot;
}

int an_port_enter(an_port *port, an_socket *socket) {
    int error = 0;
    an_mutex_lock(&port->lock);
    if (port->closed) {
        error = AN_EPORTCLOSED;
    } else if (!grow_slots(port) || !an_timers_reserve(&port->timers)) {
        error = AN_ENOMEM;
    } else {
        uint32_t slot = take_slot(port);
        port->slots[slot].socket = socket;
        port->slots[slot].generation = port->generation++;
        socket->tag = (uint64_t)port->slots[slot].generation << 32 | slot;
        port->counts.gauge_sockets++;
    }
    an_mutex_unlock(&port->lock);
    return error;
}

void an_port_leave(an_port *port, an_socket *socket) {
    an_mutex_lock(&port->lock);
    uint32_t index = (uint32_t)socket->tag;
    struct an_slot *slot = &port->slots[index];
    assert(slot->socket == socket);
    slot->socket = NULL;
    slot->next_free = port->free_slot;
    port->free_slot = index + 1;
    port->counts.gauge_sockets--;
    if (an_timers_contain(&port->timers, &socket->timer))
        an_timers_remove(&port->timers, &socket->timer);
    an_timers_unreserve(&port->timers);
    shrink_slots(port);
    an_mutex_unlock(&port->lock);
}

void an_port_feed(an_port *port) {
    if (an_atomic_load_pointer((void *const *)&port->starved) == NULL)
        return; /* one that is about to starve tries again by its timer */
    an_mutex_lock(&port->lock);
    while (port->starved != NULL) {
        an_socket *starved = port->starved;
        an_atomic_store_pointer((void **)&port->starved, starved->starved_next);
        starved->on_starved = false;
        make_ready_locked(port, starved);
        an_socket_drop(starved);
    }
    an_mutex_unlock(&port->lock);
}

/* ---- timers ------------------------------------------------------------------------------------------------------------------ */

/* Something new is due at `due_ns`: who waits, in here or on the descriptor, must not sleep past it. */
static void announce(an_port *port, int64_t due_ns) {
    if (due_ns < port->leader_until_ns && port->leader == LEADER_WAITING)
        wake_backend(port);
    if (port->watched && an_timers_next(&port->timers) == due_ns)
        port->interface->alarm(port->backend, due_ns);
}

void an_port_set_timer(an_port *port, struct an_timer *timer, int64_t due_ns) {
    an_mutex_lock(&port->lock);
    if (an_timers_contain(&port->timers, timer))
        an_timers_remove(&port->timers, timer);
    an_timers_insert(&port->timers, timer, due_ns);
    announce(port, due_ns);
    an_mutex_unlock(&port->lock);
}

int an_port_timer(an_port *port, an_operation *public_operation, int64_t delay_ns, void *state) {
    if (an_port_is_foreign(port))
        return AN_EPORTCLOSED;
    if (delay_ns < 0)
        return AN_EINVAL;
    int64_t due_ns = an_deadline(an_clock(), delay_ns);
    struct operation *operation = an_operation_private(public_operation);
    memset(operation, 0, sizeof *operation);
    operation->record = (struct an_record){.operation = public_operation, .lent = state, .kind = AN_TIMER};
    operation->more.timer.kind = TIMER_OF_OPERATION;
    int error = 0;
    an_mutex_lock(&port->lock);
    if (port->closed)
        error = AN_EPORTCLOSED;
    else if (!an_timers_reserve(&port->timers))
        error = AN_ENOMEM;
    else {
        an_timers_insert(&port->timers, &operation->more.timer, due_ns);
        an_atomic_bump64(&port->started[AN_TIMER], 1);
        announce(port, due_ns);
    }
    an_mutex_unlock(&port->lock);
    return error;
}

int an_port_cancel(an_port *port, an_operation *public_operation, int32_t *cancelled) {
    if (cancelled != NULL)
        *cancelled = 0;
    if (an_port_is_closed(port))
        return AN_EPORTCLOSED;
    struct operation *operation = an_operation_private(public_operation);
    an_mutex_lock(&port->lock);
    if (an_timers_contain(&port->timers, &operation->more.timer)) {
        an_timers_remove(&port->timers, &operation->more.timer);
        an_timers_unreserve(&port->timers);
        operation->record.error = AN_ECANCELED;
        queue_locked(port, &operation->record);
        if (cancelled != NULL)
            *cancelled = 1;
    }
    an_mutex_unlock(&port->lock);
    return 0;
}

int64_t an_port_now(an_port *port) {
    if (port->now_ns == 0)
        port->now_ns = an_clock();
    return port->now_ns;
}

static struct operation *operation_of_timer(struct an_timer *timer) {
    return (struct operation *)((char *)timer - offsetof(struct operation, more.timer));
}

static an_socket *socket_of_timer(struct an_timer *timer) {
    return (an_socket *)((char *)timer - offsetof(an_socket, timer));
}

static an_socket *expire(an_port *port, int64_t now_ns) {
    struct an_timer *timer;
    an_socket *first = NULL;
    an_socket **last = &first; /* in the order of time */
    bool expired = false;
    while ((timer = an_timers_expire(&port->timers, now_ns)) != NULL) {
        expired = true;
        if (timer->kind == TIMER_OF_BACKEND)
            continue;
        if (timer->kind == TIMER_OF_OPERATION) {
            an_timers_unreserve(&port->timers);
            queue_locked(port, &operation_of_timer(timer)->record);
            continue;
        }
        an_socket *socket = socket_of_timer(timer);
        an_socket_hold(socket);
        socket->expired_next = NULL;
        *last = socket;
        last = &socket->expired_next;
    }
    if (port->watched && expired)
        port->interface->alarm(port->backend, an_timers_next(&port->timers));
    return first;
}

/* ---- leading --------------------------------------------------------------------------------------------------------------------- */

an_socket *an_port_take_ready(an_port *port) {
    an_socket *first = port->ready_head;
    port->ready_head = port->ready_tail = NULL;
    for (an_socket *socket = first; socket != NULL; socket = socket->pass_next) {
        socket->on_ready = false; /* from here on it may be put into the next list */
        socket->pass_next = socket->ready_next;
    }
    return first;
}

void an_port_return_ready(an_port *port, an_socket *first) {
    an_socket *next, *last = NULL;
    an_socket **end = &first;
    an_mutex_lock(&port->lock);
    for (an_socket *socket = first; socket != NULL; socket = next) {
        next = socket->pass_next;
        if (socket->on_ready) {
            an_socket_drop(socket); /* another thread put it into the list, which holds it */
            continue;
        }
        socket->on_ready = true;
        *end = last = socket;
        end = &socket->ready_next;
    }
    *end = port->ready_head;
    port->ready_head = first;
    if (port->ready_tail == NULL)
        port->ready_tail = last;
    an_mutex_unlock(&port->lock);
}

static int64_t earlier(int64_t a_ns, int64_t b_ns) { return a_ns < b_ns ? a_ns : b_ns; }

int64_t an_port_begin_wait(an_port *port, int64_t until_ns) {
    an_mutex_lock(&port->lock);
    bool work = port->head != NULL || port->ready_head != NULL || port->closed;
    until_ns = work ? 0 : earlier(until_ns, an_timers_next(&port->timers));
    port->leader = until_ns > 0 ? LEADER_WAITING : LEADER_PROCESSING;
    port->leader_until_ns = until_ns;
    an_mutex_unlock(&port->lock);
    return until_ns;
}

an_socket *an_port_begin_pass(an_port *port, bool woken) {
    port->leader = LEADER_PROCESSING;
    if (woken)
        port->wakes = 0;
    port->now_ns = 0;
    return port->timers.count > 0 ? expire(port, an_port_now(port)) : NULL;
}

/* Waits in the system at most until `until_ns` and performs what came. port.lock held, but not meanwhile. */
static int lead(an_port *port, int64_t until_ns) {
    bool prepares = port->interface->prepares;
    until_ns = earlier(until_ns, an_timers_next(&port->timers));
    if (port->ready_head != NULL && !prepares)
        until_ns = 0;
    port->leader = until_ns > 0 && !prepares ? LEADER_WAITING : LEADER_PROCESSING;
    port->leader_until_ns = until_ns;
    port->counts.waits++;
    port->pass_bytes = 0;
    an_mutex_unlock(&port->lock);
    int error = port->interface->wait(port->backend, until_ns);
    an_mutex_lock(&port->lock);
    port->leader = LEADER_NONE;
    port->unpolled = 0;
    return error;
}

/* ---- waiting together --------------------------------------------------------------------------------------------------------------- */

/* As lead, beside others who do the same. */
static int join(an_port *port, int64_t until_ns) {
    int64_t next_ns = an_timers_next(&port->timers);
    if (port->ready_head != NULL)
        until_ns = 0;
    else if (next_ns < port->leader_until_ns)
        until_ns = earlier(until_ns, next_ns);
    if (until_ns > 0) {
        port->waiting++;
        port->leader_until_ns = earlier(until_ns, port->leader_until_ns);
        if (port->leader == LEADER_NONE)
            port->leader = LEADER_WAITING;
    }
    port->counts.waits++;
    an_mutex_unlock(&port->lock);
    int error = port->interface->wait(port->backend, until_ns);
    an_mutex_lock(&port->lock);
    port->unpolled = 0;
    return error;
}

/* No thread performs, or none after this one. */
static void rest(an_port *port) { port->leader = port->waiting > 0 ? LEADER_WAITING : LEADER_NONE; }

static void await_turn(an_port *port) {
    port->contenders++;
    while (port->leader == LEADER_PROCESSING && !port->turn_passed)
        an_condition_wait(&port->turn, &port->lock, AN_NEVER);
    port->turn_passed = false;
    port->contenders--;
}

bool an_port_take_turn(an_port *port, int64_t until_ns, uint32_t wakes, bool laden) {
    assert(wakes <= port->wakes);
    port->wakes -= wakes;
    if (until_ns > 0)
        port->waiting--;
    if (until_ns == port->leader_until_ns)
        port->leader_until_ns = AN_NEVER;
    if (port->leader == LEADER_PROCESSING) {
        if (!laden && port->head != NULL)
            return false;
        await_turn(port);
    }
    port->leader = LEADER_PROCESSING;
    port->pass_bytes = 0;
    return true;
}

/* Who gets the turn passed performs, so it stays PROCESSING all the while. */
void an_port_end_turn(an_port *port) {
    assert(port->leader == LEADER_PROCESSING && !port->turn_passed);
    port->turn_passed = port->contenders > 0;
    if (port->turn_passed)
        an_condition_signal(&port->turn);
    else
        rest(port);
}

/* Who is on its way already hands on in its turn. */
static void hand_on_together(an_port *port) {
    bool late = an_timers_next(&port->timers) < port->leader_until_ns;
    bool work_left = port->head != NULL || port->ready_head != NULL || late;
    if (work_left && port->leader == LEADER_WAITING && port->wakes == 0)
        wake_backend(port);
}

/* ---- following --------------------------------------------------------------------------------------------------------------------- */

static void follow(an_port *port, int64_t until_ns) {
    port->followers++;
    an_condition_wait(&port->changed, &port->lock, until_ns);
    port->followers--;
    if (port->signalled > 0)
        port->signalled--;
}

/* A thread leaves: another one takes what is left, or the leader's place. */
static void hand_on(an_port *port) {
    bool work_left = port->head != NULL || port->ready_head != NULL;
    if (has_follower_to_wake(port) && (port->head != NULL || port->leader == LEADER_NONE))
        wake_follower(port);
    else if (port->watched && work_left && port->leader == LEADER_NONE)
        wake_backend(port);
}

/* ---- dequeue ------------------------------------------------------------------------------------------------------------------------ */

static bool is_last(const struct an_record *record) {
    return record->home == RECORD_IN_OPERATION && (record->flags & RECORD_MORE) == 0;
}

static void show(an_completion *completion, struct an_record *record) {
    an_socket *socket = record->socket;
    bool with_address = (record->flags & RECORD_ADDRESS) != 0;
    completion->operation = an_operation_unmarked(record->operation);
    completion->socket = socket;
    completion->transferred = record->transferred;
    completion->accepted = record->accepted;
    completion->error = record->error;
    completion->kind = record->kind;
    completion->flags = record->flags & (RECORD_MORE | RECORD_TRUNCATED);
    if (an_operation_is_marked(record->operation))
        completion->flags |= AN_MARKED;
    completion->data = NULL;
    completion->address = NULL;
    completion->reserved = NULL;
    if (socket == NULL) {
        completion->state = record->lent;
        return;
    }
    completion->state = an_atomic_load_pointer(&socket->user_state);
    struct an_block *block = record->lent;
    completion->reserved = block;
    if (block != NULL && (record->flags & RECORD_DATA) != 0)
        completion->data = an_block_data(block, with_address);
    if (block != NULL && with_address)
        completion->address = an_block_address(block);
}

/* Moves the first record out; its memory is the caller's again or goes. */
static void take_first(an_port *port, an_completion *completion) {
    struct an_record *record = port->head;
    port->head = record->next;
    if (port->head == NULL)
        port->tail = NULL;
    port->queued--;
    relax(port, record);
    show(completion, record);
    if (is_last(record))
        port->finished++;
    if (record->home == RECORD_IN_QUIET)
        free(record); /* the first member of its operation */
}

static size_t take(an_port *port, an_completion *completions, size_t max) {
    size_t count = 0;
    while (count < max && port->head != NULL)
        take_first(port, &completions[count++]);
    port->unpolled += (uint32_t)count;
    port->counts.batches++;
    port->counts.dequeued += count;
    if (count > port->counts.batch_largest)
        port->counts.batch_largest = count;
    return count;
}

static bool is_over(int64_t until_ns) { return until_ns == 0 || (until_ns != AN_NEVER && an_clock() >= until_ns); }

/* The loop of every dequeuing thread. port.lock held. */
static int wait_for_batch(an_port *port, an_completion *completions, size_t max, int64_t until_ns, size_t *count) {
    for (;;) {
        if (port->closed)
            return AN_EPORTCLOSED;
        bool may_take = port->unpolled < POLL_EVERY || port->leader != LEADER_NONE;
        if (port->head != NULL && may_take) {
            *count = take(port, completions, max);
            return 0;
        }
        if (port->leader == LEADER_NONE || port->together) {
            int64_t wait_until_ns = port->head != NULL ? 0 : until_ns;
            int error = port->together ? join(port, wait_until_ns) : lead(port, wait_until_ns);
            if (port->head != NULL || port->closed)
                continue;
            if (error != 0 && (error != AN_EINTR || (port->flags & AN_PORT_INTERRUPTIBLE) != 0))
                return error;
            if (is_over(until_ns))
                return 0;
        } else {
            if (is_over(until_ns))
                return 0;
            follow(port, until_ns);
        }
    }
}

static int admit(an_port *port) {
    if (port->concurrency != 1)
        return 0;
    uintptr_t thread = an_thread_identity();
    if (port->dequeuer == 0)
        port->dequeuer = thread;
    return port->dequeuer == thread ? 0 : AN_EPERM;
}

static int64_t deadline_of(int64_t timeout_ns) {
    if (timeout_ns <= 0)
        return timeout_ns == 0 ? 0 : AN_NEVER;
    int64_t now_ns = an_clock();
    return timeout_ns < AN_NEVER - now_ns ? now_ns + timeout_ns : AN_NEVER;
}

int an_port_dequeue(an_port *port, an_completion *completions, size_t max, int64_t timeout_ns, size_t *count) {
    *count = 0;
    if (an_port_is_foreign(port))
        return AN_EPORTCLOSED;
    if (max == 0 || timeout_ns < AN_FOREVER)
        return AN_EINVAL;
    int64_t until_ns = deadline_of(timeout_ns);
    an_mutex_lock(&port->lock);
    int error = port->closed ? AN_EPORTCLOSED : admit(port);
    if (error == 0) {
        port->inside++;
        error = wait_for_batch(port, completions, max, until_ns, count);
        port->inside--;
        if (port->closed)
            an_condition_broadcast(&port->changed);
        else if (port->together)
            hand_on_together(port);
        else
            hand_on(port);
    }
    an_mutex_unlock(&port->lock);
    return error;
}

void an_completion_release(an_completion *completions, size_t count) {
    for (size_t i = 0; i < count; i++) {
        an_completion *completion = &completions[i];
        if (completion->socket == NULL)
            continue;
        if (completion->operation == NULL)
            an_atomic_add32(&completion->socket->unreported, (uint32_t)-1);
        if (completion->reserved != NULL)
            an_block_release(completion->reserved);
        an_socket_drop(completion->socket);
        completion->reserved = NULL;
        completion->socket = NULL;
        completion->data = NULL;
        completion->address = NULL;
    }
}

/* ---- starts that belong to no socket, and looking in ------------------------------------------------------------------------------ */

int an_port_post(an_port *port, an_operation *public_operation, void *state) {
    if (an_port_is_foreign(port))
        return AN_EPORTCLOSED;
    struct operation *operation = an_operation_private(public_operation);
    memset(operation, 0, sizeof *operation);
    operation->record = (struct an_record){.operation = public_operation, .lent = state, .kind = AN_POST};
    an_mutex_lock(&port->lock);
    int error = port->closed ? AN_EPORTCLOSED : 0;
    if (error == 0) {
        an_atomic_bump64(&port->started[AN_POST], 1);
        queue_locked(port, &operation->record);
    }
    an_mutex_unlock(&port->lock);
    return error;
}

static uint64_t in_flight_locked(an_port *port) {
    uint64_t started = 0;
    for (int kind = 0; kind < AN_KIND_COUNT; kind++)
        started += an_atomic_load64(&port->started[kind]);
    return port->closed ? 0 : started - port->finished;
}

uint64_t an_port_in_flight(an_port *port) {
    if (an_port_is_foreign(port))
        return 0;
    an_mutex_lock(&port->lock);
    uint64_t count = in_flight_locked(port);
    an_mutex_unlock(&port->lock);
    return count;
}

int an_port_descriptor(an_port *port, an_descriptor *descriptor) {
    if (an_port_is_foreign(port))
        return AN_EPORTCLOSED;
    an_mutex_lock(&port->lock);
    int error = port->closed ? AN_EPORTCLOSED : port->interface->watch(port->backend, descriptor);
    if (error == 0 && !port->watched) {
        port->watched = true;
        if (port->head != NULL || port->ready_head != NULL)
            wake_backend(port);
        port->interface->alarm(port->backend, an_timers_next(&port->timers));
    }
    an_mutex_unlock(&port->lock);
    return error;
}

int an_port_statistics(an_port *port, an_statistics *statistics) {
    if (an_port_is_foreign(port))
        return AN_EPORTCLOSED;
    an_mutex_lock(&port->lock);
    *statistics = port->counts;
    for (int kind = 0; kind < AN_KIND_COUNT; kind++)
        statistics->started[kind] = an_atomic_load64(&port->started[kind]);
    statistics->quiet_sends = an_atomic_load64(&port->quiet_sends);
    statistics->bytes_received = an_atomic_load64(&port->bytes_received);
    statistics->bytes_sent = an_atomic_load64(&port->bytes_sent);
    statistics->gauge_queued = port->queued;
    statistics->gauge_buffers = an_atomic_load32(&port->pool.total);
    statistics->gauge_timers = port->timers.count;
    statistics->gauge_inflight = in_flight_locked(port);
    statistics->gauge_waiting = port->together ? port->waiting : port->leader == LEADER_WAITING;
    an_mutex_unlock(&port->lock);
    return 0;
}

/* ---- closing ---------------------------------------------------------------------------------------------------------------------- */

static void send_dequeuers_away(an_port *port) {
    while (port->inside > 0) {
        if (port->leader == LEADER_WAITING)
            wake_backend(port);
        while (port->wakes < port->waiting) /* together: the others as well */
            wake_backend(port);
        an_condition_broadcast(&port->changed);
        an_condition_wait(&port->changed, &port->lock, AN_NEVER);
    }
}

static void abort_sockets(an_port *port) {
    for (uint32_t slot = 0; slot < port->slot_count; slot++) {
        an_socket *socket = port->slots[slot].socket;
        if (socket == NULL)
            continue;
        an_socket_hold(socket);
        an_mutex_unlock(&port->lock); /* a socket's lock comes before the port's */
        an_socket_abort(socket);
        an_socket_drop(socket);
        an_mutex_lock(&port->lock);
    }
}

/* Moves the whole queue into an empty hand, batch by batch. */
static void discard_queue(an_port *port) {
    while (port->head != NULL) {
        an_completion completion;
        take_first(port, &completion);
        an_mutex_unlock(&port->lock);
        if (completion.accepted != NULL)
            an_socket_free(completion.accepted, 0);
        an_completion_release(&completion, 1);
        an_mutex_lock(&port->lock);
    }
}

/* The lists' references go; dropping takes no lock of a port. */
static void drop_lists(an_port *port) {
    an_socket *next;
    for (an_socket *socket = port->ready_head; socket != NULL; socket = next) {
        next = socket->ready_next;
        an_socket_drop(socket);
    }
    for (an_socket *socket = port->starved; socket != NULL; socket = next) {
        next = socket->starved_next;
        an_socket_drop(socket);
    }
    for (an_socket *socket = port->throttled; socket != NULL; socket = next) {
        next = socket->throttled_next;
        an_socket_drop(socket);
    }
    port->ready_head = port->ready_tail = port->starved = port->throttled = NULL;
    port->timers.count = 0;
}

/* The child's copies of what the port watched with. Its locks may be held by threads that are not here: none is taken. */
static int close_in_child(an_port *port) {
    if (!port->released) {
        port->released = true;
        port->interface->close(port->backend);
    }
    return 0;
}

int an_port_close(an_port *port) {
    if (an_port_is_foreign(port))
        return close_in_child(port);
    an_port_hold(port); /* the last socket may go while this runs */
    an_mutex_lock(&port->lock);
    if (port->closed) {
        while (!port->released)
            an_condition_wait(&port->changed, &port->lock, AN_NEVER);
    } else {
        an_atomic_store32(&port->closed, 1);
        send_dequeuers_away(port);
        abort_sockets(port);
        discard_queue(port);
        drop_lists(port);
        port->interface->close(port->backend);
        port->released = true;
        an_condition_broadcast(&port->changed);
    }
    an_mutex_unlock(&port->lock);
    an_port_drop(port);
    return 0;
}

void an_port_free(an_port *port) {
    an_port_close(port);
    an_port_drop(port);
}
