// The routed convolution on packed, contiguous NCHW tensors in memory. kernels/contract.py says what these functions
// have to compute, docs/cpu_kernels.md explains how they do it.
#pragma once
#include <cstdint>

#include "inner_loops.h"

namespace sfg {

struct Shape {
    int64_t n, c, h, w;                          // input
    int64_t k, oh, ow;                           // output
    int64_t r, s;                                // kernel
    int64_t stride[2], padding[2], dilation[2];  // vertical, horizontal
    int64_t tap_step[2];                         // between neighbouring taps in memory: s, 1
};

// Which rows (output channels) read which columns (input channels). Output group g owns rows [rows[g], rows[g+1]),
// input group g owns columns [columns[g], columns[g+1]); reads[out * groups_in + in] says whether group `out` reads
// group `in`. Weights, biases and their gradients stand in the layer's own order: row_order[r] is the place of row r
// there, column_order[c] that of column c. Where an order is null, the weight has the order of the tensor.
struct Blocks {
    const int64_t *rows, *columns;
    const bool* reads;
    int64_t groups_out, groups_in;
    const int64_t *row_order = nullptr, *column_order = nullptr;
    int64_t weight_columns = 0;  // of the layer's weight; 0: as many as there are columns

    int64_t weight_row() const { return weight_columns ? weight_columns : columns[groups_in]; }
};

inline int64_t place(const int64_t* order, int64_t i) {
    return order ? order[i] : i;
}

// y = act(W x + bias) + residual. One thread sums each element of y, in a fixed order, so the bits of y don't depend on
// `threads`.
// - bias and residual (laid out as y) may be null.
// - kept_product is null, or laid out as y: then it gets the product of column group 0 with all rows, plus the bias.
//   That is for tables where row group g reads column groups 0 and g.
// - scale and shift [c] are null, or relu(scale * x + shift) is convolved instead of x.
template <typename T>
void forward(const InnerLoops<T>&, const T* x, const T* scale, const T* shift, const T* weight, const T* bias,
             const T* residual, bool relu, T* y, T* kept_product, const Shape&, const Blocks&, int threads);

// How the features of an SFG layer's undrawn rows are computed: they are act(scale * u + shift), where u is the layer's
// convolution. The kernels compute them block by block and never store them.
template <typename T>
struct UndrawnFormula {
    const T *x, *weight, *bias;
    const T* kept_product;   // that `forward` filled, or null: then row group g reads column group g alone
    const T *scale, *shift;  // [n][groups_out - 1][k], one for each image and undrawn row, or null
    bool one_image;          // scale and shift are the same for all images,
    bool one_group;          // or for all groups: such a dimension is missing
    Activation act;
    Shape shape;
    Blocks blocks;

