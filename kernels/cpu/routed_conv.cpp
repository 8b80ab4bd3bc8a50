// The three passes: plan, pack the weights, then work through the blocks of the output, several threads at a time.
#include "routed_conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <optional>

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
    if (bytes < int64_t(4) << 20) return;
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

// A convolution of which a block's sources are in scratch, for the outputs of one tile.
template <typename T>
struct Sums {
    const InnerLoops<T>& loops;
    const Tile& tile;
    const Layout& layout;
    const T* x;  // scratch, where source channel 0 would be
    const T *weights, *biases;
    int64_t taps, aside_stride;
    Strips at;

    // The sum over the sources in `reads`, the first of which is the `from`-th of those that the tile has weights for.
    // It starts with the bias, or with what is in `start`.
    OutputTile<T> over(const Range* reads, int64_t read_count, int64_t from, const T* start, T* to) const {
        return {.x = x,
                .channel_stride = layout.source_stride,
                .taps = layout.taps.data(),
                .tap_count = int64_t(layout.taps.size()),
                .reads = reads,
                .read_count = read_count,
                .weight = weights + from * taps * tile.outputs,
                .kernel_taps = taps,
                .bias = biases,
                .start = start,
                .start_channel = aside_stride,
                .start_strip = layout.pitch,
                .outputs = tile.outputs,
                .relu = false,
                .at = at,
                .y = to,
                .residual = nullptr,
                .y_channel = aside_stride,
                .y_strip = layout.pitch};
    }
};

// One tile of one block.
template <typename T>
struct Work {
    const Convolution<T>& task;
    const Patch& patch;
    int64_t n, item;
    Sums<T> sums;
    const Sums<T>* beside;  // of the convolution beside this one, if there is one
    T* asides;              // scratch for blocks of outputs
    int64_t aside_size;

    const Tile& tile() const { return sums.tile; }
    T* aside(int number) const { return asides + number * aside_size; }
    int64_t line() const { return patch.job->vertical->step * task.out_width; }  // between a block's rows

    // The block's first position in channel `channel` of an image of `channels`.
    int64_t at(int64_t channels, int64_t channel) const {
        const Axis &v = *patch.job->vertical, &h = *patch.job->horizontal;
        return (n * channels + channel) * task.out_plane + (v.first + patch.row * v.step) * task.out_width + h.first +
               patch.column * h.step;
    }

    // A finished block from scratch to where it belongs, the tile's first output being `to` there.
    void place(const T* from, T* to, const T* residual) const {
        const int64_t step = patch.job->horizontal->step;
        for (int64_t k = 0; k < tile().outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++) {
                const T* row = from + k * sums.aside_stride + i * sums.layout.pitch;
                const int64_t offset = k * task.out_plane + i * line();
                if (residual)
                    for (int64_t j = 0; j < patch.columns; j++)
                        to[offset + j * step] = row[j] + residual[offset + j * step];
                else if (step == 1)
                    move_row(to + offset, row, patch.columns);
                else
                    for (int64_t j = 0; j < patch.columns; j++) to[offset + j * step] = row[j];
            }
    }

    // The other way.
    void fetch(const T* from, T* to, const Sums<T>& layout_of) const {
        for (int64_t k = 0; k < tile().outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++)
                move_row(to + k * layout_of.aside_stride + i * layout_of.layout.pitch,
                         from + k * task.out_plane + i * line(), patch.columns);
    }
};

// How the blocks of an output are shared out.
struct Plan {
    std::vector<Job> jobs;
    int64_t items;  // of one image
    int64_t source, aside;
    // Of a convolution beside this one, with outputs of the same shape and tiles: how each job's blocks lie in its
    // scratch, and all that is read.
    std::vector<Layout> beside;
    Range beside_reads;
    int64_t beside_source;
};

