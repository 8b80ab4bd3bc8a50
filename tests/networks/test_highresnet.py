"""`SFGHighResNet`: equal to itself under dense masking, and the paper's baselines as special cases."""

import pytest
import torch
from torch import nn

from sfg_fast import SFGHighResNet, backend, penalties, predict
from sfg_fast.backends import available
from sfg_fast.networks.controls import assign, map_assignment, set_estimator, set_noise_on, sfg_layers
from sfg_fast.networks.methods import METHODS as ALL_METHODS
from tests.backends import FAST, PACKED
from tests.oracle import assert_close

OUTPUTS = {"ct": 1, "organs": 3}
METHODS = [method for method in ALL_METHODS if method != "cross_stitch"]


def network(residual, outputs=OUTPUTS, blocks=2, **options):
    torch.manual_seed(1)
    model = SFGHighResNet(2, outputs, width=(3, 4, 5), blocks=blocks, residual=residual, **options)
    for parameter in model.parameters():  # no zero biases, no unit scales
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


def run(model, name, x):
    """Outputs, gradients of everything, buffers."""
    torch.manual_seed(3)
    with backend(name):
        y = model(x)
    leaves = [x] + [p for p in model.parameters() if p.requires_grad]
    loss = sum((out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum() for out in y.values())
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return y, gradients, dict(model.named_buffers())


DRAWN = ["fixed", "straight_through", "gumbel_softmax", "none", "eval"]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("residual", ["separate", "routed"])
def test_equals_itself_under_dense_masking(residual, drawn, norm, name, float64):
    check_against_dense_masking(residual, drawn, norm, name)


@pytest.mark.skipif(not available("triton"), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("residual", "drawn", "norm"),
    [
        ("routed", "straight_through", "batch"),
        *(
            pytest.param(residual, drawn, norm, marks=pytest.mark.slow)
            for residual in ("separate", "routed")
            for drawn in DRAWN
            for norm in ("batch", None)
        ),
    ],
)
def test_equals_itself_on_triton(residual, drawn, norm, float64):
    check_against_dense_masking(residual, drawn, norm, "triton", blocks=1, size=(5, 4))


def check_against_dense_masking(residual, drawn, norm, name, blocks=2, size=(9, 8)):
    results = []
    for one in ("reference", name):
        estimator = drawn if drawn in ("gumbel_softmax", "none") else "straight_through"
        model = network(residual, blocks=blocks, norm=norm, estimator=estimator)
        if drawn == "fixed":
            generator = torch.Generator().manual_seed(5)
            assign(
                model,
                {n: torch.randint(3, (m.out_channels,), generator=generator) for n, m in sfg_layers(model).items()},
            )
        if drawn == "eval":
            with torch.no_grad():
                for _ in range(3):
                    model(torch.randn(2, 2, 8, 8))
            model.eval()
        x = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(2), requires_grad=True)
        results.append(run(model, one, x))
    (y, gradients, buffers), (fast_y, fast_gradients, fast_buffers) = results
    for task in OUTPUTS:
        assert_close(fast_y[task], y[task], what=task)
    names = ["input"] + [
        n
        for n, p in network(residual, blocks=blocks, norm=norm).named_parameters()
        if drawn != "none" or "logits" not in n
    ]
    assert len(names) == len(gradients)
    for what, a, b in zip(names, fast_gradients, gradients, strict=True):
        assert a is not None, f"{what} got no gradient"
        assert_close(a, torch.zeros_like(a) if b is None else b, 1e-9, what)
    for what, expected in buffers.items():
        assert_close(fast_buffers[what].double(), expected.double(), what=what)


class _AsksTheDevice(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes operations that on a GPU would make the host wait: they can't be captured in a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "unique", "item")
        if str(operation).split(".")[1] in waits:
            self.found.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in PACKED if name != "native"])
@pytest.mark.parametrize("residual", ["separate", "routed"])
def test_a_training_step_never_waits_for_the_device(name, residual):
    model = network(residual, blocks=1)
    x = torch.randn(1, 2, 4, 4)
    with _AsksTheDevice() as asked:
        with backend(name):
            y = model(x)
        sum(out.square().mean() for out in y.values()).backward()
    assert asked.found == []


