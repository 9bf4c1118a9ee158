/* MurmurHash3 over whole pages: the 128-bit kind for 64-bit machines (Austin Appleby, public domain), with seed 0, of
 * which the low 32 bits are the checksum.
 *
 * Only _pages.pyx includes this file. Two states of 64 bits begin at the seed and take in 16 bytes at a time, a
 * little-endian word each. A word is scrambled by a multiplication, a rotation and a second multiplication before it is
 * xored into its state; the state is then rotated, has the other one added to it, and is scaled. The last 1 to 15 bytes
 * are scrambled and xored like a step of their own that was filled up with zeros, but the states are not stirred after
 * it. (Zeros scramble to zero, so the missing bytes do nothing.) In the end the length is xored into both states, each
 * takes in the other, both are mixed down bit by bit, and take in each other again.
 *
 * Loads go through memcpy or single bytes, so no pointer needs any alignment. */

#ifndef KSMCORE_MURMUR_H
#define KSMCORE_MURMUR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KSM_MURMUR_FIRST 0x87c37b91114253d5u
#define KSM_MURMUR_SECOND 0x4cf5ad432745937fu

static inline uint64_t ksm_rotate(uint64_t word, int by) { return word << by | word >> (64 - by); }

static inline uint64_t ksm_load_le64(const uint8_t *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/* The 16 bytes of a step, without the stirring. */
static inline void ksm_murmur_take(const uint8_t *bytes, uint64_t *a, uint64_t *b)
{
    *a ^= ksm_rotate(ksm_load_le64(bytes) * KSM_MURMUR_FIRST, 31) * KSM_MURMUR_SECOND;
    *b ^= ksm_rotate(ksm_load_le64(bytes + 8) * KSM_MURMUR_SECOND, 33) * KSM_MURMUR_FIRST;
}

/* Every bit of the word comes to bear on every bit of the result. */
static inline uint64_t ksm_murmur_mix_down(uint64_t word)
{
    word = (word ^ word >> 33) * 0xff51afd7ed558ccdu;
    word = (word ^ word >> 33) * 0xc4ceb9fe1a85ec53u;
    return word ^ word >> 33;
}

static inline uint32_t ksm_murmur(const uint8_t *data, size_t len_bytes)
{
    uint64_t a = 0, b = 0;
    size_t at = 0;
    for (; len_bytes - at >= 16; at += 16) {
        const uint64_t b_before = b;
        ksm_murmur_take(data + at, &a, &b);
        a = (ksm_rotate(a, 27) + b_before) * 5 + 0x52dce729;
        b = (ksm_rotate(b, 31) + a) * 5 + 0x38495ab5;
    }
    if (at < len_bytes) {
        uint8_t last[16] = {0};
        memcpy(last, data + at, len_bytes - at);
        ksm_murmur_take(last, &a, &b);
    }
    a ^= len_bytes;
    b ^= len_bytes;
    a += b;
    b += a;
    a = ksm_murmur_mix_down(a);
    b = ksm_murmur_mix_down(b);
    return (uint32_t)(a + b);
}

#endif
