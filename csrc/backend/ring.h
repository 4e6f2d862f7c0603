/* ring.h - an io_uring(7) as the backend uses it: set up with what the kernel can do, waited on, and its receive buffers.
 *
 * Knows liburing and the kernel's features; nothing of sockets, operations or ports. One thread at a time (the leader)
 * calls what submits or waits.
 */
#ifndef AN_BACKEND_RING_H
#define AN_BACKEND_RING_H

#include <liburing.h>

#include "os.h"

/* What the kernel can do; each can be switched off by its name in the environment variable
 * ASYNCIO_NATIVE_IO_URING_WITHOUT (a comma between names), and then has the fallback that an older kernel gets. */
enum ring_feature {
    RING_SUBMIT_ALL = 1,         /* submit_all, Linux 5.18. Without: submitting goes on after one that was refused */
    RING_COOP_TASKRUN = 2,       /* coop_taskrun, 5.19. Without: the kernel interrupts threads to finish their work */
    RING_BUFFER_RING = 4,        /* buffer_ring, 5.19. Without: receives wait for readiness */
    RING_MULTISHOT_ACCEPT = 8,   /* multishot_accept, 5.19. Without: accepts wait for readiness */
    RING_MULTISHOT_RECEIVE = 16, /* multishot_receive, 6.0. Without: the ring receives once a time */
    RING_DEFER_TASKRUN = 32,     /* defer_taskrun, 6.1, with SINGLE_ISSUER. Without: as for many threads */
    RING_SKIP_SUCCESS = 64,      /* skip_success, 5.17. Without: each cancel has a completion, which is dropped */
    RING_CANCEL_ANY = 128        /* cancel_any, 5.19. Without: closing the port cancels what it knows by name */
};

/* Receive buffers lent to the kernel. `provided` of them stand in its ring or in completions; the rest of `used` is
 * parked, without memory. They grow when the kernel found none (ENOBUFS), and shrink when few were needed for a while. */
struct ring_buffers {
    struct io_uring_buf_ring *ring; /* NULL: none */
    char *memory;                   /* RING_BUFFERS_MOST * RING_BUFFER_SIZE bytes of address space, not inherited */
    uint16_t *parked;               /* stack of buffer numbers */
    uint32_t parked_count;
    uint32_t used;     /* numbers below were provided at some time */
    uint32_t provided; /* now */
    uint32_t target;   /* how many should be */
    uint32_t calm;     /* passes since the last shrink or shortage */
    uint32_t busiest;  /* most buffers that one pass took since then */
};

enum {
    RING_BUFFER_SIZE = 4096, /* larger messages are received by calls of their own into larger memory, see io_uring.c */
    RING_BUFFERS_LEAST = 64, /* 256 KiB: a pass of a busy server fills few more before it gives them back */
    RING_BUFFERS_MOST = 4096,   /* 16 MiB */
    RING_CALM_PASSES = 1024,    /* shrinks after so many passes that needed less than a quarter */
    RING_ENTRIES = 1024,        /* submissions; more are submitted in parts */
    RING_ENTRIES_LEAST = 8,     /* where locked memory is scarce */
    RING_COMPLETIONS_FACTOR = 8 /* completions for each submission: multishots bring many */
};

struct ring {
    struct io_uring native;
    uint32_t features; /* enum ring_feature */
    bool disabled;     /* ring_enable must come first, by the thread that will submit */
    struct ring_buffers buffers;
};

/* Sets one up. `single`: one thread will do all submitting and waiting. Errors: as io_uring_setup(2). */
int ring_open(struct ring *ring, bool single);
/* Writes why an error of ring_open came. */
void ring_explain(int error, char *reason, size_t size);
void ring_close(struct ring *ring);
/* In a forked child: its copy of the descriptor; nothing else of a ring is inherited. */
void ring_close_copy(struct ring *ring);
int ring_enable(struct ring *ring);

/* The next free submission; what stands there is submitted first if there is none. NULL: the kernel refuses now. */
struct io_uring_sqe *ring_submission(struct ring *ring);
/* Submits everything and waits for a completion until `until_ns` (0: not at all). AN_EINTR: a signal. */
int ring_enter(struct ring *ring, int64_t until_ns);
static inline bool ring_is_submitted(struct ring *ring) { return io_uring_sq_ready(&ring->native) == 0; }

static inline char *ring_buffer(struct ring *ring, uint32_t number) {
    return ring->buffers.memory + (size_t)number * RING_BUFFER_SIZE;
}
/* Gives a buffer back to the kernel, or parks it. */
void ring_recycle(struct ring *ring, uint32_t number);
/* The kernel found no buffer: provides more if there are any. */
void ring_grow(struct ring *ring);
/* A pass ended that took so many buffers. */
void ring_settle(struct ring *ring, uint32_t taken);

#endif
