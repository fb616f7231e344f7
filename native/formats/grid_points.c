#include "grid_points.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_ENTRIES = 2048, MAX_HALVES = 81, MAX_DISTANCE = 4 * 7 * 7 };

/* What is known while the lists are made. */
typedef struct {
    const uint16_t *entries;
    int n_entries, weights, levels, shells;
    int n_halves; /* points of half the weights */
    /* Squared distances of those from the codes in a byte, which is half an entry. */
    uint8_t from_half[MAX_HALVES][256];
    /* From the point at hand: those of the entries, which there are, and that of the last shell. */
    uint8_t distance[MAX_ENTRIES];
    bool seen[MAX_DISTANCE + 1];
    int last;
} builder;

static void measure_halves(builder *b) {
    for (int half = 0; half < b->n_halves; half++) {
        for (int byte = 0; byte < 256; byte++) {
            int sum = 0, rest = half;
            for (int i = b->weights / 2 - 1; i >= 0; i--, rest /= b->levels) {
                const int difference = rest % b->levels - entry_code((uint16_t)byte, b->weights, i);
                sum += difference * difference;
            }
            b->from_half[half][byte] = (uint8_t)sum;
        }
    }
}

static void measure(builder *b, int point) {
    const uint8_t *low = b->from_half[point / b->n_halves];
    const uint8_t *high = b->from_half[point % b->n_halves];
    memset(b->seen, 0, sizeof b->seen);
    for (int j = 0; j < b->n_entries; j++) {
        b->distance[j] = (uint8_t)(low[b->entries[j] & 255] + high[b->entries[j] >> 8]);
        b->seen[b->distance[j]] = true;
    }
    b->last = 0;
    for (int d = 1, shells = 0; d <= MAX_DISTANCE && shells < b->shells; d++) {
        if (b->seen[d]) {
            b->last = d;
            shells++;
        }
    }
}

/* Elements of the list of the point at hand, with its length. */
static size_t list_size(const builder *b) {
    size_t n = 1;
    for (int j = 0; j < b->n_entries; j++) {
        n += b->distance[j] <= b->last;
    }
    return n;
}

static void fill_list(const builder *b, uint16_t *list) {
    list[0] = 0;
    for (int distance = 1; distance <= b->last; distance++) {
        for (int j = 0; j < b->n_entries && b->seen[distance]; j++) {
            if (b->distance[j] == distance) {
                list[++list[0]] = (uint16_t)j;
            }
        }
    }
}

/* Entries into place, and ~ the starts of the lists of all others; returns the size of the lists.
 */
static size_t place_points(builder *b, int n_points, int32_t *place) {
    size_t size = 0;
    for (int point = 0; point < n_points; point++) {
        place[point] = -1;
    }
    for (int j = 0; j < b->n_entries; j++) {
        int8_t code[8];
        for (int i = 0; i < b->weights; i++) {
            code[i] = (int8_t)entry_code(b->entries[j], b->weights, i);
        }
        place[grid_point(code, b->weights, b->levels)] = j;
    }
    for (int point = 0; point < n_points; point++) {
        if (place[point] < 0) {
            place[point] = ~(int32_t)size;
            measure(b, point);
            size += list_size(b);
        }
    }
    return size;
}

grid_points *grid_points_new(const uint16_t *entries, int n_entries, int weights, int levels,
                             int shells) {
    builder b = {.entries = entries,
                 .n_entries = n_entries,
                 .weights = weights,
                 .levels = levels,
                 .shells = shells,
                 .n_halves = 1};
    for (int i = 0; i < weights / 2; i++) {
        b.n_halves *= levels;
    }
    measure_halves(&b);
    const int n_points = b.n_halves * b.n_halves;
    const size_t n_terms = (size_t)n_entries * (size_t)weights;
    const size_t places = sizeof(grid_points) + (size_t)n_points * sizeof(int32_t);
    grid_points *points = malloc(places + n_terms);
    if (points == NULL) {
        return NULL;
    }
    const size_t size = place_points(&b, n_points, (int32_t *)(points + 1));
    grid_points *whole = realloc(points, places + size * sizeof(uint16_t) + n_terms);
    if (whole == NULL) {
        free(points);
        return NULL;
    }
    int32_t *place = (int32_t *)(whole + 1);
    uint16_t *lists = (uint16_t *)(place + n_points);
    uint8_t *term = (uint8_t *)(lists + size);
    for (int point = 0; point < n_points; point++) {
        if (place[point] < 0) {
            measure(&b, point);
            fill_list(&b, lists + ~place[point]);
        }
    }
    for (int j = 0; j < n_entries; j++) {
        for (int i = 0; i < weights; i++) {
            term[j * weights + i] =
                (uint8_t)(entry_code(entries[j], weights, i) + TERMS / weights * i);
        }
    }
    *whole = (grid_points){entries, place, lists, term};
    return whole;
}
