"""What stands in for a core with KSMCORE_DISABLE: it remembers what is registered, and touches none
of it."""

from __future__ import annotations

import ctypes
from typing import Any

from ksmcore._core.core import Core
from ksmcore._kernel.per_process import PerProcess
from ksmcore._kernel.syscalls import page_bytes

__all__ = ["NullCore"]


class NullCore:
    """Takes the calls that would register memory with `core`, in which so nothing ever is: passes
    over it do nothing, and its numbers are 0."""

    def __init__(self, core: Core) -> None:
        self._core = core
        # By address: (region id, pages).
        self._ranges: PerProcess[dict[int, tuple[int, int]]] = PerProcess(dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def add(self, region_id: int, addr: int, n_pages: int, flags: int, fresh: bool = False) -> None:
        self._ranges.get()[addr] = region_id, n_pages

    def privatize(self, addr: int, n_pages: int, flags: int) -> None:
        """Shared memory stays shared."""

    def remove(self, region_id: int, addr: int, restore: bool, keep: bool = False) -> bool:
        return keep or self._ranges.get().pop(addr, None) is not None

    def find(self, addr: int, len_bytes: int) -> tuple[int, int, int] | None:
        """The range that begins there and is as long; of others it is not told."""
        region_id, n_pages = self._ranges.get().get(addr, (0, 0))
        return (region_id, addr, n_pages) if n_pages * page_bytes() == len_bytes else None

    def hold(self, addr: int, len_bytes: int) -> list[tuple[int, int]]:
        """Nothing is merged, so anything is held; the allocator's memory is not even known here."""
        return [(0, addr)]

    def let_go(self, region_id: int, addr: int) -> None:
        """Nothing was held."""

    def copy_memory(self, source: int, target: int, len_bytes: int) -> int:
        ctypes.memmove(target, source, len_bytes)
        return 0
