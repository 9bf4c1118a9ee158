"""May this buffer be merged? Looks at the buffer and at the mappings under it, never at its bytes;
holds no lock. Words: admission (a buffer that was let in, and the hold on it), phase."""
