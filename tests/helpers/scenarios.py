"""A way to call each function of ksmcore/_hooks/rows.h, so that it writes where a test chooses.

A scenario gets the address to write to, in memory full of FILL, and returns the arguments of the
call; they may point to what `Stage` keeps. The call succeeds where it does not return -1.
"""

import ctypes
import mmap
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

FILL = 0xA5
N_BYTES = 48
F_GETLK, F_SETLK, FIONREAD, SOL_SOCKET, SO_TYPE = 5, 6, 0x541B, 1, 3
P_ALL, WEXITED, AT_FDCWD, RUSAGE_SELF, RLIMIT_NOFILE = 0, 4, -100, 0, 7

libc = ctypes.CDLL(None, use_errno=True)
libc.fdopen.restype = ctypes.c_void_p


class Stage:
    """What the scenarios need: sources to read from, and memory for what is not under test."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "source"
        self.path.write_bytes(b"a line\n" * 20)
        (directory / "link").symlink_to(self.path)
        self.link = os.fsencode(directory / "link") + b"\0"
        self.name = os.fsencode(self.path) + b"\0"
        self.kept: list[object] = []
        self.queues: list[int] = []

    def close(self) -> None:
        for kept in self.kept:
            if isinstance(kept, int):
                os.close(kept)
            elif isinstance(kept, (socket.socket, select.epoll)):
                kept.close()
        for queue in self.queues:
            libc.msgctl(queue, 0, None)

    def opened(self, fd: int) -> int:
        self.kept.append(fd)
        return fd

    def file(self) -> int:
        return self.opened(os.open(self.path, os.O_RDWR))

    def stream(self) -> int:
        return libc.fdopen(os.open(self.path, os.O_RDONLY), b"r")

    def address(self, data: bytes | int) -> int:
        """Of memory with these bytes, or so many, that stays for as long as this does."""
        kept = ctypes.create_string_buffer(data, len(data) if isinstance(data, bytes) else data)
        self.kept.append(kept)
        return ctypes.addressof(kept)

    def parts(self, at: int, n: int = N_BYTES) -> int:
        """Two parts: the first elsewhere."""
        return self.address(struct.pack("PNPN", self.address(8), 8, at, n))

    def socket(self, kind: int = socket.SOCK_DGRAM) -> int:
        """One from which something can be read."""
        near, far = socket.socketpair(socket.AF_UNIX, kind)
        far.send(b"a message" * 8)
        self.kept += [near, far]
        return near.fileno()

    def bound(self) -> int:
        """One that somebody with an address has sent something to."""
        near, far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        near.bind(("127.0.0.1", 0))
        far.bind(("127.0.0.1", 0))
        far.connect(near.getsockname())
        near.connect(far.getsockname())
        far.send(b"a message" * 8)
        self.kept += [near, far]
        return near.fileno()

    def listening(self) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        self.kept += [server, socket.create_connection(server.getsockname())]
        return server.fileno()

    def child(self) -> int:
        """A child that has ended."""
        pid = os.posix_spawn("/bin/true", ["true"], {})
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return pid

    def pending(self) -> int:
        """A set with the one signal that waits for the calling thread."""
        taken = signal.SIGRTMIN + 4
        signal.pthread_sigmask(signal.SIG_BLOCK, {taken})
        signal.pthread_kill(threading.get_ident(), taken)
        return self.address((1 << (taken - 1)).to_bytes(128, "little"))

    def epoll(self) -> int:
        poll = select.epoll()
        poll.register(self.socket(), select.EPOLLIN)
        self.kept.append(poll)
        return poll.fileno()

    def message(self, at: int, name: bool = False) -> int:
        """A struct msghdr: bytes, or else the sender's address, go to `at`."""
        place = self.address(128) if name else at
        return self.address(
            struct.pack(
                "PIxxxxPNPNixxxx",
                at if name else 0,
                64 if name else 0,
                self.parts(place),
                2,
                0,
                0,
                0,
            )
        )


def put(at: int, data: bytes) -> int:
    ctypes.memmove(at, data, len(data))
    return at


