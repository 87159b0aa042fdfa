"""Every backend reads every vector file: here the ones that need no arrangement; test_cuda_host.py has the CUDA body on the host,
test_triton.py the interpreter."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import pytest
import torch

import zo_kernels as zk
from tests.vectors.make import check, vectors
from zo_kernels import _backends, reference
from zo_kernels._backends import cpu

ISAS = ("portable", "avx2", "avx512")
BACKENDS = [
    pytest.param("reference", "cpu"),
    *[pytest.param(isa, "cpu") for isa in ISAS],
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]

PHILOX = """
0 0 0 0 | 0 0                                           6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff | ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 | a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("v", vectors())
def test_vector(v: dict[str, Any], backend: str, device: str) -> None:
    if backend not in ISAS:
        module = _backends.load(backend)
        check(v, module.perturb, module.sequence, device)
        return
    if reason := cpu.status():
        pytest.skip(reason)
    index = cpu.extension().ISA_NAMES.index(backend)
    if index > cpu.extension().cpu_best_isa():
        pytest.skip(f"this processor or build has no {backend}")
    check(v, functools.partial(cpu.perturb, isa=index), functools.partial(cpu.sequence, isa=index))


@pytest.mark.parametrize("backend", ["reference", "cpu", *[pytest.param(b, marks=pytest.mark.gpu) for b in ("triton", "cuda")]])
def test_anchor(backend: str) -> None:
    device = "cuda" if backend in ("triton", "cuda") else "cpu"
    z = zk.normal(1 << 20, seed=0x0123456789ABCDEF, stream=5, tag=7, backend=backend, device=device).cpu()
    assert [x.hex() for x in z[:2].tolist()] == ["0x1.a984940000000p-2", "0x1.bac3c60000000p-1"]
    digest = hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "201b75e12fbad6b3abf3a31fcf35c9fb4b9e05893676c4f20f16e0c8d158e83b"


@pytest.mark.parametrize("line", PHILOX.strip().splitlines())
def test_philox_known_answers(line: str) -> None:
    """Random123's own vectors, in the reference; the other backends' Philox is pinned by the vectors above."""
    numbers = [int(x, 16) for x in line.replace("|", " ").split()]
    c, key, want = numbers[:4], numbers[4] | numbers[5] << 32, numbers[6:]
    assert [int(w) for w in reference.philox(*(torch.tensor(x) for x in c), key)] == want
