/* event.h - the part of kqueue(2) that csrc/backend/kqueue.c uses, for systems without it; see ../kqueue.c. */
#ifndef AN_TESTS_KQUEUE_SYS_EVENT_H
#define AN_TESTS_KQUEUE_SYS_EVENT_H

#include <stdint.h>
#include <time.h>
#include <unistd.h>

enum { EVFILT_READ = -1, EVFILT_WRITE = -2, EVFILT_TIMER = -7, AN_STAND_IN_USER = -11 };

/* A macro, as the systems have it: older ones lack it, and so does a build with AN_STAND_IN_OLD. */
#if !defined(AN_STAND_IN_OLD)
#define EVFILT_USER AN_STAND_IN_USER
#endif

enum { NOTE_TRIGGER = 0x01000000 };

enum {
    EV_ADD = 0x0001,
    EV_DELETE = 0x0002,
    EV_ONESHOT = 0x0010,
    EV_CLEAR = 0x0020,
    EV_ERROR = 0x4000,
    EV_EOF = 0x8000
};

struct kevent {
    uintptr_t ident;
    short filter;
    unsigned short flags;
    unsigned int fflags;
    int64_t data;
    void *udata;
};

int kqueue(void);
int kevent(int queue, const struct kevent *changes, int change_count, struct kevent *events, int event_count,
           const struct timespec *timeout);

/* Whoever includes this header closes kqueues, and they are more than one descriptor here. */
int kqueue_close(int descriptor);
#define close(descriptor) kqueue_close(descriptor)

#endif
