"""The Triton backend: what is launched, with what, and where it can run.

Belongs here: the launch of `_triton_kernels.perturb_kernel` over a plan, the tables it needs in device memory, the launches of
`_triton_update`, `_triton_mask` and `_triton_linear`, the launch constants. Does not belong here: device code (the files with these names), checks of
a user's arguments (checks.py, plan.py, linear.py).

`triton` is imported lazily. With TRITON_INTERPRET=1 set before that, its interpreter serves CPU tensors, on explicit request only:
slow, and there to test the kernels without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_kernels import update as rules
from zo_kernels.plan import capturing, move

if TYPE_CHECKING:
    from zo_kernels.plan import Entry, Pass, Passes, Plan
    from zo_kernels.update import RulePass, States


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


# Programs: at least eight rounds of the six blocks that each of an H100's 132 multiprocessors holds, as cuda.py has them: the last, unfinished round is
# short beside the whole. A fill of 2^24 elements then has tiles of its own in 8,192 programs, in the place of two tiles each in 4,096, five rounds.
GPU = Launch(groups=128, warps=4, max_tiles=16, programs=8 * 6 * 132, narrow=True)
# One tuning run on an H100 gave fp32 about twice the bandwidth with 256 groups (65 % of a copy's instead of 34 %); not taken yet, since the
# count of a sequence's instructions does not know that loop, and the full benchmark is not yet measured again.
INTERPRETER = Launch(groups=1024, warps=1, max_tiles=64, programs=1, narrow=False)  # a program costs the same, whatever its size


@dataclass(frozen=True)
class LinearLaunch:
    """The same for the perturbed linear; chosen by static counts, not yet timed on a GPU. Here the parts that K is split into do depend on
    them, and with the parts the order of a sum."""

    x_rows: int  # of a tile, at most; fewer if x has fewer, at least 16
    w_rows: int  # 64 is the least that the tensor cores of sm_90 take from registers
    columns: int  # of a tile of weights, a multiple of 32; at least 64 in fp32
    warps: int
    stages: int  # 3: two tiles of weights are on their way while the noise of the one before them is computed
    programs: int  # wanted: below that K is split
    least_tiles: int  # of a part of K


LINEAR_GPU = LinearLaunch(x_rows=64, w_rows=64, columns=64, warps=4, stages=3, programs=528, least_tiles=4)
LINEAR_GPU_FP32 = replace(LINEAR_GPU, x_rows=32, stages=2)  # twice the bytes, and registers hold less without tensor cores
LINEAR_INTERPRETER = LinearLaunch(x_rows=64, w_rows=256, columns=512, warps=1, stages=1, programs=1, least_tiles=1)
F_BASE = 0x3C240000
# Registers of a thread. Without a limit ptxas (of Triton 3.7) takes 96 for loops over passes and ranks, and spills; weights, two states and the sum
# of a lane are 64 of a rule's. Those with the most to keep spill at 128 too, and a block fewer on a multiprocessor costs less than that.
SOME, MANY = {"maxnreg": 128}, {"maxnreg": 168}


def loop_options(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Of `perturb_kernel` with these constants."""
    full = constants["STOCHASTIC"] and constants["SCALE"] and (constants["BIT_MASK"] or constants["RANDOM_MASK"])
    if constants["SEQUENCE"]:
        return MANY if full else SOME
    return SOME if constants["KIND"] == _kernels().LOW_RANK_8.value else {}


def update_options(rule: str, state: torch.dtype, constants: Mapping[str, Any]) -> dict[str, Any]:
    """Of `update_kernel` for a rule whose state has this type, with these constants."""
    masked = constants["BIT_MASK"] or constants["RANDOM_MASK"]
    full = masked and (rule == "hizoo" or (rule == "adam" and state == torch.bfloat16 and constants["SCALE"]))
    return MANY if full else SOME


def gpu_linear_launch(dtype: torch.dtype) -> LinearLaunch:
    return LINEAR_GPU_FP32 if dtype == torch.float32 else LINEAR_GPU


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


class Ready(NamedTuple):
    """A kernel that was compiled by a launch of the same kind, and is launched again without Triton's search for it."""

    run: Callable[..., Any]  # Triton's, over the batch's grid
    constants: tuple[Any, ...]  # the kernel's, in its order


