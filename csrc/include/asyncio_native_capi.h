/* asyncio_native_capi.h - the C interface out of the installed Python package, for extensions in C and Cython.
 *
 * An extension includes this instead of asyncio_native.h and links nothing: asyncio_native_import, to be called once from
 * each C file that uses the interface, when its module is initialised, fetches a table of functions from the package. All
 * names of asyncio_native.h then call the very library in there, on the very ports and sockets that Python has. Cython users
 * write `cimport asyncio_native`.
 *
 * The table only grows. An extension runs with the package that it was compiled against and with later ones, as long as
 * AN_CAPI_ABI stays; with any other, asyncio_native_import raises an ImportError that says what to do. It needs no more of
 * Python than the limited API of 3.11.
 *
 * The folder of this header is asyncio_native.get_include().
 */
#ifndef ASYNCIO_NATIVE_CAPI_H
#define ASYNCIO_NATIVE_CAPI_H

#include <Python.h>

#include "asyncio_native.h"

#define AN_CAPI_ABI 1 /* another number when something that was there has changed, also a structure's size */
#define AN_CAPI_VERSION "@VERSION@" /* the package's that the header is of */

#ifdef __cplusplus
extern "C" {
#endif

/* python: begin */

/* ---- Python objects: the caller holds the interpreter lock, or has its thread attached -------------------------------- */

/* The port of an asyncio_native.CompletionPort. Borrowed: it is valid as long as the Python object lives, also after that
 * was closed (calls then answer AN_EPORTCLOSED), so hold a reference as long as you use it; never free it. NULL with an
 * exception: TypeError; PortClosedError when it is closed, or in a forked child. */
an_port *an_py_port_handle(PyObject *port);

/* The socket of an asyncio_native.AsyncSocket. Borrowed likewise; operations of yours may be started on it. Its state
 * (an_port_associate, an_socket_set_state) is Python's: tell your operations apart by themselves. NULL with an exception:
 * TypeError; OSError (EBADF) when it is closed, PortClosedError when its port is. */
an_socket *an_py_socket_handle(PyObject *socket);

/* A new asyncio_native.AsyncSocket that owns `socket`, which was yours until then: accepted, opened or adopted. Do not free
 * it any more. One that is associated with a port that an_py_port_handle has given you stays so, its state is None then.
 * For a socket of an_py_socket_handle it is the same Python object again. NULL with an exception, and it stays yours:
 * OSError when it is closed, ValueError when its port is none of Python's. */
PyObject *an_py_socket_new(an_socket *socket);

/* The asyncio_native.Completion of an operation that Python started on that port and you dequeued: AN_MARKED is in its flags.
 * Call it for each such completion, in any order and from any thread, before you release it; what the operation held
 * (buffers, a place in `in_flight`) is held until then. The completion gets AN_TAKEN, and its `accepted` goes to Python.
 * None: there is nothing to show, give it to nobody. NULL with an exception: ValueError for a completion that has no
 * AN_MARKED, is of another port, or has AN_TAKEN already; PortClosedError when the port is closed, and then the completion
 * is nobody's any more (but `accepted`, if there is one, is yours to free); MemoryError, and then it may be tried again. */
PyObject *an_py_completion_new(PyObject *port, an_completion *completion);

/* Takes a completion of an operation that C code started and Python dequeued; see an_py_port_set_handler. */
typedef void (*an_py_handler)(an_completion *completion, void *context);

/* What dequeue and dequeue_many of that port in Python do with completions of operations that you started: `handler` is
 * called for each, in order, in the thread that dequeues, and Python gets none of them. What the completion points to is lent
 * for the time of the call, Python releases it; `accepted` is yours. The handler may call anything; an exception that it
 * leaves is reported as unraisable. Without a handler (NULL) such a completion waits in the port, and dequeuing raises
 * RuntimeError until there is one. -1 with an exception: TypeError, MemoryError. */
int an_py_port_set_handler(PyObject *port, an_py_handler handler, void *context);

/* Raises the exception of an error number of the library: the OSError that Python has for it. Returns NULL. */
PyObject *an_py_raise(int error);

/* python: end */

/* table: begin; written by tools/capi_table.py */

enum { AN_CAPI_COUNT = 65 }; /* functions in the table */

/* The package's; static. */
struct an_capi {
    uint32_t abi;        /* AN_CAPI_ABI */
    uint32_t count;      /* AN_CAPI_COUNT */
    const char *version; /* the package's */
    const char *(*an_version)(void);
    size_t (*an_backends)(an_backend_description *descriptions, size_t capacity);
    int (*an_address_ip)(an_address *address, int family, const char *host, uint16_t port, uint32_t flow,
                         uint32_t scope);
    int (*an_address_path)(an_address *address, const char *path, size_t length);
    int (*an_address_family)(const an_address *address);
    int (*an_address_format)(const an_address *address, char *host, uint16_t *port, uint32_t *flow, uint32_t *scope);
    int (*an_address_format_path)(const an_address *address, char *path, size_t *length);
    int (*an_port_open)(an_port **port, const an_port_options *options);
    int (*an_port_close)(an_port *port);
    void (*an_port_free)(an_port *port);
    const char *(*an_port_backend)(const an_port *port);
    int (*an_port_associate)(an_port *port, an_socket *socket, void *state);
    int (*an_port_post)(an_port *port, an_operation *operation, void *state);
    int (*an_port_timer)(an_port *port, an_operation *operation, int64_t delay_ns, void *state);
    int (*an_port_cancel)(an_port *port, an_operation *operation, int32_t *cancelled);
    int (*an_port_dequeue)(an_port *port, an_completion *completions, size_t max, int64_t timeout_ns, size_t *count);
    void (*an_completion_release)(an_completion *completions, size_t count);
    uint64_t (*an_port_in_flight)(an_port *port);
    int (*an_port_is_closed)(an_port *port);
    int (*an_port_descriptor)(an_port *port, an_descriptor *descriptor);
    int (*an_port_statistics)(an_port *port, an_statistics *statistics);
    int (*an_socket_open)(an_socket **socket, int family, int type, int protocol);
    int (*an_socket_adopt)(an_socket **socket, an_descriptor descriptor);
    int (*an_socket_detach)(an_socket *socket, an_descriptor *descriptor);
    int (*an_socket_close)(an_socket *socket, uint32_t flags);
    void (*an_socket_free)(an_socket *socket, uint32_t flags);
    int (*an_socket_bind)(an_socket *socket, const an_address *address);
    int (*an_socket_listen)(an_socket *socket, int backlog);
    int (*an_socket_shutdown)(an_socket *socket, int how);
    int (*an_socket_local_address)(an_socket *socket, an_address *address);
    int (*an_socket_peer_address)(an_socket *socket, an_address *address);
    int (*an_socket_set_option)(an_socket *socket, int level, int name, const void *value, size_t length);
    int (*an_socket_get_option)(an_socket *socket, int level, int name, void *value, size_t *length);
    an_descriptor (*an_socket_descriptor)(an_socket *socket);
    int (*an_socket_family)(const an_socket *socket);
    int (*an_socket_type)(const an_socket *socket);
    int (*an_socket_protocol)(const an_socket *socket);
    an_port *(*an_socket_port)(an_socket *socket);
    void *(*an_socket_state)(an_socket *socket);
    void (*an_socket_set_state)(an_socket *socket, void *state);
    int (*an_socket_is_closed)(an_socket *socket);
    uint64_t (*an_socket_unsent)(an_socket *socket);
    uint32_t (*an_socket_unreported)(const an_socket *socket);
    int (*an_socket_statistics_get)(an_socket *socket, an_socket_statistics *statistics);
    int (*an_socket_accept)(an_socket *socket, an_operation *operation, uint32_t flags, int64_t timeout_ns);
    int (*an_socket_connect)(an_socket *socket, an_operation *operation, const an_address *address, int64_t timeout_ns);
    int (*an_socket_recv)(an_socket *socket, an_operation *operation, void *buffer, size_t length, uint32_t flags,
                          uint64_t pause_above, int64_t timeout_ns);
    int (*an_socket_recvfrom)(an_socket *socket, an_operation *operation, void *buffer, size_t length, uint32_t flags,
                              int64_t timeout_ns);
    int (*an_socket_send)(an_socket *socket, an_operation *operation, const void *data, size_t length,
                          int64_t timeout_ns);
    int (*an_socket_sendv)(an_socket *socket, an_operation *operation, const an_buffer *buffers, size_t count,
                           int64_t timeout_ns);
    int (*an_socket_sendto)(an_socket *socket, an_operation *operation, const void *data, size_t length,
                            const an_address *address, int64_t timeout_ns);
    int (*an_socket_sendfile)(an_socket *socket, an_operation *operation, an_descriptor file, uint64_t offset,
                              uint64_t count, int64_t timeout_ns);
    int (*an_socket_disconnect)(an_socket *socket, an_operation *operation, int64_t timeout_ns);
    int (*an_socket_cancel)(an_socket *socket, size_t *count);
    int (*an_operation_cancel)(an_socket *socket, an_operation *operation, int32_t *cancelled);
    int (*an_operation_pause)(an_socket *socket, an_operation *operation);
    int (*an_operation_resume)(an_socket *socket, an_operation *operation);
    uint32_t (*an_operation_more_count)(const an_operation *operation);
    an_port *(*an_py_port_handle)(PyObject *port);
    an_socket *(*an_py_socket_handle)(PyObject *socket);
    PyObject *(*an_py_socket_new)(an_socket *socket);
    PyObject *(*an_py_completion_new)(PyObject *port, an_completion *completion);
    int (*an_py_port_set_handler)(PyObject *port, an_py_handler handler, void *context);
    PyObject *(*an_py_raise)(int error);
    int (*an_socket_may_linger)(an_socket *socket);
};

/* clang-format off */
#define AN_CAPI_FUNCTIONS(each) \
    each(an_version) \
    each(an_backends) \
    each(an_address_ip) \
    each(an_address_path) \
    each(an_address_family) \
    each(an_address_format) \
    each(an_address_format_path) \
    each(an_port_open) \
    each(an_port_close) \
    each(an_port_free) \
    each(an_port_backend) \
    each(an_port_associate) \
    each(an_port_post) \
    each(an_port_timer) \
    each(an_port_cancel) \
    each(an_port_dequeue) \
    each(an_completion_release) \
    each(an_port_in_flight) \
    each(an_port_is_closed) \
    each(an_port_descriptor) \
    each(an_port_statistics) \
    each(an_socket_open) \
    each(an_socket_adopt) \
    each(an_socket_detach) \
    each(an_socket_close) \
    each(an_socket_free) \
    each(an_socket_bind) \
    each(an_socket_listen) \
    each(an_socket_shutdown) \
    each(an_socket_local_address) \
    each(an_socket_peer_address) \
    each(an_socket_set_option) \
    each(an_socket_get_option) \
    each(an_socket_descriptor) \
    each(an_socket_family) \
    each(an_socket_type) \
    each(an_socket_protocol) \
    each(an_socket_port) \
    each(an_socket_state) \
    each(an_socket_set_state) \
    each(an_socket_is_closed) \
    each(an_socket_unsent) \
    each(an_socket_unreported) \
    each(an_socket_statistics_get) \
    each(an_socket_accept) \
    each(an_socket_connect) \
    each(an_socket_recv) \
    each(an_socket_recvfrom) \
    each(an_socket_send) \
    each(an_socket_sendv) \
    each(an_socket_sendto) \
    each(an_socket_sendfile) \
    each(an_socket_disconnect) \
    each(an_socket_cancel) \
    each(an_operation_cancel) \
    each(an_operation_pause) \
    each(an_operation_resume) \
    each(an_operation_more_count) \
    each(an_py_port_handle) \
    each(an_py_socket_handle) \
    each(an_py_socket_new) \
    each(an_py_completion_new) \
    each(an_py_port_set_handler) \
    each(an_py_raise) \
    each(an_socket_may_linger)
/* clang-format on */

/* table: end */

#ifndef AN_CAPI_TABLE_ONLY

/* This file's table; NULL before asyncio_native_import. */
static const struct an_capi *an_capi;

static inline int an_capi_refuse(const struct an_capi *found) {
    if (found->abi != AN_CAPI_ABI)
        PyErr_Format(
            PyExc_ImportError,
            "asyncio_native %s is installed, and its C interface has the number %d; this extension was compiled for "
            "number %d, that of asyncio_native %s: compile it again, or install that version",
            found->version, (int)found->abi, AN_CAPI_ABI, AN_CAPI_VERSION);
    else
        PyErr_Format(
            PyExc_ImportError,
            "asyncio_native %s is installed, and its C interface has %d functions; this extension was compiled for "
            "the %d of asyncio_native %s: pip install --upgrade \"asyncio-native>=%s\"",
            found->version, (int)found->count, (int)AN_CAPI_COUNT, AN_CAPI_VERSION, AN_CAPI_VERSION);
    return -1;
}

/* Fetches the table. 0, or -1 with an exception: ImportError. */
static inline int asyncio_native_import(void) {
    PyObject *module = PyImport_ImportModule("asyncio_native._capi");
    PyObject *capsule = module != NULL ? PyObject_GetAttrString(module, "table") : NULL;
    const struct an_capi *found =
        capsule != NULL ? (const struct an_capi *)PyCapsule_GetPointer(capsule, "asyncio_native._capi.table") : NULL;
    Py_XDECREF(capsule);
    Py_XDECREF(module);
    if (found == NULL)
        return -1;
    if (found->abi != AN_CAPI_ABI || found->count < AN_CAPI_COUNT)
        return an_capi_refuse(found);
    an_capi = found;
    return 0;
}

/* names: begin; written by tools/capi_table.py */
#define an_version (*an_capi->an_version)
#define an_backends (*an_capi->an_backends)
#define an_address_ip (*an_capi->an_address_ip)
#define an_address_path (*an_capi->an_address_path)
#define an_address_family (*an_capi->an_address_family)
#define an_address_format (*an_capi->an_address_format)
#define an_address_format_path (*an_capi->an_address_format_path)
#define an_port_open (*an_capi->an_port_open)
#define an_port_close (*an_capi->an_port_close)
#define an_port_free (*an_capi->an_port_free)
#define an_port_backend (*an_capi->an_port_backend)
#define an_port_associate (*an_capi->an_port_associate)
#define an_port_post (*an_capi->an_port_post)
#define an_port_timer (*an_capi->an_port_timer)
#define an_port_cancel (*an_capi->an_port_cancel)
#define an_port_dequeue (*an_capi->an_port_dequeue)
#define an_completion_release (*an_capi->an_completion_release)
#define an_port_in_flight (*an_capi->an_port_in_flight)
#define an_port_is_closed (*an_capi->an_port_is_closed)
#define an_port_descriptor (*an_capi->an_port_descriptor)
#define an_port_statistics (*an_capi->an_port_statistics)
#define an_socket_open (*an_capi->an_socket_open)
#define an_socket_adopt (*an_capi->an_socket_adopt)
#define an_socket_detach (*an_capi->an_socket_detach)
#define an_socket_close (*an_capi->an_socket_close)
#define an_socket_free (*an_capi->an_socket_free)
#define an_socket_bind (*an_capi->an_socket_bind)
#define an_socket_listen (*an_capi->an_socket_listen)
#define an_socket_shutdown (*an_capi->an_socket_shutdown)
#define an_socket_local_address (*an_capi->an_socket_local_address)
#define an_socket_peer_address (*an_capi->an_socket_peer_address)
#define an_socket_set_option (*an_capi->an_socket_set_option)
#define an_socket_get_option (*an_capi->an_socket_get_option)
#define an_socket_descriptor (*an_capi->an_socket_descriptor)
#define an_socket_family (*an_capi->an_socket_family)
#define an_socket_type (*an_capi->an_socket_type)
#define an_socket_protocol (*an_capi->an_socket_protocol)
#define an_socket_port (*an_capi->an_socket_port)
#define an_socket_state (*an_capi->an_socket_state)
#define an_socket_set_state (*an_capi->an_socket_set_state)
#define an_socket_is_closed (*an_capi->an_socket_is_closed)
#define an_socket_unsent (*an_capi->an_socket_unsent)
#define an_socket_unreported (*an_capi->an_socket_unreported)
#define an_socket_statistics_get (*an_capi->an_socket_statistics_get)
#define an_socket_accept (*an_capi->an_socket_accept)
#define an_socket_connect (*an_capi->an_socket_connect)
#define an_socket_recv (*an_capi->an_socket_recv)
#define an_socket_recvfrom (*an_capi->an_socket_recvfrom)
#define an_socket_send (*an_capi->an_socket_send)
#define an_socket_sendv (*an_capi->an_socket_sendv)
#define an_socket_sendto (*an_capi->an_socket_sendto)
#define an_socket_sendfile (*an_capi->an_socket_sendfile)
#define an_socket_disconnect (*an_capi->an_socket_disconnect)
#define an_socket_cancel (*an_capi->an_socket_cancel)
#define an_operation_cancel (*an_capi->an_operation_cancel)
#define an_operation_pause (*an_capi->an_operation_pause)
#define an_operation_resume (*an_capi->an_operation_resume)
#define an_operation_more_count (*an_capi->an_operation_more_count)
#define an_py_port_handle (*an_capi->an_py_port_handle)
#define an_py_socket_handle (*an_capi->an_py_socket_handle)
#define an_py_socket_new (*an_capi->an_py_socket_new)
#define an_py_completion_new (*an_capi->an_py_completion_new)
#define an_py_port_set_handler (*an_capi->an_py_port_set_handler)
#define an_py_raise (*an_capi->an_py_raise)
#define an_socket_may_linger (*an_capi->an_socket_may_linger)
/* names: end */

#endif

#ifdef __cplusplus
}
#endif

#endif
