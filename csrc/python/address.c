/* address.c - socket addresses, from the core's to Python objects and back. */
#include "binding.h"

#include <stdlib.h>
#include <string.h>

static PyObject *tuple_of(PyObject *first, PyObject *second) {
    PyObject *pair = first != NULL && second != NULL ? PyTuple_Pack(2, first, second) : NULL;
    Py_XDECREF(first);
    Py_XDECREF(second);
    return pair;
}

PyObject *fast_show_address(const struct binding *binding, int family, const an_address *address) {
    char host[AN_HOST_SIZE];
    uint16_t port;
    uint32_t flow, scope;
    if (address->length == 0)
        return reference(Py_None);
    int own = an_address_family(address);
    if ((own == binding->inet || own == binding->inet6) &&
        an_address_format(address, host, &port, &flow, &scope) == 0) {
        if (own == binding->inet)
            return tuple_of(PyUnicode_FromString(host), PyLong_FromLong(port));
        return Py_BuildValue("(siII)", host, (int)port, (unsigned)flow, (unsigned)scope);
    }
    return PyObject_CallFunction(binding->helpers[HELPER_DECODE], "iK", family, (unsigned long long)(uintptr_t)address);
}

static struct peer *slot_by_bytes(struct peer *peers, const an_address *address) {
    uint64_t hash = address->length;
    const uint64_t *words = address->storage;
    for (uint32_t i = 0; i < address->length / 8; i++) /* family, port and, but for IPv6's scope, all the rest */
        hash = (hash ^ words[i]) * 0x9E3779B97F4A7C15u;
    return &peers[(hash >> 32) % PEERS];
}

static struct peer *slot_by_object(struct peer *targets, PyObject *shown) {
    return &targets[((uintptr_t)shown >> 4) % PEERS];
}

static void fill_slot(struct peer *slot, PyObject *shown, const an_address *address) {
    PyObject *former = slot->shown;
    slot->shown = reference(shown);
    slot->address = *address;
    Py_XDECREF(former);
}

/* The address of a datagram: the one object for the same peer, as a server hears from the same ones again and again. An
 * answer to it finds its bytes by the object's identity. */
PyObject *fast_show_peer(struct binding *binding, int family, const an_address *address) {
    int own = an_address_family(address);
    if ((own != binding->inet && own != binding->inet6) || address->length > 32)
        return fast_show_address(binding, family, address);
    if (binding->peers == NULL)
        binding->peers = calloc(PEERS, sizeof *binding->peers);
    if (binding->targets == NULL)
        binding->targets = calloc(PEERS, sizeof *binding->targets);
    if (binding->peers == NULL || binding->targets == NULL)
        return PyErr_NoMemory();
    struct peer *slot = slot_by_bytes(binding->peers, address);
    PyObject *shown;
    if (slot->shown != NULL && slot->address.length == address->length &&
        memcmp(slot->address.storage, address->storage, address->length) == 0) {
        shown = reference(slot->shown);
    } else {
        shown = fast_show_address(binding, family, address);
        if (shown == NULL)
            return NULL;
        fill_slot(slot, shown, address);
    }
    struct peer *target = slot_by_object(binding->targets, shown);
    if (target->shown != shown)
        fill_slot(target, shown, address);
    return shown;
}

/* An address of the user for a socket of that family; false with an exception set. */
bool fast_read_address(const struct binding *binding, int family, PyObject *shown, an_address *address) {
    if (binding->targets != NULL) {
        const struct peer *slot = slot_by_object(binding->targets, shown);
        if (slot->shown == shown && an_address_family(&slot->address) == family) {
            *address = slot->address;
            return true;
        }
    }
    PyObject *encoded = PyObject_CallFunction(binding->helpers[HELPER_ENCODE], "iO", family, shown);
    if (encoded == NULL)
        return false;
    PyObject *pointer = PyObject_CallFunctionObjArgs(binding->helpers[HELPER_ADDRESS_OF], encoded, NULL);
    void *place = pointer != NULL ? PyLong_AsVoidPtr(pointer) : NULL;
    if (place != NULL)
        memcpy(address, place, sizeof *address);
    Py_XDECREF(pointer);
    Py_DECREF(encoded);
    return place != NULL;
}

void fast_clear_peers(struct peer **peers) {
    struct peer *former = *peers;
    *peers = NULL;
    for (int i = 0; former != NULL && i < PEERS; i++)
        Py_XDECREF(former[i].shown);
    free(former);
}
