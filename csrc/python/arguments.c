/* arguments.c - what calls from Python are given, turned into what the core takes; and the errors for it. */
#include "binding.h"

const char *const fast_name_texts[NAMES] = {
    "address",   "buffer", "buffers",     "count", "data",    "file", "flush", "max_bytes", "max_count",
    "multishot", "offset", "pause_above", "quiet", "seconds", "sock", "state", "timeout",
};

void fast_raise_object(PyObject *exception) {
    if (exception == NULL)
        return;
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
}

/* For a method of an object that has no handle: never opened, or finalized and found by another finalizer. */
PyObject *fast_no_handle(void) {
    PyErr_SetString(PyExc_AttributeError, "_handle");
    return NULL;
}

/* For what is used when garbage collection has cleared the module already. */
PyObject *fast_ending(void) {
    PyErr_SetString(PyExc_RuntimeError, "the interpreter is ending");
    return NULL;
}

static int find_name(const struct binding *binding, const struct signature *signature, PyObject *keyword) {
    for (int i = 0; i < signature->count; i++) {
        if (binding->names[signature->names[i]] == keyword)
            return i;
    }
    for (int i = 0; i < signature->count; i++) { /* one that is not interned */
        if (PyUnicode_CompareWithASCIIString(keyword, fast_name_texts[signature->names[i]]) == 0)
            return i;
    }
    PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", signature->function, keyword);
    return -1;
}

/* Sorts the arguments into `values`, borrowed, NULL where not given; false with an exception set. */
bool fast_parse(const struct binding *binding, const struct signature *signature, PyObject *const *arguments,
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
                         fast_name_texts[signature->names[i]]);
            return false;
        }
    }
    return true;
}

bool fast_parse_flag(PyObject *value, bool *flag) {
    *flag = value == Py_True;
    if (value == NULL || value == Py_True || value == Py_False)
        return true;
    int truth = PyObject_IsTrue(value);
    *flag = truth > 0;
    return truth >= 0;
}

bool fast_take_int64(PyObject *number, int64_t *result) {
    if (number == NULL)
        return false;
    *result = PyLong_AsLongLong(number);
    Py_DECREF(number);
    return *result != -1 || !PyErr_Occurred();
}

/* Seconds as nanoseconds, rounded up, for the values that a float tells exactly enough; else false. */
bool fast_convert_seconds(PyObject *value, int64_t *result_ns) {
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

bool fast_parse_timeout(const struct binding *binding, PyObject *value, int64_t *timeout_ns) {
    *timeout_ns = AN_FOREVER;
    if (value == NULL || value == Py_None || fast_convert_seconds(value, timeout_ns))
        return true;
    return fast_take_int64(PyObject_CallFunctionObjArgs(binding->helpers[HELPER_TIMEOUT_NS], value, NULL), timeout_ns);
}

/* An integer from `least` on; `usual` where it is not given. */
bool fast_parse_integer(const struct binding *binding, PyObject *value, enum name name, int64_t least, int64_t usual,
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
    return fast_take_int64(
        PyObject_CallFunction(binding->helpers[HELPER_INTEGER], "OsL", value, fast_name_texts[name], (long long)least),
        result);
}

/* The same, UINT64_MAX for None. */
bool fast_parse_limit(const struct binding *binding, PyObject *value, enum name name, uint64_t *result) {
    int64_t number;
    *result = UINT64_MAX;
    if (value == NULL || value == Py_None)
        return true;
    if (!fast_parse_integer(binding, value, name, 0, 0, &number))
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

bool fast_view_readable(const struct binding *binding, PyObject *object, Py_buffer *view) {
    if (PyUnicode_Check(object) || PyObject_GetBuffer(object, view, PyBUF_SIMPLE) != 0)
        return refuse_buffer(binding, HELPER_READABLE, object);
    return true;
}

bool fast_view_writable(const struct binding *binding, PyObject *object, Py_buffer *view) {
    if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE) != 0)
        return refuse_buffer(binding, HELPER_WRITABLE, object);
    if (view->len > 0)
        return true;
    PyBuffer_Release(view);
    return refuse_buffer(binding, HELPER_WRITABLE, object);
}
