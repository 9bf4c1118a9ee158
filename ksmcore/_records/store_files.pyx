"""The memory files of a store: they are made, grow by segments, get out of reach, and go.

Most stores have one. After a fork, what is new goes to another for as long as the child lives: it still maps what it
inherited, and can stretch that mapping over all of its file, so nothing that it is not to see comes there. A file that
no slot is used of goes. Where there are too many files, and where the program has closed the descriptor of one, it gets
out of reach: what is mapped of it stays mapped, and right, but nobody else can join, and its memory comes back only
when the last sharer is gone. A limit on the size of files (RLIMIT_FSIZE) makes several as well.

Numbers of slots are never used again, since the items of pages that were written remember them.

The caller holds the engine's lock.
"""

from libc.errno cimport EFBIG, ENFILE
from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from ksmcore._kernel.forks cimport forks_count, forks_watch
from ksmcore._kernel.syscalls cimport (
    ADVISE_DONTNEED, sys_advise, sys_drop, sys_error, sys_error_clear, sys_file_limit, sys_grow, sys_is_kept, sys_keep,
    sys_map_anon, sys_map_view, sys_memfd, sys_page_bytes, sys_truncate, sys_unmap,
)
from ksmcore._trees cimport rb_node

cdef enum:
    MAX_SLOTS = 0x7fffffff     # a tree link holds 31 bits


# ---- growing ----------------------------------------------------------------------------------

