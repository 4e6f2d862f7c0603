/* A deterministic simulation: the core of the library on a system that exists in memory only, with the faults that a real
 * one has rarely. One seed is one system and one program of random calls; afterwards what the program was told is compared
 * with what the system saw.
 *
 * This file defines os.h and the choice of backends anew, so the linker takes neither from the library; all else is the
 * library as users get it. One thread; the clock moves by itself. ./test_simulation SEED runs one seed and traces it;
 * ./test_simulation FIRST COUNT runs those.
 */
#include "check.h"
#include "proactor.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>

#define MILLISECOND INT64_C(1000000)

static uint64_t seed;
static bool tracing;

static void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));

static int64_t now_ns;

static void trace(const char *format, ...) {
    if (!tracing)
        return;
    va_list arguments;
    va_start(arguments, format);
    printf("%10.6f ", (double)now_ns / 1e9);
    vprintf(format, arguments);
    putchar('\n');
    va_end(arguments);
    fflush(stdout);
}

/* ---- chance ---------------------------------------------------------------------------------------------------------- */

/* splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. */
static uint64_t mix(uint64_t value) {
    value += UINT64_C(0x9e3779b97f4a7c15);
    value = (value ^ value >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    value = (value ^ value >> 27) * UINT64_C(0x94d049bb133111eb);
    return value ^ value >> 31;
}

static uint64_t chance_state;

/* 0 to bound - 1. */
static size_t below(size_t bound) {
    chance_state += UINT64_C(0x9e3779b97f4a7c15);
    return (size_t)(mix(chance_state) % bound);
}

static bool in_hundred(unsigned percent) { return below(100) < percent; }

/* What goes wrong in this run, in percent of the occasions. */
static struct {
    unsigned short_send;
    unsigned refused_send; /* "not now", with an edge soon after */
    unsigned late_report;
    unsigned spurious_report;
    unsigned reset;
    unsigned refused_connect;
    unsigned exhausted; /* episodes without descriptors */
    unsigned aborted_accept;
    unsigned failed_wait;
    unsigned no_memory;
} faults;

static void choose_faults(void) {
    unsigned *each = &faults.short_send;
    static const unsigned most[] = {60, 20, 50, 10, 3, 30, 10, 30, 5, 3};
    _Static_assert(sizeof most / sizeof *most == sizeof faults / sizeof(unsigned), "one bound for each fault");
    for (size_t i = 0; i < sizeof most / sizeof *most; i++)
        each[i] = in_hundred(50) ? (unsigned)below(most[i] + 1) : 0;
}

/* ---- memory: counted, and refused at times, where malloc can be replaced ----------------------------------------------- */

static volatile unsigned core_depth; /* the library runs; volatile: compilers know that malloc reads no variables */
static volatile unsigned long refused_allocations;

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define COUNTS_MEMORY 1
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *memory, size_t size);
extern void __libc_free(void *memory);
static volatile long live_blocks;

static bool refuse_memory(void) {
    if (core_depth == 0 || faults.no_memory == 0 || !in_hundred(faults.no_memory))
        return false;
    refused_allocations++;
    return true;
}

void *malloc(size_t size) {
    if (refuse_memory())
        return NULL;
    live_blocks++;
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
    if (refuse_memory())
        return NULL;
    live_blocks++;
    return __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size) {
    if (refuse_memory())
        return NULL;
    live_blocks += memory == NULL;
    return __libc_realloc(memory, size);
}

void free(void *memory) {
    live_blocks -= memory != NULL;
    __libc_free(memory);
}
#else
#define COUNTS_MEMORY 0
static const long live_blocks = 0; /* the sanitizer tells what leaked, at the end */
#endif

/* A call into the library. */
#define CORE(call) (core_depth++, core_result = (call), core_depth--, core_result)
#define CORE_DO(call) (core_depth++, (call), core_depth--)
static int core_result;

/* ---- locks, clock, fork: os.h ------------------------------------------------------------------------------------------- */

static an_port *the_port;
static const struct an_mutex *the_slabs_lock; /* the port's, and longer there than it */
static const struct an_mutex *held[4];
static unsigned held_count;

/* The order of core.h. */
static int rank(const struct an_mutex *mutex) {
    if (the_port == NULL)
        return 1;
    if (mutex == &the_port->lock)
        return 2;
    return mutex == &the_port->pool.lock || mutex == the_slabs_lock ? 3 : 1;
}

static bool holds_port(void) { return held_count > 0 && rank(held[held_count - 1]) > 1; }

void an_mutex_init(struct an_mutex *mutex) { CHECK(pthread_mutex_init(&mutex->native, NULL) == 0); }

void an_mutex_destroy(struct an_mutex *mutex) { CHECK(pthread_mutex_destroy(&mutex->native) == 0); }

void an_mutex_lock(struct an_mutex *mutex) {
    CHECK(pthread_mutex_trylock(&mutex->native) == 0); /* nobody else is here */
    CHECK(held_count == 0 || rank(held[held_count - 1]) < rank(mutex));
    held[held_count++] = mutex;
}

void an_mutex_unlock(struct an_mutex *mutex) {
    CHECK(held_count > 0 && held[held_count - 1] == mutex);
    held_count--;
    CHECK(pthread_mutex_unlock(&mutex->native) == 0);
}

void an_condition_init(struct an_condition *condition) { CHECK(pthread_cond_init(&condition->native, NULL) == 0); }

void an_condition_destroy(struct an_condition *condition) { CHECK(pthread_cond_destroy(&condition->native) == 0); }

void an_condition_signal(struct an_condition *condition) { (void)condition; }

void an_condition_broadcast(struct an_condition *condition) { (void)condition; }

void an_condition_wait(struct an_condition *condition, struct an_mutex *mutex, int64_t until_ns) {
    (void)condition, (void)mutex, (void)until_ns;
    CHECK(!"a lone thread never waits for another");
}

int64_t an_clock(void) { return now_ns; }

uintptr_t an_thread_identity(void) { return 1; }

uint32_t an_fork_generation(void) { return 0; }

uint32_t an_fork_count(void) { return 0; }

/* ---- the system: descriptors and their peers ------------------------------------------------------------------------------ */

enum {
    DESCRIPTORS = 512, /* made in one run; numbers are not used again, so that a stale one is seen */
    WINDOW = 8 << 10,  /* bytes on their way to a peer that does not read */
    ARRIVED = 16 << 10,
    MESSAGES = 8,
    MESSAGE_MOST = 2000,
    BACKLOG = 6,
    FILE_SIZE = 50000,
    FAMILY_INTERNET = 1,
    FAMILY_LOCAL = 2,
    TYPE_STREAM = 1,
    TYPE_DATAGRAM = 2,
    EDGE = 0,
    LEVEL = 1
};

enum role { ROLE_NONE, ROLE_STREAM, ROLE_DATAGRAM, ROLE_LISTENER, ROLE_FILE, ROLE_CLOSED };

enum link { LINK_NONE, LINK_UNDER_WAY, LINK_UP };

/* A descriptor in a reactor. */
struct watch {
    bool there;
    uint64_t tag;
    bool edge;         /* something happened and was not reported */
    uint32_t expected; /* level-triggered */
};

struct descriptor {
    enum role role;
    int family;
    struct watch watches[2]; /* by EDGE, LEVEL */
    an_socket *owner;        /* to look into; NULL unless associated */
    enum link link;
    int error;       /* to be told by the next call */
    bool peer_ended; /* behind what arrived */
    bool ended;      /* our sending side */
    bool wants_room; /* "not now" was said: an edge is due when there is room */
    uint64_t arrived;
    uint64_t taken;
    size_t window; /* bytes, or messages, that the peer has room for */
    size_t backlog;
    size_t lengths[MESSAGES]; /* of messages that arrived, by their number modulo */
    char *log;                /* what the peer got; messages with their length before each */
    size_t log_length;
    size_t log_capacity;
};

static struct descriptor descriptors[DESCRIPTORS];
static int descriptor_count;
static int open_descriptors;
static bool friendly; /* no more faults, peers read and answer */
static bool exhausted;
static uint64_t total_sent, total_received;
static unsigned long calls; /* into the system: bounds every loop */

static uint8_t content(uint64_t source, uint64_t offset) { return (uint8_t)mix(source << 32 ^ offset); }

static void fill(void *memory, uint64_t source, uint64_t offset, size_t length) {
    for (size_t i = 0; i < length; i++)
        ((uint8_t *)memory)[i] = content(source, offset + i);
}

