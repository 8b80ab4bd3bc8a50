// Weight and bias gradient. `Plan` says how the work is cut, a `Worker` goes through a thread's blocks and sums, and
// `Totals` adds up what the threads have.
#include <algorithm>
#include <array>
#include <cstring>

#include "routed_conv.h"
#include "rows.h"
#include "scratch.h"
#include "winograd.h"

namespace sfg {
namespace {

constexpr int64_t GRADIENT_POSITIONS = 1024;  // of a block: so a tile's outputs stay in the first-level cache

using Factors = std::array<double, winograd::PRODUCTS>;  // of a group's rows; zero for rows that don't count

// Mixes lines of an image to scratch, one row for each group of output rows: what one or two of Winograd's products
// multiply.
template <typename T>
struct Mix {
    const T *image, *relu_output;  // see Copy
    int64_t plane, width;
    int64_t line, step, lines;       // row i of the first group is line + i * step; lines 0 .. `lines` - 1 exist
    int64_t column;                  // of the first slot; columns 0 .. `width` - 1 exist
    std::array<Factors, 2> factors;  // for each product; a row counts for both or for none
    int products;
    bool fresh;  // are the lines not in the cache yet?

    // A row has `slots` numbers and zeros up to `pitch`; `slack` zeros follow the last row. The rows of two products
    // are `product_stride` apart.
    void operator()(const InnerLoops<T>& loops, Range channels, int64_t groups, int64_t slots, int64_t pitch,
                    int64_t slack, int64_t channel_stride, T* to, int64_t product_stride) const {
        const int64_t first = std::clamp<int64_t>(-column, 0, slots), apart = winograd::ROWS * step;
        const int64_t last = std::clamp<int64_t>(width - column, first, slots);
        Mixture<T> mixture{};
        mixture.products = products, mixture.product_stride = product_stride;
        mixture.group_stride = apart * width, mixture.pitch = pitch;
        mixture.before = first, mixture.length = last - first, mixture.behind = pitch - last;
        // A mixture takes as many groups as have the same rows inside the image.
        for (int64_t group = 0; group < groups; group += mixture.groups) {
            mixture.count = 0, mixture.groups = groups - group;
            for (size_t i = 0; i < winograd::PRODUCTS; i++) {
                const int64_t at = line + group * apart + int64_t(i) * step;
                const int64_t until = at < 0 ? -at : at < lines ? lines - at : 0;  // lines until that changes
                if (factors[0][i] == 0) continue;
                if (until) mixture.groups = std::min(mixture.groups, (until + apart - 1) / apart);
                if (at < 0 || at >= lines) continue;
                mixture.offset[mixture.count] = at * width + column + first;
                for (int product = 0; product < products; product++)
                    mixture.factor[product][mixture.count] = T(factors[product][i]);
                mixture.count++;
            }
            for (int64_t c = channels.first; c < channels.last; c++) {
                mixture.image = image + c * plane,
                mixture.relu_output = relu_output ? relu_output + c * plane : nullptr;
                mixture.to = to + (c - channels.first) * channel_stride + group * pitch;
                if (fresh && c + 1 < channels.last) prefetch(c + 1, line + group * apart, mixture.groups, slots);
                loops.mix(mixture);
            }
        }
        for (int product = 0; product < products; product++)
            for (int64_t c = 0; c < channels.size(); c++)
                zero_row(to + product * product_stride + c * channel_stride + groups * pitch, slack);
    }

    void prefetch(int64_t channel, int64_t from, int64_t groups, int64_t slots) const {
        const int64_t first = std::max<int64_t>(column, 0), last = std::min(width, column + slots);
        const int64_t until = std::min(lines, from + (groups * winograd::ROWS + winograd::TAPS - 1) * step);
        for (int64_t i = from; i < until; i += step) {
            if (i < 0) continue;
            const int64_t at = channel * plane + i * width + first;
            prefetch_row(image + at, last - first);
            if (relu_output) prefetch_row(relu_output + at, last - first);
        }
    }
};

constexpr int64_t TOGETHER_BYTES = 2048 << 10;  // of scratch, for images that are worked on together
// Costs in multiplications: of a number in a product's mixed rows, and of adding up the lanes of a vector.
constexpr double MIXING = 12, ADDING = 50;

// How the work is cut.
template <typename T>
struct Plan {
    const InnerLoops<T>& loops;
    const Shape p;
    const int64_t plane, out_plane;
    int64_t weights = 0;  // kernels of all tiles, each of which has sums for its taps
    const std::vector<Part> channel_parts;
    const std::vector<const Tile*> tiles;  // of all parts
    const std::vector<Axis> vertical, horizontal;
    // With small images and many channels a thread has tiles of its own and goes over all positions. Otherwise it has
    // positions of its own, and a copy of all gradients.
    bool by_tiles;
    int threads;
    bool by_winograd;
    int64_t taps;  // sums for each kernel; with Winograd those of all products
    std::vector<Job> jobs;
    int64_t items;     // blocks of an image
    int64_t together;  // images that are worked on at a time
    // Numbers in scratch for a product's sources and for its outputs, and the most shifted channels of a tile.
    int64_t source = 0, gradient = 0, shifted = 0;

