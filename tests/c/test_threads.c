/* Threads that start, cancel, post, close and dequeue side by side: each operation completes exactly once, and nothing
 * is in flight at the end. Run under ThreadSanitizer as well. */
#include "check.h"
#include "os.h"

#include <pthread.h>

enum { POSTERS = 3, POSTS = 4000, DEQUEUERS = 3, PAIRS = 6, MESSAGES = 2500, CHURNS = 150, SECONDS = 60 };

struct post {
    an_operation operation;
    uint32_t delivered;
};

/* One end of a pair: receives one-shot, answers each message with one, until the pair has had enough. */
struct end {
    an_operation receive;
    an_socket *socket;
    struct end *other;
    uint32_t received;
    uint32_t cancelled;
};

struct world {
    an_port *port;
    struct post posts[POSTERS][POSTS];
    struct end ends[PAIRS][2];
    uint32_t posts_delivered;
    uint32_t pairs_done;
    uint32_t stop;
    uint32_t churned;
};

static struct world *world;

static void arm(struct end *end) {
    int error = an_socket_recv(end->socket, &end->receive, NULL, 1000, 0, UINT64_MAX, AN_FOREVER);
    CHECK(error == 0 || error == AN_EBADF || error == AN_EPORTCLOSED);
}

static void handle_message(struct end *end, const an_completion *completion) {
    if (completion->error == AN_ECANCELED) {
        an_atomic_add32(&end->cancelled, 1);
        arm(end);
        return;
    }
    CHECK(completion->error == 0 && completion->transferred >= 1);
    uint32_t before = an_atomic_add32(&end->received, (uint32_t)completion->transferred);
    if (before < MESSAGES && before + completion->transferred >= MESSAGES)
        an_atomic_add32(&world->pairs_done, 1);
    /* as many bytes back: the ball stays in the game */
    int error = an_socket_send(end->socket, NULL, completion->data, completion->transferred, AN_FOREVER);
    CHECK(error == 0 || error == AN_EBADF || error == AN_EPORTCLOSED);
    arm(end);
}

static void handle(const an_completion *completion) {
    if (completion->kind == AN_POST) {
        struct post *post = completion->state;
        CHECK(&post->operation == completion->operation);
        CHECK(an_atomic_add32(&post->delivered, 1) == 0);
        an_atomic_add32(&world->posts_delivered, 1);
    } else if (completion->kind == AN_RECV && completion->state != NULL) {
        handle_message(completion->state, completion);
    }
}

static void *dequeue_until_closed(void *unused) {
    an_completion batch[32];
    size_t count;
    int error;
    (void)unused;
    while ((error = an_port_dequeue(world->port, batch, 32, AN_FOREVER, &count)) == 0) {
        CHECK(count > 0);
        for (size_t i = 0; i < count; i++)
            handle(&batch[i]);
        an_completion_release(batch, count);
    }
    CHECK(error == AN_EPORTCLOSED);
    return NULL;
}

static void *post_all(void *posts) {
    for (int i = 0; i < POSTS; i++)
        CHECK_OK(an_port_post(world->port, &((struct post *)posts)[i].operation, &((struct post *)posts)[i]));
    return NULL;
}

static void *cancel_now_and_then(void *unused) {
    unsigned turn = 0;
    (void)unused;
    while (an_atomic_load32(&world->stop) == 0) {
        struct end *end = &world->ends[turn % PAIRS][turn / PAIRS % 2];
        int32_t cancelled;
        size_t count;
        CHECK_OK(an_operation_cancel(end->socket, &end->receive, &cancelled));
        if (turn % 7 == 0)
            CHECK_OK(an_socket_cancel(end->socket, &count));
        turn++;
        rest_us(200);
    }
    return NULL;
}

