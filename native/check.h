/* The plan check. */
#ifndef EDGE_CHECK_H
#define EDGE_CHECK_H

#include "api.h"

/* Proves what the ops assume: indices, kinds, dims, layouts, arena bounds. */
int32_t plan_check(const edge_plan_spec *spec, edge_error *error);

#endif
