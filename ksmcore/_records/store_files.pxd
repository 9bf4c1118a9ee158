"""The files of a store, and which slots lie in them; see store_files.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksmcore._kernel.syscalls cimport sys_error, sys_file
from ksmcore._trees cimport rb_node


cdef extern from *:
    """
    #ifndef KSMCORE_STORE_USE
    #define KSMCORE_STORE_USE
    typedef struct {
        uint32_t number : 25;
        uint32_t used : 1;
        uint32_t copy : 1;
        uint32_t orphan : 1;
        uint32_t pending : 1;
        uint32_t lost : 1;
        uint32_t idle : 1;
        uint32_t hollow : 1;
    } store_use;
    #endif
    """
    # What is known of one slot, in 4 bytes beside its tree node.
    ctypedef struct store_use:
        uint32_t number        # private to store: of sharers; while pending, what it is pending as; or DEAD
        uint32_t used          # handed out, and not to be had again yet
        uint32_t copy          # same bytes as the slot before it: belongs to that slot's block
        uint32_t orphan        # its file is out of reach: it stands in no tree, and gets no further sharer
        uint32_t lost          # may be mapped where nobody keeps account of it: not released
        uint32_t pending       # not written yet; its bytes are still the candidate's
        uint32_t idle          # of a block without sharers that waits for its release
        uint32_t hollow        # released, its memory given back; pages still lie over it

cdef enum:
    DEAD = 0x01ffffff          # in place of the number: released, but still mapped by another process
    SEGMENT_BYTES = 0x4000000  # 64 MiB: a file grows, and is viewed, by this much
    MAX_FILES = 16             # that have a descriptor
    MAX_RELEASES = 1024        # slots waiting to be punched together; more than the longest block has


# One memory file. Its slots follow each other from `first` on: (slot - first) * page_bytes is the offset.
ctypedef struct store_file:
    sys_file file              # fd -1: out of reach; ino 0: the entry is free
    uint32_t first             # never used, so that no run of slots goes on from one file to the next
    uint32_t top               # slots below it have been handed out at least once
    uint32_t end               # slots below it have room in the file
    uint32_t n_segments        # 0: no slot of it is used; it is only known, since pages may lie over it
    uint32_t n_used
    uint32_t n_dead            # of those: released here, kept for other processes only
    uint32_t n_hollow          # of those
    uint32_t n_shared          # slots with at least one sharer
    uint32_t made              # forks of the process before there was this file, or since which all children are gone
                               # that could map it: those of later ones can
    bint is_frozen             # such a child may live
    bint is_mapped             # somewhere, as the last census found
    bint is_full               # a limit on the size of files leaves nothing more of it to write

ctypedef struct store_segment:
    uint8_t* view              # read-only mapping; NULL: no slot is used here any more
    uint32_t file              # which of the store's


ctypedef struct store_t:
    size_t page_bytes
    rb_node* nodes             # stable tree node of each slot; .digest: checksum of its bytes
    store_use* uses
    uint32_t* claims           # pages here that lie over each slot, by the rmap table; sharers are among them
    store_segment* segments
    store_file* files
    int gets_huge_pages        # the kernel gives them to memory files; -1: not asked yet
    uint32_t n_segments
    uint32_t slots_per_segment
    uint32_t capacity          # slots that the arrays have room for
    uint32_t n_files           # entries
    uint32_t n_open            # of those: with a descriptor
    uint32_t growing           # the file at the end of all slots
    uint32_t current           # the file that `cursor` lies in
    uint32_t cursor            # where the next search for a free slot starts
    uint32_t top               # no slot from it on has ever been handed out
    uint32_t aligned_end       # slots up to here are for a huge page, so none is taken elsewhere
    uint32_t n_used
    uint32_t n_dead            # of those: released here, kept for other processes only
    uint32_t n_idle            # of those
    uint32_t n_hollow          # of those
    uint32_t n_shared          # slots with at least one sharer
    bint has_lost              # there may be lost slots
    uint32_t seen_forks        # forks that the files were looked at for
    uint32_t n_releases
    uint32_t releases[<int>MAX_RELEASES]


# Told of every slot that leaves the stable tree because its file is out of reach.
ctypedef void (*store_forget)(void* context, uint32_t slot) noexcept nogil


cdef inline store_file* store_file_of(const store_t* store, uint32_t slot) noexcept nogil:
    return &store.files[store.segments[slot // store.slots_per_segment].file]


cdef inline bint store_files_can_be_written(const store_t* store, const store_file* file) noexcept nogil:
    """May slots of this file be handed out? Not of one that existed at a fork, while a child of it may live."""
    return file.file.fd >= 0 and file.made == store.seen_forks and not file.is_full


cdef int store_files_make_room(store_t* store, sys_error* err) noexcept nogil
cdef void store_files_look_after(store_t* store, store_forget forget, void* context) noexcept nogil
cdef void store_files_begin_census(store_t* store) noexcept nogil
cdef void store_files_end_census(store_t* store) noexcept nogil
cdef void store_files_close_all(store_t* store) noexcept nogil
