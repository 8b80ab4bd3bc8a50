// Functions that copy, zero and prefetch rows. Rows can be short: then a call of memcpy takes longer than the work. The
// functions are always inlined, so that no instruction set's version serves another's.
#pragma once
#include <cstdint>
#include <cstring>

#define SFG_INLINE static inline __attribute__((always_inline))

namespace sfg {

constexpr int64_t SHORT_BYTES = 128, PIECE_BYTES = 16;

template <typename T>
SFG_INLINE void move_row(T* to, const T* from, int64_t count) {
    constexpr int64_t piece = PIECE_BYTES / sizeof(T);
    if (count > int64_t(SHORT_BYTES / sizeof(T))) {
        std::memcpy(to, from, count * sizeof(T));
    } else if (count >= piece) {  // the last piece may overlap the one before
        for (int64_t j = 0; j < count - piece; j += piece) __builtin_memcpy(to + j, from + j, PIECE_BYTES);
        __builtin_memcpy(to + count - piece, from + count - piece, PIECE_BYTES);
    } else {
        for (int64_t j = 0; j < piece - 1; j++)
            if (j < count) to[j] = from[j];
    }
}

template <typename T>
SFG_INLINE void zero_row(T* at, int64_t count) {
    constexpr int64_t piece = PIECE_BYTES / sizeof(T);
    if (count > int64_t(SHORT_BYTES / sizeof(T))) {
        std::memset(at, 0, count * sizeof(T));
    } else if (count >= piece) {
        for (int64_t j = 0; j < count - piece; j += piece) __builtin_memset(at + j, 0, PIECE_BYTES);
        __builtin_memset(at + count - piece, 0, PIECE_BYTES);
    } else {
        for (int64_t j = 0; j < piece - 1; j++)
            if (j < count) at[j] = 0;
    }
}

// Asks for a row well before it is needed: rows are too short for the processor to guess which one comes next.
template <typename T>
SFG_INLINE void prefetch_row(const T* row, int64_t count) {
    for (int64_t j = 0; j < count; j += 64 / sizeof(T)) __builtin_prefetch(row + j, 0, 2);
}

}  // namespace sfg
