"""Dense masking written plainly in torch operations, independent of everything in sfg_fast that it checks: the oracle
of the tests."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sfg_fast.kernels.spec import MovingStatistics, Norm, RunningStatistics
from torch import Tensor

Pool = Callable[[Tensor], Tensor]


def merge(x: Sequence[Tensor], routing: str) -> list[Tensor]:
    """Returns what each group reads, of T+1 dense tensors [N, C, H, W] (shared first)."""
    return [x[0]] + [task + x[0] if routing == "arrow" else task for task in x[1:]]


def sfg_layer(
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    relu: bool = False,
    pool: Pool | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    routing: str = "arrow",
) -> list[Tensor]:
    """Returns the T+1 dense outputs [N, K, H', W'] of a layer: full convolutions, each times its mask.

    x: one image [N, C, H, W] that all groups read, or T+1 dense tensors. z: the gates [K, T+1]. norm: weight [K],
    bias [K] and eps of the batch normalisation.
    """
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


def max_pool(x: Tensor) -> Tensor:
    """Returns the largest value of each 2x2 window. Where several are equal, the first one gets the gradient."""
    return F.max_pool2d(x, 2)


def max_pool_last(x: Tensor) -> Tensor:
    """Returns the same as `max_pool`, but the last one of several equal values gets the gradient.

    Values that differ by rounding alone count as equal. So where the gradient differs from that of `max_pool`, rounding
    may decide which value gets it.
    """
    height, width = x.shape[2:]
    windows = x[:, :, : height // 2 * 2, : width // 2 * 2].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    windows = windows.permute(0, 1, 2, 4, 3, 5).flatten(4)
    most = windows.detach().amax(-1, keepdim=True)
    near = windows >= most - 1e-9 * most.abs()
    last = 3 - near.flip(-1).int().argmax(-1, keepdim=True)
    return windows.gather(-1, last)[..., 0]


def relaxed(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Returns softmax((log p + noise) / temperature) [K, T+1], written out."""
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    e = torch.exp((torch.log(p) + noise) / temperature)
    return e / e.sum(1, keepdim=True)


def assert_close(
    actual: Tensor | None, expected: Tensor, tolerance: float = 1e-10, what: str = "", scale: float = 1e-3
) -> None:
    """Raises AssertionError where an error is larger than `tolerance` times the largest expected value.

    `scale` takes the place of the largest expected value where `scale` is larger, because sums of larger terms may
    cancel. A gradient that should be zero may be missing (None). `what` names the tensor in the message.
    """
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


def through(normalise: Callable[..., Any]) -> Callable[..., None]:
    """A `keep_statistics` that moves the statistics by normalising images which have these means and variances."""

    def keep(mean: Tensor, var: Tensor, assignment: Tensor, count: int, momentum: float, running: Any) -> None:
        signs = torch.tensor([1.0, -1.0]).repeat(count // 2)
        u = (mean[:, None] + var.sqrt()[:, None] * signs)[None, :, None]
        norm = Norm(torch.ones_like(mean), torch.zeros_like(mean), None, 1e-5, None)
        found = normalise(u, norm, None, moves=MovingStatistics(running, assignment, momentum))
        mean.copy_(found[1])  # within rounding; the loop goes on with what the backend has found
        var.copy_(found[2])

    return keep


def check_statistics(
    keep_statistics: Callable[..., None], kernels: int = 7, groups: int = 3, steps: int = 12, momentum: float = 0.1
) -> None:
    """Compares a backend's running statistics of (group, kernel) pairs over some draws with a loop over numbers.
    `keep_statistics`: as `formulas.keep_statistics`; `through` makes one of a backend that normalises."""
    generator = torch.Generator().manual_seed(0)
    running = [torch.randn(groups, kernels, generator=generator) for _ in range(2)]
    pooled, draws = [torch.randn(kernels, generator=generator) for _ in range(2)], torch.zeros(groups, kernels)
    expected = [t.double() for t in (*running, *pooled)]
    times = [[0] * kernels for _ in range(groups)]
    for step in range(steps):
        count = (2, 50)[step % 2]
        mean, var = torch.randn(kernels, generator=generator), torch.rand(kernels, generator=generator)
        assignment = torch.randint(groups, (kernels,), generator=generator)
        keep_statistics(
            mean,
            var,
            assignment,
            count,
            momentum,
            RunningStatistics(running[0], running[1], draws, pooled[0], pooled[1]),
        )
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
    names = ("running mean", "running variance", "pooled mean", "pooled variance")
    for what, found, wanted in zip(names, (*running, *pooled), expected, strict=True):
        assert_close(found.double(), wanted, 1e-6, what)
