/* dequeue.c - waiting for completions, and making Python objects of them. */
#include "binding.h"

#include <stddef.h>
#include <stdlib.h>

/* ---- from an entry to a completion ------------------------------------------------------------------------------------------ */

static struct operation_object *operation_of(an_operation *operation) {
    return (struct operation_object *)((char *)operation - offsetof(struct operation_object, operation));
}

static struct completion_object *completion_create(const struct binding *binding, const an_completion *entry) {
    if (binding->completion_type == NULL)
        return (struct completion_object *)fast_ending();
    struct completion_object *completion =
        PyObject_GC_New(struct completion_object, (PyTypeObject *)binding->completion_type);
    if (completion == NULL)
        return NULL;
    completion->operation = completion->kind = completion->socket = completion->state = NULL;
    completion->data = completion->accepted = completion->address = completion->error = NULL;
    completion->transferred = entry->transferred;
    completion->truncated = (entry->flags & AN_TRUNCATED) != 0;
    completion->more = (entry->flags & AN_MORE) != 0;
    return completion;
}

/* A new reference, or NULL with an exception set. */
static PyObject *error_of(const struct binding *binding, const an_completion *entry) {
    if (entry->error == 0)
        return reference(binding->zero);
    PyObject *translate = binding->helpers[HELPER_ERROR_NUMBER], *number = PyLong_FromLong(entry->error);
    if (number == NULL || translate == Py_None)
        return number;
    PyObject *translated = PyObject_CallFunctionObjArgs(translate, number, number, NULL);
    Py_DECREF(number);
    return translated;
}

/* What the completion of a socket's operation carries; false with an exception set. */
static bool describe(struct binding *binding, struct completion_object *completion, const an_completion *entry,
                     struct operation_object *operation) {
    struct socket_object *socket = operation->socket;
    completion->operation = reference(operation);
    completion->socket = reference(socket);
    completion->state = none_or(socket->state);
    completion->data = entry->data != NULL ? PyBytes_FromStringAndSize(entry->data, (Py_ssize_t)entry->transferred)
                                           : reference(operation->value);
    if (entry->address == NULL)
        completion->address = reference(Py_None);
    else if (entry->kind == AN_RECVFROM)
        completion->address = fast_show_peer(binding, socket->family, entry->address);
    else
        completion->address = fast_show_address(binding, socket->family, entry->address);
    completion->accepted =
        entry->accepted != NULL ? PyType_GenericAlloc((PyTypeObject *)binding->socket_type, 0) : reference(Py_None);
    return completion->data != NULL && completion->address != NULL && completion->accepted != NULL;
}

/* A post or a timer. */
static void describe_own(struct completion_object *completion, struct operation_object *operation, uint16_t kind) {
    completion->operation = reference(kind == AN_POST ? Py_None : (PyObject *)operation);
    completion->socket = reference(Py_None);
    completion->state = reference(operation->value);
    completion->data = reference(Py_None);
    completion->address = reference(Py_None);
    completion->accepted = reference(Py_None);
}

/* A failure of quiet sends: its socket, if the program has that still, is the state that the core has now. */
static void describe_quiet(struct completion_object *completion, const an_completion *entry) {
    struct socket_object *socket = an_socket_state(entry->socket);
    completion->operation = reference(Py_None);
    completion->socket = none_or(socket);
    completion->state = none_or(socket != NULL ? socket->state : NULL);
    completion->data = reference(Py_None);
    completion->address = reference(Py_None);
    completion->accepted = reference(Py_None);
}

/* The last completion of an operation was decoded. Of a multishot, others may have earlier ones in the hand: other calls
 * here, or C code that dequeued them. */
static void end_operation(struct operation_object *operation) {
    uint32_t undecoded = operation->multishot ? an_operation_more_count(&operation->operation) - operation->decoded : 0;
    operation->undecoded = undecoded;
    if (undecoded > 0 && operation->place != NOWHERE)
        fast_move(operation, LATE);
    else
        fast_leave(operation);
}

