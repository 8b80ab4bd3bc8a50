"""How the gradient reaches p: estimators of d/dp E[loss(z)], z a one-hot draw of Cat(p) per kernel (paper, section
2.2, "Gumbel-Softmax").

Every function takes `drawn` [K, T+1], the one-hot draw; `log_p` [K, T+1], normalised, with gradient; `noise`
[1 + samples, K, T+1], standard Gumbel, of which noise[0] made the draw, drawn = one_hot(argmax(log_p + noise[0])); and
`temperature`, 0-dim or [K, 1]. It returns the gates [K, T+1], differentiable with respect to log_p. No row depends on
another one, so the rows may be those of several layers.

p here is the distribution that groups are drawn from. Where the noise is added to p itself (`GroupGates.noise_on`),
this is softmax(p); where some draws ignore p (`GroupGates.explore`), it is the mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def gumbel_softmax(drawn: Tensor, log_p: Tensor, noise: Tensor, temperature: Tensor) -> Tensor:
    """z = softmax((log p + G) / temperature): relaxed gates, with their exact gradient. A kernel is then a little in
    every group. Jang, Gu, Poole 2017 (arXiv 1611.01144), the paper's reference [14]; Maddison et al. 2017.
    """
    return ((log_p + noise[0]) / temperature).softmax(-1)


def straight_through(drawn: Tensor, log_p: Tensor, noise: Tensor, temperature: Tensor) -> Tensor:
    """z = D one-hot, dz = d softmax((log p + G) / temperature): the gradient of the relaxed draw that has the same
    argmax. Jang, Gu, Poole 2017, section 2.2. It is the default here, and in the authors' code."""
    return _with_gradient_of(drawn, gumbel_softmax(drawn, log_p, noise, temperature))


def gumbel_rao(drawn: Tensor, log_p: Tensor, noise: Tensor, temperature: Tensor) -> Tensor:
    """z = D one-hot, dz = the mean over S samples of d softmax((log p + G_s) / temperature), G_s drawn given D:

        log p + G_s = -log E_D at the drawn group, -log(E_j / p_j + E_D) elsewhere, E ~ Exp(1)

    `straight_through` without the variance that G adds to D. Paulus, Maddison, Krause 2021 (arXiv 2010.04838), eq. 9.
    """
    exponential = (-noise[1:]).exp()
    of_drawn = (exponential * drawn).sum(-1, keepdim=True)
    elsewhere = exponential / log_p.exp() + of_drawn
    given_drawn = -torch.where(drawn > 0, of_drawn, elsewhere).log()
    relaxed = ((log_p + (given_drawn - log_p).detach()) / temperature).softmax(-1)
    return _with_gradient_of(drawn, relaxed.mean(0))


def reinmax(drawn: Tensor, log_p: Tensor, noise: Tensor, temperature: Tensor) -> Tensor:
    """z = D one-hot, dz = d(2 q - p / 2), q = softmax(log p + c) with the constant c such that q = (D + p) / 2: second
    order accurate (Heun's method), where the plain straight-through estimator is first order.

    This holds at temperature 1, so the temperature is not used here. Liu et al. 2023 (arXiv 2304.08612), algorithm 2.
    """
    p = log_p.exp()
    half = (drawn + p) / 2
    q = (log_p + (half.log() - log_p).detach()).softmax(-1)
    return _with_gradient_of(drawn, 2 * q - p / 2)


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """`value`, with the gradient of `other`."""
    return value + (other - other.detach())


@dataclass(frozen=True)
class Estimator:
    """How gates are drawn in training, and how their gradient reaches the logits.

    `gates`: a function of this file; None: p is not learnt, the logits are frozen. `relaxed`: are the gates anything
    but one-hot? `all_gates`: False masks the gradient of undrawn gates, whatever `gates` gives. `samples`: how many
    more samples of noise the function needs than the one that makes the draw.
    """

    gates: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None
    relaxed: bool = False
    all_gates: bool = True
    samples: int = 0


ESTIMATORS = {
    "gumbel_softmax": Estimator(gumbel_softmax, relaxed=True),
    "straight_through": Estimator(straight_through),
    "gumbel_rao": Estimator(gumbel_rao, samples=16),
    "reinmax": Estimator(reinmax),
    # `straight_through` with dL/dz of the drawn gate alone. It is biased, but nothing is computed for undrawn gates.
    "selected": Estimator(straight_through, all_gates=False),
    "none": Estimator(None, all_gates=False),
}