    Plan(const InnerLoops<T>& loops, const Shape& shape, const Blocks& blocks, int most_threads)
        : loops(loops),
          p(with_long_rows(shape)),
          plane(p.h * p.w),
          out_plane(p.oh * p.ow),
          channel_parts(parts(blocks, false, loops.gradient_outputs, &weights)),
          tiles(tiles_of(channel_parts)),
          vertical(undilated({forward_axis(p, 0)})),
          horizontal({forward_axis(p, 1)}) {
        const int64_t positions = p.n * out_plane, least = 8 * loops.lanes;
        // By tiles every thread copies all images; otherwise every thread zeroes and adds up a copy of all gradients.
        const int64_t copied = positions * (p.c + p.k);
        by_tiles = most_threads > 1 && copied < weights * p.r * p.s * 2;
        threads = by_tiles ? most_threads : int(std::clamp<int64_t>(positions / least, 1, most_threads));
        const int64_t share = by_tiles ? positions : positions / threads;
        Limits limits{loops.lanes, sizeof(T), std::clamp<int64_t>(share, least, GRADIENT_POSITIONS), 1, true};
        const double mixing = MIXING / double(p.k);
        by_winograd = weights > 0 && suits_winograd(vertical, horizontal, limits, mixing, ADDING);
        if (by_winograd) limits.products = 1, limits.most_positions *= winograd::ROWS;
        taps = by_winograd ? winograd::PRODUCTS * tap_columns() : p.r * p.s;
        jobs = sfg::jobs(channel_parts, vertical, horizontal, limits, &items);
        together = images_together();
        for (const Job& job : jobs) {
            const int64_t reads = job.part->reads.size(), outputs = job.part->outputs.size();
            const int64_t stride = together * images_apart(job.layout);
            source = std::max(source, spread(reads * stride, sizeof(T)));
            gradient = std::max(gradient, spread(outputs * stride, sizeof(T)));
            shifted = std::max(shifted, reads * int64_t(job.layout.taps.size()));
        }
    }
    Plan(const Plan&) = delete;  // jobs point to parts and axes
    Plan& operator=(const Plan&) = delete;

    int64_t tap_columns() const { return horizontal[0].tap.size(); }
    int64_t at_once() const { return by_winograd ? 2 : 1; }  // products in scratch at a time
    int64_t scratch() const { return at_once() * (source + gradient); }
    int64_t copies() const { return by_tiles ? 1 : threads; }  // of the sums of all gradients

    // Images that are worked on together lie side by side in every channel; sources and outputs have the same distance.
    int64_t images_apart(const Layout& layout) const {
        const int64_t lines = layout.winograd ? layout.groups : layout.rows;
        return std::max(layout.source_stride, spread(lines * layout.pitch + loops.lanes, sizeof(T)));
    }

    // Small images are worked on together, so that the lanes of fewer vectors have to be added up.
    int64_t images_together() const {
        int64_t count = std::max<int64_t>(1, by_tiles ? p.n : p.n / threads);
        for (const Job& job : jobs) {
            const Layout& layout = job.layout;
            const int64_t channels = job.part->reads.size() + job.part->outputs.size();
            const bool one_strip = layout.rows == 1 || layout.pitch < round_up(layout.columns, loops.lanes);
            const int64_t bytes = at_once() * channels * images_apart(layout) * int64_t(sizeof(T));
            count = one_strip ? std::clamp<int64_t>(TOGETHER_BYTES / bytes, 1, count) : 1;
        }
        return count;
    }

