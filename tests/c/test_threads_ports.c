/* Several ports in several threads, and what several threads on one port meet that test_threads.c leaves out: multishots
 * that many dequeue from, and a port that closes beside all of it. Run under ThreadSanitizer as well. */
#include "check.h"
#include "os.h"

#include <pthread.h>

enum {
    PORTS = 4,
    ROUNDS = 3,
    CLIENTS = 4,
    MESSAGES = 60,
    MESSAGE = 32,
    BATCH = 16,
    LINKS = 5,
    PIECES = 400,
    CLOSES = 25
};

/* ---- ports in threads of their own ----------------------------------------------------------------------------------- */

/* A client of a round: it connects to the neighbour's listener and sends its messages one after the other's echo. */
struct client {
    an_operation connect, receive;
    an_socket *socket;
    uint32_t echoed; /* bytes */
};

/* What a thread has for itself: its port and all on it. Others know its address, and when it is done. */
struct shop {
    const char *backend;
    struct shop *neighbour;
    pthread_barrier_t *together;
    uint32_t *finished; /* threads whose clients are done, atomic */
    an_address address;
    an_port *port;
    an_operation accept;
    struct client clients[CLIENTS];
    an_operation served[CLIENTS]; /* multishot receives of accepted sockets */
    an_socket *accepted[CLIENTS];
    uint32_t accepted_count, ended, done;
};

static void shop_sends(struct client *client) {
    static const char message[MESSAGE] = "from one port to another";
    CHECK_OK(an_socket_send(client->socket, NULL, message, sizeof message, AN_FOREVER));
}

static void shop_connects(struct shop *shop) {
    for (int i = 0; i < CLIENTS; i++) {
        struct client *client = &shop->clients[i];
        CHECK_OK(an_socket_open(&client->socket, AF_INET, SOCK_STREAM, 0));
        CHECK_OK(an_port_associate(shop->port, client->socket, client));
        CHECK_OK(an_socket_connect(client->socket, &client->connect, &shop->neighbour->address, 10 * SECOND));
    }
}

static void shop_accepts(struct shop *shop, const an_completion *completion) {
    uint32_t place = shop->accepted_count++;
    CHECK_OK(completion->error);
    CHECK(place < CLIENTS && completion->accepted != NULL);
    shop->accepted[place] = completion->accepted;
    CHECK_OK(an_port_associate(shop->port, completion->accepted, NULL));
    CHECK_OK(
        an_socket_recv(completion->accepted, &shop->served[place], NULL, 4096, AN_MULTISHOT, UINT64_MAX, AN_FOREVER));
}

static void shop_hears_its_client(struct shop *shop, struct client *client, const an_completion *completion) {
    CHECK_OK(completion->error);
    CHECK(completion->transferred > 0);
    client->echoed += (uint32_t)completion->transferred;
    if (client->echoed % MESSAGE == 0 && client->echoed < MESSAGES * MESSAGE)
        shop_sends(client);
    if (client->echoed < MESSAGES * MESSAGE) {
        CHECK_OK(an_socket_recv(client->socket, &client->receive, NULL, 4096, 0, UINT64_MAX, AN_FOREVER));
        return;
    }
    an_socket_free(client->socket, AN_FLUSH);
    if (++shop->done == CLIENTS)
        an_atomic_add32(shop->finished, 1);
}

static void shop_serves(struct shop *shop, const an_completion *completion) {
    if (completion->transferred > 0) { /* to the client of another thread's port */
        CHECK_OK(completion->error);
        CHECK_OK(an_socket_send(completion->socket, NULL, completion->data, completion->transferred, AN_FOREVER));
    }
    if ((completion->flags & AN_MORE) == 0)
        shop->ended++;
}

static void shop_handles(struct shop *shop, const an_completion *completion) {
    struct client *client = completion->state;
    if (completion->kind == AN_CONNECT) {
        CHECK_OK(completion->error);
        shop_sends(client);
        CHECK_OK(an_socket_recv(client->socket, &client->receive, NULL, 4096, 0, UINT64_MAX, AN_FOREVER));
    } else if (completion->kind == AN_ACCEPT && (completion->flags & AN_MORE) != 0) {
        shop_accepts(shop, completion);
    } else if (completion->kind == AN_RECV && client != NULL) {
        shop_hears_its_client(shop, client, completion);
    } else if (completion->kind == AN_RECV) {
        shop_serves(shop, completion);
    }
}

static bool shop_is_done(const struct shop *shop) {
    return shop->done == CLIENTS && shop->ended == CLIENTS && an_atomic_load32(shop->finished) >= PORTS;
}

