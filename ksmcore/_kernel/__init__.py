"""What is asked of the kernel: every system call, the files under /proc, what the kernel knows of a
page, forks, and reading memory that may vanish. Nothing here knows of engines, and no lock is taken
but the forks' own. Words: mapping (vma), survey, lease."""
