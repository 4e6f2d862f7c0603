/* _fast.c - the hot paths of the Python binding in C: to start an operation, and to make Python objects of completions.
 *
 * Four types against CPython's limited API of 3.11. AsyncSocket and CompletionPort inherit from Socket and Port here, and
 * the rest from _socket_base.py and _port_base.py, which is Python over cffi; Operation and Completion are public as they
 * are. What another value than the usual one means, and each error's text, stands in Python once, for this binding and for
 * the one over cffi; it is called from here ("helpers").
 *
 * The interpreter lock guards all that is here. It is kept across calls of the core that are short and do not block, and
 * released to wait, to close, and to move much data: a lock that is released beside a busy thread comes back only after
 * that thread's switch interval (5 ms). The core never takes it, so that holding it while the core takes its own locks is
 * safe.
 *
 * Python code may run wherever an object is made or dropped (the garbage collector), and may use the same port: whoever
 * does that has no state of the port in the hand, but a batch and references of its own.
 */
#include <Python.h>
#include <structmember.h>

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "os.h"

enum {
    LOCKED_BYTES = 64 << 10,       /* up to here a send keeps the interpreter lock: some 20 us on loopback */
    HEAVY_BATCH_BYTES = 256 << 10, /* a batch that brought more lets the lock go for the next one */
    CONTENDED_NS = 100 * 1000,     /* who waits longer for the lock has a busy thread beside it */
    SLICE_NS = 200 * 1000 * 1000,  /* the main thread's longest wait: Ctrl-C has to work within 0.3 s, also when the
                                      signal came just before the wait or to another thread */
    BATCH_LEAST = 16,
    BATCH_MOST = 4096,
    PEERS = 256 /* datagrams' addresses kept as Python objects; a power of two */
};

/* ---- module state --------------------------------------------------------------------------------------------------- */

/* Names of arguments, interned to be compared by identity. */
enum name {
    NAME_ADDRESS,
    NAME_BUFFER,
    NAME_BUFFERS,
    NAME_COUNT_,
    NAME_DATA,
    NAME_FILE,
    NAME_FLUSH,
    NAME_MAX_BYTES,
    NAME_MAX_COUNT,
    NAME_MULTISHOT,
    NAME_OFFSET,
    NAME_PAUSE_ABOVE,
    NAME_QUIET,
    NAME_SECONDS,
    NAME_SOCK,
    NAME_STATE,
    NAME_TIMEOUT,
    NAMES
};

static const char *const name_texts[NAMES] = {
    "address",   "buffer", "buffers",     "count", "data",    "file", "flush", "max_bytes", "max_count",
    "multishot", "offset", "pause_above", "quiet", "seconds", "sock", "state", "timeout",
};

/* Python functions that the package hands over, by their names there. */
enum helper {
    HELPER_TIMEOUT_NS,      /* seconds or None -> ns */
    HELPER_NANOSECONDS,     /* (seconds, name) -> ns */
    HELPER_INTEGER,         /* (value, name, least) -> int */
    HELPER_READABLE,        /* raises for what is no readable buffer */
    HELPER_WRITABLE,        /* raises for what is no writable buffer, or empty */
    HELPER_ENCODE,          /* (family, address) -> an_address * of cffi */
    HELPER_ADDRESS_OF,      /* pointer of cffi -> int */
    HELPER_DECODE,          /* (family, pointer as int) -> address */
    HELPER_FILE_DESCRIPTOR, /* file -> int */
    HELPER_DEQUEUE_ERROR,   /* number -> exception */
    HELPER_START_ERROR,     /* number -> exception */
    HELPER_ASSOCIATE_ERROR, /* (sock, number; 0: it is no socket) -> exception */
    HELPER_PORT_CLOSED,     /* () -> exception */
    HELPERS
};

static const char *const helper_names[HELPERS] = {
    "timeout_ns", "nanoseconds",     "integer",       "readable",    "writable",        "encode",      "address_of",
    "decode",     "file_descriptor", "dequeue_error", "start_error", "associate_error", "port_closed",
};

/* An address and what Python has for it. */
struct peer {
    PyObject *shown;
    an_address address;
};

/* The state of the module; the types' methods and each port refer to it. */
struct binding {
    PyObject *completion_type;
    PyObject *operation_type;
    PyObject *socket_base;
    PyObject *socket_type; /* AsyncSocket */
    PyObject *kinds[AN_KIND_COUNT];
    PyObject *names[NAMES];
    PyObject *helpers[HELPERS];
    PyObject *empty; /* b"" */
    int inet;        /* the system's AF_INET, AF_INET6, SOCK_STREAM */
    int inet6;
    int stream;
    struct peer *peers;   /* by the address' bytes; NULL before the first datagram */
    struct peer *targets; /* by the identity of the Python object */
};

/* ---- objects --------------------------------------------------------------------------------------------------------- */

struct port_object;

/* Base of AsyncSocket. */
struct socket_object {
    PyObject ob_base;
    an_socket *handle; /* its state in the core is this object, as long as it has the handle; NULL: finalized */
    struct port_object *port;
    PyObject *state;
    PyObject *weak_references;
    int family;
    bool quiet; /* has sent quietly: a failure may have to find it */
};

/* Buffers and an address that must stay until an operation has completed. */
struct hold {
    an_address address;
    size_t count;
    Py_buffer views[]; /* sendv: its an_buffer array behind them */
};

/*             start                last completion decoded
 *   NOWHERE --------> IN_FLIGHT --------------------------> NOWHERE
 *           --------> FLUSHING  (a send of ours behind quiet ones, not shown to the user; likewise)
 *                         |
 *                         | another call, which the core has given earlier completions of it, has not decoded them yet;
 *                         | or the port was closed while another call may be about to decode
 *                         +----------> LATE -------------------> NOWHERE
 */
enum place { NOWHERE, IN_FLIGHT, FLUSHING, LATE, PLACES };

/* It has the memory of its operation in the core for as long as it lives: cancel in another thread may stand just before
 * its call. Its port holds a reference in each place but NOWHERE. */
struct operation_object {
    PyObject ob_base;
    an_operation operation;
    PyObject *kind;
    struct socket_object *socket; /* NULL: a post or a timer */
    struct port_object *port;
    PyObject *value;   /* what a completion without lent data has in `data`; of posts and timers the state */
    PyObject *keep;    /* the bytes that are sent */
    struct hold *hold; /* or else what is held */
    struct operation_object *next;
    struct operation_object *previous;
    uint8_t place;      /* enum place */
    bool multishot;     /* may have several completions on their way */
    bool hidden;        /* of ours, behind quiet sends: its completion is not shown */
    uint32_t undecoded; /* LATE: completions of it that other calls have in the hand */
};

/* Completions on their way from the core to Python: of one call, or left over by one that ran out of memory. */
struct batch {
    struct batch *next; /* in the port's list of active or of left ones */
    size_t capacity;
    size_t count; /* entries to be released; the core writes it under its lock, when the entries are there */
    size_t first; /* the first that is not decoded */
    an_completion entries[];
};

/* Base of CompletionPort. */
struct port_object {
    PyObject ob_base;
    an_port *handle; /* NULL: not opened, or finalized */
    struct binding *binding;
    PyObject *module; /* keeps binding */
    PyObject *weak_references;
    struct operation_object *operations[PLACES];
    Py_ssize_t in_flight;
    PyObject *abandoned; /* list: completions that an interrupted call left; or NULL */
    PyObject *lingering; /* list: dropped sockets whose failures are queued; or NULL */
    struct batch *spare;
    struct batch *left;
    struct batch *active; /* those of calls that wait or decode */
    unsigned long main_thread;
    bool contended; /* the lock came back late after the last wait */
    bool heavy;     /* the last batch brought much */
};

struct completion_object {
    PyObject ob_base;
    PyObject *operation;
    PyObject *kind;
    PyObject *socket;
    PyObject *state;
    PyObject *data;
    PyObject *accepted;
    PyObject *address;
    unsigned long long transferred;
    int error;
    char truncated;
    char more;
};

static PyObject *reference(void *object) {
    Py_INCREF((PyObject *)object);
    return object;
}

static PyObject *none_or(void *object) { return reference(object != NULL ? object : Py_None); }

static void raise_object(PyObject *exception) {
    if (exception == NULL)
        return;
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
}

/* For a method of an object that has no handle: never opened, or finalized and found by another finalizer. */
static PyObject *no_handle(void) {
    PyErr_SetString(PyExc_AttributeError, "_handle");
    return NULL;
}

/* For what is used when garbage collection has cleared the module already. */
static PyObject *ending(void) {
    PyErr_SetString(PyExc_RuntimeError, "the interpreter is ending");
    return NULL;
}

/* ---- arguments -------------------------------------------------------------------------------------------------------- */

enum { ARGUMENTS_MOST = 5 };

struct signature {
    const char *function;
    int required;   /* that many must be given */
    int positional; /* that many may be given by position */
    int count;
    enum name names[ARGUMENTS_MOST];
};

static int find_name(const struct binding *binding, const struct signature *signature, PyObject *keyword) {
    for (int i = 0; i < signature->count; i++) {
        if (binding->names[signature->names[i]] == keyword)
            return i;
    }
    for (int i = 0; i < signature->count; i++) { /* one that is not interned */
        if (PyUnicode_CompareWithASCIIString(keyword, name_texts[signature->names[i]]) == 0)
            return i;
    }
    PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", signature->function, keyword);
    return -1;
}

/* Sorts the arguments into `values`, borrowed, NULL where not given; false with an exception set. */
static bool parse(const struct binding *binding, const struct signature *signature, PyObject *const *arguments,
                  Py_ssize_t given, PyObject *keywords, PyObject **values) {
    if (given > signature->positional) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d positional arguments (%zd given)", signature->function,
                     signature->positional, given);
        return false;
    }
    for (int i = 0; i < signature->count; i++)
        values[i] = i < given ? arguments[i] : NULL;
    Py_ssize_t named = keywords != NULL ? PyTuple_Size(keywords) : 0;
    for (Py_ssize_t k = 0; k < named; k++) {
        PyObject *keyword = PyTuple_GetItem(keywords, k);
        int i = find_name(binding, signature, keyword);
        if (i < 0)
            return false;
        if (values[i] != NULL) {
            PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%U'", signature->function, keyword);
            return false;
        }
        values[i] = arguments[given + k];
    }
    for (int i = 0; i < signature->required; i++) {
        if (values[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() missing 1 required positional argument: '%s'", signature->function,
                         name_texts[signature->names[i]]);
            return false;
        }
    }
    return true;
}

static bool parse_flag(PyObject *value, bool *flag) {
    *flag = value == Py_True;
    if (value == NULL || value == Py_True || value == Py_False)
        return true;
    int truth = PyObject_IsTrue(value);
    *flag = truth > 0;
    return truth >= 0;
}

static bool take_int64(PyObject *number, int64_t *result) {
    if (number == NULL)
        return false;
    *result = PyLong_AsLongLong(number);
    Py_DECREF(number);
    return *result != -1 || !PyErr_Occurred();
}

