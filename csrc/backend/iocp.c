/* iocp.c - the backend on Windows' I/O completion ports, the proactor that this library is modelled on.
 *
 * What it asks the system for, one request in each direction of a socket (struct request):
 *   - receiving: a receive of no bytes on streams, one that only looks (MSG_PEEK) on datagram sockets, AcceptEx on
 *     listeners. It completes when something is there, which calls that do not block then take (perform.c), straight into
 *     lent memory or the user's buffer; so an idle connection ties no memory, and a cancelled receive has lost nothing;
 *   - sending: what the system has no room for now, as a WSASend or WSASendTo of a copied piece; TransmitFile; ConnectEx.
 * So user's memory is never in the kernel's hands, and cancelling and closing need not wait for it. What the kernel writes
 * to, the OVERLAPPED and what stands beside it, lives in struct an_overlapped, which each pending request keeps by a
 * reference on its socket until its packet was dequeued.
 *
 *   request:   none ---begun, socket held---> PENDING ---packet dequeued---> none
 *                        |                       |
 *   done at once, and no packet will come        +--its operation has ended: WITHDRAWN until its packet
 *
 * A piece of a send that the kernel has is not cancelled: how much of it went out could not be told then. It counts as
 * handed over, as what stands in a socket's buffer does; a socket that is closed meanwhile lingers until the piece has gone
 * out, as the kernel's end of it does on POSIX, but not for ever.
 *
 * A request is begun and its packet worked on under the socket's lock, so that another thread that dequeues the packet
 * before the beginning call has returned waits for it. Any thread begins requests. Those that dequeue wait in the kernel
 * together, each for packets of its own, which they work on in turns ("leader" below: whose turn it is).
 * Sources: Microsoft's documentation of the calls named.
 */
#if defined(_WIN32)

#include "backend/iocp.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include <ws2tcpip.h>

#include <mswsock.h>

#include "perform.h"

enum {
    ENTRIES = 256,         /* packets worked on in one pass */
    PIECE_MOST = 64 << 10, /* bytes of a send in the kernel's hands: a copy of that size for each slow reader */
    FILE_MOST = 256 << 10, /* bytes of a file likewise: `transferred` is counted by it, no memory is tied */
    ADDRESS_ROOM = sizeof(struct sockaddr_storage) + 16 /* AcceptEx: 16 bytes more than the address */
};

enum packet_key { KEY_SOCKET = 0, KEY_WAKE = 1 };

/* Under socket.lock; `overlapped` is the kernel's while pending. */
struct request {
    OVERLAPPED overlapped; /* first: a packet tells its address */
    an_socket *socket;     /* a reference while pending */
    bool pending;
    bool withdrawn; /* its operation has ended already */
    bool handed;    /* a send: the kernel has a piece of it, which counts as gone */
    bool file;      /* TransmitFile of `bytes` */
    DWORD bytes;    /* of the file, or of the piece */
    DWORD done;     /* of the piece, by requests before this one */
};

/* What came of a request. */
struct outcome {
    int error;
    DWORD bytes;
};

/* What AcceptEx needs; made for a listener's first one. */
struct acceptance {
    LPFN_ACCEPTEX accept;
    an_descriptor descriptor; /* the connection to be, or one that waits for an operation; else -1 */
    bool arrived;             /* the latter */
    char addresses[2 * ADDRESS_ROOM];
};

/* A socket's own memory; under socket.lock, what a pending request uses is the kernel's. */
struct an_overlapped {
    struct request receive;
    struct request transmit;
    struct acceptance *acceptance;
    char *piece;                   /* what is being sent */
    an_descriptor file;            /* likewise, of an operation that has ended; else -1 */
    an_descriptor lingering;       /* of a closed socket, until its last piece went out; else -1 */
    int64_t lingers_until_ns;      /* backend.lock */
    an_socket *lingering_next;     /* backend.lock */
    an_socket *lingering_previous; /* backend.lock */
    int32_t error;                 /* came instead of data or a connection, not told yet */
    bool skips_done;               /* a request that is done at once makes no packet */
};

struct an_backend {
    an_port *port;
    HANDLE native;
    uint32_t outstanding;         /* atomic: requests pending */
    struct an_mutex lock;         /* after a socket's, never with the port's */
    an_socket *lingering;         /* lock: closed sockets whose last piece is on its way; the request holds them */
    int64_t linger_due_ns;        /* lock: none of them ends its lingering before */
    struct an_timer linger_timer; /* port.lock: has a thread look then */
};

/* What one call took out of the completion port. */
struct packets {
    ULONG count;
    uint32_t wakes; /* of them */
    OVERLAPPED_ENTRY entries[ENTRIES];
};

static SOCKET native(const an_socket *socket) { return (SOCKET)socket->descriptor; }

