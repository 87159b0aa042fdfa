"""The laws that docs/numerics.md states, with the bounds derived. Fixed seeds: a failure is a change, not bad luck.

For a mean of n independent terms of variance v, 5 sqrt(v / n) is exceeded with probability 6e-7.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import zo_kernels as zk
from zo_kernels import reference

N = 1 << 22
SEED = 2024


def z_of(tag: int, kind: str = "gaussian", n: int = N) -> torch.Tensor:
    return zk.normal(n, seed=SEED, stream=77, tag=tag, kind=kind).double()


def test_the_sixteen_numbers_have_the_stated_values_and_exact_moments() -> None:
    """By enumeration: the values of f, and variance and kurtosis of 16 f's mixed, without sampling."""
    w = torch.tensor(
        [(a << 31) | (b << 23) | (c << 22) | (d << 17) for a, b, c, d in itertools.product((0, 1), range(4), (0, 1), (0, 1))]
    )
    f = reference.bits_float((w & 0x82C20000) | 0x3C240000).double() * 2**13
    assert sorted({abs(int(v)) for v in f}) == sorted(
        {m * s for m in (82, 83, 114, 115) for s in (1, 2, 16, 32)} & {abs(int(v)) for v in f}
    )
    exact = [Fraction(m * s * sign, 1 << 13) for m in (82, 83, 114, 115) for s in (1, 2, 16, 32) for sign in (1, -1)]
    kappa = Fraction(reference.KAPPA)
    variance = 16 * kappa**2 * sum(v * v for v in exact) / len(exact)
    assert abs(float(variance) - 1) < 1.5e-5
    fourth = sum(v**4 for v in exact) / len(exact)
    second = sum(v * v for v in exact) / len(exact)
    excess = float((fourth / second**2 - 3) / 16)
    assert excess == pytest.approx(-0.0019, abs=1e-4)


