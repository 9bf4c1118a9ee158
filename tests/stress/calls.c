/* Writers for the lost-write tests that write through system calls. Each message has a number of its own,
   so a write that is lost never looks like one that was not; its body is one of a few, so that pages are
   equal again and again. Compiled together with writers.c by the tests themselves.

   What is in memory is compared with a model: after each call, and again before the next one into the
   same place, because a write can also be lost after it was seen. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define HEADER_BYTES 512 /* what direct input is done in pieces of */
#define PIECE_BYTES 1500 /* what a stream is fed with at a time: one call then takes several */

extern volatile int writers_stopped;

/* PROCESS_VM_COLD: the page it copies from has to be mapped in again in the middle of the call. */
enum { PREAD, STREAM, DATAGRAM, SEQPACKET, PROCESS_VM, PROCESS_VM_COLD, PROC_MEM, PARTS, MESSAGE, PIPE, FREAD, DIRECT };

struct tally {
    uint64_t n_right;   /* calls that succeeded, with all that they say to have written in place */
    uint64_t n_failed;  /* with EFAULT, or what stands for it */
    uint64_t n_short;   /* of the right ones: those that wrote less than there was */
    uint64_t n_lost;    /* calls that succeeded, and not all is in place */
    uint64_t n_changed; /* times that other bytes were found in a slot than were left there */
    uint64_t n_astray;  /* calls that failed on a stream and took bytes from it */
    int64_t error;      /* errno that a call must not have; the run ended there */
};

struct run {
    int kind, fd, peer;
    FILE *file;
    uint64_t seed, n_message;
    size_t body_bytes, message_bytes;
    struct tally *tally;
    int64_t send_error; /* the sender's own, so that two threads never write to one place */
};

static uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Message number n: a header of its number, value and checksum, and a body of whole pages that follows from
   the value. Three in four values are one of four (one of them gives zeros), the others are unique. */
static void make_message(const struct run *run, uint64_t n, uint64_t *message) {
    uint64_t random = mixed(run->seed + n);
    uint64_t value = (random & 3) ? (random >> 40) % 4 : random;
    for (size_t k = 0; k < HEADER_BYTES / 8; k++) message[k] = value + 1;
    message[0] = n + 1;
    message[1] = value;
    message[2] = mixed(message[0] ^ mixed(value));
    uint64_t *body = message + HEADER_BYTES / 8;
    for (size_t k = 0; k < run->body_bytes / 8; k++) body[k] = value ? value + k : 0;
}

/* The sending thread: messages 0, 1, 2, ... until the receiver closes its end. */
static void *send_messages(void *argument) {
    struct run *run = argument;
    uint64_t *message = malloc(run->message_bytes);
    size_t piece = run->kind == STREAM ? PIECE_BYTES : run->message_bytes;
    ssize_t sent = message ? 0 : -1;
    for (uint64_t n = 0; sent >= 0; n++) {
        make_message(run, n, message);
        for (size_t from = 0; from < run->message_bytes && sent >= 0; from += (size_t)sent) {
            size_t left = run->message_bytes - from;
            if (run->kind == PIPE) sent = write(run->peer, (char *)message + from, left);
            else sent = send(run->peer, (char *)message + from, left < piece ? left : piece, MSG_NOSIGNAL);
        }
    }
    if (errno != EPIPE && errno != ECONNRESET && errno != ECONNREFUSED) {
        run->send_error = errno;
        shutdown(run->fd, SHUT_RDWR); /* or the receiver would wait for ever */
    }
    free(message);
    return NULL;
}

