"""NumPy's data allocator (NEP 49): large arrays come from the arena, small ones from NumPy's own allocator.

NumPy calls it with or without the GIL.

NumPy keeps the handler that an array's memory came from with the array, as a capsule, and looks into it whenever
memory is taken, grown or given back. There are two ways to have it look here:

- a capsule of our own, in the context (`PyDataMem_SetHandler`): for the arrays that this context makes;
- for all threads, whatever their contexts: NumPy's own capsule, which is the default of every context, is pointed at
  our handler. One pointer changes, so nobody ever sees half of it.

Wherever an array comes from, what is given back is told by its address, so it does not matter which handler gives
it back, or whether one was installed or taken out meanwhile. Handlers are never freed.
"""

from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.stdint cimport uint8_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memset, strcpy

from ksmcore._arrays.arena cimport (
    arena_begin, arena_give, arena_owns, arena_show_blocks, arena_shrink, arena_take, arena_trim,
)

cdef extern from "Python.h":
    int PyCapsule_SetPointer(object capsule, void* pointer) except -1

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void* ctx
        void* (*malloc)(void* ctx, size_t size) noexcept nogil
        void* (*calloc)(void* ctx, size_t nelem, size_t elsize) noexcept nogil
        void* (*realloc)(void* ctx, void* ptr, size_t new_size) noexcept nogil
        void (*free)(void* ctx, void* ptr, size_t size) noexcept nogil
    ctypedef struct PyDataMem_Handler:
        char name[127]
        uint8_t version
        PyDataMemAllocator allocator
    object PyDataMem_SetHandler(object handler)
    object PyDataMem_GetHandler()
    PyObject* PyDataMem_DefaultHandler
    int import_array "_import_array"() except -1

cdef const char* CAPSULE_NAME = b"mem_handler"    # NEP 49 fixes it
cdef PyDataMem_Handler* _numpys = NULL            # NumPy's own
cdef dict _capsules = {}                          # by threshold, and whether in the place of NumPy's own


cdef void* _take(void* ctx, size_t size) noexcept nogil:
    cdef void* taken = NULL
    if size >= <size_t>ctx:
        taken = arena_take(size, False)
    return taken if taken != NULL else _numpys.allocator.malloc(_numpys.allocator.ctx, size)


cdef void* _take_zeroed(void* ctx, size_t nelem, size_t elsize) noexcept nogil:
    cdef void* taken = NULL
    # Where the product overflows NumPy's own says no.
    if elsize != 0 and nelem <= <size_t>-1 // elsize and nelem * elsize >= <size_t>ctx:
        taken = arena_take(nelem * elsize, True)
    return taken if taken != NULL else _numpys.allocator.calloc(_numpys.allocator.ctx, nelem, elsize)


cdef void _give(void* ctx, void* memory, size_t size) noexcept nogil:
    if memory != NULL and not arena_give(memory):
        _numpys.allocator.free(_numpys.allocator.ctx, memory, size)


cdef void* _grow(void* ctx, void* memory, size_t new_size) noexcept nogil:
    """What came from NumPy's own allocator stays there: how much is to be kept of it is not known here."""
    cdef size_t there = 0
    cdef void* grown
    if memory == NULL:
        return _take(ctx, new_size)
    if not arena_owns(memory, &there):
        return _numpys.allocator.realloc(_numpys.allocator.ctx, memory, new_size)
    if new_size == 0 or (new_size <= there and arena_shrink(memory, new_size)):
        return memory
    grown = arena_take(new_size, False)
    if grown == NULL:
        grown = _numpys.allocator.malloc(_numpys.allocator.ctx, new_size)
    if grown == NULL:
        return memory if new_size <= there else NULL
    memcpy(grown, memory, min(there, new_size))
    arena_give(memory)
    return grown


cdef PyDataMem_Handler* _new_handler(size_t threshold_bytes, bint as_default) except NULL:
    """The threshold is all the context that it needs. In the place of NumPy's own it has the name of that: programs
    tell by the name whether a context has the default."""
    cdef PyDataMem_Handler* handler = <PyDataMem_Handler*>malloc(sizeof(PyDataMem_Handler))
    if handler == NULL:
        raise MemoryError("no memory for an allocator")
    memset(handler, 0, sizeof(PyDataMem_Handler))
    if as_default:
        strcpy(handler.name, _numpys.name)
    else:
        strcpy(handler.name, b"ksmcore")
    handler.version = 1
    handler.allocator.ctx = <void*>threshold_bytes
    handler.allocator.malloc = _take
    handler.allocator.calloc = _take_zeroed
    handler.allocator.realloc = _grow
    handler.allocator.free = _give
    return handler


cdef object _capsule(size_t threshold_bytes, bint as_default):
    key = (threshold_bytes, as_default)
    if key not in _capsules:
        _capsules[key] = PyCapsule_New(_new_handler(threshold_bytes, as_default), CAPSULE_NAME, NULL)
    return _capsules[key]


def begin(core, bint wants_huge):
    """Have memory registered with this core from now on. Once."""
    arena_begin(core, wants_huge)


def use_here(size_t threshold_bytes):
    """Have the arrays of this context come from the arena, from this size on; returns what was there before, for
    `use_again`."""
    return PyDataMem_SetHandler(_capsule(threshold_bytes, False))


def use_again(before):
    """Have the arrays of this context come from where they came from before."""
    PyDataMem_SetHandler(before)


def use_everywhere(size_t threshold_bytes):
    """Have the arrays of all contexts that use NumPy's default come from the arena."""
    cdef void* handler = PyCapsule_GetPointer(_capsule(threshold_bytes, True), CAPSULE_NAME)
    arena_show_blocks(threshold_bytes != <size_t>-1)
    PyCapsule_SetPointer(<object>PyDataMem_DefaultHandler, handler)


def use_nowhere():
    """Undo `use_everywhere`. The default goes on asking whose memory it is that is given back."""
    use_everywhere(<size_t>-1)
    with nogil:
        arena_trim()


import_array()
_numpys = <PyDataMem_Handler*>PyCapsule_GetPointer(<object>PyDataMem_DefaultHandler, CAPSULE_NAME)
