/* The loaded objects of the process, and what they call: their tables of addresses (GOT), and the symbols by
   which addresses are looked up. Included by redirect.pyx only.

   An entry is known by its value, not by its name: whoever has the address of the function gets the hook's, and
   whoever has another one (a library's own `read`, put before the C library's) keeps it. So nothing is remembered of
   any object, which may be unloaded at any time, and putting back is the same walk the other way round.

   Entries that are not bound yet, objects loaded later and dlsym() find their address by the symbol: that is changed
   too, in the object that defines the function. The caller holds the redirect lock, and the loader that of its list
   while it calls back. */

#ifndef KSMCORE_OBJECTS_H
#define KSMCORE_OBJECTS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <linux/futex.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define OBJECTS_IS_ENTRY(type) ((type) == R_X86_64_JUMP_SLOT || (type) == R_X86_64_GLOB_DAT || (type) == R_X86_64_64)
#elif defined(__aarch64__)
#define OBJECTS_IS_ENTRY(type) \
    ((type) == R_AARCH64_JUMP_SLOT || (type) == R_AARCH64_GLOB_DAT || (type) == R_AARCH64_ABS64)
#endif

/* Address -> the address to be in its place. Open addressing, never more than half full. */
#define OBJECTS_PAIRS 1024
typedef struct {
    uintptr_t from[OBJECTS_PAIRS], to[OBJECTS_PAIRS];
    uintptr_t lo, hi; /* all of `from` lie in [lo, hi] */
    uint32_t n;
} objects_map;

static uint32_t objects_place(const objects_map *map, uintptr_t from) {
    uint32_t at = (uint32_t)((from >> 4) * 0x9e3779b97f4a7c15u >> 54);
    while (map->from[at] && map->from[at] != from) at = (at + 1) % OBJECTS_PAIRS;
    return at;
}

static void objects_map_clear(objects_map *map) {
    memset(map, 0, sizeof *map);
    map->lo = UINTPTR_MAX;
}

static void objects_map_add(objects_map *map, uintptr_t from, uintptr_t to) {
    uint32_t at = objects_place(map, from);
    if (!from || (!map->from[at] && map->n == OBJECTS_PAIRS / 2)) return;
    map->n += !map->from[at];
    map->from[at] = from;
    map->to[at] = to;
    if (from < map->lo) map->lo = from;
    if (from > map->hi) map->hi = from;
}

/* What is to be in place of this; 0: it is to stay. */
static uintptr_t objects_new(const objects_map *map, uintptr_t from) {
    if (from < map->lo || from > map->hi) return 0;
    return map->to[objects_place(map, from)];
}

typedef struct {
    const objects_map *map;
    const objects_map *homes;  /* for symbols: objects that hold one of these addresses define the functions */
    const char *ours;          /* a prefix of the paths of our own modules, which are left alone */
    int insist;                /* also objects that seem to be in the middle of being loaded */
    uint32_t n_entries, n_symbols, n_objects, n_unready, n_refused;
    uint64_t n_loads;          /* of objects, ever */
} objects_walk;

typedef struct {
    uintptr_t base, lo, hi;           /* hi: the end of its last segment */
    uintptr_t relro_lo, relro_hi;     /* made read-only once it is loaded */
    const ElfW(Dyn) *dynamic;
    const ElfW(Rela) *rela, *jmprel;
    size_t n_rela, n_relative, n_jmprel;
    ElfW(Sym) *symbols;
    const uint32_t *gnu_hash;
} objects_one;

/* Pointers of the dynamic section are addresses in most objects, and offsets in some (the kernel's). */
static uintptr_t objects_pointer(const objects_one *one, uintptr_t value) {
    return value < one->base ? one->base + value : value;
}

static const ElfW(Phdr) *objects_segment(const struct dl_phdr_info *info, uintptr_t addr) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        if (segment->p_type == PT_LOAD && addr - info->dlpi_addr - segment->p_vaddr < segment->p_memsz) return segment;
    }
    return (const ElfW(Phdr) *)0;
}

