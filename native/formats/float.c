/* Elements that are floats already: F32, F16, BF16. */
#include <stddef.h>

#include "formats.h"

const format_info formats_float[] = {
    {0, 1, 4, EDGE_LAYOUT_F32, EDGE_TABLE_NONE, .decode = NULL},
    {1, 1, 2, EDGE_LAYOUT_F16, EDGE_TABLE_NONE, .decode = NULL},
    {30, 1, 2, EDGE_LAYOUT_BF16, EDGE_TABLE_NONE, .decode = NULL},
    {0},
};
