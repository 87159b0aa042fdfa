"""Models whose weights are sharded (FSDP2, tensor parallel, both): noise of the whole tensors, the bits of unsharded runs, journals and checkpoints over
other meshes, and what is refused. Real processes, with gloo; a start of them serves many checks.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, _utils, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zo_kernels as zk
from tests.cluster import End, Model, batches_of, cluster
from zo_kernels import ops, shards
from zo_kernels.optim import workers as sharing
from zo_kernels.parameters import Member, Weights
from zo_kernels.plan import Pass

F32, B16 = torch.float32, torch.bfloat16
SHAPES = ((37, 13), (5, 37), (8, 64), (1, 9), (3, 6, 7), (41,), (2, 2))
METHODS: dict[str, Callable[..., zk.ZOStep]] = {
    "MeZO": lambda m, **k: zk.MeZOStep(m, queries=2, weight_decay=0.1, **k),
    "FZOO": lambda m, **k: zk.FZOO(m, queries=3, **k),
    "Adam": lambda m, **k: zk.ZOAdam(m, state="recomputed", history=4, **k),
    "Momentum": lambda m, **k: zk.ZOMomentum(m, weight_decay=0.1, **k),
    "moments": lambda m, **k: zk.ZOAdam(m, queries=2, state_dtype="bfloat16", **k),
    "sparse": lambda m, **k: zk.ZOStep(m, direction=zk.RandomSparse(0.5), **k),
}
RUNS = [("MeZO", F32, "inplace"), ("MeZO", B16, "inplace"), *((name, F32, "auto") for name in METHODS), ("MeZO", B16, "auto")]


class Twice(Model):
    """One of its layers runs twice in a forward, so that FSDP gathers it twice, or keeps it."""

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.b(self.norm(self.a(x) + self.a(x.tanh())).tanh()).float().square().mean()
        return loss


class Summed(Model):
    """In one process, the sums that two make of `parallel`: outputs of the first layer in two blocks of rows, those of the second from two blocks of columns,
    each with half of the bias, as DTensor divides it. A sum of two is the same in either order."""

    def forward(self, x: Tensor) -> Tensor:
        halves, (w, bias), product = (slice(19), slice(19, None)), (self.a.weight, self.a.bias), nn.functional.linear
        hidden = self.norm(torch.cat([product(x, w[part], bias[part]) for part in halves], -1)).tanh()
        parts = [product(hidden[:, part].contiguous(), self.b.weight[:, part].contiguous(), self.b.bias / 2) for part in halves]
        loss: Tensor = sum(parts).float().square().mean()  # type: ignore[union-attr]
        return loss


def optimizer_of(name: str, model: nn.Module, **more: Any) -> zk.ZOStep:
    """With sharded weights, "auto" is what is perturbed as FSDP gathers it."""
    return METHODS[name](model, **{"lr": 1e-3, "eps": 1e-2, "seed": 4, **more})


def steps(optimizer: zk.ZOStep, model: nn.Module, upto: int, dtype: torch.dtype = F32) -> None:
    while (k := optimizer.steps) < upto:
        optimizer.step(model, batches_of(k, dtype)[:2])
        if k % 5 == 2:
            with torch.no_grad():
                model(
                    batches_of(k, dtype)[0]
                )  # a forward of the user's, after which FSDP's outermost module keeps what it gathered


def shard(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    for module in (model.a, model.b, model):  # the norm is the outermost's, which keeps what it gathers
        fully_shard(module, mesh=mesh, **options)
    return model


def parallel(model: nn.Module, mesh: DeviceMesh) -> Any:
    """The first matrix by rows, which need not divide, and the second by columns; the norm between them sees whole rows."""
    return parallelize_module(
        model, mesh, {"a": ColwiseParallel(output_layouts=Replicate()), "b": RowwiseParallel(input_layouts=Replicate())}
    )


def weights_of(model: nn.Module) -> list[Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.shape == y.shape and torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


@functools.cache
def alone(name: str, dtype: torch.dtype, mode: str = "inplace", kind: type[Model] = Model) -> list[Tensor]:
    """The unsharded run of 20 steps."""
    model = kind(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps(optimizer_of(name, model, perturbation=mode), model, 20, dtype)
    return weights_of(model)


class Even(Model):
    """Whose columns four processes divide, as FSDP wants it of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(13, 36), nn.LayerNorm(36), nn.Linear(36, 4)
        draw = torch.Generator().manual_seed(9)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw)


