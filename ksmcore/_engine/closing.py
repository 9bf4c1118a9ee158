"""What is ended by `close`: it can be used with `with`, and there is one of it only."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, SupportsIndex

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Closing"]


class Closing:
    """Closed when its `with` block is left. Neither pickled nor copied, whoever asks: two that
    answer for the same memory would be one too many."""

    __slots__ = ()

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"a ksmcore {type(self).__name__} cannot be pickled or copied: it answers for memory "
            "of this process. Its numbers can, see stats()"
        )
