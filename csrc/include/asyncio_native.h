/* asyncio_native.h - the public C interface of asyncio-native: a completion port on every system.
 *
 * Start an operation on a socket, later dequeue its completion from the port, on a thread of your choice. There are no
 * callbacks. The same code runs on epoll, io_uring, kqueue, poll and Windows' IOCP; an_backends tells which of them work
 * here.
 *
 * Conventions, for every function unless its comment says otherwise:
 *   - It returns 0, or a positive system error number (errno on POSIX, WSA codes on Windows). Nothing is in flight and
 *     nothing is taken over after an error. `errno` is never the only report; nothing aborts.
 *   - Any thread may call it at any time, also while others dequeue from the port. Handles are given back with
 *     an_socket_free and an_port_free; no call may follow on a handle that was given back.
 *   - Times are int64 nanoseconds on the monotonic clock; a timeout of -1 (AN_FOREVER) is none.
 *   - An operation completes through the queue only, never inside the call that started it.
 *   - In a forked child a port, and each socket that was associated with it, answers AN_EPORTCLOSED.
 *
 * The part between the two marker comments is plain C that the Python binding reads as its declarations; the pages of
 * docs/ are made of them and the comments before or behind them.
 */
#ifndef ASYNCIO_NATIVE_H
#define ASYNCIO_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#include <winsock2.h>
#define AN_EAGAIN WSAEWOULDBLOCK
#define AN_ECANCELED WSA_OPERATION_ABORTED
#define AN_ETIMEDOUT WSAETIMEDOUT
#define AN_ECONNRESET WSAECONNRESET
#define AN_ECONNREFUSED WSAECONNREFUSED
#define AN_ENOTCONN WSAENOTCONN
#define AN_EPIPE WSAESHUTDOWN
#define AN_EINVAL WSAEINVAL
#define AN_EBADF WSAEBADF
#define AN_EMFILE WSAEMFILE
#define AN_ENOMEM WSA_NOT_ENOUGH_MEMORY
#define AN_EINTR WSAEINTR
#define AN_ENOTSUP WSAEOPNOTSUPP
#define AN_EPERM WSAEACCES
#define AN_EPORTCLOSED WSAECANCELLED
#else
#include <errno.h>
#define AN_EAGAIN EAGAIN             /* the system has no room or no data now */
#define AN_ECANCELED ECANCELED       /* cancelled, or its socket was closed */
#define AN_ETIMEDOUT ETIMEDOUT       /* the deadline passed first */
#define AN_ECONNRESET ECONNRESET     /* the peer reset the connection */
#define AN_ECONNREFUSED ECONNREFUSED /* nobody listens there */
#define AN_ENOTCONN ENOTCONN         /* the socket is not connected */
#define AN_EPIPE EPIPE               /* the stream's sending side is over or broken */
#define AN_EINVAL EINVAL             /* a value out of range, or a socket that is not associated */
#define AN_EBADF EBADF               /* the socket is closed */
#define AN_EMFILE EMFILE             /* out of descriptors */
#define AN_ENOMEM ENOMEM             /* out of memory */
#define AN_EINTR EINTR               /* a signal ended the wait (AN_PORT_INTERRUPTIBLE only) */
#define AN_ENOTSUP EOPNOTSUPP        /* not on this type of socket, system or backend */
#define AN_EPERM EPERM               /* a second thread dequeued although concurrency 1 was promised */
#define AN_EPORTCLOSED ESHUTDOWN     /* the port is closed, or belongs to the parent of this process */
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* AN_HIDDEN: the core is part of another library, and not exported by it. */
#if defined(__GNUC__) && !defined(AN_HIDDEN)
#pragma GCC visibility push(default)
#endif

/* cdef: begin */

/* ---- types ----------------------------------------------------------------------------------------------------- */

/* A completion port. Made by an_port_open, given back by an_port_free. */
typedef struct an_port an_port;

/* A socket that starts operations. Made by an_socket_open, an_socket_adopt or a completed accept; given back by
 * an_socket_free. */
typedef struct an_socket an_socket;