template <typename T>
Plan plan(const Convolution<T>& task, const Shape& p, int threads, const Convolution<T>* beside = nullptr) {
    const int64_t lanes = task.loops.lanes;
    Plan plan{};
    // Small problems are cut finer, so that every thread gets some blocks.
    const int64_t share = p.n * task.out_plane / (3 * threads);
    const int64_t most =
        threads == 1 ? CONVOLUTION_POSITIONS : std::clamp<int64_t>(share, 8 * lanes, CONVOLUTION_POSITIONS);
    Limits limits{lanes, sizeof(T), most, FLAT_OUTPUT, false};
    if (beside)
        for (const Part& part : beside->parts)
            if (part.reads.first < part.reads.last) {
                const bool first = plan.beside_reads.last == 0;
                plan.beside_reads = {first ? part.reads.first : std::min(plan.beside_reads.first, part.reads.first),
                                     std::max(plan.beside_reads.last, part.reads.last)};
            }
    limits.other_channels = plan.beside_reads.last - plan.beside_reads.first;
    plan.jobs = sfg::jobs(task.parts, task.vertical, task.horizontal, limits, &plan.items);
    const auto fit_aside = [&](const Layout& layout) {
        plan.aside = std::max(plan.aside, spread(layout.rows * layout.pitch + lanes, sizeof(T)));
    };
    for (const Job& job : plan.jobs) {
        plan.source = std::max(plan.source, (job.part->reads.last - job.part->reads.first) * job.layout.source_stride);
        fit_aside(job.layout);
        if (!beside) continue;
        const Axis& v = beside->vertical[job.vertical - task.vertical.data()];
        plan.beside.push_back(layout(v, beside->horizontal[0], job.layout.rows, job.layout.columns, limits));
        plan.beside_source = std::max(plan.beside_source, limits.other_channels * plan.beside.back().source_stride);
        fit_aside(plan.beside.back());
    }
    plan.source = spread(plan.source, sizeof(T)), plan.aside *= task.loops.outputs;
    plan.beside_source = beside ? spread(plan.beside_source, sizeof(T)) : 0;
    return plan;
}

// [tile][channel read][tap][output], and behind them the biases of all outputs.
template <typename T>
class PackedWeights {
 public:
    PackedWeights(const Convolution<T>& task, int64_t taps)
        : task_(task), taps_(taps), tiles_(tiles_of(task.parts)), data_(task.weights * taps + task.out_channels) {}

    // By all threads together.
    void fill() const {
#pragma omp for schedule(static)
        for (size_t i = 0; i < tiles_.size(); i++) {
            const Tile& tile = *tiles_[i];
            T* to = weights(tile);
            for (const Range& range : tile.reads)
                for (int64_t c = range.first; c < range.last; c++) {
                    const T* from = task_.weight + tile.first * task_.output_stride + c * task_.read_stride;
                    for (int64_t t = 0; t < taps_; t++)
                        for (int64_t k = 0; k < tile.outputs; k++) *to++ = from[k * task_.output_stride + t];
                }
            for (int64_t k = 0; k < tile.outputs; k++) biases(tile)[k] = task_.bias ? task_.bias[tile.first + k] : T(0);
        }
    }
    T* weights(const Tile& tile) const { return data_.data() + tile.weights * taps_; }
    T* biases(const Tile& tile) const { return data_.data() + task_.weights * taps_ + tile.first; }
    const Tile& tile(int64_t first) const {
        return **std::find_if(tiles_.begin(), tiles_.end(), [&](const Tile* tile) { return tile->first == first; });
    }
    int64_t taps() const { return taps_; }

 private:
    const Convolution<T>& task_;
    const int64_t taps_;
    const std::vector<const Tile*> tiles_;
    const Buffer<T> data_;
};

