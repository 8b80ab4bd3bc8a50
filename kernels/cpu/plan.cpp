#include "plan.h"

#include <algorithm>
#include <numeric>

#include "winograd.h"

namespace sfg {
namespace {

constexpr int64_t CACHE_LINE = 64;
constexpr int64_t SCRATCH_BYTES = 384 << 10;  // of what a block has there: it fits into the second-level cache

int64_t floor_div(int64_t a, int64_t b) {
    return a >= 0 ? a / b : -((-a + b - 1) / b);
}
int64_t ceil_div(int64_t a, int64_t b) {
    return -floor_div(-a, b);
}

// taps: pairs of a place in the kernel and an offset, sorted by offset.
Axis make_axis(int64_t first, int64_t step, int64_t count, int64_t stride, int64_t length,
               const std::vector<std::pair<int64_t, int64_t>>& taps) {
    Axis axis{first, step, count, stride, length, {}, {}, {}, {}, 0, 0};
    for (const auto& [index, offset] : taps) {
        // The first output that reads no padding in front of the image.
        const int64_t reader = std::max<int64_t>(0, ceil_div(-offset, stride));
        if (reader >= count || reader * stride + offset >= length) continue;
        const int64_t slot = floor_div(offset, stride), phase = offset - slot * stride;
        auto at = std::find(axis.phases.begin(), axis.phases.end(), phase);
        if (at == axis.phases.end()) at = axis.phases.insert(at, phase);
        axis.phase_of.push_back(at - axis.phases.begin());
        axis.tap.push_back(index);
        axis.slot.push_back(slot);
    }
    if (!axis.slot.empty()) {
        axis.low = *std::min_element(axis.slot.begin(), axis.slot.end());
        axis.high = *std::max_element(axis.slot.begin(), axis.slot.end());
    }
    return axis;
}

// The taps that make_axis was given, without those that only ever read padding.
std::vector<std::pair<int64_t, int64_t>> taps_of(const Axis& axis) {
    std::vector<std::pair<int64_t, int64_t>> list;
    for (size_t i = 0; i < axis.tap.size(); i++)
        list.emplace_back(axis.tap[i], axis.slot[i] * axis.stride + axis.phases[axis.phase_of[i]]);
    return list;
}

// The distance between two lines of a block in scratch; a line is a row, or a group of rows that Winograd transforms
// together. Where a line has much fewer columns than fill its vectors, all lines are worked on as one strip, with the
// gaps between them.
int64_t pitch_of(const Axis& horizontal, int64_t lines, int64_t columns, const Limits& limits) {
    const int64_t span = horizontal.slots(columns), in_vectors = round_up(columns, limits.lanes);
    // Neighbouring lines share the zeros between them, where there are any, but never an output's position.
    const int64_t shared = columns == horizontal.count ? std::min(horizontal.zero_slots(), span - columns) : 0;
    const int64_t strip = round_up((lines - 1) * (span - shared) + columns, limits.lanes);
    const bool narrow = lines > 1 && limits.flat_cost * double(strip) < double(lines * in_vectors);
    return narrow ? span - shared : round_up(std::max(span, in_vectors), limits.lanes);
}

// The number of rows and columns of a block. Of the blocks that fit, this is the one that copies the least halo.
// Columns are cut into ever more pieces of whole vectors, and rows are tried from many to few, in larger steps where a
// row more or less hardly matters. If no block fits, it is the smallest one. Rows that are transformed together stay
// together.
std::pair<int64_t, int64_t> block(const Axis& vertical, const Axis& horizontal, int64_t channels,
                                  const Limits& limits) {
    const int64_t lanes = limits.lanes;
    const int64_t together = std::lcm(limits.together, limits.products ? winograd::ROWS : 1);
    int64_t best_rows = 0, best_columns = 0;
    double least = 0;
    const int64_t pieces = ceil_div(horizontal.count, 2 * lanes);
    for (int64_t cut = 1; cut <= pieces; cut += 1 + cut / 8) {
        const int64_t columns = cut == 1 ? horizontal.count : round_up(ceil_div(horizontal.count, cut), 2 * lanes);
        for (int64_t upto = round_up(std::min<int64_t>(vertical.count, 32), together); upto >= together;
             upto -= upto > 8 ? 4 : together) {
            const int64_t rows = std::min(upto, vertical.count);
            const int64_t phases = std::max<int64_t>(1, vertical.phases.size() * horizontal.phases.size());
            const int64_t lines = limits.products ? groups_of(rows) * limits.products : vertical.slots(rows);
            const int64_t span =
                limits.products ? pitch_of(horizontal, groups_of(rows), columns, limits) : horizontal.slots(columns);
            const int64_t bytes = channels * phases * lines * span * limits.size_of_number;
            const bool fits = bytes <= SCRATCH_BYTES && rows * columns <= limits.most_positions;
            const bool last = cut + 1 + cut / 8 > pieces && upto == together;
            if (!fits && !(last && best_rows == 0)) continue;
            const double cost = double(vertical.slots(rows)) / rows * span / columns;
            if (best_rows == 0 || cost < least) best_rows = rows, best_columns = columns, least = cost;
        }
    }
    return {best_rows, best_columns};
}

}  // namespace

Layout layout(const Axis& vertical, const Axis& horizontal, int64_t rows, int64_t columns, const Limits& limits) {
    const int64_t lanes = limits.lanes, size_of_number = limits.size_of_number;
    Layout best{};
    best.rows = rows, best.columns = columns;
    best.span = horizontal.slots(columns);
    best.winograd = limits.products > 0;
    best.pitch = pitch_of(horizontal, best.winograd ? groups_of(rows) : rows, columns, limits);
    const bool narrow = best.pitch < round_up(columns, lanes);
    best.flat = narrow && !best.winograd;
    best.slack = lanes + std::max<int64_t>(0, best.span - best.pitch);
    if (best.winograd) {
        best.groups = groups_of(best.rows);
        best.phase_stride = best.groups * best.pitch + (narrow ? best.slack : 0);
        best.source_stride = spread(limits.products * best.phase_stride + best.slack, size_of_number);
        for (size_t i = 0; i < horizontal.tap.size(); i++)
            best.taps.push_back({horizontal.slot[i] - horizontal.low, int64_t(i)});
        return best;
    }
    best.phase_stride = vertical.slots(best.rows) * best.pitch;
    const int64_t phases = vertical.phases.size() * horizontal.phases.size();
    best.source_stride = spread(phases * best.phase_stride + best.slack, size_of_number);
    for (size_t v = 0; v < vertical.tap.size(); v++)
        for (size_t h = 0; h < horizontal.tap.size(); h++) {
            const int64_t phase = vertical.phase_of[v] * int64_t(horizontal.phases.size()) + horizontal.phase_of[h];
            best.taps.push_back({phase * best.phase_stride + (vertical.slot[v] - vertical.low) * best.pitch +
                                     horizontal.slot[h] - horizontal.low,
                                 vertical.tap[v] + horizontal.tap[h]});
        }
    return best;
}

int64_t groups_of(int64_t rows) {
    return ceil_div(rows, winograd::ROWS);
}

bool suits_winograd(const std::vector<Axis>& vertical, const std::vector<Axis>& horizontal, const Limits& limits,
                    double combining, double once) {
    if (vertical.empty() || horizontal.size() != 1) return false;
    if (horizontal[0].phases.size() != 1 || horizontal[0].stride != 1) return false;
    int64_t rows = 0, groups = 0;
    for (const Axis& axis : vertical) {
        const bool three = axis.tap.size() == winograd::TAPS && axis.phases.size() == 1 && axis.tap == vertical[0].tap;
        if (!three || axis.slot[1] != axis.slot[0] + 1 || axis.slot[2] != axis.slot[1] + 1) return false;
        rows += axis.count, groups += groups_of(axis.count);
    }
    const double columns = horizontal[0].count, in_vectors = round_up(horizontal[0].count, limits.lanes);
    const double each = double(rows) * std::min(in_vectors, limits.flat_cost * columns);
    const double product = double(groups) * in_vectors;
    return winograd::PRODUCTS * (product + once) + combining * double(rows) * in_vectors <
           winograd::TAPS * (each + once);
}

int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

int64_t spread(int64_t numbers, int64_t size_of_number) {
    const int64_t lines = (numbers * size_of_number + CACHE_LINE - 1) / CACHE_LINE;
    return (lines | 1) * CACHE_LINE / size_of_number;  // an even number of lines would crowd into few sets of the cache
}

int64_t Axis::zero_slots() const {
    const int64_t phase = phases.empty() ? 0 : *std::min_element(phases.begin(), phases.end());
    const int64_t behind = count + high - ceil_div(length - phase, stride);
    return std::max<int64_t>(0, std::min(-low, behind));
}

Shape with_long_rows(Shape p) {
    const bool pointwise =
        p.r == 1 && p.s == 1 && p.stride[0] == 1 && p.stride[1] == 1 && p.padding[0] == 0 && p.padding[1] == 0;
    if (pointwise) {  // a pointwise convolution knows no rows: the image is one line
        p.w *= p.h, p.ow *= p.oh, p.h = p.oh = 1;
    } else if (p.w == 1 && p.ow == 1) {  // an image of one column lies in memory as one of one row does
        std::swap(p.h, p.w), std::swap(p.oh, p.ow), std::swap(p.r, p.s), std::swap(p.stride[0], p.stride[1]);
        std::swap(p.padding[0], p.padding[1]), std::swap(p.dilation[0], p.dilation[1]);
        std::swap(p.tap_step[0], p.tap_step[1]);
    }
    return p;
}

Axis forward_axis(const Shape& p, int axis) {
    const int64_t taps = axis ? p.s : p.r, out = axis ? p.ow : p.oh, length = axis ? p.w : p.h;
    std::vector<std::pair<int64_t, int64_t>> list;
    for (int64_t t = 0; t < taps; t++) list.emplace_back(t * p.tap_step[axis], t * p.dilation[axis] - p.padding[axis]);
    return make_axis(0, 1, out, p.stride[axis], length, list);
}

std::vector<Axis> gradient_axes(const Shape& p, int axis) {
    const int64_t taps = axis ? p.s : p.r, length = axis ? p.ow : p.oh, out = axis ? p.w : p.h, stride = p.stride[axis];
    std::vector<Axis> axes;
    for (int64_t residue = 0; residue < std::min(stride, out); residue++) {
        std::vector<std::pair<int64_t, int64_t>> list;
        for (int64_t t = taps - 1; t >= 0; t--) {
            const int64_t reached = residue + p.padding[axis] - t * p.dilation[axis];
            if (reached - floor_div(reached, stride) * stride == 0)
                list.emplace_back(t * p.tap_step[axis], reached / stride);
        }
        axes.push_back(make_axis(residue, stride, ceil_div(out - residue, stride), 1, length, list));
    }
    return axes;
}

int64_t apart(const Axis& axis) {
    const auto taps = taps_of(axis);
    const int64_t spacing = taps.size() > 1 ? taps[1].second - taps[0].second : 1;
    return spacing / std::gcd(spacing, axis.stride);
}

std::vector<Axis> every(const std::vector<Axis>& axes, int64_t apart) {
    std::vector<Axis> all;
    for (const Axis& axis : axes)
        for (int64_t residue = 0; residue < std::min(apart, axis.count); residue++) {
            auto taps = taps_of(axis);
            for (auto& tap : taps) tap.second += residue * axis.stride;
            all.push_back(make_axis(axis.first + residue * axis.step, axis.step * apart,
                                    ceil_div(axis.count - residue, apart), axis.stride * apart, axis.length, taps));
        }
    return all;
}

std::vector<Axis> undilated(const std::vector<Axis>& axes) {
    std::vector<Axis> all;
    for (const Axis& axis : axes)
        for (Axis& part : every({axis}, apart(axis))) all.push_back(std::move(part));
    return all;
}

std::vector<Part> parts(const Blocks& blocks, bool transposed, int64_t most_outputs, int64_t* weights) {
    const int64_t groups = transposed ? blocks.groups_in : blocks.groups_out;
    const int64_t sources = transposed ? blocks.groups_out : blocks.groups_in;
    const int64_t* out = transposed ? blocks.columns : blocks.rows;
    const int64_t* in = transposed ? blocks.rows : blocks.columns;
    std::vector<Part> list;
    *weights = 0;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t size = out[g + 1] - out[g];
        if (size == 0) continue;
        std::vector<Range> reads;
        int64_t total = 0;
        for (int64_t s = 0; s < sources; s++) {
            if (in[s] == in[s + 1] || !blocks.reads[transposed ? s * groups + g : g * sources + s]) continue;
            if (!reads.empty() && reads.back().last == in[s])
                reads.back().last = in[s + 1];
            else
                reads.push_back({in[s], in[s + 1]});
            total += in[s + 1] - in[s];
        }
        Part part{
            {}, reads.empty() ? Range{0, 0} : Range{reads.front().first, reads.back().last}, {out[g], out[g + 1]}};
        const int64_t count = (size + most_outputs - 1) / most_outputs;
        for (int64_t t = 0; t < count; t++) {  // tiles have the same size, give or take one
            const int64_t first = out[g] + size * t / count, last = out[g] + size * (t + 1) / count;
            part.tiles.push_back({g, first, last - first, reads, total, *weights});
            *weights += (last - first) * total;
        }
        Part* before = list.empty() ? nullptr : &list.back();
        if (before && before->reads.first < part.reads.last && part.reads.first < before->reads.last) {
            before->tiles.insert(before->tiles.end(), part.tiles.begin(), part.tiles.end());
            before->reads = {std::min(before->reads.first, part.reads.first),
                             std::max(before->reads.last, part.reads.last)};
            before->outputs.last = part.outputs.last;
        } else {
            list.push_back(part);
        }
    }
    return list;
}

