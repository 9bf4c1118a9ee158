"""An rmap table of its own, for tests: page numbers in, item numbers out."""

from libc.stdint cimport uint32_t, uint64_t

from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_error_raise
from ksmcore._records.rmap cimport (
    rmap_add, rmap_bytes, rmap_check, rmap_destroy, rmap_find, rmap_identity, rmap_init, rmap_remove, rmap_table,
)


cdef class RmapTable:
    """See the C functions of the same names."""

    cdef rmap_table table

    def __cinit__(self, uint32_t n_buckets=64):
        cdef sys_error err
        sys_error_clear(&err)
        if rmap_init(&self.table, n_buckets, &err) != 0:
            sys_error_raise(&err, "rmap table")

    def __dealloc__(self):
        rmap_destroy(&self.table)

    def add(self, uint64_t page_no):
        """Make an item for a page; KeyError when there is one, ValueError for page 0 or beyond 2**44."""
        cdef sys_error err
        cdef uint32_t item
        sys_error_clear(&err)
        if page_no == 0 or page_no >= <uint64_t>1 << 44:
            raise ValueError(f"page number {page_no} is out of range")
        if rmap_find(&self.table, page_no, 0) != 0:
            raise KeyError(page_no)
        item = rmap_add(&self.table, page_no, &err)
        if item == 0:
            sys_error_raise(&err, "rmap item")
        return item

    def find(self, uint64_t page_no, uint32_t hint=0):
        """The item of a page, or None."""
        cdef uint32_t item = rmap_find(&self.table, page_no, hint)
        return item if item != 0 else None

    def remove(self, uint64_t page_no):
        """Forget a page; KeyError when it has no item."""
        cdef uint32_t item = rmap_find(&self.table, page_no, 0)
        if item == 0:
            raise KeyError(page_no)
        rmap_remove(&self.table, item)

    def longest_bucket(self):
        """Items in the fullest bucket."""
        cdef uint32_t bucket, item, n, longest = 0
        for bucket in range(self.table.n_buckets):
            n = 0
            item = self.table.buckets[bucket]
            while item != 0:
                n += 1
                item = self.table.nexts[item]
            longest = max(longest, n)
        return longest

    def check(self):
        """Raise RuntimeError with the number of a broken invariant (see ksmcore/_records/rmap.pyx)."""
        cdef int broken = rmap_check(&self.table)
        if broken:
            raise RuntimeError(f"rmap invariant {broken} is broken")

    def __len__(self):
        return self.table.n_items

    @property
    def n_buckets(self):
        return self.table.n_buckets

    @property
    def metadata_bytes(self):
        return rmap_bytes(&self.table)


def identity(uint64_t page_no, uint64_t slot, uint64_t n_pages):
    """The number for a run of pages over the store."""
    return rmap_identity(page_no, slot, n_pages)
