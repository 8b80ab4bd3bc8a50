// Output by output: what forward pass, input gradient and gates' gradient share. A Convolution says what is summed, a
// Plan how its output is cut into blocks; `convolve` goes through the blocks with several threads and hands each tile,
// its sources in scratch, to whoever wants to know.
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
constexpr double FLAT_OUTPUT = 1.06;  // a flat block's outputs take a detour through scratch
constexpr double COMBINING = 8;       // multiplications that an output takes to be made of products
constexpr int64_t MOST_TAPS = 7;      // in a row of a kernel that goes by products
constexpr int64_t STRIP = 128;        // positions that are long enough for the loops

// Forward pass and input gradient: out[n,k] = bias[k] + sum of weight * in.
template <typename T>
struct Convolution {
    const InnerLoops<T>& loops;
    const T *in, *relu_in;                             // relu_in: see Copy
    const T *scale_in = nullptr, *shift_in = nullptr;  // likewise
    int64_t in_channels, in_plane;                     // plane: numbers in a channel
    const T *weight, *bias;
    int64_t output_stride, read_stride;        // of the weight
    const int64_t *output_order, *read_order;  // where outputs and sources are there, see Blocks
    int64_t out_channels, out_plane, out_width;
    std::vector<Part> parts;
    int64_t weights;
    std::vector<Axis> vertical, horizontal;
    int64_t kernel_taps;
    int64_t taps = kernel_taps;  // of a kernel as it is packed, of all products
    bool winograd = false;

    // What suits it, once all else is there.
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

// A convolution of which a block's sources are in scratch, for the outputs of one tile.
template <typename T>
struct Sums {
    const InnerLoops<T>& loops;
    const Tile& tile;
    const Layout& layout;
    const T* x;  // scratch, where source channel 0 would be
    const T *weights, *biases;
    int64_t taps;  // that a channel has weights for, side by side
    int64_t aside_stride;
    Strips at;
    T* products;  // scratch for those of a group of rows

    // The sum over the sources in `reads`, the first of which is the `from`-th of those that the tile has weights for.
    // It starts with the bias, or with what is in `start`.
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

