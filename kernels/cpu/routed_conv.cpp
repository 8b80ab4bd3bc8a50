// The three passes: plan, pack the weights, then work through the blocks of the output, several threads at a time.
#include "routed_conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
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

// Forward pass and input gradient: out[n,k] = bias[k] + sum of weight * in.
template <typename T>
struct Convolution {
    const InnerLoops<T>& loops;
    const T *in, *relu_in;          // relu_in: see Copy
    int64_t in_channels, in_plane;  // plane: numbers in a channel
    const T *weight, *bias;
    int64_t output_stride, read_stride;  // of the weight
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

// One tile of one block, while its sources are in scratch.
template <typename T>
struct Work {
    const Convolution<T>& task;
    const Tile& tile;
    const Patch& patch;
    int64_t n, item;
    const T* x;  // scratch, where source channel 0 would be
    T* asides;   // scratch for blocks of outputs
    int64_t aside_stride, aside_size;
    const T *weights, *biases;  // of the tile
    int64_t taps;

    const Layout& layout() const { return patch.job->layout; }
    T* aside(int number) const { return asides + number * aside_size; }

    // The tile's first output in an image of `channels` channels, of which it is the one given.
    int64_t at(int64_t channels, int64_t channel) const {
        const Axis &v = *patch.job->vertical, &h = *patch.job->horizontal;
        return (n * channels + channel) * task.out_plane + (v.first + patch.row * v.step) * task.out_width + h.first +
               patch.column * h.step;
    }

    // The sum over some of the channels that the tile's weights are for, the first of which is `from`-th among them.
    OutputTile<T> sum(const Range* reads, int64_t read_count, int64_t from, const T* start, T* to) const {
        return {.x = x,
                .channel_stride = layout().source_stride,
                .taps = layout().taps.data(),
                .tap_count = int64_t(layout().taps.size()),
                .reads = reads,
                .read_count = read_count,
                .weight = weights + from * taps * tile.outputs,
                .kernel_taps = taps,
                .bias = biases,
                .start = start,
                .start_channel = aside_stride,
                .start_strip = layout().pitch,
                .outputs = tile.outputs,
                .relu = false,
                .at = layout().strips(patch.rows, patch.columns),
                .y = to,
                .residual = nullptr,
                .y_channel = aside_stride,
                .y_strip = layout().pitch};
    }

