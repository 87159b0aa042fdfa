"""The backends behind one small interface, and the choice between them.

(The folder has an underscore because `zo_kernels.backends` is the public function.)

A backend is a module here with six functions:

    status() -> str | None            None if it can run in this process, otherwise the reason why not, in one line
    supports(device) -> str | None    None if it can work on tensors of this device, otherwise the reason why not
    perturb(plan, p) -> None          one pass over one plan (`plan.Plan`, `plan.Pass`), on the device's current stream
    sequence(plan, passes) -> None    many passes, one after another (`plan.Passes`), in one launch
    update(plan, states, p) -> None   an update rule over one plan and its states (`update.States`, `update.RulePass`)
    magnitude_mask(plan, limits) -> None    the bit masks of |x| <= limit of a plan (`ops.magnitude_masks`)

and, where it has a kernel for it, a seventh: linear(x, weight, bias, p, halves), the perturbed linear (`zo_kernels/linear.py`).

Belongs here: the registry. Does not belong here: checks of a user's arguments (checks.py), arithmetic (each backend's own file).
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

from zo_kernels.plan import Plan

NAMES = ("cuda", "triton", "cpu", "reference")
# In order of preference, by type of device. Triton's interpreter also serves CPU tensors, to those who ask for it: it is a test bench.
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


@functools.cache
def load(name: str) -> ModuleType:
    if name not in NAMES:
        raise ValueError(f"backend={name!r} must be one of {', '.join(map(repr, NAMES))}, or None for the best one")
    return importlib.import_module(f"zo_kernels._backends.{name}")


@functools.cache
def _pick(device_type: str, index: int | None, name: str | None) -> ModuleType:
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    if name is not None:
        module = load(name)
        reason = module.supports(device) or module.status()
        if reason:
            raise RuntimeError(f"backend={name!r} was asked for and cannot serve {device}: {reason}")
        return module
    refused: list[str] = []
    for candidate in PREFERENCE.get(device_type, ("reference",)):
        module = load(candidate)
        if not (reason := module.supports(device) or module.status()):
            if refused and candidate == "reference":
                warnings.warn(
                    f"tensors on {device} are served by the reference in plain PyTorch, which is a hundred times slower and more: {'; '.join(refused)}",
                    stacklevel=3,
                )
            return module
        refused.append(f"{candidate}: {reason}")
    raise RuntimeError(f"no backend can serve device {device}; see `python -m zo_kernels`")


def pick(device: torch.device, name: str | None = None) -> ModuleType:
    """The backend for `device`. An explicit request (argument, else `ZO_KERNELS_BACKEND`) is obeyed or refused with the
    reason, never silently replaced."""
    return _pick(device.type, device.index, name or os.environ.get("ZO_KERNELS_BACKEND") or None)


def of(plan: Plan, name: str | None = None) -> ModuleType:
    """`pick` for a plan, which stays with what its first pass was given."""
    chosen: ModuleType | None = plan.cache.get(f"of {name}")
    if chosen is None:
        chosen = plan.cache[f"of {name}"] = pick(plan.device, name)
    return chosen


def backends() -> dict[str, str | None]:
    """Every backend's name, with None if it is available in this process, or the reason why it is not."""
    return {name: load(name).status() for name in NAMES}
