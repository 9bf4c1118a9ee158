"""A key's tree among many: a forest of red-black trees over one array of nodes; see forest.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._trees cimport page_of_t, rb_is_in, rb_node, rb_place, rb_tree


ctypedef struct forest_t:
    rb_tree one              # what all trees have in common; its root and n_nodes are of the tree in work
    uint32_t* roots
    uint32_t n_roots         # trees
    uint32_t base            # the largest power of two that is not above n_roots
    uint32_t capacity        # of roots
    uint32_t n_nodes         # in all trees


cdef inline bint forest_holds(const forest_t* forest, uint32_t node) noexcept nogil:
    """Does a node stand in one of the trees? For forests that are never cleared."""
    return rb_is_in(forest.one.nodes[0], node)


cdef int forest_init(
    forest_t* forest, rb_node** nodes, bint by_content, size_t page_bytes, page_of_t page_of, void* owner,
    sys_error* err
) noexcept nogil
cdef void forest_destroy(forest_t* forest) noexcept nogil
cdef void forest_expect(forest_t* forest, size_t n_nodes) noexcept nogil
cdef void forest_clear(forest_t* forest) noexcept nogil
cdef void forest_prefetch(const forest_t* forest, const uint32_t* digests, size_t n) noexcept nogil
cdef uint32_t forest_find(
    forest_t* forest, uint32_t digest, const uint8_t* page, rb_place* place
) noexcept nogil
cdef void forest_insert(forest_t* forest, uint32_t node, rb_place place) noexcept nogil
cdef void forest_insert_before(forest_t* forest, uint32_t node, uint32_t successor) noexcept nogil
cdef void forest_put(forest_t* forest, uint32_t node, const uint8_t* page) noexcept nogil
cdef void forest_erase(forest_t* forest, uint32_t node) noexcept nogil
cdef uint32_t forest_first(forest_t* forest) noexcept nogil
cdef uint32_t forest_next(forest_t* forest, uint32_t node) noexcept nogil
cdef size_t forest_bytes(const forest_t* forest) noexcept nogil
cdef int forest_check(forest_t* forest, bint check_order) noexcept nogil