class Adapted(nn.Module):
    """A frozen layer beside an adapter of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            base.requires_grad_(False),
            nn.Linear(base.in_features, 3, False),
            nn.Linear(3, base.out_features, False),
        )
        draw = torch.Generator().manual_seed(9)
        for p in (self.down.weight, self.up.weight):
            p.data = torch.randn(p.shape, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def frozen_norm() -> Any:
    model = Model()
    model.norm.requires_grad_(False)
    return model


def adapted() -> Any:
    model: Any = frozen_norm()
    model.a, model.b = Adapted(model.a), Adapted(model.b)
    return model


def prefetched(model: Any, line: DeviceMesh, grid: DeviceMesh) -> None:
    shard(model, line).set_modules_to_forward_prefetch([model.a, model.b])


def without_norm(model: Any, line: DeviceMesh, grid: DeviceMesh) -> None:
    shard(model, line, ignored_params=set(model.norm.parameters()))


def by_columns(model: Any, mesh: DeviceMesh) -> None:
    shard(model, mesh, shard_placement_fn=lambda p: Shard(1) if p.shape == (4, 36) else None)


# What FSDP2 can be told, each with one method: the model, and how it is sharded over four processes, in a line or as two copies of two parts each.
FORMS: dict[str, tuple[str, Callable[[], Any], Callable[[Any, DeviceMesh, DeviceMesh], Any]]] = {
    "prefetch": ("Momentum", Model, prefetched),
    "copies": ("Momentum", Model, lambda model, line, grid: shard(model, grid)),
    "copies, kept by number": ("MeZO", Model, lambda model, line, grid: shard(model, grid, reshard_after_forward=2)),
    "on the host": (
        "moments",
        Model,
        lambda model, line, grid: shard(model, line, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    ),
    "columns": ("Momentum", Even, lambda model, line, grid: by_columns(model, line)),
    "columns of copies": ("MeZO", Even, lambda model, line, grid: by_columns(model, grid)),
    "ignored": ("Momentum", Model, without_norm),
    "ignored and frozen": ("Momentum", frozen_norm, without_norm),
    "adapters": ("Adam", adapted, lambda model, line, grid: shard(model, line)),
    "adapters of copies": ("Momentum", adapted, lambda model, line, grid: shard(model, grid)),
}


@functools.cache
def few(name: str, make: Callable[[], Any], mode: str) -> tuple[list[Tensor], float]:
    """The unsharded run of four steps, and how far the last one moved a weight."""
    model = make()
    optimizer = optimizer_of(name, model, perturbation=mode)
    steps(optimizer, model, 4)
    return weights_of(model), optimizer.movement()


def state_alone() -> dict[str, Any]:
    model = Model()
    optimizer = optimizer_of("moments", model)
    steps(optimizer, model, 1)
    return optimizer.state_dict()


def raised(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def results(ends: list[End]) -> list[dict[str, Any]]:
    assert all(not end.error and not end.killed for end in ends), [end.text[-3000:] for end in ends]
    return [end.result for end in ends]


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((37, 13), ((10, 19), (0, 13))),
        ((5, 37), ((3, 5), (19, 37))),
        ((5, 37), ((0, 5), (0, 19))),
        ((41,), ((7, 20),)),
        ((3, 6, 7), ((1, 3), (0, 6), (2, 5))),
        ((3, 6, 7), ((1, 2), (2, 5), (0, 7))),
        ((3, 6, 7), ((0, 3), (6, 6), (0, 7))),
        ((), ()),
    ],
    ids=str,
)
def test_places(shape: tuple[int, ...], box: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The indices of a part's elements, one after another."""
    part = torch.arange(math.prod(shape)).view(shape)[tuple(slice(*ends) for ends in box)]
    where = tuple(part.shape), tuple(start for start, _ in box)
    monkeypatch.setattr(_utils, "compute_local_shape_and_global_offset", lambda *_: where)
    p = SimpleNamespace(shape=shape, placements=(), device_mesh=None, _local_tensor=part)
    first, columns = shards.place_of("x", p)
    width, pitch = columns or (max(1, part.numel()),) * 2
    assert part.reshape(-1).tolist() == [first + e // width * pitch + e % width for e in range(part.numel())]


def test_forwards_are_where_the_mesh_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose generators a step sets back: a part may lie in host memory."""
    part = SimpleNamespace(device_mesh=SimpleNamespace(device_type="cuda"), _local_tensor=torch.ones(1))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: {"cuda": SimpleNamespace(current_device=lambda: 3)}[kind])
    assert shards.forwards_on(part) == torch.device("cuda", 3)
    part.device_mesh.device_type = "cpu"
    assert shards.forwards_on(part) == torch.device("cpu")


def test_what_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(shape: tuple[int, ...], mine: tuple[int, ...]) -> None:
        monkeypatch.setattr(_utils, "compute_local_shape_and_global_offset", lambda *_: ((2, 2, 2), (0, 0, 0)))
        shards.place_of("x", SimpleNamespace(shape=shape, placements=(), device_mesh=None, _local_tensor=torch.ones(mine)))

    with pytest.raises(ValueError, match=r"'x' of shape \(2, 4, 4\) is sharded in its dimensions \[1, 2\]"):
        of((2, 4, 4), (2, 2, 2))
    with pytest.raises(ValueError, match="it was replaced"):
        of((2, 4, 4), (2, 4, 2))


def test_a_closure_that_raises_before_the_first_forward(tmp_path: Path) -> None:
    """What it raised is told, and nothing of FSDP's."""

    def work(rank: int) -> list[Any]:
        model = shard(Model(), init_device_mesh("cpu", (1,)))
        optimizer = optimizer_of("MeZO", model, process_group=dist.group.WORLD, timeout=20)
        return [
            raised(lambda: optimizer.step(lambda batch: {}["labels"], batches_of(0, F32))),
            raised(lambda: steps(optimizer, model, 2)),
        ]

    ((failed, after),) = results(cluster(1, work, tmp_path))
    assert "labels" in failed and "KeyError" in failed and after == ""


def test_workers_that_are_alike_agree() -> None:
    workers = object.__new__(sharing.Workers)
    workers.alike = workers.met = True
    shares = [[0, 1], [0, 1]]
    workers.agree([[1.0, float("nan")], [1.0, float("nan")]], shares)
    with pytest.raises(zk.WorkerError, match="worker 1 found other losses"):
        workers.agree([[1.0, 2.0], [1.0, 2.0 + 2**-50]], shares)
    workers.agree([[1.0], [2.0]], [[0], [1]])
    workers.alike = False
    workers.agree([[1.0], [2.0]], [[0], [0]])


def test_workers_that_are_alike_have_as_many_forwards() -> None:
    """Each forward of one is also the others', whose parts it gathers."""
    workers = object.__new__(sharing.Workers)
    workers.alike, workers.apart, workers.whole, workers.parallel, workers.size = True, True, False, "auto", 2
    assert workers.shares(2, 4) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert workers.shares(2, 3) == [[0, 1, 2, 3, 4, 5]] * 2
    workers.parallel = "data"
    with pytest.raises(ValueError, match="3 micro-batches are not as many for each"):
        workers.shares(2, 3)
    workers.apart, workers.parallel = False, "auto"
    assert workers.shares(1, 2) == [[0, 1]] * 2


# ---- what the processes do ---------------------------------------------------------------------------------------------------


def noise(mesh: DeviceMesh) -> list[Any]:
    """Placements and shapes whose noise is not that of the whole tensor."""
    choices: list[tuple[Any, ...]] = [(Shard(0),), (Shard(1),), (Replicate(),)]
    if mesh.ndim == 2:
        choices = [
            (Shard(0), Shard(1)),
            (Shard(1), Shard(0)),
            (Replicate(), Shard(1)),
            (Shard(0), Replicate()),
            (Shard(0), Shard(0)),
        ]
    wrong = []
    for shape in SHAPES:
        for placements in choices:
            if any(isinstance(p, Shard) and p.dim >= len(shape) for p in placements):
                continue
            for dtype in (F32, B16):
                p = distribute_tensor(torch.zeros(shape, dtype=dtype), mesh, placements)
                (plan,) = Weights([Member.of("x", p, 9)]).plans
                ops.run([plan], Pass(3, [5, 6], [1.0, -0.5], kind="gaussian"))
                want = torch.zeros(shape, dtype=dtype)
                zk.perturb_([want], [(5, 1.0), (6, -0.5)], seed=3, streams=[9])
                if not same([p.full_tensor()], [want]):
                    wrong.append((shape, placements, dtype))
    return wrong


def run(name: str, sharded: nn.Module, dtype: torch.dtype = F32, upto: int = 20, mode: str = "inplace", **more: Any) -> zk.ZOStep:
    optimizer = optimizer_of(name, sharded, process_group=dist.group.WORLD, timeout=20, perturbation=mode, **more)
    steps(optimizer, sharded, upto, dtype)
    return optimizer


def gathered(mesh: DeviceMesh) -> dict[str, Any]:
    """Of runs whose forwards gather a layer twice, or keep it: the weights, what became of forwards that fail, or write to what they gathered, and whether a
    forward saw parts that were not clean."""
    found: dict[str, Any] = {}
    keeps: dict[str, Any] = {"frees": {"reshard_after_forward": True}, "keeps": {"reshard_after_forward": False}, "one unit": None}
    if mesh.size() == 4:
        keeps = {"keeps half": {"reshard_after_forward": 2}}
    for kind, options in keeps.items():
        model: Any = Twice()
        if options is None:
            fully_shard([model.a, model.b], mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            shard(model, mesh, **options)
        optimizer = run("MeZO", model, upto=7, mode="scratch")
        parts: list[Any] = list(model.parameters())
        clean, dirty = [shards.memory_of(p).clone() for p in parts], list[bool]()

        def look(*_: Any, parts: Any = parts, clean: Any = clean, dirty: Any = dirty) -> None:
            dirty.append(not same([shards.memory_of(p) for p in parts], clean))

        def write(*_: Any, model: Any = model) -> None:
            model.b.weight.add_(1)

        def replace(*_: Any, model: Any = model) -> None:
            model.b.weight = nn.Parameter(torch.ones(5, 37))

        def fail(*_: Any) -> None:
            raise ValueError("mine")

        for hook in (write, replace, fail):
            handle = model.b.register_forward_pre_hook(hook)
            found[f"{kind}: {hook.__name__}"] = raised(functools.partial(optimizer.step, model, batches_of(7, F32)[:2]))
            handle.remove()
        handle = model.b.register_forward_pre_hook(look)
        optimizer.step(model, batches_of(7, F32)[:2])
        handle.remove()
        found[f"{kind}: dirty"] = str(dirty)
        steps(optimizer, model, 20)
        found[kind] = weights_of(model)
    return found


def checkpoint(folder: Path, model: nn.Module, optimizer: zk.ZOStep, save: bool) -> None:
    weights, state = get_state_dict(model, optimizer)
    if save:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        return
    content: dict[str, Any] = {"model": weights, "optimizer": state}
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])


