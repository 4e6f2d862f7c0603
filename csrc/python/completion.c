/* completion.c - the type Completion: its attributes, and what result() is in the usual cases. Everything else is that of
 * the class in Python. */
#include "binding.h"

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
    Py_VISIT(completion->error);
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
    Py_CLEAR(completion->error);
    return 0;
}

static void completion_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    completion_clear(self);
    PyObject_GC_Del(self);
    Py_DECREF((PyObject *)type);
}

static bool is_there(const PyObject *attribute) { return attribute != NULL && attribute != Py_None; }

static PyObject *completion_result(PyObject *self, PyTypeObject *type, PyObject *const *arguments, Py_ssize_t given,
                                   PyObject *keywords) {
    static const struct signature signature = {"result", 0, 0, 0, {NAME_STATE}};
    const struct binding *binding = PyType_GetModuleState(type);
    const struct completion_object *completion = (struct completion_object *)self;
    PyObject *unused[1];
    if (!fast_parse(binding, &signature, arguments, given, keywords, unused))
        return NULL;
    bool well = completion->error == binding->zero;
    if (well && completion->kind == binding->kinds[AN_RECV] && is_there(completion->data))
        return reference(completion->data);
    if (well && completion->kind == binding->kinds[AN_ACCEPT] && is_there(completion->accepted) &&
        completion->address != NULL)
        return PyTuple_Pack(2, completion->accepted, completion->address);
    if (well && completion->kind == binding->kinds[AN_RECVFROM] && is_there(completion->data) &&
        completion->address != NULL)
        return PyTuple_Pack(2, completion->data, completion->address);
    return PyObject_CallFunctionObjArgs(binding->helpers[HELPER_RESULT], self, NULL);
}

static PyMethodDef completion_methods[] = {
    {"result", FAST_METHOD(completion_result),
     PyDoc_STR("result($self, /)\n--\n\n"
               "The natural value of the operation, or the error as an exception.\n\n"
               "accept: `(accepted, address)`; recv: `data`; recvfrom: `(data, address)`; recv_into: the\n"
               "count of bytes; recvfrom_into: `(count, address)`; send, sendv, sendto and sendfile: the\n"
               "count of bytes; connect, disconnect and timer: None; post: the state.\n\n"
               "Raises the fitting subclass of `OSError`, such as `ConnectionResetError` or `TimeoutError`;\n"
               "`OperationCancelledError` when it was cancelled.")},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef completion_members[] = {
    {"operation", T_OBJECT_EX, offsetof(struct completion_object, operation), 0, NULL},
    {"kind", T_OBJECT_EX, offsetof(struct completion_object, kind), 0, NULL},
    {"socket", T_OBJECT_EX, offsetof(struct completion_object, socket), 0, NULL},
    {"state", T_OBJECT_EX, offsetof(struct completion_object, state), 0, NULL},
    {"error", T_OBJECT_EX, offsetof(struct completion_object, error), 0, NULL},
    {"transferred", T_ULONGLONG, offsetof(struct completion_object, transferred), 0, NULL},
    {"data", T_OBJECT_EX, offsetof(struct completion_object, data), 0, NULL},
    {"accepted", T_OBJECT_EX, offsetof(struct completion_object, accepted), 0, NULL},
    {"address", T_OBJECT_EX, offsetof(struct completion_object, address), 0, NULL},
    {"truncated", T_BOOL, offsetof(struct completion_object, truncated), 0, NULL},
    {"more", T_BOOL, offsetof(struct completion_object, more), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot completion_slots[] = {
    {Py_tp_dealloc, completion_dealloc}, {Py_tp_traverse, completion_traverse}, {Py_tp_clear, completion_clear},
    {Py_tp_methods, completion_methods}, {Py_tp_members, completion_members},   {0, NULL},
};

PyType_Spec fast_completion_spec = {
    "asyncio_native.Completion",
    sizeof(struct completion_object),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    completion_slots,
};
