"""The one delicate moment: pages are protected, compared and remapped in a window, which loses no
write. In a window: no GIL, no allocation, no lock that others can hold. The caller holds the
engine's lock. Words: window, guard, scratch (where pages are moved to meanwhile)."""