/* What follows a completion that has got to the user. */
static void settle(const an_completion *entry, struct operation_object *operation) {
    if (operation->hold != NULL || operation->keep != NULL)
        fast_let_go_of_buffers(operation);
    if ((entry->flags & AN_MORE) == 0) {
        end_operation(operation);
        return;
    }
    operation->decoded++;
    if (operation->undecoded > 0 && --operation->undecoded == 0)
        fast_leave(operation);
}

/* Started by C code that shares the port: its handler takes the completion. Without one it stays, as one does for which
 * memory did not suffice; false with an exception set, and then nothing has happened. */
static bool hand_to_foreign(struct port_object *port, struct batch *batch, const an_completion *entry) {
    if (port->foreign == NULL || port->foreign == Py_None) {
        fast_raise_object(PyObject_CallNoArgs(port->binding->helpers[HELPER_NO_HANDLER]));
        return false;
    }
    batch->foreign = true;
    PyObject *handler = reference(port->foreign);
    PyObject *address = PyLong_FromVoidPtr((void *)(uintptr_t)entry);
    PyObject *result = address != NULL ? PyObject_CallFunctionObjArgs(handler, address, NULL) : NULL;
    bool taken = result != NULL;
    Py_XDECREF(result);
    Py_XDECREF(address);
    Py_DECREF(handler);
    return taken;
}

/* Decodes one entry into the list; false with an exception set, and then nothing has happened. */
static bool decode(struct port_object *port, struct batch *batch, const an_completion *entry, PyObject *done) {
    if ((entry->flags & AN_MARKED) == 0)
        return hand_to_foreign(port, batch, entry);
    struct binding *binding = port->binding;
    struct operation_object *operation = entry->operation != NULL ? operation_of(entry->operation) : NULL;
    if (operation != NULL && operation->hidden) {
        fast_leave(operation);
        return true;
    }
    struct completion_object *completion = completion_create(binding, entry);
    if (completion == NULL)
        return false;
    bool whole = true;
    completion->kind = reference(binding->kinds[entry->kind]);
    completion->error = error_of(binding, entry);
    if (operation == NULL)
        describe_quiet(completion, entry);
    else if (operation->socket == NULL)
        describe_own(completion, operation, entry->kind);
    else
        whole = describe(binding, completion, entry, operation);
    PyObject_GC_Track(completion);
    if (!whole || completion->error == NULL || PyList_Append(done, (PyObject *)completion) != 0) {
        Py_DECREF((PyObject *)completion);
        return false;
    }
    if (entry->accepted != NULL) { /* not before: without a handle it closed nothing when it was dropped */
        struct socket_object *accepted = (struct socket_object *)completion->accepted;
        accepted->handle = entry->accepted;
        accepted->family = operation->socket->family;
    }
    if (operation != NULL)
        settle(entry, operation);
    Py_DECREF((PyObject *)completion);
    return true;
}

/* Decodes up to `limit` entries, and releases the batch behind the last one. */
static bool decode_batch(struct port_object *port, struct batch *batch, size_t limit, PyObject *done) {
    uint64_t bytes = 0;
    while (batch->first < batch->count && (size_t)PyList_Size(done) < limit) {
        const an_completion *entry = &batch->entries[batch->first];
        bytes += entry->kind == AN_RECV ? entry->transferred : 0;
        if (!decode(port, batch, entry, done))
            return false;
        batch->first++;
    }
    port->heavy = bytes > HEAVY_BATCH_BYTES;
    if (batch->first == batch->count)
        fast_release_entries(port, batch);
    return true;
}

/* ---- waiting -------------------------------------------------------------------------------------------------------------- */

static int dequeue_unlocked(struct port_object *port, struct batch *batch, size_t limit, int64_t timeout_ns) {
    PyThreadState *thread = PyEval_SaveThread();
    int error = an_port_dequeue(port->handle, batch->entries, limit, timeout_ns, &batch->count);
    int64_t ready_ns = an_clock();
    PyEval_RestoreThread(thread);
    port->contended = an_clock() - ready_ns > CONTENDED_NS;
    return error;
}

/* Beside a busy thread the first attempt keeps the lock: there is mostly more to do at once, and giving the lock up costs
 * that thread's whole switch interval. Alone, the attempt would only be one more system call. */
