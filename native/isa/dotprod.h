/* The vocabulary for 64-bit ARM with dot products of bytes (Cortex-A55, A76 and later): that of
 * neon.h, but dot products of four bytes are one instruction. */
#ifndef EDGE_ISA_DOTPROD_H
#define EDGE_ISA_DOTPROD_H

#define EDGE_DOTPROD
#include "isa/neon.h"

#endif
