"""What MeZOStep promises on a CUDA device. Run by `make gpu-check`."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.models import FAMILIES, loss_of, make, tokens
from tests.optim.test_device_numbers import METHODS
from tests.optim.test_graph import METHODS as GRAPHED
from tests.optim.test_graph import Small, inputs, readable, steps_of
from zo_kernels import journal

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_perturbation_gives_the_same_loss(family: str, dtype: torch.dtype, backend: str) -> None:
    model = make(family, dtype).cuda()
    ids = tokens().cuda()
    before = copy.deepcopy(model.state_dict())
    seen: dict[str, list[Tensor]] = {"scratch": [], "inplace": []}
    for mode, losses in seen.items():

        def closure(losses: list[Tensor] = losses) -> Tensor:
            losses.append(loss_of(model, ids))
            return losses[-1]

        zk.MeZOStep(model, lr=0.0, eps=1e-2, seed=3, perturbation=mode, backend=backend).step(closure)
        if mode == "scratch":
            assert all(same_bits(t, before[n]) for n, t in model.state_dict().items())
    assert seen["scratch"][0] == seen["inplace"][0]
    assert seen["scratch"][0] != seen["scratch"][1]


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_run_has_the_same_bits_on_cpu_and_gpu(dtype: torch.dtype, mode: str, backend: str) -> None:
    """Given the same losses, as host numbers or as device tensors, every step writes the same bits."""
    values = [(0.7, 0.69), (0.71, 0.70), (float("nan"), 0.7), (0.6, 0.65)]
    finals = []
    for device, as_tensor in (("cpu", False), ("cuda", False), ("cuda", True)):
        model = make("llama-tied", dtype).to(device)
        step = zk.MeZOStep(
            model,
            lr=1e-2,
            eps=1e-2,
            seed=9,
            weight_decay=0.1,
            clip=3.0,
            perturbation=mode,
            backend=backend if device == "cuda" else None,
        )
        feed = itertools.chain.from_iterable(values)
        for _ in values:
            step.step(lambda: torch.tensor(next(feed), device=device, dtype=torch.float64) if as_tensor else next(feed))  # noqa: B023
        assert step.skipped == 1
        finals.append([p.detach().cpu() for p in model.parameters()])
    for other in finals[1:]:
        assert all(same_bits(a, b) for a, b in zip(finals[0], other, strict=True))


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
def test_a_step_never_waits_for_the_device(mode: str, backend: str) -> None:
    model = make("llama", torch.float16).cuda()
    ids = tokens().cuda()
    step = zk.MeZOStep(model, lr=1e-5, eps=1e-3, weight_decay=0.1, perturbation=mode, backend=backend)
    for _ in range(2):  # compile, upload tables, watch
        step.step(lambda: loss_of(model, ids))
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step.step(lambda: loss_of(model, ids))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert step.skipped == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_thousand_steps_at_lr_0_leave_every_bit(dtype: torch.dtype) -> None:
    model = make("llama-tied", dtype).cuda()
    ids = tokens(1, 4).cuda()
    before = copy.deepcopy(model.state_dict())
    step = zk.MeZOStep(model, lr=0.0, eps=1e-3)
    for _ in range(2000):
        step.step(lambda: loss_of(model, ids))
    assert all(same_bits(t, before[n]) for n, t in model.state_dict().items())


def test_scratch_memory_over_inference() -> None:
    """One buffer of `scratch_bytes`, and nothing of the size of the model: 5.7 MB more were seen on an H100 (tables, an embedding's
    rows, rounding of blocks), 16 MiB are allowed."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=50272, hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = OPTForCausalLM(config).half().cuda().eval()
    ids = torch.randint(0, 50272, (4, 32), device="cuda")
    with torch.no_grad():
        loss_of(model, ids)
        torch.cuda.reset_peak_memory_stats()
        loss_of(model, ids)
        inference = torch.cuda.max_memory_allocated()
    step = zk.MeZOStep(model, lr=1e-6)
    step.step(lambda: loss_of(model, ids))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step.step(lambda: loss_of(model, ids))
    extra = torch.cuda.max_memory_allocated() - inference
    assert extra <= step._views.now.limit + 16 * 2**20


def test_the_generators_of_the_device_are_kept() -> None:
    model = make("llama").cuda()
    step = zk.MeZOStep(model, lr=0.0)
    draws: list[float] = []

    def closure() -> Tensor:
        draws.append(torch.rand((), device="cuda").item())
        return loss_of(model, tokens().cuda())

    torch.cuda.manual_seed(3)
    step.step(closure)
    after = torch.rand((), device="cuda").item()
    torch.cuda.manual_seed(3)
    assert draws == [torch.rand((), device="cuda").item()] * 2
    assert after == torch.rand((), device="cuda").item()


