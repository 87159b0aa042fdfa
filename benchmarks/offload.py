"""What training costs whose weights lie in a file or in host memory and visit the device a block at a time.

    python benchmarks/offload.py --work /tmp/offload --out benchmarks/results/offload.csv
    python benchmarks/offload.py --visits opt-13b --device cuda --out offload_opt-13b.csv

Belongs here: resident memory, bytes that come in, seconds of a step. Does not belong here: whether the bits are right (tests/test_offload.py).

First a random OPT-1.3B of bf16 weights from a file of its own, which is made in --work and removed: each step is a row. `peak_bytes` is the peak of the
process's resident memory from before the model was made, less what it had then (after importing everything). Then a shape that fits, resident and
offloaded, in turn: `ratio` is a median over the resident one's, `cpu_ratio` that of the processor time, with the thread that fetches. MeZO's steps on a
batch of a few random tokens.

With --visits a model of that shape in host memory alone, pinned for a GPU, whose blocks visit the device; a row for each step, in a file with columns of
its own. `peak_bytes` is then of the device, `upload_gb_per_s` what came in over the seconds of the step, `copy_gb_per_s` what a plain copy of the
largest block reaches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
from torch import Tensor, nn
from zo_finetune import away, shapes

import zo_kernels as zk
from zo_kernels.views.files import write_tensors

COLUMNS = (
    *("shape", "dtype", "source", "together", "write_back", "weights", "weight_bytes", "blocks", "batch", "sequence", "threads"),
    *("step", *harness.TIMING_COLUMNS, "ratio", "cpu_median_s", "cpu_ratio"),
    *("read_bytes", "visits", "written_bytes", "device_bytes", "peak_bytes"),
)
VISITS = (
    *(
        "shape",
        "dtype",
        "device",
        "weights",
        "weight_bytes",
        "blocks",
        "batch",
        "sequence",
        "step",
        "seconds",
        "read_bytes",
        "visits",
    ),
    *("written_bytes", "device_bytes", "peak_bytes", "upload_gb_per_s", "copy_gb_per_s"),
)
TINY = {
    "hidden_size": 32,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 500,
    "word_embed_proj_dim": 32,
}
FITS = {
    "hidden_size": 512,
    "ffn_dim": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8000,
    "word_embed_proj_dim": 512,
}


def config_of(more: dict[str, Any], name: str = "opt-1.3b") -> Any:
    shape = {**shapes.get(name), **more}
    return transformers.AutoConfig.for_model(**shape)


def without_weights(config: Any, dtype: torch.dtype) -> Any:
    return away.empty(transformers.AutoModelForCausalLM, config, dtype)


def write_random(model: nn.Module, path: Path) -> None:
    """Of the shapes of a model without values."""
    named = dict(model.named_parameters())
    write_tensors(path, named, lambda name: torch.randn(named[name].shape).mul_(0.02).to(named[name].dtype))


def closure_of(model: Any, vocabulary: int, batch: int, sequence: int, device: str = "cpu") -> Callable[[], Tensor]:
    ids = torch.randint(vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(1)).to(device)

    def closure() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    return closure


def about(name: str, model: nn.Module, dtype: torch.dtype, batch: int, sequence: int) -> dict[str, Any]:
    weights = sum(p.numel() for p in model.parameters())
    return {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "batch": batch,
        "sequence": sequence,
        "threads": torch.get_num_threads(),
    }


def from_a_file(work: Path, name: str, more: dict[str, Any], steps: int, write_back: int) -> Iterator[dict[str, Any]]:
    """A model that is never resident."""
    dtype, batch, sequence, config = torch.bfloat16, 1, 8, config_of(more)
    path = work / "model.safetensors"
    torch.manual_seed(0)
    write_random(without_weights(config, dtype), path)
    try:
        harness.reset_peak("cpu")
        before = harness.peak_bytes("cpu") or 0
        model = without_weights(config, dtype)
        offloaded = zk.offload(model, path, write_back=write_back, folder=work if write_back else None, together=True)
        shared = about(name, model, dtype, batch, sequence)
        optimizer, closure = zk.MeZOStep(model, 1e-6), closure_of(model, config.vocab_size, batch, sequence)
        for step in range(1, steps + 1):
            t, began, cpu = offloaded.traffic, time.perf_counter(), time.process_time()
            read, visits, written = t.bytes, t.visits, t.written
            optimizer.step(closure)
            seconds, cpu_seconds = harness.Timing((time.perf_counter() - began,)), time.process_time() - cpu
            yield {
                **shared, **seconds.columns(), "source": "file", "together": True, "write_back": write_back, "step": step, "ratio": "",
                "cpu_median_s": harness.significant(cpu_seconds), "cpu_ratio": "",
                "blocks": len(offloaded.blocks), "read_bytes": t.bytes - read, "visits": t.visits - visits, "written_bytes": t.written - written,
                "device_bytes": offloaded.device_bytes, "peak_bytes": (harness.peak_bytes("cpu") or 0) - before,
            }  # fmt: skip
    finally:
        path.unlink()


def fill(model: nn.Module, pinned: bool) -> None:
    """Values for parameters on the meta device, the same million again and again: to draw billions takes minutes. Pinned at once, so that there is one copy."""
    made: dict[int, nn.Parameter] = {}
    some = torch.randn(1 << 20).mul_(0.02)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in made:
                values = torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned)
                for part in values.view(-1).split(some.numel()):
                    part.copy_(some[: part.numel()])
                made[id(p)] = nn.Parameter(values, requires_grad=p.requires_grad)
            if p is not None:
                module._parameters[name] = made[id(p)]


def copied(nbytes: int, device: str) -> float:
    """GB/s of a plain copy of so many bytes to the device, the best of a few."""
    here = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / 1e9 / min(harness.seconds_of(lambda: there.copy_(here, non_blocking=True), 1, device) for _ in range(4))


def visiting(name: str, more: dict[str, Any], device: str, steps: int, batch: int, sequence: int) -> Iterator[dict[str, Any]]:
    """A model in host memory whose blocks visit the device; the first step begins with an empty device."""
    config = config_of(more, name)
    model = without_weights(config, torch.bfloat16)
    fill(model, device == "cuda")
    harness.reset_peak(device)
    offloaded = zk.offload(model, "cpu", device=device, together=True)
    shared = about(name, model, torch.bfloat16, batch, sequence)
    del shared["threads"]
    speed = harness.significant(copied(max(offloaded.blocks.values()), device), 4)
    optimizer, closure = zk.MeZOStep(model, 1e-6), closure_of(model, config.vocab_size, batch, sequence, device)
    for step in range(1, steps + 1):
        t = offloaded.traffic
        read, visits, written = t.bytes, t.visits, t.written
        seconds = harness.seconds_of(lambda: optimizer.step(closure), 1, device)
        yield {
            **shared, "device": device, "blocks": len(offloaded.blocks), "step": step, "seconds": harness.significant(seconds, 4),
            "read_bytes": t.bytes - read, "visits": t.visits - visits, "written_bytes": t.written - written,
            "device_bytes": offloaded.device_bytes, "peak_bytes": harness.peak_bytes(device) or "",
            "upload_gb_per_s": harness.significant((t.bytes - read) / 1e9 / seconds, 4), "copy_gb_per_s": speed,
        }  # fmt: skip


def beside_resident(work: Path, more: dict[str, Any], rounds: int) -> Iterator[dict[str, Any]]:
    """Steps of one shape, resident and offloaded, in turn."""
    batch, sequence, config, path = 4, 32, config_of(more), work / "small.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        write_random(without_weights(config, dtype), path)
        try:
            contenders: dict[tuple[str, bool, int], Callable[[], Any]] = {}
            traffic: dict[tuple[str, bool, int], Any] = {}
            for key in (
                ("resident", False, 0),
                ("cpu", False, 1),
                ("cpu", True, 1),
                ("cpu", True, 8),
                ("file", True, 0),
                ("file", True, 8),
            ):
                source, together, every = key
                model = without_weights(config, dtype)
                traffic[key] = made = zk.offload(
                    model,
                    path,
                    write_back=every if source == "file" else 0,
                    folder=work if every and source == "file" else None,
                    together=together,
                )
                if source != "file":
                    resident = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
                    with torch.no_grad():
                        for (_, p), (_, q) in zip(resident.named_parameters(), model.named_parameters(), strict=True):
                            p.copy_(q)
                    model, made = resident, None
                    if source == "cpu":
                        made = zk.offload(model, "cpu", write_back=every, together=together)
                traffic[key] = made
                optimizer, closure = zk.MeZOStep(model, 1e-6), closure_of(model, config.vocab_size, batch, sequence)
                contenders[key] = lambda optimizer=optimizer, closure=closure: optimizer.step(closure)
            names = {"/".join(map(str, key)): key for key in contenders}
            times = harness.interleaved({n: contenders[key] for n, key in names.items()}, rounds=rounds)
            base, base_cpu = times[next(iter(names))].median, statistics.median(times[next(iter(names))].cpu)
            for n, key in names.items():
                source, together, every = key
                made = traffic[key]
                steps = rounds + 1
                yield {
                    **about("fits", model, dtype, batch, sequence), **times[n].columns(), "source": source, "together": together, "write_back": every,
                    "step": "", "ratio": harness.significant(times[n].median / base, 4),
                    "cpu_median_s": harness.significant(statistics.median(times[n].cpu)),
                    "cpu_ratio": harness.significant(statistics.median(times[n].cpu) / base_cpu, 4), "blocks": len(made.blocks) if made else 0,
                    "read_bytes": made.traffic.bytes // steps if made else 0, "visits": made.traffic.visits // steps if made else 0,
                    "written_bytes": made.traffic.written // steps if made else 0, "device_bytes": made.device_bytes if made else "", "peak_bytes": "",
                }  # fmt: skip
        finally:
            path.unlink()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="an empty folder with room for the weights; not for --visits")
    parser.add_argument("--visits", metavar="SHAPE", help="a model in host memory alone, such as opt-13b; with --quick a tiny one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --visits")
    parser.add_argument("--tokens", default="4x512", help="of --visits: batch x sequence")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--steps", type=int, default=3, help="of the large model")
    parser.add_argument("--rounds", type=int, default=5, help="of the shape that fits")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs; the figures mean nothing")
    parser.add_argument("--only", choices=("large", "fits"), help="one of the two")
    parser.add_argument("--append", action="store_true", help="to the rows that are there")
    args = parser.parse_args(arguments)
    if args.visits:
        visits = harness.Table(args.out, VISITS, args.append)
        for row in visiting(args.visits, TINY if args.quick else {}, args.device, args.steps, *map(int, args.tokens.split("x"))):
            visits.add(row)
        return 0
    if args.work is None:
        parser.error("--work is required: an empty folder with room for the weights")
    args.work.mkdir(parents=True, exist_ok=True)
    table = harness.Table(args.out, COLUMNS, args.append)
    if args.only != "fits":
        for row in from_a_file(args.work, "tiny" if args.quick else "opt-1.3b", TINY if args.quick else {}, args.steps, 0):
            table.add(row)
    if args.only != "large":
        for row in beside_resident(args.work, TINY if args.quick else FITS, 2 if args.quick else args.rounds):
            table.add(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
