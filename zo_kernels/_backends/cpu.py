"""The C++ kernels for tensors in host memory: AVX-512, AVX2 or portable code, chosen at run time (csrc/cpu).

Belongs here: from a plan and passes to the call of the extension. Does not belong here: arithmetic, checks of a user's arguments.

`ZO_KERNELS_ISA` = portable, avx2 or avx512 forces an instruction set; one that this processor lacks is refused. It is read
once, at the first use. Threads: as many as `torch.get_num_threads()`, if the pass is large enough for more than one.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch

from zo_kernels import checks
from zo_kernels import update as rules
from zo_kernels._backends._extension import ISA_NAMES, extension

if TYPE_CHECKING:
    from zo_kernels.plan import Pass, Passes, Plan
    from zo_kernels.update import RulePass, States


@functools.cache
def chosen_isa() -> int:
    """The instruction set to ask for: 0 (the best one), or what ZO_KERNELS_ISA names.

    Raises:
        ValueError: it names none. RuntimeError: this processor or this build lacks it, or there is no extension that could have it.
    """
    name = os.environ.get("ZO_KERNELS_ISA")
    if not name:
        return 0
    checks.check_choice("ZO_KERNELS_ISA", name, ISA_NAMES[1:])
    module = extension()
    if isinstance(module, str):
        raise RuntimeError(f"ZO_KERNELS_ISA={name!r}, but {module}")
    names = module.ISA_NAMES
    best = module.cpu_best_isa()
    if names.index(name) > best:
        raise RuntimeError(f"ZO_KERNELS_ISA={name!r}, but the best instruction set of this processor and build is {names[best]!r}")
    return names.index(name)


def status() -> str | None:
    try:
        chosen_isa()
    except (ValueError, RuntimeError) as error:
        return str(error)
    module = extension()
    return module if isinstance(module, str) else None


def supports(device: torch.device) -> str | None:
    """As every backend's. An instruction set that was asked for by name and is refused is an error here: no other backend takes its place."""
    if device.type != "cpu":
        return f"it works on cpu tensors, not on {device.type}"
    chosen_isa()
    return None


def perturb(plan: Plan, p: Pass, isa: int | None = None) -> None:
    """One pass over one plan; `isa` (index into `_C.ISA_NAMES`) is for tests.

    Scratch mode calls this for one layer at a time, hundreds of times per forward, so what depends on the plan alone is kept in
    its cache: numpy takes longer to tell a table's address than the extension to perturb a bias.
    """
    try:
        call, address, n, dtype = plan.cache["cpu"]
    except KeyError:
        module = extension()
        if isinstance(module, str):
            raise RuntimeError(module) from None
        call, address, n, dtype = module.cpu_perturb, plan.table.ctypes.data, len(plan.table), checks.DTYPES[plan.dtype]
        plan.cache["cpu"] = call, address, n, dtype
    tags: Any = p.tags
    coefs: Any = p.coefs
    if plan.low_rank:
        plan.admit(len(tags))
    n_terms = 0  # the lists know theirs
    if type(tags) is not list:
        if isinstance(tags, torch.Tensor):
            n_terms, tags, coefs = tags.numel(), tags.data_ptr(), coefs.data_ptr()
        else:
            tags, coefs = list(tags), list(coefs)
    decay: Any = p.decay
    if decay is not None:
        decay = decay.data_ptr() if isinstance(decay, torch.Tensor) else float(decay)
    kind, rounding = checks.KINDS[p.kind], checks.ROUNDINGS[p.rounding]
    isa = chosen_isa() if isa is None else isa
    call(address, n, p.seed, dtype, kind, rounding, tags, coefs, n_terms, decay, torch.get_num_threads(), isa)


def sequence(plan: Plan, passes: Passes, isa: int | None = None) -> None:
    """All passes over each tile while it lies in L1; `isa` as in `perturb`."""
    plan.admit_sequence()
    module = extension()
    if isinstance(module, str):
        raise RuntimeError(module)
    module.cpu_sequence(
        plan.table.ctypes.data,
        len(plan.table),
        passes.seed,
        checks.DTYPES[plan.dtype],
        checks.KINDS[passes.kind],
        passes.tags.data_ptr(),
        passes.coefs.data_ptr(),
        passes.tags.numel(),
        passes.first.data_ptr(),
        passes.decay.data_ptr(),
        passes.rounding.data_ptr(),
        len(passes),
        torch.get_num_threads(),
        chosen_isa() if isa is None else isa,
    )


def update(plan: Plan, states: States, p: RulePass, isa: int | None = None) -> None:
    """A rule over each tile while it lies in L1; `isa` as in `perturb`."""
    module = extension()
    if isinstance(module, str):
        raise RuntimeError(module)
    table = rules.state_table(plan, states)
    tags, coefs, numbers, squares = p.tensors_on(plan.device)
    module.cpu_update(
        plan.table.ctypes.data,
        table.ctypes.data,
        len(plan.table),
        p.seed,
        checks.DTYPES[plan.dtype],
        checks.KINDS[p.kind],
        checks.ROUNDINGS[p.rounding],
        rules.RULES[p.rule].code,
        checks.DTYPES[rules.state_dtype(states)],
        tags.data_ptr(),
        coefs.data_ptr(),
        tags.numel(),
        numbers.data_ptr(),
        None if p.squares is None else squares.data_ptr(),
        torch.get_num_threads(),
        chosen_isa() if isa is None else isa,
    )


def magnitude_mask(plan: Plan, limits: torch.Tensor, isa: int | None = None) -> None:
    """The bit masks of |x| <= limit; `isa` as in `perturb`."""
    module = extension()
    if isinstance(module, str):
        raise RuntimeError(module)
    isa = chosen_isa() if isa is None else isa
    threads = torch.get_num_threads()
    module.cpu_magnitude_mask(plan.table.ctypes.data, limits.data_ptr(), len(plan.table), checks.DTYPES[plan.dtype], threads, isa)
