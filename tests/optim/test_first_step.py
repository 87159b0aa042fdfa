"""A step runs the same kernels whether it is an optimizer's first or a later one: a run that is resumed ends with the bits of one that is not.

Belongs here: modules whose kernels depend on more than the values they are given, reads past modules' attributes in whichever step. Does not
belong here: what the kernels compute
(test_views.py), how a journal is read (test_journal_run.py).
"""

from __future__ import annotations

import contextlib
import copy
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from zo_kernels.views import reads

WIDTH = 16


class First(nn.Module):
    """The first result of modules that give several."""

    def __init__(self, module: nn.Module, arguments: int = 1, **more: Any) -> None:
        super().__init__()
        self.module, self.arguments, self.more = module, arguments, more

    def forward(self, x: Tensor) -> Tensor:
        return self.module(*[x] * self.arguments, **self.more)[0]


def layer(**more: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True, **more)


PADDING = torch.arange(9).expand(6, 9) >= torch.tensor([9, 7, 5, 9, 3, 9]).unsqueeze(1)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(layer(), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=PADDING).masked_fill(PADDING.unsqueeze(2), 0.0)


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(WIDTH, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.Conv1d(24, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2))


def test_torch_is_ready_before_the_first_step() -> None:
    """To name a step: what it imports there, before our part of the step, keeps to itself whatever a signal's handler raises, and a time limit
    would be lost. For forward gradients: torch compiles its decompositions where a process makes its first dual number. A signal in the closure
    would cut that short, and be another error."""
    code = (
        "import sys, torch, zo_kernels as zk; zk.MeZOStep(torch.nn.Linear(2, 2), 1e-3);"
        "print(getattr(torch.autograd.profiler, '_cupti_monitor_checked', True));"
        "zk.ForwardGrad(torch.nn.Linear(2, 2), 1e-3);"
        "print('torch._decomp.decompositions_for_jvp' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == [
        "True",
        "True",
    ]


def test_a_signal_waits_while_torch_makes_its_first_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports its compiler there, which is not to be had a second time in a process where that was cut short."""
    add, ended = torch.optim.Optimizer.add_param_group, []

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGALRM)
        add(*arguments)
        ended.append(True)

    def expired(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(torch.optim.Optimizer, "add_param_group", interrupted)
    before = signal.signal(signal.SIGALRM, expired)
    try:
        with pytest.raises(TimeoutError):
            zk.MeZOStep(nn.Linear(2, 2), 1e-3)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: First(nn.MultiheadAttention(WIDTH, 4, batch_first=True), 3, need_weights=False),
    "layer": layer,
    "norm first": lambda: layer(norm_first=True),
    "encoder with padding": Padded,
    "convolutions": Channels,
    "lstm": lambda: First(nn.LSTM(WIDTH, 12, batch_first=True)),
    "gru": lambda: First(nn.GRU(WIDTH, 12, batch_first=True)),
}
# scratch: everything fits and modules hold values; small: a launch a call.
WAYS: dict[str, dict[str, Any]] = {
    "inplace": {"perturbation": "inplace"},
    "lazy": {"perturbation": "inplace", "lazy": True},
    "scratch": {"perturbation": "scratch"},
    "small": {"perturbation": "scratch", "scratch_bytes": 1},
}


def run(build: Callable[[], nn.Module], method: Callable[[nn.Module], Any], dtype: torch.dtype, stops: list[int]) -> list[Tensor]:
    """The weights after the last of `stops`; at each of them the optimizer is closed and the run resumed."""
    for stop in stops:
        torch.manual_seed(0)
        model = build().to(dtype).eval()
        step = method(model)
        while step.steps < stop:
            x = torch.randn(6, 9, WIDTH, generator=torch.Generator().manual_seed(step.steps)).to(dtype)
            step.step(lambda: model(x).float().square().mean())  # noqa: B023
        step.flush()
        step.close_journal()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "way"),
    # torch has no forward-mode derivative of recurrent modules
    [(kind, way) for kind in MODELS for way in [*WAYS, "forward gradient"] if way in WAYS or kind not in ("lstm", "gru")],
)
def test_a_resumed_run_has_the_bits_of_one_that_is_not(kind: str, way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def optimizer(name: str) -> Callable[[nn.Module], Any]:
        options: dict[str, Any] = {"lr": 1e-2, "seed": 4, "journal": tmp_path / name, "resume": True}
        if way == "forward gradient":
            return lambda m: zk.ForwardGrad(m, **options)
        return lambda m: zk.MeZOStep(m, eps=1e-2, **options, **WAYS[way])

    whole = run(MODELS[kind], optimizer("whole.zoj"), dtype, [4])
    parts = run(MODELS[kind], optimizer("parts.zoj"), dtype, [1, 3, 4])
    assert all(same_bits(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("kind", ["layer", "encoder with padding"])
def test_every_way_runs_the_same_kernels(kind: str) -> None:
    """The first loss of a step, at the same weights, from its first step to its last."""
    seen: dict[str, list[float]] = {}
    x = torch.randn(6, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    for way, options in WAYS.items():
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
        step = zk.MeZOStep(model, lr=0.0, eps=1e-2, seed=4, **options)
        losses = seen[way] = []
        step.step(lambda: losses.append(float(model(x).square().mean())) or losses[-1])  # noqa: B023
    assert len({losses[0] for losses in seen.values()}) == 1
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_matrix_in_parts_stays_in_parts_when_it_is_held() -> None:
    """A weight that is found in the first step to be read past its module's attribute."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(40, 700)
            self.kept = [self.head.weight]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).float().logsumexp(1).mean() + self.kept[0].float().mean()

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 40)
    step, seen = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch", scratch_bytes=50_000), []

    def closure() -> Tensor:
        seen.append((model.head(x), model(x)))
        return seen[-1][1]

    state = step.state_dict()
    with pytest.warns(UserWarning, match="1 parameters"):
        step.step(closure)
    step.load_state_dict(state)  # the same direction again, by a new view
    other = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch", scratch_bytes=50_000)
    other._views.now.forward.held = {id(model.head.weight): other._views.now.shadows[id(model.head.weight)]}  # type: ignore[union-attr]
    other.step(closure)
    assert all(same_bits(a, b) for a, b in zip([t for s in seen[:2] for t in s], [t for s in seen[2:] for t in s], strict=True))