/* A file on a disk, with the first N_DIRECT messages, which are read again and again past the page cache. */
#define N_DIRECT 512
static int open_direct(struct run *run) {
    uint64_t *message = malloc(run->message_bytes);
    int fd = open("/var/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    char path[64];
    for (uint64_t n = 0; n < N_DIRECT && fd >= 0; n++) {
        make_message(run, n, message);
        if (pwrite(fd, message, run->message_bytes, (off_t)(n * run->message_bytes)) != (ssize_t)run->message_bytes)
            return -1;
    }
    free(message);
    if (fd < 0 || fsync(fd) != 0) return -1;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    run->fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    close(fd);
    return run->fd < 0 ? -1 : 0;
}

static int open_source(struct run *run, int source_fd) {
    static const int types[] = {[STREAM] = SOCK_STREAM, [DATAGRAM] = SOCK_DGRAM, [SEQPACKET] = SOCK_SEQPACKET,
                                [MESSAGE] = SOCK_DGRAM};
    int ends[2];
    if (run->kind == DIRECT) return open_direct(run);
    if (run->kind == FREAD) {
        run->file = fdopen(dup(source_fd), "r");
        return run->file ? setvbuf(run->file, NULL, _IONBF, 0) : -1;
    }
    if (run->kind == PIPE) {
        if (pipe2(ends, O_CLOEXEC) != 0) return -1;
        run->fd = ends[0];
        run->peer = ends[1];
        return 0;
    }
    if (run->kind == PREAD || run->kind == PARTS) return (run->fd = source_fd) < 0;
    if (run->kind == PROC_MEM) return (run->fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC)) < 0;
    if (run->kind == PROCESS_VM || run->kind == PROCESS_VM_COLD) return 0;
    if (socketpair(AF_UNIX, types[run->kind] | SOCK_CLOEXEC, 0, ends) != 0) return -1;
    run->fd = ends[0];
    run->peer = ends[1];
    return 0;
}

/* The system call: the rest of the message, from byte `from` on, to `target`. `message` lies in the memory
   file that is read from. */
static ssize_t call(struct run *run, char *message, size_t from, char *target) {
    size_t left = run->message_bytes - from;
    struct iovec here = {message + from, left}, there = {target + from, left};
    struct iovec parts[2] = {{target + from, left / 2}, {target + from + left / 2, left - left / 2}};
    struct msghdr header = {.msg_iov = parts, .msg_iovlen = 2};
    size_t got;
    switch (run->kind) {
    case PARTS: return preadv2(run->fd, parts, 2, (off_t)from, 0);
    case MESSAGE: return recvmsg(run->fd, &header, 0);
    case PIPE: return read(run->fd, target + from, left);
    case DIRECT:
        return pread(run->fd, target + from, left, (off_t)(run->n_message % N_DIRECT * run->message_bytes + from));
    case FREAD:
        if (fseek(run->file, (long)from, SEEK_SET) != 0) return -1;
        got = fread(target + from, 1, left, run->file);
        return got == 0 && ferror(run->file) ? -1 : (ssize_t)got;
    case PREAD: return pread(run->fd, target + from, left, (off_t)from);
    case PROCESS_VM_COLD: madvise(message, run->message_bytes, MADV_DONTNEED); /* fall through */
    case PROCESS_VM: return process_vm_writev(getpid(), &here, 1, &there, 1, 0);
    case PROC_MEM: return pwrite(run->fd, message + from, left, (off_t)(uintptr_t)(target + from));
    default: return recv(run->fd, target + from, left, 0);
    }
}

/* 1 when memory is not as the model has it, which then follows: a finding is counted once. */
static uint64_t has_changed(const char *now, char *model, size_t n) {
    if (memcmp(now, model, n) == 0) return 0;
    memcpy(model, now, n);
    return 1;
}

/* A call wrote `n` bytes of the message from `from` on, or so it says. Those must be in place. It may have
   begun to write what follows, too: there, each byte must be the old or the new one. */
static void settle(const struct run *run, const char *message, size_t from, size_t n, const char *target,
                   char *model) {
    size_t end = run->message_bytes;
    int changed = 0;
    if (n != 0 && memcmp(target + from, message + from, n) != 0) run->tally->n_lost++;
    else if (n != 0) run->tally->n_right++;
    if (n != 0 && from + n < end) run->tally->n_short++;
    memcpy(model + from, target + from, n);
    for (size_t i = from + n; i < end; i++) {
        char now = target[i];
        changed |= now != model[i] && now != message[i];
        model[i] = now;
    }
    run->tally->n_changed += (uint64_t)changed;
}

static ssize_t take_rest(struct run *run, char *spare, size_t left) {
    size_t got = 0;
    if (run->kind == STREAM) return recv(run->fd, spare, left, MSG_WAITALL);
    while (got < left) {
        ssize_t n = read(run->fd, spare + got, left - got);
        if (n <= 0) return -1;
        got += (size_t)n;
    }
    return (ssize_t)got;
}

/* Take one message into `target`; `spare` is for the bytes of a stream that a failed call left there.
   Returns 0, or the errno that must not be. */
