// What forward pass, input gradient and gates' gradient share. A Convolution says what is summed, a Plan how its output
// is cut into blocks. `convolve` goes through the blocks with several threads, copies the sources of each to scratch,
// and calls a function for each tile of the block, which computes the sums and does what it likes with them.
#pragma once
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "rows.h"
#include "scratch.h"
#include "winograd.h"

namespace sfg {

constexpr int64_t CONVOLUTION_POSITIONS = 4096;
constexpr double FLAT_OUTPUT = 1.06;  // cost of a position in a flat block: its outputs take a detour through scratch
constexpr double COMBINING = 8;       // multiplications that it costs to combine Winograd's products to an output
constexpr int64_t MOST_TAPS = 7;      // in a row of a kernel, for Winograd
constexpr int64_t STRIP = 128;        // positions: a strip of that length is long enough for the loops

// out[n,k] = bias[k] + sum of weight * in, for forward pass and input gradient.
template <typename T>
struct Convolution {
    const InnerLoops<T>& loops;
    const T *in, *relu_output;                         // see Copy
    const T *scale_in = nullptr, *shift_in = nullptr;  // see Copy
    int64_t in_channels, in_plane;                     // plane: numbers in a channel
    const T *weight, *bias;
    int64_t output_stride, read_stride;        // in the weight, of an output channel and of a source channel
    const int64_t *output_order, *read_order;  // the places of output and source channels in the weight, see Blocks
    int64_t out_channels, out_plane, out_width;
    std::vector<Part> parts;
    int64_t weights;  // kernels that all tiles have together
    std::vector<Axis> vertical, horizontal;
    int64_t kernel_taps;
    int64_t taps = kernel_taps;  // numbers that a kernel has once it is packed: with Winograd, those of all products
    bool winograd = false;

    // Chooses between plain sums and Winograd's products, by their cost. The other members must be set already.
    void choose_method() {
        int64_t outputs = 0;
        for (const Part& part : parts)
            for (const Tile& tile : part.tiles) outputs += tile.outputs;
        const Limits limits{loops.lanes, sizeof(T), 0, FLAT_OUTPUT, false};
        const double sources = double(weights * horizontal[0].tap.size()) / double(std::max<int64_t>(outputs, 1));
        winograd = sources > 0 && kernel_taps <= winograd::TAPS * MOST_TAPS &&
                   suits_winograd(vertical, horizontal, limits, COMBINING / sources, 0);
        if (winograd) taps = winograd::PRODUCTS * horizontal[0].tap.size();
    }
};

// A block of a few channels, in scratch or in a tensor.
template <typename T>
struct Place {
    T* at;
    int64_t channel, row;  // strides

    Place<const T> to_read() const { return {at, channel, row}; }
};

// The sums of one tile in one block, whose sources are in scratch.
template <typename T>
struct Sums {
    const InnerLoops<T>& loops;
    const Tile& tile;
    const Layout& layout;
    const T* x;  // scratch, where source channel 0 would be
    const T *weights, *biases;
    int64_t taps;          // weights of a source channel that stand side by side (of one product, with Winograd)
    int64_t aside_stride;  // of a channel in a block of scratch, see Work::aside
    Strips at;
    T* products;  // scratch for Winograd's products of a group of rows

    // The sum over the source channels in `reads`; the first of them is the `from`-th channel that the tile has weights
    // for. The sum starts with the bias, or with what is in `start`, and goes to `to`.
    OutputTile<T> over(const Range* reads, int64_t read_count, int64_t from, const Place<const T>& start,
                       const Place<T>& to) const {
        return {.x = x,
                .channel_stride = layout.source_stride,
                .taps = layout.taps.data(),
                .tap_count = int64_t(layout.taps.size()),
                .reads = reads,
                .read_count = read_count,
                .weight = weights + from * taps * tile.outputs,
                .kernel_taps = taps,
                .bias = biases,
                .start = start.at,
                .start_channel = start.channel,
                .start_strip = start.row,
                .outputs = tile.outputs,
                .relu = false,
                .at = at,
                .y = to.at,
                .residual = nullptr,
                .y_channel = to.channel,
                .y_strip = to.row};
    }
    Place<T> scratch(T* at) const { return {at, aside_stride, layout.pitch}; }

