/* core.h - the structures of the core: port, socket, operation, record, block, timer; and what its files share.
 *
 * Knows the contract's states and locks; does not know which backend runs below.
 *
 * Locks, in the order in which they may be taken:
 *   1. an_socket.lock      the socket's descriptor, state and both directions. Held across non-blocking system calls.
 *   2. an_port.lock        queue, leader, ready list, timers, slots, counters. Never held across a system call other
 *                          than waking.
 *   3. an_pool.lock        free chunks; an_slabs.lock, free memory for sockets.
 * "The leader" is the one thread that waits in the system and performs what came (see port.c); some fields are its alone.
 * Where a backend has threads wait together, it is the one whose turn it is to perform.
 */
#ifndef AN_CORE_H
#define AN_CORE_H

#include "os.h"

struct an_chunk;
struct an_slab;
struct an_slabs;
struct an_backend;
struct an_overlapped;

/* ---- record: one completion in the queue ------------------------------------------------------------------------ */

/* Where a record lives, which says what happens to its memory when it has been dequeued. */
enum record_home {
    RECORD_IN_OPERATION, /* the caller's operation: nothing */
    RECORD_IN_BLOCK,     /* a pool block: lent to the caller until an_completion_release */
    RECORD_IN_QUIET      /* a quiet operation of ours: freed */
};

enum record_flag {
    RECORD_MORE = AN_MORE,
    RECORD_TRUNCATED = AN_TRUNCATED,
    RECORD_ADDRESS = 4, /* the block carries an address */
    RECORD_DATA = 8     /* the block carries lent data */
};

/* Owned by its home; linked in one list at a time: a direction (as part of an operation) or the port's queue. */
struct an_record {
    struct an_record *next;
    an_operation *operation; /* as it was given, so with the caller's mark */
    an_socket *socket;       /* holds a reference; NULL for posts and timers */
    void *lent;              /* struct an_block * or NULL; for posts and timers the user's state */
    an_socket *accepted;
    uint64_t transferred;
    int32_t error;
    uint8_t kind;
    uint8_t flags; /* enum record_flag */
    uint8_t home;  /* enum record_home */
    uint8_t unused;
};

/* ---- pool: memory lent to receives ------------------------------------------------------------------------------- */

/* A piece of a chunk: header, then an address if it carries one, then data. */
struct an_block {
    struct an_record record; /* used when the record's home is this block */
    struct an_chunk *chunk;
};

enum {
    AN_RECEIVE_LARGEST = 256 << 10, /* on loopback 256 KiB move twice what 64 KiB do; more brings nothing */
    AN_CHUNK_SIZE = 4 * (AN_RECEIVE_LARGEST + 256), /* four of the largest receives with their headers */
    AN_CHUNKS_KEPT = 2                              /* free chunks that stay for the next burst */
};

/* Leader's: current. pool.lock: free list and counts. */
struct an_pool {
    struct an_mutex lock;
    struct an_chunk *current;
    struct an_chunk *free;
    uint32_t free_count;
    uint32_t total; /* chunks alive, atomic */
};

void an_pool_init(struct an_pool *pool);
void an_pool_destroy(struct an_pool *pool);
/* A block for up to `size` bytes of data behind an address (if asked for), or NULL without memory. Leader only. It is
 * not taken until an_pool_take: an empty-handed receive leaves no trace. */
struct an_block *an_pool_offer(struct an_pool *pool, bool with_address, size_t size);
/* Takes the block offered last with `used` bytes of data; it holds its chunk until an_block_release. Leader only. */
void an_pool_take(struct an_pool *pool, struct an_block *block, bool with_address, size_t used);
void an_block_release(struct an_block *block);
an_address *an_block_address(struct an_block *block);
void *an_block_data(struct an_block *block, bool with_address);

/* ---- timers ---------------------------------------------------------------------------------------------------------- */

enum timer_kind { TIMER_OF_OPERATION, TIMER_OF_SOCKET, TIMER_OF_BACKEND };

/* Embedded in an operation (AN_TIMER), a socket (the earliest of its deadlines) or a backend, which looks at the time in
 * each pass: for it a pass is made when it is due. Protected by port.lock. */
struct an_timer {
    int64_t due_ns;
    uint32_t place; /* index in the heap + 1; 0: not in the heap */
    uint32_t kind;  /* enum timer_kind */
};

struct an_timers {
    struct an_timer **heap;
    uint32_t count;
    uint32_t capacity;
    uint32_t reserved; /* who may stand in it: each associated socket, each AN_TIMER pending, the backend */
};

