"""The C++ kernels for tensors in host memory: AVX-512, AVX2 or portable code, chosen at run time (csrc/cpu).

Belongs here: from a plan and a pass to the call of the extension. Does not belong here: arithmetic, checks of a user's arguments.

`ZO_KERNELS_ISA` = portable, avx2 or avx512 forces an instruction set; one that this processor lacks is refused. It is read
once, at the first use. Threads: as many as `torch.get_num_threads()`, if the pass is large enough for more than one.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import torch

from zo_kernels import ops

if TYPE_CHECKING:
    from types import ModuleType

    from zo_kernels.ops import Pass, Plan


@functools.cache
def extension() -> ModuleType | str:
    """zo_kernels._C, or the reason why it cannot be imported."""
    try:
        from zo_kernels import _C
    except ImportError as error:
        return f"the extension zo_kernels._C cannot be imported ({error}); build it with `pip install -e .` in the repository"
    return _C


@functools.cache
def chosen_isa() -> int:
    """The instruction set to ask for: 0 (the best one), or what ZO_KERNELS_ISA names.

    Raises:
        ValueError: it names none. RuntimeError: this processor or this build lacks it.
    """
    name = os.environ.get("ZO_KERNELS_ISA")
    module = extension()
    if not name or isinstance(module, str):
        return 0
    names = module.ISA_NAMES
    ops.check_choice("ZO_KERNELS_ISA", name, names[1:])
    best = module.cpu_best_isa()
    if names.index(name) > best:
        raise RuntimeError(f"ZO_KERNELS_ISA={name!r}, but the best instruction set of this processor and build is {names[best]!r}")
    return names.index(name)


def status() -> str | None:
    module = extension()
    if isinstance(module, str):
        return module
    try:
        chosen_isa()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def supports(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it works on cpu tensors, not on {device.type}"


def perturb(plan: Plan, p: Pass, isa: int | None = None) -> None:
    """One pass over one plan; `isa` (index into `_C.ISA_NAMES`) is for tests."""
    module = extension()
    tags, coefs, decay, n_terms = p.tags, p.coefs, p.decay, 0
    if isinstance(tags, torch.Tensor):
        n_terms, tags, coefs = tags.numel(), tags.data_ptr(), coefs.data_ptr()  # type: ignore[union-attr,assignment]
    if isinstance(decay, torch.Tensor):
        decay = decay.data_ptr()
    elif decay is not None:
        decay = float(decay)
    module.cpu_perturb(  # type: ignore[union-attr]
        plan.table.ctypes.data,
        len(plan.entries),
        p.seed,
        ops.DTYPES[plan.dtype],
        ops.KINDS[p.kind],
        ops.ROUNDINGS[p.rounding],
        tags,
        coefs,
        n_terms,
        decay,
        torch.get_num_threads(),
        chosen_isa() if isa is None else isa,
    )
