/* The pool lends pieces of chunks, starts a chunk again when all of it is back, and keeps no more than its bound. */
#include "check.h"
#include "core.h"

enum { BLOCKS = 3000 };

static struct an_block *lend(struct an_pool *pool, bool with_address, size_t asked, size_t used) {
    struct an_block *block = an_pool_offer(pool, with_address, asked);
    CHECK(block != NULL);
    if (with_address)
        memset(an_block_address(block), 1, sizeof(an_address));
    memset(an_block_data(block, with_address), 2, asked);
    an_pool_take(pool, block, with_address, used);
    return block;
}

int main(void) {
    struct an_pool pool;
    an_pool_init(&pool);

    /* An offer that is not taken leaves no trace; a taken one moves on. */
    struct an_block *offered = an_pool_offer(&pool, false, 100);
    CHECK(an_pool_offer(&pool, false, 65536) == offered);
    struct an_block *first = lend(&pool, false, 65536, 64);
    CHECK(first == offered && lend(&pool, true, 65536, 64) > first);

    /* All back: the same memory again. */
    an_block_release(first);
    an_block_release((struct an_block *)((char *)first + 128));
    CHECK(an_pool_offer(&pool, false, 1) == first);

    /* A burst of the largest receives: four to a chunk, and few chunks stay when it is over. */
    struct an_block *blocks[BLOCKS];
    for (int i = 0; i < BLOCKS; i++)
        blocks[i] = lend(&pool, i % 2 == 0, i % 10 == 0 ? AN_RECEIVE_LARGEST : 4096, i % 10 == 0 ? 100000 : 64);
    uint32_t most = pool.total;
    CHECK(most > 10);
    for (int i = 0; i < BLOCKS; i++)
        an_block_release(blocks[i]);
    CHECK(pool.total <= AN_CHUNKS_KEPT + 1);
    CHECK(most > pool.total);
    an_pool_destroy(&pool);
    CHECK(pool.total == 0);
    return 0;
}
