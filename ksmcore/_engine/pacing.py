"""How much the background scanner does at once, and how long it rests in between.

Pure arithmetic over times and pages: it neither sleeps nor reads a clock.

Two ways, by the settings:

- By hand: batches of `pages_to_scan` pages with `sleep_millisecs` between them. A pass in which no
  page had to be read is followed by a longer rest, so that an idle engine costs next to nothing.
- `target_scan_time`: the advisor. Every batch is due when its part of the target has gone by, so a
  pass takes the target, whatever the memory's size; `max_cpu` bounds what it may cost.

`max_cpu` holds in both: after each batch as much time must have gone by as its share asks for. What
a sleep was too long is made up for in the next one. By hand, each pass that found nothing, and met
little that it had not met before, halves that share for the next one, down to a 32nd, and to an
eighth of that while the program's own threads have all processors; whatever is found, or new, gives
all of it back. Where the rests are 0 it stays.
"""

from __future__ import annotations

from ksmcore._engine.settings import Settings

__all__ = ["Pacer", "are_wanted", "young_seconds"]

# An idle pass costs this part of a processor at most, and is waited for so many seconds at most.
IDLE_SHARE = 1 / 300
LONGEST_REST_SECONDS = 60.0
# The advisor makes batches about so far apart, of pages between these bounds.
BATCH_SECONDS = 0.02
LEAST_BATCH_PAGES = 64
MOST_HALVINGS = 5
# Where the program has this part of all processors, what is left is not the scanner's.
WANTED_SHARE = 0.9
HALVINGS_WHERE_WANTED = 3
# What was allocated less than so many rests ago is left alone, or so long ago.
YOUNG_RESTS = 50
YOUNG_SECONDS = 1.0
# A pass that has merged looks at all mappings for it, and is followed by so many times that time.
LOOK_RESTS = 20
# Time that was left unused is spent later, up to so much.
MOST_CREDIT_SECONDS = 0.01


def young_seconds(settings: Settings) -> float:
    """For how long memory that was just allocated is left alone: most of it is written, or freed
    again, before looking at it could have paid. An impatient scanner waits less."""
    if settings.target_scan_time is not None:
        return YOUNG_SECONDS
    return min(YOUNG_RESTS * settings.sleep_millisecs / 1000, YOUNG_SECONDS)


def are_wanted(cpu_seconds: float, seconds: float, n_processors: int) -> bool:
    """Does the program want all its processors, having had so much of them in that time?"""
    return cpu_seconds >= WANTED_SHARE * n_processors * seconds > 0


class Pacer:
    """The times of one scanner; all of one clock that never goes back."""

    def __init__(self) -> None:
        self._pass_began = 0.0
        self._pass_cpu_seconds = 0.0
        self._owed_seconds = 0.0
        self._owed_at = 0.0
        self._n_fruitless = 0  # passes, one after the other

    def begin_pass(self, now: float) -> None:
        self._n_fruitless += self._pass_cpu_seconds > 0
        self._pass_began = now
        self._pass_cpu_seconds = 0.0
        self._owe(0.0, now)

    def batch_pages(self, settings: Settings, n_pages: int) -> int:
        """Pages of the next batch, in a pass over n_pages."""
        if settings.target_scan_time is None:
            return settings.pages_to_scan
        wanted = int(n_pages * BATCH_SECONDS / settings.target_scan_time)
        return min(max(wanted, LEAST_BATCH_PAGES), settings.pages_to_scan)

    def rest(
        self,
        settings: Settings,
        now: float,
        cpu_seconds: float,
        part_done: float,
        *,
        was_fruitful: bool,
        is_crowded: bool = False,
    ) -> float:
        """Seconds to rest after a batch that took so much of a processor; `part_done` of the pass
        is behind it, 0 to 1. `is_crowded`: the program's threads want all processors."""
        self._pass_cpu_seconds += cpu_seconds
        if was_fruitful:
            self._n_fruitless = -1  # this pass is none
        seconds = cpu_seconds * 100 / settings.max_cpu
        if settings.target_scan_time is None and settings.sleep_millisecs > 0:
            halvings = min(max(self._n_fruitless, 0), MOST_HALVINGS)
            halvings += HALVINGS_WHERE_WANTED if is_crowded and halvings > 0 else 0
            seconds *= 2**halvings
        self._owe(seconds, now)
        if settings.target_scan_time is None:
            wanted = settings.sleep_millisecs / 1000
        else:
            wanted = self._pass_began + part_done * settings.target_scan_time - now
        return max(wanted, self._owed_seconds, 0.0)

    def _owe(self, seconds: float, now: float) -> None:
        """So much time more must go by, counted from the last call on."""
        self._owed_seconds += seconds - (now - self._owed_at)
        self._owed_seconds = max(self._owed_seconds, -MOST_CREDIT_SECONDS)
        self._owed_at = now

    def rest_after_look(self, settings: Settings, look_seconds: float) -> float:
        """Seconds to rest at least after a pass that took so long to see what the program has
        advised: so much, however little it has merged."""
        if settings.target_scan_time is not None or settings.sleep_millisecs == 0:
            return 0.0
        return min(look_seconds * LOOK_RESTS, LONGEST_REST_SECONDS)

    def idle_rest(self, settings: Settings) -> float:
        """Seconds to rest at least after a pass in which no page had to be read."""
        if settings.target_scan_time is not None:
            return 0.0
        return min(self._pass_cpu_seconds / IDLE_SHARE, LONGEST_REST_SECONDS)