    // Computes a sum: the loops do so at once, or by Winograd, for every group of rows, each product and then their
    // combination. `later`: blocks that the caller reads afterwards.
    void compute(const OutputTile<T>& t, std::initializer_list<Place<const T>> later = {}) const {
        if (!layout.winograd) return loops.output(t);
        static const T no_bias[MOST_OUTPUTS] = {};
        OutputTile<T> product = t;
        const int64_t weights_of_one = tile.reads_total * taps * t.outputs;
        product.bias = no_bias, product.start = product.residual = nullptr, product.relu = false;
        product.y_channel = product_channel(layout, loops.lanes);
        const int64_t product_stride = product.y_channel * t.outputs, together = at_a_time(layout, loops.lanes);
        for (int64_t row = 0; row < t.at.strips; row += winograd::ROWS) {
            const int64_t group = row / winograd::ROWS, number = group % together;
            if (number == 0) {  // the products of the next few groups are computed as one strip
                const int64_t left = groups_of(t.at.strips - row);
                product.at = {1, (std::min(together, left) - 1) * layout.pitch + t.at.length, 0};
                const int64_t rows = std::min(together * winograd::ROWS, t.at.strips - row);
                for (int64_t i = 0; i < winograd::PRODUCTS; i++) {
                    for (int64_t k = i; k < t.outputs; k += winograd::PRODUCTS) {  // each product asks for a part
                        ask_for({t.y, t.y_channel, t.y_strip}, k, row, rows);
                        ask_for({t.start, t.start_channel, t.start_strip}, k, row, rows);
                        ask_for({t.residual, t.y_channel, t.y_strip}, k, row, rows);
                        for (const Place<const T>& place : later) ask_for(place, k, row, rows);
                    }
                    product.x = t.x + group * layout.pitch + i * layout.phase_stride;
                    product.weight = t.weight + i * weights_of_one, product.y = products + i * product_stride;
                    loops.output(product);
                }
            }
            loops.combine({.products = products + number * layout.pitch,
                           .product_stride = product_stride,
                           .channel_stride = product.y_channel,
                           .bias = t.bias,
                           .start = t.start ? t.start + row * t.start_strip : nullptr,
                           .start_channel = t.start_channel,
                           .start_row = t.start_strip,
                           .outputs = t.outputs,
                           .relu = t.relu,
                           .rows = std::min<int64_t>(winograd::ROWS, t.at.strips - row),
                           .columns = t.at.length,
                           .y = t.y + row * t.y_strip,
                           .residual = t.residual ? t.residual + row * t.y_strip : nullptr,
                           .y_channel = t.y_channel,
                           .y_row = t.y_strip});
        }
    }

    // Asks for rows in memory while products are computed: they are too far apart for the processor to guess.
    void ask_for(const Place<const T>& place, int64_t output, int64_t row, int64_t rows) const {
        if (!place.at) return;
        for (int64_t i = row; i < row + rows; i++)
            prefetch_row(place.at + output * place.channel + i * place.row, at.length);
    }

    // How many groups of rows make a strip: one narrow group would be too short for the loops. The gap between two of
    // them must be no longer than what would fill the last vector anyway.
    static int64_t at_a_time(const Layout& layout, int64_t lanes) {
        return layout.pitch <= round_up(layout.columns, lanes) ? std::max<int64_t>(1, STRIP / layout.pitch) : 1;
    }
    static int64_t product_channel(const Layout& layout, int64_t lanes) {
        return spread((at_a_time(layout, lanes) - 1) * layout.pitch + round_up(layout.columns, lanes), sizeof(T));
    }
};

// One tile of one block.
template <typename T>
struct Work {
    const Convolution<T>& task;
    const Patch& patch;
    int64_t n, item;  // the image; the block, counted through all images
    Sums<T> sums;
    const Sums<T>* companion;  // sums of the companion convolution (see `convolve`), or null
    T* asides;                 // scratch for blocks of outputs
    int64_t aside_size;

    const Tile& tile() const { return sums.tile; }
    Place<T> aside(int number) const { return sums.scratch(asides + number * aside_size); }
    // The block in a tensor; `tensor` points to its first position there.
    template <typename U>
    Place<U> in(U* tensor) const {
        return {tensor, task.out_plane, line()};
    }
    // The same for a tensor that may be null; `offset` is that of the first position.
    Place<const T> in(const T* tensor, int64_t offset) const { return tensor ? in(tensor + offset) : Place<const T>{}; }
    // Can a block be computed where it belongs? Otherwise it takes a detour through scratch.
    bool direct(const Sums<T>& by) const { return !by.layout.flat && patch.job->horizontal->step == 1; }
    int64_t line() const { return patch.job->vertical->step * task.out_width; }  // between a block's rows

    // Where the block's first position is in channel `channel` of image n, of a tensor with `channels` channels.
    int64_t at(int64_t channels, int64_t channel) const {
        const Axis &v = *patch.job->vertical, &h = *patch.job->horizontal;
        return (n * channels + channel) * task.out_plane + (v.first + patch.row * v.step) * task.out_width + h.first +
               patch.column * h.step;
    }

