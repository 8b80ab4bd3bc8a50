// The draw of a layer: the group of each kernel, and the tables that follow from it.
#include <algorithm>
#include <cmath>

#include "routed_conv.h"

namespace sfg {

template <typename T>
void sample(const T* log_p, const T* noise, const Drawn& to, int64_t kernels, int64_t groups) {
    std::fill_n(to.offsets, groups + 1, 0);
    for (int64_t k = 0; k < kernels; k++) {
        const auto value = [&](int64_t g) { return log_p[k * groups + g] + (noise ? noise[k * groups + g] : T(0)); };
        int64_t best = 0;
        for (int64_t g = 1; g < groups && !std::isnan(value(best)); g++)  // a NaN is the largest, as in torch
            if (value(g) > value(best) || std::isnan(value(g))) best = g;
        to.assignment[k] = best;
        to.offsets[best + 1]++;
    }
    for (int64_t g = 0; g < groups; g++) to.offsets[g + 1] += to.offsets[g];
    int64_t row = 0;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t k = 0; k < kernels; k++) {
            if (to.assignment[k] != g) continue;
            to.order[row] = k, to.inverse[k] = row, to.ids[row] = g;
            int64_t nth = 0;
            for (int64_t other = 1; other <= groups; other++)  // the order is: the tasks, then shared
                if (other % groups != g) to.undrawn_groups[nth++ * kernels + row] = other % groups;
            row++;
        }
}

template void sample<float>(const float*, const float*, const Drawn&, int64_t, int64_t);
template void sample<double>(const double*, const double*, const Drawn&, int64_t, int64_t);

}  // namespace sfg