    // A finished block from scratch to where it belongs, the tile's first output being `to` there.
    void place(const T* from, T* to, const T* residual) const {
        const Axis &v = *patch.job->vertical, &h = *patch.job->horizontal;
        for (int64_t k = 0; k < tile.outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++) {
                const T* row = from + k * aside_stride + i * layout().pitch;
                const int64_t offset = k * task.out_plane + i * v.step * task.out_width;
                if (residual)
                    for (int64_t j = 0; j < patch.columns; j++)
                        to[offset + j * h.step] = row[j] + residual[offset + j * h.step];
                else if (h.step == 1)
                    move_row(to + offset, row, patch.columns);
                else
                    for (int64_t j = 0; j < patch.columns; j++) to[offset + j * h.step] = row[j];
            }
    }
};

// How the blocks of an output are shared out.
struct Plan {
    std::vector<Job> jobs;
    int64_t items;  // of one image
    int64_t source, aside;
};

template <typename T>
Plan plan(const Convolution<T>& task, const Shape& p, int threads) {
    const int64_t lanes = task.loops.lanes;
    Plan plan{{}, 0, 0, 0};
    // Small problems are cut finer, so that every thread gets some blocks.
    const int64_t share = p.n * task.out_plane / (3 * threads);
    const int64_t most =
        threads == 1 ? CONVOLUTION_POSITIONS : std::clamp<int64_t>(share, 8 * lanes, CONVOLUTION_POSITIONS);
    const Limits limits{lanes, sizeof(T), most, FLAT_OUTPUT, false};
    plan.jobs = sfg::jobs(task.parts, task.vertical, task.horizontal, limits, &plan.items);
    for (const Job& job : plan.jobs) {
        plan.source = std::max(plan.source, (job.part->reads.last - job.part->reads.first) * job.layout.source_stride);
        plan.aside = std::max(plan.aside, spread(job.layout.rows * job.layout.pitch + lanes, sizeof(T)));
    }
    plan.source = spread(plan.source, sizeof(T)), plan.aside *= task.loops.outputs;
    return plan;
}

// body(Work) for every tile of every block, in any order. `asides`: blocks of scratch that it wants.
template <typename T, typename Body>
void convolve(const Convolution<T>& task, const Plan& plan, const Shape& p, int threads, int asides, const Body& body) {
    const int64_t lanes = task.loops.lanes, taps = p.r * p.s, source = plan.source, aside = plan.aside;
    const Buffer<T> packed(task.weights * taps + task.out_channels), scratch((source + asides * aside) * threads);
    T* biases = packed.data() + task.weights * taps;
    const std::vector<const Tile*> tiles = tiles_of(task.parts);

    on_threads(threads, [&](int thread, int) {
        T* x = scratch.data() + (source + asides * aside) * thread;
        std::memset(x, 0, source * sizeof(T));
#pragma omp for schedule(static)
        for (size_t i = 0; i < tiles.size(); i++) pack(task, taps, *tiles[i], packed.data(), biases);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < p.n * plan.items; item++) {
            const int64_t n = item / plan.items;
            const Patch patch(plan.jobs, item % plan.items);
            const Job& job = *patch.job;
            const int64_t image = n * task.in_channels * task.in_plane;
            task.loops.copy(copy_of(task.in + image, task.relu_in ? task.relu_in + image : nullptr, task.in_plane,
                                    job.part->reads, *job.vertical, *job.horizontal, patch.row, patch.rows,
                                    patch.column, patch.columns, x, job.layout));
            for (const Tile& tile : job.part->tiles)
                body(Work<T>{.task = task,
                             .tile = tile,
                             .patch = patch,
                             .n = n,
                             .item = item,
                             .x = x - job.part->reads.first * job.layout.source_stride,
                             .asides = x + source,
                             .aside_stride = spread(job.layout.rows * job.layout.pitch + lanes, sizeof(T)),
                             .aside_size = aside,
                             .weights = packed.data() + tile.weights * taps,
                             .biases = biases + tile.first,
                             .taps = taps});
        }
    });
}

// What a tile computes of one output: straight to its place where it can, else by way of scratch.
template <typename T>
void finish(const Work<T>& work, OutputTile<T> sum, T* to, const T* residual, T* aside) {
    const Axis &v = *work.patch.job->vertical, &h = *work.patch.job->horizontal;
    const bool direct = !work.layout().flat && h.step == 1;
    if (direct) {
        sum.y = to, sum.residual = residual;
        sum.y_channel = work.task.out_plane, sum.y_strip = v.step * work.task.out_width;
        return work.task.loops.output(sum);
    }
    sum.y = aside;
    work.task.loops.output(sum);
    work.place(aside, to, residual);
}

template <typename T>
Convolution<T> forward_task(const InnerLoops<T>& loops, const T* x, const T* weight, const T* bias, const Shape& p,
                            const Blocks& blocks) {
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
                        .out_channels = p.k,
                        .out_plane = p.oh * p.ow,
                        .out_width = p.ow,
                        .parts = {},
                        .weights = 0,
                        .vertical = undilated({forward_axis(p, 0)}),
                        .horizontal = {forward_axis(p, 1)}};
    task.parts = parts(blocks, false, loops.outputs, &task.weights);
    return task;
}

// The same groups, where every output group reads the input groups from `first` on.
struct Everything {
    Everything(const Blocks& b, int64_t first)
        : reads(new bool[b.groups_out * b.groups_in]), blocks{b.rows, b.columns, reads.get(), b.groups_out, b.groups_in} {
        for (int64_t i = 0; i < b.groups_out * b.groups_in; i++) reads[i] = i % b.groups_in >= first;
    }
    std::unique_ptr<bool[]> reads;
    Blocks blocks;
};

}  // namespace