def devices(line: DeviceMesh) -> Any:
    """Of a view on a mesh that is said to be of another device than the parts."""
    model = shard(Model(), line)
    optimizer = optimizer_of("MeZO", model, process_group=dist.group.WORLD, timeout=20)
    of, shards.forwards_on = shards.forwards_on, lambda p: torch.device("meta")
    view = optimizer.view_of(optimizer._weights())
    shards.forwards_on = of
    return view.devices, optimizer._views.now.devices  # type: ignore[union-attr]


def forms(line: DeviceMesh, grid: DeviceMesh) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for form, (name, make, wrap) in FORMS.items():
        model = make()
        wrap(model, line, grid)
        optimizer = run(name, model, upto=4, mode="auto")
        found[form] = optimizer._recording.mode, weights_of(model), optimizer.movement()
    return found


def four(rank: int, folder: Path) -> dict[str, Any]:
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    found: dict[str, Any] = {"noise": noise(line) + noise(grid)}
    model = shard(Model(), line)
    found["empty"] = [n for n, p in model.named_parameters() if isinstance(p, DTensor) and not p.to_local().numel()]
    optimizer = run("MeZO", model, upto=10, journal=folder / "run.zoj")
    checkpoint(folder / "saved", model, optimizer, save=True)
    steps(optimizer, model, 20)
    found["MeZO"] = weights_of(model)
    optimizer.close_journal()
    both = shard(parallel(Model(), grid["tensor"]), grid["data"])
    run("MeZO", both, mode="scratch", journal=folder / "both.zoj").close_journal()
    found["both"] = weights_of(both)
    found["gathered"] = gathered(line)
    model = shard(Model(), line)
    optimizer = run("moments", model, upto=10, mode="scratch")
    checkpoint(folder / "moments", model, optimizer, save=True)
    model = shard(parallel(Model(), grid["tensor"]), grid["data"])
    run("moments", model, mode="scratch", journal=folder / "moments.zoj").close_journal()
    found["moments"] = weights_of(model)
    found["forms"] = forms(line, grid)
    found["devices"] = devices(line)
    model = shard(Model(), grid)
    optimizer = run("MeZO", model, upto=1, mode="scratch")
    if rank > 1:
        shards.memory_of(model.a.weight).detach().add_(1)  # of one of two copies
    found["a copy"] = raised(functools.partial(steps, optimizer, model, 2))
    return found


