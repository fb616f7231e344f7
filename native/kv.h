/* The KV cache: pages of PAGE_POSITIONS positions, all layers of a group and their key heads
 * together.
 *
 * page = [n_layers][n_kv_heads] x { keys | values | q4: base }
 *
 * Keys are 4 panels of 16 positions, in a layout of layouts.h with k = head_dim: a lane is a
 * position, so a score needs no horizontal sum, just as in a matmul panel.
 *
 * Values are stored by position, because attention multiplies each of them with one number:
 *   f16   f16 [64][head_dim]
 *   q8    per 32 elements: | f16 scale[64] | i8 code[64][32] |
 *   q4    | f16 scale[64] per block | u8 code[head_dim / 32][64][16] |   byte i: code of element i
 *         of the 32 low, of element 16 + i high nibble; a block is as in kernels/store.c
 *
 * q4 rotates heads by a Hadamard matrix. The base of a page has two vectors of head_dim codes: the
 * mean key of the page before, and the direction of queries; most queries have a similar direction.
 * The codes of a key hold the key minus the mean. `missed`, 16 bits per key, is the error of these
 * codes in the direction of queries.
 *
 *   base  | f16 missed[64] | f16 scale[2][head_dim / 32] | i8 code[2][head_dim] |
 *   key = mean + codes + missed * direction
 *
 * Bits per number, for heads of 64 and 128: q8 8.5, 8.5; q4 4.69, 4.53. */
#ifndef EDGE_KV_H
#define EDGE_KV_H

#include "api.h"
#include "layouts.h"

typedef struct {
    const char *name;
    int32_t layout, table; /* of the keys */
    int bits;              /* of a value */
    bool based;            /* rotated, and relative to a base */
} kv_type_info;

/* In a header, so that the compiler knows the type when it compiles a kernel. */
static const kv_type_info kv_type_table[EDGE_N_KV_TYPES] = {
    [EDGE_KV_F16] = {"f16", EDGE_LAYOUT_F16, EDGE_TABLE_NONE, 16, false},
    [EDGE_KV_Q8] = {"q8", EDGE_LAYOUT_C8H32, EDGE_TABLE_NONE, 8, false},
    [EDGE_KV_Q4] = {"q4", EDGE_LAYOUT_C4H32, EDGE_TABLE_IQ4_NL, 4, true},
};

/* Elements that a Hadamard matrix rotates together: the largest power of two that divides
 * head_dim. */
static inline int32_t kv_block(int32_t head_dim) { return head_dim & -head_dim; }

/* Elements of a value that share a scale. */
static inline int32_t kv_value_group(int32_t type, int32_t head_dim) {
    return kv_type_table[type].based ? kv_block(head_dim) : GROUP;
}

/* Bytes of such a group for all positions of a page, scales included. */
static inline int64_t kv_group_bytes(int32_t type, int32_t head_dim) {
    const int bits = kv_type_table[type].bits;
    const int32_t group = kv_value_group(type, head_dim);
    return PAGE_POSITIONS * (bits == 16 ? 2 * group : 2 + group * bits / 8);
}

/* Offsets in bytes from the start of a layer and head: of its values, of its base, and of its
 * end. */
static inline int64_t kv_values_at(int32_t type, int32_t head_dim) {
    return PAGE_POSITIONS / PANEL_ROWS * panel_bytes(kv_type_table[type].layout, head_dim);
}
static inline int64_t kv_base_at(int32_t type, int32_t head_dim) {
    const int32_t n_groups = head_dim / kv_value_group(type, head_dim);
    return kv_values_at(type, head_dim) + (kv_type_table[type].bits == 16
                                               ? 2 * (int64_t)PAGE_POSITIONS * head_dim
                                               : n_groups * kv_group_bytes(type, head_dim));
}
static inline int64_t kv_head_bytes(int32_t type, int32_t head_dim) {
    const int64_t base = 2 * (PAGE_POSITIONS + 2 * head_dim / GROUP) + 2 * (int64_t)head_dim;
    return kv_base_at(type, head_dim) + (kv_type_table[type].based ? (base + 63) / 64 * 64 : 0);
}

/* The base of a page for one layer and head. */
typedef struct {
    uint16_t *missed, *scale;
    int8_t *code;
} kv_base;

static inline kv_base kv_base_of(const void *place, int32_t type, int32_t head_dim) {
    uint16_t *missed = (uint16_t *)((uintptr_t)place + (uintptr_t)kv_base_at(type, head_dim));
    uint16_t *scale = missed + PAGE_POSITIONS;
    return (kv_base){missed, scale, (int8_t *)(scale + 2 * head_dim / GROUP)};
}

/* The first page behind the sinks that a position in page i sees. */
static inline int32_t kv_first_page(const edge_kv_group *kv, int32_t i) {
    return kv->window_pages > 0 && i >= kv->window_pages ? i - kv->window_pages + 1 : 0;
}

#endif