/* A system's socket or file: a descriptor on POSIX, a SOCKET or HANDLE on Windows. */
typedef intptr_t an_descriptor;

/* The state of one operation in flight. The caller owns it and may embed it in a structure of its own, as OVERLAPPED.
 * It needs no initialisation. From the successful start until its last completion has been dequeued (or the port was
 * closed) it must stay where it is and nobody but the library may touch it; then it may be started again. */
typedef struct an_operation {
    uint64_t reserved[16];
} an_operation;

/* What an operation is. The numbers are part of the interface. */
enum an_kind {
    AN_ACCEPT = 1,
    AN_CONNECT = 2,
    AN_RECV = 3,
    AN_RECVFROM = 4,
    AN_SEND = 5,
    AN_SENDTO = 6,
    AN_SENDFILE = 7,
    AN_DISCONNECT = 8,
    AN_POST = 9,
    AN_TIMER = 10,
    AN_KIND_COUNT = 11
};

/* Flags of a start and of a close. */
enum an_start_flag {
    AN_MULTISHOT = 1, /* accept, recv, recvfrom: one start, many completions, each but the last with AN_MORE */
    AN_FLUSH = 2      /* an_socket_close: hand over what was sent before, then close */
};

/* Flags of a completion. */
enum an_completion_flag {
    AN_MORE = 1,      /* the multishot stays armed, further completions follow */
    AN_TRUNCATED = 2, /* the datagram was longer than the buffer, its rest is lost */
    AN_MARKED = 4,    /* the start was given a marked pointer: see an_operation_marked */
    AN_TAKEN = 8      /* Python has it from an_py_completion_new; the library itself never sets this */
};

/* Flags of a port. */
enum an_port_flag {
    AN_PORT_INTERRUPTIBLE = 1 /* a signal handler that ran in the waiting thread ends the wait with AN_EINTR; on Windows
                                 an APC does, and so do Ctrl-C and Ctrl-Break, behind their handlers */
};

/* Sizes, and the timeout that never ends. */
enum an_limit {
    AN_FOREVER = -1,      /* a timeout: none */
    AN_REASON_SIZE = 160, /* bytes of a backend's reason with its ending zero */
    AN_HOST_SIZE = 112    /* bytes for a host or path from an_address_format with its ending zero */
};

/* A socket address: `length` bytes of a system's struct sockaddr in `storage` (sockaddr_in, _in6, _un, ...). */
typedef struct an_address {
    uint32_t length;
    uint32_t reserved;
    uint64_t storage[16];
} an_address;

/* One piece of a gathered send; the layout of POSIX' struct iovec. */
typedef struct an_buffer {
    const void *data;
    size_t length; /* bytes */
} an_buffer;

/* One dequeued completion. What it points to is lent until an_completion_release, but `accepted`, which is the
 * caller's from the moment it was dequeued. */
typedef struct an_completion {
    an_operation *operation;   /* the operation; NULL for a failure of quiet sends */
    an_socket *socket;         /* its socket; NULL for AN_POST and AN_TIMER */
    void *state;               /* the socket's state as it is now, or the one given to post and timer */
    const void *data;          /* received bytes lent by the port; NULL when the caller gave the buffer */
    an_socket *accepted;       /* AN_ACCEPT: the new socket, not associated, the caller's to close and free; or NULL */
    const an_address *address; /* AN_ACCEPT, AN_RECVFROM: the peer's address; or NULL */
    uint64_t transferred;      /* bytes received or handed over; a quiet failure: bytes that were lost */
    int32_t error;             /* 0 or the system's error number */
    uint16_t kind;             /* enum an_kind */
    uint16_t flags;            /* AN_MORE, AN_TRUNCATED, AN_MARKED */
    void *reserved;            /* the library's: what an_completion_release gives back */
} an_completion;

/* What backends there are; see an_backends. */
typedef struct an_backend_description {
    const char *name; /* static */
    int32_t available;
    char reason[AN_REASON_SIZE]; /* why not, empty when available */
} an_backend_description;

