/* The heap of timers against a plain list: the same order, whatever is inserted and removed in between. */
#include "check.h"
#include "core.h"

enum { TIMERS = 2000, ROUNDS = 50000 };

static struct an_timer timers[TIMERS];
static struct an_timers heap;

static int64_t earliest(void) {
    int64_t due_ns = AN_NEVER;
    for (int i = 0; i < TIMERS; i++) {
        if (timers[i].place != 0 && timers[i].due_ns < due_ns)
            due_ns = timers[i].due_ns;
    }
    return due_ns;
}

int main(void) {
    srand(1);
    for (int i = 0; i < TIMERS; i++)
        CHECK(an_timers_reserve(&heap));
    for (int round = 0; round < ROUNDS; round++) {
        struct an_timer *timer = &timers[rand() % TIMERS];
        CHECK(an_timers_contain(&heap, timer) == (timer->place != 0));
        if (timer->place != 0)
            an_timers_remove(&heap, timer);
        else
            an_timers_insert(&heap, timer, rand() % 1000);
        if (round % 100 == 0)
            CHECK(an_timers_next(&heap) == earliest());
    }
    CHECK(an_timers_expire(&heap, earliest() - 1) == NULL);
    int64_t last_ns = 0;
    struct an_timer *timer;
    while ((timer = an_timers_expire(&heap, 1000)) != NULL) {
        CHECK(timer->due_ns >= last_ns && timer->place == 0);
        last_ns = timer->due_ns;
    }
    CHECK(heap.count == 0 && an_timers_next(&heap) == AN_NEVER);
    struct an_timer garbage;
    memset(&garbage, 0xa5, sizeof garbage);
    CHECK(!an_timers_contain(&heap, &garbage));
    free(heap.heap);
    return 0;
}
