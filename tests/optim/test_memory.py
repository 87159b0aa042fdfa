"""What each method holds between steps and makes within one, counted in tensors.

Belongs here: bytes. Does not belong here: what is in them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zo_kernels as zk
from zo_kernels.optim import findings

WIDTH, DEPTH = 64, 6
LAYER = WIDTH * WIDTH
PAD = 256  # bytes: where a buffer starts
FEW = 2048  # bytes for numbers, tables and handles, whatever the model's size: an eighth of a layer


class Stack(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)]).to(dtype)
        self.x = torch.randn(3, WIDTH).to(dtype)

    def forward(self) -> Tensor:
        h = self.x
        for layer in self.layers:
            h = layer(h).tanh()
        return h.float().square().mean()


Make = Callable[..., zk.ZOStep]
RANK, QUERIES = 2, 3
GIVEN = zk.InputFactors({f"layers.{k}.weight": torch.eye(WIDTH, RANK) for k in range(DEPTH)})
# Bytes that a weight costs besides its own, or 0; `b` is the size of a weight.
HELD: dict[str, tuple[Make, Callable[[int], float]]] = {
    "mezo": (zk.MeZOStep, lambda b: 0),
    "queries": (lambda m, lr, **k: zk.MeZOStep(m, lr, queries=QUERIES, **k), lambda b: 0),
    "one-sided": (lambda m, lr, **k: zk.MeZOStep(m, lr, one_sided=True, queries=QUERIES, **k), lambda b: 0),
    "quantiles": (lambda m, lr, **k: zk.MeZOStep(m, lr, clip=zk.QuantileClip(0.9, 100, 2), **k), lambda b: 0),
    "scale-free": (lambda m, lr, **k: zk.MeZOStep(m, lr, scale_free=zk.ScaleFree(), **k), lambda b: 0),
    "sign": (zk.ZOSignSGD, lambda b: 0),
    "conservative": (zk.ZOConservative, lambda b: 0),
    "fzoo": (lambda m, lr, **k: zk.FZOO(m, lr, queries=QUERIES, **k), lambda b: 0),
    "ranked": (lambda m, lr, **k: zk.ZOStep(m, lr, estimator=zk.Shaped(QUERIES), **k), lambda b: 0),
    "blockwise": (zk.BlockwiseZO, lambda b: 0),
    "forward": (zk.ForwardGrad, lambda b: 0),
    "random-sparse": (lambda m, lr, **k: zk.ZOStep(m, lr, direction=zk.RandomSparse(0.1, 2), **k), lambda b: 0),
    "layer-scale": (lambda m, lr, **k: zk.ZOStep(m, lr, direction=zk.LayerScale(every=2), **k), lambda b: 0),
    "momentum": (zk.ZOMomentum, lambda b: 4),
    "momentum, bfloat16": (lambda m, lr, **k: zk.ZOMomentum(m, lr, state_dtype="bfloat16", **k), lambda b: 2),
    "momentum, recomputed": (lambda m, lr, **k: zk.ZOMomentum(m, lr, state="recomputed", **k), lambda b: 0),
    "adam": (zk.ZOAdam, lambda b: 8),
    "adam, bfloat16": (lambda m, lr, **k: zk.ZOAdam(m, lr, state_dtype="bfloat16", **k), lambda b: 6),
    "adam, recomputed": (lambda m, lr, **k: zk.ZOAdam(m, lr, state="recomputed", **k), lambda b: 0),
    "hizoo": (zk.HiZOO, lambda b: 4),
    "sparse-mezo": (zk.SparseMeZO, lambda b: 1 / 8),
    "dizo, a third of the layers": (lambda m, lr, **k: zk.DiZO(m, lr, every=2, inner=2, layers=[r"layers\.[14]"], **k), lambda b: b / 3),
    "dizo by backpropagation": (
        lambda m, lr, **k: zk.DiZO(m, lr, every=2, inner=2, layers=[r"layers\.[14]"], learn="backpropagation", **k), lambda b: b / 3
    ),
    "lozo, momentum": (
        lambda m, lr, **k: zk.LOZO(m, lr, rank=RANK, every=2, momentum=0.9, **k), lambda b: 4 * RANK * 3 * WIDTH / LAYER
    ),
    "lozo": (lambda m, lr, **k: zk.LOZO(m, lr, rank=RANK, every=2, **k), lambda b: 4 * RANK * 2 * WIDTH / LAYER),
    "input subspace": (
        lambda m, lr, **k: zk.MeZOStep(m, lr, queries=QUERIES, direction=zk.InputSubspace(GIVEN), **k),
        lambda b: 4 * RANK * 2 * WIDTH / LAYER,
    ),
}  # fmt: skip
STATELESS = [name for name, (_, held) in HELD.items() if not held(2)]


@pytest.fixture(scope="module")
def frozen() -> Iterator[None]:
    """What was there before these tests is no object of the collector's, which then is quick; each test tells its own tensors from earlier ones.
    So are the modules that torch imports for a process's first optimizer and first dual numbers."""
    zk.ForwardGrad(nn.Linear(1, 1), 1e-3)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def storages() -> dict[int, int]:
    """Bytes of the tensors that were made since, and are alive, by the address of their memory."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and o.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}


def optimizer_of(name: str, model: Stack, mode: str) -> zk.ZOStep:
    """In scratch mode with a buffer of one layer."""
    more: dict[str, Any] = {"scratch_bytes": LAYER * model.x.itemsize} if mode == "scratch" else {}
    return HELD[name][0](model, 1e-4, seed=1, perturbation=mode, **more)


CASES = [(name, mode) for name in HELD for mode in ("scratch", "inplace") if (name, mode) != ("forward", "inplace")]


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_bytes_between_steps(name: str, mode: str, dtype: torch.dtype) -> None:
    """As documented for each weight; and the scratch buffer, whose size is the caller's choice. The stateless methods hold nothing of a layer's size."""
    model = Stack(dtype)
    before = storages()
    step = optimizer_of(name, model, mode)
    for _ in range(6):
        step.step(model)
    assert step.skipped == 0
    new = {address: size for address, size in storages().items() if address not in before}
    weights = DEPTH * LAYER
    want = HELD[name][1](dtype.itemsize) * weights
    buffer = LAYER * dtype.itemsize + PAD if mode == "scratch" else 0
    buffers = 2 * buffer if name == "blockwise" else buffer  # a block that fits whole is held by its modules, beside the buffer
    assert want <= sum(new.values()) <= want + buffers + FEW, sorted(new.values())[-5:]
    if name in STATELESS:
        assert max(new.values()) <= max(buffer, FEW)


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that an operation made."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.bytes = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and not t._is_zerotensor() and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


# Sparse-MeZO, DiZO, LayerScale and the pass with a state make what they need of one layer, at most in fp32 (sums of squares: float64).
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_bytes_within_a_step(name: str, mode: str, dtype: torch.dtype) -> None:
    """Nothing is ever made that is larger than a layer, the first step and those that renew masks, scales and factors included."""
    model = Stack(dtype)
    step = optimizer_of(name, model, mode)
    with Largest({p.untyped_storage().data_ptr() for p in model.parameters()}) as largest:
        for _ in range(5):
            step.step(model)
    whole = 8 * LAYER if name == "layer-scale" else 4 * LAYER
    assert 0 < largest.bytes <= whole + PAD
    if mode == "inplace" and name in IN_ONE_PASS:
        # The first step of 16-bit weights looks at a few elements of each tensor, in float64, and at one number more.
        looked = 8 * (sum(min(p.numel(), findings.SAMPLE) for p in model.parameters()) + 1)
        assert largest.bytes <= (max(FEW, looked) if dtype == torch.bfloat16 else FEW)


@pytest.mark.usefixtures("frozen")
def test_squares_are_summed_in_parts() -> None:
    """Of a parameter as large as an embedding the float64 copies of all its weights would be a peak of their own, in one step of `every`."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(3 << 20))
    step = zk.ZOStep(model, 1e-4, seed=1, perturbation="inplace", direction=zk.LayerScale())
    with Largest({model.w.untyped_storage().data_ptr()}) as largest:
        step.step(lambda: model.w[:8].square().sum())
    assert 0 < largest.bytes <= 8 << 20


IN_ONE_PASS = (
    "mezo",
    "queries",
    "one-sided",
    "sign",
    "conservative",
    "fzoo",
    "ranked",
    "blockwise",
    "random-sparse",
    "momentum, recomputed",
    "adam, recomputed",
)
