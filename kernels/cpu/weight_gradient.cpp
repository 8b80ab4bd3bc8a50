// Weight and bias gradient.
#include <algorithm>
#include <array>
#include <cstring>

#include "routed_conv.h"
#include "rows.h"
#include "scratch.h"
#include "winograd.h"

namespace sfg {
namespace {

constexpr int64_t GRADIENT_POSITIONS = 1024;  // of a block, so that a tile's outputs stay in the first-level cache

using Factors = std::array<double, winograd::PRODUCTS>;  // zero for rows that don't count

// Lines of an image to scratch, a row for each group of outputs: what one or two of Winograd's products multiply.
template <typename T>
struct Mix {
    const T *image, *relu;  // relu: see Copy
    int64_t plane, width;
    int64_t line, step, lines;       // row i of the first group is line + i * step; those from 0 to `lines` are there
    int64_t column;                  // of the first slot; those from 0 to `width` are there
    std::array<Factors, 2> factors;  // of the rows of a group, for each product; a row counts for both or for none
    int products;
    bool fresh;  // are they not in the cache yet?

    // slots: of a row, zeros behind them, and `slack` of them behind the last. Products lie `product_stride` apart.
    void operator()(const InnerLoops<T>& loops, Range channels, int64_t groups, int64_t slots, int64_t pitch,
                    int64_t slack, int64_t channel_stride, T* to, int64_t product_stride) const {
        const int64_t first = std::clamp<int64_t>(-column, 0, slots), apart = winograd::ROWS * step;
        const int64_t last = std::clamp<int64_t>(width - column, first, slots);
        Mixture<T> mixture{};
        mixture.products = products, mixture.product_stride = product_stride;
        mixture.group_stride = apart * width, mixture.pitch = pitch;
        mixture.before = first, mixture.length = last - first, mixture.behind = pitch - last;
        for (int64_t group = 0; group < groups; group += mixture.groups) {  // those that have alike of their rows
            mixture.count = 0, mixture.groups = groups - group;
            for (size_t i = 0; i < winograd::PRODUCTS; i++) {
                const int64_t at = line + group * apart + int64_t(i) * step;
                const int64_t until = at < 0 ? -at : at < lines ? lines - at : 0;  // it changes
                if (factors[0][i] == 0) continue;
                if (until) mixture.groups = std::min(mixture.groups, (until + apart - 1) / apart);
                if (at < 0 || at >= lines) continue;
                mixture.offset[mixture.count] = at * width + column + first;
                for (int product = 0; product < products; product++)
                    mixture.factor[product][mixture.count] = T(factors[product][i]);
                mixture.count++;
            }
            for (int64_t c = channels.first; c < channels.last; c++) {
                mixture.image = image + c * plane, mixture.relu = relu ? relu + c * plane : nullptr;
                mixture.to = to + (c - channels.first) * channel_stride + group * pitch;
                if (fresh && c + 1 < channels.last) prefetch(c + 1, line + group * apart, mixture.groups, slots);
                loops.mix(mixture);
            }
        }
        for (int product = 0; product < products; product++)
            for (int64_t c = 0; c < channels.last - channels.first; c++)
                zero_row(to + product * product_stride + c * channel_stride + groups * pitch, slack);
    }