static bool is_content(const void *memory, uint64_t source, uint64_t offset, size_t length) {
    for (size_t i = 0; i < length; i++) {
        if (((const uint8_t *)memory)[i] != content(source, offset + i))
            return false;
    }
    return true;
}

static bool occurs(unsigned percent) { return !friendly && in_hundred(percent); }

/* Every call comes through here. */
static struct descriptor *enter(an_descriptor number) {
    CHECK(calls++ < 5000000);
    CHECK(!holds_port());
    CHECK(number >= 0 && number < descriptor_count);
    struct descriptor *descriptor = &descriptors[number];
    CHECK(descriptor->role != ROLE_NONE && descriptor->role != ROLE_CLOSED);
    now_ns += (int64_t)below(2000);
    return descriptor;
}

static int create(enum role role, int family, an_descriptor *number) {
    if (descriptor_count == DESCRIPTORS || (exhausted && !friendly))
        return EMFILE;
    *number = descriptor_count;
    descriptors[descriptor_count++] = (struct descriptor){.role = role, .family = family, .window = MESSAGES};
    open_descriptors++;
    return 0;
}

/* What a level-triggered report would say now. */
static uint32_t levels(const struct descriptor *descriptor) {
    const uint32_t all = REACTOR_RECEIVE | REACTOR_TRANSMIT | REACTOR_HIDDEN;
    bool unread = descriptor->arrived > descriptor->taken;
    uint32_t events = descriptor->window > 0 ? REACTOR_TRANSMIT : 0;
    if (descriptor->role == ROLE_LISTENER)
        return descriptor->backlog > 0 ? REACTOR_RECEIVE : 0;
    if (descriptor->error != 0)
        return all;
    if (descriptor->role == ROLE_STREAM && descriptor->link != LINK_UP)
        return descriptor->link == LINK_NONE ? all : 0;
    if (unread)
        events |= REACTOR_RECEIVE;
    if (descriptor->peer_ended)
        events |= REACTOR_RECEIVE | REACTOR_HIDDEN;
    return descriptor->ended ? events | REACTOR_TRANSMIT : events;
}

static void happen(struct descriptor *descriptor) { descriptor->watches[EDGE].edge = true; }

static void give_room(struct descriptor *descriptor, size_t room, size_t most) {
    descriptor->window = descriptor->window + room < most ? descriptor->window + room : most;
    if (!descriptor->wants_room)
        return;
    descriptor->wants_room = false;
    happen(descriptor);
}

static int refuse_room(struct descriptor *descriptor) {
    descriptor->wants_room = true;
    return AN_EAGAIN;
}

static void keep_log(struct descriptor *descriptor, const void *data, size_t length) {
    if (descriptor->log_length + length > descriptor->log_capacity) {
        unsigned depth = core_depth;
        core_depth = 0;
        descriptor->log_capacity = 2 * (descriptor->log_length + length);
        descriptor->log = realloc(descriptor->log, descriptor->log_capacity);
        core_depth = depth;
    }
    if (length > 0)
        memcpy(descriptor->log + descriptor->log_length, data, length);
    descriptor->log_length += length;
}

/* ---- the peers act ---------------------------------------------------------------------------------------------------------- */

static void peer_sends(struct descriptor *descriptor) {
    size_t unread = (size_t)(descriptor->arrived - descriptor->taken);
    if (descriptor->peer_ended || descriptor->error != 0 || unread >= ARRIVED)
        return;
    descriptor->arrived += 1 + below(in_hundred(80) ? 200 : ARRIVED);
    happen(descriptor);
}

static void peer_sends_message(struct descriptor *descriptor) {
    if (descriptor->arrived - descriptor->taken >= MESSAGES || descriptor->peer_ended)
        return;
    descriptor->lengths[descriptor->arrived++ % MESSAGES] = below(4) == 0 ? 0 : below(MESSAGE_MOST);
    happen(descriptor);
}

static void peer_resets(struct descriptor *descriptor) {
    if (descriptor->link != LINK_UP || descriptor->error != 0)
        return;
    descriptor->arrived = descriptor->taken;
    descriptor->peer_ended = true;
    descriptor->ended = true;
    descriptor->error = ECONNRESET;
    happen(descriptor);
}

static void finish_connect(struct descriptor *descriptor) {
    bool refused = occurs(faults.refused_connect);
    descriptor->link = refused ? LINK_NONE : LINK_UP;
    descriptor->error = refused ? ECONNREFUSED : 0;
    descriptor->window = WINDOW;
    descriptor->wants_room = false;
    happen(descriptor);
}

static void act_on_stream(struct descriptor *descriptor) {
    if (descriptor->link == LINK_UNDER_WAY) {
        if (friendly || in_hundred(40))
            finish_connect(descriptor);
        return;
    }
    if (descriptor->link != LINK_UP)
        return;
    if (occurs(faults.reset))
        peer_resets(descriptor);
    else if (occurs(1)) {
        descriptor->peer_ended = true;
        happen(descriptor);
    } else if (!friendly && in_hundred(50))
        peer_sends(descriptor);
    if (friendly || in_hundred(40))
        give_room(descriptor, friendly ? WINDOW : below(WINDOW) + 1, WINDOW);
}

static void act_on_datagrams(struct descriptor *descriptor) {
    if (!friendly && in_hundred(40))
        peer_sends_message(descriptor);
    if (descriptor->link == LINK_UP && occurs(faults.reset)) {
        descriptor->error = ECONNREFUSED;
        happen(descriptor);
    }
    if (friendly || in_hundred(40))
        give_room(descriptor, friendly ? MESSAGES : below(MESSAGES) + 1, MESSAGES);
}

static void let_peers_act(void) {
    if (in_hundred(20))
        exhausted = occurs(faults.exhausted);
    for (int i = 0; i < descriptor_count; i++) {
        struct descriptor *descriptor = &descriptors[i];
        if (descriptor->role == ROLE_STREAM)
            act_on_stream(descriptor);
        else if (descriptor->role == ROLE_DATAGRAM)
            act_on_datagrams(descriptor);
        else if (descriptor->role == ROLE_LISTENER && !friendly && in_hundred(15) && descriptor->backlog < BACKLOG) {
            descriptor->backlog++;
            happen(descriptor);
        }
    }
}

/* ---- sockets: os.h ------------------------------------------------------------------------------------------------------------ */

bool an_os_is_stream(int type) { return type == TYPE_STREAM; }

bool an_os_is_datagram(int type) { return type == TYPE_DATAGRAM; }

void *an_os_map(size_t size) { return malloc(size); }

void an_os_unmap(void *pages, size_t size) {
    (void)size;
    free(pages);
}

bool an_os_is_internet(int family) { return family == FAMILY_INTERNET; }

bool an_os_tells_length(int family, int type, int protocol) {
    (void)family;
    (void)type;
    (void)protocol;
    return false;
}

int an_os_open(int family, int type, int protocol, an_descriptor *descriptor) {
    (void)protocol;
    return create(type == TYPE_STREAM ? ROLE_STREAM : ROLE_DATAGRAM, family, descriptor);
}

int an_os_describe(an_descriptor number, int *family, int *type, int *protocol) {
    (void)number, (void)family, (void)type, (void)protocol;
    return ENOTSUP; /* nothing is adopted here */
}

int an_os_prepare(an_descriptor number) {
    (void)number;
    return ENOTSUP;
}

int an_os_is_listening(an_descriptor number, bool *listening) {
    *listening = enter(number)->role == ROLE_LISTENER;
    return 0;
}

void an_os_close(an_descriptor number) {
    struct descriptor *descriptor = enter(number);
    CHECK(!descriptor->watches[EDGE].there && !descriptor->watches[LEVEL].there);
    descriptor->role = ROLE_CLOSED;
    descriptor->owner = NULL;
    open_descriptors--;
    trace("  close(%d)", (int)number);
}

int an_os_shutdown(an_descriptor number, int how) {
    struct descriptor *descriptor = enter(number);
    if (descriptor->role != ROLE_STREAM || descriptor->link != LINK_UP)
        return ENOTCONN;
    if (how != 0)
        descriptor->ended = true;
    if (how != 1)
        descriptor->peer_ended = true;
    happen(descriptor);
    return 0;
}

bool an_os_reset_if_asked(an_descriptor number) {
    (void)number; /* no reactor here holds a file beyond its descriptor */
    return false;
}

void an_os_end_politely(an_descriptor number) {
    an_os_shutdown(number, 1);
    descriptors[number].taken = descriptors[number].arrived;
}

