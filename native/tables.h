/* What codes stand for: facts of the formats. */
#ifndef EDGE_TABLES_H
#define EDGE_TABLES_H

#include <stdint.h>

/* value = unit * (shifted[code] - zero). Unsigned bytes, because the dot products of x86 multiply
 * unsigned by signed; max, their largest, says how many products fit 16 bits. zero is a power of
 * two, 1 << zero_shift, or 0 with zero_shift -1. */
typedef struct {
    uint8_t shifted[16];
    int32_t zero, zero_shift, max;
    float unit;
} code_table;

/* By edge_table. */
extern const code_table code_tables[];

#endif