// body(Work) for every tile of every block, in any order. `asides`: blocks of scratch that it wants. `beside`: another
// convolution, with outputs of the same shape and tiles.
template <typename T, typename Body>
void convolve(const Convolution<T>& task, const Plan& plan, const Shape& p, int threads, int asides, const Body& body,
              const Convolution<T>* beside = nullptr, int64_t beside_taps = 0) {
    const int64_t lanes = task.loops.lanes, per_thread = plan.source + plan.beside_source + asides * plan.aside;
    const PackedWeights<T> packed(task, p.r * p.s);
    const std::unique_ptr<PackedWeights<T>> packed_beside(beside ? new PackedWeights<T>(*beside, beside_taps)
                                                                 : nullptr);
    const Buffer<T> scratch(per_thread * threads);

    on_threads(threads, [&](int thread, int) {
        T* x = scratch.data() + per_thread * thread;
        T* x_beside = x + plan.source;
        std::memset(x, 0, (plan.source + plan.beside_source) * sizeof(T));
        packed.fill();
        if (beside) packed_beside->fill();
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < p.n * plan.items; item++) {
            const int64_t n = item / plan.items;
            const Patch patch(plan.jobs, item % plan.items);
            const Job& job = *patch.job;
            const auto load = [&](const Convolution<T>& source, Range channels, const Axis& v, const Axis& h,
                                  const Layout& layout, T* to) {
                const int64_t image = n * source.in_channels * source.in_plane;
                task.loops.copy(copy_of(source.in + image, source.relu_in ? source.relu_in + image : nullptr,
                                        source.in_plane, channels, v, h, patch.row, patch.rows, patch.column,
                                        patch.columns, to, layout));
            };
            const auto sums = [&](const PackedWeights<T>& weights, const Tile& tile, const Layout& layout,
                                  const T* sources) {
                return Sums<T>{.loops = task.loops,
                               .tile = tile,
                               .layout = layout,
                               .x = sources,
                               .weights = weights.weights(tile),
                               .biases = weights.biases(tile),
                               .taps = weights.taps(),
                               .aside_stride = spread(layout.rows * layout.pitch + lanes, sizeof(T)),
                               .at = layout.strips(patch.rows, patch.columns)};
            };
            load(task, job.part->reads, *job.vertical, *job.horizontal, job.layout, x);
            const Layout* other = beside ? &plan.beside[&job - plan.jobs.data()] : nullptr;
            if (beside)
                load(*beside, plan.beside_reads, beside->vertical[job.vertical - task.vertical.data()],
                     beside->horizontal[0], *other, x_beside);
            for (const Tile& tile : job.part->tiles) {
                Work<T> work{
                    .task = task,
                    .patch = patch,
                    .n = n,
                    .item = item,
                    .sums = sums(packed, tile, job.layout, x - job.part->reads.first * job.layout.source_stride),
                    .beside = nullptr,
                    .asides = x_beside + plan.beside_source,
                    .aside_size = plan.aside};
                if (!beside) {
                    body(work);
                    continue;
                }
                const Sums<T> second = sums(*packed_beside, packed_beside->tile(tile.first), *other,
                                            x_beside - plan.beside_reads.first * other->source_stride);
                work.beside = &second;
                body(work);
            }
        }
    });
}

// What a tile computes of one output: straight to its place where it can, else by way of scratch.
template <typename T>
void finish(const Work<T>& work, OutputTile<T> sum, T* to, const T* residual, T* aside) {
    const bool direct = !work.sums.layout.flat && work.patch.job->horizontal->step == 1;
    if (direct) {
        sum.y = to, sum.residual = residual;
        sum.y_channel = work.task.out_plane, sum.y_strip = work.line();
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

// A convolution of dy with the kernels turned around.
template <typename T>
Convolution<T> gradient_task(const InnerLoops<T>& loops, const T* dy, const T* relu, const T* weight, const Shape& p,
                             const Blocks& blocks) {
    const int64_t taps = p.r * p.s;
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
    task.parts = parts(blocks, true, loops.outputs, &task.weights);
    return task;
}

// The same groups, where every output group reads the input groups from `first` on.
struct Everything {
    Everything(const Blocks& b, int64_t first)
        : reads(new bool[b.groups_out * b.groups_in]),
          blocks{b.rows, b.columns, reads.get(), b.groups_out, b.groups_in} {
        for (int64_t i = 0; i < b.groups_out * b.groups_in; i++) reads[i] = i % b.groups_in >= first;
    }
    std::unique_ptr<bool[]> reads;
    Blocks blocks;
};

// u of a tile's rows as they would be in group g, in scratch: in `aside`, or all of it in `kept` already.
template <typename T>
const T* in_group(int64_t g, const Sums<T>& sums, const Blocks& blocks, const T* kept, T* aside) {
    const bool reads = g < blocks.groups_in && !(kept && g == 0);
    const Range own = reads ? Range{blocks.columns[g], blocks.columns[g + 1]} : Range{0, 0};
    if (kept && own.first == own.last) return kept;
    const int64_t from = own.first < own.last ? own.first - sums.tile.reads.front().first : 0;
    sums.loops.output(sums.over(&own, 1, from, kept, aside));
    return aside;
}

// Sums of all items for all gates -> dz.
template <typename T>
void add_up(const Buffer<T>& found, int64_t items, int64_t gates, T* dz) {
    for (int64_t gate = 0; gate < gates; gate++) {
        double total = 0;
        for (int64_t item = 0; item < items; item++) total += found.data()[item * gates + gate];
        dz[gate] = T(total);
    }
}

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
        const Tile& tile = work.tile();
        const int64_t at = work.at(p.k, tile.first);
        OutputTile<T> sum = work.sums.over(tile.reads.data(), tile.reads.size(), 0, nullptr, nullptr);
        Range rest{0, 0};
        if (kept) {
            const Range first{0, shared};
            loops.output(work.sums.over(&first, 1, 0, nullptr, work.aside(0)));
            work.place(work.aside(0), kept + at, nullptr);
            if (tile.group > 0) rest = {blocks.columns[tile.group], blocks.columns[tile.group + 1]};
            sum = work.sums.over(&rest, 1, shared, work.aside(0), nullptr);
        }
        sum.relu = relu;
        finish(work, sum, y + at, residual ? residual + at : nullptr, work.aside(kept ? 1 : 0));
    });
}

