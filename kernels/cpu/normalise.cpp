// Batch normalisation, and the activation and the residual behind it. (An instance norm comes as the batch norm of one
// image that has the channels of all images.) One thread does a whole channel: its planes fit into the second-level
// cache, so the second and the third pass over them don't go to memory.
#include <algorithm>
#include <cmath>

#include "routed_conv.h"
#include "scratch.h"

namespace sfg {
namespace {

// The norm of u is scale * u + shift.
template <typename T>
struct Affine {
    T scale, shift;
};

// At most so many numbers are summed in T, and the sums of pieces in double: a sum over a large plane in T would lose
// digits that the statistics need.
constexpr int64_t PIECE = 2048;

// Calls body(first, count) for every piece of a plane.
template <typename Body>
void by_pieces(int64_t plane, const Body& body) {
    for (int64_t first = 0; first < plane; first += PIECE) body(first, std::min(PIECE, plane - first));
}

// weight * (u - mean) / sqrt(var + eps) + bias = scale * u + shift
template <typename T>
Affine<T> affine_of(const Norm<T>& norm, int64_t kernel, const T* mean, const T* var) {
    const T scale = norm.weight[kernel] / std::sqrt(var[kernel] + norm.eps);
    return {scale, norm.bias[kernel] - mean[kernel] * scale};
}

}  // namespace

template <typename T>
void normalise(const InnerLoops<T>& loops, const Norm<T>& norm, const T* residual, T* y, T* mean, T* var, T* scales,
               T* shifts, const Running<T>& running, int threads) {
    const int64_t plane = norm.h * norm.w, out_plane = norm.act.pool ? norm.h / 2 * (norm.w / 2) : plane;
    if (y) advise_large_pages(y, norm.n * norm.c * out_plane * sizeof(T));
    on_threads(threads, [&](int, int) {
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < norm.c; row++) {
            const int64_t kernel = place(norm.order, row);
            const auto image = [&](int64_t i) { return norm.u + (i * norm.c + row) * plane; };
            double total = 0, squares = 0;
            for (int64_t i = 0; i < norm.n; i++)
                by_pieces(plane, [&](int64_t first, int64_t count) {
                    T sum = 0;
                    loops.sum(image(i) + first, 1, count, count, &sum);
                    total += sum;
                });
            mean[kernel] = T(total / double(norm.n * plane));
            for (int64_t i = 0; i < norm.n; i++)
                by_pieces(plane, [&](int64_t first, int64_t count) {
                    squares += loops.squares(image(i) + first, count, mean[kernel]);
                });
            var[kernel] = T(squares / double(norm.n * plane));
            if (running.mean) {
                const double count = double(norm.n * plane);
                const T unbiased = var[kernel] * T(count / std::max(count - 1, 1.));
                running.mean[kernel] += running.rate * (mean[kernel] - running.mean[kernel]);
                running.var[kernel] += running.rate * (unbiased - running.var[kernel]);
            }
            const auto [scale, shift] = affine_of(norm, kernel, mean, var);
            if (scales) scales[row] = scale, shifts[row] = shift;
            for (int64_t i = 0; y && i < norm.n; i++) {
                const int64_t at = (i * norm.c + row) * out_plane;
                if (norm.act.pool)
                    loops.pool({image(i), scale, shift, norm.h, norm.w}, y + at);
                else
                    loops.affine({image(i), residual ? residual + at : nullptr, scale, shift, norm.act, plane, y + at});
            }
        }
    });
}

