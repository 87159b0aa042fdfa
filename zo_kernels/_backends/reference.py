"""The reference as a backend: `zo_kernels.reference` on any device."""

from __future__ import annotations

import torch

from zo_kernels.reference import perturb as perturb  # the interface's third and fourth functions
from zo_kernels.reference import sequence as sequence


def status() -> str | None:
    return None


def supports(device: torch.device) -> str | None:
    return None