    // Does a thread of the team compute this tile? By tiles, thread i has those whose first weight is in the i-th part.
    bool has(int thread, int team, const Tile& tile) const {
        const int64_t weight = std::min(tile.weights, weights - 1);  // a tile that reads nothing has no weight
        return !by_tiles || (weight * team >= weights * thread && weight * team < weights * (thread + 1));
    }
};

// What one thread does: it sums the products of its blocks.
template <typename T>
struct Worker {
    const Plan<T>& plan;
    const T *x, *dy, *relu_output;
    bool bias;
    int thread, team;
    T *xs, *dys;   // scratch of sources and of outputs
    T *dws, *dbs;  // sums for the weights, [tile][channel][tap][output], and for the biases
    Shifted<T>* shifted;

    bool has(const Tile& tile) const { return plan.has(thread, team, tile); }

    void run() const {
        std::memset(xs, 0, plan.scratch() * sizeof(T));
        for (const Tile* tile : plan.tiles) {
            if (!has(*tile)) continue;
            const int64_t count = tile->outputs * tile->reads_total * plan.taps;
            std::memset(dws + tile->weights * plan.taps, 0, count * sizeof(T));
            std::memset(dbs + tile->first, 0, tile->outputs * sizeof(T));
        }
        const int64_t total = (plan.p.n + plan.together - 1) / plan.together * plan.items;
        // Each thread has a fixed share of the blocks: so equal runs have equal bits.
        const int64_t first = plan.by_tiles ? 0 : total * thread / team;
        const int64_t last = plan.by_tiles ? total : total * (thread + 1) / team;
        for (int64_t item = first; item < last; item++) {
            const Block block(*this, item / plan.items * plan.together, Patch(plan.jobs, item % plan.items));
            if (plan.by_winograd)
                block.add_by_winograd();
            else
                block.add();
        }
    }

    // The same block in each of a few images that are worked on together.
    struct Block {
        const Worker& own;
        const Plan<T>& plan;
        const Patch patch;
        const Layout& layout;
        const Axis &vertical, &horizontal;
        const Range reads, outputs;
        const int64_t image, images;
        const int64_t apart, stride;  // of images in a channel, and of channels, in scratch
        const int64_t lines;
        Strips strips;

        Block(const Worker& own, int64_t image, const Patch& patch)
            : own(own),
              plan(own.plan),
              patch(patch),
              layout(patch.job->layout),
              vertical(*patch.job->vertical),
              horizontal(*patch.job->horizontal),
              reads(patch.job->part->reads),
              outputs(patch.job->part->outputs),
              image(image),
              images(std::min(plan.together, plan.p.n - image)),
              apart(plan.images_apart(layout)),
              stride(plan.together * apart),
              lines(layout.winograd ? groups_of(patch.rows) : patch.rows),
              strips(layout.strips(patch.rows, patch.columns)) {
            const int64_t lanes = plan.loops.lanes;
            strips.length = round_up(strips.length, lanes);
            if (layout.winograd && layout.pitch < strips.length)  // narrow lines: one strip, with zeros between them
                strips = {1, round_up((lines - 1) * layout.pitch + patch.columns, lanes), 0};
            else if (layout.winograd)
                strips.strips = lines;
            if (images > 1) strips.strips = images, strips.pitch = apart;
        }

        const T* sources(int64_t i) const { return own.x + (image + i) * plan.p.c * plan.plane; }
        const T* gradients(int64_t i) const { return own.dy + (image + i) * plan.p.k * plan.out_plane; }
        const T* relu_outputs(int64_t i) const {
            return own.relu_output ? own.relu_output + (image + i) * plan.p.k * plan.out_plane : nullptr;
        }

        void add() const {
            const int64_t none = 0, out_plane = plan.out_plane;
            for (int64_t i = 0; i < images; i++) {
                Copy<T> copy = copy_of<T>(sources(i), nullptr, plan.plane, reads, vertical, horizontal, patch.row,
                                          patch.rows, patch.column, patch.columns, own.xs + i * apart, layout);
                copy.channel_stride = stride;
                plan.loops.copy(copy);
                // The outputs' lines are first + i * step; their columns are all columns of the image.
                plan.loops.copy({.image = gradients(i) + outputs.first * out_plane,
                                 .relu_output = own.relu_output ? relu_outputs(i) + outputs.first * out_plane : nullptr,
                                 .image_stride = out_plane,
                                 .channels = outputs.size(),
                                 .vertical = {&vertical.first, 1, patch.row, vertical.step, patch.rows, plan.p.oh},
                                 .horizontal = {&none, 1, patch.column, 1, patch.columns, plan.p.ow},
                                 .scratch = own.dys + i * apart,
                                 .channel_stride = stride,
                                 .phase_stride = 0,
                                 .pitch = layout.pitch,
                                 .slack = plan.loops.lanes});
                add_biases(i);
            }
            add_product(own.xs, own.dys, 0);
        }

