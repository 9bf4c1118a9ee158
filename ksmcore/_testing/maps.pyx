"""What is read of the text of smaps, for tests."""

from libc.stdint cimport uintptr_t

from ksmcore._kernel.maps cimport TRAITS_BARRED, TRAITS_KEEP, TRAITS_KEY, TRAITS_WATCHED, TRAITS_WATCHED_ELSE, vma_t

cdef extern from "_kernel/maps.h" nogil:
    ctypedef void (*vma_visit "ksm_vma_visit")(const vma_t* vma, void* context) noexcept nogil
    int ksm_traits_each(int fd, uintptr_t end, vma_visit visit, void* context)

cdef enum:
    MOST = 64

ctypedef struct seen_t:
    vma_t all[MOST]
    int n


cdef void _see(const vma_t* vma, void* context) noexcept nogil:
    cdef seen_t* seen = <seen_t*>context
    if seen.n < <int>MOST:
        seen.all[seen.n] = vma[0]
        seen.n += 1


def traits(int fd, uintptr_t end):
    """(start, end, what is kept, whether it is barred, whether it is watched) of each mapping below `end` that the text
    in this file tells of. What is kept: the advice as the enum region_flag has it, and the protection key above."""
    cdef seen_t seen
    cdef int rc, i
    seen.n = 0
    with nogil:
        rc = ksm_traits_each(fd, end, _see, &seen)
    if rc != 0:
        raise OSError("it cannot be read")
    return [
        (
            seen.all[i].start, seen.all[i].end, seen.all[i].traits & (TRAITS_KEEP | TRAITS_KEY),
            bool(seen.all[i].traits & TRAITS_BARRED),
            bool(seen.all[i].traits & (TRAITS_WATCHED | TRAITS_WATCHED_ELSE)),
        )
        for i in range(seen.n)
    ]