def refusals(model: nn.Module, rank: int) -> dict[str, str]:
    group: dict[str, Any] = {"process_group": dist.group.WORLD, "timeout": 20, "lr": 1e-3}

    def begin(**more: Any) -> Callable[[], Any]:
        return lambda: zk.ZOStep(model, **{**group, **more})

    optimizer = begin()()
    narrow = shard(Model(), init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(param_dtype=B16))
    assert zk.ZOStep(narrow, **group)._recording.mode == "inplace"
    partial = DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (2,)), [Partial()])
    found = {
        "process_group": raised(begin(process_group=None)),
        "parallel": raised(begin(parallel="directions")),
        "data": raised(lambda: zk.ZOStep(parallel(Model(), init_device_mesh("cpu", (2,))), parallel="data", **group)),
        "subgroup": raised(begin(process_group=dist.new_group([0]) if rank == 0 else dist.new_group([0]) and dist.new_group([1]))),
        "scratch": raised(lambda: zk.ZOStep(parallel(Model(), init_device_mesh("cpu", (2,))), perturbation="scratch", **group)),
        "narrow": raised(lambda: zk.ZOStep(narrow, perturbation="scratch", **group)),
        "dual": raised(begin(estimator=zk.ForwardGradient())),
        "lazy": raised(begin(perturbation="inplace", lazy=True)),
        "direction": raised(begin(direction=zk.LowRank())),
        "projection": raised(lambda: zk.DiZO(model, **group, layers=["weight$"])),
        "mask": raised(lambda: zk.ZOStep([{"params": list(model.named_parameters()), "scale": 0.5}], model=model, **group)),
        "module": raised(lambda: zk.ZOStep(list(model.named_parameters()), **group)),
        "check": raised(lambda: zk.check(optimizer, model, batches_of(0, F32))),
        "partial": raised(lambda: Member.of("x", nn.Parameter(partial), 0)),
        "copy": raised(lambda: copy.copy(optimizer)),
    }
    unseen, shards.ungathered = shards.ungathered, lambda model: ""
    found["gathered as"] = raised(lambda: zk.ZOStep(narrow, perturbation="scratch", **group))
    found["not gathered"] = raised(
        lambda: zk.ZOStep(parallel(Model(), init_device_mesh("cpu", (2,))), perturbation="scratch", **group)
    )
    shards.ungathered = unseen
    before = weights_of(model)
    found["batches"] = raised(lambda: optimizer.step(model, batches_of(rank, F32)))
    found["count"] = raised(lambda: optimizer.step(model, batches_of(0, F32)[: 2 + 2 * rank]))  # whose forwards would wait in torch
    frozen: Any = model
    frozen.norm.weight.requires_grad_(rank == 0)
    found["trained"] = raised(lambda: optimizer.step(model, batches_of(0, F32)))
    frozen.norm.weight.requires_grad_()
    part = shards.memory_of(frozen.a.weight).detach()
    optimizer.step(model, batches_of(0, F32))
    if rank:
        part.add_(1)  # a part is its owner's to write to, and everyone's weight
    assert optimizer.workers is not None
    sent = optimizer.workers.sent
    optimizer.step(model, batches_of(0, F32))
    found["compared"] = str(optimizer.workers.sent - sent)
    optimizer.step(model, batches_of(0, F32))
    found["begun"] = str(optimizer.workers.sent - sent)
    whole = parallel(Model(), init_device_mesh("cpu", (2,)))
    beside = zk.ZOStep(whole, **group)
    beside.step(whole, batches_of(0, F32))
    if rank:
        whole.norm.weight.detach().add_(1)
    found["written"] = raised(lambda: beside.step(whole, batches_of(0, F32)))
    moving = optimizer_of("Momentum", model, process_group=dist.group.WORLD, timeout=20)
    moving.step(model, batches_of(0, F32))
    found["movement"] = raised(moving.movement if rank else lambda: moving.step(model, batches_of(0, F32)))
    replaced = shard(Model(), init_device_mesh("cpu", (2,)))
    old = run("MeZO", replaced, upto=10, mode="scratch")
    replaced.load_state_dict({n: t.clone() for n, t in replaced.state_dict().items()}, assign=True)
    found["assign"] = raised(lambda: steps(old, replaced, 11))
    optimizer = optimizer_of("MeZO", replaced, process_group=dist.group.WORLD, timeout=20, perturbation="scratch")
    optimizer.load_state_dict(old.state_dict())
    steps(optimizer, replaced, 20)
    assert same(weights_of(replaced), alone("MeZO", F32, "scratch"))
    optimizer = begin()()
    optimizer.step(model, batches_of(0, F32))
    for p, whole in zip(model.parameters(), before, strict=True):
        shards.memory_of(p).detach().copy_(shards.memory_of(distribute_tensor(whole, p.device_mesh, p.placements)))  # type: ignore[attr-defined]
    hidden = batches_of(rank, F32)
    found["losses"] = raised(lambda: optimizer.step(lambda: model(hidden[0])))

    def failing(x: Tensor) -> Tensor:
        model(x)
        raise ValueError("mine")

    found["closure"] = raised(lambda: optimizer.step(failing, batches_of(0, F32)))
    found["undone"] = str(same(before, weights_of(model)))
    optimizer = begin(perturbation="inplace")()
    found["closure in place"] = raised(lambda: optimizer.step(failing, batches_of(0, F32)))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(before, weights_of(model), strict=True))
    return found


