"""What perturbing and restoring does to 16-bit weights when nothing is learned: lr = 0, so every step should leave them alone.

    python benchmarks/drift.py --out drift.csv                     a randomly initialised Llama of 0.5 M weights, 2,000 steps
    python benchmarks/drift.py --out drift.csv --model DIRECTORY --model-name NAME --steps 200

Belongs here: weights at lr = 0, by perturbation mode. Does not belong here: time (step.py), what drift does to a trained model.

Modes: `scratch` and `inplace` our MeZOStep; `public` the expression of MeZO's public code, p = p + c z three times (+eps, -2 eps, +eps)
with z redrawn from the step's seed in the weight's type. Scratch mode runs real forwards, since its claim is about them; what the
other two do to the weights at lr = 0 does not depend on the loss, so their closure returns a constant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn

import zo_kernels as zk

MODES = ("scratch", "inplace", "public")
MARKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
COLUMNS = (
    "model",
    "weights",
    "dtype",
    "mode",
    "eps",
    "step",
    "changed_bits_fraction",
    "relative_drift",
    "max_abs_change",
    "real_forwards",
)


def random_llama(dtype: torch.dtype) -> nn.Module:
    """Four layers of width 96, initialised as transformers does (normal, standard deviation 0.02; norms 1)."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load(path: str | None, dtype: torch.dtype) -> nn.Module:
    if path is None:
        return random_llama(dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def make_closure(model: nn.Module, real: bool) -> Callable[[], Tensor]:
    if not real:
        return lambda: torch.zeros(())
    ids = torch.randint(model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    return lambda: nn.functional.cross_entropy(
        model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    )


def public_step(params: list[Tensor], eps: float, seed: int) -> None:
    for scaling in (1, -2, 1):
        torch.manual_seed(seed)
        for p in params:
            z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
            p.data = p.data + scaling * z * eps


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def drift(params: list[Tensor], start: list[Tensor]) -> dict[str, float]:
    """Fraction of weights of which any bit changed; ||theta - theta_0|| / ||theta_0|| and max |theta - theta_0| in float64."""
    changed = sum(int((bits(p.detach()) != bits(s)).sum()) for p, s in zip(params, start, strict=True))
    differences = [p.detach().double() - s.double() for p, s in zip(params, start, strict=True)]
    norm = sum(float(s.double().square().sum()) for s in start)
    return {
        "changed_bits_fraction": changed / sum(s.numel() for s in start),
        "relative_drift": (sum(float(d.square().sum()) for d in differences) / norm) ** 0.5,
        "max_abs_change": max(float(d.abs().max()) for d in differences),
    }


def measure(
    path: str | None, name: str, dtype: str, mode: str, eps: float, steps: int, backend: str | None
) -> list[dict[str, Any]]:
    model = load(path, harness.DTYPES[dtype])
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in params]
    real = mode == "scratch"
    closure = make_closure(model, real)
    if mode != "public":
        optimizer = zk.MeZOStep(model, lr=0.0, eps=eps, perturbation=mode, backend=backend)
    rows = []
    for step in range(1, steps + 1):
        if mode == "public":
            public_step(params, eps, step)
        else:
            optimizer.step(closure)
        if step in MARKS or step == steps:
            measured = {key: harness.significant(value) for key, value in drift(params, start).items()}
            described = {
                "model": name,
                "weights": sum(s.numel() for s in start),
                "dtype": dtype,
                "mode": mode,
                "eps": eps,
                "step": step,
            }
            rows.append({**described, **measured, "real_forwards": int(real)})
    last = rows[-1]
    print(
        f"{name} {dtype} {mode}: after 1 step {rows[0]['changed_bits_fraction']:.2%} of the weights changed, "
        f"after {steps} {last['changed_bits_fraction']:.2%}, drift {last['relative_drift']:.3g}",
        flush=True,
    )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="CSV file")
    parser.add_argument("--append", action="store_true", help="add rows to the file")
    parser.add_argument("--model", help="directory or hub id of a transformers model; default: a random one")
    parser.add_argument("--model-name", help="what the CSV calls it; required with --model, so that no path gets into the results")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["float16", "bfloat16"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--backend", help="of our passes; default: the best")
    args = parser.parse_args(arguments)
    if (args.model is None) != (args.model_name is None):
        parser.error("--model and --model-name go together")
    name = args.model_name or "random-llama-0.5m"
    rows = []
    for dtype in args.dtype:
        for mode in args.modes:
            rows += measure(args.model, name, dtype, mode, args.eps, args.steps, args.backend)
    harness.write_csv(args.out, COLUMNS, rows, args.append)
    return 0


if __name__ == "__main__":
    sys.exit(main())
