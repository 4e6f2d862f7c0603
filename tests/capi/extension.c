/* extension.c - an extension in C: tells what it finds in the package, and what it was compiled for. */
#define PY_SSIZE_T_CLEAN
#include <asyncio_native_capi.h>

static PyObject *look(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return Py_BuildValue("sIIK{sisisisisisisisi}", an_version(), an_capi->abi, an_capi->count,
                         (unsigned long long)(uintptr_t)an_capi, "an_operation", (int)sizeof(an_operation),
                         "an_address", (int)sizeof(an_address), "an_buffer", (int)sizeof(an_buffer), "an_completion",
                         (int)sizeof(an_completion), "an_backend_description", (int)sizeof(an_backend_description),
                         "an_port_options", (int)sizeof(an_port_options), "an_statistics", (int)sizeof(an_statistics),
                         "an_socket_statistics", (int)sizeof(an_socket_statistics));
}

static PyMethodDef methods[] = {{"look", look, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
static int run(PyObject *module) {
    (void)module;
    return asyncio_native_import();
}
static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)run}, {0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "extension", NULL, 0, methods, slots, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_extension(void) { return PyModuleDef_Init(&definition); }
