// The inner loops of the routed convolution. inner_loops.cpp is compiled once for each instruction set. The other files
// are compiled once; they plan the work and call the loops (docs/cpu_kernels.md).
//
// The loops work on SCRATCH: a block of image rows is copied there with its halo, so that the loops know no borders,
// strides or dilations. In scratch an output stands at position (row * pitch + column), and a tap of the kernel reads
// at that position plus a constant offset.
#pragma once
#include <cstdint>

namespace sfg {

// What follows a convolution. relu: values below zero are multiplied with `slope`, which is 0 but for a leaky ReLU.
// pool: the maximum of each 2 x 2 outputs is taken behind the ReLU; an odd last row or column is left out.
struct Activation {
    bool relu = false, pool = false;
    double slope = 0;
};

constexpr int MOST_OUTPUTS = 16;  // no tile has more outputs, with any instruction set

struct Range {
    int64_t first, last;

    int64_t size() const { return last - first; }
};

// One axis of a copy. Slot s of phase p holds the image's line (first + s) * stride + phase[p]: the lines that a
// strided or dilated convolution reads for neighbouring outputs become neighbours.
struct Side {
    const int64_t* phase;
    int64_t phases, first, stride, slots, length;  // length: lines of the image; a line outside is copied as zeros
};

// A copy of channels of an image [channel][height][width] to scratch [channel][vertical phase][horizontal phase][slot]
// [pitch].
template <typename T>
struct Copy {
    const T* image;
    const T* relu_output;  // of the ReLU that the image has yet to go back through, or null: zeros are copied where it
                           // is not positive
    const T *scale = nullptr, *shift = nullptr;  // [channel]: relu(scale * image + shift) is copied; or null
    int64_t image_stride, channels;
    Side vertical, horizontal;
    T* scratch;
    int64_t channel_stride, phase_stride, pitch, slack;  // slack: zeros behind the last slot of each phase
};

// The positions that a loop works on: `strips` strips of `length` positions, `pitch` apart.
struct Strips {
    int64_t strips, length, pitch;
};

struct Tap {
    int64_t offset;  // in scratch, from the position of the output
    int64_t index;   // in the packed kernel
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
    const T* weight;  // [channel that is read][kernel_taps][output]
    int64_t kernel_taps;
    const T* bias;   // [output]
    const T* start;  // what the sums begin with, its strides start_channel and start_strip; null: they begin with bias
    int64_t start_channel, start_strip;
    int64_t outputs;
    bool relu;
    Strips at;
    T* y;
    const T* residual;  // laid out as y, or null
    int64_t y_channel, y_strip;
};

// Winograd's products (winograd.h) that are combined to rows of outputs, for a few channels.
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
    const T* residual;  // laid out as y, or null
    int64_t y_channel, y_row;
};

// Row g of `to` is the sum of factor * row over a few rows of an image, those of group g, as Copy would copy them.
// `before` zeros stand in front of it and `behind` zeros after it. With two products there are two such sums of the
// same rows.
template <typename T>
struct Mixture {
    static constexpr int MOST = 6;
    const T *image, *relu_output;
    int64_t offset[MOST];  // of the rows of group 0
    T factor[2][MOST];
    int products, count;
    int64_t groups, group_stride;
    int64_t before, length, behind;
    T* to;
    int64_t pitch, product_stride;
};

// An input channel shifted by one tap, and the sums [output] that get the gradients of its weights.
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

// sums[k] += sum over rows, columns of df[k] * act(scale[k] * u[k] + shift[k]), for a few channels. rows and columns
// are those of u; with pooling df has half as many of each.
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
    const T *u, *residual;  // the residual may be null
    T scale, shift;
    Activation act;  // without pooling
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

// The way back through AffineTile: g is dy where scale * u + shift passes the ReLU, otherwise slope * dy.
template <typename T>
struct AffineGradient {
    const T *u, *dy;
    T scale, shift;
    Activation act;  // without pooling
    int64_t count;
};

template <typename T>
struct InnerLoops {
    int64_t lanes;             // numbers in a vector
    int64_t outputs;           // most outputs of an OutputTile
    int64_t gradient_outputs;  // most outputs of a GradientTile
    void (*copy)(const Copy<T>&);
    void (*output)(const OutputTile<T>&);
    // Transforms rows of `span` numbers, `pitch` apart, for `blocks` groups of output rows, into the rows that
    // Winograd's products multiply; those of two products are `stride` apart. It writes whole vectors: each row may run
    // on into the next one, and the last one behind its end.
    void (*transform)(const T* rows, int64_t pitch, int64_t span, int64_t blocks, T* to, int64_t stride);
    void (*combine)(const ProductTile<T>&);
    // Transforms kernels [tap][MOST_OUTPUTS] into the weights of Winograd's products, [column][outputs] for each of
    // them, `stride` apart. The tap in row i and column j of a kernel is rows[i] + columns[j].
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
    // du = scale * g + slope * u + offset + shortcut_gradient, which may be null. activated_again is null, or gets
    // act(scale * u + shift); it may be dy.
    void (*affine_gradient)(const AffineGradient<T>&, T slope, T offset, const T* shortcut_gradient, T* du,
                            T* activated_again);
    void (*pool)(const PoolTile<T>&, T* y);
    void (*pool_gradient)(const PoolTile<T>&, const T* dy, T* g);  // dy goes to the first maximum of its window
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