int an_os_bind(an_descriptor number, const an_address *address) {
    (void)number, (void)address;
    return EINVAL; /* not asked for here */
}

int an_os_listen(an_descriptor number, int backlog) {
    (void)backlog;
    enter(number)->role = ROLE_LISTENER;
    return 0;
}

int an_os_local_address(an_descriptor number, an_address *address) {
    (void)number, (void)address;
    return EINVAL;
}

int an_os_peer_address(an_descriptor number, an_address *address) {
    (void)number, (void)address;
    return EINVAL;
}

int an_os_set_option(an_descriptor number, int level, int name, const void *value, size_t length) {
    (void)number, (void)level, (void)name, (void)value, (void)length;
    return EINVAL;
}

bool an_os_is_linger(int level, int name) {
    (void)level, (void)name;
    return false;
}

int an_os_get_option(an_descriptor number, int level, int name, void *value, size_t *length) {
    (void)number, (void)level, (void)name, (void)value, (void)length;
    return EINVAL;
}

int an_os_accept(an_descriptor listener, an_descriptor *accepted, an_address *address) {
    struct descriptor *descriptor = enter(listener);
    if (descriptor->role != ROLE_LISTENER)
        return EINVAL;
    if (descriptor->backlog == 0)
        return AN_EAGAIN;
    if (occurs(faults.aborted_accept)) {
        descriptor->backlog--;
        return ECONNABORTED;
    }
    int error = create(ROLE_STREAM, descriptor->family, accepted);
    trace("  accept(%d): %d", (int)listener, error != 0 ? -error : (int)*accepted);
    if (error != 0)
        return error;
    descriptor->backlog--;
    descriptors[*accepted].link = LINK_UP;
    descriptors[*accepted].window = WINDOW;
    address->length = 8;
    address->storage[0] = (uint64_t)*accepted;
    return 0;
}

bool an_os_accept_is_transient(int error) { return error == ECONNABORTED; }

bool an_os_is_exhausted(int error) { return error == EMFILE || error == ENOMEM; }

int an_os_connect(an_descriptor number, const an_address *address, bool *waiting) {
    struct descriptor *descriptor = enter(number);
    *waiting = false;
    CHECK(address->length == 8);
    if (descriptor->role == ROLE_DATAGRAM) {
        descriptor->link = LINK_UP;
        return 0;
    }
    if (descriptor->role == ROLE_LISTENER || descriptor->link == LINK_UP)
        return EISCONN;
    if (descriptor->link == LINK_UNDER_WAY)
        return EALREADY;
    descriptor->error = 0;
    if (descriptor->family == FAMILY_LOCAL) {
        if (occurs(30))
            return AN_EAGAIN; /* a full backlog */
        finish_connect(descriptor);
        int error = descriptor->error;
        descriptor->error = 0;
        return error;
    }
    descriptor->link = LINK_UNDER_WAY;
    *waiting = true;
    return 0;
}

/* As SO_ERROR, then getpeername. */
int an_os_connect_result(an_descriptor number) {
    struct descriptor *descriptor = enter(number);
    int error = descriptor->error;
    descriptor->error = 0;
    if (error != 0)
        return error;
    return descriptor->link == LINK_UP ? 0 : AN_EAGAIN;
}

static int take_error(struct descriptor *descriptor) {
    int error = descriptor->error;
    descriptor->error = 0;
    return error;
}

/* What the core promises about when it receives. */
static void check_may_receive(const struct descriptor *descriptor) {
    const an_socket *owner = descriptor->owner;
    CHECK(owner != NULL && owner->receive.head != NULL);
    const struct operation *operation = owner->receive.head;
    CHECK((operation->flags & OPERATION_PAUSED) == 0);
    bool held_back = (operation->flags & OPERATION_MULTISHOT) != 0 && operation->record.kind == AN_RECV &&
                     owner->unsent > operation->to.pause_above;
    CHECK(!held_back);
}

int an_os_receive(an_descriptor number, void *data, size_t length, size_t *received) {
    struct descriptor *descriptor = enter(number);
    check_may_receive(descriptor);
    if (descriptor->error != 0)
        return take_error(descriptor);
    if (descriptor->link != LINK_UP)
        return descriptor->link == LINK_NONE ? ENOTCONN : AN_EAGAIN;
    uint64_t unread = descriptor->arrived - descriptor->taken;
    if (unread == 0 && !descriptor->peer_ended)
        return AN_EAGAIN;
    *received = unread < length ? (size_t)unread : length;
    fill(data, (uint64_t)number, descriptor->taken, *received);
    descriptor->taken += *received;
    total_received += *received;
    trace("  recv(%d, %zu): %zu", (int)number, length, *received);
    return 0;
}

int an_os_receive_message(an_descriptor number, bool tells_length, void *data, size_t length, size_t *received,
                          an_address *address, bool *truncated) {
    (void)tells_length;
    struct descriptor *descriptor = enter(number);
    check_may_receive(descriptor);
    if (descriptor->error != 0)
        return take_error(descriptor);
    if (descriptor->arrived == descriptor->taken)
        return AN_EAGAIN;
    size_t whole = descriptor->lengths[descriptor->taken % MESSAGES];
    *received = whole < length ? whole : length;
    *truncated = whole > length;
    fill(data, (uint64_t)number, descriptor->taken * MESSAGE_MOST, *received);
    if (address != NULL) {
        address->length = 8;
        address->storage[0] = descriptor->taken;
    }
    descriptor->taken++;
    total_received += *received;
    return 0;
}

/* Nothing at all needs no room. */
static int may_send(struct descriptor *descriptor, size_t length) {
    if (descriptor->error != 0)
        return take_error(descriptor);
    if (descriptor->link == LINK_UNDER_WAY)
        return refuse_room(descriptor);
    if (descriptor->ended || descriptor->link == LINK_NONE)
        return AN_EPIPE;
    bool has_room = length == 0 || (descriptor->window > 0 && !occurs(faults.refused_send));
    return has_room ? 0 : refuse_room(descriptor);
}

static size_t shorten(const struct descriptor *descriptor, size_t length) {
    size_t most = length < descriptor->window ? length : descriptor->window;
    return most > 1 && occurs(faults.short_send) ? 1 + below(most) : most;
}

static void hand_to_peer(struct descriptor *descriptor, const void *data, size_t length) {
    keep_log(descriptor, data, length);
    descriptor->window -= length;
    total_sent += length;
}

static size_t length_of(const an_buffer *buffers, size_t count) {
    size_t length = 0;
    for (size_t i = 0; i < count; i++)
        length += buffers[i].length;
    return length;
}

static int send_message(struct descriptor *descriptor, const an_buffer *buffers, size_t count, bool addressed,
                        size_t *sent) {
    uint32_t length = (uint32_t)length_of(buffers, count);
    if (descriptor->error != 0)
        return take_error(descriptor);
    if (!addressed && descriptor->link != LINK_UP)
        return EDESTADDRREQ;
    if (length > MESSAGE_MOST)
        return EMSGSIZE;
    if (descriptor->window == 0 || occurs(faults.refused_send))
        return refuse_room(descriptor);
    descriptor->window--;
    keep_log(descriptor, &length, sizeof length);
    for (size_t i = 0; i < count; i++)
        keep_log(descriptor, buffers[i].data, buffers[i].length);
    total_sent += length;
    *sent = length;
    return 0;
}

int an_os_send_message(an_descriptor number, const an_buffer *buffers, size_t count, const an_address *address,
                       size_t *sent) {
    struct descriptor *descriptor = enter(number);
    CHECK(count <= AN_GATHER);
    if (descriptor->role == ROLE_DATAGRAM)
        return send_message(descriptor, buffers, count, address != NULL, sent);
    int error = may_send(descriptor, length_of(buffers, count));
    if (error != 0)
        return error;
    *sent = 0;
    for (size_t i = 0; i < count; i++) {
        size_t share = shorten(descriptor, buffers[i].length);
        hand_to_peer(descriptor, buffers[i].data, share);
        *sent += share;
        if (share < buffers[i].length)
            break;
    }
    trace("  sendmsg(%d, %zu buffers): %zu", (int)number, count, *sent);
    return 0;
}

int an_os_send(an_descriptor number, const void *data, size_t length, size_t *sent) {
    an_buffer buffer = {data, length};
    return an_os_send_message(number, &buffer, 1, NULL, sent);
}

