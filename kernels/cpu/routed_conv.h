// The routed convolution on packed, contiguous NCHW tensors in memory. See kernels/contract.py for the contract.
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

// Output group g owns rows [rows[g], rows[g+1]), input group g columns [columns[g], columns[g+1]);
// reads[out * groups_in + in] says whether it is read. Weights, biases and their gradients stand in the layer's own
// order: row_order[r] is where row r is there, column_order[c] where column c is (null: as they come).
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

// y = act(W x + bias) + residual, every element summed by one thread in a fixed order: the bits don't depend on
// `threads`. bias, residual (laid out as y): may be null. kept: null, or laid out as y, to be filled with the part of
// W x + bias that column group 0 has, which all rows read. scale, shift [c]: null, or relu(scale * x + shift) is
// convolved instead of x.
template <typename T>
void forward(const InnerLoops<T>&, const T* x, const T* scale, const T* shift, const T* weight, const T* bias,
             const T* residual, bool relu, T* y, T* kept, const Shape&, const Blocks&, int threads);

// What the features of an SFG layer are made of: act(scale * u + shift), u its convolution. `kept`: what `forward`
// filled, or null (then u is made of everything that a group reads).
template <typename T>
struct Producer {
    const T *x, *weight, *bias, *kept;
    const T *scale, *shift;  // [groups_out - 1][k], or null: for each row in the groups that are not its own
    bool one_affine;         // or [k], the same in all of them
    Activation act;
    Shape shape;
    Blocks blocks;
};

// Gradients that came around the convolution, by a shortcut: each is added to its like, or null.
template <typename T>
struct Around {
    const T *dx, *others;
};

// dx. relu: null, or the output of the ReLU that dy came through; dy counts where it is positive. Bits as above.
// others: null, or [n][groups_in - 1][c][h][w] to be filled with the gradient that each column would have in each
// group that is not its own, in the order 1, 2, .., 0.
// dz: null, or the inner products of dx with the features `live` [n][c][h][w] to which it belongs, [1][c] (0 if these
// are null). With their producer (without pooling): also of what would go to others with what these would be,
// [groups_in][c] in all.
template <typename T>
void input_gradient(const InnerLoops<T>&, const T* dy, const T* relu, const T* weight, const Around<T>&, T* dx,
                    T* others, const T* live, const Producer<T>*, T* dz, const Shape&, const Blocks&, int threads);

// dz [groups_out - 1][k], the inner products of df [n][groups_out - 1][k][oh][ow] (half of each, with pooling) with
// what each row would be in each group that is not its own, in the order 1, 2, .., 0. Bits as above.
template <typename T>
void gate_gradient(const InnerLoops<T>&, const Producer<T>&, const T* df, T* dz, int threads);

// dw, zero where not read, and db (may be null); no two rows may be one in the weight's order, nor two columns that a
// row reads. Each thread sums its part of the positions, then the parts are added in the order of the threads (or each
// has its part of the weights): the bits depend on how many there are, and on nothing else.
template <typename T>
void weight_gradient(const InnerLoops<T>&, const T* x, const T* dy, const T* relu, T* dw, T* db, const Shape&,
                     const Blocks&, int threads);

// Batch normalisation of u [n][c][h][w] and what follows. Parameters and statistics stand in the layer's own order, as
// in Blocks.
template <typename T>
struct Norm {
    const T *u, *weight, *bias;
    const int64_t* order;
    T eps;
    Activation act;
    int64_t n, c, h, w;
};

// Statistics that go towards those of each batch (var the unbiased one), or null.
template <typename T>
struct Running {
    T *mean, *var;
    T rate;
};

// y = act(weight * (u - mean) / sqrt(var + eps) + bias) + residual, with the mean and the (biased) variance of each
// channel, which are also returned. residual: or null; none with pooling. y: or null. scale, shift: null, or get what
// makes it scale * u + shift, each channel's where u has it.
template <typename T>
void normalise(const InnerLoops<T>&, const Norm<T>&, const T* residual, T* y, T* mean, T* var, T* scale, T* shift,
               const Running<T>&, int threads);

// Its gradients du, dweight, dbias; that of the residual is dy. add: null, or what is added to du. made: null, or gets
// act(norm(u)) once more, and may be dy; not with pooling.
template <typename T>
void normalise_gradient(const InnerLoops<T>&, const Norm<T>&, const T* dy, const T* mean, const T* var, const T* add,
                        T* du, T* dweight, T* dbias, T* made, int threads);

// Running statistics, see kernels/contract.py: [groups][kernels], or [kernels].
template <typename T>
void keep_statistics(const T* mean, const T* var, const int64_t* assignment, int64_t count, double momentum,
                     T* running_mean, T* running_var, T* draws, T* pooled_mean, T* pooled_var, int64_t groups,
                     int64_t kernels);

// argmax of log_p + noise [kernels][groups] for each kernel (noise: or null), and the kernels sorted by it, stably:
// what sfg_fast/groups.py has of a draw, by the same names.
struct Drawn {
    int64_t *assignment, *order, *offsets, *ids, *inverse, *others;
};
template <typename T>
void sample(const T* log_p, const T* noise, const Drawn&, int64_t kernels, int64_t groups);

// Names of the instruction sets that this processor can run, fastest first, ended by null; and their loops.
const char* const* instruction_sets();
template <typename T>
const InnerLoops<T>* inner_loops(const char* name);  // null if there is none of that name
template <>
const InnerLoops<float>* inner_loops<float>(const char* name);
template <>
const InnerLoops<double>* inner_loops<double>(const char* name);

}  // namespace sfg