Strips Layout::strips(int64_t block_rows, int64_t block_columns) const {
    if (flat) return {1, (block_rows - 1) * pitch + block_columns, pitch};
    return {block_rows, block_columns, pitch};
}

std::vector<Job> jobs(const std::vector<Part>& parts, const std::vector<Axis>& vertical,
                      const std::vector<Axis>& horizontal, const Limits& limits, int64_t* items) {
    std::vector<Job> list;
    *items = 0;
    for (const Part& part : parts)
        for (const Axis& v : vertical)
            for (const Axis& h : horizontal) {
                if (v.count == 0 || h.count == 0) continue;
                const int64_t reads = part.reads.size();
                const int64_t outputs = part.outputs.size();
                const auto [rows, columns] =
                    block(v, h, reads + limits.other_channels + (limits.outputs_too ? outputs : 0), limits);
                const Layout blocks = layout(v, h, rows, columns, limits);
                const int64_t column_blocks = ceil_div(h.count, blocks.columns);
                list.push_back({&part, &v, &h, blocks, column_blocks, *items});
                *items += ceil_div(v.count, blocks.rows) * column_blocks;
            }
    return list;
}

Patch::Patch(const std::vector<Job>& jobs, int64_t item) {
    const auto later = [](int64_t value, const Job& j) { return value < j.first_item; };
    job = &*(std::upper_bound(jobs.begin(), jobs.end(), item, later) - 1);
    const Layout& layout = job->layout;
    item -= job->first_item;
    row = item / job->column_blocks * layout.rows, column = item % job->column_blocks * layout.columns;
    rows = std::min(layout.rows, job->vertical->count - row);
    columns = std::min(layout.columns, job->horizontal->count - column);
}

}  // namespace sfg
