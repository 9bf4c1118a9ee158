"""Memory for arrays: page-aligned, registered from birth. The arena has a lock of its own, taken
before an engine's; whoever holds it runs no Python code. Words: chunk (one region of the arena),
extent (pages of a chunk in a row, all handed out or all free)."""
