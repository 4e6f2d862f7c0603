/* posix.c - os.h on POSIX systems, as far as they share it; the rest is in linux.c, bsd.c or macos.c (system.h). Sources:
 * the manual pages of the calls named, and POSIX.1-2017 where they differ.
 */
#if !defined(_WIN32)

#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* MSG_NOSIGNAL, F_DUPFD_CLOEXEC as glibc and musl guard them */
#endif

#include "os/system.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* Not sockaddr_storage: OpenBSD's has 256 bytes, for families that are not served. */
_Static_assert(sizeof(struct sockaddr_in6) <= sizeof(((an_address *)0)->storage), "an_address holds a served address");
_Static_assert(sizeof(struct sockaddr_un) <= sizeof(((an_address *)0)->storage), "an_address holds a served address");
_Static_assert(sizeof(an_buffer) == sizeof(struct iovec), "an_buffer is an iovec");
_Static_assert(offsetof(an_buffer, length) == offsetof(struct iovec, iov_len), "an_buffer is an iovec");

/* ---- locks ------------------------------------------------------------------------------------------------------ */

void an_mutex_init(struct an_mutex *mutex) { pthread_mutex_init(&mutex->native, NULL); }

void an_mutex_destroy(struct an_mutex *mutex) { pthread_mutex_destroy(&mutex->native); }

void an_mutex_lock(struct an_mutex *mutex) { pthread_mutex_lock(&mutex->native); }

void an_mutex_unlock(struct an_mutex *mutex) { pthread_mutex_unlock(&mutex->native); }

void an_condition_destroy(struct an_condition *condition) { pthread_cond_destroy(&condition->native); }

void an_condition_signal(struct an_condition *condition) { pthread_cond_signal(&condition->native); }

void an_condition_broadcast(struct an_condition *condition) { pthread_cond_broadcast(&condition->native); }

/* ---- clock, threads, fork ----------------------------------------------------------------------------------------- */

int64_t an_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int an_milliseconds_until(int64_t until_ns) {
    if (until_ns == 0)
        return 0;
    if (until_ns == AN_NEVER)
        return -1;
    int64_t left_ns = until_ns - an_clock();
    if (left_ns <= 0)
        return 0;
    int64_t left_ms = (left_ns - 1) / 1000000 + 1;
    return left_ms < INT_MAX ? (int)left_ms : INT_MAX;
}

uintptr_t an_thread_identity(void) {
    static _Thread_local char here; /* its address is the thread's own, whatever pthread_t is */
    return (uintptr_t)&here;
}

static uint32_t fork_generation;
static uint32_t fork_count;

/* In the parent before the fork, as its other threads go on closing sockets while the child is made, and behind it, for
 * those that they made in between. */
static void count_fork(void) { an_atomic_add32(&fork_count, 1); }

static void forked_child(void) {
    count_fork();
    an_atomic_add32(&fork_generation, 1);
}

static void watch_forks(void) { pthread_atfork(count_fork, count_fork, forked_child); }

static void watch_forks_once(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
}

uint32_t an_fork_generation(void) { return an_atomic_load32(&fork_generation); }

uint32_t an_fork_count(void) {
    watch_forks_once(); /* every socket and port asks for it before a fork can matter to it */
    return an_atomic_load32(&fork_count);
}

bool an_os_environment(const char *name, char *value, size_t size) {
    const char *found = getenv(name);
    if (found == NULL || strlen(found) >= size)
        return false;
    memcpy(value, found, strlen(found) + 1);
    return true;
}

/* ---- memory ------------------------------------------------------------------------------------------------------- */

void *an_os_map(size_t size) {
    void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    return pages != MAP_FAILED ? pages : NULL;
}

void an_os_unmap(void *pages, size_t size) { munmap(pages, size); }

/* ---- sockets -------------------------------------------------------------------------------------------------------- */

static const struct sockaddr *system_address_const(const an_address *address) {
    return (const struct sockaddr *)address->storage;
}

bool an_os_is_stream(int type) { return type == SOCK_STREAM; }

bool an_os_is_datagram(int type) { return type == SOCK_DGRAM || type == SOCK_RAW; }

bool an_os_is_internet(int family) { return family == AF_INET || family == AF_INET6; }

/* Of UDP and local datagrams the manual pages say so; what else may have the type (ICMP) keeps silent. */
bool an_os_tells_length(int family, int type, int protocol) {
    bool udp = an_os_is_internet(family) && (protocol == 0 || protocol == IPPROTO_UDP);
    return SYSTEM_LENGTH_FLAG != 0 && type == SOCK_DGRAM && (udp || family == AF_UNIX);
}