@dataclass(frozen=True)
class Batch:
    """The tensors of a plan that one launch serves: all of them, unless some are gathered rows, or have factors, and others do not."""

    table: Tensor  # int64 [n, 14]
    spans: Tensor  # int64 [programs]
    tiles: int
    flags: dict[str, Any]
    ready: dict[Any, Ready] = field(default_factory=dict)  # by what `launch_all` chooses a kernel by

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        return self.spans.numel(), 1, 1

    @functools.cached_property
    def place(self) -> tuple[int, int, int]:
        """What the kernel is given of it, the tables by their addresses, at which nobody looks."""
        return self.table.data_ptr(), self.spans.data_ptr(), self.tiles


def _tile_counts(entry: Entry, records: np.ndarray, groups: int) -> np.ndarray:
    """For each of the entry's rows of the table, as in `perturb_kernel`."""
    if entry.rows is None:
        n, offset = (records[:, word].astype(np.int64) for word in (2, 3))
        return np.where(n > 0, -(-(offset % (16 * groups) + n) // (16 * groups)), 0)
    gathered = entry.src.numel() // entry.row_len
    row_calls = 2 * (entry.row_len // 32 if entry.row_len % 32 == 0 else (entry.row_len + 62) // 32)
    return np.array([-(-(gathered * row_calls) // groups)])


def _batch(plan: Plan, members: list[int], launch: Launch) -> Batch | None:
    """The launch that serves these entries of the plan; None if they hold no element."""
    kernels = _kernels()
    entries = [plan.entries[k] for k in members]
    first_rows = [0, *itertools.accumulate(plan.rows)]
    records = [plan.table[first_rows[k] : first_rows[k + 1]] for k in members]
    counts = np.concatenate([_tile_counts(e, own, launch.groups) for e, own in zip(entries, records, strict=True)])
    if not counts.sum():
        return None
    tiles = int(np.clip(counts.sum() // launch.programs, 1, launch.max_tiles))
    spans = -(-counts // tiles)
    tensor = np.repeat(np.arange(len(counts)), spans)
    first = (np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans)) * tiles
    scale_blocks = [e.scale_block for e in entries if e.scale is not None]
    scale = 0 if not scale_blocks else 1 if min(scale_blocks) >= 8 else 2
    flags: dict[str, Any] = {}
    if entries[0].rank:  # takes the place of the noise's kind
        eights = all(e.cols % 8 == 0 and e.right is not None and e.right.data_ptr() % 16 == 0 for e in entries)
        flags["KIND"] = (kernels.LOW_RANK_8 if eights else kernels.LOW_RANK).value
    return Batch(
        table=move(torch.from_numpy(np.concatenate(records).view(np.int64)), plan.device),
        spans=move(torch.from_numpy(tensor << kernels.TILE_BITS | first), plan.device),
        tiles=tiles,
        flags={
            "BIT_MASK": any(e.mask is not None for e in entries),
            "RANDOM_MASK": any(e.keep for e in entries),
            "SCALE": scale + kernels.RSQRT.value * any(e.rsqrt for e in entries),
            "ROWS": entries[0].rows is not None,
            "IN_PLACE": all(e.src.data_ptr() == e.dst.data_ptr() for e in entries),
            **flags,
        },
    )


def _batches(plan: Plan, launch: Launch, raw: int | None = None) -> list[Batch]:
    """The plan's launches, with their tables in order before the work that the current stream gets next. `raw`: that stream's number; None: not asked
    for yet, or of no GPU."""
    if raw is None and plan.device.type == "cuda":
        raw = torch._C._cuda_getCurrentRawStream(plan.device.index)
    found: tuple[list[Batch], int | None, Any] | None = plan.cache.get("triton")
    if found is None:
        members: dict[tuple[bool, bool], list[int]] = {}
        for k, e in enumerate(plan.entries):
            members.setdefault((e.rows is not None, e.rank > 0), []).append(k)
        batches = [b for some in members.values() if (b := _batch(plan, some, launch))]
        uploaded = None
        if plan.device.type == "cuda":
            uploaded = torch.cuda.Event()
            uploaded.record(torch.cuda.current_stream(plan.device))
        found = plan.cache["triton"] = batches, raw, uploaded
    batches, stream, uploaded = found
    # On its own stream the tables are in order, and their memory is not used again before its kernels are over. A capture begins with a synchronisation.
    if raw != stream and uploaded is not None and not capturing(plan.device):
        current = torch.cuda.current_stream(plan.device)
        current.wait_event(uploaded)
        for batch in batches:
            batch.table.record_stream(current)
            batch.spans.record_stream(current)
    return batches


# ---- the launch -------------------------------------------------------------------------------------------------------


def _signed(word: int) -> int:
    """A uint32 as the int32 of the same bits: an int above 2^31 - 1 would have another type, hence another kernel."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _float_bits(x: float) -> int:
    """Of x rounded to fp32."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(x)).value


class Values(NamedTuple):
    """What a launch gives `perturb_kernel` behind `table`, `spans` and `tiles`, in its order; the names are explained there."""

    seed_low: int
    seed_high: int
    tag0: int = 0
    tag1: int = 0
    coef0: int = 0
    coef1: int = 0
    decay_bits: int = 0
    n_terms: int = 1
    tags: Tensor | None = None
    coefs: Tensor | None = None
    terms: Tensor | None = None
    decay_ptr: Tensor | None = None
    n_passes: int = 0
    most_terms: int = 0
    firsts: Tensor | None = None
    decays: Tensor | None = None
    roundings: Tensor | None = None
    steps: Tensor | None = None
    base: int = F_BASE


class Form(NamedTuple):
    """What chooses a kernel, besides a plan: the kernel's constants of these names, kind and rounding."""

    kind: str
    stochastic: bool
    TERMS: int
    HOST_TERMS: bool
    DECAY: int = 0
    SEQUENCE: bool = False


def _halves(seed: int) -> tuple[int, int]:
    return _signed(seed & 0xFFFFFFFF), _signed(seed >> 32)


def _arguments(p: Pass, device: torch.device) -> tuple[Values, Form]:
    """Of one pass. Nothing is read back from the device.

    No term at all is given as one that is not live: the same results (docs/numerics.md, sections 4 and 5), and no variant of its own.
    """
    tags: Any
    coefs: Any
    tags, coefs = (p.tags, p.coefs) if len(p.tags) else ([0], [0.0])
    decay, stochastic, n = p.decay, p.rounding == "stochastic", len(tags)
    on_device = isinstance(decay, Tensor)
    factor = 2 if on_device else int(decay is not None)
    bits = 0 if on_device or decay is None else _float_bits(float(decay))
    pointer: Any = decay if on_device else None
    unrolled = n if n in (1, 2) else 0
    if unrolled and not isinstance(tags, Tensor):
        tag0, tag1 = *(_signed(int(tag)) for tag in tags), *[0] * (2 - n)
        coef0, coef1 = *(_float_bits(float(c)) for c in coefs), *[0] * (2 - n)
        values = Values(*_halves(p.seed), tag0, tag1, coef0, coef1, bits, n, decay_ptr=pointer)
        return values, Form(p.kind, stochastic, n, True, factor)
    if not isinstance(tags, Tensor):
        tags = move(torch.tensor(tags, dtype=torch.int64), device)
        coefs = move(torch.tensor(coefs, dtype=torch.float32), device)
    terms = None if unrolled else torch.empty(n, dtype=torch.int64, device=device)
    values = Values(
        *_halves(p.seed), decay_bits=bits, n_terms=n, tags=tags.view(torch.int32), coefs=coefs, terms=terms, decay_ptr=pointer
    )
    return values, Form(p.kind, stochastic, unrolled, False, factor)


def _constants(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """What every kernel takes."""
    import triton.language as tl

    kernels = _kernels()
    return {
        "DTYPE": {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype],
        "KIND": kernels.GAUSSIAN if kind == "gaussian" else kernels.RADEMACHER,
        "INTERPRETED": _interpreted(),
    }


def _common(seed: int, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """The same, and the noise's key."""
    low, high = _halves(seed)
    return {"seed_low": low, "seed_high": high, "base": F_BASE, **_constants(kind, dtype)}


def perturb(plan: Plan, p: Pass) -> None:
    """theta <- round(decay * theta + scale * mask * sum_k c_k z_k) for every tensor of the plan, in one launch.

    (In more where the plan mixes gathered rows, or tensors with factors, with others.) The host never waits for the device.
    """
    plan.admit(len(p.tags))
    launch_all(plan, *_arguments(p, plan.device))


def sequence(plan: Plan, passes: Passes) -> None:
    """The passes one after another, in the same number of launches."""
    plan.admit_sequence()
    n, device = len(passes), plan.device
    counts = passes.first.diff()
    values = Values(
        *_halves(passes.seed),
        n_terms=passes.tags.numel(),
        tags=passes.tags.view(torch.int32),
        coefs=passes.coefs,
        terms=torch.empty(passes.tags.numel(), dtype=torch.int64, device=device),
        n_passes=n,
        most_terms=int(counts.max()) if n else 0,
        firsts=move(passes.first, device),
        decays=passes.decay,
        roundings=move(passes.rounding, device),
        steps=torch.empty(2 * n, dtype=torch.int64, device=device),
    )
    launch_all(plan, values, Form(passes.kind, bool(passes.rounding.any()), 0, False, SEQUENCE=True))


def launch_all(plan: Plan, values: Values, form: Form) -> None:
    """A launch for each batch of the plan, on its device's current stream.

    Scratch mode calls this once a layer and forward. No value chooses a kernel (`NOT_SPECIALISED`), so that the second launch of a form needs nothing
    of Triton's but the launch itself.
    """
    raw = None
    if plan.device.type == "cuda":
        if torch._C._cuda_getDevice() != plan.device.index:
            with torch.cuda.device(plan.device):
                return launch_all(plan, values, form)
        raw = torch._C._cuda_getCurrentRawStream(plan.device.index)
    launch = INTERPRETER if _interpreted() else GPU
    for batch in _batches(plan, launch, raw):
        ready = batch.ready.get(form)
        if ready is None:
            _compile_and_launch(plan.dtype, batch, values, form, launch)
        else:
            ready.run(*batch.place, *values, *ready.constants, stream=raw)


def _compile_and_launch(dtype: torch.dtype, batch: Batch, values: Values, form: Form, launch: Launch) -> None:
    """The first launch of a form, through Triton's search for a kernel, which compiles one where it has none."""
    from triton.compiler import CompiledKernel

    kernel = _kernels().perturb_kernel
    given = {
        **_constants(form.kind, dtype),
        **{"TERMS": form.TERMS, "HOST_TERMS": form.HOST_TERMS, "DECAY": form.DECAY, "SEQUENCE": form.SEQUENCE},
        **{"STOCHASTIC": form.stochastic and dtype != torch.float32, "P": launch.groups, "NARROW": launch.narrow},
        **batch.flags,
    }
    options = {} if _interpreted() else {"num_warps": launch.warps, "enable_fp_fusion": False, **loop_options(given)}
    made = kernel[batch.grid](batch.table, batch.spans, batch.tiles, *values, **given, **options)
    if isinstance(made, CompiledKernel):  # not of the interpreter, nor one that a hook of Triton's has kept from being compiled
        batch.ready[form] = Ready(made[batch.grid], tuple(given[name] for name in kernel.arg_names if name in given))


# ---- update rules -----------------------------------------------------------------------------------------------------


def update(plan: Plan, states: States, p: RulePass) -> None:
    """(theta, states) <- rule(decay theta, states, u) for every tensor of the plan, in one launch.

    Numbers and terms travel through device memory, from the host without waiting. In a CUDA graph they lie there, and states where they lay before.
    """
    import triton.language as tl

    from zo_kernels._backends import _triton_update as kernels

    interpreted = _interpreted()
    launch = INTERPRETER if interpreted else GPU
    rule, held_as = rules.RULES[p.rule], rules.state_dtype(states)

    def there(x: Any, dtype: torch.dtype) -> Tensor:
        return x.contiguous() if isinstance(x, Tensor) else move(torch.tensor(x, dtype=dtype), plan.device)

    tags, coefs, numbers = there(p.tags, torch.int64), there(p.coefs, torch.float32), there(p.numbers, torch.float32)
    squares = None if p.squares is None else there(p.squares, torch.float32)
    table = rules.resident_table(plan, states)
    arguments = {
        **_common(p.seed, p.kind, plan.dtype),
        **{"n_terms": len(tags), "tags": tags.view(torch.int32), "coefs": coefs, "squares": squares, "numbers": numbers},
        **{"RULE": rule.code, "NUMBERS": len(rule.numbers), "P": launch.groups},
        "STATE": tl.bfloat16 if held_as == torch.bfloat16 else tl.float32,
        "STOCHASTIC": p.rounding == "stochastic" and plan.dtype != torch.float32,
    }
    for batch in _batches(plan, launch):
        flags = {name: batch.flags[name] for name in ("BIT_MASK", "RANDOM_MASK")} | {"SCALE": batch.flags["SCALE"] > 0}
        options: dict[str, Any] = {}
        if not interpreted:
            options = {"num_warps": launch.warps, "enable_fp_fusion": False, **update_options(p.rule, held_as, flags)}
        with contextlib.nullcontext() if interpreted else torch.cuda.device(plan.device):
            kernels.update_kernel[(batch.spans.numel(),)](
                batch.table, table, batch.spans, batch.tiles, **arguments, **flags, **options
            )


# ---- masks by magnitude -----------------------------------------------------------------------------------------------


def magnitude_mask(plan: Plan, limits: Tensor) -> None:
    """One launch for the plan, with the tables of its passes; `limits` lies in device memory."""
    import triton.language as tl

    from zo_kernels._backends import _triton_mask as kernels

    interpreted = _interpreted()
    launch = INTERPRETER if interpreted else GPU
    dtype = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[plan.dtype]
    for batch in _batches(plan, launch):
        options = {} if interpreted else {"num_warps": launch.warps}
        with contextlib.nullcontext() if interpreted else torch.cuda.device(plan.device):
            kernels.magnitude_mask_kernel[(batch.spans.numel(),)](
                batch.table, limits, batch.spans, batch.tiles, DTYPE=dtype, P=launch.groups, **options
            )


# ---- the perturbed linear ---------------------------------------------------------------------------------------------


def _linear_terms(p: Pass, device: torch.device) -> dict[str, Any]:
    """One term in registers, or all of them in device memory."""
    if not isinstance(p.tags, Tensor) and len(p.tags) <= 1:
        tag, coef = (int(p.tags[0]), float(p.coefs[0])) if len(p.tags) else (0, 0.0)
        one = {"tag": _signed(tag), "coef": _float_bits(coef), "n_terms": 1, "tags": None, "coefs": None, "TERMS": 1}
        return one
    tags, coefs = p.tags, p.coefs
    if not isinstance(tags, Tensor):
        tags = move(torch.tensor(tags, dtype=torch.int64), device)
        coefs = move(torch.tensor(coefs, dtype=torch.float32), device)
    return {"tag": 0, "coef": 0, "n_terms": len(tags), "tags": tags.view(torch.int32), "coefs": coefs, "TERMS": 0}


def linear(x: Tensor, weight: Entry, bias: Entry | None, p: Pass, halves: bool) -> Tensor:
    """x round(W + s)^T + round(b + s_b), in the second half of x's rows with -s; see zo_kernels/linear.py.

    `x` is contiguous, [rows, K]; `weight.src` is [N, K] with K and `weight.offset` multiples of 32. Nothing is empty.
    """
    from zo_kernels._backends import _triton_linear as kernels

    interpreted = _interpreted()
    launch = LINEAR_INTERPRETER if interpreted else gpu_linear_launch(x.dtype)
    rows, K = x.shape
    N = weight.src.shape[0]
    M = rows // 2 if halves else rows
    BM = min(launch.x_rows, max(16, 1 << (M - 1).bit_length()))
    tiles = -(-M // BM) * -(-N // launch.w_rows)
    k_tiles = -(-K // launch.columns)
    splits = max(1, min(launch.programs // tiles, k_tiles // launch.least_tiles))
    split_tiles = -(-k_tiles // splits)
    splits = -(-k_tiles // split_tiles)
    y = torch.empty(rows, N, dtype=x.dtype, device=x.device)
    shared = {
        **_linear_terms(p, x.device),
        **_common(p.seed, p.kind, x.dtype),
        "bias": None if bias is None else bias.src,
        "bias_offset": 0 if bias is None else bias.offset,
        "bias_stream": 0 if bias is None else _signed(bias.stream),
        "BIAS": bias is not None,
        "y": y,
        "partial": torch.empty(splits, rows, N, dtype=torch.float32, device=x.device) if splits > 1 else None,
        "M": M,
        "N": N,
    }
    options = {} if interpreted else {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False}
    with contextlib.nullcontext() if interpreted else torch.cuda.device(x.device):
        kernels.linear_kernel[(tiles, splits)](
            x=x, weight=weight.src, K=K, split_tiles=split_tiles, offset=weight.offset, stream=_signed(weight.stream), HALVES=halves,
            SPLIT=splits > 1, EVEN_K=K % launch.columns == 0, BM=BM, BN=launch.w_rows, BK=launch.columns, **shared, **options,
        )  # fmt: skip
        if splits > 1:
            finish = (-(-rows // 16) * -(-N // launch.w_rows),)
            kernels.finish_kernel[finish](rows=rows, splits=splits, BM=16, BN=launch.w_rows, **shared, **options)
    return y
