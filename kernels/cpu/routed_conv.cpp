// The three passes: plan, pack the weights, then work through the blocks of the output, several threads at a time.
#include "routed_conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "plan.h"
#include "rows.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace sfg {
namespace {

constexpr int64_t CONVOLUTION_POSITIONS = 4096;
constexpr int64_t GRADIENT_POSITIONS = 2048;  // of a block, so that a tile's outputs stay in the first-level cache
constexpr double FLAT_OUTPUT = 1.06;          // a flat block's outputs take a detour through scratch

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

// Memory of this size comes fresh from the system every time (glibc maps it anew), and is filled with pages as it is
// written: in large ones that takes a third of the time off a 1x1 convolution with 34 MB of output.
void advise_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = 4096;
    if (bytes < int64_t(32) << 20) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal does no harm
#endif
}

// body(thread, number of threads) on each of them. They share the loops inside with `omp for`, which all of them must
// reach; nothing inside may throw.
template <typename Body>
void on_threads([[maybe_unused]] int threads, const Body& body) {
#ifdef _OPENMP
    // A region of one thread wakes nobody: after a fork (data loading workers) the pool's threads are gone.
#pragma omp parallel num_threads(threads) if (threads > 1)
    body(omp_get_thread_num(), omp_get_num_threads());
#else
    body(0, 1);
#endif
}

template <typename T>
Copy<T> copy_of(const T* image, const T* relu, int64_t plane, Range channels, const Axis& v, const Axis& h, int64_t row,
                int64_t rows, int64_t column, int64_t columns, T* scratch, const Layout& layout) {
    const int64_t offset = channels.first * plane;
    return {
        .image = image + offset,
        .relu = relu ? relu + offset : nullptr,
        .image_stride = plane,
        .channels = channels.last - channels.first,
        .vertical = {v.phases.data(), int64_t(v.phases.size()), row + v.low, v.stride, v.slots(rows), v.length},
        .horizontal = {h.phases.data(), int64_t(h.phases.size()), column + h.low, h.stride, h.slots(columns), h.length},
        .scratch = scratch,
        .channel_stride = layout.source_stride,
        .phase_stride = layout.phase_stride,
        .pitch = layout.pitch,
        .slack = layout.slack};
}

std::vector<const Tile*> tiles_of(const std::vector<Part>& parts) {
    std::vector<const Tile*> tiles;
    for (const Part& part : parts)
        for (const Tile& tile : part.tiles) tiles.push_back(&tile);
    return tiles;
}

// Forward pass and input gradient: out[n,k] = act(bias[k] + sum of weight * in) + residual.
template <typename T>
struct Convolution {
    const InnerLoops<T>& loops;
    const T *in, *relu_in;          // relu_in: see Copy
    int64_t in_channels, in_plane;  // plane: numbers in a channel
    const T *weight, *bias;
    int64_t output_stride, read_stride;  // of the weight
    const T* residual;
    bool relu;
    T* out;
    int64_t out_channels, out_plane, out_width;
    std::vector<Part> parts;
    int64_t weights;
    std::vector<Axis> vertical, horizontal;
};

// [tile][channel read][tap][output], and behind them the biases of all tiles.
template <typename T>
void pack(const Convolution<T>& task, int64_t taps, const Tile& tile, T* packed, T* biases) {
    T* to = packed + tile.weights * taps;
    for (const Range& range : tile.reads)
        for (int64_t c = range.first; c < range.last; c++) {
            const T* from = task.weight + tile.first * task.output_stride + c * task.read_stride;
            for (int64_t t = 0; t < taps; t++)
                for (int64_t k = 0; k < tile.outputs; k++) *to++ = from[k * task.output_stride + t];
        }
    for (int64_t k = tile.first; k < tile.first + tile.outputs; k++) biases[k] = task.bias ? task.bias[k] : T(0);
}

