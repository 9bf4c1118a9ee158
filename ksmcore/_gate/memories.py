"""Memory that does not come as a buffer: what tensors and arrays of other libraries say of theirs.

No library is imported for it: whose object it is, its class tells by name. A tensor stands for its
whole storage: a page that two tensors share in part belongs to the storage that both lie in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ksmcore._gate.capsules import CapsuleMemory

__all__ = [
    "Memory",
    "UnreachableError",
    "exports_buffer",
    "extent",
    "is_a",
    "library_of",
    "one_memory",
    "parts_of_tensor",
]

CPU_DEVICE = 1  # kDLCPU


class UnreachableError(ValueError):
    """There is memory, and no way to it; the text says why."""


class Memory:
    """A stretch of memory with an address, and what keeps it there. `settle` is called before it is
    registered, to have it stay where it is for as long as it is kept."""

    __slots__ = ("__array_interface__", "_keeper", "addr", "len_bytes", "library", "settle")

    def __init__(
        self,
        addr: int,
        len_bytes: int,
        keeper: object,
        *,
        library: str = "",
        settle: Callable[[], object] | None = None,
    ) -> None:
        self.addr, self.len_bytes = addr, len_bytes
        self._keeper = keeper
        self.library = library
        self.settle = settle
        # Read-only: nobody writes through it.
        self.__array_interface__ = {
            "data": (addr, True),
            "shape": (len_bytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def view(self) -> memoryview:
        """Its bytes. The array under the view holds this, which holds the keeper."""
        octets: Any = np.asarray(self)
        return memoryview(octets)


def is_a(kind: type, library: str, *names: str) -> bool:
    """Is it a class of this library with one of these names, or derived from one?"""
    return any(
        base.__name__ in names and str(base.__module__).partition(".")[0] == library
        for base in kind.__mro__
    )


def library_of(thing: object) -> str:
    """The library whose object this is; "" where nothing special is known of it."""
    kind = type(thing)
    if is_a(kind, "torch", "Tensor", "UntypedStorage", "TypedStorage"):
        return "torch"
    root = str(kind.__module__).partition(".")[0]
    return {"jaxlib": "jax", "jax": "jax", "pyarrow": "pyarrow", "polars": "polars"}.get(root, "")


def exports_buffer(thing: Any) -> bool:
    try:
        memoryview(thing).release()
    except (TypeError, BufferError):
        return False
    except ValueError:
        return True  # one that is closed, or released: what asks for it tells that
    return True


def one_memory(thing: Any) -> object | None:
    """What the gate takes for an object that is one piece of memory: the object itself if it is a
    buffer, a `Memory` for a tensor or the like; None for all others.

    Raises:
        UnreachableError: it is one, on another device, or laid out so that it has none.
    """
    kind = type(thing)
    if isinstance(thing, np.ndarray):
        return thing
    if is_a(kind, "torch", "Tensor"):
        return _of_tensor(thing)
    if is_a(kind, "torch", "UntypedStorage"):
        return _of_storage(thing)
    if is_a(kind, "torch", "TypedStorage"):
        return _of_storage(thing.untyped())
    if exports_buffer(thing):
        return thing  # type: ignore[no-any-return]
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return _of_capsule(thing)
    if hasattr(kind, "__array_interface__"):
        return _of_interface(thing)
    return None


def _of_tensor(tensor: Any) -> Memory | None:
    """The storage of a plain tensor; None for one that is made of others."""
    torch = sys.modules["torch"]
    if _is_made_of_others(tensor):
        return None
    if tensor.layout != torch.strided:
        raise UnreachableError(f"its layout is {tensor.layout}")
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError) as error:
        raise UnreachableError("it has no storage") from error
    return _of_storage(storage)


def _is_made_of_others(tensor: Any) -> bool:
    return hasattr(type(tensor), "__tensor_flatten__") or str(tensor.layout).startswith(
        "torch.sparse"
    )


def parts_of_tensor(tensor: Any) -> list[Any]:
    """The tensors that a sparse one, or one of a class of its own, is made of."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    if str(tensor.layout) == "torch.sparse_coo":
        return [tensor._indices(), tensor._values()]
    by_row = str(tensor.layout) in ("torch.sparse_csr", "torch.sparse_bsr")
    names = ("crow_indices", "col_indices") if by_row else ("ccol_indices", "row_indices")
    return [getattr(tensor, name)() for name in (*names, "values")]


def _of_storage(storage: Any) -> Memory:
    torch = sys.modules["torch"]
    if storage.device.type != "cpu":
        raise UnreachableError(f"it is on the device {storage.device.type!r}")
    if torch.cuda.is_initialized() and storage.is_pinned():
        raise UnreachableError("its pages are pinned for a device")
    addr, len_bytes = storage.data_ptr(), storage.nbytes()

    def settle() -> None:
        """A storage that may be resized could move while it is registered. An array made of a
        tensor ends that, as for all who call `Tensor.numpy`."""
        octets = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        octets.numpy()
        if (storage.data_ptr(), storage.nbytes()) != (addr, len_bytes):
            raise ValueError("this storage was resized meanwhile")

    return Memory(addr, len_bytes, storage, library="torch", settle=settle)


def _of_capsule(thing: Any) -> Memory:
    try:
        device, _ = thing.__dlpack_device__()
        if device != CPU_DEVICE:
            raise UnreachableError(f"it is on a device of kind {int(device)}")
        try:
            # A new reader tells so; what is older does not know the word.
            capsule = thing.__dlpack__(max_version=(1, 0))
        except TypeError:
            capsule = thing.__dlpack__()
        memory = CapsuleMemory(capsule)
    except UnreachableError:
        raise
    except Exception as error:
        # Each library raises what it likes: RuntimeError of deleted arrays, BufferError of types.
        raise UnreachableError(_first_line(error)) from error
    return Memory(memory.addr, memory.len_bytes, memory, library=library_of(thing))


def _of_interface(thing: Any) -> Memory:
    interface = thing.__array_interface__
    data = interface.get("data")
    if not isinstance(data, tuple):
        raise UnreachableError("it hands out copies only")
    # NumPy knows how far strides reach. What it makes holds the object.
    return Memory(*extent(np.asarray(thing)), thing)


def extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """(address of the first byte, length in bytes) of an array's memory, with the gaps in it."""
    addr: int = array.__array_interface__["data"][0]
    if array.flags.forc:
        return addr, array.nbytes
    if array.size == 0:
        return addr, 0
    reach = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
    low, high = (sum(pick(far, 0) for far in reach) for pick in (min, max))
    return addr + low, high - low + array.itemsize


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
