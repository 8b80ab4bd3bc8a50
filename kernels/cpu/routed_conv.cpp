// Forward pass, input gradient and the gates' gradient. convolve.h cuts a convolution into tiles of blocks; here stands
// what happens to each of them.
#include "routed_conv.h"

#include <numeric>

#include "convolve.h"

namespace sfg {
namespace {

template <typename T>
Convolution<T> forward_task(const InnerLoops<T>& loops, const T* x, const T* weight, const T* bias, const Shape& p,
                            const Blocks& blocks) {
    const int64_t taps = p.r * p.s;
    Convolution<T> task{.loops = loops,
                        .in = x,
                        .relu_output = nullptr,
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

// The input gradient is a convolution of dy with the kernels turned around.
template <typename T>
Convolution<T> gradient_task(const InnerLoops<T>& loops, const InputGradient<T>& tensors, const Shape& p,
                             const Blocks& blocks) {
    const int64_t taps = p.r * p.s;
    Convolution<T> task{.loops = loops,
                        .in = tensors.dy,
                        .relu_output = tensors.relu_output,
                        .in_channels = p.k,
                        .in_plane = p.oh * p.ow,
                        .weight = tensors.weight,
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

// The same groups with another table: every output group reads all input groups from `first` on. With it a tile has the
// weights, and scratch the sources, for the groups that its channels were not drawn into, too.
struct AllReads {
    AllReads(const Blocks& b, int64_t first) : reads(new bool[b.groups_out * b.groups_in]), blocks(b) {
        blocks.reads = reads.get();
        for (int64_t i = 0; i < b.groups_out * b.groups_in; i++) reads[i] = i % b.groups_in >= first;
    }
    std::unique_ptr<bool[]> reads;
    Blocks blocks;
};

// The inner products that make the gates' gradient. Every item, a block of an image, has a sum of its own for each
// gate, so no two threads add to the same number, and the items are added up in the same order whoever computed them.
template <typename T>
class GateSums {
 public:
    GateSums(int64_t items, int64_t gates) : items_(items), gates_(gates), sums_(items * gates) {
        std::fill_n(sums_.data(), items * gates, T(0));
    }

    T* of(int64_t item, int64_t gate) const { return sums_.data() + item * gates_ + gate; }

    void add_up(T* dz) const {
        for (int64_t gate = 0; gate < gates_; gate++) {
            double total = 0;
            for (int64_t item = 0; item < items_; item++) total += *of(item, gate);
            dz[gate] = T(total);
        }
    }

 private:
    const int64_t items_, gates_;
    const Buffer<T> sums_;
};

// Adds the inner products of df with act(scale * u + shift), for a tile's channels in one block, to `sums`. Scale and
// shift are those of the tile's first channel, or null.
template <typename T>
void add_inner_products(const Work<T>& work, const Place<const T>& u, const Place<const T>& df, const T* scale,
                        const T* shift, Activation act, T* sums) {
    work.task.loops.gates({.u = u.at,
                           .df = df.at,
                           .u_channel = u.channel,
                           .u_row = u.row,
                           .df_channel = df.channel,
                           .df_row = df.row,
                           .scale = scale,
                           .shift = shift,
                           .act = act,
                           .channels = work.tile().outputs,
                           .rows = work.patch.rows,
                           .columns = work.patch.columns,
                           .sums = sums});
}

// Where the kept product of a tile's rows is: in the tensor, if `sums` can start from there, otherwise copied to
// `scratch`. Without a kept product the place is empty.
template <typename T>
Place<const T> kept_product_of(const Work<T>& work, const Sums<T>& sums, const UndrawnFormula<T>& formula,
                               const Place<T>& scratch) {
    if (!formula.kept_product) return {};
    const T* const kept_product = formula.kept_product + work.at(formula.shape.k, work.tile().first);
    if (work.direct(sums)) return work.in(kept_product);
    work.fetch(kept_product, scratch);
    return scratch.to_read();
}

// u of a tile's rows as it would be in `group`: the kept product, if there is one, plus the product of the group's own
// columns. It is computed in `scratch`, unless the kept product is all of it. `later`: see Sums::compute.
template <typename T>
Place<const T> u_in_group(int64_t group, const Sums<T>& sums, const Blocks& blocks, const Place<const T>& kept_product,
                          const Place<T>& scratch, const Place<const T>& later = {}) {
    const bool reads = group < blocks.groups_in && !(kept_product.at && group == 0);
    const Range own = reads ? Range{blocks.columns[group], blocks.columns[group + 1]} : Range{0, 0};
    if (kept_product.at && own.first == own.last) return kept_product;
    const int64_t from = own.first < own.last ? own.first - sums.tile.reads.front().first : 0;
    sums.compute(sums.over(&own, 1, from, kept_product, scratch), {later});
    return scratch.to_read();
}

// The last step for the drawn features of a tile, in all modes of the input gradient: their gradient df, of one block,
// gets the shortcut's, goes to dx, and is multiplied with the features for the gates.
template <typename T>
void finish_drawn(const Work<T>& work, const InputGradient<T>& tensors, const Place<T>& df, const GateSums<T>& gates) {
    const int64_t at = work.at(work.task.out_channels, work.tile().first);
    if (tensors.shortcut_gradient.dx) work.add(tensors.shortcut_gradient.dx + at, df);
    if (df.at != tensors.dx + at) work.store(df, tensors.dx + at, nullptr);
    if (!tensors.drawn_features) return;
    const Place<const T> features = work.in(tensors.drawn_features, at);
    add_inner_products<T>(work, features, df.to_read(), nullptr, nullptr, {}, gates.of(work.item, work.tile().first));
}

// Mode (a) of the input gradient: every tile of dx is one sum over the rows that read it.
template <typename T>
struct PackedGradient {
    const InputGradient<T>& tensors;
    const GateSums<T>& gates;

    void operator()(const Work<T>& work) const {
        const std::vector<Range>& reads = work.tile().reads;
        const int64_t at = work.at(work.task.out_channels, work.tile().first);
        const T* const shortcut = tensors.shortcut_gradient.dx;
        const Place<T> aside = work.aside(0);
        if (!tensors.drawn_features) {
            const OutputTile<T> sum = work.sums.over(reads.data(), reads.size(), 0, {}, aside);
            return finish(work, sum, tensors.dx + at, shortcut ? shortcut + at : nullptr, aside);
        }
        const Place<T> df = work.direct(work.sums) ? work.in(tensors.dx + at) : aside;
        work.sums.compute(work.sums.over(reads.data(), reads.size(), 0, {}, df),
                          {work.in(tensors.drawn_features, at), work.in(shortcut, at)});
        finish_drawn(work, tensors, df, gates);
    }
};

// Mode (b): the gradient of the undrawn rows goes to dundrawn.
template <typename T>
struct StoreUndrawn {
    T* dundrawn;

    Place<const T> begin(const Work<T>&) const { return {}; }
    T* target(int64_t at) const { return dundrawn + at; }
    bool wants_zeros() const { return true; }
    void finish(const Work<T>& work, int64_t, int64_t, const Place<T>& df, int64_t at, const Place<const T>&) const {
        if (df.at != dundrawn + at) work.store(df, dundrawn + at, nullptr);
    }
};

// Mode (c): the gradient of the undrawn rows stays in scratch, where it is multiplied with the features that they would
// have; the companion convolution, of the layer that made the features, computes these.
template <typename T>
struct RecomputeUndrawn {
    const UndrawnFormula<T>& formula;
    const GateSums<T>& gates;

    // The tile's kept product, which all groups need.
    Place<const T> begin(const Work<T>& work) const {
        return kept_product_of(work, *work.companion, formula, work.companion->scratch(work.aside(2).at));
    }
    T* target(int64_t) const { return nullptr; }
    bool wants_zeros() const { return false; }
    void finish(const Work<T>& work, int64_t group, int64_t nth, const Place<T>& df, int64_t,
                const Place<const T>& kept_product) const {
        const Sums<T>& sums = *work.companion;
        const int64_t first = work.tile().first, affine = formula.affine_at(work.n, nth, first);
        const Place<const T> u = u_in_group(group, sums, formula.blocks, kept_product, sums.scratch(work.aside(3).at));
        add_inner_products<T>(work, u, df.to_read(), formula.scale ? formula.scale + affine : nullptr,
                              formula.scale ? formula.shift + affine : nullptr, formula.act,
                              gates.of(work.item, (nth + 1) * formula.shape.k + first));
    }
};

// Modes (b) and (c): the gradient that a tile's columns have in each group, one group after the other. In group g they
// get it from the rows of group g. If these read the shared columns too, the gradient in group 0 is the sum over all
// groups: it is collected on the way, and group 0 comes last. `undrawn` says what becomes of the undrawn rows'
// gradient.
template <typename T, typename Undrawn>
struct GradientInAllGroups {
    const InputGradient<T>& tensors;
    const Blocks& blocks;
    const GateSums<T>& gates;
    const Undrawn undrawn;

    // The sum of the gradients in the groups behind group 0 so far, in scratch.
    struct Total {
        const Place<T> sum;
        bool started = false;
    };

    void operator()(const Work<T>& work) const {
        const int64_t groups = blocks.groups_in, channels = work.task.out_channels, first = work.tile().first;
        const Place<const T> kept_product = undrawn.begin(work);
        Total total{work.aside(0)};
        for (int64_t step = 0, nth = 0; step < groups; step++) {
            const int64_t group = (step + 1) % groups;
            if (group == work.tile().group) {
                const int64_t at = work.at(channels, first);
                const Place<T> df = compute(work, group, total, tensors.dx + at, tensors.shortcut_gradient.dx, at,
                                            tensors.drawn_features);
                finish_drawn(work, tensors, df, gates);
                continue;
            }
            const int64_t number = nth++, at = work.at((groups - 1) * channels, number * channels + first);
            const T* const shortcut = tensors.shortcut_gradient.dundrawn;
            if (is_zero(group, total) && !shortcut && !undrawn.wants_zeros()) continue;
            const Place<T> df = compute(work, group, total, undrawn.target(at), shortcut, at, nullptr);
            if (shortcut) work.add(shortcut + at, df);
            undrawn.finish(work, group, number, df, at, kept_product);
        }
    }

    // Computes the gradient in `group`, still without the shortcut's, and returns where it is: in `target`, its place
    // in a tensor, or in scratch if that is null or the block can't be computed there. The blocks of the shortcut's
    // gradient and of the features, at `at` in their tensors, are prefetched for what follows.
    Place<T> compute(const Work<T>& work, int64_t group, Total& total, T* target, const T* shortcut, int64_t at,
                     const T* features) const {
        const Range rows = rows_of(group);
        const std::initializer_list<Place<const T>> later = {work.in(shortcut, at), work.in(features, at)};
        const bool begins = collects() && group != 0 && !total.started, ends = collects() && group == 0;
        const Place<T> to = begins ? total.sum : target && work.direct(work.sums) ? work.in(target) : work.aside(1);
        const Place<const T> start = ends && total.started ? total.sum.to_read() : Place<const T>{};
        work.sums.compute(work.sums.over(&rows, 1, rows.first, start, to), later);
        total.started = true;
        if (begins && shortcut) {  // the shortcut's gradient must not get into the total
            const Place<T> copy = work.aside(1);
            std::memcpy(copy.at, to.at, work.tile().outputs * work.sums.aside_stride * sizeof(T));
            return copy;
        }
        if (collects() && !begins && !ends) work.add(to.to_read(), total.sum);
        return to;
    }

    Range rows_of(int64_t group) const {
        return group < blocks.groups_out ? Range{blocks.rows[group], blocks.rows[group + 1]} : Range{0, 0};
    }
    // Do the rows behind group 0 read group 0, too?
    bool collects() const { return blocks.groups_out > 1 && blocks.reads[blocks.groups_in]; }
    bool is_zero(int64_t group, const Total& total) const {
        return rows_of(group).size() == 0 && !(collects() && group == 0 && total.started);
    }
};

// Mode (a) for the whole output.
template <typename T>
void packed_gradient(const InnerLoops<T>& loops, const InputGradient<T>& tensors, const Shape& shape,
                     const Blocks& blocks, int threads) {
    const Shape p = with_long_rows(shape);
    Convolution<T> task = gradient_task(loops, tensors, p, blocks);
    task.choose_method();
    const Plan shares = plan(task, p, threads);
    const GateSums<T> gates(p.n * shares.items, tensors.dz ? p.c : 0);
    convolve(task, shares, p, threads, 1, PackedGradient<T>{tensors, gates});
    if (tensors.dz) gates.add_up(tensors.dz);
}

// Mode (b) for the whole output.
template <typename T>
void gradient_with_undrawn(const InnerLoops<T>& loops, const InputGradient<T>& tensors, const Shape& shape,
                           const Blocks& blocks, int threads) {
    const Shape p = with_long_rows(shape);
    const AllReads all(blocks, 0);
    Convolution<T> task = gradient_task(loops, tensors, p, all.blocks);
    task.choose_method();
    const Plan shares = plan(task, p, threads);
    const GateSums<T> gates(p.n * shares.items, tensors.dz ? p.c : 0);
    advise_large_pages(tensors.dundrawn, (blocks.groups_in - 1) * p.n * p.c * p.h * p.w * sizeof(T));
    using Walk = GradientInAllGroups<T, StoreUndrawn<T>>;
    convolve(task, shares, p, threads, 2, Walk{tensors, blocks, gates, {tensors.dundrawn}});
    if (tensors.dz) gates.add_up(tensors.dz);
}

// Mode (c) for the whole output.
template <typename T>
void gradient_and_gates(const InnerLoops<T>& loops, const InputGradient<T>& tensors, const Shape& p,
                        const Blocks& blocks, int threads) {
    const UndrawnFormula<T>& formula = *tensors.undrawn_formula;
    const AllReads all(blocks, 0), sources(formula.blocks, formula.kept_product ? 1 : 0);
    Convolution<T> task = gradient_task(loops, tensors, p, all.blocks);
    Convolution<T> companion =
        forward_task(loops, formula.x, formula.weight, formula.bias, formula.shape, sources.blocks);
    // Blocks of both convolutions must have the same lines of the image, so both are cut by the same distance.
    const Axis gradient = gradient_axes(p, 0)[0], forward = forward_axis(formula.shape, 0);
    const int64_t distance = std::lcm(apart(gradient), apart(forward));
    task.vertical = every({gradient}, distance), companion.vertical = every({forward}, distance);
    task.choose_method(), companion.choose_method();
    const Plan shares = plan(task, p, threads, &companion);
    const GateSums<T> gates(p.n * shares.items, blocks.groups_in * p.c);
    using Walk = GradientInAllGroups<T, RecomputeUndrawn<T>>;
    convolve(task, shares, p, threads, 4, Walk{tensors, blocks, gates, {formula, gates}}, &companion);
    gates.add_up(tensors.dz);
}

}  // namespace

template <typename T>
void forward(const InnerLoops<T>& loops, const T* x, const T* scale, const T* shift, const T* weight, const T* bias,
             const T* residual, bool relu, T* y, T* kept_product, const Shape& shape, const Blocks& blocks,
             int threads) {
    const Shape p = with_long_rows(shape);
    Convolution<T> task = forward_task(loops, x, weight, bias, p, blocks);
    task.scale_in = scale, task.shift_in = shift;
    task.choose_method();
    const int64_t bytes = p.n * p.k * p.oh * p.ow * sizeof(T);
    advise_large_pages(y, bytes);
    if (kept_product) advise_large_pages(kept_product, bytes);
    convolve(task, plan(task, p, threads), p, threads, kept_product ? 2 : 1, [&](const Work<T>& work) {
        const Tile& tile = work.tile();
        const int64_t at = work.at(p.k, tile.first);
        OutputTile<T> sum = work.sums.over(tile.reads.data(), tile.reads.size(), 0, {}, {});
        Range own{0, 0};
        if (kept_product) {  // first the product of the shared columns, then the group's own on top of it
            const Range shared{0, blocks.columns[1]};
            const bool direct = work.direct(work.sums);
            const Place<T> start = direct ? work.in(kept_product + at) : work.aside(0);
            work.sums.compute(work.sums.over(&shared, 1, 0, {}, start));
            if (!direct) work.store(start, kept_product + at, nullptr);
            if (tile.group > 0) own = {blocks.columns[tile.group], blocks.columns[tile.group + 1]};
            sum = work.sums.over(&own, 1, shared.last, start.to_read(), {});
        }
        sum.relu = relu;
        finish(work, sum, y + at, residual ? residual + at : nullptr, work.aside(kept_product ? 1 : 0));
    });
}

template <typename T>
void input_gradient(const InnerLoops<T>& loops, const InputGradient<T>& tensors, const Shape& shape,
                    const Blocks& blocks, int threads) {
    advise_large_pages(tensors.dx, shape.n * shape.c * shape.h * shape.w * sizeof(T));
    if (blocks.groups_in == 1 || !(tensors.dundrawn || tensors.undrawn_formula))  // with one group nothing is undrawn
        packed_gradient(loops, tensors, shape, blocks, threads);
    else if (tensors.dundrawn)
        gradient_with_undrawn(loops, tensors, shape, blocks, threads);
    else
        gradient_and_gates(loops, tensors, shape, blocks, threads);
}

template <typename T>
void gate_gradient(const InnerLoops<T>& loops, const UndrawnFormula<T>& formula, const T* dundrawn, T* dz,
                   int threads) {
    const bool pool = formula.act.pool;
    const Shape p = pool ? formula.shape : with_long_rows(formula.shape);
    const Blocks& blocks = formula.blocks;
    const int64_t groups = blocks.groups_out, gate_count = (groups - 1) * p.k;
    const AllReads sources(blocks, formula.kept_product ? 1 : 0);
    Convolution<T> task = forward_task(loops, formula.x, formula.weight, formula.bias, p, sources.blocks);
    if (pool) task.vertical = {forward_axis(p, 0)};  // a window of the pooling needs neighbouring lines in one block
    task.choose_method();
    const Plan shares = plan(task, p, threads, (const Convolution<T>*)nullptr, pool ? 2 : 1);
    const int64_t df_width = pool ? p.ow / 2 : p.ow, df_plane = pool ? p.oh / 2 * df_width : p.oh * p.ow;
    const GateSums<T> gates(p.n * shares.items, gate_count);
    convolve(task, shares, p, threads, 2, [&](const Work<T>& work) {
        const Tile& tile = work.tile();
        const Place<const T> kept_product = kept_product_of(work, work.sums, formula, work.aside(0));
        for (int64_t step = 0, nth = 0; step < groups; step++) {
            const int64_t group = (step + 1) % groups;
            if (group == tile.group) continue;
            const int64_t affine = formula.affine_at(work.n, nth, tile.first), gate = nth++ * p.k + tile.first;
            const T* const plane = dundrawn + (work.n * gate_count + gate) * df_plane;
            const Place<const T> df =
                pool ? Place<const T>{plane + work.patch.row / 2 * df_width + work.patch.column / 2, df_plane, df_width}
                     : work.in(dundrawn + work.at(gate_count, gate));
            const Place<const T> u =
                u_in_group(group, work.sums, blocks, kept_product, work.aside(1), pool ? Place<const T>{} : df);
            add_inner_products(work, u, df, formula.scale ? formula.scale + affine : nullptr,
                               formula.scale ? formula.shift + affine : nullptr, formula.act,
                               gates.of(work.item, gate));
        }
    });
    gates.add_up(dz);
}

#define SFG_INSTANTIATE(T)                                                                                            \
    template void forward<T>(const InnerLoops<T>&, const T*, const T*, const T*, const T*, const T*, const T*, bool,  \
                             T*, T*, const Shape&, const Blocks&, int);                                               \
    template void input_gradient<T>(const InnerLoops<T>&, const InputGradient<T>&, const Shape&, const Blocks&, int); \
    template void gate_gradient<T>(const InnerLoops<T>&, const UndrawnFormula<T>&, const T*, T*, int);
SFG_INSTANTIATE(float)
SFG_INSTANTIATE(double)

}  // namespace sfg
