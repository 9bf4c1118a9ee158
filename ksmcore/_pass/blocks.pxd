"""New shared pages; see blocks.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksmcore._pass.batch cimport batch, intent, pending_block


cdef uint32_t blocks_new(
    batch* b, uint32_t n_copies, const uint8_t* source, uint32_t digest, bint goes_on
) noexcept nogil
cdef void blocks_give_up_unwanted(batch* b, uint64_t* reason) noexcept nogil
cdef void blocks_write(batch* b) noexcept nogil
cdef void blocks_settle(batch* b) noexcept nogil
cdef void blocks_release_unmapped(batch* b) noexcept nogil
cdef void blocks_offer(batch* b) noexcept nogil
cdef void blocks_offer_all(batch* b) noexcept nogil
cdef pending_block* blocks_pending(batch* b, const intent* wanted) noexcept nogil