@pytest.mark.parametrize("options", [{"perturbation": "inplace"}, {}, {"scratch_bytes": 9000}], ids=str)
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-tied", "lora"])
def test_graphs_give_the_same_bits(family: str, options: dict[str, object], backend: str) -> None:
    """A step captured as a CUDA graph, with a schedule, two shapes of batch and weight decay, against steps without."""
    model = make(family, torch.float16).cuda()
    other = copy.deepcopy(model)
    data = [tokens(2 + k % 2, 6, seed=k).cuda() for k in range(10)]
    found = []
    for m, graph in ((model, True), (other, False)):
        step = zk.MeZOStep(m, lr=1e-3, eps=1e-2, seed=5, weight_decay=0.1, clip=50.0, backend=backend, cuda_graph=graph, **options)
        schedule = torch.optim.lr_scheduler.LinearLR(step, 1.0, 0.1, total_iters=len(data))
        losses = []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="cuda_graph")  # no silent fallback
            for batch in data:
                losses.append(step.step(lambda b: loss_of(m, b), [batch]))  # noqa: B023
                schedule.step()
        if graph:
            assert len(step._schedule.graphs.captured) == 2
        found.append([loss.item() for loss in losses])
    assert found[0] == found[1]
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_large_matrix_needs_no_copy_of_itself() -> None:
    """A head of 50,000 rows at the default buffer: parts, and the whole step within 64 MiB of inference."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=50272, hidden_size=2048, ffn_dim=8192, num_hidden_layers=2, num_attention_heads=32, word_embed_proj_dim=2048
    )
    model = OPTForCausalLM(config).half().cuda().eval()
    ids = torch.randint(0, 50272, (16, 32), device="cuda")

    def closure() -> Tensor:
        return model(input_ids=ids, logits_to_keep=1).logits.float().square().mean()

    with torch.no_grad():
        closure()
        torch.cuda.reset_peak_memory_stats()
        closure()
        inference = torch.cuda.max_memory_allocated()
    step = zk.MeZOStep(model, lr=1e-6)
    for _ in range(2):
        step.step(closure)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step.step(closure)
    assert torch.cuda.max_memory_allocated() - inference <= 64 * 2**20


@pytest.mark.parametrize(
    "options", [{}, {"perturbation": "inplace"}, {"perturbation": "inplace", "lazy": True}, {"cuda_graph": True}], ids=str
)
def test_recorded_runs_are_replayed_to_their_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    """On the device and on the CPU; no step waits for the device, so the file lags, and state_dict() brings it up to date."""
    base, ids, path = make("llama", torch.float16), tokens().cuda(), tmp_path / "run.zoj"
    model = copy.deepcopy(base).cuda()
    step = zk.MeZOStep(model, lr=1e-2, eps=1e-2, seed=3, clip=5.0, weight_decay=0.1, journal=path, **options)

    def closure(x: Tensor) -> Tensor:
        return loss_of(model, ids) + x

    xs = [torch.tensor(x, device="cuda") for x in (0.1, 0.2, math.nan, 0.3, 0.4, 0.5)]
    for k, x in enumerate(xs):
        if k >= 3:  # everything is warm, and captured
            torch.cuda.set_sync_debug_mode("error")
        try:
            step.step(closure, [x])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    step.state_dict()
    past = journal.read(path)
    assert len(past) == 6 and past.flag("skipped").tolist() == [k == 2 for k in range(6)]
    step.close_journal()
    for device in ("cuda", "cpu"):
        again = copy.deepcopy(base).to(device)
        zk.replay(again, past)
        assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(again.parameters(), model.parameters(), strict=True)), device


WAITING = {"dizo", "layer-scale"}  # whose own forwards' losses the host reads


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_replayed_to_its_bits(name: str, mode: str, tmp_path: Path) -> None:
    """Recorded on the device, without waiting for it, and replayed there and on the CPU."""
    if name == "forward-gradient" and mode == "inplace":
        pytest.skip("forward gradients need shadows")
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(9, 13), nn.Linear(13, 5)).half()
    model, x, path = copy.deepcopy(base).cuda(), torch.randn(4, 9).half().cuda(), tmp_path / "run.zoj"
    step = METHODS[name](model, seed=5, perturbation=mode, journal=path)

    def closure() -> Tensor:
        loss: Tensor = model(x).float().square().mean()
        return loss

    for k in range(8):
        if k >= 5 and name not in WAITING:  # everything is warm: each block, each table
            torch.cuda.set_sync_debug_mode("error")
        try:
            step.step(closure)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step.skipped == 0
    step.close_journal()
    for device in ("cuda", "cpu"):
        again = copy.deepcopy(base).to(device)
        zk.replay(again, path)
        assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(again.parameters(), model.parameters(), strict=True)), device


# ---- what nobody has seen yet -------------------------------------------------------------------------------------------


FRESH = """
import sys, torch, warnings, zo_kernels as zk
warnings.filterwarnings("error", message="cuda_graph")
backend, mode = sys.argv[1:]
model = torch.nn.Sequential(torch.nn.Linear(9, 13), torch.nn.Linear(13, 5)).half().cuda()
step = zk.MeZOStep(model, lr=1e-3, weight_decay=0.1, cuda_graph=True, backend=backend, perturbation=mode)
closure = lambda x: model(x).float().square().mean()
before = model[0].weight.detach().clone()
for k in range(3):
    step.step(closure, [torch.full((4, 9), 0.1 * k + 0.1, device="cuda").half()])
