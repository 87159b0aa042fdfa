"""The net under a rebuild: the bits of whole runs, by method x mode x dtype x rounding, as SHA-256 of weights, state and journal.

`python -m tests.optim.net --write` makes tests/vectors/net_v1.json anew; `--list` names the cases that no longer have their pinned bits. They are
pinned for good: a case that moves is a fault, unless a contract or a format has a new version.

Belongs here: the cases, a model whose losses are the same on every machine, and what of a run is hashed. Does not belong here: the comparison
(test_net.py), what a method computes (methods.py), single operations (tests/vectors).

The hashes hold whatever the instruction set, the number of threads and the version of torch, since no rounding depends on them:
- `Exact` reads its weights element by element, rounds them to integers and sums those. Its losses are exact numbers, in every order of summation.
- Passes over weights and state are of zo_kernels' contract. What a step computes besides from many numbers (a standard deviation, a quantile, the
  factors that carry LOZO-M's momentum, LayerScale's means) is float64, and counts after a rounding to fp32 or 12 bits.
- Gradients by backpropagation are of single elements, exact. A forward gradient and a slope of DiZO's are sums of some hundred float64 numbers,
  rounded to fp32: another order shows in one case in a hundred million.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zo_kernels as zk
from tests.optim import emulated_graph

PINNED = Path(__file__).parents[1] / "vectors" / "net_v1.json"
SEED, EPS, STEPS, MIDDLE = 2024, 0.1, 7, 4
SKIPPED = 2  # the step, counted from 0, whose loss is no number
GRID = 12  # a loss sees a weight in units of 2^-12


# ---- a model with exact losses ------------------------------------------------------------------------------------------


class Read(nn.Linear):
    """Its weights are read past `forward`'s usual product, as attributes."""

    def forward(self, batch: Tensor) -> Tensor:
        return torch.cat([(self.weight * 1.0).reshape(-1), self.bias * 1.0])


class Scaled(nn.LayerNorm):
    def forward(self, batch: Tensor) -> Tensor:
        return torch.cat([self.weight + 0.0, self.bias * 2.0])


WIDE = 131  # features of the model of long rows


class Exact(nn.Module):
    """Odd sizes, an embedding that a head shares, a product with a permutation (exact: one term a sum), a frozen weight and a buffer.

    A batch is (data, offset): what the coefficients of the loss depend on, and a number that is added to it.
    """

    permuted: Tensor

    def __init__(self, dtype: torch.dtype, wide: bool = False) -> None:
        super().__init__()
        a, b = (WIDE, 67) if wide else (7, 5)
        self.embedding = nn.Embedding(9, b)
        self.layers = nn.ModuleList([Read(b, a), Read(a, 3)])
        self.norm = Scaled(a)
        self.plain = nn.Linear(a, b, bias=False)
        self.head = nn.Linear(b, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.empty(3, b), requires_grad=False)
        self.register_buffer("permuted", 2.0 * torch.eye(a).roll(2, 0))
        for k, p in enumerate(self.parameters()):
            n = torch.arange(p.numel(), dtype=torch.int64)
            p.data = ((n * (7919 + 2 * k) + 31 * k) % 1021 - 510).double().div(512).reshape(p.shape).to(dtype)
        self.permuted = self.permuted.to(dtype)
        self.rows = torch.tensor([3, 1, 8, 3])

    def forward(self, batch: Tensor) -> Tensor:
        """What the loss is made of, float64: the elements of the weights, times a power of two at most."""
        found = [functional.embedding(self.rows, self.embedding.weight), self.frozen * 1.0]
        for module in (*self.layers, self.norm):
            found.append(module(batch))
        found += [self.plain(self.permuted), self.head.weight * 0.5]
        return torch.cat([values.reshape(-1) for values in found]).double()


@functools.cache
def base(dtype: torch.dtype, wide: bool) -> Exact:
    return Exact(dtype, wide)


