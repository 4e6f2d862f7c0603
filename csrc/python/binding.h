/* binding.h - the hot paths of the Python binding in C: to start an operation, and to make Python objects of completions.
 *
 * Four types against CPython's limited API of 3.11. AsyncSocket and CompletionPort inherit from Socket and Port here, and
 * the rest from _socket_base.py and _port_base.py, which is Python over cffi; Operation and Completion are public as they
 * are. What another value than the usual one means, and each error's text, stands in Python once, for this binding and for
 * the one over cffi; it is called from here ("helpers").
 *
 * The interpreter lock guards all that is here. It is kept across calls of the core that are short and do not block, and
 * released to wait, to close what may linger, and to move much data: a lock that is released beside a busy thread comes
 * back only after that thread's switch interval (5 ms). The core never takes it, so that holding it while the core takes
 * its own locks is safe.
 *
 * Python code may run wherever an object is made or dropped (the garbage collector), and may use the same port: whoever
 * does that has no state of the port in the hand, but a batch and references of its own.
 */
#ifndef FAST_BINDING_H
#define FAST_BINDING_H

#include <Python.h>
#include <structmember.h>

#include "os.h"

enum {
    LOCKED_BYTES = 64 << 10,       /* up to here a send keeps the interpreter lock: some 20 us on loopback */
    HEAVY_BATCH_BYTES = 256 << 10, /* a batch that brought more lets the lock go for the next one */
    CONTENDED_NS = 100 * 1000,     /* who waits longer for the lock has a busy thread beside it */
    SLICE_NS = 200 * 1000 * 1000,  /* the main thread's longest wait: Ctrl-C has to work within 0.3 s, also when the
                                      signal came just before the wait or to another thread */
    BATCH_LEAST = 16,
    BATCH_MOST = 4096
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
    HELPER_REFUSAL,         /* (sock, number) -> exception */
    HELPER_DEQUEUE_ERROR,   /* number -> exception */
    HELPER_START_ERROR,     /* number -> exception */
    HELPER_ASSOCIATE_ERROR, /* (sock, number; 0: it is no socket) -> exception */
    HELPER_PORT_CLOSED,     /* () -> exception */
    HELPER_NO_HANDLER,      /* () -> exception */
    HELPER_OTHER_PORT,      /* () -> exception */
    HELPER_RESULT,          /* (completion) -> its result, or raises */
    HELPER_ERROR_NUMBER,    /* (number, number) -> what the module errno calls it; None: the same on this system */
    HELPERS
};

struct peers;

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
    PyObject *zero;  /* 0, the error of most completions */
    int inet;        /* the system's AF_INET, AF_INET6, SOCK_STREAM */
    int inet6;
    int stream;
    struct peers *peers; /* datagrams' addresses as Python objects; NULL before the first one */
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
 *                         | others (another call, C code), which the core has given earlier completions of it, have not
 *                         | decoded them yet; or the port was closed while another call may be about to decode
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
    uint32_t decoded;   /* multishot: completions with more that were decoded */
    uint32_t undecoded; /* LATE: those that others have in the hand */
};

/* Completions on their way from the core to Python: of one call, or left over by one that ran out of memory. */
struct batch {
    struct batch *next; /* in the port's list of active or of left ones */
    size_t capacity;
    size_t count; /* entries to be released; the core writes it under its lock, when the entries are there */
    size_t first; /* the first that is not decoded */
    bool foreign; /* had completions of operations that C code started */
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
    PyObject *abandoned;        /* list: completions that an interrupted call left; or NULL */
    Py_ssize_t abandoned_first; /* those before it were taken up */
    PyObject *lingering;        /* list: dropped sockets whose failures are queued; or NULL */
    PyObject *foreign;          /* takes completions of operations that C code started; NULL or None: nobody does */
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
    PyObject *error; /* an object, as the interpreter then finds it without a call */
    unsigned long long transferred;
    char truncated;
    char more;
};

static inline PyObject *reference(void *object) {
    Py_INCREF((PyObject *)object);
    return object;
}