def test_a_call_has_one_parity_and_its_sums_take_32_values() -> None:
    """What the mix leaves of the lattice, as numerics.md says it: of a call's 16 numbers, in units of c' 2^-13, and of their 16 signed sums
    with the signs of the mix, whose moments are exact. The mix rounds to fp32, by no more than 2^-6 units at this coefficient."""
    z = z_of(3, n=1 << 14).view(-1, 2, 2, 8).transpose(1, 2).reshape(-1, 16)
    unit = reference.gaussian_coefficients(torch.ones(1)).double() * 2.0**-13
    units = z / unit
    assert (units - units.round()).abs().max() < 2.0**-6
    parity = units.round() % 2
    assert torch.equal(parity, parity[:, :1].expand_as(parity))
    assert 0.4 < parity[:, 0].mean() < 0.6
    values = torch.tensor([m * s for m in (82, 83, 114, 115) for s in (1, 2, 16, 32)])
    sums = reference.mix(units.round()).div(16)
    assert torch.equal(sums, sums.round())
    assert torch.equal(sums.abs().unique(), values.double().sort().values)
    mean = {n: Fraction(sum(v**n for v in values.tolist()), 16) for n in (2, 4, 6, 8)}
    moments = [float(mean[n] / mean[2] ** (n // 2)) for n in (4, 6, 8)]
    assert [f"{m:.4g}" for m in moments] == ["2.97", "10.7", "41.76"]
    assert f"{values.max() / values.double().square().mean().sqrt():.3g}" == "2.06"


def test_the_law_of_the_gaussian() -> None:
    """Every figure that docs/numerics.md has of the law of one element, exactly: the convolution of the laws of sixteen f's."""
    top = 115 * 32
    law = np.zeros(2 * top + 1)
    for value in (m * s * sign for m in (82, 83, 114, 115) for s in (1, 2, 16, 32) for sign in (1, -1)):
        law[value + top] += 1 / 32
    for _ in range(4):  # the law of 2, 4, 8, 16 of them
        size = 2 * len(law) - 1
        transform = np.fft.rfft(law, 1 << size.bit_length())
        law = np.fft.irfft(transform * transform)[:size].clip(0)
    unit = reference.KAPPA * 2.0**-13
    z = unit * (np.arange(len(law)) - len(law) // 2)
    second, third, fourth = (float((law * z**k).sum()) for k in (2, 3, 4))
    assert unit == pytest.approx(1.4e-4, abs=5e-6)
    assert z.max() == pytest.approx(8.23, abs=5e-3)
    # A coefficient keeps 17 bits, so that a variance may be off by twice 2^-17; that of c = 1 is closer.
    assert abs(second - 1) < 1e-6 and 2 * 2.0**-17 < 1.6e-5
    assert abs(third) < 1e-9
    excess = fourth / second**2 - 3
    assert excess == pytest.approx(-0.0019, abs=5e-5)
    # E z_i^2 |z|^2 = d + 2 + the excess of z_i + the covariances with the fifteen others of its group, each as large.
    assert 16 * excess == pytest.approx(-0.03, abs=5e-3)
    upto = law.cumsum()
    normal = torch.special.ndtr(torch.from_numpy(z)).numpy()
    assert max(abs(upto - normal).max(), abs(upto - law - normal).max()) == pytest.approx(4.8e-5, abs=5e-7)
    for sigma, ratio in ((3, 0.994), (4, 0.945), (5, 0.783)):
        assert law[z > sigma].sum() / (math.erfc(sigma / math.sqrt(2)) / 2) == pytest.approx(ratio, abs=5e-4)


def test_gaussian_moments_and_distribution() -> None:
    z = z_of(1)
    assert abs(z.mean()) < 5 / math.sqrt(N)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / N) + 1.5e-5
    assert abs(z.pow(3).mean()) < 5 * math.sqrt(15 / N)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / N) + 0.002
    assert z.abs().max() <= 8.24
    # Kolmogorov-Smirnov: P(sup > x / sqrt(N)) = 2 exp(-2 x^2); x = 2.6 gives 3e-6; the law itself is 4.8e-5 off the normal's.
    u = torch.special.ndtr(z.sort().values)
    grid = torch.arange(1, N + 1, dtype=torch.float64) / N
    assert (u - grid).abs().max() < 2.6 / math.sqrt(N) + 4.8e-5 + 1 / N
    for sigma, ratio in ((3, 0.994), (4, 0.945)):
        p = 2 * float(torch.special.ndtr(torch.tensor(-float(sigma), dtype=torch.float64))) * ratio
        assert abs((z.abs() > sigma).double().mean() - p) < 5 * math.sqrt(p / N)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_elements_tags_and_streams_are_uncorrelated(kind: str) -> None:
    z = z_of(1, kind)
    bound = 5 / math.sqrt(N)
    for lag in (1, 2, 7, 8, 15, 16, 17, 24, 31, 32, 64, 127, 128, 1024):
        assert abs((z[lag:] * z[:-lag]).mean()) < bound * 1.01, lag
        assert abs((z[lag:].pow(3) * z[:-lag]).mean()) < 5 * math.sqrt(15 / (N - lag)), lag
    assert abs((z * z_of(2, kind)).mean()) < bound
    other = zk.normal(N, seed=SEED, stream=78, tag=1, kind=kind).double()
    assert abs((z * other).mean()) < bound
    reseeded = zk.normal(N, seed=SEED + 1, stream=77, tag=1, kind=kind).double()
    assert abs((z * reseeded).mean()) < bound


def test_rademacher_is_plus_or_minus_one() -> None:
    z = z_of(3, "rademacher")
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean()) < 5 / math.sqrt(N)
    per_place = z.view(-1, 128).mean(0)  # every place in a call on its own
    assert per_place.abs().max() < 6 / math.sqrt(N / 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fraction", [0.03, 0.25, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, fraction: float) -> None:
    """theta = 1 plus a shift of a fraction of the spacing above 1. The share rounded up is binomial with that fraction."""
    spacing = torch.finfo(dtype).eps
    theta = torch.ones(N, dtype=dtype)
    zk.perturb_([theta], [], decay=1 + fraction * spacing, rounding="stochastic", seed=SEED, streams=[1])
    up = (theta.double() - 1) / spacing
    assert set(up.unique().tolist()) <= {0.0, 1.0}
    exact = (torch.tensor(1 + fraction * spacing, dtype=torch.float32).double().item() - 1) / spacing
    assert abs(up.mean() - exact) < 5 * math.sqrt(exact * (1 - exact) / N)


def test_stochastic_rounding_is_exact_over_all_its_random_bits() -> None:
    """Not sampled: all 65,536 values of the random bits, for normal, subnormal and large results. The mean is the value itself
    (fp16 subnormals: to 2^-38)."""
    v = torch.arange(1 << 16)
    info = torch.finfo(torch.float16)
    for x in (1.0001, -3.14159, 1e-4, info.tiny * 1.3, info.tiny * 0.7, 3.3e-7, -2.0e-8, 1e-9, 60001.7):
        r = torch.full((1 << 16,), x, dtype=torch.float32)
        mean = reference.cast_stochastic(r, v, torch.float16).double().mean()
        tolerance = 2.0**-38 if abs(x) < info.tiny else 0.0
        assert abs(mean - r[0].double()) <= tolerance + 1e-18, x
        mean = reference.cast_stochastic(r, v, torch.bfloat16).double().mean()
        assert mean == r[0].double(), x


def test_small_updates_survive_stochastic_rounding() -> None:
    """bf16 weights of 1 and 1,000 updates of 1e-4: nearest loses them all, stochastic keeps their sum."""
    total = {}
    for rounding in ("nearest", "stochastic"):
        theta = torch.ones(10_000, dtype=torch.bfloat16)
        for tag in range(1000):
            # A decay is a deterministic update of theta: 1 - 1e-4.
            zk.perturb_([theta], [(tag, 0.0)], decay=1 - 1e-4, rounding=rounding, seed=SEED, streams=[2])
        total[rounding] = theta.double().mean().item()
    assert total["nearest"] == 1.0
    assert total["stochastic"] == pytest.approx((1 - 1e-4) ** 1000, rel=2e-3)


@pytest.mark.parametrize("keep", [1e-4, 0.01, 0.1, 0.5, 0.999])
def test_random_masks_keep_the_stated_fraction(keep: float) -> None:
    theta = torch.zeros(N)
    zk.perturb_([theta], [(1, 1.0)], seed=SEED, streams=[3], masks=[zk.RandomMask(keep, tag=4)])
    kept = (theta != 0).double()
    assert abs(kept.mean() - keep) < 5 * math.sqrt(keep * (1 - keep) / N) + 2.0**-32
    even, odd = kept[::2].mean(), kept[1::2].mean()
    assert abs(even - odd) < 5 * math.sqrt(4 * keep * (1 - keep) / N)
    both = (kept[::2] * kept[1::2]).mean()
    assert abs(both - keep**2) < 5 * math.sqrt(2 * keep**2 / N) + keep * 2.0**-15 + 2.0**-32
    again = torch.zeros(N)
    zk.perturb_([again], [(1, 1.0)], seed=SEED, streams=[3], masks=[zk.RandomMask(keep, tag=5)])
    overlap = (kept * (again != 0)).mean()
    assert abs(overlap - keep**2) < 5 * keep / math.sqrt(N) + 1e-9, "another tag is another mask"


def test_random_mask_probability_is_exact() -> None:
    """An element is kept where x < T, x its 32 bits and T = keep 2^32, so with probability T / 2^32 and no other: at T = x it is out, at
    T = x + 1 it is in. x: the word of its pair, whose halves the even element has swapped (docs/numerics.md, section 4)."""
    n, tag, stream = 64, 4, 3
    i = torch.arange(n)
    words = reference.words(i // 8, 3, stream, tag, SEED)[i, i % 8 // 2]
    x = torch.where(i % 2 == 0, words % 2**16 * 2**16 + words // 2**16, words)

    def kept(threshold: int) -> torch.Tensor:
        theta = torch.zeros(n)
        zk.perturb_([theta], [(1, 1.0)], seed=SEED, streams=[stream], masks=[zk.RandomMask(threshold / 2**32, tag)])
        return theta != 0

    for threshold in x.tolist():
        assert torch.equal(kept(threshold), x < threshold)
        assert torch.equal(kept(threshold + 1), x <= threshold)


def test_masked_direction_is_unbiased_with_its_inverse_scale() -> None:
    """E[mask z / p ...]: a mask on perturbation and update keeps elements' variance 1 where kept and 0 elsewhere."""
    theta = torch.zeros(N)
    zk.perturb_([theta], [(1, 1.0)], seed=SEED, streams=[3], masks=[zk.RandomMask(0.25, tag=4)], scales=[2.0])
    assert abs(theta.double().square().mean() - 1) < 5 * math.sqrt(11 / N)
