"""The Triton backend: what is launched, with what, and where it can run.

Belongs here: the launch of `_triton_kernels.perturb_kernel` over a plan, the tables it needs in device memory, the launch constants.
Does not belong here: device code (_triton_kernels.py), checks of a user's arguments (ops.py).

`triton` is imported lazily. With TRITON_INTERPRET=1 set before that, its interpreter serves CPU tensors, on explicit request only:
slow, and there to test the kernels without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels import ops
from zo_kernels.ops import Pass

if TYPE_CHECKING:
    from zo_kernels.ops import Entry, Passes, Plan


@dataclass(frozen=True)
class Launch:
    """The launch constants. They are the only place to tune; the results do not depend on them.

    Not autotuned: a trial run of an in-place pass would change the weights.
    """

    groups: int  # lanes of a tile, 16 elements each; a power of two, at least 32 * warps
    warps: int
    max_tiles: int  # of a span, the work of one program
    programs: int  # wanted before spans grow longer than one tile
    narrow: bool  # masked accesses element by element, not as chunks


GPU = Launch(groups=128, warps=4, max_tiles=16, programs=4096, narrow=True)  # chosen by static counts; not yet timed on a GPU
INTERPRETER = Launch(groups=1024, warps=1, max_tiles=64, programs=1, narrow=False)  # a program costs 30 ms, whatever its size
F_BASE = 0x3C240000
SEQUENCE_OPTIONS = {"maxnreg": 128}  # without a limit ptxas (of Triton 3.7) takes 96 registers for the loop over passes, and spills


# ---- where it can run -------------------------------------------------------------------------------------------------


@functools.cache
def _import() -> tuple[ModuleType | None, str | None]:
    """(the kernels' module, None), or (None, why not)."""
    try:
        from zo_kernels._backends import _triton_kernels
    except Exception as error:  # a broken installation fails in many ways, and none of them may break the library
        return None, f"triton cannot be imported ({type(error).__name__}: {error}): pip install 'triton>=3.6'"
    return _triton_kernels, None


def _kernels() -> ModuleType:
    module, reason = _import()
    if module is None:
        raise RuntimeError(f"backend='triton': {reason}")
    return module


@functools.cache
def _interpreted() -> bool:
    """Whether the kernels were decorated for the interpreter (TRITON_INTERPRET=1 at the first import)."""
    import triton

    return not isinstance(_kernels().perturb_kernel, triton.runtime.JITFunction)


@functools.cache
def status() -> str | None:
    module, reason = _import()
    if module is None:
        return reason
    if not _interpreted() and not torch.cuda.is_available():
        return "no CUDA device; TRITON_INTERPRET=1, set before the start, runs it on CPU tensors, slowly"
    return None


def supports(device: torch.device) -> str | None:
    if _interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is set, and the interpreter serves CPU tensors only"
    if device.type != "cuda":
        return f"triton serves CUDA tensors, not {device.type}; for CPU tensors set TRITON_INTERPRET=1 before the start (slow)"
    return None


# ---- tables of a plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The tensors of a plan that one launch serves: all of them, unless some are gathered rows and others are not."""

    table: Tensor  # int64 [n, 11]
    spans: Tensor  # int64 [programs]
    tiles: int
    flags: dict[str, Any]


def _tile_count(entry: Entry, groups: int) -> int:
    """As in `perturb_kernel`."""
    n = entry.src.numel()
    if n == 0:
        return 0
    if entry.rows is None:
        return -(-(entry.offset % (16 * groups) + n) // (16 * groups))
    row_calls = 2 * (entry.row_len // 32 if entry.row_len % 32 == 0 else (entry.row_len + 62) // 32)
    return -(-(n // entry.row_len * row_calls) // groups)


def _batch(plan: Plan, members: list[int], launch: Launch) -> Batch | None:
    """The launch that serves these entries of the plan; None if they hold no element."""
    kernels = _kernels()
    entries = [plan.entries[k] for k in members]
    counts = np.array([_tile_count(e, launch.groups) for e in entries], dtype=np.int64)
    if not counts.sum():
        return None
    tiles = int(np.clip(counts.sum() // launch.programs, 1, launch.max_tiles))
    spans = -(-counts // tiles)
    tensor = np.repeat(np.arange(len(entries)), spans)
    first = (np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans)) * tiles
    scale_blocks = [e.scale_block for e in entries if e.scale is not None]
    return Batch(
        table=ops.move(torch.from_numpy(plan.table[members].view(np.int64)), plan.device),
        spans=ops.move(torch.from_numpy(tensor << kernels.TILE_BITS | first), plan.device),
        tiles=tiles,
        flags={
            "BIT_MASK": any(e.mask is not None for e in entries),
            "RANDOM_MASK": any(e.keep for e in entries),
            "SCALE": 0 if not scale_blocks else 1 if min(scale_blocks) >= 8 else 2,
            "ROWS": entries[0].rows is not None,
            "IN_PLACE": all(e.src.data_ptr() == e.dst.data_ptr() for e in entries),
        },
    )


def _batches(plan: Plan, launch: Launch) -> list[Batch]:
    """The plan's launches, with their tables in order before the work that the current stream gets next."""
    if "triton" not in plan.cache:
        rows = [k for k, e in enumerate(plan.entries) if e.rows is not None]
        others = [k for k, e in enumerate(plan.entries) if e.rows is None]
        batches = [b for members in (others, rows) if (b := _batch(plan, members, launch))]
        uploaded = None
        if plan.device.type == "cuda":
            uploaded = torch.cuda.Event()
            uploaded.record(torch.cuda.current_stream(plan.device))
        plan.cache["triton"] = batches, uploaded
    batches, uploaded = plan.cache["triton"]
    if uploaded is not None and not torch.cuda.is_current_stream_capturing():  # a capture begins with a synchronisation
        torch.cuda.current_stream(plan.device).wait_event(uploaded)
    return batches


# ---- the launch -------------------------------------------------------------------------------------------------------


def _signed(word: int) -> int:
    """A uint32 as the int32 of the same bits: an int above 2^31 - 1 would have another type, hence another kernel."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _float_bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))


def _terms(p: Pass, device: torch.device) -> dict[str, Any]:
    """The kernel's arguments that hold tags and coefficients. Nothing is read back from the device.

    No term at all is given as one that is not live: the same results (docs/numerics.md, sections 4 and 5), and no variant of its own.
    """
    tags, coefs = (p.tags, p.coefs) if len(p.tags) else ([0], [0.0])
    n = len(tags)
    unrolled = n if n in (1, 2) else 0
    arguments: dict[str, Any] = {"tag0": 0, "tag1": 0, "coef0": 0, "coef1": 0, "tags": None, "coefs": None, "terms": None}
    arguments |= {"n_terms": n, "TERMS": unrolled, "HOST_TERMS": True}
    if n > 2 and not isinstance(tags, Tensor):
        tags = ops.move(torch.tensor(tags, dtype=torch.int64), device)
        coefs = ops.move(torch.tensor(coefs, dtype=torch.float32), device)
    if isinstance(tags, Tensor):
        arguments |= {"tags": tags.view(torch.int32), "coefs": coefs, "HOST_TERMS": False}
        if not unrolled:
            arguments["terms"] = torch.empty(n, dtype=torch.int64, device=device)
    else:
        for k in range(n):
            arguments |= {f"tag{k}": _signed(int(tags[k])), f"coef{k}": _float_bits(float(coefs[k]))}
    return arguments


def _decay(decay: float | Tensor | None) -> dict[str, Any]:
    if isinstance(decay, Tensor):
        return {"decay_bits": 0, "decay_ptr": decay, "DECAY": 2}
    return {"decay_bits": 0 if decay is None else _float_bits(decay), "decay_ptr": None, "DECAY": int(decay is not None)}


NO_SEQUENCE: dict[str, Any] = {
    **{"n_passes": 0, "most_terms": 0, "SEQUENCE": False},
    **dict.fromkeys(("firsts", "decays", "roundings", "steps")),
}


def perturb(plan: Plan, p: Pass) -> None:
    """theta <- round(decay * theta + scale * mask * sum_k c_k z_k) for every tensor of the plan, in one launch.

    (In two where the plan mixes gathered rows with other tensors.) The host never waits for the device.
    """
    stochastic = p.rounding == "stochastic"
    launch_all(plan, p.seed, p.kind, stochastic, {**_terms(p, plan.device), **_decay(p.decay), **NO_SEQUENCE})


def sequence(plan: Plan, passes: Passes) -> None:
    """The passes one after another, in the same number of launches."""
    n, device = len(passes), plan.device
    counts = passes.first.diff()
    arguments = {
        **_terms(Pass(passes.seed, [], []), device),
        **_decay(None),
        **{"tags": passes.tags.view(torch.int32), "coefs": passes.coefs, "n_terms": passes.tags.numel()},
        **{"TERMS": 0, "HOST_TERMS": False, "SEQUENCE": True, "decays": passes.decay},
        **{"n_passes": n, "most_terms": int(counts.max()) if n else 0, "firsts": ops.move(passes.first, device)},
        "roundings": ops.move(passes.rounding, device),
        "terms": torch.empty(passes.tags.numel(), dtype=torch.int64, device=device),
        "steps": torch.empty(2 * n, dtype=torch.int64, device=device),
    }
    launch_all(plan, passes.seed, passes.kind, bool(passes.rounding.any()), arguments)


def launch_all(plan: Plan, seed: int, kind: str, stochastic: bool, arguments: dict[str, Any]) -> None:
    """A launch for each batch of the plan; `arguments`: those of the kernel that depend on the terms."""
    import triton.language as tl

    kernels = _kernels()
    interpreted = _interpreted()
    launch = INTERPRETER if interpreted else GPU
    arguments |= {
        "seed_low": _signed(seed & 0xFFFFFFFF),
        "seed_high": _signed(seed >> 32),
        "base": F_BASE,
        "DTYPE": {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[plan.dtype],
        "KIND": kernels.GAUSSIAN if kind == "gaussian" else kernels.RADEMACHER,
        "STOCHASTIC": stochastic and plan.dtype != torch.float32,
        "P": launch.groups,
        "NARROW": launch.narrow,
        "INTERPRETED": interpreted,
    }
    for batch in _batches(plan, launch):
        grid = (batch.spans.numel(),)
        options = {} if interpreted else {"num_warps": launch.warps, "enable_fp_fusion": False}
        if arguments["SEQUENCE"] and not interpreted:
            options |= SEQUENCE_OPTIONS
        with contextlib.nullcontext() if interpreted else torch.cuda.device(plan.device):
            kernels.perturb_kernel[grid](batch.table, batch.spans, batch.tiles, **arguments, **batch.flags, **options)
