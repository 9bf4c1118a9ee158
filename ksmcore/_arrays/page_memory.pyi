import sys
from typing import final

from ksmcore._core.core import Core

@final
class PageMemory:
    def __new__(
        cls,
        core: Core | None,
        region_id: int,
        len_bytes: int,
        owner: object = None,
        offset: int = 0,
    ) -> PageMemory: ...
    @property
    def addr(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def len_bytes(self) -> int: ...
    @property
    def n_pages(self) -> int: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
