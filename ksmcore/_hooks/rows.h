/* The table: every function of the C library that writes into its caller's memory for input, or has the kernel do so.
   Included several times, with ROW() and its kin defined otherwise each time:

       ROW(name, type of result, parameters, arguments, what is told)

   What is told: MAY_WRITE(where, bytes) for each place; more than is written does no harm, and a place that is NULL
   is none. What a function writes by its own code (getline's, scanf's) need not be here: a guard makes that wait
   like any other code. So it is the functions that have the kernel write. The C library's other names for a
   function (pread64) share its address, and are there too where they do not.

   To add one: a row here, and an entry in tests/helpers/scenarios.py, without which a test fails. */

/* ---- files, and what is read like one ---- */
ROW(read, ssize_t, (int fd, void *to, size_t n), (fd, to, n), MAY_WRITE(to, n))
ROW(__read_chk, ssize_t, (int fd, void *to, size_t n, size_t room), (fd, to, n, room), MAY_WRITE(to, n))
ROW(pread, ssize_t, (int fd, void *to, size_t n, off_t at), (fd, to, n, at), MAY_WRITE(to, n))
ROW(pread64, ssize_t, (int fd, void *to, size_t n, off_t at), (fd, to, n, at), MAY_WRITE(to, n))
ROW(__pread_chk, ssize_t, (int fd, void *to, size_t n, off_t at, size_t room), (fd, to, n, at, room), MAY_WRITE(to, n))
ROW(__pread64_chk, ssize_t, (int fd, void *to, size_t n, off_t at, size_t room), (fd, to, n, at, room),
    MAY_WRITE(to, n))
ROW(readv, ssize_t, (int fd, const struct iovec *to, int n), (fd, to, n), MAY_WRITE_EACH(to, n))
ROW(preadv, ssize_t, (int fd, const struct iovec *to, int n, off_t at), (fd, to, n, at), MAY_WRITE_EACH(to, n))
ROW(preadv64, ssize_t, (int fd, const struct iovec *to, int n, off_t at), (fd, to, n, at), MAY_WRITE_EACH(to, n))
ROW(preadv2, ssize_t, (int fd, const struct iovec *to, int n, off_t at, int flags), (fd, to, n, at, flags),
    MAY_WRITE_EACH(to, n))
ROW(preadv64v2, ssize_t, (int fd, const struct iovec *to, int n, off_t at, int flags), (fd, to, n, at, flags),
    MAY_WRITE_EACH(to, n))
ROW(fread, size_t, (void *to, size_t size, size_t n, FILE *from), (to, size, n, from), MAY_WRITE(to, size * n))
ROW(fread_unlocked, size_t, (void *to, size_t size, size_t n, FILE *from), (to, size, n, from), MAY_WRITE(to, size * n))
ROW(__fread_chk, size_t, (void *to, size_t room, size_t size, size_t n, FILE *from), (to, room, size, n, from),
    MAY_WRITE(to, size * n))
ROW(__fread_unlocked_chk, size_t, (void *to, size_t room, size_t size, size_t n, FILE *from),
    (to, room, size, n, from), MAY_WRITE(to, size * n))
ROW(fgets, char *, (char *to, int n, FILE *from), (to, n, from), MAY_WRITE(to, n > 0 ? (size_t)n : 0))
ROW(fgets_unlocked, char *, (char *to, int n, FILE *from), (to, n, from), MAY_WRITE(to, n > 0 ? (size_t)n : 0))
ROW(__fgets_chk, char *, (char *to, size_t room, int n, FILE *from), (to, room, n, from),
    MAY_WRITE(to, n > 0 ? (size_t)n : 0))
ROW(__fgets_unlocked_chk, char *, (char *to, size_t room, int n, FILE *from), (to, room, n, from),
    MAY_WRITE(to, n > 0 ? (size_t)n : 0))
