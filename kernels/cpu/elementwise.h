// Inner loops that look at every number by itself, or at its 2 x 2 window: the gates' inner products, normalisation,
// activation and pooling. A part of inner_loops.cpp.
#pragma once
#include "inner_loops.h"
#include "vectors.h"

namespace sfg {
namespace SFG_ISA {
namespace {

template <typename T>
void sum(const T* values, int64_t rows, int64_t pitch, int64_t length, T* total) {
    Vector<T> sums{};
    T rest = 0;
    for (int64_t i = 0; i < rows; i++, values += pitch) {
        int64_t j = 0;
        for (; j + LANES<T> <= length; j += LANES<T>) sums += load(values + j);
        for (; j < length; j++) rest += values[j];
    }
    add_sums<T, 1>(&sums, total);
    *total += rest;
}

// --------------------------------------------------------------------------------------------------------------- gates

// Windows j .. j + L of two rows, `pitch` apart: scale * u + shift at their four places.
template <typename T>
SFG_INLINE void windows_at(const T* u, int64_t pitch, int64_t j, Vector<T> scale, Vector<T> shift, Vector<T>* values) {
    SFG_UNROLL
    for (int row = 0; row < 2; row++, u += pitch, values += 2) {
        const Vector<T> a = load(u + 2 * j), b = load(u + 2 * j + LANES<T>);
        values[0] = every_other<T, 0>(a, b) * scale + shift;
        values[1] = every_other<T, 1>(a, b) * scale + shift;
    }
}
template <typename T>
SFG_INLINE void window_at(const T* u, int64_t pitch, int64_t j, T scale, T shift, T* values) {
    for (int place = 0; place < 4; place++) values[place] = u[place / 2 * pitch + 2 * j + place % 2] * scale + shift;
}

// Of four; a NaN is the largest, as in torch.
template <typename T>
SFG_INLINE Vector<T> largest(const Vector<T>* values) {
    Vector<T> most = values[0];
    SFG_UNROLL
    for (int place = 1; place < 4; place++)
        most = (values[place] > most) | (values[place] != values[place]) ? values[place] : most;
    return most;
}
template <typename T>
SFG_INLINE T largest(const T* values) {
    T most = values[0];
    for (int place = 1; place < 4; place++)
        if (values[place] > most || values[place] != values[place]) most = values[place];
    return most;
}

template <typename T, bool POOL>
SFG_INLINE void gates_of(const GateTile<T>& t) {
    constexpr int L = LANES<T>, STEP = POOL ? 2 : 1;
    const Vector<T> none{};
    for (int64_t k = 0; k < t.channels; k++) {
        const T a = t.scale ? t.scale[k] : T(1), b = t.scale ? t.shift[k] : T(0);
        const Vector<T> scale = broadcast(a), shift = broadcast(b);
        Vector<T> sums[2] = {none, none}, window[4];
        T rest = 0, place[4];
        for (int64_t i = 0; i < t.rows / STEP; i++) {
            const T* u = t.u + k * t.u_channel + i * STEP * t.u_row;
            const T* df = t.df + k * t.df_channel + i * t.df_row;
            int64_t j = 0;
            for (; j + L <= t.columns / STEP; j += L) {
                Vector<T> h;
                if constexpr (POOL) {
                    windows_at(u, t.u_row, j, scale, shift, window);
                    h = largest<T>(window);
                } else {
                    h = load(u + j) * scale + shift;
                }
                if (t.act.relu) h = h < none ? none : h;
                sums[(j / L) & 1] += load(df + j) * h;
            }
            for (; j < t.columns / STEP; j++) {
                T h;
                if constexpr (POOL) {
                    window_at(u, t.u_row, j, a, b, place);
                    h = largest(place);
                } else {
                    h = u[j] * a + b;
                }
                if (t.act.relu && h < 0) h = 0;
                rest += df[j] * h;
            }
        }
        sums[0] += sums[1];
        add_sums<T, 1>(sums, t.sums + k);
        t.sums[k] += rest;
    }
}

template <typename T>
void gates(const GateTile<T>& t) {
    t.act.pool ? gates_of<T, true>(t) : gates_of<T, false>(t);
}

template <typename T>
void add(T* to, const T* from, int64_t count) {
    int64_t j = 0;
    for (; j + LANES<T> <= count; j += LANES<T>) store<T>(to + j, load(to + j) + load(from + j));
    for (; j < count; j++) to[j] += from[j];
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
    for (; j < count; j++) rest += (values[j] - mean) * (values[j] - mean);
    sums[0] += sums[1] + sums[2] + sums[3];
    add_sums<T, 1>(sums, &rest);
    return rest;
}

template <typename T>
void affine(const AffineTile<T>& t) {
    const Vector<T> scale = broadcast(t.scale), shift = broadcast(t.shift), none{};
    int64_t j = 0;
    for (; j + LANES<T> <= t.count; j += LANES<T>) {
        Vector<T> y = load(t.u + j) * scale + shift;
        if (t.relu) y = y < none ? none : y;
        if (t.residual) y += load(t.residual + j);
        store<T>(t.y + j, y);
    }
    for (; j < t.count; j++) {
        T y = t.u[j] * t.scale + t.shift;
        if (t.relu && y < 0) y = 0;
        t.y[j] = t.residual ? y + t.residual[j] : y;
    }
}

template <typename T>
SFG_INLINE Vector<T> passed(const AffineGradient<T>& t, int64_t j, Vector<T> u) {
    const Vector<T> none{}, dy = load(t.dy + j);
    return t.relu ? (u * broadcast(t.scale) + broadcast(t.shift) <= none ? none : dy) : dy;
}

template <typename T>
SFG_INLINE T passed(const AffineGradient<T>& t, int64_t j) {
    return t.relu && t.u[j] * t.scale + t.shift <= 0 ? T(0) : t.dy[j];
}

template <typename T>
void affine_sums(const AffineGradient<T>& t, T mean, T* sums) {
    constexpr int L = LANES<T>;
    const Vector<T> centre = broadcast(mean);
    Vector<T> plain[2] = {}, moments[2] = {};
    int64_t j = 0;
    for (; j + 2 * L <= t.count; j += 2 * L)
        for (int i = 0; i < 2; i++) {
            const Vector<T> u = load(t.u + j + i * L), g = passed(t, j + i * L, u);
            plain[i] += g;
            moments[i] += g * (u - centre);
        }
    T rest[2] = {0, 0};
    for (; j < t.count; j++) {
        const T g = passed(t, j);
        rest[0] += g, rest[1] += g * (t.u[j] - mean);
    }
    plain[0] += plain[1], moments[0] += moments[1];
    add_sums<T, 1>(plain, rest), add_sums<T, 1>(moments, rest + 1);
    sums[0] = rest[0], sums[1] = rest[1];
}

template <typename T>
void affine_gradient(const AffineGradient<T>& t, T slope, T offset, const T* add, T* du, T* y) {
    const Vector<T> scale = broadcast(t.scale), shift = broadcast(t.shift), none{};
    const Vector<T> slopes = broadcast(slope), offsets = broadcast(offset);
    int64_t j = 0;
    for (; j + LANES<T> <= t.count; j += LANES<T>) {
        const Vector<T> u = load(t.u + j);
        Vector<T> gradient = scale * passed(t, j, u) + (slopes * u + offsets);
        if (add) gradient += load(add + j);
        store<T>(du + j, gradient);
        if (!y) continue;
        const Vector<T> made = u * scale + shift;
        store<T>(y + j, t.relu ? (made < none ? none : made) : made);
    }
    for (; j < t.count; j++) {
        const T gradient = t.scale * passed(t, j) + (slope * t.u[j] + offset);
        du[j] = add ? gradient + add[j] : gradient;
        if (!y) continue;
        const T made = t.u[j] * t.scale + t.shift;
        y[j] = t.relu && made < 0 ? T(0) : made;
    }
}

// ------------------------------------------------------------------------------------------------------------- pooling

template <typename T>
void pool(const PoolTile<T>& t, T* y) {
    const Vector<T> scale = broadcast(t.scale), shift = broadcast(t.shift), none{};
    const int64_t columns = t.columns / 2;
    Vector<T> window[4];
    T place[4];
    for (int64_t i = 0; i < t.rows / 2; i++, y += columns) {
        const T* u = t.u + 2 * i * t.columns;
        int64_t j = 0;
        for (; j + LANES<T> <= columns; j += LANES<T>) {
            windows_at(u, t.columns, j, scale, shift, window);
            const Vector<T> most = largest<T>(window);
            store<T>(y + j, most < none ? none : most);
        }
        for (; j < columns; j++) {
            window_at(u, t.columns, j, t.scale, t.shift, place);
            const T most = largest(place);
            y[j] = most < 0 ? T(0) : most;
        }
    }
}

template <typename T>
void pool_gradient(const PoolTile<T>& t, const T* dy, T* g) {
    constexpr int L = LANES<T>;
    const Vector<T> scale = broadcast(t.scale), shift = broadcast(t.shift), none{};
    const int64_t columns = t.columns / 2;
    Vector<T> window[4], share[4];
    T place[4];
    for (int64_t i = 0; i < t.rows / 2; i++, dy += columns) {
        const T* u = t.u + 2 * i * t.columns;
        T *upper = g + 2 * i * t.columns, *lower = upper + t.columns;
        int64_t j = 0;
        for (; j + L <= columns; j += L) {
            windows_at(u, t.columns, j, scale, shift, window);
            const Vector<T> most = largest<T>(window);
            Vector<T> left = most <= none ? none : load(dy + j);
            SFG_UNROLL
            for (int p = 0; p < 4; p++) {
                const auto here = (window[p] == most) | (window[p] != window[p]);
                share[p] = here ? left : none;
                left = here ? none : left;
            }
            store<T>(upper + 2 * j, in_turn<T, 0>(share[0], share[1]));
            store<T>(upper + 2 * j + L, in_turn<T, L>(share[0], share[1]));
            store<T>(lower + 2 * j, in_turn<T, 0>(share[2], share[3]));
            store<T>(lower + 2 * j + L, in_turn<T, L>(share[2], share[3]));
        }
        for (; j < columns; j++) {
            window_at(u, t.columns, j, t.scale, t.shift, place);
            const T most = largest(place);
            T left = most <= 0 ? T(0) : dy[j];
            for (int p = 0; p < 4; p++) {
                const bool here = place[p] == most || place[p] != place[p];
                upper[p / 2 * t.columns + 2 * j + p % 2] = here ? left : T(0);
                if (here) left = 0;
            }
        }
        if (t.columns % 2) upper[t.columns - 1] = lower[t.columns - 1] = 0;
    }
    if (t.rows % 2) zero_row(g + (t.rows - 1) * t.columns, t.columns);
}

}  // namespace
}  // namespace SFG_ISA
}  // namespace sfg
