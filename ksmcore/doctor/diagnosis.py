"""Can ksmcore work here, how well, and what would make it better?

    import ksmcore.doctor
    diagnosis = ksmcore.doctor.examine()
    print(diagnosis.health, [check.remedy for check in diagnosis.checks if check.remedy])

It looks at the kernel, at this process and at what limits it, and then really merges a few pages
(in an engine of its own). Data only; `str(diagnosis)` is a plain text. The single checks are
functions of what was read, see `checks`.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import ksmcore
from ksmcore._engine.all_engines import process_left_out_bytes
from ksmcore._engine.engine import Engine
from ksmcore._engine.features import features
from ksmcore._engine.settings import GUARDS, Settings
from ksmcore._engine.stats import STORE_PATH
from ksmcore._kernel import procfs, smaps
from ksmcore.doctor import checks, limits
from ksmcore.doctor.checks import Check
from ksmcore.sizes import human_bytes

__all__ = ["Check", "Diagnosis", "examine"]

Health = Literal["healthy", "weak", "broken"]
EXIT_STATUS: dict[Health, int] = {"healthy": 0, "weak": 1, "broken": 2}

TEST_PAGES = 64

REPORT = "see the other lines; if they are all good, please report this"
# Other checks that are named where the self-test failed.
MOST_CAUSES = 2

SCHEMA = 1
"""Of `Diagnosis.as_dict`: names and meanings stay, as long as this number does; checks and keys
may be added."""


@dataclass(frozen=True)
class Diagnosis:
    """All checks, in the order of their importance for a reader."""

    checks: tuple[Check, ...]

    @property
    def health(self) -> Health:
        """The worst of the checks: "broken" when nothing can be merged; "weak" when something keeps
        ksmcore from working as it should; else "healthy", advice or not."""
        levels = {check.level for check in self.checks}
        return "broken" if "broken" in levels else "weak" if "weak" in levels else "healthy"

    @property
    def exit_status(self) -> int:
        """0 healthy, 1 weak, 2 broken."""
        return EXIT_STATUS[self.health]

    def __getitem__(self, name: str) -> Check:
        """The check of that name; KeyError if there is none."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for json."""
        return {
            "schema": SCHEMA,
            "ksmcore": ksmcore.__version__,
            "health": self.health,
            "exit_status": self.exit_status,
            "checks": [asdict(check) for check in self.checks],
        }

    def __str__(self) -> str:
        return "\n".join(f"{check.level:8}{check.name}: {check.text}" for check in self.checks)


def examine() -> Diagnosis:
    """Look at everything. Takes some tens of milliseconds, and half a MiB for that time.

    Nothing is raised: what cannot be looked at here is a check that says so.
    """
    tested, in_use = self_test()
    found = functools.cache(features)
    looks: dict[str, Callable[[], Check]] = {
        "kernel": checks.kernel,
        "memfd": lambda: checks.memory_file(found()["memfd"]),
        "descriptors": checks.descriptors,
        "proc": checks.proc_files,
        "pagemap": lambda: checks.page_map(found()["pagemap"]),
        "guard": lambda: checks.guard(
            {name: found()[name] for name in GUARDS},
            in_use.guard,
            holds_calls=found()["calls"] is None and Settings.made().hold_calls is not False,
        ),
        "calls": lambda: checks.calls(found()["calls"], Settings.made().hold_calls, in_use.guard),
        "tracking": lambda: checks.tracking(found()["tracking"], in_use.dirty),
        "mappings": lambda: checks.map_limit(
            smaps.count_maps(), procfs.max_map_count(), process_left_out_bytes()
        ),
        "addresses": limits.address_space,
        "file size": limits.file_size,
        "memory": limits.memory_limit,
        "locked": lambda: limits.locked(procfs.locked_bytes(), new_memory_is_locked()),
        "overcommit": limits.overcommit,
        "huge pages": checks.huge_pages,
        "kernel's KSM": checks.kernel_ksm,
        "core files": limits.core_files,
        "signals": lambda: checks.blocked_signals(in_use.guard),
        "python": checks.library,
        "numpy": checks.numpy_allocator,
        "environment": checks.environment,
    }
    others = [_told(name, look) for name, look in looks.items()]
    causes = [check for check in others if check.level in ("weak", "broken")]
    if tested.remedy == REPORT and causes:
        named = "; ".join(f"{check.name}: {check.remedy}" for check in causes[:MOST_CAUSES])
        tested = replace(tested, remedy=f"it may be this: {named}")
    return Diagnosis((tested, *others))


