/* windows.h - the types of os.h whose size must be known, and atomics, for Windows with MSVC, clang or mingw. Included by
 * os.h, before the public header: windows.h must not define what COM needs (a macro named `interface` among it).
 */
#ifndef AN_OS_WINDOWS_H
#define AN_OS_WINDOWS_H

#if !defined(WIN32_LEAN_AND_MEAN)
#define WIN32_LEAN_AND_MEAN
#endif

#include <windows.h>
#include <winsock2.h>

#include <stdbool.h>
#include <stdint.h>

#include "asyncio_native.h"

struct an_mutex {
    SRWLOCK native;
};

struct an_condition {
    CONDITION_VARIABLE native;
};

/* What accept or AcceptEx means by an error. Wine 8 has WSAEINVAL for descriptors that ran out, where a socket that does listen
 * cannot get it: NtStatusToWSAError knows no STATUS_TOO_MANY_OPENED_FILES. */
int an_os_accept_error(an_descriptor listener, int error);

/* A thread in a wait that Ctrl-C shall end, on its own stack; linked in a list of the process under a lock of its own. */
struct an_interruptible {
    struct an_interruptible *next;
    struct an_interruptible *previous;
    DWORD thread;
};

/* Has the console's events (Ctrl-C, Ctrl-Break) interrupt threads from now on. Whoever handles them goes on doing so. */
void an_os_listen_to_console(void);
/* Between these two an event interrupts this thread's alertable wait, as a signal does on POSIX, when all have handled it;
 * it may also interrupt the next wait. */
void an_os_begin_interruptible(struct an_interruptible *waiting);
void an_os_end_interruptible(struct an_interruptible *waiting);

/* Counters and flags that threads share without a lock. add returns the value before. The Interlocked functions are full
 * barriers; an aligned load or store of up to 64 bits is whole on all machines with Windows, MemoryBarrier orders it. */
static inline uint32_t an_atomic_add32(uint32_t *value, uint32_t delta) {
    return (uint32_t)InterlockedExchangeAdd((volatile LONG *)value, (LONG)delta);
}

static inline uint32_t an_atomic_load32(const uint32_t *value) {
    uint32_t loaded = *(const volatile uint32_t *)value;
    MemoryBarrier();
    return loaded;
}

static inline void an_atomic_store32(uint32_t *value, uint32_t stored) {
    InterlockedExchange((volatile LONG *)value, (LONG)stored);
}

static inline uint64_t an_atomic_add64(uint64_t *value, uint64_t delta) {
    return (uint64_t)InterlockedExchangeAdd64((volatile LONG64 *)value, (LONG64)delta);
}

static inline uint64_t an_atomic_load64(const uint64_t *value) { return *(const volatile uint64_t *)value; }

/* For a value with one writer at a time, whoever reads: no locked instruction. */
static inline void an_atomic_bump64(uint64_t *value, uint64_t delta) {
    *(volatile uint64_t *)value = an_atomic_load64(value) + delta;
}

static inline void *an_atomic_load_pointer(void *const *value) {
    void *loaded = *(void *const volatile *)value;
    MemoryBarrier();
    return loaded;
}

static inline void an_atomic_store_pointer(void **value, void *stored) { InterlockedExchangePointer(value, stored); }

#endif
