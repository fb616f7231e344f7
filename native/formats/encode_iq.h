/* The encoders of the IQ types; what they are is said in formats.h. */
#ifndef EDGE_ENCODE_IQ_H
#define EDGE_ENCODE_IQ_H

#include "formats.h"

void choose_iq4_xs(const encode_input *in, decoded_block *out);
void choose_iq1_s(const encode_input *in, decoded_block *out);
void choose_iq1_m(const encode_input *in, decoded_block *out);
void choose_iq2_xxs(const encode_input *in, decoded_grid *out);
void choose_iq2_xs(const encode_input *in, decoded_grid *out);
void choose_iq2_s(const encode_input *in, decoded_grid *out);
void choose_iq3_xxs(const encode_input *in, decoded_grid *out);
void choose_iq3_s(const encode_input *in, decoded_grid *out);

void store_iq4_xs(const decoded_block *in, uint8_t *block);
void store_iq1_s(const decoded_block *in, uint8_t *block);
void store_iq1_m(const decoded_block *in, uint8_t *block);
void store_iq2_xxs(const decoded_grid *in, uint8_t *block);
void store_iq2_xs(const decoded_grid *in, uint8_t *block);
void store_iq2_s(const decoded_grid *in, uint8_t *block);
void store_iq3_xxs(const decoded_grid *in, uint8_t *block);
void store_iq3_s(const decoded_grid *in, uint8_t *block);

/* Of a super-block. */
static inline float sum_of_squares(const float *x) {
    float sum = 0;
    for (int i = 0; i < SUPER; i++) {
        sum += x[i] * x[i];
    }
    return sum;
}

void *tables_iq1(void);
void *tables_iq2_xxs(void);
void *tables_iq2_xs(void);
void *tables_iq2_s(void);
void *tables_iq3_xxs(void);
void *tables_iq3_s(void);

#endif
