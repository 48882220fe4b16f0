/* What torch's CPU library does slowly in fp32, for channels-last maps. Called from model/cpu/native.py.

   Every sum is taken in an order that does not depend on the number of threads. All numbers are floats but where a
   double is named; all maps are (images, height, width, channels), dense.

   LANES channels at a time: a panel is that many neighbouring channels of many places, [place][LANES], so that
   products read memory in the order in which it lies.
*/
#if !defined(__x86_64__)
#define EXPORT
#elif defined(__gnu_linux__) && __GNUC__ >= 12 && !defined(__clang__)
#define EXPORT __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#error "no compiler that writes code for several processors: torch's own kernels are faster than what it would make of this"
#endif
#define INLINE static inline __attribute__((always_inline))

#ifndef SOURCE_CRC32
#error "setup.py passes the checksum of this file: build with it"
#endif

/* native.py compares it with the file beside it: the code travels to other machines, this library stays. */
unsigned native_source(void) { return SOURCE_CRC32; }

enum { LANES = 16, ROWS = 6, DEEP = 256 }; /* a sum of DEEP products: its factors fit the first cache */
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias)); /* of the lanes */

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int Places __attribute__((vector_size(32)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Places){__VA_ARGS__})
#endif

/* Rows for columns, 8 x 8. */
INLINE void transpose(Half *m) {
    Half pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = PICK(m[i], m[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = PICK(m[i], m[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = PICK(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = PICK(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        m[i] = PICK(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        m[i + 4] = PICK(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* --- products: up to ROWS x LANES sums in registers ------------------------------------------------------------- */

/* a[r, q, i] lies at a + q a_panel + r a_row + i a_k; b[q, i] are LANES numbers at b + q b_panel + i LANES. */
typedef struct {
    long panels, k, a_panel, a_row, a_k, b_panel, c_row;
} Shape;

enum { SET, ADD, GO_ON }; /* c = the sum; c += the sum; the sum begins with c, as if all had been summed at once */

INLINE void few_rows(int rows, const Shape *s, const float *a, const float *b, float *c, int how) {
    Half low[ROWS], high[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        const Half *from = (const Half *)(c + r * s->c_row);
        low[r] = how == GO_ON ? from[0] : (Half){0}, high[r] = how == GO_ON ? from[1] : (Half){0};
    }
    for (long q = 0; q < s->panels; q++) {
        const float *from_a = a + q * s->a_panel, *from_b = b + q * s->b_panel;
        for (long i = 0; i < s->k; i++) {
            Half b_low = *(const Half *)(from_b + i * LANES), b_high = *(const Half *)(from_b + i * LANES + LANES / 2);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                float factor = from_a[r * s->a_row + i * s->a_k];
                low[r] += factor * b_low;
                high[r] += factor * b_high;
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        Half *to = (Half *)(c + r * s->c_row);
        if (how == ADD)
            low[r] += to[0], high[r] += to[1];
        to[0] = low[r], to[1] = high[r];
    }
}

/* c[r] gets the sum over q and i of a[r, q, i] b[q, i], for all rows r. Seven to nine rows are two halves: few rows at a
   time wait for each other's sums. */
INLINE void product(long rows, const Shape *s, const float *a, const float *b, float *c, int how) {
    while (rows > 0) {
        int now = rows > 9 || rows == 6 ? 6 : rows > 6 ? (rows + 1) / 2 : rows;
        switch (now) {
        case 6: few_rows(6, s, a, b, c, how); break;
        case 5: few_rows(5, s, a, b, c, how); break;
        case 4: few_rows(4, s, a, b, c, how); break;
        case 3: few_rows(3, s, a, b, c, how); break;
        case 2: few_rows(2, s, a, b, c, how); break;
        default: few_rows(1, s, a, b, c, how);
        }
        rows -= now, a += now * s->a_row, c += now * s->c_row;
    }
}

/* --- 3 x 3 convolutions by Winograd's algorithm; model/cpu/winograd.py tells which -------------------------------------- */

enum { TILE = 4, SIDE = 6, POINTS = SIDE * SIDE, CHUNK = 64 }; /* of channels: their factors fit the second cache */
static const float A = 0.70710678118654752f, B = 1.41421356237309505f, AA = 0.5f, BB = 2.0f;
static const float WEIGHT_A = -0.66666666666666667f, WEIGHT_B = 0.16666666666666667f; /* 1 / (2 AA (AA - BB)), ... */
static const float nothing[1 << 12]; /* the channels of a cell outside */

/* One-dimensional transforms of vectors that are `from` apart to vectors that are `to` apart. */

/* Six inputs to six factors: at 0, A, -A, B, -B, infinity. */
INLINE void interpolate(const Half *d, int from, Half *v, int to) {
    Half d0 = d[0], d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from], d5 = d[5 * from];
    Half even_a = d4 - BB * d2, odd_a = A * (d3 - BB * d1), even_b = d4 - AA * d2, odd_b = B * (d3 - AA * d1);
    v[0] = d0 + d4 - (AA + BB) * d2, v[5 * to] = d1 + d5 - (AA + BB) * d3;
    v[to] = even_a + odd_a, v[2 * to] = even_a - odd_a, v[3 * to] = even_b + odd_b, v[4 * to] = even_b - odd_b;
}

/* Six products to four outputs. */
INLINE void evaluate(const Half *m, int from, Half *y, int to) {
    Half even_a = m[from] + m[2 * from], odd_a = A * (m[from] - m[2 * from]);
    Half even_b = m[3 * from] + m[4 * from], odd_b = B * (m[3 * from] - m[4 * from]);
    y[0] = m[0] + even_a + even_b, y[to] = odd_a + odd_b;
    y[2 * to] = AA * even_a + BB * even_b, y[3 * to] = m[5 * from] + AA * odd_a + BB * odd_b;
}

/* The transpose of evaluate. */
INLINE void spread(const Half *y, int from, Half *v, int to) {
    Half y0 = y[0], y1 = y[from], y2 = y[2 * from], y3 = y[3 * from];
    Half even_a = y0 + AA * y2, odd_a = A * (y1 + AA * y3), even_b = y0 + BB * y2, odd_b = B * (y1 + BB * y3);
    v[0] = y0, v[5 * to] = y3;
    v[to] = even_a + odd_a, v[2 * to] = even_a - odd_a, v[3 * to] = even_b + odd_b, v[4 * to] = even_b - odd_b;
}

/* Three weights to six factors. */
INLINE void weigh(const Half *w, int from, Half *u, int to) {
    Half w0 = w[0], w1 = w[from], w2 = w[2 * from];
    Half even_a = WEIGHT_A * (w0 + AA * w2), odd_a = (WEIGHT_A * A) * w1;
    Half even_b = WEIGHT_B * (w0 + BB * w2), odd_b = (WEIGHT_B * B) * w1;
    u[0] = w0, u[5 * to] = w2;
    u[to] = even_a + odd_a, u[2 * to] = even_a - odd_a, u[3 * to] = even_b + odd_b, u[4 * to] = even_b - odd_b;
}

/* The transpose of weigh. */
INLINE void unweigh(const Half *u, int from, Half *w, int to) {
    Half even_a = WEIGHT_A * (u[from] + u[2 * from]), odd_a = u[from] - u[2 * from];
    Half even_b = WEIGHT_B * (u[3 * from] + u[4 * from]), odd_b = u[3 * from] - u[4 * from];
    w[0] = u[0] + even_a + even_b, w[to] = (WEIGHT_A * A) * odd_a + (WEIGHT_B * B) * odd_b;
    w[2 * to] = AA * even_a + BB * even_b + u[5 * from];
}

typedef struct {
    long height, width, channels;
} Maps;

typedef struct {
    long image, row, column;
} Corner;

INLINE Corner corner_of(const Maps *maps, long tile) {
    long across = (maps->width + TILE - 1) / TILE, in_image = (maps->height + TILE - 1) / TILE * across;
    return (Corner){tile / in_image, tile % in_image / across * TILE, tile % across * TILE};
}

INLINE long offset(const Maps *maps, long image, long row, long column) {
    return ((image * maps->height + row) * maps->width + column) * maps->channels;
}

/* Where the side x side cells from (row, column) on lie. */
INLINE void cells_at(const Maps *maps, const float *x, long image, long row, long column, int side, const float **cells) {
    for (int i = 0; i < side; i++)
        for (int j = 0; j < side; j++) {
            long y = row + i, z = column + j;
            int inside = y >= 0 && y < maps->height && z >= 0 && z < maps->width;
            cells[i * side + j] = inside ? x + offset(maps, image, y, z) : nothing;
        }
}

/* A tile's side x side cells as 36 factors, in panels: its inputs (with the cells around it), or the gradient of its
   outputs (TILE x TILE, the transpose of write_tile). */
INLINE void read_tile(const Maps *maps, const float *x, long tile, int side, float *v, long point, long panel) {
    const float *cells[POINTS];
    Corner corner = corner_of(maps, tile);
    int around = (side - TILE) / 2;
    cells_at(maps, x, corner.image, corner.row - around, corner.column - around, side, cells);
    for (long c = 0; c < maps->channels; c += LANES / 2) {
        Half column[SIDE], tall[POINTS], factors[POINTS];
        for (int j = 0; j < side; j++) {
            for (int i = 0; i < side; i++)
                column[i] = *(const Half *)(cells[i * side + j] + c);
            side == SIDE ? interpolate(column, 1, tall + j, side) : spread(column, 1, tall + j, side);
        }
        for (int i = 0; i < SIDE; i++)
            side == SIDE ? interpolate(tall + i * side, 1, factors + i * SIDE, 1)
                         : spread(tall + i * side, 1, factors + i * SIDE, 1);
        float *to = v + c / LANES * panel + c % LANES;
        for (int p = 0; p < POINTS; p++)
            *(Half *)(to + p * point) = factors[p];
    }
}

INLINE void write_tile(const Maps *maps, float *y, long tile, const float *m, long point, long panel) {
    Corner corner = corner_of(maps, tile);
    for (long c = 0; c < maps->channels; c += LANES / 2) {
        Half products[POINTS], wide[TILE * SIDE], outputs[TILE * TILE];
        const float *from = m + c / LANES * panel + c % LANES;
        for (int p = 0; p < POINTS; p++)
            products[p] = *(const Half *)(from + p * point);
        for (int j = 0; j < SIDE; j++)
            evaluate(products + j, SIDE, wide + j, SIDE);
        for (int i = 0; i < TILE; i++)
            evaluate(wide + i * SIDE, 1, outputs + i * TILE, 1);
        for (int i = 0; i < TILE && corner.row + i < maps->height; i++)
            for (int j = 0; j < TILE && corner.column + j < maps->width; j++)
                *(Half *)(y + offset(maps, corner.image, corner.row + i, corner.column + j) + c) = outputs[i * TILE + j];
    }
}

/* Numbers of a panel's point of u. One line more than needed: else a channel's points compete for one place in a cache. */
INLINE long point_of(long channels) { return (channels + 1) * LANES; }

/* Some channels of a panel, u[point][channel][LANES], of w[output][channel][3][3]. With `transposed`, of the convolution
   that takes gradients of outputs to those of inputs: outputs and channels trade places, each 3 x 3 is turned by 180
   degrees. */
INLINE void weigh_panel(const float *w, long outputs, long channels, long transposed, long panel, long first, long count,
                        float *u, long point) {
    long lane = 9 * (transposed ? 1 : channels), next = 9 * (transposed ? outputs : 1);
    for (long c = 0; c < count; c++)
        for (int h = 0; h < LANES; h += LANES / 2) {
            const float *from = w + (panel * LANES + h) * lane + (first + c) * next;
            Half given[9], weights[9], tall[SIDE * 3], factors[SIDE];
            for (int l = 0; l < 8; l++)
                given[l] = *(const Half *)(from + l * lane);
            transpose(given);
            given[8] = (Half){from[8], from[lane + 8], from[2 * lane + 8], from[3 * lane + 8],
                              from[4 * lane + 8], from[5 * lane + 8], from[6 * lane + 8], from[7 * lane + 8]};
            for (int s = 0; s < 9; s++)
                weights[s] = given[transposed ? 8 - s : s];
            for (int j = 0; j < 3; j++)
                weigh(weights + j, 3, tall + j, 3);
            for (int i = 0; i < SIDE; i++) {
                weigh(tall + i * 3, 1, factors, 1);
                for (int j = 0; j < SIDE; j++)
                    *(Half *)(u + (i * SIDE + j) * point + c * LANES + h) = factors[j];
            }
        }
}

/* dw[output][channel][3][3] of LANES channels of a panel from the gradient of theirs of u. The transpose of weigh_panel. */
INLINE void unweigh_panel(const float *u, long point, long channels, long panel, long first, float *w) {
    for (long c = 0; c < LANES; c++)
        for (int h = 0; h < LANES; h += LANES / 2) {
            Half products[SIDE], wide[3 * SIDE], weights[9];
            for (int i = 0; i < SIDE; i++) {
                for (int j = 0; j < SIDE; j++)
                    products[j] = *(const Half *)(u + (i * SIDE + j) * point + c * LANES + h);
                unweigh(products, 1, wide + i, SIDE);
            }
            for (int j = 0; j < 3; j++)
                unweigh(wide + j * SIDE, 1, weights + j, 3);
            transpose(weights);
            for (int l = 0; l < 8; l++) {
                float *to = w + ((panel * LANES + h + l) * channels + first + c) * 9;
                *(Half *)to = weights[l];
                to[8] = weights[8][l];
            }
        }
}

/* y = the convolution of x by w; `transposed` as above. scratch: POINTS (band + 1) (channels + outputs) numbers for
   the transformed inputs and the products of a band of tiles, and with more than one band POINTS (channels + 1) outputs
   for u. A single band's u serves nobody after it: it is made in pieces that stay in a cache, on the stack. */
EXPORT void winograd_forward(const float *x, const float *w, long transposed, float *y, long images, long height, long width,
                             long channels, long outputs, float *scratch, long band, long threads) {
    Maps in = {height, width, channels}, out = {height, width, outputs};
    long tiles = images * ((height + TILE - 1) / TILE) * ((width + TILE - 1) / TILE), panel = (band + 1) * LANES;
    long in_point = channels / LANES * panel, out_point = outputs / LANES * panel;
    float *u = scratch, *v = u + (tiles > band ? outputs / LANES * POINTS * point_of(channels) : 0), *m = v + POINTS * in_point;
    long chunk = tiles > band ? channels : CHUNK, point = point_of(chunk); /* one band: nobody reads its factors again */
#pragma omp parallel num_threads(threads)
    for (long first = 0; first < tiles; first += band) {
        long here = tiles - first < band ? tiles - first : band;
        float own[POINTS * (CHUNK + 1) * LANES];
#pragma omp for
        for (long t = 0; t < here; t++)
            read_tile(&in, x, first + t, SIDE, v + t * LANES, in_point, panel);
#pragma omp for
        for (long o = 0; o < outputs / LANES; o++) {
            float *factors = tiles > band ? u + o * POINTS * point : own;
            for (long c = 0; c < channels; c += chunk) {
                long now = channels - c < chunk ? channels - c : chunk;
                Shape shape = {now / LANES, LANES, panel, LANES, 1, LANES * LANES, LANES};
                if (!first) /* just before they are used, and still in the cache */
                    weigh_panel(w, outputs, channels, transposed, o, c, now, factors, point);
                for (long p = 0; p < POINTS; p++)
                    product(here, &shape, v + p * in_point + c / LANES * panel, factors + p * point,
                            m + p * out_point + o * panel, c ? GO_ON : SET);
            }
        }
#pragma omp for
        for (long t = 0; t < here; t++)
            write_tile(&out, y, first + t, m + t * LANES, out_point, panel);
    }
}

/* dw[output][channel][3][3] of the gradient of y. scratch as above. */
EXPORT void winograd_weight_gradient(const float *x, const float *gradient, float *w, long images, long height, long width,
                                     long channels, long outputs, float *scratch, long band, long threads) {
    Maps in = {height, width, channels}, out = {height, width, outputs};
    long tiles = images * ((height + TILE - 1) / TILE) * ((width + TILE - 1) / TILE), panel = (band + 1) * LANES;
    long in_point = channels / LANES * panel, out_point = outputs / LANES * panel;
    float *u = scratch, *v = u + (tiles > band ? outputs / LANES * POINTS * point_of(channels) : 0), *m = v + POINTS * in_point;
#pragma omp parallel num_threads(threads)
    for (long first = 0; first < tiles; first += band) {
        long here = tiles - first < band ? tiles - first : band;
        Shape shape = {1, here, 0, 1, LANES, 0, LANES};
        float own[POINTS * (LANES + 1) * LANES];
#pragma omp for
        for (long t = 0; t < here; t++) {
            read_tile(&in, x, first + t, SIDE, v + t * LANES, in_point, panel);
            read_tile(&out, gradient, first + t, TILE, m + t * LANES, out_point, panel);
        }
#pragma omp for collapse(2)
        for (long o = 0; o < outputs / LANES; o++)
            for (long c = 0; c < channels / LANES; c++) {
                long point = point_of(tiles > band ? channels : LANES);
                float *sums = tiles > band ? u + o * POINTS * point + c * LANES * LANES : own;
                for (long p = 0; p < POINTS; p++)
                    product(LANES, &shape, v + p * in_point + c * panel, m + p * out_point + o * panel, sums + p * point,
                            first ? ADD : SET);
                if (first + band >= tiles)
                    unweigh_panel(sums, point, channels, o, c * LANES, w);
            }
    }
}

/* --- other convolutions: a row of a window is `kernel` x `channels` numbers in a row -------------------------------- */

/* Of x, padded already. w[output panel][kernel][kernel channels][LANES]. y: (images, tall, wide, outputs). */
EXPORT void windows_forward(const float *x, const float *w, float *y, long images, long height, long width, long channels,
                            long tall, long wide, long outputs, long kernel, long stride, long threads) {
    Maps in = {height, width, channels}, out = {tall, wide, outputs};
    Shape shape = {kernel, kernel * channels, width * channels, stride * channels, 1, kernel * channels * LANES, outputs};
#pragma omp parallel for collapse(2) num_threads(threads)
    for (long image = 0; image < images; image++)
        for (long row = 0; row < tall; row++)
            for (long o = 0; o < outputs; o += LANES)
                product(wide, &shape, x + offset(&in, image, row * stride, 0), w + o * kernel * kernel * channels,
                        y + offset(&out, image, row, 0) + o, SET);
}

/* Added to dx, padded. w[kernel][kernel][channel panel][output][LANES]. */
EXPORT void windows_input_gradient(const float *gradient, const float *w, float *dx, long images, long height, long width,
                                   long channels, long tall, long wide, long outputs, long kernel, long stride, long threads) {
    Maps in = {height, width, channels}, out = {tall, wide, outputs};
    Shape shape = {1, outputs, 0, outputs, 1, 0, stride * channels};
#pragma omp parallel for collapse(2) num_threads(threads) /* windows overlap in an image and a channel, nowhere else */
    for (long image = 0; image < images; image++)
        for (long c = 0; c < channels; c += LANES)
            for (long row = 0; row < tall; row++)
                for (long place = 0; place < kernel * kernel; place++)
                    product(wide, &shape, gradient + offset(&out, image, row, 0), w + (place * channels + c) * outputs,
                            dx + offset(&in, image, row * stride + place / kernel, place % kernel) + c, ADD);
}

/* dw[output panel][kernel][kernel channels][LANES]. panels: room for the gradient in panels. */
EXPORT void windows_weight_gradient(const float *x, const float *gradient, float *dw, float *panels, long images, long height,
                                    long width, long channels, long tall, long wide, long outputs, long kernel, long stride,
                                    long threads) {
    Maps in = {height, width, channels};
    long places = tall * wide, numbers = kernel * channels * LANES, most = wide < DEEP ? DEEP / wide : 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long place = 0; place < images * places; place++)
            for (long o = 0; o < outputs / LANES; o++)
                for (int h = 0; h < LANES; h += LANES / 2)
                    *(Half *)(panels + (o * images * places + place) * LANES + h) =
                        *(const Half *)(gradient + place * outputs + o * LANES + h);
#pragma omp for collapse(2)
        for (long o = 0; o < outputs / LANES; o++)
            for (long i = 0; i < kernel; i++)
                for (long image = 0; image < images; image++)
                    for (long row = 0; row < tall; row += most) { /* few enough to stay in the cache for all products */
                        long rows = tall - row < most ? tall - row : most;
                        Shape shape = {rows, wide, stride * width * channels, 1, stride * channels, wide * LANES, LANES};
                        product(kernel * channels, &shape, x + offset(&in, image, i + row * stride, 0),
                                panels + ((o * images + image) * places + row * wide) * LANES, dw + (o * kernel + i) * numbers,
                                image + row ? ADD : SET);
                    }
    }
}

/* --- group norm: sums in floats over BLOCK cells, then in doubles ---------------------------------------------------- */

enum { BLOCK = 64 };

INLINE void flush(long channels, float *part, double *total) {
    for (long c = 0; c < channels; c++)
        total[c] += part[c], part[c] = 0;
}

/* Normalises each group of an image: y = x scale + shift. moments: (images, groups, 2), the mean and 1 / deviation.
   totals: (images, 2 channels) doubles, room. */
EXPORT void group_norm_forward(const float *x, const float *weight, const float *bias, float *y, float *moments, double *totals,
                               long images, long cells, long channels, long groups, double eps, long threads) {
    long width = channels / groups;
#pragma omp parallel for num_threads(threads)
    for (long image = 0; image < images; image++) {
        const float *from = x + image * cells * channels;
        float *to = y + image * cells * channels, *moment = moments + image * groups * 2;
        double *total = totals + image * 2 * channels;
        float *part = (float *)(total + channels), *mean = part + channels;
        for (int squares = 0; squares < 2; squares++) {
            for (long c = 0; c < channels; c++)
                total[c] = part[c] = 0;
            for (long i = 0; i < cells; i++) {
                const float *cell = from + i * channels;
                if (squares)
                    for (long c = 0; c < channels; c++)
                        part[c] += (cell[c] - mean[c]) * (cell[c] - mean[c]);
                else
                    for (long c = 0; c < channels; c++)
                        part[c] += cell[c];
                if (i % BLOCK == BLOCK - 1)
                    flush(channels, part, total);
            }
            flush(channels, part, total);
            for (long g = 0; g < groups; g++) {
                double sum = 0;
                for (long c = g * width; c < (g + 1) * width; c++)
                    sum += total[c];
                sum /= width * cells;
                moment[g * 2 + squares] = squares ? 1 / __builtin_sqrt(sum + eps) : sum;
                for (long c = g * width; c < (g + 1) * width; c++)
                    mean[c] = moment[g * 2];
            }
        }
        float *scale = part, *shift = mean;
        for (long c = 0; c < channels; c++) {
            scale[c] = weight[c] * moment[c / width * 2 + 1];
            shift[c] = bias[c] - mean[c] * scale[c];
        }
        for (long i = 0; i < cells; i++)
            for (long c = 0; c < channels; c++)
                to[i * channels + c] = from[i * channels + c] * scale[c] + shift[c];
    }
}

/* dx, and of each image what it adds to the gradients of weight and bias: shares (2, images, channels).
   totals: (images, 4 channels) doubles, room. */
EXPORT void group_norm_backward(const float *gradient, const float *x, const float *weight, const float *moments, float *dx,
                                float *shares, double *totals, long images, long cells, long channels, long groups,
                                long threads) {
    long width = channels / groups;
#pragma omp parallel for num_threads(threads)
    for (long image = 0; image < images; image++) {
        const float *from = x + image * cells * channels, *given = gradient + image * cells * channels;
        const float *moment = moments + image * groups * 2;
        double *ones = totals + image * 4 * channels, *centred = ones + channels;
        float *to = dx + image * cells * channels, *mean = (float *)(centred + channels);
        float *of_ones = mean + channels, *of_x = of_ones + channels;
        float *of_weight = shares + image * channels, *of_bias = of_weight + images * channels;
        for (long c = 0; c < channels; c++) {
            mean[c] = moment[c / width * 2];
            ones[c] = centred[c] = of_ones[c] = of_x[c] = 0;
        }
        for (long i = 0; i < cells; i++) {
            for (long c = 0; c < channels; c++) {
                float g = given[i * channels + c];
                of_ones[c] += g;
                of_x[c] += g * (from[i * channels + c] - mean[c]);
            }
            if (i % BLOCK == BLOCK - 1)
                flush(channels, of_ones, ones), flush(channels, of_x, centred);
        }
        flush(channels, of_ones, ones), flush(channels, of_x, centred);
        float *scale = mean, *slope = of_ones, *shift = of_x;
        for (long g = 0; g < groups; g++) {
            double middle = moment[g * 2], inverse = moment[g * 2 + 1], sum = 0, sum_centred = 0;
            for (long c = g * width; c < (g + 1) * width; c++) {
                sum += weight[c] * ones[c];
                sum_centred += weight[c] * centred[c];
                of_bias[c] = ones[c];
                of_weight[c] = centred[c] * inverse;
            }
            double along = -inverse * inverse * inverse * sum_centred / (width * cells);
            for (long c = g * width; c < (g + 1) * width; c++) {
                scale[c] = weight[c] * inverse;
                slope[c] = along;
                shift[c] = -inverse * sum / (width * cells) - along * middle;
            }
        }
        for (long i = 0; i < cells; i++)
            for (long c = 0; c < channels; c++)
                to[i * channels + c] = given[i * channels + c] * scale[c] + from[i * channels + c] * slope[c] + shift[c];
    }
}

/* --- RoIAlign: a bin is a sum over taps x taps cells ---------------------------------------------------------------- */

enum { MOST_CELLS = 256 }; /* of a bin */

typedef struct {
    const float *row_weights, *column_weights; /* (rois, side, taps) */
    const int *image, *rows, *columns;         /* (rois,), (rois, side, taps) twice */
    long side, taps, height, width, channels;
} Bins;

/* Where the cells of a bin lie, and their weights, products of two. */
INLINE void cells_of(const Bins *b, long bin, long *cells, float *weights) {
    long roi = bin / b->side / b->side, y = bin / b->side % b->side, x = bin % b->side;
    for (long i = 0; i < b->taps; i++)
        for (long j = 0; j < b->taps; j++) {
            long row = (roi * b->side + y) * b->taps + i, column = (roi * b->side + x) * b->taps + j;
            weights[i * b->taps + j] = b->row_weights[row] * b->column_weights[column];
            cells[i * b->taps + j] =
                ((b->image[roi] * b->height + b->rows[row]) * b->width + b->columns[column]) * b->channels;
        }
}

/* bins: (rois, side, side, channels). */
EXPORT void bins_forward(const float *x, const int *image, const int *rows, const float *row_weights, const int *columns,
                         const float *column_weights, float *bins, long rois, long side, long taps, long height, long width,
                         long channels, long threads) {
    Bins b = {row_weights, column_weights, image, rows, columns, side, taps, height, width, channels};
#pragma omp parallel for num_threads(threads)
    for (long bin = 0; bin < rois * side * side; bin++) {
        long cells[MOST_CELLS];
        float weights[MOST_CELLS];
        cells_of(&b, bin, cells, weights);
        for (long c = 0; c < channels; c += LANES) {
            Half low = {0}, high = {0};
            for (long t = 0; t < taps * taps; t++) {
                const Half *cell = (const Half *)(x + cells[t] + c);
                low += weights[t] * cell[0], high += weights[t] * cell[1];
            }
            Half *to = (Half *)(bins + bin * channels + c);
            to[0] = low, to[1] = high;
        }
    }
}

/* Added to dx. */
EXPORT void bins_backward(const float *gradient, const int *image, const int *rows, const float *row_weights,
                          const int *columns, const float *column_weights, float *dx, long rois, long side, long taps,
                          long height, long width, long channels, long threads) {
    Bins b = {row_weights, column_weights, image, rows, columns, side, taps, height, width, channels};
#pragma omp parallel for num_threads(threads) /* bins share cells, channels do not */
    for (long thread = 0; thread < threads; thread++) {
        long panels = channels / LANES, first = panels * thread / threads * LANES, last = panels * (thread + 1) / threads * LANES;
        for (long bin = 0; bin < rois * side * side; bin++) {
            long cells[MOST_CELLS];
            float weights[MOST_CELLS];
            cells_of(&b, bin, cells, weights);
            for (long t = 0; t < taps * taps; t++)
                for (long c = first; c < last; c += LANES / 2)
                    *(Half *)(dx + cells[t] + c) += weights[t] * *(const Half *)(gradient + bin * channels + c);
        }
    }
}

/* --- non-maximum suppression ---------------------------------------------------------------------------------------- */

/* keep: 1 for a valid box that overlaps no better kept box of its list by more than max_iou. boxes: (lists, count, 4), best
   first. scratch: (lists, 6, count). Each step of the quotient is stored before the next: rounded as torchvision rounds,
   no product and sum in one. */
EXPORT void nms(const float *boxes, const unsigned char *valid, unsigned char *keep, float *scratch, long lists, long count,
                double max_iou, long threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long list = 0; list < lists; list++) {
        const float *box = boxes + list * count * 4;
        unsigned char *alive = keep + list * count;
        float *x0 = scratch + list * 6 * count, *y0 = x0 + count, *x1 = y0 + count, *y1 = x1 + count;
        float *area = y1 + count, *shared = area + count;
        for (long i = 0; i < count; i++) {
            x0[i] = box[i * 4], y0[i] = box[i * 4 + 1], x1[i] = box[i * 4 + 2], y1[i] = box[i * 4 + 3];
            area[i] = (x1[i] - x0[i]) * (y1[i] - y0[i]);
            alive[i] = valid[list * count + i];
        }
        for (long i = 0; i < count; i++) {
            if (!alive[i])
                continue;
            for (long j = i + 1; j < count; j++) {
                float width = (x1[i] < x1[j] ? x1[i] : x1[j]) - (x0[i] > x0[j] ? x0[i] : x0[j]);
                float height = (y1[i] < y1[j] ? y1[i] : y1[j]) - (y0[i] > y0[j] ? y0[i] : y0[j]);
                shared[j] = (width > 0 ? width : 0) * (height > 0 ? height : 0);
            }
            for (long j = i + 1; j < count; j++)
                alive[j] &= !(shared[j] / (area[i] + area[j] - shared[j]) > max_iou);
        }
    }
}
