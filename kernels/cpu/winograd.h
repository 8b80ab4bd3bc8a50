// Winograd's F(4, 3) in the vertical direction (Lavin and Gray 2016, section 4.1): four rows of outputs read six rows
// of sources through three rows of taps. Plain sums need twelve products of rows for that, Winograd needs six products
// of transformed rows:
//   outputs = OUTPUTS (WEIGHTS weights * SOURCES sources)
// Columns are summed as usual. The result is exact but for rounding, which depends on the points 0, +-A, +-B at which
// polynomials are multiplied: with sums over 64 channels in float the error is 1.4 times that of plain sums (1.9 times
// with the usual points 1 and 2), over 3 channels 2.3 times.
#pragma once
#include <cstdint>

namespace sfg::winograd {

constexpr int ROWS = 4, TAPS = 3, PRODUCTS = ROWS + TAPS - 1;

// Multiples of 1/8, so that these numbers and their products are exact.
constexpr double A = 5. / 8, B = 3. / 2, AA = A * A, BB = B * B;

// Each row has the coefficients of the product of (x - p) over all points p but one; the last row, over all of them.
constexpr double SOURCES[PRODUCTS][PRODUCTS] = {{AA * BB, 0, -AA - BB, 0, 1, 0}, {0, -A * BB, -BB, A, 1, 0},
                                                {0, A * BB, -BB, -A, 1, 0},      {0, -B * AA, -AA, B, 1, 0},
                                                {0, B * AA, -AA, -B, 1, 0},      {0, AA * BB, 0, -AA - BB, 0, 1}};
constexpr double AT_A = 2 * AA * (AA - BB), AT_B = 2 * BB * (BB - AA);
constexpr double WEIGHTS[PRODUCTS][TAPS] = {
    {1 / (AA * BB), 0, 0},           {1 / AT_A, A / AT_A, AA / AT_A},  {1 / AT_A, -A / AT_A, AA / AT_A},
    {1 / AT_B, B / AT_B, BB / AT_B}, {1 / AT_B, -B / AT_B, BB / AT_B}, {0, 0, 1}};
// Row i has the i-th powers of the points.
constexpr double OUTPUTS[ROWS][PRODUCTS] = {
    {1, 1, 1, 1, 1, 0}, {0, A, -A, B, -B, 0}, {0, AA, AA, BB, BB, 0}, {0, A * AA, -A * AA, B * BB, -B * BB, 1}};

// Is this the first of two products at opposite points? Their factors of odd rows have opposite signs, the
// others are equal.
constexpr bool opposite(int64_t product) {
    return product == 1 || product == 3;
}

}  // namespace sfg::winograd