assert len(step._schedule.graphs.captured) == 1 and step.skipped == 0
assert not torch.equal(before, model[0].weight), "an empty graph"
"""


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
def test_a_graphed_step_in_a_fresh_process(backend: str, mode: str) -> None:
    """Where no kernel is loaded before the rehearsal."""
    done = subprocess.run([sys.executable, "-c", FRESH, backend, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("breaking", ["item", "raise"])
def test_a_capture_that_breaks_leaves_the_process_as_it_was(breaking: str, backend: str) -> None:
    model, x = nn.Linear(9, 5).half().cuda(), torch.ones(4, 9, device="cuda").half()
    calls = [0]

    def closure(x: Tensor) -> Tensor:
        loss: Tensor = model(x).float().square().mean()
        if torch.cuda.is_current_stream_capturing():
            calls[0] += 1
            if breaking == "raise":
                raise ValueError("in a capture")
            loss.item()
        return loss

    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="cuda_graph=True: the step cannot be captured"):
        zk.MeZOStep(model, lr=1e-3, cuda_graph=True, backend=backend).step(closure, [x])
    assert calls == [1]
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    assert torch.rand(8, device="cuda").isfinite().all()
    other = zk.MeZOStep(model, lr=1e-3, cuda_graph=True, backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graph")
        other.step(lambda x: model(x).float().square().mean(), [x])
    assert other._schedule.graphs is not None and len(other._schedule.graphs.captured) == 1


def test_batches_on_the_host_are_refused() -> None:
    model = nn.Linear(9, 5).cuda()
    step = zk.MeZOStep(model, lr=1e-3, cuda_graph=True)
    with pytest.warns(UserWarning, match="a batch has a tensor on cpu: move it to cuda:0"):
        step.step(lambda x: model(x.cuda()).square().mean(), [torch.ones(4, 9)])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("graph", [False, True])
def test_weights_on_a_second_device(graph: bool, backend: str) -> None:
    """While the first is current."""
    models = [nn.Linear(9, 5).half().to(f"cuda:{k}") for k in (0, 1)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        x = torch.ones(4, 9, device=model.weight.device).half()
        step = zk.MeZOStep(model, lr=1e-2, seed=1, cuda_graph=graph, backend=backend)
        for _ in range(3):
            step.step(lambda x, model=model: model(x).float().square().mean(), [x])
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_graphs_of_two_shapes_among_eager_steps_keep_their_memory(backend: str) -> None:
    model = make("llama", torch.float16).cuda()
    graphed = zk.MeZOStep(model, lr=1e-5, cuda_graph=True, backend=backend)
    eager = zk.MeZOStep(model, lr=1e-5, backend=backend)
    data = [tokens(2 + k, 6).cuda() for k in (0, 1)]

    def closure(x: Tensor) -> Tensor:
        return loss_of(model, x)

    held = []
    for k in range(300):
        (eager if k % 5 == 4 else graphed).step(closure, [data[k % 2]])
        if k in (20, 299):
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
    assert held[0] == held[1]


def test_a_step_from_another_thread(backend: str) -> None:
    model, x = nn.Linear(9, 5).half().cuda(), torch.ones(4, 9, device="cuda").half()
    step = zk.MeZOStep(model, lr=1e-3, cuda_graph=True, backend=backend)

    def closure(x: Tensor) -> Tensor:
        loss: Tensor = model(x).float().square().mean()
        return loss

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(step.step, closure, [x]).result().isfinite()
    assert step.step(closure, [x]).isfinite()


def test_graphed_journals_are_resumed(tmp_path: Path, backend: str) -> None:
    base, path = make("llama", torch.float16), tmp_path / "run.zoj"
    data = [tokens(2, 6, seed=k).cuda() for k in range(8)]
    finals = []
    for cut in (8, 4):
        model, there = copy.deepcopy(base).cuda(), path.with_suffix(f".{cut}")
        for first in range(0, 8, cut):
            model = copy.deepcopy(base).cuda()
            step = zk.MeZOStep(model, lr=1e-3, seed=3, cuda_graph=True, backend=backend, journal=there, resume=first > 0)
            for batch in data[first : first + cut]:
                step.step(lambda b, m=model: loss_of(m, b), [batch])
            step.close_journal()
        finals.append([p.detach().cpu() for p in model.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*finals, strict=True))


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
@pytest.mark.parametrize("name", GRAPHED)
def test_states_in_a_graph_are_those_without(name: str, mode: str, backend: str, tmp_path: Path) -> None:
    """Rules that keep a state and directions that are prepared, with two shapes of batch, a schedule, a decay and a step that is skipped; and the
    record's replay on the CPU."""
    models, states = [], []
    for graph in (True, False):
        model, path = Small(torch.bfloat16).cuda(), tmp_path / f"{graph}.zoj"
        step = GRAPHED[name](model, seed=5, weight_decay=0.1, perturbation=mode, journal=path, cuda_graph=graph, backend=backend)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="cuda_graph")  # no silent fallback
            steps_of(step, model, [x.cuda() for x in inputs(9, torch.bfloat16)])
        step.close_journal()
        assert step.skipped == 1
        if graph:
            assert step._schedule.graphs is not None and len(step._schedule.graphs.captured) == 2
        models.append(model)
        states.append(readable(step.state_dict()))
    assert states[0] == states[1]
    models.append(Small(torch.bfloat16))
    zk.replay(models[2], tmp_path / "True.zoj")
    for a, b, c in zip(*(m.parameters() for m in models), strict=True):
        assert same_bits(a, b) and same_bits(a.cpu(), c)


