/* Writes packed weights into panels and reads them back, a row and a block or group at a time. */
#ifndef EDGE_PANELS_H
#define EDGE_PANELS_H

#include "formats/formats.h"

/* Writes a decoded block as block j of row r of a panel with k columns. Rows and groups that
 * nothing is written to must be zero already. */
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

/* values[code]: what each code of a layout stands for, at most 256; returns how many there are. Not
 * for floats. */
int panel_values(int32_t layout, int32_t table, int8_t *values);

/* What a code is multiplied by, and what is added to the product (-0 where a layout has no minima):
 * from the floats of a block, and the integers of a group where a layout has them. Not for floats;
 * an integer of a grid is 2 s + 1. */
float code_scale(const layout_info *layout, int32_t table, uint16_t scale, int integer);
float code_min(const layout_info *layout, uint16_t min, int integer);

/* out[GROUP]: the values of row r, group g. Not for floats. */
void panel_get(const edge_weight *w, const uint8_t *panel, int r, int64_t g, float *out);

#endif