ROW(getrandom, ssize_t, (void *to, size_t n, unsigned flags), (to, n, flags), MAY_WRITE(to, n))
ROW(getentropy, int, (void *to, size_t n), (to, n), MAY_WRITE(to, n))
ROW(process_vm_readv, ssize_t,
    (pid_t pid, const struct iovec *to, unsigned long n, const struct iovec *from, unsigned long m,
     unsigned long flags),
    (pid, to, n, from, m, flags), MAY_WRITE_EACH(to, n))

/* ---- sockets ---- */
ROW(recv, ssize_t, (int fd, void *to, size_t n, int flags), (fd, to, n, flags), MAY_WRITE(to, n))
ROW(__recv_chk, ssize_t, (int fd, void *to, size_t n, size_t room, int flags), (fd, to, n, room, flags),
    MAY_WRITE(to, n))
ROW(recvfrom, ssize_t, (int fd, void *to, size_t n, int flags, void *who, socklen_t *who_n),
    (fd, to, n, flags, who, who_n),
    MAY_WRITE(to, n) MAY_WRITE(who, ADDRESS_BYTES) MAY_WRITE(who_n, sizeof *who_n))
ROW(__recvfrom_chk, ssize_t, (int fd, void *to, size_t n, size_t room, int flags, void *who, socklen_t *who_n),
    (fd, to, n, room, flags, who, who_n),
    MAY_WRITE(to, n) MAY_WRITE(who, ADDRESS_BYTES) MAY_WRITE(who_n, sizeof *who_n))
ROW(recvmsg, ssize_t, (int fd, struct msghdr *to, int flags), (fd, to, flags), MAY_WRITE_MESSAGE(to))
ROW(recvmmsg, int, (int fd, struct mmsghdr *to, unsigned n, int flags, struct timespec *limit),
    (fd, to, n, flags, limit),
    MAY_WRITE(to, n * sizeof *to) MAY_WRITE(limit, sizeof *limit)
    for (unsigned i = 0; to && i < n && i < MOST_PARTS; i++) MAY_WRITE_MESSAGE(&to[i].msg_hdr))
ROW(accept, int, (int fd, void *who, socklen_t *who_n), (fd, who, who_n),
    MAY_WRITE(who, ADDRESS_BYTES) MAY_WRITE(who_n, sizeof *who_n))
ROW(accept4, int, (int fd, void *who, socklen_t *who_n, int flags), (fd, who, who_n, flags),
    MAY_WRITE(who, ADDRESS_BYTES) MAY_WRITE(who_n, sizeof *who_n))
ROW(getsockname, int, (int fd, void *who, socklen_t *who_n), (fd, who, who_n),
    MAY_WRITE(who, ADDRESS_BYTES) MAY_WRITE(who_n, sizeof *who_n))
ROW(getpeername, int, (int fd, void *who, socklen_t *who_n), (fd, who, who_n),
    MAY_WRITE(who, ADDRESS_BYTES) MAY_WRITE(who_n, sizeof *who_n))
ROW(getsockopt, int, (int fd, int level, int name, void *to, socklen_t *n), (fd, level, name, to, n),
    MAY_WRITE(to, n ? *n : 0) MAY_WRITE(n, sizeof *n))
ROW(socketpair, int, (int domain, int type, int protocol, int *to), (domain, type, protocol, to),
    MAY_WRITE(to, 2 * sizeof *to))
ROW(msgrcv, ssize_t, (int id, void *to, size_t n, long type, int flags), (id, to, n, type, flags),
    MAY_WRITE(to, n + sizeof(long)))
ROW(mq_receive, ssize_t, (int id, char *to, size_t n, unsigned *rank), (id, to, n, rank),
    MAY_WRITE(to, n) MAY_WRITE(rank, sizeof *rank))
ROW(mq_timedreceive, ssize_t, (int id, char *to, size_t n, unsigned *rank, const struct timespec *limit),
    (id, to, n, rank, limit), MAY_WRITE(to, n) MAY_WRITE(rank, sizeof *rank))

