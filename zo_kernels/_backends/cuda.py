"""The CUDA kernel for tensors on an NVIDIA GPU of compute capability 8.0 or newer (csrc/cuda).

Belongs here: from a plan and a pass to one launch on the device's current stream. Does not belong here: arithmetic, checks of a
user's arguments.

Nothing is read back and nothing waits for the device. Terms that are numbers travel as kernel arguments (up to 8) or through a
pinned buffer; terms in device memory are read by the kernel. What depends on the plan alone (its table and its work map, in device
memory) is uploaded at the plan's first pass and kept in its cache.

CUDA graphs: a pass can be captured once its plan has run once outside the capture. The graph then reads device terms and a device
decay anew at each replay; numbers are frozen into it, and more than 8 of them are refused during a capture. As for every graph,
the plan and the term tensors must outlive it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels import checks
from zo_kernels import update as rules
from zo_kernels._backends._extension import extension
from zo_kernels.plan import move

if TYPE_CHECKING:
    from zo_kernels.plan import Pass, Passes, Plan
    from zo_kernels.update import RulePass, States

SPAN = 2048  # ZO_CUDA_SPAN: elements that a block works on at a time
BLOCKS = 6  # of 128 threads that a multiprocessor holds (perturb.cu)
GENERAL, LEAN, EXTENDED = range(3)  # zo_form


def status() -> str | None:
    module = extension()
    if isinstance(module, str):
        return module
    if not module.WITH_CUDA:
        return "the extension was built without CUDA; with nvcc at hand, rebuild with ZO_KERNELS_CUDA=1"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if problem := module.cuda_status():
        return f"the CUDA runtime that the extension was built with finds no device ({problem}): it may need a newer driver than torch's"
    return None


def supports(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it works on cuda tensors, not on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernel is compiled for compute capability 8.0 and newer, this device has {major}.{minor}"
    return None


# ---- the work map -----------------------------------------------------------------------------------------------------


def tile_size(elements: int, multiprocessors: int) -> int:
    """Elements of a tile: at least 8 rounds of blocks, so that the last, unfinished round is short beside the whole, and at most
    16 spans, after which a tile's preparations no longer count."""
    return SPAN * min(16, max(1, elements // (8 * BLOCKS * multiprocessors * SPAN)))


def work_map(table: np.ndarray, tile: int) -> np.ndarray:
    """uint32 [tiles, 2]: (tensor, tile of that tensor) for every block of the launch; see zo_cuda_perturb in zo_kernels.h."""
    numel, offset, row_len = (table[:, k].astype(np.int64) for k in (2, 3, 8))
    rows = table[:, 7] != 0
    counts = -(-(numel + np.where(rows, 0, offset % 32)) // tile)
    odd = rows & (row_len % 32 != 0)
    counts[odd] = numel[odd] // row_len[odd] * -(-(row_len[odd] + 31) // tile)
    counts[numel == 0] = 0
    result = np.empty((int(counts.sum()), 2), dtype=np.uint32)
    result[:, 0] = np.repeat(np.arange(len(table)), counts)
    result[:, 1] = np.arange(len(result)) - np.repeat(np.cumsum(counts) - counts, counts)
    return result


@dataclass
class Resident:
    """What a plan keeps in device memory, and everything of a launch that depends on the plan alone.

    `stream` is the raw stream that the tables were last in order with; `ready` was recorded after the upload, None once it is over.
    """

    table: Tensor
    map: Tensor
    launch: tuple[int, int, int, int]  # table, map, tiles, tile, as zo_cuda_perturb takes them
    form: int  # zo_form; of a lean one, if the pass has no decay
    dtype: int
    index: int
    stream: int
    ready: torch.cuda.Event | None


def form_of(plan: Plan) -> int:
    """Which kernels serve the plan."""
    return EXTENDED if plan.extended else LEAN if plan.plain else GENERAL


def make_resident(plan: Plan, index: int, raw: int) -> Resident:
    tile = tile_size(int(plan.table[:, 2].sum()), torch.cuda.get_device_properties(index).multi_processor_count)
    blocks = work_map(plan.table, tile)
    table, blocks_there = (
        move(torch.from_numpy(array), plan.device) for array in (plan.table.view(np.int64), blocks.view(np.int32))
    )
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(index))
    launch = table.data_ptr(), blocks_there.data_ptr(), len(blocks), tile
    return Resident(table, blocks_there, launch, form_of(plan), checks.DTYPES[plan.dtype], index, raw, ready)


def resident(plan: Plan, r: Resident | None, index: int, raw: int) -> Resident:
    """The plan's tables, in order before the work that stream `raw` gets next: uploaded, or waited for by another stream."""
    capturing = torch.cuda.is_current_stream_capturing()
    if r is None:
        if capturing:
            raise RuntimeError("a CUDA graph is being captured and this pass has never run: run it once before the capture")
        r = plan.cache["cuda"] = make_resident(plan, index, raw)
    elif not capturing:  # a capture begins with a device synchronisation
        stream = torch.cuda.current_stream(index)
        if r.ready is not None:
            if r.ready.query():
                r.ready = None
            else:
                stream.wait_event(r.ready)
        r.table.record_stream(stream)
        r.map.record_stream(stream)
    return r


# ---- the pass ---------------------------------------------------------------------------------------------------------


def staged(values: Sequence[Any], dtype: type, device: torch.device) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{len(values)} terms given as numbers cannot be captured in a CUDA graph: give two device tensors, or fewer terms"
        )
    return move(torch.from_numpy(np.asarray(values, dtype=dtype)), device)


def perturb(plan: Plan, p: Pass) -> None:
    """One launch for the plan. Returns before it is over.

    Scratch mode calls this once a layer and forward, so the usual case, the plan's own stream on the current device, asks torch for
    nothing but that stream's number.
    """
    r: Resident | None = plan.cache.get("cuda")
    current = torch.cuda.current_device() if r is None else torch._C._cuda_getDevice()
    index = (current if plan.device.index is None else plan.device.index) if r is None else r.index
    if index != current:
        with torch.cuda.device(index):
            return perturb(plan, p)
    raw = torch._C._cuda_getCurrentRawStream(index)
    if r is None or r.stream != raw:
        r = resident(plan, r, index, raw)
    module = extension()
    if isinstance(module, str):
        raise RuntimeError(module)
    tags: Any = p.tags
    coefs: Any = p.coefs
    n_terms = len(tags)
    plan.admit(n_terms)
    if isinstance(tags, Tensor):
        tags, coefs = tags.data_ptr(), coefs.data_ptr()
    elif n_terms > module.INLINE_TERMS:
        on_device = staged(tags, np.int64, plan.device), staged(coefs, np.float32, plan.device)
        tags, coefs = (t.data_ptr() for t in on_device)
    elif type(tags) is not list:
        tags, coefs = list(tags), list(coefs)
    decay: Any = p.decay
    if decay is not None:
        decay = decay.data_ptr() if isinstance(decay, Tensor) else float(decay)
    form = GENERAL if r.form == LEAN and decay is not None else r.form
    kind, rounding = checks.KINDS[p.kind], checks.ROUNDINGS[p.rounding]
    module.cuda_perturb(*r.launch, form, p.seed, r.dtype, kind, rounding, tags, coefs, n_terms, decay, raw)


def on_current_stream(plan: Plan) -> tuple[Resident, int]:
    """The plan's tables, ready on the current stream of the current device, the plan's; and that stream's number."""
    index = torch.cuda.current_device()
    raw = torch._C._cuda_getCurrentRawStream(index)
    r: Resident | None = plan.cache.get("cuda")
    return (r if r is not None and r.stream == raw else resident(plan, r, index, raw)), raw


def sequence(plan: Plan, passes: Passes) -> None:
    """All passes over each group of weights while it lies in registers: one launch, after a small one that prepares the terms."""
    plan.admit_sequence()
    module = extension()
    if isinstance(module, str):
        raise RuntimeError(module)
    with torch.cuda.device(plan.device):
        r, raw = on_current_stream(plan)
        n, n_terms = len(passes), passes.tags.numel()
        scratch = torch.empty(16 * n + 8 * n_terms, dtype=torch.uint8, device=plan.device)  # ZO_CUDA_SCRATCH
        there = (move(passes.first, plan.device), passes.decay, move(passes.rounding, plan.device))
        first, decays, roundings = (t.data_ptr() for t in there)
        tags, coefs = passes.tags.data_ptr(), passes.coefs.data_ptr()
        terms = (tags, coefs, n_terms, first, decays, roundings, n, scratch.data_ptr())
        module.cuda_sequence(*r.launch, r.form, passes.seed, r.dtype, checks.KINDS[passes.kind], *terms, raw)


# ---- update rules -----------------------------------------------------------------------------------------------------


def update(plan: Plan, states: States, p: RulePass) -> None:
    """One launch for the plan and its states. Returns before it is over; numbers in device memory are read by the kernel."""
    module = extension()
    if isinstance(module, str):
        raise RuntimeError(module)
    with torch.cuda.device(plan.device):
        r, raw = on_current_stream(plan)
        table = rules.resident_table(plan, states)
        inline = not isinstance(p.tags, Tensor) and len(p.tags) <= module.INLINE_TERMS
        given: list[Any] = [p.tags, p.coefs, p.numbers, p.squares]
        kept: list[Tensor] = []  # until the launch
        for k, x in enumerate(given):
            if x is None:
                continue
            if isinstance(x, Tensor):
                kept.append(x.contiguous())
            elif k != 2 and not inline:
                kept.append(staged(x, np.int64 if k == 0 else np.float32, plan.device))
            else:
                given[k] = list(x)
                continue
            given[k] = kept[-1].data_ptr()
        tags, coefs, numbers, squares = given
        options = checks.DTYPES[plan.dtype], checks.KINDS[p.kind], checks.ROUNDINGS[p.rounding], rules.RULES[p.rule].code
        held_as = checks.DTYPES[rules.state_dtype(states)]
        module.cuda_update(*r.launch, table.data_ptr(), p.seed, *options, held_as, tags, coefs, len(p.tags), numbers, squares, raw)


# ---- masks by magnitude -----------------------------------------------------------------------------------------------


def magnitude_mask(plan: Plan, limits: Tensor) -> None:
    """One launch for the plan, with the tables of its passes; `limits` lies in device memory."""
    module = extension()
    if isinstance(module, str):
        raise RuntimeError(module)
    with torch.cuda.device(plan.device):
        r, raw = on_current_stream(plan)
        module.cuda_magnitude_mask(*r.launch, limits.data_ptr(), r.dtype, raw)