/* None for the interpreter. From 3.12 on None is immortal there, while this code was compiled for 3.11 to count: what is
 * given away must not be counted here alone. */
static inline PyObject *nothing(void) {
    Py_IncRef(Py_None);
    return Py_None;
}

/* To start it with: the mark tells that it is one of Python's, of an operation_object. */
static inline an_operation *fast_memory(struct operation_object *operation) {
    return an_operation_marked(&operation->operation);
}

static inline PyObject *none_or(void *object) { return reference(object != NULL ? object : Py_None); }

static inline bool port_is_closed(const struct port_object *port) {
    return port == NULL || port->handle == NULL || an_port_is_closed(port->handle) != 0;
}

extern PyType_Spec fast_operation_spec;
extern PyType_Spec fast_completion_spec;
extern PyType_Spec fast_socket_spec;
extern PyType_Spec fast_port_spec;

/* ---- arguments and errors (arguments.c): false or NULL with an exception set ------------------------------------------- */

extern const char *const fast_name_texts[NAMES];

enum { ARGUMENTS_MOST = 5 };

struct signature {
    const char *function;
    int required;   /* that many must be given */
    int positional; /* that many may be given by position */
    int count;
    enum name names[ARGUMENTS_MOST];
};

#define FAST_METHOD(function) (PyCFunction)(void (*)(void))(function), METH_METHOD | METH_FASTCALL | METH_KEYWORDS

void fast_raise_object(PyObject *exception);
PyObject *fast_no_handle(void);
PyObject *fast_ending(void);
bool fast_parse(const struct binding *binding, const struct signature *signature, PyObject *const *arguments,
                Py_ssize_t given, PyObject *keywords, PyObject **values);
bool fast_parse_flag(PyObject *value, bool *flag);
bool fast_take_int64(PyObject *number, int64_t *result);
bool fast_convert_seconds(PyObject *value, int64_t *result_ns);
bool fast_parse_timeout(const struct binding *binding, PyObject *value, int64_t *timeout_ns);
bool fast_parse_integer(const struct binding *binding, PyObject *value, enum name name, int64_t least, int64_t usual,
                        int64_t *result);
bool fast_parse_limit(const struct binding *binding, PyObject *value, enum name name, uint64_t *result);
bool fast_view_readable(const struct binding *binding, PyObject *object, Py_buffer *view);
bool fast_view_writable(const struct binding *binding, PyObject *object, Py_buffer *view);

/* ---- addresses (address.c) ------------------------------------------------------------------------------------------------ */

PyObject *fast_show_address(const struct binding *binding, int family, const an_address *address);
PyObject *fast_show_peer(struct binding *binding, int family, const an_address *address);
void fast_clear_peers(struct binding *binding);
bool fast_read_address(const struct binding *binding, int family, PyObject *shown, an_address *address);

/* ---- operations and what they hold (operation.c) -------------------------------------------------------------------------- */

struct hold *fast_hold_create(size_t views, size_t pieces);
void fast_hold_free(struct hold *hold);
void fast_let_go_of_buffers(struct operation_object *operation);
void fast_move(struct operation_object *operation, enum place place);
void fast_enter(struct operation_object *operation, enum place place);
void fast_leave(struct operation_object *operation);
struct operation_object *fast_operation_create(struct port_object *port, struct socket_object *socket, int kind,
                                               PyObject *value);

/* ---- sockets (socket.c) ----------------------------------------------------------------------------------------------------- */

bool fast_close_socket(struct socket_object *socket, bool flush);

/* ---- ports (port.c, dequeue.c) ---------------------------------------------------------------------------------------------- */

struct batch *fast_take_batch(struct port_object *port, size_t limit);
void fast_give_batch_back(struct port_object *port, struct batch *batch);
void fast_release_entries(struct port_object *port, struct batch *batch);
void fast_discard_left(struct port_object *port);
void fast_discard_abandoned(struct port_object *port);
void fast_drop_late(struct port_object *port);
PyObject *fast_port_fill(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *fast_port_abandon(PyObject *self, PyObject *done);
PyObject *fast_port_decode(PyObject *self, PyObject *address);

#endif
