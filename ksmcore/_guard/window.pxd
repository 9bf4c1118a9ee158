"""A window: pages that no writer reaches while they are compared and remapped. Types only."""

from libc.stdint cimport uint8_t, uint32_t, uintptr_t


cdef enum:
    USUAL_PAGES = 128        # most pages of a usual window: tens of microseconds for a waiting writer
    WINDOW_PAGES = 512       # of any: a huge page is dealt with as a whole, which takes no longer
    WINDOW_STUCK = -2        # what opening or closing returns when the kernel gives something not back
    WINDOW_BARRED = -3       # what opening returns while a thread blocks SIGSEGV, or may
    WINDOW_IN_CALL = -4      # and while a call in flight may write into it

# How writers are kept out; the names are in settings.py.
cdef enum guard_kind:
    GUARD_MPROTECT           # permission taken away, and a signal handler
    GUARD_UFFD_USER          # userfaultfd that holds back user code only
    GUARD_UFFD               # userfaultfd that holds back system calls as well
    N_GUARDS

# What became of one page.
cdef enum page_outcome:
    DONE                     # in the window: in the guard's hand; after it: dealt with
    CHANGED                  # its bytes were not (or no longer) what they were taken for
    REFUSED                  # the kernel would not protect or remap it; see the error
    PINNED                   # a device may be writing into it
    IN_CALL                  # a call in flight may write into it
    BARRED                   # a thread blocks SIGSEGV, so the mprotect guard would end the process


ctypedef struct window_t:
    # set by whoever opens it
    guard_kind guard
    bint over_store          # the pages map the store (or a shared file); else anonymous memory
    uintptr_t addr
    uint32_t n_pages         # at most WINDOW_PAGES
    size_t page_bytes
    bint is_huge             # the WINDOW_PAGES pages of a huge page, that should not be split
    bint is_way_back         # the pages become plain memory again
    bint is_due              # they must; a call in flight is waited for, and not for ever
    uint8_t* outcomes        # enum page_outcome, for each page
    # set by the guard
    const uint8_t* bytes     # where the pages can be read while it is open: those with outcome DONE
    uintptr_t scratch        # private to the guard: where pages are moved to
    uint8_t away[<int>WINDOW_PAGES]     # private to the guard: this page is not at its address now