int an_integer_option(an_descriptor descriptor, int name, int *value) {
    socklen_t length = sizeof *value;
    return getsockopt((int)descriptor, SOL_SOCKET, name, value, &length) < 0 ? errno : 0;
}

int an_os_describe(an_descriptor descriptor, int *family, int *type, int *protocol) {
    an_address local = {0};
    socklen_t length = sizeof local.storage;
    if (getsockname((int)descriptor, an_system_address(&local), &length) < 0)
        return errno;
    *family = an_system_address(&local)->sa_family;
    if (an_integer_option(descriptor, SYSTEM_SO_PROTOCOL, protocol) != 0)
        *protocol = 0;
    return an_integer_option(descriptor, SO_TYPE, type);
}

int an_os_prepare(an_descriptor descriptor) {
    int flags = fcntl((int)descriptor, F_GETFL);
    if (flags < 0 || fcntl((int)descriptor, F_SETFL, flags | O_NONBLOCK) < 0)
        return errno;
    return fcntl((int)descriptor, F_SETFD, FD_CLOEXEC) < 0 ? errno : an_system_silence((int)descriptor);
}

/* close(2) is not made again after EINTR: on Linux the number is free then and may be another's already. */
void an_os_close(an_descriptor descriptor) { close((int)descriptor); }

int an_os_shutdown(an_descriptor descriptor, int how) { return shutdown((int)descriptor, how) < 0 ? errno : 0; }

/* SO_LINGER with no time, RFC 9293's abort: closing shall reset the connection. connect(2) to AF_UNSPEC does so at once on
 * Linux; where it is refused, the reset waits until the last holder of the file has let go. */
bool an_os_reset_if_asked(an_descriptor descriptor) {
    struct linger linger = {0};
    socklen_t length = sizeof linger;
    if (getsockopt((int)descriptor, SOL_SOCKET, SO_LINGER, &linger, &length) < 0)
        return false;
    if (linger.l_onoff == 0 || linger.l_linger != 0)
        return false;
    struct sockaddr nobody = {.sa_family = AF_UNSPEC};
    return connect((int)descriptor, &nobody, sizeof nobody) == 0;
}

void an_os_end_politely(an_descriptor descriptor) {
    char unread[16384];
    if (shutdown((int)descriptor, SHUT_WR) < 0)
        return;
    for (int i = 0; i < 64; i++) { /* 1 MiB: what a flooding client sends is not worth more */
        if (recv((int)descriptor, unread, sizeof unread, MSG_DONTWAIT) <= 0)
            return;
    }
}

int an_os_bind(an_descriptor descriptor, const an_address *address) {
    return bind((int)descriptor, system_address_const(address), address->length) < 0 ? errno : 0;
}

int an_os_listen(an_descriptor descriptor, int backlog) { return listen((int)descriptor, backlog) < 0 ? errno : 0; }

int an_os_local_address(an_descriptor descriptor, an_address *address) {
    socklen_t length = sizeof address->storage;
    if (getsockname((int)descriptor, an_system_address(address), &length) < 0)
        return errno;
    address->length = length;
    return 0;
}

int an_os_peer_address(an_descriptor descriptor, an_address *address) {
    socklen_t length = sizeof address->storage;
    if (getpeername((int)descriptor, an_system_address(address), &length) < 0)
        return errno;
    address->length = length;
    return 0;
}

bool an_os_is_linger(int level, int name) { return level == SOL_SOCKET && name == SO_LINGER; }

int an_os_set_option(an_descriptor descriptor, int level, int name, const void *value, size_t length) {
    return setsockopt((int)descriptor, level, name, value, (socklen_t)length) < 0 ? errno : 0;
}

int an_os_get_option(an_descriptor descriptor, int level, int name, void *value, size_t *length) {
    socklen_t native = (socklen_t)*length;
    if (getsockopt((int)descriptor, level, name, value, &native) < 0)
        return errno;
    *length = native;
    return 0;
}

bool an_os_is_exhausted(int error) { return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM; }

int an_os_connect(an_descriptor descriptor, const an_address *address, bool *waiting) {
    *waiting = false;
    if (connect((int)descriptor, system_address_const(address), address->length) == 0)
        return 0;
    if (errno == EINPROGRESS || errno == EINTR) { /* connect(2): interrupted, it goes on in the background */
        *waiting = true;
        return 0;
    }
    return an_try_again(errno);
}

