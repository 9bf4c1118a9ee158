"""ksmcore._testing.rmap: page number -> rmap item, against a dict, and the shape of its buckets."""

import random

import pytest

from ksmcore._engine.settings import Settings
from ksmcore._testing.rmap import RmapTable

ITEM_BYTES = 28
LAST_PAGE = 2**44 - 1


def filled(page_numbers, **options):
    table = RmapTable(**options)
    for page_no in page_numbers:
        table.add(page_no)
    return table


def test_empty():
    table = RmapTable()
    table.check()
    assert len(table) == 0
    assert table.find(1) is None
    assert table.longest_bucket() == 0


def test_add_then_find():
    table = RmapTable()
    item = table.add(12345)
    assert item > 0
    assert table.find(12345) == item
    assert table.find(12346) is None
    assert len(table) == 1


def test_add_twice():
    table = filled([7])
    with pytest.raises(KeyError, match="7"):
        table.add(7)
    assert len(table) == 1
    table.check()


@pytest.mark.parametrize("page_no", [0, 2**44, 2**63])
def test_page_number_out_of_range(page_no):
    table = RmapTable()
    with pytest.raises(ValueError, match=str(page_no)):
        table.add(page_no)
    table.check()


@pytest.mark.parametrize("page_no", [-1, 2**64])
def test_page_number_beyond_64_bits(page_no):
    with pytest.raises(OverflowError):
        RmapTable().add(page_no)


def test_first_and_last_page_number():
    table = filled([1, LAST_PAGE])
    table.check()
    assert table.find(1) != table.find(LAST_PAGE)


@pytest.mark.parametrize("page_no", [0, 2**44, 2**64 - 1])
def test_find_what_cannot_be(page_no):
    assert filled([1, LAST_PAGE]).find(page_no) is None


def test_remove_then_find():
    table = filled([5, 6])
    table.remove(5)
    table.check()
    assert table.find(5) is None
    assert table.find(6) is not None
    assert len(table) == 1


def test_remove_the_absent():
    table = filled([5])
    with pytest.raises(KeyError, match="6"):
        table.remove(6)
    table.check()
    assert len(table) == 1


def test_remove_the_absent_again_and_again():
    # GIVEN a table in which every bucket has been used
    table = filled(range(1, 2000))
    for page_no in range(1, 2000):
        table.remove(page_no)
    # WHEN absent pages are removed, more often than there are buckets
    for page_no in range(1, 2000):
        with pytest.raises(KeyError):
            table.remove(page_no)
    # THEN nothing has gone wrong, and the table still works
    table.check()
    table.add(1)
    assert table.find(1) is not None


def test_an_item_is_used_again():
    table = filled([5, 6])
    item = table.find(5)
    table.remove(5)
    assert table.add(99) == item
    table.check()


def test_items_come_in_scan_order():
    table = RmapTable()
    items = [table.add(page_no) for page_no in range(1000, 1100)]
    assert items == list(range(items[0], items[0] + 100))


class TestHint:
    """The hint is a guess: whatever it is, the answer is the same."""

    def test_right(self):
        table = filled(range(10, 20))
        for page_no in range(11, 20):
            assert table.find(page_no, table.find(page_no - 1)) == table.find(page_no)

    @pytest.mark.parametrize("hint", [0, 1, 5, 10, 11, 1000, 2**32 - 2, 2**32 - 1])
    def test_any(self, hint):
        table = filled(range(10, 20))
        for page_no in range(10, 20):
            assert table.find(page_no, hint) == table.find(page_no)
        assert table.find(30, hint) is None

    def test_of_a_removed_item(self):
        table = filled([10, 11, 12])
        gone = table.find(11)
        table.remove(11)
        assert table.find(11, gone - 1) is None
        assert table.find(12, gone) == table.find(12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_buckets", [1, 64, 1000])
def test_random_operations_against_a_dict(seed, n_buckets):
    dice = random.Random(seed)
    table, model = RmapTable(n_buckets), {}
    # Two crowds, so that hits, buckets with several items and far neighbours are all common.
    pages = [*range(1, 300), *(base + i for base in (2**20, 2**43) for i in range(0, 900, 3))]
    for step in range(4000):
        page_no = dice.choice(pages)
        # Now growing, now shrinking.
        if dice.random() < (0.8 if step // 1000 % 2 == 0 else 0.2):
            if page_no in model:
                with pytest.raises(KeyError):
                    table.add(page_no)
            else:
                model[page_no] = table.add(page_no)
        elif page_no in model:
            table.remove(page_no)
            del model[page_no]
        else:
            with pytest.raises(KeyError):
                table.remove(page_no)
        if step % 10 == 0:
            table.check()
        assert len(table) == len(model)
    table.check()
    assert {page_no: table.find(page_no) for page_no in pages} == {
        page_no: model.get(page_no) for page_no in pages
    }
    assert len(set(model.values())) == len(model)


def test_a_million_pages():
    n = 1_000_000
    table = filled(range(1, n + 1))
    table.check()
    assert len(table) == n
    assert table.longest_bucket() <= 8
    assert table.metadata_bytes <= 30 * n
    assert all(table.find(page_no) for page_no in range(1, n + 1, 997))
    for page_no in range(1, n + 1, 2):
        table.remove(page_no)
    table.check()
    assert len(table) == n // 2
    assert table.find(1) is None
    assert table.find(2) is not None


class TestBuckets:
    """Neighbours in memory are neighbours in the table, so dense regions fill it evenly."""

    def test_dense(self):
        table = filled(range(2**20, 2**20 + 100_000))
        assert table.longest_bucket() <= 8

    def test_several_dense_regions(self):
        pages = [base + i for base in (2**20, 2**30 + 17, 2**43 + 5) for i in range(20_000)]
        assert filled(pages).longest_bucket() <= 24

    @pytest.mark.parametrize("stride", [2, 3, 5, 8, 16])
    def test_strided(self, stride):
        """Each bucket gets at most the items of as many strides as wrap around the table."""
        table = filled(range(2**20, 2**20 + 20_000 * stride, stride))
        assert table.longest_bucket() <= 4 * max(stride, 2)

    def test_load(self):
        table = filled(range(1, 50_001))
        assert table.n_buckets >= len(table) / 4

    def test_asked_for(self):
        assert RmapTable(1000).n_buckets == 1000

    def test_growth_from_any_size(self):
        for n_buckets in (64, 65, 100, 127, 128, 129, 1023):
            table = filled(range(1, 3000), n_buckets=n_buckets)
            table.check()
            assert table.n_buckets >= max(n_buckets, 2999 / 4 - 1)

    def test_default_is_that_of_the_settings(self):
        assert RmapTable().n_buckets == Settings().rmap_hash_size


def test_metadata_counts_items_and_buckets():
    table = RmapTable()
    empty = table.metadata_bytes
    for page_no in range(1, 101):
        table.add(page_no)
    assert table.metadata_bytes == empty + 100 * ITEM_BYTES


def test_metadata_of_removed_items_is_used_again():
    table = filled(range(1, 10_001))
    before = table.metadata_bytes
    for page_no in range(1, 10_001):
        table.remove(page_no)
    for page_no in range(1, 10_001):
        table.add(page_no)
    assert table.metadata_bytes == before
    table.check()
