"""A step runs the same kernels whether it is an optimizer's first or a later one: a run that is resumed ends with the bits of one that is not.

Belongs here: modules whose kernels depend on more than the values they are given. Does not belong here: what the kernels compute
(test_views.py), how a journal is read (test_journal_run.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits

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
    other._view.held = {id(model.head.weight): other._view.shadows[id(model.head.weight)]}  # type: ignore[union-attr]
    other.step(closure)
    assert all(same_bits(a, b) for a, b in zip([t for s in seen[:2] for t in s], [t for s in seen[2:] for t in s], strict=True))
