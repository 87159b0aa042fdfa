"""Every method twice: as the library makes it, and as an obvious float64 implementation of its paper's formula.

Belongs here: what several test files need of a method (how to make it, what it should compute, what it is allowed to). Does not belong here: tests.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import zo_kernels as zk

SEED = 12345
EPS = 0.1
Weights = dict[str, Tensor]


class Tiny(nn.Module):
    """Two linear layers and a norm, odd sizes; a smooth loss in float64, whatever the weights' type.

    `told`: a list, to which each forward adds the weights that it saw, in float64, and its loss.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, sizes: tuple[int, int, int] = (7, 5, 4)) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[1], sizes[2])])
        self.norm = nn.LayerNorm(sizes[1])
        self.x = torch.randn(11, sizes[0], generator=g, dtype=torch.float64)
        self.y = torch.randn(11, sizes[2], generator=g, dtype=torch.float64)
        self.told: list[tuple[Weights, Tensor]] | None = None
        for p in self.parameters():
            p.data = (0.5 * torch.randn(p.shape, generator=g)).to(dtype)

    def forward(self, rows: slice = slice(None)) -> Tensor:
        first, second, norm = self.layers[0], self.layers[1], self.norm
        weights = {
            "layers.0.weight": first.weight, "layers.0.bias": first.bias, "layers.1.weight": second.weight, "layers.1.bias": second.bias,
            "norm.weight": norm.weight, "norm.bias": norm.bias,
        }  # fmt: skip
        wide = {n: p.double() for n, p in weights.items()}
        found = loss(wide, self.x[rows], self.y[rows])
        if self.told is not None:
            self.told.append(({n: p.detach().clone() for n, p in wide.items()}, found.detach()))
        return found