/* How a port is made. All zero (and a NULL pointer to it) is the default. */
typedef struct an_port_options {
    const char *backend;  /* "iocp", "io_uring", "epoll", "kqueue", "poll", or NULL or "auto": the environment variable
                             ASYNCIO_NATIVE_BACKEND, else the fastest that works here */
    uint32_t concurrency; /* 1: the first thread that dequeues is the only one that ever will; 0: no promise */
    uint32_t flags;       /* AN_PORT_INTERRUPTIBLE */
} an_port_options;

/* Counts since the port was opened, indexed by enum an_kind where they are arrays; they only grow. The gauges below
 * are values of the moment. */
typedef struct an_statistics {
    uint64_t started[AN_KIND_COUNT];   /* operations started, without the quiet ones */
    uint64_t completed[AN_KIND_COUNT]; /* completions queued with no error, each of a multishot */
    uint64_t failed[AN_KIND_COUNT];    /* completions queued with an error other than cancelled, also quiet failures */
    uint64_t cancelled[AN_KIND_COUNT]; /* completions queued as cancelled */
    uint64_t quiet_sends;              /* quiet send, sendv and sendto calls that were taken */
    uint64_t bytes_received;
    uint64_t bytes_sent;
    uint64_t waits;          /* times that the system was asked for events */
    uint64_t wakeups;        /* times that a thread had to wake one that waits in the system */
    uint64_t batches;        /* dequeues that returned at least one completion */
    uint64_t dequeued;       /* completions returned */
    uint64_t batch_largest;  /* completions in the largest batch so far */
    uint64_t gauge_sockets;  /* gauge: sockets associated and not yet closed, a descriptor each */
    uint64_t gauge_queued;   /* gauge: completions queued and not yet dequeued */
    uint64_t gauge_buffers;  /* gauge: receive buffers that the pool holds */
    uint64_t gauge_timers;   /* gauge: timers pending, and sockets that have or had a deadline to be looked at */
    uint64_t gauge_inflight; /* gauge: operations started whose last completion was not dequeued yet */
    uint64_t gauge_waiting;  /* gauge: threads that wait in the system; with iocp all that dequeue and find nothing */
} an_statistics;

/* Counts of one socket since it was made; they only grow. */
typedef struct an_socket_statistics {
    uint64_t bytes_received;
    uint64_t bytes_sent;
} an_socket_statistics;

/* ---- the library ----------------------------------------------------------------------------------------------- */

/* The version as "MAJOR.MINOR.PATCH", static. */
const char *an_version(void);

/* Describes up to `capacity` backends and returns how many there are (five on every platform, the fastest first).
 * Opens and closes each one to see whether it works here. */
size_t an_backends(an_backend_description *descriptions, size_t capacity);

/* ---- addresses: no call here blocks or resolves a name ---------------------------------------------------------- */

/* Fills `address` with an IPv4 (family AF_INET) or IPv6 (AF_INET6) address. `host` is numeric; for IPv6 it may end in
 * %scope, a number or an interface's name. `scope` (sin6_scope_id) and `flow` (sin6_flowinfo, host order) are for IPv6.
 * AN_EINVAL: not a numeric address of that family. */
int an_address_ip(an_address *address, int family, const char *host, uint16_t port, uint32_t flow, uint32_t scope);

/* Fills `address` with an AF_UNIX path of `length` bytes; one that begins with a zero byte is Linux' abstract
 * namespace; length 0 is the unnamed address. AN_EINVAL: too long. AN_ENOTSUP: no AF_UNIX here. */
int an_address_path(an_address *address, const char *path, size_t length);

/* The address family of `address`, or 0 (AF_UNSPEC) when it is empty. */
int an_address_family(const an_address *address);

/* The opposite of an_address_ip: writes the numeric host into `host` (AN_HOST_SIZE bytes, no %scope), and the rest
 * through the pointers, none of which may be NULL. AN_EINVAL: neither IPv4 nor IPv6. */
int an_address_format(const an_address *address, char *host, uint16_t *port, uint32_t *flow, uint32_t *scope);

/* The opposite of an_address_path: copies the path into `path` (AN_HOST_SIZE bytes), its bytes to `length`. */
int an_address_format_path(const an_address *address, char *path, size_t *length);