int an_os_send_file(an_descriptor number, an_descriptor file, uint64_t offset, uint64_t count, size_t *sent) {
    struct descriptor *descriptor = enter(number);
    char data[4096];
    CHECK(enter(file)->role == ROLE_FILE);
    *sent = 0;
    if (offset >= FILE_SIZE)
        return 0;
    size_t length = count < FILE_SIZE - offset ? (size_t)count : (size_t)(FILE_SIZE - offset);
    int error = may_send(descriptor, length);
    if (error != 0)
        return error;
    *sent = shorten(descriptor, length < sizeof data ? length : sizeof data);
    fill(data, DESCRIPTORS, offset, *sent);
    hand_to_peer(descriptor, data, *sent);
    trace("  sendfile(%d, %llu): %zu", (int)number, (unsigned long long)offset, *sent);
    return 0;
}

int an_os_duplicate_file(an_descriptor file, an_descriptor *duplicate) {
    (void)file;
    return create(ROLE_FILE, 0, duplicate);
}

void an_os_close_file(an_descriptor file) {
    enter(file)->role = ROLE_CLOSED;
    open_descriptors--;
}

/* ---- reactors: an edge-triggered and a level-triggered one ---------------------------------------------------------------------- */

struct an_reactor {
    int trigger; /* EDGE, LEVEL */
    bool woken;
    int64_t alarm_ns;
};

static struct an_reactor reactors[2];
static int64_t pass_ns; /* when the last wait ended */
static bool watched;    /* an_port_descriptor was called */

static int open_reactor(int trigger, struct an_reactor **reactor) {
    if (occurs(faults.no_memory))
        return ENOMEM;
    reactors[trigger] = (struct an_reactor){.trigger = trigger, .alarm_ns = AN_NEVER};
    *reactor = &reactors[trigger];
    return 0;
}

static int open_edge(struct an_reactor **reactor) { return open_reactor(EDGE, reactor); }

static int open_level(struct an_reactor **reactor) { return open_reactor(LEVEL, reactor); }

static void close_reactor(struct an_reactor *reactor) {
    for (int i = 0; i < descriptor_count; i++)
        CHECK(!descriptors[i].watches[reactor->trigger].there);
}

static int add(struct an_reactor *reactor, an_descriptor number, uint64_t tag) {
    struct watch *watch = &descriptors[number].watches[reactor->trigger];
    if (watch->there)
        return EEXIST;
    if (occurs(faults.no_memory))
        return ENOMEM;
    *watch = (struct watch){.there = true, .tag = tag, .edge = true};
    return 0;
}

static void remove_descriptor(struct an_reactor *reactor, an_descriptor number, uint64_t tag) {
    struct watch *watch = &descriptors[number].watches[reactor->trigger];
    CHECK(!watch->there || watch->tag == tag); /* not there: adding it to the mirror failed */
    watch->there = false;
}

static void expect(struct an_reactor *reactor, uint64_t tag, uint32_t direction) {
    for (int i = 0; i < descriptor_count; i++) {
        struct watch *watch = &descriptors[i].watches[reactor->trigger];
        if (watch->there && watch->tag == tag) {
            watch->expected |= direction;
            return;
        }
    }
    CHECK(!"a socket that is expected is there");
}

/* What a wait reports of a descriptor. */
static uint32_t report_of(const struct an_reactor *reactor, struct descriptor *descriptor) {
    struct watch *watch = &descriptor->watches[reactor->trigger];
    uint32_t events = levels(descriptor);
    if (reactor->trigger == LEVEL) {
        events &= watch->expected;
        watch->expected &= ~events;
        return events;
    }
    bool spurious = !watched && occurs(faults.spurious_report); /* it lets things happen that nothing announced */
    if (!watch->edge && !spurious)
        return 0;
    watch->edge = false;
    return spurious ? events | REACTOR_RECEIVE | REACTOR_TRANSMIT : events;
}

/* What the mirror of a level-triggered reactor saw, that one sees as well. */
static bool is_late(const struct an_reactor *reactor) {
    return !(watched && reactor->trigger == LEVEL) && occurs(faults.late_report);
}

static size_t collect(struct an_reactor *reactor, struct an_reactor_report *reports) {
    size_t count = 0;
    for (int i = 0; i < descriptor_count && count < AN_REPORTS; i++) {
        struct watch *watch = &descriptors[i].watches[reactor->trigger];
        if (!watch->there || is_late(reactor))
            continue;
        uint32_t events = report_of(reactor, &descriptors[i]);
        if (events == 0)
            continue;
        reports[count++] = (struct an_reactor_report){watch->tag, events};
        trace("  report %d: %s%s%s", i, events & REACTOR_RECEIVE ? "receive " : "",
              events & REACTOR_TRANSMIT ? "transmit " : "", events & REACTOR_HIDDEN ? "hidden" : "");
    }
    return count;
}

static int wait_for_reports(struct an_reactor *reactor, int64_t until_ns, struct an_reactor_report *reports,
                            size_t *count, bool *woken) {
    CHECK(calls++ < 5000000);
    CHECK(held_count == 0);
    CHECK(until_ns != AN_NEVER); /* the program never waits for ever */
    *count = 0;
    *woken = false;
    if (occurs(faults.failed_wait)) {
        pass_ns = now_ns;
        return in_hundred(50) ? AN_EINTR : ENOMEM;
    }
    *woken = reactor->woken;
    reactor->woken = false;
    *count = collect(reactor, reports);
    while (*count == 0 && !*woken && now_ns < until_ns) {
        let_peers_act();
        now_ns += (int64_t)below(3 * MILLISECOND) + 1;
        *count = collect(reactor, reports);
    }
    now_ns += (int64_t)below(1000);
    pass_ns = now_ns;
    return 0;
}

static void wake(struct an_reactor *reactor) { reactor->woken = true; }

static int get_descriptor(struct an_reactor *reactor, an_descriptor *descriptor) {
    *descriptor = reactor->trigger;
    return 0;
}

static void set_alarm(struct an_reactor *reactor, int64_t due_ns) { reactor->alarm_ns = due_ns; }

/* Whether the descriptor of the watched reactor is readable. */
static bool is_readable(const struct an_reactor *reactor) {
    if (reactor->woken || reactor->alarm_ns <= now_ns)
        return true;
    for (int i = 0; i < descriptor_count; i++) {
        const struct watch *watch = &descriptors[i].watches[reactor->trigger];
        if (watch->there && watch->edge && levels(&descriptors[i]) != 0)
            return true;
    }
    return false;
}

static const struct an_reactor_interface edge_reactor = {
    .name = "edge",
    .open = open_edge,
    .close = close_reactor,
    .add = add,
    .remove = remove_descriptor,
    .expect = NULL,
    .wait = wait_for_reports,
    .wake = wake,
    .descriptor = get_descriptor,
    .alarm = set_alarm,
};

static const struct an_reactor_interface level_reactor = {
    .name = "level",
    .open = open_level,
    .close = close_reactor,
    .add = add,
    .remove = remove_descriptor,
    .expect = expect,
    .wait = wait_for_reports,
    .wake = wake,
    .descriptor = NULL,
    .alarm = NULL,
};

int an_backend_open(an_port *port, const char *name) {
    static const struct an_proactor_detail details[] = {
        [EDGE] = {.reactor = &edge_reactor},
        [LEVEL] = {.reactor = &level_reactor, .mirror = &edge_reactor},
    };
    bool level = strcmp(name, level_reactor.name) == 0;
    port->name = name;
    port->interface = &an_proactor;
    return an_proactor.open(&port->backend, port, &details[level ? LEVEL : EDGE]);
}

/* ---- the program: what it started and what it was told ---------------------------------------------------------------------------- */

enum { SOCKETS = 40, OPERATIONS = 300, SENDS = 600, HELD = 16, STEPS_MOST = 400, BATCH = 32 };

/* One send, also a quiet one, for the comparison with what the peer got. */
struct sent {
    int socket;
    bool known;  /* how much of it went out is known, as it was told */
    bool silent; /* quiet, after the failure of its stream was told: need not be told again */
    bool quiet;
    bool refused; /* the call failed */
    uint64_t source;
    uint64_t offset;
    uint64_t length;
    uint64_t transferred;
};

struct user_socket {
    an_socket *handle; /* NULL: given back */
    an_descriptor descriptor;
    int type;
    bool listener;
    bool associated;
    bool closed; /* plainly */
    bool flushing;
    uint64_t received; /* bytes or messages, told in order */
    uint64_t lost;     /* bytes, by failures of quiet sends */
    int failures;      /* of quiet sends */
};

