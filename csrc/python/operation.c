/* operation.c - the type Operation: the memory of an operation in the core, what it holds, and where its port has it. */
#include "binding.h"

#include <stdlib.h>

struct hold *fast_hold_create(size_t views, size_t pieces) {
    struct hold *hold = malloc(sizeof *hold + views * sizeof(Py_buffer) + pieces * sizeof(an_buffer));
    if (hold == NULL)
        PyErr_NoMemory();
    else
        hold->count = 0;
    return hold;
}

void fast_hold_free(struct hold *hold) {
    if (hold == NULL)
        return;
    for (size_t i = 0; i < hold->count; i++)
        PyBuffer_Release(&hold->views[i]);
    free(hold);
}

/* The core is done with what it was given. */
void fast_let_go_of_buffers(struct operation_object *operation) {
    struct hold *hold = operation->hold;
    operation->hold = NULL;
    fast_hold_free(hold);
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
void fast_move(struct operation_object *operation, enum place place) {
    struct port_object *port = operation->port;
    if (operation->place != NOWHERE)
        unlink_from(&port->operations[operation->place], operation);
    port->in_flight -= operation->place == IN_FLIGHT;
    operation->place = (uint8_t)place;
    if (place == NOWHERE)
        return;
    port->in_flight += place == IN_FLIGHT;
    operation->next = port->operations[place];
    if (operation->next != NULL)
        operation->next->previous = operation;
    port->operations[place] = operation;
}

void fast_enter(struct operation_object *operation, enum place place) {
    Py_INCREF((PyObject *)operation);
    fast_move(operation, place);
}

void fast_leave(struct operation_object *operation) {
    if (operation->place == NOWHERE)
        return;
    fast_move(operation, NOWHERE);
    Py_DECREF((PyObject *)operation);
}

/* Not started yet. */
struct operation_object *fast_operation_create(struct port_object *port, struct socket_object *socket, int kind,
                                               PyObject *value) {
    PyTypeObject *type = (PyTypeObject *)port->binding->operation_type;
    if (type == NULL)
        return (struct operation_object *)fast_ending();
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
    operation->decoded = operation->undecoded = 0;
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
    fast_let_go_of_buffers(operation);
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

/* ---- methods ----------------------------------------------------------------------------------------------------------- */

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
        fast_raise_object(PyObject_CallNoArgs(operation->port->binding->helpers[HELPER_PORT_CLOSED]));
        return NULL;
    }
    struct socket_object *socket = operation->socket;
    if (socket == NULL || socket->handle == NULL || operation->place != IN_FLIGHT ||
        call(socket->handle, &operation->operation) != 0) {
        PyErr_SetString(PyExc_ValueError, "only a multishot that is in flight can be paused and resumed");
        return NULL;
    }
    return nothing();
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

PyType_Spec fast_operation_spec = {
    "asyncio_native.Operation",
    sizeof(struct operation_object),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    operation_slots,
};