/* An event may be older than the connect that it seems to answer (a fresh socket reports EPOLLOUT | EPOLLHUP), and
 * SO_ERROR is 0 also while the connect is under way: only a peer's name proves the connection. */
int an_os_connect_result(an_descriptor descriptor) {
    int result = 0;
    int error = an_integer_option(descriptor, SO_ERROR, &result);
    if (error != 0 || result != 0)
        return error != 0 ? error : result;
    an_address peer;
    return an_os_peer_address(descriptor, &peer) == ENOTCONN ? EAGAIN : 0;
}

int an_os_receive(an_descriptor descriptor, void *data, size_t length, size_t *received) {
    ssize_t count;
    do
        count = recv((int)descriptor, data, length, MSG_DONTWAIT);
    while (count < 0 && errno == EINTR);
    if (count < 0)
        return an_try_again(errno);
    *received = (size_t)count;
    return 0;
}

static int receive_by_length(an_descriptor descriptor, void *data, size_t length, size_t *received, an_address *address,
                             bool *truncated) {
    socklen_t address_length;
    ssize_t whole;
    do {
        address_length = sizeof address->storage;
        whole = recvfrom((int)descriptor, data, length, MSG_DONTWAIT | SYSTEM_LENGTH_FLAG,
                         address != NULL ? an_system_address(address) : NULL, address != NULL ? &address_length : NULL);
    } while (whole < 0 && errno == EINTR);
    if (whole < 0)
        return an_try_again(errno);
    if (address != NULL)
        address->length = address_length;
    *truncated = (size_t)whole > length;
    *received = *truncated ? length : (size_t)whole;
    return 0;
}

static int receive_by_flags(an_descriptor descriptor, void *data, size_t length, size_t *received, an_address *address,
                            bool *truncated) {
    struct iovec piece = {.iov_base = data, .iov_len = length};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    ssize_t count;
    do {
        message.msg_name = address != NULL ? address->storage : NULL;
        message.msg_namelen = address != NULL ? sizeof address->storage : 0;
        count = recvmsg((int)descriptor, &message, MSG_DONTWAIT);
    } while (count < 0 && errno == EINTR);
    if (count < 0)
        return an_try_again(errno);
    if (address != NULL)
        address->length = message.msg_namelen;
    *received = (size_t)count;
    *truncated = (message.msg_flags & MSG_TRUNC) != 0;
    return 0;
}

/* recvfrom(2) is a tenth of a microsecond cheaper than recvmsg(2), but without flags it hides that a datagram was cut. */
int an_os_receive_message(an_descriptor descriptor, bool tells_length, void *data, size_t length, size_t *received,
                          an_address *address, bool *truncated) {
    return tells_length ? receive_by_length(descriptor, data, length, received, address, truncated)
                        : receive_by_flags(descriptor, data, length, received, address, truncated);
}

int an_os_send(an_descriptor descriptor, const void *data, size_t length, size_t *sent) {
    ssize_t count;
    do
        count = send((int)descriptor, data, length, SYSTEM_SEND_FLAGS);
    while (count < 0 && errno == EINTR);
    if (count < 0)
        return an_system_send_error((int)descriptor, errno);
    *sent = (size_t)count;
    return 0;
}

static ssize_t send_pieces(an_descriptor descriptor, const an_buffer *buffers, size_t count,
                           const an_address *address) {
    struct msghdr message = {.msg_iov = (struct iovec *)(uintptr_t)buffers};
    message.msg_iovlen = (__typeof__(message.msg_iovlen))count; /* an int on most systems, a size_t on glibc */
    if (address != NULL) {
        message.msg_name = (void *)(uintptr_t)address->storage;
        message.msg_namelen = address->length;
    }
    return sendmsg((int)descriptor, &message, SYSTEM_SEND_FLAGS);
}

/* The same for one piece: the system need not read a header and a list from our memory. */
static ssize_t send_piece(an_descriptor descriptor, const an_buffer *piece, const an_address *address) {
    const struct sockaddr *to = address != NULL ? system_address_const(address) : NULL;
    return sendto((int)descriptor, piece->data, piece->length, SYSTEM_SEND_FLAGS, to,
                  address != NULL ? address->length : 0);
}

