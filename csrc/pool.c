/* pool.c - the memory that the port lends to receives, so that idle connections tie none.
 *
 * The leader receives into the current chunk, block after block; a chunk counts the blocks that are lent. When all of
 * the current one came back it starts again at its beginning: a busy server then works in the same few warm pages,
 * however many connections it has. A full chunk is left to its borrowers, the last of whom gives it back.
 * Knows nothing of sockets and ports.
 */
#include "core.h"

#include <stdlib.h>

struct an_chunk {
    struct an_pool *pool;
    struct an_chunk *next; /* free list */
    size_t used;           /* leader */
    uint32_t references;   /* atomic: the pool while it is current, each block lent */
    uint32_t unused;
    uint64_t data[]; /* AN_CHUNK_SIZE bytes */
};

static size_t round_up(size_t size) { return (size + 15) & ~(size_t)15; }

void an_pool_init(struct an_pool *pool) {
    an_mutex_init(&pool->lock);
    pool->current = NULL;
    pool->free = NULL;
    pool->free_count = 0;
    pool->total = 0;
}

static void chunk_discard(struct an_chunk *chunk) {
    an_atomic_add32(&chunk->pool->total, (uint32_t)-1);
    free(chunk);
}

static void chunk_release(struct an_chunk *chunk) {
    struct an_pool *pool = chunk->pool;
    if (an_atomic_add32(&chunk->references, (uint32_t)-1) != 1)
        return;
    an_mutex_lock(&pool->lock);
    bool keep = pool->free_count < AN_CHUNKS_KEPT;
    if (keep) {
        chunk->next = pool->free;
        pool->free = chunk;
        pool->free_count++;
    }
    an_mutex_unlock(&pool->lock);
    if (!keep)
        chunk_discard(chunk);
}

void an_pool_destroy(struct an_pool *pool) {
    if (pool->current != NULL) /* nothing is lent any more; in a forked child the lock may be held for ever */
        chunk_discard(pool->current);
    while (pool->free != NULL) {
        struct an_chunk *chunk = pool->free;
        pool->free = chunk->next;
        chunk_discard(chunk);
    }
    an_mutex_destroy(&pool->lock);
}

static struct an_chunk *chunk_obtain(struct an_pool *pool) {
    an_mutex_lock(&pool->lock);
    struct an_chunk *chunk = pool->free;
    if (chunk != NULL) {
        pool->free = chunk->next;
        pool->free_count--;
    }
    an_mutex_unlock(&pool->lock);
    if (chunk == NULL) {
        chunk = malloc(sizeof *chunk + AN_CHUNK_SIZE);
        if (chunk == NULL)
            return NULL;
        an_atomic_add32(&pool->total, 1);
    }
    chunk->pool = pool;
    chunk->next = NULL;
    chunk->used = 0;
    chunk->references = 1;
    return chunk;
}

static size_t header_size(bool with_address) {
    return sizeof(struct an_block) + (with_address ? sizeof(an_address) : 0);
}

struct an_block *an_pool_offer(struct an_pool *pool, bool with_address, size_t size) {
    size_t need = header_size(with_address) + size;
    struct an_chunk *chunk = pool->current;
    if (chunk != NULL && an_atomic_load32(&chunk->references) == 1)
        chunk->used = 0;
    if (chunk == NULL || chunk->used + need > AN_CHUNK_SIZE) {
        struct an_chunk *fresh = chunk_obtain(pool);
        if (fresh == NULL)
            return NULL;
        if (chunk != NULL)
            chunk_release(chunk);
        pool->current = chunk = fresh;
    }
    struct an_block *block = (struct an_block *)((char *)chunk->data + chunk->used);
    block->chunk = chunk;
    return block;
}

void an_pool_take(struct an_pool *pool, struct an_block *block, bool with_address, size_t used) {
    struct an_chunk *chunk = pool->current;
    (void)block;
    chunk->used += round_up(header_size(with_address) + used);
    an_atomic_add32(&chunk->references, 1);
}

void an_block_release(struct an_block *block) { chunk_release(block->chunk); }

an_address *an_block_address(struct an_block *block) { return (an_address *)(block + 1); }

void *an_block_data(struct an_block *block, bool with_address) { return (char *)block + header_size(with_address); }
