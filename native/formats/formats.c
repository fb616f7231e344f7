#include "formats.h"

#include <stddef.h>

const format_info *format_find(int32_t type) {
    static const format_info *const families[] = {formats_float, formats_legacy, formats_k,
                                                  formats_iq, formats_ternary};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        for (const format_info *f = families[i]; f->block != 0; f++) {
            if (f->type == type) {
                return f;
            }
        }
    }
    return NULL;
}
