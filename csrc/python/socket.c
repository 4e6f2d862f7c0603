/* socket.c - the type Socket, from which AsyncSocket inherits: its life, and the start of each operation. */
#include "binding.h"

/* ---- life ---------------------------------------------------------------------------------------------------------------- */

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
    return nothing();
}

static PyObject *socket_forget(PyObject *self, PyObject *unused) {
    (void)unused;
    struct socket_object *socket = (struct socket_object *)self;
    an_socket *handle = socket->handle;
    struct port_object *port = socket->port;
    socket->handle = NULL;
    socket->port = NULL;
    if (handle != NULL)
        an_socket_set_state(handle, NULL);
    Py_XDECREF((PyObject *)port);
    return nothing();
}

static void close_handle(an_socket *handle, uint32_t flags) {
    if (an_socket_is_closed(handle) && (flags & AN_FLUSH) != 0)
        return;
    if (!an_socket_may_linger(handle)) {
        an_socket_close(handle, flags);
        return;
    }
    PyThreadState *thread = PyEval_SaveThread();
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
    struct operation_object *operation = fast_operation_create(port, socket, AN_SEND, Py_None);
    if (operation == NULL)
        return false;
    operation->hidden = true;
    fast_enter(operation, FLUSHING);
    if (an_socket_send(socket->handle, fast_memory(operation), NULL, 0, AN_FOREVER) != 0)
        fast_leave(operation);
    Py_DECREF((PyObject *)operation);
    return true;
}

bool fast_close_socket(struct socket_object *socket, bool flush) {
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
    if (!fast_close_socket(socket, true))
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
    return handle != NULL ? PyLong_FromVoidPtr(handle) : fast_no_handle();
}

static PyObject *socket_closed(PyObject *self, void *closure) {
    (void)closure;
    an_socket *handle = ((struct socket_object *)self)->handle;
    return handle != NULL ? PyBool_FromLong(an_socket_is_closed(handle)) : fast_no_handle();
}

static PyObject *socket_unsent(PyObject *self, void *closure) {
    (void)closure;
    an_socket *handle = ((struct socket_object *)self)->handle;
    return handle != NULL ? PyLong_FromUnsignedLongLong(an_socket_unsent(handle)) : fast_no_handle();
}

static PyObject *socket_close(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                              PyObject *keywords) {
    static const struct signature signature = {"close", 0, 0, 1, {NAME_FLUSH}};
    PyObject *values[1];
    bool flush;
    struct socket_object *socket = (struct socket_object *)self;
    if (!fast_parse(PyType_GetModuleState(type), &signature, arguments, given, keywords, values) ||
        !fast_parse_flag(values[0], &flush))
        return NULL;
    if (socket->handle == NULL)
        return fast_no_handle();
    if (!fast_close_socket(socket, flush))
        return NULL;
    return nothing();
}

/* ---- starting operations ------------------------------------------------------------------------------------------------ */

static PyObject *refuse(const struct binding *binding, struct socket_object *socket, int error) {
    fast_raise_object(PyObject_CallFunction(binding->helpers[HELPER_REFUSAL], "Oi", socket, error));
    return NULL;
}

/* A new operation, not started; NULL with an exception set. */
static struct operation_object *draft(const struct binding *binding, struct socket_object *socket, int kind,
                                      PyObject *value) {
    if (socket->handle == NULL)
        fast_no_handle();
    else if (socket->port == NULL)
        refuse(binding, socket, AN_EINVAL);
    else
        return fast_operation_create(socket->port, socket, kind, value);
    return NULL;
}

