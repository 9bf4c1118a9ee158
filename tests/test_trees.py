"""_trees against a sorted list, with equal keys, changing pages, a million nodes; the checker."""

import bisect
import math
import random
import threading
from itertools import permutations

import pytest

from ksmcore import _pages
from ksmcore._testing.tree import Tree

PAGE_BYTES = 64
ORDERS = ["digest", "content"]


def page(number):
    return number.to_bytes(PAGE_BYTES, "big")


class Model:
    """A tree as a sorted list of (key, index); what the tree must agree with."""

    def __init__(self, order):
        self.order = order
        self.entries = []

    def key(self, content, digest=None):
        if self.order == "content":
            return (0, content)
        return (_pages.jhash(content, 17) if digest is None else digest, content)

    def position(self, content, digest=None):
        return bisect.bisect_left(self.entries, (self.key(content, digest), -1, 0))

    def find(self, content, digest=None):
        at = self.position(content, digest)
        if at < len(self.entries) and self.entries[at][0] == self.key(content, digest):
            return self.entries[at][2]
        return None


def height_bound(n_nodes):
    return 2 * math.log2(n_nodes + 1)


def check_against(tree, model):
    tree.check()
    assert len(tree) == len(model.entries)
    assert tree.nodes_in_order() == [entry[2] for entry in model.entries]
    assert tree.pages_in_order() == [entry[0][1] for entry in model.entries]
    assert tree.height() <= height_bound(len(tree))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_pages", [4, 40, 400])
@pytest.mark.parametrize("few_digests", [False, True])
def test_random_operations_against_sorted_list(order, n_pages, few_digests):
    rng = random.Random(n_pages)
    tree, model = Tree(order, PAGE_BYTES), Model(order)
    for _ in range(1500):
        content = page(rng.randrange(n_pages))
        digest = content[-1] % 3 if few_digests else None
        known = model.find(content, digest)
        assert tree.find(content, digest) == known
        operation = rng.choice(["add", "add", "discard", "erase"])
        if operation == "add" and known is None:
            at = model.position(content, digest)
            model.entries.insert(at, (model.key(content, digest), 0, tree.add(content, digest)))
        elif operation == "add":
            with pytest.raises(KeyError):
                tree.add(content, digest)
        elif operation == "discard":
            assert tree.discard(content, digest) == (known is not None)
            if known is not None:
                del model.entries[model.position(content, digest)]
        elif model.entries:
            tree.erase(model.entries.pop(rng.randrange(len(model.entries)))[2])
        check_against(tree, model)


@pytest.mark.parametrize("order", ORDERS)
def test_every_insertion_order_and_every_erasure_of_small_trees(order):
    """All insertion orders of up to six nodes, erased from the last one back."""
    for n in range(1, 7):
        for sequence in permutations(range(n)):
            tree = Tree(order, PAGE_BYTES)
            nodes = {}
            for number in sequence:
                nodes[number] = tree.add(page(number), number)
                tree.check()
            assert tree.pages_in_order() == [page(number) for number in range(n)]
            for number in reversed(sequence):
                tree.erase(nodes.pop(number))
                tree.check()
                assert tree.pages_in_order() == [page(left) for left in sorted(nodes)]


@pytest.mark.parametrize("descending", [False, True])
def test_sorted_input_stays_balanced(descending):
    tree = Tree("content", PAGE_BYTES)
    for i in range(5000):
        tree.add(page(5000 - i if descending else i))
    tree.check()
    assert tree.height() <= height_bound(5000)
    for node in tree.nodes_in_order():
        tree.erase(node)
    tree.check()
    assert len(tree) == tree.height() == 0


def test_digest_order_compares_bytes_only_on_equal_digests():
    tree = Tree("digest", PAGE_BYTES)
    for i in range(1000):
        tree.add(page(i), digest=i)
    assert tree.n_compares == 0
    steps = tree.n_steps
    assert tree.find(page(500), 500) is not None
    assert tree.n_compares == 1
    assert tree.n_steps - steps <= height_bound(1000)
    assert tree.find(page(500), 501) is None  # equal bytes, another digest: another key
    assert tree.n_compares == 2  # with the bytes of the node that has digest 501


def test_content_order_does_not_look_at_digests():
    tree = Tree("content", PAGE_BYTES)
    nodes = [tree.add(page(i), digest=1000 - i) for i in range(100)]
    assert tree.nodes_in_order() == nodes
    assert tree.find(page(7), digest=0) == nodes[7]


