"""A process that runs out of mappings."""

import mmap

import ksmcore
from helpers.libc import MAP_FAILED, libc
from helpers.memory import PAGE, PRIVATE
from ksmcore._kernel import procfs

LIMIT = procfs.max_map_count()


def n_maps() -> int:
    """Mappings of this process, counted line by line: that takes no mapping itself."""
    with open("/proc/self/maps", "rb") as maps:
        return sum(1 for _ in maps)


def counted_anew(engine) -> int:
    """Mappings that the engine uses. With a limit that was not asked for before all are counted."""
    engine._core.take_census(-1, LIMIT)
    engine._core.take_census(LIMIT, LIMIT)
    return engine.stats().maps_used


def used_by_others() -> int:
    """Mappings of stores count whosever they are: other tests may have left some."""
    with ksmcore.Engine() as nobodys:
        return counted_anew(nobodys)


class Taken:
    """So many mappings of the program, give or take two: pages of no use, every second readable."""

    def __init__(self, n: int) -> None:
        self.len_bytes = (n | 1) * PAGE
        self.addr = libc.mmap(None, self.len_bytes, 0, PRIVATE, -1, 0)
        assert self.addr not in (None, MAP_FAILED)
        for page in range(1, n - 1, 2):
            failed = libc.mprotect(self.addr + page * PAGE, PAGE, mmap.PROT_READ)
            assert not failed, f"the program gets no more than {page} of {n} mappings"

    def give_back(self) -> None:
        assert libc.munmap(self.addr, self.len_bytes) == 0


def take_all_but(room: int) -> Taken:
    """Leave the process only so many mappings."""
    return Taken(LIMIT - n_maps() - room)