/* Reserves a place, so that putting a timer in cannot fail. False without memory. */
bool an_timers_reserve(struct an_timers *timers);
void an_timers_unreserve(struct an_timers *timers);
void an_timers_insert(struct an_timers *timers, struct an_timer *timer, int64_t due_ns);
void an_timers_remove(struct an_timers *timers, struct an_timer *timer);
/* False unless `timer`, whose memory may be anything, is in the heap. */
bool an_timers_contain(const struct an_timers *timers, const struct an_timer *timer);
int64_t an_timers_next(const struct an_timers *timers);
/* Removes and returns the earliest if it is due, else NULL. */
struct an_timer *an_timers_expire(struct an_timers *timers, int64_t now_ns);

/* ---- operation ---------------------------------------------------------------------------------------------------------- */

/*      start                 completed               dequeued
 * idle ------> in a direction ---------> in the queue ---------> idle (the caller's again)
 *                   |  ^
 *                   +--+ multishot: a block's record goes into the queue with MORE, the operation stays
 *
 * A quiet operation (memory of ours) goes from its direction to nowhere, or into the queue if it failed. A post goes
 * straight into the queue; a timer waits in the heap instead of a direction.
 */
enum operation_flag {
    OPERATION_MULTISHOT = 1,
    OPERATION_PAUSED = 2,
    OPERATION_QUIET = 4,
    OPERATION_VECTOR = 8,  /* data is an an_buffer array */
    OPERATION_BEGUN = 16,  /* connect: under way. Sends: bytes went out before what is counted in transferred */
    OPERATION_REVIVES = 32 /* connect: the stream was broken when it started */
};

/* What an an_operation really is. The caller's memory, ours while in flight, under the socket's lock. */
struct operation {
    struct an_record record; /* record.transferred is the progress */
    struct operation *previous;
    union {
        void *buffer;             /* receives: NULL asks for lent memory */
        const void *data;         /* sends */
        const an_buffer *vector;  /* sends with OPERATION_VECTOR */
        an_descriptor descriptor; /* sendfile: our duplicate */
    } at;
    uint64_t length; /* bytes to receive at most, to send in all */
    union {
        const an_address *address; /* connect, sendto */
        uint64_t pause_above;      /* multishot recv */
        uint64_t offset;           /* sendfile */
    } to;
    int64_t deadline_ns;
    int64_t timeout_ns; /* multishot: what each arrival moves the deadline by */
    union {
        struct an_timer timer; /* AN_TIMER */
        struct {
            uint64_t offset; /* bytes of the current vector entry that went out */
            uint32_t index;
            uint32_t count;
        } piece;
    } more;
    uint32_t flags;      /* enum operation_flag */
    uint32_t more_count; /* multishot: completions with AN_MORE so far */
};

_Static_assert(sizeof(struct operation) <= sizeof(an_operation), "an_operation has room for the real one");

/* Without the caller's mark: see an_operation_marked. */
static inline an_operation *an_operation_unmarked(an_operation *operation) {
    return (an_operation *)((uintptr_t)operation & ~(uintptr_t)1);
}

static inline bool an_operation_is_marked(const an_operation *operation) { return ((uintptr_t)operation & 1) != 0; }

static inline struct operation *an_operation_private(an_operation *operation) {
    return (struct operation *)an_operation_unmarked(operation);
}

static inline struct operation *an_operation_next(struct operation *operation) {
    return (struct operation *)operation->record.next;
}

/* ---- socket ------------------------------------------------------------------------------------------------------------ */

/* One direction of a socket: its operations in the order started. Under socket.lock. */
struct an_direction {
    struct operation *head;
    struct operation *tail;
    int64_t retry_ns; /* try again then, and not before, whatever `ready` says (out of descriptors, full backlog) */
    bool ready;       /* not known to be "not now": worth a try */
    bool armed;       /* the reactor was asked to report it (level-triggered ones only) */
    bool starved;     /* accept: out of descriptors, and reported */
    bool held;        /* receive: stands still because unsent is above pause_above */
    bool under_way;   /* transmit: the system has bytes in hand that count as gone, which a shutdown may cut off */
};

/* Something that the system brought before an operation asked for it; its owner is the socket that it came for. */
struct an_parcel {
    struct an_parcel *next;
    an_descriptor accepted; /* of a listener; else -1 */
    size_t offset;          /* bytes that were taken already */
    size_t length;
    char data[];
};

