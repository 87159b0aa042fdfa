"""Models whose weights lie in host memory or in a file: the bits of resident runs, what moves, and what is refused."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import gc
import hashlib
import json
import os
import random
import signal
import struct
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zo_kernels as zk
from zo_kernels.views import reads as views_reads
from zo_kernels.views.files import tensors_of, write_tensors

WIDTH, WORDS, LAYERS = 16, 29, 4
SIXTEEN = pytest.mark.filterwarnings("ignore::zo_kernels.ZOWarning")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Tied(nn.Module):
    """A language model whose head is the embedding, read by the parent past its module."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(8, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return functional.linear(self.norm(x), self.head.weight)


@functools.cache
def _base(dtype: torch.dtype) -> Tied:
    torch.manual_seed(4)
    return Tied().to(dtype)


def model_of(dtype: torch.dtype = torch.float32) -> Tied:
    return copy.deepcopy(_base(dtype))


def write(model: nn.Module, path: Path) -> Path:
    """A safetensors file of its parameters, tied ones once."""
    head, parts, at = {}, [], 0
    for name, p in model.named_parameters():
        raw = p.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[p.dtype]
        head[name] = {"dtype": kind, "shape": list(p.shape), "data_offsets": [at, at + len(raw)]}
        parts.append(raw)
        at += len(raw)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    return path


class Stop(BaseException):
    pass


def closure_of(model: nn.Module, step: int) -> Callable[[], Tensor]:
    ids = (torch.arange(10).view(2, 5) * 7 + step) % WORDS
    return lambda: functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten().roll(1))


def train(model: nn.Module, make: Callable[..., zk.ZOStep], steps: int = 5, **more: Any) -> zk.ZOStep:
    optimizer = make(model, lr=1e-2, seed=9, **more)
    while optimizer.steps < steps:
        optimizer.step(closure_of(model, optimizer.steps))
    return optimizer


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


METHODS: dict[str, Callable[..., zk.ZOStep]] = {
    "mezo": functools.partial(zk.MeZOStep, weight_decay=0.1),
    "queries": functools.partial(zk.MeZOStep, queries=2, kind="rademacher", rounding="nearest"),
    "fzoo": functools.partial(zk.FZOO, queries=3),
    "sign": zk.ZOSignSGD,
    "sparse": functools.partial(zk.MeZOStep, direction=zk.RandomSparse(0.5, 2)),
    "blocks": functools.partial(zk.BlockwiseZO),
    "conservative": zk.ZOConservative,
    "recomputed": functools.partial(zk.ZOAdam, state="recomputed", history=3),
}