def test_pages_of_one_digest_are_all_kept():
    tree = Tree("digest", PAGE_BYTES)
    nodes = [tree.add(page(i), digest=9) for i in range(100)]
    assert tree.nodes_in_order() == nodes
    for i in range(100):
        assert tree.find(page(i), 9) == nodes[i]


@pytest.mark.parametrize("order", ORDERS)
def test_equal_keys_stand_newest_first(order):
    rng = random.Random(11)
    tree = Tree(order, PAGE_BYTES)
    newest_first = {i: [] for i in range(20)}
    for _ in range(3000):
        number = rng.randrange(20)
        mine = newest_first[number]
        if mine and rng.random() < 0.4:
            tree.erase(mine.pop(rng.randrange(len(mine))))
        elif mine and rng.random() < 0.2:
            assert tree.discard(page(number), number)
            mine.pop(0)
        else:
            mine.insert(0, tree.add(page(number), number, allow_equal=True))
        assert tree.find(page(number), number) == (mine[0] if mine else None)
        tree.check()
    expected = [node for number in range(20) for node in newest_first[number]]
    assert tree.nodes_in_order() == expected


def test_erasing_what_is_absent():
    tree = Tree(page_bytes=PAGE_BYTES)
    assert not tree.discard(page(1))
    node = tree.add(page(1))
    tree.erase(node)
    for index in (node, 0, -1, 14, 15, 16, 1 << 40):
        with pytest.raises(KeyError):
            tree.erase(index)
    for _ in range(100):
        assert not tree.discard(page(1))
    tree.check()
    assert tree.find(page(1)) is None


def test_clear_forgets_everything():
    tree = Tree(page_bytes=PAGE_BYTES)
    nodes = [tree.add(page(i)) for i in range(100)]
    tree.clear()
    tree.check()
    assert (len(tree), tree.height(), tree.nodes_in_order()) == (0, 0, [])
    with pytest.raises(KeyError):
        tree.erase(nodes[0])
    for i in range(200):
        tree.add(page(i))
    tree.check()
    assert len(tree) == 200


def test_add_many_leaves_equal_pages_out():
    data = b"".join(page(i % 700) for i in range(20000))
    tree = Tree(page_bytes=PAGE_BYTES)
    tree.add(page(5))
    assert tree.add_many(data) == 699
    assert tree.add_many(data) == 0
    assert tree.add_many(b"") == 0
    tree.check()
    assert sorted(tree.pages_in_order()) == [page(i) for i in range(700)]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="'digest', 'content'"):
        Tree("size")
    for page_bytes in (0, -1):
        with pytest.raises(ValueError, match="positive"):
            Tree(page_bytes=page_bytes)
    tree = Tree(page_bytes=PAGE_BYTES)
    with pytest.raises(ValueError, match="64 bytes"):
        tree.add(b"short")
    with pytest.raises(TypeError):
        tree.add("text")
    for digest in (-1, 1 << 32):
        with pytest.raises(ValueError, match="digest"):
            tree.add(page(1), digest)
    with pytest.raises(ValueError, match="whole number"):
        tree.add_many(bytes(PAGE_BYTES + 1))
    with pytest.raises(ValueError, match="contiguous"):
        tree.add_many(memoryview(bytes(256))[::2])
    with pytest.raises(KeyError):
        tree.set_page(1, page(1))
    with pytest.raises(KeyError):
        tree.page(1)
    tree.check()


def test_other_threads_are_kept_out_of_add_many():
    """Calls from another thread either work or are refused, and the tree stays whole."""
    tree = Tree(page_bytes=PAGE_BYTES)
    done = threading.Event()
    surprises = []

    def disturb():
        while not done.is_set():
            try:
                tree.find(page(1))
                tree.discard(page(2))
            except RuntimeError as error:
                if "in use" not in str(error):
                    surprises.append(error)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(5):
            tree.clear()
            while True:
                try:
                    tree.add_many(b"".join(page(i) for i in range(30000)))
                    break
                except RuntimeError:
                    pass
    finally:
        done.set()
        thread.join()
    assert surprises == []
    tree.check()


# ---- the checker ----


def tree_of(n):
    tree = Tree("content", PAGE_BYTES)
    for i in range(n):
        tree.add(page(i))
    tree.check()
    return tree


def root_of(tree):
    return next(node for node in tree.nodes_in_order() if tree._links(node)[0] == 0)


def leaf_of(tree, *, black):
    return next(n for n in tree.nodes_in_order() if tree._links(n)[1:] == (black, 0, 0))


def inner_black_of(tree):
    root = root_of(tree)
    return next(
        n for n in tree.nodes_in_order() if tree._links(n)[1] and tree._links(n)[2] and n != root
    )


