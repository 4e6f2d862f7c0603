/* port.c - the type Port, from which CompletionPort inherits: its life, what it holds, and the calls that are not dequeue. */
#include "binding.h"

#include <stdlib.h>

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

struct batch *fast_take_batch(struct port_object *port, size_t limit) {
    struct batch *batch = port->spare;
    if (batch == NULL || batch->capacity < limit)
        return batch_create(limit);
    port->spare = NULL;
    return batch;
}

void fast_give_batch_back(struct port_object *port, struct batch *batch) {
    struct batch *other = port->spare;
    if (other == NULL || other->capacity < batch->capacity)
        port->spare = batch;
    else
        other = batch;
    free(other);
}

/* Dropped sockets whose failures have all been reported need not be kept any more. */
static void dismiss_lingering(struct port_object *port) {
    PyObject *lingering = reference(port->lingering); /* dropping one may run Python code, which may close the port */
    for (Py_ssize_t i = PyList_Size(lingering) - 1; i >= 0; i--) {
        if (i >= PyList_Size(lingering))
            continue; /* or which dismissed others */
        struct socket_object *socket = (struct socket_object *)PyList_GetItem(lingering, i);
        if (socket->handle != NULL && an_socket_unreported(socket->handle) > 0)
            continue;
        if (PyList_SetSlice(lingering, i, i + 1, NULL) != 0)
            PyErr_Clear();
    }
    Py_DECREF(lingering);
}

void fast_release_entries(struct port_object *port, struct batch *batch) {
    size_t count = batch->count;
    batch->count = batch->first = 0;
    an_completion_release(batch->entries, count);
    if (port->lingering != NULL)
        dismiss_lingering(port);
}

void fast_discard_left(struct port_object *port) {
    while (port->left != NULL) {
        struct batch *batch = port->left;
        port->left = batch->next;
        for (size_t i = batch->first; i < batch->count; i++) {
            if (batch->entries[i].accepted != NULL)
                an_socket_free(batch->entries[i].accepted, 0);
        }
        fast_release_entries(port, batch);
        free(batch);
    }
}

/* Nobody has got these, nor the connections in them. */
void fast_discard_abandoned(struct port_object *port) {
    PyObject *abandoned = port->abandoned;
    Py_ssize_t first = port->abandoned_first;
    port->abandoned = NULL;
    port->abandoned_first = 0;
    for (Py_ssize_t i = first; abandoned != NULL && i < PyList_Size(abandoned); i++) {
        PyObject *accepted = ((struct completion_object *)PyList_GetItem(abandoned, i))->accepted;
        if (accepted == NULL || accepted == Py_None || ((struct socket_object *)accepted)->handle == NULL)
            continue; /* garbage together with the port, and finalized before it */
        if (!fast_close_socket((struct socket_object *)accepted, false))
            PyErr_Clear();
    }
    Py_XDECREF(abandoned);
}

/* The port is closed: nobody dequeues what they would have to be there for. */
void fast_drop_late(struct port_object *port) {
    while (port->operations[LATE] != NULL)
        fast_leave(port->operations[LATE]);
}

