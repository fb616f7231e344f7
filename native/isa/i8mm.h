/* The vocabulary for 64-bit ARM with products of matrices of bytes (phones from 2022 on, Apple M2):
 * that of neon.h, but dot products of two rows and two columns are one instruction. */
#ifndef EDGE_ISA_I8MM_H
#define EDGE_ISA_I8MM_H

#define EDGE_DOTPROD
#define EDGE_I8MM
#include "isa/neon.h"

#endif
