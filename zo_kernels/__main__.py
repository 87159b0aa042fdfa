"""`python -m zo_kernels`: which backends are available in this process, which are not, and why."""

from __future__ import annotations

import platform
import sys

import torch

import zo_kernels


def main() -> int:
    devices = ["cpu"] + [f"cuda:{k} ({torch.cuda.get_device_name(k)})" for k in range(torch.cuda.device_count())]
    print(
        f"zo_kernels {zo_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {', '.join(devices)}"
    )
    for name, reason in zo_kernels.backends().items():
        print(f"  {name:<10} {'available' if reason is None else f'not available: {reason}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