def descriptor_set(stage: Stage, at: int) -> tuple[int, int]:
    """A set with a descriptor that can be read and one that cannot: how many numbers, and where."""
    yes, no = stage.socket(), stage.opened(os.pipe()[0])
    bits = (1 << yes) | (1 << no)
    n_bytes = (max(yes, no) // 64 + 1) * 8
    put(at, bits.to_bytes(n_bytes, "little"))
    return n_bytes * 8, at


def size(stage: Stage, n: int = 64) -> int:
    return stage.address(struct.pack("I", n))


N = N_BYTES
DGRAM, STREAM = socket.SOCK_DGRAM, socket.SOCK_STREAM
Scenario = Callable[[Stage, int], tuple[int, ...]]

FILES: dict[str, Scenario] = {
    "read": lambda s, to: (s.file(), to, N),
    "__read_chk": lambda s, to: (s.file(), to, N, N),
    "pread": lambda s, to: (s.file(), to, N, 1),
    "pread64": lambda s, to: (s.file(), to, N, 1),
    "__pread_chk": lambda s, to: (s.file(), to, N, 1, N),
    "__pread64_chk": lambda s, to: (s.file(), to, N, 1, N),
    "readv": lambda s, to: (s.file(), s.parts(to), 2),
    "preadv": lambda s, to: (s.file(), s.parts(to), 2, 1),
    "preadv64": lambda s, to: (s.file(), s.parts(to), 2, 1),
    "preadv2": lambda s, to: (s.file(), s.parts(to), 2, 1, 0),
    "preadv64v2": lambda s, to: (s.file(), s.parts(to), 2, 1, 0),
    "fread": lambda s, to: (to, 1, N, s.stream()),
    "fread_unlocked": lambda s, to: (to, 1, N, s.stream()),
    "__fread_chk": lambda s, to: (to, N, 1, N, s.stream()),
    "__fread_unlocked_chk": lambda s, to: (to, N, 1, N, s.stream()),
    "fgets": lambda s, to: (to, N, s.stream()),
    "fgets_unlocked": lambda s, to: (to, N, s.stream()),
    "__fgets_chk": lambda s, to: (to, N, N, s.stream()),
    "__fgets_unlocked_chk": lambda s, to: (to, N, N, s.stream()),
    "getrandom": lambda s, to: (to, N, 0),
    "getentropy": lambda s, to: (to, N),
    "process_vm_readv": lambda s, to: (
        os.getpid(), s.parts(to), 2, s.address(struct.pack("PN", s.address(N), N)), 1, 0,
    ),
}  # fmt: skip

SOCKETS: dict[str, Scenario] = {
    "recv": lambda s, to: (s.socket(), to, N, 0),
    "__recv_chk": lambda s, to: (s.socket(), to, N, N, 0),
    "recvfrom": lambda s, to: (s.bound(), to, N, 0, s.address(64), size(s)),
    "recvfrom: address": lambda s, to: (s.bound(), s.address(N), N, 0, to, size(s)),
    "recvfrom: its size": lambda s, to: (
        s.bound(), s.address(N), N, 0, s.address(64), put(to, b"\x40\0\0\0"),
    ),
    "__recvfrom_chk": lambda s, to: (s.bound(), to, N, N, 0, s.address(64), size(s)),
    "recvmsg": lambda s, to: (s.bound(), s.message(to), 0),
    "recvmsg: address": lambda s, to: (s.bound(), s.message(to, name=True), 0),
    "recvmsg: itself": lambda s, to: (
        s.bound(), put(to, ctypes.string_at(s.message(s.address(64)), 56)), socket.MSG_TRUNC,
    ),
    "recvmmsg": lambda s, to: (
        s.bound(), s.address(ctypes.string_at(s.message(to), 56) + bytes(8)), 1, 0, 0,
    ),
    "recvmmsg: itself": lambda s, to: (
        s.bound(), put(to, ctypes.string_at(s.message(s.address(64)), 56) + bytes(8)), 1, 0, 0,
    ),
    "accept": lambda s, to: (s.listening(), to, size(s)),
    "accept4": lambda s, to: (s.listening(), to, size(s), 0),
    "getsockname": lambda s, to: (s.bound(), to, size(s)),
    "getpeername": lambda s, to: (s.bound(), to, size(s)),
    "getsockopt": lambda s, to: (s.socket(), SOL_SOCKET, SO_TYPE, to, size(s, 4)),
    "socketpair": lambda s, to: (socket.AF_UNIX, STREAM, 0, to),
    "msgrcv": lambda s, to: (message_queue(s), to, N, 0, 0),
    "mq_receive": lambda s, to: (posix_queue(s), to, N, 0),
    "mq_timedreceive": lambda s, to: (posix_queue(s), to, N, 0, 0),
}  # fmt: skip

READY: dict[str, Scenario] = {
    "poll": lambda s, to: (put(to, struct.pack("ihh", s.socket(), 1, 0)), 1, -1),
    "__poll_chk": lambda s, to: (put(to, struct.pack("ihh", s.socket(), 1, 0)), 1, -1, 8),
    "ppoll": lambda s, to: (put(to, struct.pack("ihh", s.socket(), 1, 0)), 1, 0, 0),
    "__ppoll_chk": lambda s, to: (put(to, struct.pack("ihh", s.socket(), 1, 0)), 1, 0, 0, 8),
    "select": lambda s, to: (*descriptor_set(s, to), 0, 0, 0),
    "pselect": lambda s, to: (*descriptor_set(s, to), 0, 0, 0, 0),
    "epoll_wait": lambda s, to: (s.epoll(), to, 1, -1),
    "epoll_pwait": lambda s, to: (s.epoll(), to, 1, -1, 0),
    "epoll_pwait2": lambda s, to: (s.epoll(), to, 1, 0, 0),
}

ABOUT_FILES: dict[str, Scenario] = {
    **{
        name: lambda s, to: (s.address(s.name), to)
        for name in ("stat", "stat64", "lstat", "lstat64", "statfs", "statfs64")
    },
    **{name: lambda s, to: (s.file(), to) for name in ("fstat", "fstat64", "fstatfs", "fstatfs64")},
    "fstatat": lambda s, to: (AT_FDCWD, s.address(s.name), to, 0),
    "fstatat64": lambda s, to: (AT_FDCWD, s.address(s.name), to, 0),
    "__xstat64": lambda s, to: (1, s.address(s.name), to),
    "__lxstat64": lambda s, to: (1, s.address(s.name), to),
    "__fxstat64": lambda s, to: (1, s.file(), to),
    "__fxstatat64": lambda s, to: (1, AT_FDCWD, s.address(s.name), to, 0),
    "statx": lambda s, to: (AT_FDCWD, s.address(s.name), 0, 0xFFF, to),
    "getdents64": lambda s, to: (s.opened(os.open(s.path.parent, os.O_RDONLY)), to, 512),
    "readlink": lambda s, to: (s.address(s.link), to, N),
    "__readlink_chk": lambda s, to: (s.address(s.link), to, N, N),
    "readlinkat": lambda s, to: (AT_FDCWD, s.address(s.link), to, N),
    "__readlinkat_chk": lambda s, to: (AT_FDCWD, s.address(s.link), to, N, N),
    "getcwd": lambda s, to: (to, 512),
    "__getcwd_chk": lambda s, to: (to, 512, 512),
    "getxattr": lambda s, to: (s.address(attributed(s)), s.address(b"user.a\0"), to, N),
    "lgetxattr": lambda s, to: (s.address(attributed(s)), s.address(b"user.a\0"), to, N),
    "fgetxattr": lambda s, to: (attributed(s) and s.file(), s.address(b"user.a\0"), to, N),
    "listxattr": lambda s, to: (s.address(attributed(s)), to, N),
    "llistxattr": lambda s, to: (s.address(attributed(s)), to, N),
    "flistxattr": lambda s, to: (attributed(s) and s.file(), to, N),
    "ioctl": lambda s, to: (s.file(), FIONREAD, to),
    "fcntl": lambda s, to: (s.file(), F_GETLK, put(to, struct.pack("hhqqi", 1, 0, 0, 0, 9))),
    "fcntl64": lambda s, to: (s.file(), F_GETLK, put(to, struct.pack("hhqqi", 1, 0, 0, 0, 9))),
    "pipe": lambda s, to: (to,),
    "pipe2": lambda s, to: (to, 0),
    "sendfile": lambda s, to: (s.opened(os.memfd_create("to")), s.file(), put(to, bytes(8)), N),
    "sendfile64": lambda s, to: (s.opened(os.memfd_create("to")), s.file(), put(to, bytes(8)), N),
    "splice": lambda s, to: (s.file(), put(to, bytes(8)), s.opened(os.pipe()[1]), 0, N, 0),
    "copy_file_range": lambda s, to: (
        s.file(), put(to, bytes(8)),
        s.opened(os.open(s.path.parent / "copy", os.O_RDWR | os.O_CREAT)), 0, N, 0,
    ),
}  # fmt: skip

PROCESSES: dict[str, Scenario] = {
    "wait": lambda s, to: s.child() and (to,),
    "waitpid": lambda s, to: (s.child(), to, 0),
    "wait3": lambda s, to: s.child() and (to, 0, 0),
    "wait4": lambda s, to: (s.child(), to, 0, 0),
    "wait4: usage": lambda s, to: (s.child(), 0, 0, to),
    "waitid": lambda s, to: s.child() and (P_ALL, 0, to, WEXITED),
    "sigtimedwait": lambda s, to: (s.pending(), to, s.address(struct.pack("qq", 60, 0))),
    "sigwaitinfo": lambda s, to: (s.pending(), to),
    "sigpending": lambda s, to: (to,),
    "nanosleep": lambda s, to: (s.address(struct.pack("qq", 0, 1)), to),
    "clock_nanosleep": lambda s, to: (1, 0, s.address(struct.pack("qq", 0, 1)), to),
    "getrusage": lambda s, to: (RUSAGE_SELF, to),
    "getrlimit": lambda s, to: (RLIMIT_NOFILE, to),
    "getrlimit64": lambda s, to: (RLIMIT_NOFILE, to),
    "prlimit": lambda s, to: (0, RLIMIT_NOFILE, 0, to),
    "prlimit64": lambda s, to: (0, RLIMIT_NOFILE, 0, to),
    "sysinfo": lambda s, to: (to,),
    "uname": lambda s, to: (to,),
    "getgroups": lambda s, to: (64, to),
    "mincore": lambda s, to: (to // mmap.PAGESIZE * mmap.PAGESIZE, mmap.PAGESIZE, to),
    "sigsuspend": lambda s, to: (put(to, bytes(128)),),
    "pthread_sigmask": lambda s, to: (signal.SIG_BLOCK, 0, to),
    "sigprocmask": lambda s, to: (signal.SIG_BLOCK, 0, to),
    "sigaction": lambda s, to: (signal.SIGUSR2, 0, to),
    "signal": lambda s, to: (signal.SIGUSR2, 0),
}

SCENARIOS = {**FILES, **SOCKETS, **READY, **ABOUT_FILES, **PROCESSES}
# They return when a signal comes, or write only then: that they write is not seen here.
UNSEEN = {"nanosleep", "clock_nanosleep", "getgroups"}
# Tell nothing: they are in the table for a mask, or a handler.
MASK_ONLY = {"sigsuspend", "signal"}


def attributed(stage: Stage) -> bytes:
    """The file, with an extended attribute; OSError where its file system has none."""
    os.setxattr(stage.path, "user.a", b"value")
    return stage.name


def message_queue(stage: Stage) -> int:
    queue = libc.msgget(0, 0o1600)
    libc.msgsnd(queue, ctypes.c_void_p(stage.address(struct.pack("l", 1) + b"x" * 16)), 16, 0)
    stage.queues.append(queue)
    return queue


def posix_queue(stage: Stage) -> int:
    name = b"/ksmcore-test-%d" % os.getpid()
    attributes = stage.address(struct.pack("llll", 0, 4, N, 0) + bytes(32))
    queue = libc.mq_open(name, os.O_RDWR | os.O_CREAT, 0o600, ctypes.c_void_p(attributes))
    libc.mq_unlink(name)
    libc.mq_send(queue, b"x" * 16, 16, 0)
    return stage.opened(queue) if queue >= 0 else queue
