// Compares the C++ kernels, without Python, with plain loops in double on random problems. ctest runs it, and
// `make test-sanitize` under sanitizers.
// Usage: test_routed_conv [cases [first seed]]. Each case has a seed of its own, which is printed if it fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "memory.h"
#include "routed_conv.h"

namespace {

using sfg::Blocks;
using sfg::Shape;

std::mt19937 generator(0);

int64_t pick(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
int64_t one_of(std::initializer_list<int64_t> values) {
    return values.begin()[pick(0, int64_t(values.size()) - 1)];
}

template <typename T>
std::vector<T> random_numbers(int64_t count) {
    std::normal_distribution<T> normal;
    std::vector<T> numbers(count);
    for (T& number : numbers) number = normal(generator);
    return numbers;
}

struct Problem {
    Shape shape;
    std::vector<int64_t> rows, columns;
    std::vector<char> reads;  // char: std::vector<bool> has no array of bool
    bool relu, residual, bias;
    bool normalised;  // the kernels get u and compute the input, relu(scale * u + shift), themselves
    int threads;

    Blocks blocks() const {
        return {rows.data(), columns.data(), reinterpret_cast<const bool*>(reads.data()), int64_t(rows.size()) - 1,
                int64_t(columns.size()) - 1};
    }
    bool read(int64_t k, int64_t c) const {
        const auto group = [](const std::vector<int64_t>& offsets, int64_t channel) {
            return std::upper_bound(offsets.begin(), offsets.end(), channel) - offsets.begin() - 1;
        };
        return reads[group(rows, k) * (columns.size() - 1) + group(columns, c)];
    }
};

std::vector<int64_t> random_offsets() {
    std::vector<int64_t> offsets{0};
    for (int64_t groups = pick(1, 5); groups > 0 || offsets.back() == 0; groups--)
        offsets.push_back(offsets.back() + one_of({0, 1, 2, 3, 5, 6, 7, 11, 13}));
    return offsets;
}

Problem random_problem() {
    Problem problem;
    problem.rows = random_offsets(), problem.columns = random_offsets();
    for (size_t i = 0; i < (problem.rows.size() - 1) * (problem.columns.size() - 1); i++)
        problem.reads.push_back(char(pick(0, 1)));
    Shape& p = problem.shape;
    p.n = pick(1, 3), p.c = problem.columns.back(), p.k = problem.rows.back();
    p.r = one_of({1, 2, 3, 3, 5, 7}), p.s = one_of({1, 2, 3, 3, 5, 7});
    p.tap_step[0] = p.s, p.tap_step[1] = 1;
    for (int axis = 0; axis < 2; axis++) {
        p.stride[axis] = one_of({1, 1, 1, 2, 3}), p.dilation[axis] = pick(1, 4), p.padding[axis] = pick(0, 6);
        const int64_t taps = axis ? p.s : p.r, reach = p.dilation[axis] * (taps - 1) + 1;
        const int64_t length = std::max<int64_t>(1, reach - 2 * p.padding[axis]) + pick(0, one_of({0, 3, 20, 70}));
        (axis ? p.w : p.h) = length;
        (axis ? p.ow : p.oh) = (length + 2 * p.padding[axis] - reach) / p.stride[axis] + 1;
    }
    problem.relu = pick(0, 1), problem.residual = pick(0, 1), problem.bias = pick(0, 1);
    problem.normalised = pick(0, 1);
    problem.threads = int(pick(1, 3));
    return problem;
}

int failures = 0;

template <typename T>
void compare(const char* what, const std::vector<T>& actual, const std::vector<double>& expected, int64_t terms) {
    // Rounding errors of a sum of n terms of size one add up like a random walk: eps sqrt(n) of a sum of size sqrt(n).
    const double bound = 4 * std::numeric_limits<T>::epsilon() * double(std::max<int64_t>(terms, 1));
    double worst = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        const double error = std::abs(double(actual[i]) - expected[i]);
        if (!(error <= bound)) {  // so that a NaN, which says that nothing was written, is an error, too
            worst = error;
            break;
        }
    }
    if (worst == 0) return;
    std::printf("%s: error %g, bound %g\n", what, worst, bound);
    failures++;
}

template <typename T>
void check(const Problem& problem, const char* isa) {
    const Shape& p = problem.shape;
    const sfg::InnerLoops<T>& loops = *sfg::inner_loops<T>(isa);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const int64_t taps = p.r * p.s, inputs = p.n * p.c * p.h * p.w, outputs = p.n * p.k * p.oh * p.ow;
    std::vector<T> x = random_numbers<T>(inputs), weight = random_numbers<T>(p.k * p.c * taps);
    const std::vector<T> bias = random_numbers<T>(p.k), residual = random_numbers<T>(outputs);
    const std::vector<T> dy = random_numbers<T>(outputs), shortcut = random_numbers<T>(inputs);
    for (int64_t k = 0; k < p.k; k++)
        for (int64_t c = 0; c < p.c; c++)
            if (!problem.read(k, c))
                std::fill_n(weight.begin() + (k * p.c + c) * taps, taps, nan);  // the kernels must not read it

    std::vector<T> y(outputs, nan), activated(outputs, nan), dx(inputs, nan), dw(weight.size(), nan), db(p.k, nan);
    const T* b = problem.bias ? bias.data() : nullptr;
    const std::vector<T> u = x;
    std::vector<T> scale = random_numbers<T>(p.c), shift = random_numbers<T>(p.c);
    for (std::vector<T>* values : {&scale, &shift})
        for (T& value : *values) value /= 2;  // so that x is of size one, which the bounds assume
    if (problem.normalised)
        for (int64_t i = 0; i < inputs; i++) {
            const int64_t c = i / (p.h * p.w) % p.c;
            x[i] = std::max(u[i] * scale[c] + shift[c], T(0));
        }
    const T *by = problem.normalised ? scale.data() : nullptr, *and_to = problem.normalised ? shift.data() : nullptr;
    sfg::forward<T>(loops, u.data(), by, and_to, weight.data(), b, problem.residual ? residual.data() : nullptr,
                    problem.relu, y.data(), nullptr, p, problem.blocks(), problem.threads);
    sfg::forward<T>(loops, u.data(), by, and_to, weight.data(), b, nullptr, true, activated.data(), nullptr, p,
                    problem.blocks(), 1);
    const T* relu_output = problem.relu ? activated.data() : nullptr;
    sfg::input_gradient<T>(loops,
                           {.dy = dy.data(),
                            .relu_output = relu_output,
                            .weight = weight.data(),
                            .shortcut_gradient = {.dx = problem.residual ? shortcut.data() : nullptr},
                            .dx = dx.data()},
                           p, problem.blocks(), problem.threads);
    sfg::weight_gradient<T>(loops, x.data(), dy.data(), relu_output, dw.data(), db.data(), p, problem.blocks(),
                            problem.threads);

    std::vector<double> y0(outputs), dx0(inputs), dw0(weight.size()), db0(p.k);
    if (problem.residual) std::copy(shortcut.begin(), shortcut.end(), dx0.begin());
    for (int64_t n = 0; n < p.n; n++)
        for (int64_t k = 0; k < p.k; k++)
            for (int64_t i = 0; i < p.oh; i++)
                for (int64_t j = 0; j < p.ow; j++) {
                    const int64_t at = ((n * p.k + k) * p.oh + i) * p.ow + j;
                    const double gradient = relu_output && activated[at] <= 0 ? 0 : dy[at];
                    double sum = problem.bias ? bias[k] : 0;
                    db0[k] += gradient;
                    for (int64_t c = 0; c < p.c; c++)
                        for (int64_t r = 0; r < p.r && problem.read(k, c); r++)
                            for (int64_t s = 0; s < p.s; s++) {
                                const int64_t h = i * p.stride[0] - p.padding[0] + r * p.dilation[0];
                                const int64_t w = j * p.stride[1] - p.padding[1] + s * p.dilation[1];
                                if (h < 0 || h >= p.h || w < 0 || w >= p.w) continue;
                                const int64_t in = ((n * p.c + c) * p.h + h) * p.w + w;
                                const int64_t of = ((k * p.c + c) * p.r + r) * p.s + s;
                                sum += double(weight[of]) * x[in];
                                dx0[in] += gradient * weight[of];
                                dw0[of] += gradient * x[in];
                            }
                    y0[at] = (problem.relu && sum < 0 ? 0 : sum) + (problem.residual ? residual[at] : 0);
                }
    const int before = failures;
    compare("forward", y, y0, p.c * taps + 2);  // and bias and residual
    compare("input gradient", dx, dx0, p.k * taps);
    compare("weight gradient", dw, dw0, p.n * p.oh * p.ow);
    compare("bias gradient", db, db0, p.n * p.oh * p.ow);
    if (failures > before)
        std::printf(
            "  %s, %d-bit: n=%ld c=%ld k=%ld image=%ldx%ld kernel=%ldx%ld stride=%ld,%ld padding=%ld,%ld "
            "dilation=%ld,%ld relu=%d threads=%d\n",
            isa, int(8 * sizeof(T)), long(p.n), long(p.c), long(p.k), long(p.h), long(p.w), long(p.r), long(p.s),
            long(p.stride[0]), long(p.stride[1]), long(p.padding[0]), long(p.padding[1]), long(p.dilation[0]),
            long(p.dilation[1]), problem.relu, problem.threads);
}

// A table of reads: row group g reads column groups g and 0 (arrow).
struct Arrow {
    explicit Arrow(int64_t groups) : groups(groups) {
        for (int64_t i = 0; i < groups * groups; i++) reads.push_back(i % groups == 0 || i % groups == i / groups);
    }
    Blocks blocks(const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) const {
        return {rows.data(), columns.data(), reinterpret_cast<const bool*>(reads.data()), groups, groups};
    }
    int64_t groups;
    std::vector<char> reads;
};

Shape layer(const Shape& before, int64_t channels, bool strided) {
    Shape p{};
    p.n = before.n, p.c = before.k, p.h = before.oh, p.w = before.ow, p.k = channels;
    p.r = one_of({1, 3, 5}), p.s = one_of({1, 3, 5}), p.tap_step[0] = p.s, p.tap_step[1] = 1;
    for (int axis = 0; axis < 2; axis++) {
        p.stride[axis] = strided ? one_of({1, 2}) : 1, p.dilation[axis] = pick(1, 4);
        const int64_t reach = p.dilation[axis] * ((axis ? p.s : p.r) - 1);
        p.padding[axis] = reach / 2;
        (axis ? p.ow : p.oh) = ((axis ? p.w : p.h) + 2 * p.padding[axis] - reach - 1) / p.stride[axis] + 1;
    }
    return p;
}

// The gates' gradient inside the input gradient (mode c) against that from the stored gradient of the undrawn rows
// (mode b). This test is about memory that must not be touched; test_native.py compares the numbers with autograd.
template <typename T>
void check_gates(const char* isa) {
    const sfg::InnerLoops<T>& loops = *sfg::inner_loops<T>(isa);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const Arrow arrow(pick(2, 4));
    std::vector<int64_t> offsets[3];
    for (auto& list : offsets) {
        list = {0};
        for (int64_t g = 0; g < arrow.groups; g++) list.push_back(list.back() + one_of({0, 1, 2, 5, 6, 13}));
        if (list.back() == 0) list.back() = 1;
    }
    Shape image{};
    image.n = pick(1, 2), image.k = offsets[0].back(), image.oh = pick(1, 40), image.ow = pick(1, 40);
    const Shape p = layer(image, offsets[1].back(), true), q = layer(p, offsets[2].back(), false);
    const Blocks first = arrow.blocks(offsets[1], offsets[0]), second = arrow.blocks(offsets[2], offsets[1]);
    const int64_t undrawn = arrow.groups - 1, features = p.n * p.k * p.oh * p.ow;
    const std::vector<T> x = random_numbers<T>(p.n * p.c * p.h * p.w), bias = random_numbers<T>(p.k);
    const std::vector<T> weight = random_numbers<T>(p.k * p.c * p.r * p.s);
    const std::vector<T> weight_two = random_numbers<T>(q.k * q.c * q.r * q.s);
    const std::vector<T> dy = random_numbers<T>(q.n * q.k * q.oh * q.ow),
                         scale = random_numbers<T>(p.n * undrawn * p.k);
    std::vector<T> y(features, nan), kept_product(features, nan), dx(features, nan), dundrawn(features * undrawn, nan);
    std::vector<T> dz(undrawn * p.k, nan), dz_all(arrow.groups * p.k, nan);
    const int threads = int(pick(1, 3));
    sfg::forward<T>(loops, x.data(), nullptr, nullptr, weight.data(), bias.data(), nullptr, true, y.data(),
                    kept_product.data(), p, first, threads);
    const sfg::UndrawnFormula<T> undrawn_formula{.x = x.data(),
                                                 .weight = weight.data(),
                                                 .bias = bias.data(),
                                                 .kept_product = kept_product.data(),
                                                 .scale = scale.data(),
                                                 .shift = scale.data(),
                                                 .one_image = pick(0, 1) == 1,
                                                 .one_group = pick(0, 1) == 1,
                                                 .act = {true, false, pick(0, 1) ? 0.01 : 0},
                                                 .shape = p,
                                                 .blocks = first};
    const auto stored = [&](const sfg::ShortcutGradient<T>& shortcut, std::vector<T>& dx, std::vector<T>& dundrawn) {
        sfg::input_gradient<T>(loops,
                               {.dy = dy.data(),
                                .weight = weight_two.data(),
                                .shortcut_gradient = shortcut,
                                .dx = dx.data(),
                                .dundrawn = dundrawn.data()},
                               q, second, threads);
    };
    const auto recomputed = [&](const sfg::ShortcutGradient<T>& shortcut, std::vector<T>& dx) {
        sfg::input_gradient<T>(loops,
                               {.dy = dy.data(),
                                .weight = weight_two.data(),
                                .shortcut_gradient = shortcut,
                                .dx = dx.data(),
                                .drawn_features = y.data(),
                                .undrawn_formula = &undrawn_formula,
                                .dz = dz_all.data()},
                               q, second, threads);
    };
    stored({}, dx, dundrawn);
    const int64_t terms = p.oh * p.ow * p.n * (p.c * p.r * p.s + 1) * (q.k * q.r * q.s + 1);
    std::vector<T> again(features, nan);
    if (pick(0, 1)) {  // a shortcut
        const std::vector<T> past = random_numbers<T>(features), past_undrawn = random_numbers<T>(dundrawn.size());
        const sfg::ShortcutGradient<T> shortcut{past.data(), past_undrawn.data()};
        std::vector<T> all(dundrawn.size(), nan);
        stored(shortcut, again, all);
        for (size_t i = 0; i < dx.size(); i++) dx[i] += past[i];
        for (size_t i = 0; i < dundrawn.size(); i++) dundrawn[i] += past_undrawn[i];
        compare("input gradient and shortcut", again, {dx.begin(), dx.end()}, q.k * q.r * q.s);
        compare("undrawn rows' gradient and shortcut", all, {dundrawn.begin(), dundrawn.end()}, q.k * q.r * q.s);
        recomputed(shortcut, again);
    } else {
        recomputed({}, again);
    }
    sfg::gate_gradient<T>(loops, undrawn_formula, dundrawn.data(), dz.data(), threads);
    compare("gates", std::vector<T>(dz_all.begin() + p.k, dz_all.end()), {dz.begin(), dz.end()}, terms);
    compare("input gradient together with the gates", again, {dx.begin(), dx.end()}, q.k * q.r * q.s);
}

// Batch normalisation: y against its definition. test_native.py compares du with autograd.
template <typename T>
void check_normalise(const char* isa) {
    const sfg::InnerLoops<T>& loops = *sfg::inner_loops<T>(isa);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const bool pool = pick(0, 1), relu = pool || pick(0, 1);
    const double slope = pool || pick(0, 1) ? 0 : 0.01;
    const int64_t n = pick(1, 3), c = pick(1, 5), h = pick(4, 17), w = pick(5, 70), plane = h * w, size = n * c * plane;
    const int64_t out_w = pool ? w / 2 : w, out_plane = pool ? h / 2 * out_w : plane;
    const std::vector<T> u = random_numbers<T>(size), weight = random_numbers<T>(c), bias = random_numbers<T>(c);
    const std::vector<T> residual = random_numbers<T>(size);
    std::vector<int64_t> order(c);
    for (int64_t k = 0; k < c; k++) order[k] = k;
    std::shuffle(order.begin(), order.end(), generator);
    std::vector<T> y(n * c * out_plane, nan), du(size, nan), mean(c, nan), var(c, nan), dweight(c, nan), dbias(c, nan);
    const int threads = int(pick(1, 3));
    const sfg::Norm<T> norm{u.data(), weight.data(), bias.data(), order.data(), T(1e-5), {relu, pool, slope}, n, c, h,
                            w};
    std::vector<T> scale(c, nan), shift(c, nan), again(pool ? 0 : size, nan), running(2 * c, 1);
    sfg::normalise<T>(loops, norm, pool ? nullptr : residual.data(), y.data(), mean.data(), var.data(), scale.data(),
                      shift.data(), {running.data(), running.data() + c, T(0.25)}, threads);
    sfg::normalise_gradient<T>(loops, norm, residual.data(), mean.data(), var.data(), residual.data(), du.data(),
                               dweight.data(), dbias.data(), pool ? nullptr : again.data(), threads);
    for (size_t i = 0; i < again.size(); i++) again[i] += residual[i];
    std::vector<double> expected(y.size(), 0);
    for (int64_t k = 0; k < c; k++) {
        double sum = 0, squares = 0;
        const auto each = [&](const auto& visit) {
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < plane; j++) visit(i * c + k, j);
        };
        each([&](int64_t image, int64_t j) { sum += u[image * plane + j]; });
        each([&](int64_t image, int64_t j) { squares += std::pow(u[image * plane + j] - sum / double(n * plane), 2); });
        const double scale = weight[order[k]] / std::sqrt(squares / double(n * plane) + 1e-5);
        each([&](int64_t image, int64_t j) {
            const int64_t at = image * plane + j, row = j / w / 2, column = j % w / 2;
            const double value = (u[at] - sum / double(n * plane)) * scale + bias[order[k]];
            if (!pool)
                expected[at] = (relu && value < 0 ? slope * value : value) + residual[at];
            else if (row < h / 2 && column < w / 2) {
                double& most = expected[image * out_plane + row * out_w + column];
                most = std::max(most, value);  // it starts from 0, which is the ReLU
            }
        });
    }
    compare("normalise", y, expected, n * plane);
    const double unbiased = double(n * plane) / std::max<double>(double(n * plane - 1), 1);
    std::vector<double> expected_running(2 * c);
    for (int64_t k = 0; k < c; k++)
        expected_running[k] = .75 + .25 * mean[k], expected_running[c + k] = .75 + .25 * unbiased * var[k];
    compare("running statistics", running, expected_running, 4);
    if (!pool) compare("normalise once more", again, expected, n * plane);
    for (int64_t k = 0; k < c; k++) expected[k] = weight[order[k]] / std::sqrt(var[order[k]] + 1e-5);
    compare("scale", scale, {expected.begin(), expected.begin() + c}, n * plane);
    for (int64_t k = 0; k < c; k++) expected[k] = bias[order[k]] - mean[order[k]] * expected[k];
    compare("shift", shift, {expected.begin(), expected.begin() + c}, n * plane);
    for (const T value : du)
        if (!std::isfinite(value)) {
            std::printf("normalise: a gradient was not written\n");
            failures++;
            return;
        }
}

