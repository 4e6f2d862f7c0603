/* ring.h - the least of io_uring that the benchmark programs need: raw system calls, no library.
 *
 * Not liburing, because a distribution's older one knows neither rings without an index array nor the minimum wait, and
 * because nothing may stand between a feature and its cost. Knows no sockets. One thread for each ring.
 */
#ifndef BENCH_RING_H
#define BENCH_RING_H

#include <errno.h>
#include <linux/io_uring.h>
#include <linux/time_types.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What headers of Linux 6.1 lack. All values from the kernel's include/uapi/linux/io_uring.h, here as of 6.18. */
enum {
    SETUP_NO_SQARRAY = 1U << 16,   /* IORING_SETUP_NO_SQARRAY, 6.6 */
    RECVSEND_BUNDLE = 1U << 4,     /* IORING_RECVSEND_BUNDLE, 6.10 */
    BUFFER_RING_INCREMENTAL = 2,   /* IOU_PBUF_RING_INC, 6.12 */
    CQE_BUFFER_GOES_ON = 1U << 4,  /* IORING_CQE_F_BUF_MORE, 6.12 */
    FEATURE_MIN_TIMEOUT = 1U << 15 /* IORING_FEAT_MIN_TIMEOUT, 6.12 */
};

/* struct io_uring_getevents_arg, whose padding became the minimum wait in 6.12. */
struct wait_argument {
    uint64_t signal_mask;
    uint32_t signal_mask_size;
    uint32_t min_wait_us;
    uint64_t timeout; /* address of a __kernel_timespec, or 0 */
};

struct ring {
    int descriptor;
    int enter_descriptor; /* the same, or its index among the registered rings */
    unsigned enter_flags;
    unsigned features;
    unsigned *sq_head, *sq_tail, *cq_head, *cq_tail;
    unsigned sq_mask, cq_mask, sq_entries;
    unsigned tail, submitted; /* entries taken, entries handed to the kernel */
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    uint64_t enters;
};

/* A ring of provided buffers: a power of two of them, all of one size, in one mapping. */
struct buffer_ring {
    struct io_uring_buf_ring *entries;
    unsigned char *memory;
    unsigned *position; /* where in the ring a buffer was put last: a bundle takes the ones behind it */
    unsigned *consumed; /* incremental: how much of a buffer was filled */
    unsigned count, size;
    uint16_t tail;
};

static inline void die(const char *what) {
    perror(what);
    exit(1);
}

static inline void *map_memory(size_t size, int descriptor, off_t offset) {
    int flags = descriptor < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED | MAP_POPULATE;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, descriptor, offset);
    if (memory == MAP_FAILED)
        die("mmap");
    return memory;
}

static inline int register_with_ring(struct ring *ring, unsigned what, void *argument, unsigned count) {
    return (int)syscall(__NR_io_uring_register, ring->descriptor, what, argument, count);
}

static inline void ring_open(struct ring *ring, unsigned entries, unsigned cq_entries, unsigned flags) {
    struct io_uring_params params = {.flags = flags | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP,
                                     .cq_entries = cq_entries};
    *ring = (struct ring){0};
    ring->descriptor = (int)syscall(__NR_io_uring_setup, entries, &params);
    if (ring->descriptor < 0)
        die("io_uring_setup");
    ring->enter_descriptor = ring->descriptor;
    ring->features = params.features;
    size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    unsigned char *rings = map_memory(sq_size > cq_size ? sq_size : cq_size, ring->descriptor, IORING_OFF_SQ_RING);
    ring->sqes = map_memory(params.sq_entries * sizeof(struct io_uring_sqe), ring->descriptor, (off_t)IORING_OFF_SQES);
    ring->sq_head = (unsigned *)(void *)(rings + params.sq_off.head);
    ring->sq_tail = (unsigned *)(void *)(rings + params.sq_off.tail);
    ring->cq_head = (unsigned *)(void *)(rings + params.cq_off.head);
    ring->cq_tail = (unsigned *)(void *)(rings + params.cq_off.tail);
    ring->cqes = (struct io_uring_cqe *)(void *)(rings + params.cq_off.cqes);
    ring->sq_entries = params.sq_entries;
    ring->sq_mask = params.sq_entries - 1;
    ring->cq_mask = params.cq_entries - 1;
    if ((flags & SETUP_NO_SQARRAY) == 0) {
        unsigned *array = (unsigned *)(void *)(rings + params.sq_off.array);
        for (unsigned i = 0; i < params.sq_entries; i++)
            array[i] = i;
    }
}