static void drop_place(struct port_object *port, enum place place) {
    while (port->operations[place] != NULL) {
        struct operation_object *operation = port->operations[place];
        Py_INCREF((PyObject *)operation);
        if (port->active != NULL)
            fast_move(operation, LATE);
        else
            fast_leave(operation);
        fast_let_go_of_buffers(operation);
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
    fast_discard_left(port);
    fast_discard_abandoned(port);
    drop_place(port, IN_FLIGHT);
    drop_place(port, FLUSHING);
    if (port->active == NULL)
        fast_drop_late(port);
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
    return nothing();
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
    Py_VISIT(port->foreign);
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
    fast_drop_late(port);
    Py_CLEAR(port->abandoned);
    Py_CLEAR(port->lingering);
    Py_CLEAR(port->foreign);
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

/* ---- methods ----------------------------------------------------------------------------------------------------------- */

static PyObject *started_own(struct operation_object *operation, int error) {
    if (error == 0)
        return (PyObject *)operation;
    fast_leave(operation);
    fast_raise_object(PyObject_CallFunction(operation->port->binding->helpers[HELPER_START_ERROR], "i", error));
    Py_DECREF((PyObject *)operation);
    return NULL;
}

static PyObject *port_post(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                           PyObject *keywords) {
    static const struct signature signature = {"post", 0, 1, 1, {NAME_STATE}};
    struct port_object *port = (struct port_object *)self;
    PyObject *values[1];
    if (!fast_parse(PyType_GetModuleState(type), &signature, arguments, given, keywords, values))
        return NULL;
    if (port->handle == NULL)
        return fast_no_handle();
    struct operation_object *operation =
        fast_operation_create(port, NULL, AN_POST, values[0] != NULL ? values[0] : Py_None);
    if (operation == NULL)
        return NULL;
    fast_enter(operation, IN_FLIGHT);
    if (started_own(operation, an_port_post(port->handle, fast_memory(operation), NULL)) == NULL)
        return NULL;
    Py_DECREF((PyObject *)operation);
    return nothing();
}

static PyObject *port_timer(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                            PyObject *keywords) {
    static const struct signature signature = {"timer", 1, 2, 2, {NAME_SECONDS, NAME_STATE}};
    const struct binding *binding = PyType_GetModuleState(type);
    struct port_object *port = (struct port_object *)self;
    PyObject *values[2];
    int64_t delay_ns;
    if (!fast_parse(binding, &signature, arguments, given, keywords, values))
        return NULL;
    if (!fast_convert_seconds(values[0], &delay_ns)) {
        PyObject *helper = binding->helpers[HELPER_NANOSECONDS];
        if (!fast_take_int64(PyObject_CallFunction(helper, "Os", values[0], "seconds"), &delay_ns))
            return NULL;
    }
    if (port->handle == NULL)
        return fast_no_handle();
    struct operation_object *operation =
        fast_operation_create(port, NULL, AN_TIMER, values[1] != NULL ? values[1] : Py_None);
    if (operation == NULL)
        return NULL;
    fast_enter(operation, IN_FLIGHT);
    return started_own(operation, an_port_timer(port->handle, fast_memory(operation), delay_ns, NULL));
}

static PyObject *port_associate(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                PyObject *keywords) {
    static const struct signature signature = {"associate", 1, 2, 2, {NAME_SOCK, NAME_STATE}};
    const struct binding *binding = PyType_GetModuleState(type);
    struct port_object *port = (struct port_object *)self;
    PyObject *values[2];
    if (!fast_parse(binding, &signature, arguments, given, keywords, values))
        return NULL;
    if (!PyObject_TypeCheck(values[0], (PyTypeObject *)binding->socket_base)) {
        fast_raise_object(PyObject_CallFunction(binding->helpers[HELPER_ASSOCIATE_ERROR], "Oi", values[0], 0));
        return NULL;
    }
    struct socket_object *socket = (struct socket_object *)values[0];
    if (port->handle == NULL || socket->handle == NULL)
        return fast_no_handle();
    int error = an_port_associate(port->handle, socket->handle, socket);
    if (error != 0) {
        fast_raise_object(PyObject_CallFunction(binding->helpers[HELPER_ASSOCIATE_ERROR], "Oi", values[0], error));
        return NULL;
    }
    PyObject *former = socket->state;
    socket->state = values[1] != NULL && values[1] != Py_None ? reference(values[1]) : NULL;
    if (socket->port == NULL)
        socket->port = (struct port_object *)reference(port);
    Py_XDECREF(former);
    return nothing();
}

static PyObject *port_close(PyObject *self, PyObject *unused) {
    (void)unused;
    shut_down((struct port_object *)self);
    return nothing();
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
    return handle != NULL ? PyLong_FromVoidPtr(handle) : fast_no_handle();
}

static PyMethodDef port_methods[] = {
    {"_open", FAST_METHOD(port_open), PyDoc_STR("Gives it its port: (address of the handle, main thread).")},
    {"_fill", (PyCFunction)(void (*)(void))fast_port_fill, METH_FASTCALL,
     PyDoc_STR("Waits, and puts completions into a list: (list, max_count, timeout).")},
    {"_abandon", fast_port_abandon, METH_O, PyDoc_STR("Takes completions back that did not get to the user.")},
    {"_decode", fast_port_decode, METH_O,
     PyDoc_STR("The completion of an entry that C code dequeued, by its address; or None, if it is not to be shown.")},
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
    {"_foreign", T_OBJECT, offsetof(struct port_object, foreign), 0, NULL},
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

PyType_Spec fast_port_spec = {
    "asyncio_native._fast.Port",
    sizeof(struct port_object),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    port_slots,
};
