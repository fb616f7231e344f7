/* exp of 16 lanes and what is made of it, from fma alone: the same bits on every machine. A NaN
 * passes on. */
#ifndef EDGE_KERNELS_EXP_H
#define EDGE_KERNELS_EXP_H

#include "kernels/isa.h"

/* x = n ln 2 + r, n whole, |r| <= ln(2) / 2; x is clamped to [-87.3, 88.3], where exp(x) and 2^n
 * are normal numbers. tail: (exp(r) - 1 - r) / r^2, Taylor to r^5, so that exp(r) has the terms to
 * r^7 (5e-9 relative). */
typedef struct {
    vi n;
    vf r, tail;
} exp_parts;

INLINE exp_parts exp_parts_of(vf x) {
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
    return (exp_parts){n, r, p};
}

INLINE vf vf_exp(vf x) {
    const exp_parts e = exp_parts_of(x);
    vf p = vf_fma(e.tail, e.r, vf_set1(1.0f));
    p = vf_fma(p, e.r, vf_set1(1.0f));
    return vf_mul(p, vf_pow2(e.n));
}

/* exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1): near 0, where n is 0, nothing cancels. */
INLINE vf vf_expm1(vf x) {
    const exp_parts e = exp_parts_of(x);
    const vf p = vf_fma(vf_mul(e.r, e.r), e.tail, e.r), scale = vf_pow2(e.n);
    return vf_fma(scale, p, vf_sub(scale, vf_set1(1.0f)));
}

/* tanh(x) = (exp(2 x) - 1) / (exp(2 x) + 1). */
INLINE vf vf_tanh(vf x) {
    const vf e = vf_expm1(vf_add(x, x));
    return vf_div(e, vf_add(e, vf_set1(2.0f)));
}

/* The normal distribution's cumulative function at -a, (1 - erf(a / sqrt(2))) / 2, 0 <= a <= 13.2:
 * exp(-a^2 / 2) times a polynomial in q = (a - 4) / (a + 4) over (a + 4), fitted for a small
 * relative error (2e-8). */
INLINE vf vf_normal_tail(vf a) {
    static const float fitted[] = {
        0.755285144f,    -0.607896626f,   0.387136906f,   -0.186522946f,   0.0604041107f,
        -0.00752863707f, -0.00351668056f, 0.00157528487f, 0.000190489664f, -0.000127145307f};
    const vf below = vf_div(vf_set1(1.0f), vf_add(a, vf_set1(4.0f)));
    const vf q = vf_mul(vf_sub(a, vf_set1(4.0f)), below);
    vf p = vf_set1(fitted[9]);
    UNROLL for (int i = 8; i >= 0; i--) { p = vf_fma(p, q, vf_set1(fitted[i])); }
    /* a^2 / 2 as a sum of two numbers: exp would multiply what rounding takes from it */
    const vf half = vf_mul(a, vf_set1(0.5f)), square = vf_mul(half, a);
    const vf minus = vf_sub(vf_zero(), square), left = vf_fma(half, a, minus);
    const vf e = vf_exp(minus);
    return vf_mul(vf_mul(p, below), vf_sub(e, vf_mul(e, left)));
}

#endif
