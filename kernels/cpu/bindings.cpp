// The Python side of the CPU kernels: it checks the arguments and releases the GIL. kernels/cpu/__init__.py passes them
// by position; _native.pyi lists them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "memory.h"
#include "routed_conv.h"

namespace nb = nanobind;
using namespace nb::literals;
using sfg::Blocks;
using sfg::Shape;

namespace {

template <typename T, int Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Tensor = Array<T, 4>;
using Offsets = std::vector<int64_t>;
using Table = std::vector<uint8_t>;   // std::vector<bool> has no array of bool
using Pair = std::array<int64_t, 2>;  // vertical, horizontal
using Order = std::optional<Array<const int64_t, 1>>;

struct Geometry {
    const Pair stride, padding, dilation;
};

// Who reads whom, see Blocks: what Python passes, by reference.
struct Routing {
    const Offsets &rows, &columns;
    const Table& reads;
    const Order &row_order, &column_order;
};

const char* chosen = sfg::instruction_sets()[0];

template <typename T>
const sfg::InnerLoops<T>& loops() {
    return *sfg::inner_loops<T>(chosen);
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// The shape of a convolution of x [n, c, h, w] with w [.., .., r, s] to y, whose sizes are given. The kernels index
// with it unchecked, so everything is checked here, against every array.
template <typename X, typename W>
Shape shape(const X& x, const W& w, std::array<int64_t, 4> y, const Geometry& geometry) {
    const auto& [stride, padding, dilation] = geometry;
    Shape p{};
    p.n = x.shape(0), p.c = x.shape(1), p.h = x.shape(2), p.w = x.shape(3);
    p.k = y[1], p.oh = y[2], p.ow = y[3];
    p.r = w.shape(2), p.s = w.shape(3), p.tap_step[0] = p.s, p.tap_step[1] = 1;
    require(y[0] == p.n, "input and output differ in batch size");
    const int64_t image[] = {p.h, p.w}, taps[] = {p.r, p.s};
    for (int i = 0; i < 2; i++) {
        require(image[i] + 2 * padding[i] >= dilation[i] * (taps[i] - 1) + 1, "the kernel is larger than the image");
        require(stride[i] >= 1 && dilation[i] >= 1 && padding[i] >= 0, "stride, dilation or padding out of range");
        p.stride[i] = stride[i], p.padding[i] = padding[i], p.dilation[i] = dilation[i];
    }
    const auto size = [](int64_t in, int64_t k, int64_t s, int64_t pad, int64_t d) {
        return (in + 2 * pad - d * (k - 1) - 1) / s + 1;
    };
    require(p.oh == size(p.h, p.r, stride[0], padding[0], dilation[0]) &&
                p.ow == size(p.w, p.s, stride[1], padding[1], dilation[1]),
            "the output has the wrong height or width");
    return p;
}

template <typename X, typename W, typename Y>
Shape shape(const X& x, const W& w, const Y& y, const Geometry& geometry) {
    const std::array<int64_t, 4> size{int64_t(y.shape(0)), int64_t(y.shape(1)), int64_t(y.shape(2)),
                                      int64_t(y.shape(3))};
    return shape(x, w, size, geometry);
}

// The place of each of `count` channels in the weight, which has `size` of them; null: the channels are in its order.
const int64_t* order(const Order& places, int64_t count, int64_t size) {
    if (!places) return nullptr;
    require(int64_t(places->shape(0)) == count, "an order does not fit the channels");
    const int64_t* first = places->data();
    require(std::all_of(first, first + count, [&](int64_t place) { return place >= 0 && place < size; }),
            "an order leaves the weight");
    return first;
}

// Do the first `count` places differ, and are they less than `count`?
bool each_once(const int64_t* places, int64_t count) {
    std::vector<char> seen(count);
    for (int64_t i = 0; places && i < count; i++)
        if (places[i] >= count || seen[places[i]]++) return false;
    return true;
}

// Does every row read each column of the weight at most once?
bool read_once(const Blocks& b) {
    for (int64_t out = 0; out < b.groups_out; out++) {
        std::vector<char> seen(b.weight_row());
        for (int64_t in = 0; in < b.groups_in; in++)
            for (int64_t c = b.columns[in]; b.reads[out * b.groups_in + in] && c < b.columns[in + 1]; c++)
                if (seen[sfg::place(b.column_order, c)]++) return false;
    }
    return true;
}

// The result points into `routing`. w: the weight, in the layer's own order.
template <typename W>
Blocks blocks(const Routing& routing, const Shape& p, const W& w) {
    const auto& [rows, columns, reads, row_order, column_order] = routing;
    require(rows.size() > 1 && columns.size() > 1 && reads.size() == (rows.size() - 1) * (columns.size() - 1),
            "offsets don't fit the table");
    const auto ascending = [](const Offsets& offsets, int64_t total) {
        return offsets.front() == 0 && offsets.back() == total && std::is_sorted(offsets.begin(), offsets.end());
    };
    require(ascending(rows, p.k) && ascending(columns, p.c), "offsets don't cover the channels");
    require(row_order || int64_t(w.shape(0)) == p.k, "the weight does not fit the output's channels");
    require(column_order || int64_t(w.shape(1)) == p.c, "the weight does not fit the input's channels");
    return {rows.data(),
            columns.data(),
            reinterpret_cast<const bool*>(reads.data()),
            static_cast<int64_t>(rows.size()) - 1,
            static_cast<int64_t>(columns.size()) - 1,
            order(row_order, p.k, w.shape(0)),
            order(column_order, p.c, w.shape(1)),
            static_cast<int64_t>(w.shape(1))};
}

template <typename T>
using Optional = std::optional<Tensor<const T>>;

// The memory of a tensor, which must have the expected shape; null if there is none.
template <typename T>
T* data(const std::optional<Tensor<T>>& tensor, std::array<int64_t, 4> expected, const char* message) {
    if (!tensor) return nullptr;
    for (int i = 0; i < 4; i++) require(int64_t(tensor->shape(i)) == expected[i], message);
    return tensor->data();
}

template <typename T>
void forward(Tensor<const T> x, Tensor<const T> w, std::optional<Array<const T, 1>> bias, Optional<T> residual,
             bool relu, Tensor<T> y, std::optional<Tensor<T>> kept_product, const Offsets& rows, const Offsets& columns,
             const Table& reads, Pair stride, Pair padding, Pair dilation, int threads, const Order& row_order,
             const Order& column_order, std::optional<Array<const T, 2>> affine) {
    const Shape p = shape(x, w, y, {stride, padding, dilation});
    const Blocks b = blocks({rows, columns, reads, row_order, column_order}, p, w);
    const std::array<int64_t, 4> output{p.n, p.k, p.oh, p.ow};
    require(!bias || bias->shape(0) == w.shape(0), "the bias does not fit the output channels");
    const T* const residual_data = data(residual, output, "the residual does not fit the output");
    T* const kept_data = data(kept_product, output, "the kept product does not fit the output");
    require(!affine || (affine->shape(0) == 2 && int64_t(affine->shape(1)) == p.c),
            "scale and shift don't fit the input");
    const T* const scale = affine ? affine->data() : nullptr;
    const sfg::InnerLoops<T>& inner = loops<T>();
    require(threads >= 1, "threads must be at least 1");
    const nb::gil_scoped_release released;
    sfg::forward<T>(inner, x.data(), scale, scale ? scale + p.c : nullptr, w.data(), bias ? bias->data() : nullptr,
                    residual_data, relu, y.data(), kept_data, p, b, threads);
}

// How Python passes an Activation: relu, pool, slope.
using ActivationTuple = std::tuple<bool, bool, double>;

sfg::Activation activation(const ActivationTuple& tuple) {
    const auto [relu, pool, slope] = tuple;
    require(relu || !pool, "pooling comes behind a ReLU");
    require(!pool || slope == 0, "pooling comes behind a ReLU that is not leaky");
    return {relu, pool, slope};
}

// The tuple in which Python passes UndrawnFormula: x, weight, bias, kept_product, scale, shift, activation, rows,
// columns, reads, stride, padding, dilation, the output's size, row_order, column_order.
template <typename T>
using UndrawnTuple = std::tuple<Tensor<const T>, Tensor<const T>, std::optional<Array<const T, 1>>, Optional<T>,
                                std::optional<Array<const T, 3>>, std::optional<Array<const T, 3>>, ActivationTuple,
                                Offsets, Offsets, Table, Pair, Pair, Pair, Pair, Order, Order>;

// The result points into the tuple.
template <typename T>
sfg::UndrawnFormula<T> undrawn_formula(const UndrawnTuple<T>& tuple) {
    const auto& [x, w, bias, kept_product, scale, shift, act, rows, columns, reads, stride, padding, dilation, size,
                 row_order, column_order] = tuple;
    const std::array<int64_t, 4> y{int64_t(x.shape(0)), rows.empty() ? 0 : rows.back(), size[0], size[1]};
    const Shape p = shape(x, w, y, {stride, padding, dilation});
    const Blocks b = blocks({rows, columns, reads, row_order, column_order}, p, w);
    require(!bias || bias->shape(0) == w.shape(0), "the bias does not fit the output channels");
    require(bool(scale) == bool(shift), "scale and shift come together");
    for (const auto* values : {&scale, &shift})
        require(!*values || ((int64_t((*values)->shape(0)) == p.n || (*values)->shape(0) == 1) &&
                             (int64_t((*values)->shape(1)) == b.groups_out - 1 || (*values)->shape(1) == 1) &&
                             (*values)->shape(0) == scale->shape(0) && (*values)->shape(1) == scale->shape(1) &&
                             int64_t((*values)->shape(2)) == p.k),
                "scale or shift don't fit the undrawn rows");
    return {.x = x.data(),
            .weight = w.data(),
            .bias = bias ? bias->data() : nullptr,
            .kept_product = data(kept_product, y, "the kept product does not fit the output"),
            .scale = scale ? scale->data() : nullptr,
            .shift = shift ? shift->data() : nullptr,
            .one_image = scale && scale->shape(0) == 1,
            .one_group = scale && scale->shape(1) == 1,
            .act = activation(act),
            .shape = p,
            .blocks = b};
}

// Do the undrawn features belong to the columns of this convolution?
template <typename T>
void require_fit(const sfg::UndrawnFormula<T>& formula, const Shape& p, const Blocks& b) {
    const Shape& q = formula.shape;
    require(!formula.act.pool, "the gates' gradient inside the input gradient comes without pooling");
    require(q.n == p.n && q.k == p.c && q.oh == p.h && q.ow == p.w && formula.blocks.groups_out == b.groups_in,
            "the features of undrawn rows do not fit the drawn ones");
    for (int64_t g = 0; g <= b.groups_in; g++)
        require(formula.blocks.rows[g] == b.columns[g],
                "the features of undrawn rows have other groups than the drawn ones");
}

template <typename T>
void input_gradient(Tensor<const T> dy, Optional<T> relu_output, Tensor<const T> w, Optional<T> shortcut_dx,
                    Optional<T> shortcut_dundrawn, Tensor<T> dx, std::optional<Tensor<T>> dundrawn,
                    Optional<T> drawn_features, const std::optional<UndrawnTuple<T>>& undrawn,
                    std::optional<Array<T, 2>> dz, const Offsets& rows, const Offsets& columns, const Table& reads,
                    Pair stride, Pair padding, Pair dilation, int threads, const Order& row_order,
                    const Order& column_order) {
    const Shape p = shape(dx, w, dy, {stride, padding, dilation});
    const Blocks b = blocks({rows, columns, reads, row_order, column_order}, p, w);
    const std::array<int64_t, 4> output{p.n, p.k, p.oh, p.ow}, input{p.n, p.c, p.h, p.w};
    const std::array<int64_t, 4> undrawn_rows{p.n, (b.groups_in - 1) * p.c, p.h, p.w};
    std::optional<sfg::UndrawnFormula<T>> formula;
    if (undrawn) formula = undrawn_formula(*undrawn), require_fit(*formula, p, b);
    const sfg::InputGradient<T> tensors{
        .dy = dy.data(),
        .relu_output = data(relu_output, output, "the ReLU's output does not fit the gradient"),
        .weight = w.data(),
        .shortcut_gradient = {data(shortcut_dx, input, "the shortcut's gradient does not fit the input"),
                              data(shortcut_dundrawn, undrawn_rows,
                                   "the shortcut's gradient does not fit the undrawn rows")},
        .dx = dx.data(),
        .dundrawn = data(dundrawn, undrawn_rows, "the gradient of the undrawn rows does not fit the input"),
        .drawn_features = data(drawn_features, input, "the features don't fit the gradient"),
        .undrawn_formula = formula ? &*formula : nullptr,
        .dz = dz ? dz->data() : nullptr};
    require(!shortcut_dundrawn || dundrawn || undrawn,
            "the shortcut has a gradient of undrawn rows, which is not asked for");
    require(bool(dz) == (drawn_features || undrawn), "the gates' gradient needs the features, drawn or undrawn");
    require(!dundrawn || !undrawn, "either the gradient of the undrawn rows or that of their gates");
    require(!dz || (p.stride[0] == 1 && p.stride[1] == 1), "the gates' gradient comes with stride 1 only");
    require(!dz || (int64_t(dz->shape(0)) == (undrawn ? b.groups_in : 1) && int64_t(dz->shape(1)) == p.c),
            "the gates' gradient does not fit the groups");
    const sfg::InnerLoops<T>& inner = loops<T>();
    require(threads >= 1, "threads must be at least 1");
    const nb::gil_scoped_release released;
    sfg::input_gradient<T>(inner, tensors, p, b, threads);
}

template <typename T>
void gate_gradient(const UndrawnTuple<T>& undrawn, Tensor<const T> dundrawn, Array<T, 2> dz, int threads) {
    const sfg::UndrawnFormula<T> formula = undrawn_formula(undrawn);
    const Shape& p = formula.shape;
    const int64_t groups = formula.blocks.groups_out - 1, part = formula.act.pool ? 2 : 1;
    const T* const gradient = data(std::optional(dundrawn), {p.n, groups * p.k, p.oh / part, p.ow / part},
                                   "the gradient of the undrawn rows does not fit the output");
    require(int64_t(dz.shape(0)) == groups && int64_t(dz.shape(1)) == p.k, "the gates' gradient does not fit");
    const sfg::InnerLoops<T>& inner = loops<T>();
    require(threads >= 1, "threads must be at least 1");
    const nb::gil_scoped_release released;
    sfg::gate_gradient<T>(inner, formula, gradient, dz.data(), threads);
}

template <typename T>
void weight_gradient(Tensor<const T> x, Tensor<const T> dy, Optional<T> relu_output, Tensor<T> dw,
                     std::optional<Array<T, 1>> db, const Offsets& rows, const Offsets& columns, const Table& reads,
                     Pair stride, Pair padding, Pair dilation, int threads, const Order& row_order,
                     const Order& column_order) {
    const Shape p = shape(x, dw, dy, {stride, padding, dilation});
    const Blocks b = blocks({rows, columns, reads, row_order, column_order}, p, dw);
    require(!db || db->shape(0) == dw.shape(0), "the bias gradient does not fit the output channels");
    const T* const relu_data = data(relu_output, {p.n, p.k, p.oh, p.ow}, "the ReLU's output does not fit the gradient");
    require(int64_t(dw.shape(0)) == p.k && each_once(b.row_order, p.k) && read_once(b),
            "the weight's gradient needs every row once, and what it reads");
    const sfg::InnerLoops<T>& inner = loops<T>();
    require(threads >= 1, "threads must be at least 1");
    const nb::gil_scoped_release released;
    sfg::weight_gradient<T>(inner, x.data(), dy.data(), relu_data, dw.data(), db ? db->data() : nullptr, p, b, threads);
}

template <typename T>
using Vector = Array<T, 1>;

template <typename T>
sfg::Norm<T> norm(const Tensor<const T>& u, const Vector<const T>& weight, const Vector<const T>& bias,
                  const Order& places, double eps, const ActivationTuple& act) {
    const int64_t c = u.shape(1);
    require(int64_t(weight.shape(0)) == c && int64_t(bias.shape(0)) == c, "the parameters don't fit the channels");
    const int64_t* at = order(places, c, c);
    require(each_once(at, c), "an order has a kernel twice");
    return {u.data(), weight.data(),       bias.data(),        at, T(eps), activation(act), int64_t(u.shape(0)),
            c,        int64_t(u.shape(2)), int64_t(u.shape(3))};
}

template <typename T>
std::array<int64_t, 4> output_size(const sfg::Norm<T>& norm) {
    const int64_t part = norm.act.pool ? 2 : 1;
    return {norm.n, norm.c, norm.h / part, norm.w / part};
}

template <typename T>
void normalise(Tensor<const T> u, Vector<const T> weight, Vector<const T> bias, const Order& order,
               Optional<T> residual, double eps, const ActivationTuple& act, std::optional<Tensor<T>> y, Vector<T> mean,
               Vector<T> var, int threads, std::optional<Array<T, 2>> affine, std::optional<Vector<T>> running_mean,
               std::optional<Vector<T>> running_var, double rate) {
    const sfg::Norm<T> n = norm<T>(u, weight, bias, order, eps, act);
    const T* const residual_data = data(residual, output_size(n), "the residual does not fit the output");
    require(!residual || !n.act.pool, "there is no residual behind pooling");
    T* const output = data(y, output_size(n), "the output does not fit the input");
    for (const int64_t size : {mean.shape(0), var.shape(0)}) require(size == n.c, "a statistic does not fit");
    require(!affine || (affine->shape(0) == 2 && int64_t(affine->shape(1)) == n.c), "scale and shift don't fit");
    T* scale = affine ? affine->data() : nullptr;
    require(bool(running_mean) == bool(running_var), "running statistics come together");
    for (const auto* values : {&running_mean, &running_var})
        require(!*values || int64_t((*values)->shape(0)) == n.c, "running statistics don't fit the channels");
    const sfg::Running<T> running{running_mean ? running_mean->data() : nullptr,
                                  running_var ? running_var->data() : nullptr, T(rate)};
    const sfg::InnerLoops<T>& inner = loops<T>();
    require(threads >= 1, "threads must be at least 1");
    const nb::gil_scoped_release released;
    sfg::normalise<T>(inner, n, residual_data, output, mean.data(), var.data(), scale, scale ? scale + n.c : nullptr,
                      running, threads);
}

template <typename T>
void normalise_gradient(Tensor<const T> dy, Tensor<const T> u, Vector<const T> weight, Vector<const T> bias,
                        const Order& order, Vector<const T> mean, Vector<const T> var, Optional<T> shortcut_gradient,
                        double eps, const ActivationTuple& act, Tensor<T> du, Vector<T> dweight, Vector<T> dbias,
                        int threads, std::optional<Tensor<T>> activated_again) {
    const sfg::Norm<T> n = norm<T>(u, weight, bias, order, eps, act);
    const std::array<int64_t, 4> input{n.n, n.c, n.h, n.w};
    data(std::optional(dy), output_size(n), "the gradient does not fit the output");
    data(std::optional(du), input, "the gradient does not fit the input");
    const T* const shortcut = data(shortcut_gradient, input, "the shortcut's gradient does not fit the input");
    for (const int64_t size : {mean.shape(0), var.shape(0), dweight.shape(0), dbias.shape(0)})
        require(size == n.c, "a statistic or gradient does not fit the channels");
    require(!activated_again || !n.act.pool, "with pooling the activation is not computed again");
    T* const activated = data(activated_again, input, "the activation does not fit the input");
    const sfg::InnerLoops<T>& inner = loops<T>();
    require(threads >= 1, "threads must be at least 1");
    const nb::gil_scoped_release released;
    sfg::normalise_gradient<T>(inner, n, dy.data(), mean.data(), var.data(), shortcut, du.data(), dweight.data(),
                               dbias.data(), activated, threads);
}

template <typename T>
void keep_statistics(Vector<const T> mean, Vector<const T> var, Array<const int64_t, 1> assignment, int64_t count,
                     double momentum, Array<T, 2> running_mean, Array<T, 2> running_var, Array<T, 2> draws,
                     Vector<T> pooled_mean, Vector<T> pooled_var) {
    const int64_t groups = draws.shape(0), kernels = draws.shape(1);
    for (const auto* table : {&running_mean, &running_var})
        require(int64_t(table->shape(0)) == groups && int64_t(table->shape(1)) == kernels, "statistics don't fit");
    for (const int64_t size :
         {mean.shape(0), var.shape(0), assignment.shape(0), pooled_mean.shape(0), pooled_var.shape(0)})
        require(size == kernels, "statistics don't fit");
    require(std::all_of(assignment.data(), assignment.data() + kernels,
                        [&](int64_t group) { return group >= 0 && group < groups; }),
            "there is no such group");
    sfg::keep_statistics<T>(mean.data(), var.data(), assignment.data(), count, momentum, running_mean.data(),
                            running_var.data(), draws.data(), pooled_mean.data(), pooled_var.data(), groups, kernels);
}

// known: ids, inverse and undrawn (see sfg::Drawn), one behind the other, [groups + 1][kernels] in all. The offsets are
// returned as well, as a list.
template <typename T>
Offsets sample(Array<const T, 2> log_p, std::optional<Array<const T, 2>> noise, Array<int64_t, 1> assignment,
               Array<int64_t, 1> order, Array<int64_t, 1> offsets, Array<int64_t, 2> known) {
    const int64_t kernels = log_p.shape(0), groups = log_p.shape(1);
    require(groups >= 1, "there are no groups");
    require(!noise || (int64_t(noise->shape(0)) == kernels && int64_t(noise->shape(1)) == groups),
            "the noise does not fit the probabilities");
    require(int64_t(assignment.shape(0)) == kernels && int64_t(order.shape(0)) == kernels &&
                int64_t(offsets.shape(0)) == groups + 1 && int64_t(known.shape(0)) == groups + 1 &&
                int64_t(known.shape(1)) == kernels,
            "a result does not fit the probabilities");
    int64_t* const ids = known.data();
    const sfg::Drawn drawn{assignment.data(), order.data(), offsets.data(), ids, ids + kernels, ids + 2 * kernels};
    sfg::sample<T>(log_p.data(), noise ? noise->data() : nullptr, drawn, kernels, groups);
    return {offsets.data(), offsets.data() + groups + 1};
}

// A tensor on its way to torch, in the form that DLPack defines. Its new owner calls the deleter, in any thread, with
// or without Python's lock, and even after Python has ended: so nothing in it may belong to Python.
struct Result {
    nb::dlpack::dltensor tensor;
    void* context;
    void (*deleter)(Result*);
    // DLPack knows nothing of the members that follow.
    std::array<int64_t, 4> shape;
    size_t bytes;
};

constexpr const char* NOT_TAKEN = "dltensor";  // DLPack's name of a capsule from which nobody has taken the tensor yet

// A tensor whose values are undefined; its memory comes from Memory.
template <typename T>
nb::object empty(std::array<int64_t, 4> shape) {
    auto result = std::make_unique<Result>();
    result->shape = shape, result->bytes = sizeof(T);
    for (const int64_t length : shape) {
        require(length >= 0, "a length is negative");
        result->bytes *= size_t(length);
    }
    result->tensor = {sfg::Memory::instance().take(result->bytes),
                      {nb::device::cpu::value, 0},
                      4,
                      nb::dtype<T>(),
                      result->shape.data(),
                      nullptr,
                      0};
    result->deleter = [](Result* held) {
        sfg::Memory::instance().give(held->tensor.data, held->bytes);
        delete held;
    };
    PyObject* const capsule = PyCapsule_New(result.get(), NOT_TAKEN, [](PyObject* self) {
        if (!PyCapsule_IsValid(self, NOT_TAKEN)) return;
        auto* const held = static_cast<Result*>(PyCapsule_GetPointer(self, NOT_TAKEN));
        held->deleter(held);
    });
    if (!capsule) {
        sfg::Memory::instance().give(result->tensor.data, result->bytes);
        throw nb::python_error();
    }
    result.release();
    return nb::steal(capsule);
}

template <typename T>
void define(nb::module_& m) {
    m.def("forward", &forward<T>, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert().none(),
          "residual"_a.noconvert().none(), "relu"_a, "y"_a.noconvert(), "kept_product"_a.noconvert().none(), "rows"_a,
          "columns"_a, "reads"_a, "stride"_a, "padding"_a, "dilation"_a, "threads"_a, "row_order"_a = nb::none(),
          "column_order"_a = nb::none(), "affine"_a.noconvert() = nb::none());
    m.def("input_gradient", &input_gradient<T>, "dy"_a.noconvert(), "relu_output"_a.noconvert().none(),
          "weight"_a.noconvert(), "shortcut_dx"_a.noconvert().none(), "shortcut_dundrawn"_a.noconvert().none(),
          "dx"_a.noconvert(), "dundrawn"_a.noconvert().none(), "drawn_features"_a.noconvert().none(),
          "undrawn"_a.none(), "dz"_a.noconvert().none(), "rows"_a, "columns"_a, "reads"_a, "stride"_a, "padding"_a,
          "dilation"_a, "threads"_a, "row_order"_a = nb::none(), "column_order"_a = nb::none());
    m.def("gate_gradient", &gate_gradient<T>, "undrawn"_a, "dundrawn"_a.noconvert(), "dz"_a.noconvert(), "threads"_a);
    m.def("weight_gradient", &weight_gradient<T>, "x"_a.noconvert(), "dy"_a.noconvert(),
          "relu_output"_a.noconvert().none(), "dw"_a.noconvert(), "db"_a.noconvert().none(), "rows"_a, "columns"_a,
          "reads"_a, "stride"_a, "padding"_a, "dilation"_a, "threads"_a, "row_order"_a = nb::none(),
          "column_order"_a = nb::none());
    m.def("keep_statistics", &keep_statistics<T>, "mean"_a.noconvert(), "var"_a.noconvert(), "assignment"_a.noconvert(),
          "count"_a, "momentum"_a, "running_mean"_a.noconvert(), "running_var"_a.noconvert(), "draws"_a.noconvert(),
          "pooled_mean"_a.noconvert(), "pooled_var"_a.noconvert());
    m.def("sample", &sample<T>, "log_p"_a.noconvert(), "noise"_a.noconvert().none(), "assignment"_a.noconvert(),
          "order"_a.noconvert(), "offsets"_a.noconvert(), "known"_a.noconvert());
    m.def("normalise", &normalise<T>, "u"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert(), "order"_a.none(),
          "residual"_a.noconvert().none(), "eps"_a, "activation"_a, "y"_a.noconvert().none(), "mean"_a.noconvert(),
          "var"_a.noconvert(), "threads"_a, "affine"_a.noconvert() = nb::none(),
          "running_mean"_a.noconvert() = nb::none(), "running_var"_a.noconvert() = nb::none(), "rate"_a = 0.0);
    m.def("normalise_gradient", &normalise_gradient<T>, "dy"_a.noconvert(), "u"_a.noconvert(), "weight"_a.noconvert(),
          "bias"_a.noconvert(), "order"_a.none(), "mean"_a.noconvert(), "var"_a.noconvert(),
          "shortcut_gradient"_a.noconvert().none(), "eps"_a, "activation"_a, "du"_a.noconvert(),
          "dweight"_a.noconvert(), "dbias"_a.noconvert(), "threads"_a, "activated_again"_a.noconvert() = nb::none());
}

}  // namespace

NB_MODULE(_native, m) {
    m.def(
        "instruction_sets",
        [] {
            nb::list names;
            for (const char* const* name = sfg::instruction_sets(); *name; name++) names.append(nb::str(*name));
            return names;
        },
        "The instruction sets that this processor can run, fastest first.");
    m.def(
        "use",
        [](const char* name) {
            for (const char* const* known = sfg::instruction_sets(); *known; known++)
                if (!std::strcmp(*known, name)) {
                    chosen = *known;
                    return;
                }
            throw std::invalid_argument("this processor does not have the instruction set asked for");
        },
        "Chooses an instruction set, for tests and benchmarks. The fastest is in use from the start.");
    m.def("empty_float32", &empty<float>, "shape"_a);
    m.def("empty_float64", &empty<double>, "shape"_a);
    m.def(
        "memory_held", [] { return sfg::Memory::instance().held(); },
        "Bytes of memory for results: in use, and kept for the next ones.");
    define<float>(m);
    define<double>(m);
}