/* ---- requests: socket.lock held ------------------------------------------------------------------------------------------ */

static void begin(an_socket *socket, struct request *request) {
    assert(!request->pending);
    memset(&request->overlapped, 0, sizeof request->overlapped);
    request->socket = socket;
    request->pending = true;
    an_socket_hold(socket);
    an_atomic_add32(&socket->port->backend->outstanding, 1);
}

/* Its packet was dequeued, or none will come. Who holds the lock holds a reference of his own. */
static void end(an_socket *socket, struct request *request) {
    request->pending = false;
    an_atomic_add32(&socket->port->backend->outstanding, (uint32_t)-1);
    an_socket_drop(socket);
}

/* The beginning call has returned. True: the request is over already, and no packet will come. */
static bool is_over(an_socket *socket, struct request *request, bool succeeded, struct outcome *outcome) {
    outcome->error = succeeded ? 0 : WSAGetLastError();
    if (outcome->error == WSA_IO_PENDING || (succeeded && !socket->overlapped->skips_done))
        return false;
    if (succeeded)
        outcome->bytes = (DWORD)request->overlapped.InternalHigh;
    end(socket, request);
    return true;
}

/* A request that could not even begin is over. */
static bool refuse(struct outcome *outcome, int error) {
    outcome->error = error;
    return true;
}

static struct outcome outcome_of(an_socket *socket, struct request *request) {
    struct outcome outcome = {0};
    DWORD flags = 0;
    if (!WSAGetOverlappedResult(native(socket), &request->overlapped, &outcome.bytes, FALSE, &flags))
        outcome.error = WSAGetLastError();
    return outcome;
}

static int find_function(an_socket *socket, GUID name, void *function, DWORD size) {
    DWORD used;
    int failed = WSAIoctl(native(socket), SIO_GET_EXTENSION_FUNCTION_POINTER, &name, sizeof name, function, size, &used,
                          NULL, NULL);
    return failed != 0 ? WSAGetLastError() : 0;
}

/* ---- accepting -------------------------------------------------------------------------------------------------------------- */

static void free_acceptance(struct an_overlapped *overlapped) {
    struct acceptance *acceptance = overlapped->acceptance;
    if (acceptance == NULL)
        return;
    if (acceptance->descriptor != -1)
        an_os_close(acceptance->descriptor);
    free(acceptance);
    overlapped->acceptance = NULL;
}

static int make_acceptance(an_socket *socket) {
    static const GUID name = WSAID_ACCEPTEX;
    struct an_overlapped *overlapped = socket->overlapped;
    if (overlapped->acceptance != NULL)
        return 0;
    overlapped->acceptance = calloc(1, sizeof *overlapped->acceptance);
    if (overlapped->acceptance == NULL)
        return AN_ENOMEM;
    overlapped->acceptance->descriptor = -1;
    int error = find_function(socket, name, &overlapped->acceptance->accept, sizeof overlapped->acceptance->accept);
    if (error != 0)
        free_acceptance(overlapped);
    return error;
}

/* AcceptEx on a socket that does not listen may wait for ever. */
static bool listens(const an_socket *socket) {
    bool listening = socket->listening;
    return listening || (an_os_is_listening(socket->descriptor, &listening) == 0 && listening);
}

static bool begin_accept(an_socket *socket, struct request *request, struct outcome *outcome) {
    int error = listens(socket) ? make_acceptance(socket) : AN_EINVAL;
    if (error != 0)
        return refuse(outcome, error);
    struct acceptance *acceptance = socket->overlapped->acceptance;
    error = an_os_open(socket->family, socket->type, socket->protocol, &acceptance->descriptor);
    if (error != 0)
        return refuse(outcome, error);
    DWORD unused;
    begin(socket, request);
    BOOL succeeded = acceptance->accept(native(socket), (SOCKET)acceptance->descriptor, acceptance->addresses, 0,
                                        ADDRESS_ROOM, ADDRESS_ROOM, &unused, &request->overlapped);
    return is_over(socket, request, succeeded, outcome);
}

/* Without it the connection knows neither its addresses nor shutdown. False where the peer has gone already. */
static bool adopt_connection(an_socket *listener, an_descriptor descriptor) {
    SOCKET context = native(listener);
    return an_os_set_option(descriptor, SOL_SOCKET, SO_UPDATE_ACCEPT_CONTEXT, &context, sizeof context) == 0;
}

static void accept_ended(an_socket *socket, int error) {
    struct acceptance *acceptance = socket->overlapped->acceptance;
    acceptance->arrived = error == 0 && adopt_connection(socket, acceptance->descriptor);
    if (acceptance->arrived)
        return;
    an_os_close(acceptance->descriptor);
    acceptance->descriptor = -1;
    error = an_os_accept_error(socket->descriptor, error);
    if (error != 0 && !an_os_accept_is_transient(error) && error != WSA_OPERATION_ABORTED)
        socket->overlapped->error = error;
}