/* Seconds as nanoseconds, rounded up, for the values that a float tells exactly enough; else false. */
static bool convert_seconds(PyObject *value, int64_t *result_ns) {
    const double longest = 4611686018.0; /* from about 2^62 ns on it is for ever, which the helper knows */
    if (!PyFloat_CheckExact(value) && !PyLong_CheckExact(value))
        return false;
    double seconds = PyLong_CheckExact(value) ? PyLong_AsDouble(value) : PyFloat_AsDouble(value);
    if (PyErr_Occurred()) {
        PyErr_Clear(); /* an integer beyond all floats */
        return false;
    }
    if (!(seconds >= 0 && seconds < longest))
        return false;
    double exact_ns = seconds * 1e9;
    *result_ns = (int64_t)exact_ns;
    *result_ns += (double)*result_ns < exact_ns;
    return true;
}

static bool parse_timeout(const struct binding *binding, PyObject *value, int64_t *timeout_ns) {
    *timeout_ns = AN_FOREVER;
    if (value == NULL || value == Py_None || convert_seconds(value, timeout_ns))
        return true;
    return take_int64(PyObject_CallFunctionObjArgs(binding->helpers[HELPER_TIMEOUT_NS], value, NULL), timeout_ns);
}

/* An integer from `least` on; `usual` where it is not given. */
static bool parse_integer(const struct binding *binding, PyObject *value, enum name name, int64_t least, int64_t usual,
                          int64_t *result) {
    *result = usual;
    if (value == NULL)
        return true;
    if (PyLong_CheckExact(value)) {
        int overflow;
        *result = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow == 0 && *result >= least)
            return true;
    }
    return take_int64(
        PyObject_CallFunction(binding->helpers[HELPER_INTEGER], "OsL", value, name_texts[name], (long long)least),
        result);
}

/* The same, UINT64_MAX for None. */
static bool parse_limit(const struct binding *binding, PyObject *value, enum name name, uint64_t *result) {
    int64_t number;
    *result = UINT64_MAX;
    if (value == NULL || value == Py_None)
        return true;
    if (!parse_integer(binding, value, name, 0, 0, &number))
        return false;
    *result = (uint64_t)number;
    return true;
}

/* Calls a check in Python, which raises and says why. */
static bool refuse_buffer(const struct binding *binding, enum helper check, PyObject *object) {
    PyErr_Clear();
    PyObject *result = PyObject_CallFunctionObjArgs(binding->helpers[check], object, NULL);
    if (result != NULL) {
        Py_DECREF(result);
        PyErr_SetString(PyExc_BufferError, "the buffer was refused, and then was not");
    }
    return false;
}

static bool view_readable(const struct binding *binding, PyObject *object, Py_buffer *view) {
    if (PyUnicode_Check(object) || PyObject_GetBuffer(object, view, PyBUF_SIMPLE) != 0)
        return refuse_buffer(binding, HELPER_READABLE, object);
    return true;
}

static bool view_writable(const struct binding *binding, PyObject *object, Py_buffer *view) {
    if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE) != 0)
        return refuse_buffer(binding, HELPER_WRITABLE, object);
    if (view->len > 0)
        return true;
    PyBuffer_Release(view);
    return refuse_buffer(binding, HELPER_WRITABLE, object);
}

/* ---- addresses ---------------------------------------------------------------------------------------------------------- */

static PyObject *tuple_of(PyObject *first, PyObject *second) {
    PyObject *pair = first != NULL && second != NULL ? PyTuple_Pack(2, first, second) : NULL;
    Py_XDECREF(first);
    Py_XDECREF(second);
    return pair;
}

