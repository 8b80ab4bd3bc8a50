// The inner loops that look at every number by itself, or at its 2 x 2 window: the gates' inner products,
// normalisation, activation and pooling. inner_loops.cpp includes this file.
#pragma once
#include "inner_loops.h"
#include "vectors.h"

namespace sfg {
namespace SFG_ISA {
namespace {

template <typename T>
void sum(const T* values, int64_t rows, int64_t pitch, int64_t length, T* total) {
    constexpr int L = LANES<T>;
    Vector<T> sums[4] = {};
    for (int64_t i = 0; i < rows; i++, values += pitch) {
        int64_t j = 0;
        for (; j + 4 * L <= length; j += 4 * L)
            for (int k = 0; k < 4; k++) sums[k] += load(values + j + k * L);
        for (; j < length; j += L) sums[0] += load_some(values + j, length - j);
    }
    sums[0] += sums[1] + sums[2] + sums[3];
    add_sums<T, 1>(sums, total);
}

// --------------------------------------------------------------------------------------------------------------- gates

// values[place] = scale * u + shift at the four places of windows j .. j + L - 1 of two rows, `pitch` apart. `left`:
// how many windows there are from j on.
template <typename T>
SFG_INLINE void windows_at(const T* u, int64_t pitch, int64_t j, int64_t left, Vector<T> scale, Vector<T> shift,
                           Vector<T>* values) {
    constexpr int L = LANES<T>;
    SFG_UNROLL
    for (int row = 0; row < 2; row++, u += pitch, values += 2) {
        const Vector<T> a = load_some(u + 2 * j, 2 * left), b = load_some(u + 2 * j + L, 2 * left - L);
        values[0] = every_other<T, 0>(a, b) * scale + shift;
        values[1] = every_other<T, 1>(a, b) * scale + shift;
    }
}

// The largest of four values; a NaN is the largest, as in torch.
template <typename T>
SFG_INLINE Vector<T> largest(const Vector<T>* values) {
    Vector<T> most = values[0];
    SFG_UNROLL
    for (int place = 1; place < 4; place++)
        most = (values[place] > most) | (values[place] != values[place]) ? values[place] : most;
    return most;
}

// What the activation makes of values below zero. (A ReLU makes 0 of infinity, too; a product would be a NaN.)
template <typename T>
SFG_INLINE Vector<T> below_zero(const Activation& act, Vector<T> values) {
    return act.slope != 0 ? values * broadcast(T(act.slope)) : Vector<T>{};
}

template <typename T, bool POOL>
SFG_INLINE void gates_of(const GateTile<T>& t) {
    constexpr int L = LANES<T>, STEP = POOL ? 2 : 1;
    const Vector<T> none{};
    for (int64_t k = 0; k < t.channels; k++) {
        const T a = t.scale ? t.scale[k] : T(1), b = t.scale ? t.shift[k] : T(0);
        const Vector<T> scale = broadcast(a), shift = broadcast(b);
        Vector<T> sums[2] = {none, none}, window[4];
        for (int64_t i = 0; i < t.rows / STEP; i++) {
            const T* u = t.u + k * t.u_channel + i * STEP * t.u_row;
            const T* df = t.df + k * t.df_channel + i * t.df_row;
            const auto take = [&](int64_t j, Vector<T>& sum) {
                const int64_t left = t.columns / STEP - j;
                Vector<T> h;
                if constexpr (POOL) {
                    windows_at(u, t.u_row, j, left, scale, shift, window);
                    h = largest<T>(window);
                } else {
                    h = load_some(u + j, left) * scale + shift;
                }
                if (t.act.relu) h = h < none ? below_zero<T>(t.act, h) : h;
                sum += load_some(df + j, left) * h;
            };
            int64_t j = 0;
            for (; j + L < t.columns / STEP; j += 2 * L) take(j, sums[0]), take(j + L, sums[1]);
            if (j < t.columns / STEP) take(j, sums[0]);
        }
        sums[0] += sums[1];
        add_sums<T, 1>(sums, t.sums + k);
    }
}

template <typename T>
void gates(const GateTile<T>& t) {
    t.act.pool ? gates_of<T, true>(t) : gates_of<T, false>(t);
}

template <typename T>
void add(T* to, const T* from, int64_t count) {
    for (int64_t j = 0; j < count; j += LANES<T>)
        store_some<T>(to + j, load_some(to + j, count - j) + load_some(from + j, count - j), count - j);
}

// ------------------------------------------------------------------------------------------------------- normalisation

template <typename T>
T squares(const T* values, int64_t count, T mean) {
    constexpr int L = LANES<T>;
    const Vector<T> centre = broadcast(mean);
    Vector<T> sums[4] = {};
    T rest = 0;
    int64_t j = 0;
    for (; j + 4 * L <= count; j += 4 * L)
        for (int i = 0; i < 4; i++) {
            const Vector<T> d = load(values + j + i * L) - centre;
            sums[i] += d * d;
        }
    for (; j + L <= count; j += L) {
        const Vector<T> d = load(values + j) - centre;
        sums[0] += d * d;
    }
    for (; j < count; j++) rest += (values[j] - mean) * (values[j] - mean);
    sums[0] += sums[1] + sums[2] + sums[3];
    add_sums<T, 1>(sums, &rest);
    return rest;
}

template <typename T>
void affine(const AffineTile<T>& t) {
    const Vector<T> scale = broadcast(t.scale), shift = broadcast(t.shift), none{};
    for (int64_t j = 0; j < t.count; j += LANES<T>) {
        const int64_t left = t.count - j;
        Vector<T> y = load_some(t.u + j, left) * scale + shift;
        if (t.act.relu) y = y < none ? below_zero<T>(t.act, y) : y;
        if (t.residual) y += load_some(t.residual + j, left);
        store_some<T>(t.y + j, y, left);
    }
}

// g of AffineGradient at positions j .. j + L - 1, zero behind the last position.
template <typename T>
SFG_INLINE Vector<T> through_relu(const AffineGradient<T>& t, int64_t j, Vector<T> u) {
    const Vector<T> none{}, dy = load_some(t.dy + j, t.count - j);
    return t.act.relu ? (u * broadcast(t.scale) + broadcast(t.shift) <= none ? below_zero<T>(t.act, dy) : dy) : dy;
}

template <typename T>
void affine_sums(const AffineGradient<T>& t, T mean, T* sums) {
    constexpr int L = LANES<T>;
    const Vector<T> centre = broadcast(mean);
    Vector<T> plain[2] = {}, moments[2] = {};
    const auto take = [&](int64_t j, int i) {
        const Vector<T> u = load_some(t.u + j, t.count - j), g = through_relu(t, j, u);
        plain[i] += g;
        moments[i] += g * (u - centre);
    };
    int64_t j = 0;
    for (; j + L < t.count; j += 2 * L) take(j, 0), take(j + L, 1);
    if (j < t.count) take(j, 0);
    plain[0] += plain[1], moments[0] += moments[1];
    sums[0] = sums[1] = 0;
    add_sums<T, 1>(plain, sums), add_sums<T, 1>(moments, sums + 1);
}

template <typename T>
void affine_gradient(const AffineGradient<T>& t, T slope, T offset, const T* shortcut_gradient, T* du,
                     T* activated_again) {
    const Vector<T> scale = broadcast(t.scale), shift = broadcast(t.shift), none{};
    const Vector<T> slopes = broadcast(slope), offsets = broadcast(offset);
    for (int64_t j = 0; j < t.count; j += LANES<T>) {
        const int64_t left = t.count - j;
        const Vector<T> u = load_some(t.u + j, left);
        Vector<T> gradient = scale * through_relu(t, j, u) + (slopes * u + offsets);
        if (shortcut_gradient) gradient += load_some(shortcut_gradient + j, left);
        store_some<T>(du + j, gradient, left);
        if (!activated_again) continue;
        const Vector<T> normalised = u * scale + shift;
        const Vector<T> activated = normalised < none ? below_zero<T>(t.act, normalised) : normalised;
        store_some<T>(activated_again + j, t.act.relu ? activated : normalised, left);
    }
}

// ------------------------------------------------------------------------------------------------------------- pooling

template <typename T>
void pool(const PoolTile<T>& t, T* y) {
    const Vector<T> scale = broadcast(t.scale), shift = broadcast(t.shift), none{};
    const int64_t columns = t.columns / 2;
    Vector<T> window[4];
    for (int64_t i = 0; i < t.rows / 2; i++, y += columns)
        for (int64_t j = 0; j < columns; j += LANES<T>) {
            windows_at(t.u + 2 * i * t.columns, t.columns, j, columns - j, scale, shift, window);
            const Vector<T> most = largest<T>(window);
            store_some<T>(y + j, most < none ? none : most, columns - j);
        }
}

template <typename T>
void pool_gradient(const PoolTile<T>& t, const T* dy, T* g) {
    constexpr int L = LANES<T>;
    const Vector<T> scale = broadcast(t.scale), shift = broadcast(t.shift), none{};
    const int64_t columns = t.columns / 2;
    Vector<T> window[4], share[4];
    for (int64_t i = 0; i < t.rows / 2; i++, dy += columns) {
        T *upper = g + 2 * i * t.columns, *lower = upper + t.columns;
        for (int64_t j = 0; j < columns; j += L) {
            const int64_t places = 2 * (columns - j);
            windows_at(t.u + 2 * i * t.columns, t.columns, j, columns - j, scale, shift, window);
            const Vector<T> most = largest<T>(window);
            Vector<T> left = most <= none ? none : load_some(dy + j, columns - j);
            SFG_UNROLL
            for (int p = 0; p < 4; p++) {
                const auto here = (window[p] == most) | (window[p] != window[p]);
                share[p] = here ? left : none;
                left = here ? none : left;
            }
            store_some<T>(upper + 2 * j, in_turn<T, 0>(share[0], share[1]), places);
            store_some<T>(upper + 2 * j + L, in_turn<T, L>(share[0], share[1]), places - L);
            store_some<T>(lower + 2 * j, in_turn<T, 0>(share[2], share[3]), places);
            store_some<T>(lower + 2 * j + L, in_turn<T, L>(share[2], share[3]), places - L);
        }
        if (t.columns % 2) upper[t.columns - 1] = lower[t.columns - 1] = 0;
    }
    if (t.rows % 2) zero_row(g + (t.rows - 1) * t.columns, t.columns);
}

}  // namespace
}  // namespace SFG_ISA
}  // namespace sfg