/* ---- receiving: socket.lock held -------------------------------------------------------------------------------------------- */

static bool begin_receive(an_socket *socket, struct request *request, struct outcome *outcome) {
    static char nowhere;
    WSABUF nothing = {.len = 0, .buf = &nowhere};
    DWORD flags = an_os_is_datagram(socket->type) ? MSG_PEEK : 0;
    begin(socket, request);
    bool succeeded = WSARecv(native(socket), &nothing, 1, NULL, &flags, &request->overlapped, NULL) == 0;
    return is_over(socket, request, succeeded, outcome);
}

/* Errors after which a call of our own tells what there is: a datagram longer than nothing, an end that we made, a request
 * that was cancelled because we shut that side, or because its thread has ended (as some systems do). */
static bool is_worth_a_look(int error) {
    return error == 0 || error == WSAEMSGSIZE || error == WSAESHUTDOWN || error == WSA_OPERATION_ABORTED;
}

static void receive_ended(an_socket *socket, int error) {
    if (is_worth_a_look(error))
        return;
    bool answer = an_os_is_datagram(socket->type) && (error == WSAECONNRESET || error == WSAENETRESET);
    socket->overlapped->error = answer ? AN_ECONNREFUSED : error; /* as os.h tells it */
}

/* The request is over: what there is can be taken. */
static void receiving_ended(an_socket *socket, int error) {
    struct acceptance *acceptance = socket->overlapped->acceptance;
    socket->receive.ready = true;
    if (acceptance != NULL && acceptance->descriptor != -1 && !acceptance->arrived)
        accept_ended(socket, error);
    else if (socket->listening)
        socket->overlapped->error = error; /* AcceptEx could not be begun */
    else
        receive_ended(socket, error);
}

static void await_receive(an_socket *socket) {
    struct request *request = &socket->overlapped->receive;
    struct outcome outcome = {0};
    if (request->pending)
        return;
    bool over = socket->receive.head->record.kind == AN_ACCEPT ? begin_accept(socket, request, &outcome)
                                                               : begin_receive(socket, request, &outcome);
    if (!over)
        return;
    receiving_ended(socket, outcome.error);
    an_port_make_ready(socket->port, socket);
}

/* The first receive, if it may take something now. */
static struct operation *taker(an_socket *socket) {
    struct operation *operation = socket->state == SOCKET_OPEN ? socket->receive.head : NULL;
    return operation != NULL && !an_perform_stands_still(socket, operation) ? operation : NULL;
}

static void hand_accepted(an_socket *socket, struct operation *operation) {
    struct acceptance *acceptance = socket->overlapped->acceptance;
    struct an_block *block = an_pool_offer(&socket->port->pool, true, 0);
    an_socket *accepted = an_socket_create(acceptance->descriptor, socket->family, socket->type, socket->protocol);
    if (block == NULL || accepted == NULL) {
        if (accepted != NULL) {
            accepted->state = SOCKET_CLOSED;
            an_socket_drop(accepted);
        }
        an_perform_accept_failed(socket, operation, AN_ENOMEM); /* a timer looks again */
        return;
    }
    acceptance->descriptor = -1;
    acceptance->arrived = false;
    if (an_os_peer_address(accepted->descriptor, an_block_address(block)) != 0)
        an_block_address(block)->length = 0; /* reset meanwhile: it has no peer any more */
    an_perform_accepted(socket, operation, block, accepted);
}

static void tell_error(an_socket *socket, struct operation *operation) {
    int error = socket->overlapped->error;
    socket->overlapped->error = 0;
    if (operation->record.kind == AN_ACCEPT)
        an_perform_accept_failed(socket, operation, error);
    else
        an_perform_receive_failed(socket, operation, error);
}

/* Leader. */
static void receive(an_socket *socket) {
    struct an_overlapped *overlapped = socket->overlapped;
    struct operation *operation = taker(socket);
    bool arrived = overlapped->acceptance != NULL && overlapped->acceptance->arrived;
    if (operation != NULL && arrived && operation->record.kind == AN_ACCEPT)
        hand_accepted(socket, operation);
    else if (operation != NULL && overlapped->error != 0)
        tell_error(socket, operation);
    if (socket->state == SOCKET_OPEN)
        an_perform_receive(socket);
}

/* ---- sending: socket.lock held ----------------------------------------------------------------------------------------------- */

static void free_piece(struct an_overlapped *overlapped) {
    free(overlapped->piece);
    overlapped->piece = NULL;
    if (overlapped->file != -1)
        an_os_close_file(overlapped->file);
    overlapped->file = -1;
}