def exact_loss(model: nn.Module, batch: Sequence[Tensor], random: bool) -> Tensor:
    """sum a q^2 + (sum b q)^2 / 16, rounded down, with small integers a and b that the data say, over q = round(2^12 w)."""
    data, offset = batch
    values = model(data)
    q = torch.round(values * 2.0**GRID).long()
    a, b = coefficients(values, data + torch.randint(0, 4, ()) if random else data)  # a draw, as dropout would
    linear = (q * b).sum()
    return ((q * q * a).sum() + linear * linear // 16).double() * 2.0 ** (-2 * GRID) + offset


def smooth_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Differentiable: sum a w^2 + b w. The gradient of a weight is its own alone."""
    data, offset = batch
    values = model(data)
    a, b = coefficients(values, data)
    return (values * values * a + values * b).sum() + offset


def coefficients(values: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.arange(len(values), dtype=torch.int64) + data
    return n % 3 + 1, n * 5 % 7 - 3


class Failed(RuntimeError):
    """Of a closure that was told to fail."""


class Closure:
    """One object for all steps, as a graph wants it. `fail`: at the forward of this number it does."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.model, self.case, self.fail = model, case, -1

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        self.fail -= 1
        if self.fail == -1:
            raise Failed
        if self.case.smooth:
            return smooth_loss(self.model, batch)
        return exact_loss(self.model, batch, random=not self.case.graph)


# ---- the cases ----------------------------------------------------------------------------------------------------------

Make = Callable[..., zk.ZOStep]


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        make: (model, **ZOStep's arguments) -> optimizer.
        options: of `make`: the mode, the rounding.
        smooth: the loss is differentiated. wide: weights of some thousand elements. journal: the method can be recorded.
        micro: micro-batches of a step. failures: forwards that fail, by the number of the step that they are to disturb.
        given: stored masks and scales, by parameter, which a replay must be given.
    """

    make: Make
    dtype: torch.dtype
    options: Mapping[str, Any]
    smooth: bool = False
    wide: bool = False
    journal: bool = True
    graph: bool = False
    micro: int = 1
    failures: Mapping[int, int] = field(default_factory=dict)
    given: Callable[[Exact], dict[str, Any]] = lambda model: {}

    def model(self) -> Exact:
        return copy.deepcopy(base(self.dtype, self.wide))

    def optimizer(self, model: nn.Module, **more: Any) -> zk.ZOStep:
        return self.make(model, **self.options, **more)


@dataclass(frozen=True)
class Method:
    """`modes`: besides lazy and graph, which plain methods have. `more`: fields of its cases."""

    make: Make
    modes: Sequence[str] = ("scratch", "inplace")
    more: Mapping[str, Any] = field(default_factory=dict)


def of(cls: type[zk.ZOStep], **own: Any) -> Make:
    def make(trained: Any, **more: Any) -> zk.ZOStep:
        options = {"lr": 1e-3, "seed": SEED, "weight_decay": 0.05, **own, **more}
        if cls is not zk.ForwardGrad:
            options.setdefault("eps", EPS)
        optimizer: zk.ZOStep = cls(trained, **options)
        return optimizer

    return make


def hybrid(model: Exact, **more: Any) -> zk.ZOStep:
    first_order = torch.optim.SGD(list(model.norm.parameters()), lr=0.0625)
    return of(zk.HybridZO, first_order=first_order)(model, **more)


def grouped(cls: type[zk.ZOStep] = zk.MeZOStep, limits: bool = False, **own: Any) -> Make:
    """Two groups of different lr, eps and decay; `limits`: with masks and scales."""

    def make(model: Exact, **more: Any) -> zk.ZOStep:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        first: dict[str, Any] = {"params": named[:3], "lr": 2e-3, "weight_decay": 0.0}
        second: dict[str, Any] = {"params": named[3:], "eps": 0.05, "weight_decay": 0.2}
        if limits:
            stored = stored_limits(model)
            first["mask"] = {"embedding.weight": stored["masks"]["embedding.weight"], "layers.0.weight": zk.RandomMask(0.4, 7)}
            second["scale"] = {"layers.1.weight": 0.5, "plain.weight": stored["scales"]["plain.weight"]}
            second["mask"] = zk.RandomMask(0.75, 3)
        return of(cls, **own)([first, second], model=model, **more)

    return make


def stored_limits(model: Exact) -> dict[str, Any]:
    rows = model.plain.weight.shape[0]
    bits: Tensor = torch.arange(model.embedding.weight.numel()) % 3 != 1
    values = (torch.arange(rows) % 4 + 1).float() / 4
    return {
        "masks": {"embedding.weight": zk.pack_mask(bits)},
        "scales": {"plain.weight": (values, model.plain.weight.shape[1])},
    }


def in_subspace(cls: type[zk.ZOStep], others: str = "dense", **own: Any) -> Make:
    """Along given factors: of one matrix the left one, of the others the right one; small integers over 64."""

    def make(model: Exact, **more: Any) -> zk.ZOStep:
        given: dict[str, dict[str, Tensor]] = {"right": {}, "left": {}}
        for k, (name, p) in enumerate(model.named_parameters()):
            if p.ndim == 2 and p.requires_grad:
                side = "left" if name.startswith("plain") else "right"
                n = torch.arange(p.shape[side == "right"] * 2, dtype=torch.int64)
                given[side][name] = ((n * (37 + k)) % 61 - 30).float().div(64).view(-1, 2)
        return of(cls, direction=zk.InputSubspace(zk.InputFactors(**given), others), **own)(model, **more)

    return make


def anchored(cls: type[zk.ZOStep], lam: float, every: int, **own: Any) -> Make:
    """Toward what an `Exact` of the same type and sizes begins with, wherever this one is."""

    def make(model: Exact, **more: Any) -> zk.ZOStep:
        start = dict(Exact(model.plain.weight.dtype, wide=model.plain.in_features == WIDE).named_parameters())
        return of(cls, anchor=zk.Anchor(lam, every, start), **own)(model, **more)

    return make


LAYERS = {"layers": [r"layers\.\d\.weight"]}
DIZO = {"every": 2, "inner": 2, "inner_lr": 1e-3, **LAYERS}
RECOMPUTED = {"state": "recomputed", "history": 3}

PLAIN: dict[str, Method] = {
    "mezo": Method(of(zk.MeZOStep)),
    "mezo-rademacher": Method(of(zk.MeZOStep, kind="rademacher")),
    "mezo-clip": Method(of(zk.MeZOStep, clip=4.0)),
    "mezo-maximize": Method(of(zk.MeZOStep, lr=1e-4, maximize=True)),
    "mezo-groups": Method(grouped()),
    "mezo-limits": Method(grouped(limits=True), more={"given": stored_limits}),
    "mezo-micro": Method(of(zk.MeZOStep), more={"micro": 2}),
    "sign": Method(of(zk.ZOSignSGD)),
}
QUERIES: dict[str, Method] = {
    "mezo-queries": Method(of(zk.MeZOStep, queries=3)),
    "mezo-one-sided": Method(of(zk.MeZOStep, one_sided=True, queries=2)),
    "sign-queries": Method(of(zk.ZOSignSGD, queries=2)),
    "fzoo": Method(of(zk.FZOO, lr=3e-3, queries=4)),
}
OTHERS: dict[str, Method] = {
    "ranked": Method(of(zk.ZOStep, estimator=zk.Shaped(4))),
    "z-scored-mirrored": Method(of(zk.ZOStep, estimator=zk.Shaped(2, "z-scored", mirrored=True))),
    "mezo-anchored": Method(anchored(zk.MeZOStep, 0.3, 2)),
    "momentum-anchored": Method(anchored(zk.ZOMomentum, 0.3, 1, lr=5e-4)),
    "mezo-quantile": Method(of(zk.MeZOStep, clip=zk.QuantileClip(0.5, 4, 2))),
    "mezo-scale-free": Method(of(zk.MeZOStep, scale_free=zk.ScaleFree(0.8))),
    "one-sided-scale-free": Method(of(zk.MeZOStep, one_sided=True, queries=3, scale_free=zk.ScaleFree(0.8))),
    "groups-scale-free": Method(grouped(scale_free=zk.ScaleFree(0.5), clip=zk.QuantileClip(0.5, 4, 2))),
    "dizo-scale-free": Method(of(zk.DiZO, scale_free=zk.ScaleFree(0.8), **DIZO)),
    "momentum-stored": Method(of(zk.ZOMomentum, lr=5e-4)),
    "momentum-bf16": Method(of(zk.ZOMomentum, lr=5e-4, state_dtype="bfloat16")),
    "momentum-queries": Method(of(zk.ZOMomentum, lr=5e-4, queries=2, one_sided=True)),
    "momentum-recomputed": Method(of(zk.ZOMomentum, lr=5e-4, **RECOMPUTED)),
    "momentum-recomputed-blocks": Method(of(zk.ZOMomentum, lr=5e-4, blocks=zk.Blocks(), **RECOMPUTED)),
    "momentum-groups": Method(grouped(zk.ZOMomentum, lr=5e-4)),
    "momentum-mask": Method(of(zk.ZOMomentum, lr=5e-4, direction=zk.RandomSparse(0.5, 2))),
    "adam-stored": Method(of(zk.ZOAdam, lr=4e-3)),
    "adam-bf16": Method(of(zk.ZOAdam, lr=4e-3, state_dtype="bfloat16")),
    "adam-recomputed": Method(of(zk.ZOAdam, lr=4e-3, **RECOMPUTED)),
    "adam-recomputed-blocks": Method(of(zk.ZOAdam, lr=4e-3, blocks=zk.Blocks(order="random"), **RECOMPUTED)),
    "adam-blocks": Method(of(zk.ZOAdam, lr=4e-3, blocks=zk.Blocks(every=2))),
    "adam-groups-maximize": Method(grouped(zk.ZOAdam, lr=4e-3, maximize=True)),
    "conservative": Method(of(zk.ZOConservative)),
    "forward": Method(of(zk.ForwardGrad, lr=2e-3), ("scratch",), {"smooth": True}),
    "hybrid": Method(hybrid, more={"smooth": True, "journal": False}),
    "blocks-cyclic": Method(of(zk.BlockwiseZO)),
    "blocks-random": Method(of(zk.BlockwiseZO, by=["bias$", "weight$"], order="random", every=2)),
    "magnitude-sparse": Method(of(zk.SparseMeZO, quantile=0.6)),
    "random-sparse": Method(of(zk.ZOStep, direction=zk.RandomSparse(0.3, 2))),
    "scale-rms-variance": Method(of(zk.ZOStep, direction=zk.LayerScale(every=3))),
    "scale-rms-expectation": Method(of(zk.ZOStep, direction=zk.LayerScale(every=3, estimate="expectation"))),
    "scale-gradient-variance": Method(of(zk.ZOStep, direction=zk.LayerScale("gradient", every=3))),
    "scale-gradient-expectation": Method(of(zk.ZOStep, direction=zk.LayerScale("gradient", every=3, estimate="expectation"))),
    "hizoo": Method(of(zk.HiZOO, alpha=1e-3, low=0.5, high=2.0)),
    "hizoo-blocks": Method(of(zk.HiZOO, alpha=1e-3, low=0.5, high=2.0, blocks=zk.Blocks())),
    "dizo-forward": Method(of(zk.DiZO, **DIZO)),
    "dizo-backpropagation": Method(of(zk.DiZO, learn="backpropagation", **DIZO), more={"smooth": True}),
    "dizo-momentum-maximize": Method(of(zk.DiZO, lr=1e-4, maximize=True, rule=zk.Momentum(0.8), **DIZO)),
    "dizo-scale-gradient": Method(of(zk.DiZO, direction=zk.LayerScale("gradient", every=2), **DIZO)),
    "lozo": Method(of(zk.LOZO, every=3)),
    "lozo-queries": Method(of(zk.LOZO, every=3, estimator=zk.OneSided(3))),
    "input-subspace": Method(in_subspace(zk.MeZOStep)),
    "input-subspace-queries": Method(in_subspace(zk.MeZOStep, queries=3)),
    "input-subspace-fzoo": Method(in_subspace(zk.FZOO, "still", lr=3e-3, queries=4)),
    "input-subspace-blocks": Method(in_subspace(zk.MeZOStep, queries=2, blocks=zk.Blocks())),
    "lozo-momentum": Method(of(zk.LOZO, every=2, momentum=0.8)),
    "lozo-momentum-blocks": Method(of(zk.LOZO, every=3, rank=1, momentum=0.8, blocks=zk.Blocks())),
}  # fmt: skip

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHORT = {F32: "f32", F16: "f16", BF16: "bf16"}
MODES: dict[str, dict[str, Any]] = {
    "scratch": {"perturbation": "scratch"},
    "pieces": {"perturbation": "scratch", "scratch_bytes": 64},
    "inplace": {"perturbation": "inplace"},
    "lazy": {"perturbation": "inplace", "lazy": True},
    "graph": {"perturbation": "scratch", "cuda_graph": True},
    "graph-inplace": {"perturbation": "inplace", "cuda_graph": True},
}
# Of every method; of plain MeZO all of them. Rounding to fp32 is one whatever it is called.
KINDS = {
    "scratch": ((F32, "nearest"), (BF16, "stochastic")),
    "inplace": ((F16, "stochastic"), (BF16, "nearest")),
}
ALL = tuple((dtype, rounding) for dtype in SHORT for rounding in ("nearest", "stochastic"))
SIXTEEN = ((BF16, "stochastic"),)
# What keeps something between steps, or measures it in a step.
KEPT = (
    "momentum-stored",
    "adam-stored",
    "adam-recomputed",
    "hizoo",
    "dizo-forward",
    "scale-gradient-variance",
    "magnitude-sparse",
    "lozo-momentum",
    "input-subspace-queries",
)


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}

    def add(name: str, method: Method, mode: str, kinds: Sequence[tuple[torch.dtype, str]], note: str = "", **more: Any) -> None:
        for dtype, rounding in kinds:
            fields = {**method.more, **more, "graph": mode.startswith("graph")}
            case = Case(method.make, dtype, {**MODES[mode], "rounding": rounding}, **fields)
            found[f"{name}-{mode}-{SHORT[dtype]}-{rounding}{note}"] = case

    for name, method in {**PLAIN, **QUERIES, **OTHERS}.items():
        for mode in method.modes:
            add(name, method, mode, ALL if name == "mezo" else KINDS[mode])
    for name, method in PLAIN.items():
        add(name, method, "lazy", ALL if name == "mezo" else ((F32, "nearest"), (BF16, "nearest")))
        add(name, method, "graph", SIXTEEN)
    for mode in MODES:
        add("mezo", PLAIN["mezo"], mode, ((F32, "nearest"), (BF16, "stochastic")), "-wide", wide=True)
        if "graph" not in mode:
            # In the step's first and second forward, and of the step behind one that failed.
            add("mezo", PLAIN["mezo"], mode, ((BF16, "nearest"),), "-failures", failures={1: 0, 3: 1, 5: 1})
    # Not FZOO: recording it, the emulation evaluates it at one point alone, where equal losses count as a skipped step; no real graph does.
    for name in ("mezo-queries", "mezo-one-sided", "sign-queries"):
        add(name, QUERIES[name], "graph", SIXTEEN)
    add("mezo", PLAIN["mezo"], "graph-inplace", ALL)
    for name in KEPT:
        add(name, OTHERS[name], "scratch", SIXTEEN, "-wide", wide=True)
        add(name, OTHERS[name], "pieces", SIXTEEN)
        failures = {1: 1, 3: 0, 4: 2}
        add(name, OTHERS[name], "scratch", SIXTEEN, "-failures", failures=failures)
        add(name, OTHERS[name], "inplace", ((BF16, "nearest"),), "-failures", failures=failures, journal=False)  # none records that
    return found


CASES = cases()


# ---- hashes -------------------------------------------------------------------------------------------------------------


def _feed(h: Any, value: Any) -> None:
    """A value's own bytes: keys sorted, tensors as dtype, shape and bytes, floats to the last bit."""
    if isinstance(value, Mapping):
        h.update(b"{%d" % len(value))
        for key in sorted(value, key=lambda k: (type(k).__name__, k)):
            _feed(h, key)
            _feed(h, value[key])
    elif isinstance(value, (list, tuple)):
        h.update(b"[%d" % len(value))
        for item in value:
            _feed(h, item)
    elif isinstance(value, Tensor):
        h.update(f"t{value.dtype}{tuple(value.shape)}".encode())
        h.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif value is None or isinstance(value, (bool, int, str)):
        h.update(f"{type(value).__name__}{value};".encode())
    elif isinstance(value, zk.RandomMask):
        _feed(h, ["RandomMask", value.keep, value.tag])
    elif isinstance(value, float):
        h.update(b"f" + struct.pack("<d", value))
    else:
        raise TypeError(f"{type(value).__name__} in a state has no canonical bytes here")


def sha(value: Any) -> str:
    h = hashlib.sha256()
    _feed(h, value)
    return h.hexdigest()[:16]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def state_of(step: zk.ZOStep) -> dict[str, Any]:
    """With the JSON text in it read, since the order of its keys is nobody's promise."""
    state = step.state_dict()
    first, *others = state["param_groups"]
    own = {**first["zo"], "parts": json.loads(first["zo"]["parts"])}
    return {**state, "param_groups": [{**first, "zo": own}, *others]}


def journal_of(path: Path) -> dict[str, Any]:
    """What of a journal is the run's: of the header all but its name and the versions that wrote it, and the records without their checksums, which
    cover the header. Read by the bytes of docs/journal.md, not by the library."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<I", raw, 12)
    header = json.loads(raw[16 : 16 + length])
    for varies in ("run", "versions"):
        del header[varies]
    eps = 0 if header["perturbation"] == "scratch" else 1
    size = 20 + 4 * header["groups"] * (1 + eps + header["terms"])
    body = raw[16 + length + 4 :]
    if len(body) % size:
        raise ValueError(f"{len(body)} bytes of records, which have {size} each")
    return {"header": header, "records": [body[k : k + size - 4].hex() for k in range(0, len(body), size)]}


# ---- a run --------------------------------------------------------------------------------------------------------------


def batches(k: int, micro: int) -> list[tuple[Tensor, Tensor]]:
    offset = math.nan if k == SKIPPED else 0.0
    return [(torch.tensor(k + 10 * m), torch.tensor(offset, dtype=torch.float64)) for m in range(micro)]


def go_on(case: Case, model: nn.Module, step: zk.ZOStep, closure: Closure, until: int) -> None:
    while step.steps < until:
        k = step.steps
        for fails in [*([case.failures[k]] if k in case.failures else []), -1]:
            torch.default_generator.manual_seed(k)  # the CPU's, of which a closure may draw
            closure.fail = fails
            with contextlib.suppress(Failed) if fails >= 0 else contextlib.nullcontext():
                step.step(closure, batches(k, case.micro))


@dataclass
class Found:
    """What a run left, as hashes, and what went differently where it was taken up again."""

    hashes: dict[str, str]
    differs: list[str] = field(default_factory=list)


def run(name: str, folder: Path) -> Found:
    """A whole run with a journal; and from its middle a copy, a loaded state and a resumed journal, which must end where it did, as its replay."""
    case = CASES[name]
    path = folder / "run.zoj"

    def finish(model: nn.Module, step: zk.ZOStep, closure: Closure | None = None) -> tuple[str, str]:
        closure = closure or Closure(model, case)
        go_on(case, model, step, closure, MIDDLE)
        step.state_dict()  # which a lazy run sees
        go_on(case, model, step, closure, STEPS)
        state = sha(state_of(step))
        step.close_journal()
        return sha(weights_of(model)), state

    found: dict[str, tuple[str, str]] = {}
    records = {"journal": path} if case.journal else {}
    model = case.model()
    step, closure = case.optimizer(model, **records), Closure(model, case)
    go_on(case, model, step, closure, MIDDLE - 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the copy of an optimizer with a journal")
        twin = copy.deepcopy((model, step))
    go_on(case, model, step, closure, MIDDLE)
    saved, middle = through_a_file(step.state_dict()), weights_of(model)
    theirs = copy.deepcopy(step._first_order.state_dict()) if step._first_order is not None else None
    half = folder / "half.zoj"
    if case.journal:
        half.write_bytes(path.read_bytes())
    found["live"] = finish(model, step, closure)
    assert step.skipped == 1
    found["copied"] = finish(*twin)

    model = case.model()
    model.load_state_dict(middle, strict=False)
    step = case.optimizer(model)
    step.load_state_dict(saved)
    if theirs is not None and step._first_order is not None:
        step._first_order.load_state_dict(theirs)
    found["loaded"] = finish(model, step)
    hashes = dict(zip(("weights", "state"), found["live"], strict=True))
    differs = [f"{way}: {what}" for way, two in found.items() for what, a in zip(hashes, two, strict=True) if a != hashes[what]]
    if not case.journal:
        return Found(hashes, differs)

    hashes["journal"] = sha(journal_of(path))
    model = case.model()
    step = case.optimizer(model, journal=half, resume=True)
    resumed = dict(zip(("weights", "state"), finish(model, step), strict=True))
    resumed["journal"] = sha(journal_of(half))
    differs += [f"resumed: {what}" for what in hashes if resumed[what] != hashes[what]]
    given = case.given(model)
    for what, upto, expected in (("replayed", None, hashes["weights"]), ("replayed in part", MIDDLE, sha(middle))):
        model = case.model()
        past = zk.replay(model, path, upto, **given)
        if sha(weights_of(model)) != expected:
            differs.append(f"{what}: weights")
    if past.header.method is None:
        model = case.model()
        zk.replay(model, path, mode="fused", **given)
        hashes["fused"] = sha(weights_of(model))
    return Found(hashes, differs)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.serialization.safe_globals([zk.RandomMask]):
        return torch.load(file, weights_only=True)


@contextlib.contextmanager
def graphs(case: Case) -> Iterator[None]:
    """For a case with graphs: those of the CPU's emulation, which knows the compiled kernels alone."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if case.graph:
            emulated_graph.install(patch)
            warnings.filterwarnings("error", message="cuda_graph")  # no silent fallback
        yield


def line_of(hashes: Mapping[str, str]) -> str:
    return " ".join(f"{what} {value}" for what, value in hashes.items())


def pinned() -> dict[str, str]:
    found: dict[str, str] = json.loads(PINNED.read_text())["runs"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The net's pinned hashes.")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true", help=f"make {PINNED.name} anew")
    choice.add_argument("--list", action="store_true", help="print what differs from it")
    args = parser.parse_args(arguments)
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder, graphs(case):
            warnings.simplefilter("ignore", zk.ZOWarning)
            result = run(name, Path(folder))
        if result.differs:
            raise SystemExit(f"{name}: {'; '.join(result.differs)}")
        found[name] = line_of(result.hashes)
    if args.write:
        made = "python -m tests.optim.net --write; what is hashed: tests/optim/net.py"
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(line)}" for name, line in sorted(found.items()))
        PINNED.write_text(f'{{"made": {json.dumps(made)}, "runs": {{\n{rows}\n}}}}\n')
        return 0
    before = pinned()
    moved = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    print("\n".join(moved))
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
