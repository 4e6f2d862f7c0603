/* io_uring.h - the backend on io_uring, as its row in backends.c takes it. */
#ifndef AN_BACKEND_IO_URING_H
#define AN_BACKEND_IO_URING_H

#include "backend.h"

extern const struct an_backend_interface an_io_uring;

#endif