def break_root_colour(tree):
    tree._break(root_of(tree), black=False)


def break_root_parent(tree):
    root = root_of(tree)
    tree._break(root, parent=tree._links(root)[2])


def break_red_pair(tree):
    # Recolouring a node and its children against each other keeps the black counts.
    root = root_of(tree)
    leaf = leaf_of(tree, black=False)
    parent = tree._links(leaf)[0]
    assert parent != root
    tree._break(parent, black=False)


def break_black_count(tree):
    tree._break(leaf_of(tree, black=False), black=True)


def break_child_link(tree):
    tree._break(leaf_of(tree, black=True), left=root_of(tree))


def break_parent_link(tree):
    tree._break(leaf_of(tree, black=True), parent=leaf_of(tree, black=False))


def break_into_twice_the_same_child(tree):
    node = inner_black_of(tree)
    tree._break(node, right=tree._links(node)[2])


def break_order(tree):
    tree.set_page(tree.nodes_in_order()[10], page(1 << 60))


def break_count_down(tree):
    tree._break(root_of(tree), n_nodes=len(tree) - 1)


def break_count_up(tree):
    tree._break(root_of(tree), n_nodes=len(tree) + 1)


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        (break_root_colour, 1),
        (break_root_parent, 4),
        (break_red_pair, 2),
        (break_black_count, 3),
        (break_child_link, 4),
        (break_parent_link, 4),
        (break_into_twice_the_same_child, 4),
        (break_order, 5),
        (break_count_down, 6),
        (break_count_up, 6),
    ],
)
def test_checker_names_the_broken_invariant(damage, number):
    tree = tree_of(30)
    damage(tree)
    with pytest.raises(RuntimeError, match=f"invariant {number} "):
        tree.check()
    if number == 5:
        tree.check(order=False)
    tree.clear()
    tree.check()


def test_checker_counts_the_empty_tree():
    tree = tree_of(1)
    tree._break(tree.nodes_in_order()[0], n_nodes=0)
    with pytest.raises(RuntimeError, match="invariant 6 "):
        tree.check()


# ---- pages that change under the tree ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("few_digests", [False, True])
def test_unstable_tree_keeps_its_shape(order, few_digests):
    """Rewritten pages may hide matches; the shape stays, and what is found is truly equal."""
    rng = random.Random(7)
    tree = Tree(order, PAGE_BYTES)
    members = []
    n_found = 0
    for _ in range(6000):
        content = page(rng.randrange(300))
        digest = rng.randrange(3) if few_digests else None
        roll = rng.random()
        if roll < 0.3 and members:
            tree.set_page(rng.choice(members), content)
        elif roll < 0.7:
            found = tree.find(content, digest)
            if found is None:
                members.append(tree.add(content, digest))
            else:
                n_found += 1
                assert tree.page(found) == content
                if rng.random() < 0.3:
                    members.append(tree.add(content, digest, allow_equal=True))
        elif members:
            at = rng.randrange(len(members))
            members[at], members[-1] = members[-1], members[at]
            tree.erase(members.pop())
        tree.check(order=False)
        assert tree.height() <= height_bound(len(tree))
    assert n_found > 100
    assert sorted(tree.nodes_in_order()) == sorted(members)
    for node in members:
        tree.erase(node)
    tree.check()
    assert len(tree) == 0


def test_digest_order_survives_changes_of_pages_with_different_digests():
    """Different digests decide by themselves, so rewritten pages do not hide the others."""
    tree = Tree("digest", PAGE_BYTES)
    nodes = [tree.add(page(i), digest=i) for i in range(1000)]
    for i in range(0, 1000, 2):
        tree.set_page(nodes[i], page(5000 - i))
    for i in range(1000):
        assert tree.find(page(i), i) == (nodes[i] if i % 2 else None)


# ---- size ----


@pytest.mark.parametrize("order", ORDERS)
def test_a_million_nodes(order):
    n = 1_000_000
    rng = random.Random(13)
    data = b"".join(i.to_bytes(4, "little") + bytes(PAGE_BYTES - 4) for i in range(n))
    tree = Tree(order, PAGE_BYTES)
    assert tree.add_many(data) == n
    tree.check()
    assert tree.height() <= height_bound(n)
    assert tree.n_steps <= n * height_bound(n)
    victims = tree.nodes_in_order()
    rng.shuffle(victims)
    for node in victims[: n // 2]:
        tree.erase(node)
    tree.check()
    assert len(tree) == n - n // 2
    assert tree.height() <= height_bound(len(tree))
