/* macos.c - what os.h and system.h need of macOS. Sources: its manual pages and headers, and the kernel's published
 * source where these are silent.
 */
#if defined(__APPLE__)

#include "os/system.h"

#include <errno.h>
#include <fcntl.h>
#include <libproc.h>
#include <time.h>
#include <unistd.h>

#include <sys/uio.h>

/* ---- conditions: they have no clock of their own, but take the time left ---------------------------------------------- */

/* Waits may end early without a reason: a day at most spares the kernel's arithmetic years in nanoseconds. */
static const int64_t LONGEST_WAIT_NS = INT64_C(86400000000000);

void an_condition_init(struct an_condition *condition) { pthread_cond_init(&condition->native, NULL); }

void an_condition_wait(struct an_condition *condition, struct an_mutex *mutex, int64_t until_ns) {
    if (until_ns == AN_NEVER) {
        pthread_cond_wait(&condition->native, &mutex->native);
        return;
    }
    int64_t left_ns = until_ns - an_clock();
    if (left_ns < 0)
        left_ns = 0;
    if (left_ns > LONGEST_WAIT_NS)
        left_ns = LONGEST_WAIT_NS;
    struct timespec left = {.tv_sec = (time_t)(left_ns / 1000000000), .tv_nsec = (long)(left_ns % 1000000000)};
    pthread_cond_timedwait_relative_np(&condition->native, &mutex->native, &left);
}

/* ---- sockets ------------------------------------------------------------------------------------------------------- */

int an_system_silence(int descriptor) {
    int on = 1;
    return setsockopt(descriptor, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on) < 0 ? errno : 0;
}

/* There are no flags for it in socket and accept: a fork of another thread in between inherits the descriptor. */
static int prepare_new(int descriptor) {
    if (fcntl(descriptor, F_SETFD, FD_CLOEXEC) < 0 || fcntl(descriptor, F_SETFL, O_NONBLOCK) < 0)
        return errno;
    return an_system_silence(descriptor);
}

int an_os_open(int family, int type, int protocol, an_descriptor *descriptor) {
    int opened = socket(family, type, protocol);
    if (opened < 0)
        return errno;
    int error = prepare_new(opened);
    if (error != 0) {
        close(opened);
        return error;
    }
    *descriptor = opened;
    return 0;
}

void an_system_seal_address(an_address *address) { an_system_address(address)->sa_len = (__uint8_t)address->length; }

/* getsockopt(2) refuses SO_ACCEPTCONN here; the kernel tells it of a process' own descriptors in this way. */
int an_os_is_listening(an_descriptor descriptor, bool *listening) {
    struct socket_fdinfo info;
    int told = proc_pidfdinfo(getpid(), (int)descriptor, PROC_PIDFDSOCKETINFO, &info, sizeof info);
    *listening = told == (int)sizeof info && (info.psi.soi_options & SO_ACCEPTCONN) != 0;
    return told == (int)sizeof info ? 0 : errno;
}

/* accept takes a connection from the queue before it looks for a descriptor, and drops the connection when there is none.
 * So from the first time that this happens until there are descriptors again, one is had before. */
static uint32_t scarce; /* atomic */

static int look_for_descriptor(int listener) {
    if (an_atomic_load32(&scarce) == 0)
        return 0;
    int found = fcntl(listener, F_DUPFD_CLOEXEC, 0);
    if (found < 0)
        return errno;
    close(found);
    an_atomic_store32(&scarce, 0);
    return 0;
}

static int accept_failed(int error) {
    if (error == EMFILE || error == ENFILE)
        an_atomic_store32(&scarce, 1);
    return an_try_again(error);
}

/* A connection that was reset before it is accepted comes out all the same: without an address, and without options. */
int an_os_accept(an_descriptor listener, an_descriptor *accepted, an_address *address) {
    int opened, error = look_for_descriptor((int)listener);
    socklen_t length;
    if (error != 0)
        return error;
    do {
        length = sizeof address->storage;
        opened = accept((int)listener, an_system_address(address), &length);
    } while (opened < 0 && errno == EINTR);
    if (opened < 0)
        return accept_failed(errno);
    error = length == 0 ? ECONNABORTED : prepare_new(opened);
    if (error != 0) {
        close(opened);
        return error == EINVAL ? ECONNABORTED : error;
    }
    *accepted = opened;
    address->length = length;
    return 0;
}

/* accept(2): the connection was aborted while it waited. */
bool an_os_accept_is_transient(int error) { return error == ECONNABORTED || error == EPROTO; }

/* A local datagram socket whose receiver is full says ENOBUFS: room comes. On the internet it says that the interface's
 * queue is full, which no event ends: the datagram is lost, and its sender is told. EPROTOTYPE is what a send says while
 * the connection is being torn down. */
int an_system_send_error(int descriptor, int error) {
    struct sockaddr_storage local;
    socklen_t length = sizeof local;
    if (error == EPROTOTYPE)
        return EPIPE;
    if (error != ENOBUFS || getsockname(descriptor, (struct sockaddr *)&local, &length) < 0)
        return an_try_again(error);
    return local.ss_family == AF_UNIX ? EAGAIN : error;
}

/* Its count goes in and out through one parameter, out also with EAGAIN and EINTR. */
int an_system_send_file(int descriptor, int file, uint64_t offset, size_t count, size_t *sent) {
    off_t done;
    int result;
    do {
        done = (off_t)count;
        result = sendfile(file, descriptor, (off_t)offset, &done, NULL, 0);
    } while (result < 0 && errno == EINTR && done == 0);
    if (result < 0 && (errno == ENOTSUP || errno == EOPNOTSUPP || errno == ENOTSOCK || errno == EINVAL))
        return EINVAL;
    bool in_part = result < 0 && done > 0 && (errno == EAGAIN || errno == EINTR);
    if (result < 0 && !in_part)
        return an_system_send_error(descriptor, errno);
    *sent = (size_t)done;
    return 0;
}

#endif
