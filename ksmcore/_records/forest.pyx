"""A forest: the stable and the unstable tree, each split into many small red-black trees by the checksum.

It owns the roots; the nodes are the caller's, and every tree is one of _trees.

A search in one tree of a million nodes follows some twenty links, most of them to memory that no cache
holds. Here the low bits of a key's checksum choose one of many trees of LOAD_NODES nodes or fewer on
average, so a search follows three or so, however many pages there are. In "content" order the checksum
is no part of the key, and there is one tree.

Like the rmap hash the forest grows by one tree whenever the load passes LOAD_NODES per tree, and only the
nodes of one tree are moved then: no insertion pays for the size of the forest.

Invariants, checked by `forest_check` beside those of each tree: every node is in the tree that its
checksum names (7); n_nodes counts them all (6).
"""

from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.string cimport memset

from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_grow, sys_map_anon, sys_page_bytes, sys_unmap
from ksmcore._trees cimport (
    NIL, page_of_t, rb_check, rb_erase, rb_find, rb_first, rb_init, rb_insert, rb_insert_before, rb_next, rb_node,
    rb_place,
)

cdef extern from *:
    void __builtin_prefetch(const void* address) noexcept nogil

cdef enum:
    LOAD_NODES = 6
    MAX_EXPECTED = 1 << 18   # trees; more grow as they come: a sparse region may never have the pages


cdef inline uint32_t _tree_of(const forest_t* forest, uint32_t digest) noexcept nogil:
    cdef uint32_t tree = digest & (2 * forest.base - 1)
    return tree if tree < forest.n_roots else tree & (forest.base - 1)


