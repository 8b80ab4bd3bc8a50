"""`SFGConv2d` on every backend against dense masking written plainly, and its contract."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

import sfg_fast
from sfg_fast import FilterGroups, SFGConv2d, SFGFeatures, backend, reference, set_estimator
from sfg_fast.backends import available
from sfg_fast.draws import gumbel_noise
from sfg_fast.layers.streams import Heads, Merge
from tests import oracle
from tests.backends import EVERY, FAST, PACKED
from tests.oracle import assert_close


def chain(estimator, norm, activation, tasks, widths, geometry, init):
    """Layers widths[0] -> widths[1] -> ..; the first reads the image."""
    return nn.ModuleList(
        SFGConv2d(c, k, 3, *geometry, tasks=tasks, norm=norm, activation=activation, estimator=estimator, init=init)
        for c, k in itertools.pairwise(widths)
    )


def gates_of(layer, estimator, seed):
    """z [K, T+1] of the oracle, from the same noise, with the gradient that the estimator promises."""
    if layer.assigned:
        return nn.functional.one_hot(layer.fixed_assignment, layer.logits.shape[1]).to(layer.logits.dtype)
    noise = gumbel_noise(layer.logits)
    soft = oracle.relaxed(layer.logits, noise, layer.temperature)
    if estimator == "gumbel_softmax":
        return soft
    hard = nn.functional.one_hot((layer.logits.log_softmax(1) + noise).argmax(1), soft.shape[1]).to(soft.dtype)
    return hard if estimator == "none" else hard + soft - soft.detach()


@st.composite
def chains(draw):
    activation = draw(st.sampled_from([None, "relu", "relu_pool"]))
    geometry = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    if activation == "relu_pool":  # halves the image often enough
        geometry = (1, geometry[2], geometry[2])
    return {
        "estimator": draw(st.sampled_from(["straight_through", "gumbel_softmax", "none"])),
        "norm": draw(st.sampled_from([None, "batch"])),
        "activation": activation,
        "tasks": draw(st.integers(1, 3)),
        "widths": [draw(st.integers(1, 2)), *(draw(st.integers(1, 6)) for _ in range(3))],
        "geometry": geometry,
        "fixed": draw(st.booleans()),
        "init": draw(st.sampled_from(["uniform", "mostly_shared", "vertex"])),
        "temperature": draw(st.sampled_from([1.0, 0.3])),
        "seed": draw(st.integers(0, 2**16)),
    }


def check_chain(p, name):
    """Outputs, all gradients and running statistics of a chain of layers."""
    torch.manual_seed(p["seed"])
    options = [p[key] for key in ("estimator", "norm", "activation", "tasks", "widths", "geometry", "init")]
    layers = chain(*options).double()
    if p["fixed"]:
        for layer in layers:
            layer.assign(torch.randint(p["tasks"] + 1, (layer.out_channels,)))
    for layer in layers:
        layer.temperature = p["temperature"]
        nn.init.normal_(layer.weight)
        if layer.norm is not None:  # not one and zero
            nn.init.normal_(layer.norm.weight)
            nn.init.normal_(layer.norm.bias)
    x = torch.randn(2, p["widths"][0], *p.get("image", (19, 18)), dtype=torch.float64, requires_grad=True)
    leaves = [x] + [parameter for parameter in layers.parameters() if parameter.requires_grad]

    def dense_masking(pool):
        torch.manual_seed(p["seed"] + 1)
        stride, padding, dilation = p["geometry"]
        y = x
        for layer in layers:
            z = gates_of(layer, p["estimator"], p["seed"])
            norm = None if layer.norm is None else (layer.norm.weight, layer.norm.bias, layer.norm.eps)
            y = oracle.sfg_layer(
                y, layer.weight, layer.bias, z,
                stride=stride, padding=padding, dilation=dilation, relu=p["activation"] is not None,
                pool=pool if p["activation"] == "relu_pool" else None, norm=norm,
            )  # fmt: skip
        cotangents = [torch.randn_like(tensor) for tensor in y]
        return y, cotangents, torch.autograd.grad(y, leaves, cotangents, allow_unused=True)

    wanted, cotangents, expected = dense_masking(oracle.max_pool)

    torch.manual_seed(p["seed"] + 1)
    y = x
    with backend(name):
        for layer in layers:
            y = layer(y)
    dense = list(y)
    got = torch.autograd.grad(dense, leaves, cotangents, allow_unused=True)
    for group, (a, b) in enumerate(zip(dense, wanted, strict=True)):
        assert_close(a, b, what=f"group {group}")
    for task in range(1, p["tasks"] + 1):
        assert_close(y.merged(task), wanted[0] + wanted[task], what=f"merged {task}")
    biases = {id(layer.bias) for layer in layers if layer.norm is not None}
    # A norm behind few values may multiply rounding by up to 1 / sqrt(eps) = 316, so all leaves share one scale.
    scale = max([1e-3, *(b.abs().max().item() for b in expected if b is not None)])
    if p["activation"] == "relu_pool":  # not where rounding may decide which value of a window gets the gradient
        for a, b in zip(expected, dense_masking(oracle.max_pool_last)[2], strict=True):
            assume(b is None or (a - b).abs().max() <= 1e-10 * scale)
    for leaf, a, b in zip(leaves, got, expected, strict=True):
        assert a is not None, "a parameter without a gradient"
        if id(leaf) in biases:  # zero but for rounding: the norm takes the bias away
            assert a.abs().max() < 1e-8
        else:
            assert_close(a, torch.zeros_like(leaf) if b is None else b, 1e-9, f"gradient {tuple(leaf.shape)}", scale)


@pytest.mark.parametrize("name", ["reference", *FAST])
@settings(max_examples=60)
@given(problem=chains())
def test_chain_against_dense_masking(name, problem):
    check_chain(problem, name)


def small_chain(**options):
    usual = {"norm": None, "tasks": 2, "widths": [1, 4, 3, 2], "geometry": (1, 1, 1), "fixed": False, "seed": 0}
    return {**usual, "init": "uniform", "temperature": 1.0, "image": (5, 4), **options}


@pytest.mark.skipif(not available("triton"), reason="Triton is not installed")
@settings(phases=[Phase.explicit])  # the interpreter takes seconds: `make test-all` has random ones
@given(problem=chains())
@example(problem=small_chain(estimator="straight_through", norm="batch", activation="relu"))
@example(
    problem=small_chain(estimator="gumbel_softmax", activation="relu_pool", tasks=1, temperature=0.3, image=(9, 8))
)
@example(
    problem=small_chain(estimator="none", norm="batch", activation=None, tasks=3, geometry=(2, 1, 1), image=(9, 8))
)
@example(problem=small_chain(estimator="straight_through", activation="relu", geometry=(1, 2, 2), fixed=True))
@example(problem=small_chain(estimator="gumbel_softmax", activation="relu", init="mostly_shared"))
@example(problem=small_chain(estimator="straight_through", norm="batch", activation="relu_pool", image=(8, 9)))
@example(
    problem=small_chain(
        estimator="straight_through", activation=None, init="vertex", geometry=(2, 0, 1), image=(15, 16)
    )
)
def test_chain_on_triton_against_dense_masking(problem):
    check_chain(problem, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=1000)
@given(problem=chains())
def test_chain_against_dense_masking_at_length(name, problem):
    if name != "triton" or problem["seed"] % 10 == 0:
        check_chain(problem, name)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("norm", [None, "batch"])
def test_of_equals_in_a_pooling_window_the_first_gets_the_gradient(name, norm, float64):
    """Whole numbers, which are not rounded: ties are ties."""
    layer = SFGConv2d(1, 6, 1, bias=False, norm=norm, activation="relu_pool")
    nn.init.ones_(layer.weight)
    x = torch.randint(1, 3, (2, 1, 8, 9)).double().requires_grad_()
    with backend(name):
        y = layer(x)
    of_norm = None if norm is None else (layer.norm.weight, layer.norm.bias, layer.norm.eps)
    gates = y.groups.gates
    wanted = oracle.sfg_layer(x, layer.weight, None, gates, relu=True, pool=oracle.max_pool, norm=of_norm)
    cotangents = [torch.randn_like(tensor) for tensor in wanted]
    leaves = [x, layer.logits]
    expected = torch.autograd.grad(wanted, leaves, cotangents, retain_graph=True)
    found = torch.autograd.grad(list(y), leaves, cotangents)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("sample", [False, True])
def test_eval_uses_running_statistics_of_the_drawn_pairs(name, sample, float64):
    layer = SFGConv2d(3, 6, 3, tasks=2, norm="batch", activation="relu", init="dirichlet")
    x = torch.randn(4, 3, 8, 8)
    for _ in range(30):
        layer(x + torch.randn(1))
    layer.eval()
    layer.sampling = sample
    torch.manual_seed(1)
    with backend(name):
        y = layer(x)
    groups = y.groups.assignment
    if not sample:
        assert torch.equal(groups, layer.logits.argmax(1))
    u = nn.functional.conv2d(x, layer.weight, layer.bias)
    for kernel, group in enumerate(groups.tolist()):
        norm = layer.norm
        known = norm.draws[group, kernel] > 0
        mean = norm.running_mean[group, kernel] if known else norm.pooled_mean[kernel]
        var = norm.running_var[group, kernel] if known else norm.pooled_var[kernel]
        expected = ((u[:, kernel] - mean) / (var + norm.eps).sqrt() * norm.weight[kernel] + norm.bias[kernel]).relu()
        for other in range(3):
            wanted = expected if other == group else torch.zeros_like(expected)
            assert_close(y.dense(other)[:, kernel], wanted, 1e-9)


@pytest.mark.parametrize("name", PACKED)
def test_running_statistics_are_those_of_the_reference(name, float64):
    buffers = []
    for one in ("reference", name):
        torch.manual_seed(3)
        layers = chain("straight_through", "batch", "relu", 2, [2, 5, 6], (1, 1, 1), "uniform")
        with backend(one):
            for _ in range(5):
                layers[1](layers[0](torch.randn(2, 2, 6, 6)))
        buffers.append(dict(layers.named_buffers()))
    for key, expected in buffers[0].items():
        assert_close(buffers[1][key].double(), expected.double(), what=key)


def test_list_input_is_merged_like_features(float64):
    first, second = SFGConv2d(2, 4, 3), SFGConv2d(4, 5, 3)
    y = first(torch.randn(2, 2, 9, 9))
    torch.manual_seed(1)
    from_features = second(y)
    torch.manual_seed(1)
    from_list = second(list(y))
    for a, b in zip(from_features, from_list, strict=True):
        assert_close(a, b)


def test_features_of_one_backend_are_read_rightly_by_another(float64):
    from sfg_fast.layers.streams import Heads, Merge, StreamBlock

    layer, following = SFGConv2d(1, 3, 3, padding=1, tasks=["a", "b"]), SFGConv2d(3, 4, 3, tasks=["a", "b"])
    middle = [StreamBlock(3, ["a", "b"], first=True), Merge(3, ["a", "b"])]
    heads = Heads(4, {"a": 1, "b": 2})
    for one in (layer, following):
        one.assign(torch.arange(one.out_channels) % 3)
    x = torch.randn(2, 1, 7, 7)
    outputs = []
    for split in range(6):  # the backend changes before this module
        y = x
        for number, module in enumerate([layer, *middle, following, heads]):
            with backend("reference" if number >= split else "masked"):
                y = module(y)
        outputs.append(y)
        y = x
        for number, module in enumerate([layer, *middle, following, heads]):
            with backend("masked" if number >= split else "reference"):
                y = module(y)
        outputs.append(y)
    for other in outputs[1:]:
        for task in ("a", "b"):
            assert_close(other[task], outputs[0][task])


def test_residual_blocks_keep_half_of_their_tensors():
    """Of x + conv(relu(bn(conv(relu(bn(x)))))) x and the first convolution, not what comes out of the norms."""
    from sfg_fast.layers.streams import StreamBlock

    block = StreamBlock(4, ["a", "b"])
    x = torch.randn(2, 12, 20, 20, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    groups = FilterGroups.streams(4, ["a", "b"])
    with backend("native"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(SFGFeatures(x, groups)).packed
    assert sum(size >= x.numel() for size in kept.values()) == 2
    y.sum().backward()
    assert x.grad is not None


def test_gate_gradient_does_not_overflow_in_half_precision():
    layer = SFGConv2d(1, 4, 1)
    torch.nn.init.ones_(layer.weight)
    x = torch.full((1, 1, 128, 128), 8.0)
    with torch.autocast("cpu", dtype=torch.float16), backend("masked"):
        y = layer(x)
    (2 * sum(t.float().sum() for t in y)).backward()
    assert torch.isfinite(layer.logits.grad).all()
    assert layer.logits.grad.abs().max() > 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "none"])
def test_one_value_per_channel_can_not_be_normalised(name, estimator):
    layer = SFGConv2d(1, 3, 1, norm="batch", estimator=estimator)
    with backend(name), pytest.raises(ValueError, match="more than"):
        layer(torch.randn(1, 1, 1, 1))


def test_loading_with_assign_keeps_groupings_shared():
    model = sfg_fast.SFGHighResNet(1, {"a": 1}, width=(3, 3, 3), blocks=1, residual="routed")
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for stage in model.stages:
        assert stage["blocks"][0].conv2.logits is stage["sfg"].logits
    twin = copy.deepcopy(model)
    assert twin.stages[0]["blocks"][0].conv2.logits is twin.stages[0]["sfg"].logits
    assert twin.stages[0]["sfg"].logits is not model.stages[0]["sfg"].logits


def test_state_dict_is_interchangeable_with_the_reference():
    fast = SFGConv2d(3, 5, 3, padding=1, tasks=["ct", "organs"], norm="batch")
    plain = reference.SFGConv2d(3, 5, 3, padding=1, tasks=["ct", "organs"], norm="batch")
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(1)
    a = fast(x)
    torch.manual_seed(1)
    b = plain(x)
    assert isinstance(b, list)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other)
    fast.load_state_dict(plain.state_dict())


def test_assignment_travels_in_the_state_dict():
    layer = SFGConv2d(2, 4, 3)
    layer.assign([0, 1, 2, 1])
    other = SFGConv2d(2, 4, 3)
    other.load_state_dict(layer.state_dict())
    assert other.assigned
    assert other(torch.randn(1, 2, 5, 5)).groups.assignment.tolist() == [0, 1, 2, 1]
    other.assign(None)
    layer.load_state_dict(other.state_dict())
    assert not layer.assigned


def test_same_seed_same_assignment_on_every_backend():
    layer = SFGConv2d(2, 16, 3, tasks=3)
    drawn = []
    for name in EVERY:
        torch.manual_seed(7)
        with backend(name):
            drawn.append(layer(torch.randn(1, 2, 5, 5)).groups.assignment.tolist())
    assert all(one == drawn[0] for one in drawn)
    assert len(set(drawn[0])) > 1


def test_packed_order_is_stable_by_kernel_index():
    layer = SFGConv2d(1, 6, 1, bias=False)
    layer.assign([2, 0, 1, 0, 2, 1])
    y = layer(torch.randn(1, 1, 4, 4))
    assert y.groups.order.tolist() == [1, 3, 2, 5, 0, 4]
    assert y.groups.offsets.tolist() == [0, 2, 4, 6]
    assert y.packed.shape[1] == len(y.groups.order)
    for row, kernel in enumerate(y.groups.order.tolist()):
        group = int(y.groups.assignment[kernel])
        assert torch.equal(y.packed[:, row], y.dense(group)[:, kernel])


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_empty_groups(empty):
    layers = chain("straight_through", "batch", "relu", 2, [1, 4, 4], (1, 1, 1), "uniform")
    for layer in layers:
        layer.assign([(empty + 1) % 3] * 2 + [(empty + 2) % 3] * 2)
    y = layers[1](layers[0](torch.randn(2, 1, 5, 5)))
    assert not y.dense(empty).any()
    sum(t.square().sum() for t in y).backward()
    assert all(parameter.grad is not None for parameter in layers.parameters())


def test_fixed_assignment_gives_logits_zeros_as_gradient():
    layer = SFGConv2d(2, 4, 3)
    layer.assign(torch.tensor([0, 1, 2, 0]))
    sum(t.sum() for t in layer(torch.randn(1, 2, 5, 5))).backward()
    assert layer.logits.grad is not None
    assert not layer.logits.grad.any()


def test_sampled_gates_give_logits_a_gradient_also_for_unselected_groups():
    layer = SFGConv2d(2, 4, 3, activation="relu")
    y = layer(torch.randn(1, 2, 5, 5))
    sum((t * torch.randn_like(t)).sum() for t in y).backward()
    assert (layer.logits.grad.abs() > 1e-6).all()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, of its own convolution
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
@pytest.mark.parametrize("size", [3, (2, 4)])
def test_all_shared_equals_a_plain_convolution(mode, padding, size, float64):
    arguments = {"kernel_size": size, "padding": padding, "padding_mode": mode}
    layer, plain = SFGConv2d(3, 4, **arguments), nn.Conv2d(3, 4, **arguments)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    layer.assign(torch.zeros(4, dtype=torch.int64))
    x = torch.randn(2, 3, 7, 6)
    for name in EVERY:
        with backend(name):
            y = layer(x)
        assert_close(y.merged(1), plain(x), what=name)
        assert not y.dense(2).any()


def test_initial_weights_are_those_of_conv2d():
    torch.manual_seed(5)
    plain = nn.Conv2d(3, 8, 3)
    torch.manual_seed(5)
    layer = SFGConv2d(3, 8, 3)
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_keeps_gates_in_float32(name):
    layers = chain("straight_through", "batch", "relu", 2, [1, 4, 4], (1, 1, 1), "uniform")
    with torch.autocast("cpu", dtype=torch.bfloat16), backend(name):
        y = layers[1](layers[0](torch.randn(2, 1, 6, 6)))
    # native has no bfloat16, and Triton's interpreter does not multiply in it
    assert y.dense(1).dtype == (torch.float32 if name in ("native", "triton") else torch.bfloat16)
    assert y.groups.gates.dtype == torch.float32
    sum(t.float().square().sum() for t in y).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layers.parameters())


def test_copies_and_pickles():
    layer = SFGConv2d(2, 4, 3, norm="batch")
    x = torch.randn(1, 2, 5, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(2)
        a = layer(x).packed
        torch.manual_seed(2)
        assert torch.equal(other(x).packed, a)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["straight_through", "selected", "gumbel_softmax", "gumbel_rao"])
def test_activation_checkpointing_draws_the_same(estimator, reentrant, every):
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(1, 1, 6, 6, requires_grad=True)
    gradients, steps = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        layers = chain(estimator, None, "relu", 2, [1, 6, 6, 5], (1, 1, 1), "uniform")
        set_estimator(layers, estimator, every)

        def body(x, layers=layers):
            for layer in layers:
                x = layer(x)
            return x.packed.square().sum()

        found = []
        for _ in range(3):
            layers.zero_grad()
            (checkpoint(body, x, use_reentrant=reentrant) if checkpointed else body(x)).backward()
            found += [p.grad.clone() for p in layers.parameters()]
        gradients.append(found)
        steps.append([layer.learning_steps.item() for layer in layers])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert steps[0] == steps[1]


@pytest.mark.parametrize("name", ["native", "masked"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_moves_the_statistics_once(name, reentrant):
    from torch.utils.checkpoint import checkpoint

    x, found = torch.randn(2, 1, 6, 6, requires_grad=True), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(*(SFGConv2d(c, 6, 3, tasks=2, norm="batch", activation="relu") for c in (1, 6)))

        def body(x, layers=layers):
            return layers(x).packed.square().sum()

        with backend(name):
            for _ in range(3):
                (checkpoint(body, x, use_reentrant=reentrant) if checkpointed else body(x)).backward()
        found.append(dict(layers.named_buffers()))
    for key, value in found[0].items():  # (without gradients to come `masked` adds in another order)
        torch.testing.assert_close(value, found[1][key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [(4, 4), (40, 40), (1, 200)])
def test_an_empty_batch_has_gradients_of_zero(name, size):
    conv = SFGConv2d(3, 8, (1, 3))
    x = torch.zeros(0, 3, *size, requires_grad=True)
    with backend(name):
        sum(y.sum() for y in conv(x)).backward()
    assert x.grad.shape == x.shape
    assert not conv.weight.grad.any()


@pytest.mark.parametrize("name", EVERY[1:])
@pytest.mark.parametrize("outputs", [{"a": 1, "b": 2}, {"a": 1, "b": 1}, {"a": 2, "b": 2}], ids=str)
def test_heads_on_merged_streams(name, outputs, float64):
    """Every group has rows of its own, shared none."""
    conv, merge, heads = SFGConv2d(2, 5, 3, tasks=outputs), Merge(5, outputs), Heads(5, outputs)
    conv.assign([0, 1, 2, 0, 1])
    x = torch.randn(1, 2, 8, 8)
    with backend("reference"):
        expected = heads(merge(conv(x)))
    with backend(name):
        found = heads(merge(conv(x)))
    for task in outputs:
        assert_close(found[task], expected[task])


@pytest.mark.parametrize("name", EVERY[1:])
def test_what_is_done_to_the_packed_tensor_counts(name):
    """A consumer may give the gates their gradient without that of the features: not if somebody waits for it."""
    first, second = chain("straight_through", None, "relu", 2, [1, 6, 4], (1, 1, 1), "uniform")
    seen = []
    with backend(name):
        features = first(torch.randn(1, 1, 9, 9))
        features.packed.register_hook(lambda gradient: seen.append(gradient) or gradient * 0)
        second(features).packed.sum().backward()
        assert len(seen) == 1
        assert not first.weight.grad.any()
        features = first(torch.randn(1, 1, 9, 9))
        features.packed.retain_grad()
        y = second(features)
        y.packed.sum().backward()
        assert features.packed.grad.any()
        zeros = second(dataclasses.replace(features, packed=features.packed * 0), groups=y.groups).packed
    assert_close(zeros, second.bias.relu()[y.groups.order][:, None, None].expand_as(zeros))


def test_a_half_layer_with_a_norm_in_float32():
    layer, x = SFGConv2d(1, 4, 3, norm="batch").bfloat16(), torch.randn(2, 1, 5, 5).bfloat16()
    layer.norm.float()
    with backend("masked"):
        for training in (True, False):
            assert layer.train(training)(x).dtype == torch.bfloat16


def test_an_assignment_changes_no_features_that_are_there():
    conv = SFGConv2d(1, 6, 3)
    conv.assign([0, 1, 2, 0, 1, 2])
    features = conv(torch.randn(1, 1, 5, 5))
    before = torch.cat([features, features], 1).dense(0)
    conv.assign([2, 2, 2, 0, 0, 0])
    assert torch.equal(torch.cat([features, features], 1).dense(0), before)


@pytest.mark.parametrize("name", EVERY[1:])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_an_activation_that_works_in_place(name, norm, float64):
    gradients = []
    for backend_name, activation in (("reference", nn.SiLU()), (name, nn.Sequential(nn.SiLU(inplace=True)))):
        torch.manual_seed(0)
        conv, x = SFGConv2d(1, 6, 3, activation=activation, norm=norm), torch.randn(2, 1, 8, 8)
        with backend(backend_name):
            y = list(conv(x))
        sum((i + t).square().sum() for i, t in enumerate(y)).backward()
        gradients.append([conv.weight.grad, conv.logits.grad])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFGConv2d(2, 4, 3, norm="local"), "norm='local'"),
        (lambda: SFGConv2d(2, 4, 3, norm="group"), "num_groups=None: expected it for the norm 'group'"),
        (lambda: SFGConv2d(2, 4, 3, norm=("group", {"num_groups": 3})), "num_groups=3: expected a divisor of the 4"),
        (lambda: SFGConv2d(2, 4, 3, norm=("instance", {"num_groups": 2})), "has no argument 'num_groups'"),
        (lambda: SFGConv2d(2, 4, 3, activation="gelu"), "activation='gelu'"),
        (lambda: SFGConv2d(2, 4, 3, activation=nn.PReLU(3)), r"activation=PReLU\(num_parameters=3\)"),
        (lambda: SFGConv2d(2, 4, 3, init="even"), "init='even'"),
        (lambda: SFGConv2d(2, 4, 3, init=[0.5, 0.5]), r"shape \(2,\), expected \(3,\)"),
        (lambda: SFGConv2d(2, 4, 3, init=[0.5, 0.5, 0.5]), "sum to 1"),
        (lambda: SFGConv2d(2, 4, 3, estimator="reinforce"), "estimator='reinforce'"),
        (lambda: SFGConv2d(2, 4, 3, tasks=0), "tasks=0"),
        (lambda: SFGConv2d(2, 4, 3, tasks="ct"), "tasks='ct' is one text"),
        (lambda: FilterGroups.streams(4, "ct", torch.device("cpu")), "tasks='ct' is one text"),
        (lambda: SFGConv2d(2, 4, 3, tasks=["ct", "shared"]), "'shared'"),
        (lambda: SFGConv2d(2, 4, 3).assign([0, 1, 2]), r"shape \(3,\)"),
        (lambda: SFGConv2d(2, 4, 3).assign([0, 1, 2, 3]), r"\[0, 1, 2, 3\]"),
        (lambda: SFGConv2d(2, 4, 3)(torch.randn(1, 3, 5, 5)), r"expected \[N, 2, H, W\]"),
        (lambda: SFGConv2d(2, 4, 3)([torch.randn(1, 2, 5, 5)] * 2), "2 dense tensors, expected 3"),
        (lambda: SFGConv2d(4, 4, 3, tasks=1)(SFGConv2d(2, 4, 3)(torch.randn(1, 2, 9, 9))), "groups"),
        (lambda: setattr(SFGConv2d(2, 4, 3), "temperature", 0.0), "temperature=0"),
        (lambda: setattr(SFGConv2d(2, 4, 3), "temperature", 1e-60), "temperature=1e-60"),
        (lambda: SFGConv2d(2, 4, 3)([torch.randn(1, c, 5, 5) for c in (1, 2, 3)]), "one shape"),
        (lambda: SFGConv2d(2, 4, 3)(torch.randn(1, 2, 5, 5), groups=SFGConv2d(2, 5, 3).draw()), "4 kernels"),
        (lambda: SFGConv2d(2, 4, 3)(torch.randn(1, 2, 5, 5), groups=SFGConv2d(2, 4, 3, tasks=3).draw()), "groups"),
        (lambda: FilterGroups.from_assignment([0, 5, 1]), r"assignment=\[0, 5, 1\]"),
    ],
)
def test_errors_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_image_of_another_dtype_is_refused_as_by_conv2d(name, dtype):
    said = "expected the same|should be the same|the tensor is torch.float16, the native kernels"
    with backend(name), pytest.raises(RuntimeError, match=said):
        SFGConv2d(2, 4, 3)(torch.randn(1, 2, 5, 5).to(dtype))


def test_features_are_exported_by_the_package():
    assert isinstance(sfg_fast.SFGConv2d(1, 2, 1)(torch.randn(1, 1, 2, 2)), SFGFeatures)