cdef uint32_t _n_slots(const store_t* store, size_t len_bytes) noexcept nogil:
    return <uint32_t>(len_bytes // store.page_bytes)


cdef int _lengthen(store_t* store, store_file* file, size_t len_bytes, sys_error* err) noexcept nogil:
    """Make a file so long, or, where that is more than a limit allows, as long as it allows. -1 with *err when it
    cannot be longer than it is; EFBIG for the limit."""
    cdef size_t limit
    if sys_truncate(file.file.fd, <long long>len_bytes, err) != 0:
        limit = sys_file_limit() // store.page_bytes * store.page_bytes
        if err.code != EFBIG or limit >= len_bytes or file.first + _n_slots(store, limit) <= max(file.end, file.top):
            return -1
        sys_error_clear(err)
        len_bytes = limit
        if sys_truncate(file.file.fd, <long long>len_bytes, err) != 0:
            return -1
    file.end = file.first + _n_slots(store, len_bytes)
    return 0


cdef int _grow_arrays(store_t* store, size_t old, size_t new, sys_error* err) noexcept nogil:
    """All three. When one cannot grow, those before it are longer than need be, and grown again next time: harmless."""
    cdef void** arrays[3]
    cdef size_t entry_bytes[3]
    cdef void* grown
    cdef int i
    arrays[0] = <void**>&store.nodes
    arrays[1] = <void**>&store.uses
    arrays[2] = <void**>&store.claims
    entry_bytes[0] = sizeof(rb_node)
    entry_bytes[1] = sizeof(store_use)
    entry_bytes[2] = sizeof(uint32_t)
    for i in range(3):
        if arrays[i][0] == NULL:
            grown = sys_map_anon(new * entry_bytes[i], err)
        else:
            # There from the first try, if that was not all.
            old = max(old, <size_t>store.slots_per_segment)
            grown = sys_grow(arrays[i][0], old * entry_bytes[i], new * entry_bytes[i], err)
        if grown == NULL:
            return -1
        arrays[i][0] = grown
    return 0


cdef int _add_segment(store_t* store, store_file* file, sys_error* err) noexcept nogil:
    """Room for one segment more at the end of all slots, in the file that ends there, the views and the arrays.

    Each step leaves the store as it was when a later one fails: a longer file and longer arrays are only used up to
    `end` and `capacity`, which are raised last.
    """
    cdef size_t old = store.capacity
    cdef size_t new = old + store.slots_per_segment
    cdef size_t begins = <size_t>file.n_segments * SEGMENT_BYTES
    cdef uint32_t end = file.end
    cdef uint8_t* view
    cdef void* grown
    if new > MAX_SLOTS:
        return -1
    grown = realloc(store.segments, (store.n_segments + 1) * sizeof(store_segment))
    if grown == NULL:
        return -1
    store.segments = <store_segment*>grown
    if _lengthen(store, file, begins + SEGMENT_BYTES, err) != 0:
        return -1
    view = <uint8_t*>sys_map_view(SEGMENT_BYTES, file.file.fd, <long long>begins, err)
    if view == NULL or _grow_arrays(store, old, new, err) != 0:
        file.end = end
        if view != NULL:
            sys_unmap(<uintptr_t>view, SEGMENT_BYTES, err)
        return -1
    store.segments[store.n_segments].view = view
    store.segments[store.n_segments].file = <uint32_t>(file - store.files)
    store.n_segments += 1
    file.n_segments += 1
    store.capacity = <uint32_t>new
    return 0


cdef store_file* _free_entry(store_t* store) noexcept nogil:
    cdef uint32_t i
    cdef void* grown
    for i in range(store.n_files):
        if store.files[i].file.ino == 0:
            return &store.files[i]
    grown = realloc(store.files, (store.n_files + 1) * sizeof(store_file))
    if grown == NULL:
        return NULL
    store.files = <store_file*>grown
    store.n_files += 1
    return &store.files[store.n_files - 1]


cdef int _new_file(store_t* store, sys_error* err) noexcept nogil:
    """Begin a file behind all slots."""
    cdef store_file* file = _free_entry(store)
    if file == NULL:
        return -1
    memset(file, 0, sizeof(store_file))
    # In this order: a fork in between makes it one that existed then.
    file.made = forks_count()
    sys_keep(&file.file, sys_memfd(b"ksmcore-store", err))
    if file.file.fd < 0:
        file.file.ino = 0
        return -1
    file.first = file.end = store.capacity
    file.top = file.first + 1
    if _add_segment(store, file, err) != 0:
        sys_drop(&file.file)
        file.file.ino = 0
        file.n_segments = 0
        return -1
    if store.n_open == 0:
        forks_watch(1)
    store.n_open += 1
    store.growing = store.current = <uint32_t>(file - store.files)
    store.cursor = file.top
    return 0


cdef int store_files_make_room(store_t* store, sys_error* err) noexcept nogil:
    """More room at the end of all slots: in the file that is there, or in a new one. -1 with *err (code 0: malloc
    failed, or there are no numbers left)."""
    cdef store_file* file
    cdef uint32_t full_end
    if store.n_open != 0:
        file = &store.files[store.growing]
        if store_files_can_be_written(store, file):
            full_end = file.first + file.n_segments * store.slots_per_segment
            if file.end < full_end:
                # It met a limit, which may be a higher one by now.
                if _lengthen(store, file, <size_t>file.n_segments * SEGMENT_BYTES, err) == 0:
                    return 0
            elif _add_segment(store, file, err) == 0:
                return 0
            if err.code != EFBIG:
                return -1
    if store.n_open >= <uint32_t>MAX_FILES:
        if err.code == 0:
            err.code = ENFILE
        return -1
    sys_error_clear(err)
    return _new_file(store, err)


# ---- out of reach, and gone -------------------------------------------------------------------

cdef void _orphan(store_t* store, store_file* file, store_forget forget, void* context) noexcept nogil:
    """A file without a descriptor. No batch is under way, and no release waits to be carried out."""
    cdef uint32_t slot
    store.n_open -= 1
    if store.n_open == 0:
        forks_watch(-1)
    for slot in range(file.first, file.top):
        if not store.uses[slot].used:
            continue
        if not store.uses[slot].copy and store.uses[slot].number != <uint32_t>DEAD:
            forget(context, slot)
        store.n_idle -= store.uses[slot].idle
        store.uses[slot].idle = 0
        store.uses[slot].orphan = 1


cdef void _empty_array(uintptr_t array, size_t entry_bytes, const store_file* file, uint32_t end) noexcept nogil:
    """The memory of a file's entries is zero from here on, and given back, up to `end`, as far as it is whole pages."""
    cdef sys_error ignored
    cdef size_t page_bytes = sys_page_bytes()
    cdef uintptr_t start = array + file.first * entry_bytes, stop = array + end * entry_bytes
    cdef uintptr_t inner = (start + page_bytes - 1) // page_bytes * page_bytes
    memset(<void*>start, 0, (file.top - file.first) * entry_bytes)
    sys_error_clear(&ignored)
    # Unchecked: refused, it is kept.
    if inner < stop // page_bytes * page_bytes:
        sys_advise(inner, stop // page_bytes * page_bytes - inner, ADVISE_DONTNEED, &ignored)


cdef void _vacate(store_t* store, store_file* file) noexcept nogil:
    """A file none of whose slots is shared any more goes. It stays known: pages may lie over it that have been written
    since. Whoever has mapped it by other means keeps it."""
    cdef sys_error ignored
    cdef uint32_t segment = file.first // store.slots_per_segment, i
    cdef uint32_t end = file.first + file.n_segments * store.slots_per_segment
    sys_error_clear(&ignored)
    for i in range(segment, segment + file.n_segments):
        # Unchecked, here and below: a whole mapping of our own.
        sys_unmap(<uintptr_t>store.segments[i].view, SEGMENT_BYTES, &ignored)
        store.segments[i].view = NULL
    # To the end of its segments, so that also of a short one it is whole pages.
    _empty_array(<uintptr_t>store.nodes, sizeof(rb_node), file, end)
    _empty_array(<uintptr_t>store.uses, sizeof(store_use), file, end)
    _empty_array(<uintptr_t>store.claims, sizeof(uint32_t), file, end)
    store.n_used -= file.n_used
    store.n_dead -= file.n_dead
    store.n_hollow -= file.n_hollow
    if file.file.fd >= 0:
        sys_drop(&file.file)
        store.n_open -= 1
        if store.n_open == 0:
            forks_watch(-1)
    file.n_segments = file.n_used = file.n_dead = file.n_hollow = file.n_shared = 0
    file.is_frozen = False


cdef void store_files_begin_census(store_t* store) noexcept nogil:
    """Whoever finds a file mapped somewhere says so in `is_mapped`."""
    cdef uint32_t i
    for i in range(store.n_files):
        store.files[i].is_mapped = False


cdef void store_files_end_census(store_t* store) noexcept nogil:
    """All mappings have been looked at: what has gone and is not mapped either can be forgotten."""
    cdef uint32_t i
    for i in range(store.n_files):
        if store.files[i].n_segments == 0 and not store.files[i].is_mapped:
            store.files[i].file.ino = 0


cdef store_file* _least_used(store_t* store) noexcept nogil:
    """Of the files that cannot be written any more."""
    cdef store_file* least = NULL
    cdef store_file* file
    cdef uint32_t i
    for i in range(store.n_files):
        file = &store.files[i]
        if file.file.fd >= 0 and not store_files_can_be_written(store, file) and (
            least == NULL or file.n_used < least.n_used
        ):
            least = file
    return least


cdef void store_files_look_after(store_t* store, store_forget forget, void* context) noexcept nogil:
    """When a pass begins: see which files are out of reach, have room for another, and let go of what is empty."""
    cdef store_file* file
    cdef uint32_t i
    for i in range(store.n_files):
        file = &store.files[i]
        if file.file.fd >= 0 and not sys_is_kept(&file.file):
            # The number may be another's by now.
            sys_drop(&file.file)
            _orphan(store, file, forget, context)
    for i in range(store.n_files):
        file = &store.files[i]
        if file.n_segments != 0 and (
            file.n_shared == 0 if file.file.fd < 0
            else file.n_used == file.n_hollow and not (
                store_files_can_be_written(store, file) and i == store.growing
            )
        ):
            _vacate(store, file)
    if store.n_open >= <uint32_t>MAX_FILES:
        file = _least_used(store)
        if file != NULL:
            sys_drop(&file.file)
            _orphan(store, file, forget, context)


cdef void store_files_close_all(store_t* store) noexcept nogil:
    """Drop the descriptors, the views and the arrays; mappings of the files elsewhere stay right."""
    cdef sys_error ignored
    cdef uint32_t i
    sys_error_clear(&ignored)
    for i in range(store.n_segments):
        if store.segments[i].view != NULL:
            sys_unmap(<uintptr_t>store.segments[i].view, SEGMENT_BYTES, &ignored)
    if store.nodes != NULL:
        sys_unmap(<uintptr_t>store.nodes, <size_t>store.capacity * sizeof(rb_node), &ignored)
    if store.uses != NULL:
        sys_unmap(<uintptr_t>store.uses, <size_t>store.capacity * sizeof(store_use), &ignored)
    if store.claims != NULL:
        sys_unmap(<uintptr_t>store.claims, <size_t>store.capacity * sizeof(uint32_t), &ignored)
    for i in range(store.n_files):
        if store.files[i].file.fd >= 0:
            sys_drop(&store.files[i].file)
    if store.n_open > 0:
        forks_watch(-1)
    free(store.segments)
    free(store.files)
