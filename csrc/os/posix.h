/* posix.h - the types of os.h whose size must be known, and atomics, for POSIX with gcc or clang. Included by os.h. */
#ifndef AN_OS_POSIX_H
#define AN_OS_POSIX_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct an_mutex {
    pthread_mutex_t native;
};

struct an_condition {
    pthread_cond_t native;
};

/* Counters and flags that threads share without a lock. add returns the value before. */
static inline uint32_t an_atomic_add32(uint32_t *value, uint32_t delta) {
    return __atomic_fetch_add(value, delta, __ATOMIC_ACQ_REL);
}

static inline uint32_t an_atomic_load32(const uint32_t *value) { return __atomic_load_n(value, __ATOMIC_ACQUIRE); }

static inline void an_atomic_store32(uint32_t *value, uint32_t stored) {
    __atomic_store_n(value, stored, __ATOMIC_RELEASE);
}

static inline uint64_t an_atomic_add64(uint64_t *value, uint64_t delta) {
    return __atomic_fetch_add(value, delta, __ATOMIC_RELAXED);
}

static inline uint64_t an_atomic_load64(const uint64_t *value) { return __atomic_load_n(value, __ATOMIC_RELAXED); }

/* For a value with one writer at a time, whoever reads: no locked instruction. */
static inline void an_atomic_bump64(uint64_t *value, uint64_t delta) {
    __atomic_store_n(value, __atomic_load_n(value, __ATOMIC_RELAXED) + delta, __ATOMIC_RELAXED);
}

static inline void *an_atomic_load_pointer(void *const *value) { return __atomic_load_n(value, __ATOMIC_ACQUIRE); }

static inline void an_atomic_store_pointer(void **value, void *stored) {
    __atomic_store_n(value, stored, __ATOMIC_RELEASE);
}

#endif
