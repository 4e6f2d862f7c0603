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

/* ---- datagrams' peers ---------------------------------------------------------------------------------------------- */

/* An address, what Python has for it, and where that is found again by its identity. A set of WAYS holds the addresses with
 * the same hash, so that some hundred peers have their places without pushing each other out. */
enum { SETS = 256, WAYS = 4, PEERS = SETS * WAYS, WORDS = 4 };

struct peer {
    PyObject *shown; /* NULL: free */
    uint32_t length;
    uint32_t unused;
    uint64_t words[WORDS]; /* the two IP families' addresses are shorter */
};

struct peers {
    struct peer slots[PEERS];
    uint16_t by_object[PEERS]; /* the slot of an object, if that is still there */
    uint32_t turn;             /* who of a set goes next */
};

static uint64_t scatter(uint64_t hash, uint64_t word) { return (hash ^ word) * 0x9E3779B97F4A7C15u; }

static struct peer *set_of(struct peers *peers, const an_address *address) {
    uint64_t hash = address->length;
    for (uint32_t i = 0; i < address->length / 8; i++) /* family, port and, but for IPv6's scope, all the rest */
        hash = scatter(hash, address->storage[i]);
    return &peers->slots[(hash >> 32) % SETS * WAYS];
}

static uint16_t *place_of(struct peers *peers, const PyObject *shown) {
    return &peers->by_object[(scatter(0, (uintptr_t)shown) >> 32) % PEERS];
}

static struct peer *find_peer(struct peer *set, const an_address *address) {
    for (int i = 0; i < WAYS; i++) {
        if (set[i].shown != NULL && set[i].length == address->length &&
            memcmp(set[i].words, address->storage, address->length) == 0)
            return &set[i];
    }
    return NULL;
}

static struct peer *free_peer(struct peers *peers, struct peer *set) {
    for (int i = 0; i < WAYS; i++) {
        if (set[i].shown == NULL)
            return &set[i];
    }
    return &set[peers->turn++ % WAYS];
}

/* The address of a datagram: the one object for the same peer, as a server hears from the same ones again and again. An
 * answer to it finds its bytes by the object's identity. */
PyObject *fast_show_peer(struct binding *binding, int family, const an_address *address) {
    int own = an_address_family(address);
    if ((own != binding->inet && own != binding->inet6) || address->length > sizeof(uint64_t) * WORDS)
        return fast_show_address(binding, family, address);
    if (binding->peers == NULL && (binding->peers = calloc(1, sizeof *binding->peers)) == NULL)
        return PyErr_NoMemory();
    struct peers *peers = binding->peers;
    struct peer *set = set_of(peers, address);
    struct peer *peer = find_peer(set, address);
    if (peer == NULL) {
        PyObject *shown = fast_show_address(binding, family, address);
        if (shown == NULL)
            return NULL;
        peer = free_peer(peers, set);
        PyObject *former = peer->shown;
        peer->shown = shown;
        peer->length = address->length;
        memcpy(peer->words, address->storage, sizeof peer->words);
        Py_XDECREF(former); /* a tuple of a string and numbers: no code of Python runs */
    }
    *place_of(peers, peer->shown) = (uint16_t)(peer - peers->slots);
    return reference(peer->shown);
}

void fast_clear_peers(struct binding *binding) {
    struct peers *former = binding->peers;
    binding->peers = NULL;
    for (int i = 0; former != NULL && i < PEERS; i++)
        Py_XDECREF(former->slots[i].shown);
    free(former);
}

/* ---- what the user gives ------------------------------------------------------------------------------------------------ */

static bool read_peer(const struct binding *binding, int family, PyObject *shown, an_address *address) {
    if (binding->peers == NULL)
        return false;
    const struct peer *peer = &binding->peers->slots[*place_of(binding->peers, shown)];
    if (peer->shown != shown)
        return false;
    memcpy(address->storage, peer->words, sizeof peer->words);
    address->length = peer->length;
    return an_address_family(address) == family;
}

/* A host in numbers and a port, as almost all addresses are; false without an exception for all else. */
static bool read_plain(const struct binding *binding, int family, PyObject *shown, an_address *address) {
    if ((family != binding->inet && family != binding->inet6) || !PyTuple_CheckExact(shown) || PyTuple_Size(shown) != 2)
        return false;
    PyObject *host = PyTuple_GetItem(shown, 0), *port = PyTuple_GetItem(shown, 1);
    if (!PyUnicode_CheckExact(host) || !PyLong_CheckExact(port))
        return false;
    int overflow;
    Py_ssize_t length;
    long number = PyLong_AsLongAndOverflow(port, &overflow);
    const char *text = PyUnicode_AsUTF8AndSize(host, &length);
    if (text == NULL)
        PyErr_Clear();
    if (text == NULL || strlen(text) != (size_t)length || overflow != 0 || number < 0 || number > UINT16_MAX)
        return false;
    return an_address_ip(address, family, text, (uint16_t)number, 0, 0) == 0;
}

/* An address of the user for a socket of that family; false with an exception set. */
bool fast_read_address(const struct binding *binding, int family, PyObject *shown, an_address *address) {
    if (read_peer(binding, family, shown, address) || read_plain(binding, family, shown, address))
        return true;
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
