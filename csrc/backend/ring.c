/* ring.c - see ring.h. Sources: io_uring_setup(2), io_uring_enter(2), io_uring_register(2), liburing's manual pages. */
#if defined(__linux__) && defined(AN_HAVE_LIBURING)

#include "backend/ring.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- features ---------------------------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    uint32_t feature;
} feature_names[] = {
    {"submit_all", RING_SUBMIT_ALL},
    {"coop_taskrun", RING_COOP_TASKRUN},
    {"buffer_ring", RING_BUFFER_RING},
    {"multishot_accept", RING_MULTISHOT_ACCEPT},
    {"multishot_receive", RING_MULTISHOT_RECEIVE},
    {"defer_taskrun", RING_DEFER_TASKRUN},
    {"skip_success", RING_SKIP_SUCCESS},
    {"cancel_any", RING_CANCEL_ANY},
};

static uint32_t feature_named(const char *name, size_t length) {
    for (size_t i = 0; i < sizeof feature_names / sizeof *feature_names; i++) {
        if (strlen(feature_names[i].name) == length && memcmp(feature_names[i].name, name, length) == 0)
            return feature_names[i].feature;
    }
    return 0;
}

/* What may be used at all: everything but what the environment variable names. */
static uint32_t allowed_features(void) {
    uint32_t allowed = UINT32_MAX;
    const char *names = getenv("ASYNCIO_NATIVE_IO_URING_WITHOUT");
    while (names != NULL && *names != '\0') {
        size_t length = strcspn(names, ",");
        allowed &= ~feature_named(names, length);
        names += length + (names[length] == ',' ? 1 : 0);
    }
    return allowed;
}

/* ---- setting up -------------------------------------------------------------------------------------------------------- */

static uint32_t wanted_entries(void) {
    const char *text = getenv("ASYNCIO_NATIVE_IO_URING_ENTRIES"); /* for tests and for scarce memory */
    long entries = text != NULL ? strtol(text, NULL, 10) : 0;
    return entries >= RING_ENTRIES_LEAST && entries <= RING_ENTRIES ? (uint32_t)entries : RING_ENTRIES;
}

/* Smaller where the limit of locked memory (kernels before 5.12 count rings there) does not allow more. */
static int set_up(struct ring *ring, uint32_t flags) {
    int error = ENOMEM;
    for (uint32_t entries = wanted_entries(); error == ENOMEM && entries >= RING_ENTRIES_LEAST; entries /= 2) {
        struct io_uring_params parameters = {
            .flags = flags | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP,
            .cq_entries = entries * RING_COMPLETIONS_FACTOR,
        };
        error = -io_uring_queue_init_params(entries, &ring->native, &parameters);
    }
    return error;
}

/* The best combination that the kernel takes; it refuses flags that it does not know with EINVAL. */
static int set_up_best(struct ring *ring, bool single, uint32_t allowed) {
    const struct {
        uint32_t flags;
        uint32_t features;
        bool single;
    } ways[] = {
        {IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_R_DISABLED,
         RING_SUBMIT_ALL | RING_DEFER_TASKRUN | RING_CANCEL_ANY, true},
        {IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN, RING_SUBMIT_ALL | RING_COOP_TASKRUN, false},
        {IORING_SETUP_SUBMIT_ALL, RING_SUBMIT_ALL, false},
        {0, 0, false},
    };
    int error = EINVAL;
    for (size_t i = 0; i < sizeof ways / sizeof *ways && error == EINVAL; i++) {
        if ((ways[i].features & ~allowed) != 0 || (ways[i].single && !single))
            continue;
        error = set_up(ring, ways[i].flags);
        ring->features = ways[i].features;
        ring->disabled = ways[i].single;
    }
    return error;
}

static void *map_memory(size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    /* The kernel goes on writing for the parent: a child's copy would make the parent's pages other ones. */
    madvise(memory, size, MADV_DONTFORK);
    return memory;
}

static const size_t buffer_ring_size = RING_BUFFERS_MOST * sizeof(struct io_uring_buf);
static const size_t buffer_memory_size = (size_t)RING_BUFFERS_MOST * RING_BUFFER_SIZE;

static void close_buffers(struct ring_buffers *buffers) {
    if (buffers->ring != NULL)
        munmap(buffers->ring, buffer_ring_size);
    if (buffers->memory != NULL)
        munmap(buffers->memory, buffer_memory_size);
    free(buffers->parked);
    *buffers = (struct ring_buffers){0};
}

