/* What one system call is given: macOS refuses more than INT_MAX bytes (EINVAL), so no stream's call may ask for them. The
 * calls are replaced by ones that refuse as macOS does, and take all the rest at once.
 */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* MAP_NORESERVE */
#endif

#include "check.h"

#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <sys/mman.h>

static const size_t HUGE_LENGTH = (size_t)3 << 30;

static int calls;

static bool is_refused(size_t length) {
    calls++;
    errno = EINVAL;
    return length > INT_MAX;
}

ssize_t send(int descriptor, const void *data, size_t length, int flags) {
    (void)descriptor, (void)data, (void)flags;
    return is_refused(length) ? -1 : (ssize_t)length;
}

ssize_t sendmsg(int descriptor, const struct msghdr *message, int flags) {
    size_t length = 0;
    (void)descriptor, (void)flags;
    for (size_t i = 0; i < (size_t)message->msg_iovlen; i++)
        length += message->msg_iov[i].iov_len;
    return is_refused(length) ? -1 : (ssize_t)length;
}

ssize_t recv(int descriptor, void *data, size_t length, int flags) {
    return is_refused(length) ? -1 : recvfrom(descriptor, data, length, flags, NULL, NULL);
}

/* Address space only: nothing reads or writes more than a page of it. */
static void *reserve(void) {
    void *memory = mmap(NULL, HUGE_LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

static void expect_sent(an_port *port, uint64_t length) {
    an_completion completion = dequeue_one(port);
    CHECK(completion.kind == AN_SEND && completion.error == 0 && completion.transferred == length);
    an_completion_release(&completion, 1);
}

static void a_send_of_3_gibibytes_goes_out_whole(const char *backend) {
    an_port *port = open_port(backend);
    an_socket *socket;
    an_operation operation;
    int peer;
    void *memory = reserve();
    open_pair(port, &socket, NULL, &peer);
    calls = 0;
    CHECK_OK(an_socket_send(socket, &operation, memory, HUGE_LENGTH, AN_FOREVER));
    expect_sent(port, HUGE_LENGTH);
    CHECK(calls == 3);
    an_buffer pieces[] = {{memory, 10}, {memory, HUGE_LENGTH}, {memory, 1}};
    CHECK_OK(an_socket_sendv(socket, &operation, pieces, 3, AN_FOREVER));
    expect_sent(port, HUGE_LENGTH + 11);
    close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
    munmap(memory, HUGE_LENGTH);
}

static void a_receive_into_3_gibibytes_takes_what_is_there(const char *backend) {
    an_port *port = open_port(backend);
    an_socket *socket;
    an_operation operation;
    int peer;
    void *memory = reserve();
    open_pair(port, &socket, NULL, &peer);
    CHECK(write(peer, "x", 1) == 1);
    CHECK_OK(an_socket_recv(socket, &operation, memory, HUGE_LENGTH, 0, UINT64_MAX, AN_FOREVER));
    an_completion completion = dequeue_one(port);
    CHECK(completion.kind == AN_RECV && completion.error == 0 && completion.transferred == 1);
    an_completion_release(&completion, 1);
    close(peer);
    an_socket_free(socket, 0);
    an_port_free(port);
    munmap(memory, HUGE_LENGTH);
}

int main(void) {
    on_each_backend("a send of 3 GiB goes out whole", a_send_of_3_gibibytes_goes_out_whole);
    on_each_backend("a receive into 3 GiB takes what is there", a_receive_into_3_gibibytes_takes_what_is_there);
    return 0;
}
