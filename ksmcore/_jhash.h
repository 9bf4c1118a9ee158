/* jhash over whole pages: Bob Jenkins' lookup3 (public domain), one page at a time and many side by side.
 *
 * Only _pages.pyx includes this file. It owns the arithmetic; which kernel runs is decided there, at run time.
 *
 * lookup3 in short. Three 32-bit words a, b, c start at 0xdeadbeef + length + initval. The bytes are read as
 * little-endian words; while more than 12 bytes are left, the next three words are added to a, b, c and the three are
 * mixed. The last 1 to 12 bytes, padded with zeros to three words, are added and `final` mixes instead; c is the
 * digest. Nothing to add (length 0) means that c is returned as it started.
 *
 * Why the side-by-side kernels give the same digests as the scalar one. A step of lookup3 is made of 32-bit additions,
 * subtractions, xors and rotations by constants, and which step comes next depends on the length alone, never on the
 * data. Pages of one length therefore go through the same sequence of steps. Vector lane i holds the a, b and c of page
 * i; lane arithmetic is modulo 2**32 and never crosses lanes; so lane i computes what the scalar code computes for page
 * i, provided it is fed the same words. LOAD_4X4 feeds them: it reads four consecutive words of every page and
 * transposes them, so that vector k has word k of page i in lane i. The last step is read from a copy padded with zero
 * bytes; that is the padding of the definition, and words beyond it are not used at all.
 *
 * Loads go through memcpy or unaligned load instructions, so no pointer needs any alignment. */

#ifndef KSMCORE_JHASH_H
#define KSMCORE_JHASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KSM_JHASH_INITVAL 17u /* what KSM passes for a page */
#define KSM_JHASH_SEED 0xdeadbeefu

/* Both work on plain words and on vectors of words alike. */
#define KSM_ROTL(x, k) (((x) << (k)) | ((x) >> (32 - (k))))

#define KSM_JHASH_MIX(a, b, c)                                                                                         \
    do {                                                                                                               \
        a -= c, a ^= KSM_ROTL(c, 4), c += b;                                                                           \
        b -= a, b ^= KSM_ROTL(a, 6), a += c;                                                                           \
        c -= b, c ^= KSM_ROTL(b, 8), b += a;                                                                           \
        a -= c, a ^= KSM_ROTL(c, 16), c += b;                                                                          \
        b -= a, b ^= KSM_ROTL(a, 19), a += c;                                                                          \
        c -= b, c ^= KSM_ROTL(b, 4), b += a;                                                                           \
    } while (0)

#define KSM_JHASH_FINAL(a, b, c)                                                                                       \
    do {                                                                                                               \
        c ^= b, c -= KSM_ROTL(b, 14);                                                                                  \
        a ^= c, a -= KSM_ROTL(c, 11);                                                                                  \
        b ^= a, b -= KSM_ROTL(a, 25);                                                                                  \
        c ^= b, c -= KSM_ROTL(b, 16);                                                                                  \
        a ^= c, a -= KSM_ROTL(c, 4);                                                                                   \
        b ^= a, b -= KSM_ROTL(a, 14);                                                                                  \
        c ^= b, c -= KSM_ROTL(b, 24);                                                                                  \
    } while (0)

/* ---- one page: the reference, right for every length, alignment and byte order ---- */

