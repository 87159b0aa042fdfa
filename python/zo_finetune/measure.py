"""One row of a profile, in a process of its own: what a step of one method takes of memory and time.

    python -m zo_finetune.measure < requests > rows    (JSON, one a line)

Belongs here: building a model, steps on a made-up batch, bytes and seconds. Does not belong here: which rows there are, tables (profile.py).

Memory on a GPU is `max_memory_allocated` over all steps. On a CPU there are two numbers. `peak_bytes` is the same count: tensors that are alive before a
step, and the most that torch's allocator then adds in one, which is the same every time. `peak_rss_bytes` is what the system saw: the resident memory at
its highest during the steps, less what the process had before the model (interpreter, torch, transformers); it has the kernels' own memory and
whatever the C library keeps.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetune import adapters, machine, methods, shapes
from zo_finetune import model as models
from zo_finetune.errors import UserError, one_line
from zo_finetune.objectives.language_model import LanguageModelling
from zo_finetune.scoring import Encoded, Scorer, Span
from zo_finetune.train import view_options

WARMUP = 2  # steps before those that are timed: the first makes states and buffers


def resident(field: str) -> int | None:
    """VmRSS or VmHWM of this process, in bytes; None where the system has no such file."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])
    return None


def forget_peak() -> bool:
    """Let the highest resident memory begin anew; whether the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def alive() -> int:
    """Bytes of the tensors there are, each memory once."""
    gc.collect()
    found: dict[int, int] = {}
    for o in gc.get_objects():
        if type(o) in (Tensor, nn.Parameter) and o.device.type == "cpu" and not o.is_sparse:
            found[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(found.values())


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what torch's profiler writes on stderr past Python."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def added(step: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator on the CPU adds, at any moment of a step, to what was there before it."""
    from torch.profiler import ProfilerActivity, profile

    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [
        e
        for e in found.profiler.kineto_results.events()
        if e.name() == "[memory]" and e.device_type() == torch.autograd.DeviceType.CPU
    ]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def check_room(shape: nn.Module, dtype: torch.dtype, backward: bool) -> None:
    """Refuse what cannot fit in the machine's memory, before the machine is brought to a stand."""
    weights = sum(p.numel() for p in shape.parameters()) * dtype.itemsize
    least = weights * (2 if backward else 1)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        there = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
        if least > there:
            raise UserError(f"it needs at least {least / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free")


def bare_model(shape: Mapping[str, Any]) -> tuple[nn.Module, Callable[..., Any]]:
    """The model of a shape without memory, and what makes one with memory whose weights are whatever lay there."""
    import transformers
    from transformers.initialization import no_init_weights

    auto: Any = transformers.AutoModelForMaskedLM if shapes.is_masked(shape) else transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.for_model(**shape)

    def make(**more: Any) -> Any:
        with no_init_weights():
            model = auto.from_config(config, **more)
        model.tie_weights()
        return model

    with torch.device("meta"):
        return make(), make


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every weight a number: the same few, again and again, in no time. One-dimensional ones are near 1, as norms' are."""
    few = torch.randn(1 << 16) * 0.02
    for p in model.parameters():
        block, flat = few.to(p) + (p.ndim == 1), p.view(-1)
        for k in range(0, flat.numel(), block.numel()):
            flat[k : k + block.numel()].copy_(block[: flat.numel() - k])


def build(request: Mapping[str, Any]) -> models.LanguageModel:
    """The model of a shape, with random weights, or of a folder."""
    torch.manual_seed(0)
    peft, shape = request["peft"], request["shape"]
    if shape is None:
        return models.load(request["model"], dtype=request["dtype"], device=request["device"], form=request["form"], peft=peft)
    place = models.pick_device(request["device"])
    usual = torch.float32 if place.type == "cpu" else torch.bfloat16
    dtype = usual if request["dtype"] == "auto" else getattr(torch, request["dtype"])
    bare, make = bare_model(shape)
    if place.type == "cpu":
        method = methods.METHODS.get(request["method"])
        check_room(bare, dtype, method is not None and method.first_order and peft == "none")
    with torch.device(place):
        model = make(dtype=dtype).eval()
    fill(model)
    masked = shapes.is_masked(shape)
    base = models.LanguageModel(model, None, "masked" if masked else "causal", "none", place)
    return models.adapt(base, adapters.Adapter(peft))