/* ---- port ------------------------------------------------------------------------------------------------------ */

/* Opens a port. `options` may be NULL. AN_ENOTSUP: the backend is unknown, not compiled in or refused by the system
 * (an_backends tells why); others from the system: out of descriptors or memory. */
int an_port_open(an_port **port, const an_port_options *options);

/* Closes the port: closes its sockets, cancels what is in flight, discards what is queued (an accepted socket in it is
 * closed), waits until no thread is left in a call that dequeues and no buffer can be touched any more. Blocked
 * dequeues return AN_EPORTCLOSED. The operations are the caller's again. Idempotent. In a forked child it only closes
 * the child's copy of the descriptors. Completions dequeued before must still be released. */
int an_port_close(an_port *port);

/* Closes the port and gives the handle back. The memory goes when its last socket was given back as well. */
void an_port_free(an_port *port);

/* The name of the backend in use, static. */
const char *an_port_backend(const an_port *port);

/* Binds `socket` to `port` for good and puts it under the port's event system. `state` comes back with each of its
 * completions. Again on the same port: replaces the state. AN_EINVAL: it belongs to another port; on Windows also to one of
 * others, or it was made without WSA_FLAG_OVERLAPPED. */
int an_port_associate(an_port *port, an_socket *socket, void *state);

/* Queues a completion of kind AN_POST that carries `state`. `operation` is the caller's until it is dequeued. */
int an_port_post(an_port *port, an_operation *operation, void *state);

/* Starts a timer: it completes after `delay_ns` (0 or more), never early, with `state`; an_port_cancel ends it. */
int an_port_timer(an_port *port, an_operation *operation, int64_t delay_ns, void *state);

/* Cancels a timer. *cancelled (may be NULL) is 1 if it was still in flight; its completion then has AN_ECANCELED. */
int an_port_cancel(an_port *port, an_operation *operation, int32_t *cancelled);

/* Waits up to `timeout_ns` (0: not at all, AN_FOREVER) for completions and moves 1 to `max` of them, in order, into
 * `completions`; *count tells how many, 0 at the timeout. Each dequeued completion must be given back with
 * an_completion_release. AN_EPORTCLOSED: the port is closed. AN_EINTR: see AN_PORT_INTERRUPTIBLE. AN_EPERM: a second
 * thread on a port with concurrency 1. AN_EINVAL: max is 0, or a negative timeout other than AN_FOREVER. Others: the
 * system refused to wait (out of memory); nothing is lost. */
int an_port_dequeue(an_port *port, an_completion *completions, size_t max, int64_t timeout_ns, size_t *count);

/* Gives back what `count` dequeued completions lend: `data`, `address`, and the hold on `socket`. `accepted` is the
 * caller's and stays. Works after the port was closed and freed, too. */
void an_completion_release(an_completion *completions, size_t count);

/* Operations started and not yet dequeued: a multishot and a post count as one, quiet operations not at all. */
uint64_t an_port_in_flight(an_port *port);

/* 1 after an_port_close and in a forked child. */
int an_port_is_closed(an_port *port);

/* A descriptor that polls readable whenever an_port_dequeue with timeout 0 may return something; only for watching in
 * another event loop. The port keeps it. AN_ENOTSUP: not on this system. */
int an_port_descriptor(an_port *port, an_descriptor *descriptor);

/* Copies the counts of now. */
int an_port_statistics(an_port *port, an_statistics *statistics);

/* ---- socket: life and synchronous calls -------------------------------------------------------------------------- */

/* Opens a non-blocking socket that child processes do not inherit across exec: socket(2) with the system's numbers. */
int an_socket_open(an_socket **socket, int family, int type, int protocol);

/* Takes over an open socket and makes it non-blocking and not inheritable. On success the library owns it. */
int an_socket_adopt(an_socket **socket, an_descriptor descriptor);

/* Gives the descriptor back to the caller and closes the handle around it. AN_EINVAL: associated already. */
int an_socket_detach(an_socket *socket, an_descriptor *descriptor);

