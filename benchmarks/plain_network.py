"""The paper's network by dense masking, as one would write it in a plain script. It is the baseline of every speed-up.

It uses nothing of sfg_fast. `backend("reference")` has to run at this speed (bench_reference.py).
"""

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 3  # shared, ct, organs


class Norm(nn.Module):
    """Normalises all groups by the batch statistics of each kernel's drawn group. Running statistics are kept for each
    (group, kernel)."""

    def __init__(self, k):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(k)), nn.Parameter(torch.zeros(k))
        self.register_buffer("mean", torch.zeros(GROUPS, k))
        self.register_buffer("var", torch.ones(GROUPS, k))
        self.register_buffer("pooled_mean", torch.zeros(k))
        self.register_buffer("pooled_var", torch.ones(k))
        self.register_buffer("draws", torch.zeros(GROUPS, k))

    def forward(self, u, drawn):
        moments = [torch.var_mean(t, (0, 2, 3), correction=0) for t in u]
        if len(u) > 1:
            var = torch.stack([v for v, _ in moments]).gather(0, drawn[None])[0]
            mean = torch.stack([m for _, m in moments]).gather(0, drawn[None])[0]
        else:
            var, mean = moments[0]
        with torch.no_grad():
            k = torch.arange(len(drawn), device=drawn.device)
            self.draws[drawn, k] += 1
            rate = (1 / self.draws[drawn, k]).clamp_min(0.1)
            self.mean[drawn, k] += rate * (mean - self.mean[drawn, k])
            self.var[drawn, k] += rate * (var - self.var[drawn, k])
            rate = (1 / self.draws.sum(0)).clamp_min(0.1)
            self.pooled_mean += rate * (mean - self.pooled_mean)
            self.pooled_var += rate * (var - self.pooled_var)
        scale = self.weight * (var + 1e-5).rsqrt()
        shift = self.bias - mean * scale
        return [torch.addcmul(shift[:, None, None], t, scale[:, None, None]) for t in u]


class SFG(nn.Module):
    def __init__(self, c, k, d=1, relu=True):
        super().__init__()
        self.conv = nn.Conv2d(c, k, 3, padding=d, dilation=d, bias=False)
        self.norm = Norm(k)
        self.logits = nn.Parameter(torch.zeros(k, GROUPS))
        self.relu = relu

    def draw(self):
        noise = -torch.empty_like(self.logits).exponential_().log()
        soft = (self.logits.log_softmax(1) + noise).softmax(1)
        hard = F.one_hot(soft.argmax(1), GROUPS).to(soft.dtype)
        return hard + (soft - soft.detach())

    def forward(self, reads, z=None):
        z = self.draw() if z is None else z
        u = [self.conv(x) for x in reads]
        u = self.norm(u, z.detach().argmax(1))
        if self.relu:
            u = [F.relu(t) for t in u]
        if len(u) == 1:
            u = u * GROUPS
        masks = z.t()[:, :, None, None]
        return [t * masks[g] for g, t in enumerate(u)], z


class Block(nn.Module):
    def __init__(self, k, d, first):
        super().__init__()
        self.conv1 = nn.Conv2d(k, k, 3, padding=d, dilation=d, bias=False)
        self.conv2 = nn.Conv2d(k, k, 3, padding=d, dilation=d)
        self.norm1, self.norm2 = None if first else nn.BatchNorm2d(k), nn.BatchNorm2d(k)

    def forward(self, x):
        h = x if self.norm1 is None else F.relu(self.norm1(x))
        return x + self.conv2(F.relu(self.norm2(self.conv1(h))))


def merge(x):
    return [x[0], *(t + x[0] for t in x[1:])]


class PlainNetwork(nn.Module):
    def __init__(self, outputs=(1, 6), widths=(16, 32, 64), blocks=3, residual="separate"):
        super().__init__()
        self.residual = residual
        self.sfg, self.blocks, self.merges = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        c = 1
        for stage, k in enumerate(widths):
            self.sfg.append(SFG(c, k))
            d = 2**stage
            if residual == "separate":
                stacks = [nn.Sequential(*(Block(k, d, b == 0) for b in range(blocks))) for _ in range(GROUPS)]
                self.blocks.append(nn.ModuleList(stacks))
                self.merges.append(nn.ModuleList(nn.Conv2d(2 * k, k, 1) for _ in range(GROUPS - 1)))
            else:
                pairs = (nn.ModuleList([SFG(k, k, d), SFG(k, k, d, relu=False)]) for _ in range(blocks))
                self.blocks.append(nn.ModuleList(pairs))
            c = k
        self.final = nn.ModuleList([SFG(c, c), SFG(c, c)])
        self.heads = nn.ModuleList(nn.Conv2d(c, o, 1) for o in outputs)

    def forward(self, image):
        reads = [image]
        for stage, sfg in enumerate(self.sfg):
            x, z = sfg(reads)
            if self.residual == "separate":
                x = [stack(t) for stack, t in zip(self.blocks[stage], x, strict=True)]
                x = [x[0], *(conv(torch.cat([t, x[0]], 1)) for conv, t in zip(self.merges[stage], x[1:], strict=True))]
                reads = x
            else:
                for first, second in self.blocks[stage]:
                    h, _ = second(merge(first(merge(x))[0]), z)
                    x = [a + b for a, b in zip(x, h, strict=True)]
                reads = merge(x)
        x, _ = self.final[0](reads)
        x, _ = self.final[1](merge(x))
        return [head(t) for head, t in zip(self.heads, merge(x)[1:], strict=True)]