/* After the core's answer: the operation, or the exception. */
static PyObject *started(struct operation_object *operation, int error) {
    if (error == 0)
        return (PyObject *)operation;
    fast_leave(operation);
    fast_let_go_of_buffers(operation);
    refuse(operation->port->binding, operation->socket, error);
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
    if (!fast_parse(binding, &signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[1], &timeout_ns) || !fast_parse_flag(values[0], &multishot))
        return NULL;
    struct operation_object *operation = draft(binding, (struct socket_object *)self, AN_ACCEPT, Py_None);
    if (operation == NULL)
        return NULL;
    operation->multishot = multishot;
    fast_enter(operation, IN_FLIGHT);
    return started(operation, an_socket_accept(operation->socket->handle, fast_memory(operation),
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
    if (!fast_parse(binding, &signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[1], &timeout_ns) ||
        !fast_read_address(binding, socket->family, values[0], &address))
        return NULL;
    struct operation_object *operation = draft(binding, socket, AN_CONNECT, Py_None);
    if (operation == NULL || (operation->hold = fast_hold_create(0, 0)) == NULL)
        return operation != NULL ? not_started(operation) : NULL;
    operation->hold->address = address;
    fast_enter(operation, IN_FLIGHT);
    return started(operation,
                   an_socket_connect(socket->handle, fast_memory(operation), &operation->hold->address, timeout_ns));
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
    if (!fast_parse(binding, &signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[3], &timeout_ns) ||
        !fast_parse_integer(binding, values[0], NAME_MAX_BYTES, 1, 65536, &length) ||
        !fast_parse_limit(binding, values[2], NAME_PAUSE_ABOVE, &pause_above) ||
        !fast_parse_flag(values[1], &multishot))
        return NULL;
    struct operation_object *operation = draft(binding, (struct socket_object *)self, AN_RECV, binding->empty);
    if (operation == NULL)
        return NULL;
    operation->multishot = multishot;
    fast_enter(operation, IN_FLIGHT);
    return started(operation, an_socket_recv(operation->socket->handle, fast_memory(operation), NULL, (size_t)length,
                                             multishot ? AN_MULTISHOT : 0, pause_above, timeout_ns));
}

static PyObject *socket_recvfrom(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                 PyObject *keywords) {
    static const struct signature signature = {"recvfrom", 0, 1, 3, {NAME_MAX_BYTES, NAME_MULTISHOT, NAME_TIMEOUT}};
    struct binding *binding = PyType_GetModuleState(type);
    PyObject *values[3];
    int64_t timeout_ns, length;
    bool multishot;
    if (!fast_parse(binding, &signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[2], &timeout_ns) ||
        !fast_parse_integer(binding, values[0], NAME_MAX_BYTES, 1, 65536, &length) ||
        !fast_parse_flag(values[1], &multishot))
        return NULL;
    struct operation_object *operation = draft(binding, (struct socket_object *)self, AN_RECVFROM, binding->empty);
    if (operation == NULL)
        return NULL;
    operation->multishot = multishot;
    fast_enter(operation, IN_FLIGHT);
    return started(operation, an_socket_recvfrom(operation->socket->handle, fast_memory(operation), NULL,
                                                 (size_t)length, multishot ? AN_MULTISHOT : 0, timeout_ns));
}

/* Drafts a receive into the caller's buffer, which is held then. */
static struct operation_object *draft_into(PyObject *self, const struct binding *binding,
                                           const struct signature *signature, int kind, PyObject *const *arguments,
                                           Py_ssize_t given, PyObject *keywords, int64_t *timeout_ns) {
    PyObject *values[2];
    if (!fast_parse(binding, signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[1], timeout_ns))
        return NULL;
    struct hold *hold = fast_hold_create(1, 0);
    if (hold == NULL || !fast_view_writable(binding, values[0], &hold->views[0])) {
        fast_hold_free(hold);
        return NULL;
    }
    hold->count = 1;
    struct operation_object *operation = draft(binding, (struct socket_object *)self, kind, Py_None);
    if (operation != NULL)
        operation->hold = hold;
    else
        fast_hold_free(hold);
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
    fast_enter(operation, IN_FLIGHT);
    return started(operation, an_socket_recv(operation->socket->handle, fast_memory(operation), view->buf,
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
    fast_enter(operation, IN_FLIGHT);
    return started(operation, an_socket_recvfrom(operation->socket->handle, fast_memory(operation), view->buf,
                                                 (size_t)view->len, 0, timeout_ns));
}

/* ---- sends --------------------------------------------------------------------------------------------------------------- */

/* What one send hands to the core, whichever function it is. */
struct sending {
    an_operation *operation; /* marked as Python's; without one: quiet */
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

static PyObject *send_quietly(const struct binding *binding, struct socket_object *socket, struct sending *sending) {
    if (socket->handle == NULL)
        return fast_no_handle();
    socket->quiet = true;
    sending->operation = an_operation_marked(NULL);
    int error = hand_over(socket->handle, sending);
    return error == 0 ? nothing() : refuse(binding, socket, error);
}

static PyObject *start_sending(struct operation_object *operation, struct sending *sending) {
    sending->operation = fast_memory(operation);
    fast_enter(operation, IN_FLIGHT);
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
        return send_quietly(binding, socket, sending);
    if (quiet) {
        Py_buffer view;
        if (!fast_view_readable(binding, data, &view))
            return NULL;
        read_view(&view, sending);
        PyObject *result = send_quietly(binding, socket, sending);
        PyBuffer_Release(&view);
        return result;
    }
    struct hold *hold = NULL;
    if (!is_bytes || sending->address != NULL) {
        if ((hold = fast_hold_create(1, 0)) == NULL)
            return NULL;
        if (!is_bytes && !fast_view_readable(binding, data, &hold->views[0])) {
            fast_hold_free(hold);
            return NULL;
        }
        hold->count = !is_bytes;
    }
    struct operation_object *operation = draft(binding, socket, kind, Py_None);
    if (operation == NULL) {
        fast_hold_free(hold);
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
    if (!fast_parse(binding, &signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[2], &sending.timeout_ns) || !fast_parse_flag(values[1], &quiet))
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
    if (!fast_parse(binding, &signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[3], &sending.timeout_ns) || !fast_parse_flag(values[2], &quiet) ||
        !fast_read_address(binding, socket->family, values[1], &address))
        return NULL;
    sending.address = &address;
    return send_one(binding, socket, AN_SENDTO, values[0], quiet, &sending);
}

/* Takes a view of each of the buffers; the array for the core stands behind the views. */
static struct hold *hold_pieces(const struct binding *binding, PyObject *buffers, struct sending *sending) {
    size_t count = (size_t)PyList_Size(buffers);
    struct hold *hold = fast_hold_create(count, count + 1);
    if (hold == NULL)
        return NULL;
    an_buffer *pieces = (an_buffer *)&hold->views[count];
    while (hold->count < count) {
        Py_buffer *view = &hold->views[hold->count];
        PyObject *buffer = PyList_GetItem(buffers, (Py_ssize_t)hold->count);
        if (buffer == NULL || !fast_view_readable(binding, buffer, view)) {
            fast_hold_free(hold);
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
    if (!fast_parse(binding, &signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[2], &sending.timeout_ns) || !fast_parse_flag(values[1], &quiet))
        return NULL;
    struct hold *hold = hold_all(binding, values[0], &sending);
    if (hold == NULL)
        return NULL;
    if (quiet) {
        PyObject *result = send_quietly(binding, socket, &sending);
        fast_hold_free(hold);
        return result;
    }
    struct operation_object *operation = draft(binding, socket, AN_SEND, Py_None);
    if (operation == NULL) {
        fast_hold_free(hold);
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
    if (!fast_parse(binding, &signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[3], &timeout_ns) ||
        !fast_parse_integer(binding, values[1], NAME_OFFSET, 0, 0, &offset) ||
        !fast_parse_limit(binding, values[2], NAME_COUNT_, &count) ||
        !fast_take_int64(PyObject_CallFunctionObjArgs(binding->helpers[HELPER_FILE_DESCRIPTOR], values[0], NULL),
                         &file))
        return NULL;
    struct operation_object *operation = draft(binding, (struct socket_object *)self, AN_SENDFILE, Py_None);
    if (operation == NULL)
        return NULL;
    fast_enter(operation, IN_FLIGHT);
    PyThreadState *thread = PyEval_SaveThread(); /* it may read from a disk */
    int error = an_socket_sendfile(operation->socket->handle, fast_memory(operation), (an_descriptor)file,
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
    if (!fast_parse(binding, &signature, arguments, given, keywords, values) ||
        !fast_parse_timeout(binding, values[0], &timeout_ns))
        return NULL;
    struct operation_object *operation = draft(binding, (struct socket_object *)self, AN_DISCONNECT, Py_None);
    if (operation == NULL)
        return NULL;
    fast_enter(operation, IN_FLIGHT);
    return started(operation, an_socket_disconnect(operation->socket->handle, fast_memory(operation), timeout_ns));
}

static PyObject *socket_cancel(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                               PyObject *keywords) {
    static const struct signature signature = {"cancel", 0, 0, 0, {0}};
    const struct binding *binding = PyType_GetModuleState(type);
    struct socket_object *socket = (struct socket_object *)self;
    size_t count = 0;
    if (!fast_parse(binding, &signature, arguments, given, keywords, NULL))
        return NULL;
    if (socket->handle == NULL)
        return fast_no_handle();
    int error = an_socket_cancel(socket->handle, &count);
    return error == 0 ? PyLong_FromSize_t(count) : refuse(binding, socket, error);
}

static PyMethodDef socket_methods[] = {
    {"_give", socket_give, METH_VARARGS, PyDoc_STR("Gives it its socket: (address of the handle, family).")},
    {"_forget", socket_forget, METH_NOARGS, PyDoc_STR("Gives its socket up without closing it.")},
    {"close", FAST_METHOD(socket_close),
     PyDoc_STR("close($self, /, *, flush=False)\n--\n\nCloses the socket, and returns at once.\n\n"
               "Plainly: the peer is told now, operations in flight complete as cancelled, what was not yet\n"
               "handed to the system is dropped. `flush=True` hands over what was sent before, while the\n"
               "port is dequeued from, and then closes; a failure of that is one completion. A plain close\n"
               "while that goes on, also at the end of a `with` block, stops it and drops the rest. Never\n"
               "raises on what is closed.")},
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
    {"cancel", FAST_METHOD(socket_cancel),
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

PyType_Spec fast_socket_spec = {
    "asyncio_native._fast.Socket",
    sizeof(struct socket_object),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    socket_slots,
};
