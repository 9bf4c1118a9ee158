"""_rmap driven by hypothesis: after any operations a table equals a dict."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ksmcore._testing.rmap import RmapTable

# Few distinct numbers, many of which fall into one bucket, in groups that do and do not touch.
page_numbers = st.one_of(
    st.integers(1, 40),
    st.integers(0, 10).map(lambda i: 256 * i + 1),
    st.integers(0, 10).map(lambda i: 2**44 - 1 - i),
)


class RmapMachine(RuleBasedStateMachine):
    @initialize(n_buckets=st.sampled_from([1, 64, 65, 127, 200]))
    def create(self, n_buckets):
        self.table = RmapTable(n_buckets)
        self.items = {}

    @rule(page_no=page_numbers)
    def add(self, page_no):
        if page_no in self.items:
            with pytest.raises(KeyError):
                self.table.add(page_no)
        else:
            self.items[page_no] = self.table.add(page_no)

    @rule(first=st.integers(1, 2**40), n=st.integers(1, 400))
    def add_region(self, first, n):
        """Enough at once for the table to grow by many buckets."""
        for page_no in range(first, first + n):
            if page_no not in self.items:
                self.items[page_no] = self.table.add(page_no)

    @rule(page_no=page_numbers)
    def remove(self, page_no):
        if page_no in self.items:
            self.table.remove(page_no)
            del self.items[page_no]
        else:
            with pytest.raises(KeyError):
                self.table.remove(page_no)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def remove_present(self, data):
        page_no = data.draw(st.sampled_from(sorted(self.items)))
        self.table.remove(page_no)
        del self.items[page_no]

    @rule(page_no=page_numbers, hint=st.integers(0, 2**32 - 1) | st.integers(0, 500))
    def find(self, page_no, hint):
        assert self.table.find(page_no, hint) == self.items.get(page_no)

    @invariant()
    def equals_the_dict(self):
        self.table.check()
        assert len(self.table) == len(self.items)
        assert len(set(self.items.values())) == len(self.items)
        assert {page_no: self.table.find(page_no) for page_no in self.items} == self.items


TestRmap = RmapMachine.TestCase