static PyObject *show_address(const struct binding *binding, int family, const an_address *address) {
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
    for (uint32_t i = 0; i < (address->length + 7) / 8 && i < 4; i++) /* an IPv6 address at most; a path's begin */
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
static PyObject *show_peer(struct binding *binding, int family, const an_address *address) {
    int own = an_address_family(address);
    if ((own != binding->inet && own != binding->inet6) || address->length > 32)
        return show_address(binding, family, address);
    if (binding->peers == NULL)
        binding->peers = calloc(PEERS, sizeof *binding->peers);
    if (binding->targets == NULL)
        binding->targets = calloc(PEERS, sizeof *binding->targets);
    if (binding->peers == NULL || binding->targets == NULL)
        return PyErr_NoMemory();
    struct peer *slot = slot_by_bytes(binding->peers, address);
    if (slot->shown != NULL && slot->address.length == address->length &&
        memcmp(slot->address.storage, address->storage, address->length) == 0)
        return reference(slot->shown);
    PyObject *shown = show_address(binding, family, address);
    if (shown == NULL)
        return NULL;
    fill_slot(slot, shown, address);
    fill_slot(slot_by_object(binding->targets, shown), shown, address);
    return shown;
}

/* An address of the user for a socket of that family; false with an exception set. */
static bool read_address(const struct binding *binding, int family, PyObject *shown, an_address *address) {
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

/* ---- Operation: life ------------------------------------------------------------------------------------------------------ */

static struct hold *hold_create(size_t views, size_t pieces) {
    struct hold *hold = malloc(sizeof *hold + views * sizeof(Py_buffer) + pieces * sizeof(an_buffer));
    if (hold == NULL)
        PyErr_NoMemory();
    else
        hold->count = 0;
    return hold;
}

static void hold_free(struct hold *hold) {
    if (hold == NULL)
        return;
    for (size_t i = 0; i < hold->count; i++)
        PyBuffer_Release(&hold->views[i]);
    free(hold);
}

/* The core is done with what it was given. */
static void let_go_of_buffers(struct operation_object *operation) {
    struct hold *hold = operation->hold;
    operation->hold = NULL;
    hold_free(hold);
    Py_CLEAR(operation->keep);
}

static void unlink_from(struct operation_object **first, struct operation_object *operation) {
    if (operation->previous != NULL)
        operation->previous->next = operation->next;
    else
        *first = operation->next;
    if (operation->next != NULL)
        operation->next->previous = operation->previous;
    operation->next = operation->previous = NULL;
}

/* Puts it from one place into another. A reference of the port goes with it: the caller's, when it comes from NOWHERE or
 * goes there. */
static void move(struct operation_object *operation, enum place place) {
    struct port_object *port = operation->port;
    if (operation->place != NOWHERE)
        unlink_from(&port->operations[operation->place], operation);
    port->in_flight -= operation->place == IN_FLIGHT;
    operation->place = place;
    if (place == NOWHERE)
        return;
    port->in_flight += place == IN_FLIGHT;
    operation->next = port->operations[place];
    if (operation->next != NULL)
        operation->next->previous = operation;
    port->operations[place] = operation;
}

static void enter(struct operation_object *operation, enum place place) {
    Py_INCREF((PyObject *)operation);
    move(operation, place);
}

static void leave(struct operation_object *operation) {
    if (operation->place == NOWHERE)
        return;
    move(operation, NOWHERE);
    Py_DECREF((PyObject *)operation);
}

/* Not started yet. */
static struct operation_object *operation_create(struct port_object *port, struct socket_object *socket, int kind,
                                                 PyObject *value) {
    PyTypeObject *type = (PyTypeObject *)port->binding->operation_type;
    if (type == NULL)
        return (struct operation_object *)ending();
    struct operation_object *operation = PyObject_GC_New(struct operation_object, type);
    if (operation == NULL)
        return NULL;
    operation->kind = reference(port->binding->kinds[kind]);
    operation->socket = socket != NULL ? (struct socket_object *)reference(socket) : NULL;
    operation->port = (struct port_object *)reference(port);
    operation->value = reference(value);
    operation->keep = NULL;
    operation->hold = NULL;
    operation->next = operation->previous = NULL;
    operation->place = NOWHERE;
    operation->multishot = operation->hidden = false;
    operation->undecoded = 0;
    PyObject_GC_Track(operation);
    return operation;
}

static int operation_traverse(PyObject *self, visitproc visit, void *arg) {
    struct operation_object *operation = (struct operation_object *)self;
    Py_VISIT((PyObject *)Py_TYPE(self));
    Py_VISIT(operation->kind);
    Py_VISIT((PyObject *)operation->socket);
    Py_VISIT((PyObject *)operation->port);
    Py_VISIT(operation->value);
    Py_VISIT(operation->keep);
    for (size_t i = 0; operation->hold != NULL && i < operation->hold->count; i++)
        Py_VISIT(operation->hold->views[i].obj);
    return 0;
}

static void drop_references(struct operation_object *operation) {
    let_go_of_buffers(operation);
    struct socket_object *socket = operation->socket;
    operation->socket = NULL;
    Py_XDECREF((PyObject *)socket);
    struct port_object *port = operation->port;
    operation->port = NULL;
    Py_XDECREF((PyObject *)port);
    Py_CLEAR(operation->value);
}

/* One that the core may still use keeps everything: its port ends that first. */
static int operation_clear(PyObject *self) {
    struct operation_object *operation = (struct operation_object *)self;
    if (operation->place == NOWHERE)
        drop_references(operation);
    return 0;
}

static void operation_dealloc(PyObject *self) {
    struct operation_object *operation = (struct operation_object *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    drop_references(operation);
    Py_CLEAR(operation->kind);
    PyObject_GC_Del(self);
    Py_DECREF((PyObject *)type);
}

/* ---- Operation: methods --------------------------------------------------------------------------------------------------- */

static bool port_is_closed(const struct port_object *port) {
    return port == NULL || port->handle == NULL || an_port_is_closed(port->handle) != 0;
}

static PyObject *operation_pending(PyObject *self, void *closure) {
    (void)closure;
    struct operation_object *operation = (struct operation_object *)self;
    return PyBool_FromLong(operation->place == IN_FLIGHT && !port_is_closed(operation->port));
}

static PyObject *operation_cancel(PyObject *self, PyObject *unused) {
    (void)unused;
    struct operation_object *operation = (struct operation_object *)self;
    int32_t cancelled = 0;
    int error = AN_EBADF;
    if (operation->place != IN_FLIGHT)
        Py_RETURN_FALSE;
    if (operation->socket == NULL && operation->port->handle != NULL)
        error = an_port_cancel(operation->port->handle, &operation->operation, &cancelled);
    else if (operation->socket != NULL && operation->socket->handle != NULL)
        error = an_operation_cancel(operation->socket->handle, &operation->operation, &cancelled);
    return PyBool_FromLong(error == 0 && cancelled != 0);
}

static PyObject *control(PyObject *self, int (*call)(an_socket *, an_operation *)) {
    struct operation_object *operation = (struct operation_object *)self;
    if (operation->port != NULL && port_is_closed(operation->port)) {
        raise_object(PyObject_CallNoArgs(operation->port->binding->helpers[HELPER_PORT_CLOSED]));
        return NULL;
    }
    struct socket_object *socket = operation->socket;
    if (socket == NULL || socket->handle == NULL || operation->place != IN_FLIGHT ||
        call(socket->handle, &operation->operation) != 0) {
        PyErr_SetString(PyExc_ValueError, "only a multishot that is in flight can be paused and resumed");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *operation_pause(PyObject *self, PyObject *unused) {
    (void)unused;
    return control(self, an_operation_pause);
}

static PyObject *operation_resume(PyObject *self, PyObject *unused) {
    (void)unused;
    return control(self, an_operation_resume);
}

static PyMethodDef operation_methods[] = {
    {"cancel", operation_cancel, METH_NOARGS,
     PyDoc_STR("cancel($self, /)\n--\n\nCancels the operation, and returns at once.\n\n"
               "Returns whether its outcome was still open; its completion then comes through the queue\n"
               "with the cancelled error. False when it was done already. Never raises.")},
    {"pause", operation_pause, METH_NOARGS,
     PyDoc_STR("pause($self, /)\n--\n\n"
               "Stops a multishot from taking more: the rest waits in the kernel until `resume`.\n\n"
               "What is queued already still comes. Raises ValueError when it is no multishot in flight.")},
    {"resume", operation_resume, METH_NOARGS,
     PyDoc_STR("resume($self, /)\n--\n\nEnds a `pause`. Raises ValueError when it is no multishot in flight.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef operation_getters[] = {
    {"pending", operation_pending, NULL,
     PyDoc_STR("Whether its last completion has not been dequeued yet; False on a closed port."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef operation_members[] = {
    {"kind", T_OBJECT_EX, offsetof(struct operation_object, kind), READONLY, NULL},
    {"socket", T_OBJECT, offsetof(struct operation_object, socket), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot operation_slots[] = {
    {Py_tp_dealloc, operation_dealloc},
    {Py_tp_traverse, operation_traverse},
    {Py_tp_clear, operation_clear},
    {Py_tp_methods, operation_methods},
    {Py_tp_getset, operation_getters},
    {Py_tp_members, operation_members},
    {0, NULL},
};

static PyType_Spec operation_spec = {
    "asyncio_native.Operation",
    sizeof(struct operation_object),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    operation_slots,
};

/* ---- Completion ----------------------------------------------------------------------------------------------------------- */

static int completion_traverse(PyObject *self, visitproc visit, void *arg) {
    struct completion_object *completion = (struct completion_object *)self;
    Py_VISIT((PyObject *)Py_TYPE(self));
    Py_VISIT(completion->operation);
    Py_VISIT(completion->kind);
    Py_VISIT(completion->socket);
    Py_VISIT(completion->state);
    Py_VISIT(completion->data);
    Py_VISIT(completion->accepted);
    Py_VISIT(completion->address);
    return 0;
}

static int completion_clear(PyObject *self) {
    struct completion_object *completion = (struct completion_object *)self;
    Py_CLEAR(completion->operation);
    Py_CLEAR(completion->kind);
    Py_CLEAR(completion->socket);
    Py_CLEAR(completion->state);
    Py_CLEAR(completion->data);
    Py_CLEAR(completion->accepted);
    Py_CLEAR(completion->address);
    return 0;
}

static void completion_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    completion_clear(self);
    PyObject_GC_Del(self);
    Py_DECREF((PyObject *)type);
}

#define FAST_METHOD(function) (PyCFunction)(void (*)(void))(function), METH_METHOD | METH_FASTCALL | METH_KEYWORDS

static PyMemberDef completion_members[] = {
    {"operation", T_OBJECT_EX, offsetof(struct completion_object, operation), 0, NULL},
    {"kind", T_OBJECT_EX, offsetof(struct completion_object, kind), 0, NULL},
    {"socket", T_OBJECT_EX, offsetof(struct completion_object, socket), 0, NULL},
    {"state", T_OBJECT_EX, offsetof(struct completion_object, state), 0, NULL},
    {"error", T_INT, offsetof(struct completion_object, error), 0, NULL},
    {"transferred", T_ULONGLONG, offsetof(struct completion_object, transferred), 0, NULL},
    {"data", T_OBJECT_EX, offsetof(struct completion_object, data), 0, NULL},
    {"accepted", T_OBJECT_EX, offsetof(struct completion_object, accepted), 0, NULL},
    {"address", T_OBJECT_EX, offsetof(struct completion_object, address), 0, NULL},
    {"truncated", T_BOOL, offsetof(struct completion_object, truncated), 0, NULL},
    {"more", T_BOOL, offsetof(struct completion_object, more), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot completion_slots[] = {
    {Py_tp_dealloc, completion_dealloc},
    {Py_tp_traverse, completion_traverse},
    {Py_tp_clear, completion_clear},
    {Py_tp_members, completion_members},
    {0, NULL},
};

static PyType_Spec completion_spec = {
    "asyncio_native.Completion",
    sizeof(struct completion_object),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    completion_slots,
};

/* ---- Socket: life --------------------------------------------------------------------------------------------------------- */

static PyObject *socket_give(PyObject *self, PyObject *arguments) {
    unsigned long long address;
    int family;
    struct socket_object *socket = (struct socket_object *)self;
    if (!PyArg_ParseTuple(arguments, "Ki", &address, &family))
        return NULL;
    an_socket *handle = (an_socket *)(uintptr_t)address;
    if (socket->handle != NULL) {
        an_socket_free(handle, 0);
        PyErr_SetString(PyExc_RuntimeError, "this object has its socket already");
        return NULL;
    }
    socket->handle = handle;
    socket->family = family;
    Py_RETURN_NONE;
}

static void close_handle(an_socket *handle, uint32_t flags) {
    if (an_socket_is_closed(handle) && (flags & AN_FLUSH) != 0)
        return;
    PyThreadState *thread = PyEval_SaveThread(); /* the system may linger, whatever the descriptor's mode */
    an_socket_close(handle, flags);
    PyEval_RestoreThread(thread);
}

/* Nobody finds this object through the core from here on. */
static void give_handle_back(struct socket_object *socket) {
    an_socket *handle = socket->handle;
    if (handle == NULL)
        return;
    socket->handle = NULL;
    an_socket_set_state(handle, NULL);
    close_handle(handle, AN_FLUSH);
    an_socket_free(handle, AN_FLUSH);
}

/* Keeps this object until its quiet sends have gone out or failed: the completion of a failure has to find it, also when
 * the program has let go of it. An empty send completes behind all that was sent before it. */
static bool keep_while_flushing(struct socket_object *socket) {
    struct port_object *port = socket->port;
    if (port == NULL || an_socket_type(socket->handle) != port->binding->stream)
        return true;
    struct operation_object *operation = operation_create(port, socket, AN_SEND, Py_None);
    if (operation == NULL)
        return false;
    operation->hidden = true;
    enter(operation, FLUSHING);
    if (an_socket_send(socket->handle, &operation->operation, NULL, 0, AN_FOREVER) != 0)
        leave(operation);
    Py_DECREF((PyObject *)operation);
    return true;
}

static bool close_socket(struct socket_object *socket, bool flush) {
    if (flush && socket->quiet && an_socket_unsent(socket->handle) > 0 && !keep_while_flushing(socket))
        return false;
    close_handle(socket->handle, flush ? AN_FLUSH : 0);
    return true;
}

/* Its last user has dropped it, but a failure of its quiet sends may be reported: it lives on until they have gone out, or
 * the completion of their failure was dequeued. Python does not finalize an object again: then its handle goes with it. */
static void linger(struct socket_object *socket) {
    struct port_object *port = socket->port;
    if (an_socket_unreported(socket->handle) > 0) {
        if (port->lingering == NULL)
            port->lingering = PyList_New(0);
        if (port->lingering == NULL || PyList_Append(port->lingering, (PyObject *)socket) != 0)
            PyErr_Clear(); /* its failure comes without it */
    }
    if (!close_socket(socket, true))
        PyErr_Clear();
}

static void socket_finalize(PyObject *self) {
    struct socket_object *socket = (struct socket_object *)self;
    if (socket->handle == NULL)
        return;
    PyObject *type, *value, *traceback, *text = NULL;
    PyErr_Fetch(&type, &value, &traceback);
    if (!an_socket_is_closed(socket->handle) && (text = PyObject_Repr(self)) == NULL)
        PyErr_WriteUnraisable(self);
    if (socket->quiet && !port_is_closed(socket->port) &&
        (an_socket_unsent(socket->handle) > 0 || an_socket_unreported(socket->handle) > 0))
        linger(socket);
    else
        give_handle_back(socket);
    if (text != NULL && PyErr_ResourceWarning(self, 1, "unclosed %U", text) != 0)
        PyErr_WriteUnraisable(self);
    Py_XDECREF(text);
    PyErr_Restore(type, value, traceback);
}

static int socket_traverse(PyObject *self, visitproc visit, void *arg) {
    struct socket_object *socket = (struct socket_object *)self;
    Py_VISIT((PyObject *)Py_TYPE(self));
    Py_VISIT((PyObject *)socket->port);
    Py_VISIT(socket->state);
    return 0;
}

static int socket_clear(PyObject *self) {
    struct socket_object *socket = (struct socket_object *)self;
    give_handle_back(socket); /* of no use without a port; and there only when a subclass hid the finalizer */
    struct port_object *port = socket->port;
    socket->port = NULL;
    Py_XDECREF((PyObject *)port);
    Py_CLEAR(socket->state);
    return 0;
}

static void socket_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (((struct socket_object *)self)->weak_references != NULL)
        PyObject_ClearWeakRefs(self);
    socket_clear(self);
    PyObject_GC_Del(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *socket_address(PyObject *self, void *closure) {
    (void)closure;
    an_socket *handle = ((struct socket_object *)self)->handle;
    return handle != NULL ? PyLong_FromVoidPtr(handle) : no_handle();
}

static PyObject *socket_closed(PyObject *self, void *closure) {
    (void)closure;
    an_socket *handle = ((struct socket_object *)self)->handle;
    return handle != NULL ? PyBool_FromLong(an_socket_is_closed(handle)) : no_handle();
}

static PyObject *socket_unsent(PyObject *self, void *closure) {
    (void)closure;
    an_socket *handle = ((struct socket_object *)self)->handle;
    return handle != NULL ? PyLong_FromUnsignedLongLong(an_socket_unsent(handle)) : no_handle();
}

static PyObject *socket_close(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                              PyObject *keywords) {
    static const struct signature signature = {"close", 0, 0, 1, {NAME_FLUSH}};
    PyObject *values[1];
    bool flush;
    struct socket_object *socket = (struct socket_object *)self;
    if (!parse(PyType_GetModuleState(type), &signature, arguments, given, keywords, values) ||
        !parse_flag(values[0], &flush))
        return NULL;
    if (socket->handle == NULL)
        return no_handle();
    if (!close_socket(socket, flush))
        return NULL;
    Py_RETURN_NONE;
}

/* ---- Socket: starting operations -------------------------------------------------------------------------------------------- */

/* What to raise when the core refused: _socket_base.py knows. */
static PyObject *refuse(struct socket_object *socket, int error) {
    raise_object(PyObject_CallMethod((PyObject *)socket, "_refusal", "i", error));
    return NULL;
}

/* A new operation, not started; NULL with an exception set. */
static struct operation_object *draft(struct socket_object *socket, int kind, PyObject *value) {
    if (socket->handle == NULL)
        no_handle();
    else if (socket->port == NULL)
        refuse(socket, AN_EINVAL);
    else
        return operation_create(socket->port, socket, kind, value);
    return NULL;
}

/* After the core's answer: the operation, or the exception. */
static PyObject *started(struct operation_object *operation, int error) {
    if (error == 0)
        return (PyObject *)operation;
    leave(operation);
    let_go_of_buffers(operation);
    refuse(operation->socket, error);
    Py_DECREF((PyObject *)operation);
    return NULL;
}

static PyObject *not_started(struct operation_object *operation) {
    Py_DECREF((PyObject *)operation);
    return NULL;
}

static PyObject *socket_accept(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                               PyObject *keywords) {
    static const struct signature signature = {"accept", 0, 0, 2, {NAME_MULTISHOT, NAME_TIMEOUT}};
    struct binding *binding = PyType_GetModuleState(type);
    PyObject *values[2];
    int64_t timeout_ns;
    bool multishot;
    if (!parse(binding, &signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[1], &timeout_ns) || !parse_flag(values[0], &multishot))
        return NULL;
    struct operation_object *operation = draft((struct socket_object *)self, AN_ACCEPT, Py_None);
    if (operation == NULL)
        return NULL;
    operation->multishot = multishot;
    enter(operation, IN_FLIGHT);
    return started(operation, an_socket_accept(operation->socket->handle, &operation->operation,
                                               multishot ? AN_MULTISHOT : 0, timeout_ns));
}

static PyObject *socket_connect(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                PyObject *keywords) {
    static const struct signature signature = {"connect", 1, 1, 2, {NAME_ADDRESS, NAME_TIMEOUT}};
    struct binding *binding = PyType_GetModuleState(type);
    struct socket_object *socket = (struct socket_object *)self;
    PyObject *values[2];
    int64_t timeout_ns;
    an_address address;
    if (!parse(binding, &signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[1], &timeout_ns) || !read_address(binding, socket->family, values[0], &address))
        return NULL;
    struct operation_object *operation = draft(socket, AN_CONNECT, Py_None);
    if (operation == NULL || (operation->hold = hold_create(0, 0)) == NULL)
        return operation != NULL ? not_started(operation) : NULL;
    operation->hold->address = address;
    enter(operation, IN_FLIGHT);
    return started(operation,
                   an_socket_connect(socket->handle, &operation->operation, &operation->hold->address, timeout_ns));
}

static PyObject *socket_recv(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                             PyObject *keywords) {
    static const struct signature signature = {
        "recv", 0, 1, 4, {NAME_MAX_BYTES, NAME_MULTISHOT, NAME_PAUSE_ABOVE, NAME_TIMEOUT}};
    struct binding *binding = PyType_GetModuleState(type);
    PyObject *values[4];
    int64_t timeout_ns, length;
    uint64_t pause_above;
    bool multishot;
    if (!parse(binding, &signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[3], &timeout_ns) ||
        !parse_integer(binding, values[0], NAME_MAX_BYTES, 1, 65536, &length) ||
        !parse_limit(binding, values[2], NAME_PAUSE_ABOVE, &pause_above) || !parse_flag(values[1], &multishot))
        return NULL;
    struct operation_object *operation = draft((struct socket_object *)self, AN_RECV, binding->empty);
    if (operation == NULL)
        return NULL;
    operation->multishot = multishot;
    enter(operation, IN_FLIGHT);
    return started(operation, an_socket_recv(operation->socket->handle, &operation->operation, NULL, (size_t)length,
                                             multishot ? AN_MULTISHOT : 0, pause_above, timeout_ns));
}

static PyObject *socket_recvfrom(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                 PyObject *keywords) {
    static const struct signature signature = {"recvfrom", 0, 1, 3, {NAME_MAX_BYTES, NAME_MULTISHOT, NAME_TIMEOUT}};
    struct binding *binding = PyType_GetModuleState(type);
    PyObject *values[3];
    int64_t timeout_ns, length;
    bool multishot;
    if (!parse(binding, &signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[2], &timeout_ns) ||
        !parse_integer(binding, values[0], NAME_MAX_BYTES, 1, 65536, &length) || !parse_flag(values[1], &multishot))
        return NULL;
    struct operation_object *operation = draft((struct socket_object *)self, AN_RECVFROM, binding->empty);
    if (operation == NULL)
        return NULL;
    operation->multishot = multishot;
    enter(operation, IN_FLIGHT);
    return started(operation, an_socket_recvfrom(operation->socket->handle, &operation->operation, NULL, (size_t)length,
                                                 multishot ? AN_MULTISHOT : 0, timeout_ns));
}

/* Drafts a receive into the caller's buffer, which is held then. */
static struct operation_object *draft_into(PyObject *self, const struct binding *binding,
                                           const struct signature *signature, int kind, PyObject *const *arguments,
                                           Py_ssize_t given, PyObject *keywords, int64_t *timeout_ns) {
    PyObject *values[2];
    if (!parse(binding, signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[1], timeout_ns))
        return NULL;
    struct hold *hold = hold_create(1, 0);
    if (hold == NULL || !view_writable(binding, values[0], &hold->views[0])) {
        hold_free(hold);
        return NULL;
    }
    hold->count = 1;
    struct operation_object *operation = draft((struct socket_object *)self, kind, Py_None);
    if (operation != NULL)
        operation->hold = hold;
    else
        hold_free(hold);
    return operation;
}

static PyObject *socket_recv_into(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                  PyObject *keywords) {
    static const struct signature signature = {"recv_into", 1, 1, 2, {NAME_BUFFER, NAME_TIMEOUT}};
    int64_t timeout_ns;
    struct operation_object *operation =
        draft_into(self, PyType_GetModuleState(type), &signature, AN_RECV, arguments, given, keywords, &timeout_ns);
    if (operation == NULL)
        return NULL;
    const Py_buffer *view = &operation->hold->views[0];
    enter(operation, IN_FLIGHT);
    return started(operation, an_socket_recv(operation->socket->handle, &operation->operation, view->buf,
                                             (size_t)view->len, 0, UINT64_MAX, timeout_ns));
}

static PyObject *socket_recvfrom_into(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                      PyObject *keywords) {
    static const struct signature signature = {"recvfrom_into", 1, 1, 2, {NAME_BUFFER, NAME_TIMEOUT}};
    int64_t timeout_ns;
    struct operation_object *operation =
        draft_into(self, PyType_GetModuleState(type), &signature, AN_RECVFROM, arguments, given, keywords, &timeout_ns);
    if (operation == NULL)
        return NULL;
    const Py_buffer *view = &operation->hold->views[0];
    enter(operation, IN_FLIGHT);
    return started(operation, an_socket_recvfrom(operation->socket->handle, &operation->operation, view->buf,
                                                 (size_t)view->len, 0, timeout_ns));
}

/* ---- Socket: sends ---------------------------------------------------------------------------------------------------------- */

/* What one send hands to the core, whichever function it is. */
struct sending {
    an_operation *operation; /* NULL: quiet */
    const void *data;
    size_t length;
    const an_buffer *pieces; /* sendv, or NULL */
    size_t count;
    const an_address *address; /* sendto, or NULL */
    int64_t timeout_ns;
};

static int call_core(an_socket *handle, const struct sending *sending) {
    if (sending->pieces != NULL)
        return an_socket_sendv(handle, sending->operation, sending->pieces, sending->count, sending->timeout_ns);
    if (sending->address != NULL)
        return an_socket_sendto(handle, sending->operation, sending->data, sending->length, sending->address,
                                sending->timeout_ns);
    return an_socket_send(handle, sending->operation, sending->data, sending->length, sending->timeout_ns);
}

static int hand_over(an_socket *handle, const struct sending *sending) {
    if (sending->length <= LOCKED_BYTES)
        return call_core(handle, sending);
    PyThreadState *thread = PyEval_SaveThread();
    int error = call_core(handle, sending);
    PyEval_RestoreThread(thread);
    return error;
}

static PyObject *send_quietly(struct socket_object *socket, const struct sending *sending) {
    if (socket->handle == NULL)
        return no_handle();
    socket->quiet = true;
    int error = hand_over(socket->handle, sending);
    return error == 0 ? reference(Py_None) : refuse(socket, error);
}

static PyObject *start_sending(struct operation_object *operation, struct sending *sending) {
    sending->operation = &operation->operation;
    enter(operation, IN_FLIGHT);
    return started(operation, hand_over(operation->socket->handle, sending));
}

/* bytes cannot change, so that holding them is enough; of all else a view is taken. */
static bool read_bytes(PyObject *data, struct sending *sending) {
    char *bytes;
    Py_ssize_t length;
    if (!PyBytes_CheckExact(data) || PyBytes_AsStringAndSize(data, &bytes, &length) != 0)
        return false;
    sending->data = bytes;
    sending->length = (size_t)length;
    return true;
}

static void read_view(const Py_buffer *view, struct sending *sending) {
    sending->data = view->buf;
    sending->length = (size_t)view->len;
}

/* send and sendto from where the arguments are known. */
static PyObject *send_one(const struct binding *binding, struct socket_object *socket, int kind, PyObject *data,
                          bool quiet, struct sending *sending) {
    bool is_bytes = read_bytes(data, sending);
    if (quiet && is_bytes)
        return send_quietly(socket, sending);
    if (quiet) {
        Py_buffer view;
        if (!view_readable(binding, data, &view))
            return NULL;
        read_view(&view, sending);
        PyObject *result = send_quietly(socket, sending);
        PyBuffer_Release(&view);
        return result;
    }
    struct hold *hold = NULL;
    if (!is_bytes || sending->address != NULL) {
        if ((hold = hold_create(1, 0)) == NULL)
            return NULL;
        if (!is_bytes && !view_readable(binding, data, &hold->views[0])) {
            hold_free(hold);
            return NULL;
        }
        hold->count = !is_bytes;
    }
    struct operation_object *operation = draft(socket, kind, Py_None);
    if (operation == NULL) {
        hold_free(hold);
        return NULL;
    }
    operation->hold = hold;
    if (is_bytes)
        operation->keep = reference(data);
    else
        read_view(&hold->views[0], sending);
    if (sending->address != NULL) {
        hold->address = *sending->address;
        sending->address = &hold->address;
    }
    return start_sending(operation, sending);
}

static PyObject *socket_send(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                             PyObject *keywords) {
    static const struct signature signature = {"send", 1, 1, 3, {NAME_DATA, NAME_QUIET, NAME_TIMEOUT}};
    const struct binding *binding = PyType_GetModuleState(type);
    PyObject *values[3];
    struct sending sending = {0};
    bool quiet;
    if (!parse(binding, &signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[2], &sending.timeout_ns) || !parse_flag(values[1], &quiet))
        return NULL;
    return send_one(binding, (struct socket_object *)self, AN_SEND, values[0], quiet, &sending);
}

static PyObject *socket_sendto(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                               PyObject *keywords) {
    static const struct signature signature = {"sendto", 2, 2, 4, {NAME_DATA, NAME_ADDRESS, NAME_QUIET, NAME_TIMEOUT}};
    const struct binding *binding = PyType_GetModuleState(type);
    struct socket_object *socket = (struct socket_object *)self;
    PyObject *values[4];
    struct sending sending = {0};
    an_address address;
    bool quiet;
    if (!parse(binding, &signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[3], &sending.timeout_ns) || !parse_flag(values[2], &quiet) ||
        !read_address(binding, socket->family, values[1], &address))
        return NULL;
    sending.address = &address;
    return send_one(binding, socket, AN_SENDTO, values[0], quiet, &sending);
}

/* Takes a view of each of the buffers; the array for the core stands behind the views. */
static struct hold *hold_pieces(const struct binding *binding, PyObject *buffers, struct sending *sending) {
    size_t count = (size_t)PyList_Size(buffers);
    struct hold *hold = hold_create(count, count + 1);
    if (hold == NULL)
        return NULL;
    an_buffer *pieces = (an_buffer *)&hold->views[count];
    while (hold->count < count) {
        Py_buffer *view = &hold->views[hold->count];
        PyObject *buffer = PyList_GetItem(buffers, (Py_ssize_t)hold->count);
        if (buffer == NULL || !view_readable(binding, buffer, view)) {
            hold_free(hold);
            return NULL;
        }
        pieces[hold->count++] = (an_buffer){view->buf, (size_t)view->len};
        sending->length += (size_t)view->len; /* for the choice of the lock only */
    }
    sending->pieces = pieces;
    sending->count = count;
    return hold;
}

static struct hold *hold_all(const struct binding *binding, PyObject *buffers, struct sending *sending) {
    if (PyUnicode_Check(buffers) || PyBytes_Check(buffers) || PyByteArray_Check(buffers) ||
        PyMemoryView_Check(buffers)) {
        PyErr_SetString(PyExc_TypeError, "sendv takes an iterable of bytes-like objects; send takes one of them");
        return NULL;
    }
    PyObject *list = PySequence_List(buffers);
    struct hold *hold = list != NULL ? hold_pieces(binding, list, sending) : NULL;
    Py_XDECREF(list);
    return hold;
}

static PyObject *socket_sendv(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                              PyObject *keywords) {
    static const struct signature signature = {"sendv", 1, 1, 3, {NAME_BUFFERS, NAME_QUIET, NAME_TIMEOUT}};
    const struct binding *binding = PyType_GetModuleState(type);
    struct socket_object *socket = (struct socket_object *)self;
    PyObject *values[3];
    struct sending sending = {0};
    bool quiet;
    if (!parse(binding, &signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[2], &sending.timeout_ns) || !parse_flag(values[1], &quiet))
        return NULL;
    struct hold *hold = hold_all(binding, values[0], &sending);
    if (hold == NULL)
        return NULL;
    if (quiet) {
        PyObject *result = send_quietly(socket, &sending);
        hold_free(hold);
        return result;
    }
    struct operation_object *operation = draft(socket, AN_SEND, Py_None);
    if (operation == NULL) {
        hold_free(hold);
        return NULL;
    }
    operation->hold = hold;
    return start_sending(operation, &sending);
}

static PyObject *socket_sendfile(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                 PyObject *keywords) {
    static const struct signature signature = {
        "sendfile", 1, 3, 4, {NAME_FILE, NAME_OFFSET, NAME_COUNT_, NAME_TIMEOUT}};
    struct binding *binding = PyType_GetModuleState(type);
    PyObject *values[4];
    int64_t timeout_ns, offset, file;
    uint64_t count;
    if (!parse(binding, &signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[3], &timeout_ns) ||
        !parse_integer(binding, values[1], NAME_OFFSET, 0, 0, &offset) ||
        !parse_limit(binding, values[2], NAME_COUNT_, &count) ||
        !take_int64(PyObject_CallFunctionObjArgs(binding->helpers[HELPER_FILE_DESCRIPTOR], values[0], NULL), &file))
        return NULL;
    struct operation_object *operation = draft((struct socket_object *)self, AN_SENDFILE, Py_None);
    if (operation == NULL)
        return NULL;
    enter(operation, IN_FLIGHT);
    PyThreadState *thread = PyEval_SaveThread(); /* it may read from a disk */
    int error = an_socket_sendfile(operation->socket->handle, &operation->operation, (an_descriptor)file,
                                   (uint64_t)offset, count, timeout_ns);
    PyEval_RestoreThread(thread);
    return started(operation, error);
}

static PyObject *socket_disconnect(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                   PyObject *keywords) {
    static const struct signature signature = {"disconnect", 0, 0, 1, {NAME_TIMEOUT}};
    struct binding *binding = PyType_GetModuleState(type);
    PyObject *values[1];
    int64_t timeout_ns;
    if (!parse(binding, &signature, arguments, given, keywords, values) ||
        !parse_timeout(binding, values[0], &timeout_ns))
        return NULL;
    struct operation_object *operation = draft((struct socket_object *)self, AN_DISCONNECT, Py_None);
    if (operation == NULL)
        return NULL;
    enter(operation, IN_FLIGHT);
    return started(operation, an_socket_disconnect(operation->socket->handle, &operation->operation, timeout_ns));
}

static PyObject *socket_cancel(PyObject *self, PyObject *unused) {
    (void)unused;
    struct socket_object *socket = (struct socket_object *)self;
    size_t count = 0;
    if (socket->handle == NULL)
        return no_handle();
    int error = an_socket_cancel(socket->handle, &count);
    return error == 0 ? PyLong_FromSize_t(count) : refuse(socket, error);
}

static PyMethodDef socket_methods[] = {
    {"_give", socket_give, METH_VARARGS, PyDoc_STR("Gives it its socket: (address of the handle, family).")},
    {"close", FAST_METHOD(socket_close),
     PyDoc_STR("close($self, /, *, flush=False)\n--\n\nCloses the socket, and returns at once.\n\n"
               "Plainly: the peer is told now, operations in flight complete as cancelled, what was not yet\n"
               "handed to the system is dropped. `flush=True` hands over what was sent before, while the\n"
               "port is dequeued from, and then closes; a failure of that is one completion.")},
    {"accept", FAST_METHOD(socket_accept),
     PyDoc_STR("accept($self, /, *, multishot=False, timeout=None)\n--\n\n"
               "Completes with a connection in `accepted` and its `address` (accept4(2), AcceptEx).\n\n"
               "multishot: goes on, with one completion for each connection. timeout: seconds.")},
    {"connect", FAST_METHOD(socket_connect),
     PyDoc_STR("connect($self, /, address, *, timeout=None)\n--\n\n"
               "Completes when connected or failed (connect(2), ConnectEx).\n\n"
               "address: with a numeric host. timeout: seconds.")},
    {"recv", FAST_METHOD(socket_recv),
     PyDoc_STR("recv($self, /, max_bytes=65536, *, multishot=False, pause_above=None, timeout=None)\n--\n\n"
               "Completes when at least one byte is there, with `data`; b\"\" at the end of the stream.\n\n"
               "max_bytes: the most that one completion carries. multishot: goes on until the end, an\n"
               "error or a cancel. pause_above: the multishot receives nothing while `unsent` is over that\n"
               "many bytes, and goes on by itself. timeout: seconds; for a multishot, without anything.")},
    {"recv_into", FAST_METHOD(socket_recv_into),
     PyDoc_STR("recv_into($self, /, buffer, *, timeout=None)\n--\n\n"
               "As `recv`, but into the caller's memory, with the count in `transferred` (recv(2)).\n\n"
               "buffer: writable, contiguous, not empty; it must not be resized until the completion is\n"
               "dequeued (a `bytearray` raises `BufferError` then). timeout: seconds.")},
    {"recvfrom", FAST_METHOD(socket_recvfrom),
     PyDoc_STR("recvfrom($self, /, max_bytes=65536, *, multishot=False, timeout=None)\n--\n\n"
               "Completes with a datagram in `data`, its sender's `address`, and `truncated`.\n\n"
               "max_bytes: a longer datagram is cut to it. multishot: one for each datagram.\n"
               "timeout: seconds; for a multishot, without any. Raises `ValueError` on a stream.")},
    {"recvfrom_into", FAST_METHOD(socket_recvfrom_into),
     PyDoc_STR("recvfrom_into($self, /, buffer, *, timeout=None)\n--\n\n"
               "As `recvfrom`, but into the caller's memory, with the count in `transferred`.\n\n"
               "buffer: as for `recv_into`. timeout: seconds.")},
    {"send", FAST_METHOD(socket_send),
     PyDoc_STR("send($self, /, data, *, quiet=False, timeout=None)\n--\n\n"
               "Completes when ALL bytes were handed to the system, or at a failure (send(2)).\n\n"
               "`transferred` is the number of bytes handed over. On a stream `send(b\"\")` completes when all\n"
               "that was sent before it has been. The data is held, and must not change, until then.\n\n"
               "quiet: returns None and completes only at a failure, as a `SEND` with `operation` None, and\n"
               "in `transferred` the bytes lost; the data is the caller's again at once. timeout: seconds.")},
    {"sendv", FAST_METHOD(socket_sendv),
     PyDoc_STR("sendv($self, /, buffers, *, quiet=False, timeout=None)\n--\n\n"
               "Sends several buffers as if they were joined, else as `send` (sendmsg(2)).\n\n"
               "On a datagram socket they are one datagram.")},
    {"sendto", FAST_METHOD(socket_sendto),
     PyDoc_STR("sendto($self, /, data, address, *, quiet=False, timeout=None)\n--\n\n"
               "Sends one datagram to an address with a numeric host; else as `send`.\n\n"
               "As sendto(2). A quiet one fails as `SENDTO`. Raises `ValueError` on a stream.")},
    {"sendfile", FAST_METHOD(socket_sendfile),
     PyDoc_STR("sendfile($self, /, file, offset=0, count=None, *, timeout=None)\n--\n\n"
               "Sends bytes of an open file, with no copy through Python.\n\n"
               "file: a file object or descriptor; the descriptor is duplicated, and the file's own position\n"
               "neither used nor moved. offset: bytes from its start. count: bytes; None for up to its end.\n"
               "timeout: seconds. Raises `ValueError` on a datagram socket.")},
    {"disconnect", FAST_METHOD(socket_disconnect),
     PyDoc_STR("disconnect($self, /, *, timeout=None)\n--\n\n"
               "Ends the sending side, after what was sent before it has been handed over.\n\n"
               "The peer gets the end of the stream; receiving goes on. timeout: seconds. Raises\n"
               "`ValueError` on a datagram socket.")},
    {"cancel", socket_cancel, METH_NOARGS,
     PyDoc_STR("cancel($self, /)\n--\n\n"
               "Cancels all that is in flight on this socket, quiet sends too, and returns at once.\n\n"
               "Returns the number of operations whose outcome was still open, without the quiet ones; they\n"
               "complete with the cancelled error.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef socket_getters[] = {
    {"_address", socket_address, NULL, PyDoc_STR("The handle's address."), NULL},
    {"closed", socket_closed, NULL,
     PyDoc_STR("Whether it or its port was closed (also with a flush that still goes on)."), NULL},
    {"unsent", socket_unsent, NULL, PyDoc_STR("Bytes that sends took and that have not yet been handed to the system."),
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef socket_members[] = {
    {"_family", T_INT, offsetof(struct socket_object, family), READONLY, NULL},
    {"_port", T_OBJECT, offsetof(struct socket_object, port), READONLY, NULL},
    {"port", T_OBJECT, offsetof(struct socket_object, port), READONLY,
     PyDoc_STR("The completion port that it is associated with.")},
    {"state", T_OBJECT, offsetof(struct socket_object, state), READONLY,
     PyDoc_STR("What it was associated with; `CompletionPort.associate` replaces it.")},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(struct socket_object, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot socket_slots[] = {
    {Py_tp_doc, "What AsyncSocket inherits from C: to start operations, and to close."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, socket_dealloc},
    {Py_tp_finalize, socket_finalize},
    {Py_tp_traverse, socket_traverse},
    {Py_tp_clear, socket_clear},
    {Py_tp_methods, socket_methods},
    {Py_tp_getset, socket_getters},
    {Py_tp_members, socket_members},
    {0, NULL},
};

static PyType_Spec socket_spec = {
    "asyncio_native._fast.Socket",
    sizeof(struct socket_object),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    socket_slots,
};

/* ---- Port: what it holds ---------------------------------------------------------------------------------------------------- */

static struct batch *batch_create(size_t limit) {
    size_t capacity = BATCH_LEAST;
    while (capacity < limit && capacity < BATCH_MOST)
        capacity *= 16;
    struct batch *batch = malloc(sizeof *batch + capacity * sizeof(an_completion));
    if (batch == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    batch->next = NULL;
    batch->capacity = capacity;
    batch->count = batch->first = 0;
    return batch;
}

static struct batch *take_batch(struct port_object *port, size_t limit) {
    struct batch *batch = port->spare;
    if (batch == NULL || batch->capacity < limit)
        return batch_create(limit);
    port->spare = NULL;
    return batch;
}

static void give_batch_back(struct port_object *port, struct batch *batch) {
    struct batch *other = port->spare;
    if (other == NULL || other->capacity < batch->capacity)
        port->spare = batch;
    else
        other = batch;
    free(other);
}

/* Dropped sockets whose failures have all been reported need not be kept any more. */
static void dismiss_lingering(struct port_object *port) {
    for (Py_ssize_t i = PyList_Size(port->lingering) - 1; i >= 0; i--) {
        if (i >= PyList_Size(port->lingering))
            continue; /* dropping one ran Python code, which dismissed others */
        struct socket_object *socket = (struct socket_object *)PyList_GetItem(port->lingering, i);
        if (socket->handle != NULL && an_socket_unreported(socket->handle) > 0)
            continue;
        if (PyList_SetSlice(port->lingering, i, i + 1, NULL) != 0)
            PyErr_Clear();
    }
}

static void release_entries(struct port_object *port, struct batch *batch) {
    size_t count = batch->count;
    batch->count = batch->first = 0;
    an_completion_release(batch->entries, count);
    if (port->lingering != NULL)
        dismiss_lingering(port);
}

static void discard_left(struct port_object *port) {
    while (port->left != NULL) {
        struct batch *batch = port->left;
        port->left = batch->next;
        for (size_t i = batch->first; i < batch->count; i++) {
            if (batch->entries[i].accepted != NULL)
                an_socket_free(batch->entries[i].accepted, 0);
        }
        release_entries(port, batch);
        free(batch);
    }
}

/* Nobody has got these, nor the connections in them. */
static void discard_abandoned(struct port_object *port) {
    PyObject *abandoned = port->abandoned;
    port->abandoned = NULL;
    for (Py_ssize_t i = 0; abandoned != NULL && i < PyList_Size(abandoned); i++) {
        PyObject *accepted = ((struct completion_object *)PyList_GetItem(abandoned, i))->accepted;
        if (accepted != NULL && accepted != Py_None && !close_socket((struct socket_object *)accepted, false))
            PyErr_Clear();
    }
    Py_XDECREF(abandoned);
}

/* The port is closed: nobody dequeues what they would have to be there for. */
static void drop_late(struct port_object *port) {
    while (port->operations[LATE] != NULL)
        leave(port->operations[LATE]);
}

static void drop_place(struct port_object *port, enum place place) {
    while (port->operations[place] != NULL) {
        struct operation_object *operation = port->operations[place];
        Py_INCREF((PyObject *)operation);
        if (port->active != NULL)
            move(operation, LATE);
        else
            leave(operation);
        let_go_of_buffers(operation);
        Py_DECREF((PyObject *)operation);
    }
}

/* Closes the port in the core, which then has let go of all; and lets go of what was held for it. */
static void shut_down(struct port_object *port) {
    if (port->handle == NULL)
        return;
    PyThreadState *thread = PyEval_SaveThread();
    an_port_close(port->handle);
    PyEval_RestoreThread(thread);
    discard_left(port);
    discard_abandoned(port);
    drop_place(port, IN_FLIGHT);
    drop_place(port, FLUSHING);
    if (port->active == NULL)
        drop_late(port);
    Py_CLEAR(port->lingering);
}

static void free_handle(struct port_object *port) {
    an_port *handle = port->handle;
    shut_down(port);
    port->handle = NULL;
    if (handle != NULL)
        an_port_free(handle); /* the core keeps its memory until the last socket was given back */
}

static PyObject *port_open(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                           PyObject *keywords) {
    struct port_object *port = (struct port_object *)self;
    if (given != 2 || keywords != NULL) {
        PyErr_SetString(PyExc_TypeError, "_open() takes the handle's address and the main thread's number");
        return NULL;
    }
    void *handle = PyLong_AsVoidPtr(arguments[0]);
    unsigned long main_thread = PyLong_AsUnsignedLong(arguments[1]);
    if (PyErr_Occurred())
        return NULL;
    if (port->handle != NULL) {
        an_port_free(handle);
        PyErr_SetString(PyExc_RuntimeError, "this port is open already");
        return NULL;
    }
    port->binding = PyType_GetModuleState(type);
    if (port->module == NULL)
        port->module = reference(PyType_GetModule(type));
    port->main_thread = main_thread;
    port->handle = handle;
    Py_RETURN_NONE;
}

static void port_finalize(PyObject *self) {
    struct port_object *port = (struct port_object *)self;
    if (port->handle == NULL)
        return;
    PyObject *type, *value, *traceback, *text = NULL;
    PyErr_Fetch(&type, &value, &traceback);
    if (!port_is_closed(port) && (text = PyObject_Repr(self)) == NULL)
        PyErr_WriteUnraisable(self);
    free_handle(port);
    if (text != NULL && PyErr_ResourceWarning(self, 1, "unclosed %U", text) != 0)
        PyErr_WriteUnraisable(self);
    Py_XDECREF(text);
    PyErr_Restore(type, value, traceback);
}

static int port_traverse(PyObject *self, visitproc visit, void *arg) {
    struct port_object *port = (struct port_object *)self;
    Py_VISIT((PyObject *)Py_TYPE(self));
    Py_VISIT(port->module);
    Py_VISIT(port->abandoned);
    Py_VISIT(port->lingering);
    for (int place = IN_FLIGHT; place < PLACES; place++) {
        for (struct operation_object *operation = port->operations[place]; operation != NULL;
             operation = operation->next)
            Py_VISIT((PyObject *)operation);
    }
    return 0;
}

/* The finalizer has done most of it, unless a subclass hid that. */
static int port_clear(PyObject *self) {
    struct port_object *port = (struct port_object *)self;
    free_handle(port);
    drop_late(port);
    Py_CLEAR(port->abandoned);
    Py_CLEAR(port->lingering);
    return 0;
}

static void port_dealloc(PyObject *self) {
    struct port_object *port = (struct port_object *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (port->weak_references != NULL)
        PyObject_ClearWeakRefs(self);
    port_clear(self);
    free(port->spare);
    Py_CLEAR(port->module);
    PyObject_GC_Del(self);
    Py_DECREF((PyObject *)type);
}

/* ---- Port: from an entry to a completion -------------------------------------------------------------------------------------- */

static struct operation_object *operation_of(an_operation *operation) {
    return (struct operation_object *)((char *)operation - offsetof(struct operation_object, operation));
}

static struct completion_object *completion_create(const struct binding *binding, const an_completion *entry) {
    if (binding->completion_type == NULL)
        return (struct completion_object *)ending();
    struct completion_object *completion =
        PyObject_GC_New(struct completion_object, (PyTypeObject *)binding->completion_type);
    if (completion == NULL)
        return NULL;
    completion->operation = completion->kind = completion->socket = completion->state = NULL;
    completion->data = completion->accepted = completion->address = NULL;
    completion->transferred = entry->transferred;
    completion->error = entry->error;
    completion->truncated = (entry->flags & AN_TRUNCATED) != 0;
    completion->more = (entry->flags & AN_MORE) != 0;
    return completion;
}

/* What the completion of a socket's operation carries; false with an exception set. */
static bool describe(struct binding *binding, struct completion_object *completion, const an_completion *entry,
                     struct operation_object *operation) {
    struct socket_object *socket = operation->socket;
    completion->operation = reference(operation);
    completion->socket = reference(socket);
    completion->state = none_or(socket->state);
    completion->data = entry->data != NULL ? PyBytes_FromStringAndSize(entry->data, (Py_ssize_t)entry->transferred)
                                           : reference(operation->value);
    if (entry->address == NULL)
        completion->address = reference(Py_None);
    else if (entry->kind == AN_RECVFROM)
        completion->address = show_peer(binding, socket->family, entry->address);
    else
        completion->address = show_address(binding, socket->family, entry->address);
    completion->accepted =
        entry->accepted != NULL ? PyType_GenericAlloc((PyTypeObject *)binding->socket_type, 0) : reference(Py_None);
    return completion->data != NULL && completion->address != NULL && completion->accepted != NULL;
}

/* A post or a timer. */
static void describe_own(struct completion_object *completion, struct operation_object *operation, uint16_t kind) {
    completion->operation = reference(kind == AN_POST ? Py_None : (PyObject *)operation);
    completion->socket = reference(Py_None);
    completion->state = reference(operation->value);
    completion->data = reference(Py_None);
    completion->address = reference(Py_None);
    completion->accepted = reference(Py_None);
}

/* A failure of quiet sends: its socket, if the program has that still, is the state that the core has now. */
static void describe_quiet(struct completion_object *completion, const an_completion *entry) {
    struct socket_object *socket = an_socket_state(entry->socket);
    completion->operation = reference(Py_None);
    completion->socket = none_or(socket);
    completion->state = none_or(socket != NULL ? socket->state : NULL);
    completion->data = reference(Py_None);
    completion->address = reference(Py_None);
    completion->accepted = reference(Py_None);
}

static uint32_t count_of(const struct batch *batch, const an_operation *operation) {
    uint32_t count = 0;
    for (size_t i = batch->first; i < batch->count; i++)
        count += batch->entries[i].operation == operation;
    return count;
}

/* The last completion of an operation was decoded. Of a multishot, other calls may have earlier ones in the hand, which
 * the core gave them before it gave us this one; so what we read of their batches is written. */
static void end_operation(struct port_object *port, const struct batch *own, struct operation_object *operation) {
    uint32_t undecoded = 0;
    if (operation->multishot) {
        for (const struct batch *batch = port->active; batch != NULL; batch = batch->next)
            undecoded += batch != own ? count_of(batch, &operation->operation) : 0;
        for (const struct batch *batch = port->left; batch != NULL; batch = batch->next)
            undecoded += count_of(batch, &operation->operation);
    }
    operation->undecoded = undecoded;
    if (undecoded > 0 && operation->place != NOWHERE)
        move(operation, LATE);
    else
        leave(operation);
}

/* What follows a completion that has got to the user. */
static void settle(struct port_object *port, const struct batch *own, const an_completion *entry,
                   struct operation_object *operation) {
    if (operation->hold != NULL || operation->keep != NULL)
        let_go_of_buffers(operation);
    if ((entry->flags & AN_MORE) == 0)
        end_operation(port, own, operation);
    else if (operation->undecoded > 0 && --operation->undecoded == 0)
        leave(operation);
}

/* Decodes one entry into the list; false with an exception set, and then nothing has happened. */
static bool decode(struct port_object *port, const struct batch *batch, const an_completion *entry, PyObject *done) {
    struct binding *binding = port->binding;
    struct operation_object *operation = entry->operation != NULL ? operation_of(entry->operation) : NULL;
    if (operation != NULL && operation->hidden) {
        leave(operation);
        return true;
    }
    struct completion_object *completion = completion_create(binding, entry);
    if (completion == NULL)
        return false;
    bool whole = true;
    completion->kind = reference(binding->kinds[entry->kind]);
    if (operation == NULL)
        describe_quiet(completion, entry);
    else if (operation->socket == NULL)
        describe_own(completion, operation, entry->kind);
    else
        whole = describe(binding, completion, entry, operation);
    PyObject_GC_Track(completion);
    if (!whole || PyList_Append(done, (PyObject *)completion) != 0) {
        Py_DECREF((PyObject *)completion);
        return false;
    }
    if (entry->accepted != NULL) { /* not before: without a handle it closed nothing when it was dropped */
        struct socket_object *accepted = (struct socket_object *)completion->accepted;
        accepted->handle = entry->accepted;
        accepted->family = operation->socket->family;
    }
    if (operation != NULL)
        settle(port, batch, entry, operation);
    Py_DECREF((PyObject *)completion);
    return true;
}

/* Decodes up to `limit` entries, and releases the batch behind the last one. */
static bool decode_batch(struct port_object *port, struct batch *batch, size_t limit, PyObject *done) {
    uint64_t bytes = 0;
    while (batch->first < batch->count && (size_t)PyList_Size(done) < limit) {
        const an_completion *entry = &batch->entries[batch->first];
        bytes += entry->kind == AN_RECV ? entry->transferred : 0;
        if (!decode(port, batch, entry, done))
            return false;
        batch->first++;
    }
    port->heavy = bytes > HEAVY_BATCH_BYTES;
    if (batch->first == batch->count)
        release_entries(port, batch);
    return true;
}

/* ---- Port: dequeue ------------------------------------------------------------------------------------------------------------- */

static int dequeue_unlocked(struct port_object *port, struct batch *batch, size_t limit, int64_t timeout_ns) {
    PyThreadState *thread = PyEval_SaveThread();
    int error = an_port_dequeue(port->handle, batch->entries, limit, timeout_ns, &batch->count);
    int64_t ready_ns = an_clock();
    PyEval_RestoreThread(thread);
    port->contended = an_clock() - ready_ns > CONTENDED_NS;
    return error;
}

/* Beside a busy thread the first attempt keeps the lock: there is mostly more to do at once, and giving the lock up costs
 * that thread's whole switch interval. Alone, the attempt would only be one more system call. */
static int dequeue(struct port_object *port, struct batch *batch, size_t limit, int64_t timeout_ns) {
    if ((timeout_ns == 0 || port->contended) && !port->heavy) {
        int error = an_port_dequeue(port->handle, batch->entries, limit, 0, &batch->count);
        if (error != 0 || batch->count > 0 || timeout_ns == 0)
            return error;
    }
    return dequeue_unlocked(port, batch, limit, timeout_ns);
}

/* Waits until something is decoded into `done` or the time is over; false with an exception set. */
static bool wait_and_decode(struct port_object *port, struct batch *batch, size_t limit, int64_t wait_ns,
                            PyObject *done) {
    bool sliced = PyThread_get_thread_ident() == port->main_thread;
    int64_t until_ns = wait_ns > 0 ? an_clock() + wait_ns : 0;
    for (;;) {
        int64_t slice_ns = sliced && (wait_ns < 0 || wait_ns > SLICE_NS) ? SLICE_NS : wait_ns;
        int error = dequeue(port, batch, limit, slice_ns);
        bool came = batch->count > 0;
        if (came && !decode_batch(port, batch, limit, done))
            return false;
        if (PyList_Size(done) > 0)
            return true;
        if (!came && error != 0 && error != AN_EINTR) {
            raise_object(PyObject_CallFunction(port->binding->helpers[HELPER_DEQUEUE_ERROR], "i", error));
            return false;
        }
        if (PyErr_CheckSignals() != 0)
            return false;
        if (wait_ns > 0) {
            int64_t now_ns = an_clock();
            wait_ns = now_ns < until_ns ? until_ns - now_ns : 0;
        }
        if (wait_ns == 0 && !came)
            return true;
    }
}

static bool take_abandoned(struct port_object *port, size_t limit, PyObject *done) {
    PyObject *first = PyList_GetSlice(port->abandoned, 0, (Py_ssize_t)limit);
    if (first == NULL)
        return false;
    Py_ssize_t count = PyList_Size(first);
    bool taken = PyList_SetSlice(done, 0, 0, first) == 0 && PyList_SetSlice(port->abandoned, 0, count, NULL) == 0;
    Py_DECREF(first);
    if (taken && PyList_Size(port->abandoned) == 0)
        Py_CLEAR(port->abandoned);
    return taken;
}

/* What calls left over that ran out of memory, or were broken off by a signal handler. */
static bool take_left(struct port_object *port, size_t limit, PyObject *done) {
    if (port->abandoned != NULL && !take_abandoned(port, limit, done))
        return false;
    while (port->left != NULL && (size_t)PyList_Size(done) < limit) {
        struct batch *batch = port->left;
        port->left = batch->next;
        bool decoded = decode_batch(port, batch, limit, done);
        if (batch->count > 0) {
            batch->next = port->left;
            port->left = batch;
        } else {
            free(batch);
        }
        if (!decoded)
            return false;
    }
    return true;
}

static void deactivate(struct port_object *port, struct batch *batch) {
    struct batch **place = &port->active;
    while (*place != batch)
        place = &(*place)->next;
    *place = batch->next;
    batch->next = NULL;
}

/* The port was closed while this call was under way: what it could not let go of then, goes now. */
static void settle_closed(struct port_object *port) {
    if (!port_is_closed(port))
        return;
    discard_left(port);
    if (port->active == NULL)
        drop_late(port);
}

static bool fill(struct port_object *port, size_t limit, int64_t wait_ns, PyObject *done) {
    if ((port->left != NULL || port->abandoned != NULL) && !take_left(port, limit, done))
        return false;
    if (PyList_Size(done) > 0)
        return true;
    struct batch *batch = take_batch(port, limit);
    if (batch == NULL)
        return false;
    batch->next = port->active;
    port->active = batch;
    bool filled = wait_and_decode(port, batch, limit, wait_ns, done);
    deactivate(port, batch);
    if (batch->count == 0) {
        give_batch_back(port, batch);
    } else {
        batch->next = port->left;
        port->left = batch;
    }
    if (port->operations[LATE] != NULL || port->left != NULL)
        settle_closed(port);
    return filled;
}

static bool parse_max_count(const struct binding *binding, PyObject *value, int64_t *limit) {
    int overflow = 0;
    if (PyLong_CheckExact(value))
        *limit = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow > 0)
        *limit = INT64_MAX;
    return overflow > 0 || parse_integer(binding, value, NAME_MAX_COUNT, 1, 1, limit);
}

/* _fill(done, max_count, timeout): the list `done` is the caller's, so that what was dequeued is not lost when a signal
 * handler raises between the return from here and the next instruction. */
static PyObject *port_fill(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    struct port_object *port = (struct port_object *)self;
    int64_t limit, wait_ns;
    if (given != 3 || !PyList_CheckExact(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "_fill() takes a list, the count and the timeout");
        return NULL;
    }
    if (port->handle == NULL)
        return no_handle();
    if (!parse_max_count(port->binding, arguments[1], &limit) || !parse_timeout(port->binding, arguments[2], &wait_ns))
        return NULL;
    bool filled = fill(port, limit < BATCH_MOST ? (size_t)limit : BATCH_MOST, wait_ns, arguments[0]);
    if (!filled && PyList_Size(arguments[0]) == 0)
        return NULL;
    if (!filled)
        PyErr_Clear(); /* out of memory behind these, which go to the user first */
    Py_RETURN_NONE;
}

static PyObject *port_abandon(PyObject *self, PyObject *done) {
    struct port_object *port = (struct port_object *)self;
    if (port->abandoned == NULL && (port->abandoned = PyList_New(0)) == NULL)
        return NULL;
    if (PyList_SetSlice(port->abandoned, 0, 0, done) != 0)
        return NULL;
    if (port_is_closed(port))
        discard_abandoned(port);
    Py_RETURN_NONE;
}

/* ---- Port: the other methods ----------------------------------------------------------------------------------------------------- */

static PyObject *started_own(struct operation_object *operation, int error) {
    if (error == 0)
        return (PyObject *)operation;
    leave(operation);
    raise_object(PyObject_CallFunction(operation->port->binding->helpers[HELPER_START_ERROR], "i", error));
    Py_DECREF((PyObject *)operation);
    return NULL;
}

static PyObject *port_post(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                           PyObject *keywords) {
    static const struct signature signature = {"post", 0, 1, 1, {NAME_STATE}};
    struct port_object *port = (struct port_object *)self;
    PyObject *values[1];
    if (!parse(PyType_GetModuleState(type), &signature, arguments, given, keywords, values))
        return NULL;
    if (port->handle == NULL)
        return no_handle();
    struct operation_object *operation = operation_create(port, NULL, AN_POST, values[0] != NULL ? values[0] : Py_None);
    if (operation == NULL)
        return NULL;
    enter(operation, IN_FLIGHT);
    if (started_own(operation, an_port_post(port->handle, &operation->operation, NULL)) == NULL)
        return NULL;
    Py_DECREF((PyObject *)operation);
    Py_RETURN_NONE;
}

static PyObject *port_timer(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                            PyObject *keywords) {
    static const struct signature signature = {"timer", 1, 2, 2, {NAME_SECONDS, NAME_STATE}};
    const struct binding *binding = PyType_GetModuleState(type);
    struct port_object *port = (struct port_object *)self;
    PyObject *values[2];
    int64_t delay_ns;
    if (!parse(binding, &signature, arguments, given, keywords, values))
        return NULL;
    if (!convert_seconds(values[0], &delay_ns)) {
        PyObject *helper = binding->helpers[HELPER_NANOSECONDS];
        if (!take_int64(PyObject_CallFunction(helper, "Os", values[0], "seconds"), &delay_ns))
            return NULL;
    }
    if (port->handle == NULL)
        return no_handle();
    struct operation_object *operation =
        operation_create(port, NULL, AN_TIMER, values[1] != NULL ? values[1] : Py_None);
    if (operation == NULL)
        return NULL;
    enter(operation, IN_FLIGHT);
    return started_own(operation, an_port_timer(port->handle, &operation->operation, delay_ns, NULL));
}

static PyObject *port_associate(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                PyObject *keywords) {
    static const struct signature signature = {"associate", 1, 2, 2, {NAME_SOCK, NAME_STATE}};
    const struct binding *binding = PyType_GetModuleState(type);
    struct port_object *port = (struct port_object *)self;
    PyObject *values[2];
    if (!parse(binding, &signature, arguments, given, keywords, values))
        return NULL;
    if (!PyObject_TypeCheck(values[0], (PyTypeObject *)binding->socket_base)) {
        raise_object(PyObject_CallFunction(binding->helpers[HELPER_ASSOCIATE_ERROR], "Oi", values[0], 0));
        return NULL;
    }
    struct socket_object *socket = (struct socket_object *)values[0];
    if (port->handle == NULL || socket->handle == NULL)
        return no_handle();
    int error = an_port_associate(port->handle, socket->handle, socket);
    if (error != 0) {
        raise_object(PyObject_CallFunction(binding->helpers[HELPER_ASSOCIATE_ERROR], "Oi", values[0], error));
        return NULL;
    }
    PyObject *former = socket->state;
    socket->state = values[1] != NULL && values[1] != Py_None ? reference(values[1]) : NULL;
    if (socket->port == NULL)
        socket->port = (struct port_object *)reference(port);
    Py_XDECREF(former);
    Py_RETURN_NONE;
}

static PyObject *port_close(PyObject *self, PyObject *unused) {
    (void)unused;
    shut_down((struct port_object *)self);
    Py_RETURN_NONE;
}

static PyObject *port_closed(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(port_is_closed((struct port_object *)self));
}

static PyObject *port_in_flight(PyObject *self, void *closure) {
    (void)closure;
    struct port_object *port = (struct port_object *)self;
    return PyLong_FromSsize_t(port_is_closed(port) ? 0 : port->in_flight);
}

static PyObject *port_address(PyObject *self, void *closure) {
    (void)closure;
    an_port *handle = ((struct port_object *)self)->handle;
    return handle != NULL ? PyLong_FromVoidPtr(handle) : no_handle();
}

static PyMethodDef port_methods[] = {
    {"_open", FAST_METHOD(port_open), PyDoc_STR("Gives it its port: (address of the handle, main thread).")},
    {"_fill", (PyCFunction)(void (*)(void))port_fill, METH_FASTCALL,
     PyDoc_STR("Waits, and puts completions into a list: (list, max_count, timeout).")},
    {"_abandon", port_abandon, METH_O, PyDoc_STR("Takes completions back that did not get to the user.")},
    {"associate", FAST_METHOD(port_associate),
     PyDoc_STR("associate($self, /, sock, state=None)\n--\n\nBinds a socket to this port for good.\n\n"
               "state: comes back with each completion of the socket, as it is when that is dequeued; again\n"
               "on the same port replaces it. Raises `ValueError` when it belongs to another port.")},
    {"post", FAST_METHOD(port_post),
     PyDoc_STR("post($self, /, state=None)\n--\n\n"
               "Queues a completion of kind `POST` that carries `state`; from any thread.\n\n"
               "In order for each posting thread. It is what Windows' PostQueuedCompletionStatus does.")},
    {"timer", FAST_METHOD(port_timer),
     PyDoc_STR("timer($self, /, seconds, state=None)\n--\n\n"
               "Starts a timer, which completes after `seconds` (0 or more), never early.\n\n"
               "state: comes back with the completion. `Operation.cancel` ends it.")},
    {"close", port_close, METH_NOARGS,
     PyDoc_STR("close($self, /)\n--\n\n"
               "Closes the port and its sockets, cancels what is in flight, and releases all.\n\n"
               "Returns when no buffer can be touched any more. What is queued is discarded. Blocked\n"
               "dequeues raise `PortClosedError`. Idempotent.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef port_getters[] = {
    {"_address", port_address, NULL, PyDoc_STR("The handle's address."), NULL},
    {"closed", port_closed, NULL, PyDoc_STR("Whether it was closed; true in a forked child, too."), NULL},
    {"in_flight", port_in_flight, NULL,
     PyDoc_STR("Operations started and not yet dequeued.\n\n"
               "A multishot counts as one, a post as one, a quiet operation not at all; 0 once closed."),
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef port_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(struct port_object, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot port_slots[] = {
    {Py_tp_doc, "What CompletionPort inherits from C: to dequeue, post, associate and close."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, port_dealloc},
    {Py_tp_finalize, port_finalize},
    {Py_tp_traverse, port_traverse},
    {Py_tp_clear, port_clear},
    {Py_tp_methods, port_methods},
    {Py_tp_getset, port_getters},
    {Py_tp_members, port_members},
    {0, NULL},
};

static PyType_Spec port_spec = {
    "asyncio_native._fast.Port",
    sizeof(struct port_object),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    port_slots,
};

/* ---- module -------------------------------------------------------------------------------------------------------------------- */

static bool take_kinds(struct binding *binding, PyObject *kinds) {
    for (int kind = AN_ACCEPT; kind < AN_KIND_COUNT; kind++) {
        PyObject *former = binding->kinds[kind];
        binding->kinds[kind] = PySequence_GetItem(kinds, kind);
        Py_XDECREF(former);
        if (binding->kinds[kind] == NULL)
            return false;
    }
    return true;
}

static bool take_helpers(struct binding *binding, PyObject *helpers) {
    for (int i = 0; i < HELPERS; i++) {
        PyObject *former = binding->helpers[i];
        binding->helpers[i] = PyMapping_GetItemString(helpers, helper_names[i]);
        Py_XDECREF(former);
        if (binding->helpers[i] == NULL)
            return false;
    }
    return true;
}

/* bind(socket_type, kinds, (AF_INET, AF_INET6, SOCK_STREAM), **helpers): before the first object is made. */
static PyObject *module_bind(PyObject *module, PyObject *arguments, PyObject *helpers) {
    struct binding *binding = PyModule_GetState(module);
    PyObject *socket_type, *kinds;
    if (!PyArg_ParseTuple(arguments, "OO(iii):bind", &socket_type, &kinds, &binding->inet, &binding->inet6,
                          &binding->stream))
        return NULL;
    if (helpers == NULL || !take_kinds(binding, kinds) || !take_helpers(binding, helpers))
        return PyErr_Occurred() ? NULL : (PyErr_SetString(PyExc_TypeError, "bind() needs the helpers"), NULL);
    PyObject *former = binding->socket_type;
    binding->socket_type = reference(socket_type);
    Py_XDECREF(former);
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"bind", (PyCFunction)(void (*)(void))module_bind, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("Takes what stands in Python: the socket's class, the kinds, the system's numbers, and helpers.")},
    {NULL, NULL, 0, NULL},
};

static PyObject *add_type(PyObject *module, PyType_Spec *spec) {
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type != NULL && PyModule_AddType(module, (PyTypeObject *)type) != 0)
        Py_CLEAR(type);
    return type;
}

static int module_exec(PyObject *module) {
    struct binding *binding = PyModule_GetState(module);
    for (int i = 0; i < NAMES; i++) {
        binding->names[i] = PyUnicode_InternFromString(name_texts[i]);
        if (binding->names[i] == NULL)
            return -1;
    }
    binding->empty = PyBytes_FromStringAndSize(NULL, 0);
    binding->completion_type = add_type(module, &completion_spec);
    binding->operation_type = add_type(module, &operation_spec);
    binding->socket_base = add_type(module, &socket_spec);
    PyObject *port_type = add_type(module, &port_spec);
    Py_XDECREF(port_type); /* the module has it */
    bool whole = binding->empty != NULL && binding->completion_type != NULL && binding->operation_type != NULL &&
                 binding->socket_base != NULL && port_type != NULL;
    return whole ? 0 : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    struct binding *binding = PyModule_GetState(module);
    Py_VISIT(binding->completion_type);
    Py_VISIT(binding->operation_type);
    Py_VISIT(binding->socket_base);
    Py_VISIT(binding->socket_type);
    for (int i = 0; i < AN_KIND_COUNT; i++)
        Py_VISIT(binding->kinds[i]);
    for (int i = 0; i < HELPERS; i++)
        Py_VISIT(binding->helpers[i]);
    return 0;
}

static void clear_peers(struct peer **peers) {
    struct peer *former = *peers;
    *peers = NULL;
    for (int i = 0; former != NULL && i < PEERS; i++)
        Py_XDECREF(former[i].shown);
    free(former);
}

static int module_clear(PyObject *module) {
    struct binding *binding = PyModule_GetState(module);
    clear_peers(&binding->peers);
    clear_peers(&binding->targets);
    Py_CLEAR(binding->completion_type);
    Py_CLEAR(binding->operation_type);
    Py_CLEAR(binding->socket_base);
    Py_CLEAR(binding->socket_type);
    Py_CLEAR(binding->empty);
    for (int i = 0; i < AN_KIND_COUNT; i++)
        Py_CLEAR(binding->kinds[i]);
    for (int i = 0; i < NAMES; i++)
        Py_CLEAR(binding->names[i]);
    for (int i = 0; i < HELPERS; i++)
        Py_CLEAR(binding->helpers[i]);
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    "asyncio_native._fast",
    "The hot paths in C; it stands in the same extension file as _native, and shares the core with it.",
    sizeof(struct binding),
    module_methods,
    module_slots,
    module_traverse,
    module_clear,
    module_free,
};

PyMODINIT_FUNC PyInit__fast(void);

PyMODINIT_FUNC PyInit__fast(void) { return PyModuleDef_Init(&module_definition); }