static int dequeue(struct port_object *port, struct batch *batch, size_t limit, int64_t timeout_ns) {
    if ((timeout_ns == 0 || port->contended) && !port->heavy) {
        int error = an_port_dequeue(port->handle, batch->entries, limit, 0, &batch->count);
        if (error != 0 || batch->count > 0 || timeout_ns == 0)
            return error;
    }
    return dequeue_unlocked(port, batch, limit, timeout_ns);
}

/* Waits until something is decoded into `done` or the time is over; false with an exception set. */
static bool wait_and_decode(struct port_object *port, struct batch *batch, size_t limit, int64_t wait_ns,
                            PyObject *done) {
    bool sliced = PyThread_get_thread_ident() == port->main_thread;
    int64_t until_ns = wait_ns > 0 ? an_clock() + wait_ns : 0;
    for (;;) {
        int64_t slice_ns = sliced && (wait_ns < 0 || wait_ns > SLICE_NS) ? SLICE_NS : wait_ns;
        batch->foreign = false;
        int error = dequeue(port, batch, limit, slice_ns);
        bool came = batch->count > 0;
        if (came && !decode_batch(port, batch, limit, done))
            return false;
        if (PyList_Size(done) > 0)
            return true;
        if (!came && error != 0 && error != AN_EINTR) {
            fast_raise_object(PyObject_CallFunction(port->binding->helpers[HELPER_DEQUEUE_ERROR], "i", error));
            return false;
        }
        if (PyErr_CheckSignals() != 0)
            return false;
        if (wait_ns > 0) {
            int64_t now_ns = an_clock();
            wait_ns = now_ns < until_ns ? until_ns - now_ns : 0;
        }
        if (wait_ns == 0 && (!came || batch->foreign)) /* a poll does not go on for others' sake */
            return true;
    }
}

static bool take_abandoned(struct port_object *port, size_t limit, PyObject *done) {
    Py_ssize_t size = PyList_Size(port->abandoned);
    while (port->abandoned_first < size && (size_t)PyList_Size(done) < limit) {
        if (PyList_Append(done, PyList_GetItem(port->abandoned, port->abandoned_first)) != 0)
            return false;
        port->abandoned_first++;
    }
    if (port->abandoned_first == size) {
        port->abandoned_first = 0;
        Py_CLEAR(port->abandoned);
    }
    return true;
}

/* The port was closed while this call was under way: what it could not let go of then, goes now. */
static void settle_closed(struct port_object *port) {
    if (!port_is_closed(port))
        return;
    fast_discard_left(port);
    if (port->active == NULL)
        fast_drop_late(port);
}

/* From here to deactivate, who closes the port leaves the operations that the batch's entries refer to. */
static void activate(struct port_object *port, struct batch *batch) {
    batch->next = port->active;
    port->active = batch;
}

static void deactivate(struct port_object *port, struct batch *batch) {
    struct batch **place = &port->active;
    while (*place != batch)
        place = &(*place)->next;
    *place = batch->next;
    batch->next = NULL;
    if (batch->count == 0) {
        fast_give_batch_back(port, batch);
    } else {
        batch->next = port->left;
        port->left = batch;
    }
    if (port->operations[LATE] != NULL || port->left != NULL)
        settle_closed(port);
}

/* What calls left over that ran out of memory, or were broken off by a signal handler. */
static bool take_left(struct port_object *port, size_t limit, PyObject *done) {
    if (port->abandoned != NULL && !take_abandoned(port, limit, done))
        return false;
    while (port->left != NULL && (size_t)PyList_Size(done) < limit) {
        struct batch *batch = port->left;
        port->left = batch->next;
        activate(port, batch);
        bool decoded = decode_batch(port, batch, limit, done);
        deactivate(port, batch);
        if (!decoded)
            return false;
    }
    return true;
}

static bool fill(struct port_object *port, size_t limit, int64_t wait_ns, PyObject *done) {
    if ((port->left != NULL || port->abandoned != NULL) && !take_left(port, limit, done))
        return false;
    if (PyList_Size(done) > 0)
        return true;
    struct batch *batch = fast_take_batch(port, limit);
    if (batch == NULL)
        return false;
    activate(port, batch);
    bool filled = wait_and_decode(port, batch, limit, wait_ns, done);
    deactivate(port, batch);
    return filled;
}