static void provide(struct ring *ring, uint32_t number) {
    struct ring_buffers *buffers = &ring->buffers;
    io_uring_buf_ring_add(buffers->ring, ring_buffer(ring, number), RING_BUFFER_SIZE, (unsigned short)number,
                          RING_BUFFERS_MOST - 1, 0);
    io_uring_buf_ring_advance(buffers->ring, 1);
}

/* As many as `target` says: parked ones first, then new ones. */
static void provide_more(struct ring *ring) {
    struct ring_buffers *buffers = &ring->buffers;
    while (buffers->provided < buffers->target) {
        uint32_t number = buffers->parked_count > 0 ? buffers->parked[--buffers->parked_count] : buffers->used++;
        provide(ring, number);
        buffers->provided++;
    }
}

/* False where the kernel has no buffer rings (EINVAL) or no memory for one. */
static bool open_buffers(struct ring *ring) {
    struct ring_buffers *buffers = &ring->buffers;
    buffers->ring = map_memory(buffer_ring_size);
    buffers->memory = map_memory(buffer_memory_size);
    buffers->parked = malloc(RING_BUFFERS_MOST * sizeof *buffers->parked);
    struct io_uring_buf_reg registration = {
        .ring_addr = (uintptr_t)buffers->ring, .ring_entries = RING_BUFFERS_MOST, .bgid = 0};
    if (buffers->ring == NULL || buffers->memory == NULL || buffers->parked == NULL ||
        io_uring_register_buf_ring(&ring->native, &registration, 0) != 0) {
        close_buffers(buffers);
        return false;
    }
    io_uring_buf_ring_init(buffers->ring);
    buffers->target = RING_BUFFERS_LEAST;
    provide_more(ring);
    return true;
}

static bool has_opcode(struct ring *ring, int opcode) {
    struct io_uring_probe *probe = io_uring_get_probe_ring(&ring->native);
    bool has = probe != NULL && io_uring_opcode_supported(probe, opcode);
    io_uring_free_probe(probe);
    return has;
}

/* These cannot be asked for; they came with what can be: multishot accepts and the cancel of any with the socket opcode
 * (5.19), multishot receives with the zero-copy send (6.0). */
static void find_features(struct ring *ring, uint32_t allowed) {
    if ((ring->native.features & IORING_FEAT_CQE_SKIP) != 0)
        ring->features |= RING_SKIP_SUCCESS;
    if (has_opcode(ring, IORING_OP_SOCKET))
        ring->features |= RING_MULTISHOT_ACCEPT | RING_CANCEL_ANY;
    if ((allowed & RING_BUFFER_RING) != 0 && open_buffers(ring)) {
        ring->features |= RING_BUFFER_RING;
        if (has_opcode(ring, IORING_OP_SEND_ZC))
            ring->features |= RING_MULTISHOT_RECEIVE;
    }
    ring->features &= allowed;
}

/* A filter may allow setting up a ring and forbid its use, which the first wait would find too late. A ring that is not
 * enabled yet answers EBADFD, a probe without memory EINVAL: both are allowed. */
static int find_refusal(struct ring *ring) {
    unsigned descriptor = (unsigned)ring->native.ring_fd;
    const int results[] = {
        io_uring_enter(descriptor, 0, 0, 0, NULL),
        io_uring_register(descriptor, IORING_REGISTER_PROBE, NULL, 0),
    };
    for (size_t i = 0; i < sizeof results / sizeof *results; i++) {
        if (results[i] == -EPERM || results[i] == -EACCES || results[i] == -ENOSYS)
            return -results[i];
    }
    return (ring->native.features & IORING_FEAT_EXT_ARG) != 0 ? 0 : ENOSYS; /* waits with a timeout, 5.11 */
}

int ring_open(struct ring *ring, bool single) {
    uint32_t allowed = allowed_features();
    memset(ring, 0, sizeof *ring);
    int error = set_up_best(ring, single, allowed);
    if (error != 0)
        return error;
    error = find_refusal(ring);
    if (error != 0) {
        io_uring_queue_exit(&ring->native);
        return error;
    }
    io_uring_ring_dontfork(&ring->native);
    find_features(ring, allowed);
    return 0;
}

static bool forbidden_by_sysctl(int *level) {
    FILE *file = fopen("/proc/sys/kernel/io_uring_disabled", "re");
    if (file == NULL)
        return false;
    bool read = fscanf(file, "%d", level) == 1;
    fclose(file);
    return read && *level > 0;
}