def two(rank: int, folder: Path) -> dict[str, Any]:
    line = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {"noise": noise(line)}
    for name, dtype, mode in RUNS:
        model = shard(Model(dtype), line)
        calls: list[int] = []
        model.a.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        optimizer = run(name, model, dtype, mode=mode, parallel="data" if name == "MeZO" else "auto")
        found["forwards"] = len(calls) - 4, 20 * optimizer.forwards(0)  # of one micro-batch of two; 4 are the user's
        found[f"{name} {dtype} {mode}"] = weights_of(model)
    found["gathered"] = gathered(line)
    model = shard(Model(), line)
    optimizer = optimizer_of("MeZO", model, process_group=dist.group.WORLD, timeout=20, seed=99, perturbation="inplace")
    checkpoint(folder / "saved", model, optimizer, save=False)
    steps(optimizer, model, 20)
    found["loaded"] = weights_of(model)
    model = shard(Model(), line)
    optimizer = optimizer_of("moments", model, process_group=dist.group.WORLD, timeout=20, seed=99)
    found["unsharded state"] = raised(lambda: optimizer.load_state_dict(state_alone()))
    checkpoint(folder / "moments", model, optimizer, save=False)
    steps(optimizer, model, 20)
    found["moments loaded"] = weights_of(model)
    model = shard(Model(), line)
    optimizer = run("MeZO", model, journal=folder / "run.zoj", resume=True)
    found["resumed"], found["resumed at"] = weights_of(model), optimizer.steps
    optimizer.close_journal()
    model = parallel(Model(), line)
    run("MeZO", model, journal=folder / "tensor.zoj").close_journal()
    found["tensor"] = weights_of(model)
    found["refused"] = refusals(shard(Model(), line), rank)
    return found


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("shards")
    on_four = results(cluster(4, lambda rank: four(rank, folder), folder / "four", limit=300))
    return folder, on_four, results(cluster(2, lambda rank: two(rank, folder), folder / "two", limit=300))