static void objects_read(const struct dl_phdr_info *info, objects_one *one) {
    uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    size_t jmprel_bytes = 0, rela_bytes = 0, jmprel_kind = DT_RELA;
    memset(one, 0, sizeof *one);
    one->base = info->dlpi_addr;
    one->lo = UINTPTR_MAX;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        uintptr_t at = one->base + segment->p_vaddr;
        if (segment->p_type == PT_DYNAMIC) one->dynamic = (const ElfW(Dyn) *)at;
        if (segment->p_type == PT_LOAD && at < one->lo) one->lo = at;
        if (segment->p_type == PT_LOAD && at + segment->p_memsz > one->hi) one->hi = at + segment->p_memsz;
        if (segment->p_type == PT_GNU_RELRO) {
            one->relro_lo = at & ~(page_bytes - 1);
            one->relro_hi = (at + segment->p_memsz) & ~(page_bytes - 1);
        }
    }
    if (!one->dynamic) return;
    for (const ElfW(Dyn) *entry = one->dynamic; entry->d_tag != DT_NULL; entry++) {
        uintptr_t value = entry->d_un.d_val;
        switch (entry->d_tag) {
        case DT_JMPREL: one->jmprel = (const ElfW(Rela) *)objects_pointer(one, value); break;
        case DT_PLTRELSZ: jmprel_bytes = value; break;
        case DT_PLTREL: jmprel_kind = value; break;
        case DT_RELA: one->rela = (const ElfW(Rela) *)objects_pointer(one, value); break;
        case DT_RELASZ: rela_bytes = value; break;
        case DT_RELACOUNT: one->n_relative = value; break;
        case DT_SYMTAB: one->symbols = (ElfW(Sym) *)objects_pointer(one, value); break;
        case DT_GNU_HASH: one->gnu_hash = (const uint32_t *)objects_pointer(one, value); break;
        }
    }
    if (one->jmprel && jmprel_kind == DT_RELA) one->n_jmprel = jmprel_bytes / sizeof(ElfW(Rela));
    if (one->rela) one->n_rela = rela_bytes / sizeof(ElfW(Rela));
}

/* Could this word be written just now? Adds zero to it, in the kernel, which says EFAULT and raises no signal. */
static int objects_writable(uintptr_t addr) {
    uint32_t dummy = 0;
    int op = FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, 0);
    return syscall(SYS_futex, &dummy, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0, (void *)0, (uint32_t *)addr, op) >= 0;
}

/* Change the entries of one table. *opened: its read-only part was made writable. 0: that is refused. */
static int objects_change(objects_walk *walk, const struct dl_phdr_info *info, const objects_one *one,
                          const ElfW(Rela) *all, size_t n, int *opened) {
    for (size_t i = 0; i < n; i++) {
        uintptr_t at = one->base + all[i].r_offset, was, wanted;
        const ElfW(Phdr) *segment;
        if (!OBJECTS_IS_ENTRY(ELF64_R_TYPE(all[i].r_info)) || at % sizeof(uintptr_t)) continue;
        was = __atomic_load_n((uintptr_t *)at, __ATOMIC_RELAXED);
        wanted = objects_new(walk->map, was);
        if (!wanted) continue;
        segment = objects_segment(info, at);
        if (!segment || !(segment->p_flags & PF_W)) continue;
        if (at >= one->relro_lo && at < one->relro_hi && !*opened) {
            if (mprotect((void *)one->relro_lo, one->relro_hi - one->relro_lo, PROT_READ | PROT_WRITE) != 0) return 0;
            *opened = 1;
        }
        walk->n_entries += __atomic_compare_exchange_n((uintptr_t *)at, &was, wanted, 0, __ATOMIC_SEQ_CST,
                                                       __ATOMIC_RELAXED);
    }
    return 1;
}