/* Has the system send what did not go out yet of the piece. */
static bool begin_piece(an_socket *socket, struct request *request, const an_address *address,
                        struct outcome *outcome) {
    WSABUF buffer = {.len = request->bytes - request->done, .buf = socket->overlapped->piece + request->done};
    begin(socket, request);
    int failed = address != NULL
                     ? WSASendTo(native(socket), &buffer, 1, NULL, 0, (const struct sockaddr *)address->storage,
                                 (int)address->length, &request->overlapped, NULL)
                     : WSASend(native(socket), &buffer, 1, NULL, 0, &request->overlapped, NULL);
    return is_over(socket, request, failed == 0, outcome);
}

static bool begin_send(an_socket *socket, struct request *request, struct operation *operation,
                       struct outcome *outcome) {
    bool addressed = operation->record.kind == AN_SENDTO;
    uint64_t remaining = an_operation_remaining(operation);
    bool cut = an_os_is_stream(socket->type) && remaining > PIECE_MOST;
    size_t length = cut ? PIECE_MOST : (size_t)remaining;
    char *piece = malloc(length + 1); /* an empty datagram has an address, too */
    if (piece == NULL) {
        an_perform_retry_transmit(socket);
        return false;
    }
    socket->overlapped->piece = piece;
    request->bytes = (DWORD)an_perform_copy(operation, piece, length);
    bool over = begin_piece(socket, request, addressed ? operation->to.address : NULL, outcome);
    request->handed = !over || outcome->error == 0;
    if (request->handed)
        an_perform_sent(socket, operation, length);
    return over;
}

static bool begin_file(an_socket *socket, struct request *request, struct operation *operation,
                       struct outcome *outcome) {
    static const GUID name = WSAID_TRANSMITFILE;
    LPFN_TRANSMITFILE transmit_file;
    LARGE_INTEGER size;
    uint64_t offset = operation->to.offset + operation->record.transferred;
    int error = find_function(socket, name, &transmit_file, sizeof transmit_file);
    if (error == 0 && !GetFileSizeEx((HANDLE)operation->at.descriptor, &size))
        error = (int)GetLastError();
    if (error != 0)
        return refuse(outcome, error);
    uint64_t there = offset < (uint64_t)size.QuadPart ? (uint64_t)size.QuadPart - offset : 0;
    uint64_t length = an_operation_remaining(operation) < there ? an_operation_remaining(operation) : there;
    if (length == 0) /* cut off since it was looked at; a length of 0 would mean all there is */
        return refuse(outcome, 0);
    begin(socket, request);
    request->file = true;
    request->overlapped.Offset = (DWORD)offset;
    request->overlapped.OffsetHigh = (DWORD)(offset >> 32);
    request->bytes = length < FILE_MOST ? (DWORD)length : FILE_MOST;
    BOOL succeeded = transmit_file(native(socket), (HANDLE)operation->at.descriptor, request->bytes, 0,
                                   &request->overlapped, NULL, 0);
    return is_over(socket, request, succeeded, outcome);
}

/* ConnectEx wants a socket that is bound. */
static int bind_anywhere(an_socket *socket) {
    an_address address;
    if (an_os_local_address(socket->descriptor, &address) == 0)
        return 0;
    int error = an_os_address_ip(&address, socket->family, socket->family == AF_INET ? "0.0.0.0" : "::", 0, 0, 0);
    return error != 0 ? error : an_os_bind(socket->descriptor, &address);
}

static bool begin_connect(an_socket *socket, struct request *request, struct operation *operation,
                          struct outcome *outcome) {
    static const GUID name = WSAID_CONNECTEX;
    LPFN_CONNECTEX connect_overlapped;
    const an_address *address = operation->to.address;
    if (!an_os_is_internet(socket->family)) { /* under way by connect, of which nothing tells: looked at by a timer */
        an_perform_retry_transmit(socket);
        return false;
    }
    int error = find_function(socket, name, &connect_overlapped, sizeof connect_overlapped);
    if (error == 0)
        error = bind_anywhere(socket);
    if (error != 0)
        return refuse(outcome, error);
    begin(socket, request);
    BOOL succeeded = connect_overlapped(native(socket), (const struct sockaddr *)address->storage, (int)address->length,
                                        NULL, 0, NULL, &request->overlapped);
    return is_over(socket, request, succeeded, outcome);
}

static void connect_ended(an_socket *socket, struct operation *operation, int error) {
    if (error == WSA_OPERATION_ABORTED) /* not by us: its thread has ended; it is begun again */
        return;
    if (error == 0) /* without it the socket knows neither its addresses nor shutdown */
        error = an_os_set_option(socket->descriptor, SOL_SOCKET, SO_UPDATE_CONNECT_CONTEXT, NULL, 0);
    an_perform_connected(socket, operation, error);
}

