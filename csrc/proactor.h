/* proactor.h - the adapter as a row of backends.c takes it: one backend interface, on the reactors that the row names. */
#ifndef AN_PROACTOR_H
#define AN_PROACTOR_H

#include "backend.h"
#include "reactor.h"

struct an_proactor_detail {
    const struct an_reactor_interface *reactor;
    /* One with a descriptor of its own, for a reactor that has none, to be watched in its place; NULL: none. */
    const struct an_reactor_interface *mirror;
};

extern const struct an_backend_interface an_proactor;

#endif