struct user_operation {
    an_operation memory;
    int kind;
    int socket; /* -1: post, timer */
    unsigned number;
    bool multishot;
    bool paused;
    uint32_t more; /* completions with more that were dequeued */
    int64_t started_ns;
    int64_t timeout_ns; /* timers: the delay */
    int64_t active_ns;  /* it was in flight; a multishot: something came, or it was resumed */
    void *buffer;
    size_t length;
    int sent; /* index, or -1 */
    an_address address;
    an_buffer pieces[3];
};

/* Every other operation is marked; calls that look for one take it with the mark or without. */
static bool is_marked(const struct user_operation *operation) { return operation->number % 2 == 1; }

static an_operation *memory_of(struct user_operation *operation) {
    return is_marked(operation) ? an_operation_marked(&operation->memory) : &operation->memory;
}

struct held_completion {
    an_completion completion;
    uint64_t source;
    uint64_t offset;
};

static struct user_socket sockets[SOCKETS];
static int socket_count;
static struct user_operation *operations[OPERATIONS];
static size_t operation_count;
static struct sent sends[SENDS];
static int send_count;
static struct held_completion held_completions[HELD];
static size_t held_completion_count;
static unsigned operation_number;
static unsigned posts_started, posts_told;
static uint64_t quiet_taken;

static bool receives(int kind) { return kind == AN_ACCEPT || kind == AN_RECV || kind == AN_RECVFROM; }

static struct user_operation *create_operation(int kind, int socket, int64_t timeout_ns, size_t room) {
    struct user_operation *operation = malloc(sizeof *operation);
    memset(operation, 0xa5, sizeof *operation); /* needs no initialisation */
    operation->kind = kind;
    operation->socket = socket;
    operation->number = operation_number++;
    operation->multishot = operation->paused = false;
    operation->more = 0;
    operation->started_ns = operation->active_ns = now_ns;
    operation->timeout_ns = timeout_ns;
    operation->buffer = room > 0 ? malloc(room) : NULL;
    operation->length = room;
    operation->sent = -1;
    operation->address = (an_address){.length = 8};
    return operation;
}

static void free_operation(struct user_operation *operation) {
    if (operation->buffer != NULL)
        memset(operation->buffer, 0xa5, operation->length);
    free(operation->buffer);
    memset(operation, 0xa5, sizeof *operation);
    free(operation);
}

/* What a start may answer. */
static void check_start(const struct user_socket *socket, int error, unsigned long refused_before) {
    if (socket->closed || socket->flushing)
        CHECK(error == AN_EBADF);
    else if (!socket->associated)
        CHECK(error == AN_EINVAL);
    else
        CHECK(error == 0 || (error == AN_ENOMEM && refused_allocations > refused_before));
}

/* It is in flight, or the call failed. */
static void keep(struct user_operation *operation, int error) {
    static const char *const names[] = {"",       "accept",   "connect",    "recv", "recvfrom", "send",
                                        "sendto", "sendfile", "disconnect", "post", "timer"};
    trace("%s #%u on %d, length %zu, timeout %lld ns%s: %d", names[operation->kind], operation->number,
          operation->socket >= 0 ? (int)sockets[operation->socket].descriptor : -1, operation->length,
          (long long)operation->timeout_ns, operation->multishot ? ", multishot" : "", error);
    operation->active_ns = now_ns;
    if (error == 0)
        operations[operation_count++] = operation;
    else
        free_operation(operation);
}

static int64_t any_timeout(void) {
    static const int64_t most_ns[] = {1, MILLISECOND, 30 * MILLISECOND};
    return in_hundred(75) ? AN_FOREVER : (int64_t)below((size_t)most_ns[below(3)]);
}

/* ---- the program starts things ------------------------------------------------------------------------------------------------------ */

static void remember(an_socket *handle, int type, bool listener) {
    int index = socket_count++;
    sockets[index] = (struct user_socket){
        .handle = handle, .descriptor = an_socket_descriptor(handle), .type = type, .listener = listener};
    struct user_socket *socket = &sockets[index];
    if (in_hundred(3))
        return; /* forgotten */
    int error = CORE(an_port_associate(the_port, handle, socket));
    trace("associate %d: %d", (int)socket->descriptor, error);
    CHECK(error == 0 || error == AN_ENOMEM);
    socket->associated = error == 0;
    if (error == 0)
        descriptors[socket->descriptor].owner = handle;
}

static void open_any_socket(void) {
    an_socket *handle;
    bool datagram = in_hundred(25), listener = !datagram && in_hundred(25);
    int type = datagram ? TYPE_DATAGRAM : TYPE_STREAM;
    if (socket_count == SOCKETS)
        return;
    int error = CORE(an_socket_open(&handle, in_hundred(70) ? FAMILY_INTERNET : FAMILY_LOCAL, type, 0));
    if (error != 0) {
        CHECK(error == EMFILE || error == AN_ENOMEM);
        return;
    }
    if (listener)
        CHECK_OK(CORE(an_socket_listen(handle, BACKLOG)));
    else if (!datagram && in_hundred(65)) { /* most streams begin connected */
        descriptors[an_socket_descriptor(handle)].link = LINK_UP;
        descriptors[an_socket_descriptor(handle)].window = WINDOW;
    }
    remember(handle, type, listener);
}

static void start_receive(int index) {
    struct user_socket *socket = &sockets[index];
    bool multishot = in_hundred(40), lent = multishot || in_hundred(50);
    bool addressed = socket->type == TYPE_DATAGRAM && in_hundred(60);
    size_t length = 1 + below(in_hundred(50) ? 300 : 20000);
    uint32_t flags = multishot ? AN_MULTISHOT : 0;
    unsigned long refused = refused_allocations;
    struct user_operation *operation =
        create_operation(addressed ? AN_RECVFROM : AN_RECV, index, any_timeout(), lent ? 0 : length);
    operation->multishot = multishot;
    operation->length = length;
    int error = addressed ? CORE(an_socket_recvfrom(socket->handle, memory_of(operation), operation->buffer, length,
                                                    flags, operation->timeout_ns))
                          : CORE(an_socket_recv(socket->handle, memory_of(operation), operation->buffer, length, flags,
                                                in_hundred(50) ? UINT64_MAX : below(5000), operation->timeout_ns));
    check_start(socket, error, refused);
    keep(operation, error);
}

static void start_accept(int index) {
    struct user_socket *socket = &sockets[index];
    unsigned long refused = refused_allocations;
    struct user_operation *operation = create_operation(AN_ACCEPT, index, any_timeout(), 0);
    operation->multishot = in_hundred(60);
    int error = CORE(an_socket_accept(socket->handle, memory_of(operation), operation->multishot ? AN_MULTISHOT : 0,
                                      operation->timeout_ns));
    check_start(socket, error, refused);
    keep(operation, error);
}

static struct sent *record_send(int socket, uint64_t length) {
    struct sent *sent = &sends[send_count++];
    *sent = (struct sent){.socket = socket, .source = (uint64_t)(DESCRIPTORS + send_count), .length = length};
    return sent;
}

/* One buffer in three pieces; returns how many are used. */
static size_t cut(struct user_operation *operation) {
    size_t first = below(operation->length + 1), second = below(operation->length - first + 1);
    const char *data = operation->buffer;
    operation->pieces[0] = (an_buffer){data, first};
    operation->pieces[1] = (an_buffer){data + first, second};
    operation->pieces[2] = (an_buffer){data + first + second, operation->length - first - second};
    return 3;
}

static int call_send(an_socket *handle, struct user_operation *operation, bool quiet) {
    an_operation *memory = quiet ? NULL : memory_of(operation);
    if (operation->kind == AN_SENDTO)
        return CORE(an_socket_sendto(handle, memory, operation->buffer, operation->length, &operation->address,
                                     operation->timeout_ns));
    if (in_hundred(30))
        return CORE(an_socket_sendv(handle, memory, operation->pieces, cut(operation), operation->timeout_ns));
    return CORE(an_socket_send(handle, memory, operation->buffer, operation->length, operation->timeout_ns));
}

