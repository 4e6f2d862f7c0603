/* module.c - the module asyncio_native._fast, in the extension file of _native. */
#include "binding.h"

#include <stdlib.h>

static const char *const helper_names[HELPERS] = {
    "timeout_ns",      "nanoseconds", "integer",         "readable",   "writable",      "encode",
    "address_of",      "decode",      "file_descriptor", "refusal",    "dequeue_error", "start_error",
    "associate_error", "port_closed", "no_handler",      "other_port", "result",        "error_number",
};

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
    if (helpers == NULL) {
        PyErr_SetString(PyExc_TypeError, "bind() needs the helpers");
        return NULL;
    }
    if (!take_kinds(binding, kinds) || !take_helpers(binding, helpers))
        return NULL;
    PyObject *former = binding->socket_type;
    binding->socket_type = reference(socket_type);
    Py_XDECREF(former);
    return nothing();
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
        binding->names[i] = PyUnicode_InternFromString(fast_name_texts[i]);
        if (binding->names[i] == NULL)
            return -1;
    }
    binding->empty = PyBytes_FromStringAndSize(NULL, 0);
    binding->zero = PyLong_FromLong(0);
    binding->completion_type = add_type(module, &fast_completion_spec);
    binding->operation_type = add_type(module, &fast_operation_spec);
    binding->socket_base = add_type(module, &fast_socket_spec);
    PyObject *port_type = add_type(module, &fast_port_spec);
    Py_XDECREF(port_type); /* the module has it */
    bool whole = binding->empty != NULL && binding->zero != NULL && binding->completion_type != NULL &&
                 binding->operation_type != NULL && binding->socket_base != NULL && port_type != NULL;
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

static int module_clear(PyObject *module) {
    struct binding *binding = PyModule_GetState(module);
    fast_clear_peers(binding);
    Py_CLEAR(binding->completion_type);
    Py_CLEAR(binding->operation_type);
    Py_CLEAR(binding->socket_base);
    Py_CLEAR(binding->socket_type);
    Py_CLEAR(binding->empty);
    Py_CLEAR(binding->zero);
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
