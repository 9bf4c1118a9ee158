"""The mappings of the process; see maps.pyx."""

from libc.stdint cimport uint64_t, uintptr_t

from ksmcore._kernel.syscalls cimport sys_error


cdef extern from "_kernel/maps.h":
    enum:
        VMA_READ "KSM_VMA_READ"
        VMA_WRITE "KSM_VMA_WRITE"
        VMA_EXEC "KSM_VMA_EXEC"
        VMA_SHARED "KSM_VMA_SHARED"
        # Traits. KEEP: bits of enum region_flag, as is the protection key.
        TRAITS_KEEP "(KSM_BARRED - 1)"
        TRAITS_BARRED "KSM_BARRED"
        TRAITS_WATCHED "KSM_WATCHED"
        TRAITS_WATCHED_ELSE "KSM_WATCHED_ELSE"
        TRAITS_KEY "KSM_KEY_MASK"
    ctypedef struct vma_t "ksm_vma":
        uintptr_t start
        uintptr_t end
        uint64_t offset
        uint64_t dev_major
        uint64_t dev_minor
        uint64_t inode           # of the file; 0: none
        int flags
        bint is_store            # named as the stores of all engines are; maps_each only
        int traits               # what the program has advised; maps_traits_each only
    ctypedef void (*vma_visit "ksm_vma_visit")(const vma_t* vma, void* context) noexcept nogil


cdef inline bint maps_is_private_data(const vma_t* vma) noexcept nogil:
    """Private, to be read and written, not to be executed."""
    return vma.flags & (VMA_READ | VMA_WRITE | VMA_EXEC | VMA_SHARED) == VMA_READ | VMA_WRITE


cdef int maps_each(vma_visit visit, void* context, sys_error* err) noexcept nogil
cdef bint maps_answers() noexcept nogil
cdef int maps_each_in(
    uintptr_t start, uintptr_t end, vma_visit visit, void* context, sys_error* err
) noexcept nogil

# The file stays open from the first enter to the last leave, so that the mappings can be read where there is no
# descriptor left for it, or no /proc any more. Entering never fails.
cdef void maps_enter() noexcept nogil
cdef void maps_leave() noexcept nogil

# What only smaps tells of them: up to `end`.
cdef int maps_traits_each(uintptr_t end, vma_visit visit, void* context, sys_error* err) noexcept nogil
cdef int maps_has_policy(uintptr_t addr) noexcept nogil      # a NUMA policy of its own; -1: it is not told
cdef void maps_give_policy(uintptr_t source, uintptr_t target, size_t len_bytes) noexcept nogil
cdef void maps_give_key(uintptr_t addr, size_t len_bytes, int key) noexcept nogil
cdef void maps_lock_pages(uintptr_t addr, size_t len_bytes) noexcept nogil
