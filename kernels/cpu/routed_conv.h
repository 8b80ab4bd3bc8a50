// The routed convolution on packed, contiguous NCHW tensors. See kernels/__init__.py for the contract.
#pragma once
#include <cstdint>

namespace sfg {

struct Shape {
    int64_t n, c, h, w;           // input
    int64_t k, oh, ow;            // output
    int64_t r, s;                 // kernel
    int64_t stride[2], padding[2], dilation[2];  // vertical, horizontal
};

// Output group g owns rows [rows[g], rows[g+1]), input group g columns [columns[g], columns[g+1]);
// reads[out * groups_in + in] says whether it is read.
struct Blocks {
    const int64_t *rows, *columns;
    const bool* reads;
    int64_t groups_out, groups_in;
};

template <typename T>
struct Kernels {
    void (*forward)(const T* x, const T* weight, const T* bias, T* y, const Shape&, const Blocks&, int threads);
    void (*input_gradient)(const T* dy, const T* weight, T* dx, const Shape&, const Blocks&, int threads);
    void (*weight_gradient)(const T* x, const T* dy, T* dw, const Shape&, const Blocks&, int threads);
};

// One set for each instruction set that the file was compiled for.
#define SFG_DECLARE(isa)                 \
    namespace isa {                      \
    extern const Kernels<float> kernels_float;   \
    extern const Kernels<double> kernels_double; \
    }
SFG_DECLARE(baseline)
SFG_DECLARE(avx2)
SFG_DECLARE(avx512)
#undef SFG_DECLARE

}  // namespace sfg