// A finished block from scratch to where it belongs.
template <typename T>
void place(const T* from, int64_t channel_stride, const Tile& tile, const Patch& patch, const Convolution<T>& task,
           int64_t n) {
    const Axis &v = *patch.job->vertical, &h = *patch.job->horizontal;
    for (int64_t k = 0; k < tile.outputs; k++)
        for (int64_t i = 0; i < patch.rows; i++) {
            const T* row = from + k * channel_stride + i * patch.job->layout.pitch;
            const int64_t at = (n * task.out_channels + tile.first + k) * task.out_plane +
                               (v.first + (patch.row + i) * v.step) * task.out_width + h.first + patch.column * h.step;
            T* to = task.out + at;
            if (task.residual)
                for (int64_t j = 0; j < patch.columns; j++) to[j * h.step] = row[j] + task.residual[at + j * h.step];
            else if (h.step == 1)
                move_row(to, row, patch.columns);
            else
                for (int64_t j = 0; j < patch.columns; j++) to[j * h.step] = row[j];
        }
}

template <typename T>
void convolve(const Convolution<T>& task, const Shape& p, int threads) {
    const int64_t lanes = task.loops.lanes, taps = p.r * p.s;
    int64_t items = 0;
    // Small problems are cut finer, so that every thread gets some blocks.
    const int64_t share = p.n * task.out_plane / (3 * threads);
    const int64_t most =
        threads == 1 ? CONVOLUTION_POSITIONS : std::clamp<int64_t>(share, 8 * lanes, CONVOLUTION_POSITIONS);
    const Limits limits{lanes, sizeof(T), most, FLAT_OUTPUT, false};
    const std::vector<Job> jobs = sfg::jobs(task.parts, task.vertical, task.horizontal, limits, &items);
    int64_t source = 0, detour = 0;
    for (const Job& job : jobs) {
        source = std::max(source, (job.part->reads.last - job.part->reads.first) * job.layout.source_stride);
        if (job.layout.flat || job.horizontal->step != 1)
            detour = std::max(detour, spread(job.layout.rows * job.layout.pitch, sizeof(T)));
    }
    source = spread(source, sizeof(T)), detour *= task.loops.outputs;
    const Buffer<T> packed(task.weights * taps + task.out_channels), scratch((source + detour) * threads);
    T* biases = packed.data() + task.weights * taps;
    advise_large_pages(task.out, p.n * task.out_channels * task.out_plane * sizeof(T));
    const std::vector<const Tile*> tiles = tiles_of(task.parts);

    on_threads(threads, [&](int thread, int) {
        T* x = scratch.data() + (source + detour) * thread;
        T* aside = x + source;
        std::memset(x, 0, source * sizeof(T));
#pragma omp for schedule(static)
        for (size_t i = 0; i < tiles.size(); i++) pack(task, taps, *tiles[i], packed.data(), biases);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < p.n * items; item++) {
            const int64_t n = item / items;
            const Patch patch(jobs, item % items);
            const Job& job = *patch.job;
            const Layout& layout = job.layout;
            const Axis &v = *job.vertical, &h = *job.horizontal;
            const int64_t image = n * task.in_channels * task.in_plane;
            task.loops.copy(copy_of(task.in + image, task.relu_in ? task.relu_in + image : nullptr, task.in_plane,
                                    job.part->reads, v, h, patch.row, patch.rows, patch.column, patch.columns, x,
                                    layout));
            const bool direct = !layout.flat && h.step == 1;
            const int64_t aside_stride = spread(layout.rows * layout.pitch, sizeof(T));
            for (const Tile& tile : job.part->tiles) {
                const int64_t at = (n * task.out_channels + tile.first) * task.out_plane +
                                   (v.first + patch.row * v.step) * task.out_width + h.first + patch.column;
                task.loops.output({.x = x - job.part->reads.first * layout.source_stride,
                                   .channel_stride = layout.source_stride,
                                   .taps = layout.taps.data(),
                                   .tap_count = int64_t(layout.taps.size()),
                                   .reads = tile.reads.data(),
                                   .read_count = int64_t(tile.reads.size()),
                                   .weight = packed.data() + tile.weights * taps,
                                   .kernel_taps = taps,
                                   .bias = biases + tile.first,
                                   .outputs = tile.outputs,
                                   .relu = task.relu,
                                   .at = layout.strips(patch.rows, patch.columns),
                                   .y = direct ? task.out + at : aside,
                                   .residual = direct && task.residual ? task.residual + at : nullptr,
                                   .y_channel = direct ? task.out_plane : aside_stride,
                                   .y_strip = direct ? v.step * task.out_width : layout.pitch});
                if (!direct) place(aside, aside_stride, tile, patch, task, n);
            }
        }
    });
}

}  // namespace