/* ---- what is ready ---- */
ROW(poll, int, (struct pollfd *to, nfds_t n, int limit), (to, n, limit), MAY_WRITE(to, n * sizeof *to))
ROW(__poll_chk, int, (struct pollfd *to, nfds_t n, int limit, size_t room), (to, n, limit, room),
    MAY_WRITE(to, n * sizeof *to))
MASK_ROW(ppoll, int, (struct pollfd *to, nfds_t n, const struct timespec *limit, const sigset_t *mask),
    (to, n, limit, mask), MAY_WRITE(to, n * sizeof *to))
MASK_ROW(__ppoll_chk, int,
    (struct pollfd *to, nfds_t n, const struct timespec *limit, const sigset_t *mask, size_t room),
    (to, n, limit, mask, room), MAY_WRITE(to, n * sizeof *to))
ROW(select, int, (int n, fd_set *in, fd_set *out, fd_set *other, struct timeval *limit), (n, in, out, other, limit),
    MAY_WRITE_SETS(n, in, out, other) MAY_WRITE(limit, sizeof *limit))
MASK_ROW(pselect, int,
    (int n, fd_set *in, fd_set *out, fd_set *other, const struct timespec *limit, const sigset_t *mask),
    (n, in, out, other, limit, mask), MAY_WRITE_SETS(n, in, out, other))
ROW(epoll_wait, int, (int fd, struct epoll_event *to, int n, int limit), (fd, to, n, limit),
    MAY_WRITE(to, n > 0 ? (size_t)n * sizeof *to : 0))
MASK_ROW(epoll_pwait, int, (int fd, struct epoll_event *to, int n, int limit, const sigset_t *mask),
    (fd, to, n, limit, mask), MAY_WRITE(to, n > 0 ? (size_t)n * sizeof *to : 0))
MASK_ROW(epoll_pwait2, int,
    (int fd, struct epoll_event *to, int n, const struct timespec *limit, const sigset_t *mask),
    (fd, to, n, limit, mask), MAY_WRITE(to, n > 0 ? (size_t)n * sizeof *to : 0))

/* ---- about files ---- */
ROW(stat, int, (const char *path, struct stat *to), (path, to), MAY_WRITE(to, sizeof *to))
ROW(stat64, int, (const char *path, struct stat *to), (path, to), MAY_WRITE(to, sizeof *to))
ROW(lstat, int, (const char *path, struct stat *to), (path, to), MAY_WRITE(to, sizeof *to))
ROW(lstat64, int, (const char *path, struct stat *to), (path, to), MAY_WRITE(to, sizeof *to))
ROW(fstat, int, (int fd, struct stat *to), (fd, to), MAY_WRITE(to, sizeof *to))
ROW(fstat64, int, (int fd, struct stat *to), (fd, to), MAY_WRITE(to, sizeof *to))
ROW(fstatat, int, (int fd, const char *path, struct stat *to, int flags), (fd, path, to, flags),
    MAY_WRITE(to, sizeof *to))
ROW(fstatat64, int, (int fd, const char *path, struct stat *to, int flags), (fd, path, to, flags),
    MAY_WRITE(to, sizeof *to))
ROW(__xstat64, int, (int kind, const char *path, struct stat *to), (kind, path, to), MAY_WRITE(to, sizeof *to))
ROW(__lxstat64, int, (int kind, const char *path, struct stat *to), (kind, path, to), MAY_WRITE(to, sizeof *to))
ROW(__fxstat64, int, (int kind, int fd, struct stat *to), (kind, fd, to), MAY_WRITE(to, sizeof *to))
ROW(__fxstatat64, int, (int kind, int fd, const char *path, struct stat *to, int flags), (kind, fd, path, to, flags),
    MAY_WRITE(to, sizeof *to))
ROW(statx, int, (int fd, const char *path, int flags, unsigned mask, void *to), (fd, path, flags, mask, to),
    MAY_WRITE(to, 256))