/* What a system that receives by itself has in hand for a socket. The backend's alone; under socket.lock. */
struct an_requests {
    struct an_parcel *first;
    struct an_parcel *last;
    an_socket *next;          /* the backend's list of descriptors to close; its lock */
    an_descriptor descriptor; /* in that list */
    int32_t error;            /* came instead of data, not told yet */
    uint32_t round;           /* the backend's round in which requests were last prepared */
    uint32_t fork_count;      /* of the time when accepting was last asked for */
    uint8_t armed;            /* kinds of requests that the system has */
    uint8_t cancelled;        /* of them: it was asked to end them */
    uint8_t once;             /* of them: ends with its first completion by itself */
    bool preparing;           /* the leader is about to prepare what is needed */
    bool bulk;                /* messages are large: received by calls of our own */
    uint8_t streak;           /* receives in a row that speak for the other way */
};

/*          close(flush)              last send handed over
 *   OPEN --------------> FLUSHING ------------------------+
 *     |                      | close                      v
 *     +----------------------+------------------------> CLOSED (no descriptor, no operation; only memory)
 */
enum socket_state { SOCKET_OPEN, SOCKET_FLUSHING, SOCKET_CLOSED };

/* Reference counted: the user's handle, each operation in flight, each completion until it is released, each list of
 * the port that it stands in. Fields are under socket.lock unless told otherwise. */
struct an_socket {
    struct an_mutex lock;
    uint32_t references; /* atomic */
    uint64_t tag;        /* its events': generation and index of its slot in the port; constant while associated */
    an_port *port;       /* set once, by associate; holds a reference */
    uint32_t unreported; /* atomic: failures of quiet sends queued and not yet released */
    void *user_state;    /* atomic */
    an_descriptor descriptor;
    int family;
    int type;
    int protocol;
    uint32_t fork_count; /* of the time it was made, see os.h */
    uint32_t state;      /* enum socket_state; atomic, written under the lock */
    bool adopted;
    bool shown;   /* an_socket_descriptor told the number: others may duplicate it */
    bool lingers; /* SO_LINGER was set, or may have been on its listener: closing may wait for the peer */
    bool accepted;
    bool listening;
    bool tells_length;     /* an_os_tells_length */
    bool private_listener; /* associated with no fork in between: no other process serves it */
    bool ended;            /* the end of the stream was received: nothing unread can be left */
    bool broken;           /* a send broke off in the middle: later ones fail with AN_EPIPE */
    bool quiet_failed;     /* reported; later quiet sends are silent */
    bool hidden;           /* the last event said that a short receive may hide more (edge-triggered only) */
    bool reported;         /* a level-triggered reactor said that there is something, and nothing was received since */
    bool on_ready;         /* in the port's ready list; port.lock */
    bool on_starved;       /* in the port's starved list; port.lock */
    bool throttled;        /* reads no further ahead until its records are dequeued; port.lock */
    bool on_throttled;     /* in the port's list of those that wait for the port's share; port.lock */
    struct an_direction receive;
    struct an_direction transmit;
    uint64_t unsent; /* atomic, written under the lock */
    uint64_t bytes_received;
    uint64_t bytes_sent;
    uint64_t ahead;            /* bytes queued and not dequeued; atomic, written under port.lock */
    an_socket *ready_next;     /* port.lock */
    an_socket *starved_next;   /* port.lock */
    an_socket *throttled_next; /* port.lock */
    int64_t scheduled_ns;      /* the deadline that `timer` stands for, AN_NEVER without; socket.lock */
    struct an_timer timer;     /* port.lock */
    an_socket *pass_next;      /* leader */
    an_socket *expired_next;   /* leader */
    struct an_requests requests;
    struct an_overlapped *overlapped; /* a backend's own memory for it, which goes with it */
    struct an_slab *slab;             /* its memory is of; NULL: of the general allocator */
};

/* ---- slabs: the memory of accepted sockets ------------------------------------------------------------------------------ */

/* Of a port and the sockets that it accepted, which may outlive it. Under its lock, which is the last of all. */
struct an_slabs {
    struct an_mutex lock;
    struct an_slab *first;    /* those with a free piece */
    uint32_t references;      /* atomic: the port, each piece taken */
    uint32_t fork_generation; /* constant */
    uint32_t total;
    uint32_t empty; /* without a used piece: one is kept */
};

/* NULL without memory. */
struct an_slabs *an_slabs_create(void);
/* The port lets go of them. */
void an_slabs_drop(struct an_slabs *slabs);
/* Memory for a socket, zero but for `slab`; NULL without. Any thread. */
an_socket *an_slabs_take(struct an_slabs *slabs);
/* Any thread. */
void an_slab_give_back(an_socket *piece);

enum {
    AN_AHEAD_OF_SOCKET = 1 << 20, /* bytes read ahead of dequeue for one socket */
    AN_AHEAD_OF_PORT = 64 << 20   /* and for a port */
};