static inline uint32_t ksm_load_le32(const uint8_t *bytes)
{
    /* Compilers turn this into one load (and a byte swap where the machine is big-endian). */
    return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static uint32_t ksm_jhash(const uint8_t *bytes, size_t len_bytes, uint32_t initval)
{
    uint32_t a = KSM_JHASH_SEED + (uint32_t)len_bytes + initval, b = a, c = a;
    uint8_t last[12] = {0};

    if (len_bytes == 0)
        return c;
    while (len_bytes > 12) {
        a += ksm_load_le32(bytes);
        b += ksm_load_le32(bytes + 4);
        c += ksm_load_le32(bytes + 8);
        KSM_JHASH_MIX(a, b, c);
        bytes += 12;
        len_bytes -= 12;
    }
    memcpy(last, bytes, len_bytes);
    a += ksm_load_le32(last);
    b += ksm_load_le32(last + 4);
    c += ksm_load_le32(last + 8);
    KSM_JHASH_FINAL(a, b, c);
    return c;
}

static void ksm_jhash_pages_scalar(const uint8_t *const *pages, size_t n_pages, size_t len_bytes, uint32_t *digests)
{
    for (size_t i = 0; i < n_pages; i++)
        digests[i] = ksm_jhash(pages[i], len_bytes, KSM_JHASH_INITVAL);
}

/* ---- many pages side by side ---- */

/* Vector lanes hold words in the machine's byte order, so the kernels below are for little-endian machines; others
 * have the scalar one. */
#if (defined(__GNUC__) || defined(__clang__)) && defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define KSM_JHASH_HAS_GENERIC 1
#if defined(__x86_64__)
#define KSM_JHASH_HAS_AVX2 1
#define KSM_JHASH_HAS_AVX512 1
#endif
#endif

#ifdef KSM_JHASH_HAS_GENERIC

/* Three words enter a mix and a load brings four, so a step takes 12 words: three loads, four mixes. */
#define KSM_STEP_BYTES 48

/* A kernel carries one or two sets of vectors. Six dependent operations per mix leave the processor waiting for
 * results; a second, independent set fills that time where vectors are short. Where they are 32 bytes long, one set is
 * already at memory speed and a second would only run out of registers. DO gets the number of the set first. */
#define KSM_ONE_SET(DO, ...) DO(0, __VA_ARGS__)
#define KSM_TWO_SETS(DO, ...) DO(0, __VA_ARGS__) DO(1, __VA_ARGS__)

#define KSM_DECLARE(s, VEC, start) VEC a##s = (VEC){0} + (start), b##s = a##s, c##s = a##s, w##s[12];

#define KSM_LOAD_STEP(s, LANES, LOAD_4X4, pages, at)                                                                  \
    LOAD_4X4(w##s[0], w##s[1], w##s[2], w##s[3], (pages) + s * (LANES), (at));                                        \
    LOAD_4X4(w##s[4], w##s[5], w##s[6], w##s[7], (pages) + s * (LANES), (at) + 16);                                   \
    LOAD_4X4(w##s[8], w##s[9], w##s[10], w##s[11], (pages) + s * (LANES), (at) + 32);

#define KSM_FEED_MIX(s, k)                                                                                            \
    a##s += w##s[(k)], b##s += w##s[(k) + 1], c##s += w##s[(k) + 2];                                                  \
    KSM_JHASH_MIX(a##s, b##s, c##s);

#define KSM_FEED_FINAL(s, k)                                                                                          \
    a##s += w##s[(k)], b##s += w##s[(k) + 1], c##s += w##s[(k) + 2];                                                  \
    KSM_JHASH_FINAL(a##s, b##s, c##s);

#define KSM_STORE(s, LANES, digests) memcpy((digests) + s * (LANES), &c##s, sizeof c##s);

/* Defines NAME(pages, n_pages, len_bytes, digests), and NAME_group for N_SETS * LANES pages of one byte or more.
 *
 * In NAME_group, `at` bytes of every page have been mixed and at least one byte is left, as lookup3 wants it: the last
 * words must go to `final`. In NAME, a last group that is not full is filled up with repetitions of its last page: a
 * whole group costs about as much as two or three pages one by one. */
#define KSM_JHASH_KERNEL(NAME, TARGET, VEC, LANES, N_SETS, EACH_SET, LOAD_4X4, LONG_STEPS)                            \
    TARGET static void NAME##_group(const uint8_t *const *pages, size_t len_bytes, uint32_t *digests)                 \
    {                                                                                                                 \
        uint8_t last[(N_SETS) * (LANES)][KSM_STEP_BYTES] = {{0}};                                                     \
        const uint8_t *last_pages[(N_SETS) * (LANES)];                                                                \
        size_t at = 0, k = 0;                                                                                         \
        EACH_SET(KSM_DECLARE, VEC, KSM_JHASH_SEED + (uint32_t)len_bytes + KSM_JHASH_INITVAL)                          \
                                                                                                                      \
        LONG_STEPS(pages, len_bytes, at)                                                                              \
        for (; len_bytes - at > KSM_STEP_BYTES; at += KSM_STEP_BYTES) {                                               \
            EACH_SET(KSM_LOAD_STEP, LANES, LOAD_4X4, pages, at)                                                       \
            EACH_SET(KSM_FEED_MIX, 0)                                                                                 \
            EACH_SET(KSM_FEED_MIX, 3)                                                                                 \
            EACH_SET(KSM_FEED_MIX, 6)                                                                                 \
            EACH_SET(KSM_FEED_MIX, 9)                                                                                 \
        }                                                                                                             \
        for (size_t i = 0; i < (N_SETS) * (LANES); i++) {                                                             \
            memcpy(last[i], pages[i] + at, len_bytes - at);                                                           \
            last_pages[i] = last[i];                                                                                  \
        }                                                                                                             \
        EACH_SET(KSM_LOAD_STEP, LANES, LOAD_4X4, last_pages, 0)                                                       \
        for (; len_bytes - at > 12; at += 12, k += 3) {                                                               \
            EACH_SET(KSM_FEED_MIX, k)                                                                                 \
        }                                                                                                             \
        EACH_SET(KSM_FEED_FINAL, k)                                                                                   \
        EACH_SET(KSM_STORE, LANES, digests)                                                                           \
    }                                                                                                                 \
                                                                                                                      \
    static void NAME(const uint8_t *const *pages, size_t n_pages, size_t len_bytes, uint32_t *digests)                \
    {                                                                                                                 \
        enum { GROUP = (N_SETS) * (LANES) };                                                                          \
        const uint8_t *filled_up[GROUP];                                                                              \
        uint32_t group_digests[GROUP];                                                                                \
        size_t done = 0, n_rest;                                                                                      \
                                                                                                                      \
        if (len_bytes != 0)                                                                                           \
            for (; n_pages - done >= GROUP; done += GROUP)                                                            \
                NAME##_group(pages + done, len_bytes, digests + done);                                                \
        n_rest = n_pages - done;                                                                                      \
        if (len_bytes == 0 || n_rest <= 2) {                                                                          \
            ksm_jhash_pages_scalar(pages + done, n_rest, len_bytes, digests + done);                                  \
            return;                                                                                                   \
        }                                                                                                             \
        for (size_t i = 0; i < GROUP; i++)                                                                            \
            filled_up[i] = pages[done + (i < n_rest ? i : n_rest - 1)];                                               \
        NAME##_group(filled_up, len_bytes, group_digests);                                                            \
        memcpy(digests + done, group_digests, n_rest * sizeof *digests);                                              \
    }

#define KSM_NO_LONG_STEPS(pages, len_bytes, at)

/* Four lanes in 16 bytes: SSE2, which every x86-64 has, and NEON, which every aarch64 has. */
typedef uint32_t ksm_v4 __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define KSM_PICK(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
#define KSM_PICK(x, y, i, j, k, l) __builtin_shuffle(x, y, (ksm_v4){i, j, k, l})
#endif

#define KSM_LOAD_4X4_V4(w0, w1, w2, w3, pages, at)                                                                    \
    do {                                                                                                              \
        ksm_v4 p0, p1, p2, p3, t0, t1, t2, t3;                                                                        \
        memcpy(&p0, (pages)[0] + (at), sizeof p0);                                                                    \
        memcpy(&p1, (pages)[1] + (at), sizeof p1);                                                                    \
        memcpy(&p2, (pages)[2] + (at), sizeof p2);                                                                    \
        memcpy(&p3, (pages)[3] + (at), sizeof p3);                                                                    \
        t0 = KSM_PICK(p0, p1, 0, 4, 1, 5);                                                                            \
        t1 = KSM_PICK(p2, p3, 0, 4, 1, 5);                                                                            \
        t2 = KSM_PICK(p0, p1, 2, 6, 3, 7);                                                                            \
        t3 = KSM_PICK(p2, p3, 2, 6, 3, 7);                                                                            \
        w0 = KSM_PICK(t0, t1, 0, 1, 4, 5);                                                                            \
        w1 = KSM_PICK(t0, t1, 2, 3, 6, 7);                                                                            \
        w2 = KSM_PICK(t2, t3, 0, 1, 4, 5);                                                                            \
        w3 = KSM_PICK(t2, t3, 2, 3, 6, 7);                                                                            \
    } while (0)

KSM_JHASH_KERNEL(ksm_jhash_pages_generic, , ksm_v4, 4, 2, KSM_TWO_SETS, KSM_LOAD_4X4_V4,
                 KSM_NO_LONG_STEPS)

#endif /* KSM_JHASH_HAS_GENERIC */

/* OP: what the instructions' names begin with; LOAD fills a vector of type REG from every fourth page. */
#define KSM_LOAD_4X4_WIDE(OP, REG, VEC, LOAD, w0, w1, w2, w3, pages, at)                                              \
    do {                                                                                                              \
        REG p0 = LOAD(pages, 0, at), p1 = LOAD(pages, 1, at), p2 = LOAD(pages, 2, at), p3 = LOAD(pages, 3, at);       \
        REG t0 = OP##_unpacklo_epi32(p0, p1), t1 = OP##_unpacklo_epi32(p2, p3);                                       \
        REG t2 = OP##_unpackhi_epi32(p0, p1), t3 = OP##_unpackhi_epi32(p2, p3);                                       \
        w0 = (VEC)OP##_unpacklo_epi64(t0, t1);                                                                        \
        w1 = (VEC)OP##_unpackhi_epi64(t0, t1);                                                                        \
        w2 = (VEC)OP##_unpacklo_epi64(t2, t3);                                                                        \
        w3 = (VEC)OP##_unpackhi_epi64(t2, t3);                                                                        \
    } while (0)

#ifdef KSM_JHASH_HAS_AVX2
#include <immintrin.h>

/* Eight lanes in 32 bytes. The two halves of a vector are loaded from page i and page i + 4, so that instructions which
 * work on each half by itself transpose two 4x4 squares at once and leave the pages in order. */
typedef uint32_t ksm_v8 __attribute__((vector_size(32)));

#define KSM_LOAD_HALVES(pages, i, at)                                                                                 \
    _mm256_inserti128_si256(                                                                                          \
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)((pages)[i] + (at)))),                                \
        _mm_loadu_si128((const __m128i *)((pages)[(i) + 4] + (at))), 1)

#define KSM_LOAD_4X4_V8(w0, w1, w2, w3, pages, at)                                                                    \
    KSM_LOAD_4X4_WIDE(_mm256, __m256i, ksm_v8, KSM_LOAD_HALVES, w0, w1, w2, w3, pages, at)

KSM_JHASH_KERNEL(ksm_jhash_pages_avx2, __attribute__((target("avx2"))), ksm_v8, 8, 1, KSM_ONE_SET, KSM_LOAD_4X4_V8,
                 KSM_NO_LONG_STEPS)

#endif /* KSM_JHASH_HAS_AVX2 */

#ifdef KSM_JHASH_HAS_AVX512

/* Sixteen lanes in 64 bytes, the same way: the quarters of a vector come from the pages i, i + 4, i + 8 and i + 12.
 * Besides being twice as wide, AVX-512 rotates with one instruction where AVX2 needs three. */
typedef uint32_t ksm_v16 __attribute__((vector_size(64)));

#define KSM_LOAD_QUARTER(pages, i, at) _mm_loadu_si128((const __m128i *)((pages)[i] + (at)))

#define KSM_LOAD_QUARTERS(pages, i, at)                                                                               \
    _mm512_inserti32x4(                                                                                               \
        _mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(KSM_LOAD_QUARTER(pages, i, at)),                 \
                                              KSM_LOAD_QUARTER(pages, (i) + 4, at), 1),                               \
                           KSM_LOAD_QUARTER(pages, (i) + 8, at), 2),                                                  \
        KSM_LOAD_QUARTER(pages, (i) + 12, at), 3)

#define KSM_LOAD_4X4_V16(w0, w1, w2, w3, pages, at)                                                                   \
    KSM_LOAD_4X4_WIDE(_mm512, __m512i, ksm_v16, KSM_LOAD_QUARTERS, w0, w1, w2, w3, pages, at)

/* Pages are a multiple of 4 KiB apart, so the lines of sixteen pages at one place fall into one set of the first cache,
 * which has room for eight or twelve. Where a line is read in pieces, with other pages in between, every piece is
 * fetched anew. So a long step takes whole lines, three of each page, which are sixteen mixes. */
#define KSM_LINE_BYTES 64
#define KSM_LONG_BYTES (3 * KSM_LINE_BYTES)

/* The next line of sixteen pages: w[k] gets its word k, page i in lane i. */
__attribute__((target("avx512f"))) static inline void ksm_load_lines(ksm_v16 *w, const uint8_t *const *pages, size_t at)
{
    __m512i r[16], t[16];

    for (int i = 0; i < 16; i++)
        r[i] = _mm512_loadu_si512(pages[i] + at);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    /* Then r[i + j] has word j of each quarter line of the pages i to i + 3. */
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* Quarters are gathered in two steps: first the even and the odd ones of eight pages, then each of sixteen. */
    for (int j = 0; j < 4; j++) {
        __m512i even_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        __m512i even_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        __m512i odd_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        w[j] = (ksm_v16)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
        w[4 + j] = (ksm_v16)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        w[8 + j] = (ksm_v16)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        w[12 + j] = (ksm_v16)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

#define KSM_LONG_STEPS_V16(pages, len_bytes, at)                                                                      \
    for (; len_bytes - at > KSM_LONG_BYTES; at += KSM_LONG_BYTES) {                                                   \
        ksm_v16 line[48];                                                                                             \
        ksm_load_lines(line, pages, at);                                                                              \
        ksm_load_lines(line + 16, pages, at + KSM_LINE_BYTES);                                                        \
        ksm_load_lines(line + 32, pages, at + 2 * KSM_LINE_BYTES);                                                    \
        for (int word = 0; word < 48; word += 3) {                                                                    \
            a0 += line[word], b0 += line[word + 1], c0 += line[word + 2];                                             \
            KSM_JHASH_MIX(a0, b0, c0);                                                                                \
        }                                                                                                             \
    }

KSM_JHASH_KERNEL(ksm_jhash_pages_avx512, __attribute__((target("avx512f"))), ksm_v16, 16, 1, KSM_ONE_SET,
                 KSM_LOAD_4X4_V16, KSM_LONG_STEPS_V16)

#endif /* KSM_JHASH_HAS_AVX512 */

/* ---- which kernels this machine has, best first; valid for i < KSM_N_KERNELS ---- */

typedef void (*ksm_pages_kernel_t)(const uint8_t *const *pages, size_t n_pages, size_t len_bytes, uint32_t *digests);

enum { KSM_N_KERNELS = 4 };

static const char *const ksm_kernel_names[KSM_N_KERNELS] = {"avx512", "avx2", "generic", "scalar"};

/* NULL: not compiled for this architecture, or this processor cannot run it. */
static ksm_pages_kernel_t ksm_kernel(int i)
{
    switch (i) {
#ifdef KSM_JHASH_HAS_AVX512
    case 0:
        return __builtin_cpu_supports("avx512f") ? ksm_jhash_pages_avx512 : NULL;
#endif
#ifdef KSM_JHASH_HAS_AVX2
    case 1:
        return __builtin_cpu_supports("avx2") ? ksm_jhash_pages_avx2 : NULL;
#endif
#ifdef KSM_JHASH_HAS_GENERIC
    case 2:
        return ksm_jhash_pages_generic;
#endif
    case 3:
        return ksm_jhash_pages_scalar;
    default:
        return NULL;
    }
}

#endif /* KSMCORE_JHASH_H */
