// Weight and bias gradient.
#include <algorithm>
#include <cstring>

#include "routed_conv.h"
#include "scratch.h"

namespace sfg {
namespace {

constexpr int64_t GRADIENT_POSITIONS = 1024;  // of a block, so that a tile's outputs stay in the first-level cache

}  // namespace

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

#define SFG_INSTANTIATE(T)                                                                                     \
    template void weight_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, T*, T*, const Shape&, \
                                     const Blocks&, int);
SFG_INSTANTIATE(float)
SFG_INSTANTIATE(double)

}  // namespace sfg
