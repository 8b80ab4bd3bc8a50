// This file is compiled once for each instruction set (namespace SFG_ISA), with GCC's and Clang's vector extensions.
// It uses no templates of the standard library: the linker might take such a function from the object file with the
// widest instruction set, for all of them.
#include "inner_loops.h"

#include "elementwise.h"
#include "rows.h"
#include "vectors.h"
#include "winograd.h"

namespace sfg {
namespace SFG_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------------------- copy

template <typename T>
SFG_INLINE void copy_row(T* to, const T* from, const T* relu_output, int64_t count, int64_t stride) {
    if (stride == 1 && !relu_output) return move_row(to, from, count);
    int64_t j = 0;
    if (stride == 1) {
        for (const Vector<T> none{}; j + LANES<T> <= count; j += LANES<T>)
            store<T>(to + j, load(relu_output + j) <= none ? none : load(from + j));
        // The rest, or all of a short row, goes in small pieces, of which the last may overlap the one before.
        constexpr int64_t piece = sizeof(SmallVector<T>) / sizeof(T);
        for (const SmallVector<T> none{}; j < count && count >= piece; j += piece) {
            const int64_t at = j < count - piece ? j : count - piece;
            const auto output = *reinterpret_cast<const SmallVector<T>*>(relu_output + at);
            const auto values = *reinterpret_cast<const SmallVector<T>*>(from + at);
            *reinterpret_cast<SmallVector<T>*>(to + at) = output <= none ? none : values;
        }
    }
    for (; j < count; j++) to[j] = relu_output && relu_output[j * stride] <= 0 ? T(0) : from[j * stride];
}

// to = relu(scale * from + shift); a NaN stays.
template <typename T>
SFG_INLINE void activate_row(T* to, const T* from, T scale, T shift, int64_t count, int64_t stride) {
    int64_t j = 0;
    if (stride == 1)
        for (const Vector<T> none{}; j + LANES<T> <= count; j += LANES<T>) {
            const Vector<T> value = load(from + j) * broadcast(scale) + broadcast(shift);
            store<T>(to + j, value < none ? none : value);
        }
    for (; j < count; j++) {
        const T value = from[j * stride] * scale + shift;
        to[j] = value < 0 ? T(0) : value;
    }
}

SFG_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

SFG_INLINE int64_t ceil_div(int64_t a, int64_t b) {
    return a >= 0 ? (a + b - 1) / b : -(-a / b);
}

template <typename T>
void copy(const Copy<T>& t) {
    const Side &v = t.vertical, &h = t.horizontal;
    // Rows may overlap in their zeros: the next row is written later and wins.
    const int64_t fill = h.slots > t.pitch ? h.slots : t.pitch;
    for (int64_t c = 0; c < t.channels; c++)
        for (int64_t vp = 0; vp < v.phases; vp++)
            for (int64_t hp = 0; hp < h.phases; hp++) {
                T* row = t.scratch + c * t.channel_stride + (vp * h.phases + hp) * t.phase_stride;
                const int64_t start = h.first * h.stride + h.phase[hp];  // image column of slot 0
                const int64_t first = clamp(ceil_div(-start, h.stride), 0, h.slots);
                const int64_t last = clamp(ceil_div(h.length - start, h.stride), first, h.slots);
                for (int64_t s = 0; s < v.slots; s++, row += t.pitch) {
                    const int64_t line = (v.first + s) * v.stride + v.phase[vp];
                    if (line < 0 || line >= v.length || first == last) {
                        zero_row(row, fill);
                        continue;
                    }
                    zero_row(row, first);
                    const int64_t from = c * t.image_stride + line * h.length + start + first * h.stride;
                    const int64_t later = from + t.image_stride;  // the same row of the next channel
                    prefetch_row(t.image + later, last - first);
                    if (t.relu_output) prefetch_row(t.relu_output + later, last - first);
                    if (t.scale)
                        activate_row(row + first, t.image + from, t.scale[c], t.shift[c], last - first, h.stride);
                    else
                        copy_row(row + first, t.image + from, t.relu_output ? t.relu_output + from : nullptr,
                                 last - first, h.stride);
                    zero_row(row + last, fill - last);
                }
                zero_row(row, t.slack);
            }
}

// -------------------------------------------------------------------------------------------------------------- output

// Computes K outputs x NV vectors of positions, with all sums in registers.
template <typename T, int K, int NV>
SFG_INLINE void output_at(const OutputTile<T>& t, const T* x, T* y, const T* start, const T* residual,
                          int64_t columns) {
    constexpr int L = LANES<T>;
    Vector<T> sum[K][NV];
    SFG_UNROLL
    for (int k = 0; k < K; k++) {
        SFG_UNROLL
        for (int v = 0; v < NV; v++)
            sum[k][v] = start ? load_some(start + k * t.start_channel + v * L, columns - v * L) : broadcast(t.bias[k]);
    }
    const T* weights = t.weight;
    for (int64_t r = 0; r < t.read_count; r++) {
        const T* channel = x + t.reads[r].first * t.channel_stride;
        for (int64_t c = t.reads[r].first; c < t.reads[r].last;
             c++, channel += t.channel_stride, weights += t.kernel_taps * K)
            for (int64_t i = 0; i < t.tap_count; i++) {
                const T* from = channel + t.taps[i].offset;
                const T* w = weights + t.taps[i].index * K;
                if constexpr (NV <= K) {  // the values stay in registers, while the weights are loaded one by one
                    Vector<T> value[NV];
                    SFG_UNROLL
                    for (int v = 0; v < NV; v++) {
                        value[v] = load(from + v * L);
                        pin(value[v]);
                    }
                    SFG_UNROLL
                    for (int k = 0; k < K; k++) {
                        Vector<T> weight = broadcast(w[k]);
                        if (NV > 1) pin(weight);
                        SFG_UNROLL
                        for (int v = 0; v < NV; v++) sum[k][v] += weight * value[v];
                    }
                } else {  // the weights stay in registers
                    Vector<T> weight[K];
                    SFG_UNROLL
                    for (int k = 0; k < K; k++) {
                        weight[k] = broadcast(w[k]);
                        pin(weight[k]);
                    }
                    SFG_UNROLL
                    for (int v = 0; v < NV; v++) {
                        Vector<T> value = load(from + v * L);
                        if (K > 1) pin(value);
                        SFG_UNROLL
                        for (int k = 0; k < K; k++) sum[k][v] += weight[k] * value;
                    }
                }
            }
    }
    const Vector<T> none{};
    SFG_UNROLL
    for (int k = 0; k < K; k++) {
        SFG_UNROLL
        for (int v = 0; v < NV; v++) {
            const Vector<T> u = sum[k][v];
            Vector<T> result = t.relu ? (u < none ? none : u) : u;  // a NaN stays
            T* to = y + k * t.y_channel + v * L;
            const T* add = residual ? residual + k * t.y_channel + v * L : nullptr;
            const int64_t left = columns - v * L;
            store_some<T>(to, add ? result + load_some(add, left) : result, left);
        }
    }
}

// Vectors in the widest piece of a strip: so many sums hide the latency of a multiply-add and leave registers for the
// values and weights.
constexpr int widest(int outputs) {
    const int sums = REGISTERS == 32 ? 24 : 12;
    return 8 * outputs <= sums ? 8 : 4 * outputs <= sums ? 4 : 2;
}

template <typename T, int K>
void output_tile(const OutputTile<T>& t) {
    constexpr int L = LANES<T>, W = widest(K);
    for (int64_t s = 0; s < t.at.strips; s++) {
        const T* x = t.x + s * t.at.pitch;
        T* y = t.y + s * t.y_strip;
        const T* residual = t.residual ? t.residual + s * t.y_strip : nullptr;
        const T* start = t.start ? t.start + s * t.start_strip : nullptr;
        int64_t j = 0;
        const auto advance = [&](int64_t by) {
            j += by, x += by, y += by, residual = residual ? residual + by : nullptr,
                                       start = start ? start + by : nullptr;
        };
        for (; t.at.length - j > (W - 1) * L; advance(W * L))
            output_at<T, K, W>(t, x, y, start, residual, t.at.length - j);
        if (W > 4 && t.at.length - j > 3 * L)
            output_at<T, K, 4>(t, x, y, start, residual, t.at.length - j), advance(4 * L);
        if (W > 2 && t.at.length - j > L) output_at<T, K, 2>(t, x, y, start, residual, t.at.length - j), advance(2 * L);
        if (t.at.length > j) output_at<T, K, 1>(t, x, y, start, residual, t.at.length - j);
    }
}

template <typename T, int K>
void output(const OutputTile<T>& t) {
    if constexpr (K > 0) {
        if (t.outputs == K)
            output_tile<T, K>(t);
        else
            output<T, K - 1>(t);
    }
}

// ------------------------------------------------------------------------------------------------------------ winograd

// The sum of factor * value over a row of one of Winograd's matrices; zeros are left out.
template <typename T, int N>
SFG_INLINE Vector<T> combination(const double (&factors)[N], const Vector<T>* values) {
    Vector<T> sum{};
    bool started = false;
    SFG_UNROLL
    for (int i = 0; i < N; i++) {
        if (factors[i] == 0) continue;
        const Vector<T> part = factors[i] == 1 ? values[i] : values[i] * broadcast(T(factors[i]));
        sum = started ? sum + part : part;
        started = true;
    }
    return sum;
}

template <typename T>
void transform(const T* rows, int64_t pitch, int64_t span, int64_t blocks, T* to, int64_t stride) {
    using winograd::PRODUCTS, winograd::ROWS;
    for (int64_t b = 0; b < blocks; b++, rows += ROWS * pitch, to += pitch)
        for (int64_t j = 0; j < span; j += LANES<T>) {
            Vector<T> sources[PRODUCTS];
            SFG_UNROLL
            for (int i = 0; i < PRODUCTS; i++) sources[i] = load(rows + i * pitch + j);
            SFG_UNROLL
            for (int i = 0; i < PRODUCTS; i++)
                store<T>(to + i * stride + j, combination<T>(winograd::SOURCES[i], sources));
        }
}

template <typename T>
void combine(const ProductTile<T>& t) {
    using winograd::PRODUCTS, winograd::ROWS;
    constexpr int L = LANES<T>;
    const Vector<T> none{};
    for (int64_t k = 0; k < t.outputs; k++) {
        const Vector<T> bias = broadcast(t.bias[k]);
        for (int64_t j = 0; j < t.columns; j += L) {
            Vector<T> products[PRODUCTS];
            SFG_UNROLL
            for (int i = 0; i < PRODUCTS; i++)
                products[i] = load(t.products + i * t.product_stride + k * t.channel_stride + j);
            SFG_UNROLL
            for (int r = 0; r < ROWS; r++) {
                if (r >= t.rows) break;
                Vector<T> u = combination<T>(winograd::OUTPUTS[r], products);
                u += t.start ? load_some(t.start + k * t.start_channel + r * t.start_row + j, t.columns - j) : bias;
                if (t.relu) u = u < none ? none : u;  // a NaN stays
                const int64_t at = k * t.y_channel + r * t.y_row + j;
                if (t.residual) u += load_some(t.residual + at, t.columns - j);
                store_some<T>(t.y + at, u, t.columns - j);
            }
        }
    }
}

template <typename T>
void weigh(const T* taps, const int64_t* rows, const int64_t* columns, int64_t column_count, int64_t outputs, T* to,
           int64_t stride) {
    for (int64_t column = 0; column < column_count; column++, to += outputs)
        for (int64_t k = 0; k < outputs; k += LANES<T>) {
            Vector<T> given[winograd::TAPS];
            SFG_UNROLL
            for (int i = 0; i < winograd::TAPS; i++)
                given[i] = load(taps + (rows[i] + columns[column]) * MOST_OUTPUTS + k);
            SFG_UNROLL
            for (int i = 0; i < winograd::PRODUCTS; i++)
                store_some<T>(to + i * stride + k, combination<T>(winograd::WEIGHTS[i], given), outputs - k);
        }
}

template <typename T, int P, int N, bool RELU>
void mix_rows(const Mixture<T>& t) {
    constexpr int L = LANES<T>;
    Vector<T> factors[P][N];
    const T* rows[N];
    for (int i = 0; i < N; i++) {
        for (int product = 0; product < P; product++) factors[product][i] = broadcast(t.factor[product][i]);
        rows[i] = t.image + t.offset[i];
    }
    const int64_t to_relu = RELU ? t.relu_output - t.image : 0;
    const auto mix_at = [&](int64_t j, T* to) {
        const Vector<T> none{};
        Vector<T> sums[P] = {};
        SFG_UNROLL
        for (int i = 0; i < N; i++) {
            Vector<T> value = load(rows[i] + j);
            if (RELU) value = load(rows[i] + to_relu + j) <= none ? none : value;
            SFG_UNROLL
            for (int product = 0; product < P; product++) sums[product] += factors[product][i] * value;
        }
        SFG_UNROLL
        for (int product = 0; product < P; product++) store<T>(to + product * t.product_stride, sums[product]);
    };
    T* to = t.to;
    for (int64_t group = 0; group < t.groups; group++, to += t.pitch) {
        T* row = to + t.before;
        for (int product = 0; product < P; product++) {
            zero_row(to + product * t.product_stride, t.before);
            zero_row(row + product * t.product_stride + t.length, t.behind);
        }
        int64_t j = 0;
        for (; j + L <= t.length; j += L) mix_at(j, row + j);
        if (j < t.length && t.length >= L) {  // the last vector overlaps the one before
            mix_at(t.length - L, row + t.length - L);
        } else {
            for (; j < t.length; j++)
                for (int product = 0; product < P; product++) {
                    T& sum = row[product * t.product_stride + j];
                    sum = 0;
                    for (int i = 0; i < N; i++)
                        if (!RELU || !(rows[i][to_relu + j] <= 0)) sum += t.factor[product][i] * rows[i][j];
                }
        }
        for (int i = 0; i < N; i++) rows[i] += t.group_stride;
    }
}

template <typename T, int N>
void mix(const Mixture<T>& t) {
    if constexpr (N == 0) {
        for (int product = 0; product < t.products; product++)
            for (int64_t group = 0; group < t.groups; group++)
                zero_row(t.to + product * t.product_stride + group * t.pitch, t.before + t.length + t.behind);
    } else if (t.count < N) {
        mix<T, N - 1>(t);
    } else if (t.products == 2) {
        t.relu_output ? mix_rows<T, 2, N, true>(t) : mix_rows<T, 2, N, false>(t);
    } else {
        t.relu_output ? mix_rows<T, 1, N, true>(t) : mix_rows<T, 1, N, false>(t);
    }
}

// ------------------------------------------------------------------------------------------------------------ gradient

// Sums the products of K outputs' dy with NS shifted channels over all positions.
template <typename T, int K, int NS>
SFG_INLINE void gradient_at(const GradientTile<T>& t, const Shifted<T>* shifted, int64_t count) {
    constexpr int L = LANES<T>;
    Vector<T> sum[NS][K];
    SFG_UNROLL
    for (int i = 0; i < NS; i++) {
        SFG_UNROLL
        for (int k = 0; k < K; k++) sum[i][k] = Vector<T>{};
    }
    const T* x[NS];
    SFG_UNROLL
    for (int i = 0; i < NS; i++) x[i] = shifted[i < count ? i : count - 1].x;  // spare places repeat the last channel
    for (int64_t s = 0; s < t.at.strips; s++) {
        const int64_t end = s * t.at.pitch + t.at.length;
        for (int64_t j = s * t.at.pitch; j < end; j += L) {
            if constexpr (NS <= K) {
                Vector<T> value[NS];
                SFG_UNROLL
                for (int i = 0; i < NS; i++) {
                    value[i] = load(x[i] + j);
                    pin(value[i]);
                }
                SFG_UNROLL
                for (int k = 0; k < K; k++) {
                    Vector<T> dy = load(t.dy + k * t.channel_stride + j);
                    pin(dy);
                    SFG_UNROLL
                    for (int i = 0; i < NS; i++) sum[i][k] += dy * value[i];
                }
            } else {
                Vector<T> dy[K];
                SFG_UNROLL
                for (int k = 0; k < K; k++) {
                    dy[k] = load(t.dy + k * t.channel_stride + j);
                    pin(dy[k]);
                }
                SFG_UNROLL
                for (int i = 0; i < NS; i++) {
                    Vector<T> value = load(x[i] + j);
                    if (K > 1) pin(value);
                    SFG_UNROLL
                    for (int k = 0; k < K; k++) sum[i][k] += dy[k] * value;
                }
            }
        }
    }
    // Mostly the sums stand side by side.
    if (count == NS && shifted[NS - 1].gradient - shifted[0].gradient == (NS - 1) * K)
        return add_sums<T, NS * K>(sum[0], shifted[0].gradient);
    SFG_UNROLL
    for (int i = 0; i < NS; i++) {
        if (i < count) {
            add_sums<T, K>(sum[i], shifted[i].gradient);
        }
    }
}

template <typename T, int K>
void gradient_tile(const GradientTile<T>& t) {
    constexpr int sums = REGISTERS == 32 ? 24 : 12, NS = sums / K < 9 ? sums / K : 9;
    for (int64_t i = 0; i < t.shifted_count; i += NS)
        gradient_at<T, K, NS>(t, t.shifted + i, t.shifted_count - i < NS ? t.shifted_count - i : NS);
}

template <typename T, int K>
void gradient(const GradientTile<T>& t) {
    if constexpr (K > 0) {
        if (t.outputs == K)
            gradient_tile<T, K>(t);
        else
            gradient<T, K - 1>(t);
    }
}

constexpr int OUTPUTS = REGISTERS == 32 ? 12 : 6, GRADIENT_OUTPUTS = REGISTERS == 32 ? 8 : 4;

}  // namespace

#define SFG_LOOPS(T)                                                       \
    extern const InnerLoops<T> loops_##T = {LANES<T>,                      \
                                            OUTPUTS,                       \
                                            GRADIENT_OUTPUTS,              \
                                            copy<T>,                       \
                                            output<T, OUTPUTS>,            \
                                            transform<T>,                  \
                                            combine<T>,                    \
                                            weigh<T>,                      \
                                            mix<T, Mixture<T>::MOST>,      \
                                            gradient<T, GRADIENT_OUTPUTS>, \
                                            sum<T>,                        \
                                            gates<T>,                      \
                                            add<T>,                        \
                                            squares<T>,                    \
                                            affine<T>,                     \
                                            affine_sums<T>,                \
                                            affine_gradient<T>,            \
                                            pool<T>,                       \
                                            pool_gradient<T>};
SFG_LOOPS(float)
SFG_LOOPS(double)

}  // namespace SFG_ISA
}  // namespace sfg