    void prefetch(int64_t channel, int64_t from, int64_t groups, int64_t slots) const {
        const int64_t first = std::max<int64_t>(column, 0), last = std::min(width, column + slots);
        const int64_t until = std::min(lines, from + (groups * winograd::ROWS + winograd::TAPS - 1) * step);
        for (int64_t i = from; i < until; i += step) {
            if (i < 0) continue;
            const int64_t at = channel * plane + i * width + first;
            prefetch_row(image + at, last - first);
            if (relu) prefetch_row(relu + at, last - first);
        }
    }
};

constexpr int64_t TOGETHER_BYTES = 2048 << 10;  // of images that are worked on together
constexpr double MIXING = 12, ADDING = 50;      // to make a product's rows; to add up what the lanes of a vector have

}  // namespace

template <typename T>
void weight_gradient(const InnerLoops<T>& loops, const T* x, const T* dy, const T* relu, T* dw, T* db,
                     const Shape& shape, const Blocks& blocks, int threads) {
    const Shape p = with_long_rows(shape);
    const int64_t lanes = loops.lanes, plane = p.h * p.w, out_plane = p.oh * p.ow;
    int64_t weights = 0, items = 0;
    const std::vector<Part> channel_parts = parts(blocks, false, loops.gradient_outputs, &weights);
    const std::vector<Axis> vertical = undilated({forward_axis(p, 0)}), horizontal = {forward_axis(p, 1)};
    // Small images, many channels: a thread has tiles of its own, and goes over all positions, where otherwise it has
    // positions of its own, and a copy of all gradients. (In units of numbers that are copied or added up.)
    const int64_t positions = p.n * out_plane, copied = positions * (p.c + p.k);
    const bool by_tiles = threads > 1 && copied < weights * p.r * p.s * 2;
    if (!by_tiles) threads = int(std::clamp<int64_t>(positions / (8 * lanes), 1, threads));
    const int64_t share = by_tiles ? positions : positions / threads;
    const int64_t most = std::clamp<int64_t>(share, 8 * lanes, GRADIENT_POSITIONS);
    Limits limits{lanes, sizeof(T), most, 1, true};
    const bool by_winograd = weights > 0 && suits_winograd(vertical, horizontal, limits, MIXING / double(p.k), ADDING);
    // By Winograd: the gradients of what the products multiply, one product after the other in the same scratch.
    const int64_t products = by_winograd ? winograd::PRODUCTS : 1;
    const int64_t tap_columns = horizontal[0].tap.size(), taps = by_winograd ? products * tap_columns : p.r * p.s;
    if (by_winograd) limits.products = 1, limits.most_positions *= winograd::ROWS;
    const std::vector<Job> jobs = sfg::jobs(channel_parts, vertical, horizontal, limits, &items);
    const int64_t at_once = by_winograd ? 2 : 1;
    // Small images are worked on together, so that the lanes of fewer vectors are added up. In scratch they lie side by
    // side in every channel, the outputs as far apart as what is read.
    const auto images_apart = [&](const Layout& layout) {
        const int64_t lines = layout.winograd ? layout.groups : layout.rows;
        return std::max(layout.source_stride, spread(lines * layout.pitch + lanes, sizeof(T)));
    };
    int64_t together = by_tiles ? p.n : std::max<int64_t>(1, p.n / threads);
    for (const Job& job : jobs) {
        const Layout& layout = job.layout;
        const Range reads = job.part->reads, outputs = job.part->outputs;
        const int64_t channels = reads.last - reads.first + outputs.last - outputs.first;
        const bool one_strip = layout.rows == 1 || layout.pitch < round_up(layout.columns, lanes);
        const int64_t fit = TOGETHER_BYTES / (at_once * channels * images_apart(layout) * int64_t(sizeof(T)));
        together = one_strip ? std::clamp<int64_t>(fit, 1, together) : 1;
    }
    int64_t source = 0, gradient = 0, shifted_most = 0;
    for (const Job& job : jobs) {
        const int64_t reads = job.part->reads.last - job.part->reads.first;
        const int64_t stride = together * images_apart(job.layout);
        source = std::max(source, reads * stride);
        gradient = std::max(gradient, (job.part->outputs.last - job.part->outputs.first) * stride);
        shifted_most = std::max(shifted_most, reads * int64_t(job.layout.taps.size()));
    }
    source = spread(source, sizeof(T)), gradient = spread(gradient, sizeof(T));
    const int64_t sums = spread(weights * taps + p.k, sizeof(T)), copies = by_tiles ? 1 : threads;
    const int64_t per_thread = at_once * (source + gradient);
    const Buffer<T> scratch(per_thread * threads), gradients(sums * copies);
    const Buffer<Shifted<T>> shifted_lists(shifted_most * threads);
    const auto sums_of = [&](int64_t copy) { return gradients.data() + sums * copy; };
    const std::vector<const Tile*> tiles = tiles_of(channel_parts);
    const int64_t none = 0, total = (p.n + together - 1) / together * items;
    // By tiles, thread i has those whose first weight is in the i-th part of all.
    const auto has = [&](int thread, int team, const Tile& tile) {
        const int64_t weight = std::min(tile.weights, weights - 1);  // one that reads nothing has none
        return !by_tiles || (weight * team >= weights * thread && weight * team < weights * (thread + 1));
    };

    on_threads(threads, [&](int thread, int team) {
        T* xs = scratch.data() + per_thread * thread;
        T *dys = xs + at_once * source, *dws = sums_of(by_tiles ? 0 : thread), *dbs = dws + weights * taps;
        Shifted<T>* shifted = shifted_lists.data() + shifted_most * thread;
        std::memset(xs, 0, per_thread * sizeof(T));
        for (const Tile* tile : tiles) {
            if (!has(thread, team, *tile)) continue;
            std::memset(dws + tile->weights * taps, 0, tile->outputs * tile->reads_total * taps * sizeof(T));
            std::memset(dbs + tile->first, 0, tile->outputs * sizeof(T));
        }
        // A fixed share, for the sake of equal bits.
        const int64_t begin = by_tiles ? 0 : total * thread / team,
                      last = by_tiles ? total : total * (thread + 1) / team;
        for (int64_t item = begin; item < last; item++) {
            const int64_t n = item / items * together, images = std::min(together, p.n - n);
            const Patch patch(jobs, item % items);
            const Job& job = *patch.job;
            const Layout& layout = job.layout;
            const Axis &v = *job.vertical, &h = *job.horizontal;
            const Range reads = job.part->reads, outputs = job.part->outputs;
            const int64_t apart = images_apart(layout), stride = together * apart;
            const T *of_x = x + n * p.c * plane, *of_dy = dy + n * p.k * out_plane;
            const T* passed = relu ? relu + n * p.k * out_plane : nullptr;
            Strips strips = layout.strips(patch.rows, patch.columns);
            strips.length = round_up(strips.length, lanes);
            const int64_t lines = by_winograd ? groups_of(patch.rows) : patch.rows;
            if (by_winograd && layout.pitch < strips.length)  // narrow: zeros between the outputs
                strips = {1, round_up((lines - 1) * layout.pitch + patch.columns, lanes), 0};
            else if (by_winograd)
                strips.strips = lines;
            if (images > 1) strips.strips = images, strips.pitch = apart;
            const auto passed_of = [&](int64_t i) { return passed ? passed + i * p.k * out_plane : nullptr; };
            const auto mix_dy = [&](int64_t i, const std::array<Factors, 2>& factors, int count, bool fresh) {
                const Mix<T> mix{of_dy + i * p.k * out_plane,
                                 passed_of(i),
                                 out_plane,
                                 p.ow,
                                 v.first + patch.row * v.step,
                                 v.step,
                                 p.oh,
                                 patch.column,
                                 factors,
                                 count,
                                 fresh};
                mix(loops, outputs, lines, patch.columns, layout.pitch, lanes, stride, dys + i * apart, gradient);
            };
            const auto add_biases = [&](int64_t i) {
                for (const Tile& tile : job.part->tiles)
                    for (int64_t k = tile.first; db && has(thread, team, tile) && k < tile.first + tile.outputs; k++)
                        loops.sum(dys + i * apart + (k - outputs.first) * stride, lines, layout.pitch, patch.columns,
                                  dbs + k);
            };
            for (int64_t i = 0; by_winograd && db && i < images; i++)
                mix_dy(i, {Factors{1, 1, 1, 1}}, 1, true), add_biases(i);
            for (int64_t first = 0, count; first < products; first += count) {
                count = by_winograd && winograd::opposite(first) ? 2 : 1;
                std::array<Factors, 2> factors{}, powers{};
                for (int64_t i = 0; by_winograd && i < count; i++) {
                    std::copy_n(winograd::SOURCES[first + i], winograd::PRODUCTS, factors[i].begin());
                    for (int row = 0; row < winograd::ROWS; row++) powers[i][row] = winograd::OUTPUTS[row][first + i];
                }
                for (int64_t i = 0; i < images; i++) {
                    const T* const image = of_x + i * p.c * plane;
                    if (by_winograd) {
                        const Mix<T> mix{image,
                                         nullptr,
                                         plane,
                                         p.w,
                                         (patch.row + v.low) * v.stride + v.phases[0],
                                         v.stride,
                                         p.h,
                                         patch.column + h.low,
                                         factors,
                                         int(count),
                                         first == 0};
                        mix(loops, reads, lines, h.slots(patch.columns), layout.pitch, layout.slack, stride,
                            xs + i * apart, source);
                        mix_dy(i, powers, count, first == 0 && !db);
                        continue;
                    }
                    Copy<T> copy = copy_of<T>(image, nullptr, plane, reads, v, h, patch.row, patch.rows, patch.column,
                                              patch.columns, xs + i * apart, layout);
                    copy.channel_stride = stride;
                    loops.copy(copy);
                    // The outputs' lines are v.first + i * v.step; columns are all there is.
                    loops.copy({.image = of_dy + (i * p.k + outputs.first) * out_plane,
                                .relu = passed ? passed_of(i) + outputs.first * out_plane : nullptr,
                                .image_stride = out_plane,
                                .channels = outputs.last - outputs.first,
                                .vertical = {&v.first, 1, patch.row, v.step, patch.rows, p.oh},
                                .horizontal = {&none, 1, patch.column, 1, patch.columns, p.ow},
                                .scratch = dys + i * apart,
                                .channel_stride = stride,
                                .phase_stride = 0,
                                .pitch = layout.pitch,
                                .slack = lanes});
                    add_biases(i);
                }
                for (int64_t i = 0; i < count; i++)
                    for (const Tile& tile : job.part->tiles) {
                        if (!has(thread, team, tile)) continue;
                        int64_t taps_there = 0, channel = 0;
                        const int64_t product_tap = (first + i) * tap_columns * by_winograd;
                        for (const Range& range : tile.reads)
                            for (int64_t c = range.first; c < range.last; c++, channel++)
                                for (const Tap& tap : layout.taps)
                                    shifted[taps_there++] = {
                                        xs + i * source + (c - reads.first) * stride + tap.offset,
                                        dws + tile.weights * taps +
                                            (channel * taps + product_tap + tap.index) * tile.outputs};
                        loops.gradient({.dy = dys + i * gradient + (tile.first - outputs.first) * stride,
                                        .channel_stride = stride,
                                        .outputs = tile.outputs,
                                        .shifted = shifted,
                                        .shifted_count = taps_there,
                                        .at = strips});
                    }
            }
        }
        const int64_t kernel_taps = p.r * p.s, kernel = blocks.weight_row() * kernel_taps;
        const int64_t parts_of_sum = by_tiles ? 1 : team;
        // Numbers `at` and behind, added up in the order of the threads.
        const auto total = [&](int64_t at, int64_t count, T* to) {
            for (int64_t i = 0; i < count; i++) to[i] = sums_of(0)[at + i];
            for (int64_t t = 1; t < parts_of_sum; t++)
                for (int64_t i = 0; i < count; i++) to[i] += sums_of(t)[at + i];
        };
#pragma omp barrier
#pragma omp for schedule(static)
        for (size_t i = 0; i < tiles.size(); i++) {
            const Tile& tile = *tiles[i];
            const int64_t count = tile.outputs;
            T *rows[MOST_OUTPUTS], totals[MOST_OUTPUTS];
            for (int64_t k = 0; k < count; k++) {
                rows[k] = dw + place(blocks.row_order, tile.first + k) * kernel;
                std::memset(rows[k], 0, kernel * sizeof(T));
            }
            int64_t at = tile.weights * taps;
            for (const Range& range : tile.reads)
                for (int64_t c = range.first; c < range.last; c++, at += taps * count) {
                    const int64_t column = place(blocks.column_order, c) * kernel_taps;
                    for (int64_t t = 0; !by_winograd && t < taps; t++) {
                        total(at + t * count, count, totals);
                        for (int64_t k = 0; k < count; k++) rows[k][column + t] = totals[k];
                    }
                    for (int64_t h = 0; by_winograd && h < tap_columns; h++) {
                        T sums[winograd::TAPS][MOST_OUTPUTS] = {};
                        for (int64_t product = 0; product < products; product++) {
                            total(at + (product * tap_columns + h) * count, count, totals);
                            for (int v = 0; v < winograd::TAPS; v++)
                                for (int64_t k = 0; k < count; k++)
                                    sums[v][k] += T(winograd::WEIGHTS[product][v]) * totals[k];
                        }
                        for (int v = 0; v < winograd::TAPS; v++)
                            for (int64_t k = 0; k < count; k++)
                                rows[k][column + vertical[0].tap[v] + horizontal[0].tap[h]] = sums[v][k];
                    }
                }
            if (!db) continue;
            total(weights * taps + tile.first, count, totals);
            for (int64_t k = 0; k < count; k++) db[place(blocks.row_order, tile.first + k)] = totals[k];
        }
    });
}

#define SFG_INSTANTIATE(T)                                                                                     \
    template void weight_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, T*, T*, const Shape&, \
                                     const Blocks&, int);
SFG_INSTANTIATE(float)
SFG_INSTANTIATE(double)

}  // namespace sfg
