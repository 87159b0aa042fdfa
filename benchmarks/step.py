"""A whole training step of a randomly initialised model: seconds and peak memory, beside two bare forwards and MeZO's loop.

    python benchmarks/step.py --out step.csv          with a GPU opt-1.3b in fp16 at 16 x 32 and 16 x 400 tokens, otherwise
                                                      llama-15m and llama-110m in fp32 at 16 x 32
    python benchmarks/step.py --out step.csv --device cuda --dtype float16 --model-shape opt-1.3b --tokens 16x32 16x400

Belongs here: whole steps, on any device. Does not belong here: single passes (cpu_pass.py, gpu_pass.py), learning. Random weights
take the time and memory of trained ones.

Modes: `forwards` two forwards and nothing else (the lower bound), `scratch` and `inplace` our MeZOStep, `mezo` the loop of MeZO's
public code. The closure is single-token classification: logits of the last position only, cross-entropy in fp32. Full logits would
make the forwards longer and every overhead look smaller.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import harness
import torch
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels import _backends as backends

MODES = ("forwards", "scratch", "inplace", "mezo")
LR, EPS = 1e-7, 1e-3
COLUMNS = (
    *("model", "weights", "tensors", "device", "dtype", "threads", "batch", "sequence", "mode", *harness.TIMING_COLUMNS),
    *("overhead_percent", "passes_s", "rest_s", "peak_bytes", "peak_over_inference_bytes"),
)

# hidden, ffn, heads, layers; the vocabulary and the positions are the published ones.
OPT = {
    "opt-125m": (768, 3072, 12, 12),
    "opt-1.3b": (2048, 8192, 32, 24),
    "opt-2.7b": (2560, 10240, 32, 32),
    "opt-6.7b": (4096, 16384, 32, 32),
    "opt-13b": (5120, 20480, 40, 40),
}
LLAMA = {"llama-tiny": (64, 172, 4, 2, 512), "llama-15m": (288, 768, 6, 6, 32000), "llama-110m": (768, 2048, 12, 12, 32000)}
SHAPES = (*LLAMA, *OPT)


def make_model(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A causal language model of this shape with random weights and a tied head, in eval mode, made on the device itself."""
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

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


def make_closure(model: nn.Module, batch: int, sequence: int, device: torch.device) -> Callable[[], Tensor]:
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (batch, sequence), generator=generator).to(device)
    labels = torch.randint(vocabulary, (batch,), generator=generator).to(device)

    def closure() -> Tensor:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return nn.functional.cross_entropy(logits.float(), labels)

    return closure


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


@contextmanager
def timed_passes(device: torch.device, backend: str | None) -> Iterator[list[float]]:
    """Collects the seconds of every pass over weights. It synchronises around each, so the timed steps run without it."""
    seconds: list[float] = []
    module = backends.pick(device, backend)
    perturb = module.perturb

    def timed(*args: Any, **kwargs: Any) -> None:
        harness.synchronize(device)
        start = time.perf_counter()
        perturb(*args, **kwargs)
        harness.synchronize(device)
        seconds.append(time.perf_counter() - start)

    module.perturb = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        module.perturb = perturb  # type: ignore[method-assign]


def passes_of(
    mode: str,
    steppers: dict[str, Callable[[], Any]],
    loop: MezoLoop | None,
    device: torch.device,
    backend: str | None,
    rounds: int = 3,
) -> float:
    """Median seconds that a step of this mode spends in passes over weights."""
    totals = []
    for _ in range(rounds):
        if mode == "mezo" and loop is not None:
            harness.synchronize(device)
            start = time.perf_counter()
            for scaling in (1, -2, 1):
                loop.perturb(scaling)
            loop.update(0.0)
            harness.synchronize(device)
            totals.append(time.perf_counter() - start)
        else:
            with timed_passes(device, backend) as seconds:
                steppers[mode]()
            totals.append(sum(seconds))
    return harness.Timing(tuple(totals)).median


def make_stepper(mode: str, model: nn.Module, closure: Callable[[], Tensor], backend: str | None) -> Callable[[], Any]:
    if mode == "forwards":
        return lambda: bare_forwards(closure)
    if mode == "mezo":
        loop = MezoLoop(model, LR, EPS)
        return lambda: loop.step(closure)
    optimizer = zk.MeZOStep(model, lr=LR, eps=EPS, perturbation=mode, backend=backend)
    return lambda: optimizer.step(closure)


