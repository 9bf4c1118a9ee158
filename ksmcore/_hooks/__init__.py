"""Functions of the C library, redirected for all loaded objects, and what is told by them: which memory a call is
writing into at the moment. A lock of its own around redirecting, none in a call. Words: hook (what is called
instead), below (what was called before), row (a function and its hook), record (of a call in flight)."""
