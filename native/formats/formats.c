#include "formats.h"

#include <stddef.h>

const format_info *format_find(int32_t type) {
    for (int32_t i = 0; i < n_formats_legacy; i++) {
        if (formats_legacy[i].type == type) {
            return &formats_legacy[i];
        }
    }
    for (int32_t i = 0; i < n_formats_float; i++) {
        if (formats_float[i].type == type) {
            return &formats_float[i];
        }
    }
    return NULL;
}