template <typename T>
void input_gradient(const InnerLoops<T>& loops, const T* dy, const T* relu, const T* weight, T* dx, T* others,
                    const T* live, const Producer<T>* producer, T* dz, const Shape& shape, const Blocks& blocks,
                    int threads) {
    // With a producer, both convolutions walk over the same lines.
    const Shape p = producer ? shape : with_long_rows(shape);
    const int64_t last = others || producer ? blocks.groups_in - 1 : 0;
    const Everything everything(blocks, 0);
    Convolution<T> task = gradient_task(loops, dy, relu, weight, p, last ? everything.blocks : blocks);
    std::optional<Convolution<T>> beside;
    std::optional<Everything> sources;
    int64_t beside_taps = 0;
    if (producer) {
        const Shape& q = producer->shape;
        sources.emplace(producer->blocks, producer->kept ? 1 : 0);
        beside.emplace(forward_task(loops, producer->x, producer->weight, producer->bias, q, sources->blocks));
        beside_taps = q.r * q.s;
        const Axis mine = gradient_axes(p, 0)[0], its = forward_axis(q, 0);
        const int64_t n = std::lcm(apart(mine), apart(its));
        task.vertical = every({mine}, n), beside->vertical = every({its}, n);
    }
    const Convolution<T>* second = beside ? &*beside : nullptr;
    const Plan shares = plan(task, p, threads, second);
    const int64_t items = p.n * shares.items, gates = dz ? (producer ? last + 1 : 1) * p.c : 0;
    const Buffer<T> found(items * gates);  // [item][gate]: of the columns' own groups, then of their others
    std::fill_n(found.data(), items * gates, T(0));
    const int64_t bytes = p.n * p.c * p.h * p.w * sizeof(T);
    advise_large_pages(dx, bytes);
    if (others) advise_large_pages(others, last * bytes);
    const bool shared = last > 0 && blocks.groups_out > 1 && blocks.reads[blocks.groups_in];  // row group 1 reads 0

    // The inner products of a block of the gradient, in scratch, with its features.
    const auto gate = [&](const Work<T>& work, int64_t number, const T* df, const T* u, int64_t u_channel,
                          int64_t u_row, bool behind_norm) {
        const bool affine = behind_norm && producer->scale;
        const int64_t other = (number - 1) * p.c + work.tile().first;
        loops.gates({.u = u,
                     .df = df,
                     .u_channel = u_channel,
                     .u_row = u_row,
                     .df_channel = work.sums.aside_stride,
                     .df_row = work.sums.layout.pitch,
                     .scale = affine ? producer->scale + other : nullptr,
                     .shift = affine ? producer->shift + other : nullptr,
                     .relu = behind_norm && producer->relu,
                     .channels = work.tile().outputs,
                     .rows = work.patch.rows,
                     .columns = work.patch.columns,
                     .sums = found.data() + work.item * gates + number * p.c + work.tile().first});
    };
    const auto of_live = [&](const Work<T>& work, const T* df) {
        const int64_t at = work.at(p.c, work.tile().first);
        work.place(df, dx + at, nullptr);
        if (dz) gate(work, 0, df, live + at, task.out_plane, work.line(), false);
    };

    if (!last)
        return convolve(task, shares, p, threads, 1,
                        [&](const Work<T>& work) {
                            const std::vector<Range>& reads = work.tile().reads;
                            const OutputTile<T> sum =
                                work.sums.over(reads.data(), reads.size(), 0, nullptr, work.aside(0));
                            if (!dz)
                                return finish(work, sum, dx + work.at(p.c, work.tile().first), (const T*)nullptr,
                                              work.aside(0));
                            loops.output(sum);
                            of_live(work, work.aside(0));
                        }),
               add_up(found, items, gates, dz);

    const auto of_all_groups = [&](const Work<T>& work) {
        const Tile& tile = work.tile();
        T *total = work.aside(0), *kept = nullptr;
        if (producer && producer->kept)
            work.fetch(producer->kept + work.at(p.c, tile.first), kept = work.aside(2), *work.beside);
        bool started = false;
        int64_t other = 0;
        for (int64_t step = 0; step <= last; step++) {  // group 0 last: it gets the sum of all, if it is read by all
            const int64_t g = (step + 1) % (last + 1);
            const Range own = g < blocks.groups_out ? Range{blocks.rows[g], blocks.rows[g + 1]} : Range{0, 0};
            const bool sums_up = shared && g == 0, begins = shared && g != 0 && !started;
            T* df = begins ? total : work.aside(1);
            const int64_t number = g == tile.group ? 0 : ++other;
            const bool nothing = own.first == own.last && !(sums_up && started);
            if (nothing && number && producer) continue;
            loops.output(work.sums.over(&own, 1, own.first, sums_up && started ? total : nullptr, df));
            if (shared && !begins && g != 0)
                for (int64_t k = 0; k < tile.outputs; k++)
                    loops.add(total + k * work.sums.aside_stride, df + k * work.sums.aside_stride,
                              (work.patch.rows - 1) * work.sums.layout.pitch + work.patch.columns);
            started = true;
            if (number == 0) {
                of_live(work, df);
            } else if (others) {
                work.place(df, others + work.at(last * p.c, (number - 1) * p.c + tile.first), nullptr);
            } else {
                const T* u = in_group(g, *work.beside, producer->blocks, (const T*)kept, work.aside(3));
                gate(work, number, df, u, work.beside->aside_stride, work.beside->layout.pitch, true);
            }
        }
    };
    convolve(task, shares, p, threads, producer ? 4 : 2, of_all_groups, second, beside_taps);
    if (dz) add_up(found, items, gates, dz);
}

