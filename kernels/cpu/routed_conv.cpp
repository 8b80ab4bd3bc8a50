// Plain loops over image rows that the compiler vectorises. Blocks that are not read are skipped.
// Every output element is summed by one thread in a fixed order: the bits don't depend on the number of threads.
#include "routed_conv.h"

#include <algorithm>

namespace sfg {
namespace SFG_ISA {
namespace {

constexpr int TILE = 4;  // channels that share one pass over a row

int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// Output columns [first, last) whose input column, ow * stride - padding + tap * dilation, lies in the image.
struct Span {
    int64_t first, last, offset;
};

Span span(const Shape& p, int64_t tap) {
    const int64_t offset = tap * p.dilation[1] - p.padding[1];
    const int64_t first = std::max<int64_t>(0, ceil_div(-offset, p.stride[1]));
    const int64_t last = std::min(p.ow, ceil_div(p.w - offset, p.stride[1]));
    return {first, std::max(first, last), offset};
}

// y[i][j] += weight[i] * x[j * stride], for `count` rows y.
template <typename T>
inline void add_rows(T* const* y, const T* weight, int count, const T* x, int64_t stride, int64_t length) {
    if (count == TILE && stride == 1) {
        T *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
        const T w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
#pragma omp simd
        for (int64_t j = 0; j < length; j++) {
            const T v = x[j];
            y0[j] += w0 * v;
            y1[j] += w1 * v;
            y2[j] += w2 * v;
            y3[j] += w3 * v;
        }
        return;
    }
    for (int i = 0; i < count; i++) {
        T* out = y[i];
        const T w = weight[i];
#pragma omp simd
        for (int64_t j = 0; j < length; j++) out[j] += w * x[j * stride];
    }
}

template <typename T>
void forward(const T* x, const T* weight, const T* bias, T* y, const Shape& p, const Blocks& blocks,
             [[maybe_unused]] int threads) {
    const int64_t taps = p.r * p.s;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t n = 0; n < p.n; n++)
        for (int64_t oh = 0; oh < p.oh; oh++)
            for (int64_t out = 0; out < blocks.groups_out; out++)
                for (int64_t k = blocks.rows[out]; k < blocks.rows[out + 1]; k += TILE) {
                    const int count = static_cast<int>(std::min<int64_t>(TILE, blocks.rows[out + 1] - k));
                    T *rows[TILE], *shifted[TILE];
                    for (int i = 0; i < count; i++) {
                        rows[i] = y + ((n * p.k + k + i) * p.oh + oh) * p.ow;
                        std::fill(rows[i], rows[i] + p.ow, bias ? bias[k + i] : T(0));
                    }
                    for (int64_t in = 0; in < blocks.groups_in; in++) {
                        if (!blocks.reads[out * blocks.groups_in + in]) continue;
                        for (int64_t c = blocks.columns[in]; c < blocks.columns[in + 1]; c++)
                            for (int64_t r = 0; r < p.r; r++) {
                                const int64_t h = oh * p.stride[0] - p.padding[0] + r * p.dilation[0];
                                if (h < 0 || h >= p.h) continue;
                                const T* line = x + ((n * p.c + c) * p.h + h) * p.w;
                                for (int64_t s = 0; s < p.s; s++) {
                                    const Span at = span(p, s);
                                    if (at.first == at.last) continue;
                                    T w[TILE];
                                    for (int i = 0; i < count; i++) {
                                        w[i] = weight[((k + i) * p.c + c) * taps + r * p.s + s];
                                        shifted[i] = rows[i] + at.first;
                                    }
                                    const T* from = line + at.first * p.stride[1] + at.offset;
                                    add_rows(shifted, w, count, from, p.stride[1], at.last - at.first);
                                }
                            }
                    }
                }
}

template <typename T>
void input_gradient(const T* dy, const T* weight, T* dx, const Shape& p, const Blocks& blocks,
             [[maybe_unused]] int threads) {
    const int64_t taps = p.r * p.s;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t n = 0; n < p.n; n++)
        for (int64_t h = 0; h < p.h; h++)
            for (int64_t in = 0; in < blocks.groups_in; in++)
                for (int64_t c = blocks.columns[in]; c < blocks.columns[in + 1]; c += TILE) {
                    const int count = static_cast<int>(std::min<int64_t>(TILE, blocks.columns[in + 1] - c));
                    T *rows[TILE], *shifted[TILE];
                    for (int i = 0; i < count; i++) {
                        rows[i] = dx + ((n * p.c + c + i) * p.h + h) * p.w;
                        std::fill(rows[i], rows[i] + p.w, T(0));
                    }
                    for (int64_t out = 0; out < blocks.groups_out; out++) {
                        if (!blocks.reads[out * blocks.groups_in + in]) continue;
                        for (int64_t k = blocks.rows[out]; k < blocks.rows[out + 1]; k++)
                            for (int64_t r = 0; r < p.r; r++) {
                                const int64_t reached = h + p.padding[0] - r * p.dilation[0];
                                if (reached < 0 || reached % p.stride[0] || reached / p.stride[0] >= p.oh) continue;
                                const T* line = dy + ((n * p.k + k) * p.oh + reached / p.stride[0]) * p.ow;
                                for (int64_t s = 0; s < p.s; s++) {
                                    const Span at = span(p, s);
                                    const int64_t to = at.first * p.stride[1] + at.offset;
                                    for (int i = 0; i < count; i++) shifted[i] = rows[i] + to;
                                    T w[TILE];
                                    for (int i = 0; i < count; i++)
                                        w[i] = weight[(k * p.c + c + i) * taps + r * p.s + s];
                                    if (p.stride[1] == 1) {
                                        add_rows(shifted, w, count, line + at.first, 1, at.last - at.first);
                                    } else {
                                        for (int i = 0; i < count; i++)
                                            for (int64_t j = 0; j < at.last - at.first; j++)
                                                shifted[i][j * p.stride[1]] += w[i] * line[at.first + j];
                                    }
                                }
                            }
                    }
                }
}

template <typename T>
void weight_gradient(const T* x, const T* dy, T* dw, const Shape& p, const Blocks& blocks,
             [[maybe_unused]] int threads) {
    std::fill(dw, dw + p.k * p.c * p.r * p.s, T(0));
    for (int64_t out = 0; out < blocks.groups_out; out++)
        for (int64_t in = 0; in < blocks.groups_in; in++) {
            if (!blocks.reads[out * blocks.groups_in + in]) continue;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
            for (int64_t k = blocks.rows[out]; k < blocks.rows[out + 1]; k++)
                for (int64_t c = blocks.columns[in]; c < blocks.columns[in + 1]; c++)
                    for (int64_t r = 0; r < p.r; r++)
                        for (int64_t s = 0; s < p.s; s++) {
                            const Span at = span(p, s);
                            double total = 0;  // rows are summed in T, their sums in double
                            for (int64_t n = 0; n < p.n; n++)
                                for (int64_t oh = 0; oh < p.oh; oh++) {
                                    const int64_t h = oh * p.stride[0] - p.padding[0] + r * p.dilation[0];
                                    if (h < 0 || h >= p.h) continue;
                                    const T* a = dy + ((n * p.k + k) * p.oh + oh) * p.ow + at.first;
                                    const T* b = x + ((n * p.c + c) * p.h + h) * p.w + at.first * p.stride[1] + at.offset;
                                    T sum = 0;
#pragma omp simd reduction(+ : sum)
                                    for (int64_t j = 0; j < at.last - at.first; j++) sum += a[j] * b[j * p.stride[1]];
                                    total += static_cast<double>(sum);
                                }
                            dw[((k * p.c + c) * p.r + r) * p.s + s] = static_cast<T>(total);
                        }
        }
}

}  // namespace

extern const Kernels<float> kernels_float = {forward<float>, input_gradient<float>, weight_gradient<float>};
extern const Kernels<double> kernels_double = {forward<double>, input_gradient<double>, weight_gradient<double>};

}  // namespace SFG_ISA
}  // namespace sfg