    // Every group of rows: each product, then all of them together. `later`: what else is read afterwards.
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
            if (number == 0) {  // the products of the next few groups, as one strip
                const int64_t left = groups_of(t.at.strips - row);
                product.at = {1, (std::min(together, left) - 1) * layout.pitch + t.at.length, 0};
                const int64_t rows = std::min(together * winograd::ROWS, t.at.strips - row);
                for (int64_t i = 0; i < winograd::PRODUCTS; i++) {
                    for (int64_t k = i; k < t.outputs; k += winograd::PRODUCTS) {  // the products share the asking
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

    // Asks for rows while products are computed: they are in memory, too far apart for the processor to guess.
    void ask_for(const Place<const T>& place, int64_t output, int64_t row, int64_t rows) const {
        if (!place.at) return;
        for (int64_t i = row; i < row + rows; i++)
            prefetch_row(place.at + output * place.channel + i * place.row, at.length);
    }

    // Groups of rows in a strip: narrow ones would be too short for the loops. There must be no more between them than
    // what would fill the last vector.
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
    int64_t n, item;
    Sums<T> sums;
    const Sums<T>* beside;  // of the convolution beside this one, if there is one
    T* asides;              // scratch for blocks of outputs
    int64_t aside_size;

    const Tile& tile() const { return sums.tile; }
    Place<T> aside(int number) const { return sums.scratch(asides + number * aside_size); }
    // `tensor`: where the block's first position is there.
    template <typename U>
    Place<U> in(U* tensor) const {
        return {tensor, task.out_plane, line()};
    }
    // `offset`: of that position in a tensor, which may be null.
    Place<const T> in(const T* tensor, int64_t offset) const { return tensor ? in(tensor + offset) : Place<const T>{}; }
    // Can a block be computed where it belongs? Else it takes a detour through scratch.
    bool direct(const Sums<T>& by) const { return !by.layout.flat && patch.job->horizontal->step == 1; }
    int64_t line() const { return patch.job->vertical->step * task.out_width; }  // between a block's rows

    // The block's first position in channel `channel` of an image of `channels`.
    int64_t at(int64_t channels, int64_t channel) const {
        const Axis &v = *patch.job->vertical, &h = *patch.job->horizontal;
        return (n * channels + channel) * task.out_plane + (v.first + patch.row * v.step) * task.out_width + h.first +
               patch.column * h.step;
    }

    // A finished block from scratch to where it belongs, the tile's first output being `to` there.
    void place(const Place<T>& from, T* to, const T* residual) const {
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

    // The other way: adds a block to one in scratch,
    void include(const T* from, const Place<T>& to) const {
        const int64_t step = patch.job->horizontal->step;
        for (int64_t k = 0; k < tile().outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++) {
                T* row = to.at + k * to.channel + i * to.row;
                const T* added = from + k * task.out_plane + i * line();
                if (step == 1) {
                    task.loops.add(row, added, patch.columns);
                    continue;
                }
                for (int64_t j = 0; j < patch.columns; j++) row[j] += added[j * step];
            }
    }

    // or copies it there.
    void fetch(const T* from, const Place<T>& to) const {
        for (int64_t k = 0; k < tile().outputs; k++)
            for (int64_t i = 0; i < patch.rows; i++)
                move_row(to.at + k * to.channel + i * to.row, from + k * task.out_plane + i * line(), patch.columns);
    }
};

// How the blocks of an output are shared out.
struct Plan {
    std::vector<Job> jobs;
    int64_t items;  // of one image
    int64_t source, aside;
    int64_t rows, products;  // scratch for Winograd: a channel before it is transformed, and the products
    // Of a convolution beside this one, with outputs of the same shape and tiles: how each job's blocks lie in its
    // scratch, and all that is read.
    std::vector<Layout> beside;
    Range beside_reads;
    int64_t beside_source;
};

template <typename T>
Plan plan(const Convolution<T>& task, const Shape& p, int threads, const Convolution<T>* beside = nullptr,
          int64_t together = 1) {
    const int64_t lanes = task.loops.lanes;
    Plan plan{};
    // Small problems are cut finer, so that every thread gets some blocks.
    const int64_t share = p.n * task.out_plane / (3 * threads);
    const int64_t most =
        threads == 1 ? CONVOLUTION_POSITIONS : std::clamp<int64_t>(share, 8 * lanes, CONVOLUTION_POSITIONS);
    Limits limits{lanes, sizeof(T), most, FLAT_OUTPUT, false};
    limits.together = together;
    if (beside)
        for (const Part& part : beside->parts)
            if (part.reads.first < part.reads.last) {
                const bool first = plan.beside_reads.last == 0;
                plan.beside_reads = {first ? part.reads.first : std::min(plan.beside_reads.first, part.reads.first),
                                     std::max(plan.beside_reads.last, part.reads.last)};
            }
    limits.other_channels = plan.beside_reads.size();
    Limits other_limits = limits;
    limits.products = task.winograd ? winograd::PRODUCTS : 0;
    other_limits.products = beside && beside->winograd ? winograd::PRODUCTS : 0;
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
        if (!beside) continue;
        const Axis& v = beside->vertical[job.vertical - task.vertical.data()];
        plan.beside.push_back(layout(v, beside->horizontal[0], job.layout.rows, job.layout.columns, other_limits));
        plan.beside_source = std::max(plan.beside_source, limits.other_channels * plan.beside.back().source_stride);
        fit(plan.beside.back());
    }
    plan.source = spread(plan.source, sizeof(T)), plan.aside *= task.loops.outputs;
    plan.beside_source = beside ? spread(plan.beside_source, sizeof(T)) : 0;
    return plan;
}

// [tile][channel read][tap][output], by Winograd [tile][product][channel read][column of taps][output], and behind them
// the biases of all outputs.
template <typename T>
class PackedWeights {
 public:
    explicit PackedWeights(const Convolution<T>& task)
        : task_(task), tiles_(tiles_of(task.parts)), data_(task.weights * task.taps + task.out_channels) {}

    // By all threads together.
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
                    for (int64_t k = 0; k < outputs; k++) {  // they lie here and there
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

// body(Work) for every tile of every block, in any order. `asides`: blocks of scratch that it wants. `beside`: another
// convolution, with outputs of the same shape and tiles.
template <typename T, typename Body>
void convolve(const Convolution<T>& task, const Plan& plan, const Shape& p, int threads, int asides, const Body& body,
              const Convolution<T>* beside = nullptr) {
    const int64_t lanes = task.loops.lanes, sources = plan.source + plan.beside_source;
    const int64_t per_thread = sources + asides * plan.aside + plan.rows + plan.products;
    const PackedWeights<T> packed(task);
    const std::unique_ptr<PackedWeights<T>> packed_beside(beside ? new PackedWeights<T>(*beside) : nullptr);
    const Buffer<T> scratch(per_thread * threads);

    on_threads(threads, [&](int thread, int) {
        T* x = scratch.data() + per_thread * thread;
        T *x_beside = x + plan.source, *aside = x + sources;
        T *rows = aside + asides * plan.aside, *products = rows + plan.rows;
        std::memset(x, 0, sources * sizeof(T));
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
                const int64_t rows_there = layout.winograd ? layout.groups * winograd::ROWS : patch.rows;
                Copy<T> copy = copy_of(source.in + image, source.relu_in ? source.relu_in + image : nullptr,
                                       source.in_plane, channels, v, h, patch.row, rows_there, patch.column,
                                       patch.columns, layout.winograd ? rows : to, layout);
                if (source.scale_in) {
                    copy.scale = source.scale_in + channels.first;
                    copy.shift = source.shift_in + channels.first;
                }
                if (!layout.winograd) return task.loops.copy(copy);
                for (copy.channels = 1; channels.first < channels.last; channels.first++, to += layout.source_stride) {
                    task.loops.copy(copy);
                    task.loops.transform(rows, layout.pitch, std::max(layout.span, layout.pitch), layout.groups, to,
                                         layout.phase_stride);
                    copy.image += copy.image_stride, copy.relu += copy.relu ? copy.image_stride : 0;
                    copy.scale += copy.scale != nullptr, copy.shift += copy.shift != nullptr;
                }
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
                               .at = layout.strips(patch.rows, patch.columns),
                               .products = products};
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
                    .asides = aside,
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

// What a tile computes of one output.
template <typename T>
void finish(const Work<T>& work, OutputTile<T> sum, T* to, const T* residual, const Place<T>& aside) {
    const bool direct = work.direct(work.sums);
    const Place<T> target = direct ? work.in(to) : aside;
    sum.y = target.at, sum.y_channel = target.channel, sum.y_strip = target.row;
    sum.residual = direct ? residual : nullptr;
    work.sums.compute(sum);
    if (!direct) work.place(aside, to, residual);
}

}  // namespace sfg
