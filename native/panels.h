/* Panels, one row and one block or group at a time: plain code for packing and for reading rows. */
#ifndef EDGE_PANELS_H
#define EDGE_PANELS_H

#include "formats/formats.h"

/* Row r of block j of a panel of k, from a decoded block. Padding rows and groups must be zero
 * already. */
void panel_put(int32_t layout, uint8_t *panel, int64_t k, int64_t j, int r,
               const decoded_block *in);
void panel_put_grid(int32_t layout, uint8_t *panel, int64_t k, int64_t j, int r,
                    const decoded_grid *in);

/* A group of a row as integers: value k is scale[k / 16] * code[k] + min[k / 16], each operation
 * rounded. The unit of the type's table is in the scale; min is -0 where a type has none, which
 * changes no bit of a sum. */
typedef struct {
    float scale[2], min[2];
    int8_t code[GROUP];
} group_codes;

/* Row r, group g. Not for floats. */
void panel_codes(const edge_weight *w, const uint8_t *panel, int r, int64_t g, group_codes *out);

/* What the codes of a layout stand for, one after the other: values, at most 256; returns how many.
 * Not for floats. */
int panel_values(int32_t layout, int32_t table, int8_t *values);

/* out[GROUP]: the values of row r, group g. Not for floats. */
void panel_get(const edge_weight *w, const uint8_t *panel, int r, int64_t g, float *out);

#endif