        void add_by_winograd() const {
            for (int64_t i = 0; own.bias && i < images; i++)
                mix_gradients(i, {Factors{1, 1, 1, 1}}, 1, true), add_biases(i);
            for (int64_t first = 0, count; first < winograd::PRODUCTS; first += count) {
                count = winograd::opposite(first) ? 2 : 1;
                std::array<Factors, 2> factors{}, powers{};
                for (int64_t i = 0; i < count; i++) {
                    std::copy_n(winograd::SOURCES[first + i], winograd::PRODUCTS, factors[i].begin());
                    for (int row = 0; row < winograd::ROWS; row++) powers[i][row] = winograd::OUTPUTS[row][first + i];
                }
                for (int64_t i = 0; i < images; i++) {
                    mix_sources(i, factors, count, first == 0);
                    mix_gradients(i, powers, count, first == 0 && !own.bias);
                }
                for (int64_t i = 0; i < count; i++)
                    add_product(own.xs + i * plan.source, own.dys + i * plan.gradient, first + i);
            }
        }

        void mix_sources(int64_t i, const std::array<Factors, 2>& factors, int64_t count, bool fresh) const {
            const Mix<T> mix{sources(i),
                             nullptr,
                             plan.plane,
                             plan.p.w,
                             (patch.row + vertical.low) * vertical.stride + vertical.phases[0],
                             vertical.stride,
                             plan.p.h,
                             patch.column + horizontal.low,
                             factors,
                             int(count),
                             fresh};
            mix(plan.loops, reads, lines, horizontal.slots(patch.columns), layout.pitch, layout.slack, stride,
                own.xs + i * apart, plan.source);
        }

        void mix_gradients(int64_t i, const std::array<Factors, 2>& factors, int64_t count, bool fresh) const {
            const Mix<T> mix{
                gradients(i),  relu_outputs(i), plan.out_plane, plan.p.ow, vertical.first + patch.row * vertical.step,
                vertical.step, plan.p.oh,       patch.column,   factors,   int(count),
                fresh};
            mix(plan.loops, outputs, lines, patch.columns, layout.pitch, plan.loops.lanes, stride, own.dys + i * apart,
                plan.gradient);
        }

        void add_biases(int64_t i) const {
            for (const Tile& tile : patch.job->part->tiles)
                for (int64_t k = tile.first; own.bias && own.has(tile) && k < tile.first + tile.outputs; k++)
                    plan.loops.sum(own.dys + i * apart + (k - outputs.first) * stride, lines, layout.pitch,
                                   patch.columns, own.dbs + k);
        }

        void add_product(const T* xs, const T* dys, int64_t product) const {
            const int64_t taps = plan.taps, first_tap = layout.winograd ? product * plan.tap_columns() : 0;
            for (const Tile& tile : patch.job->part->tiles) {
                if (!own.has(tile)) continue;
                int64_t count = 0, channel = 0;
                for (const Range& range : tile.reads)
                    for (int64_t c = range.first; c < range.last; c++, channel++)
                        for (const Tap& tap : layout.taps)
                            own.shifted[count++] = {xs + (c - reads.first) * stride + tap.offset,
                                                    own.dws + (tile.weights + channel * tile.outputs) * taps +
                                                        (first_tap + tap.index) * tile.outputs};
                plan.loops.gradient({.dy = dys + (tile.first - outputs.first) * stride,
                                     .channel_stride = stride,
                                     .outputs = tile.outputs,
                                     .shifted = own.shifted,
                                     .shifted_count = count,
                                     .at = strips});
            }
        }
    };
};

// Adds up the sums of all threads, in the order of the threads, and writes the gradients.
template <typename T>
struct Totals {
    const Plan<T>& plan;
    const Blocks& blocks;
    const T* sums;  // those of the first thread; the next thread's are `apart` numbers behind
    int64_t copies, apart;