int an_os_send_message(an_descriptor descriptor, const an_buffer *buffers, size_t count, const an_address *address,
                       size_t *sent) {
    ssize_t done;
    do
        done = count == 1 ? send_piece(descriptor, buffers, address) : send_pieces(descriptor, buffers, count, address);
    while (done < 0 && errno == EINTR);
    if (done < 0)
        return an_system_send_error((int)descriptor, errno);
    *sent = (size_t)done;
    return 0;
}

/* For files that sendfile(2) refuses (Linux: /proc, some file systems), and where there is none: one piece by way of this
 * stack. */
static int send_file_by_copy(an_descriptor descriptor, int file, uint64_t offset, size_t count, size_t *sent) {
    char piece[16384];
    ssize_t have;
    do
        have = pread(file, piece, count < sizeof piece ? count : sizeof piece, (off_t)offset);
    while (have < 0 && errno == EINTR);
    if (have < 0)
        return errno;
    if (have == 0) {
        *sent = 0;
        return 0;
    }
    return an_os_send(descriptor, piece, (size_t)have, sent);
}

int an_os_send_file(an_descriptor descriptor, an_descriptor file, uint64_t offset, uint64_t count, size_t *sent) {
    const uint64_t most = 1u << 20; /* one call's share, so that one file cannot hold up the other sockets */
    uint64_t room = offset < INT64_MAX ? INT64_MAX - offset : 0; /* no file goes further */
    size_t length = (size_t)(count < most ? count : most);
    if (length > room)
        length = (size_t)room;
    if (length == 0) {
        *sent = 0;
        return 0;
    }
    int error = an_system_send_file((int)descriptor, (int)file, offset, length, sent);
    return error == EINVAL ? send_file_by_copy(descriptor, (int)file, offset, length, sent) : error;
}

/* ---- a pipe that ends a wait ------------------------------------------------------------------------------------------ */

/* pipe2(2) would do it in one call; macOS has none. */
int an_wakeup_open(struct an_wakeup *wakeup) {
    int ends[2];
    wakeup->read_end = -1;
    if (pipe(ends) < 0)
        return errno;
    *wakeup = (struct an_wakeup){.read_end = ends[0], .write_end = ends[1]};
    for (int i = 0; i < 2; i++) {
        if (fcntl(ends[i], F_SETFL, O_NONBLOCK) < 0 || fcntl(ends[i], F_SETFD, FD_CLOEXEC) < 0) {
            int error = errno;
            an_wakeup_close(wakeup);
            wakeup->read_end = -1;
            return error;
        }
    }
    return 0;
}

void an_wakeup_close(struct an_wakeup *wakeup) {
    close((int)wakeup->read_end);
    close((int)wakeup->write_end);
}

/* A full pipe (EAGAIN) is readable enough. */
void an_wakeup_ring(const struct an_wakeup *wakeup) {
    ssize_t written;
    do
        written = write((int)wakeup->write_end, "w", 1);
    while (written < 0 && errno == EINTR);
    assert(written == 1 || errno == EAGAIN);
}

void an_wakeup_drain(const struct an_wakeup *wakeup) {
    char bytes[64];
    while (read((int)wakeup->read_end, bytes, sizeof bytes) > 0) {
    }
}

/* ---- files ---------------------------------------------------------------------------------------------------------- */

int an_os_duplicate_file(an_descriptor file, an_descriptor *duplicate) {
    int copy = fcntl((int)file, F_DUPFD_CLOEXEC, 0);
    if (copy < 0)
        return errno;
    *duplicate = copy;
    return 0;
}

void an_os_close_file(an_descriptor file) { close((int)file); }

/* ---- addresses ------------------------------------------------------------------------------------------------------- */

static int fill_ip4(an_address *address, const char *host, uint16_t port) {
    struct sockaddr_in *ip4 = (struct sockaddr_in *)address->storage;
    ip4->sin_family = AF_INET;
    ip4->sin_port = htons(port);
    address->length = sizeof *ip4;
    an_system_seal_address(address);
    return inet_pton(AF_INET, host, &ip4->sin_addr) == 1 ? 0 : EINVAL;
}

/* RFC 4007, section 11: address%zone, the zone a number or an interface's name. */
static int parse_scope(const char *text, uint32_t *scope) {
    char *end;
    unsigned long number = strtoul(text, &end, 10);
    if (*text >= '0' && *text <= '9' && *end == '\0' && number <= UINT32_MAX) {
        *scope = (uint32_t)number;
        return 0;
    }
    *scope = if_nametoindex(text);
    return *scope != 0 ? 0 : EINVAL;
}

