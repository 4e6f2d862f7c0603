/* Each reactor alone, through reactor.h: what it must report, and what it must not. A new reactor goes into the table; with
 * -DAN_REACTOR_OF_YOURS=NAME one from outside does.
 */
#include "check.h"
#include "reactor.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>

#if defined(AN_REACTOR_OF_YOURS)
extern const struct an_reactor_interface AN_REACTOR_OF_YOURS;
#endif

static const struct an_reactor_interface *const reactors[] = {
#if defined(AN_REACTOR_OF_YOURS)
    &AN_REACTOR_OF_YOURS,
#endif
#if defined(__linux__)
    &an_reactor_epoll,
#endif
#if defined(AN_HAVE_KQUEUE)
    &an_reactor_kqueue,
#endif
    &an_reactor_poll,
};

struct watched {
    const struct an_reactor_interface *interface;
    struct an_reactor *reactor;
    int ends[2];
    uint64_t tag;
};

static const uint64_t GENERATION = UINT64_C(7) << 32;

static struct watched open_watched(const struct an_reactor_interface *interface) {
    struct watched watched = {.interface = interface, .tag = GENERATION | 3};
    CHECK_OK(interface->open(&watched.reactor));
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, watched.ends) == 0);
    CHECK_OK(interface->add(watched.reactor, watched.ends[0], watched.tag));
    return watched;
}

static void close_watched(struct watched *watched) {
    watched->interface->close(watched->reactor);
    close(watched->ends[0]);
    if (watched->ends[1] >= 0)
        close(watched->ends[1]);
}

static void expect(struct watched *watched, uint32_t direction) {
    if (watched->interface->expect != NULL)
        watched->interface->expect(watched->reactor, watched->tag, direction);
}

/* What is reported for the descriptor until a wait ends without reports. */
static uint32_t reported(struct watched *watched, int64_t first_ns, bool *woken) {
    static struct an_reactor_report reports[AN_REPORTS];
    uint32_t events = 0;
    size_t count = 0;
    bool any_woken = false, now_woken;
    int64_t until_ns = first_ns;
    do {
        CHECK_OK(watched->interface->wait(watched->reactor, until_ns, reports, &count, &now_woken));
        any_woken |= now_woken;
        for (size_t i = 0; i < count; i++) {
            CHECK(reports[i].tag == watched->tag);
            events |= reports[i].events;
        }
        until_ns = 0;
    } while (count > 0);
    if (woken != NULL)
        *woken = any_woken;
    return events;
}

static void reports_data_once_each_time_it_is_expected(const struct an_reactor_interface *interface) {
    struct watched watched = open_watched(interface);
    expect(&watched, REACTOR_RECEIVE);
    CHECK((reported(&watched, 0, NULL) & REACTOR_RECEIVE) == 0);
    CHECK(write(watched.ends[1], "x", 1) == 1);
    CHECK((reported(&watched, an_clock() + 5 * SECOND, NULL) & REACTOR_RECEIVE) != 0);
    CHECK(reported(&watched, 0, NULL) == 0); /* nobody asked again, and no new edge came */
    CHECK(write(watched.ends[1], "x", 1) == 1);
    expect(&watched, REACTOR_RECEIVE);
    CHECK((reported(&watched, an_clock() + 5 * SECOND, NULL) & REACTOR_RECEIVE) != 0);
    close_watched(&watched);
}

static void reports_what_was_ready_when_it_was_added(const struct an_reactor_interface *interface) {
    struct watched watched = open_watched(interface);
    interface->remove(watched.reactor, watched.ends[0], watched.tag);
    CHECK(write(watched.ends[1], "x", 1) == 1);
    watched.tag = GENERATION | 200; /* an index far beyond those seen */
    CHECK_OK(interface->add(watched.reactor, watched.ends[0], watched.tag));
    expect(&watched, REACTOR_RECEIVE);
    expect(&watched, REACTOR_TRANSMIT);
    uint32_t events = reported(&watched, an_clock() + 5 * SECOND, NULL);
    CHECK((events & REACTOR_RECEIVE) != 0 && (events & REACTOR_TRANSMIT) != 0);
    close_watched(&watched);
}

static void reports_the_end_in_both_directions(const struct an_reactor_interface *interface) {
    struct watched watched = open_watched(interface);
    reported(&watched, 0, NULL);
    expect(&watched, REACTOR_RECEIVE);
    expect(&watched, REACTOR_TRANSMIT);
    close(watched.ends[1]);
    watched.ends[1] = -1;
    uint32_t events = reported(&watched, an_clock() + 5 * SECOND, NULL);
    CHECK((events & REACTOR_RECEIVE) != 0 && (events & REACTOR_TRANSMIT) != 0);
    CHECK(interface->expect != NULL || (events & REACTOR_HIDDEN) != 0);
    close_watched(&watched);
}

