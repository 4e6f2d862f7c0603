/* linux.c - what os.h and system.h need of Linux alone. Sources: the manual pages of the calls named. */
#if defined(__linux__)

#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* accept4, SOCK_CLOEXEC as glibc and musl guard them */
#endif

#include "os/system.h"

#include <errno.h>
#include <signal.h>
#include <sys/sendfile.h>
#include <time.h>

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

int an_os_open(int family, int type, int protocol, an_descriptor *descriptor) {
    int opened = socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol);
    if (opened < 0)
        return errno;
    *descriptor = opened;
    return 0;
}

int an_system_silence(int descriptor) {
    (void)descriptor;
    return 0; /* MSG_NOSIGNAL with each send */
}

void an_system_seal_address(an_address *address) { (void)address; }

int an_os_is_listening(an_descriptor descriptor, bool *listening) {
    int value = 0;
    int error = an_integer_option(descriptor, SO_ACCEPTCONN, &value);
    *listening = value != 0;
    return error;
}

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

/* accept(2), "Error handling": Linux passes pending network errors of the new connection as its own. */
bool an_os_accept_is_transient(int error) {
    switch (error) {
    case ECONNABORTED:
    case ENETDOWN:
    case EPROTO:
    case ENOPROTOOPT:
    case EHOSTDOWN:
    case EHOSTUNREACH:
    case EOPNOTSUPP:
    case ENETUNREACH:
    case EPERM: /* a firewall's rule */
        return true;
    default:
        return false;
    }
}

int an_system_send_error(int descriptor, int error) {
    (void)descriptor;
    return an_try_again(error);
}

/* sendfile(2) has no MSG_NOSIGNAL: SIGPIPE is held back for the call, and taken away if the call raised it. */
int an_system_send_file(int descriptor, int file, uint64_t offset, size_t count, size_t *sent) {
    sigset_t pipe_signal, before, pending;
    off_t position = (off_t)offset;
    sigemptyset(&pipe_signal);
    sigaddset(&pipe_signal, SIGPIPE);
    sigpending(&pending);
    bool was_pending = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe_signal, &before);
    ssize_t done;
    do
        done = sendfile(descriptor, file, &position, count);
    while (done < 0 && errno == EINTR);
    int error = done < 0 ? errno : 0;
    if (done != (ssize_t)count && !was_pending) { /* also when a part of it went out first */
        struct timespec at_once = {0, 0};
        while (sigtimedwait(&pipe_signal, NULL, &at_once) < 0 && errno == EINTR) {
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0)
        return error == ENOSYS ? EINVAL : an_try_again(error);
    *sent = (size_t)done;
    return 0;
}

#endif
