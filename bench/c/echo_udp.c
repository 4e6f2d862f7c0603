/* echo_udp.c - a minimal UDP echo server on epoll: one receive and one send a datagram, which the system asks of everyone.
 *
 *     echo_udp [role=udp] [port=0]
 */
#define _GNU_SOURCE
#include "server.h"

#include <sys/epoll.h>

static int bind_on_loopback(char **arguments) {
    int bound = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)number(arguments, "port", 0))};
    socklen_t length = sizeof address;
    struct sigaction action = {.sa_handler = stop};
    if (sigaction(SIGTERM, &action, NULL) < 0 || bound < 0 || bind(bound, (struct sockaddr *)&address, length) < 0 ||
        getsockname(bound, (struct sockaddr *)&address, &length) < 0)
        fail("bind");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return bound;
}

/* What cannot be sent now is lost, as datagrams may be. */
static uint64_t answer_all(int bound) {
    static unsigned char buffer[65536];
    for (uint64_t answered = 0;; answered++) {
        struct sockaddr_in peer;
        socklen_t length = sizeof peer;
        ssize_t received = recvfrom(bound, buffer, sizeof buffer, 0, (struct sockaddr *)&peer, &length);
        if (received < 0)
            return answered;
        sendto(bound, buffer, (size_t)received, 0, (struct sockaddr *)&peer, length);
    }
}

int main(int count, char **arguments) {
    (void)count;
    check_options(arguments, (const char *const[]){"role", "port", NULL});
    choice(arguments, "role", (const char *const[]){"udp", NULL});
    int epoll = epoll_create1(EPOLL_CLOEXEC), bound = bind_on_loopback(arguments);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    uint64_t waits = 0, receives = 0;
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, bound, &event) < 0)
        fail("start");
    while (!stopping) {
        epoll_wait(epoll, &event, 1, -1);
        waits++;
        receives += answer_all(bound);
    }
    printf("{\"waits\": %llu, \"receives\": %llu}\n", (unsigned long long)waits, (unsigned long long)receives);
    return 0;
}
