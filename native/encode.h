/* An encoder: a format, and what its search looks up. */
#ifndef EDGE_ENCODE_H
#define EDGE_ENCODE_H

#include "formats/formats.h"

struct edge_encoder {
    const format_info *format;
    void *tables;
};

#endif
