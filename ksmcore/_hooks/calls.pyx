"""Calls in flight: a function of the C library that may write into memory until it returns says so, and waits for
a window over that memory; and no window is opened there meanwhile.

The functions are the table in rows.h, the hooks are made of it in hooks.h, how a call and a window see each other is
told in slots.h. A call that began before the hooks were there, or in an object that they had not reached yet, is not
known of. Nor are calls whose input arrives after they returned (io_uring, aio_read), and those that go past the C
library.

Hooks stay redirected while anybody counts on them; where nobody does any more, calls in flight go on telling of
themselves until they return, and nobody asks.
"""

from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._hooks.redirect cimport (
    redirect_back, redirect_find, redirect_look, redirect_missing, redirect_others, redirect_put, redirect_table,
)
from ksmcore._kernel.forks cimport forks_lock, forks_unlock

cdef extern from "_hooks/hooks.h":
    redirect_table hooks_table
    uint32_t hooks_keep_segv
    void hooks_route_actions(void* route, void* is_over) nogil
    ctypedef struct slots_window_t:
        uint32_t n_waits
        uint32_t n_waiting
    slots_window_t slots_window
    int slots_has_key
    uint32_t slots_n_untold, slots_probes
    uint32_t slots_need_fence
    void slots_init()
    void slots_prepare() nogil
    bint slots_open(uintptr_t lo, uintptr_t hi) nogil
    void slots_close() nogil
    bint slots_first(uintptr_t* lo, uintptr_t* hi) nogil
    void slots_child() noexcept nogil

cdef extern from *:
    int pthread_atfork(
        void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil
    )

# Written under the fork lock, so never inside a window.
cdef uint32_t _n_users = 0
cdef uint32_t _n_keepers = 0
cdef bint _is_shut = False


cdef object calls_missing():
    return redirect_missing()


cdef void calls_begin(bint keep_segv) noexcept nogil:
    global _n_users, _n_keepers, hooks_keep_segv
    slots_prepare()
    redirect_put(&hooks_table)
    forks_lock()
    _n_users += 1
    _n_keepers += keep_segv
    hooks_keep_segv = _n_keepers
    forks_unlock()


cdef void calls_end(bint keep_segv) noexcept nogil:
    global _n_users, _n_keepers, hooks_keep_segv
    forks_lock()
    _n_users -= 1
    _n_keepers -= keep_segv
    hooks_keep_segv = _n_keepers
    forks_unlock()
    redirect_back(&hooks_table)


cdef void calls_look() noexcept nogil:
    if _n_users != 0:
        redirect_look(&hooks_table)


cdef void calls_route_actions(calls_action route, calls_asked is_over) noexcept nogil:
    hooks_route_actions(<void*>route, <void*>is_over)


cdef bint calls_shut(uintptr_t addr, size_t len_bytes) noexcept nogil:
    global _is_shut
    if _n_users == 0:
        return False
    _is_shut = True
    return slots_open(addr, addr + len_bytes)


cdef void calls_let_in() noexcept nogil:
    global _is_shut
    if _is_shut:
        _is_shut = False
        slots_close()


cdef bint calls_first(uintptr_t* lo, uintptr_t* hi) noexcept nogil:
    return _n_users != 0 and slots_first(lo, hi)


# ---- for Python -----------------------------------------------------------------------------------

def missing():
    """None where calls in flight can be told of, else why they cannot, or not all of them."""
    if calls_missing() is None and redirect_others() != 0:
        return (
            f"{redirect_others()} functions come from another library than the C library (LD_PRELOAD, a sanitizer): "
            "not all calls tell of themselves"
        )
    return calls_missing()


def rows():
    """(name, whether this C library has it) of each function in the table."""
    return [
        (hooks_table.rows[i].name.decode(), hooks_table.rows[i].below[0] != NULL) for i in range(hooks_table.n_rows)
    ]


def hook(str name):
    """Where the hook of that function is."""
    cdef bytes wanted = name.encode()
    for i in range(hooks_table.n_rows):
        if hooks_table.rows[i].name == wanted:
            return <uintptr_t>hooks_table.rows[i].hook
    raise KeyError(name)


cdef uint32_t calls_probe(uint32_t n_places) noexcept nogil:
    global slots_probes
    cdef uint32_t before = slots_probes
    slots_probes = n_places
    return before


def counts():
    """How it stands: users; entries and symbols that the last walk over the objects has changed, and the objects it
    saw, had to leave for later, or could not change; calls that wait, and that ever did; and whether calls need
    a barrier of their own."""
    return {
        "users": _n_users,
        "entries": hooks_table.n_entries,
        "symbols": hooks_table.n_symbols,
        "objects": hooks_table.n_objects,
        "unready": hooks_table.n_unready,
        "refused": hooks_table.n_refused,
        "untold": slots_n_untold,
        "waiting": slots_window.n_waiting,
        "waits": slots_window.n_waits,
        "fenced": slots_need_fence,
    }


slots_init()
redirect_find(&hooks_table)
if pthread_atfork(NULL, NULL, slots_child) != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
