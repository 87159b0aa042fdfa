"""SPSA is right: the mean of g z approaches the gradient at the predicted rate, and g approaches z . grad as eps -> 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk

D_IN, D_OUT = 9, 4
STREAM = zk.stream_of("weight")


def problem() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(D_OUT, D_IN, generator=g),
        torch.randn(20, D_IN, generator=g, dtype=torch.float64),
        torch.randint(D_OUT, (20,), generator=g),
    )


def loss(weight: Tensor) -> Tensor:
    _, x, y = problem()
    return nn.functional.cross_entropy(x @ weight.double().T, y)


def gradient(weight: Tensor) -> Tensor:
    w = weight.double().requires_grad_()
    (g,) = torch.autograd.grad(loss(w), w)
    return g


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_the_mean_of_g_z_is_the_gradient(kind: str) -> None:
    """E |g z - grad|^2 = (d + 1 + kappa) |grad|^2 for small eps, where kappa is the excess of E z^4 - 2 (0 for the normal, -0.0019 within
    a group here; Rademacher: d - 1). The mean over m tags misses by that / m: measured over 64 such means, each of which has a relative
    spread of about sqrt(2 / d), so that the mean of their squares has one of 3 % and the band of 5 of them less than 25 %.
    E |g z|^2: g^2 |z|^2 has a relative spread of 1.6, its mean over 4096 of 2.5 %, and a g that is 8 % off moves it by 17 %."""
    weight, d, n, m = problem()[0], D_IN * D_OUT, 4096, 64
    want = gradient(weight)
    z = torch.stack([zk.normal((D_OUT, D_IN), seed=11, stream=STREAM, tag=t, kind=kind) for t in range(n)]).double()
    eps = 1e-4
    w = weight.double()
    g = torch.stack([(loss(w + eps * zt) - loss(w - eps * zt)) / (2 * eps) for zt in z])

    def check(values: Tensor, predicted: float, widest: float) -> None:
        band = 5 * float(values.std()) / len(values) ** 0.5
        assert band < widest * predicted, "a band that everything is in"
        assert abs(float(values.mean()) - predicted) <= band

    estimates = (g[:, None, None] * z).flatten(1)
    means = estimates.view(n // m, m, d).mean(1)
    check((means - want.flatten()).square().sum(1) / want.square().sum(), (d + 1 if kind == "gaussian" else d - 1) / m, 0.25)
    check(estimates.square().sum(1) / want.square().sum(), d + 2 if kind == "gaussian" else d, 0.15)
    for k, wanted in enumerate(want.flatten()):
        assert abs(float(estimates[:, k].mean() - wanted)) <= 5 * float(estimates[:, k].std()) / n**0.5, k


def test_g_approaches_the_directional_derivative() -> None:
    """(L+ - L-) / 2 eps = z . grad + O(eps^2): ten times smaller eps, a hundred times smaller error."""
    weight = problem()[0]
    z = zk.normal((D_OUT, D_IN), seed=11, stream=STREAM, tag=0).double()
    slope = (z * gradient(weight)).sum()
    w = weight.double()
    errors = [float((loss(w + e * z) - loss(w - e * z)) / (2 * e) - slope) for e in (1e-1, 1e-2, 1e-3)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine / coarse == pytest.approx(1e-2, rel=0.1)


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
def test_mezostep_measures_that_slope(mode: str) -> None:
    """The optimizer's own g, in fp32: rounding of the weights (2^-24 |w|) against eps = 1e-2 leaves 1e-4."""
    weight, x, y = problem()
    module = nn.Linear(D_IN, D_OUT, bias=False)
    module.weight.data = weight.clone()
    step = zk.MeZOStep(module, lr=0.0, eps=1e-2, seed=11, perturbation=mode)
    for tag in range(20):
        step.step(lambda: nn.functional.cross_entropy(module(x.float()).double(), y))
        z = zk.normal((D_OUT, D_IN), seed=11, stream=STREAM, tag=tag).double()
        assert step.projected_gradient.item() == pytest.approx(float((z * gradient(weight)).sum()), rel=2e-3, abs=2e-4)