/* Opens, uses and closes sockets with operations in flight; their operations live until the port is closed. */
static void *churn(void *unused) {
    static an_operation operations[CHURNS][4];
    (void)unused;
    for (int i = 0; i < CHURNS; i++) {
        an_socket *socket, *peer;
        open_pair(world->port, &socket, &peer, NULL);
        CHECK_OK(an_socket_recv(socket, &operations[i][0], NULL, 100, AN_MULTISHOT, UINT64_MAX, AN_FOREVER));
        CHECK_OK(an_socket_recv(peer, &operations[i][1], NULL, 100, 0, UINT64_MAX, SECOND / 1000));
        CHECK_OK(an_socket_send(socket, &operations[i][2], "abc", 3, AN_FOREVER));
        CHECK_OK(an_port_timer(world->port, &operations[i][3], i % 3 * SECOND / 1000, NULL));
        CHECK_OK(an_socket_send(peer, NULL, "abc", 3, AN_FOREVER));
        if (i % 2 == 0)
            rest_us(500);
        an_socket_free(socket, i % 3 == 0 ? AN_FLUSH : 0);
        an_socket_free(peer, 0);
        an_atomic_add32(&world->churned, 1);
    }
    return NULL;
}

static void kick_off(void) {
    for (int pair = 0; pair < PAIRS; pair++) {
        struct end *ends = world->ends[pair];
        open_pair(world->port, &ends[0].socket, &ends[1].socket, NULL);
        for (int side = 0; side < 2; side++) {
            CHECK_OK(an_port_associate(world->port, ends[side].socket, &ends[side]));
            ends[side].other = &ends[1 - side];
            arm(&ends[side]);
        }
        CHECK_OK(an_socket_send(ends[0].socket, NULL, "x", 1, AN_FOREVER));
    }
}

static bool all_done(void) {
    return an_atomic_load32(&world->posts_delivered) == POSTERS * POSTS &&
           an_atomic_load32(&world->pairs_done) == 2 * PAIRS && an_atomic_load32(&world->churned) == CHURNS;
}

static void everything_at_once(const char *backend, int dequeuing, uint32_t concurrency) {
    pthread_t dequeuers[DEQUEUERS], posters[POSTERS], canceller, churner;
    an_port_options options = {.backend = backend, .concurrency = concurrency};
    world = calloc(1, sizeof *world);
    CHECK_OK(an_port_open(&world->port, &options));
    kick_off();
    for (int i = 0; i < dequeuing; i++)
        CHECK_OK(pthread_create(&dequeuers[i], NULL, dequeue_until_closed, NULL));
    for (int i = 0; i < POSTERS; i++)
        CHECK_OK(pthread_create(&posters[i], NULL, post_all, world->posts[i]));
    CHECK_OK(pthread_create(&canceller, NULL, cancel_now_and_then, NULL));
    CHECK_OK(pthread_create(&churner, NULL, churn, NULL));
    int64_t until_ns = an_clock() + SECONDS * SECOND;
    while (!all_done() && an_clock() < until_ns)
        rest_us(2000);
    CHECK(all_done());
    an_atomic_store32(&world->stop, 1);
    CHECK_OK(pthread_join(canceller, NULL));
    CHECK_OK(pthread_join(churner, NULL));
    for (int i = 0; i < POSTERS; i++)
        CHECK_OK(pthread_join(posters[i], NULL));
    CHECK_OK(an_port_close(world->port));
    for (int i = 0; i < dequeuing; i++)
        CHECK_OK(pthread_join(dequeuers[i], NULL));
    CHECK(an_port_in_flight(world->port) == 0);
    for (int pair = 0; pair < PAIRS; pair++) {
        an_socket_free(world->ends[pair][0].socket, 0);
        an_socket_free(world->ends[pair][1].socket, 0);
    }
    an_port_free(world->port);
    free(world);
}

static void many_dequeue(const char *backend) { everything_at_once(backend, DEQUEUERS, 0); }

static void one_dequeues_as_promised(const char *backend) { everything_at_once(backend, 1, 1); }

static an_port *contested;

static void *post_and_dequeue(void *memory) {
    an_operation *operation = memory;
    an_completion completion;
    size_t count;
    for (int i = 0; i < 2000; i++) {
        CHECK_OK(an_port_post(contested, operation, operation));
        CHECK_OK(an_port_dequeue(contested, &completion, 1, 10 * SECOND, &count));
        CHECK(count == 1);
        if (completion.state != operation)
            break; /* another's: ours is in flight still, so this thread may not start it again */
    }
    return NULL;
}

