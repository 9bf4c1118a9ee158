"""Page-aligned memory that is registered from birth and gives itself back.

A `PageMemory` is the base object of an array: as long as any view of the array lives, it lives. The
engine does not hold it, or it could never be collected; instead it takes itself out of the engine
before it unmaps its pages. It holds the engine, which therefore lives as long as its arrays do.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uintptr_t

from ksmcore._arrays.huge_pages cimport HUGE_BYTES, huge_pages_refuse
from ksmcore._kernel.syscalls cimport (
    sys_error, sys_error_clear, sys_error_raise, sys_map_anon, sys_page_bytes, sys_unmap,
)


@cython.no_gc_clear          # __dealloc__ needs `core`, also when a reference cycle is collected
cdef class PageMemory:
    """`len_bytes` bytes of zeros that begin `offset` bytes into a page; a writable buffer."""

    cdef object __weakref__
    cdef object core
    cdef object owner            # the engine; only kept alive
    cdef readonly uintptr_t addr     # of the first page
    cdef readonly size_t offset
    cdef readonly size_t len_bytes   # asked for
    cdef size_t mapped_bytes     # whole pages
    cdef object region_id

    def __cinit__(self, object core, object region_id, size_t len_bytes, object owner=None, size_t offset=0):
        cdef sys_error err
        cdef size_t page = sys_page_bytes()
        cdef void* memory
        cdef int flags = 0
        sys_error_clear(&err)
        if len_bytes == 0 or len_bytes > <size_t>-1 // 2 - 2 * page or offset >= page:
            raise ValueError(f"cannot make {len_bytes} bytes of memory")
        self.len_bytes = len_bytes
        self.offset = offset
        self.mapped_bytes = (offset + len_bytes + page - 1) // page * page
        with nogil:
            memory = sys_map_anon(self.mapped_bytes, &err)
            if memory != NULL and self.mapped_bytes < <size_t>HUGE_BYTES:
                flags = huge_pages_refuse(<uintptr_t>memory, self.mapped_bytes)
        if memory == NULL:
            sys_error_raise(&err, "array")
        self.addr = <uintptr_t>memory
        # Even the last page belongs to this memory alone, so all of it is registered.
        core.add(region_id, self.addr, self.mapped_bytes // page, flags, fresh=True)
        self.region_id = region_id
        self.core = core
        self.owner = owner

    def __dealloc__(self):
        cdef sys_error ignored
        sys_error_clear(&ignored)
        try:
            if self.core is not None:
                # False when it was unregistered before, or belongs to a forked child's parent.
                self.core.remove(self.region_id, self.addr, False)
        except MemoryError:
            # In a forked child that cannot make an engine of its own: nothing is registered there.
            pass
        if self.addr != 0:
            # Unchecked: a whole mapping of our own.
            with nogil:
                sys_unmap(self.addr, self.mapped_bytes, &ignored)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, <void*>(self.addr + self.offset), <Py_ssize_t>self.len_bytes, False, flags)

    @property
    def n_pages(self):
        return self.mapped_bytes // sys_page_bytes()

    def __repr__(self):
        return f"<ksmcore page memory: {self.len_bytes} bytes at {self.addr + self.offset:#x}>"
