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