@pytest.mark.parametrize("residual", ["separate", "routed"])
def test_reference_network_is_the_paper_written_plainly(residual, float64):
    """A plain script of the network, from its parameters alone, with a fixed assignment and no norm."""
    import torch.nn.functional as F

    model = network(residual, norm=None)
    assignments = {n: torch.arange(m.out_channels) % 3 for n, m in sfg_layers(model).items()}
    assign(model, assignments)
    p = dict(model.named_parameters())

    def sfg(name, x, dilation=1, relu=True, masks_of=None, merged=True):
        z = F.one_hot(assignments[masks_of or name], 3).to(torch.float64)
        inputs = [x] * 3 if isinstance(x, torch.Tensor) else [x[0], x[1] + x[0], x[2] + x[0]] if merged else x
        out = [F.conv2d(i, p[f"{name}.weight"], p[f"{name}.bias"], 1, dilation, dilation) for i in inputs]
        return [(u.relu() if relu else u) * z[:, g].view(1, -1, 1, 1) for g, u in enumerate(out)]

    x = image = torch.randn(2, 2, 7, 7)
    merged = True
    for stage, (wide, dilation) in enumerate(((3, 1), (4, 2), (5, 4))):
        trunk = f"stages.{stage}.sfg"
        x = sfg(trunk, x, merged=merged)
        for block in range(2):
            prefix = f"stages.{stage}.blocks.{block}"
            if residual == "routed":
                h = sfg(f"{prefix}.conv2", sfg(f"{prefix}.conv1", x, dilation), dilation, relu=False, masks_of=trunk)
                x = [a + b for a, b in zip(x, h, strict=True)]
                continue
            new = []
            for g, stream in enumerate(x):
                rows = slice(g * wide, (g + 1) * wide)
                h = stream if block == 0 else stream.relu()
                h = F.conv2d(
                    h, p[f"{prefix}.conv1.weight"][rows], p[f"{prefix}.conv1.bias"][rows], 1, dilation, dilation
                )
                h = h.relu()
                h = F.conv2d(
                    h, p[f"{prefix}.conv2.weight"][rows], p[f"{prefix}.conv2.bias"][rows], 1, dilation, dilation
                )
                new.append(stream + h)
            x = new
        if residual == "separate":
            weight, bias = p[f"stages.{stage}.merge.conv.weight"], p[f"stages.{stage}.merge.conv.bias"]
            x = [x[0]] + [
                F.conv2d(torch.cat([x[t], x[0]], 1), weight[(t - 1) * wide : t * wide], bias[(t - 1) * wide : t * wide])
                for t in (1, 2)
            ]
            merged = False
    x = sfg("final.1", sfg("final.0", x, merged=merged))
    weight, bias = p["heads.conv.weight"], p["heads.conv.bias"]
    expected = {
        "ct": F.conv2d(x[1] + x[0], weight[:1], bias[:1]),
        "organs": F.conv2d(x[2] + x[0], weight[1:], bias[1:]),
    }
    for name in ["reference", *FAST]:
        with backend(name):
            y = model(image)
        for task in OUTPUTS:
            assert_close(y[task], expected[task], what=f"{name} {task}")


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("estimator", ["straight_through", "selected"])
@pytest.mark.parametrize("residual", ["separate", "routed"])
def test_weights_that_change_before_the_backward_pass_give_no_wrong_gradient(residual, estimator, name):
    model = network(residual)
    set_estimator(model, estimator)
    x = torch.randn(1, 2, 6, 6, requires_grad=True)

    def gradient(changed=None):
        torch.manual_seed(3)
        with backend(name):
            y = model(x)
            if changed is not None:
                with torch.no_grad():
                    changed.mul_(3)
            return torch.autograd.grad(sum(out.square().sum() for out in y.values()), x)[0]

    expected, refused = gradient(), 0
    for parameter in [p for p in model.parameters() if p.dim() == 4]:
        before = parameter.detach().clone()
        try:
            found = gradient(parameter)
        except RuntimeError as error:
            refused += "modified by an inplace operation" in str(error)
        else:
            assert torch.equal(found, expected)
        with torch.no_grad():
            parameter.copy_(before)
    assert refused > 3


