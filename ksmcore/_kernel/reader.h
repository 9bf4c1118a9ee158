/* Reading memory that may go away. Included by reader.pyx and by those that read.

   A thread that is about to read a page of the program leaves a place to return to. If the page faults,
   the handler of SIGSEGV or SIGBUS (segv.h) sends it there. The reading code in between holds no lock and
   keeps no state, so nothing is lost by leaving it. No other handler runs on the thread meanwhile, so a fault
   is always one of the reading. */

#ifndef KSMCORE_READER_H
#define KSMCORE_READER_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* One thread that reads. `back` is set only while it does. */
typedef struct {
    uint32_t tid; /* 0: free */
    sigjmp_buf *volatile back;
} ksm_reader;

#define KSM_FENCE() __atomic_signal_fence(__ATOMIC_SEQ_CST)

/* Run `work` with a place to return to; 1 when it faulted and was left. The handler puts the signal mask
   right, so that nothing of it need be saved here. */
#define KSM_READ(reader, work)                                   \
    __extension__({                                              \
        sigjmp_buf here_;                                        \
        int faulted_ = sigsetjmp(here_, 0);                      \
        if (!faulted_) {                                         \
            (reader)->back = &here_;                             \
            KSM_FENCE();                                         \
            work;                                                \
            KSM_FENCE();                                         \
            (reader)->back = NULL;                               \
        }                                                        \
        faulted_;                                                \
    })

typedef void (*ksm_checksum)(const uint8_t *const *pages, size_t n_pages, size_t len_bytes, uint32_t *digests);

/* memcmp; 1 when a page went away. */
static inline int ksm_read_compare(ksm_reader *reader, const uint8_t *a, const uint8_t *b, size_t len_bytes) {
    volatile int order = 1;
    if (KSM_READ(reader, order = memcmp(a, b, len_bytes))) return 1;
    return order;
}

static inline int ksm_read_copy(ksm_reader *reader, void *target, const void *source, size_t len_bytes) {
    return KSM_READ(reader, memcpy(target, source, len_bytes));
}

/* 1: a page went away, and the digests are not all there. */
static inline int ksm_read_checksum(ksm_reader *reader, ksm_checksum checksum, const uint8_t *const *pages,
                                    size_t n_pages, size_t len_bytes, uint32_t *digests) {
    return KSM_READ(reader, checksum(pages, n_pages, len_bytes, digests));
}

#endif