template <typename T>
void forward(const InnerLoops<T>& loops, const T* x, const T* weight, const T* bias, const T* residual, bool relu, T* y,
             const Shape& shape, const Blocks& blocks, int threads) {
    const Shape p = with_long_rows(shape);
    const int64_t taps = p.r * p.s;
    Convolution<T> task{.loops = loops,
                        .in = x,
                        .relu_in = nullptr,
                        .in_channels = p.c,
                        .in_plane = p.h * p.w,
                        .weight = weight,
                        .bias = bias,
                        .output_stride = p.c * taps,
                        .read_stride = taps,
                        .residual = residual,
                        .relu = relu,
                        .out = y,
                        .out_channels = p.k,
                        .out_plane = p.oh * p.ow,
                        .out_width = p.ow,
                        .parts = {},
                        .weights = 0,
                        .vertical = undilated({forward_axis(p, 0)}),
                        .horizontal = {forward_axis(p, 1)}};
    task.parts = parts(blocks, false, loops.outputs, &task.weights);
    convolve(task, p, threads);
}

template <typename T>
void input_gradient(const InnerLoops<T>& loops, const T* dy, const T* relu, const T* weight, T* dx, const Shape& shape,
                    const Blocks& blocks, int threads) {
    const Shape p = with_long_rows(shape);
    const int64_t taps = p.r * p.s;
    // A convolution of dy with the kernels turned around.
    Convolution<T> task{.loops = loops,
                        .in = dy,
                        .relu_in = relu,
                        .in_channels = p.k,
                        .in_plane = p.oh * p.ow,
                        .weight = weight,
                        .bias = nullptr,
                        .output_stride = taps,
                        .read_stride = p.c * taps,
                        .residual = nullptr,
                        .relu = false,
                        .out = dx,
                        .out_channels = p.c,
                        .out_plane = p.h * p.w,
                        .out_width = p.w,
                        .parts = {},
                        .weights = 0,
                        .vertical = undilated(gradient_axes(p, 0)),
                        .horizontal = gradient_axes(p, 1)};
    task.parts = parts(blocks, true, loops.outputs, &task.weights);
    convolve(task, p, threads);
}

