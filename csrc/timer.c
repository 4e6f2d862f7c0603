/* timer.c - a binary heap of the points in time at which something is due. Knows no clock, port or socket.
 *
 * A socket stands in it once, with the earliest of its deadlines as it was when it was put there; deadlines that were
 * pushed back since are found when it comes up, and it is put in again (an_socket_expire_all). So moving a deadline at each
 * message is a store, not a heap operation.
 */
#include "core.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static void put(struct an_timers *timers, uint32_t index, struct an_timer *timer) {
    timers->heap[index] = timer;
    timer->place = index + 1;
}

static void rise(struct an_timers *timers, uint32_t index, struct an_timer *timer) {
    while (index > 0) {
        uint32_t parent = (index - 1) / 2;
        if (timers->heap[parent]->due_ns <= timer->due_ns)
            break;
        put(timers, index, timers->heap[parent]);
        index = parent;
    }
    put(timers, index, timer);
}

static void sink(struct an_timers *timers, uint32_t index, struct an_timer *timer) {
    for (;;) {
        uint32_t child = 2 * index + 1;
        if (child >= timers->count)
            break;
        if (child + 1 < timers->count && timers->heap[child + 1]->due_ns < timers->heap[child]->due_ns)
            child++;
        if (timer->due_ns <= timers->heap[child]->due_ns)
            break;
        put(timers, index, timers->heap[child]);
        index = child;
    }
    put(timers, index, timer);
}

enum { CAPACITY_LEAST = 64 };

bool an_timers_reserve(struct an_timers *timers) {
    if (timers->reserved < timers->capacity) {
        timers->reserved++;
        return true;
    }
    uint32_t capacity = timers->capacity == 0 ? CAPACITY_LEAST : timers->capacity * 2;
    struct an_timer **heap = realloc(timers->heap, capacity * sizeof *heap);
    if (heap == NULL)
        return false;
    timers->heap = heap;
    timers->capacity = capacity;
    timers->reserved++;
    return true;
}

/* To fresh memory, as what is cut where it is may lie above all that was freed and keep that from the system. Without
 * memory it stays large. */
static void shrink(struct an_timers *timers) {
    uint32_t capacity = timers->capacity / 2;
    struct an_timer **heap = malloc(capacity * sizeof *heap);
    if (heap == NULL)
        return;
    memcpy(heap, timers->heap, timers->count * sizeof *heap);
    free(timers->heap);
    timers->heap = heap;
    timers->capacity = capacity;
}

void an_timers_unreserve(struct an_timers *timers) {
    timers->reserved--;
    assert(timers->count <= timers->reserved);
    if (timers->capacity > CAPACITY_LEAST && timers->reserved <= timers->capacity / 4)
        shrink(timers);
}

void an_timers_insert(struct an_timers *timers, struct an_timer *timer, int64_t due_ns) {
    assert(timers->count < timers->reserved);
    timer->due_ns = due_ns;
    rise(timers, timers->count++, timer);
}

void an_timers_remove(struct an_timers *timers, struct an_timer *timer) {
    uint32_t index = timer->place - 1;
    struct an_timer *last = timers->heap[--timers->count];
    timer->place = 0;
    if (last == timer)
        return;
    if (index > 0 && last->due_ns < timers->heap[(index - 1) / 2]->due_ns)
        rise(timers, index, last);
    else
        sink(timers, index, last);
}

bool an_timers_contain(const struct an_timers *timers, const struct an_timer *timer) {
    return timer->place > 0 && timer->place <= timers->count && timers->heap[timer->place - 1] == timer;
}

int64_t an_timers_next(const struct an_timers *timers) {
    return timers->count > 0 ? timers->heap[0]->due_ns : AN_NEVER;
}

struct an_timer *an_timers_expire(struct an_timers *timers, int64_t now_ns) {
    if (an_timers_next(timers) > now_ns)
        return NULL;
    struct an_timer *timer = timers->heap[0];
    an_timers_remove(timers, timer);
    return timer;
}
