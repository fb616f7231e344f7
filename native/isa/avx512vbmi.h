/* The vocabulary for AVX-512 with VNNI and VBMI, which of the CPUs with VNNI only servers of 2019
 * and 2020 lack: that of avx512vnni.h, but grids are looked up by a shuffle of bytes. */
#ifndef EDGE_ISA_AVX512VBMI_H
#define EDGE_ISA_AVX512VBMI_H

#define EDGE_AVX512VBMI
#include "isa/avx512vnni.h"

#endif
