"""May this buffer be merged, and where are those of an object? Looks at buffers and at the mappings
under them, never at their bytes; holds no lock. Words: admission (a buffer that was let in, and the
hold on it), memory (what is no buffer, told by its address), leaf (found in an object), phase."""
