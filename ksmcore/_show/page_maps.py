"""Page maps as pictures: which memory to show, how to make it fit, and the colours of the states.

Needs NumPy only.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ksmcore._arrays import arena
from ksmcore._engine.page_state import PageState
from ksmcore._kernel.syscalls import page_bytes
from ksmcore._show.names import names_in
from ksmcore.sizes import human_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ksmcore._core.core import Core
    from ksmcore._engine.engine import Engine
    from ksmcore._engine.region import Region

__all__ = [
    "LOOKS",
    "MIXED_NOTE",
    "Cells",
    "Look",
    "PageMap",
    "engine_maps",
    "png_uri",
    "reduced",
    "region_map",
]

N_STATES = len(PageState)
# A cell that lies behind the last page.
OUTSIDE = N_STATES


# To be said where cells stand for more than a page.
MIXED_NOTE = "where the pages of cells differ, each state gets its share of these cells"


class Look(NamedTuple):
    """How a state is shown."""

    colour: str
    label: str
    meaning: str


# In the order of legends. Neighbours in lightness are at least 8 steps of L* apart, so that the
# colours can be told in grey and with any kind of colour blindness.
LOOKS = {
    PageState.SHARED: Look("#0f69b5", "shared", "maps a shared page"),
    PageState.ZERO: Look("#9bd4f5", "zero", "was all zero and given back"),
    PageState.UNIQUE: Look("#9a9a9a", "unique", "did not change, and equals no other"),
    PageState.VOLATILE: Look(
        "#eda321", "volatile", "changed since the last pass, or was not seen often enough to tell"
    ),
    PageState.BROKEN: Look(
        "#d2492a", "broken", "was shared or zero, and has been written since the last pass"
    ),
    PageState.NOT_PRESENT: Look(
        "#e9e9e9", "not present", "takes no memory: never touched, given up, or swapped out"
    ),
}


@dataclass(frozen=True)
class PageMap:
    """The states of one region's pages, or of several regions' end to end."""

    title: str
    states: NDArray[np.uint8]
    page_bytes: int
    n_regions: int = 1
    place: str = ""
    """What the title does not tell: where that is, and who registered it."""

    @property
    def nbytes(self) -> int:
        return len(self.states) * self.page_bytes

    def counts(self) -> dict[PageState, int]:
        """Pages by state, in the order of legends."""
        counts = np.bincount(self.states, minlength=N_STATES)
        return {state: int(counts[state]) for state in LOOKS}


class Cells(NamedTuple):
    """A page map made to fit: one state for each block of pages, in their order."""

    states: NDArray[np.uint8]
    pages_per_cell: int

    def grid(self, most_columns: int, columns_per_row: float = 8) -> NDArray[np.uint8]:
        """The cells line by line, as far as there are any in about this ratio; the rest of the
        last line is OUTSIDE."""
        n_cells = len(self.states)
        columns = min(max(round((n_cells * columns_per_row) ** 0.5), 1), most_columns, n_cells)
        rows = -(-n_cells // columns)
        grid = np.full(rows * columns, OUTSIDE, np.uint8)
        grid[:n_cells] = self.states
        return grid.reshape(rows, columns)

    def caption(self, page_bytes: int) -> str:
        """What one cell stands for."""
        pages = "one page" if self.pages_per_cell == 1 else f"{self.pages_per_cell:,} pages"
        return f"one cell is {pages} ({human_bytes(self.pages_per_cell * page_bytes)})"


def reduced(states: NDArray[np.uint8], most_cells: int) -> Cells:
    """At most so many cells, each for a power of two of pages.

    A cell shows a state that occurs among its pages. Of several it is the one that is most behind
    its share so far, so that rare states, and fine mixtures, show as often as they occur.
    """
    pages_per_cell = 1
    while len(states) > most_cells * pages_per_cell:
        pages_per_cell *= 2
    if pages_per_cell == 1:
        return Cells(states, 1)
    firsts = np.arange(0, len(states), pages_per_cell)
    counts = np.stack(
        [np.add.reduceat(states == state, firsts, dtype=np.int64) for state in range(N_STATES)],
        axis=1,
    )
    chosen = counts.argmax(axis=1).astype(np.uint8)
    behind = np.zeros(N_STATES)
    for cell in np.flatnonzero((counts != 0).sum(axis=1) > 1):
        behind += counts[cell]
        chosen[cell] = np.where(counts[cell] != 0, behind, -np.inf).argmax()
        behind[chosen[cell]] -= counts[cell].sum()
    return Cells(chosen, pages_per_cell)


# ---- which memory -------------------------------------------------------------------------------


def region_map(region: Region) -> PageMap:
    """The page map of a region; ValueError when it is closed."""
    states = region.page_map()
    (name,) = names_in([(region.addr, region.addr + region.nbytes)])
    title, place = _called(region, "Region", name, region.addr)
    return PageMap(title, states, page_bytes(), place=place)


def _called(region: Region | None, owner: str, name: str, addr: int) -> tuple[str, str]:
    """(title, place) of a map: what it is called, or else where it is."""
    where = f"{owner} at {addr:#x}"
    title = region.name or name if region is not None else name
    told = [where[:1].lower() + where[1:]] if title else []
    if region is not None:
        told.append(f"registered at {region.registered_at.rpartition('/')[2]}")
    if name and title != name:
        told.append(f"which is {name}")
    return title or where, ", ".join(told)


def engine_maps(engine: Engine, most_regions: int) -> list[PageMap]:
    """The page maps of all memory of an engine: the largest regions one by one, then all others end
    to end, by address. Nothing of a region that is closed meanwhile.

    Raises:
        ValueError: the engine is closed.
    """
    core = engine._open_core()
    handles = {region._id: region for region in engine.regions}

    def owner(region_id: int) -> str:
        if region_id in handles:
            return "Region"
        return "Arrays of the allocator" if arena.is_chunk(region_id) else "Memory of an array"

    by_size = sorted(core.regions(), key=lambda one: -one[2])
    # One more is shown as easily as it is summed up.
    n_shown = most_regions if len(by_size) > most_regions + 1 else len(by_size)
    shown = list(_states(core, by_size[:n_shown]))
    names = names_in([(addr, addr + len(states) * page_bytes()) for _, addr, states in shown])
    maps = []
    for (region_id, addr, states), name in zip(shown, names, strict=True):
        title, place = _called(handles.get(region_id), owner(region_id), name, addr)
        maps.append(PageMap(title, states, page_bytes(), place=place))
    others = list(_states(core, sorted(by_size[n_shown:], key=lambda one: one[1])))
    if others:
        states = np.concatenate([states for _, _, states in others])
        title = f"{len(others):,} smaller regions, end to end"
        maps.append(PageMap(title, states, page_bytes(), len(others)))
    return maps


def _states(
    core: Core, regions: Iterable[tuple[int, int, int]]
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    for region_id, addr, n_pages in regions:
        states = np.zeros(n_pages, np.uint8)
        if core.page_map(region_id, addr, states):
            yield region_id, addr, states


# ---- pictures without a library -----------------------------------------------------------------


def rgb(colour: str) -> tuple[int, int, int]:
    """'#0f69b5' -> (15, 105, 181)."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def png(grid: NDArray[np.uint8]) -> bytes:
    """A grid of states as a PNG file, one pixel for each cell. What is not present is a faint grey
    on any background, what is outside is nothing."""
    rows, columns = grid.shape
    palette = bytearray()
    alphas = bytearray()
    for state in sorted(LOOKS):
        absent = state is PageState.NOT_PRESENT
        palette += bytes((128, 128, 128) if absent else rgb(LOOKS[state].colour))
        alphas.append(56 if absent else 255)
    palette += bytes(3)
    alphas.append(0)
    lines = np.zeros((rows, columns + 1), np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = grid
    head = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits, palette
    parts = (
        (b"IHDR", head),
        (b"PLTE", bytes(palette)),
        (b"tRNS", bytes(alphas)),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def png_uri(grid: NDArray[np.uint8]) -> str:
    """The same as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(grid)).decode("ascii")
