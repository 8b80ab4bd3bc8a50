// The vectors of an instruction set, and what the loops do with them. inner_loops.cpp and elementwise.h use this file.
#pragma once
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "rows.h"

#if defined(__clang__)
#define SFG_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SFG_UNROLL _Pragma("GCC unroll 32")
#endif

namespace sfg {
namespace SFG_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int BYTES = 32, REGISTERS = 16;
#else
constexpr int BYTES = 16, REGISTERS = 16;
#endif

template <typename T>
struct Vectors;
template <>
struct Vectors<float> {
    typedef float Vector __attribute__((vector_size(BYTES)));
    typedef float Unaligned __attribute__((vector_size(BYTES), aligned(4), may_alias));
    typedef float Small __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct Vectors<double> {
    typedef double Vector __attribute__((vector_size(BYTES)));
    typedef double Unaligned __attribute__((vector_size(BYTES), aligned(8), may_alias));
    typedef double Small __attribute__((vector_size(16), aligned(8), may_alias));
};
template <typename T>
using Vector = typename Vectors<T>::Vector;
template <typename T>
using SmallVector = typename Vectors<T>::Small;
template <typename T>
constexpr int LANES = BYTES / sizeof(T);

template <typename T>
SFG_INLINE Vector<T> load(const T* from) {
    return *reinterpret_cast<const typename Vectors<T>::Unaligned*>(from);
}
template <typename T>
SFG_INLINE void store(T* to, Vector<T> value) {
    *reinterpret_cast<typename Vectors<T>::Unaligned*>(to) = value;
}
template <typename T>
SFG_INLINE Vector<T> broadcast(T value) {
    return value - Vector<T>{};
}

#if defined(__AVX512F__)
SFG_INLINE __m512 load_lanes(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}
SFG_INLINE __m512d load_lanes(const double* from, int64_t count) {
    return _mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), from);
}
SFG_INLINE void store_lanes(float* to, __m512 value, int64_t count) {
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), value);
}
SFG_INLINE void store_lanes(double* to, __m512d value, int64_t count) {
    _mm512_mask_storeu_pd(to, __mmask8((1u << count) - 1), value);
}
#else
template <typename T>
SFG_INLINE Vector<T> load_lanes(const T* from, int64_t count) {
    T lane[LANES<T>] = {};
    move_row(lane, from, count);
    return load(lane);
}
template <typename T, typename V>
SFG_INLINE void store_lanes(T* to, V value, int64_t count) {
    T lane[LANES<T>];
    store<T>(lane, value);
    move_row(to, lane, count);
}
#endif

// Loads the first `count` lanes and sets the others to zero: the memory behind them may not exist.
template <typename T>
SFG_INLINE Vector<T> load_some(const T* from, int64_t count) {
    return count >= LANES<T> ? load(from) : count > 0 ? load_lanes(from, count) : Vector<T>{};
}
template <typename T>
SFG_INLINE void store_some(T* to, Vector<T> value, int64_t count) {
    if (count >= LANES<T>)
        store<T>(to, value);
    else if (count > 0)
        store_lanes(to, value, count);
}

// Pins a value that several multiplications share to a register. Without it the compiler loads it anew for each of
// them, and the load ports limit the loop (73 instead of 134 GFLOP/s in the weight gradient, GCC 12, AVX2).
template <typename V>
SFG_INLINE void pin(V& value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX2__)
    asm("" : "+x"(value));
#else
    (void)value;
#endif
}

// Every other lane of two vectors side by side, from lane FIRST on.
template <typename T, int FIRST, int... I>
SFG_INLINE Vector<T> every_other(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, 2 * I + FIRST...);
#else
    T from[2 * sizeof...(I)], to[sizeof...(I)];
    store<T>(from, a);
    store<T>(from + sizeof...(I), b);
    for (int i = 0; i < int(sizeof...(I)); i++) to[i] = from[2 * i + FIRST];
    return load(to);
#endif
}
template <typename T, int FIRST>
SFG_INLINE Vector<T> every_other(Vector<T> a, Vector<T> b) {
    return every_other<T, FIRST>(a, b, std::make_integer_sequence<int, LANES<T>>{});
}

// The inverse: lanes FIRST, FIRST + 1, .. of [a0, b0, a1, b1, ..].
template <typename T, int FIRST, int... I>
SFG_INLINE Vector<T> in_turn(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
    constexpr int L = sizeof...(I);
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (I + FIRST) / 2 + (I + FIRST) % 2 * L...);
#else
    T from[2 * L], to[L];
    store<T>(from, a);
    store<T>(from + L, b);
    for (int i = 0; i < L; i++) to[i] = from[(i + FIRST) / 2 + (i + FIRST) % 2 * L];
    return load(to);
#endif
}
template <typename T, int FIRST>
SFG_INLINE Vector<T> in_turn(Vector<T> a, Vector<T> b) {
    return in_turn<T, FIRST>(a, b, std::make_integer_sequence<int, LANES<T>>{});
}

// Lane i of the result is the sum of the lanes of vector i (N of them, at most as many as there are lanes).
template <typename T, int N, int PartialSums = LANES<T>>
SFG_INLINE Vector<T> lane_sums(const Vector<T>* vectors) {
    if constexpr (PartialSums == 1) {
        return vectors[0];
    } else {
        Vector<T> next[(N + 1) / 2];
        SFG_UNROLL
        for (int i = 0; i < (N + 1) / 2; i++) {
            const Vector<T> a = vectors[2 * i], b = vectors[2 * i + 1 < N ? 2 * i + 1 : 2 * i];
            next[i] = every_other<T, 0>(a, b) + every_other<T, 1>(a, b);
        }
        return lane_sums<T, (N + 1) / 2, PartialSums / 2>(next);
    }
}

// to[i] += the sum of the lanes of vector i.
template <typename T, int N>
SFG_INLINE void add_sums(const Vector<T>* vectors, T* to) {
    constexpr int L = LANES<T>, now = N < L ? N : L;
    const Vector<T> found = lane_sums<T, now>(vectors);
    if constexpr (now == L) {
        store<T>(to, load(to) + found);
    } else {
        T sums[L];
        store<T>(sums, found);
        SFG_UNROLL
        for (int i = 0; i < now; i++) to[i] += sums[i];
    }
    if constexpr (N > L) add_sums<T, N - L>(vectors + L, to + L);
}

}  // namespace
}  // namespace SFG_ISA
}  // namespace sfg