template <typename T>
void normalise_gradient(const InnerLoops<T>& loops, const Norm<T>& norm, const T* dy, const T* mean, const T* var,
                        const T* shortcut_gradient, T* du, T* dweight, T* dbias, T* activated_again, int threads) {
    const int64_t plane = norm.h * norm.w, out_plane = norm.act.pool ? norm.h / 2 * (norm.w / 2) : plane;
    advise_large_pages(du, norm.n * norm.c * plane * sizeof(T));
    on_threads(threads, [&](int, int) {
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < norm.c; row++) {
            const int64_t kernel = place(norm.order, row);
            const auto [scale, shift] = affine_of(norm, kernel, mean, var);
            const auto tile = [&](int64_t i) {
                const int64_t at = i * norm.c + row;
                if (norm.act.pool)  // pool_gradient has written g into du already
                    return AffineGradient<T>{norm.u + at * plane, du + at * plane, scale, shift, {}, plane};
                return AffineGradient<T>{norm.u + at * plane, dy + at * plane, scale, shift, norm.act, plane};
            };
            double plain = 0, moment = 0;  // sums of g and g * (u - mean), where g = dL/d(scale * u + shift)
            for (int64_t i = 0; i < norm.n; i++) {
                const int64_t at = i * norm.c + row;
                if (norm.act.pool)
                    loops.pool_gradient({norm.u + at * plane, scale, shift, norm.h, norm.w}, dy + at * out_plane,
                                        du + at * plane);
                by_pieces(plane, [&](int64_t first, int64_t count) {
                    AffineGradient<T> piece = tile(i);
                    piece.u += first, piece.dy += first, piece.count = count;
                    T sums[2];
                    loops.affine_sums(piece, mean[kernel], sums);
                    plain += sums[0], moment += sums[1];
                });
            }
            // du = scale * (g - mean(g) - (u - mean) * mean(g * (u - mean)) / (var + eps))
            const double count = double(norm.n * plane), precision = 1 / (double(var[kernel]) + double(norm.eps));
            const double slope = -scale * moment * precision / count;
            const double offset = -scale * plain / count - slope * mean[kernel];
            dbias[kernel] = T(plain);
            dweight[kernel] = T(moment * std::sqrt(precision));
            for (int64_t i = 0; i < norm.n; i++) {
                const int64_t at = (i * norm.c + row) * plane;
                loops.affine_gradient(tile(i), T(slope), T(offset),
                                      shortcut_gradient ? shortcut_gradient + at : nullptr, du + at,
                                      activated_again ? activated_again + at : nullptr);
            }
        }
    });
}

template <typename T>
void keep_statistics(const T* mean, const T* var, const int64_t* assignment, int64_t count, double momentum,
                     T* running_mean, T* running_var, T* draws, T* pooled_mean, T* pooled_var, int64_t groups,
                     int64_t kernels) {
    const T unbiased = T(double(count) / double(std::max<int64_t>(count - 1, 1)));
    const auto towards = [&](T& old, T now, T times) { old += std::max(T(1) / times, T(momentum)) * (now - old); };
    for (int64_t k = 0; k < kernels; k++) {
        const int64_t at = assignment[k] * kernels + k;
        draws[at] += 1;
        T of_all = 0;
        for (int64_t g = 0; g < groups; g++) of_all += draws[g * kernels + k];
        towards(running_mean[at], mean[k], draws[at]), towards(running_var[at], var[k] * unbiased, draws[at]);
        towards(pooled_mean[k], mean[k], of_all), towards(pooled_var[k], var[k] * unbiased, of_all);
    }
}

#define SFG_NORMALISE(T)                                                                                               \
    template void normalise<T>(const InnerLoops<T>&, const Norm<T>&, const T*, T*, T*, T*, T*, T*, const Running<T>&,  \
                               int);                                                                                   \
    template void normalise_gradient<T>(const InnerLoops<T>&, const Norm<T>&, const T*, const T*, const T*, const T*,  \
                                        T*, T*, T*, T*, int);                                                          \
    template void keep_statistics<T>(const T*, const T*, const int64_t*, int64_t, double, T*, T*, T*, T*, T*, int64_t, \
                                     int64_t);
SFG_NORMALISE(float)
SFG_NORMALISE(double)

}  // namespace sfg
