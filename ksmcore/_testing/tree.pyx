"""The red-black trees as Python sees them: for tests and inspection.

A `Tree` owns its nodes and a copy of its pages.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport SIZE_MAX, uint8_t, uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from ksmcore._pages cimport jhash_page
from ksmcore._trees cimport (
    NIL, rb_check, rb_clear, rb_erase, rb_find, rb_first, rb_height, rb_init, rb_insert, rb_insert_before, rb_next,
    rb_node, rb_place, rb_tree,
)

# Pages added between two looks for signals, without the GIL: a few milliseconds.
cdef enum:
    SIGNAL_PAGES = 8192

_BROKEN = {
    1: "the root is red",
    2: "a red node has a red child",
    3: "two ways down differ in black nodes",
    4: "a parent link does not mirror a child link",
    5: "two nodes are out of order",
    6: "n_nodes is not the number of nodes",
}

# What page_of gets as its owner: slot i of `pages` is the page of node i.
ctypedef struct slots_t:
    uint8_t* pages
    size_t page_bytes


cdef const uint8_t* _page_of_slot(void* owner, uint32_t node) noexcept nogil:
    cdef slots_t* slots = <slots_t*>owner
    return slots.pages + node * slots.page_bytes


@cython.final
cdef class Tree:
    """One tree with its own node array and its own copies of the pages, for tests and inspection.

    Args:
        order: "digest" or "content".
        page_bytes: length of every page, positive.

    A node is named by its index. The index of an erased node is used again. Not for use by several threads at a time:
    a call from another thread while add_many runs raises RuntimeError.
    """

    cdef rb_tree tree
    cdef rb_node* nodes     # n_slots of them
    cdef slots_t slots      # n_slots pages
    cdef uint8_t* is_member  # n_slots flags: 1 for nodes in the tree
    cdef size_t n_slots     # allocated; slot 0 stays unused
    cdef size_t n_used      # slots from here on were never used
    cdef uint32_t free_head  # erased nodes, chained by `left`
    cdef bint busy          # add_many is running without the GIL

    def __cinit__(self, str order="digest", Py_ssize_t page_bytes=64):
        if order not in ("digest", "content"):
            raise ValueError(f"unknown order {order!r}; valid: 'digest', 'content'")
        if page_bytes <= 0:
            raise ValueError(f"page_bytes must be positive, not {page_bytes}")
        self.slots.page_bytes = <size_t>page_bytes
        self.n_used = 1
        self.free_head = NIL
        rb_init(&self.tree, &self.nodes, order == "content", <size_t>page_bytes, _page_of_slot, &self.slots)
        self._reserve(15)

    def __dealloc__(self):
        free(self.nodes)
        free(self.slots.pages)
        free(self.is_member)

    # -- slots --

    cdef int _reserve(self, size_t n_more) except -1:
        """Room for n_more nodes beyond n_used. The arrays may move; the tree finds them through their addresses."""
        cdef size_t n_wanted
        cdef void* moved
        if n_more <= self.n_slots - self.n_used and self.n_slots != 0:
            return 0
        if n_more > (<size_t>1 << 31) - self.n_used:
            raise MemoryError("a tree holds fewer than 2**31 nodes")
        n_wanted = min(max(self.n_used + n_more, 2 * self.n_slots), <size_t>1 << 31)
        if n_wanted > SIZE_MAX // max(self.slots.page_bytes, sizeof(rb_node)):
            raise MemoryError("the pages do not fit into the address space")
        # Each pointer is kept as soon as it is valid; n_slots counts what all three arrays have.
        moved = realloc(self.nodes, n_wanted * sizeof(rb_node))
        if moved == NULL:
            raise MemoryError(f"no memory for {n_wanted} nodes")
        self.nodes = <rb_node*>moved
        moved = realloc(self.slots.pages, n_wanted * self.slots.page_bytes)
        if moved == NULL:
            raise MemoryError(f"no memory for {n_wanted} pages of {self.slots.page_bytes} bytes")
        self.slots.pages = <uint8_t*>moved
        moved = realloc(self.is_member, n_wanted)
        if moved == NULL:
            raise MemoryError(f"no memory for {n_wanted} flags")
        self.is_member = <uint8_t*>moved
        memset(self.nodes + self.n_slots, 0, (n_wanted - self.n_slots) * sizeof(rb_node))
        memset(self.is_member + self.n_slots, 0, n_wanted - self.n_slots)
        self.n_slots = n_wanted
        return 0

    cdef uint32_t _take(self, const uint8_t* page, uint32_t digest) noexcept nogil:
        """A node that is in no tree, with a copy of the page. There is room."""
        cdef uint32_t node = self.free_head
        if node != NIL:
            self.free_head = self.nodes[node].left
        else:
            node = <uint32_t>self.n_used
            self.n_used += 1
        memcpy(self.slots.pages + node * self.slots.page_bytes, page, self.slots.page_bytes)
        self.nodes[node].digest = digest
        self.is_member[node] = 1
        return node

    cdef void _release(self, uint32_t node) noexcept nogil:
        rb_erase(&self.tree, node)
        self.is_member[node] = 0
        self.nodes[node].left = self.free_head
        self.free_head = node

    # -- arguments --

    cdef int _check_idle(self) except -1:
        if self.busy:
            raise RuntimeError("this tree is in use: add_many is running in another thread")
        return 0

    cdef uint32_t _member(self, index) except NIL:
        if not 0 < index < self.n_used or not self.is_member[<size_t>index]:
            raise KeyError(index)
        return <uint32_t>index

    cdef bytes _page(self, page):
        self._check_idle()
        cdef bytes content = bytes(memoryview(page))
        if <size_t>len(content) != self.slots.page_bytes:
            raise ValueError(f"a page has {self.slots.page_bytes} bytes, not {len(content)}")
        return content

    cdef uint32_t _digest(self, bytes page, digest) except? 0:
        if digest is None:
            return jhash_page(<const uint8_t*>page, self.slots.page_bytes, 17)
        if not 0 <= digest <= 0xffffffff:
            raise ValueError(f"a digest must be 0 to 2**32 - 1, not {digest}")
        return <uint32_t>digest

    # -- operations --

    def add(self, page, digest=None, *, bint allow_equal=False):
        """Adds a page and returns its index. KeyError when an equal key is there, unless allow_equal puts it before.

        digest: the checksum part of the key; without it jhash with initval 17. "content" order does not look at it.
        """
        cdef bytes content = self._page(page)
        cdef uint32_t node, found, key = self._digest(content, digest)
        cdef rb_place place
        found = rb_find(&self.tree, key, <const uint8_t*>content, &place)
        if found != NIL and not allow_equal:
            raise KeyError(f"node {found} has an equal key")
        self._reserve(1)
        node = self._take(<const uint8_t*>content, key)
        if found != NIL:
            rb_insert_before(&self.tree, node, found)
        else:
            rb_insert(&self.tree, node, place)
        return node

    cdef uint32_t _add_pages(self, const uint8_t* pages, size_t n_pages) noexcept nogil:
        cdef size_t i
        cdef uint32_t digest, n_added = 0
        cdef rb_place place
        for i in range(n_pages):
            digest = jhash_page(pages, self.slots.page_bytes, 17)
            if rb_find(&self.tree, digest, pages, &place) == NIL:
                rb_insert(&self.tree, self._take(pages, digest), place)
                n_added += 1
            pages += self.slots.page_bytes
        return n_added

    def add_many(self, buffer):
        """Adds every page of a contiguous buffer that has no equal in the tree; returns how many. Releases the GIL."""
        cdef Py_buffer view
        cdef size_t n_pages, n_now, at = 0, n_added = 0
        cdef const uint8_t* source
        self._check_idle()
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        except BufferError as error:
            raise ValueError(f"the buffer must be contiguous: {error}") from None
        try:
            n_pages = <size_t>view.len // self.slots.page_bytes
            if <size_t>view.len % self.slots.page_bytes != 0:
                raise ValueError(
                    f"the buffer's {view.len} bytes are not a whole number of pages of {self.slots.page_bytes} bytes")
            source = <const uint8_t*>view.buf
            self._reserve(n_pages)
            self.busy = True
            while at < n_pages:
                n_now = min(n_pages - at, <size_t>SIGNAL_PAGES)
                with nogil:
                    n_added += self._add_pages(source + at * self.slots.page_bytes, n_now)
                at += n_now
                PyErr_CheckSignals()
        finally:
            self.busy = False
            PyBuffer_Release(&view)
        return n_added

    def find(self, page, digest=None):
        """The index of the first node with this key, or None."""
        cdef bytes content = self._page(page)
        cdef uint32_t found = rb_find(&self.tree, self._digest(content, digest), <const uint8_t*>content, NULL)
        return None if found == NIL else found

    def erase(self, index):
        """Takes a node out; KeyError when it is not in the tree."""
        self._check_idle()
        self._release(self._member(index))

    def discard(self, page, digest=None):
        """Takes the first node with this key out; returns whether there was one."""
        found = self.find(page, digest)
        if found is None:
            return False
        self._release(<uint32_t>found)
        return True

    def set_page(self, index, page):
        """Rewrites the bytes of a node under the tree, as a writer does to an unstable one. The digest stays."""
        cdef bytes content = self._page(page)
        cdef uint32_t node = self._member(index)
        memcpy(self.slots.pages + node * self.slots.page_bytes, <const uint8_t*>content, self.slots.page_bytes)

    def clear(self):
        """Forgets all nodes."""
        self._check_idle()
        rb_clear(&self.tree)
        memset(self.is_member, 0, self.n_slots)
        self.n_used = 1
        self.free_head = NIL

    # -- inspection --

    def __len__(self):
        return self.tree.n_nodes

    def page(self, index):
        """The bytes that a node has now; KeyError when it is not in the tree."""
        self._check_idle()
        cdef uint32_t node = self._member(index)
        return (<const char*>_page_of_slot(&self.slots, node))[:self.slots.page_bytes]

    def nodes_in_order(self):
        """The indices of all nodes, in order."""
        self._check_idle()
        cdef list result = []
        cdef uint32_t node = rb_first(&self.tree)
        while node != NIL:
            result.append(node)
            node = rb_next(&self.tree, node)
        return result

    def pages_in_order(self):
        """The pages of all nodes, in order."""
        return [self.page(node) for node in self.nodes_in_order()]

    def height(self):
        """Nodes on the longest way down from the root."""
        self._check_idle()
        return rb_height(&self.tree)

    def check(self, bint order=True):
        """RuntimeError with the number of a broken invariant; order=False leaves out number 5."""
        self._check_idle()
        cdef int broken = rb_check(&self.tree, order)
        if broken:
            raise RuntimeError(f"tree invariant {broken} is broken: {_BROKEN[broken]}")

    def _links(self, index):
        """(parent, is black, left, right) of a node, with 0 for NIL."""
        cdef uint32_t node = self._member(index)
        cdef rb_node* links = self.nodes + node
        return links.parent_colour >> 1, bool(links.parent_colour & 1), links.left, links.right

    def _break(self, index, *, parent=None, black=None, left=None, right=None, n_nodes=None):
        """Damages a node's links, so that check can be tested. Afterwards nothing but check and clear is safe."""
        cdef uint32_t node = self._member(index)
        for link in (parent, left, right):
            if link is not None and not 0 <= link < self.n_used:
                raise ValueError(f"{link} is no slot of this tree")
        if parent is not None:
            self.nodes[node].parent_colour = parent << 1 | self.nodes[node].parent_colour & 1
        if black is not None:
            self.nodes[node].parent_colour = self.nodes[node].parent_colour & ~<uint32_t>1 | <bint>bool(black)
        if left is not None:
            self.nodes[node].left = left
        if right is not None:
            self.nodes[node].right = right
        if n_nodes is not None:
            self.tree.n_nodes = n_nodes

    @property
    def order(self):
        return "content" if self.tree.by_content else "digest"

    @property
    def page_bytes(self):
        return self.slots.page_bytes

    @property
    def n_compares(self):
        """Full compares of bytes made by searches so far."""
        return self.tree.n_compares

    @property
    def n_steps(self):
        """Nodes visited by searches so far."""
        return self.tree.n_steps