static bool parse_max_count(const struct binding *binding, PyObject *value, int64_t *limit) {
    int overflow = 0;
    if (PyLong_CheckExact(value))
        *limit = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow > 0)
        *limit = INT64_MAX;
    return overflow > 0 || fast_parse_integer(binding, value, NAME_MAX_COUNT, 1, 1, limit);
}

/* _fill(done, max_count, timeout): the list `done` is the caller's, so that what was dequeued is not lost when a signal
 * handler raises between the return from here and the next instruction. */
PyObject *fast_port_fill(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    struct port_object *port = (struct port_object *)self;
    int64_t limit, wait_ns;
    if (given != 3 || !PyList_CheckExact(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "_fill() takes a list, the count and the timeout");
        return NULL;
    }
    if (port->handle == NULL)
        return fast_no_handle();
    if (!parse_max_count(port->binding, arguments[1], &limit) ||
        !fast_parse_timeout(port->binding, arguments[2], &wait_ns))
        return NULL;
    bool filled = fill(port, limit < BATCH_MOST ? (size_t)limit : BATCH_MOST, wait_ns, arguments[0]);
    if (!filled && PyList_Size(arguments[0]) == 0)
        return NULL;
    if (!filled)
        PyErr_Clear(); /* out of memory behind these, which go to the user first */
    return nothing();
}

/* _abandon(done): puts them before what is abandoned already, in the place of what was taken up. */
PyObject *fast_port_abandon(PyObject *self, PyObject *done) {
    struct port_object *port = (struct port_object *)self;
    if (port->abandoned == NULL && (port->abandoned = PyList_New(0)) == NULL)
        return NULL;
    if (PyList_SetSlice(port->abandoned, 0, port->abandoned_first, done) != 0)
        return NULL;
    port->abandoned_first = 0;
    if (port_is_closed(port))
        fast_discard_abandoned(port);
    return nothing();
}

/* Whether that entry is one of this port's, which is open; false with an exception set. */
static bool may_decode(struct port_object *port, const an_completion *entry) {
    enum helper refusal = HELPERS;
    if (port_is_closed(port))
        refusal = HELPER_PORT_CLOSED;
    else if (entry->operation != NULL && operation_of(entry->operation)->port != port)
        refusal = HELPER_OTHER_PORT;
    if (refusal != HELPERS)
        fast_raise_object(PyObject_CallNoArgs(port->binding->helpers[refusal]));
    return refusal == HELPERS;
}

/* Decodes a copy of the entry, as a batch of its own; false with an exception set, and then nothing has happened. No
 * Python code runs between the look at the port and activate: it could close the port, and with it the operation goes. */
static bool decode_copy(struct port_object *port, const an_completion *entry, PyObject *done) {
    if (!may_decode(port, entry))
        return false;
    struct batch *batch = fast_take_batch(port, 1);
    if (batch == NULL)
        return false;
    batch->entries[0] = *entry;
    batch->count = 1;
    activate(port, batch);
    bool decoded = decode(port, batch, &batch->entries[0], done);
    batch->count = 0; /* who dequeued the entry releases it */
    fast_release_entries(port, batch);
    deactivate(port, batch);
    return decoded;
}

/* _decode(address): what an_py_completion_new stands on, which has looked for the mark. */
PyObject *fast_port_decode(PyObject *self, PyObject *address) {
    an_completion *entry = PyLong_AsVoidPtr(address);
    if (entry == NULL)
        return PyErr_Occurred() ? NULL : fast_no_handle();
    PyObject *completion = NULL, *done = PyList_New(0); /* first: it may have garbage collected */
    if (done != NULL && decode_copy((struct port_object *)self, entry, done)) {
        entry->flags |= AN_TAKEN;
        entry->accepted = NULL;
        completion = PyList_Size(done) > 0 ? reference(PyList_GetItem(done, 0)) : nothing();
    }
    Py_XDECREF(done);
    return completion;
}