def test_one_shared_draw_per_residual_trunk():
    model = network("routed")
    for stage in model.stages:
        for block in stage["blocks"]:
            assert block.conv2.logits is stage["sfg"].logits
            assert block.conv1.logits is not stage["sfg"].logits
    seen = []
    trunk = model.stages[0]["sfg"]
    for module in (trunk, model.stages[0]["blocks"][1].conv2):
        module.register_forward_hook(lambda _m, _i, out: seen.append(out.groups))
    model(torch.randn(1, 2, 6, 6))
    assert seen[0] is seen[1]


@pytest.mark.parametrize("residual", ["separate", "routed"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_are_what_they_claim(method, residual):
    outputs = {"ct": 1} if method == "one_task" else OUTPUTS
    model = network(residual, outputs, method=method)
    layers = sfg_layers(model)
    before = {name: layer.logits.detach().clone() for name, layer in layers.items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assignments = []
    seen = []
    for layer in layers.values():
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out.groups.assignment))
    for _ in range(3):
        seen.clear()
        loss = sum(y.square().mean() for y in model(torch.randn(1, 2, 6, 6)).values()) - penalties(model)[1]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assignments.append(torch.cat(seen))
    moved = any((layer.logits != before[name]).any() for name, layer in layers.items())
    changed = any((a != assignments[0]).any() for a in assignments)
    assert moved == (method == "sfg")
    assert changed == (method in ("sfg", "constant_p", "retrain"))
    if method == "one_task":
        assert (assignments[0] == 1).all()
    if method == "hard_sharing":
        assert (assignments[0] == 0).all()
    if method == "constant_mask":
        for layer in layers.values():
            kept = torch.bincount(layer.fixed_assignment, minlength=3)
            assert kept.max() - kept.min() <= 1
    if method == "even_split":
        for layer in layers.values():
            shared, *kept = torch.bincount(layer.fixed_assignment, minlength=3).tolist()
            assert shared == 0
            assert max(kept) - min(kept) <= 1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_retrain_is_given_its_grouping():
    """Until then it is drawn from p = 1/(T+1), whatever `init` says; then it is that one, also after a reload."""
    found = map_assignment(network("routed", init="dirichlet"))
    model = network("routed", method="retrain", init="mostly_shared")
    with pytest.raises(ValueError, match="drawn from a constant p"):
        predict(model, torch.randn(2, 2, 8, 8))
    assert all((layer.probabilities() - 1 / 3).abs().max() < 1e-6 for layer in sfg_layers(model).values())
    assign(model, found)
    again = network("routed", method="retrain")
    again.load_state_dict(model.state_dict())
    for one in (model, again):
        assert all(torch.equal(layer.draw().assignment, found[name]) for name, layer in sfg_layers(one).items())
        predict(one, torch.randn(2, 2, 8, 8))


@pytest.mark.parametrize("method", ["sfg", "constant_p"])
def test_noise_on_p_reaches_all_layers(method):
    model = network("routed", method=method, noise_on="p")
    assert {layer.noise_on for layer in sfg_layers(model).values()} == {"p"}
    set_noise_on(model, "log_p")
    assert {layer.noise_on for layer in sfg_layers(model).values()} == {"log_p"}
    with pytest.raises(ValueError, match="noise_on='q' is unknown"):
        set_noise_on(model, "q")


def test_any_number_of_tasks():
    for tasks in (1, 4):
        outputs = {f"t{i}": i + 1 for i in range(tasks)}
        y = SFGHighResNet(1, outputs, width=(4, 4, 4), blocks=1, residual="routed")(torch.randn(1, 1, 8, 8))
        assert {task: out.shape[1] for task, out in y.items()} == outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "dense"}, "residual='dense'"),
        ({"method": "soft"}, "method='soft'"),
        ({"method": "one_task"}, "exactly one output"),
        ({"width": (4, 8)}, r"width=\(4, 8\)"),
        ({"noise_on": "q"}, "noise_on='q' is unknown, expected one of log_p, p"),
        ({"method": "cross_stitch"}, "method='cross_stitch' is a network of its own"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SFGHighResNet(1, OUTPUTS, **options)


@pytest.mark.parametrize("name", ["type", "values", "training", "a.b"])
def test_a_task_that_no_module_can_be_called_is_refused(name):
    with pytest.raises(ValueError, match=f"a module of torch can't be called '{name}', expected another name"):
        SFGHighResNet(1, {"ct": 1, name: 1})