def _told(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:
        text = f"could not be looked at: {error}"
        return Check(name, "weak", text, "see 'proc': it is mostly read there", {})


def new_memory_is_locked() -> bool:
    """Is whatever is mapped from now on locked? No file tells, so a page is mapped."""
    try:
        memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except BlockingIOError:  # EAGAIN: more than may be locked
        return True
    start = np.frombuffer(memory, np.uint8).ctypes.data
    return any("lo" in vma.flags for vma in smaps.vmas_in(start, start + mmap.PAGESIZE))


# ---- the self-test -------------------------------------------------------------------------------


class WrongBytesError(Exception):
    """Something that must never be, whatever the machine; the text says what."""


@dataclass(frozen=True)
class InUse:
    """What an engine with the settings of the environment goes by; None if there can be none."""

    guard: str | None = None
    dirty: str | None = None


def self_test() -> tuple[Check, InUse]:
    """Merge a few pages, with the settings of the environment, and see by the bytes and by the
    kernel's figures that it was right."""
    others = checks.OTHER_VARIABLES - {"KSMCORE_DISABLE"}
    own = {name for name in os.environ if name.startswith("KSMCORE_")} - others
    remedy = REPORT
    if own:
        remedy = f"try it without {', '.join(sorted(own))}, which it was done with"
    in_use = InUse()
    try:
        engine = Engine()
        try:
            stats = engine.stats()
            in_use = InUse(stats.guard, stats.dirty)
            saved, fallen = _merge_and_write(engine)
        finally:
            engine.close()
    except Exception as error:  # the rest of the diagnosis is wanted all the same
        if isinstance(error, WrongBytesError):
            remedy = "do not merge anything here, and please report this"
        unknown = {"pss_fallen_bytes": None, "bytes_saved": None}
        return Check("self-test", "broken", f"failed: {error}", remedy, unknown), in_use
    facts = {"pss_fallen_bytes": fallen, "bytes_saved": saved}
    text = (
        f"{saved // engine.page_bytes} of {TEST_PAGES} pairs of pages merged, written and "
        f"restored, all bytes right; PSS fell by {human_bytes(fallen)}"
    )
    if saved < TEST_PAGES * engine.page_bytes:
        return Check("self-test", "weak", text, remedy, facts), in_use
    if fallen < 0.9 * saved:
        return Check("self-test", "weak", text, "something else holds these pages", facts), in_use
    return Check("self-test", "good", text, None, facts), in_use


def _merge_and_write(engine: Engine) -> tuple[int, int]:
    """(bytes saved, by how much the PSS of those pages fell)."""
    memory = mmap.mmap(
        -1, 2 * TEST_PAGES * engine.page_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    # Which keeps the kernel from counting neighbours of the same kind with it.
    memory.madvise(mmap.MADV_DONTDUMP)
    pages = np.frombuffer(memory, np.uint8).reshape(2, TEST_PAGES, engine.page_bytes)
    # Bytes of which no two pages are equal. Not random ones: that takes more libraries, and there
    # may be no mapping left for them.
    words = np.arange(pages[0].size // 4, dtype=np.uint32) * np.uint32(2_654_435_761)
    expected = words.view(np.uint8).reshape(pages.shape[1:])
    pages[:] = expected
    before = _pss_of(pages)
    report = engine.dedup(memory)
    if not (pages == expected).all():
        raise WrongBytesError("merging changed bytes")
    after = _pss_of(pages)
    if report.bytes_saved <= 0:
        reasons = ", ".join(reason for reason, count in report.skipped.items() if count)
        raise RuntimeError(f"no page was merged ({reasons or 'none was looked at'})")
    pages[0] += 1
    if not (pages[0] == expected + np.uint8(1)).all() or not (pages[1] == expected).all():
        raise WrongBytesError("a write to a merged page went astray")
    engine.unmerge()
    if not (pages[0] == expected + np.uint8(1)).all() or not (pages[1] == expected).all():
        raise WrongBytesError("unmerging changed bytes")
    return report.bytes_saved, before - after


def _pss_of(pages: NDArray[Any]) -> int:
    """With that of the stores, which engines have a view of for themselves."""
    start, end = pages.ctypes.data, pages.ctypes.data + pages.nbytes
    return sum(
        vma.pss
        for vma in smaps.Snapshot().vmas_in(0, 1 << 64)
        if start <= vma.start < end or vma.path.startswith(STORE_PATH)
    )
