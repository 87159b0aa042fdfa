"""A whole training step of a randomly initialised model: seconds, peak memory and bytes, beside two bare forwards and MeZO's loop.

    python benchmarks/step.py --out step.csv          with a GPU OPT-125M to OPT-13B in fp16 at 16 x 32 and 16 x 400 tokens,
                                                      otherwise llama-15m, llama-110m and opt-125m in fp32 and bf16 at 16 x 32
    python benchmarks/step.py --out step.csv --device cuda --dtype float16 --model-shape opt-1.3b --tokens 16x32 16x400

Belongs here: whole steps, on any device. Does not belong here: single passes (cpu_pass.py, gpu_pass.py), learning. Random weights
take the time and memory of trained ones.

Modes: `forwards` two forwards and nothing else, `rewrite` these and one rewrite of all weights without arithmetic (the bound of a step that
shares nothing between its forwards), those of `OURS` our MeZOStep, `mezo` the loop of MeZO's public code,
on a copy of the model of its own, since it moves every weight to new memory. The closure is single-token classification: logits of
the last position only, cross-entropy in fp32. Full logits would make the forwards longer and every overhead look smaller.

What does not fit is left out with a notice: memory is estimated before anything is allocated, and running out of it is caught.

Bytes are counted, not modelled, in a step of their own: every pass over weights by its plan (`perturb_traffic`), every operation of torch
that our code runs, and what the forwards read of the weights (`harness.Traffic`). They are bytes that kernels load and store: what a
cache serves counts too. The lower bound is that the forwards read the weights and the update reads and writes each weight once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import contenders
import harness
import torch
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels import _backends as backends
from zo_kernels.plan import Pass, Plan

# Our modes: the arguments of MeZOStep. One that it refuses here, by an error or a graph that it does without, is left out with the reason.
OURS: dict[str, dict[str, Any]] = {
    "scratch": {"perturbation": "scratch"},
    "scratch-leaf": {"perturbation": "scratch", "scratch_bytes": 1},  # a pass for every use of a weight, whole matrices
    "inplace": {"perturbation": "inplace"},
    "lazy": {"perturbation": "inplace", "lazy": True},
    "scratch-graph": {"perturbation": "scratch", "cuda_graph": True},
    "inplace-graph": {"perturbation": "inplace", "cuda_graph": True},
}
# Arguments that change how a step is launched, not what it does to weights: its passes can be counted and timed without them only.
LAUNCHING = ("cuda_graph",)
MODES = ("forwards", "rewrite", *OURS, "mezo")
LR, EPS = 1e-7, 1e-3
COLUMNS = (
    *("model", "weights", "tensors", "device", "dtype", "threads", "batch", "sequence", "mode"),
    *("calls", *harness.TIMING_COLUMNS, "overhead_percent", "passes_s", "rest_s", "peak_bytes", "peak_over_inference_bytes"),
    *("forward_bytes", "weight_bytes_read", "weight_bytes_written", "lower_bound_bytes"),
)
LASTING = 0.3  # seconds that a timing should last at least, if not more than MOST_CALLS steps are needed for it
MOST_CALLS = 5
Size = tuple[int, int]  # sequences, tokens of each
MARGIN = 1 << 29  # bytes that an estimate of memory leaves for libraries and fragmentation

# hidden, ffn, heads, layers; the vocabulary and the positions are the published ones.
OPT = {
    "opt-125m": (768, 3072, 12, 12),
    "opt-1.3b": (2048, 8192, 32, 24),
    "opt-2.7b": (2560, 10240, 32, 32),
    "opt-6.7b": (4096, 16384, 32, 32),
    "opt-13b": (5120, 20480, 40, 40),
}
LLAMA = {"llama-tiny": (64, 172, 4, 2, 512), "llama-15m": (288, 768, 6, 6, 32000), "llama-110m": (768, 2048, 12, 12, 32000)}
GPT2 = "gpt2"  # GPT-2 small as published: 124 million weights in 148 tensors
SHAPES = (*LLAMA, *OPT, GPT2)


def make_model(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A causal language model of this shape with random weights and a tied head, in eval mode, made on the device itself."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

    config: Any
    if shape in LLAMA:
        hidden, ffn, heads, layers, vocabulary = LLAMA[shape]
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
        )
    elif shape == GPT2:
        config = GPT2Config(n_inner=3072)  # what it is where none is given
    else:
        hidden, ffn, heads, layers = OPT[shape]
        config = OPTConfig(
            vocab_size=50272,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=2048,
        )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval()


class Task:
    """The closure: the loss of one batch, its own unless another is given. One object, as a step that becomes a CUDA graph needs."""

    def __init__(self, model: nn.Module, batch: int, sequence: int, device: torch.device) -> None:
        vocabulary: Any = model.config.vocab_size
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(vocabulary, (batch, sequence), generator=generator).to(device)
        labels = torch.randint(vocabulary, (batch,), generator=generator).to(device)
        self.model, self.batch = model, (ids, labels)

    def __call__(self, batch: tuple[Tensor, Tensor] | None = None) -> Tensor:
        ids, labels = batch or self.batch
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return nn.functional.cross_entropy(logits.float(), labels)


class MezoLoop:
    """The step of MeZO's public code (Malladi et al. 2023, algorithm 1): a global seed, z drawn anew, tensor by tensor, in the
    weight's type, for each of the three perturbations and for the update."""

    def __init__(self, model: nn.Module, lr: float, eps: float) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps, self.seed = lr, eps, 0

    def draw(self, p: Tensor) -> Tensor:
        return torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)

    def perturb(self, scaling: float) -> None:
        torch.manual_seed(self.seed)
        for p in self.params:
            p.data = p.data + scaling * self.draw(p) * self.eps

    def update(self, g: float) -> None:
        torch.manual_seed(self.seed)
        for p in self.params:
            p.data = p.data - self.lr * (g * self.draw(p))

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self.seed += 1
        self.perturb(1)
        with torch.inference_mode():
            plus = closure()
        self.perturb(-2)
        with torch.inference_mode():
            minus = closure()
        self.perturb(1)
        with torch.no_grad():
            self.update(((plus - minus) / (2 * self.eps)).item())
        return plus