static void *run_shop(void *memory) {
    struct shop *shop = memory;
    an_port_options options = {.backend = shop->backend, .concurrency = 1};
    an_completion batch[BATCH];
    size_t count;
    CHECK_OK(an_port_open(&shop->port, &options));
    an_socket *listener = open_listener(shop->port, &shop->address);
    CHECK_OK(an_socket_accept(listener, &shop->accept, AN_MULTISHOT, AN_FOREVER));
    pthread_barrier_wait(shop->together); /* the address is known */
    shop_connects(shop);
    for (int64_t until_ns = an_clock() + 60 * SECOND; !shop_is_done(shop);) {
        CHECK(an_clock() < until_ns);
        CHECK_OK(an_port_dequeue(shop->port, batch, BATCH, SECOND / 50, &count));
        for (size_t i = 0; i < count; i++)
            shop_handles(shop, &batch[i]);
        an_completion_release(batch, count);
    }
    CHECK(shop->accepted_count == CLIENTS);
    for (int i = 0; i < CLIENTS; i++)
        an_socket_free(shop->accepted[i], 0);
    an_socket_free(listener, 0);
    an_port_free(shop->port);
    return NULL;
}

/* Each thread opens a port, serves the clients of its neighbour's port and is the client of the other neighbour, closes
 * it and does so again: what the library keeps for all ports, and the descriptors' numbers, are all that they share. */
static void ports_in_threads_of_their_own(const char *backend) {
    for (int round = 0; round < ROUNDS; round++) {
        struct shop *shops = calloc(PORTS, sizeof *shops);
        pthread_t threads[PORTS];
        pthread_barrier_t together;
        uint32_t finished = 0;
        CHECK(shops != NULL);
        CHECK_OK(pthread_barrier_init(&together, NULL, PORTS));
        for (int i = 0; i < PORTS; i++) {
            shops[i].backend = backend;
            shops[i].neighbour = &shops[(i + 1) % PORTS];
            shops[i].together = &together;
            shops[i].finished = &finished;
            CHECK_OK(pthread_create(&threads[i], NULL, run_shop, &shops[i]));
        }
        for (int i = 0; i < PORTS; i++)
            CHECK_OK(pthread_join(threads[i], NULL));
        CHECK_OK(pthread_barrier_destroy(&together));
        free(shops);
    }
}

/* ---- multishots that many dequeue from -------------------------------------------------------------------------------- */

struct link {
    an_operation receive;
    an_socket *socket, *peer;
    uint32_t received, ended;
};

static struct {
    an_port *port;
    struct link links[LINKS];
    uint32_t senders_done;
} crowd;

static void *send_pieces(void *memory) {
    struct link *link = memory;
    for (int i = 0; i < PIECES; i++) {
        CHECK_OK(an_socket_send(link->peer, NULL, "abcd", 4, AN_FOREVER));
        if (i % 16 == 0)
            CHECK_OK(an_port_associate(crowd.port, link->socket, link)); /* the state, while others read it */
    }
    an_atomic_add32(&crowd.senders_done, 1);
    return NULL;
}

static void *pause_and_resume(void *unused) {
    (void)unused;
    for (unsigned turn = 0; an_atomic_load32(&crowd.senders_done) < LINKS; turn++) {
        struct link *link = &crowd.links[turn % LINKS];
        CHECK_OK(an_operation_pause(link->socket, &link->receive));
        (void)an_socket_unsent(link->peer);
        CHECK_OK(an_operation_resume(link->socket, &link->receive));
        rest_us(100);
    }
    return NULL;
}

static void *count_until_closed(void *unused) {
    an_completion batch[3];
    an_statistics statistics;
    size_t count;
    int error;
    (void)unused;
    while ((error = an_port_dequeue(crowd.port, batch, 3, AN_FOREVER, &count)) == 0) {
        for (size_t i = 0; i < count; i++) {
            struct link *link = batch[i].state;
            CHECK(batch[i].operation == &link->receive);
            an_atomic_add32(&link->received, (uint32_t)batch[i].transferred);
            if ((batch[i].flags & AN_MORE) == 0)
                CHECK(an_atomic_add32(&link->ended, 1) == 0);
        }
        an_completion_release(batch, count);
        error = an_port_statistics(crowd.port, &statistics);
        CHECK(error == 0 || error == AN_EPORTCLOSED);
    }
    CHECK(error == AN_EPORTCLOSED);
    return NULL;
}

static void crowd_waits_for(uint32_t received, uint32_t ended) {
    int64_t until_ns = an_clock() + 60 * SECOND;
    for (int i = 0; i < LINKS; i++) {
        struct link *link = &crowd.links[i];
        while (an_atomic_load32(&link->received) < received || an_atomic_load32(&link->ended) < ended) {
            CHECK(an_clock() < until_ns);
            rest_us(500);
        }
        CHECK(an_atomic_load32(&link->received) == received);
    }
}

