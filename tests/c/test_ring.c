/* The ring below the io_uring backend: what the kernel can do and the environment takes away, why it is refused, and how
 * its receive buffers grow and shrink. Without liburing there is nothing to test. */
#include "check.h"

#if defined(AN_HAVE_LIBURING)

#include <errno.h>
#include <sys/mman.h>

#include "backend/ring.h"

static const char *const names[] = {"submit_all",        "coop_taskrun",  "buffer_ring",  "multishot_accept",
                                    "multishot_receive", "defer_taskrun", "skip_success", "cancel_any"};
static const uint32_t features[] = {RING_SUBMIT_ALL,       RING_COOP_TASKRUN,      RING_BUFFER_RING,
                                    RING_MULTISHOT_ACCEPT, RING_MULTISHOT_RECEIVE, RING_DEFER_TASKRUN,
                                    RING_SKIP_SUCCESS,     RING_CANCEL_ANY};
enum { NAMES = sizeof names / sizeof *names };

static uint32_t features_without(const char *without, bool single) {
    struct ring ring;
    CHECK(setenv("ASYNCIO_NATIVE_IO_URING_WITHOUT", without, 1) == 0);
    CHECK_OK(ring_open(&ring, single));
    CHECK(ring.disabled == (single && (ring.features & RING_DEFER_TASKRUN) != 0));
    CHECK((ring.buffers.ring != NULL) == ((ring.features & RING_BUFFER_RING) != 0));
    uint32_t found = ring.features;
    ring_close(&ring);
    CHECK(unsetenv("ASYNCIO_NATIVE_IO_URING_WITHOUT") == 0);
    return found;
}

/* Who asks for one thread gets DEFER_TASKRUN, others COOP_TASKRUN; a receive that repeats needs buffers. */
static void each_feature_is_switched_off_by_its_name(bool single) {
    uint32_t all = features_without("", single);
    printf("this kernel's features: %x\n", (unsigned)all);
    for (int i = 0; i < NAMES; i++) {
        uint32_t expected = all & ~features[i];
        if (features[i] == RING_BUFFER_RING)
            expected &= ~(uint32_t)RING_MULTISHOT_RECEIVE;
        if (features[i] == RING_CANCEL_ANY) /* older than DEFER_TASKRUN, which is only tried with it */
            expected &= ~(uint32_t)RING_DEFER_TASKRUN;
        if (features[i] == RING_SUBMIT_ALL) /* older than the others, which are only tried with it */
            expected &= ~(uint32_t)(RING_DEFER_TASKRUN | RING_COOP_TASKRUN);
        uint32_t found = features_without(names[i], single);
        if (single && (features[i] == RING_DEFER_TASKRUN || features[i] == RING_CANCEL_ANY))
            found &= ~(uint32_t)RING_COOP_TASKRUN; /* in its place */
        CHECK(found == expected);
    }
}

static void several_names_and_unknown_ones(void) {
    uint32_t all = features_without("", false);
    uint32_t none = features_without("submit_all,coop_taskrun,buffer_ring,multishot_accept,multishot_receive,"
                                     "defer_taskrun,skip_success,cancel_any",
                                     false);
    CHECK(none == 0);
    CHECK(features_without("no_such_feature,,skip_success,", false) == (all & ~(uint32_t)RING_SKIP_SUCCESS));
    CHECK(features_without("skip", false) == all);
}

static void check_reason(int error, const char *words) {
    char reason[AN_REASON_SIZE];
    ring_explain(error, reason, sizeof reason);
    CHECK(strstr(reason, words) != NULL);
    ring_explain(error, reason, 10); /* cut, not overrun */
    CHECK(strlen(reason) < 10);
}

static void each_refusal_has_its_reason(void) {
    check_reason(EPERM, "forbidden by");
    check_reason(EACCES, "security policy");
    check_reason(ENOSYS, "Linux 5.11");
    check_reason(ENOMEM, "ulimit -l");
    check_reason(EMFILE, strerror(EMFILE));
}

static uint32_t resident_pages(struct ring *ring) {
    static unsigned char pages[(size_t)RING_BUFFERS_MOST * RING_BUFFER_SIZE / 4096];
    size_t size = (size_t)RING_BUFFERS_MOST * RING_BUFFER_SIZE;
    uint32_t resident = 0;
    CHECK(mincore(ring->buffers.memory, size, pages) == 0);
    for (size_t i = 0; i < sizeof pages; i++)
        resident += pages[i] & 1u;
    return resident;
}

/* What the kernel would have filled comes back. */
static void use_and_recycle(struct ring *ring, uint32_t count) {
    for (uint32_t number = 0; number < count; number++) {
        memset(ring_buffer(ring, number), 'x', RING_BUFFER_SIZE);
        ring_recycle(ring, number);
    }
}

static void buffers_grow_to_a_bound_and_shrink_when_it_is_calm(void) {
    struct ring ring;
    CHECK_OK(ring_open(&ring, false));
    struct ring_buffers *buffers = &ring.buffers;
    if (buffers->ring == NULL) {
        printf("this kernel has no buffer rings\n");
        ring_close(&ring);
        return;
    }
    CHECK(buffers->provided == RING_BUFFERS_LEAST);
    for (uint32_t expected = RING_BUFFERS_LEAST * 2; expected <= RING_BUFFERS_MOST; expected *= 2) {
        ring_grow(&ring);
        CHECK(buffers->provided == expected && buffers->used == expected);
    }
    ring_grow(&ring);
    CHECK(buffers->provided == RING_BUFFERS_MOST);
    use_and_recycle(&ring, RING_BUFFERS_MOST);
    CHECK(buffers->provided == RING_BUFFERS_MOST && resident_pages(&ring) == RING_BUFFERS_MOST);
    for (int pass = 0; pass < 10 * RING_CALM_PASSES; pass++) /* busy: nothing shrinks */
        ring_settle(&ring, RING_BUFFERS_MOST / 4);
    CHECK(buffers->target == RING_BUFFERS_MOST);
    for (int pass = 0; pass < 10 * RING_CALM_PASSES; pass++)
        ring_settle(&ring, 1);
    CHECK(buffers->target == RING_BUFFERS_LEAST);
    use_and_recycle(&ring, RING_BUFFERS_MOST); /* parked, and their memory given back */
    CHECK(buffers->provided == RING_BUFFERS_LEAST && resident_pages(&ring) == RING_BUFFERS_LEAST);
    CHECK(buffers->parked_count == RING_BUFFERS_MOST - RING_BUFFERS_LEAST);
    ring_grow(&ring); /* takes parked ones */
    CHECK(buffers->provided == 2 * RING_BUFFERS_LEAST && buffers->used == RING_BUFFERS_MOST);
    ring_close(&ring);
}

static bool is_available(void) {
    an_backend_description backends[8];
    size_t count = an_backends(backends, 8);
    for (size_t i = 0; i < count; i++) {
        if (strcmp(backends[i].name, "io_uring") != 0)
            continue;
        printf("io_uring: %s\n", backends[i].available ? "available" : backends[i].reason);
        return backends[i].available;
    }
    return false;
}

int main(void) {
    each_refusal_has_its_reason();
    if (!is_available())
        return 0;
    each_feature_is_switched_off_by_its_name(false);
    each_feature_is_switched_off_by_its_name(true);
    several_names_and_unknown_ones();
    buffers_grow_to_a_bound_and_shrink_when_it_is_calm();
    return 0;
}

#else

int main(void) {
    printf("built without liburing\n");
    return 0;
}

#endif