LAZY = """
import sys, torch, zo_kernels as zk
weights = torch.nn.Parameter(torch.ones(64, device="cuda"))
step = zk.MeZOStep([("w", weights)], lr=0.0, eps=0.5, perturbation="inplace", lazy=True, backend=sys.argv[1])
step.step(lambda: weights.square().sum())
assert (weights != 1).all(), "ahead"
import atexit
flush = step.flush
def seen():
    flush()
    assert (weights - 1).abs().max() <= 3 * 6 * 2.0**-24, weights
    print("flushed")
step.flush = seen
atexit.register(seen)  # before torch is torn down, behind the library's own
"""


def test_a_lazy_run_is_flushed_as_the_process_ends(backend: str) -> None:
    """While the device can still be asked."""
    done = subprocess.run([sys.executable, "-c", LAZY, backend], capture_output=True, text=True)
    assert done.returncode == 0 and "flushed" in done.stdout and not done.stderr, done.stderr[-2000:]


KILLED = """
import os, signal, sys, torch, zo_kernels as zk
from tests.optim.test_graph import METHODS, Small, inputs
name, path, backend, last = sys.argv[1:]
model = Small(torch.bfloat16).cuda()
step = METHODS[name](model, seed=5, cuda_graph=True, backend=backend, journal=path, resume=os.path.exists(path))
data = [x.cuda() for x in inputs(12, torch.bfloat16, bad=None)]
for k in range(step.steps, len(data)):
    step.step(model, [data[k]])
    if k == int(last):
        step.state_dict()  # what is behind the kernels is in the file
        os.kill(os.getpid(), signal.SIGKILL)
step.close_journal()
torch.save([p.detach().cpu() for p in model.parameters()], path + ".pt")
"""


@pytest.mark.parametrize("name", ["momentum", "adam", "hizoo"])
def test_a_graphed_run_that_is_killed_goes_on(name: str, backend: str, tmp_path: Path) -> None:
    finals = []
    for kills in ((), (3, 7)):
        path = str(tmp_path / f"{len(kills)}.zoj")
        for last in (*kills, 99):
            command = [sys.executable, "-c", KILLED, name, path, backend, str(last)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
            assert done.returncode == (0 if last == 99 else -9), done.stderr[-2000:]
        finals.append(torch.load(path + ".pt"))
    assert all(same_bits(a, b) for a, b in zip(*finals, strict=True))
