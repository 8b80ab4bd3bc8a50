// The inner loops of the routed convolution. inner_loops.cpp is compiled once for each instruction set;
// routed_conv.cpp, compiled once, plans the work and calls them.
//
// The loops work on SCRATCH: a block of image rows copied with its halo, so that the loops know no borders, strides or
// dilations. In scratch an output stands at position (row * pitch + column) and a tap of the kernel reads at that
// position plus a constant offset.
#pragma once
#include <cstdint>

namespace sfg {

// What follows a convolution. pool: behind the ReLU, the maximum of each 2 x 2 outputs (none of an odd last row or
// column).
struct Activation {
    bool relu = false, pool = false;
};

constexpr int MOST_OUTPUTS = 16;  // of a tile, with any instruction set

struct Range {
    int64_t first, last;

    int64_t size() const { return last - first; }
};

// One axis of a copy. Slot s of phase p holds the image's line (first + s) * stride + phase[p]: the lines that a
// strided or dilated convolution reads for neighbouring outputs become neighbours.
struct Side {
    const int64_t* phase;
    int64_t phases, first, stride, slots, length;  // length: lines of the image; those outside are zero
};

// Channels of an image [channel][height][width] -> scratch [channel][vertical phase][horizontal phase][slot][pitch].
template <typename T>
struct Copy {
    const T* image;
    const T* relu;  // if not null: the output of the ReLU in front of the image, which passes where it is positive
    const T *scale = nullptr, *shift = nullptr;  // [channel], or null; relu(scale * image + shift) is copied then
    int64_t image_stride, channels;
    Side vertical, horizontal;
    T* scratch;
    int64_t channel_stride, phase_stride, pitch, slack;  // slack: zeros behind the last slot of each phase
};

// Positions that are worked on together: `strips` times `length`, `pitch` apart.
struct Strips {
    int64_t strips, length, pitch;
};

struct Tap {
    int64_t offset;  // in scratch, from the position of the output
    int64_t index;   // in the kernel
};

// y[k] = act(start[k] + sum over channels, taps of weight * x) for a few output channels of one group.
template <typename T>
struct OutputTile {
    const T* x;
    int64_t channel_stride;
    const Tap* taps;
    int64_t tap_count;
    const Range* reads;
    int64_t read_count;
    const T* weight;  // [channel read][kernel_taps][output]
    int64_t kernel_taps;
    const T* bias;   // [output]
    const T* start;  // what the sums begin with: null for the bias, or laid out as start_channel, start_strip say
    int64_t start_channel, start_strip;
    int64_t outputs;
    bool relu;
    Strips at;
    T* y;
    const T* residual;  // null or laid out as y
    int64_t y_channel, y_strip;
};

// Rows of outputs from Winograd's products (winograd.h), for a few channels.
template <typename T>
struct ProductTile {
    const T* products;
    int64_t product_stride, channel_stride;
    const T *bias, *start;  // as in OutputTile
    int64_t start_channel, start_row;
    int64_t outputs;
    bool relu;
    int64_t rows, columns;  // rows: at most winograd::ROWS
    T* y;
    const T* residual;  // null or laid out as y
    int64_t y_channel, y_row;
};

// Row g of `to` is the sum of factor * row over a few rows of an image, those of group g; where there is a relu, of the
// numbers that passed it (see Copy). Zeros stand before and behind it. With two products there are two such sums of the
// same rows.
template <typename T>
struct Mixture {
    static constexpr int MOST = 6;
    const T *image, *relu;
    int64_t offset[MOST];  // of the rows of group 0
    T factor[2][MOST];
    int products, count;
    int64_t groups, group_stride;
    int64_t before, length, behind;
    T* to;
    int64_t pitch, product_stride;
};

// An input channel as seen by one tap, and where its gradients [output] are summed.
template <typename T>
struct Shifted {
    const T* x;
    T* gradient;
};

// gradient[k] += sum over positions of dy[k] * x, for each shifted channel and a few output channels of one group.
template <typename T>
struct GradientTile {
    const T* dy;
    int64_t channel_stride;
    int64_t outputs;
    const Shifted<T>* shifted;
    int64_t shifted_count;
    Strips at;  // length is a whole number of vectors; dy is zero where there is no output
};

// sums[k] += sum over rows, columns of df[k] * act(scale[k] * u[k] + shift[k]), for a few channels. rows, columns: of
// u; with pooling df has half of each.
template <typename T>
struct GateTile {
    const T *u, *df;
    int64_t u_channel, u_row, df_channel, df_row;
    const T *scale, *shift;  // [channel], or null
    Activation act;
    int64_t channels, rows, columns;
    T* sums;
};

// y = act(scale * u + shift) + residual, for a channel of an image.
template <typename T>
struct AffineTile {
    const T *u, *residual;  // residual: or null
    T scale, shift;
    bool relu;
    int64_t count;
    T* y;
};

// y = the maxima over 2 x 2 windows of relu(scale * u + shift), for a channel of an image.
template <typename T>
struct PoolTile {
    const T* u;
    T scale, shift;
    int64_t rows, columns;  // of u
};

// The way back: g is dy where scale * u + shift passes the ReLU, otherwise 0.
template <typename T>
struct AffineGradient {
    const T *u, *dy;
    T scale, shift;
    bool relu;
    int64_t count;
};

template <typename T>
struct InnerLoops {
    int64_t lanes;             // numbers in a vector
    int64_t outputs;           // most outputs of an OutputTile
    int64_t gradient_outputs;  // and of a GradientTile
    void (*copy)(const Copy<T>&);
    void (*output)(const OutputTile<T>&);
    // Rows of `span`, `pitch` apart -> those that Winograd multiplies, `blocks` of each, each kind in `stride`. Whole
    // vectors: each may go on into the next one, and behind the last.
    void (*transform)(const T* rows, int64_t pitch, int64_t span, int64_t blocks, T* to, int64_t stride);
    void (*combine)(const ProductTile<T>&);
    // Kernels [tap][MOST_OUTPUTS] -> what these multiply, [column][outputs] for each product, `stride` apart; taps are
    // rows[i] + columns[j].
    void (*weigh)(const T* taps, const int64_t* rows, const int64_t* columns, int64_t column_count, int64_t outputs,
                  T* to, int64_t stride);
    void (*mix)(const Mixture<T>&);
    void (*gradient)(const GradientTile<T>&);
    void (*sum)(const T* values, int64_t rows, int64_t pitch, int64_t length, T* total);  // *total += sum
    void (*gates)(const GateTile<T>&);
    void (*add)(T* to, const T* from, int64_t count);      // to += from
    T (*squares)(const T* values, int64_t count, T mean);  // sum of (value - mean)^2
    void (*affine)(const AffineTile<T>&);
    void (*affine_sums)(const AffineGradient<T>&, T mean, T* sums);  // sums of g and g * (u - mean)
    // du = scale * g + slope * u + offset + add; add: or null
    // y: null, or gets act(scale * u + shift), and may be dy
    void (*affine_gradient)(const AffineGradient<T>&, T slope, T offset, const T* add, T* du, T* y);
    void (*pool)(const PoolTile<T>&, T* y);
    void (*pool_gradient)(const PoolTile<T>&, const T* dy, T* g);  // each dy to the first of its window's largest
};

#define SFG_DECLARE(isa)                          \
    namespace isa {                               \
    extern const InnerLoops<float> loops_float;   \
    extern const InnerLoops<double> loops_double; \
    }
SFG_DECLARE(portable)
SFG_DECLARE(avx2)
SFG_DECLARE(avx512)
#undef SFG_DECLARE

}  // namespace sfg
