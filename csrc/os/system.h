/* system.h - what posix.c leaves to the system's own file, and the numbers that are a system's own. One of linux.c, bsd.c
 * and macos.c is compiled beside posix.c; it has these functions, and of os.h:
 *
 *     an_condition_init, an_condition_wait, an_os_open, an_os_is_listening, an_os_accept, an_os_accept_is_transient
 *
 * Knows what posix.c knows. Included by these files alone.
 */
#ifndef AN_OS_SYSTEM_H
#define AN_OS_SYSTEM_H

#include "os.h"

#include <sys/socket.h>
#include <sys/types.h>

/* MSG_DONTWAIT although the descriptor is non-blocking: that flag is the open file's, and who holds a duplicate of an
 * adopted socket can take it away. macOS heeds it in receives only; its headers know MSG_NOSIGNAL by now, the kernels in use
 * may not. */
#if defined(__APPLE__)
enum { SYSTEM_SEND_FLAGS = MSG_DONTWAIT };
#else
enum { SYSTEM_SEND_FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL };
#endif

/* The option that tells a socket's protocol; -1, which getsockopt(2) refuses, where there is none. */
#if defined(SO_PROTOCOL)
enum { SYSTEM_SO_PROTOCOL = SO_PROTOCOL };
#else
enum { SYSTEM_SO_PROTOCOL = -1 };
#endif

/* Given to a receive, it has a datagram's whole length returned, whatever there was room for: recv(2) on Linux. Elsewhere
 * it is a flag of what was received only. */
#if defined(__linux__)
enum { SYSTEM_LENGTH_FLAG = MSG_TRUNC };
#else
enum { SYSTEM_LENGTH_FLAG = 0 };
#endif

/* Local addresses that begin with a zero byte are names of their own: unix(7). Elsewhere they are empty. */
#if defined(__linux__)
enum { SYSTEM_ABSTRACT_NAMES = 1 };
#else
enum { SYSTEM_ABSTRACT_NAMES = 0 };
#endif

/* Has the system not raise SIGPIPE for the socket, where that is the socket's property. */
int an_system_silence(int descriptor);
/* Completes an address that was filled in: BSDs keep its length in it. */
void an_system_seal_address(an_address *address);
/* What an error of a send means: AN_EAGAIN where room will come. */
int an_system_send_error(int descriptor, int error);
/* Sends up to `count` bytes, at least 1, of a file; *sent also what went out before the way was full. AN_EINVAL: this
 * file or this system does not do it. Does not raise SIGPIPE. */
int an_system_send_file(int descriptor, int file, uint64_t offset, size_t count, size_t *sent);

/* EAGAIN and EWOULDBLOCK may differ by POSIX; the core knows one of them. */
static inline int an_try_again(int error) { return error == EWOULDBLOCK ? EAGAIN : error; }

static inline struct sockaddr *an_system_address(an_address *address) { return (struct sockaddr *)address->storage; }

int an_integer_option(an_descriptor descriptor, int name, int *value); /* of SOL_SOCKET */

#endif
