"""_trees driven by hypothesis: after any operations a tree equals a sorted list."""

import bisect
import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ksmcore._testing.tree import Tree

PAGE_BYTES = 8

# Few distinct values, so that equal keys, equal digests and hits are common.
contents = st.integers(0, 30).map(lambda number: number.to_bytes(PAGE_BYTES, "big"))
digests = st.integers(0, 4)


class TreeMachine(RuleBasedStateMachine):
    @initialize(order=st.sampled_from(["digest", "content"]))
    def create(self, order):
        self.tree = Tree(order, PAGE_BYTES)
        self.keys = []  # sorted
        self.nodes = []  # the index of the node for each key

    def position(self, content, digest):
        key = (digest if self.tree.order == "digest" else 0, content)
        at = bisect.bisect_left(self.keys, key)
        return key, at, at < len(self.keys) and self.keys[at] == key

    def remove(self, at):
        del self.keys[at]
        del self.nodes[at]

    @rule(content=contents, digest=digests, allow_equal=st.booleans())
    def add(self, content, digest, allow_equal):
        key, at, known = self.position(content, digest)
        if known and not allow_equal:
            with pytest.raises(KeyError):
                self.tree.add(content, digest)
            return
        self.keys.insert(at, key)
        self.nodes.insert(at, self.tree.add(content, digest, allow_equal=allow_equal))

    @rule(content=contents, digest=digests)
    def find(self, content, digest):
        _, at, known = self.position(content, digest)
        assert self.tree.find(content, digest) == (self.nodes[at] if known else None)

    @rule(content=contents, digest=digests)
    def discard(self, content, digest):
        _, at, known = self.position(content, digest)
        assert self.tree.discard(content, digest) == known
        if known:
            self.remove(at)

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def erase(self, data):
        at = data.draw(st.integers(0, len(self.keys) - 1))
        self.tree.erase(self.nodes[at])
        self.remove(at)

    @rule()
    def clear(self):
        self.tree.clear()
        self.keys.clear()
        self.nodes.clear()

    @invariant()
    def equals_the_list(self):
        self.tree.check()
        assert len(self.tree) == len(self.keys)
        assert self.tree.nodes_in_order() == self.nodes
        assert self.tree.pages_in_order() == [content for _, content in self.keys]
        assert self.tree.height() <= 2 * math.log2(len(self.keys) + 1)


class UnstableTreeMachine(RuleBasedStateMachine):
    """Pages may be rewritten in place, so order is lost; shape and truthful answers must not be."""

    @initialize(order=st.sampled_from(["digest", "content"]))
    def create(self, order):
        self.tree = Tree(order, PAGE_BYTES)
        self.members = {}

    @rule(content=contents, digest=digests)
    def add(self, content, digest):
        self.members[self.tree.add(content, digest, allow_equal=True)] = content

    @precondition(lambda self: self.members)
    @rule(data=st.data(), content=contents)
    def rewrite(self, data, content):
        node = data.draw(st.sampled_from(sorted(self.members)))
        self.tree.set_page(node, content)
        self.members[node] = content

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def erase(self, data):
        node = data.draw(st.sampled_from(sorted(self.members)))
        self.tree.erase(node)
        del self.members[node]

    @rule(content=contents, digest=digests)
    def find(self, content, digest):
        found = self.tree.find(content, digest)
        assert found is None or self.members[found] == content

    @invariant()
    def keeps_its_shape(self):
        self.tree.check(order=False)
        assert set(self.tree.nodes_in_order()) == set(self.members)
        assert self.tree.height() <= 2 * math.log2(len(self.members) + 1)


def limited(machine):
    case = machine.TestCase
    case.settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
    )
    return case


TestTree = limited(TreeMachine)
TestUnstableTree = limited(UnstableTreeMachine)