def peak_of(
    mode: str, shape: str, dtype: torch.dtype, size: tuple[int, int], device: torch.device, backend: str | None
) -> int | None:
    """Of a model of its own: MeZO's loop moves every weight, and another mode's tables would keep the old ones alive."""
    gc.collect()
    model = make_model(shape, device, dtype)
    stepper = make_stepper(mode, model, make_closure(model, *size, device), backend)
    stepper()
    stepper()
    harness.reset_peak(device)
    stepper()
    return harness.peak_bytes(device)


def measure(
    shape: str,
    tokens: list[tuple[int, int]],
    dtype: str,
    device: torch.device,
    modes: list[str],
    rounds: int,
    calls: int,
    backend: str | None,
) -> list[dict[str, Any]]:
    """Rows for one model. The modes share one model: each leaves its weights clean, to within the roundings of in-place passes."""
    model = make_model(shape, device, harness.DTYPES[dtype])
    weights, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    table = []
    for batch, sequence in tokens:
        closure = make_closure(model, batch, sequence, device)
        steppers = {mode: make_stepper(mode, model, closure, backend) for mode in dict.fromkeys(("forwards", *modes))}
        loop = MezoLoop(model, LR, EPS) if "mezo" in modes else None
        # The loop moves every parameter to new memory, so that our next step rebuilds its tables: settle.
        timings = harness.interleaved(steppers, rounds=rounds, device=device, warmup=2, calls=calls, settle=1)
        forwards = timings["forwards"].median
        passes_by_mode = {mode: passes_of(mode, steppers, loop, device, backend) if mode != "forwards" else 0.0 for mode in timings}
        steppers.clear()  # they and the loop hold weights
        loop = None
        kind = harness.DTYPES[dtype]
        inference = peak_of("forwards", shape, kind, (batch, sequence), device, backend)
        resident = sum(p.nbytes for p in model.parameters())  # of the model above, which is still there
        for mode, timing in timings.items():
            passes = passes_by_mode[mode]
            peak = peak_of(mode, shape, kind, (batch, sequence), device, backend) if mode != "forwards" else inference
            over = timing.median - forwards
            table.append(
                {
                    "model": shape,
                    "weights": weights,
                    "tensors": tensors,
                    "device": device.type,
                    "dtype": dtype,
                    "threads": torch.get_num_threads(),
                    "batch": batch,
                    "sequence": sequence,
                    "mode": mode,
                    **timing.columns(),
                    "overhead_percent": harness.significant(100 * over / forwards, 3),
                    "passes_s": harness.significant(passes, 4),
                    "rest_s": harness.significant(over - passes, 4),
                    "peak_bytes": "" if peak is None else peak - resident,
                    "peak_over_inference_bytes": "" if peak is None or inference is None else peak - inference,
                }
            )
            print(
                f"{shape} {dtype} {batch}x{sequence} {mode:<9} {timing.median:8.4f} s  {100 * over / forwards:+7.1f} %  "
                f"passes {passes:.4f} s  peak over inference {((peak or 0) - (inference or 0)) / 2**20:.0f} MiB",
                flush=True,
            )
    return table


def read_tokens(text: str) -> tuple[int, int]:
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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, help="steps between two synchronisations; default 1 on the CPU, 5 elsewhere")
    parser.add_argument("--backend", help="of our passes; default: the best")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    on_cpu = device.type == "cpu"
    calls = args.calls or (1 if on_cpu else 5)
    tokens = args.tokens or ([(16, 32)] if on_cpu else [(16, 32), (16, 400)])
    append = args.append
    for shape in args.model_shape or (["llama-15m", "llama-110m"] if on_cpu else ["opt-1.3b"]):
        for dtype in args.dtype or ["float32" if on_cpu else "float16"]:
            rows = measure(shape, tokens, dtype, device, args.modes, args.rounds, calls, args.backend)
            harness.write_csv(args.out, COLUMNS, rows, append)  # after every model: an interrupted run keeps what it has
            append = True
            if not on_cpu:
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