/* A stream's send may be done before its last byte: on a socket that does not block, says WSASend's documentation; Wine 8
 * ends one so when the peer has shut down its side. The rest is sent then, so the way must still be open: a disconnect waits
 * for the piece (under_way). */
static bool is_short(const an_socket *socket, const struct request *request, struct outcome outcome) {
    bool piece = request->handed && an_os_is_stream(socket->type);
    return piece && outcome.error == 0 && outcome.bytes < request->bytes - request->done;
}

/* The request is over. Its operation stands where it was; but a send that was handed over has gone on, and a failure is
 * told to what stands behind it. */
static void transmitting_ended(an_socket *socket, struct request *request, struct outcome outcome) {
    struct operation *operation = socket->transmit.head;
    if (is_short(socket, request, outcome))
        outcome.error = AN_EPIPE;
    if (request->file && outcome.error == WSAENOTCONN) /* so TransmitFile tells of a connection that was reset before */
        outcome.error = AN_EPIPE;
    free_piece(socket->overlapped);
    socket->transmit.ready = true;
    socket->transmit.under_way = false;
    bool lost = request->handed && an_os_is_datagram(socket->type); /* as datagrams may be */
    bool torn = request->handed && !lost && outcome.error != 0;
    if (torn)
        socket->broken = true; /* what counted as gone has not gone */
    if (request->withdrawn || lost || operation == NULL)
        return;
    if (torn && outcome.error == WSA_OPERATION_ABORTED)
        outcome.error = AN_EPIPE;
    if (operation->record.kind == AN_CONNECT)
        connect_ended(socket, operation, outcome.error);
    else if (request->file && outcome.error == 0)
        an_perform_sent(socket, operation, outcome.bytes);
    else if (request->file)
        an_perform_count(socket, operation, outcome.bytes);
    if (outcome.error != 0 && outcome.error != WSA_OPERATION_ABORTED && operation == socket->transmit.head)
        an_perform_send_failed(socket, outcome.error);
}

static bool begin_transmit(an_socket *socket, struct request *request, struct outcome *outcome) {
    struct operation *operation = socket->transmit.head;
    switch (operation->record.kind) {
    case AN_CONNECT:
        return begin_connect(socket, request, operation, outcome);
    case AN_SENDFILE:
        return begin_file(socket, request, operation, outcome);
    default:
        return begin_send(socket, request, operation, outcome);
    }
}

static void await_transmit(an_socket *socket) {
    struct request *request = &socket->overlapped->transmit;
    struct outcome outcome = {0};
    if (request->pending || socket->transmit.retry_ns != AN_NEVER)
        return;
    request->withdrawn = request->handed = request->file = false; /* what the last one was */
    request->bytes = request->done = 0;
    if (!begin_transmit(socket, request, &outcome)) {
        socket->transmit.under_way = request->handed || request->file;
        return;
    }
    transmitting_ended(socket, request, outcome);
    an_port_make_ready(socket->port, socket);
}

/* ---- lingering ------------------------------------------------------------------------------------------------------------------ */

static void start_lingering(struct an_backend *backend, an_socket *socket) {
    struct an_overlapped *overlapped = socket->overlapped;
    int64_t due_ns = overlapped->lingers_until_ns;
    an_mutex_lock(&backend->lock);
    bool earliest = due_ns < backend->linger_due_ns; /* the first, as all linger for the same time */
    overlapped->lingering_previous = NULL;
    overlapped->lingering_next = backend->lingering;
    if (backend->lingering != NULL)
        backend->lingering->overlapped->lingering_previous = socket;
    if (earliest)
        backend->linger_due_ns = due_ns;
    backend->lingering = socket;
    an_mutex_unlock(&backend->lock);
    if (earliest)
        an_port_set_timer(backend->port, &backend->linger_timer, due_ns);
}

static void stop_lingering(struct an_backend *backend, an_socket *socket) {
    an_mutex_lock(&backend->lock);
    an_socket *next = socket->overlapped->lingering_next, *previous = socket->overlapped->lingering_previous;
    if (next != NULL)
        next->overlapped->lingering_previous = previous;
    if (previous != NULL)
        previous->overlapped->lingering_next = next;
    else
        backend->lingering = next;
    an_mutex_unlock(&backend->lock);
}

static bool wants_reset(an_descriptor descriptor) {
    LINGER linger = {0};
    size_t length = sizeof linger;
    int error = an_os_get_option(descriptor, SOL_SOCKET, SO_LINGER, &linger, &length);
    return error == 0 && linger.l_onoff != 0 && linger.l_linger == 0;
}

