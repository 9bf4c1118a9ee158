# cython: language_level=3
"""Red-black trees over nodes held in the caller's array: the stable and the unstable tree are two of them.

This module owns the shape of the trees and nothing else: the caller owns the array, the pages and the locks. The
C functions are in _trees.pxd; `ksmcore._testing.tree` shows them to Python.

The key of a node is (digest, bytes of its page). In "digest" order different digests decide by themselves, and bytes
are compared only where digests are equal, by a search that has bytes to compare; in "content" order the digest part of
every key is taken as zero. Nodes with equal keys are possible, by rb_insert_before alone, and stand newest first.

Invariants, each checked by rb_check under its number:

  1  The root is black.
  2  A red node has no red child.
  3  Every way from the root down to a NIL passes the same number of black nodes.
  4  A child's parent link names the node whose child link names it; the root's names NIL; no node is the child twice.
  5  In order, keys never decrease.
  6  n_nodes is the number of nodes that can be reached from the root.

1 to 3 bound the height by 2 * log2(n_nodes + 1): by 3 the tree down to the depth of its black nodes is complete, and by
2 at most every second node of a way is red.

Pages of the unstable tree may change while their nodes are in it, so 5 does not always hold there. Everything else
does, because inserting and erasing decide by colours and links, never by bytes. A search follows child links
downwards, so it ends after at most height steps and visits nodes of this tree only, whatever the pages say; with 5
broken it may miss a key, but what it returns has compared equal (by digest, or by bytes if it was given any).

In the drawings of the rebalancing a capital letter is a black node, a small one is red, and each has a mirror image
that the same code handles: `side` is the side of the node in question, and `not side` the other one.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from ksmcore._pages cimport page_compare


# ---- links and colours ----

cdef enum:
    LEFT = 0
    RIGHT = 1


cdef inline uint32_t _parent(const rb_node* nodes, uint32_t node) noexcept nogil:
    return nodes[node].parent_colour >> 1


cdef inline bint _is_red(const rb_node* nodes, uint32_t node) noexcept nogil:
    # NIL counts as black; node 0 of the array is not read for it.
    return node != NIL and not nodes[node].parent_colour & 1


cdef inline void _set_parent(rb_node* nodes, uint32_t node, uint32_t parent) noexcept nogil:
    nodes[node].parent_colour = parent << 1 | nodes[node].parent_colour & 1


cdef inline void _set_red(rb_node* nodes, uint32_t node) noexcept nogil:
    nodes[node].parent_colour &= ~<uint32_t>1


cdef inline void _set_black(rb_node* nodes, uint32_t node) noexcept nogil:
    nodes[node].parent_colour |= 1


cdef inline uint32_t _child(const rb_node* nodes, uint32_t node, bint side) noexcept nogil:
    return nodes[node].right if side else nodes[node].left


cdef inline void _set_child(rb_node* nodes, uint32_t node, bint side, uint32_t child) noexcept nogil:
    if side:
        nodes[node].right = child
    else:
        nodes[node].left = child


cdef inline void _replace_child(rb_tree* tree, rb_node* nodes, uint32_t parent, uint32_t old,
                                uint32_t new) noexcept nogil:
    # Makes the link that names `old` name `new`. The parent link of `new` is the caller's task.
    if parent == NIL:
        tree.root = new
    else:
        _set_child(nodes, parent, nodes[parent].right == old, new)


cdef void _rotate(rb_tree* tree, rb_node* nodes, uint32_t top, bint side) noexcept nogil:
    # Turns `top` down to `side`; its other child comes up. Colours stay with their nodes. Keeps 4 and 5.
    #
    #    side = LEFT:     top               up
    #                    /   \             /  \
    #                   1     up   ->   top    3
    #                        /  \      /   \
    #                       2    3    1     2
    cdef uint32_t parent = _parent(nodes, top)
    cdef uint32_t up = _child(nodes, top, not side)
    cdef uint32_t inner = _child(nodes, up, side)
    _set_child(nodes, top, not side, inner)
    if inner != NIL:
        _set_parent(nodes, inner, top)
    _replace_child(tree, nodes, parent, top, up)
    _set_parent(nodes, up, parent)
    _set_child(nodes, up, side, top)
    _set_parent(nodes, top, up)


# ---- create, forget, walk ----

cdef void rb_init(rb_tree* tree, rb_node** nodes, bint by_content, size_t page_bytes, page_of_t page_of,
                  void* owner) noexcept nogil:
    memset(tree, 0, sizeof(rb_tree))
    tree.nodes = nodes
    tree.root = NIL
    tree.by_content = by_content
    tree.page_bytes = page_bytes
    tree.page_of = page_of
    tree.owner = owner


cdef void rb_clear(rb_tree* tree) noexcept nogil:
    tree.root = NIL
    tree.n_nodes = 0


cdef inline uint32_t _last_of_side(const rb_node* nodes, uint32_t node, bint side) noexcept nogil:
    while _child(nodes, node, side) != NIL:
        node = _child(nodes, node, side)
    return node


cdef uint32_t rb_first(rb_tree* tree) noexcept nogil:
    return NIL if tree.root == NIL else _last_of_side(tree.nodes[0], tree.root, LEFT)


cdef uint32_t rb_next(rb_tree* tree, uint32_t node) noexcept nogil:
    cdef const rb_node* nodes = tree.nodes[0]
    cdef uint32_t parent
    if nodes[node].right != NIL:
        return _last_of_side(nodes, nodes[node].right, LEFT)
    # Up, until a link is climbed that is a left one.
    parent = _parent(nodes, node)
    while parent != NIL and nodes[parent].right == node:
        node = parent
        parent = _parent(nodes, node)
    return parent


# ---- search ----

cdef uint32_t rb_find(rb_tree* tree, uint32_t digest, const uint8_t* page, rb_place* place) noexcept nogil:
    cdef const rb_node* nodes = tree.nodes[0]
    cdef uint32_t at = tree.root, parent = NIL, found = NIL
    cdef bint right = False
    cdef uint64_t n_compares = tree.n_compares
    cdef const uint8_t* other
    cdef int order
    # By 5, every node before the key lies left of the way down and every node after it right of it. An equal node is
    # remembered, and the search goes on to its left, where an earlier equal one may stand. In digest order this costs
    # integer compares only, except for nodes of the same digest.
    while at != NIL:
        tree.n_steps += 1
        if not tree.by_content and digest != nodes[at].digest:
            right = digest > nodes[at].digest
        else:
            order = 0
            if page != NULL:
                tree.n_compares += 1
                other = tree.page_of(tree.owner, at)
                order = page_compare(page, other, tree.page_bytes) if page != other else 0
            right = order > 0
            if order == 0:
                found = at
        parent = at
        at = _child(nodes, at, right)
    if found == NIL and place != NULL:
        place.parent = parent
        place.right = right
        place.alone = n_compares == tree.n_compares
    return found


# ---- insert ----

cdef void _rebalance_inserted(rb_tree* tree, rb_node* nodes, uint32_t node) noexcept nogil:
    # Restores 1 and 2 after a red `node` was linked; 3 holds throughout.
    # Loop invariant: node is red, and 2 may be broken only between node and its parent, 1 only at node.
    cdef uint32_t parent, grand, uncle
    cdef bint side
    while True:
        parent = _parent(nodes, node)
        if parent == NIL:
            # Root: black adds one to every way alike, so 3 holds. Restores 1.
            _set_black(nodes, node)
            return
        if not _is_red(nodes, parent):
            return
        # By 1 a red parent is not the root, and by 2 the grandparent is black.
        grand = _parent(nodes, parent)
        side = nodes[grand].right == parent
        uncle = _child(nodes, grand, not side)

        if _is_red(nodes, uncle):
            # The uncle is red: the grandparent's black moves down to both. Every way keeps its count (3); 2 may now be
            # broken between the grandparent and its own parent.
            #
            #       G            g
            #      / \          / \
            #     p   u   ->   P   U
            #    /            /
            #   n            n
            _set_black(nodes, parent)
            _set_black(nodes, uncle)
            _set_red(nodes, grand)
            node = grand
            continue

        if _child(nodes, parent, not side) == node:
            # The uncle is black, node is the inner grandchild: a rotation makes it the outer one. Red nodes only are
            # moved (3), and 2 stays broken between the same two.
            #
            #     G            G
            #    / \          / \
            #   p   U   ->   n   U
            #    \          /
            #     n        p
            _rotate(tree, nodes, parent, side)
            parent = node

        # The uncle is black, the red pair is on the outside: the parent comes up, black, and the grandparent goes down,
        # red. Restores 2; ways through U, and through the outer node, still pass one black node here (3).
        #
        #       G            P
        #      / \          / \
        #     p   U   ->   n   g
        #    /                  \
        #   n                    U
        _rotate(tree, nodes, grand, not side)
        _set_black(nodes, parent)
        _set_red(nodes, grand)
        return


cdef void rb_insert(rb_tree* tree, uint32_t node, rb_place place) noexcept nogil:
    cdef rb_node* nodes = tree.nodes[0]
    # A red leaf adds no black node to any way: 3 holds from the start.
    nodes[node].parent_colour = place.parent << 1
    nodes[node].left = NIL
    nodes[node].right = NIL
    if place.parent == NIL:
        tree.root = node
    else:
        _set_child(nodes, place.parent, place.right, node)
    tree.n_nodes += 1
    _rebalance_inserted(tree, nodes, node)


cdef void rb_insert_before(rb_tree* tree, uint32_t node, uint32_t successor) noexcept nogil:
    cdef const rb_node* nodes = tree.nodes[0]
    cdef rb_place place
    # The free place immediately before a node: its own left one, or the last one in its left subtree.
    if nodes[successor].left == NIL:
        place.parent = successor
        place.right = False
    else:
        place.parent = _last_of_side(nodes, nodes[successor].left, RIGHT)
        place.right = True
    rb_insert(tree, node, place)


# ---- erase ----

cdef void _rebalance_erased(rb_tree* tree, rb_node* nodes, uint32_t parent, bint side) noexcept nogil:
    # Restores 3 after a black leaf was unlinked from `side` of `parent`.
    # Loop invariant: ways through `side` of parent (N below: black, possibly NIL) pass one black node less than all
    # others; apart from that 3 holds, and 1, 2 and 4 hold.
    cdef uint32_t sibling, near, far, node
    while parent != NIL:
        # By 3 the other side has a black node to spare, so the sibling is never NIL.
        sibling = _child(nodes, parent, not side)

        if _is_red(nodes, sibling):
            # A red sibling: parent and nephews are black (2). Rotated up, it leaves a black nephew as the new sibling,
            # and a red parent, so that the cases below end the work. Counts of all ways stay.
            #
            #     P               S
            #    / \             / \
            #   N   s     ->    p   D
            #      / \         / \
            #     C   D       N   C
            _rotate(tree, nodes, parent, side)
            _set_black(nodes, sibling)
            _set_red(nodes, parent)
            sibling = _child(nodes, parent, not side)

        near = _child(nodes, sibling, side)
        far = _child(nodes, sibling, not side)

        if not _is_red(nodes, near) and not _is_red(nodes, far):
            # A black sibling with black children turns red: both sides of the parent now lack one. A red parent makes
            # up for it by turning black (2 and 3 restored); under a black one the lack moves up.
            #
            #     p               P                  P               P  <- lacks one
            #    / \             / \                / \             / \
            #   N   S     ->    N   s       or     N   S     ->    N   s
            #      / \             / \                / \             / \
            #     C   D           C   D              C   D           C   D
            _set_red(nodes, sibling)
            if _is_red(nodes, parent):
                _set_black(nodes, parent)
                return
            node = parent
            parent = _parent(nodes, node)
            if parent != NIL:
                side = nodes[parent].right == node
            continue

        if not _is_red(nodes, far):
            # Only the near nephew is red: it becomes the sibling, with a red node behind it. Counts of all ways stay.
            # P may have either colour.
            #
            #     P               P
            #    / \             / \
            #   N   S     ->    N   C
            #      / \               \
            #     c   D               s
            #                          \
            #                           D
            _rotate(tree, nodes, sibling, not side)
            _set_black(nodes, near)
            _set_red(nodes, sibling)
            far = sibling
            sibling = near

        # The far nephew is red: the sibling comes up with the parent's colour, and the parent goes down, black, to the
        # side that lacks one; the far nephew turns black in place of the sibling. Restores 3. P may have either colour
        # and S gets it; C may have either and keeps it.
        #
        #     P               S
        #    / \             / \
        #   N   S     ->    P   D
        #      / \         / \
        #     C   d       N   C
        _rotate(tree, nodes, parent, side)
        if _is_red(nodes, parent):
            _set_red(nodes, sibling)
        else:
            _set_black(nodes, sibling)
        _set_black(nodes, parent)
        _set_black(nodes, far)
        return
    # The lack has reached the root: every way passes one black node less, which is 3 again.


cdef void rb_erase(rb_tree* tree, uint32_t node) noexcept nogil:
    cdef rb_node* nodes = tree.nodes[0]
    cdef uint32_t parent, child, heir
    cdef bint side, was_red
    if nodes[node].left != NIL and nodes[node].right != NIL:
        # Two children: the next node in order, which has no left child, is taken out of its place instead, and then
        # takes over node's place, links and colour. Indices are identities, so nodes are relinked, never copied.
        heir = _last_of_side(nodes, nodes[node].right, LEFT)
        was_red = _is_red(nodes, heir)
        child = nodes[heir].right
        parent = _parent(nodes, heir)
        if parent == node:
            parent = heir  # the heir keeps its right subtree and moves up with it
            side = RIGHT
        else:
            side = LEFT
            nodes[parent].left = child
            if child != NIL:
                _set_parent(nodes, child, parent)
            nodes[heir].right = nodes[node].right
            _set_parent(nodes, nodes[heir].right, heir)
        nodes[heir].left = nodes[node].left
        _set_parent(nodes, nodes[heir].left, heir)
        _replace_child(tree, nodes, _parent(nodes, node), node, heir)
        nodes[heir].parent_colour = nodes[node].parent_colour
    else:
        was_red = _is_red(nodes, node)
        child = nodes[node].left if nodes[node].left != NIL else nodes[node].right
        parent = _parent(nodes, node)
        side = parent != NIL and nodes[parent].right == node
        _replace_child(tree, nodes, parent, node, child)
        if child != NIL:
            _set_parent(nodes, child, parent)
    nodes[node].parent_colour = 0
    nodes[node].left = NIL
    nodes[node].right = NIL
    tree.n_nodes -= 1
    # What left its place had at most one child. With one child, by 3 that child was a red leaf (and, by 2, its parent
    # black): turned black it stands in for what left. Without, a red leaf takes no black node along.
    if child != NIL:
        _set_black(nodes, child)
    elif not was_red:
        _rebalance_erased(tree, nodes, parent, side)


# ---- measure and check: walks with parent links, so that no stack is needed ----

cdef uint32_t rb_height(rb_tree* tree) noexcept nogil:
    cdef const rb_node* nodes = tree.nodes[0]
    cdef uint32_t at = tree.root, came_from = NIL, depth = 1, height = 0, following
    if at == NIL:
        return 0
    # depth is that of `at`; came_from is the node of the step before, a child or the parent of `at`.
    while at != NIL:
        if depth > height:
            height = depth
        following = _parent(nodes, at)
        if came_from == following:
            if nodes[at].left != NIL:
                following = nodes[at].left
            elif nodes[at].right != NIL:
                following = nodes[at].right
        elif came_from == nodes[at].left and nodes[at].right != NIL:
            following = nodes[at].right
        depth = depth - 1 if following == _parent(nodes, at) else depth + 1
        came_from = at
        at = following
    return height


cdef bint _in_order(rb_tree* tree, uint32_t earlier, uint32_t later) noexcept nogil:
    cdef const rb_node* nodes = tree.nodes[0]
    if not tree.by_content and nodes[earlier].digest != nodes[later].digest:
        return nodes[earlier].digest < nodes[later].digest
    return page_compare(tree.page_of(tree.owner, earlier), tree.page_of(tree.owner, later), tree.page_bytes) <= 0


cdef int rb_check(rb_tree* tree, bint check_order) noexcept nogil:
    cdef const rb_node* nodes = tree.nodes[0]
    cdef uint32_t at = tree.root, previous = NIL, child, n_seen = 0
    cdef uint32_t n_black = 0  # black nodes from the root to `at`, both included
    cdef uint32_t n_expected = 0  # n_black at the first NIL, which all others must have; 0: no NIL met yet
    cdef int side
    if at == NIL:
        return 6 if tree.n_nodes != 0 else 0
    if _parent(nodes, at) != NIL:
        return 4
    if _is_red(nodes, at):
        return 1
    # Going down follows checked links only, and n_seen is bounded, so that a broken tree cannot catch the walk.
    while True:
        # Down to the left from a node not seen before.
        while True:
            n_seen += 1
            if n_seen > tree.n_nodes:
                return 6
            n_black += not _is_red(nodes, at)
            if nodes[at].left == nodes[at].right and nodes[at].left != NIL:
                return 4
            for side in range(2):
                child = _child(nodes, at, side)
                if child == NIL:
                    if n_expected == 0:
                        n_expected = n_black
                    elif n_black != n_expected:
                        return 3
                elif _parent(nodes, child) != at:
                    return 4
                elif _is_red(nodes, at) and _is_red(nodes, child):
                    return 2
            if nodes[at].left == NIL:
                break
            at = nodes[at].left
        # `at` is the next one in order; so are the nodes above it while they have no right subtree to enter first.
        while True:
            if check_order and previous != NIL and not _in_order(tree, previous, at):
                return 5
            previous = at
            if nodes[at].right != NIL:
                at = nodes[at].right
                break
            while True:
                n_black -= not _is_red(nodes, at)
                child = at
                at = _parent(nodes, at)
                if at == NIL:
                    return 6 if n_seen != tree.n_nodes else 0
                if nodes[at].left == child:
                    break
