/* capi.c - the module asyncio_native._table, in the extension file of _native: the table of functions for extensions.
 *
 * What needs Python objects stands in _capi.py, for both bindings; here it is called. Nothing is kept between calls, so that
 * each interpreter has its own.
 */
#define AN_CAPI_TABLE_ONLY
#include "asyncio_native_capi.h"

#include <stdbool.h>
#include <stdlib.h>

#define PACKAGE "asyncio_native._capi"
#define TABLE_NAME PACKAGE ".table"
#define TAKER_NAME PACKAGE ".taker"

/* ---- calls into _capi.py -------------------------------------------------------------------------------------------------- */

/* Calls a function of it with one argument or two (the second may be NULL), and gives back the first. NULL for an argument
 * that could not be made: with its exception. */
static PyObject *call(const char *function, PyObject *first, PyObject *second) {
    PyObject *module = first != NULL ? PyImport_ImportModule(PACKAGE) : NULL;
    PyObject *callable = module != NULL ? PyObject_GetAttrString(module, function) : NULL;
    PyObject *result = callable != NULL ? PyObject_CallFunctionObjArgs(callable, first, second, NULL) : NULL;
    Py_XDECREF(callable);
    Py_XDECREF(module);
    return result;
}

static void *address(PyObject *number) {
    void *pointer = number != NULL ? PyLong_AsVoidPtr(number) : NULL;
    Py_XDECREF(number);
    return pointer;
}

an_port *an_py_port_handle(PyObject *port) { return address(call("port_address", port, NULL)); }

an_socket *an_py_socket_handle(PyObject *socket) { return address(call("socket_address", socket, NULL)); }

PyObject *an_py_socket_new(an_socket *socket) {
    PyObject *number = PyLong_FromVoidPtr(socket);
    PyObject *made = call("new_socket", number, NULL);
    Py_XDECREF(number);
    return made;
}

PyObject *an_py_completion_new(PyObject *port, an_completion *completion) {
    if ((completion->flags & (AN_MARKED | AN_TAKEN)) != AN_MARKED) {
        const char *text = (completion->flags & AN_TAKEN) != 0
                               ? "Python has taken this completion already"
                               : "Python did not start the operation of this completion";
        PyErr_SetString(PyExc_ValueError, text);
        return NULL;
    }
    PyObject *number = PyLong_FromVoidPtr(completion);
    PyObject *made = number != NULL ? call("new_completion", port, number) : NULL;
    Py_XDECREF(number);
    return made;
}

PyObject *an_py_raise(int error) {
    PyObject *number = PyLong_FromLong(error);
    PyObject *exception = call("exception", number, NULL);
    Py_XDECREF(number);
    if (exception != NULL)
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_XDECREF(exception);
    return NULL;
}

/* ---- the handler of completions that Python dequeued ------------------------------------------------------------------------ */

/* Owned by a capsule, that by a Python function, that by the port. */
struct taker {
    an_py_handler handler;
    void *context;
};

static void free_taker(PyObject *capsule) { free(PyCapsule_GetPointer(capsule, TAKER_NAME)); }

/* take(address, done=None): the entry is committed in the list before the handler has it, so that it comes once. */
static PyObject *take(PyObject *capsule, PyObject *arguments) {
    PyObject *number, *done = NULL;
    if (!PyArg_ParseTuple(arguments, "O|O!", &number, &PyList_Type, &done))
        return NULL;
    struct taker *taker = PyCapsule_GetPointer(capsule, TAKER_NAME);
    an_completion *completion = taker != NULL ? PyLong_AsVoidPtr(number) : NULL;
    if (completion == NULL || (done != NULL && PyList_Append(done, Py_None) != 0))
        return NULL;
    taker->handler(completion, taker->context);
    if (PyErr_Occurred())
        PyErr_WriteUnraisable(capsule);
    Py_IncRef(Py_None); /* not counted here alone: see binding.h */
    return Py_None;
}

static PyMethodDef take_definition = {"take", take, METH_VARARGS,
                                      PyDoc_STR("Gives an entry to the handler of C code: (its address, done=None).")};

/* NULL with an exception. */
static PyObject *create_taker(an_py_handler handler, void *context) {
    if (handler == NULL) {
        Py_IncRef(Py_None);
        return Py_None;
    }
    struct taker *taker = malloc(sizeof *taker);
    if (taker == NULL)
        return PyErr_NoMemory();
    *taker = (struct taker){handler, context};
    PyObject *capsule = PyCapsule_New(taker, TAKER_NAME, free_taker);
    if (capsule == NULL) {
        free(taker);
        return NULL;
    }
    PyObject *function = PyCFunction_NewEx(&take_definition, capsule, NULL);
    Py_DECREF(capsule);
    return function;
}

int an_py_port_set_handler(PyObject *port, an_py_handler handler, void *context) {
    PyObject *taker = create_taker(handler, context);
    PyObject *set = taker != NULL ? call("set_handler", port, taker) : NULL;
    bool done = set != NULL;
    Py_XDECREF(set);
    Py_XDECREF(taker);
    return done ? 0 : -1;
}

/* ---- the module --------------------------------------------------------------------------------------------------------------- */

#define ENTRY(function) .function = function,

static const struct an_capi table = {
    .abi = AN_CAPI_ABI, .count = AN_CAPI_COUNT, .version = AN_VERSION_STRING, AN_CAPI_FUNCTIONS(ENTRY)};

static int module_exec(PyObject *module) {
    PyObject *capsule = PyCapsule_New((void *)(uintptr_t)&table, TABLE_NAME, NULL);
    int error = capsule != NULL ? PyModule_AddObjectRef(module, "table", capsule) : -1;
    Py_XDECREF(capsule);
    return error;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if defined(Py_mod_gil) /* not in the limited API of 3.11 */
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "asyncio_native._table",
    .m_doc = "The table of functions for C and Cython extensions; see asyncio_native_capi.h.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__table(void);

PyMODINIT_FUNC PyInit__table(void) { return PyModuleDef_Init(&module_definition); }