cdef int forest_init(
    forest_t* forest, rb_node** nodes, bint by_content, size_t page_bytes, page_of_t page_of, void* owner,
    sys_error* err
) noexcept nogil:
    """A forest of one empty tree. -1 without memory; forest_destroy is safe either way."""
    memset(forest, 0, sizeof(forest_t))
    rb_init(&forest.one, nodes, by_content, page_bytes, page_of, owner)
    forest.capacity = <uint32_t>(sys_page_bytes() // sizeof(uint32_t))
    forest.n_roots = forest.base = 1
    forest.roots = <uint32_t*>sys_map_anon(forest.capacity * sizeof(uint32_t), err)
    return 0 if forest.roots != NULL else -1


cdef void forest_destroy(forest_t* forest) noexcept nogil:
    cdef sys_error ignored
    sys_error_clear(&ignored)
    # Unchecked: munmap of a whole mapping of our own fails only on a broken argument.
    if forest.roots != NULL:
        sys_unmap(<uintptr_t>forest.roots, <size_t>forest.capacity * sizeof(uint32_t), &ignored)
    forest.roots = NULL


cdef bint _make_room(forest_t* forest, size_t n_roots) noexcept nogil:
    """Room for so many trees; False without memory for it."""
    cdef size_t capacity = forest.capacity
    cdef sys_error ignored
    cdef void* grown
    while capacity < n_roots:
        capacity *= 2
    if capacity != forest.capacity:
        sys_error_clear(&ignored)
        grown = sys_grow(
            forest.roots, <size_t>forest.capacity * sizeof(uint32_t), capacity * sizeof(uint32_t), &ignored
        )
        if grown == NULL:
            return False
        forest.roots = <uint32_t*>grown
        forest.capacity = <uint32_t>capacity
    return True


cdef void forest_expect(forest_t* forest, size_t n_nodes) noexcept nogil:
    """An empty forest becomes one of as many trees as n_nodes nodes want, so that they come without any tree
    being split; never one of fewer. Where no memory is to be had it stays as it is."""
    cdef size_t wanted = min(n_nodes // LOAD_NODES, <size_t>MAX_EXPECTED)
    if forest.one.by_content or forest.n_nodes != 0 or wanted <= forest.n_roots:
        return
    if not _make_room(forest, wanted):
        return
    forest.n_roots = <uint32_t>wanted
    while 2 * forest.base < forest.n_roots:
        forest.base *= 2
    memset(forest.roots, 0, wanted * sizeof(uint32_t))


cdef void forest_clear(forest_t* forest) noexcept nogil:
    """Forget all nodes, without visiting them; the trees stay as many as they are."""
    if forest.n_nodes != 0:
        memset(forest.roots, 0, <size_t>forest.n_roots * sizeof(uint32_t))
    forest.n_nodes = 0


cdef void forest_prefetch(const forest_t* forest, const uint32_t* digests, size_t n) noexcept nogil:
    """Searches for digests[0 ... n) come soon, one after the other: have memory bring what they begin with.

    Of the last the place of the root, of the one in the middle, whose root is known by then, the node."""
    cdef const rb_node* nodes = forest.one.nodes[0]
    cdef uint32_t root
    if n == 0 or forest.n_roots == 1:
        return
    __builtin_prefetch(&forest.roots[_tree_of(forest, digests[n - 1])])
    root = forest.roots[_tree_of(forest, digests[n // 2])]
    if root != NIL:
        __builtin_prefetch(&nodes[root])


cdef inline void _take(forest_t* forest, uint32_t tree) noexcept nogil:
    forest.one.root = forest.roots[tree]


cdef inline void _put(forest_t* forest, uint32_t tree) noexcept nogil:
    forest.roots[tree] = forest.one.root


cdef uint32_t forest_find(
    forest_t* forest, uint32_t digest, const uint8_t* page, rb_place* place
) noexcept nogil:
    """As rb_find. *place is valid until the forest changes."""
    _take(forest, _tree_of(forest, digest))
    return rb_find(&forest.one, digest, page, place)


cdef void forest_insert(forest_t* forest, uint32_t node, rb_place place) noexcept nogil:
    """As rb_insert; the node's digest is the one that `place` was found for."""
    cdef uint32_t tree = _tree_of(forest, forest.one.nodes[0][node].digest)
    _take(forest, tree)
    rb_insert(&forest.one, node, place)
    _put(forest, tree)
    forest.n_nodes += 1
    _grow(forest)


cdef void forest_insert_before(forest_t* forest, uint32_t node, uint32_t successor) noexcept nogil:
    """As rb_insert_before; both nodes have one digest."""
    cdef uint32_t tree = _tree_of(forest, forest.one.nodes[0][node].digest)
    _take(forest, tree)
    rb_insert_before(&forest.one, node, successor)
    _put(forest, tree)
    forest.n_nodes += 1
    _grow(forest)


cdef void forest_put(forest_t* forest, uint32_t node, const uint8_t* page) noexcept nogil:
    """Insert a node, whose digest is set, by its key; before those with an equal one, so that it is found first."""
    cdef rb_place place
    cdef uint32_t same = forest_find(forest, forest.one.nodes[0][node].digest, page, &place)
    if same != NIL:
        forest_insert_before(forest, node, same)
    else:
        forest_insert(forest, node, place)


cdef void forest_erase(forest_t* forest, uint32_t node) noexcept nogil:
    cdef uint32_t tree = _tree_of(forest, forest.one.nodes[0][node].digest)
    _take(forest, tree)
    rb_erase(&forest.one, node)
    _put(forest, tree)
    forest.n_nodes -= 1


cdef void _grow(forest_t* forest) noexcept nogil:
    """One tree more, if the load asks for it. Where no memory is to be had the trees grow instead."""
    if forest.one.by_content or forest.n_nodes <= <size_t>forest.n_roots * LOAD_NODES:
        return
    if not _make_room(forest, <size_t>forest.n_roots + 1):
        return
    if forest.n_roots == 2 * forest.base:
        forest.base *= 2
    forest.n_roots += 1
    forest.roots[forest.n_roots - 1] = NIL
    _split(forest, forest.n_roots - 1 - forest.base, forest.n_roots - 1)


cdef void _split(forest_t* forest, uint32_t old, uint32_t new) noexcept nogil:
    """Move the nodes that belong there from one tree to a new one. Taken in order and appended, so those
    with equal keys stay in their order."""
    cdef const rb_node* nodes = forest.one.nodes[0]
    cdef uint32_t node, following
    cdef rb_place place
    place.parent = NIL
    place.right = True
    _take(forest, old)
    node = rb_first(&forest.one)
    while node != NIL:
        _take(forest, old)
        following = rb_next(&forest.one, node)
        if _tree_of(forest, nodes[node].digest) == new:
            rb_erase(&forest.one, node)
            _put(forest, old)
            _take(forest, new)
            rb_insert(&forest.one, node, place)
            _put(forest, new)
            place.parent = node
        node = following


cdef uint32_t _first_from(forest_t* forest, uint32_t tree) noexcept nogil:
    while tree < forest.n_roots:
        if forest.roots[tree] != NIL:
            _take(forest, tree)
            return rb_first(&forest.one)
        tree += 1
    return NIL


cdef uint32_t forest_first(forest_t* forest) noexcept nogil:
    """A walk over all nodes, tree by tree: the first, or NIL; the one after `node`, or NIL."""
    return _first_from(forest, 0)


cdef uint32_t forest_next(forest_t* forest, uint32_t node) noexcept nogil:
    cdef uint32_t following = rb_next(&forest.one, node)
    if following != NIL:
        return following
    return _first_from(forest, _tree_of(forest, forest.one.nodes[0][node].digest) + 1)


cdef size_t forest_bytes(const forest_t* forest) noexcept nogil:
    """Bytes of metadata in use."""
    return <size_t>forest.n_roots * sizeof(uint32_t)


cdef int forest_check(forest_t* forest, bint check_order) noexcept nogil:
    """0, or the number of the first broken invariant. Visits every node."""
    cdef uint32_t tree, node, n_nodes = 0, n_before
    cdef int broken = 0
    for tree in range(forest.n_roots):
        _take(forest, tree)
        n_before = n_nodes
        node = rb_first(&forest.one) if forest.roots[tree] != NIL else NIL
        while node != NIL:
            if _tree_of(forest, forest.one.nodes[0][node].digest) != tree:
                return 7
            n_nodes += 1
            if n_nodes > forest.n_nodes:
                return 6
            node = rb_next(&forest.one, node)
        forest.one.n_nodes = n_nodes - n_before
        broken = rb_check(&forest.one, check_order)
        if broken:
            return broken
    return 6 if n_nodes != forest.n_nodes else 0
