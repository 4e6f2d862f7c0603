/* echo_epoll.c - a minimal TCP echo server on epoll: what a plain C server costs.
 *
 *     echo_epoll [buffer=262144] [port=0]
 *
 * Each connection is registered once, edge-triggered, for both directions. A receive that came back short has emptied
 * the socket. What a send leaves over waits for room in memory of the connection.
 */
#define _GNU_SOURCE
#include "server.h"

#include <fcntl.h>
#include <sys/epoll.h>

enum { EVENTS = 512 };

static int epoll;
static unsigned char *buffer;
static size_t buffer_size;
static struct bytes rest[CONNECTION_LIMIT]; /* by descriptor */
static uint64_t waits, short_sends;

static void accept_all(int listener) {
    int connection;
    while ((connection = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.fd = connection};
        if (connection >= CONNECTION_LIMIT || epoll_ctl(epoll, EPOLL_CTL_ADD, connection, &event) < 0)
            fail("epoll_ctl");
    }
}

static void end(int connection) {
    bytes_clear(&rest[connection]);
    close(connection);
}

static bool flush_rest(int connection) {
    struct bytes *bytes = &rest[connection];
    ssize_t sent = send_now(connection, bytes->data + bytes->from, bytes->length - bytes->from);
    if (sent < 0)
        return false;
    bytes->from += (size_t)sent;
    if (bytes->from == bytes->length)
        bytes_clear(bytes);
    return true;
}

static bool reply(int connection, size_t length) {
    ssize_t sent = 0;
    if (rest[connection].length == 0)
        sent = send_now(connection, buffer, length);
    if (sent < 0)
        return false;
    if ((size_t)sent < length) {
        bytes_append(&rest[connection], buffer + sent, length - (size_t)sent);
        short_sends++;
    }
    return true;
}

static void serve(int connection, uint32_t events) {
    if (rest[connection].length > 0 && !flush_rest(connection)) {
        end(connection);
        return;
    }
    if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) == 0)
        return;
    bool may_hide_the_end = (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    ssize_t received;
    do {
        received = recv(connection, buffer, buffer_size, 0);
        if (received == 0 || (received < 0 && errno != EAGAIN) ||
            (received > 0 && !reply(connection, (size_t)received))) {
            end(connection);
            return;
        }
    } while (received > 0 && ((size_t)received == buffer_size || may_hide_the_end));
}

int main(int count, char **arguments) {
    (void)count;
    check_options(arguments, (const char *const[]){"buffer", "port", NULL});
    buffer_size = number(arguments, "buffer", 256 * 1024);
    buffer = malloc(buffer_size);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on_loopback(arguments);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.fd = listener}, events[EVENTS];
    if (buffer == NULL || epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event) < 0)
        fail("start");
    if (fcntl(listener, F_SETFL, O_NONBLOCK) < 0) /* edge-triggered accepting runs until EAGAIN */
        fail("fcntl");
    while (!stopping) {
        int found = epoll_wait(epoll, events, EVENTS, -1);
        waits++;
        for (int i = 0; i < found; i++) {
            if (events[i].data.fd == listener)
                accept_all(listener);
            else
                serve(events[i].data.fd, events[i].events);
        }
    }
    printf("{\"waits\": %llu, \"short_sends\": %llu}\n", (unsigned long long)waits, (unsigned long long)short_sends);
    return 0;
}
