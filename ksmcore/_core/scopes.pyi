from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, final

from typing_extensions import Self

class _Core(Protocol):
    def enter_guard(self) -> int: ...
    def leave_guard(self, entered: int) -> None: ...
    def hold(self, addr: int, len_bytes: int) -> list[tuple[int, int]]: ...
    def let_go(self, region_id: int, addr: int) -> None: ...

class _Export(Protocol):
    @property
    def ranges(self) -> list[tuple[int, int]]: ...
    def release(self) -> None: ...

@final
class PassLock(AbstractContextManager[PassLock, None]):
    def is_mine(self) -> bool: ...
    def check_outside(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class GuardScope(AbstractContextManager[GuardScope, None]):
    def __new__(cls, core: _Core) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class HoldScope(AbstractContextManager[None, None]):
    def __new__(cls, core: _Core, take: Callable[[], _Export]) -> Self: ...
    def __enter__(self) -> None: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
