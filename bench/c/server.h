/* server.h - what the benchmark servers share: options, the listener, bytes that wait for room, the report at the end.
 *
 * A server prints its port on a line, serves until SIGTERM, and prints what it counted as one line of JSON.
 */
#ifndef BENCH_SERVER_H
#define BENCH_SERVER_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CONNECTION_LIMIT = 65536, BACKLOG = 4096 };

static volatile sig_atomic_t stopping;

static inline void fail(const char *what) {
    perror(what);
    exit(1);
}

/* The value of an argument name=value, or the default. */
static inline const char *option(char **arguments, const char *name, const char *otherwise) {
    size_t length = strlen(name);
    for (char **argument = arguments + 1; *argument != NULL; argument++)
        if (strncmp(*argument, name, length) == 0 && (*argument)[length] == '=')
            return *argument + length + 1;
    return otherwise;
}

static inline unsigned number(char **arguments, const char *name, unsigned otherwise) {
    const char *value = option(arguments, name, NULL);
    return value == NULL ? otherwise : (unsigned)strtoul(value, NULL, 10);
}

/* The index of an option's value among the names, the last of which is NULL; the first name is the default. A value
 * that is not among them ends the program. */
static inline int choice(char **arguments, const char *name, const char *const *names) {
    const char *value = option(arguments, name, names[0]);
    for (int i = 0; names[i] != NULL; i++)
        if (strcmp(names[i], value) == 0)
            return i;
    fprintf(stderr, "%s=%s is not known\n", name, value);
    exit(2);
}

/* A misspelt option must not measure the default. */
static inline void check_options(char **arguments, const char *const *known) {
    for (char **argument = arguments + 1; *argument != NULL; argument++) {
        const char *const *name = known;
        while (*name != NULL && !(strncmp(*argument, *name, strlen(*name)) == 0 && (*argument)[strlen(*name)] == '='))
            name++;
        if (*name == NULL) {
            fprintf(stderr, "%s is not known\n", *argument);
            exit(2);
        }
    }
}

static inline void stop(int signal_number) {
    (void)signal_number;
    stopping = 1;
}

/* On the port of the option port=, which several servers may share, or on one that is free. Accepted connections inherit
 * TCP_NODELAY, so none needs a call of its own. */
static inline int listen_on_loopback(char **arguments) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)number(arguments, "port", 0))};
    socklen_t length = sizeof address;
    struct sigaction action = {.sa_handler = stop};
    if (sigaction(SIGTERM, &action, NULL) < 0 || listener < 0 ||
        setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0 ||
        setsockopt(listener, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one) < 0 ||
        bind(listener, (struct sockaddr *)&address, length) < 0 || listen(listener, BACKLOG) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &length) < 0)
        fail("listen");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

/* Bytes that the socket did not take yet. */
struct bytes {
    unsigned char *data;
    size_t from, length, capacity;
};

static inline void bytes_append(struct bytes *bytes, const void *data, size_t length) {
    if (bytes->length + length > bytes->capacity) {
        bytes->capacity = 2 * (bytes->length + length);
        bytes->data = realloc(bytes->data, bytes->capacity);
        if (bytes->data == NULL)
            fail("realloc");
    }
    memcpy(bytes->data + bytes->length, data, length);
    bytes->length += length;
}

static inline void bytes_clear(struct bytes *bytes) { bytes->from = bytes->length = 0; }

/* Sends without blocking; returns what was taken, or the negative error. */
static inline ssize_t send_now(int descriptor, const void *data, size_t length) {
    ssize_t sent = send(descriptor, data, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0)
        return sent;
    return errno == EAGAIN || errno == EINTR ? 0 : -errno;
}

#endif