Ends = tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]

# ---- what they found ---------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_whole_tensor(ends: Ends) -> None:
    for found in (*ends[1], *ends[2]):
        assert found["noise"] == []


def test_runs_have_the_bits_of_the_unsharded_run(ends: Ends) -> None:
    """Of a model whose forwards gather whole layers, with parts that are uneven and empty."""
    assert any(found["empty"] for found in ends[1])
    for found in ends[1]:
        assert same(found["MeZO"], alone("MeZO", F32))
    for found in ends[2]:
        assert found["forwards"][0] == found["forwards"][1]
        for name, dtype, mode in RUNS:
            assert same(found[f"{name} {dtype} {mode}"], alone(name, dtype, mode)), (name, mode)


def test_what_is_gathered_is_perturbed_once(ends: Ends) -> None:
    """However long FSDP keeps it, also behind a forward that failed; and parts are clean at every point."""
    for found in (*ends[1], *ends[2]):
        kinds = {key: value for key, value in found["gathered"].items() if ":" not in key}
        assert len(kinds) in (1, 3)
        for kind, weights in kinds.items():
            assert same(weights, alone("MeZO", F32, "scratch", Twice)), kind
            told = {what: found["gathered"][f"{kind}: {what}"] for what in ("write", "replace", "fail", "dirty")}
            assert "False" in told["dirty"] and "True" not in told["dirty"]
            assert told["fail"] == "ValueError: mine"
            assert "b.weight was written to, where FSDP had gathered it," in told["write"]
            assert "b.weight was replaced" in told["replace"]