template <typename T>
void weight_gradient(const InnerLoops<T>& loops, const T* x, const T* dy, const T* relu, T* dw, T* db,
                     const Shape& shape, const Blocks& blocks, int threads) {
    const Shape p = with_long_rows(shape);
    const int64_t taps = p.r * p.s, lanes = loops.lanes, plane = p.h * p.w, out_plane = p.oh * p.ow;
    int64_t weights = 0, items = 0;
    const std::vector<Part> channel_parts = parts(blocks, false, loops.gradient_outputs, &weights);
    const std::vector<Axis> vertical = undilated({forward_axis(p, 0)}), horizontal = {forward_axis(p, 1)};
    threads =
        int(std::clamp<int64_t>(p.n * out_plane / (8 * lanes), 1, threads));  // each needs a copy of the gradients
    const int64_t share = p.n * out_plane / threads;
    const int64_t most = std::clamp<int64_t>(share, 8 * lanes, GRADIENT_POSITIONS);
    const Limits limits{lanes, sizeof(T), most, 1, true};
    const std::vector<Job> jobs = sfg::jobs(channel_parts, vertical, horizontal, limits, &items);
    int64_t source = 0, gradient = 0, shifted_most = 0;
    for (const Job& job : jobs) {
        const int64_t reads = job.part->reads.last - job.part->reads.first;
        const int64_t out_stride = spread(job.layout.rows * job.layout.pitch + lanes, sizeof(T));
        source = std::max(source, reads * job.layout.source_stride);
        gradient = std::max(gradient, (job.part->outputs.last - job.part->outputs.first) * out_stride);
        shifted_most = std::max(shifted_most, reads * taps);
    }
    source = spread(source, sizeof(T)), gradient = spread(gradient, sizeof(T));
    const int64_t sums = spread(weights * taps + p.k, sizeof(T)), per_thread = source + gradient + sums;
    const Buffer<T> scratch(per_thread * threads);
    const Buffer<Shifted<T>> shifted_lists(shifted_most * threads);
    const auto sums_of = [&](int thread) { return scratch.data() + per_thread * thread + source + gradient; };
    const std::vector<const Tile*> tiles = tiles_of(channel_parts);
    const int64_t none = 0, total = p.n * items;

    on_threads(threads, [&](int thread, int team) {
        T* xs = scratch.data() + per_thread * thread;
        T *dys = xs + source, *dws = dys + gradient, *dbs = dws + weights * taps;
        Shifted<T>* shifted = shifted_lists.data() + shifted_most * thread;
        std::memset(xs, 0, per_thread * sizeof(T));
        const int64_t last = total * (thread + 1) / team;  // a fixed share, for the sake of equal bits
        for (int64_t item = total * thread / team; item < last; item++) {
            const int64_t n = item / items;
            const Patch patch(jobs, item % items);
            const Job& job = *patch.job;
            const Layout& layout = job.layout;
            const Axis &v = *job.vertical, &h = *job.horizontal;
            const Range outputs = job.part->outputs;
            loops.copy(copy_of<T>(x + n * p.c * plane, nullptr, plane, job.part->reads, v, h, patch.row, patch.rows,
                                  patch.column, patch.columns, xs, layout));
            const int64_t out_stride = spread(layout.rows * layout.pitch + lanes, sizeof(T));
            const int64_t image = (n * p.k + outputs.first) * out_plane;
            // The outputs' lines are v.first + i * v.step; columns are all there is.
            loops.copy({.image = dy + image,
                        .relu = relu ? relu + image : nullptr,
                        .image_stride = out_plane,
                        .channels = outputs.last - outputs.first,
                        .vertical = {&v.first, 1, patch.row, v.step, patch.rows, p.oh},
                        .horizontal = {&none, 1, patch.column, 1, patch.columns, p.ow},
                        .scratch = dys,
                        .channel_stride = out_stride,
                        .phase_stride = 0,
                        .pitch = layout.pitch,
                        .slack = lanes});
            if (db)
                for (int64_t k = outputs.first; k < outputs.last; k++)
                    loops.sum(dys + (k - outputs.first) * out_stride, patch.rows, layout.pitch, patch.columns, dbs + k);
            Strips strips = layout.strips(patch.rows, patch.columns);
            strips.length = round_up(strips.length, lanes);
            for (const Tile& tile : job.part->tiles) {
                int64_t count = 0, channel = 0;
                for (const Range& range : tile.reads)
                    for (int64_t c = range.first; c < range.last; c++, channel++)
                        for (const Tap& tap : layout.taps)
                            shifted[count++] = {
                                xs + (c - job.part->reads.first) * layout.source_stride + tap.offset,
                                dws + ((tile.weights * taps + (channel * taps + tap.index) * tile.outputs))};
                loops.gradient({.dy = dys + (tile.first - outputs.first) * out_stride,
                                .channel_stride = out_stride,
                                .outputs = tile.outputs,
                                .shifted = shifted,
                                .shifted_count = count,
                                .at = strips});
            }
        }
        // Added up in the order of the threads.
        const int64_t kernel = p.c * taps;
#pragma omp barrier
#pragma omp for schedule(static)
        for (size_t i = 0; i < tiles.size(); i++) {
            const Tile& tile = *tiles[i];
            std::memset(dw + tile.first * kernel, 0, tile.outputs * kernel * sizeof(T));
            for (int64_t k = 0; k < tile.outputs; k++) {
                int64_t at = tile.weights * taps + k;
                for (const Range& range : tile.reads)
                    for (int64_t q = range.first * taps; q < range.last * taps; q++, at += tile.outputs) {
                        T total = 0;
                        for (int t = 0; t < team; t++) total += sums_of(t)[at];
                        dw[(tile.first + k) * kernel + q] = total;
                    }
            }
            for (int64_t k = tile.first; db && k < tile.first + tile.outputs; k++) {
                db[k] = 0;
                for (int t = 0; t < team; t++) db[k] += sums_of(t)[weights * taps + k];
            }
        }
    });
}

#define SFG_INSTANTIATE(T)                                                                                         \
    template void forward<T>(const InnerLoops<T>&, const T*, const T*, const T*, const T*, bool, T*, const Shape&, \
                             const Blocks&, int);                                                                  \
    template void input_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, T*, const Shape&,          \
                                    const Blocks&, int);                                                           \
    template void weight_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, T*, T*, const Shape&,     \
                                     const Blocks&, int);
SFG_INSTANTIATE(float)
SFG_INSTANTIATE(double)

}  // namespace sfg
