// Forward pass, input gradient and the gates' gradient.
#include "routed_conv.h"

#include <numeric>
#include <optional>

#include "convolve.h"

namespace sfg {
namespace {

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
                        .output_stride = blocks.weight_row() * taps,
                        .read_stride = taps,
                        .output_order = blocks.row_order,
                        .read_order = blocks.column_order,
                        .out_channels = p.k,
                        .out_plane = p.oh * p.ow,
                        .out_width = p.ow,
                        .parts = {},
                        .weights = 0,
                        .vertical = undilated({forward_axis(p, 0)}),
                        .horizontal = {forward_axis(p, 1)},
                        .kernel_taps = taps};
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
                        .read_stride = blocks.weight_row() * taps,
                        .output_order = blocks.column_order,
                        .read_order = blocks.row_order,
                        .out_channels = p.c,
                        .out_plane = p.h * p.w,
                        .out_width = p.w,
                        .parts = {},
                        .weights = 0,
                        .vertical = undilated(gradient_axes(p, 0)),
                        .horizontal = gradient_axes(p, 1),
                        .kernel_taps = taps};
    task.parts = parts(blocks, true, loops.outputs, &task.weights);
    return task;
}

// The same groups, where every output group reads the input groups from `first` on.
struct Everything {
    Everything(const Blocks& b, int64_t first) : reads(new bool[b.groups_out * b.groups_in]), blocks(b) {
        blocks.reads = reads.get();
        for (int64_t i = 0; i < b.groups_out * b.groups_in; i++) reads[i] = i % b.groups_in >= first;
    }
    std::unique_ptr<bool[]> reads;
    Blocks blocks;
};

// u of a tile's rows as they would be in group g: in `aside`, or all of it in `kept` already.
template <typename T>
Place<const T> in_group(int64_t g, const Sums<T>& sums, const Blocks& blocks, const Place<const T>& kept,
                        const Place<T>& aside, const Place<const T>& later = {}) {
    const bool reads = g < blocks.groups_in && !(kept.at && g == 0);
    const Range own = reads ? Range{blocks.columns[g], blocks.columns[g + 1]} : Range{0, 0};
    if (kept.at && own.first == own.last) return kept;
    const int64_t from = own.first < own.last ? own.first - sums.tile.reads.front().first : 0;
    sums.compute(sums.over(&own, 1, from, kept, aside), {later});
    return aside.to_read();
}