def loss(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    h = nn.functional.linear(x, w["layers.0.weight"], w["layers.0.bias"])
    h = nn.functional.layer_norm(h, w["norm.weight"].shape, w["norm.weight"], w["norm.bias"])
    return (nn.functional.linear(h.tanh(), w["layers.1.weight"], w["layers.1.bias"]) - y).square().mean()


LAYERS = [["norm.weight", "norm.bias"], ["layers.0.weight", "layers.0.bias"], ["layers.1.weight", "layers.1.bias"]]
NORM = tuple(LAYERS[0])


def values(model: nn.Module) -> Weights:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ---- the float64 implementation -----------------------------------------------------------------------------------------


@dataclass
class Reference:
    """Weights in float64 and what a method remembers. `lr`, `eps`, `decay`: by parameter name.

    `path`: how far the weights have been moved, every term of an update counted by itself (largest element), which is what relative errors of
    coefficients are relative to.
    """

    theta: Weights
    loss: Callable[[Weights], Tensor]
    lr: dict[str, float]
    eps: dict[str, float]
    decay: dict[str, float]
    kind: str = "gaussian"
    clip: float | None = None
    step: int = 0
    path: float = 0.0
    memory: dict[str, Any] = field(default_factory=dict)
    g: float = 0.0  # of the last step, first query
    z_of: Callable[[str, tuple[int, ...], int, str], Tensor | None] | None = (
        None  # of a parameter, instead of noise; None: it stays
    )

    @classmethod
    def of(cls, model: Tiny, lr: float, eps: float = EPS, weight_decay: float = 0.0, **more: Any) -> Reference:
        theta = {n: p.double() for n, p in values(model).items()}
        decay = {n: weight_decay if n.startswith("layers") and n.endswith("weight") else 0.0 for n in theta}  # no bias, no norm
        x, y = model.x, model.y
        return cls(theta, lambda w: loss(w, x, y), dict.fromkeys(theta, lr), dict.fromkeys(theta, eps), decay, **more)

    def z(self, tag: int) -> Weights:
        found = {n: (self.z_of or noise)(n, tuple(t.shape), tag, self.kind) for n, t in self.theta.items()}
        return {n: z for n, z in found.items() if z is not None}

    def at(self, direction: Weights, factor: float) -> float:
        return float(
            self.loss({n: t + factor * self.eps[n] * direction[n] if n in direction else t for n, t in self.theta.items()})
        )

    def clipped(self, g: float) -> float:
        return g if self.clip is None else min(max(g, -self.clip), self.clip)

    def two_sided(self, direction: Weights) -> dict[str, float]:
        """g of each parameter, with its own eps."""
        d = self.at(direction, 1) - self.at(direction, -1)
        return {n: self.clipped(d / (2 * self.eps[n])) for n in self.theta}

    def gradient(self) -> Weights:
        theta = {n: t.clone().requires_grad_() for n, t in self.theta.items()}
        return dict(zip(theta, torch.autograd.grad(self.loss(theta), list(theta.values())), strict=True))

    def move(self, by: Weights, size: float | None = None) -> None:
        """theta <- (1 - lr wd) theta + by."""
        self.path += max(float(m.abs().max()) for m in by.values()) if size is None else size
        for n, m in by.items():
            rate = self.lr[n] * self.decay[n]
            self.path += rate * float(self.theta[n].abs().max())
            self.theta[n] = (1 - rate) * self.theta[n] + m


@functools.cache
def noise(name: str, shape: tuple[int, ...], tag: int, kind: str = "gaussian", **more: Any) -> Tensor:
    return zk.normal(shape, seed=SEED, stream=zk.stream_of(name), tag=tag, kind=kind, backend="reference", **more).double()


def average(r: Reference, gs: Sequence[dict[str, float]], zs: Sequence[Weights]) -> tuple[Weights, float]:
    """The estimate (1/q) sum g_i z_i, and its size term by term."""
    estimate = {n: sum((g[n] * z[n] for g, z in zip(gs, zs, strict=True)), torch.zeros_like(r.theta[n])) / len(gs) for n in zs[0]}
    size = sum(max(abs(g[n]) * float(z[n].abs().max()) for n in z) for g, z in zip(gs, zs, strict=True)) / len(gs)
    r.g = gs[0].get("layers.0.weight", 0.0)
    return estimate, size


def estimate_two_sided(r: Reference, tags: Sequence[int]) -> tuple[Weights, float]:
    zs = [r.z(t) for t in tags]
    return average(r, [r.two_sided(z) for z in zs], zs)


def estimate_one_sided(r: Reference, tags: Sequence[int]) -> tuple[Weights, float]:
    zs, clean = [r.z(t) for t in tags], r.at({}, 0)
    gs = [{n: r.clipped((r.at(z, 1) - clean) / r.eps[n]) for n in r.theta} for z in zs]
    return average(r, gs, zs)


def sgd(estimate: Callable[[Reference, Sequence[int]], tuple[Weights, float]]) -> Callable[[Reference, Sequence[int]], None]:
    def step(r: Reference, tags: Sequence[int]) -> None:
        u, size = estimate(r, tags)
        r.move({n: -r.lr[n] * u[n] for n in u}, max(r.lr.values()) * size)

    return step


def sign(r: Reference, tags: Sequence[int]) -> None:
    zs = [r.z(t) for t in tags]
    measured = [r.two_sided(z) for z in zs]
    u, size = average(r, [{n: float(np.sign(g)) for n, g in gs.items()} for gs in measured], zs)
    r.g = measured[0]["layers.0.weight"]
    r.move({n: -r.lr[n] * u[n] for n in u}, max(r.lr.values()) * size)


def fzoo(r: Reference, tags: Sequence[int]) -> None:
    zs, clean = [r.z(t) for t in tags], r.at({}, 0)
    shifted = [r.at(z, 1) for z in zs]
    std = float(np.std(shifted, ddof=1))
    u, size = average(r, [{n: (s - clean) / r.eps[n] / std for n in r.theta} for s in shifted], zs)
    r.move({n: -r.lr[n] * u[n] for n in u}, max(r.lr.values()) * size)


def shaped(r: Reference, tags: Sequence[int], shape: str, mirrored: bool) -> None:
    zs = [r.z(t) for t in tags]
    losses = [r.at(z, sign) for z in zs for sign in ((1, -1) if mirrored else (1,))]
    n = len(losses)
    if shape == "ranked":
        u = [np.mean([k for k, x in enumerate(sorted(losses)) if x == own]) / (n - 1) - 0.5 for own in losses]
    else:
        u = [(x - np.mean(losses)) / np.std(losses, ddof=1) for x in losses]
    each = [(a - b) / 2 for a, b in zip(u[::2], u[1::2], strict=True)] if mirrored else u
    move, size = average(r, [{n: r.clipped(float(x) / r.eps[n]) for n in r.theta} for x in each], zs)
    r.move({n: -r.lr[n] * move[n] for n in move}, max(r.lr.values()) * size)


def conservative(r: Reference, tags: Sequence[int]) -> None:
    z = r.z(tags[0])
    g = r.two_sided(z)
    r.g = g["layers.0.weight"]
    candidates = [{n: c * r.lr[n] * g[n] * z[n] for n in z} for c in (0.0, -1.0, 1.0)]
    losses = [float(r.loss({n: t + c[n] for n, t in r.theta.items()})) for c in candidates]
    r.move(candidates[int(np.argmin(losses))])


def forward_gradient(r: Reference, tags: Sequence[int]) -> None:
    z, gradient = r.z(tags[0]), r.gradient()
    r.g = float(sum((z[n] * gradient[n]).sum() for n in z))
    r.move({n: -r.lr[n] * r.g * z[n] for n in z})


FIRST_ORDER_LR = 0.02


def hybrid(r: Reference, tags: Sequence[int]) -> None:
    gradient = r.gradient()
    z = {n: t for n, t in r.z(tags[0]).items() if n not in NORM}
    g = r.two_sided(z)
    r.g = g["layers.0.weight"]
    r.move({n: -r.lr[n] * g[n] * z[n] for n in z})
    for n in NORM:
        r.theta[n] = r.theta[n] - FIRST_ORDER_LR * gradient[n]


def blockwise(block_of: Callable[[int], Sequence[str]]) -> Callable[[Reference, Sequence[int]], None]:
    def step(r: Reference, tags: Sequence[int]) -> None:
        z = {n: t for n, t in r.z(tags[0]).items() if n in block_of(r.step)}
        g = r.two_sided(z)
        r.move({n: -r.lr[n] * g[n] * z[n] for n in z})

    return step


def in_blocks(
    method: Callable[[Reference, Sequence[int]], None], block_of: Callable[[int], Sequence[str]]
) -> Callable[[Reference, Sequence[int]], None]:
    """A method of each block's own: what it remembers is of the steps of that block."""

    def step(r: Reference, tags: Sequence[int]) -> None:
        names = block_of(r.step)
        own = r.memory.setdefault(tuple(names), {})
        theta = {n: r.theta[n] for n in names}
        part = Reference(theta, lambda w: r.loss({**r.theta, **w}), r.lr, r.eps, r.decay, r.kind, memory=own)
        method(part, tags)
        r.theta.update(part.theta)
        r.path += part.path

    return step


def magnitude_sparse(quantile: float) -> Callable[[Reference, Sequence[int]], None]:
    def step(r: Reference, tags: Sequence[int]) -> None:
        if not r.step:
            ranks = {n: math.ceil(quantile * t.numel()) - 1 for n, t in r.theta.items()}
            r.memory = {n: t.abs().flatten().sort().values[ranks[n]] for n, t in r.theta.items()}
        z = {n: t * (r.theta[n].abs() <= r.memory[n]) for n, t in r.z(tags[0]).items()}
        u, size = average(r, [r.two_sided(z)], [z])
        r.move({n: -r.lr[n] * u[n] for n in u}, max(r.lr.values()) * size)

    return step


@functools.cache
def kept(name: str, shape: tuple[int, ...], keep: float, mask_tag: int) -> Tensor:
    """Where a random mask lets a perturbation through: ones, perturbed by ±1."""
    ones = torch.ones(shape)
    mask, streams = zk.RandomMask(keep, mask_tag), [zk.stream_of(name)]
    zk.perturb_([ones], [(0, 1.0)], seed=SEED, streams=streams, masks=[mask], kind="rademacher", backend="reference")
    return ones != 1


def random_sparse(keep: float, every: int) -> Callable[[Reference, Sequence[int]], None]:
    def step(r: Reference, tags: Sequence[int]) -> None:
        z = {n: t * kept(n, t.shape, keep, r.step // every) for n, t in r.z(tags[0]).items()}
        u, size = average(r, [r.two_sided(z)], [z])
        r.move({n: -r.lr[n] * u[n] for n in u}, max(r.lr.values()) * size)

    return step


def to_12_bits(x: Any) -> Any:
    mantissa, exponent = np.frexp(np.asarray(x, dtype=np.float64))
    return np.ldexp(np.round(mantissa * 4096) / 4096, exponent)  # numpy rounds ties to even


def layer_scale(every: int, variance: bool, beta: float | None = None) -> Callable[[Reference, Sequence[int]], None]:
    """`beta`: by the gradient, of which one parameter's is estimated in each step, with the tag behind the direction's; None: by the weights."""

    def mean_square(r: Reference, n: str, t: Tensor) -> float:
        if beta is None:
            return float(t.square().mean())
        turns = [g for name, g in r.memory.setdefault("turns", []) if name == n]
        weights = [beta**age for age in reversed(range(len(turns)))]
        return sum(w * g * g for w, g in zip(weights, turns, strict=True)) / sum(weights) / t.numel() if turns else 0.0

    def step(r: Reference, tags: Sequence[int]) -> None:
        if r.step % every == 0:
            means = {n: math.sqrt(mean_square(r, n, t)) for n, t in r.theta.items()}
            known = [d for d in means.values() if d > 0]
            middle = math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0
            r.memory["d"] = {n: float(to_12_bits(max(d / middle, 1e-2))) if d > 0 else 1.0 for n, d in means.items()}
        if beta is not None:
            n = sorted(r.theta)[r.step % len(r.theta)]
            only = {n: noise(n, r.theta[n].shape, tags[0] + 1, r.kind)}
            r.memory["turns"].append((n, (r.at(only, 1) - r.at(only, -1)) / (2 * r.eps["layers.0.weight"])))
        z, d = r.z(tags[0]), r.memory["d"]
        g = r.two_sided({n: t / d[n] for n, t in z.items()})
        r.g = g["layers.0.weight"]
        r.move({n: -r.lr[n] * g[n] * z[n] * (d[n] if variance else 1.0) for n in z})

    return step


def lozo_momentum(rank: int, every: int, beta: float) -> Callable[[Reference, Sequence[int]], None]:
    """LOZO-M: N of a matrix in place of the buffer b of the others, carried from one V to the next."""

    def v_of(name: str, columns: int, tag: int) -> np.ndarray:
        made: np.ndarray = to_12_bits(noise(name, (rank, columns), tag, offset=1 << 55).numpy()).T
        return made

    def step(r: Reference, tags: Sequence[int]) -> None:
        z, now = r.z(tags[0]), r.step // every
        for n, t in r.theta.items():
            if t.ndim == 2:
                z[n] = low_rank(n, t.shape[0], t.shape[1], rank, tags[0], now)
        g = r.two_sided(z)
        r.g = g["layers.0.weight"]
        by = {}
        for n, t in r.theta.items():
            if t.ndim != 2:
                r.memory[n] = beta * r.memory.get(n, 0.0) + (1 - beta) * g[n] * z[n]
                by[n] = -r.lr[n] * r.memory[n]
                continue
            u = to_12_bits(noise(n, (t.shape[0], rank), tags[0]).numpy())
            v, momentum = v_of(n, t.shape[1], now), r.memory.get(n, np.zeros_like(u))
            if r.step and r.step % every == 0:
                momentum = momentum @ (v_of(n, t.shape[1], now - 1).T @ v) / t.shape[1]
            r.memory[n] = beta * momentum + (1 - beta) * g[n] * u
            by[n] = -r.lr[n] / rank * torch.from_numpy(r.memory[n] @ v.T)
        r.move(by)

    return step


def lozo(rank: int, every: int) -> Callable[[Reference, Sequence[int]], None]:
    def step(r: Reference, tags: Sequence[int]) -> None:
        zs = [r.z(t) for t in tags]
        for z, tag in zip(zs, tags, strict=True):
            for n, t in r.theta.items():
                if t.ndim == 2:
                    z[n] = low_rank(n, t.shape[0], t.shape[1], rank, tag, r.step // every)
        u, _ = average(r, [r.two_sided(z) for z in zs], zs)
        r.move({n: -r.lr[n] * u[n] / (rank if u[n].ndim == 2 else 1) for n in u})

    return step


def along(
    z_of: Callable[[str, tuple[int, ...], int, str], Tensor | None], method: Callable[[Reference, Sequence[int]], None]
) -> Callable[[Reference, Sequence[int]], None]:
    def step(r: Reference, tags: Sequence[int]) -> None:
        r.z_of = z_of
        method(r, tags)

    return step


def _given(sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Of the first layer the right factor, of the second the left one, as where a weight is stored transposed."""
    g = torch.Generator().manual_seed(7)
    right, left = torch.randn(sizes[0], 2, generator=g), torch.randn(sizes[2], 2, generator=g)
    return {"right": {"layers.0.weight": right}, "left": {"layers.1.weight": left}}


GIVEN = {sizes: zk.InputFactors(**_given(sizes)) for sizes in ((7, 5, 4), (19, 13, 6))}


def given_of(named: Any) -> zk.InputFactors:
    """The factors that fit a `Tiny`, or groups of its parameters."""
    pairs = named.named_parameters() if isinstance(named, nn.Module) else [pair for g in named for pair in g["params"]]
    cols = next(p.shape[1] for n, p in pairs if n == "layers.0.weight")
    return next(factors for sizes, factors in GIVEN.items() if sizes[0] == cols)


def subspace(name: str, shape: tuple[int, ...], tag: int, kind: str) -> Tensor | None:
    """U V^T, V given, by the formula in zo_kernels/lowrank.py; None: no factors."""
    factors = next(f for f in GIVEN.values() if name not in f.matrices or f.matrices[name][1].shape[0] in shape)
    if name not in factors.matrices:
        return None
    side, v = factors.matrices[name]
    rows, columns = shape
    if side == "right":
        return torch.from_numpy(to_12_bits(noise(name, (rows, 2), tag, kind).numpy())) @ v.double().T
    return v.double() @ torch.from_numpy(to_12_bits(noise(name, (2, columns), tag, kind, offset=1 << 55).numpy()))


def subspace_or_dense(name: str, shape: tuple[int, ...], tag: int, kind: str) -> Tensor:
    z = subspace(name, shape, tag, kind)
    return noise(name, shape, tag, kind) if z is None else z


def low_rank(name: str, rows: int, columns: int, rank: int, tag_u: int, tag_v: int) -> Tensor:
    """U V^T by the formula in zo_kernels/lowrank.py."""
    u = to_12_bits(noise(name, (rows, rank), tag_u).numpy())
    v = to_12_bits(noise(name, (rank, columns), tag_v, offset=1 << 55).numpy())
    return torch.from_numpy(u @ v)


def momentum(beta: float, queries: int = 1, history: int | None = None) -> Callable[[Reference, Sequence[int]], None]:
    """b <- beta b + u; `history`: b is the sum of the last so many beta^age u."""

    def step(r: Reference, tags: Sequence[int]) -> None:
        past = r.memory.setdefault("past", [])
        past.append(estimate_two_sided(r, tags))
        recent = list(reversed(past if history is None else past[-history:]))
        b = {n: sum(beta**age * u[n] for age, (u, _) in enumerate(recent)) for n in r.theta}
        size = sum(beta**age * s for age, (_, s) in enumerate(recent))
        r.move({n: -r.lr[n] * b[n] for n in b}, max(r.lr.values()) * size)

    return step


def adam(b1: float, b2: float, eps: float, history: int | None = None) -> Callable[[Reference, Sequence[int]], None]:
    """The averages of u and u^2 whose weights beta^age sum to one: with the whole past this is m / (1 - b1^t) and v / (1 - b2^t)."""

    def step(r: Reference, tags: Sequence[int]) -> None:
        past = r.memory.setdefault("past", [])
        past.append(estimate_two_sided(r, tags)[0])
        recent = list(reversed(past if history is None else past[-history:]))
        by, size = {}, 0.0
        for n in r.theta:
            first, second = ([b**age for age in range(len(recent))] for b in (b1, b2))
            m = sum(w * u[n] for w, u in zip(first, recent, strict=True)) / sum(first)
            v = sum(w * u[n].square() for w, u in zip(second, recent, strict=True)) / sum(second)
            by[n] = -r.lr[n] * m / (v.sqrt() + eps)
            absolute = sum(w * u[n].abs() for w, u in zip(first, recent, strict=True)) / sum(first)
            size = max(size, r.lr[n] * float((absolute / (v.sqrt() + eps)).max()))
        r.move(by, size)

    return step


def hizoo(alpha: float, low: float, high: float) -> Callable[[Reference, Sequence[int]], None]:
    def step(r: Reference, tags: Sequence[int]) -> None:
        h = r.memory.setdefault("H", {n: torch.ones_like(t) for n, t in r.theta.items()})
        z = r.z(tags[0])
        direction = {n: t / h[n].sqrt() for n, t in z.items()}
        clean, plus, minus = r.at({}, 0), r.at(direction, 1), r.at(direction, -1)
        g = {n: r.clipped((plus - minus) / (2 * r.eps[n])) for n in z}
        r.g = g["layers.0.weight"]
        for n in z:
            kappa = abs(plus + minus - 2 * clean) / (2 * r.eps[n] ** 2)
            h[n] = (h[n] + alpha * h[n] * (kappa * z[n].square() - 1)).clamp(low, high)
        r.move({n: -r.lr[n] * g[n] * z[n] / h[n].sqrt() for n in z})

    return step


def dizo(
    every: int, inner: int, inner_eps: float, inner_lr: float, tau: float, layers: Sequence[str], learn: str = "forward"
) -> Callable[[Reference, Sequence[int]], None]:
    """A step and, at the end of every `every`-th, the projection: on the same loss, from where the step has led."""

    def step(r: Reference, tags: Sequence[int]) -> None:
        if not r.step:
            r.memory = {n: r.theta[n].clone() for n in layers}
        sgd(estimate_two_sided)(r, tags)
        if (r.step + 1) % every:
            return
        far, rho = {n: r.theta[n] - r.memory[n] for n in layers}, dict.fromkeys(layers, 1.0)

        def at(rho: dict[str, Any]) -> Tensor:
            return r.loss(r.theta | {n: r.memory[n] + rho[n] * far[n] for n in layers})

        for j in range(inner):
            if learn == "backpropagation":
                free = {n: torch.tensor(rho[n], dtype=torch.float64, requires_grad=True) for n in layers}
                slope = dict(zip(free, map(float, torch.autograd.grad(at(free), list(free.values()))), strict=True))
            else:
                z = {n: float(noise(n, (), tags[0] + 1 + j)) for n in layers}
                ends = [float(at({n: rho[n] + side * inner_eps * z[n] for n in layers})) for side in (1, -1)]
                slope = {n: (ends[0] - ends[1]) / (2 * inner_eps) * z[n] for n in layers}
            rho = {n: min(max(rho[n] - inner_lr * slope[n], 1 - tau), 1 + tau) for n in layers}
        for n in layers:
            r.theta[n] = r.memory[n] + rho[n] * far[n]
            r.path += abs(rho[n] - 1) * float(far[n].abs().max())

    return step


def anchored(
    step: Callable[[Reference, Sequence[int]], None], lam: float, every: int
) -> Callable[[Reference, Sequence[int]], None]:
    def whole(r: Reference, tags: Sequence[int]) -> None:
        start = r.memory.setdefault("start", dict(r.theta))
        step(r, tags)
        if (r.step + 1) % every == 0:
            r.theta = {n: t + lam * (start[n] - t) for n, t in r.theta.items()}

    return whole


def scale_free(beta: float, queries: int = 1) -> Callable[[Reference, Sequence[int]], None]:
    """Each g over the root of the average of all steps' mean g^2, of weights beta^age that sum to one."""

    def step(r: Reference, tags: Sequence[int]) -> None:
        zs = [r.z(t) for t in tags]
        gs = [r.two_sided(z) for z in zs] if queries == 1 else [{n: (r.at(z, 1) - r.at({}, 0)) / r.eps[n] for n in z} for z in zs]
        past = r.memory.setdefault("squares", [])
        past.append({n: sum(g[n] ** 2 for g in gs) / len(gs) for n in r.theta})
        weights = [beta**age for age in reversed(range(len(past)))]
        s = {n: math.sqrt(sum(w * m[n] for w, m in zip(weights, past, strict=True)) / sum(weights)) for n in r.theta}
        u, size = average(r, [{n: g[n] / s[n] for n in g} for g in gs], zs)
        r.g = gs[0]["layers.0.weight"]
        r.move({n: -r.lr[n] * u[n] for n in u}, max(r.lr.values()) * size)

    return step


def quantile_clipped(q: float, window: int, least: int) -> Callable[[Reference, Sequence[int]], None]:
    def step(r: Reference, tags: Sequence[int]) -> None:
        past = r.memory.setdefault("past", [])
        r.clip = float(np.quantile(past[-window:], q)) if len(past) >= least else None
        z = r.z(tags[0])
        past.append(abs((r.at(z, 1) - r.at(z, -1)) / (2 * r.eps["layers.0.weight"])))
        sgd(estimate_two_sided)(r, tags)

    return step


# ---- the library's ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One method with small settings.

    Args:
        make: (model, **ZOStep's arguments) -> optimizer.
        reference: one step on a `Reference`.
        forwards: a step, at most.
        sharp: g is divided by less than 2 eps, or not smooth in the losses: errors count this much more.
    """

    make: Callable[..., zk.ZOStep]
    reference: Callable[[Reference, Sequence[int]], None]
    forwards: int = 2
    lr: float = 2e-3
    kind: str = "gaussian"
    modes: tuple[str, ...] = ("scratch", "inplace")
    journal: bool = True
    sharp: float = 1.0


def first_order_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(model.norm.parameters()), lr=FIRST_ORDER_LR)


QV = ("layers.0.weight", "layers.1.weight")
DIZO: dict[str, Any] = {"every": 6, "inner": 3, "inner_eps": 0.1, "inner_lr": 0.5, "tau": 0.2}


def _of(cls: Any, **own: Any) -> Callable[..., zk.ZOStep]:
    def make(model: Any, /, **more: Any) -> zk.ZOStep:
        options = {"seed": SEED, **own, **more}
        if cls is not zk.ForwardGrad:
            options.setdefault("eps", EPS)
        options.setdefault("lr", LR.get(cls, 2e-3))
        optimizer: zk.ZOStep = cls(model, **options)
        return optimizer

    return make


LR: dict[Any, float] = {zk.FZOO: 2e-4, zk.ZOAdam: 1e-3, zk.ZOMomentum: 5e-4}


def _in_subspace(cls: Any, others: str = "dense", **own: Any) -> Callable[..., zk.ZOStep]:
    def make(model: Any, /, **more: Any) -> zk.ZOStep:
        return _of(cls, direction=zk.InputSubspace(given_of(model), others), **own)(model, **more)

    return make


def _hybrid(model: Any, /, **more: Any) -> zk.ZOStep:
    return _of(zk.HybridZO, first_order=first_order_of(model))(model, **more)


def _anchored(cls: Any, lam: float, every: int, **own: Any) -> Callable[..., zk.ZOStep]:
    """Toward what a `Tiny` of the same type and shapes begins with."""

    def make(model: Any, /, **more: Any) -> zk.ZOStep:
        module: Any = model if isinstance(model, Tiny) else more["model"]
        first, second = module.layers
        start = values(Tiny(first.weight.dtype, (first.in_features, first.out_features, second.out_features)))
        return _of(cls, anchor=zk.Anchor(lam, every, start), **own)(model, **more)

    return make


CASES: dict[str, Case] = {
    "mezo": Case(_of(zk.MeZOStep), sgd(estimate_two_sided)),
    "mezo-3": Case(_of(zk.MeZOStep, queries=3), sgd(estimate_two_sided), 6),
    "one-sided": Case(_of(zk.MeZOStep, one_sided=True), sgd(estimate_one_sided), sharp=2),
    "one-sided-3": Case(_of(zk.MeZOStep, one_sided=True, queries=3), sgd(estimate_one_sided), 4, sharp=2),
    "rademacher": Case(_of(zk.MeZOStep, kind="rademacher"), sgd(estimate_two_sided), kind="rademacher"),
    "quantile-clip": Case(_of(zk.MeZOStep, clip=zk.QuantileClip(0.6, 8, 3)), quantile_clipped(0.6, 8, 3)),
    "sign": Case(_of(zk.ZOSignSGD), sign),
    "sign-3": Case(_of(zk.ZOSignSGD, queries=3), sign, 6),
    "momentum": Case(_of(zk.ZOMomentum, beta=0.8), momentum(0.8), lr=5e-4),
    "momentum-2": Case(_of(zk.ZOMomentum, beta=0.8, queries=2), momentum(0.8), 4, lr=5e-4),
    "momentum-recomputed": Case(_of(zk.ZOMomentum, beta=0.8, state="recomputed", history=6), momentum(0.8, history=6), lr=5e-4),
    "adam": Case(_of(zk.ZOAdam, betas=(0.8, 0.95)), adam(0.8, 0.95, 1e-8), lr=1e-3),
    "adam-recomputed": Case(
        _of(zk.ZOAdam, betas=(0.8, 0.95), state="recomputed", history=6), adam(0.8, 0.95, 1e-8, history=6), lr=1e-3
    ),
    "conservative": Case(_of(zk.ZOConservative), conservative, 5),
    "forward": Case(_of(zk.ForwardGrad), forward_gradient, 1, modes=("scratch",)),
    "hybrid": Case(_hybrid, hybrid, 3, journal=False),
    "blockwise": Case(_of(zk.BlockwiseZO), blockwise(lambda k: LAYERS[k % 3])),
    "blockwise-random": Case(
        _of(zk.BlockwiseZO, order="random", every=2), blockwise(lambda k: LAYERS[zk.Blocks(order="random", every=2).at(k, 3, SEED)])
    ),
    "blockwise-patterns": Case(
        _of(zk.BlockwiseZO, by=["bias$", "weight$"], every=3),
        blockwise(lambda k: [n for block in LAYERS for n in block if n.endswith(("bias", "weight")[k // 3 % 2])]),
    ),
    "momentum-blocks": Case(
        _of(zk.ZOMomentum, beta=0.8, blocks=zk.Blocks()), in_blocks(momentum(0.8), lambda k: LAYERS[k % 3]), lr=5e-4
    ),
    "momentum-recomputed-blocks": Case(
        _of(zk.ZOMomentum, beta=0.8, state="recomputed", history=6, blocks=zk.Blocks(order="random")),
        in_blocks(momentum(0.8, history=6), lambda k: LAYERS[zk.Blocks(order="random").at(k, 3, SEED)]), lr=5e-4,
    ),
    "adam-blocks": Case(
        _of(zk.ZOAdam, lr=3e-3, betas=(0.8, 0.95), blocks=zk.Blocks(every=2)), in_blocks(adam(0.8, 0.95, 1e-8), lambda k: LAYERS[k // 2 % 3]), lr=3e-3
    ),
    "adam-recomputed-blocks": Case(
        _of(zk.ZOAdam, lr=3e-3, betas=(0.8, 0.95), state="recomputed", history=6, blocks=zk.Blocks()),
        in_blocks(adam(0.8, 0.95, 1e-8, history=6), lambda k: LAYERS[k % 3]), lr=3e-3,
    ),
    "sparse-mezo": Case(_of(zk.SparseMeZO, quantile=0.6), magnitude_sparse(0.6)),
    "random-sparse": Case(_of(zk.ZOStep, direction=zk.RandomSparse(0.3, 2)), random_sparse(0.3, 2)),
    "layer-scale": Case(_of(zk.ZOStep, direction=zk.LayerScale(estimate="variance", every=7)), layer_scale(7, True)),
    "layer-scale-expectation": Case(_of(zk.ZOStep, direction=zk.LayerScale(estimate="expectation", every=7)), layer_scale(7, False)),
    # Scales of 12 bits: one that falls on the other side of a tie is off by 2^-12; the tolerance of sharp = 8 has 2^-11.
    "layer-scale-gradient": Case(
        _of(zk.ZOStep, direction=zk.LayerScale("gradient", every=5, beta=0.7)), layer_scale(5, True, 0.7), 4, sharp=8
    ),
    "hizoo": Case(_of(zk.HiZOO, alpha=1e-2, low=0.5, high=2.0), hizoo(1e-2, 0.5, 2.0), 3),
    "dizo": Case(_of(zk.DiZO, layers=[r"layers\.\d\.weight"], **DIZO), dizo(layers=QV, **DIZO), 8),
    "dizo-fo": Case(
        _of(zk.DiZO, layers=[r"layers\.\d\.weight"], learn="backpropagation", **DIZO),
        dizo(layers=QV, learn="backpropagation", **DIZO),
        5,
    ),
    "lozo": Case(_of(zk.LOZO, rank=2, every=5), lozo(2, 5)),
    # The sum over the queries is rounded to 12 bits: 2^-12, and as much for what each U lost by it in the forwards.
    "lozo-3": Case(_of(zk.LOZO, rank=2, every=5, estimator=zk.TwoSided(3), lr=8e-3), lozo(2, 5), 6, lr=8e-3, sharp=8),
    "input-subspace": Case(_in_subspace(zk.MeZOStep), along(subspace_or_dense, sgd(estimate_two_sided))),
    "input-subspace-still-3": Case(
        _in_subspace(zk.MeZOStep, "still", queries=3), along(subspace, sgd(estimate_two_sided)), 6, sharp=8
    ),
    "input-subspace-fzoo": Case(
        _in_subspace(zk.FZOO, queries=4), along(subspace_or_dense, fzoo), 5, lr=2e-4, kind="rademacher", sharp=8
    ),
    # N is rounded to 12 bits for each update, and what carries it to the next V too: 2^-13 each, where a coefficient has 2^-17.
    "lozo-m": Case(_of(zk.LOZO, rank=2, every=5, momentum=0.8, lr=4e-3), lozo_momentum(2, 5, 0.8), lr=4e-3, sharp=8),
    "scale-free": Case(_of(zk.MeZOStep, scale_free=zk.ScaleFree(0.8)), scale_free(0.8), lr=2e-3, sharp=2),
    "scale-free-3": Case(
        _of(zk.MeZOStep, one_sided=True, queries=3, scale_free=zk.ScaleFree(0.8)), scale_free(0.8, 3), 4, lr=2e-3, sharp=4
    ),
    "anchored": Case(_anchored(zk.MeZOStep, 0.0625, 2), anchored(sgd(estimate_two_sided), 0.0625, 2)),
    "anchored-momentum": Case(
        _anchored(zk.ZOMomentum, 0.03125, 2, beta=0.8), anchored(momentum(0.8), 0.03125, 2), lr=5e-4
    ),
    "ranked": Case(_of(zk.ZOStep, estimator=zk.Shaped(4)), functools.partial(shaped, shape="ranked", mirrored=False), 4),
    "z-scored-mirrored": Case(
        _of(zk.ZOStep, estimator=zk.Shaped(2, "z-scored", True), lr=2e-4), functools.partial(shaped, shape="z-scored", mirrored=True), 4, lr=2e-4, sharp=2
    ),
    "fzoo": Case(_of(zk.FZOO, queries=4), fzoo, 5, lr=2e-4, kind="rademacher", sharp=2),
}  # fmt: skip
EVERY = [(name, mode) for name, case in CASES.items() for mode in case.modes]


def in_turn(runs: Sequence[tuple[str, str]], what: Sequence[Any]) -> list[tuple[str, str, Any]]:
    """Each (name, mode) with some of `what`: a name meets all of it, half in each of its modes, as a mode does over the names."""
    names, modes = list(dict.fromkeys(name for name, _ in runs)), ("scratch", "inplace")
    alone = {name for name in names if len([run for run in runs if run[0] == name]) == 1}
    return [
        (name, mode, one)
        for name, mode in runs
        for k, one in enumerate(what)
        if name in alone or (k + names.index(name) + modes.index(mode)) % 2 == 0
    ]


JOURNALED = [(name, mode) for name, mode in EVERY if CASES[name].journal]
