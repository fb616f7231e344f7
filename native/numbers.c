#include "numbers.h"

#include <float.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "excess precision would change the bits of results: compile for SSE2, not for x87"
#endif

static const double LN2_HIGH = 0x1.62e42fee00000p-1, LN2_LOW = 0x1.a39ef35793c76p-33;

/* To the nearest whole number, |x| < 2^51. */
static double nearest(double x) { return x + 0x1.8p52 - 0x1.8p52; }

/* x = m 2^e with m in [sqrt(1/2), sqrt(2)); log m = 2 (s + s^3 / 3 + ...), s = (m - 1) / (m + 1).
 */
double number_log(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    int exponent = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffff) | 0x3ff0000000000000;
    double m;
    memcpy(&m, &bits, 8);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        exponent++;
    }
    const double s = (m - 1) / (m + 1), s2 = s * s;
    double sum = 0;
    for (int i = 25; i >= 1; i -= 2) {
        sum = sum * s2 + 1.0 / i;
    }
    return exponent * LN2_HIGH + (2 * s * sum + exponent * LN2_LOW);
}

double number_exp(double x) {
    const double n = nearest(x * 1.4426950408889634);
    const double r = x - n * LN2_HIGH - n * LN2_LOW;
    double sum = 1;
    for (int i = 18; i >= 1; i--) {
        sum = 1 + sum * r / i;
    }
    const uint64_t bits = (uint64_t)((int64_t)n + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return sum * power;
}

/* pi / 2 in three parts (as in fdlibm): n times each of the first two is exact for n < 2^20. */
static const double HALF_PI_1 = 1.57079632673412561417e+00, HALF_PI_2 = 6.07710050630396597660e-11,
                    HALF_PI_3 = 2.02226624879595063154e-21;

void number_sincos(double x, double *sine, double *cosine) {
    const double n = nearest(x * 0.63661977236758134308);
    const double r = x - n * HALF_PI_1 - n * HALF_PI_2 - n * HALF_PI_3, r2 = r * r;
    double s = 1, c = 1; /* Taylor, |r| <= pi / 4 */
    for (int i = 18; i >= 2; i -= 2) {
        s = 1 - s * r2 / (i * (i + 1));
        c = 1 - c * r2 / (i * (i - 1));
    }
    s *= r;
    switch ((int64_t)n & 3) {
    case 0: *sine = s, *cosine = c; break;
    case 1: *sine = c, *cosine = -s; break;
    case 2: *sine = -s, *cosine = -c; break;
    default: *sine = -c, *cosine = s; break;
    }
}
