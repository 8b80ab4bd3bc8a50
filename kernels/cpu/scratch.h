// Memory for scratch, threads, and the copy of a block to scratch.
#pragma once
#include <cstdlib>
#include <new>
#include <vector>

#include "plan.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace sfg {

// Memory of a fixed size, aligned to a cache line, whose values are undefined at first.
template <typename T>
class Buffer {
 public:
    explicit Buffer(int64_t size) : data_(static_cast<T*>(std::aligned_alloc(64, bytes(size)))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* data() const { return data_; }

 private:
    static size_t bytes(int64_t size) { return round_up(std::max<int64_t>(size, 1) * sizeof(T), 64); }
    T* data_;
};

// Large memory comes fresh from the system every time (glibc maps it anew), and the system adds pages as it is written.
// Large pages take a third of the time off a 1x1 convolution with 34 MB of output.
inline void advise_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = 4096;
    if (bytes < int64_t(4) << 20) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal does no harm
#endif
}

// Calls body(thread, number of threads) in each thread. The threads share the loops inside with `omp for`, which all of
// them must reach; nothing inside may throw.
template <typename Body>
void on_threads([[maybe_unused]] int threads, const Body& body) {
#ifdef _OPENMP
    // One thread must not wake the pool: after a fork (as in data loading workers) the pool's threads are gone.
#pragma omp parallel num_threads(threads) if (threads > 1)
    body(omp_get_thread_num(), omp_get_num_threads());
#else
    body(0, 1);
#endif
}

// The copy of a block of output rows and columns, with its halo, to scratch. plane: numbers in a channel.
template <typename T>
Copy<T> copy_of(const T* image, const T* relu_output, int64_t plane, Range channels, const Axis& v, const Axis& h,
                int64_t row, int64_t rows, int64_t column, int64_t columns, T* scratch, const Layout& layout) {
    const int64_t offset = channels.first * plane;
    return {
        .image = image + offset,
        .relu_output = relu_output ? relu_output + offset : nullptr,
        .image_stride = plane,
        .channels = channels.size(),
        .vertical = {v.phases.data(), int64_t(v.phases.size()), row + v.low, v.stride, v.slots(rows), v.length},
        .horizontal = {h.phases.data(), int64_t(h.phases.size()), column + h.low, h.stride, h.slots(columns), h.length},
        .scratch = scratch,
        .channel_stride = layout.source_stride,
        .phase_stride = layout.phase_stride,
        .pitch = layout.pitch,
        .slack = layout.slack};
}

inline std::vector<const Tile*> tiles_of(const std::vector<Part>& parts) {
    std::vector<const Tile*> tiles;
    for (const Part& part : parts)
        for (const Tile& tile : part.tiles) tiles.push_back(&tile);
    return tiles;
}

}  // namespace sfg
