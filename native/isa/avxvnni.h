/* The vocabulary for AVX2 with AVX-VNNI, which small x86 boards have without AVX-512: that of
 * avx2.h, but dot products of four bytes are one instruction. */
#ifndef EDGE_ISA_AVXVNNI_H
#define EDGE_ISA_AVXVNNI_H

#define EDGE_AVXVNNI
#include "isa/avx2.h"

#endif