static inline void ring_register_descriptor(struct ring *ring) {
    struct io_uring_rsrc_update update = {.offset = UINT32_MAX, .data = (unsigned)ring->descriptor};
    if (register_with_ring(ring, IORING_REGISTER_RING_FDS, &update, 1) != 1)
        die("IORING_REGISTER_RING_FDS");
    ring->enter_descriptor = (int)update.offset;
    ring->enter_flags = IORING_ENTER_REGISTERED_RING;
}

/* Submits what was prepared and waits for that many completions; the argument may be NULL. False if interrupted. */
static inline bool ring_enter(struct ring *ring, unsigned wait_count, const struct wait_argument *argument) {
    unsigned flags = ring->enter_flags | (wait_count > 0 ? IORING_ENTER_GETEVENTS : 0);
    unsigned to_submit = ring->tail - ring->submitted;
    if (argument != NULL)
        flags |= IORING_ENTER_EXT_ARG;
    __atomic_store_n(ring->sq_tail, ring->tail, __ATOMIC_RELEASE);
    ring->enters++;
    int result = (int)syscall(__NR_io_uring_enter, ring->enter_descriptor, to_submit, wait_count, flags, argument,
                              argument != NULL ? sizeof *argument : 0);
    if (result < 0 && errno != EINTR && errno != ETIME && errno != EBUSY && errno != EAGAIN)
        die("io_uring_enter");
    ring->submitted = __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
    return result >= 0 || errno != EINTR;
}

static inline struct io_uring_sqe *ring_next_sqe(struct ring *ring) {
    while (ring->tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) == ring->sq_entries)
        ring_enter(ring, 0, NULL);
    struct io_uring_sqe *sqe = &ring->sqes[ring->tail++ & ring->sq_mask];
    *sqe = (struct io_uring_sqe){0};
    return sqe;
}

static inline unsigned ring_ready(const struct ring *ring) {
    return __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) - *ring->cq_head;
}

/* Takes one completion out of the ring; false if there is none. */
static inline bool ring_take(struct ring *ring, struct io_uring_cqe *taken) {
    unsigned head = *ring->cq_head;
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
        return false;
    *taken = ring->cqes[head & ring->cq_mask];
    __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
    return true;
}

/* Gives a buffer to the kernel; it sees it from the next buffer_ring_publish on. */
static inline void buffer_ring_put(struct buffer_ring *buffers, unsigned id) {
    unsigned index = buffers->tail++ & (buffers->count - 1);
    struct io_uring_buf *entry = &buffers->entries->bufs[index]; /* its last field shares memory with the tail */
    entry->addr = (uint64_t)(uintptr_t)(buffers->memory + (size_t)id * buffers->size);
    entry->len = buffers->size;
    entry->bid = (uint16_t)id;
    buffers->position[id] = index;
    buffers->consumed[id] = 0;
}

static inline void buffer_ring_publish(struct buffer_ring *buffers) {
    __atomic_store_n(&buffers->entries->tail, buffers->tail, __ATOMIC_RELEASE);
}

static inline void buffer_ring_open(struct buffer_ring *buffers, struct ring *ring, unsigned count, unsigned size,
                                    bool incremental) {
    *buffers = (struct buffer_ring){.count = count, .size = size};
    buffers->entries = map_memory(count * sizeof(struct io_uring_buf), -1, 0);
    buffers->memory = map_memory((size_t)count * size, -1, 0);
    buffers->position = calloc(count, sizeof *buffers->position);
    buffers->consumed = calloc(count, sizeof *buffers->consumed);
    if (buffers->position == NULL || buffers->consumed == NULL)
        die("calloc");
    struct io_uring_buf_reg registration = {.ring_addr = (uint64_t)(uintptr_t)buffers->entries, .ring_entries = count};
    registration.pad = incremental ? BUFFER_RING_INCREMENTAL : 0; /* the flags since 6.4 */
    if (register_with_ring(ring, IORING_REGISTER_PBUF_RING, &registration, 1) != 0)
        die("IORING_REGISTER_PBUF_RING");
    for (unsigned id = 0; id < count; id++)
        buffer_ring_put(buffers, id);
    buffer_ring_publish(buffers);
}

#endif