/* The peer gets the piece, and the end behind it. */
static void linger(struct an_backend *backend, an_socket *socket) {
    const int64_t longest_ns = INT64_C(10000000000); /* a peer that reads at all has read a piece by then */
    struct an_overlapped *overlapped = socket->overlapped;
    shutdown(native(socket), SD_SEND);
    overlapped->lingering = socket->descriptor;
    overlapped->lingers_until_ns = an_clock() + longest_ns;
    start_lingering(backend, socket);
}

/* Ends the lingering of those whose time has come: their packets follow. */
static void end_lingering(struct an_backend *backend, int64_t now_ns) {
    an_mutex_lock(&backend->lock);
    bool due = backend->linger_due_ns <= now_ns;
    int64_t next_ns = due ? AN_NEVER : backend->linger_due_ns;
    for (an_socket *socket = due ? backend->lingering : NULL; socket != NULL;) {
        struct an_overlapped *overlapped = socket->overlapped;
        if (overlapped->lingers_until_ns <= now_ns) {
            overlapped->lingers_until_ns = AN_NEVER;
            CancelIoEx((HANDLE)overlapped->lingering, NULL);
        } else if (overlapped->lingers_until_ns < next_ns) {
            next_ns = overlapped->lingers_until_ns;
        }
        socket = overlapped->lingering_next;
    }
    backend->linger_due_ns = next_ns;
    an_mutex_unlock(&backend->lock);
    if (due && next_ns != AN_NEVER)
        an_port_set_timer(backend->port, &backend->linger_timer, next_ns);
}

/* Leader. */
static void look_after_lingering(struct an_backend *backend) {
    if (an_atomic_load_pointer((void *const *)&backend->lingering) != NULL)
        end_lingering(backend, an_clock());
}

/* Its socket was closed: what the kernel may have written to can go. */
static void clear_away(an_socket *socket, struct request *request) {
    struct an_overlapped *overlapped = socket->overlapped;
    if (request == &overlapped->receive) {
        free_acceptance(overlapped);
        return;
    }
    free_piece(overlapped);
    if (overlapped->lingering == -1)
        return;
    stop_lingering(socket->port->backend, socket);
    an_os_end_politely(overlapped->lingering); /* what came meanwhile must not reset the connection */
    an_os_close(overlapped->lingering);
    overlapped->lingering = -1;
}

/* ---- working on packets: leader ------------------------------------------------------------------------------------------------- */

static void receive_packet(an_socket *socket, struct request *request) {
    receiving_ended(socket, outcome_of(socket, request).error);
    receive(socket);
}

static void transmit_packet(an_socket *socket, struct request *request) {
    struct outcome outcome = outcome_of(socket, request);
    if (is_short(socket, request, outcome)) {
        request->done += outcome.bytes;
        if (!begin_piece(socket, request, NULL, &outcome))
            return;
    }
    transmitting_ended(socket, request, outcome);
    an_perform_transmit(socket);
}

static void work_on(const OVERLAPPED_ENTRY *entry) {
    struct request *request = (struct request *)entry->lpOverlapped;
    an_socket *socket = request->socket;
    an_socket_hold(socket);
    an_mutex_lock(&socket->lock);
    if (!HasOverlappedIoCompleted(&request->overlapped)) { /* Wine, if the thread that began the request has ended */
        request->overlapped.Internal = entry->Internal;
        request->overlapped.InternalHigh = entry->dwNumberOfBytesTransferred;
    }
    end(socket, request);
    if (socket->state == SOCKET_CLOSED)
        clear_away(socket, request);
    else if (request == &socket->overlapped->receive)
        receive_packet(socket, request);
    else
        transmit_packet(socket, request);
    an_mutex_unlock(&socket->lock);
    an_socket_drop(socket);
}

static void work_on_all(const struct packets *packets) {
    for (ULONG i = 0; i < packets->count; i++) {
        if (packets->entries[i].lpCompletionKey == KEY_SOCKET)
            work_on(&packets->entries[i]);
    }
}

static void work_on_ready(an_port *port, an_socket *first) {
    an_socket *socket, *next;
    for (socket = first; socket != NULL && port->pass_bytes < AN_PASS_BYTES; socket = next) {
        next = socket->pass_next;
        an_mutex_lock(&socket->lock);
        if (socket->receive.starved)
            socket->receive.retry_ns = AN_NEVER; /* a descriptor may be free now */
        if (socket->state != SOCKET_CLOSED && socket->transmit.head != NULL)
            an_perform_transmit(socket);
        if (socket->state == SOCKET_OPEN)
            receive(socket);
        an_mutex_unlock(&socket->lock);
        an_socket_drop(socket);
    }
    if (socket != NULL)
        an_port_return_ready(port, socket);
}

/* ---- the interface, in the header's order ---------------------------------------------------------------------------------------- */