def batch_of(language_model: models.LanguageModel, scorer: Scorer, rows: int, length: int) -> Any:
    """Random tokens, of whose last one the probability is asked, as in the tasks with an answer of one token."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, language_model.vocabulary, (rows, length), generator=draw).tolist()
    at = (length - 1,)
    return LanguageModelling().batch(scorer, [Encoded((tuple(row),), (Span(0, at, (row[0],)),), 0) for row in tokens])


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row, or the reason why there are none.

    Args:
        request: shape (a configuration) or model (a path), method ("inference" or a name), peft, options, batch_size, length, steps, dtype, device, form,
            perturbation.
    """
    try:
        return _measure(request)
    except (UserError, MemoryError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        out = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        return {"reason": f"out of memory: {one_line(error, 120)}" if out else one_line(error)}


def _measure(request: Mapping[str, Any]) -> dict[str, Any]:
    at_first = resident("VmRSS")
    language_model = build(request)
    device = language_model.device
    model, gpu = language_model.model, device.type == "cuda"
    objective = LanguageModelling()
    method = methods.METHODS.get(request["method"])
    if request["length"] > language_model.max_length:
        raise UserError(f"--length {request['length']}: the model has room for {language_model.max_length}")
    with Scorer(model, language_model.form, 0) as scorer:
        batch = batch_of(language_model, scorer, request["batch_size"], request["length"])
        before = torch.cuda.memory_allocated(device) if gpu else alive()
        optimizer, forwards = None, 1.0
        if method is not None:
            recipe = method.recipe(request["peft"], request["options"])
            options = {} if method.first_order else {"seed": 0, **view_options(request["perturbation"])}
            optimizer, forwards = recipe.make(model, **options), recipe.forwards(1000) / 1000

        def closure(batch: Any) -> Tensor:
            return objective.loss(scorer, batch)

        def step() -> None:
            if optimizer is not None:
                optimizer.step(closure, [batch])
            else:
                with torch.no_grad():
                    closure(batch)
            if gpu:
                torch.cuda.synchronize(device)

        resets = forget_peak()
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = []
        for _ in range(WARMUP + request["steps"]):
            since = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - since)
        high = resident("VmHWM")
        held = torch.cuda.memory_allocated(device) if gpu else alive()
        peak = torch.cuda.max_memory_allocated(device) if gpu else held + added(step)
    state = optimizer.state_bytes() if optimizer is not None else 0
    trainable, total = language_model.counts()
    return {
        "weights": total,
        "trained_weights": trainable if optimizer is not None else 0,
        "dtype": str(model.dtype).removeprefix("torch."),
        "forwards": forwards,
        "model_bytes": before,
        "state_bytes": state,
        "buffer_bytes": max(0, held - before - state),
        "gradient_bytes": language_model.trained_bytes() if method is not None and method.first_order else 0,
        "peak_bytes": peak,
        "peak_rss_bytes": None if gpu or not resets or high is None or at_first is None else high - at_first,
        "seconds_per_step": statistics.median(seconds[WARMUP:]),
        "skipped_steps": optimizer.skipped if optimizer is not None else 0,
        "machine": machine.machine(device),
        "versions": machine.versions(),
        "reason": "",
    }


def alone(request: Mapping[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own, which inherits modules and nothing else; the system may end it."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            with contextlib.suppress(OSError):  # if memory ends, this process goes, and no other
                Path("/proc/self/oom_score_adj").write_text("1000")
            with open(write, "w", encoding="utf-8") as file:
                json.dump(measure(request), file)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        text = file.read()
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        found: dict[str, Any] = json.loads(text)
        return found
    ended = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"reason": "out of memory: the system ended its process" if ended else "failed: its traceback is above"}


def prepare(request: Mapping[str, Any]) -> None:
    """Import what every row needs, on a machine without a GPU, whose driver no fork may have seen: it is no row's memory, and takes its time once."""
    if torch.version.cuda is None and request["shape"] is not None:
        import peft  # noqa: F401

        bare_model(request["shape"])
        methods.get("mezo").recipe("none", {}).make(nn.Linear(1, 1))  # torch imports its compiler for the first optimizer


def main() -> int:
    """A request a line, a row a line."""
    for k, line in enumerate(sys.stdin):
        request = json.loads(line)
        if k == 0:
            prepare(request)
        print(json.dumps(alone(request)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
