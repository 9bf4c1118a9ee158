"""Pictures with matplotlib (extra `plot`): page maps, and savings over time.

Imported when it is first needed. Draws on figures of its own and leaves matplotlib's global state
alone.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedFormatter, FixedLocator
except ImportError as error:
    raise ImportError("ksmcore.plot draws with matplotlib: pip install 'ksmcore[plot]'") from error

from ksmcore._show.charts import (
    SAVED_COLOUR,
    USED_COLOUR,
    Point,
    byte_ticks,
    savings_points,
    time_ticks,
)
from ksmcore._show.page_maps import (
    LOOKS,
    MIXED_NOTE,
    OUTSIDE,
    PageMap,
    engine_maps,
    reduced,
    region_map,
)
from ksmcore.sizes import counted, human_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from ksmcore._engine.engine import Engine
    from ksmcore._engine.region import Region

__all__ = ["Picture", "of_engine", "of_region"]

MOST_COLUMNS = 160
# All maps together: about what a page of paper can show.
MOST_CELLS = 16384
INCHES_WIDE = 8.0


class Picture(Figure):
    """A figure that a notebook shows by itself, whichever backend is in use."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def of_region(region: Region) -> Picture:
    """See `ksmcore.plot`."""
    the_map = region_map(region)
    return _drawn(f"ksmcore: a region of {human_bytes(the_map.nbytes)}", [the_map])


def of_engine(engine: Engine, most_regions: int) -> Picture:
    """See `ksmcore.plot`."""
    maps = engine_maps(engine, most_regions)
    n_bytes = human_bytes(sum(one.nbytes for one in maps))
    regions = counted(sum(one.n_regions for one in maps), "region")
    saved = human_bytes(engine.stats().bytes_saved)
    title = f"ksmcore: {saved} saved in {regions}, {n_bytes}"
    return _drawn(title, maps, savings_points(engine))


def _drawn(title: str, maps: Sequence[PageMap], savings: Sequence[Point] | None = None) -> Picture:
    """A panel for each map, above them one for what was saved over time."""
    most_cells = max(MOST_CELLS // max(len(maps), 1), 1024)
    cells = [reduced(one.states, most_cells) for one in maps]
    grids = [one.grid(MOST_COLUMNS) for one in cells]
    heights = [2.4] * (savings is not None) + [_inches_high(grid) for grid in grids]
    # Each panel has a title and a caption; below all of them is the legend.
    size = (INCHES_WIDE, sum(heights) + 0.6 * len(heights) + 1.1)
    figure = Picture(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    panels: Any = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    axes = list(panels[:, 0])
    if savings is not None:
        _draw_savings(axes.pop(0), savings)
    for panel, one, fitted, grid in zip(axes, maps, cells, grids, strict=True):
        caption = "; ".join(filter(None, [fitted.caption(one.page_bytes), one.place]))
        _draw_map(panel, one, grid, caption)
    if maps:
        _draw_legend(figure, maps)
    return figure


def _inches_high(grid: NDArray[np.uint8]) -> float:
    rows, columns = map(int, grid.shape)
    return max(rows * min((INCHES_WIDE - 0.4) / columns, 0.14), 0.2)


def _draw_savings(axes: Axes, points: Sequence[Point]) -> None:
    axes.set_title("Memory of registered pages", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if not points:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no pass has ended yet", ha="center", transform=axes.transAxes)
        return
    seconds = [point.seconds for point in points]
    used = [point.used_bytes for point in points]
    both = [point.used_bytes + point.saved_bytes for point in points]
    end, most = seconds[-1], max(*both, 1)
    saved = f"saved, {human_bytes(points[-1].saved_bytes)} now"
    # An edge as wide as a pen's, so that a single moment is seen too.
    axes.fill_between(seconds, 0, used, color=USED_COLOUR, label="in use", linewidth=1.5)
    axes.fill_between(seconds, used, both, color=SAVED_COLOUR, label=saved, linewidth=1.5)
    axes.set_xlim(0, end * 1.01)
    axes.set_ylim(0, most * 1.04)
    for axis, ticks in ((axes.xaxis, time_ticks(end)), (axes.yaxis, byte_ticks(most))):
        axis.set_major_locator(FixedLocator([value for value, _ in ticks]))
        axis.set_major_formatter(FixedFormatter([text for _, text in ticks]))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("time since the engine was made", fontsize=8)
    # Beside the title, where no line can run into it.
    axes.legend(
        fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0
    )


def _draw_map(axes: Axes, one: PageMap, grid: NDArray[np.uint8], caption: str) -> None:
    colours = [LOOKS[state].colour for state in sorted(LOOKS)] + ["#ffffff"]
    axes.imshow(
        grid, cmap=ListedColormap(colours), vmin=-0.5, vmax=OUTSIDE + 0.5, interpolation="nearest"
    )
    axes.set_anchor("NW")
    pages = f"{len(one.states):,} page{'' if len(one.states) == 1 else 's'}"
    axes.set_title(f"{one.title}, {pages}, {human_bytes(one.nbytes)}", fontsize=10, loc="left")
    axes.set_xlabel(caption, fontsize=8, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _draw_legend(figure: Figure, maps: Sequence[PageMap]) -> None:
    counts = {state: sum(one.counts()[state] for one in maps) for state in LOOKS}
    handles = [
        Patch(
            facecolor=look.colour, edgecolor="#555555", linewidth=0.5, label=f"{look.label} {n:,}"
        )
        for (state, look), n in zip(LOOKS.items(), counts.values(), strict=True)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=6,
        fontsize=8,
        frameon=False,
        title=f"Pages by state; {MIXED_NOTE}",
        title_fontsize=8,
        alignment="left",
    )