    // Copies a finished block from scratch to the tensor where it belongs, and adds the residual, if there is one. `to`
    // and `residual` point to the block's first position, in the tile's first channel.
    void store(const Place<T>& from, T* to, const T* residual) const {
        const int64_t step = patch.job->horizontal->step;
        for (int64_t k = 0; k < tile().outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++) {
                const T* row = from.at + k * from.channel + i * from.row;
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

    // Adds a block to another.
    void add(const Place<const T>& from, const Place<T>& to) const {
        for (int64_t k = 0; k < tile().outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++)
                task.loops.add(to.at + k * to.channel + i * to.row, from.at + k * from.channel + i * from.row,
                               patch.columns);
    }
    // Adds a block of a tensor to one in scratch.
    void add(const T* from, const Place<T>& to) const {
        const int64_t step = patch.job->horizontal->step;
        if (step == 1) return add(in(from), to);
        for (int64_t k = 0; k < tile().outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++)
                for (int64_t j = 0; j < patch.columns; j++)
                    to.at[k * to.channel + i * to.row + j] += from[k * task.out_plane + i * line() + j * step];
    }

    // Copies a block of a tensor to scratch.
    void fetch(const T* from, const Place<T>& to) const {
        for (int64_t k = 0; k < tile().outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++)
                move_row(to.at + k * to.channel + i * to.row, from + k * task.out_plane + i * line(), patch.columns);
    }
};

// How the output is cut into blocks, and how much scratch each thread needs.
struct Plan {
    std::vector<Job> jobs;
    int64_t items;           // blocks of one image
    int64_t source, aside;   // numbers in scratch: of a block's sources, and of a block of outputs
    int64_t rows, products;  // and for Winograd: of a channel before it is transformed, and of the products
    // Of the companion convolution: how each job's blocks lie in scratch, the channels that any tile reads, and the
    // numbers in scratch for them.
    std::vector<Layout> companion;
    Range companion_reads;
    int64_t companion_source;
};

// The source channels from the first to the last that any part reads.
inline Range hull_of_reads(const std::vector<Part>& parts) {
    Range hull{0, 0};
    for (const Part& part : parts) {
        if (part.reads.size() == 0) continue;
        hull = hull.last == 0 ? part.reads
                              : Range{std::min(hull.first, part.reads.first), std::max(hull.last, part.reads.last)};
    }
    return hull;
}

// together: so many neighbouring rows are never cut apart.
template <typename T>
Plan plan(const Convolution<T>& task, const Shape& p, int threads, const Convolution<T>* companion = nullptr,
          int64_t together = 1) {
    const int64_t lanes = task.loops.lanes;
    Plan plan{};
    // Small problems are cut finer: every thread should get about three blocks.
    const int64_t share = p.n * task.out_plane / (3 * threads);
    const int64_t most =
        threads == 1 ? CONVOLUTION_POSITIONS : std::clamp<int64_t>(share, 8 * lanes, CONVOLUTION_POSITIONS);
    Limits limits{lanes, sizeof(T), most, FLAT_OUTPUT, false};
    limits.together = together;
    if (companion) plan.companion_reads = hull_of_reads(companion->parts);
    limits.other_channels = plan.companion_reads.size();
    Limits companion_limits = limits;
    limits.products = task.winograd ? winograd::PRODUCTS : 0;
    companion_limits.products = companion && companion->winograd ? winograd::PRODUCTS : 0;
    plan.jobs = sfg::jobs(task.parts, task.vertical, task.horizontal, limits, &plan.items);
    const auto fit = [&](const Layout& layout) {
        plan.aside = std::max(plan.aside, spread(layout.rows * layout.pitch + lanes, sizeof(T)));
        if (!layout.winograd) return;
        const int64_t rows = layout.groups * winograd::ROWS + winograd::TAPS - 1;
        plan.rows = std::max(plan.rows, spread(rows * layout.pitch + layout.slack, sizeof(T)));
        plan.products =
            std::max(plan.products, Sums<T>::product_channel(layout, lanes) * task.loops.outputs * winograd::PRODUCTS);
    };
    for (const Job& job : plan.jobs) {
        plan.source = std::max(plan.source, job.part->reads.size() * job.layout.source_stride);
        fit(job.layout);
        if (!companion) continue;
        const Axis& v = companion->vertical[job.vertical - task.vertical.data()];
        plan.companion.push_back(
            layout(v, companion->horizontal[0], job.layout.rows, job.layout.columns, companion_limits));
        plan.companion_source =
            std::max(plan.companion_source, limits.other_channels * plan.companion.back().source_stride);
        fit(plan.companion.back());
    }
    plan.source = spread(plan.source, sizeof(T)), plan.aside *= task.loops.outputs;
    plan.companion_source = companion ? spread(plan.companion_source, sizeof(T)) : 0;
    return plan;
}

// The weights in the order in which the loops read them: [tile][channel read][tap][output], or for Winograd
// [tile][product][channel read][column of taps][output], and behind them the biases of all outputs.
template <typename T>
class PackedWeights {
 public:
    explicit PackedWeights(const Convolution<T>& task)
        : task_(task), tiles_(tiles_of(task.parts)), data_(task.weights * task.taps + task.out_channels) {}

    // Must be called by all threads of a region: they share the tiles.
    void fill() const {
#pragma omp for schedule(static)
        for (size_t i = 0; i < tiles_.size(); i++) {
            const Tile& tile = *tiles_[i];
            const int64_t count = task_.kernel_taps, outputs = tile.outputs;
            T* to = weights(tile);
            T together[winograd::TAPS * MOST_TAPS * MOST_OUTPUTS] = {};
            const T* of_output[MOST_OUTPUTS];
            for (int64_t k = 0; k < outputs; k++)
                of_output[k] = task_.weight + place(task_.output_order, tile.first + k) * task_.output_stride;
            for (const Range& range : tile.reads)
                for (int64_t c = range.first; c < range.last; c++) {
                    const int64_t source = place(task_.read_order, c) * task_.read_stride;
                    const int64_t later = place(task_.read_order, std::min(c + 4, range.last - 1)) * task_.read_stride;
                    for (int64_t k = 0; k < outputs; k++) {  // in the layer's order they are far apart
                        __builtin_prefetch(of_output[k] + later);
                        __builtin_prefetch(of_output[k] + later + count - 1);
                    }
                    const int64_t pitch = task_.winograd ? int64_t(MOST_OUTPUTS) : outputs;
                    T* kernels = task_.winograd ? together : to;
                    for (int64_t k = 0; k < outputs; k++)
                        for (int64_t t = 0; t < count; t++) kernels[t * pitch + k] = of_output[k][source + t];
                    if (task_.winograd)
                        task_.loops.weigh(kernels, task_.vertical[0].tap.data(), task_.horizontal[0].tap.data(),
                                          task_.horizontal[0].tap.size(), outputs, to,
                                          tile.reads_total * taps() * outputs);
                    to += taps() * outputs;
                }
            for (int64_t k = 0; k < tile.outputs; k++)
                biases(tile)[k] = task_.bias ? task_.bias[place(task_.output_order, tile.first + k)] : T(0);
        }
    }
    T* weights(const Tile& tile) const { return data_.data() + tile.weights * task_.taps; }
    T* biases(const Tile& tile) const { return data_.data() + task_.weights * task_.taps + tile.first; }
    const Tile& tile(int64_t first) const {
        return **std::find_if(tiles_.begin(), tiles_.end(), [&](const Tile* tile) { return tile->first == first; });
    }
    int64_t taps() const { return task_.winograd ? task_.taps / winograd::PRODUCTS : task_.taps; }

 private:
    const Convolution<T>& task_;
    const std::vector<const Tile*> tiles_;
    const Buffer<T> data_;
};

// A thread's scratch.
template <typename T>
struct Scratch {
    T *sources, *companion_sources, *asides;
    T *rows, *products;  // for Winograd

    static int64_t size(const Plan& plan, int asides) {
        return plan.source + plan.companion_source + asides * plan.aside + plan.rows + plan.products;
    }
    Scratch(T* memory, const Plan& plan, int aside_count) {
        sources = memory, companion_sources = sources + plan.source;
        asides = companion_sources + plan.companion_source;
        rows = asides + aside_count * plan.aside, products = rows + plan.rows;
        std::memset(memory, 0, (plan.source + plan.companion_source) * sizeof(T));
    }
};

// Copies the sources of a block of image n to scratch, and transforms them for Winograd; `rows` is scratch for that.
template <typename T>
void load_sources(const Convolution<T>& task, int64_t n, const Patch& patch, Range channels, const Axis& v,
                  const Axis& h, const Layout& layout, T* rows, T* to) {
    const int64_t image = n * task.in_channels * task.in_plane;
    const int64_t rows_there = layout.winograd ? layout.groups * winograd::ROWS : patch.rows;
    Copy<T> copy =
        copy_of(task.in + image, task.relu_output ? task.relu_output + image : nullptr, task.in_plane, channels, v, h,
                patch.row, rows_there, patch.column, patch.columns, layout.winograd ? rows : to, layout);
    if (task.scale_in) {
        copy.scale = task.scale_in + channels.first;
        copy.shift = task.shift_in + channels.first;
    }
    if (!layout.winograd) return task.loops.copy(copy);
    for (copy.channels = 1; channels.first < channels.last; channels.first++, to += layout.source_stride) {
        task.loops.copy(copy);
        task.loops.transform(rows, layout.pitch, std::max(layout.span, layout.pitch), layout.groups, to,
                             layout.phase_stride);
        copy.image += copy.image_stride, copy.relu_output += copy.relu_output ? copy.image_stride : 0;
        copy.scale += copy.scale != nullptr, copy.shift += copy.shift != nullptr;
    }
}

// The sums of a tile in a block. `sources`: its sources in scratch, from channel `first_source` on.
template <typename T>
Sums<T> sums_of(const InnerLoops<T>& loops, const PackedWeights<T>& weights, const Tile& tile, const Layout& layout,
                const Patch& patch, const T* sources, int64_t first_source, T* products) {
    return {.loops = loops,
            .tile = tile,
            .layout = layout,
            .x = sources - first_source * layout.source_stride,
            .weights = weights.weights(tile),
            .biases = weights.biases(tile),
            .taps = weights.taps(),
            .aside_stride = spread(layout.rows * layout.pitch + loops.lanes, sizeof(T)),
            .at = layout.strips(patch.rows, patch.columns),
            .products = products};
}

// Calls body(Work) for every tile of every block, in any order, with several threads. `asides`: how many blocks of
// scratch the body wants. `companion`: another convolution with outputs of the same shape and the same tiles, or null;
// its sources are in scratch at the same time, so that the body can compute both for one tile.
template <typename T, typename Body>
void convolve(const Convolution<T>& task, const Plan& plan, const Shape& p, int threads, int asides, const Body& body,
              const Convolution<T>* companion = nullptr) {
    const int64_t per_thread = Scratch<T>::size(plan, asides);
    const PackedWeights<T> packed(task);
    const std::unique_ptr<PackedWeights<T>> companion_packed(companion ? new PackedWeights<T>(*companion) : nullptr);
    const Buffer<T> memory(per_thread * threads);

    on_threads(threads, [&](int thread, int) {
        const Scratch<T> scratch(memory.data() + per_thread * thread, plan, asides);
        packed.fill();
        if (companion) companion_packed->fill();
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < p.n * plan.items; item++) {
            const int64_t n = item / plan.items;
            const Patch patch(plan.jobs, item % plan.items);
            const Job& job = *patch.job;
            load_sources(task, n, patch, job.part->reads, *job.vertical, *job.horizontal, job.layout, scratch.rows,
                         scratch.sources);
            const Layout* layout = companion ? &plan.companion[&job - plan.jobs.data()] : nullptr;
            if (companion)
                load_sources(*companion, n, patch, plan.companion_reads,
                             companion->vertical[job.vertical - task.vertical.data()], companion->horizontal[0],
                             *layout, scratch.rows, scratch.companion_sources);
            for (const Tile& tile : job.part->tiles) {
                Work<T> work{.task = task,
                             .patch = patch,
                             .n = n,
                             .item = item,
                             .sums = sums_of(task.loops, packed, tile, job.layout, patch, scratch.sources,
                                             job.part->reads.first, scratch.products),
                             .companion = nullptr,
                             .asides = scratch.asides,
                             .aside_size = plan.aside};
                if (!companion) {
                    body(work);
                    continue;
                }
                const Sums<T> sums =
                    sums_of(task.loops, *companion_packed, companion_packed->tile(tile.first), *layout, patch,
                            scratch.companion_sources, plan.companion_reads.first, scratch.products);
                work.companion = &sums;
                body(work);
            }
        }
    });
}

// Computes a tile's sum and stores it in the tensor, with the residual added, if there is one. `to` and `residual`
// point to the block's first position in the tile's first channel. `aside`: scratch, where the block can't be computed
// in the tensor.
template <typename T>
void finish(const Work<T>& work, OutputTile<T> sum, T* to, const T* residual, const Place<T>& aside) {
    const bool direct = work.direct(work.sums);
    const Place<T> target = direct ? work.in(to) : aside;
    sum.y = target.at, sum.y_channel = target.channel, sum.y_strip = target.row;
    sum.residual = direct ? residual : nullptr;
    work.sums.compute(sum);
    if (!direct) work.store(aside, to, residual);
}

}  // namespace sfg