@SIXTEEN
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_the_resident_run(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    resident = model_of(dtype)
    train(resident, METHODS[name])
    file = write(model_of(dtype), tmp_path / "model.safetensors")
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    for source, every in (("cpu", 1), ("cpu", 8), (file, 0), (file, 2)) if name in ("mezo", "sparse") else (("cpu", 2), (file, 0)):
        model = model_of(dtype)
        if source is file:
            model = model.to("meta")
            model.head.weight = model.embedding.weight
        zk.offload(model, source, write_back=every, folder=tmp_path if every else None, small=0, together=every != 8)
        train(model, METHODS[name])
        assert same(bits(model), bits(resident)), (source, every)
        ids = torch.arange(8).view(2, 4)
        assert torch.equal(model(ids), resident(ids))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_groups_have_their_limits_in_every_block() -> None:
    """Masks and scales by name; some weights are resident, and the groups have blocks in common."""

    def make(model: Tied, **more: Any) -> zk.ZOStep:
        named = list(model.named_parameters())
        mask = zk.pack_mask(torch.arange(3 * WIDTH * WIDTH) % 3 != 1)
        first = {"params": named[::2], "eps": 3e-3, "scale": {"layers.1.up.weight": 0.5, "layers.2.up.weight": 2.0}}
        second = {"params": named[1::2], "weight_decay": 0.2, "scale": {n: 1 + k / 7 for k, (n, _) in enumerate(named[1::2])}}
        return zk.MeZOStep([first | {"mask": {"layers.3.up.weight": mask}}, second], model=model, **more)

    resident, model = model_of(), model_of()
    zk.offload(model, write_back=2, small=1000)
    train(model, make), train(resident, make)
    assert same(bits(model), bits(resident)) and not same(bits(model), bits(model_of()))


def test_a_file_of_another_dtype(tmp_path: Path) -> None:
    resident, file = model_of(torch.bfloat16).float(), write(model_of(torch.bfloat16), tmp_path / "model.safetensors")
    model = model_of()
    zk.offload(model, tmp_path, small=0)
    assert same(bits(model), bits(resident)) and file.exists()
    train(model, zk.MeZOStep), train(resident, zk.MeZOStep)
    assert same(bits(model), bits(resident))


def test_what_comes_and_goes() -> None:
    """A visit a forward and block, but for those that are still there, and no write where none is due."""
    model = model_of()
    offloaded = zk.offload(model, write_back=3, small=1000)
    sizes = offloaded.blocks
    assert list(sizes) == ["embedding", *(f"layers.{k}" for k in range(LAYERS))]
    resident = 4 * (8 * WIDTH + 2 * WIDTH)
    assert offloaded.device_bytes == 2 * sizes["layers.0"] + resident < sum(sizes.values())
    optimizer, seen = zk.MeZOStep(model, 1e-2), []
    for step in range(7):
        before = copy.copy(offloaded.traffic)
        optimizer.step(closure_of(model, step))
        now = offloaded.traffic
        seen.append((now.visits - before.visits, now.bytes - before.bytes, now.written - before.written))
    whole = 2 * sum(sizes.values())
    # The embedding is the head, and there when the next forward begins; the first layer is fetched for the next step.
    assert seen[1] == (2 * (LAYERS + 1), whole, 0)
    assert [written for *_, written in seen[1:]].count(0) >= 3 and sum(w for *_, w in seen) == 2 * sum(sizes.values())


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_block_comes_once_a_step(prefetch: bool) -> None:
    """For both sides, for all queries, for candidates once more; for each micro-batch."""
    for make, batches, visits in (
        (zk.MeZOStep, 1, 1),
        (METHODS["fzoo"], 1, 1),
        (zk.ZOConservative, 1, 2),
        (METHODS["queries"], 3, 3),
    ):
        model, resident = model_of(), model_of()
        offloaded = zk.offload(model, write_back=1, small=0, together=True, prefetch=prefetch)
        a, b = (make(m, lr=1e-2, seed=9) for m in (model, resident))
        for step in range(3):
            before = copy.copy(offloaded.traffic)
            losses = []
            for m, optimizer in ((model, a), (resident, b)):
                losses.append(optimizer.step(lambda k, m=m: closure_of(m, k)(), [step + k for k in range(batches)]))
            assert torch.equal(*losses)
            if step:
                assert offloaded.traffic.visits - before.visits == visits * len(offloaded.blocks)
                assert offloaded.traffic.bytes - before.bytes == visits * sum(offloaded.blocks.values())
        assert same(bits(model), bits(resident))


def test_no_block_goes_for_the_next_one_while_a_forward_waits_for_it() -> None:
    """The middle one of three stays, so that nobody waits there."""
    model, resident = model_of(), model_of()
    offloaded = zk.offload(model, blocks=[f"layers.{k}" for k in range(3)], together=True)
    offloaded._away.thread = AtOnce()  # type: ignore[assignment]
    a, b = (METHODS["queries"](m, lr=1e-2, seed=9) for m in (model, resident))
    for step in range(3):
        before = offloaded.traffic.visits
        for m, optimizer in ((model, a), (resident, b)):
            optimizer.step(lambda k, m=m: closure_of(m, k)(), [step, step + 1, step + 2])
        assert step == 0 or offloaded.traffic.visits - before == 3 * 2
    assert same(bits(model), bits(resident))


@pytest.mark.parametrize("name", ["fzoo", "conservative"])
def test_resident_weights_are_read_at_theta_beside_other_points(name: str) -> None:
    model, resident = model_of(), model_of()
    zk.offload(model, blocks=[f"layers.{k}.up" for k in range(LAYERS)], together=True)
    train(model, METHODS[name]), train(resident, METHODS[name])
    assert same(bits(model), bits(resident))


def test_forwards_side_by_side_draw_the_same_numbers() -> None:
    model, resident = model_of().train(), model_of().train()
    for m in (model, resident):
        for layer in m.layers:
            layer.register_forward_hook(lambda module, _, x: functional.dropout(x, 0.3))
    zk.offload(model, small=0, together=True)
    for m in (model, resident):
        torch.manual_seed(5)
        train(m, METHODS["queries"], steps=3)
        m.drawn = torch.rand(3)
    assert same(bits(model), bits(resident)) and torch.equal(model.drawn, resident.drawn)


@pytest.mark.parametrize("how", ["raises", "interrupt"])
def test_a_forward_that_fails_ends_those_beside_it(how: str) -> None:
    """In whichever thread it runs, at whichever block; a signal, whichever runs then."""
    model, resident = model_of(), model_of()
    offloaded = zk.offload(model, write_back=1, small=0, together=True)
    ours, theirs = (METHODS["queries"](m, lr=1e-2, seed=9) for m in (model, resident))
    threads, calls, at = threading.active_count() + 1, 0, 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at and how == "raises":
            raise Stop
        if calls == at:
            signal.raise_signal(signal.SIGINT)

    for step, place in enumerate((1, 2, 4, 7, 4 * LAYERS)):
        handles = [layer.register_forward_hook(fail) for layer in model.layers]
        calls, at = 0, place
        with pytest.raises(Stop if how == "raises" else KeyboardInterrupt):
            ours.step(closure_of(model, step))
        for handle in handles:
            handle.remove()
        assert how == "interrupt" or calls == at  # none of them went on
        assert ours.steps == step and threading.active_count() <= threads and offloaded._away.gate is None
        ours.step(closure_of(model, step)), theirs.step(closure_of(resident, step))
    assert same(bits(model), bits(resident))


class AtOnce:
    """A thread that is done when it is asked."""

    def submit(self, function: Callable[..., None], *arguments: Any) -> Any:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        function(*arguments)
        future.set_result(None)
        return future


@pytest.mark.parametrize("together", [True, False])
def test_a_fetched_block_takes_no_slot_that_is_in_use(together: bool) -> None:
    """The head is behind a norm in its own slot, and each module has several functions."""
    for small in (0, 1000):
        model, resident = model_of(), model_of()
        zk.offload(model, small=small, together=together)._away.thread = AtOnce()  # type: ignore[assignment]
        train(model, zk.MeZOStep, steps=3), train(resident, zk.MeZOStep, steps=3)
        assert same(bits(model), bits(resident))


def test_adapters_are_resident_and_nothing_is_written(tmp_path: Path) -> None:
    def adapted(model: Tied) -> nn.Module:
        torch.manual_seed(1)
        for p in model.parameters():
            p.requires_grad_(False)
        for layer in model.layers:
            layer.adapter = nn.Linear(WIDTH, WIDTH)
            layer.register_forward_hook(lambda module, _, x: x + module.adapter(x))
        return model

    file = write(model_of(), tmp_path / "model.safetensors")
    for make in (zk.MeZOStep, zk.ZOAdam, zk.LOZO, functools.partial(zk.MeZOStep, perturbation="inplace")):
        model, resident = model_of(), adapted(model_of())
        offloaded = zk.offload(model, file, small=0, together=True)
        train(adapted(model), make), train(resident, make)
        assert same(bits(model), bits(resident)) and offloaded.traffic.written == 0


@pytest.mark.parametrize("source", ["cpu", "file"])
def test_a_run_goes_on_from_its_journal(source: str, tmp_path: Path) -> None:
    """Whatever was written back when a process was killed is gone or left alone: the base and the journal are the run."""
    resident = model_of()
    train(resident, METHODS["queries"], steps=7, journal=tmp_path / "a.zoj").close_journal()
    file = write(model_of(), tmp_path / "model.safetensors")
    for steps in (2, 5, 7):
        model = model_of()
        zk.offload(model, file if source == "file" else "cpu", write_back=2, folder=tmp_path, small=0)
        optimizer = train(model, METHODS["queries"], steps, journal=tmp_path / "b.zoj", resume=True)
        optimizer.close_journal()
        del model, optimizer
    model = model_of()
    zk.offload(model, small=0)
    train(model, METHODS["queries"], 7, journal=tmp_path / "b.zoj", resume=True)
    assert same(bits(model), bits(resident))
    replayed = model_of()
    zk.replay(replayed, tmp_path / "b.zoj")
    assert same(bits(replayed), bits(resident))


def test_a_failed_forward_leaves_everything_as_it_was() -> None:
    resident, model = model_of(), model_of()
    zk.offload(model, write_back=1, small=0)
    ours, theirs = zk.MeZOStep(model, 1e-2, seed=9), zk.MeZOStep(resident, 1e-2, seed=9)
    for step in range(4):
        for at in range(LAYERS):

            def fail(*_: Any) -> None:
                raise Stop

            handle = model.layers[at].register_forward_hook(fail)
            with pytest.raises(Stop):
                ours.step(closure_of(model, step))
            handle.remove()
        ours.step(closure_of(model, step)), theirs.step(closure_of(resident, step))
    assert same(bits(model), bits(resident))


def test_a_block_that_does_not_come_is_named(tmp_path: Path) -> None:
    file = write(model_of(), tmp_path / "model.safetensors")
    model = model_of()
    zk.offload(model, file, small=0)
    optimizer = zk.MeZOStep(model, 1e-2)
    optimizer.step(closure_of(model, 0))
    whole, times = file.read_bytes(), file.stat()
    for wrong, words in ((whole[:3000], "was cut short"), (whole[:-400] + bytes(400), "was written to while")):
        file.write_bytes(wrong)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
        with pytest.raises(OSError, match=words):
            optimizer.step(closure_of(model, 1))
    file.write_bytes(whole)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    optimizer.step(closure_of(model, 1))
    resident = model_of()
    train(resident, lambda model, lr, seed: zk.MeZOStep(model, 1e-2), steps=2)
    assert same(bits(model), bits(resident))


def test_checks_and_looks_see_the_weights() -> None:
    model, resident = model_of(), model_of()
    zk.offload(model, small=0)
    a, b = zk.MeZOStep(model, 1e-2, seed=9), zk.MeZOStep(resident, 1e-2, seed=9)
    for step in range(2):
        a.step(closure_of(model, step)), b.step(closure_of(resident, step))
    assert zk.check(a, closure_of(model, 5)).ok
    with zk.perturbed(a, 77):
        ours = closure_of(model, 3)()
    with zk.perturbed(b, 77):
        assert torch.equal(ours, closure_of(resident, 3)())
    twin = copy.deepcopy(model)
    assert same(bits(twin), bits(resident)) and twin.layers[0].up.weight.data_ptr() != model.layers[0].up.weight.data_ptr()
    views = [layer.up.weight[:2] for layer in model.layers]  # of memory that another block has by now
    assert torch.equal(torch.stack([v.clone() for v in views]), torch.stack([layer.up.weight[:2] for layer in resident.layers]))
    halves = [layer.up.weight.chunk(2) for layer in model.layers]
    assert all(torch.equal(a, b.up.weight[: len(a)]) for (a, _), b in zip(halves, resident.layers, strict=True))
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert all((arrays[name] == p.detach().numpy()).all() for name, p in resident.named_parameters())


@pytest.mark.parametrize("blocks", [None, ["layers.0"]])
def test_a_backward_pass_never_takes_one_blocks_weights_for_anothers(blocks: list[str] | None) -> None:
    """torch keeps a forward's weights by reference: where another block, or another step, has taken their memory, it says so."""
    model, resident = model_of(), model_of()
    zk.offload(model, small=0, blocks=blocks)
    optimizer = zk.MeZOStep(model, 1e-2)
    loss = closure_of(model, 0)()
    if blocks:
        optimizer.step(closure_of(model, 0))
        closure_of(model, 1)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    if blocks:
        model.zero_grad()
        train(resident, lambda model, lr, seed: zk.MeZOStep(model, 1e-2), steps=1)
        closure_of(model, 1)().backward(), closure_of(resident, 1)().backward()
        for p, q in zip(model.parameters(), resident.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("alias", [False, True])
def test_threads_that_read_one_model_take_turns(alias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that one of them needs never takes the place of what the other one's function reads."""
    model, resident = model_of(), model_of()
    away, failed, wrong = zk.offload(model, small=0)._away, list[BaseException](), list[int]()
    bring = away._bring

    def slowly(block: Any) -> None:
        bring(block)
        time.sleep(1e-3)  # between a block's coming and its use

    monkeypatch.setattr(away, "_bring", slowly)
    monkeypatch.setattr(away.reads, "read", lambda p: time.sleep(3e-3))  # while a function has it
    truth = [closure_of(resident, step)() for step in range(2)]

    def view_of(weight: Tensor, own: int) -> Tensor:
        time.sleep(1.5e-3 * own)  # the other thread's function has this one
        return weight.t()

    def read(own: int) -> None:
        try:
            for _ in range(3):
                if alias:
                    views = [view_of(layer.up.weight, own) for layer in model.layers]
                    pairs = zip(views, resident.layers, strict=True)
                    wrong.extend(k for k, (view, layer) in enumerate(pairs) if not torch.equal(view, layer.up.weight.t()))
                elif not torch.equal(closure_of(model, own)(), truth[own]):
                    wrong.append(own)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(own,)) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and not wrong


def test_a_step_and_another_thread_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block is trained; what shares its slot is frozen, and read by a thread meanwhile."""
    model, other, wrong, over = model_of(), model_of(), list[Any](), threading.Event()
    for m in (model, other):
        m.requires_grad_(False)
        m.layers[2].requires_grad_(True)
    away = zk.offload(model, small=0)._away
    bring = away._bring

    def slowly(block: Any) -> None:
        bring(block)
        time.sleep(1e-3)

    ours, theirs = (zk.MeZOStep(m, lr=1e-2, seed=9) for m in (model, other))
    x = torch.ones(1, 1, WIDTH)
    truth = other.layers[0](x)
    assert len({away.slots[p.zo_block.slot] is away.slots[0] for p in (model.layers[0].up.weight, model.layers[2].up.weight)}) == 1

    def read() -> None:
        while not over.is_set():
            try:
                wrong.extend([1] if not torch.equal(model.layers[0](x), truth) else [])
            except BaseException as error:
                wrong.append(error)

    thread = threading.Thread(target=read)
    for step in range(4):
        if step == 1:
            monkeypatch.setattr(away, "_bring", slowly)
            thread.start()
        ours.step(closure_of(model, step)), theirs.step(closure_of(other, step))
    over.set()
    thread.join()
    assert not wrong and same(bits(model), bits(other))


@pytest.mark.parametrize("together", [True, False])
def test_another_thread_is_no_forward_of_a_step(together: bool) -> None:
    """Who reads frozen blocks meanwhile gets them, but where forwards take turns, which are theirs."""
    model, other, told = model_of(), model_of(), list[BaseException | Tensor]()
    for m in (model, other):
        m.requires_grad_(False)
        torch.manual_seed(1)
        m.layers[0].adapter = nn.Linear(WIDTH, WIDTH)
        m.layers[0].register_forward_hook(lambda module, _, x: x + module.adapter(x))
    zk.offload(
        model, small=0, together=together, blocks=["embedding", "places", *(f"layers.{k}" for k in range(1, LAYERS)), "norm"]
    )
    ours, theirs = (zk.MeZOStep(m, lr=1e-2, seed=9) for m in (model, other))
    x = torch.ones(1, 1, WIDTH)

    def read() -> None:
        try:
            told.append(model.layers[3](x))
        except BaseException as error:
            told.append(error)

    def look(*_: Any) -> None:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()

    for step in range(2):
        handle = model.layers[0].register_forward_hook(look) if step else None  # the first one is looked at in its own thread
        ours.step(closure_of(model, step)), theirs.step(closure_of(other, step))
    assert handle is not None and len(told) == 2 and same(bits(model), bits(other))
    for one in told:
        assert (
            "is read in another thread" in str(one)
            if together
            else isinstance(one, Tensor) and torch.equal(one, other.layers[3](x))
        )


def test_refusals(tmp_path: Path) -> None:
    model = model_of()
    start = bits(model)
    file = write(model, tmp_path / "model.safetensors")
    for wrong, words in (
        ({"source": file, "write_back": 2}, "needs a folder"),
        ({"write_back": -1}, "write_back=-1"),
        ({"blocks": ["layers.9"]}, "no module 'layers.9'"),
        ({"blocks": ["layers", "layers.0"]}, "another block inside"),
        ({"source": write(Layer(), tmp_path / "other.safetensors")}, "no tensor for parameter"),
        ({"source": write(Tied(2), tmp_path / "short.safetensors")}, "layers.2"),
        ({"blocks": []}, "name its blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            zk.offload(model, **wrong)
    assert same(bits(model), start)
    zk.offload(model, small=0)
    with pytest.raises(ValueError, match="offloaded already"):
        zk.offload(model)
    for options, words in (
        ({"perturbation": "inplace"}, "perturbation='inplace'"),
        ({"cuda_graph": True}, "cuda_graph"),
        ({"rule": zk.Momentum()}, "keeps a state"),
        ({"direction": zk.LowRank(2)}, "LowRank"),
        ({"direction": zk.MagnitudeSparse()}, "MagnitudeSparse"),
        ({"estimator": zk.ForwardGradient()}, "ForwardGradient"),
        ({"projection": zk.Projection(layers=["up.weight"])}, "projection"),
        ({"anchor": zk.Anchor(0.1, 1, start)}, "anchor"),
    ):
        with pytest.raises(ValueError, match=words):
            zk.ZOStep(model, 1e-2, **options)
    with pytest.raises(RuntimeError, match="pickled"):
        torch.save(model.state_dict(), tmp_path / "state.pt")
    with pytest.raises(RuntimeError, match="written to"), torch.no_grad():
        model.norm.weight.mul_(2)
    assert torch.equal(model.norm.weight, start["norm.weight"])
    with pytest.raises(ValueError, match="resume the journal"):
        zk.replay(model, tmp_path / "none.zoj")
    captured = model.layers[0].up.weight
    with pytest.raises(RuntimeError, match="read past its module's attribute"):
        zk.MeZOStep(model, 1e-2).step(lambda: captured.square().sum())
    with pytest.raises(RuntimeError, match="of which two are there"):
        torch.cat([layer.norm.weight for layer in model.layers])


class Kept(Tied):
    """With buffers that a checkpoint has, and one that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.ones(3), persistent=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_has_every_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    """Those of no block and buffers too, a tied one once: byte for byte what safetensors writes of a resident run, onto the file that is read, too."""
    torch.manual_seed(3)
    resident = Kept().to(dtype)
    with torch.no_grad():
        resident.mean.fill_(7)
    own = resident.state_dict()
    named = {name: t for name, t in own.items() if name != "head.weight"}
    file = tmp_path / "model.safetensors"
    write_tensors(file, named, named.__getitem__)
    model = Kept().to(dtype)
    offloaded = zk.offload(model, file)  # embeddings, norm and places are too small for blocks
    assert torch.equal(model.mean, resident.mean)
    train(resident, zk.MeZOStep, steps=3)
    train(model, zk.MeZOStep, steps=3)
    there = {name: values.clone() for name, values in offloaded.parameters()}
    assert there.keys() == dict(resident.named_parameters()).keys()
    assert all(torch.equal(values, own[name]) for name, values in there.items())
    from safetensors import torch as library

    offloaded.save(file)
    library.save_file(named, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["library.safetensors", "model.safetensors"]
    train(model, zk.MeZOStep, steps=1)  # from the file that was there


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    file = write(model_of(), tmp_path / "model.safetensors")
    offloaded = zk.offload(model_of(), file)
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    os.truncate(file, 999)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        offloaded.save(tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2


def test_what_a_file_and_a_model_lack_of_each_other(tmp_path: Path) -> None:
    """Tensors that the model has no place for, once in words; buffers without values; no such file."""
    file = write(Tied(6), tmp_path / "deeper.safetensors")
    with pytest.warns(UserWarning, match=r"has 12 tensors that the model has no place for, .*: layers\.4\..*this model's\?"):
        zk.offload(model_of(), file)
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        zk.offload(model_of(), "facebook/opt-1.3b")
    with torch.device("meta"):
        empty = Kept()
    own = {name: t for name, t in Kept().state_dict().items() if name != "head.weight"}
    write_tensors(tmp_path / "own.safetensors", own, own.__getitem__)
    with pytest.raises(ValueError, match=r"buffer 'count' is on the meta device .*init_empty_weights"):
        zk.offload(empty, tmp_path / "own.safetensors")
    assert empty.mean.is_meta and empty.norm.weight.is_meta
    del empty.count
    empty.table = torch.ones(3)
    zk.offload(empty, tmp_path / "own.safetensors")
    assert torch.equal(empty.mean, own["mean"])


def test_nothing_is_left_of_a_model_that_goes(tmp_path: Path) -> None:
    model = model_of()
    offloaded = zk.offload(model, small=0)
    train(model, zk.MeZOStep, steps=2)
    gone = weakref.ref(model), weakref.ref(offloaded._away), weakref.ref(model.layers[0].up.weight)
    del model, offloaded
    gc.collect(), gc.collect()  # what watches the parameters goes when the blocks are gone
    assert [one() for one in gone] == [None] * 3


def test_headers_of_files_are_read_or_refused(tmp_path: Path) -> None:
    whole = write(model_of(), tmp_path / "model.safetensors").read_bytes()
    assert tensors_of(tmp_path / "model.safetensors")["norm.bias"].shape == (WIDTH,)
    draw, path, refused = random.Random(0), tmp_path / "broken.safetensors", []
    for _ in range(300):
        data = bytearray(whole[: draw.choice((len(whole), draw.randrange(1500)))])
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data)) if data else 0 : 1] = draw.choice((b"", b"{", b"\xff", b"9" * 30, b"null"))
        path.write_bytes(data)
        try:
            found = tensors_of(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert all(one.start + one.nbytes <= len(data) for one in found.values())
    assert len(refused) > 150 and all("broken.safetensors is no safetensors file" in words for words in refused)


class Doubling(Tensor):
    """Whose products are twice as large."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result if result is NotImplemented else result * 2 if func in PRODUCTS else result


PRODUCTS = (functional.linear, Tensor.__matmul__, Tensor.matmul, torch.matmul)


@pytest.mark.parametrize("product", [functional.linear, lambda x, w, b: (w @ x.t()).t() + b])
def test_activations_of_a_class_of_the_users(product: Callable[..., Tensor]) -> None:
    """Its own functions are asked, whichever argument comes first, in evaluation and in steps."""

    def losses(away: bool) -> list[Any]:
        torch.manual_seed(4)
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])

        def forward() -> Tensor:
            x: Tensor = torch.ones(3, WIDTH).as_subclass(Doubling)
            for layer in model:
                x = product(x, layer.weight, layer.bias)
            assert type(x) is Doubling
            return x.square().mean()

        if away:
            zk.offload(model, small=0)
        optimizer = zk.MeZOStep(model, lr=1e-4, seed=9)
        with torch.no_grad():
            return [float(forward()) if k % 2 else float(optimizer.step(forward)) for k in range(6)]

    assert losses(True) == losses(False)


def test_a_thread_in_the_middle_of_a_function_when_forwards_begin_to_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads stays until it is done."""
    model, other, found, inside = model_of(), model_of(), list[Any](), threading.Event()
    away = zk.offload(model, small=0, together=True)._away
    ours, theirs = (zk.MeZOStep(m, lr=1e-2, seed=9) for m in (model, other))
    ours.step(closure_of(model, 0)), theirs.step(closure_of(other, 0))
    truth = other.layers[0].up.weight.detach().clone()

    def slow(p: Tensor) -> None:
        if threading.current_thread() is reader:
            inside.set()
            time.sleep(0.2)

    def look() -> None:
        found.append(torch.clone(model.layers[0].up.weight))

    reader = threading.Thread(target=look)
    monkeypatch.setattr(away.reads, "read", slow)
    reader.start()
    inside.wait()
    ours.step(closure_of(model, 1)), theirs.step(closure_of(other, 1))
    reader.join()
    assert torch.equal(found[0], truth) and same(bits(model), bits(other))


@pytest.mark.parametrize("function", [len, lambda t: 1 - t, lambda t: t.norm(), lambda t: t.unique(), lambda t: t.split(4)])
def test_no_thread_sees_a_parameter_unwatched(function: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a function of another thread reads is read while its class is that which asks."""
    model, seen = model_of(), list[type]()
    reads, p = zk.offload(model, small=0)._away.reads, model.layers[1].up.weight
    watched, unwatched = type(p), views_reads._unwatched

    def look(*arguments: Any) -> Any:
        seen.append(type(p))
        return unwatched(*arguments)

    monkeypatch.setattr(views_reads, "_unwatched", look)
    monkeypatch.setattr(reads, "read", lambda t: seen.append(type(p)))
    function(p)
    assert seen and set(seen) == {watched}
