/* iocp.h - the backend on Windows' I/O completion ports, as its row in backends.c takes it. */
#ifndef AN_BACKEND_IOCP_H
#define AN_BACKEND_IOCP_H

#include "backend.h"

extern const struct an_backend_interface an_iocp;

#endif
