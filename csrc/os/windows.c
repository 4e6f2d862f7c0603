/* windows.c - os.h on Windows, by Winsock. Sources: Microsoft's documentation of the calls named.
 *
 * Errors are WSA codes where Winsock speaks, system codes (GetLastError) for files. What POSIX users know under another
 * number is translated where it comes up, with a word why.
 */
#if defined(_WIN32)

#include "os.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include <ws2tcpip.h>

#include <afunix.h>
#include <iphlpapi.h>
#include <mswsock.h>

/* Headers of older kits lack these: mswsock.h, "SIO_UDP_CONNRESET" and "SIO_UDP_NETRESET". */
#if !defined(SIO_UDP_CONNRESET)
#define SIO_UDP_CONNRESET _WSAIOW(IOC_VENDOR, 12)
#endif
#if !defined(SIO_UDP_NETRESET)
#define SIO_UDP_NETRESET _WSAIOW(IOC_VENDOR, 15)
#endif

_Static_assert(sizeof(struct sockaddr_in6) <= sizeof(((an_address *)0)->storage), "an_address holds a served address");
_Static_assert(sizeof(struct sockaddr_un) <= sizeof(((an_address *)0)->storage), "an_address holds a served address");
_Static_assert(sizeof(SOCKET) == sizeof(an_descriptor), "an_descriptor holds a SOCKET");

/* One call's share: what is handed over is out of reach of cancel, and a large call is copied by the kernel as a whole. */
enum { SEND_MOST = 1 << 20 };

/* ---- locks ------------------------------------------------------------------------------------------------------ */

void an_mutex_init(struct an_mutex *mutex) { InitializeSRWLock(&mutex->native); }

void an_mutex_destroy(struct an_mutex *mutex) { (void)mutex; }

void an_mutex_lock(struct an_mutex *mutex) { AcquireSRWLockExclusive(&mutex->native); }

void an_mutex_unlock(struct an_mutex *mutex) { ReleaseSRWLockExclusive(&mutex->native); }

void an_condition_init(struct an_condition *condition) { InitializeConditionVariable(&condition->native); }

void an_condition_destroy(struct an_condition *condition) { (void)condition; }

void an_condition_signal(struct an_condition *condition) { WakeConditionVariable(&condition->native); }

void an_condition_broadcast(struct an_condition *condition) { WakeAllConditionVariable(&condition->native); }

void an_condition_wait(struct an_condition *condition, struct an_mutex *mutex, int64_t until_ns) {
    int milliseconds = an_milliseconds_until(until_ns);
    SleepConditionVariableSRW(&condition->native, &mutex->native, milliseconds < 0 ? INFINITE : (DWORD)milliseconds, 0);
}

/* ---- clock, threads, fork ----------------------------------------------------------------------------------------- */