void ring_explain(int error, char *reason, size_t size) {
    int level = 0;
    if (error == EPERM && forbidden_by_sysctl(&level))
        snprintf(reason, size, "forbidden by the sysctl kernel.io_uring_disabled = %d", level);
    else if (error == EPERM || error == EACCES)
        snprintf(reason, size, "forbidden by a security policy, perhaps a container's seccomp filter: %s",
                 strerror(error));
    else if (error == ENOSYS)
        snprintf(reason, size, "not in this kernel (Linux 5.11 or later is needed), or a seccomp filter hides it");
    else if (error == ENOMEM)
        snprintf(reason, size, "no memory for it; perhaps the limit of locked memory (ulimit -l) is too low");
    else
        snprintf(reason, size, "refused by the system: %s", strerror(error));
}

void ring_close(struct ring *ring) {
    io_uring_queue_exit(&ring->native);
    close_buffers(&ring->buffers);
}

void ring_close_copy(struct ring *ring) {
    close(ring->native.ring_fd);
    free(ring->buffers.parked);
}

int ring_enable(struct ring *ring) {
    if (!ring->disabled)
        return 0;
    /* io_uring_enable_rings is missing in the shared library of liburing 2.3. */
    int result = io_uring_register((unsigned)ring->native.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
    ring->disabled = result < 0;
    return -result;
}

/* ---- submitting and waiting ------------------------------------------------------------------------------------------------ */

struct io_uring_sqe *ring_submission(struct ring *ring) {
    struct io_uring_sqe *submission = io_uring_get_sqe(&ring->native);
    if (submission == NULL && io_uring_submit(&ring->native) >= 0)
        submission = io_uring_get_sqe(&ring->native);
    return submission;
}

static int wait_until(struct ring *ring, int64_t until_ns) {
    struct io_uring_cqe *first;
    if (until_ns == AN_NEVER)
        return io_uring_submit_and_wait(&ring->native, 1);
    int64_t left_ns = until_ns - an_clock();
    if (left_ns <= 0)
        return io_uring_submit_and_get_events(&ring->native);
    struct __kernel_timespec left = {.tv_sec = left_ns / 1000000000, .tv_nsec = left_ns % 1000000000};
    return io_uring_submit_and_wait_timeout(&ring->native, &first, 1, &left, NULL);
}

int ring_enter(struct ring *ring, int64_t until_ns) {
    int result = until_ns == 0 ? io_uring_submit_and_get_events(&ring->native) : wait_until(ring, until_ns);
    /* Without SUBMIT_ALL the kernel stops behind a submission that it refused. Each call takes one at least. */
    for (uint32_t i = 0; result >= 0 && !ring_is_submitted(ring) && i < RING_ENTRIES; i++)
        result = io_uring_submit(&ring->native);
    if (result >= 0) {
        /* A signal that ended the wait is not told when something was submitted before it. */
        bool early = until_ns != 0 && io_uring_cq_ready(&ring->native) == 0 && an_clock() < until_ns;
        return early ? EINTR : 0;
    }
    switch (-result) {
    case ETIME:
        return 0;
    case EPERM: /* a filter that was set since; EPERM itself is what a second thread gets that dequeues */
        return EACCES;
    case EBUSY: /* completions stand in the kernel's overflow list until some are taken */
    case EAGAIN:
        return io_uring_cq_ready(&ring->native) > 0 ? 0 : -result;
    default:
        return -result;
    }
}

/* ---- receive buffers ----------------------------------------------------------------------------------------------------------- */

void ring_recycle(struct ring *ring, uint32_t number) {
    struct ring_buffers *buffers = &ring->buffers;
    if (buffers->provided <= buffers->target) {
        provide(ring, number);
        return;
    }
    buffers->provided--;
    buffers->parked[buffers->parked_count++] = (uint16_t)number;
    madvise(ring_buffer(ring, number), RING_BUFFER_SIZE, MADV_DONTNEED);
}

void ring_grow(struct ring *ring) {
    struct ring_buffers *buffers = &ring->buffers;
    buffers->calm = buffers->busiest = 0;
    if (buffers->target < RING_BUFFERS_MOST)
        buffers->target *= 2;
    provide_more(ring);
}

void ring_settle(struct ring *ring, uint32_t taken) {
    struct ring_buffers *buffers = &ring->buffers;
    if (taken > buffers->busiest)
        buffers->busiest = taken;
    if (++buffers->calm < RING_CALM_PASSES)
        return;
    if (buffers->busiest < buffers->target / 4 && buffers->target > RING_BUFFERS_LEAST)
        buffers->target /= 2; /* the ones too many are parked as they come back */
    buffers->calm = buffers->busiest = 0;
}

#endif