static void start_send(int index) {
    struct user_socket *socket = &sockets[index];
    bool datagram = socket->type == TYPE_DATAGRAM, quiet = in_hundred(50);
    size_t length = 8 + below(datagram ? MESSAGE_MOST + 100 : in_hundred(70) ? 500 : 20000);
    if (in_hundred(5))
        length = 0;
    if (send_count == SENDS)
        return;
    unsigned long refused = refused_allocations;
    struct user_operation *operation =
        create_operation(datagram && in_hundred(60) ? AN_SENDTO : AN_SEND, index, any_timeout(), length);
    struct sent *sent = record_send(index, length);
    fill(operation->buffer, sent->source, 0, length);
    operation->sent = send_count - 1;
    sent->quiet = quiet;
    sent->silent = quiet && socket->handle->broken && socket->handle->quiet_failed &&
                   socket->handle->transmit.head == NULL; /* else a connect may come to another stream */
    int error = call_send(socket->handle, operation, quiet);
    check_start(socket, error, refused);
    sent->refused = error != 0;
    sent->known = error != 0 && !quiet; /* a quiet one may have begun before memory ran out */
    if (quiet)
        trace("quiet %s on %d, length %zu: %d", datagram ? "message" : "send", (int)socket->descriptor, length, error);
    quiet_taken += quiet && error == 0;
    if (quiet)
        free_operation(operation);
    else
        keep(operation, error);
}

static void start_sendfile(int index) {
    struct user_socket *socket = &sockets[index];
    unsigned long refused = refused_allocations;
    if (send_count == SENDS)
        return;
    struct user_operation *operation = create_operation(AN_SENDFILE, index, any_timeout(), 0);
    uint64_t offset = below(FILE_SIZE + 1000), count = below(10000);
    uint64_t there = offset < FILE_SIZE ? FILE_SIZE - offset : 0;
    struct sent *sent = record_send(index, count < there ? count : there);
    sent->source = DESCRIPTORS;
    sent->offset = offset;
    operation->sent = send_count - 1;
    int error = CORE(an_socket_sendfile(socket->handle, memory_of(operation), 0, offset, count, operation->timeout_ns));
    if (error == EMFILE && socket->associated && !socket->closed && !socket->flushing)
        trace("out of descriptors");
    else
        check_start(socket, error, refused);
    sent->known = sent->refused = error != 0;
    keep(operation, error);
}

static void start_connect_or_disconnect(int index) {
    struct user_socket *socket = &sockets[index];
    unsigned long refused = refused_allocations;
    bool connects = socket->type == TYPE_DATAGRAM || in_hundred(70);
    struct user_operation *operation = create_operation(connects ? AN_CONNECT : AN_DISCONNECT, index, any_timeout(), 0);
    int error =
        connects
            ? CORE(an_socket_connect(socket->handle, memory_of(operation), &operation->address, operation->timeout_ns))
            : CORE(an_socket_disconnect(socket->handle, memory_of(operation), operation->timeout_ns));
    check_start(socket, error, refused);
    keep(operation, error);
}

static void start_post_or_timer(void) {
    bool timer = in_hundred(60);
    unsigned long refused = refused_allocations;
    struct user_operation *operation =
        create_operation(timer ? AN_TIMER : AN_POST, -1, (int64_t)below(50 * MILLISECOND), 0);
    int error = timer ? CORE(an_port_timer(the_port, memory_of(operation), operation->timeout_ns, operation))
                      : CORE(an_port_post(the_port, memory_of(operation), (void *)(uintptr_t)posts_started));
    CHECK(error == 0 || (timer && error == AN_ENOMEM && refused_allocations > refused));
    posts_started += !timer;
    keep(operation, error);
}

static void start_anything(int index) {
    struct user_socket *socket = &sockets[index];
    size_t choice = below(100);
    if (operation_count + 1 >= OPERATIONS)
        return;
    bool unconnected = socket->type == TYPE_STREAM && descriptors[socket->descriptor].link == LINK_NONE;
    if (socket->listener)
        start_accept(index);
    else if (unconnected && in_hundred(40))
        start_connect_or_disconnect(index);
    else if (choice < 40)
        start_receive(index);
    else if (choice < 86)
        start_send(index);
    else if (choice < 92 && socket->type == TYPE_STREAM)
        start_sendfile(index);
    else
        start_connect_or_disconnect(index);
}

/* ---- the program stops things --------------------------------------------------------------------------------------------------------- */

static size_t in_flight_of(int index) {
    size_t count = 0;
    for (size_t i = 0; i < operation_count; i++)
        count += operations[i]->socket == index;
    return count;
}

static void cancel_one(void) {
    int32_t cancelled = 0;
    if (operation_count == 0)
        return;
    struct user_operation *operation = operations[below(operation_count)];
    if (operation->socket < 0) {
        CHECK_OK(CORE(an_port_cancel(the_port, &operation->memory, &cancelled)));
    } else if (sockets[operation->socket].handle != NULL) {
        CHECK_OK(CORE(an_operation_cancel(sockets[operation->socket].handle, &operation->memory, &cancelled)));
    }
    trace("cancel #%u: %d", operation->number, cancelled);
}

static void cancel_all(int index) {
    size_t count = 0;
    if (!sockets[index].associated)
        return;
    CHECK_OK(CORE(an_socket_cancel(sockets[index].handle, &count)));
    CHECK(count <= in_flight_of(index));
    trace("cancel all of %d: %zu", (int)sockets[index].descriptor, count);
}

static void pause_or_resume(void) {
    if (operation_count == 0)
        return;
    struct user_operation *operation = operations[below(operation_count)];
    if (operation->socket < 0 || sockets[operation->socket].handle == NULL || !operation->multishot)
        return;
    an_socket *handle = sockets[operation->socket].handle;
    bool pause = !operation->paused;
    int error = pause ? CORE(an_operation_pause(handle, memory_of(operation)))
                      : CORE(an_operation_resume(handle, memory_of(operation)));
    CHECK(error == 0 || error == AN_EINVAL); /* its last completion may be queued */
    trace("%s #%u: %d", pause ? "pause" : "resume", operation->number, error);
    if (error != 0)
        return;
    operation->paused = pause;
    operation->active_ns = now_ns;
}

static void close_any(int index) {
    struct user_socket *socket = &sockets[index];
    bool flush = in_hundred(50), give_back = in_hundred(50);
    trace("%s %d%s", give_back ? "free" : "close", (int)socket->descriptor, flush ? " after a flush" : "");
    if (flush && !socket->closed)
        socket->flushing = true;
    else
        socket->closed = true;
    if (give_back) {
        CORE_DO(an_socket_free(socket->handle, flush ? AN_FLUSH : 0));
        socket->handle = NULL;
    } else {
        CHECK_OK(CORE(an_socket_close(socket->handle, flush ? AN_FLUSH : 0)));
    }
}

/* ---- completions ------------------------------------------------------------------------------------------------------------------------ */

static size_t find_operation(const an_operation *memory) {
    size_t index = 0;
    while (index < operation_count && &operations[index]->memory != memory)
        index++;
    CHECK(index < operation_count); /* it is in flight: exactly one last completion */
    return index;
}

static void claim(struct user_socket *listener, const an_completion *completion) {
    an_socket *accepted = completion->accepted;
    CHECK(listener->listener && completion->error == 0);
    CHECK(completion->address != NULL && completion->address->length == 8);
    CHECK(completion->address->storage[0] == (uint64_t)an_socket_descriptor(accepted));
    if (socket_count == SOCKETS || in_hundred(10))
        CORE_DO(an_socket_free(accepted, 0));
    else
        remember(accepted, TYPE_STREAM, false);
}

/* Bytes of a stream come in order, with none missing; a message as it was sent. */
static void check_received(struct user_socket *socket, const struct user_operation *operation,
                           const an_completion *completion, struct held_completion *lent) {
    const void *data = completion->data != NULL ? completion->data : operation->buffer;
    uint64_t source = (uint64_t)socket->descriptor;
    CHECK(completion->transferred <= operation->length);
    if (completion->error != 0)
        return;
    uint64_t offset = socket->received;
    if (socket->type == TYPE_DATAGRAM) {
        offset *= MESSAGE_MOST;
        CHECK(operation->kind != AN_RECVFROM || completion->address->storage[0] == socket->received);
        CHECK((completion->flags & AN_TRUNCATED) == 0 || completion->transferred == operation->length);
        socket->received++;
    } else {
        socket->received += completion->transferred;
        CHECK(completion->transferred > 0 || (completion->flags & AN_MORE) == 0);
    }
    CHECK(completion->transferred == 0 || is_content(data, source, offset, completion->transferred));
    *lent = (struct held_completion){.source = source, .offset = offset};
}

