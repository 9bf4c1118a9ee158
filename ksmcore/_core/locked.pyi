from typing import Literal

from typing_extensions import Self

class LockedCore:
    def __new__(
        cls,
        *,
        order: Literal["digest", "content"],
        checksum: Literal["jhash", "mmh3"],
        guard: str,
        any_guard: bool,
        with_pagemap: bool,
        with_tracker: bool,
        n_buckets: int,
        hold_calls: bool,
        hold_always: bool,
    ) -> Self: ...
    def let_calls_go(self) -> None: ...
