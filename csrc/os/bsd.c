/* bsd.c - what os.h and system.h need of FreeBSD, OpenBSD, NetBSD and DragonFly. Sources: their manual pages and headers.
 */
#if defined(__FreeBSD__) || defined(__OpenBSD__) || defined(__NetBSD__) || defined(__DragonFly__)

#include "os/system.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#if defined(SO_NOSIGPIPE)
enum { SILENCE = SO_NOSIGPIPE };
#else
enum { SILENCE = 0 }; /* OpenBSD: MSG_NOSIGNAL with each send, and it has no sendfile */
#endif

/* ---- conditions --------------------------------------------------------------------------------------------------- */

void an_condition_init(struct an_condition *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&condition->native, &attributes);
    pthread_condattr_destroy(&attributes);
}

void an_condition_wait(struct an_condition *condition, struct an_mutex *mutex, int64_t until_ns) {
    if (until_ns == AN_NEVER) {
        pthread_cond_wait(&condition->native, &mutex->native);
        return;
    }
    struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000), .tv_nsec = (long)(until_ns % 1000000000)};
    pthread_cond_timedwait(&condition->native, &mutex->native, &until);
}

/* ---- sockets ------------------------------------------------------------------------------------------------------- */

int an_system_silence(int descriptor) {
    int on = 1;
    if (SILENCE == 0)
        return 0;
    return setsockopt(descriptor, SOL_SOCKET, SILENCE, &on, sizeof on) < 0 ? errno : 0;
}

int an_os_open(int family, int type, int protocol, an_descriptor *descriptor) {
    int opened = socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol);
    if (opened < 0)
        return errno;
    int error = an_system_silence(opened);
    if (error != 0) {
        close(opened);
        return error;
    }
    *descriptor = opened;
    return 0;
}

void an_system_seal_address(an_address *address) {
    an_system_address(address)->sa_len = (__typeof__(((struct sockaddr *)0)->sa_len))address->length;
}

int an_os_is_listening(an_descriptor descriptor, bool *listening) {
    int value = 0;
    int error = an_integer_option(descriptor, SO_ACCEPTCONN, &value);
    *listening = value != 0;
    return error;
}

/* accept4 sets O_NONBLOCK as told; accept would take it from the listener. SO_NOSIGPIPE comes from the listener. */
int an_os_accept(an_descriptor listener, an_descriptor *accepted, an_address *address) {
    int opened;
    socklen_t length;
    do {
        length = sizeof address->storage;
        opened = accept4((int)listener, an_system_address(address), &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    } while (opened < 0 && errno == EINTR);
    if (opened < 0)
        return an_try_again(errno);
    *accepted = opened;
    address->length = length;
    return 0;
}

/* accept(2): the connection was aborted while it waited. EPROTO is what POSIX' streams say for it. */
bool an_os_accept_is_transient(int error) { return error == ECONNABORTED || error == EPROTO; }

/* A local datagram socket whose receiver is full says ENOBUFS: room comes. On the internet it says that the interface's
 * queue is full, which no event ends: the datagram is lost, and its sender is told. */
int an_system_send_error(int descriptor, int error) {
    struct sockaddr_storage local;
    socklen_t length = sizeof local;
    if (error != ENOBUFS || getsockname(descriptor, (struct sockaddr *)&local, &length) < 0)
        return an_try_again(error);
    return local.ss_family == AF_UNIX ? EAGAIN : error;
}

#endif

/* ---- files: one of the two --------------------------------------------------------------------------------------------- */

#if defined(__FreeBSD__) || defined(__DragonFly__)

#include <sys/uio.h>

/* Its count comes through the last but one parameter, also with EAGAIN and EINTR. */
int an_system_send_file(int descriptor, int file, uint64_t offset, size_t count, size_t *sent) {
    off_t done = 0;
    int result;
    do
        result = sendfile(file, descriptor, (off_t)offset, count, NULL, &done, 0);
    while (result < 0 && errno == EINTR && done == 0);
    if (result < 0 && (errno == ENOTSUP || errno == EOPNOTSUPP || errno == ENOTSOCK))
        return EINVAL;
    bool in_part = result < 0 && done > 0 && (errno == EAGAIN || errno == EINTR);
    if (result < 0 && !in_part)
        return an_system_send_error(descriptor, errno);
    *sent = (size_t)done;
    return 0;
}

#elif defined(__OpenBSD__) || defined(__NetBSD__)

int an_system_send_file(int descriptor, int file, uint64_t offset, size_t count, size_t *sent) {
    (void)descriptor, (void)file, (void)offset, (void)count, (void)sent;
    return EINVAL; /* there is no such call */
}

#endif
