/* os.h - the one interface to the system: sockets, files, clock, locks, atomics, fork.
 *
 * Knows system calls and nothing of ports, operations or backends. Each platform implements it in its own folder file
 * (os/posix.c and os/windows.c, each with a header for the types that must be known by size). Every function that can fail returns 0 or a
 * positive system error number; calls that a signal interrupted are made again, unless the comment says otherwise.
 */
#ifndef AN_OS_H
#define AN_OS_H

#include <stdbool.h>

#if defined(_WIN32)
#include "os/windows.h"
#else
#include "os/posix.h"
#endif

#include "asyncio_native.h"

#define AN_NEVER INT64_MAX /* a point in time that does not come */

/* ---- locks: not recursive ------------------------------------------------------------------------------------- */

void an_mutex_init(struct an_mutex *mutex);
void an_mutex_destroy(struct an_mutex *mutex);
void an_mutex_lock(struct an_mutex *mutex);
void an_mutex_unlock(struct an_mutex *mutex);

void an_condition_init(struct an_condition *condition);
void an_condition_destroy(struct an_condition *condition);
void an_condition_signal(struct an_condition *condition);
void an_condition_broadcast(struct an_condition *condition);
/* Waits until signalled or until `until_ns` on the clock of an_clock; may also return for no reason. */
void an_condition_wait(struct an_condition *condition, struct an_mutex *mutex, int64_t until_ns);

/* ---- clock, threads, fork --------------------------------------------------------------------------------------- */

/* Monotonic nanoseconds. */
int64_t an_clock(void);

/* How long a system call with a timeout in milliseconds waits until then: rounded up, never early; -1 for AN_NEVER. */
int an_milliseconds_until(int64_t until_ns);

/* A number that no other living thread has. */
uintptr_t an_thread_identity(void);

/* Changes in the child at each fork: what was made under another number belongs to the parent. */
uint32_t an_fork_generation(void);

/* Copies the value of an environment variable, as the process has set it last; false without one or if it is longer. */
bool an_os_environment(const char *name, char *value, size_t size);

/* Changes in parent and child at each fork, in the parent before and behind it: as long as it stays, no other process can
 * hold our descriptors. */
uint32_t an_fork_count(void);

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* Pages of their own, zero, that go back to the system when they are unmapped; NULL without memory. */
void *an_os_map(size_t size);
void an_os_unmap(void *pages, size_t size);

/* ---- sockets ----------------------------------------------------------------------------------------------------- */

int an_os_open(int family, int type, int protocol, an_descriptor *descriptor);
/* Tells what a descriptor is. */
int an_os_describe(an_descriptor descriptor, int *family, int *type, int *protocol);
/* Makes a descriptor non-blocking and not inheritable. */
int an_os_prepare(an_descriptor descriptor);
int an_os_is_listening(an_descriptor descriptor, bool *listening);
void an_os_close(an_descriptor descriptor);
int an_os_shutdown(an_descriptor descriptor, int how);
/* Resets the connection if the socket's options say that closing it shall; true: done. */
bool an_os_reset_if_asked(an_descriptor descriptor);
/* Ends the sending side and throws away what has arrived, up to a bound: closing a socket with unread bytes makes TCP
 * reset the connection (RFC 1122, 4.2.2.13), and the peer may lose what was sent to it just before. */
void an_os_end_politely(an_descriptor descriptor);
int an_os_bind(an_descriptor descriptor, const an_address *address);
int an_os_listen(an_descriptor descriptor, int backlog);
int an_os_local_address(an_descriptor descriptor, an_address *address);
int an_os_peer_address(an_descriptor descriptor, an_address *address);
int an_os_set_option(an_descriptor descriptor, int level, int name, const void *value, size_t length);
/* Whether it is the option by which closing waits for the peer. */
bool an_os_is_linger(int level, int name);
int an_os_get_option(an_descriptor descriptor, int level, int name, void *value, size_t *length);

/* What a socket is, from its system numbers. */
bool an_os_is_stream(int type);
bool an_os_is_datagram(int type);
bool an_os_is_internet(int family);
/* Whether the system tells of a datagram that was cut how long it was, in a call that is cheaper than that for messages. */
bool an_os_tells_length(int family, int type, int protocol);

/* None of these blocks; AN_EAGAIN says "not now". */
int an_os_accept(an_descriptor listener, an_descriptor *accepted, an_address *address);
/* Whether an error of accept speaks of one connection that died early, and the next one may be tried at once. */
bool an_os_accept_is_transient(int error);
/* Whether an error says that descriptors or memory ran out. */
bool an_os_is_exhausted(int error);
/* 0: connected. *waiting true: under way, an_os_connect_result tells when writable. AN_EAGAIN: a local listener's
 * backlog is full and no event will follow. */
int an_os_connect(an_descriptor descriptor, const an_address *address, bool *waiting);
/* AN_EAGAIN: still under way. */
int an_os_connect_result(an_descriptor descriptor);
int an_os_receive(an_descriptor descriptor, void *data, size_t length, size_t *received);
/* With address (may be NULL) and truncation of datagrams. `tells_length`: what an_os_tells_length says of the socket. */
int an_os_receive_message(an_descriptor descriptor, bool tells_length, void *data, size_t length, size_t *received,
                          an_address *address, bool *truncated);
int an_os_send(an_descriptor descriptor, const void *data, size_t length, size_t *sent);
/* One message from `count` buffers (at most AN_GATHER) to address (NULL: where it is connected to). */
int an_os_send_message(an_descriptor descriptor, const an_buffer *buffers, size_t count, const an_address *address,
                       size_t *sent);
/* *sent 0 without an error: the end of the file. */
int an_os_send_file(an_descriptor descriptor, an_descriptor file, uint64_t offset, uint64_t count, size_t *sent);

enum {
    AN_GATHER = 64,          /* buffers of one system call; IOV_MAX is at least 16 by POSIX, 1024 where we run */
    AN_CALL_BYTES = 1 << 30, /* of a stream in one system call; macOS refuses more than INT_MAX */
};

/* ---- a pipe that ends a wait for descriptors, for reactors whose system has nothing better ------------------------- */

/* Owned by its reactor. */
struct an_wakeup {
    an_descriptor read_end; /* readable from ring until drain */
    an_descriptor write_end;
};

/* Neither end blocks, neither is inherited by programs. On failure read_end is -1, and there is nothing to close. */
int an_wakeup_open(struct an_wakeup *wakeup);
void an_wakeup_close(struct an_wakeup *wakeup);
/* Any thread. */
void an_wakeup_ring(const struct an_wakeup *wakeup);
/* Who rings after it makes the pipe readable again. */
void an_wakeup_drain(const struct an_wakeup *wakeup);

/* ---- files --------------------------------------------------------------------------------------------------------- */

int an_os_duplicate_file(an_descriptor file, an_descriptor *duplicate);
void an_os_close_file(an_descriptor file);

/* ---- addresses ------------------------------------------------------------------------------------------------------ */

int an_os_address_ip(an_address *address, int family, const char *host, uint16_t port, uint32_t flow, uint32_t scope);
int an_os_address_path(an_address *address, const char *path, size_t length);
int an_os_address_family(const an_address *address);
int an_os_address_format(const an_address *address, char *host, uint16_t *port, uint32_t *flow, uint32_t *scope);
int an_os_address_format_path(const an_address *address, char *path, size_t *length);

#endif
