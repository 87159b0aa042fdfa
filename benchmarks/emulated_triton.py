"""A GPU of Triton's that is emulated: nothing is compiled for it, and nothing runs on it.

Belongs here: the driver, kernels that only note their launches, and the launches that launches.py times and tests count. Does not belong here: what kernels
compute (tests/kernels/interpreter.py), or are made of (sass_triton.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from zo_kernels._backends import _triton_kernels as kernels
from zo_kernels._backends import triton as backend
from zo_kernels.plan import Entry, Pass, Plan

STREAM = 77
SHAPES = [(64, 64), (64,), (256, 64), (256,)]  # of a fill: some tensors, whatever their size
FORMS: dict[str, Callable[[int], Pass]] = {
    "one term": lambda k: Pass(5, [k], [1e-3]),
    "update": lambda k: Pass(5, [k], [1e-3], 0.999, "gaussian", "stochastic"),
    "terms on the device": lambda k: Pass(5, torch.tensor([k]), torch.tensor([1e-3])),
}


class Gpu:
    """`noted`: of each launch the kernel, the grid, the stream and all arguments. `compiled`: how many kernels were asked for."""

    def __init__(self) -> None:
        self.noted: list[tuple[int, tuple[int, int, int], int, tuple[Any, ...]]] = []
        self.compiled = 0

    def launches(self) -> list[tuple[Any, ...]]:
        """What a real one would have seen of each: addresses in the place of tensors, and of a constant its value."""
        return [
            (number, grid, stream, *(a.data_ptr() if isinstance(a, Tensor) else getattr(a, "value", a) for a in given))
            for number, grid, stream, given in self.noted
        ]

    # What Triton asks its driver, and the compiler.

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def compile(self, src: Any, target: Any = None, options: Any = None, **_: Any) -> Noted:
        self.compiled += 1
        return Noted(self, src)


class Noted(CompiledKernel):  # type: ignore[misc]
    """A kernel of Triton's, with handles that are there already."""

    def __init__(self, gpu: Gpu, src: Any) -> None:
        self.src, self.gpu, self.number = src, gpu, gpu.compiled
        self.name, self.hash, self.metadata = "noted", "", SimpleNamespace()
        self.module, self.function, self.packed_metadata = object(), object(), ()
        self._run = self.note

    def note(self, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, launch: Any, *rest: Any) -> None:
        _, _, *given = rest  # behind the hooks of a launch
        self.gpu.noted.append((self.number, (x, y, z), stream, tuple(given)))


@contextmanager
def emulated() -> Iterator[Gpu]:
    """`perturb_kernel` on such a GPU, which knows no kernel yet. Weights in host memory stand for the GPU's."""
    gpu, kernel = Gpu(), kernels.perturb_kernel
    with (
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(triton.compiler, "compile", gpu.compile),
        mock.patch.object(kernel, "device_caches", defaultdict(kernel.create_binder)),
    ):
        yield gpu


# ---- launches ---------------------------------------------------------------------------------------------------------


def plan_of(dtype: torch.dtype = torch.bfloat16) -> Plan:
    weights = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    return Plan(tuple(Entry(w, torch.zeros_like(w), k) for k, w in enumerate(weights)), torch.device("cpu"), dtype)


def ways(form: Callable[[int], Pass]) -> dict[str, Callable[[], None]]:
    plan, passes = plan_of(), [form(k) for k in range(16)]
    backend.perturb(plan, passes[0])
    (batch,) = plan.cache["triton"][0]
    turn = iter(range(1 << 60))

    def ready() -> None:
        backend.perturb(plan, passes[next(turn) % 16])

    def search() -> None:
        batch.ready.clear()
        ready()

    return {"search": search, "ready": ready}