// What the producer kept for a tile's rows: where it is, if `sums` can start there, else in scratch.
template <typename T>
Place<const T> kept_of(const Work<T>& work, const Sums<T>& sums, const Producer<T>& producer, int aside) {
    if (!producer.kept) return {};
    const T* const kept = producer.kept + work.at(producer.shape.k, work.tile().first);
    if (work.direct(sums)) return work.in(kept);
    const Place<T> copied = sums.scratch(work.aside(aside).at);
    work.fetch(kept, copied);
    return copied.to_read();
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
void forward(const InnerLoops<T>& loops, const T* x, const T* scale, const T* shift, const T* weight, const T* bias,
             const T* residual, bool relu, T* y, T* kept, const Shape& shape, const Blocks& blocks, int threads) {
    const Shape p = with_long_rows(shape);
    Convolution<T> task = forward_task(loops, x, weight, bias, p, blocks);
    task.scale_in = scale, task.shift_in = shift;
    task.choose_method();
    const int64_t bytes = p.n * p.k * p.oh * p.ow * sizeof(T), shared = blocks.columns[1];
    advise_large_pages(y, bytes);
    if (kept) advise_large_pages(kept, bytes);
    convolve(task, plan(task, p, threads), p, threads, kept ? 2 : 1, [&](const Work<T>& work) {
        const Tile& tile = work.tile();
        const int64_t at = work.at(p.k, tile.first);
        OutputTile<T> sum = work.sums.over(tile.reads.data(), tile.reads.size(), 0, {}, {});
        Range rest{0, 0};
        if (kept) {
            const Range first{0, shared};
            const bool direct = work.direct(work.sums);
            const Place<T> start = direct ? work.in(kept + at) : work.aside(0);
            work.sums.compute(work.sums.over(&first, 1, 0, {}, start));
            if (!direct) work.place(start, kept + at, nullptr);
            if (tile.group > 0) rest = {blocks.columns[tile.group], blocks.columns[tile.group + 1]};
            sum = work.sums.over(&rest, 1, shared, start.to_read(), {});
        }
        sum.relu = relu;
        finish(work, sum, y + at, residual ? residual + at : nullptr, work.aside(kept ? 1 : 0));
    });
}

template <typename T>
void input_gradient(const InnerLoops<T>& loops, const T* dy, const T* relu, const T* weight, const Around<T>& around,
                    T* dx, T* others, const T* live, const Producer<T>* producer, T* dz, const Shape& shape,
                    const Blocks& blocks, int threads) {
    // With a producer, both convolutions walk over the same lines.
    const Shape p = producer ? shape : with_long_rows(shape);
    const int64_t last = others || producer ? blocks.groups_in - 1 : 0;
    const Everything everything(blocks, 0);
    Convolution<T> task = gradient_task(loops, dy, relu, weight, p, last ? everything.blocks : blocks);
    std::optional<Convolution<T>> beside;
    std::optional<Everything> sources;
    if (producer) {
        const Shape& q = producer->shape;
        sources.emplace(producer->blocks, producer->kept ? 1 : 0);
        beside.emplace(forward_task(loops, producer->x, producer->weight, producer->bias, q, sources->blocks));
        const Axis mine = gradient_axes(p, 0)[0], its = forward_axis(q, 0);
        const int64_t n = std::lcm(apart(mine), apart(its));
        task.vertical = every({mine}, n), beside->vertical = every({its}, n);
        beside->choose_method();
    }
    task.choose_method();
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
    const auto gate = [&](const Work<T>& work, int64_t number, const Place<T>& df, const Place<const T>& u,
                          bool behind_norm) {
        const bool affine = behind_norm && producer->scale;
        const int64_t other = affine && producer->one_affine ? 0 : (number - 1) * p.c;
        loops.gates({.u = u.at,
                     .df = df.at,
                     .u_channel = u.channel,
                     .u_row = u.row,
                     .df_channel = df.channel,
                     .df_row = df.row,
                     .scale = affine ? producer->scale + other + work.tile().first : nullptr,
                     .shift = affine ? producer->shift + other + work.tile().first : nullptr,
                     .act = {behind_norm && producer->act.relu, false},
                     .channels = work.tile().outputs,
                     .rows = work.patch.rows,
                     .columns = work.patch.columns,
                     .sums = found.data() + work.item * gates + number * p.c + work.tile().first});
    };
    const auto of_live = [&](const Work<T>& work, const Place<T>& df) {
        const int64_t at = work.at(p.c, work.tile().first);
        if (around.dx) work.include(around.dx + at, df);
        if (df.at != dx + at) work.place(df, dx + at, nullptr);
        if (live) gate(work, 0, df, work.in(live + at), false);
    };

    if (!last)
        return convolve(task, shares, p, threads, 1,
                        [&](const Work<T>& work) {
                            const std::vector<Range>& reads = work.tile().reads;
                            const int64_t at = work.at(p.c, work.tile().first);
                            const Place<T> df = live && work.direct(work.sums) ? work.in(dx + at) : work.aside(0);
                            const OutputTile<T> sum = work.sums.over(reads.data(), reads.size(), 0, {}, df);
                            if (!live) return finish(work, sum, dx + at, around.dx ? around.dx + at : nullptr, df);
                            work.sums.compute(sum, {work.in(live, at), work.in(around.dx, at)});
                            of_live(work, df);
                        }),
               dz ? add_up(found, items, gates, dz) : void();

    const auto of_all_groups = [&](const Work<T>& work) {
        const Tile& tile = work.tile();
        const Place<T> total = work.aside(0);
        const Place<const T> kept = producer ? kept_of(work, *work.beside, *producer, 2) : Place<const T>{};
        bool started = false;
        int64_t other = 0;
        for (int64_t step = 0; step <= last; step++) {  // group 0 last: it gets the sum of all, if it is read by all
            const int64_t g = (step + 1) % (last + 1);
            const Range own = g < blocks.groups_out ? Range{blocks.rows[g], blocks.rows[g + 1]} : Range{0, 0};
            const bool sums_up = shared && g == 0, begins = shared && g != 0 && !started;
            const int64_t number = g == tile.group ? 0 : ++other;
            const int64_t at = number ? work.at(last * p.c, (number - 1) * p.c + tile.first) : work.at(p.c, tile.first);
            T* const target = number ? others ? others + at : nullptr : dx + at;
            Place<T> df = begins ? total : target && work.direct(work.sums) ? work.in(target) : work.aside(1);
            const bool nothing = own.first == own.last && !(sums_up && started);
            if (nothing && number && producer && !around.others) continue;
            work.sums.compute(
                work.sums.over(&own, 1, own.first, sums_up && started ? total.to_read() : Place<const T>{}, df),
                {work.in(number ? around.others : around.dx, at), work.in(number ? nullptr : live, at)});
            if (shared && !begins && g != 0)
                for (int64_t k = 0; k < tile.outputs; k++)
                    for (int64_t i = 0; i < work.patch.rows; i++)
                        loops.add(total.at + k * total.channel + i * total.row, df.at + k * df.channel + i * df.row,
                                  work.patch.columns);
            started = true;
            if (begins && (number ? around.others : around.dx)) {  // not part of the total
                df = work.aside(1);
                std::memcpy(df.at, total.at, tile.outputs * work.sums.aside_stride * sizeof(T));
            }
            if (number && around.others) work.include(around.others + at, df);
            if (number == 0) {
                of_live(work, df);
            } else if (others) {
                if (df.at != target) work.place(df, target, nullptr);
            } else {
                const Place<T> aside = work.beside->scratch(work.aside(3).at);
                const Place<const T> u = in_group(g, *work.beside, producer->blocks, kept, aside);
                gate(work, number, df, u, true);
            }
        }
    };
    convolve(task, shares, p, threads, producer ? 4 : 2, of_all_groups, second);
    if (dz) add_up(found, items, gates, dz);
}

template <typename T>
void gate_gradient(const InnerLoops<T>& loops, const Producer<T>& producer, const T* df, T* dz, int threads) {
    const bool pool = producer.act.pool;
    const Shape p = pool ? producer.shape : with_long_rows(producer.shape);
    const Blocks& blocks = producer.blocks;
    const int64_t last = blocks.groups_out - 1, gates = last * p.k;
    const Everything sources(blocks, producer.kept ? 1 : 0);
    Convolution<T> task = forward_task(loops, producer.x, producer.weight, producer.bias, p, sources.blocks);
    if (pool) task.vertical = {forward_axis(p, 0)};  // neighbouring rows are looked at together
    task.choose_method();
    const Plan shares = plan(task, p, threads, (const Convolution<T>*)nullptr, pool ? 2 : 1);
    const int64_t df_width = pool ? p.ow / 2 : p.ow, df_plane = pool ? p.oh / 2 * df_width : p.oh * p.ow;
    const int64_t items = p.n * shares.items;
    const Buffer<T> found(items * gates);  // [item][gate]
    std::fill_n(found.data(), items * gates, T(0));
    convolve(task, shares, p, threads, 2, [&](const Work<T>& work) {
        const Tile& tile = work.tile();
        const Place<const T> kept = kept_of(work, work.sums, producer, 0);
        for (int64_t step = 0, other = 0; step <= last; step++) {
            const int64_t g = (step + 1) % (last + 1);
            if (g == tile.group) continue;
            const int64_t gate = other++ * p.k + tile.first, affine = producer.one_affine ? tile.first : gate;
            const int64_t row = work.patch.row, column = work.patch.column;
            const T* of_gate = df + (work.n * gates + gate) * df_plane;
            const T* features = pool ? of_gate + row / 2 * df_width + column / 2 : df + work.at(gates, gate);
            const Place<const T> u =
                in_group(g, work.sums, blocks, kept, work.aside(1), pool ? Place<const T>{} : work.in(features));
            loops.gates({.u = u.at,
                         .df = features,
                         .u_channel = u.channel,
                         .u_row = u.row,
                         .df_channel = df_plane,
                         .df_row = pool ? df_width : work.line(),
                         .scale = producer.scale ? producer.scale + affine : nullptr,
                         .shift = producer.scale ? producer.shift + affine : nullptr,
                         .act = producer.act,
                         .channels = tile.outputs,
                         .rows = work.patch.rows,
                         .columns = work.patch.columns,
                         .sums = found.data() + work.item * gates + gate});
        }
    });
    add_up(found, items, gates, dz);
}

#define SFG_INSTANTIATE(T)                                                                                           \
    template void forward<T>(const InnerLoops<T>&, const T*, const T*, const T*, const T*, const T*, const T*, bool, \
                             T*, T*, const Shape&, const Blocks&, int);                                              \
    template void input_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, const Around<T>&, T*, T*,    \
                                    const T*, const Producer<T>*, T*, const Shape&, const Blocks&, int);             \
    template void gate_gradient<T>(const InnerLoops<T>&, const Producer<T>&, const T*, T*, int);
SFG_INSTANTIATE(float)
SFG_INSTANTIATE(double)

}  // namespace sfg
