"""The step rule against an independent, obvious float64 implementation, and its life as a torch optimizer."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.models import loss_of, make, tokens

MODES = ("inplace", "scratch")


class Cubic(nn.Module):
    """A smooth loss of a few parameters, cheap enough for many steps and exact enough in float64."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.linear = nn.Linear(7, 5).to(dtype)
        self.norm = nn.LayerNorm(5).to(dtype)
        self.x = torch.randn(11, 7, generator=g, dtype=torch.float64).to(dtype)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g).to(dtype)

    def forward(self) -> Tensor:
        h = nn.functional.linear(self.x.double(), self.linear.weight.double(), self.linear.bias.double())
        return nn.functional.layer_norm(h, (5,), self.norm.weight.double(), self.norm.bias.double()).pow(3).mean()


def reference_step(
    theta: dict[str, Tensor], loss: Any, tag: int, seed: int, lr: float, eps: float, decay: dict[str, float]
) -> float:
    """Algorithm 1 of the MeZO paper in float64, with z from `zo_kernels.normal`."""
    z = {n: zk.normal(t.shape, seed=seed, stream=zk.stream_of(n), tag=tag, backend="reference").double() for n, t in theta.items()}
    plus = loss({n: t + eps * z[n] for n, t in theta.items()})
    minus = loss({n: t - eps * z[n] for n, t in theta.items()})
    g = float(plus - minus) / (2 * eps)
    for n in theta:
        theta[n] = (1 - lr * decay[n]) * theta[n] - lr * g * z[n]
    return g


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_equal_the_float64_reference(mode: str, weight_decay: float) -> None:
    """One step and fifty, with a tolerance that grows as the path does. Each step's coefficient has 17 significant bits (numerics.md), so
    a step lr |g z| is off by 2^-17 of itself and, through eps, by as much again; the loss is float64 but theta ± eps z are fp32,
    which moves g by about |grad| sqrt(50) 2^-25 / eps, below 2^-16 |g|-sized steps; rounding the update adds 2^-24. |z| <= 4.5 here. The
    curvature may amplify what is there: a factor 4 over the whole path."""
    model = Cubic()
    seed, lr, eps, path = 12345, 1e-3, 0.1, 0.0
    theta = {n: p.detach().double() for n, p in model.named_parameters()}
    decay = {n: weight_decay if n == "linear.weight" else 0.0 for n in theta}  # biases and norms by class: none
    x = model.x.double()

    def loss(t: dict[str, Tensor]) -> Tensor:
        h = nn.functional.linear(x, t["linear.weight"], t["linear.bias"])
        return nn.functional.layer_norm(h, (5,), t["norm.weight"], t["norm.bias"]).pow(3).mean()

    step = zk.MeZOStep(model, lr=lr, eps=eps, seed=seed, weight_decay=weight_decay, perturbation=mode)
    for k in range(50):
        g = reference_step(theta, loss, k, seed, lr, eps, decay)
        step.step(model)
        if k == 0:
            assert step.projected_gradient.item() == pytest.approx(g, rel=1e-4, abs=1e-5)
        path += lr * (abs(g) + weight_decay) * 4.5
        tolerance = 4 * (2**-16 * path + (k + 1) * 2**-22)
        for n, p in model.named_parameters():
            assert torch.allclose(p.double(), theta[n], atol=tolerance, rtol=0), (k, n)


def test_groups_have_their_own_lr_eps_and_decay() -> None:
    model = Cubic()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pairs = dict(model.named_parameters())
    groups = [
        {"params": [("linear.weight", pairs["linear.weight"])], "lr": 0.1, "eps": 1e-2, "weight_decay": 0.5},
        {"params": [("linear.bias", pairs["linear.bias"])], "lr": 0.0},
        {"params": [("norm.weight", pairs["norm.weight"])], "eps": 5e-2},
    ]
    step = zk.MeZOStep(groups, lr=0.01, eps=1e-3, seed=9, model=model)
    shifted = []
    losses = []

    def closure() -> Tensor:
        shifted.append({n: (getattr(getattr(model, n.split(".")[0]), n.split(".")[1]) + 0.0) for n in pairs})
        losses.append(model().double())
        return losses[-1]

    step.step(closure)
    z = {n: zk.normal(p.shape, seed=9, stream=zk.stream_of(n), tag=0) for n, p in pairs.items()}
    d = (losses[0] - losses[1]).item()
    for n, (lr, eps, wd) in {
        "linear.weight": (0.1, 1e-2, 0.5),
        "linear.bias": (0.0, 1e-3, 0.0),
        "norm.weight": (0.01, 5e-2, 0.0),
    }.items():
        assert torch.allclose(shifted[0][n], before[n] + eps * z[n], atol=1e-6)
        move = -lr * d / (2 * eps) * z[n]
        want = (1 - lr * wd) * before[n] + move
        assert torch.allclose(pairs[n], want, atol=1e-6 + 2**-17 * float(move.abs().max())), n  # coefficients have 17 bits
    assert torch.equal(pairs["norm.bias"], before["norm.bias"]), "not in any group"


