/* Slabs lend memory for sockets that nobody else has, and go back when it is back; sockets may outlive their port. */
#include "check.h"
#include "core.h"

enum { PIECES = 2000, ROUNDS = 100000 };

static an_socket *pieces[PIECES];

static void take(struct an_slabs *slabs, int i) {
    const an_socket zero = {0};
    an_socket *piece = an_slabs_take(slabs);
    CHECK(piece != NULL && piece->slab != NULL && (uintptr_t)piece % sizeof(void *) == 0);
    an_socket rest = *piece;
    rest.slab = NULL;
    CHECK(memcmp(&rest, &zero, sizeof zero) == 0);
    piece->bytes_sent = (uint64_t)i + 1;
    pieces[i] = piece;
}

static void give_back(int i) {
    CHECK(pieces[i]->bytes_sent == (uint64_t)i + 1);
    an_slab_give_back(pieces[i]);
    pieces[i] = NULL;
}

static void slabs_follow_what_is_used(void) {
    struct an_slabs *slabs = an_slabs_create();
    CHECK(slabs != NULL && slabs->total == 0);
    for (int i = 0; i < PIECES; i++)
        take(slabs, i);
    uint32_t most = slabs->total;
    CHECK(most > 5);
    srand(1);
    for (int round = 0; round < ROUNDS; round++) {
        int i = rand() % PIECES;
        if (pieces[i] == NULL)
            take(slabs, i);
        else
            give_back(i);
    }
    CHECK(slabs->total <= most);
    for (int i = 1; i < PIECES; i++) {
        if (pieces[i] != NULL)
            give_back(i);
    }
    if (pieces[0] == NULL)
        take(slabs, 0);
    CHECK(slabs->total <= 2); /* that of the one in use, and one that is kept */
    an_slabs_drop(slabs);
    give_back(0); /* lets go of everything */
}

static void an_accepted_socket_outlives_its_port(const char *backend) {
    an_address address;
    an_operation accept, connect;
    an_port *port = open_port(backend);
    an_socket *listener = open_listener(port, &address), *client, *accepted = NULL;
    CHECK_OK(an_socket_accept(listener, &accept, 0, AN_FOREVER));
    CHECK_OK(an_socket_open(&client, AF_INET, SOCK_STREAM, 0));
    CHECK_OK(an_port_associate(port, client, NULL));
    CHECK_OK(an_socket_connect(client, &connect, &address, AN_FOREVER));
    for (int i = 0; i < 2; i++) {
        an_completion completion = dequeue_one(port);
        CHECK(completion.error == 0);
        if (completion.kind == AN_ACCEPT)
            accepted = completion.accepted;
        an_completion_release(&completion, 1);
    }
    CHECK(accepted != NULL);
    an_socket_free(listener, 0);
    an_socket_free(client, 0);
    an_port_free(port);
    port = open_port(backend);
    CHECK_OK(an_port_associate(port, accepted, NULL));
    an_port_free(port);
    CHECK(an_socket_is_closed(accepted));
    an_socket_free(accepted, 0);
}

/* The places of many sockets go when they have closed; and who comes late with a tag finds no stranger. */
static void a_port_shrinks_with_its_sockets(const char *backend) {
    enum { SOCKETS = 300 };
    static an_socket *sockets[SOCKETS];
    static uint64_t tags[SOCKETS];
    an_port *port = open_port(backend);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < SOCKETS; i++) {
            CHECK_OK(an_socket_open(&sockets[i], AF_INET, SOCK_DGRAM, 0));
            CHECK_OK(an_port_associate(port, sockets[i], NULL));
            for (int k = 0; round > 0 && k < SOCKETS; k++)
                CHECK(sockets[i]->tag != tags[k]);
        }
        CHECK(port->slot_capacity >= SOCKETS && port->timers.capacity >= SOCKETS);
        for (int i = 0; i < SOCKETS; i++) {
            tags[i] = sockets[i]->tag;
            CHECK_OK(an_socket_close(sockets[i], 0));
            CHECK(an_port_find(port, tags[i]) == NULL);
            for (int k = i + 1; k < SOCKETS; k += 37) {
                CHECK(an_port_find(port, sockets[k]->tag) == sockets[k]);
                an_socket_drop(sockets[k]);
            }
        }
        CHECK(port->slot_capacity == 64 && port->slot_count == 0 && port->timers.capacity == 64);
        for (int i = 0; i < SOCKETS; i++)
            an_socket_free(sockets[i], 0);
    }
    an_port_free(port);
}

/* One that came last and stays long keeps the places of all others, but not for ever. */
static void a_port_shrinks_when_the_last_socket_has_gone(const char *backend) {
    enum { SOCKETS = 600, STAYING = 5, WAVE = 50, WAVES = 10 };
    static an_socket *sockets[SOCKETS];
    an_port *port = open_port(backend);
    for (int i = 0; i < SOCKETS; i++) {
        CHECK_OK(an_socket_open(&sockets[i], AF_INET, SOCK_DGRAM, 0));
        CHECK_OK(an_port_associate(port, sockets[i], NULL));
    }
    for (int i = STAYING; i < SOCKETS - 1; i++)
        an_socket_free(sockets[i], 0);
    CHECK(port->slot_capacity >= SOCKETS);
    an_socket_free(sockets[SOCKETS - 1], 0);
    for (int wave = 0; wave < WAVES; wave++) {
        for (int i = STAYING; i < WAVE; i++) {
            CHECK_OK(an_socket_open(&sockets[i], AF_INET, SOCK_DGRAM, 0));
            CHECK_OK(an_port_associate(port, sockets[i], NULL));
        }
        for (int i = STAYING; i < WAVE; i++)
            an_socket_free(sockets[i], 0);
    }
    CHECK(port->slot_capacity == 64 && port->slot_count <= WAVE);
    for (int i = 0; i < STAYING; i++)
        an_socket_free(sockets[i], 0);
    an_port_free(port);
}

int main(void) {
    slabs_follow_what_is_used();
    on_each_backend("an accepted socket outlives its port", an_accepted_socket_outlives_its_port);
    on_each_backend("a port shrinks with its sockets", a_port_shrinks_with_its_sockets);
    on_each_backend("a port shrinks when the last socket has gone", a_port_shrinks_when_the_last_socket_has_gone);
    return 0;
}