/* Each thread leaves after it took a completion that is not its own; the rest is found by close. */
static void leaders_change_without_losing_a_wake_up(const char *backend) {
    static an_operation operations[4];
    pthread_t threads[4];
    contested = open_port(backend);
    for (int i = 0; i < 4; i++)
        CHECK_OK(pthread_create(&threads[i], NULL, post_and_dequeue, &operations[i]));
    for (int i = 0; i < 4; i++)
        CHECK_OK(pthread_join(threads[i], NULL));
    an_port_free(contested);
}

static void *wait_for_the_post(void *unused) {
    an_completion completion;
    size_t count;
    (void)unused;
    CHECK_OK(an_port_dequeue(contested, &completion, 1, 10 * SECOND, &count));
    CHECK(count == 1 && completion.kind == AN_POST);
    return NULL;
}

/* Another loop begins to watch the port while a thread waits in it, or is about to. */
static void a_port_is_watched_while_a_thread_waits(const char *backend) {
    enum { TURNS = 20 };
    for (int turn = 0; turn < TURNS; turn++) {
        pthread_t waiting;
        an_operation post;
        an_descriptor descriptor;
        contested = open_port(backend);
        CHECK_OK(pthread_create(&waiting, NULL, wait_for_the_post, NULL));
        if (turn % 2 == 0)
            rest_us(1000);
        int error = an_port_descriptor(contested, &descriptor);
        CHECK(error == (strcmp(backend, "iocp") == 0 ? AN_ENOTSUP : 0)); /* Windows has no such descriptor */
        CHECK_OK(an_port_post(contested, &post, NULL));
        CHECK_OK(pthread_join(waiting, NULL));
        an_port_free(contested);
    }
}

/* Closes the sockets that come as posts. */
static void *close_what_comes(void *posts) {
    an_completion post;
    size_t count;
    while (an_port_dequeue(posts, &post, 1, AN_FOREVER, &count) == 0)
        CHECK_OK(an_socket_close(post.state, 0));
    return NULL;
}

/* Who got the last completion owns the socket alone, although the call that cancelled the operation has not returned yet. */
static void the_last_completion_frees_what_another_thread_closes(const char *backend) {
    enum { TURNS = 5000 };
    an_port *port = open_port(backend), *posts = open_port(backend);
    pthread_t closer;
    CHECK_OK(pthread_create(&closer, NULL, close_what_comes, posts));
    for (int turn = 0; turn < TURNS; turn++) {
        an_socket *socket;
        an_operation receive, post;
        int peer;
        open_pair(port, &socket, NULL, &peer);
        CHECK_OK(an_socket_recv(socket, &receive, NULL, 10, 0, UINT64_MAX, AN_FOREVER));
        CHECK_OK(an_port_post(posts, &post, socket));
        an_completion completion = dequeue_one(port);
        CHECK(completion.error == AN_ECANCELED);
        an_completion_release(&completion, 1);
        an_socket_free(socket, 0);
        peer_close(peer);
    }
    CHECK_OK(an_port_close(posts));
    CHECK_OK(pthread_join(closer, NULL));
    an_port_free(posts);
    an_port_free(port);
}

/* ---- threads that wait, and what ends the wait of how many ------------------------------------------------------------ */

enum { CROWD = 4 };

static struct {
    an_port *port;
    pthread_t threads[CROWD];
    an_operation operations[CROWD];
    uint32_t handling; /* threads that have something to handle */
    uint32_t enough;   /* so many must have it at once, before one of them goes on */
} crowd;

static an_statistics counts(void) {
    an_statistics statistics;
    CHECK_OK(an_port_statistics(crowd.port, &statistics));
    return statistics;
}

static void until_they_handle(uint32_t threads) {
    int64_t until_ns = an_clock() + 10 * SECOND;
    while (an_atomic_load32(&crowd.handling) < threads && an_clock() < until_ns)
        rest_us(100);
    CHECK(an_atomic_load32(&crowd.handling) >= threads);
}

static void *handle_one(void *unused) {
    an_completion completion;
    size_t count;
    (void)unused;
    int error = an_port_dequeue(crowd.port, &completion, 1, 30 * SECOND, &count);
    if (error == AN_EPORTCLOSED)
        return NULL;
    CHECK_OK(error);
    CHECK(count == 1);
    an_atomic_add32(&crowd.handling, 1);
    until_they_handle(crowd.enough);
    an_completion_release(&completion, 1);
    return NULL;
}

