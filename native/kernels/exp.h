/* exp of 16 lanes, from fma alone: the same bits on every machine.
 *
 * exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2, Taylor to r^7 (5e-9 relative).
 * Clamped to [-87.3, 88.3], where the result and 2^n are normal numbers. */
#ifndef EDGE_KERNELS_EXP_H
#define EDGE_KERNELS_EXP_H

#include "kernels/isa.h"

INLINE vf vf_exp(vf x) {
    /* In this order a NaN passes on, see vf_max. */
    x = vf_min(vf_set1(88.3f), vf_max(vf_set1(-87.3f), x));
    const vi n = vi_round(vf_mul(x, vf_set1(1.44269504f)));
    const vf whole = vf_from_int(n);
    vf r = vf_fma(whole, vf_set1(-0.693145751953125f), x); /* ln 2 in two parts */
    r = vf_fma(whole, vf_set1(-1.42860677e-6f), r);
    vf p = vf_set1(1.0f / 5040);
    p = vf_fma(p, r, vf_set1(1.0f / 720));
    p = vf_fma(p, r, vf_set1(1.0f / 120));
    p = vf_fma(p, r, vf_set1(1.0f / 24));
    p = vf_fma(p, r, vf_set1(1.0f / 6));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_mul(p, vf_pow2(n));
}

INLINE vf vf_tanh(vf x) {
    const vf e = vf_exp(vf_add(x, x)), one = vf_set1(1.0f);
    return vf_div(vf_sub(e, one), vf_add(e, one));
}

#endif