def bare_forwards(closure: Callable[[], Tensor]) -> None:
    with torch.inference_mode():
        closure()
        closure()


@dataclass
class Stepper:
    """A step of one mode; `optimizer` where it is ours."""

    step: Callable[[], Any]
    optimizer: zk.MeZOStep | None = None

    def around(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """A lazy step begins where the one before it ended, and the others want clean weights: before and after a timing."""
        return (self.step, self.optimizer.flush) if self.optimizer is not None else (lambda: None, lambda: None)


WARM = 3  # steps after which every mode is in its stride: tables, what a first forward teaches, a captured graph


def rewrite(task: Task) -> None:
    with torch.no_grad():
        for p in task.model.parameters():
            harness.rewrite_(p)


def forwards_and_rewrite(task: Task) -> None:
    bare_forwards(task)
    rewrite(task)


def make_stepper(mode: str, task: Task, backend: str | None) -> Stepper:
    """The stepper, warm.

    Raises:
        RuntimeError, ValueError: this mode cannot run here.
    """
    if mode == "forwards":
        stepper = Stepper(lambda: bare_forwards(task))
    elif mode == "rewrite":
        stepper = Stepper(lambda: forwards_and_rewrite(task))
    elif mode == "mezo":
        loop = MezoLoop(task.model, LR, EPS)
        stepper = Stepper(lambda: loop.step(task))
    else:
        stepper = our_stepper(task, backend, OURS[mode])
    with warnings.catch_warnings():
        # A step that was to be a graph and runs without one is another mode's.
        warnings.filterwarnings("error", "cuda_graph=True: ")
        for _ in range(WARM if stepper.optimizer is not None else 1):
            stepper.step()
    return stepper


def our_stepper(task: Task, backend: str | None, arguments: dict[str, Any]) -> Stepper:
    optimizer = zk.MeZOStep(task.model, lr=LR, eps=EPS, backend=backend, **arguments)
    batches = [task.batch] if arguments.get("cuda_graph") else None  # a graph must know the batch's memory
    return Stepper(lambda: optimizer.step(task, batches), optimizer)


# ---- passes: seconds and bytes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def around_passes(device: torch.device, backend: str | None, wrap: Callable[..., Any]) -> Iterator[None]:
    """For the time of the block, a pass over weights is `wrap(perturb, plan, p)`."""
    module: Any = backends.pick(device, backend)
    perturb = module.perturb
    module.perturb = lambda plan, p: wrap(perturb, plan, p)
    try:
        yield
    finally:
        module.perturb = perturb


def perturb_traffic(plan: Plan) -> tuple[int, int]:
    """Bytes that one pass reads (weights, masks, scales, row numbers) and writes, whatever the number of its terms."""
    extra = sum(t.nbytes for e in plan.entries for t in (e.mask, e.scale, e.rows) if t is not None)
    return sum(e.src.nbytes for e in plan.entries) + extra, sum(e.dst.nbytes for e in plan.entries)


@dataclass(frozen=True)
class Passes:
    """What a step of a mode does to weights besides reading them in its forwards."""

    seconds: float
    read: int
    written: int


def passes_of(mode: str, task: Task, device: torch.device, backend: str | None, rounds: int = 3) -> Passes:
    """Of steps of their own, since both the clocks and the counting slow a step down: the median of `rounds`, and one step's bytes."""
    if mode == "forwards":
        return Passes(0.0, 0, 0)
    if mode == "rewrite":
        seconds = tuple(harness.seconds_of(lambda: rewrite(task), 1, device) for _ in range(rounds))
        size = sum(p.nbytes for p in task.model.parameters())
        return Passes(harness.Timing(seconds).median, size, size)
    if mode == "mezo":
        loop = MezoLoop(task.model, LR, EPS)

        def work() -> None:
            for scaling in (1, -2, 1):
                loop.perturb(scaling)
            loop.update(0.0)

        work()
        seconds = tuple(harness.seconds_of(work, 1, device) for _ in range(rounds))
        with harness.Traffic() as traffic:
            work()
        return Passes(harness.Timing(seconds).median, traffic.read, traffic.written)

    plain = {name: value for name, value in OURS[mode].items() if name not in LAUNCHING}
    stepper = our_stepper(task, backend, plain)
    optimizer: Any = stepper.optimizer
    spent: list[float] = []
    totals: list[float] = []

    def timed(perturb: Callable[..., None], *arguments: Any) -> None:
        spent.append(harness.seconds_of(lambda: perturb(*arguments), 1, device))

    for _ in range(WARM):
        stepper.step()
    with around_passes(device, backend, timed):
        for _ in range(rounds):
            spent.clear()
            stepper.step()
            totals.append(sum(spent))

    inside_forward = inside_pass = False

    def counting() -> bool:
        """Outside of passes, which count themselves; in a forward only what scratch mode does for the model."""
        return not inside_pass and (not inside_forward or getattr(getattr(optimizer._views.now, "forward", None), "inside", False))

    traffic = harness.Traffic(counting)

    def counted(perturb: Callable[..., None], plan: Plan, p: Pass) -> None:
        nonlocal inside_pass
        inside_pass = True
        perturb(plan, p)
        inside_pass = False
        read, written = perturb_traffic(plan)
        traffic.read += read
        traffic.written += written

    def forward() -> Tensor:
        nonlocal inside_forward
        inside_forward = True
        loss = task()
        inside_forward = False
        return loss

    with around_passes(device, backend, counted), traffic:
        optimizer.step(forward)
    return Passes(harness.Timing(tuple(totals)).median, traffic.read, traffic.written)


def forward_bytes(task: Task) -> int:
    """Bytes of weights that two bare forwards read: an embedding only the rows of its tokens, a tied head the whole table."""
    traffic = harness.Traffic(storages={p.untyped_storage().data_ptr() for p in task.model.parameters()})
    with traffic:
        bare_forwards(task)
    return traffic.read


# ---- memory -----------------------------------------------------------------------------------------------------------


def estimate(shape: str, dtype: torch.dtype, size: Size, copies: int) -> int:
    """Bytes that timing needs at most, from shapes alone: the model (and a copy), four tensors of the size of its largest one
    (MeZO's expression), and the activations of a layer with its attention in flash form."""
    model = make_model(shape, torch.device("meta"), dtype)
    largest = max(p.nbytes for p in model.parameters())
    config: Any = model.config
    ffn = next(getattr(config, name) for name in ("ffn_dim", "intermediate_size", "n_inner") if hasattr(config, name))
    width = 8 * config.hidden_size + 3 * ffn
    activations = math.prod(size) * width * dtype.itemsize + size[0] * config.vocab_size * 8
    return copies * sum(p.nbytes for p in model.parameters()) + 4 * largest + activations + MARGIN


def fitting(shape: str, dtype: torch.dtype, size: Size, device: torch.device, modes: list[str]) -> list[str]:
    """The modes that fit into memory; MeZO's loop needs a second model. Says what does not."""
    free = harness.free_bytes(device)
    fits = []
    for mode in modes:
        need = estimate(shape, dtype, size, 2 if mode == "mezo" else 1)
        if need <= free:
            fits.append(mode)
        else:
            contenders.notice(
                f"left out: {shape} {size[0]}x{size[1]} {mode} needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )
    return fits


def peak_of(mode: str, task: Task, device: torch.device, backend: str | None) -> int | None:
    stepper = make_stepper(mode, task, backend)
    stepper.step()
    harness.reset_peak(device)
    stepper.step()
    return harness.peak_bytes(device)


# ---- measuring --------------------------------------------------------------------------------------------------------


def working(tasks: dict[str, Task], backend: str | None, where: str) -> dict[str, Stepper]:
    """The steppers that exist here and survive their first steps; says why the others do not."""
    steppers = {}
    for mode, task in tasks.items():
        try:
            steppers[mode] = make_stepper(mode, task, backend)
        except (ValueError, RuntimeError, MemoryError, UserWarning) as error:
            if not harness.out_of_memory(error) and mode not in OURS:
                raise
            contenders.notice(f"left out: {where} {mode}: {str(error).splitlines()[0]}")
    return steppers


def timed_rows(
    where: str, models: dict[str, nn.Module], size: Size, device: torch.device, rounds: int, calls: int | None, backend: str | None
) -> dict[str, dict[str, Any]]:
    """mode -> the columns that need no other memory than that of the models: seconds and bytes."""
    tasks = {mode: Task(model, *size, device) for mode, model in models.items()}
    steppers = working(tasks, backend, where)
    if "forwards" not in steppers:
        return {}
    steps = {mode: stepper.step for mode, stepper in steppers.items()}
    often = calls or harness.calls_lasting(steps["forwards"], LASTING, device, MOST_CALLS)
    around = {mode: steppers[mode].around() for mode in steps if OURS.get(mode, {}).get("lazy")}
    timings = harness.interleaved(steps, rounds=rounds, device=device, warmup=0, calls=often, around=around)
    steppers.clear()  # they hold weights
    steps.clear()
    around.clear()
    reads = forward_bytes(tasks["forwards"])
    updated = 2 * sum(p.nbytes for p in models["forwards"].parameters())
    forwards = timings["forwards"].median
    result = {}
    for mode, timing in timings.items():
        passes, over = passes_of(mode, tasks[mode], device, backend), timing.median - forwards
        bound = reads if mode == "forwards" else reads + updated
        result[mode] = {
            "calls": often,
            **timing.columns(),
            "overhead_percent": harness.significant(100 * over / forwards, 3),
            "passes_s": harness.significant(passes.seconds, 4),
            "rest_s": harness.significant(over - passes.seconds, 4),
            "forward_bytes": reads,
            "weight_bytes_read": passes.read,
            "weight_bytes_written": passes.written,
            "lower_bound_bytes": bound,
        }
        print(
            f"{where} {mode:<13} {timing.median:8.4f} s  {100 * over / forwards:+7.1f} %  passes {passes.seconds:.4f} s  "
            f"bytes over weights {(reads + passes.read + passes.written) / bound:.2f} x the lower bound",
            flush=True,
        )
    return result


def measure(
    shape: str,
    tokens: list[Size],
    dtype: str,
    device: torch.device,
    modes: list[str],
    rounds: int,
    calls: int | None,
    backend: str | None,
) -> list[dict[str, Any]]:
    """Rows for one model. The modes share it, MeZO's loop aside: each leaves its weights clean, to within the roundings of in-place
    passes. Peaks are taken of a fresh model for every mode, when nothing else is left in memory."""
    kind, modes = harness.DTYPES[dtype], list(dict.fromkeys(("forwards", *modes)))
    allowed = {size: fits for size in tokens if "forwards" in (fits := fitting(shape, kind, size, device, modes))}
    if not allowed:
        return []
    twice = all("mezo" in fits for fits in allowed.values())
    model = make_model(shape, device, kind)
    again = copy.deepcopy(model) if twice else model
    # A lazy step puts a hook on its module, which would slow the others' forwards down: modules of its own, with the same parameters.
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    shared = {
        "model": shape,
        "weights": sum(p.numel() for p in model.parameters()),
        "tensors": len(list(model.parameters())),
        "device": device.type,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    table: dict[tuple[Size, str], dict[str, Any]] = {}
    for size, fits in allowed.items():
        where = f"{shape} {dtype} {size[0]}x{size[1]}"
        models = {
            mode: again if mode == "mezo" else twin if OURS.get(mode, {}).get("lazy") else model
            for mode in fits
            if mode != "mezo" or twice
        }
        try:
            for mode, columns in timed_rows(where, models, size, device, rounds, calls, backend).items():
                table[size, mode] = {**shared, "batch": size[0], "sequence": size[1], "mode": mode, **columns}
        except (RuntimeError, MemoryError) as error:
            if not harness.out_of_memory(error):
                raise
            contenders.notice(f"left out: {where}: {str(error).splitlines()[0]}")
    del model, again, twin, models
    inference: dict[Size, int | None] = {}
    for mode in dict.fromkeys(mode for _, mode in table):
        gc.collect()
        fresh = make_model(shape, device, kind)
        for size in [size for size, name in table if name == mode]:
            peak = peak_of(mode, Task(fresh, *size, device), device, backend)
            base = inference.setdefault(size, peak)  # `forwards` comes first
            known = peak is not None and base is not None
            table[size, mode] |= {
                "peak_bytes": peak if known else "",
                "peak_over_inference_bytes": peak - base if known else "",  # type: ignore[operator]
            }
            if known:
                over = (peak - base) / 2**20  # type: ignore[operator]
                print(f"{shape} {dtype} {size[0]}x{size[1]} {mode:<13} peak over inference {over:.1f} MiB", flush=True)
        del fresh
    return list(table.values())


def read_tokens(text: str) -> Size:
    batch, _, sequence = text.partition("x")
    if not (batch.isdigit() and sequence.isdigit() and int(batch) and int(sequence)):
        raise argparse.ArgumentTypeError(f"{text!r} must be BATCHxSEQUENCE, such as 16x32")
    return int(batch), int(sequence)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="CSV file")
    parser.add_argument("--append", action="store_true", help="add rows to the file")
    parser.add_argument("--model-shape", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=read_tokens, metavar="BATCHxSEQUENCE")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, help=f"steps of a timing; default: {LASTING} s of two forwards, 1 to {MOST_CALLS}")
    parser.add_argument("--backend", help="of our passes; default: the best")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    on_cpu = device.type == "cpu"
    tokens = args.tokens or ([(16, 32)] if on_cpu else [(16, 32), (16, 400)])
    append = args.append
    for shape in args.model_shape or (["llama-15m", "llama-110m", "opt-125m"] if on_cpu else list(OPT)):
        for dtype in args.dtype or (["float32", "bfloat16"] if on_cpu else ["float16"]):
            rows = measure(shape, tokens, dtype, device, args.modes, args.rounds, args.calls, args.backend)
            if rows:
                harness.write_csv(args.out, COLUMNS, rows, append)  # after every model: an interrupted run keeps what it has
                append = True
    return 0


if __name__ == "__main__":
    sys.exit(main())
