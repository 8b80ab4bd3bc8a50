// Batch normalisation, the activation and the shortcut behind it. A thread has a channel: its planes fit into the
// second-level cache, so that the second and the third pass over them don't go to memory.
#include <cmath>

#include "routed_conv.h"
#include "scratch.h"

namespace sfg {
namespace {

template <typename T>
struct Affine {
    T scale, shift;
};

// weight * (u - mean) / sqrt(var + eps) + bias = scale * u + shift
template <typename T>
Affine<T> affine_of(T weight, T bias, T mean, T var, T eps) {
    const T scale = weight / std::sqrt(var + eps);
    return {scale, bias - mean * scale};
}

}  // namespace

template <typename T>
void normalise(const InnerLoops<T>& loops, const T* u, const T* weight, const T* bias, const T* residual, T eps,
               bool relu, T* y, T* mean, T* var, int64_t n, int64_t c, int64_t plane, int threads) {
    advise_large_pages(y, n * c * plane * sizeof(T));
    on_threads(threads, [&](int, int) {
#pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < c; k++) {
            double total = 0, squares = 0;
            for (int64_t i = 0; i < n; i++) {
                T sum = 0;
                loops.sum(u + (i * c + k) * plane, 1, plane, plane, &sum);
                total += sum;
            }
            mean[k] = T(total / double(n * plane));
            for (int64_t i = 0; i < n; i++) squares += loops.squares(u + (i * c + k) * plane, plane, mean[k]);
            var[k] = T(squares / double(n * plane));
            const auto [scale, shift] = affine_of(weight[k], bias[k], mean[k], var[k], eps);
            for (int64_t i = 0; i < n; i++) {
                const int64_t at = (i * c + k) * plane;
                loops.affine({u + at, residual ? residual + at : nullptr, scale, shift, relu, plane, y + at});
            }
        }
    });
}

template <typename T>
void normalise_gradient(const InnerLoops<T>& loops, const T* dy, const T* u, const T* weight, const T* bias,
                        const T* mean, const T* var, T eps, bool relu, T* du, T* dweight, T* dbias, int64_t n,
                        int64_t c, int64_t plane, int threads) {
    advise_large_pages(du, n * c * plane * sizeof(T));
    on_threads(threads, [&](int, int) {
#pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < c; k++) {
            const auto [scale, shift] = affine_of(weight[k], bias[k], mean[k], var[k], eps);
            const auto tile = [&](int64_t i) {
                const int64_t at = (i * c + k) * plane;
                return AffineGradient<T>{u + at, dy + at, scale, shift, relu, plane};
            };
            double plain = 0, moment = 0;  // sums of g and g * (u - mean), g = dL/d(scale * u + shift)
            for (int64_t i = 0; i < n; i++) {
                T sums[2];
                loops.affine_sums(tile(i), mean[k], sums);
                plain += sums[0], moment += sums[1];
            }
            // du = scale * (g - mean(g) - (u - mean) * mean(g * (u - mean)) / (var + eps))
            const double count = double(n * plane), precision = 1 / (double(var[k]) + double(eps));
            const double slope = -scale * moment * precision / count;
            const double offset = -scale * plain / count - slope * mean[k];
            dbias[k] = T(plain);
            dweight[k] = T(moment * std::sqrt(precision));
            for (int64_t i = 0; i < n; i++)
                loops.affine_gradient(tile(i), T(slope), T(offset), du + (i * c + k) * plane);
        }
    });
}

#define SFG_NORMALISE(T)                                                                                          \
    template void normalise<T>(const InnerLoops<T>&, const T*, const T*, const T*, const T*, T, bool, T*, T*, T*, \
                               int64_t, int64_t, int64_t, int);                                                   \
    template void normalise_gradient<T>(const InnerLoops<T>&, const T*, const T*, const T*, const T*, const T*,   \
                                        const T*, T, bool, T*, T*, T*, int64_t, int64_t, int64_t, int);
SFG_NORMALISE(float)
SFG_NORMALISE(double)

}  // namespace sfg