/* Closes the socket; the handle stays valid until an_socket_free. Plain (flags 0): the peer is told now, operations
 * complete as cancelled, what was not yet handed to the system is dropped. AN_FLUSH: receives end as cancelled, sends
 * go on and the socket closes when the last one has been handed over (a failure of quiet ones is one completion);
 * a plain close while that goes on stops it and drops the rest. Idempotent. */
int an_socket_close(an_socket *socket, uint32_t flags);

/* Closes the socket as an_socket_close does with these flags, and gives the handle back. */
void an_socket_free(an_socket *socket, uint32_t flags);

/* bind(2). */
int an_socket_bind(an_socket *socket, const an_address *address);

/* listen(2). */
int an_socket_listen(an_socket *socket, int backlog);

/* shutdown(2): `how` is 0 receive, 1 send, 2 both. */
int an_socket_shutdown(an_socket *socket, int how);

/* getsockname(2). */
int an_socket_local_address(an_socket *socket, an_address *address);

/* getpeername(2). */
int an_socket_peer_address(an_socket *socket, an_address *address);

/* setsockopt(2) with the system's numbers; `length` is in bytes. */
int an_socket_set_option(an_socket *socket, int level, int name, const void *value, size_t length);

/* getsockopt(2) with the system's numbers; *length is in bytes, in and out. */
int an_socket_get_option(an_socket *socket, int level, int name, void *value, size_t *length);

/* The descriptor, or -1 when closed. For looking at, not for reading, writing or closing. */
an_descriptor an_socket_descriptor(an_socket *socket);

/* The address family, the system's number, as it was opened or adopted. */
int an_socket_family(const an_socket *socket);

/* The type (SOCK_STREAM, SOCK_DGRAM), the system's number. */
int an_socket_type(const an_socket *socket);

/* The protocol, the system's number. */
int an_socket_protocol(const an_socket *socket);

/* The port that it was associated with, or NULL. */
an_port *an_socket_port(an_socket *socket);

/* The state that it was associated with last. */
void *an_socket_state(an_socket *socket);

/* Replaces the state given with it, whether the socket is open or closed. */
void an_socket_set_state(an_socket *socket, void *state);

/* 1 once an_socket_close was called, with whatever flags, or the port was closed. */
int an_socket_is_closed(an_socket *socket);

/* 0 as long as closing it cannot block. 1: SO_LINGER was set, or may have been by who made it or was told its descriptor;
 * close(2) then waits for the peer, also where the descriptor is non-blocking. */
int an_socket_may_linger(an_socket *socket);

/* Bytes that sends took and that have not yet been handed to the system. */
uint64_t an_socket_unsent(an_socket *socket);

/* Failures of its quiet sends that are queued, or dequeued and not yet released. None comes after a plain close. */
uint32_t an_socket_unreported(const an_socket *socket);

/* Copies the counts of now. */
int an_socket_statistics_get(an_socket *socket, an_socket_statistics *statistics);

/* ---- socket: overlapped operations ------------------------------------------------------------------------------- */

/* All of these: the socket must be associated (else AN_EINVAL) and open (else AN_EBADF). `operation` is the caller's
 * and in flight after a return of 0. Buffers, buffer arrays and addresses given are the caller's as well, and must stay
 * valid and unchanged until the completion was dequeued. `timeout_ns`: the operation then completes with AN_ETIMEDOUT
 * (a multishot: when nothing came for that long, also because pause_above holds it back; a pause suspends it); AN_FOREVER
 * for none. */

/* accept4(2) / AcceptEx: completes with each connection. flags: AN_MULTISHOT. Out of descriptors: a completion with
 * the error, and with AN_MULTISHOT it goes on by itself when descriptors are free. */
int an_socket_accept(an_socket *socket, an_operation *operation, uint32_t flags, int64_t timeout_ns);

/* connect(2) / ConnectEx: completes when connected or failed. */
int an_socket_connect(an_socket *socket, an_operation *operation, const an_address *address, int64_t timeout_ns);