/* A completion port holds packets back while as many threads run as its ConcurrentThreads says, by default one for each
 * processor: threads that compute would keep the others waiting beside packets, and the one that closes the port beside the
 * only one that dequeues. How many threads dequeue is the user's choice, so it holds nothing back. */
static HANDLE make_completion_port(void) {
    const DWORD unlimited = MAXDWORD;
    return CreateIoCompletionPort(INVALID_HANDLE_VALUE, NULL, 0, unlimited);
}

static int iocp_open(struct an_backend **opened, an_port *port, const void *detail) {
    (void)detail;
    struct an_backend *backend = calloc(1, sizeof *backend);
    if (backend == NULL || !an_timers_reserve(&port->timers)) {
        free(backend);
        return AN_ENOMEM;
    }
    backend->port = port;
    an_mutex_init(&backend->lock);
    backend->linger_due_ns = AN_NEVER;
    backend->linger_timer.kind = TIMER_OF_BACKEND;
    backend->native = make_completion_port();
    if (backend->native == NULL) {
        int error = (int)GetLastError();
        an_timers_unreserve(&port->timers);
        free(backend);
        return error;
    }
    if ((port->flags & AN_PORT_INTERRUPTIBLE) != 0)
        an_os_listen_to_console();
    *opened = backend;
    return 0;
}

/* Returns 0, or AN_EINTR where the thread is to be interrupted: by Ctrl-C or another's APC. */
static int dequeue(struct an_backend *backend, DWORD milliseconds, bool interruptible, struct packets *packets) {
    ULONG count;
    packets->count = 0; /* where the call fails; it may write a count all the same */
    packets->wakes = 0;
    if (!GetQueuedCompletionStatusEx(backend->native, packets->entries, ENTRIES, &count, milliseconds, interruptible)) {
        DWORD error = GetLastError();
        if (error == WAIT_IO_COMPLETION)
            return AN_EINTR;
        return error == WAIT_TIMEOUT ? 0 : (int)error;
    }
    packets->count = count;
    for (ULONG i = 0; i < count; i++)
        packets->wakes += packets->entries[i].lpCompletionKey == KEY_WAKE;
    return 0;
}

/* The sockets were closed, which cancels their requests. Where a driver holds one for longer, its memory and the port stay
 * with it: both are leaked, as the kernel may still write to them. */
static bool is_let_go(struct an_backend *backend) {
    enum { TRIES = 100, EACH_MS = 50 };
    for (int i = 0; i < TRIES && an_atomic_load32(&backend->outstanding) > 0; i++) {
        struct packets packets;
        if (dequeue(backend, EACH_MS, false, &packets) == 0)
            work_on_all(&packets);
    }
    return an_atomic_load32(&backend->outstanding) == 0;
}

static void iocp_close(struct an_backend *backend) {
    end_lingering(backend, AN_NEVER);
    if (!is_let_go(backend))
        return;
    CloseHandle(backend->native);
    an_mutex_destroy(&backend->lock);
    free(backend);
}

/* Layered service providers, whose sockets are not the system's own handles, queue a packet in any case (KB 2568167). */
static bool skip_done(an_socket *socket) {
    WSAPROTOCOL_INFOW info;
    int length = sizeof info;
    if (getsockopt(native(socket), SOL_SOCKET, SO_PROTOCOL_INFOW, (char *)&info, &length) != 0)
        return false;
    if ((info.dwServiceFlags1 & XP1_IFS_HANDLES) == 0)
        return false;
    const UCHAR modes = FILE_SKIP_COMPLETION_PORT_ON_SUCCESS | FILE_SKIP_SET_EVENT_ON_HANDLE;
    return SetFileCompletionNotificationModes((HANDLE)socket->descriptor, modes);
}

static int iocp_attach(struct an_backend *backend, an_socket *socket) {
    struct an_overlapped *overlapped = calloc(1, sizeof *overlapped);
    if (overlapped == NULL)
        return AN_ENOMEM;
    if (CreateIoCompletionPort((HANDLE)socket->descriptor, backend->native, KEY_SOCKET, 0) == NULL) {
        int error = (int)GetLastError();
        free(overlapped); /* an invalid parameter: bound to another port, or made without WSA_FLAG_OVERLAPPED */
        return error == ERROR_INVALID_PARAMETER ? AN_EINVAL : error;
    }
    overlapped->file = overlapped->lingering = -1;
    overlapped->skips_done = skip_done(socket);
    socket->overlapped = overlapped;
    return 0;
}

static bool iocp_detach(struct an_backend *backend, an_socket *socket) {
    struct an_overlapped *overlapped = socket->overlapped;
    (void)backend;
    if (overlapped->receive.pending)
        CancelIoEx((HANDLE)socket->descriptor, &overlapped->receive.overlapped);
    else
        free_acceptance(overlapped);
    return false;
}

