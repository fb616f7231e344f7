/* Filling an edge_error. */
#ifndef EDGE_ERROR_H
#define EDGE_ERROR_H

#include <stdint.h>

#include "api.h"

/* Fills *error (which may be NULL) and returns code. */
__attribute__((format(printf, 3, 4))) int32_t fail(edge_error *error, int32_t code,
                                                   const char *format, ...);

#endif