/* Of one direction, those that were started before are done; but cancelled and timed-out ones come when they come. */
static void check_order(const struct user_operation *operation, int error) {
    if (operation->socket < 0 || error == AN_ECANCELED || error == AN_ETIMEDOUT)
        return;
    for (size_t i = 0; i < operation_count; i++) {
        const struct user_operation *other = operations[i];
        bool before = other->socket == operation->socket && receives(other->kind) == receives(operation->kind) &&
                      other->number < operation->number;
        if (before)
            trace("before it: #%u, kind %d", other->number, other->kind);
        CHECK(!before);
    }
}

static void check_time(const struct user_operation *operation, int error) {
    if (error == AN_ETIMEDOUT)
        CHECK(operation->timeout_ns >= 0 && now_ns - operation->started_ns >= operation->timeout_ns);
    if (operation->kind == AN_TIMER && error == 0)
        CHECK(now_ns - operation->started_ns >= operation->timeout_ns);
}

static void take_last(size_t index, const an_completion *completion) {
    struct user_operation *operation = operations[index];
    CHECK(completion->error != AN_EAGAIN); /* that is what the library is there for */
    check_order(operation, completion->error);
    check_time(operation, completion->error);
    if (operation->sent >= 0) {
        struct sent *sent = &sends[operation->sent];
        CHECK(completion->transferred <= sent->length);
        CHECK(completion->transferred == sent->length || completion->error != 0);
        sent->known = true;
        sent->transferred = completion->transferred;
    }
    operations[index] = operations[--operation_count];
    free_operation(operation);
}

static void take_quiet_failure(const an_completion *completion) {
    struct user_socket *socket = completion->state;
    CHECK(completion->error != 0 && completion->error != AN_EAGAIN && completion->flags == 0);
    CHECK(completion->kind == AN_SEND || completion->kind == AN_SENDTO);
    socket->lost += completion->transferred;
    socket->failures++;
}

static void release(size_t index) {
    struct held_completion *held_one = &held_completions[index];
    const an_completion *completion = &held_one->completion;
    if (completion->data != NULL) /* lent until now, whatever was closed meanwhile */
        CHECK(is_content(completion->data, held_one->source, held_one->offset, completion->transferred));
    CORE_DO(an_completion_release(&held_one->completion, 1));
    held_completions[index] = held_completions[--held_completion_count];
}

/* Gives it back now or later. */
static void hold(const an_completion *completion, struct held_completion lent) {
    if (held_completion_count == HELD)
        release(below(HELD));
    lent.completion = *completion;
    held_completions[held_completion_count++] = lent;
    if (in_hundred(70))
        release(held_completion_count - 1);
}

/* What waits to be dequeued moves the deadline of each multishot of its socket. */
static void note_activity(int socket) {
    for (size_t i = 0; i < operation_count; i++) {
        if (operations[i]->socket == socket && operations[i]->multishot)
            operations[i]->active_ns = now_ns;
    }
}

static void take_completion(const an_completion *completion) {
    struct held_completion lent = {0};
    trace("completion: kind %d error %d transferred %llu flags %d %s", completion->kind, completion->error,
          (unsigned long long)completion->transferred, completion->flags, completion->operation == NULL ? "quiet" : "");
    if (completion->operation == NULL) {
        take_quiet_failure(completion);
        hold(completion, lent);
        return;
    }
    size_t index = find_operation(completion->operation);
    struct user_operation *operation = operations[index];
    trace("  of #%u", operation->number);
    note_activity(operation->socket);
    CHECK(completion->kind == operation->kind);
    CHECK(((completion->flags & AN_MARKED) != 0) == is_marked(operation));
    CHECK(completion->state == (operation->socket >= 0 ? (void *)&sockets[operation->socket] : completion->state));
    if (operation->kind == AN_POST)
        CHECK((uintptr_t)completion->state == posts_told++);
    if (completion->accepted != NULL)
        claim(&sockets[operation->socket], completion);
    else if (operation->kind == AN_RECV || operation->kind == AN_RECVFROM)
        check_received(&sockets[operation->socket], operation, completion, &lent);
    if ((completion->flags & AN_MORE) != 0) {
        CHECK(operation->multishot);
        operation->more++;
        check_order(operation, 0);
    } else {
        CHECK(operation->more == an_operation_more_count(&operation->memory));
        take_last(index, completion);
    }
    hold(completion, lent);
}

/* Nothing is to be dequeued: no deadline may have passed before the last pass. */
static void check_nothing_is_overdue(void) {
    for (size_t i = 0; i < operation_count; i++) {
        const struct user_operation *operation = operations[i];
        bool silent_by_itself = operation->timeout_ns < 0 || operation->paused || operation->kind == AN_POST;
        bool overdue = !silent_by_itself && operation->active_ns + operation->timeout_ns < pass_ns;
        if (overdue)
            trace("overdue: #%u since %lld ns", operation->number,
                  (long long)(pass_ns - operation->active_ns - operation->timeout_ns));
        CHECK(!overdue);
    }
}

static size_t dequeue(size_t max, int64_t timeout_ns) {
    static an_completion completions[BATCH];
    size_t count = 0;
    bool readable = is_readable(&reactors[EDGE]);
    int64_t alarm_ns = reactors[EDGE].alarm_ns;
    int error = CORE(an_port_dequeue(the_port, completions, max, timeout_ns, &count));
    trace("dequeue up to %zu within %lld ns: %zu, error %d", max, (long long)timeout_ns, count, error);
    CHECK(error == 0 || (error == ENOMEM && faults.failed_wait > 0 && count == 0));
    CHECK(count <= max);
    bool announced = !watched || readable || alarm_ns <= now_ns; /* the alarm may have come during the call */
    CHECK(announced || timeout_ns > 0 || count == 0);
    for (size_t i = 0; i < count; i++)
        take_completion(&completions[i]);
    if (count == 0 && error == 0)
        check_nothing_is_overdue();
    return count;
}

static void watch_port(void) {
    an_descriptor descriptor;
    int error = CORE(an_port_descriptor(the_port, &descriptor));
    CHECK(error == 0 || error == AN_ENOMEM);
    watched = watched || error == 0;
    trace("watch: %d", error);
}

/* It needs no room: as the first it is done at once, unless a connect just before it waits for a backlog. */
static void check_no_disconnect_waits(void) {
    for (int i = 0; i < socket_count; i++) {
        const struct an_direction *direction = sockets[i].handle != NULL ? &sockets[i].handle->transmit : NULL;
        if (direction != NULL && direction->head != NULL && direction->retry_ns == AN_NEVER)
            CHECK(direction->head->record.kind != AN_DISCONNECT);
    }
}

static void take_step(void) {
    size_t choice = below(100);
    int index = socket_count > 0 ? (int)below((size_t)socket_count) : -1;
    bool usable = index >= 0 && sockets[index].handle != NULL;
    if (choice < 8 || index < 0)
        open_any_socket();
    else if (choice < 50 && usable)
        start_anything(index);
    else if (choice < 54 && operation_count + 1 < OPERATIONS)
        start_post_or_timer();
    else if (choice < 57)
        cancel_one();
    else if (choice < 58 && usable)
        cancel_all(index);
    else if (choice < 63)
        pause_or_resume();
    else if (choice < 66 && usable)
        close_any(index);
    else if (choice < 67 && in_hundred(10))
        watch_port();
    else if (choice < 75)
        let_peers_act();
    else
        dequeue(1 + below(BATCH), in_hundred(60) ? 0 : (int64_t)below(20 * MILLISECOND));
    CHECK(an_port_in_flight(the_port) == operation_count);
    CHECK(held_count == 0);
    check_no_disconnect_waits();
}

/* ---- afterwards ---------------------------------------------------------------------------------------------------------------------------- */

/* The system is kind now: what can be done gets done, or something was missed. */
static void settle(void) {
    enum { ROUNDS = 3000, QUIET_ROUNDS = 4 };
    int quiet = 0;
    friendly = true;
    for (int i = 0; i < ROUNDS && quiet < QUIET_ROUNDS; i++) {
        let_peers_act();
        quiet = dequeue(BATCH, 70 * MILLISECOND) == 0 ? quiet + 1 : 0;
    }
    CHECK(quiet == QUIET_ROUNDS);
}

static bool is_paused(const an_socket *socket) {
    return socket->receive.head != NULL && (socket->receive.head->flags & OPERATION_PAUSED) != 0;
}

