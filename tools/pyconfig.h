/* pyconfig.h - in place of the interpreter's own where the extension is cross compiled: what CPython's headers ask of a
 * 64-bit system in the limited API, which is the same on all of them. */
#ifndef ASYNCIO_NATIVE_PYCONFIG_H
#define ASYNCIO_NATIVE_PYCONFIG_H

#define SIZEOF_SHORT 2
#define SIZEOF_INT 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_TIME_T 8
#define ALIGNOF_MAX_ALIGN_T 8
#define WITH_DOC_STRINGS 1 /* else PyDoc_STR makes them empty */

#if defined(_WIN32)
#define MS_WIN64 1
#define MS_WIN32 1
#define MS_WINDOWS 1
#define NT_THREADS 1
#define Py_ENABLE_SHARED 1
#define HAVE_DECLSPEC_DLL 1
#define HAVE_PY_SSIZE_T 1
#define PY_SSIZE_T_MAX 9223372036854775807LL
#define SIZEOF_LONG 4
#define SIZEOF_WCHAR_T 2
typedef long long Py_ssize_t;
#else
#define HAVE_PTHREAD_H 1
#define HAVE_SSIZE_T 1
#define HAVE_STDARG_PROTOTYPES 1
#define HAVE_SYS_TIME_H 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_UNISTD_H 1
#define HAVE_WCHAR_H 1
#define SIZEOF_LONG 8
#define SIZEOF_WCHAR_T 4
#endif

#endif