/* Symbols of an object, from its hash table; those before the first hashed one are of other objects. */
static uint32_t objects_n_symbols(const uint32_t *hash) {
    uint32_t n_buckets = hash[0], first = hash[1], bloom_words = hash[2], last = 0;
    const uint32_t *buckets = hash + 4 + bloom_words * (sizeof(uintptr_t) / 4), *chain = buckets + n_buckets;
    for (uint32_t i = 0; i < n_buckets; i++)
        if (buckets[i] > last) last = buckets[i];
    if (last < first) return 0;
    while (!(chain[last - first] & 1)) last++;
    return last + 1;
}

/* Change what the symbols of an object say, if it is one that defines the functions, and the table of symbols lies
   where no code does. */
static void objects_change_symbols(objects_walk *walk, const struct dl_phdr_info *info, const objects_one *one) {
    uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE), lo, hi;
    const ElfW(Phdr) *segment;
    uint32_t n, n_found = 0;
    for (uint32_t i = 0; i < OBJECTS_PAIRS; i++)
        n_found += walk->homes->from[i] >= one->lo && walk->homes->from[i] < one->hi;
    segment = objects_segment(info, (uintptr_t)one->symbols);
    if (!n_found || !one->symbols || !one->gnu_hash || !segment || segment->p_flags & (PF_X | PF_W)) return;
    n = objects_n_symbols(one->gnu_hash);
    lo = (uintptr_t)one->symbols & ~(page_bytes - 1);
    hi = ((uintptr_t)(one->symbols + n) + page_bytes - 1) & ~(page_bytes - 1);
    if (mprotect((void *)lo, hi - lo, PROT_READ | PROT_WRITE) != 0) {
        walk->n_refused++;
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        ElfW(Sym) *symbol = &one->symbols[i];
        uintptr_t wanted = objects_new(walk->map, one->base + symbol->st_value);
        if (!wanted || symbol->st_shndx == SHN_UNDEF || ELF64_ST_TYPE(symbol->st_info) != STT_FUNC) continue;
        __atomic_store_n(&symbol->st_value, wanted - one->base, __ATOMIC_RELEASE);
        walk->n_symbols++;
    }
    /* Unchecked: it would stay writable, which nobody needs. */
    mprotect((void *)lo, hi - lo, PROT_READ);
}

static int objects_visit(struct dl_phdr_info *info, size_t size, void *data) {
    objects_walk *walk = (objects_walk *)data;
    objects_one one;
    int was_open, opened;
    (void)size;
    walk->n_loads = info->dlpi_adds;
    if (walk->ours[0] && info->dlpi_name && !strncmp(info->dlpi_name, walk->ours, strlen(walk->ours))) return 0;
    objects_read(info, &one);
    if (!one.dynamic) return 0;
    walk->n_objects++;
    was_open = opened = one.relro_lo < one.relro_hi && objects_writable(one.relro_lo);
    /* The loader still writes there, and would meet what we make read-only again. */
    if (was_open && !walk->insist) {
        walk->n_unready++;
        return 0;
    }
    if (one.n_relative > one.n_rela) one.n_relative = 0;
    if (!objects_change(walk, info, &one, one.jmprel, one.n_jmprel, &opened) ||
        !objects_change(walk, info, &one, one.rela + one.n_relative, one.n_rela - one.n_relative, &opened))
        walk->n_refused++;
    /* Unchecked: what stays writable is what any object without this protection has. */
    if (opened && !was_open) mprotect((void *)one.relro_lo, one.relro_hi - one.relro_lo, PROT_READ);
    objects_change_symbols(walk, info, &one);
    return 0;
}

static int objects_count(struct dl_phdr_info *info, size_t size, void *data) {
    (void)size;
    *(uint64_t *)data = info->dlpi_adds;
    return 1;
}

/* Objects loaded so far, ever: when it has grown there are new ones. */
static uint64_t objects_n_loads(void) {
    uint64_t n = 0;
    dl_iterate_phdr(objects_count, &n);
    return n;
}

#endif
