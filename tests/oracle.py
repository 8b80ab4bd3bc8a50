"""Dense masking written plainly in torch operations, independent of everything in sfg_fast that it checks: the oracle
of the tests."""

import torch
import torch.nn.functional as F
from sfg_fast.kernels.spec import RunningStatistics


def merge(x, routing):
    """What each group reads, from T+1 dense tensors (shared first)."""
    return [x[0]] + [task + x[0] if routing == "arrow" else task for task in x[1:]]


def sfg_layer(
    x, weight, bias, z, *, stride=1, padding=0, dilation=1, relu=False, pool=None, norm=None, routing="arrow"
):
    """T+1 full convolutions times masks. x: one image or T+1 tensors; z [K, T+1]; norm: (weight, bias, eps) or None;
    pool: a function or None."""
    groups = z.shape[1]
    reads = [x] * groups if isinstance(x, torch.Tensor) else merge(list(x), routing)
    u = [F.conv2d(read, weight, bias, stride, padding, dilation) for read in reads]
    if norm is not None:
        gamma, beta, eps = norm
        drawn = z.detach().argmax(1)
        rows = torch.stack([u[int(group)][:, kernel] for kernel, group in enumerate(drawn)], 1)
        mean = rows.mean((0, 2, 3))
        var = ((rows - mean[:, None, None]) ** 2).mean((0, 2, 3))
        u = [
            (t - mean[:, None, None]) / (var + eps).sqrt()[:, None, None] * gamma[:, None, None] + beta[:, None, None]
            for t in u
        ]
    h = [t.clamp_min(0) if relu else t for t in u]
    if pool is not None:
        h = [pool(t) for t in h]
    return [t * z[:, group].view(1, -1, 1, 1) for group, t in enumerate(h)]


def max_pool(x):
    """Of 2x2 windows. Of equals the first gets the gradient."""
    return F.max_pool2d(x, 2)


def max_pool_last(x):
    """As `max_pool`, but the last gets it, and what differs by rounding alone counts as equal: where the gradient
    differs from that of `max_pool`, rounding may decide."""
    height, width = x.shape[2:]
    windows = x[:, :, : height // 2 * 2, : width // 2 * 2].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    windows = windows.permute(0, 1, 2, 4, 3, 5).flatten(4)
    most = windows.detach().amax(-1, keepdim=True)
    near = windows >= most - 1e-9 * most.abs()
    last = 3 - near.flip(-1).int().argmax(-1, keepdim=True)
    return windows.gather(-1, last)[..., 0]


def relaxed(logits, noise, temperature):
    """softmax((log p + noise) / temperature), written out."""
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    e = torch.exp((torch.log(p) + noise) / temperature)
    return e / e.sum(1, keepdim=True)


def assert_close(actual, expected, tolerance=1e-10, what="", scale=1e-3):
    """Relative to the largest expected value, or to `scale` where that is larger: sums of larger terms may cancel.
    Gradients that should vanish may be missing."""
    if actual is None:
        actual = torch.zeros_like(expected)
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    errors = (actual - expected).abs()
    error, scale = errors.max().item(), max(expected.abs().max().item(), scale)
    if not error <= tolerance * scale:  # not > : a NaN is no success
        worst = [int(index) for index in torch.unravel_index(errors.nan_to_num(torch.inf).argmax(), errors.shape)]
        few = f"{(errors > tolerance * scale).sum().item()} of {errors.numel()} values"
        raise AssertionError(f"{what}: error {error:.3g} at scale {scale:.3g}, the largest at {worst}; {few} differ")


def check_statistics(keep_statistics, kernels=7, groups=3, steps=12, momentum=0.1):
    """Running statistics of (group, kernel) pairs over some draws, number by number."""
    generator = torch.Generator().manual_seed(0)
    running = [torch.randn(groups, kernels, generator=generator) for _ in range(2)]
    pooled, draws = [torch.randn(kernels, generator=generator) for _ in range(2)], torch.zeros(groups, kernels)
    expected = [t.double() for t in (*running, *pooled)]
    times = [[0] * kernels for _ in range(groups)]
    for step in range(steps):
        count = (2, 50)[step % 2]
        mean, var = torch.randn(kernels, generator=generator), torch.rand(kernels, generator=generator)
        assignment = torch.randint(groups, (kernels,), generator=generator)
        keep_statistics(mean, var, assignment, count, momentum, RunningStatistics(*running, draws, *pooled))
        for k in range(kernels):
            g = int(assignment[k])
            times[g][k] += 1
            for moment, new in enumerate((float(mean[k]), float(var[k]) * count / (count - 1))):
                for table, at, n in (
                    (expected[moment], (g, k), times[g][k]),
                    (expected[moment + 2], (k,), sum(times[one][k] for one in range(groups))),
                ):
                    table[at] += max(1 / n, momentum) * (new - table[at])
    assert draws.tolist() == times
    for found, wanted in zip((*running, *pooled), expected, strict=True):
        assert_close(found.double(), wanted, 1e-6)