/* Nobody else can have the file open: closing the descriptor closes it. socket.lock held. */
bool an_socket_is_sole_holder(const an_socket *socket);
void an_socket_hold(an_socket *socket);
void an_socket_drop(an_socket *socket);
/* Wraps a descriptor; on failure (no memory) it stays the caller's. */
an_socket *an_socket_create(an_descriptor descriptor, int family, int type, int protocol);
/* The same for one that this listener, which is associated, has accepted. */
an_socket *an_socket_create_accepted(const an_socket *listener, an_descriptor descriptor);
/* The port closes: as an_socket_close, without asking whether the port is open. */
void an_socket_abort(an_socket *socket);
/* socket.lock held: CLOSED, whatever is still in the directions ends. `error` is what the operations end with. */
void an_socket_finish(an_socket *socket);
/* Timers of these sockets are due: ends operations whose deadline passed, retries what was to be retried. The list is that
 * of an_port_begin_pass. Leader. */
void an_socket_expire_all(an_socket *first);
/* socket.lock held: makes sure that an_socket_expire_all comes at `due_ns` or earlier. */
void an_socket_schedule(an_socket *socket, int64_t due_ns);

/* ---- operations in a direction (operation.c); socket.lock held for all ------------------------------------------------- */

/* The point in time `timeout_ns` after now_ns: AN_NEVER for a negative one, and never AN_NEVER for another. */
static inline int64_t an_deadline(int64_t now_ns, int64_t timeout_ns) {
    if (timeout_ns < 0)
        return AN_NEVER;
    return timeout_ns < AN_NEVER - now_ns ? now_ns + timeout_ns : AN_NEVER - 1;
}

void an_direction_append(struct an_direction *direction, struct operation *operation);
void an_direction_remove(struct an_direction *direction, struct operation *operation);
struct an_direction *an_direction_of(an_socket *socket, uint8_t kind);
/* Bytes not yet handed over. */
uint64_t an_operation_remaining(const struct operation *operation);
bool an_operation_has_begun(const struct operation *operation);
/* Takes it out of its direction and queues its (last) completion, or frees it if it was quiet and went well. */
void an_operation_complete(an_socket *socket, struct operation *operation, int error);
/* The same for one that never was in its direction. */
void an_operation_complete_unlinked(an_socket *socket, struct operation *operation, int error);
/* A send ends before its last byte: completes it and does what follows for those behind it. `forced` is false when the
 * system failed it, true when it was cancelled or timed out. */
void an_operation_fail_send(an_socket *socket, struct operation *operation, int error, bool forced);
/* The first of the transmit direction is about to be ended: the system lets go of it. True: it had gone out whole, and was
 * completed. */
bool an_operation_withdraw(an_socket *socket, struct operation *operation);
/* Ends one operation of either direction as cancelled or timed out. */
void an_operation_end(an_socket *socket, struct operation *operation, int error);
void an_operation_discard_quiet(an_socket *socket, struct operation *operation);
/* Gives back what a finished or refused operation held (its file). */
void an_operation_let_go(struct operation *operation);

/* ---- port ---------------------------------------------------------------------------------------------------------------- */

enum leader_state { LEADER_NONE, LEADER_WAITING, LEADER_PROCESSING };

/* A socket's place in the port. The generation tells a late event from the socket that has the slot now. */
struct an_slot {
    an_socket *socket; /* not a reference: the socket leaves its slot before it dies */
    uint32_t generation;
    uint32_t next_free; /* index + 1 */
};

/* Fields are under port.lock unless told otherwise. */
struct an_port {
    struct an_mutex lock;
    struct an_condition changed; /* followers: the queue or the leader's place; closing: the last one left */
    struct an_condition turn;    /* together: those who wait for their turn to perform */
    uint32_t references;         /* atomic: the user's handle, each associated socket */
    uint32_t fork_generation;    /* constant */
    uint32_t concurrency;        /* constant */
    uint32_t flags;              /* constant */
    const char *name;            /* constant, static */
    bool edge_triggered;         /* constant: the backend tells of readiness once, when it begins */
    bool together;               /* constant: the backend has threads wait together */
    const struct an_backend_interface *interface; /* constant */
    struct an_backend *backend;                   /* constant until closed */

    struct an_record *head;
    struct an_record *tail;
    uint64_t queued;
    uint64_t ahead; /* bytes queued and not dequeued, all sockets; atomic, written under the lock */

