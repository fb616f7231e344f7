/* The lattice that a grid is a part of: which of its points are entries, and which entries are
 * nearest to the others. */
#ifndef EDGE_GRID_POINTS_H
#define EDGE_GRID_POINTS_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "formats.h"

enum { TERMS = 32 };

/* A point is a number to the base `levels`, a digit per weight, the first weight's highest. */
typedef struct {
    const uint16_t *entries; /* 8 weights of 3 levels or 4 of 8, as in formats.h */
    const int32_t *place;    /* of a point: the entry that it is, or ~ the start of its list */
    /* A list has its length, then entries, nearest first, equal distances by number. */
    const uint16_t *lists;
    /* Of every weight of every entry: code + TERMS / weights * position. */
    const uint8_t *term;
} grid_points;

/* Points whose lists reach to the entries of the `shells` smallest distances. One block of memory,
 * the struct at its start; NULL when there is none. */
grid_points *grid_points_new(const uint16_t *entries, int n_entries, int weights, int levels,
                             int shells);

static inline int grid_point(const int8_t *code, int weights, int levels) {
    int point = 0;
    for (int i = 0; i < weights; i++) {
        point = point * levels + code[i];
    }
    return point;
}

/* The bits of the code of weight i of an entry, 4 weights of 4 bits or 8 of 2. */
static inline int entry_code(uint16_t entry, int weights, int i) {
    const int bits = 16 / weights;
    return entry >> (bits * i) & ((1 << bits) - 1);
}

/* Several scales at a time: a lane is what one of them gives. */
enum { LANES = 4 };
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t lane_ints __attribute__((vector_size(4 * LANES)));

static inline lanes load_lanes(const float *p) {
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* The entry of a list that has the least sum of terms, added in the order of weights; the first of
 * equals, and of all if no sum is a number below FLT_MAX. */
static inline lane_ints least_entry(const grid_points *points, int weights, const uint16_t *list,
                                    const lanes term[TERMS]) {
    lanes least = (lanes){0} + FLT_MAX;
    lane_ints found = (lane_ints){0} + list[1];
    for (int j = 1; j <= list[0]; j++) {
        const uint8_t *which = points->term + (size_t)list[j] * (size_t)weights;
        lanes sum = term[which[0]];
        for (int i = 1; i < weights; i++) {
            sum += term[which[i]];
        }
        const lane_ints less = sum < least;
        least = (lanes)(((lane_ints)sum & less) | ((lane_ints)least & ~less));
        found ^= (found ^ list[j]) & less;
    }
    return found;
}

#endif