template <typename T>
void gate_gradient(const InnerLoops<T>& loops, const Producer<T>& producer, const T* df, T* dz, int threads) {
    const Shape p = with_long_rows(producer.shape);
    const Blocks& blocks = producer.blocks;
    const int64_t last = blocks.groups_out - 1, gates = last * p.k;
    const Everything sources(blocks, producer.kept ? 1 : 0);
    const Convolution<T> task = forward_task(loops, producer.x, producer.weight, producer.bias, p, sources.blocks);
    const Plan shares = plan(task, p, threads);
    const int64_t items = p.n * shares.items;
    const Buffer<T> found(items * gates);  // [item][gate]
    std::fill_n(found.data(), items * gates, T(0));
    convolve(task, shares, p, threads, 2, [&](const Work<T>& work) {
        const Tile& tile = work.tile();
        T* kept = nullptr;
        if (producer.kept) work.fetch(producer.kept + work.at(p.k, tile.first), kept = work.aside(0), work.sums);
        for (int64_t step = 0, other = 0; step <= last; step++) {
            const int64_t g = (step + 1) % (last + 1);
            if (g == tile.group) continue;
            const int64_t gate = other++ * p.k + tile.first;
            loops.gates({.u = in_group(g, work.sums, blocks, (const T*)kept, work.aside(1)),
                         .df = df + work.at(gates, gate),
                         .u_channel = work.sums.aside_stride,
                         .u_row = work.sums.layout.pitch,
                         .df_channel = task.out_plane,
                         .df_row = work.line(),
                         .scale = producer.scale ? producer.scale + gate : nullptr,
                         .shift = producer.scale ? producer.shift + gate : nullptr,
                         .relu = producer.relu,
                         .channels = tile.outputs,
                         .rows = work.patch.rows,
                         .columns = work.patch.columns,
                         .sums = found.data() + work.item * gates + gate});
        }
    });
    add_up(found, items, gates, dz);
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

#define SFG_INSTANTIATE(T)                                                                                             \
    template void forward<T>(const InnerLoops<T>&, const T*, const T*, const T*, const T*, bool, T*, T*, const Shape&, \
                             const Blocks&, int);                                                                      \
    template void input_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, T*, T*, const T*,              \
                                    const Producer<T>*, T*, const Shape&, const Blocks&, int);                         \
    template void gate_gradient<T>(const InnerLoops<T>&, const Producer<T>&, const T*, T*, int);                       \
    template void weight_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, T*, T*, const Shape&,         \
                                     const Blocks&, int);
SFG_INSTANTIATE(float)
SFG_INSTANTIATE(double)

}  // namespace sfg