@pytest.mark.parametrize("form", FORMS)
def test_what_fsdp_can_be_told_changes_no_bit(ends: Ends, form: str) -> None:
    """Nor how far a step moved a weight, which every process says alike, read of the state or not."""
    name, make, _ = FORMS[form]
    for found in ends[1]:
        mode, weights, moved = found["forms"][form]
        assert mode == ("inplace" if form == "ignored" else "scratch")
        want, movement = few(name, make, mode)
        assert same(weights, want) and moved == movement > 0
        assert re.match(r"WorkerError: worker 2, 3 differs from worker 0 in parameter a.weight: ", found["a copy"])


def test_generators_are_those_of_the_forwards(ends: Ends) -> None:
    """Also where parts lie in host memory."""
    for found in ends[1]:
        assert found["devices"] == ({torch.device("meta"), torch.device("cpu")}, {torch.device("cpu")})


def test_checkpoints_and_journals_go_on_over_another_mesh(ends: Ends) -> None:
    """Saved after 10 of 20 steps on four processes, loaded on two, with another seed before; a journal of four, resumed on two."""
    for found in ends[2]:
        assert same(found["loaded"], alone("MeZO", F32))
        assert same(found["moments loaded"], alone("moments", F32, "scratch"))
        assert "as a Tensor, and not as the part of it that this process has" in found["unsharded state"]
        assert same(found["resumed"], alone("MeZO", F32)) and found["resumed at"] == 20


