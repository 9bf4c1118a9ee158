"""What becomes of a page that was looked at; see match.pyx."""

from libc.stdint cimport uint32_t

from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport region_t


cdef void match_leave_tree(engine_core* c, uint32_t item) noexcept nogil
cdef void match_forget_item(engine_core* c, uint32_t item) noexcept nogil
cdef void match_trust_changed(engine_core* c, size_t n_look) noexcept nogil
cdef void match_prepare(engine_core* c, region_t* region, size_t n_look, sys_error* err) noexcept nogil
cdef void match_page(
    engine_core* c, const region_t* region, size_t i, size_t n_look, bint immediate
) noexcept nogil
cdef void match_leave_store(engine_core* c, const region_t* region, size_t n_look) noexcept nogil