ROW(statfs, int, (const char *path, struct statfs *to), (path, to), MAY_WRITE(to, sizeof *to))
ROW(statfs64, int, (const char *path, struct statfs *to), (path, to), MAY_WRITE(to, sizeof *to))
ROW(fstatfs, int, (int fd, struct statfs *to), (fd, to), MAY_WRITE(to, sizeof *to))
ROW(fstatfs64, int, (int fd, struct statfs *to), (fd, to), MAY_WRITE(to, sizeof *to))
ROW(getdents64, ssize_t, (int fd, void *to, size_t n), (fd, to, n), MAY_WRITE(to, n))
ROW(readlink, ssize_t, (const char *path, char *to, size_t n), (path, to, n), MAY_WRITE(to, n))
ROW(__readlink_chk, ssize_t, (const char *path, char *to, size_t n, size_t room), (path, to, n, room), MAY_WRITE(to, n))
ROW(readlinkat, ssize_t, (int fd, const char *path, char *to, size_t n), (fd, path, to, n), MAY_WRITE(to, n))
ROW(__readlinkat_chk, ssize_t, (int fd, const char *path, char *to, size_t n, size_t room), (fd, path, to, n, room),
    MAY_WRITE(to, n))
ROW(getcwd, char *, (char *to, size_t n), (to, n), MAY_WRITE(to, n))
ROW(__getcwd_chk, char *, (char *to, size_t n, size_t room), (to, n, room), MAY_WRITE(to, n))
ROW(getxattr, ssize_t, (const char *path, const char *name, void *to, size_t n), (path, name, to, n), MAY_WRITE(to, n))
ROW(lgetxattr, ssize_t, (const char *path, const char *name, void *to, size_t n), (path, name, to, n), MAY_WRITE(to, n))
ROW(fgetxattr, ssize_t, (int fd, const char *name, void *to, size_t n), (fd, name, to, n), MAY_WRITE(to, n))
ROW(listxattr, ssize_t, (const char *path, char *to, size_t n), (path, to, n), MAY_WRITE(to, n))
ROW(llistxattr, ssize_t, (const char *path, char *to, size_t n), (path, to, n), MAY_WRITE(to, n))
ROW(flistxattr, ssize_t, (int fd, char *to, size_t n), (fd, to, n), MAY_WRITE(to, n))
ROW(ioctl, int, (int fd, unsigned long what, void *to), (fd, what, to), MAY_WRITE(to, control_bytes(what)))
ROW(fcntl, int, (int fd, int what, void *to), (fd, what, to), MAY_WRITE(to, FCNTL_BYTES))
ROW(fcntl64, int, (int fd, int what, void *to), (fd, what, to), MAY_WRITE(to, FCNTL_BYTES))
ROW(pipe, int, (int *to), (to), MAY_WRITE(to, 2 * sizeof *to))
ROW(pipe2, int, (int *to, int flags), (to, flags), MAY_WRITE(to, 2 * sizeof *to))
ROW(sendfile, ssize_t, (int to, int from, off_t *at, size_t n), (to, from, at, n), MAY_WRITE(at, sizeof *at))
ROW(sendfile64, ssize_t, (int to, int from, off_t *at, size_t n), (to, from, at, n), MAY_WRITE(at, sizeof *at))
ROW(splice, ssize_t, (int from, off_t *from_at, int to, off_t *to_at, size_t n, unsigned flags),
    (from, from_at, to, to_at, n, flags), MAY_WRITE(from_at, sizeof *from_at) MAY_WRITE(to_at, sizeof *to_at))
ROW(copy_file_range, ssize_t, (int from, off_t *from_at, int to, off_t *to_at, size_t n, unsigned flags),
    (from, from_at, to, to_at, n, flags), MAY_WRITE(from_at, sizeof *from_at) MAY_WRITE(to_at, sizeof *to_at))