static int fill_ip6(an_address *address, const char *host, uint16_t port, uint32_t flow, uint32_t scope) {
    struct sockaddr_in6 *ip6 = (struct sockaddr_in6 *)address->storage;
    char numeric[INET6_ADDRSTRLEN];
    const char *percent = strchr(host, '%');
    size_t length = percent != NULL ? (size_t)(percent - host) : strlen(host);
    if (length >= sizeof numeric)
        return EINVAL;
    memcpy(numeric, host, length);
    numeric[length] = '\0';
    if (percent != NULL && parse_scope(percent + 1, &scope) != 0)
        return EINVAL;
    ip6->sin6_family = AF_INET6;
    ip6->sin6_port = htons(port);
    ip6->sin6_flowinfo = htonl(flow);
    ip6->sin6_scope_id = scope;
    address->length = sizeof *ip6;
    an_system_seal_address(address);
    return inet_pton(AF_INET6, numeric, &ip6->sin6_addr) == 1 ? 0 : EINVAL;
}

int an_os_address_ip(an_address *address, int family, const char *host, uint16_t port, uint32_t flow, uint32_t scope) {
    memset(address, 0, sizeof *address);
    if (family == AF_INET)
        return fill_ip4(address, host, port);
    if (family == AF_INET6)
        return fill_ip6(address, host, port, flow, scope);
    return EINVAL;
}

int an_os_address_path(an_address *address, const char *path, size_t length) {
    memset(address, 0, sizeof *address);
    struct sockaddr_un *local = (struct sockaddr_un *)address->storage;
    local->sun_family = AF_UNIX;
    bool named = length > 0 && path[0] != '\0';
    size_t most = sizeof local->sun_path - (named ? 1 : 0);
    if (length > most || (length > 0 && !named && !SYSTEM_ABSTRACT_NAMES))
        return EINVAL;
    memcpy(local->sun_path, path, length);
    address->length = (uint32_t)(offsetof(struct sockaddr_un, sun_path) + length + (named ? 1 : 0));
    an_system_seal_address(address);
    return 0;
}

int an_os_address_family(const an_address *address) {
    return address->length >= sizeof(sa_family_t) ? system_address_const(address)->sa_family : AF_UNSPEC;
}

/* What inet_ntop(3) writes, at a tenth of its cost: each accepted connection and each new peer has its address shown. */
static void format_ip4(const struct in_addr *ip4, char *host) {
    const unsigned char *bytes = (const unsigned char *)&ip4->s_addr;
    for (int i = 0; i < 4; i++) {
        unsigned value = bytes[i];
        if (value >= 100)
            *host++ = (char)('0' + value / 100);
        if (value >= 10)
            *host++ = (char)('0' + value / 10 % 10);
        *host++ = (char)('0' + value % 10);
        *host++ = i < 3 ? '.' : '\0';
    }
}

int an_os_address_format(const an_address *address, char *host, uint16_t *port, uint32_t *flow, uint32_t *scope) {
    int family = an_os_address_family(address);
    *flow = *scope = 0;
    if (family == AF_INET) {
        const struct sockaddr_in *ip4 = (const struct sockaddr_in *)address->storage;
        *port = ntohs(ip4->sin_port);
        format_ip4(&ip4->sin_addr, host);
        return 0;
    }
    if (family == AF_INET6) {
        const struct sockaddr_in6 *ip6 = (const struct sockaddr_in6 *)address->storage;
        *port = ntohs(ip6->sin6_port);
        *flow = ntohl(ip6->sin6_flowinfo);
        *scope = ip6->sin6_scope_id;
        return inet_ntop(AF_INET6, &ip6->sin6_addr, host, AN_HOST_SIZE) != NULL ? 0 : errno;
    }
    return EINVAL;
}

int an_os_address_format_path(const an_address *address, char *path, size_t *length) {
    const struct sockaddr_un *local = (const struct sockaddr_un *)address->storage;
    size_t start = offsetof(struct sockaddr_un, sun_path);
    if (address->length > 0 && an_os_address_family(address) != AF_UNIX)
        return EINVAL;
    *length = address->length > start ? address->length - start : 0;
    if (*length > sizeof local->sun_path)
        *length = sizeof local->sun_path; /* Linux may report one byte more than it holds for a full path */
    if (*length > 0 && (local->sun_path[0] != '\0' || !SYSTEM_ABSTRACT_NAMES))
        *length = strnlen(local->sun_path, *length);
    memcpy(path, local->sun_path, *length);
    if (*length < AN_HOST_SIZE)
        path[*length] = '\0';
    return 0;
}

#endif