/* recv(2): completes with at least one byte, or at the end of the stream with transferred 0 and no error. buffer NULL:
 * the port lends memory when data is there (an_completion.data), at most `length` bytes a completion. flags:
 * AN_MULTISHOT, only with buffer NULL. pause_above: such a multishot receives nothing while an_socket_unsent is above
 * it; UINT64_MAX for never. AN_EINVAL: length 0. */
int an_socket_recv(an_socket *socket, an_operation *operation, void *buffer, size_t length, uint32_t flags,
                   uint64_t pause_above, int64_t timeout_ns);

/* recvfrom(2): one datagram with its sender's address; as an_socket_recv else. AN_ENOTSUP: a stream. */
int an_socket_recvfrom(an_socket *socket, an_operation *operation, void *buffer, size_t length, uint32_t flags,
                       int64_t timeout_ns);

/* send(2): completes when ALL bytes were handed to the system, or at a failure with the number that was. length 0 on a
 * stream completes when all that was sent before has been. operation NULL is a quiet send: no completion unless it
 * fails, and `data` is the caller's again when the call returns. */
int an_socket_send(an_socket *socket, an_operation *operation, const void *data, size_t length, int64_t timeout_ns);

/* sendmsg(2): gathers `count` buffers; as an_socket_send else. On a datagram socket they are one datagram. */
int an_socket_sendv(an_socket *socket, an_operation *operation, const an_buffer *buffers, size_t count,
                    int64_t timeout_ns);

/* sendto(2): one datagram; operation NULL is quiet. AN_ENOTSUP: a stream. */
int an_socket_sendto(an_socket *socket, an_operation *operation, const void *data, size_t length,
                     const an_address *address, int64_t timeout_ns);

/* sendfile(2): `count` bytes (UINT64_MAX: to its end) of an open file from `offset` on. The file's own position is
 * neither used nor moved; its descriptor is duplicated and the caller's is free when the call returns. Past the end of
 * the file it completes with what was there. AN_ENOTSUP: not a stream. */
int an_socket_sendfile(an_socket *socket, an_operation *operation, an_descriptor file, uint64_t offset, uint64_t count,
                       int64_t timeout_ns);

/* shutdown(2) of the sending side after all that was sent before has been handed over. AN_ENOTSUP: not a stream. */
int an_socket_disconnect(an_socket *socket, an_operation *operation, int64_t timeout_ns);

/* Cancels all that is in flight on the socket, also quiet sends; *count (may be NULL) tells how many operations it
 * was, without the quiet ones. Their completions have AN_ECANCELED. */
int an_socket_cancel(an_socket *socket, size_t *count);

/* Cancels one operation of that socket. *cancelled (may be NULL) is 1 if it was still open. The operation's memory is
 * compared, and read only while it is in flight on `socket`. */
int an_operation_cancel(an_socket *socket, an_operation *operation, int32_t *cancelled);

/* A multishot receives nothing after pause until resume: what is queued already still comes, the rest waits in the
 * kernel. AN_EINVAL: it is not a multishot that is in flight on `socket`. */
int an_operation_pause(an_socket *socket, an_operation *operation);

/* Ends a pause. AN_EINVAL as above. */
int an_operation_resume(an_socket *socket, an_operation *operation);

/* How many completions with AN_MORE a multishot had; to be asked when its last one has been dequeued. Where several threads
 * dequeue, one has the last completion in its hand while another has not handled an earlier one: the operation's memory may
 * go when so many were handled. */
uint32_t an_operation_more_count(const an_operation *operation);

/* cdef: end */

/* Two users of one port tell their completions apart by a mark: who starts an operation with this instead of the plain
 * pointer gets AN_MARKED in each of its completions, whose `operation` is the plain one. NULL, marked, is a quiet send whose
 * failure will have the mark. The mark is the lowest bit of the pointer, which is never set in one; every function takes the
 * operation with or without it. On ports that the Python package opened, the mark is Python's. */
static inline an_operation *an_operation_marked(an_operation *operation) {
    return (an_operation *)((uintptr_t)operation | 1);
}

#if defined(__GNUC__) && !defined(AN_HIDDEN)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif
