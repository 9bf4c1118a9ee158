"""What other Cython modules may call in _trees: red-black trees over nodes held in the caller's array.

A node is named by its 32-bit index in that array. Nothing here allocates, and nothing needs the GIL. The caller keeps
two threads from using one tree at the same time (rb_find counts its work in the tree, so this includes searches).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    NIL = 0  # node 0 is never used; zeroed memory is full of NIL

ctypedef struct rb_node:  # 16 bytes; the caller owns the array, it may move between calls
    uint32_t parent_colour  # parent's index << 1 | (1 when black, 0 when red) in a tree, else 0. Indices < 2**31
    uint32_t left           # index of the left child or NIL; valid while in a tree
    uint32_t right          # index of the right child or NIL; valid while in a tree
    uint32_t digest         # checksum part of the key; set by the caller before rb_find's place is used, then fixed

# The page_bytes bytes of a node's page at this moment. Called only for nodes of the tree, and only during rb_find
# and rb_check; pointers must stay valid until that function returns (rb_check holds two) and are not kept.
ctypedef const uint8_t* (*page_of_t)(void* owner, uint32_t node) noexcept nogil

ctypedef struct rb_tree:
    rb_node** nodes      # the caller's array pointer, by address, so that growth needs no visit here
    uint32_t root        # index of the root or NIL
    uint32_t n_nodes     # nodes in the tree
    bint by_content      # "content" order: the digest part of every key is taken as zero
    size_t page_bytes    # length of every page
    page_of_t page_of
    void* owner          # first argument of page_of, otherwise unused
    uint64_t n_compares  # full byte compares made by searches, since rb_init
    uint64_t n_steps     # nodes visited by searches, since rb_init

ctypedef struct rb_place:  # where a missing key belongs; valid until the tree changes
    uint32_t parent        # NIL: the tree is empty
    bint right             # right child of parent, otherwise left
    bint alone             # in digest order: no node has this digest

# Is this node in a tree? For nodes of zeroed memory, and of trees that are never cleared: a red node has a parent, and
# a black one its bit.
cdef inline bint rb_is_in(const rb_node* nodes, uint32_t node) noexcept nogil:
    return nodes[node].parent_colour != 0

# An empty tree. Reads nothing of the array, so *nodes may still be NULL.
cdef void rb_init(rb_tree* tree, rb_node** nodes, bint by_content, size_t page_bytes, page_of_t page_of,
                  void* owner) noexcept nogil

# The first node in order with this key, or NIL and then *place (which may be NULL) says where the key belongs.
# page NULL, in digest order: the first with this digest.
cdef uint32_t rb_find(rb_tree* tree, uint32_t digest, const uint8_t* page, rb_place* place) noexcept nogil

# Links a node that is in no tree at a place that rb_find has just filled for its key.
cdef void rb_insert(rb_tree* tree, uint32_t node, rb_place place) noexcept nogil

# Links a node that is in no tree immediately before `successor`. The only way to equal keys: newest first.
cdef void rb_insert_before(rb_tree* tree, uint32_t node, uint32_t successor) noexcept nogil

# Unlinks a node that is in this tree; its links become NIL, its digest stays.
cdef void rb_erase(rb_tree* tree, uint32_t node) noexcept nogil

# Forgets all nodes at once, O(1). Their links stay stale until they are inserted again; counters stay.
cdef void rb_clear(rb_tree* tree) noexcept nogil

# In-order walk: the first node or NIL; the node after `node` or NIL.
cdef uint32_t rb_first(rb_tree* tree) noexcept nogil
cdef uint32_t rb_next(rb_tree* tree, uint32_t node) noexcept nogil

# Nodes on the longest path from the root down; 0 for an empty tree. Visits every node.
cdef uint32_t rb_height(rb_tree* tree) noexcept nogil

# 0, or the number of the first broken invariant (the list opens _trees.pyx). Visits every node.
cdef int rb_check(rb_tree* tree, bint check_order) noexcept nogil
