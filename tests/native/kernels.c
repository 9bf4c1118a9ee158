/* Every kernel of the checksum that is compiled here and that this processor can run, against the scalar one.
   For architectures that the Python tests do not run on: see "make neon". */

#include <stdio.h>
#include <stdlib.h>

#include "../../ksmcore/_jhash.h"

enum { MOST_PAGES = 70, PAGE_BYTES = 4096, UNALIGNED = 3 };

static uint32_t next_random(void)
{
    static uint64_t state = 42; /* an LCG with Knuth's MMIX constants: the same on every machine */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static int differs(ksm_pages_kernel_t kernel, const uint8_t *const *pages, size_t n_pages, size_t len_bytes)
{
    uint32_t digests[MOST_PAGES + 1], expected;
    digests[n_pages] = 0x5ca1ab1e;
    kernel(pages, n_pages, len_bytes, digests);
    for (size_t i = 0; i < n_pages; i++) {
        expected = ksm_jhash(pages[i], len_bytes, KSM_JHASH_INITVAL);
        if (digests[i] != expected) return 1;
    }
    return digests[n_pages] != 0x5ca1ab1e;
}

int main(void)
{
    static uint8_t memory[MOST_PAGES * PAGE_BYTES + UNALIGNED];
    const uint8_t *pages[MOST_PAGES];
    int n_kernels = 0;
    for (size_t i = 0; i < sizeof memory; i++) memory[i] = (uint8_t)next_random();
    /* "hash" of Bob Jenkins' driver (lookup3.c, driver5): hashlittle("Four score and seven years ago", 30, 0). */
    if (ksm_jhash((const uint8_t *)"Four score and seven years ago", 30, 0) != 0x17770551) {
        puts("scalar: not lookup3");
        return 1;
    }
    for (int k = 0; k < KSM_N_KERNELS; k++) {
        ksm_pages_kernel_t kernel = ksm_kernel(k);
        if (!kernel) continue;
        for (size_t n_pages = 1; n_pages <= MOST_PAGES; n_pages++) {
            for (size_t i = 0; i < n_pages; i++) {
                pages[i] = memory + (next_random() % MOST_PAGES) * PAGE_BYTES + next_random() % (UNALIGNED + 1);
            }
            if (differs(kernel, pages, n_pages, PAGE_BYTES) || differs(kernel, pages, n_pages, 1 + next_random() % 500)) {
                printf("%s: differs for %zu pages\n", ksm_kernel_names[k], n_pages);
                return 1;
            }
        }
        printf("%s: as the scalar one\n", ksm_kernel_names[k]);
        n_kernels++;
    }
    return n_kernels < 2; /* the scalar one alone proves nothing */
}