/* What still waits has nothing to wait for but the peer. */
static void check_nothing_was_missed(void) {
    for (size_t i = 0; i < operation_count; i++) {
        const struct user_operation *operation = operations[i];
        CHECK(operation->socket >= 0);
        const struct descriptor *descriptor = &descriptors[sockets[operation->socket].descriptor];
        CHECK(receives(operation->kind));
        CHECK(descriptor->owner != NULL);
        if (!is_paused(descriptor->owner))
            CHECK((levels(descriptor) & REACTOR_RECEIVE) == 0);
    }
    for (int i = 0; i < socket_count; i++) {
        const struct user_socket *socket = &sockets[i];
        if (socket->handle != NULL)
            CHECK(an_socket_unsent(socket->handle) == 0);
        if (socket->flushing)
            CHECK(descriptors[socket->descriptor].role == ROLE_CLOSED); /* all was handed over */
    }
}

static void end_streams(void) {
    for (int i = 0; i < descriptor_count; i++) {
        if (descriptors[i].role != ROLE_STREAM || descriptors[i].link != LINK_UP)
            continue;
        descriptors[i].peer_ended = true;
        happen(&descriptors[i]);
    }
}

static void cancel_what_is_left(void) {
    for (int i = 0; i < socket_count; i++) {
        if (sockets[i].handle != NULL)
            cancel_all(i);
    }
    settle();
    CHECK(operation_count == 0);
}

static size_t matching(const struct sent *sent, const char *log, size_t available) {
    size_t most = sent->length < available ? (size_t)sent->length : available, count = 0;
    while (count < most && (uint8_t)log[count] == content(sent->source, sent->offset + count))
        count++;
    return count;
}

/* What quiet sends of a socket lost. */
struct lost {
    uint64_t must_be_told;
    uint64_t may_be_told;
};

static void count_lost(struct lost *lost, const struct sent *sent, uint64_t bytes) {
    if (!sent->quiet || sent->refused)
        return;
    lost->may_be_told += bytes;
    lost->must_be_told += sent->silent ? 0 : bytes;
}

/* The peer of a stream got the sends in their order, each whole, or the last one cut off. */
static struct lost check_stream(int index, const struct descriptor *descriptor) {
    size_t place = 0;
    struct lost lost = {0};
    bool cut_off = false;
    for (int i = 0; i < send_count; i++) {
        const struct sent *sent = &sends[i];
        if (sent->socket != index)
            continue;
        size_t count = matching(sent, descriptor->log + place, descriptor->log_length - place);
        if (count < sent->length && place + count < descriptor->log_length)
            count = 0; /* alike by chance: behind one that was cut off nothing can come */
        if (sent->known)
            CHECK(count == sent->transferred);
        CHECK(count == 0 || !cut_off);
        cut_off = cut_off || (count > 0 && count < sent->length);
        place += count;
        trace("socket %d: %zu of %llu%s%s%s", (int)sockets[index].descriptor, count, (unsigned long long)sent->length,
              sent->quiet ? ", quiet" : "", sent->silent ? ", silent" : "", sent->refused ? ", refused" : "");
        count_lost(&lost, sent, sent->length - count);
    }
    CHECK(place == descriptor->log_length);
    return lost;
}

static struct lost check_messages(int index, const struct descriptor *descriptor) {
    size_t place = 0;
    struct lost lost = {0};
    for (int i = 0; i < send_count; i++) {
        const struct sent *sent = &sends[i];
        uint32_t length = UINT32_MAX;
        if (sent->socket != index)
            continue;
        if (place < descriptor->log_length)
            memcpy(&length, descriptor->log + place, sizeof length);
        bool there =
            length == sent->length && matching(sent, descriptor->log + place + sizeof length, length) == length;
        if (sent->known && sent->length > 0)
            CHECK(there == (sent->transferred == sent->length));
        if (sent->known && sent->length == 0)
            there = there && !sent->refused; /* whether an empty one went out, its neighbours tell */
        if (there)
            place += sizeof length + length;
        else
            count_lost(&lost, sent, sent->length);
    }
    CHECK(place == descriptor->log_length);
    return lost;
}

static void check_peers(bool settled) {
    for (int i = 0; i < socket_count; i++) {
        const struct user_socket *socket = &sockets[i];
        const struct descriptor *descriptor = &descriptors[socket->descriptor];
        struct lost lost = socket->type == TYPE_DATAGRAM ? check_messages(i, descriptor) : check_stream(i, descriptor);
        trace("socket %d: lost %llu to %llu, told %llu", (int)socket->descriptor, (unsigned long long)lost.must_be_told,
              (unsigned long long)lost.may_be_told, (unsigned long long)socket->lost);
        if (settled && !socket->closed)
            CHECK(socket->lost >= lost.must_be_told);
        CHECK(socket->lost <= lost.may_be_told);
    }
}

static void check_statistics(void) {
    an_statistics statistics;
    CHECK_OK(an_port_statistics(the_port, &statistics));
    CHECK(statistics.bytes_sent == total_sent);
    CHECK(statistics.bytes_received == total_received);
    CHECK(statistics.quiet_sends == quiet_taken);
    CHECK(statistics.gauge_queued == 0 && statistics.gauge_inflight == 0);
}

/* The operations are the program's again. */
static void forget_operations(void) {
    while (operation_count > 0)
        free_operation(operations[--operation_count]);
}

static void tear_down(void) {
    bool port_first = in_hundred(50);
    if (port_first)
        CORE_DO(an_port_free(the_port));
    if (port_first)
        forget_operations();
    for (int i = 0; i < socket_count; i++) {
        if (sockets[i].handle != NULL)
            CORE_DO(an_socket_free(sockets[i].handle, in_hundred(50) ? AN_FLUSH : 0));
    }
    if (!port_first)
        CORE_DO(an_port_free(the_port));
    forget_operations();
    while (held_completion_count > 0)
        release(held_completion_count - 1);
    CHECK(open_descriptors == 1); /* the file */
}

static void begin(uint64_t chosen) {
    seed = chosen;
    chance_state = mix(seed);
    now_ns = 1000 * SECOND;
    choose_faults();
    friendly = exhausted = watched = false;
    descriptor_count = open_descriptors = socket_count = send_count = 0;
    operation_count = held_completion_count = 0;
    operation_number = posts_started = posts_told = 0;
    total_sent = total_received = quiet_taken = 0;
    refused_allocations = calls = 0;
    an_descriptor file;
    CHECK_OK(create(ROLE_FILE, 0, &file)); /* number 0 */
    CHECK(file == 0);
}

static void end(void) {
    the_port = NULL;
    the_slabs_lock = NULL;
    for (int i = 0; i < descriptor_count; i++)
        free(descriptors[i].log);
}

static void run(uint64_t chosen) {
    long blocks_before = live_blocks;
    begin(chosen);
    an_port_options options = {.backend = in_hundred(60) ? "edge" : "level"};
    trace("seed %llu, %s-triggered", (unsigned long long)seed, options.backend);
    int error = CORE(an_port_open(&the_port, &options));
    CHECK(error == 0 || (error == AN_ENOMEM && faults.no_memory > 0));
    if (error == 0) {
        the_slabs_lock = &the_port->slabs->lock;
        bool settles = in_hundred(75);
        for (size_t left = below(STEPS_MOST); left > 0; left--)
            take_step();
        if (settles) {
            settle();
            check_nothing_was_missed();
            end_streams();
            settle();
            cancel_what_is_left();
            check_statistics();
        }
        tear_down();
        check_peers(settles);
    }
    end();
    CHECK(live_blocks == blocks_before);
}

/* ---- running ---------------------------------------------------------------------------------------------------------------------------------- */

static void tell_seed(int number) {
    fprintf(stderr, "signal %d in seed %llu\n", number, (unsigned long long)seed);
    signal(number, SIG_DFL);
    raise(number);
}

int main(int argc, char **argv) {
    enum { SEEDS = 5000, MOST_SECONDS = 200 };
    static char output[BUFSIZ];
    setvbuf(stdout, output, _IOFBF, sizeof output);
    tracing = argc == 2;
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    uint64_t count = argc > 2 ? strtoull(argv[2], NULL, 10) : argc == 2 ? 1 : SEEDS;
    signal(SIGABRT, tell_seed);
    signal(SIGSEGV, tell_seed);
    signal(SIGALRM, tell_seed);
    if (argc == 1)
        alarm(MOST_SECONDS);
    for (uint64_t i = 0; i < count; i++)
        run(first + i);
    printf("%llu simulated systems%s\n", (unsigned long long)count,
           COUNTS_MEMORY ? "" : " (memory is the sanitizer's here: none is refused)");
    return 0;
}
