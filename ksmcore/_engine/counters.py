"""What the numbers mean, in words for people who do not know KSM, and what can be done about them.

Read by the HTML report. docs/scanner.md has the same for those who do; tests hold both complete.
"""

from __future__ import annotations

__all__ = ["COUNTERS", "SKIPPED", "STAGES"]

# Groups of the numbers of `ksmcore.Stats`.
COUNTERS = {
    "Pages at this moment": {
        "bytes_saved": "Memory given back: (pages_sharing + ksm_zero_pages) pages.",
        "general_profit": "bytes_saved less metadata_bytes.",
        "pages_shared": "Shared pages in use. Each holds bytes that several pages have in common.",
        "pages_sharing": "Pages that map a shared page, less one for each of these: pages saved.",
        "ksm_zero_pages": "Pages that held only zeros and were given back: saved too.",
        "pages_unshared": "Pages that did not change and equal no other.",
        "pages_quiet": "Unshared pages that are not read again until the kernel reports a write.",
        "pages_volatile": "Pages that changed since the last pass, or were not seen often enough.",
        "pages_tracked": "Shared, sharing, unshared and volatile pages together.",
        "regions": "Registered regions, arrays of the engine included.",
        "page_bytes": "Size of a page.",
    },
    "Work since the engine was made": {
        "full_scans": "Completed passes over everything registered.",
        "pages_scanned": "Pages passed that had memory.",
        "pages_hashed": "Pages that were read, for their checksum.",
        "page_compares": "Whole pages compared while searching for equal ones.",
        "pages_merged": "Times that a page was mapped to a shared page.",
        "pages_reshared": "Those of them that had become equal again, and needed no new mapping.",
        "pages_zeroed": "Times that a zero page was given back.",
        "cow_breaks": "Shared pages that the kernel copied back because they were written.",
        "guard_waits": "Writes that had to wait for a merge (seen by the guard mprotect only).",
        "pages_skipped": "Sum of what was left out, see there.",
    },
    "What it takes": {
        "metadata_bytes": "Records, trees and tables of the engine.",
        "store_pages": "Pages that the store of shared pages holds.",
        "store_pages_frozen": "Those of them that another process may still map because of a fork.",
        "maps_used": "Memory mappings that the engine is taken to use.",
        "maps_allowed": "Memory mappings that it may use.",
    },
}

# Stages of a page's path, of `Stats.seconds`.
STAGES = {
    "pagemap": "asking the kernel which pages are there and which were written",
    "checksum": "reading pages",
    "trees": "searching for equal pages",
    "store": "making shared pages",
    "guard": "comparing and mapping, with writers kept out",
}

# Reasons of `Stats.skipped`: what the page was, and what can be done.
SKIPPED = {
    "changed": (
        "was written while it was being looked at",
        "Nothing. A page that is written all the time gains nothing by merging.",
    ),
    "refused": (
        "could not be protected or mapped: the kernel refused",
        "See whether memory or vm.max_map_count is used up; ask `python -m ksmcore doctor`.",
    ),
    "map_budget": (
        "stood too alone: merging it would have taken mappings that the process may need",
        "Raise vm.max_map_count (sysctl, as root), or the setting map_budget.",
    ),
    "store": (
        "found no room: the store could not grow",
        "Give the process more memory, or raise its control group's limit.",
    ),
    "max_shared_pages": (
        "met the limit of shared pages",
        "Raise the setting max_shared_pages, or set it to None.",
    ),
    "partner": (
        "had a partner that could not be merged",
        "Nothing. Both are met again in the next pass.",
    ),
    "away": (
        "was swapped out, or was being moved by the kernel",
        "Nothing, unless there are many: then the machine has too little memory.",
    ),
    "pinned": (
        "may have been written by a device at that time, or was shared with a child by a fork",
        "Without forks: end direct input and output, or leave such buffers unregistered.",
    ),
    "altered": (
        "lies in memory that the program has since unmapped, moved, protected or locked",
        "Undo that, or close the region and register the memory anew.",
    ),
    "held": (
        "lies in a region that was held",
        "Leave hold() as soon as the system call has returned.",
    ),
    "smart_scan": (
        "found no equal page before, and was not looked at this time",
        "Turn the setting smart_scan off to look at every page in every pass.",
    ),
    "max_page_sharing": (
        "found its shared page full",
        'Raise the setting max_page_sharing, or set it to "auto".',
    ),
}
