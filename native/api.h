/* edge.h for our own files: it can hold no #include, #pragma or guard, since cffi reads it. */
#ifndef EDGE_API_H
#define EDGE_API_H

#include <stdint.h>

#pragma GCC visibility push(default)
#include "edge.h"
#pragma GCC visibility pop

#endif
