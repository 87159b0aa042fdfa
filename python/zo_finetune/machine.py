"""Facts about the machine, the process and the installed versions, for the record of a run.

Belongs here: what is asked of the system. Nothing here loads torch before it is needed: `--version` answers at once.
"""

from __future__ import annotations

import functools
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@functools.cache
def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None


def versions() -> dict[str, str | None]:
    names = ("zo_kernels", "torch", "transformers", "peft", "datasets", "gguf", "scikit-learn")
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}


def machine(device: torch.device) -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "torch_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there and KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