    // The totals of `count` sums from the `at`-th on.
    void total(int64_t at, int64_t count, T* to) const {
        for (int64_t i = 0; i < count; i++) to[i] = sums[at + i];
        for (int64_t t = 1; t < copies; t++)
            for (int64_t i = 0; i < count; i++) to[i] += sums[t * apart + at + i];
    }

    // Writes the rows of the gradient that belong to a tile's outputs.
    void write(const Tile& tile, T* dw, T* db) const {
        const int64_t kernel_taps = plan.p.r * plan.p.s, kernel = blocks.weight_row() * kernel_taps;
        const int64_t count = tile.outputs;
        T *rows[MOST_OUTPUTS], totals[MOST_OUTPUTS];
        for (int64_t k = 0; k < count; k++) {
            rows[k] = dw + place(blocks.row_order, tile.first + k) * kernel;
            std::memset(rows[k], 0, kernel * sizeof(T));
        }
        int64_t at = tile.weights * plan.taps;
        for (const Range& range : tile.reads)
            for (int64_t c = range.first; c < range.last; c++, at += plan.taps * count) {
                const int64_t column = place(blocks.column_order, c) * kernel_taps;
                if (plan.by_winograd) {
                    write_by_winograd(at, column, count, rows);
                    continue;
                }
                for (int64_t t = 0; t < plan.taps; t++) {
                    total(at + t * count, count, totals);
                    for (int64_t k = 0; k < count; k++) rows[k][column + t] = totals[k];
                }
            }
        if (!db) return;
        total(plan.weights * plan.taps + tile.first, count, totals);
        for (int64_t k = 0; k < count; k++) db[place(blocks.row_order, tile.first + k)] = totals[k];
    }

    // Writes those weights' gradients of a tile that one source channel has.
    void write_by_winograd(int64_t at, int64_t column, int64_t count, T* const* rows) const {
        const std::vector<int64_t>&vertical = plan.vertical[0].tap, &horizontal = plan.horizontal[0].tap;
        T totals[MOST_OUTPUTS];
        for (int64_t h = 0; h < plan.tap_columns(); h++) {
            T sums[winograd::TAPS][MOST_OUTPUTS] = {};
            for (int64_t product = 0; product < winograd::PRODUCTS; product++) {
                total(at + (product * plan.tap_columns() + h) * count, count, totals);
                for (int v = 0; v < winograd::TAPS; v++)
                    for (int64_t k = 0; k < count; k++) sums[v][k] += T(winograd::WEIGHTS[product][v]) * totals[k];
            }
            for (int v = 0; v < winograd::TAPS; v++)
                for (int64_t k = 0; k < count; k++) rows[k][column + vertical[v] + horizontal[h]] = sums[v][k];
        }
    }
};

}  // namespace

template <typename T>
void weight_gradient(const InnerLoops<T>& loops, const T* x, const T* dy, const T* relu_output, T* dw, T* db,
                     const Shape& shape, const Blocks& blocks, int threads) {
    const Plan<T> plan(loops, shape, blocks, threads);
    const int64_t weight_sums = plan.weights * plan.taps, sums = spread(weight_sums + plan.p.k, sizeof(T));
    const Buffer<T> scratch(plan.scratch() * plan.threads), gradients(sums * plan.copies());
    const Buffer<Shifted<T>> shifted(plan.shifted * plan.threads);

    on_threads(plan.threads, [&](int thread, int team) {
        T* const xs = scratch.data() + plan.scratch() * thread;
        T* const dws = gradients.data() + (plan.by_tiles ? 0 : sums * thread);
        Worker<T>{plan,
                  x,
                  dy,
                  relu_output,
                  db != nullptr,
                  thread,
                  team,
                  xs,
                  xs + plan.at_once() * plan.source,
                  dws,
                  dws + weight_sums,
                  shifted.data() + plan.shifted * thread}
            .run();
        const Totals<T> totals{plan, blocks, gradients.data(), plan.by_tiles ? 1 : team, sums};
#pragma omp barrier
#pragma omp for schedule(static)
        for (size_t i = 0; i < plan.tiles.size(); i++) totals.write(*plan.tiles[i], dw, db);
    });
}

#define SFG_INSTANTIATE(T)                                                                                     \
    template void weight_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, T*, T*, const Shape&, \
                                     const Blocks&, int);
SFG_INSTANTIATE(float)
SFG_INSTANTIATE(double)

}  // namespace sfg