static void reports_nothing_after_remove(const struct an_reactor_interface *interface) {
    struct watched watched = open_watched(interface);
    expect(&watched, REACTOR_RECEIVE);
    reported(&watched, 0, NULL);
    int copy = dup(watched.ends[0]); /* as a forked child has it */
    interface->remove(watched.reactor, watched.ends[0], watched.tag);
    CHECK(write(watched.ends[1], "x", 1) == 1);
    CHECK(reported(&watched, an_clock() + SECOND / 50, NULL) == 0);
    close(copy);
    close_watched(&watched);
}

static void wake_ends_one_wait_even_if_it_comes_first(const struct an_reactor_interface *interface) {
    struct watched watched = open_watched(interface);
    bool woken = false;
    reported(&watched, 0, NULL);
    interface->wake(watched.reactor);
    interface->wake(watched.reactor);
    reported(&watched, an_clock() + 5 * SECOND, &woken);
    CHECK(woken);
    int64_t start_ns = an_clock();
    reported(&watched, start_ns + SECOND / 50, &woken);
    CHECK(!woken && an_clock() >= start_ns + SECOND / 50); /* never early */
    close_watched(&watched);
}

static void descriptor_is_readable_while_a_wait_would_report(const struct an_reactor_interface *interface) {
    if (interface->descriptor == NULL)
        return;
    struct watched watched = open_watched(interface);
    an_descriptor descriptor;
    CHECK_OK(interface->descriptor(watched.reactor, &descriptor));
    struct pollfd watcher = {.fd = (int)descriptor, .events = POLLIN};
    reported(&watched, 0, NULL);
    CHECK(poll(&watcher, 1, 0) == 0);
    CHECK(write(watched.ends[1], "x", 1) == 1);
    CHECK(poll(&watcher, 1, 5000) == 1);
    reported(&watched, 0, NULL);
    CHECK(poll(&watcher, 1, 0) == 0);
    interface->wake(watched.reactor);
    CHECK(poll(&watcher, 1, 5000) == 1);
    reported(&watched, 0, NULL);
    int64_t due_ns = an_clock() + SECOND / 50;
    interface->alarm(watched.reactor, due_ns);
    CHECK(poll(&watcher, 1, 5000) == 1 && an_clock() >= due_ns);
    reported(&watched, 0, NULL);
    interface->alarm(watched.reactor, an_clock() + SECOND / 100);
    interface->alarm(watched.reactor, AN_NEVER);
    CHECK(poll(&watcher, 1, 50) == 0);
    close_watched(&watched);
}

/* A kqueue is not inherited by fork: what has its number in the child is another file. */
static void close_in_a_child_spares_a_file_with_the_number_of_a_descriptor_that_it_has_not(
    const struct an_reactor_interface *interface) {
    an_descriptor number;
    an_fork_count(); /* as whoever opens a port: from now on forks are counted */
    struct watched watched = open_watched(interface);
    if (interface->descriptor == NULL || interface->descriptor(watched.reactor, &number) != 0)
        number = -1;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        bool free_number = number >= 0 && fcntl((int)number, F_GETFD) < 0;
        if (free_number)
            CHECK(dup2(watched.ends[0], (int)number) == (int)number);
        interface->close(watched.reactor);
        CHECK(!free_number || fcntl((int)number, F_GETFD) >= 0);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(write(watched.ends[1], "x", 1) == 1);
    expect(&watched, REACTOR_RECEIVE);
    CHECK((reported(&watched, an_clock() + 5 * SECOND, NULL) & REACTOR_RECEIVE) != 0);
    close_watched(&watched);
}

int main(void) {
    for (size_t i = 0; i < sizeof reactors / sizeof *reactors; i++) {
        printf("reactor %s\n", reactors[i]->name);
        reports_data_once_each_time_it_is_expected(reactors[i]);
        reports_what_was_ready_when_it_was_added(reactors[i]);
        reports_the_end_in_both_directions(reactors[i]);
        reports_nothing_after_remove(reactors[i]);
        wake_ends_one_wait_even_if_it_comes_first(reactors[i]);
        descriptor_is_readable_while_a_wait_would_report(reactors[i]);
        close_in_a_child_spares_a_file_with_the_number_of_a_descriptor_that_it_has_not(reactors[i]);
    }
    return 0;
}
