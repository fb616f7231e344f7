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

/* out[GROUP]: the values of row r, group g. Not for floats. */
void panel_get(const edge_weight *w, const uint8_t *panel, int r, int64_t g, float *out);

#endif