int64_t an_clock(void) {
    static int64_t frequency; /* constant since boot; threads that meet here write the same */
    LARGE_INTEGER value;
    if (frequency == 0) {
        QueryPerformanceFrequency(&value);
        frequency = value.QuadPart;
    }
    QueryPerformanceCounter(&value);
    int64_t seconds = value.QuadPart / frequency, rest = value.QuadPart % frequency;
    return seconds * 1000000000 + rest * 1000000000 / frequency;
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

uintptr_t an_thread_identity(void) { return GetCurrentThreadId(); }

uint32_t an_fork_generation(void) { return 0; } /* there is no fork */

uint32_t an_fork_count(void) { return 0; }

/* Not getenv, which looks into a copy that each C library has of its own. */
bool an_os_environment(const char *name, char *value, size_t size) {
    DWORD length = GetEnvironmentVariableA(name, value, (DWORD)size);
    return length > 0 && length < size;
}

/* ---- the console -------------------------------------------------------------------------------------------------------- */

/* The system calls the handlers of an event, the latest first, in a thread that it makes for that. Ours comes before the C
 * library's, by which Python learns of Ctrl-C; a thread that it woke would look for a signal that is not there yet. So it
 * only has that thread's end watched: then all have handled it. */

static SRWLOCK interruptible_lock = SRWLOCK_INIT;
static struct an_interruptible *interruptible; /* interruptible_lock: the threads that wait */

void an_os_begin_interruptible(struct an_interruptible *waiting) {
    waiting->thread = GetCurrentThreadId();
    waiting->previous = NULL;
    AcquireSRWLockExclusive(&interruptible_lock);
    waiting->next = interruptible;
    if (interruptible != NULL)
        interruptible->previous = waiting;
    interruptible = waiting;
    ReleaseSRWLockExclusive(&interruptible_lock);
}

void an_os_end_interruptible(struct an_interruptible *waiting) {
    AcquireSRWLockExclusive(&interruptible_lock);
    if (waiting->next != NULL)
        waiting->next->previous = waiting->previous;
    if (waiting->previous != NULL)
        waiting->previous->next = waiting->next;
    else
        interruptible = waiting->next;
    ReleaseSRWLockExclusive(&interruptible_lock);
}

static void CALLBACK do_nothing(ULONG_PTR unused) { (void)unused; }

static void interrupt_all(void) {
    AcquireSRWLockExclusive(&interruptible_lock);
    for (const struct an_interruptible *waiting = interruptible; waiting != NULL; waiting = waiting->next) {
        HANDLE thread = OpenThread(THREAD_SET_CONTEXT, FALSE, waiting->thread);
        if (thread == NULL)
            continue;
        QueueUserAPC(do_nothing, thread, 0);
        CloseHandle(thread);
    }
    ReleaseSRWLockExclusive(&interruptible_lock);
}

static DWORD WINAPI interrupt_behind(void *handlers) {
    enum { LONGEST_MS = 10000 }; /* a handler that takes longer is not waited for */
    WaitForSingleObject(handlers, LONGEST_MS);
    CloseHandle(handlers);
    interrupt_all();
    return 0;
}

/* FALSE: it is for the others to handle. */
static BOOL WINAPI notice_event(DWORD event) {
    HANDLE process = GetCurrentProcess(), handlers, watcher;
    if ((event != CTRL_C_EVENT && event != CTRL_BREAK_EVENT) ||
        !DuplicateHandle(process, GetCurrentThread(), process, &handlers, SYNCHRONIZE, FALSE, 0))
        return FALSE;
    watcher = CreateThread(NULL, 0, interrupt_behind, handlers, 0, NULL);
    if (watcher != NULL)
        CloseHandle(watcher);
    else
        CloseHandle(handlers);
    return FALSE;
}

static BOOL CALLBACK listen_to_console(INIT_ONCE *once, void *unused, void **also_unused) {
    const DWORD how = GET_MODULE_HANDLE_EX_FLAG_PIN | GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS;
    HMODULE module;
    (void)once, (void)unused, (void)also_unused;
    /* The handler stays for good, and so must the library that it is in. */
    if (GetModuleHandleExW(how, (const wchar_t *)&interruptible, &module))
        SetConsoleCtrlHandler(notice_event, TRUE);
    return TRUE;
}

void an_os_listen_to_console(void) {
    static INIT_ONCE once = INIT_ONCE_STATIC_INIT;
    InitOnceExecuteOnce(&once, listen_to_console, NULL, NULL);
}

/* ---- memory ------------------------------------------------------------------------------------------------------- */

void *an_os_map(size_t size) { return VirtualAlloc(NULL, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }

void an_os_unmap(void *pages, size_t size) {
    (void)size;
    VirtualFree(pages, 0, MEM_RELEASE);
}

/* ---- sockets -------------------------------------------------------------------------------------------------------- */

static SOCKET native(an_descriptor descriptor) { return (SOCKET)descriptor; }

static struct sockaddr *system_address(an_address *address) { return (struct sockaddr *)address->storage; }

static const struct sockaddr *system_address_const(const an_address *address) {
    return (const struct sockaddr *)address->storage;
}

bool an_os_is_stream(int type) { return type == SOCK_STREAM; }

bool an_os_is_datagram(int type) { return type == SOCK_DGRAM || type == SOCK_RAW; }

bool an_os_is_internet(int family) { return family == AF_INET || family == AF_INET6; }

bool an_os_tells_length(int family, int type, int protocol) {
    (void)family;
    (void)type;
    (void)protocol;
    return false; /* nor need it: an error tells of the cut */
}

/* Winsock is started once and never ended: sockets may live until the process ends. */
static int start_winsock(void) {
    static uint32_t started; /* two threads that meet both start it, which Winsock counts */
    WSADATA data;
    if (an_atomic_load32(&started) != 0)
        return 0;
    int error = WSAStartup(MAKEWORD(2, 2), &data);
    if (error == 0)
        an_atomic_store32(&started, 1);
    return error;
}

static int set_non_blocking(an_descriptor descriptor) {
    u_long yes = 1;
    return ioctlsocket(native(descriptor), (long)FIONBIO, &yes) == 0 ? 0 : WSAGetLastError();
}

/* An unreachable peer's answer to a datagram (ICMP) fails a receive only where that is told of one peer: a socket that
 * is connected. Else it would poison the receives of what others sent (KB 263823). */
static void report_unreachable(an_descriptor descriptor, bool report) {
    BOOL value = report;
    DWORD unused;
    WSAIoctl(native(descriptor), SIO_UDP_CONNRESET, &value, sizeof value, NULL, 0, &unused, NULL, NULL);
    WSAIoctl(native(descriptor), SIO_UDP_NETRESET, &value, sizeof value, NULL, 0, &unused, NULL, NULL);
}

int an_os_open(int family, int type, int protocol, an_descriptor *descriptor) {
    int error = start_winsock();
    if (error != 0)
        return error;
    SOCKET opened = WSASocketW(family, type, protocol, NULL, 0, WSA_FLAG_OVERLAPPED | WSA_FLAG_NO_HANDLE_INHERIT);
    if (opened == INVALID_SOCKET)
        return WSAGetLastError();
    *descriptor = (an_descriptor)opened;
    error = set_non_blocking(*descriptor);
    if (error != 0) {
        closesocket(opened);
        return error;
    }
    if (an_os_is_datagram(type))
        report_unreachable(*descriptor, false);
    return 0;
}

static int integer_option(an_descriptor descriptor, int name, int *value) {
    int length = sizeof *value;
    return getsockopt(native(descriptor), SOL_SOCKET, name, (char *)value, &length) == 0 ? 0 : WSAGetLastError();
}

int an_os_describe(an_descriptor descriptor, int *family, int *type, int *protocol) {
    WSAPROTOCOL_INFOW info;
    int length = sizeof info;
    int error = start_winsock();
    if (error != 0)
        return error;
    if (getsockopt(native(descriptor), SOL_SOCKET, SO_PROTOCOL_INFOW, (char *)&info, &length) != 0)
        return WSAGetLastError();
    *family = info.iAddressFamily;
    *type = info.iSocketType;
    *protocol = info.iProtocol;
    return 0;
}

int an_os_prepare(an_descriptor descriptor) {
    int error = set_non_blocking(descriptor);
    if (error == 0 && !SetHandleInformation((HANDLE)descriptor, HANDLE_FLAG_INHERIT, 0))
        error = (int)GetLastError();
    return error;
}

int an_os_is_listening(an_descriptor descriptor, bool *listening) {
    int value = 0;
    int error = integer_option(descriptor, SO_ACCEPTCONN, &value);
    *listening = value != 0;
    return error;
}

void an_os_close(an_descriptor descriptor) { closesocket(native(descriptor)); }

int an_os_shutdown(an_descriptor descriptor, int how) {
    return shutdown(native(descriptor), how) == 0 ? 0 : WSAGetLastError();
}

bool an_os_reset_if_asked(an_descriptor descriptor) {
    (void)descriptor;
    return false; /* closing does it: no request under way holds a socket whose handle was closed */
}

void an_os_end_politely(an_descriptor descriptor) {
    char unread[16384];
    if (shutdown(native(descriptor), SD_SEND) != 0)
        return;
    for (int i = 0; i < 64; i++) { /* 1 MiB: what a flooding client sends is not worth more */
        if (recv(native(descriptor), unread, sizeof unread, 0) <= 0)
            return;
    }
}

int an_os_bind(an_descriptor descriptor, const an_address *address) {
    int done = bind(native(descriptor), system_address_const(address), (int)address->length);
    return done == 0 ? 0 : WSAGetLastError();
}

int an_os_listen(an_descriptor descriptor, int backlog) {
    return listen(native(descriptor), backlog) == 0 ? 0 : WSAGetLastError();
}

int an_os_local_address(an_descriptor descriptor, an_address *address) {
    int length = sizeof address->storage;
    if (getsockname(native(descriptor), system_address(address), &length) != 0)
        return WSAGetLastError();
    address->length = (uint32_t)length;
    return 0;
}

int an_os_peer_address(an_descriptor descriptor, an_address *address) {
    int length = sizeof address->storage;
    if (getpeername(native(descriptor), system_address(address), &length) != 0)
        return WSAGetLastError();
    address->length = (uint32_t)length;
    return 0;
}

bool an_os_is_linger(int level, int name) { return level == SOL_SOCKET && name == SO_LINGER; }

int an_os_set_option(an_descriptor descriptor, int level, int name, const void *value, size_t length) {
    int done = setsockopt(native(descriptor), level, name, value, (int)length);
    return done == 0 ? 0 : WSAGetLastError();
}

/* Some options are a single byte here where POSIX has an int; an int that was asked for is filled up. */
int an_os_get_option(an_descriptor descriptor, int level, int name, void *value, size_t *length) {
    int got = (int)*length;
    memset(value, 0, *length);
    if (getsockopt(native(descriptor), level, name, value, &got) != 0)
        return WSAGetLastError();
    *length = (size_t)got;
    return 0;
}

int an_os_accept_error(an_descriptor listener, int error) {
    bool listening;
    if (error != WSAEINVAL || an_os_is_listening(listener, &listening) != 0 || !listening)
        return error;
    return AN_EMFILE;
}

int an_os_accept(an_descriptor listener, an_descriptor *accepted, an_address *address) {
    SOCKET opened = accept(native(listener), NULL, NULL);
    if (opened == INVALID_SOCKET)
        return an_os_accept_error(listener, WSAGetLastError());
    *accepted = (an_descriptor)opened;
    int error = an_os_prepare(*accepted);
    if (error != 0) {
        closesocket(opened);
        return error;
    }
    if (an_os_peer_address(*accepted, address) != 0)
        address->length = 0; /* reset meanwhile: it has no peer any more */
    return 0;
}

/* accept, AcceptEx: the connection was reset before it was accepted. */
bool an_os_accept_is_transient(int error) {
    switch (error) {
    case WSAECONNRESET:
    case WSAECONNABORTED:
    case WSAENETRESET:
    case WSAENETDOWN:
    case WSAENETUNREACH:
    case WSAEHOSTUNREACH:
    case WSAETIMEDOUT:
    case WSAEDISCON:
        return true;
    default:
        return false;
    }
}

bool an_os_is_exhausted(int error) {
    return error == WSAEMFILE || error == WSAENOBUFS || error == WSA_NOT_ENOUGH_MEMORY ||
           error == ERROR_TOO_MANY_OPEN_FILES || error == ERROR_NO_SYSTEM_RESOURCES;
}

/* Whether the system connects such a socket by itself (ConnectEx is for connections of the internet families). */
static bool connects_by_itself(an_descriptor descriptor) {
    int family, type, protocol;
    return an_os_describe(descriptor, &family, &type, &protocol) == 0 && an_os_is_stream(type) &&
           an_os_is_internet(family);
}

int an_os_connect(an_descriptor descriptor, const an_address *address, bool *waiting) {
    *waiting = connects_by_itself(descriptor); /* by the backend, when it is asked to await it */
    if (*waiting)
        return 0;
    if (connect(native(descriptor), system_address_const(address), (int)address->length) != 0) {
        *waiting = WSAGetLastError() == WSAEWOULDBLOCK;
        return *waiting ? 0 : WSAGetLastError();
    }
    report_unreachable(descriptor, true);
    return 0;
}

int an_os_connect_result(an_descriptor descriptor) {
    int result = 0;
    int error = integer_option(descriptor, SO_ERROR, &result);
    if (error != 0 || result != 0)
        return error != 0 ? error : result;
    an_address peer;
    return an_os_peer_address(descriptor, &peer) == WSAENOTCONN ? AN_EAGAIN : 0;
}

static int clamp(size_t length) { return length < SEND_MOST ? (int)length : SEND_MOST; }

int an_os_receive(an_descriptor descriptor, void *data, size_t length, size_t *received) {
    int count = recv(native(descriptor), data, clamp(length), 0);
    if (count >= 0) {
        *received = (size_t)count;
        return 0;
    }
    int error = WSAGetLastError();
    if (error != WSAESHUTDOWN)
        return error;
    *received = 0; /* shut down by ourselves: the end, as on POSIX */
    return 0;
}

int an_os_receive_message(an_descriptor descriptor, bool tells_length, void *data, size_t length, size_t *received,
                          an_address *address, bool *truncated) {
    (void)tells_length;
    int from_length = sizeof address->storage;
    int count = recvfrom(native(descriptor), data, clamp(length), 0, address != NULL ? system_address(address) : NULL,
                         address != NULL ? &from_length : NULL);
    int error = count < 0 ? WSAGetLastError() : 0;
    *truncated = error == WSAEMSGSIZE;
    if (error == WSAECONNRESET || error == WSAENETRESET)
        return AN_ECONNREFUSED; /* an ICMP answer to what was sent, which POSIX tells by this number */
    if (error != 0 && !*truncated)
        return error;
    if (address != NULL)
        address->length = (uint32_t)from_length;
    *received = *truncated ? length : (size_t)count;
    return 0;
}

int an_os_send(an_descriptor descriptor, const void *data, size_t length, size_t *sent) {
    int count = send(native(descriptor), length > 0 ? data : "", clamp(length), 0);
    if (count < 0)
        return WSAGetLastError();
    *sent = (size_t)count;
    return 0;
}

/* A datagram is whole or nothing; of a stream's bytes one call takes its share. */
static size_t list_buffers(const an_buffer *buffers, size_t count, WSABUF *listed) {
    uint64_t total = 0;
    size_t used = 0;
    for (; used < count && total < SEND_MOST; used++) {
        listed[used].buf = (char *)(uintptr_t)buffers[used].data;
        listed[used].len = (ULONG)clamp(buffers[used].length);
        total += listed[used].len;
        if (listed[used].len < buffers[used].length)
            return used + 1;
    }
    return used;
}

int an_os_send_message(an_descriptor descriptor, const an_buffer *buffers, size_t count, const an_address *address,
                       size_t *sent) {
    WSABUF listed[AN_GATHER];
    DWORD done = 0;
    DWORD used = (DWORD)list_buffers(buffers, count, listed);
    int failed = address != NULL ? WSASendTo(native(descriptor), listed, used, &done, 0, system_address_const(address),
                                             (int)address->length, NULL, NULL)
                                 : WSASend(native(descriptor), listed, used, &done, 0, NULL, NULL);
    if (failed != 0)
        return WSAGetLastError();
    *sent = done;
    return 0;
}

/* Tells only the end of the file: the system sends by itself (TransmitFile), when the backend is asked to await it. */
int an_os_send_file(an_descriptor descriptor, an_descriptor file, uint64_t offset, uint64_t count, size_t *sent) {
    LARGE_INTEGER size;
    (void)descriptor;
    if (!GetFileSizeEx((HANDLE)file, &size))
        return (int)GetLastError();
    if (count > 0 && offset < (uint64_t)size.QuadPart)
        return AN_EAGAIN;
    *sent = 0;
    return 0;
}

/* ---- files ---------------------------------------------------------------------------------------------------------- */

/* Opened anew where it can be: a duplicate shares the position with the caller's handle, which TransmitFile may move. */
int an_os_duplicate_file(an_descriptor file, an_descriptor *duplicate) {
    const DWORD share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
    HANDLE self = GetCurrentProcess();
    HANDLE copy = ReOpenFile((HANDLE)file, GENERIC_READ, share, FILE_FLAG_OVERLAPPED);
    if (copy == INVALID_HANDLE_VALUE &&
        !DuplicateHandle(self, (HANDLE)file, self, &copy, 0, FALSE, DUPLICATE_SAME_ACCESS))
        return GetLastError() == ERROR_INVALID_HANDLE ? AN_EBADF : (int)GetLastError();
    *duplicate = (an_descriptor)copy;
    return 0;
}

void an_os_close_file(an_descriptor file) { CloseHandle((HANDLE)file); }

/* ---- addresses ------------------------------------------------------------------------------------------------------- */

static int fill_ip4(an_address *address, const char *host, uint16_t port) {
    struct sockaddr_in *ip4 = (struct sockaddr_in *)address->storage;
    ip4->sin_family = AF_INET;
    ip4->sin_port = htons(port);
    address->length = sizeof *ip4;
    return inet_pton(AF_INET, host, &ip4->sin_addr) == 1 ? 0 : AN_EINVAL;
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
    return *scope != 0 ? 0 : AN_EINVAL;
}

static int fill_ip6(an_address *address, const char *host, uint16_t port, uint32_t flow, uint32_t scope) {
    struct sockaddr_in6 *ip6 = (struct sockaddr_in6 *)address->storage;
    char numeric[INET6_ADDRSTRLEN];
    const char *percent = strchr(host, '%');
    size_t length = percent != NULL ? (size_t)(percent - host) : strlen(host);
    if (length >= sizeof numeric)
        return AN_EINVAL;
    memcpy(numeric, host, length);
    numeric[length] = '\0';
    if (percent != NULL && parse_scope(percent + 1, &scope) != 0)
        return AN_EINVAL;
    ip6->sin6_family = AF_INET6;
    ip6->sin6_port = htons(port);
    ip6->sin6_flowinfo = htonl(flow);
    ip6->sin6_scope_id = scope;
    address->length = sizeof *ip6;
    return inet_pton(AF_INET6, numeric, &ip6->sin6_addr) == 1 ? 0 : AN_EINVAL;
}

int an_os_address_ip(an_address *address, int family, const char *host, uint16_t port, uint32_t flow, uint32_t scope) {
    memset(address, 0, sizeof *address);
    if (start_winsock() != 0) /* inet_pton asks for it */
        return AN_EINVAL;
    if (family == AF_INET)
        return fill_ip4(address, host, port);
    if (family == AF_INET6)
        return fill_ip6(address, host, port, flow, scope);
    return AN_EINVAL;
}

/* Abstract names are Linux' own: Windows takes them at bind, and nobody can connect to them. */
int an_os_address_path(an_address *address, const char *path, size_t length) {
    memset(address, 0, sizeof *address);
    struct sockaddr_un *local = (struct sockaddr_un *)address->storage;
    local->sun_family = AF_UNIX;
    if (length >= sizeof local->sun_path || (length > 0 && path[0] == '\0'))
        return AN_EINVAL;
    if (length > 0)
        memcpy(local->sun_path, path, length);
    address->length = (uint32_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
    return 0;
}

int an_os_address_family(const an_address *address) {
    return address->length >= sizeof(ADDRESS_FAMILY) ? system_address_const(address)->sa_family : AF_UNSPEC;
}

int an_os_address_format(const an_address *address, char *host, uint16_t *port, uint32_t *flow, uint32_t *scope) {
    int family = an_os_address_family(address);
    *flow = *scope = 0;
    if (family == AF_INET) {
        const struct sockaddr_in *ip4 = (const struct sockaddr_in *)address->storage;
        *port = ntohs(ip4->sin_port);
        return inet_ntop(AF_INET, &ip4->sin_addr, host, AN_HOST_SIZE) != NULL ? 0 : WSAGetLastError();
    }
    if (family == AF_INET6) {
        const struct sockaddr_in6 *ip6 = (const struct sockaddr_in6 *)address->storage;
        *port = ntohs(ip6->sin6_port);
        *flow = ntohl(ip6->sin6_flowinfo);
        *scope = ip6->sin6_scope_id;
        return inet_ntop(AF_INET6, &ip6->sin6_addr, host, AN_HOST_SIZE) != NULL ? 0 : WSAGetLastError();
    }
    return AN_EINVAL;
}

int an_os_address_format_path(const an_address *address, char *path, size_t *length) {
    const struct sockaddr_un *local = (const struct sockaddr_un *)address->storage;
    size_t start = offsetof(struct sockaddr_un, sun_path);
    if (address->length > 0 && an_os_address_family(address) != AF_UNIX)
        return AN_EINVAL;
    *length = address->length > start ? address->length - start : 0;
    if (*length > sizeof local->sun_path)
        *length = sizeof local->sun_path;
    *length = strnlen(local->sun_path, *length);
    memcpy(path, local->sun_path, *length);
    if (*length < AN_HOST_SIZE)
        path[*length] = '\0';
    return 0;
}

#endif