@pytest.mark.parametrize("what", ["run", "tensor", "both", "moments"])
def test_a_sharded_run_is_replayed_by_one_process(ends: Ends, what: str) -> None:
    """Whatever its forwards rounded: the weights are what the recorded numbers make of the whole ones."""
    folder, on_four, on_two = ends
    model = Model()
    zk.replay(model, folder / f"{what}.zoj")
    for found in {"run": on_four, "tensor": on_two, "both": on_four, "moments": on_four}[what]:
        assert same(found["MeZO" if what == "run" else what], weights_of(model))


@pytest.mark.parametrize(("what", "mode"), [("tensor", "inplace"), ("both", "scratch")])
def test_tensor_parallel_runs_have_the_bits_of_the_same_sums(ends: Ends, what: str, mode: str) -> None:
    for found in ends[1] if what == "both" else ends[2]:
        assert same(found[what], alone("MeZO", F32, mode, Summed))
    assert not same(alone("MeZO", F32, mode, Summed), alone("MeZO", F32, mode))


def test_what_is_refused(ends: Ends) -> None:
    want = {
        "process_group": "ValueError: .*sharded.*process_group=None",
        "parallel": "ValueError: .*parallel='directions' would have",
        "data": "ValueError: .*parallel='data' is for processes that each have whole layers",
        "subgroup": "ValueError: .*which are not in process_group",
        "scratch": "ValueError: perturbation='scratch' .* 'a.weight' is in no module of fully_shard",
        "narrow": "ValueError: perturbation='scratch' .* gathers 'a.weight' as torch.bfloat16",
        "gathered as": "ValueError: perturbation='scratch': parameter 'a.weight' is torch.float32, and gathered as torch.bfloat16",
        "not gathered": "ValueError: perturbation='scratch': parameter 'a.weight' is not gathered by FSDP",
        "dual": "ValueError: .*ForwardGradient",
        "lazy": "ValueError: .*leave lazy out",
        "direction": "ValueError: .*direction=LowRank\\(\\) is made of whole tensors",
        "projection": "ValueError: .*projection needs whole tensors",
        "mask": "ValueError: .*has a scale of its own",
        "module": "TypeError: .*no module",
        "check": "ValueError: .*zk.check",
        "partial": "ValueError: .*a term of a sum",
        "copy": "TypeError",
        "closure": "ValueError: mine",
        "closure in place": "ValueError: mine",
        "batches": "WorkerError: .*micro-batches",
        "count": "WorkerError: .*micro-batches",
        "trained": "WorkerError: worker 1 differs from worker 0 in what is trained: '5 parameters",
        "compared": f"{3 * 8 * sharing.FRAME}$",
        "begun": f"{5 * 8 * sharing.FRAME}$",
        "written": "WorkerError: worker 1 differs from worker 0 in parameter norm.weight: ",
        "movement": "WorkerError: worker 1 differs from worker 0 in what it is at: the movement of a step there, the beginning of a step on",
        "assign": "RuntimeError: 6 parameters are no longer in the model .* Make a new optimizer of the model",
        "losses": "WorkerError: worker 1 found other losses than worker 0 ",
    }
    for found in ends[2]:
        refused = found["refused"]
        assert refused.pop("undone") == "True"
        assert {k: v for k, v in refused.items() if not re.match(want[k], v, re.DOTALL)} == {}
