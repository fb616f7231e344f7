/* The plan check: once for each plan, so that ops need no checks of their own. */
#ifndef EDGE_CHECK_H
#define EDGE_CHECK_H

#include "api.h"

/* Checks what the ops assume: indices, kinds, dims, layouts, arena bounds. EDGE_BAD_PLAN: error->op
 * is the op that is wrong, -1 when it is none of them. */
int32_t plan_check(const edge_plan_spec *spec, edge_error *error);

#endif
