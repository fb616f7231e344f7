/* Elementary functions in double precision from + - * / alone: no libm, so that rotary tables and
 * log-probabilities have the same bits on every machine. */
#ifndef EDGE_NUMBERS_H
#define EDGE_NUMBERS_H

/* Natural logarithm of a normal positive number, to about 1e-15. */
double number_log(double x);
/* exp(x) for |x| <= 700, to about 1e-15. */
double number_exp(double x);
/* sine and cosine for |x| < 2^20, to about 1e-12. */
void number_sincos(double x, double *sine, double *cosine);

#endif
