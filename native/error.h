/* Filling an edge_error. */
#ifndef EDGE_ERROR_H
#define EDGE_ERROR_H

#include <stdatomic.h>
#include <stdint.h>

#include "api.h"

/* Fills *error (which may be NULL) and returns code. */
__attribute__((format(printf, 3, 4))) int32_t fail(edge_error *error, int32_t code,
                                                   const char *format, ...);
/* Fills *error for one element of the data: "row 3, column 5 " and what it is. Returns
 * EDGE_BAD_DATA. */
int32_t fail_element(edge_error *error, int64_t row, int64_t column, const char *what);

/* Threads report elements; the smallest is kept. -1: none yet. */
static inline void report_element(_Atomic int64_t *first, int64_t element) {
    int64_t seen = atomic_load(first);
    while ((seen < 0 || element < seen) && !atomic_compare_exchange_weak(first, &seen, element)) {
    }
}

#endif