template <typename T>
void forward(const InnerLoops<T>& loops, const T* x, const T* weight, const T* bias, const T* residual, bool relu, T* y,
             T* kept, const Shape& shape, const Blocks& blocks, int threads) {
    const Shape p = with_long_rows(shape);
    const Convolution<T> task = forward_task(loops, x, weight, bias, p, blocks);
    const int64_t bytes = p.n * p.k * p.oh * p.ow * sizeof(T), shared = blocks.columns[1];
    advise_large_pages(y, bytes);
    if (kept) advise_large_pages(kept, bytes);
    convolve(task, plan(task, p, threads), p, threads, kept ? 2 : 1, [&](const Work<T>& work) {
        const int64_t at = work.at(p.k, work.tile.first);
        const std::vector<Range>& reads = work.tile.reads;
        OutputTile<T> sum = work.sum(reads.data(), reads.size(), 0, nullptr, nullptr);
        Range rest{0, 0};
        if (kept) {
            const Range first{0, shared};
            loops.output(work.sum(&first, 1, 0, nullptr, work.aside(0)));
            work.place(work.aside(0), kept + at, nullptr);
            if (const int64_t g = work.tile.group; g > 0 && g < blocks.groups_in)
                rest = {blocks.columns[g], blocks.columns[g + 1]};
            sum = work.sum(&rest, 1, shared, work.aside(0), nullptr);
        }
        sum.relu = relu;
        finish(work, sum, y + at, residual ? residual + at : nullptr, work.aside(kept ? 1 : 0));
    });
}

template <typename T>
void input_gradient(const InnerLoops<T>& loops, const T* dy, const T* relu, const T* weight, T* dx, T* others,
                    const Shape& shape, const Blocks& blocks, int threads) {
    const Shape p = with_long_rows(shape);
    const int64_t taps = p.r * p.s, last = blocks.groups_in - 1;
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
                        .out_channels = p.c,
                        .out_plane = p.h * p.w,
                        .out_width = p.w,
                        .parts = {},
                        .weights = 0,
                        .vertical = undilated(gradient_axes(p, 0)),
                        .horizontal = gradient_axes(p, 1)};
    const Everything everything(blocks, 0);
    task.parts = parts(others ? everything.blocks : blocks, true, loops.outputs, &task.weights);
    const Plan blocks_of_output = plan(task, p, threads);
    advise_large_pages(dx, p.n * p.c * p.h * p.w * sizeof(T));
    if (!others)
        return convolve(task, blocks_of_output, p, threads, 1, [&](const Work<T>& work) {
            const std::vector<Range>& reads = work.tile.reads;
            const OutputTile<T> sum = work.sum(reads.data(), reads.size(), 0, nullptr, nullptr);
            finish(work, sum, dx + work.at(p.c, work.tile.first), static_cast<const T*>(nullptr), work.aside(0));
        });
    advise_large_pages(others, last * p.n * p.c * p.h * p.w * sizeof(T));
    const bool shared = last > 0 && blocks.groups_out > 1 && blocks.reads[blocks.groups_in];  // row group 1 reads 0
    convolve(task, blocks_of_output, p, threads, 2, [&](const Work<T>& work) {
        const Tile& tile = work.tile;
        bool started = false;
        int64_t other = 0;
        for (int64_t step = 0; step <= last; step++) {  // group 0 last: it gets the sum of all, if it is read by all
            const int64_t g = (step + 1) % (last + 1);
            const Range own = g < blocks.groups_out ? Range{blocks.rows[g], blocks.rows[g + 1]} : Range{0, 0};
            T* to = g == tile.group ? dx + work.at(p.c, tile.first)
                                    : others + work.at(last * p.c, other++ * p.c + tile.first);
            const bool total = shared && g == 0;
            OutputTile<T> sum = work.sum(&own, 1, own.first, total && started ? work.aside(1) : nullptr, nullptr);
            if (!shared || total || own.first == own.last) {
                finish(work, sum, to, static_cast<const T*>(nullptr), work.aside(0));
                continue;
            }
            T* aside = work.aside(started ? 0 : 1);
            sum.y = aside;
            loops.output(sum);
            work.place(aside, to, nullptr);
            const Layout& layout = work.layout();
            for (int64_t k = 0; started && k < tile.outputs; k++)
                loops.add(work.aside(1) + k * work.aside_stride, aside + k * work.aside_stride,
                          (work.patch.rows - 1) * layout.pitch + work.patch.columns);
            started = true;
        }
    });
}

