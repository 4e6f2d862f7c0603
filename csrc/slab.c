/* slab.c - the memory of accepted sockets, by the hundred: a slab goes back when its last socket has gone.
 *
 * The sockets of a busy hour, one by one between everything else that a program allocates, would leave a heap full of holes
 * that does not go back to the system, as something small is left above them. Here what is left holds one slab of pages. It
 * is also cheaper than the general allocator. Knows nothing of a socket but its size.
 */
#include "core.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* Who uses memory after it was given back is found out as with free(3). */
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SLAB_POISONS 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SLAB_POISONS 1
#endif
#if defined(SLAB_POISONS)
#include <sanitizer/asan_interface.h>
static void *obtain_pages(size_t size) { return malloc(size); } /* LeakSanitizer looks for pointers there */
static void return_pages(void *pages, size_t size) {
    (void)size;
    free(pages);
}
#else
static void *obtain_pages(size_t size) { return an_os_map(size); }
static void return_pages(void *pages, size_t size) { an_os_unmap(pages, size); }
#define ASAN_POISON_MEMORY_REGION(place, size) ((void)(place), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(place, size) ((void)(place), (void)(size))
#endif

enum {
    SLAB_SIZE = 64 << 10,
    SLAB_HEAD = 64,
    PIECES = (SLAB_SIZE - SLAB_HEAD) / (sizeof(an_socket) + sizeof(uint16_t))
};

/* In the list of its owner while it has a free piece. Under the owner's lock. */
struct an_slab {
    struct an_slabs *owner;
    struct an_slab *next;
    struct an_slab *previous;
    uint32_t used;
    uint32_t free;              /* index + 1 */
    uint16_t next_free[PIECES]; /* index + 1 */
    an_socket pieces[PIECES];
};

_Static_assert(sizeof(struct an_slab) <= SLAB_SIZE, "SLAB_HEAD is enough");

struct an_slabs *an_slabs_create(void) {
    struct an_slabs *slabs = calloc(1, sizeof *slabs);
    if (slabs == NULL)
        return NULL;
    an_mutex_init(&slabs->lock);
    slabs->references = 1;
    slabs->fork_generation = an_fork_generation();
    return slabs;
}

/* In a forked child the lock may be held for ever, and the lists be in the middle of a change: what was the parent's stays. */
static bool is_foreign(const struct an_slabs *slabs) { return slabs->fork_generation != an_fork_generation(); }

static void enlist(struct an_slabs *slabs, struct an_slab *slab) {
    slab->previous = NULL;
    slab->next = slabs->first;
    if (slab->next != NULL)
        slab->next->previous = slab;
    slabs->first = slab;
}

static void delist(struct an_slabs *slabs, struct an_slab *slab) {
    if (slab->next != NULL)
        slab->next->previous = slab->previous;
    if (slab->previous != NULL)
        slab->previous->next = slab->next;
    else
        slabs->first = slab->next;
}

static void slab_free(struct an_slab *slab) {
    ASAN_UNPOISON_MEMORY_REGION(slab->pieces, sizeof slab->pieces);
    return_pages(slab, SLAB_SIZE);
}

void an_slabs_drop(struct an_slabs *slabs) {
    if (an_atomic_add32(&slabs->references, (uint32_t)-1) != 1 || is_foreign(slabs))
        return;
    while (slabs->first != NULL) {
        struct an_slab *slab = slabs->first;
        assert(slab->used == 0);
        delist(slabs, slab);
        slab_free(slab);
    }
    an_mutex_destroy(&slabs->lock);
    free(slabs);
}

static struct an_slab *slab_create(struct an_slabs *slabs) {
    struct an_slab *slab = obtain_pages(SLAB_SIZE);
    if (slab == NULL)
        return NULL;
    slab->owner = slabs;
    slab->used = 0;
    slab->free = 1;
    for (uint16_t index = 0; index < PIECES; index++)
        slab->next_free[index] = index + 1 < PIECES ? (uint16_t)(index + 2) : 0;
    ASAN_POISON_MEMORY_REGION(slab->pieces, sizeof slab->pieces);
    enlist(slabs, slab);
    slabs->empty++;
    slabs->total++;
    return slab;
}

static an_socket *take_piece(struct an_slabs *slabs, struct an_slab *slab) {
    uint32_t index = slab->free - 1;
    slab->free = slab->next_free[index];
    slabs->empty -= slab->used == 0;
    slab->used++;
    if (slab->free == 0)
        delist(slabs, slab);
    return &slab->pieces[index];
}

an_socket *an_slabs_take(struct an_slabs *slabs) {
    an_socket *piece = NULL;
    an_mutex_lock(&slabs->lock);
    struct an_slab *slab = slabs->first != NULL ? slabs->first : slab_create(slabs);
    if (slab != NULL)
        piece = take_piece(slabs, slab);
    an_mutex_unlock(&slabs->lock);
    if (piece == NULL)
        return NULL;
    an_atomic_add32(&slabs->references, 1);
    ASAN_UNPOISON_MEMORY_REGION(piece, sizeof *piece);
    memset(piece, 0, sizeof *piece);
    piece->slab = slab;
    return piece;
}

void an_slab_give_back(an_socket *piece) {
    struct an_slab *slab = piece->slab;
    struct an_slabs *slabs = slab->owner;
    uint32_t index = (uint32_t)(piece - slab->pieces);
    bool surplus = false;
    if (is_foreign(slabs))
        return;
    ASAN_POISON_MEMORY_REGION(piece, sizeof *piece);
    an_mutex_lock(&slabs->lock);
    if (slab->free == 0)
        enlist(slabs, slab);
    slab->next_free[index] = (uint16_t)slab->free;
    slab->free = index + 1;
    slab->used--;
    if (slab->used == 0) {
        surplus = slabs->empty > 0;
        slabs->empty += !surplus;
    }
    if (surplus) {
        delist(slabs, slab);
        slabs->total--;
    }
    an_mutex_unlock(&slabs->lock);
    if (surplus)
        slab_free(slab);
    an_slabs_drop(slabs);
}
