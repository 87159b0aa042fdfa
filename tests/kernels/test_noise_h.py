"""csrc/noise.h, function by function: the casts over every half and many floats, Philox against Random123's answers.

Belongs here: the scalar functions, compiled alone and called through ctypes. Does not belong here: kernels (test_cpu.py).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cases import same_bits
from tests.kernels.test_vectors import PHILOX
from zo_kernels import reference

CSRC = Path(__file__).resolve().parents[2] / "csrc"

SOURCE = """
#include "noise.h"
#define EACH(name, in, out, expression)                                                                    \\
  extern "C" void name(int64_t n, const in *x, const uint16_t *v, out *y) {                                \\
    for (int64_t k = 0; k < n; ++k) y[k] = (expression);                                                   \\
    (void)v;                                                                                               \\
  }
EACH(half_to_float, uint16_t, float, zo::half_to_float(x[k]))
EACH(bfloat_to_float, uint16_t, float, zo::bfloat_to_float(x[k]))
EACH(float_to_half, float, uint16_t, zo::float_to_half(x[k]))
EACH(float_to_bfloat, float, uint16_t, zo::float_to_bfloat(x[k]))
EACH(stochastic_half, float, uint16_t, zo::float_to_half(zo::stochastic_half_value(x[k], v[k])))
EACH(stochastic_bfloat, float, uint16_t, zo::float_to_bfloat_stochastic(x[k], v[k]))
EACH(coefficient, float, float, zo::gaussian_coefficient(x[k]))
EACH(signed_coefficient, float, float, zo::rademacher_coefficient(x[k]))
EACH(inverse_root, float, float, zo::inverse_root(x[k]))
extern "C" void philox(const uint32_t *c, uint64_t seed, uint32_t *w) {
  const zo::Words r = zo::philox(c[0], c[1], c[2], c[3], seed);
  for (int m = 0; m < 4; ++m) w[m] = r.w[m];
}
"""


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    cxx = os.environ.get("CXX") or shutil.which("c++")
    if not cxx:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("noise")
    source, library = folder / "noise.cpp", folder / "noise.so"
    source.write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-function", "-Werror"]
    subprocess.run([cxx, *flags, f"-I{CSRC}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def each(noise: ctypes.CDLL, name: str, x: Tensor, out: torch.dtype, v: Tensor | None = None) -> Tensor:
    y = torch.empty(x.shape, dtype=out)
    words = torch.zeros(x.shape, dtype=torch.int16) if v is None else v.to(torch.int16)
    getattr(noise, name)(ctypes.c_int64(x.numel()), *(ctypes.c_void_p(t.data_ptr()) for t in (x, words, y)))
    return y


HALVES = torch.arange(-(2**15), 2**15).to(torch.int16)


def floats() -> Tensor:
    """Random bits, every exponent alike, and the neighbourhood of every half and bfloat, the midpoints between them included."""
    g = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (1 << 20,), generator=g)
    halves = torch.arange(-(2**15), 2**15).to(torch.int16)
    anchors = torch.cat(
        [halves.view(torch.float16).float().view(torch.int32), halves.view(torch.bfloat16).float().view(torch.int32)]
    )
    steps = torch.tensor([0, 1, -1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
    near = (anchors.long()[:, None] + steps).flatten()
    return torch.cat([anything, near]).to(torch.int32).view(torch.float32)


def test_every_half_and_bfloat(noise: ctypes.CDLL) -> None:
    assert same_bits(each(noise, "half_to_float", HALVES, torch.float32), HALVES.view(torch.float16).float())
    assert same_bits(each(noise, "bfloat_to_float", HALVES, torch.float32), HALVES.view(torch.bfloat16).float())


def test_nearest_casts_equal_torch(noise: ctypes.CDLL) -> None:
    x = floats()
    assert same_bits(each(noise, "float_to_half", x, torch.float16), x.half())
    assert same_bits(each(noise, "float_to_bfloat", x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize(("name", "dtype"), [("stochastic_half", torch.float16), ("stochastic_bfloat", torch.bfloat16)])
def test_stochastic_casts_equal_reference(noise: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    x = floats()
    for v in (torch.zeros(x.shape), torch.full(x.shape, 0xFFFF), torch.randint(0, 1 << 16, x.shape)):
        v = v.long()
        assert same_bits(each(noise, name, x, dtype, v), reference.cast_stochastic(x, v, dtype))


def test_gaussian_coefficients_equal_reference(noise: ctypes.CDLL) -> None:
    x = floats()  # by value: a dead term may be 0 or -0
    assert torch.equal(each(noise, "coefficient", x, torch.float32), reference.gaussian_coefficients(x))


def test_rademacher_coefficients(noise: ctypes.CDLL) -> None:
    """As they are from 2^-100 on, and dead below."""
    edge = torch.tensor([2.0**-100, -(2.0**-100)])
    x = torch.cat([floats(), edge, edge.nextafter(torch.zeros(2)), edge.nextafter(2 * edge)])
    live = x.isfinite() & (x.double().abs() >= 2.0**-100)
    assert torch.equal(each(noise, "signed_coefficient", x, torch.float32), torch.where(live, x, 0.0))


def test_inverse_roots_round_twice(noise: ctypes.CDLL) -> None:
    """RN(1 / RN(sqrt(x))), and not the root of a quotient; of 0 an infinity, of what has no root a NaN."""
    x = floats()
    assert same_bits(each(noise, "inverse_root", x, torch.float32), 1.0 / reference.exact_sqrt(x))


@pytest.mark.parametrize("line", PHILOX.strip().splitlines())
def test_philox_known_answers(noise: ctypes.CDLL, line: str) -> None:
    numbers = [int(x, 16) for x in line.replace("|", " ").split()]
    counter, words = np.array(numbers[:4], dtype=np.uint32), np.zeros(4, dtype=np.uint32)
    seed = ctypes.c_uint64(numbers[4] | numbers[5] << 32)
    noise.philox(ctypes.c_void_p(counter.ctypes.data), seed, ctypes.c_void_p(words.ctypes.data))
    assert words.tolist() == numbers[6:]
