"""`SFGUNet` against a U-Net by dense masking, written plainly in float64; against itself under dense masking, with all
gradients; and that it is trained and predicts."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfg_fast import SFGUNet, assign, backend, freeze, penalties, predict, recalibrate, sampling
from sfg_fast.cli import main
from sfg_fast.layer import SFGLayer
from sfg_fast.networks.build import NETWORKS, build, head_biases
from sfg_fast.networks.controls import sfg_layers
from sfg_fast.networks.methods import METHODS, he_initialise
from sfg_fast.networks.parts import ChannelDropout
from sfg_fast.networks.unet import leaky_relu_behind_gate
from tests.backends import FAST
from tests.oracle import assert_close, merge
from tests.training.small_run import make_cache

OUTPUTS = {"ct": 1, "organs": 3}
SHAPES = {
    "plain": {},
    "pooled": {"down": "pooled", "blocks": 1},
    "residual": {"residual": True, "width": [3, 4, 4], "blocks": 2},  # one stage keeps its width
    "residual, pooled": {"residual": True, "down": "pooled", "blocks": 1},
}
SIZES = {2: (11, 8), 3: (3, 9, 8)}  # padded to 12 x 8, and to 4 x 12 x 8
BACKENDS = [(2, name) for name in FAST] + [(3, name) for name in ("masked", "auto")]  # native reads no volumes


def network(shape="plain", dims=2, **options):
    torch.manual_seed(1)
    given = {"width": [3, 4, 5], "blocks": 2, **SHAPES[shape], "spatial_dims": dims, **options}
    model = SFGUNet(2, options.pop("outputs", OUTPUTS), **{k: v for k, v in given.items() if k != "outputs"}, stages=3)
    for parameter in model.parameters():  # no zero biases, no unit scales
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


def image(dims, n=2):
    return torch.randn(n, 2, *SIZES[dims], generator=torch.Generator().manual_seed(2))


# --- written plainly --------------------------------------------------------------------------------------------------


def plainly(model, shape, x, assignments=None):
    """The outputs of each task by dense masking, from the parameters alone: features are T+1 dense tensors. Without
    assignments there is one network: features are one tensor, and every task reads it."""
    dims, options = x.dim() - 2, SHAPES[shape]
    p = dict(model.named_parameters())
    conv = {2: F.conv2d, 3: F.conv3d}[dims]
    back = {2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    mean_of_cells = {2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    pooled = options.get("down") == "pooled"

    def layer(name, x, convolve, act=True, norm=True, of=None):
        reads = x if len(x) == 1 else merge(x, "arrow")
        u = [convolve(one, p[f"{name}.weight"], p.get(f"{name}.bias")) for one in reads]
        group = [0] * u[0].shape[1]
        if assignments is not None:
            group = assignments[of or name].tolist()
        if norm:  # by the drawn row of each kernel
            drawn = torch.stack([u[g][:, k] for k, g in enumerate(group)], 1)
            over = tuple(range(2, drawn.dim()))
            mean = drawn.mean(over, keepdim=True)
            sd = (((drawn - mean) ** 2).mean(over, keepdim=True) + 1e-5).sqrt()
            weight, bias = (p[f"{name}.norm.{one}"].view(-1, *[1] * dims) for one in ("weight", "bias"))
            u = [(one - mean) / sd * weight + bias for one in u]
        u = [torch.where(one > 0, one, 0.01 * one) for one in u] if act else u
        masks = [torch.tensor([float(g == n) for g in group]).view(-1, *[1] * dims) for n in range(len(u))]
        return [one * mask for one, mask in zip(u, masks, strict=True)]

    def same(w_stride=1):
        return lambda x, w, b: conv(x, w, b, w_stride, w.shape[-1] // 2)

    size, cell = x.shape[2:], 4
    wanted = [-(-length // cell) * cell for length in size]
    wanted[-2:] = [max(length, 2 * cell) for length in wanted[-2:]]
    for axis, length in enumerate(wanted, 2):  # the last slice again and again
        last = x.narrow(axis, x.shape[axis] - 1, 1)
        x = torch.cat([x, *[last] * (length - x.shape[axis])], axis)
    y = [x] * (1 if assignments is None else 1 + len(OUTPUTS))
    first, skips, trunk = True, [], None
    for number, stage in enumerate(model.encoder):
        stride = 2 if number and not pooled else 1
        if number and pooled:
            y = [mean_of_cells(one, 2) for one in y]
        for index in range(len(stage)):
            name = f"encoder.{number}.{index}"
            if f"{name}.weight" in p:
                if first:  # of an image: every group reads it, nothing is merged
                    u = layer(name, y[:1] if assignments is None else _unmerged(y), same(stride))
                else:
                    u = layer(name, y, same(stride))
                y, first, trunk = u, False, name
            else:
                shortcut = [mean_of_cells(one, 2) for one in y] if stride == 2 else y
                if f"{name}.project.weight" in p:
                    trunk = f"{name}.project"
                    shortcut = layer(trunk, shortcut, same(), act=False)
                h = layer(f"{name}.conv1", y, same(stride))
                h = layer(f"{name}.conv2", h, same(), act=False, of=trunk)
                y = [F.leaky_relu(a + b, 0.01) for a, b in zip(shortcut, h, strict=True)]
            stride = 1
        skips.append(y)
    skips.pop()
    for number, stage in enumerate(model.decoder):
        up = layer(f"ups.{number}", y, lambda x, w, b: back(x, w, b, 2), act=False, norm=False)
        y = [torch.cat(both, 1) for both in zip(up, skips.pop(), strict=True)]
        for index in range(len(stage)):
            y = layer(f"decoder.{number}.{index}", y, same())
    rows, found = 0, {}
    for task, (name, count) in enumerate(OUTPUTS.items(), 1):
        read = y[0] if assignments is None else y[0] + y[task]
        weight, bias = (p[f"heads.conv.{one}"][rows : rows + count] for one in ("weight", "bias"))
        found[name] = conv(read, weight, bias)[(..., *(slice(length) for length in size))]
        rows += count
    return found


def _unmerged(streams):
    """T+1 tensors of which every group reads the same: those of the tasks are nothing beside the shared one."""
    return [streams[0], *(torch.zeros_like(one) for one in streams[1:])]


@pytest.mark.parametrize(("dims", "name"), [(2, "reference"), (3, "reference"), *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_all_kernels_shared_it_is_the_plain_network(shape, dims, name, float64):
    model, x = network(shape, dims), image(dims)
    assign(model, {n: [0] * m.out_channels for n, m in sfg_layers(model).items()})
    expected = plainly(model, shape, x)
    for training in (True, False):
        with backend(name):
            found = model.train(training)(x)
        for task, y in expected.items():
            assert y.shape == (2, OUTPUTS[task], *SIZES[dims])
            assert_close(found[task], y, what=task)


@pytest.mark.parametrize(("dims", "name"), [(2, "reference"), (3, "reference"), *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_dense_masking_written_plainly(shape, dims, name, float64):
    model, x = network(shape, dims), image(dims)
    assignments = {n: (torch.arange(m.out_channels) + i) % 3 for i, (n, m) in enumerate(sfg_layers(model).items())}
    assign(model, assignments)
    weights = {key: one for key, one in model.named_parameters() if one.requires_grad and "logits" not in key}
    expected = plainly(model, shape, x, assignments)
    with backend(name):
        found = model(x)
    both = []
    for outputs in (found, expected):
        loss = sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs.values())
        both.append(torch.autograd.grad(loss, list(weights.values())))
    for task in OUTPUTS:
        assert_close(found[task], expected[task], what=task)
    for key, a, b in zip(weights, *both, strict=True):
        assert_close(a, b, 1e-9, key, scale=1e-2)


# --- under dense masking, with the gradient of p ----------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "name"), BACKENDS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *((shape, {}) for shape in SHAPES),
        *(("plain", {"norm": norm}) for norm in (None, "batch", "layer", ("group", {"num_groups": 1}))),
        ("residual", {"norm": "batch"}),
        ("residual", {"estimator": "gumbel_softmax"}),
        ("plain", {"deep_supervision": True}),
    ],
)
def test_equals_itself_under_dense_masking(shape, dims, options, name, float64):
    """The same draw on both; values, and gradients of all parameters with the logits, and of the image."""
    model, x = network(shape, dims, init=[0.6, 0.2, 0.2], **options), image(dims).requires_grad_()
    leaves = {"input": x, **dict(model.named_parameters())}
    results = []
    for one in ("reference", name):
        torch.manual_seed(3)
        with backend(one):
            found = model(x)
        outputs = [y for task in found.values() for y in (task if isinstance(task, list) else [task])]
        loss = sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, list(leaves.values()))])
    names = [*range(len(outputs)), *leaves]
    for what, expected, actual in zip(names, *results, strict=True):
        assert_close(actual, expected, 1e-9, str(what), scale=1e-2)
        assert actual.any() or not str(what).endswith("logits"), what


# --- deep supervision, sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", SIZES)
@pytest.mark.parametrize("options", [{}, {"residual": True}, {"down": "pooled"}, {"norm": "batch"}], ids=str)
def test_frozen_it_is_the_same(dims, options, float64):
    """With a mixed assignment, on another image size, and exported."""
    torch.manual_seed(0)
    net = SFGUNet(1, {"a": 1, "b": 3}, width=6, stages=3, spatial_dims=dims, **options)
    x, other = (torch.randn(2, 1, *size) for size in (((21, 18), (26, 9)) if dims == 2 else ((5, 9, 8), (8, 6, 9))))
    with torch.no_grad():
        for _ in range(3):  # running statistics of a batch norm
            net(x)
        assign(net, {name: torch.randint(3, (layer.out_channels,)) for name, layer in sfg_layers(net).items()})
        frozen = freeze(net.eval(), example=x)
        exported = torch.export.export(frozen, (x,)).module()
        for one, image in ((frozen, x), (frozen, other), (exported, x)):
            found, expected = one(image), net(image)
            for task, y in expected.items():
                assert_close(found[task], y, 1e-9, task)


def test_deep_supervision_adds_outputs_of_coarser_grids_in_training():
    model = SFGUNet(1, OUTPUTS, width=2, stages=4, blocks=1, deep_supervision=True, init="mostly_shared")
    assert [len(head_biases(model, task)) for task in OUTPUTS] == [3, 3]
    x = torch.randn(2, 1, 21, 34)
    sizes = [(21, 34), (11, 17), (6, 9)]
    for task, found in model(x).items():
        assert [tuple(y.shape) for y in found] == [(2, OUTPUTS[task], *size) for size in sizes]
    sum(y.square().sum() for found in model(x).values() for y in found).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        torch.manual_seed(0)
        expected = {task: found[0] for task, found in model(x).items()}
        model.eval()
        with sampling(model):
            torch.manual_seed(0)
            found = model(x)
    for task in OUTPUTS:
        torch.testing.assert_close(found[task], expected[task])


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 8), (17, 40)])
def test_images_of_any_size_are_taken(size):
    model = SFGUNet(1, OUTPUTS, width=2, stages=4, blocks=1)
    assert {task: tuple(y.shape[2:]) for task, y in model(torch.randn(1, 1, *size)).items()} == dict.fromkeys(
        OUTPUTS, size
    )


def test_what_is_padded_is_the_border():
    """An image that ends with its last row again has the same outputs as one that is padded by it."""
    model = network(init="mostly_shared").eval()
    x = torch.randn(1, 2, 11, 8)
    with torch.no_grad():
        whole, cut = (model(one)["ct"] for one in (torch.cat([x, x[:, :, -1:]], 2), x))
    torch.testing.assert_close(whole[:, :, :11], cut)


# --- as the others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", SIZES)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "cross_stitch"])
@pytest.mark.filterwarnings("ignore:the most probable group is a tie")
def test_every_method_is_trained_and_predicts(method, dims):
    outputs = {"ct": 1} if method == "one_task" else OUTPUTS
    model = network("residual", dims, outputs=outputs, method=method, dropout=0.2)
    groups = {g for layer in sfg_layers(model).values() for g in layer.draw().assignment.tolist()}
    expected = {"one_task": {1}, "hard_sharing": {0}, "constant_mask": {0, 1, 2}, "even_split": {1, 2}}
    assert groups == expected.get(method, groups)
    assert all(layer.learns_grouping == (method == "sfg") for layer in sfg_layers(model).values())
    x = image(dims)
    loss = sum(y.square().mean() for y in model(x).values()) - penalties(model)[1]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    recalibrate(model, [x], drawn=method in ("constant_p", "retrain"))
    found = predict(model, x, draws=2)
    assert {task: tuple(one.mean.shape) for task, one in found.items()} == {
        task: (2, size, *SIZES[dims]) for task, size in outputs.items()
    }
    assert all(one.variance.max() > 0 for one in found.values())  # dropout, if nothing else


def test_the_architecture_is_nnunet_s():
    model = SFGUNet(1, OUTPUTS, width=32, stages=6, spatial_dims=3, deep_supervision=True)
    assert [stage[0].out_channels for stage in model.encoder] == [32, 64, 128, 256, 320, 320]
    assert [up.in_channels for up in model.ups] == [320, 320, 256, 128, 64]
    assert [stage[0].in_channels for stage in model.decoder] == [640, 512, 256, 128, 64]
    assert [stage[0].stride for stage in model.encoder] == [(1, 1, 1)] + 5 * [(2, 2, 2)]
    assert SFGUNet(1, OUTPUTS, stages=6).encoder[-1][0].out_channels == 512
    every = [m for m in model.modules() if isinstance(m, SFGLayer)]
    assert all((m.norm is None) == m.transposed == (m.bias is not None) for m in every)
    assert all(m.norm.kind == "instance" for m in every if not m.transposed)


@pytest.mark.parametrize("name", ["highresnet", "vgg"])
def test_other_networks_take_instance_norm(name):
    sizes = {"highresnet": {"width": 2, "blocks": 1, "residual": "routed"}, "vgg": {"width": 2}}[name]
    model, x = build(name, 1, OUTPUTS, norm="instance", **sizes), torch.randn(2, 1, 40, 40)
    results = []
    for one in ("reference", "auto"):
        torch.manual_seed(0)
        with backend(one):
            results.append(model(x))
    for task in OUTPUTS:
        torch.testing.assert_close(results[0][task], results[1][task], rtol=1e-3, atol=1e-4)


def test_a_leaky_relu_behind_a_gate_has_its_mean_slope_at_zero(float64):
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    y = leaky_relu_behind_gate(x)
    torch.testing.assert_close(y, F.leaky_relu(x))
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == pytest.approx([0.01, 0.505, 1.0])


def test_weights_start_after_he_of_every_convolution():
    """As nnU-Net does: kaiming_normal_ with the slope of the LeakyReLU."""
    model = nn.ModuleList([*network("plain", 3, width=[16, 16, 16]).modules()][1:])
    he_initialise(model)
    for module in model:
        if isinstance(module, SFGLayer | nn.Conv3d):
            slope = 0.01 if getattr(module, "activation", None) else 0.0
            fan = module.weight.shape[1] * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / (1 + slope**2) / fan) ** 0.5, rel=0.2)
            assert module.bias is None or not module.bias.any()


def test_dropout_drops_whole_channels_of_volumes():
    x = torch.ones(2, 50, 2, 3, 4)
    y = ChannelDropout(0.5)(x).flatten(2)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert (y == y[..., :1]).all()
    assert 0.3 < (y[..., 0] == 0).float().mean() < 0.7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": 1}, "stages=1: expected at least 2, one of which halves"),
        ({"blocks": 0}, "blocks=0: expected at least 1 in each stage"),
        ({"down": "max"}, "down='max' is unknown, expected one of strided, pooled"),
        ({"residual": "routed"}, "residual='routed': expected True or False"),
        ({"spatial_dims": 1}, "spatial_dims=1: expected 2, or 3 for volumes"),
        ({"width": [4, 8]}, r"width=\[4, 8\]: expected a number, or 5, one for each stage"),
        ({"method": "cross_stitch"}, "method='cross_stitch' is a network of its own"),
        ({"norm": "none"}, "norm='none' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SFGUNet(1, OUTPUTS, **options)


@pytest.mark.parametrize(("dims", "shape"), [(2, (1, 8, 8, 8)), (3, (1, 8, 8)), (2, (8, 8))])
def test_an_image_of_other_axes_is_refused(dims, shape):
    expected = {2: r"\[N, 1, H, W\]", 3: r"\[N, 1, D, H, W\]"}[dims]
    with pytest.raises(ValueError, match=f"the input has shape .*, expected {expected}"):
        SFGUNet(1, OUTPUTS, width=2, spatial_dims=dims)(
            torch.zeros(1, *shape) if len(shape) > 2 else torch.zeros(shape)
        )


# --- by the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("unet"))


@pytest.mark.parametrize(
    ("patch", "options"),
    [
        ("null", ["--network.norm", "batch", "--network.dropout", "0.1"]),  # slices of 24 x 24
        ("[20,17]", ["--network.deep_supervision", "true", "--network.residual", "true"]),
        ("[4,9,10]", ["--network.deep_supervision", "true", "--network.down", "pooled", "--precision", "bfloat16"]),
    ],
)
def test_it_is_trained_and_predicts(cache, tmp_path, patch, options):
    arguments = ["--network.name", "unet", "--network.width", "4", "--network.stages", "3", "--network.blocks", "1"]
    arguments += ["--schedule.steps", "4", "--schedule.batch", "2", "--checkpoint_every", "2", "--log_every", "2"]
    arguments += ["--validation_slices", "2", "--patch", patch, *options]
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", "--data", str(cache), "--out", str(run), *arguments]) == 0
    history = json.loads((run / "history.json").read_text())
    assert all(value == value and abs(value) < 1e6 for value in history["curves"]["objective"])
    assert main(["predict", str(run), str(cache.parent / "cohort"), str(out), "--draws", "2"]) == 0
    assert list(out.glob("*/ct.nii.gz"))


def test_a_network_without_an_option_refuses_it(cache, tmp_path, capsys):
    arguments = ["train", "--data", str(cache), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--network.stages", "3"]) == 2
    assert "network: stages=3: highresnet has no such option" in capsys.readouterr().err
    assert main([*arguments, "--network.name", "unet", "--network.method", "cross_stitch"]) == 2
    assert "method='cross_stitch': SFGUNet has no stages" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert "unet" in NETWORKS
