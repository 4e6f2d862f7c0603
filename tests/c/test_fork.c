/* What the parent closes ends for its peer although a forked child has a copy: also when the fork is under way in another
 * thread just then. Both moments are met in one thread here, by a handler of fork(2) and by a socket(2) of our own. */
#include "check.h"
#include "os.h"

#include <dlfcn.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

static an_socket *closed_at_fork; /* NULL: none */
static bool forks_at_socket;
static pid_t child;

/* The library's own handlers were installed later, and run behind this one. */
static void close_in_parent(void) {
    if (closed_at_fork != NULL)
        CHECK_OK(an_socket_close(closed_at_fork, 0));
}

static void fork_child(void) {
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(60);
        for (;;)
            pause();
    }
}

static void end_child(void) {
    CHECK(kill(child, SIGKILL) == 0);
    CHECK(waitpid(child, NULL, 0) == child);
}

/* In the place of the system's. */
int socket(int family, int type, int protocol) {
    int (*systems)(int, int, int);
    *(void **)&systems = dlsym(RTLD_NEXT, "socket");
    int descriptor = systems(family, type, protocol);
    if (forks_at_socket)
        fork_child();
    forks_at_socket = false;
    return descriptor;
}

/* A connection of the port; the other end is a plain descriptor. */
static an_socket *connect_socket(an_port *port, int *peer, bool forks) {
    an_socket *client;
    an_address address;
    an_operation accept, connect;
    an_socket *listener = open_listener(port, &address);
    forks_at_socket = forks;
    CHECK_OK(an_socket_open(&client, AF_INET, SOCK_STREAM, 0));
    CHECK_OK(an_port_associate(port, client, NULL));
    CHECK_OK(an_socket_accept(listener, &accept, 0, AN_FOREVER));
    CHECK_OK(an_socket_connect(client, &connect, &address, AN_FOREVER));
    for (int i = 0; i < 2; i++) {
        an_completion completion = dequeue_one(port);
        an_descriptor descriptor;
        CHECK(completion.error == 0);
        if (completion.accepted != NULL) {
            CHECK_OK(an_socket_detach(completion.accepted, &descriptor));
            an_socket_free(completion.accepted, 0);
            *peer = (int)descriptor;
        }
        an_completion_release(&completion, 1);
    }
    an_socket_free(listener, 0);
    return client;
}

static void check_end(int peer) {
    char byte;
    struct pollfd end = {.fd = peer, .events = POLLIN};
    CHECK(poll(&end, 1, 10000) == 1);
    CHECK(read(peer, &byte, 1) == 0);
    close(peer);
}

static void a_connection_that_is_closed_while_a_fork_returns_ends(const char *backend) {
    int peer;
    if (strcmp(backend, "kqueue") == 0)
        return; /* its stand-in keeps its lock over a fork, in this same thread: the close would wait for ever */
    an_port *port = open_port(backend);
    closed_at_fork = connect_socket(port, &peer, false);
    fork_child();
    check_end(peer);
    end_child();
    an_socket_free(closed_at_fork, 0);
    closed_at_fork = NULL;
    an_port_free(port);
}

static void a_connection_whose_socket_was_copied_as_soon_as_it_was_there_ends(const char *backend) {
    int peer;
    an_port *port = open_port(backend);
    an_socket *client = connect_socket(port, &peer, true);
    an_socket_free(client, 0);
    check_end(peer);
    end_child();
    an_port_free(port);
}

int main(void) {
    CHECK(pthread_atfork(NULL, close_in_parent, NULL) == 0);
    on_each_backend("a connection that is closed while a fork returns ends",
                    a_connection_that_is_closed_while_a_fork_returns_ends);
    on_each_backend("a connection whose socket was copied as soon as it was there ends",
                    a_connection_whose_socket_was_copied_as_soon_as_it_was_there_ends);
    return 0;
}