/* ---- about processes, and the time ---- */
ROW(wait, pid_t, (int *to), (to), MAY_WRITE(to, sizeof *to))
ROW(waitpid, pid_t, (pid_t pid, int *to, int flags), (pid, to, flags), MAY_WRITE(to, sizeof *to))
ROW(wait3, pid_t, (int *to, int flags, struct rusage *use), (to, flags, use),
    MAY_WRITE(to, sizeof *to) MAY_WRITE(use, sizeof *use))
ROW(wait4, pid_t, (pid_t pid, int *to, int flags, struct rusage *use), (pid, to, flags, use),
    MAY_WRITE(to, sizeof *to) MAY_WRITE(use, sizeof *use))
ROW(waitid, int, (int kind, id_t id, siginfo_t *to, int flags), (kind, id, to, flags), MAY_WRITE(to, sizeof *to))
ROW(sigtimedwait, int, (const sigset_t *set, siginfo_t *to, const struct timespec *limit), (set, to, limit),
    MAY_WRITE(to, sizeof *to))
ROW(sigwaitinfo, int, (const sigset_t *set, siginfo_t *to), (set, to), MAY_WRITE(to, sizeof *to))
ROW(sigpending, int, (sigset_t *to), (to), MAY_WRITE(to, sizeof *to))
ROW(nanosleep, int, (const struct timespec *time, struct timespec *to), (time, to), MAY_WRITE(to, sizeof *to))
ROW(clock_nanosleep, int, (clockid_t clock, int flags, const struct timespec *time, struct timespec *to),
    (clock, flags, time, to), MAY_WRITE(to, sizeof *to))
ROW(getrusage, int, (int who, struct rusage *to), (who, to), MAY_WRITE(to, sizeof *to))
ROW(getrlimit, int, (int what, struct rlimit *to), (what, to), MAY_WRITE(to, sizeof *to))
ROW(getrlimit64, int, (int what, struct rlimit *to), (what, to), MAY_WRITE(to, sizeof *to))
ROW(prlimit, int, (pid_t pid, int what, const struct rlimit *new, struct rlimit *to), (pid, what, new, to),
    MAY_WRITE(to, sizeof *to))
ROW(prlimit64, int, (pid_t pid, int what, const struct rlimit *new, struct rlimit *to), (pid, what, new, to),
    MAY_WRITE(to, sizeof *to))
ROW(sysinfo, int, (struct sysinfo *to), (to), MAY_WRITE(to, sizeof *to))
ROW(uname, int, (struct utsname *to), (to), MAY_WRITE(to, sizeof *to))
ROW(getgroups, int, (int n, gid_t *to), (n, to), MAY_WRITE(to, n > 0 ? (size_t)n * sizeof *to : 0))
ROW(mincore, int, (void *at, size_t n, unsigned char *to), (at, n, to), MAY_WRITE(to, n / 4096 + 1))

/* ---- masks of signals: SIGSEGV stays out of them while a guard needs it ---- */
MASK_ROW(sigsuspend, int, (const sigset_t *mask), (mask), )
ROW(pthread_sigmask, int, (int how, const sigset_t *mask, sigset_t *to), (how, UNMASKED_IF(how, mask), to),
    MAY_WRITE(to, sizeof *to))
ROW(sigprocmask, int, (int how, const sigset_t *mask, sigset_t *to), (how, UNMASKED_IF(how, mask), to),
    MAY_WRITE(to, sizeof *to))

/* ---- handlers of signals: what is called instead leaves a guard's in place ---- */
INSTEAD_ROW(sigaction, int, (int sig, const struct sigaction *mask, struct sigaction *to),
    (sig, UNMASKED_ACTION(mask), to), hooks_change_action, MAY_WRITE(to, sizeof *to))
INSTEAD_ROW(signal, sighandler_t, (int sig, sighandler_t handler), (sig, handler), hooks_change_handler, )