static void multishots_are_shared_by_all_who_dequeue(const char *backend) {
    enum { DEQUEUERS = 3 };
    pthread_t dequeuers[DEQUEUERS], senders[LINKS], pauser;
    memset(&crowd, 0, sizeof crowd);
    crowd.port = open_port(backend);
    for (int i = 0; i < LINKS; i++) {
        struct link *link = &crowd.links[i];
        open_pair(crowd.port, &link->socket, &link->peer, NULL);
        CHECK_OK(an_port_associate(crowd.port, link->socket, link));
        CHECK_OK(an_socket_recv(link->socket, &link->receive, NULL, 64, AN_MULTISHOT, UINT64_MAX, AN_FOREVER));
    }
    for (int i = 0; i < DEQUEUERS; i++)
        CHECK_OK(pthread_create(&dequeuers[i], NULL, count_until_closed, NULL));
    for (int i = 0; i < LINKS; i++)
        CHECK_OK(pthread_create(&senders[i], NULL, send_pieces, &crowd.links[i]));
    CHECK_OK(pthread_create(&pauser, NULL, pause_and_resume, NULL));
    for (int i = 0; i < LINKS; i++)
        CHECK_OK(pthread_join(senders[i], NULL));
    CHECK_OK(pthread_join(pauser, NULL));
    crowd_waits_for(4 * PIECES, 0);
    for (int i = 0; i < LINKS; i++)
        CHECK_OK(an_operation_cancel(crowd.links[i].socket, &crowd.links[i].receive, NULL));
    crowd_waits_for(4 * PIECES, 1);
    CHECK(an_port_in_flight(crowd.port) == 0);
    CHECK_OK(an_port_close(crowd.port));
    for (int i = 0; i < DEQUEUERS; i++)
        CHECK_OK(pthread_join(dequeuers[i], NULL));
    for (int i = 0; i < LINKS; i++) {
        an_socket_free(crowd.links[i].socket, 0);
        an_socket_free(crowd.links[i].peer, 0);
    }
    an_port_free(crowd.port);
}

/* ---- a port that closes beside all of it ------------------------------------------------------------------------------- */

struct closing {
    an_port *port;
    an_socket *socket, *peer;
    uint32_t busy; /* starts that went well, atomic */
};

/* Starts what it can until the port is closed; then the operations, and their buffers, are its own again. */
static void *start_until_closed(void *memory) {
    enum { OPERATIONS = 256 };
    struct closing *closing = memory;
    an_operation *operations = calloc(OPERATIONS, sizeof *operations);
    char *buffers = calloc(OPERATIONS, 8);
    int error = 0;
    CHECK(operations != NULL && buffers != NULL);
    for (int i = 0; i < OPERATIONS && error == 0; i++) {
        if (i % 4 == 0)
            error = an_port_post(closing->port, &operations[i], NULL);
        else if (i % 4 == 1)
            error = an_port_timer(closing->port, &operations[i], i % 8 * SECOND / 1000, NULL);
        else if (i % 4 == 2)
            error = an_socket_recv(closing->socket, &operations[i], &buffers[8 * i], 8, 0, UINT64_MAX, SECOND / 1000);
        else
            error = an_socket_send(closing->peer, &operations[i], &buffers[8 * i], 8, AN_FOREVER);
        if (error == 0)
            an_atomic_add32(&closing->busy, 1);
    }
    CHECK(error == 0 || error == AN_EPORTCLOSED);
    CHECK_OK(an_port_close(closing->port)); /* beside whoever else closes it */
    memset(buffers, 'x', OPERATIONS * 8);
    free(operations);
    free(buffers);
    return NULL;
}

static void *dequeue_until_it_closes(void *memory) {
    struct closing *closing = memory;
    an_completion batch[BATCH];
    size_t count;
    int error;
    while ((error = an_port_dequeue(closing->port, batch, BATCH, AN_FOREVER, &count)) == 0)
        an_completion_release(batch, count);
    CHECK(error == AN_EPORTCLOSED);
    return NULL;
}

static void a_port_closes_beside_threads_that_start_and_dequeue(const char *backend) {
    enum { STARTERS = 2, DEQUEUERS = 2 };
    for (int turn = 0; turn < CLOSES; turn++) {
        struct closing closing = {.port = open_port(backend)};
        pthread_t starters[STARTERS], dequeuers[DEQUEUERS];
        open_pair(closing.port, &closing.socket, &closing.peer, NULL);
        for (int i = 0; i < DEQUEUERS; i++)
            CHECK_OK(pthread_create(&dequeuers[i], NULL, dequeue_until_it_closes, &closing));
        for (int i = 0; i < STARTERS; i++)
            CHECK_OK(pthread_create(&starters[i], NULL, start_until_closed, &closing));
        while (an_atomic_load32(&closing.busy) < (uint32_t)(turn * 8)) /* no starter closes it before 256 */
            rest_us(50);
        CHECK_OK(an_port_close(closing.port));
        CHECK(an_port_in_flight(closing.port) == 0);
        for (int i = 0; i < STARTERS; i++)
            CHECK_OK(pthread_join(starters[i], NULL));
        for (int i = 0; i < DEQUEUERS; i++)
            CHECK_OK(pthread_join(dequeuers[i], NULL));
        an_socket_free(closing.socket, 0);
        an_socket_free(closing.peer, 0);
        an_port_free(closing.port);
    }
}

int main(void) {
    on_each_backend("ports in threads of their own", ports_in_threads_of_their_own);
    on_each_backend("multishots are shared by all who dequeue", multishots_are_shared_by_all_who_dequeue);
    on_each_backend("a port closes beside threads that start and dequeue",
                    a_port_closes_beside_threads_that_start_and_dequeue);
    return 0;
}