# ---- reads past the modules' attributes -------------------------------------------------------------------------------------------------


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


def weights(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


def plain(p: nn.Parameter) -> nn.Parameter:
    assert type(p) is nn.Parameter
    return p


def functional(model: nn.Module) -> Tensor:
    values = {name: p.detach() for name, p in model.named_parameters()}
    return torch.func.functional_call(model, values, (torch.ones(2, 12, dtype=weights(model)[0].dtype),)).float().sum()


READERS: dict[str, Callable[[nn.Module], Tensor]] = {
    "powers": lambda m: sum((p.pow(2).sum() for p in m.parameters()), torch.zeros(())),
    "one of them": lambda m: weights(m)[3].float().sum() + weights(m)[0].float().sum(),
    "a vector": lambda m: nn.utils.parameters_to_vector(m.parameters()).float().square().sum(),
    "norms": lambda m: torch.stack(torch._foreach_norm(weights(m))).sum(),
    "data": lambda m: torch.cat([p.data.view(-1) for p in m.parameters()]).float().sum(),
    "detached": lambda m: sum((p.detach().clone().float().sum() for p in m.parameters()), torch.zeros(())),
    "numpy": lambda m: torch.tensor(sum(float(p.detach().float().numpy().sum()) for p in m.parameters())),
    "a state": lambda m: torch.stack([t.float().square().sum() for t in m.state_dict().values()]).sum(),
    "copies": lambda m: torch.stack([plain(copy.deepcopy(p)).float().square().sum() for p in m.parameters()]).sum(),
    "functional call": functional,
    "an operator": lambda m: torch.ops.aten.linear(torch.ones(2, 12, dtype=weights(m)[0].dtype), *weights(m)[:2]).float().sum(),
    "a function": lambda m: Times.apply(weights(m)[0], 2.0).float().sum(),
}


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
        return x * k


@pytest.mark.filterwarnings("ignore:scratch mode")
@pytest.mark.parametrize("begin", [0, 2, 3, 5], ids=lambda k: f"in forward {k}")
@pytest.mark.parametrize("size", [1, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_a_read_past_the_attributes_counts_whenever_it_begins(reader: str, dtype: torch.dtype, size: int, begin: int) -> None:
    """Every loss is that of a copy with perturbed weights, before, in and after the forward of the first such read; in one of the two forwards too."""
    model, x, seen = net(dtype), torch.randn(4, 12).to(dtype), []

    def loss(m: nn.Module, n: int) -> float:
        out = m(x).float().square().mean() + (READERS[reader](m).float() if n >= begin and n != begin + 2 else 0.0)
        return (out + m(x).float().mean()).item()

    def closure() -> float:
        seen.append(loss(model, len(seen)))
        return seen[-1]

    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, seed=3, perturbation="scratch", scratch_bytes=size)
    before = [p.detach().clone() for p in weights(model)]
    for _ in range(4):
        step.step(closure)
        assert all(type(p) is nn.Parameter for p in weights(model))
    assert all(same_bits(p.detach(), b) for p, b in zip(weights(model), before, strict=True))
    for n, got in enumerate(seen):
        other = copy.deepcopy(model)
        pairs = list(other.named_parameters())
        zk.perturb_(
            [p for _, p in pairs], [(n // 2, (1, -1)[n % 2] * 1e-2)], seed=3, streams=[zk.stream_of(name) for name, _ in pairs]
        )
        assert loss(other, n) == got, n
    assert len(set(seen)) == 8


@pytest.mark.filterwarnings("ignore:scratch mode")
@pytest.mark.parametrize("begin", [0, 1])
def test_a_compiled_function_is_given_a_parameter(begin: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: (p * 2).sum(), backend="eager")
    found: dict[str, list[float]] = {}
    for way in ("inplace", "scratch"):
        model = net()
        step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation=way)
        found[way] = []
        for k in range(3):
            step.step(lambda: model(torch.ones(1, 12)).sum() + (compiled(weights(model)[0]) if k >= begin else 0.0))  # noqa: B023
            found[way].append(float(step.projected_gradient))
    assert found["scratch"] == pytest.approx(found["inplace"], abs=1e-2)


@pytest.mark.filterwarnings("ignore:scratch mode")
@pytest.mark.parametrize("begin", [0, 1])
def test_parameters_made_in_inference_mode_are_held(begin: int) -> None:
    with torch.inference_mode():
        model = net()
    before, seen = [p.detach().clone() for p in weights(model)], []
    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch")
    for k in range(3):
        step.step(lambda: seen.append(float(weights(model)[0].sum()) if k >= begin else 0.0) or model(torch.ones(1, 12)).sum())  # noqa: B023
        assert all(same_bits(p.detach(), b) for p, b in zip(weights(model), before, strict=True))
    assert len(set(seen[2 * begin :])) == 6 - 2 * begin


@pytest.mark.filterwarnings("ignore:scratch mode")
def test_an_alias_kept_from_a_step_counts_in_later_ones() -> None:
    model, kept, seen = net(), [], []

    def closure() -> float:
        kept[:] = kept or [model.state_dict(), [p.data for p in model.parameters()]]
        seen.append(0.0 if step.steps < 2 else sum(float(t.sum()) for t in (*kept[0].values(), *kept[1])))
        return seen[-1]

    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch")
    for _ in range(4):
        step.step(closure)
        assert all(type(t) is Tensor for t in (*kept[0].values(), *kept[1]))
    assert len(set(seen[4:])) == 4
    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch")
    step.step(lambda: model(torch.ones(1, 12)).sum())
    del kept[:]
    assert not step._views.now.reads.aliases  # type: ignore[union-attr]


def test_what_reads_no_value_holds_nothing(recwarn: pytest.WarningsRecorder, tmp_path: Path) -> None:
    """Shapes, gradients, flags; and a state that is saved has the clean weights, in every step."""
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def closure() -> Tensor:
        for p in model.parameters():
            assert isinstance(p, nn.Parameter)
            assert (p.shape, p.dtype, p.device, p.numel(), p.is_contiguous()) == (
                p.size(),
                torch.float32,
                torch.device("cpu"),
                len(p) * (p.nbytes // 4 // len(p)),
                True,
            )
            assert p.grad is None
            p.requires_grad_(True)
            assert p in {p}
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.save(model.state_dict(), tmp_path / "m.pt")
        saved = torch.load(tmp_path / "m.pt")
        assert all(type(t) is Tensor and same_bits(t, before[n]) for n, t in saved.items())
        return model(torch.ones(1, 12)).sum()

    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch")
    for _ in range(3):
        step.step(closure)
    assert not step._views.now.forward.held  # type: ignore[union-attr]
    assert not recwarn.list


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("later", [0, 1])
def test_a_failed_read_leaves_classes_and_weights(later: int, failure: type[BaseException]) -> None:
    model, calls = net(), 0
    before = [p.detach().clone() for p in weights(model)]

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if step.steps == later:
            weights(model)[0].sum(), weights(model)[1].data
            if calls % 2 == 0:
                raise failure
        return model(torch.ones(1, 12)).sum()

    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch")
    for _ in range(later):
        step.step(closure)
    with pytest.raises(failure):
        step.step(closure)
    assert all(type(p) is nn.Parameter and same_bits(p.detach(), b) for p, b in zip(weights(model), before, strict=True))
    assert not step._views.now.forward.held  # type: ignore[union-attr]
    assert not reads._under_way


def test_another_thread_is_refused_and_may_ask_for_a_state() -> None:
    model, got = net(), []

    def closure() -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            got.append(pool.submit(lambda: [t.clone() for t in model.state_dict().values()]).result())
            if step.steps:
                pool.submit(lambda: weights(model)[0].sum()).result()
        return model(torch.ones(1, 12)).sum()

    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch")
    step.step(closure)
    assert all(same_bits(a, p.detach()) for a, p in zip(got[0], weights(model), strict=True))
    with pytest.raises(RuntimeError, match=r"in another thread.*0\.weight"):
        step.step(closure)
    assert all(type(p) is nn.Parameter for p in weights(model))


@pytest.mark.parametrize("begin", [0, 1, 2])
@pytest.mark.parametrize("reader", ["powers", "data", "beside a shadow"])
def test_forward_gradients_refuse_reads_past_the_attributes(reader: str, begin: int) -> None:
    model = net()
    first = weights(model)[1]
    read = READERS.get(reader, lambda m: nn.functional.linear(torch.ones(1, 12), m[0].weight, first).sum())
    step = zk.ForwardGrad(model, lr=0.0)
    for k in range(3):
        before = [p.detach().clone() for p in weights(model)]
        with pytest.raises(RuntimeError, match="past its module's attributes") if k == begin else contextlib.nullcontext():
            step.step(lambda: model(torch.ones(1, 12)).sum() + (read(model) if k == begin else 0.0))  # noqa: B023
        assert all(type(p) is nn.Parameter and same_bits(p.detach(), b) for p, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("kind", ["scripted", "nobody's"])
def test_forward_gradients_refuse_weights_that_no_module_shows(kind: str) -> None:
    """A scripted module's, and one that is in no module: they would move without ever having had a tangent."""
    model, more = net(), [] if kind == "scripted" else [("more", nn.Parameter(torch.ones(2)))]
    if kind == "scripted":
        model[2] = torch.jit.script(nn.Linear(40, 3))
    with pytest.raises(RuntimeError, match=r"is no module's attribute.*forward gradients"):
        zk.ForwardGrad([*model.named_parameters(), *more], lr=1e-2, model=model)


@pytest.mark.filterwarnings("ignore:scratch mode")
def test_parameters_of_classes_of_their_own() -> None:
    class Mine(nn.Parameter):
        pass

    model, seen = net(), []
    model[0].weight = Mine(model[0].weight.detach())
    model[2].weight = nn.Parameter(model[2].weight.detach())

    def closure() -> float:
        total = sum(float(p.sum()) for p in model.parameters()) if len(seen) >= 2 else 0.0
        assert isinstance(next(model.parameters()), Mine)
        seen.append(float(model(torch.ones(1, 12)).sum()) + total)
        return seen[-1]

    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch")
    for _ in range(3):
        step.step(closure)
    assert [type(p) for p in model.parameters()] == [Mine, *[nn.Parameter] * 3]
    assert len(step._views.now.forward.held) == 4  # type: ignore[union-attr]
    assert len(set(seen)) == 6
