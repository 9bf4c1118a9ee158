"""What is asked of the kernel: every system call, the files under /proc, what the kernel knows of a
page, forks, and reading memory that may vanish. Nothing here knows of engines; the fork lock, and
those of maps and of the list of descriptors are its own. Words: mapping (vma), survey, lease."""