/* They wait in the system: all of them on a completion port of the system's own, else one for the others. */
static void gather_crowd(const char *backend, uint32_t enough) {
    uint64_t expected = strcmp(backend, "iocp") == 0 ? CROWD : 1;
    int64_t until_ns = an_clock() + 10 * SECOND;
    crowd.port = open_port(backend);
    crowd.handling = 0;
    crowd.enough = enough;
    for (int i = 0; i < CROWD; i++)
        CHECK_OK(pthread_create(&crowd.threads[i], NULL, handle_one, NULL));
    while (counts().gauge_waiting < expected && an_clock() < until_ns)
        rest_us(100);
    CHECK(counts().gauge_waiting == expected);
}

static void dismiss_crowd(void) {
    CHECK_OK(an_port_close(crowd.port));
    for (int i = 0; i < CROWD; i++)
        CHECK_OK(pthread_join(crowd.threads[i], NULL));
    an_port_free(crowd.port);
}

static void posts_are_handled_by_a_thread_each(const char *backend) {
    gather_crowd(backend, CROWD);
    for (int i = 0; i < CROWD; i++)
        CHECK_OK(an_port_post(crowd.port, &crowd.operations[i], NULL));
    until_they_handle(CROWD);
    dismiss_crowd();
}

static void timers_are_handled_by_a_thread_each(const char *backend) {
    gather_crowd(backend, CROWD);
    for (int i = 0; i < CROWD; i++)
        CHECK_OK(an_port_timer(crowd.port, &crowd.operations[i], SECOND / 50, NULL));
    until_they_handle(CROWD);
    dismiss_crowd();
}

static void receives_are_handled_by_a_thread_each(const char *backend) {
    an_socket *sockets[CROWD];
    int peers[CROWD];
    gather_crowd(backend, CROWD);
    for (int i = 0; i < CROWD; i++) {
        open_pair(crowd.port, &sockets[i], NULL, &peers[i]);
        CHECK_OK(an_socket_recv(sockets[i], &crowd.operations[i], NULL, 10, 0, UINT64_MAX, AN_FOREVER));
    }
    for (int i = 0; i < CROWD; i++)
        CHECK(peer_write(peers[i], "x", 1) == 1);
    until_they_handle(CROWD);
    dismiss_crowd();
    for (int i = 0; i < CROWD; i++) {
        an_socket_free(sockets[i], 0);
        peer_close(peers[i]);
    }
}

static void one_post_wakes_one_thread(const char *backend) {
    gather_crowd(backend, 1);
    an_statistics before = counts();
    CHECK_OK(an_port_post(crowd.port, &crowd.operations[0], NULL));
    until_they_handle(1);
    rest_us(20000); /* for others to wake up in, who must not */
    CHECK(counts().wakeups - before.wakeups <= 1);
    CHECK(counts().waits - before.waits <= 1);
    dismiss_crowd();
}

static void one_thread_looks_after_the_timers(const char *backend) {
    gather_crowd(backend, 1);
    an_statistics before = counts();
    CHECK_OK(an_port_timer(crowd.port, &crowd.operations[0], SECOND / 50, NULL));
    until_they_handle(1);
    rest_us(20000);
    CHECK(counts().wakeups - before.wakeups <= 1);
    CHECK(counts().waits - before.waits <= 2); /* who was told of the timer waits on, for that; a follower leads on */
    dismiss_crowd();
}

int main(void) {
    on_each_backend("posts are handled by a thread each", posts_are_handled_by_a_thread_each);
    on_each_backend("timers are handled by a thread each", timers_are_handled_by_a_thread_each);
    on_each_backend("receives are handled by a thread each", receives_are_handled_by_a_thread_each);
    on_each_backend("one post wakes one thread", one_post_wakes_one_thread);
    on_each_backend("one thread looks after the timers", one_thread_looks_after_the_timers);
    on_each_backend("everything at once", many_dequeue);
    on_each_backend("everything at once, with one thread that dequeues", one_dequeues_as_promised);
    on_each_backend("leaders change without losing a wake-up", leaders_change_without_losing_a_wake_up);
    on_each_backend("a port is watched while a thread waits", a_port_is_watched_while_a_thread_waits);
    on_each_backend("the last completion frees what another thread closes",
                    the_last_completion_frees_what_another_thread_closes);
    return 0;
}