def test_group_masks_and_scales() -> None:
    model = Cubic()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    keep = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    names = [n for n, _ in model.named_parameters()]
    step = zk.MeZOStep(
        [{"params": list(model.named_parameters()), "mask": {"linear.weight": keep, "linear.bias": zk.RandomMask(0.4, 3)}, "scale": {"norm.weight": 0.0}}],
        lr=1e-2, eps=1e-2, model=model,
    )  # fmt: skip
    step.step(model)
    after = dict(model.named_parameters())
    assert torch.equal(after["linear.weight"] == before["linear.weight"], ~keep)
    assert torch.equal(after["norm.weight"], before["norm.weight"])
    assert not torch.equal(after["norm.bias"], before["norm.bias"])
    assert names


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_averages_micro_batches(mode: str) -> None:
    """One z over all micro-batches, losses averaged, one update: the same as one closure over the whole batch."""
    a, b = make("llama"), make("llama")
    ids = tokens(4, 9)
    whole = zk.MeZOStep(a, lr=1e-3, eps=1e-2, perturbation=mode)
    parts = zk.MeZOStep(b, lr=1e-3, eps=1e-2, perturbation=mode)
    loss = whole.step(lambda: torch.stack([loss_of(a, ids[:2]).double(), loss_of(a, ids[2:]).double()]).mean())
    accumulated = parts.step(lambda batch: loss_of(b, batch), [ids[:2], ids[2:]])
    assert loss == accumulated
    assert all(same_bits(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_two_forwards_share_their_random_state_and_the_caller_keeps_one() -> None:
    model = Cubic()
    step = zk.MeZOStep(model, lr=0.0)
    draws: list[float] = []

    def closure() -> Tensor:
        draws.append(torch.rand(()).item())
        return model()

    torch.manual_seed(7)
    step.step(closure)
    after = torch.rand(()).item()
    torch.manual_seed(7)
    assert draws == [torch.rand(()).item()] * 2
    assert after == torch.rand(()).item(), "a step consumes what one call of the closure consumes"
    state = torch.get_rng_state()
    step.step(model)
    assert torch.equal(torch.get_rng_state(), state), "the step itself draws nothing"


@pytest.mark.parametrize("value", [3, 2.5, np.float32(1.5), torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2), True])
def test_losses_may_be_anything_float_like(value: Any) -> None:
    loss = zk.MeZOStep(Cubic(), lr=0.1).step(lambda: value)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert float(loss) == float(value)


def test_half_precision_losses_are_differenced_in_float64() -> None:
    model = Cubic()
    values = iter([torch.tensor(1.0 + 2**-23), torch.tensor(1.0)])
    step = zk.MeZOStep(model, lr=0.0, eps=2.0**-10)
    step.step(lambda: next(values))
    assert step.projected_gradient.item() == 2**-23 / 2**-9


def test_maximize_clip_and_kind() -> None:
    moved = {}
    for name, options in {
        "plain": {},
        "maximize": {"maximize": True},
        "clip": {"clip": 1e-3},
        "rademacher": {"kind": "rademacher"},
    }.items():
        model = Cubic()
        before = model.linear.weight.detach().clone()
        step = zk.MeZOStep(model, lr=1e-2, eps=1e-2, seed=4, perturbation="scratch", **options)
        step.step(model)
        moved[name] = (model.linear.weight.detach() - before, step.projected_gradient.item())
    assert torch.allclose(moved["plain"][0], -moved["maximize"][0], atol=1e-7)
    g = moved["clip"][1]
    assert abs(g) > 1e-3
    assert torch.allclose(moved["clip"][0], moved["plain"][0] * 1e-3 / abs(g), atol=3e-7)
    assert torch.allclose(moved["rademacher"][0].abs(), torch.tensor(1e-2 * abs(moved["rademacher"][1])), rtol=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ConstantLR(o)], milestones=[2]
        ),
    ],
)
def test_every_torch_scheduler_drives_it(scheduler: Any) -> None:
    model = Cubic()
    step = zk.MeZOStep(model, lr=0.1)
    s = scheduler(step)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for _ in range(4):
            before = model.linear.weight.detach().clone()
            loss = step.step(model)
            z = zk.normal((5, 7), seed=0, stream=zk.stream_of("linear.weight"), tag=len(rates))
            rates.append(step.param_groups[0]["lr"])
            move = -rates[-1] * step.projected_gradient.item() * z
            assert torch.allclose(model.linear.weight, before + move, rtol=1e-6, atol=1e-6 + 2**-17 * float(move.abs().max()))
            s.step(loss) if isinstance(s, torch.optim.lr_scheduler.ReduceLROnPlateau) else s.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_exact(mode: str, dtype: torch.dtype) -> None:
    """Six steps in one go, and three + save + load into fresh objects + three: the same bits."""

    def run(model: nn.Module, step: zk.MeZOStep, n: int) -> None:
        for _ in range(n):
            step.step(model)
            step.param_groups[0]["lr"] *= 0.9

    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "seed": 2**63 + 5, "weight_decay": 0.1, "perturbation": mode}
    whole = Cubic(dtype)
    run(whole, zk.MeZOStep(whole, **options), 6)
    first = Cubic(dtype)
    step = zk.MeZOStep(first, **options)
    run(first, step, 3)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "step": step.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Cubic(dtype)
    second.load_state_dict(saved["model"])
    resumed = zk.MeZOStep(second, **{**options, "seed": 0, "lr": 5.0})
    resumed.load_state_dict(saved["step"])
    run(second, resumed, 3)
    assert all(same_bits(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_noise_does_not_depend_on_freezing_order_or_wrapping() -> None:
    def delta(model: nn.Module, source: Any, name: str = "linear.weight") -> Tensor:
        p = model.get_parameter(name)
        before = p.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = zk.MeZOStep(source, lr=1.0, eps=1e-2, kind="rademacher")
        values = iter([1.0, 0.0])
        step.step(lambda: next(values))
        return (p.detach() - before).sign()

    plain = delta(m := Cubic(), m)
    frozen = Cubic()
    frozen.linear.bias.requires_grad_(False)
    frozen.norm.requires_grad_(False)
    assert torch.equal(plain, delta(frozen, frozen))
    m = Cubic()
    assert torch.equal(plain, delta(m, list(reversed(list(m.named_parameters())))))
    wrapped = nn.Sequential()
    wrapped.module = Cubic()  # the attribute that DistributedDataParallel uses
    assert torch.equal(plain, delta(wrapped, wrapped, "module.linear.weight"))


def test_freezing_replacing_and_moving_between_steps() -> None:
    model = Cubic()
    step = zk.MeZOStep(model, lr=1e-2, eps=1e-2)
    step.step(model)
    model.linear.bias.requires_grad_(False)
    before = model.linear.bias.detach().clone()
    model.linear.weight.data = model.linear.weight.data.clone()  # new storage
    weight = model.linear.weight.detach().clone()
    step.step(model)
    assert torch.equal(model.linear.bias, before)
    assert not torch.equal(model.linear.weight, weight)
    model.to(torch.bfloat16)
    model.x = model.x.bfloat16()
    step.step(model)
    assert model.linear.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
def test_memory_that_is_seen_otherwise_between_steps_is_looked_at_anew(mode: str) -> None:
    """A part of a weight begins where the whole did, and so does its transpose: a plan of before would write the rest, or mix up its elements."""
    model, x = nn.Linear(4, 4), torch.randn(5, 4)
    step = zk.MeZOStep(model, lr=1e-2, perturbation=mode)
    step.step(lambda: model(x).square().mean())
    whole = model.weight.data
    model.weight.data, model.bias.data = whole[:3], model.bias.data[:3]
    before = whole.clone()
    step.step(lambda: model(x).square().mean())
    assert torch.equal(whole[3:], before[3:])
    assert not torch.equal(whole[:3], before[:3])
    model.weight.data = whole.t()
    before = whole.clone()
    with pytest.raises(ValueError, match=r"parameter weight of shape \(4, 4\) is not contiguous"):
        step.step(lambda: model(x).square().mean())
    assert torch.equal(whole, before)


def test_version_counters_move() -> None:
    """A tensor saved for backward before the step must not be used after it unnoticed."""
    model = Cubic()
    loss = model.linear.weight.square().sum()
    zk.MeZOStep(model, lr=1e-2).step(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_learns() -> None:
    """Not a formula: loss goes down on a real, small problem."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    y = x[:, :1] * x[:, 1:2]
    step = zk.MeZOStep(model, lr=1e-2, eps=1e-3)
    history = [step.step(lambda: (model(x) - y).square().mean()).item() for _ in range(1500)]
    assert np.mean(history[-50:]) < 0.5 * np.mean(history[:50])


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda m: zk.MeZOStep(m, lr=-1.0), ValueError, "lr=-1.0"),
    (lambda m: zk.MeZOStep(m, lr=float("nan")), ValueError, "lr=nan"),
    (lambda m: zk.MeZOStep(m, lr=0.1, eps=0.0), ValueError, "eps=0.0"),
    (lambda m: zk.MeZOStep(m, lr=0.1, weight_decay=-1), ValueError, "weight_decay=-1"),
    (lambda m: zk.MeZOStep(m, lr=0.1, seed=-1), ValueError, "seed=-1"),
    (lambda m: zk.MeZOStep(m, lr=0.1, seed=2**64), ValueError, "seed="),
    (lambda m: zk.MeZOStep(m, lr=0.1, perturbation="magic"), ValueError, "perturbation='magic'"),
    (lambda m: zk.MeZOStep(m, lr=0.1, rounding="up"), ValueError, "rounding='up'"),
    (lambda m: zk.MeZOStep(m, lr=0.1, clip=0), ValueError, "clip=0"),
    (lambda m: zk.MeZOStep(m, lr=0.1, backend="fpga"), ValueError, "backend='fpga'"),
    (lambda m: zk.MeZOStep(m.requires_grad_(False), lr=0.1), ValueError, "no trainable parameter"),
    (lambda m: zk.MeZOStep(m.to("meta"), lr=0.1), ValueError, "meta device"),
    (lambda m: zk.MeZOStep(m.double(), lr=0.1), TypeError, r"parameter linear\.weight has dtype torch\.float64"),
    (lambda m: zk.MeZOStep([], lr=0.1), ValueError, "params is empty"),
    (lambda m: zk.MeZOStep(m.linear.weight, lr=0.1), TypeError, "params is a Parameter"),
    (lambda m: zk.MeZOStep([torch.zeros(3)], lr=0.1), ValueError, "frozen"),
    (lambda m: zk.MeZOStep([*m.named_parameters()] * 2, lr=0.1), ValueError, "occurs twice"),
    (lambda m: zk.MeZOStep(list(m.named_parameters()), lr=0.1, perturbation="scratch"), ValueError, "needs the module"),
    (lambda m: zk.MeZOStep(m, lr=0.1).step(), TypeError, "closure=None"),
    (lambda m: zk.MeZOStep(m, lr=0.1).step(lambda: None), TypeError, "closure returned None"),
    (lambda m: zk.MeZOStep(m, lr=0.1).step(lambda: torch.ones(2)), TypeError, r"shape \(2,\)"),
    (lambda m: zk.MeZOStep(m, lr=0.1).step(lambda: "loss"), TypeError, "closure returned str"),
    (lambda m: zk.MeZOStep(m, lr=0.1).step(m, []), ValueError, "batches is empty"),
    (lambda m: zk.MeZOStep(m, lr=0.1).load_state_dict(torch.optim.SGD(m.parameters(), lr=0.1).state_dict()), ValueError, "no entry 'zo'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_refused_and_changes_nothing(call: Any, error: type[Exception], match: str) -> None:
    model = Cubic()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        call(model)
    if not next(model.parameters()).is_meta and next(model.parameters()).dtype == torch.float32:
        assert all(torch.allclose(p, before[n], atol=1e-6) for n, p in model.named_parameters())


def test_a_failed_step_can_be_followed_by_a_good_one() -> None:
    model, other = Cubic(), Cubic()
    step = zk.MeZOStep(model, lr=1e-2, perturbation="scratch")
    with pytest.raises(TypeError):
        step.step(lambda: None)
    step.step(model)
    zk.MeZOStep(other, lr=1e-2, perturbation="scratch").step(other)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_compiled_models_are_perturbed_in_place() -> None:
    """A compiled graph does not look attributes up: a shadow would be ignored, and both losses equal."""
    model = Cubic()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"cannot serve a torch\.compile'd module"):
        zk.MeZOStep(compiled, lr=1e-2, perturbation="scratch")
    step = zk.MeZOStep(compiled, lr=1e-2, eps=1e-2)
    step.step(compiled)
    assert step.projected_gradient.item() != 0
    other = Cubic()
    zk.MeZOStep(other, lr=1e-2, eps=1e-2, perturbation="inplace").step(other)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_warnings_are_said_once_and_clearly() -> None:
    model = Cubic(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"16-bit weights without a .* module are perturbed in place"):
        zk.MeZOStep(list(model.named_parameters()), lr=0.1)
    with pytest.warns(UserWarning, match="position in the list"):
        zk.MeZOStep(Cubic().parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zk.MeZOStep(model, lr=0.1, eps=0.1).step(model)
        zk.MeZOStep(list(model.named_parameters()), lr=0.1, perturbation="inplace")