template <typename T>
void gate_gradient(const InnerLoops<T>& loops, const T* x, const T* weight, const T* bias, const T* kept, const T* df,
                   const T* scale, const T* shift, bool relu, T* dz, const Shape& shape, const Blocks& blocks,
                   int threads) {
    const Shape p = with_long_rows(shape);
    const int64_t last = blocks.groups_out - 1, gates = last * p.k;
    // Group g reads column group g; column group 0, which others may read, too, is in `kept`.
    const Everything sources(blocks, kept ? 1 : 0);
    const Convolution<T> task = forward_task(loops, x, weight, bias, p, sources.blocks);
    const Plan blocks_of_output = plan(task, p, threads);
    const int64_t items = p.n * blocks_of_output.items;
    const Buffer<T> found(items * gates);  // [item][gate]
    std::fill_n(found.data(), items * gates, T(0));
    convolve(task, blocks_of_output, p, threads, 2, [&](const Work<T>& work) {
        const Tile& tile = work.tile;
        const Patch& patch = work.patch;
        const int64_t pitch = work.layout().pitch, line = patch.job->vertical->step * task.out_width;
        for (int64_t k = 0; kept && k < tile.outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++)
                move_row(work.aside(0) + k * work.aside_stride + i * pitch,
                         kept + work.at(p.k, tile.first + k) + i * line, patch.columns);
        int64_t other = 0;
        for (int64_t step = 0; step <= last; step++) {
            const int64_t g = (step + 1) % (last + 1);
            if (g == tile.group) continue;
            const bool reads = g < blocks.groups_in && !(kept && g == 0);
            const Range own = reads ? Range{blocks.columns[g], blocks.columns[g + 1]} : Range{0, 0};
            const T* u = work.aside(0);
            if (!kept || own.first < own.last) {
                const int64_t from = own.first < own.last ? own.first - tile.reads.front().first : 0;
                loops.output(work.sum(&own, 1, from, kept ? work.aside(0) : nullptr, work.aside(1)));
                u = work.aside(1);
            }
            const int64_t gate = other++ * p.k + tile.first;
            loops.gates({.u = u,
                         .df = df + work.at(gates, gate),
                         .u_channel = work.aside_stride,
                         .u_row = pitch,
                         .df_channel = task.out_plane,
                         .df_row = line,
                         .scale = scale ? scale + gate : nullptr,
                         .shift = scale ? shift + gate : nullptr,
                         .relu = relu,
                         .channels = tile.outputs,
                         .rows = patch.rows,
                         .columns = patch.columns,
                         .sums = found.data() + work.item * gates + gate});
        }
    });
    for (int64_t gate = 0; gate < gates; gate++) {
        double total = 0;
        for (int64_t item = 0; item < items; item++) total += found.data()[item * gates + gate];
        dz[gate] = T(total);
    }
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
    template void forward<T>(const InnerLoops<T>&, const T*, const T*, const T*, const T*, bool, T*, T*,           \
                             const Shape&, const Blocks&, int);                                                    \
    template void input_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, T*, T*, const Shape&,      \
                                    const Blocks&, int);                                                           \
    template void gate_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, const T*, const T*,         \
                                   const T*, const T*, bool, T*, const Shape&, const Blocks&, int);                                                          \
    template void weight_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, T*, T*, const Shape&,     \
                                     const Blocks&, int);
SFG_INSTANTIATE(float)
SFG_INSTANTIATE(double)

}  // namespace sfg
