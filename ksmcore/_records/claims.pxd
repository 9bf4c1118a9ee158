"""Which slots are mapped in this process, by the records and by the kernel; see claims.pyx."""

from libc.stdint cimport uint32_t

from ksmcore._kernel.pagemap cimport pagemap
from ksmcore._records.store_files cimport store_t


cdef void claims_set_hollow(store_t* store, uint32_t slot, bint hollow) noexcept nogil
cdef void claims_add(store_t* store, uint32_t slot) noexcept nogil
cdef void claims_lose(store_t* store, uint32_t slot) noexcept nogil
cdef void claims_drop(store_t* store, uint32_t slot) noexcept nogil
cdef uint32_t claims_unshown(store_t* store, pagemap* pm, uint32_t slot, uint32_t n_slots) noexcept nogil