static void iocp_close_descriptor(struct an_backend *backend, an_socket *socket) {
    struct request *request = &socket->overlapped->transmit;
    bool sending = request->pending && (request->handed || request->file);
    if (sending && an_os_is_stream(socket->type) && !wants_reset(socket->descriptor))
        linger(backend, socket);
    else
        an_os_close(socket->descriptor); /* which cancels what is pending */
}

static void iocp_await(struct an_backend *backend, an_socket *socket, struct an_direction *direction) {
    (void)backend;
    if (direction == &socket->receive)
        await_receive(socket);
    else
        await_transmit(socket);
}

static void iocp_withdraw(struct an_backend *backend, an_socket *socket, struct operation *operation) {
    struct request *request = &socket->overlapped->transmit;
    (void)backend;
    if (!request->pending || request->withdrawn)
        return;
    request->withdrawn = request->file || operation->record.kind == AN_CONNECT;
    if (operation->record.kind == AN_CONNECT) {
        CancelIoEx((HANDLE)socket->descriptor, &request->overlapped);
        return;
    }
    if (!request->file)
        return;
    an_perform_count(socket, operation, request->bytes);
    socket->overlapped->file = operation->at.descriptor; /* the kernel goes on reading it */
    operation->at.descriptor = -1;
}

/* The packet of a cancelled receive has the leader look, and find the end. Sends end now: the way is shut behind the piece
 * that the kernel has. */
static void iocp_shut(struct an_backend *backend, an_socket *socket, int how) {
    struct an_overlapped *overlapped = socket->overlapped;
    (void)backend;
    if (how != SD_SEND && overlapped->receive.pending)
        CancelIoEx((HANDLE)socket->descriptor, &overlapped->receive.overlapped);
    struct operation *operation = socket->transmit.head;
    if (how == SD_RECEIVE || operation == NULL || operation->record.kind == AN_CONNECT)
        return;
    if (operation->record.kind == AN_SENDFILE && !an_operation_withdraw(socket, operation))
        an_perform_send_failed(socket, AN_EPIPE);
    socket->transmit.ready = true;
    an_perform_transmit(socket);
}

/* It is this thread's turn. port.lock held, but not meanwhile. */
static void pass(struct an_backend *backend, const struct packets *packets) {
    an_port *port = backend->port;
    an_socket *expired = an_port_begin_pass(port, false);
    an_socket *ready = an_port_take_ready(port);
    an_mutex_unlock(&port->lock);
    work_on_ready(port, ready); /* first: they have waited longer, and there is an end to what a pass receives */
    work_on_all(packets);
    an_socket_expire_all(expired);
    look_after_lingering(backend);
    an_mutex_lock(&port->lock);
}

static int iocp_wait(struct an_backend *backend, int64_t until_ns) {
    an_port *port = backend->port;
    struct packets packets;
    struct an_interruptible waiting;
    bool interruptible = until_ns > 0 && (port->flags & AN_PORT_INTERRUPTIBLE) != 0;
    int milliseconds = an_milliseconds_until(until_ns);
    if (interruptible)
        an_os_begin_interruptible(&waiting);
    int error = dequeue(backend, milliseconds < 0 ? INFINITE : (DWORD)milliseconds, interruptible, &packets);
    if (interruptible)
        an_os_end_interruptible(&waiting);
    an_mutex_lock(&port->lock);
    if (an_port_take_turn(port, until_ns, packets.wakes, packets.count > packets.wakes)) {
        pass(backend, &packets);
        an_port_end_turn(port);
    }
    an_mutex_unlock(&port->lock);
    return error;
}

static void iocp_wake(struct an_backend *backend) {
    BOOL posted = PostQueuedCompletionStatus(backend->native, 0, KEY_WAKE, NULL);
    assert(posted);
    (void)posted;
}

static int iocp_watch(struct an_backend *backend, an_descriptor *descriptor) {
    (void)backend;
    (void)descriptor;
    return AN_ENOTSUP; /* a completion port cannot be waited for with others */
}

const struct an_backend_interface an_iocp = {
    .open = iocp_open,
    .close = iocp_close,
    .attach = iocp_attach,
    .detach = iocp_detach,
    .close_descriptor = iocp_close_descriptor,
    .try_send = an_perform_try_send,
    .start = an_perform_start,
    .proceed = an_perform_proceed,
    .withdraw = iocp_withdraw,
    .shut = iocp_shut,
    .await = iocp_await,
    .together = true,
    .wait = iocp_wait,
    .wake = iocp_wake,
    .watch = iocp_watch,
    .alarm = NULL, /* of watched ports only */
};

#endif