    // Where scale and shift of `row` are, for an image and the nth (from 0) of the groups that it was not drawn into.
    int64_t affine_at(int64_t image, int64_t nth, int64_t row) const {
        const int64_t groups = one_group ? 1 : blocks.groups_out - 1;
        return ((one_image ? 0 : image * groups) + (one_group ? 0 : nth)) * shape.k + row;
    }
};

// Gradients that came by a shortcut around the convolution, each laid out as the gradient that it is added to, or null.
template <typename T>
struct ShortcutGradient {
    const T *dx = nullptr, *dundrawn = nullptr;
};

// The tensors of an input gradient: what it is computed from, and what it fills. All may be null but dy, weight and dx.
template <typename T>
struct InputGradient {
    const T* dy;                     // [n][k][oh][ow]
    const T* relu_output = nullptr;  // of the ReLU that dy has yet to go back through: dy counts where it is positive
    const T* weight;
    ShortcutGradient<T> shortcut_gradient = {};
    T* dx;                  // [n][c][h][w]
    T* dundrawn = nullptr;  // [n][groups_in - 1][c][h][w]: the gradient of each column's undrawn rows
    // For the gradient of the gates, with stride 1 only:
    const T* drawn_features = nullptr;                   // [n][c][h][w], to which dx belongs
    const UndrawnFormula<T>* undrawn_formula = nullptr;  // of the layer that made the features, without pooling
    T* dz = nullptr;                                     // [1][c], with undrawn_formula [groups_in][c]
};

// The gradient of a convolution's input, in one of three modes:
// (a) dx alone.
// (b) dundrawn is given: also the gradient of the undrawn rows, stored in the order of the groups 1, 2, .., 0 without
//     the one that the column is drawn into.
// (c) undrawn_formula is given, and dundrawn is not: the gradient of the undrawn rows is not stored, but multiplied
//     with their features, which are computed at the same time.
// dz[0] gets the inner products of dx with drawn_features (zeros without them), dz[1..] in mode (c) those of the
// gradient of the undrawn rows with their features. In modes (b) and (c) output group g reads input group g and, if
// group 1 does, group 0; other tables are for mode (a) alone.
// The bits of dx and dundrawn don't depend on `threads`. Those of dz do: `threads` decides how an image is cut into
// blocks, and each block has a partial sum of its own.
template <typename T>
void input_gradient(const InnerLoops<T>&, const InputGradient<T>&, const Shape&, const Blocks&, int threads);

// dz [groups_out - 1][k], the inner products of dundrawn [n][groups_out - 1][k][oh][ow] (with pooling half of each of
// oh and ow) with the features of the undrawn rows, in the order of the groups 1, 2, .., 0. The bits depend on
// `threads`, as those of dz above.
template <typename T>
void gate_gradient(const InnerLoops<T>&, const UndrawnFormula<T>&, const T* dundrawn, T* dz, int threads);

// dw, with zeros for weights that no row reads, and db, which may be null. relu_output is that of InputGradient. No two
// rows may have the same place in the weight, nor two columns that a row reads. Each thread sums its part of the
// positions and the parts are added in the order of the threads, or each thread has its part of the weights: the bits
// depend on the number of threads and on nothing else.
template <typename T>
void weight_gradient(const InnerLoops<T>&, const T* x, const T* dy, const T* relu_output, T* dw, T* db, const Shape&,
                     const Blocks&, int threads);

// Batch normalisation of u [n][c][h][w] and the activation behind it. Weight, bias and statistics stand in the layer's
// own order: order[c] is the place of channel c there, as in Blocks. (Instance normalisation of n images of c channels
// is batch normalisation of one image of n * c channels.)
template <typename T>
struct Norm {
    const T *u, *weight, *bias;
    const int64_t* order;
    T eps;
    Activation act;
    int64_t n, c, h, w;
};

// Running statistics, or null. Each moves towards that of the batch by `rate` of the difference; var is the unbiased
// variance.
template <typename T>
struct Running {
    T *mean, *var;
    T rate;
};

// y = act(weight * (u - mean) / sqrt(var + eps) + bias) + residual. Here and below the bits don't depend on `threads`.
// - mean and var get the mean and the biased variance of each channel.
// - residual may be null, and has to be with pooling. y may be null, if only the statistics are wanted.
// - scale and shift are null, or get the numbers with which the norm of u is scale * u + shift; they have the order of
//   u's channels.
template <typename T>
void normalise(const InnerLoops<T>&, const Norm<T>&, const T* residual, T* y, T* mean, T* var, T* scale, T* shift,
               const Running<T>&, int threads);

// The gradients du, dweight and dbias of `normalise`. (That of the residual is dy itself.)
// - shortcut_gradient is null, or is added to du.
// - activated_again is null, or gets act(norm(u)) once more; it may be dy. It must be null with pooling.
template <typename T>
void normalise_gradient(const InnerLoops<T>&, const Norm<T>&, const T* dy, const T* mean, const T* var,
                        const T* shortcut_gradient, T* du, T* dweight, T* dbias, T* activated_again, int threads);

// Running statistics of every kernel in every group, and pooled over the groups, see kernels/contract.py: tables are
// [groups][kernels], the others [kernels].
template <typename T>
void keep_statistics(const T* mean, const T* var, const int64_t* assignment, int64_t count, double momentum,
                     T* running_mean, T* running_var, T* draws, T* pooled_mean, T* pooled_var, int64_t groups,
                     int64_t kernels);

// The tensors that describe a draw. sfg_fast/groups.py has them by the same names.
struct Drawn {
    int64_t *assignment, *order, *offsets, *ids, *inverse, *undrawn_groups;
};
// Fills the tensors of a draw: the group of each kernel, argmax of log_p + noise [kernels][groups] (noise may be null),
// and the kernels sorted by it, stably.
template <typename T>
void sample(const T* log_p, const T* noise, const Drawn&, int64_t kernels, int64_t groups);

// Names of the instruction sets that this processor can run, fastest first, ended by null.
const char* const* instruction_sets();
// The inner loops for one of these, null if there is none of that name.
template <typename T>
const InnerLoops<T>* inner_loops(const char* name);
template <>
const InnerLoops<float>* inner_loops<float>(const char* name);
template <>
const InnerLoops<double>* inner_loops<double>(const char* name);

}  // namespace sfg
