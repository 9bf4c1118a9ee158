"""The memory of all libraries: malloc and its kin for all loaded objects, large blocks from the arena.

The functions and what they do are in memory.h, how they come to be called in _hooks/redirect. Once redirected they
stay so: blocks of the arena may be given back at any time, by anybody. To undo it is to take no more from the arena.
"""

from ksmcore._arrays.arena cimport (
    arena_give, arena_grow, arena_move, arena_owns, arena_shrink, arena_take, arena_trim,
)
from ksmcore._hooks.redirect cimport (
    redirect_find, redirect_is_programs, redirect_look, redirect_missing, redirect_put, redirect_table,
)
from ksmcore._kernel.syscalls cimport sys_page_bytes, sys_pause

cdef extern from "_arrays/memory.h":
    ctypedef struct memory_source:
        void* (*take)(size_t len_bytes, bint zeroed) noexcept nogil
        bint (*owns)(const void* memory, size_t* len_bytes) noexcept nogil
        bint (*give)(void* memory) noexcept nogil
        bint (*grow)(void* memory, size_t len_bytes) noexcept nogil
        bint (*shrink)(void* memory, size_t len_bytes) noexcept nogil
        bint (*move)(void* memory, void* target) noexcept nogil
    memory_source memory_arena
    size_t memory_page_bytes
    size_t memory_threshold "below.threshold"
    void* (*below_malloc "below.malloc")(size_t len_bytes) noexcept nogil
    size_t MEMORY_NEVER
    redirect_table memory_table
    void store_threshold "__atomic_store_n"(size_t* value, size_t wanted, int order) nogil
    int __ATOMIC_SEQ_CST

cdef enum:
    MOST_TRIES = 1000          # a millisecond apart

cdef bint _redirected = False


def missing():
    """None where the memory of all libraries can be had, else why it cannot. None may give back what it does not know:
    so all have to have the hooks."""
    if redirect_missing() is not None:
        return redirect_missing()
    if redirect_is_programs(<const void*>below_malloc):
        return "the program has a malloc of its own, whose calls cannot all be redirected"
    if memory_table.n_refused != 0:
        return f"the kernel refuses to have the tables of {memory_table.n_refused} loaded objects changed"
    return None


def use_everywhere(size_t threshold_bytes):
    """Have blocks of this size and more come from the arena, for all loaded objects. Returns what `missing` does: then
    nothing is taken from there."""
    global _redirected
    cdef int tries = 0
    with nogil:
        if not _redirected:
            redirect_put(&memory_table)
            _redirected = True
        # An object that another thread is loading just now may have the addresses of before.
        while memory_table.n_unready != 0 and tries < MOST_TRIES:
            redirect_look(&memory_table)
            sys_pause()
            tries += 1
        if memory_table.n_refused == 0:
            store_threshold(&memory_threshold, threshold_bytes, __ATOMIC_SEQ_CST)
    return missing()


def use_nowhere():
    """Take no more from the arena. What was taken goes back there all the same."""
    with nogil:
        store_threshold(&memory_threshold, MEMORY_NEVER, __ATOMIC_SEQ_CST)
        arena_trim()


def look():
    """Redirect objects that were loaded since, where they had their addresses from elsewhere."""
    with nogil:
        if _redirected:
            redirect_look(&memory_table)


memory_arena.take = arena_take
memory_arena.owns = arena_owns
memory_arena.give = arena_give
memory_arena.grow = arena_grow
memory_arena.shrink = arena_shrink
memory_arena.move = arena_move
memory_page_bytes = sys_page_bytes()
redirect_find(&memory_table)
