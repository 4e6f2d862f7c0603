/* check_posix.h - what check.h needs of POSIX: plain sockets as peers. */
#ifndef CHECK_POSIX_H
#define CHECK_POSIX_H

#include <stdbool.h>
#include <sys/socket.h>
#include <unistd.h>

static inline bool connect_ends(int ends[2]) { return socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0; }

static inline bool peer_connect(int peer, const an_address *address) {
    return connect(peer, (const struct sockaddr *)address->storage, address->length) == 0;
}

static inline long peer_write(int peer, const void *data, size_t length) { return (long)write(peer, data, length); }

static inline long peer_read(int peer, void *data, size_t length) { return (long)read(peer, data, length); }

static inline void peer_close(int peer) { close(peer); }

static inline void rest_us(unsigned microseconds) { usleep(microseconds); }

#endif