static int take_message(struct run *run, char *message, char *target, char *model, char *spare) {
    size_t from = 0, left;
    do {
        ssize_t n = call(run, message, from, target);
        if (n == 0) return ENODATA;
        if (run->file) clearerr(run->file);
        if (n < 0 && errno != EFAULT && !(run->kind == PROC_MEM && errno == EIO)) return errno;
        settle(run, message, from, n > 0 ? (size_t)n : 0, target, model);
        if (n > 0) {
            from += (size_t)n;
            continue;
        }
        run->tally->n_failed++;
        if (run->kind != STREAM && run->kind != PIPE) return 0;
        /* The kernel leaves in the stream what it could not hand over; into plain memory the rest of the
           message always goes. Were it another rest, every later message would be off too: end there. */
        left = run->message_bytes - from;
        if (take_rest(run, spare, left) == (ssize_t)left && memcmp(spare, message + from, left) == 0)
            return 0;
        run->tally->n_astray++;
        return EPROTO;
    } while ((run->kind == STREAM || run->kind == PIPE) && from < run->message_bytes);
    return 0;
}

/* Messages into slots `thread`, `thread` + n_threads, ... of n_slots, until stopped. The header goes to the
   end of a slot's first page, the body is its other pages. */
void calls_run(int kind, char *pages, long n_slots, long page_bytes, long slot_pages, long thread,
               long n_threads, uint64_t seed, struct tally *tally) {
    size_t page = (size_t)page_bytes, slot_bytes = page * (size_t)slot_pages, at = page - HEADER_BYTES;
    struct run run = {kind, -1, -1, NULL, mixed(seed), 0, slot_bytes - page, slot_bytes - at, tally, 0};
    char *models = malloc((size_t)n_slots * slot_bytes), *spare = malloc(slot_bytes), *message = MAP_FAILED;
    int source_fd = memfd_create("ksmcore-test", MFD_CLOEXEC);
    int error = 0;
    pthread_t sender;
    if (source_fd >= 0 && ftruncate(source_fd, (off_t)slot_bytes) == 0)
        message = mmap(NULL, slot_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, source_fd, 0);
    if (!models || !spare || message == MAP_FAILED || open_source(&run, source_fd) != 0) error = errno;
    if (error == 0 && run.peer >= 0) error = pthread_create(&sender, NULL, send_messages, &run);
    if (error != 0) {
        /* Nothing is given back: the test is over. */
        tally->error = error;
        return;
    }
    memcpy(models, pages, (size_t)n_slots * slot_bytes);
    for (uint64_t n = 0; error == 0 && !writers_stopped; n++) {
        uint64_t random = mixed(run.seed ^ (n << 1));
        size_t slot = (random >> 8) % (uint64_t)(n_slots / n_threads) * (size_t)n_threads + (size_t)thread;
        char *target = pages + slot * slot_bytes, *model = models + slot * slot_bytes;
        run.n_message = n;
        make_message(&run, kind == DIRECT ? n % N_DIRECT : n, (uint64_t *)message);
        tally->n_changed += has_changed(target, model, slot_bytes);
        error = take_message(&run, message, target + at, model + at, spare);
        /* Mostly the header is wiped out by ordinary stores: this page becomes equal to others again. */
        if (random & 3) {
            for (size_t i = at; i < page; i += 8) *(volatile uint64_t *)(target + i) = 0;
            memset(model + at, 0, HEADER_BYTES);
        }
        tally->n_changed += has_changed(target, model, slot_bytes);
    }
    for (size_t slot = (size_t)thread; slot < (size_t)n_slots; slot += (size_t)n_threads)
        tally->n_changed += has_changed(pages + slot * slot_bytes, models + slot * slot_bytes, slot_bytes);
    if (run.fd >= 0 && run.fd != source_fd) close(run.fd);
    if (run.peer >= 0) {
        pthread_join(sender, NULL); /* ended by the close of its peer */
        close(run.peer);
    }
    tally->error = error ? error : run.send_error;
    if (run.file) fclose(run.file);
    munmap(message, slot_bytes);
    close(source_fd);
    free(models);
    free(spare);
}

/* Keep the lock of the memory map busy, as a program that allocates much does: the scanner then waits inside
   of its windows, and writers meet them much more often, even on one processor. */
void calls_jam(void) {
    size_t n_bytes = 4u << 20;
    char *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return;
    madvise(memory, n_bytes, MADV_NOHUGEPAGE); /* a thousand entries to change, not two */
    memset(memory, 1, n_bytes);
    while (!writers_stopped) {
        mprotect(memory, n_bytes, PROT_READ);
        mprotect(memory, n_bytes, PROT_READ | PROT_WRITE);
        usleep(50);
    }
    munmap(memory, n_bytes);
}
