/* check_windows.h - what check.h needs of Windows: plain sockets as peers. A SOCKET is a handle, whose numbers are small. */
#ifndef CHECK_WINDOWS_H
#define CHECK_WINDOWS_H

#include <stdbool.h>
#include <winsock2.h>

/* There is no socketpair: two ends of a connection over loopback. */
static inline bool connect_ends(int ends[2]) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int length = sizeof address;
    WSADATA data;
    if (WSAStartup(MAKEWORD(2, 2), &data) != 0)
        return false;
    SOCKET listener = socket(AF_INET, SOCK_STREAM, 0);
    SOCKET client = socket(AF_INET, SOCK_STREAM, 0);
    bool listens = bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 1) == 0 &&
                   getsockname(listener, (struct sockaddr *)&address, &length) == 0;
    bool connected = listens && connect(client, (struct sockaddr *)&address, sizeof address) == 0;
    SOCKET server = connected ? accept(listener, NULL, NULL) : INVALID_SOCKET;
    BOOL yes = TRUE; /* two small sends in a row must not wait for each other */
    setsockopt(server, IPPROTO_TCP, TCP_NODELAY, (char *)&yes, sizeof yes);
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, (char *)&yes, sizeof yes);
    closesocket(listener);
    ends[0] = (int)server;
    ends[1] = (int)client;
    return server != INVALID_SOCKET;
}

static inline bool peer_connect(int peer, const an_address *address) {
    return connect((SOCKET)peer, (const struct sockaddr *)address->storage, (int)address->length) == 0;
}

static inline long peer_write(int peer, const void *data, size_t length) {
    return send((SOCKET)peer, data, (int)length, 0);
}

static inline long peer_read(int peer, void *data, size_t length) { return recv((SOCKET)peer, data, (int)length, 0); }

static inline void peer_close(int peer) { closesocket((SOCKET)peer); }

static inline void rest_us(unsigned microseconds) { Sleep(microseconds / 1000 + 1); }

#endif