    enum leader_state leader;
    uint32_t followers; /* threads that wait for `changed` */
    uint32_t inside;    /* threads in an_port_dequeue */
    uint32_t unpolled;  /* completions handed out since the system was last asked */
    uint32_t signalled; /* followers that were woken and have not run yet */
    uint32_t wakes;     /* wake-ups of the backend that no wait has reported yet; at most one but for together */
    /* When who waits in the system looks at the timers by himself; together: the first of those who are known to, AN_NEVER
     * if none is. */
    int64_t leader_until_ns;
    uint32_t waiting;    /* together: threads that wait in the system */
    uint32_t contenders; /* together: threads that wait for their turn */
    bool turn_passed;    /* together: one of them has it */
    uintptr_t dequeuer;  /* concurrency 1: the thread */
    uint32_t closed;     /* atomic: written under the lock, read anywhere */
    bool released;       /* closing is over */
    bool watched;        /* an_port_descriptor was called */

    an_socket *ready_head; /* sockets with work left over; the list holds references */
    an_socket *ready_tail;
    an_socket *starved;   /* listeners without descriptors; holds references; atomic, written under the lock */
    an_socket *throttled; /* sockets that wait for the port's share; holds references */

    struct an_slot *slots;
    uint32_t slot_count;
    uint32_t slot_capacity;
    uint32_t slots_left; /* sockets that have left since it was last seen whether the slots could be fewer */
    uint32_t free_slot;  /* index + 1 */
    uint32_t generation; /* the next socket's */

    struct an_timers timers;
    struct an_pool pool;
    struct an_slabs *slabs; /* constant */
    int64_t now_ns;         /* leader: the time of this pass, 0 until it is asked for */
    uint64_t pass_bytes;    /* leader: received by calls in this pass, all sockets */

    uint64_t finished;               /* last completions dequeued */
    uint64_t started[AN_KIND_COUNT]; /* atomic */
    uint64_t quiet_sends;            /* atomic */
    uint64_t bytes_received;         /* atomic */
    uint64_t bytes_sent;             /* atomic */
    an_statistics counts;            /* the rest */
};


void an_port_hold(an_port *port);
void an_port_drop(an_port *port);
bool an_port_is_foreign(const an_port *port); /* made by a parent of this process */
/* Queues a record; it holds the socket's reference that it carries. Any thread. */
void an_port_queue(an_port *port, struct an_record *record);
/* Has the leader look at the socket in its next pass. Any thread. */
void an_port_make_ready(an_port *port, an_socket *socket);
/* True: the socket must not read further ahead; the port makes it ready when it may. */
bool an_port_throttles(an_port *port, an_socket *socket);
/* The listener ran out of descriptors: made ready when one of the port's sockets closes. */
void an_port_starve(an_port *port, an_socket *socket);
/* Puts the socket into the port; AN_EPORTCLOSED. socket.lock held. */
int an_port_enter(an_port *port, an_socket *socket);
/* Takes it out. socket.lock held. */
void an_port_leave(an_port *port, an_socket *socket);
/* A descriptor was closed: starved listeners may try again. */
void an_port_feed(an_port *port);
/* Takes the ready list for the leader to work on: linked by pass_next, it holds references. port.lock held. */
an_socket *an_port_take_ready(an_port *port);
/* Gives back those from `first` on, with their references, that the pass had no room for: they are the next one's first.
 * Leader. */
void an_port_return_ready(an_port *port, an_socket *first);
/* The leader, for a backend that prepares, goes to wait in the system now. Returns until when: until_ns, earlier if a timer
 * is due, 0 if there is something to do already. */
int64_t an_port_begin_wait(an_port *port, int64_t until_ns);
/* The leader came back from the system; `woken` as the system told. Queues timers that are due, and returns the sockets
 * whose deadlines are: linked by expired_next, the list holds references. port.lock held. */
an_socket *an_port_begin_pass(an_port *port, bool woken);
/* Together: this thread came back from the system, where it waited until `until_ns`, with `wakes` wake-ups; `laden`: with
 * something to perform. True: it is its turn, from an_port_begin_pass to an_port_end_turn. False: there is nothing for it to
 * perform, but something in the queue, and it is another one's turn. port.lock held, but not while it waits for its turn. */
bool an_port_take_turn(an_port *port, int64_t until_ns, uint32_t wakes, bool laden);
/* port.lock held. */
void an_port_end_turn(an_port *port);
/* The socket with that event tag, with a reference, or NULL. port.lock held. */
an_socket *an_port_find(an_port *port, uint64_t tag);
/* The time of this pass. The clock is read when it is needed: on some machines that is a system call. Leader only. */
int64_t an_port_now(an_port *port);
void an_port_set_timer(an_port *port, struct an_timer *timer, int64_t due_ns);

#endif