// Memory of results: no block lies in another, and at most 5/4 of what was ever in use is held.
void check_memory() {
    sfg::Memory memory;
    struct Block {
        unsigned char* at;
        size_t bytes;
        unsigned char mark;
    };
    std::vector<Block> blocks;
    size_t used = 0, most = 0;
    const auto check = [&](bool right, const char* what) {
        if (!right) std::printf("memory: %s\n", what), failures++;
    };
    for (int step = 0; step < 300; step++) {
        size_t bytes = size_t(pick(1, 1 << 22));
        const size_t wanted = bytes;
        void* const block = memory.take(bytes);
        check(bytes >= wanted && reinterpret_cast<uintptr_t>(block) % 64 == 0, "too small, or not aligned");
        blocks.push_back({static_cast<unsigned char*>(block), bytes, static_cast<unsigned char>(step)});
        std::fill_n(blocks.back().at, wanted, blocks.back().mark);
        blocks.back().bytes = bytes, used += bytes, most = std::max(most, used);
        check(memory.held() <= most + most / 4, "more is held than was ever needed");
        while (int64_t(blocks.size()) > pick(0, 8)) {
            const size_t i = size_t(pick(0, int64_t(blocks.size()) - 1));
            check(blocks[i].at[0] == blocks[i].mark, "a block was overwritten");
            memory.give(blocks[i].at, blocks[i].bytes), used -= blocks[i].bytes;
            blocks.erase(blocks.begin() + int64_t(i));
        }
    }
    for (const Block& block : blocks) memory.give(block.at, block.bytes);
    size_t bytes = 1000;
    void* const first = memory.take(bytes);
    memory.give(first, bytes);
    check(memory.take(bytes) == first, "a block was not used again");
    memory.give(first, bytes);
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 150, first_seed = argc > 2 ? std::atoi(argv[2]) : 0;
    int sets = 0;
    check_memory();
    for (int i = 0; i < cases && failures < 10; i++) {
        sets = 0;
        for (const char* const* isa = sfg::instruction_sets(); *isa; isa++, sets++) {
            const int before = failures, seed = first_seed + i;
            generator.seed(unsigned(seed));
            const Problem problem = random_problem();
            check<float>(problem, *isa);
            check<double>(problem, *isa);
            check_gates<float>(*isa);
            check_gates<double>(*isa);
            check_normalise<float>(*isa);
            check_normalise<double>(*isa);
            if (failures > before) std::printf("  %s: again with test_routed_conv 1 %d\n", *isa, seed);
        }
    }
    std::printf("%d problems on %d instruction sets, %d failures\n", cases, sets, failures);
    return failures ? 1 : 0;
}
