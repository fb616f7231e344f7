#include "error.h"

#include <stdarg.h>
#include <stdio.h>

int32_t fail(edge_error *error, int32_t code, const char *format, ...) {
    if (error != NULL) {
        error->code = code;
        error->op = -1;
        error->row = -1;
        error->column = -1;
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error->text, sizeof error->text, format, arguments);
        va_end(arguments);
    }
    return code;
}

int32_t fail_element(edge_error *error, int64_t row, int64_t column, const char *what) {
    fail(error, EDGE_BAD_DATA, "row %lld, column %lld %s", (long long)row, (long long)column, what);
    if (error != NULL) {
        error->row = row;
        error->column = column;
    }
    return EDGE_BAD_DATA;
}
